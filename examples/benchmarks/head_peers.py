"""The loss of both heads on a GPU: the limit, ours, and every implementation it is compared with, in one run.

What peers compute differs: Liger and TRL a divergence over the whole vocabulary from both heads; CCE and Liger's fused
cross-entropy the student's head alone. None of them finds a top k or computes a gate.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from nemo_tropd import objectives
from nemo_tropd.batch import LossTokens, TeacherScores
from nemo_tropd.loss import inputs
from nemo_tropd.loss.head import head_loss, teacher_scores, token_scores
from nemo_tropd.loss.inputs import HeadLayout

TOP_K = 64
VOCABULARY = 151936
PAIRS = ((1536, 3584), (2560, 5120))
TOKENS = (2048, 8192, 32768)
ERROR_TOKENS = 512  # of the fp32 reference


@dataclass(frozen=True)
class Problem:
    """Random hidden states and heads on the GPU; sampled tokens are drawn from the student."""

    hidden: Tensor  # [T, H]
    weight: Tensor  # [V, H]
    teacher_hidden: Tensor
    teacher_weight: Tensor
    tokens: LossTokens

    @classmethod
    def random(cls, tokens: int, pair: tuple[int, int], dtype: torch.dtype = torch.bfloat16) -> Problem:
        """Fresh inputs on every call."""

        def normal(rows: int, columns: int, scale: float = 1.0) -> Tensor:
            return (torch.randn(rows, columns, device="cuda", dtype=torch.float32) * scale).to(dtype)

        hidden, weight = normal(tokens, pair[0]), normal(VOCABULARY, pair[0], 0.05)
        drawn = [(part @ weight.t()).float().softmax(-1).multinomial(1)[:, 0] for part in hidden.split(512)]
        loss_tokens = LossTokens(
            rows=torch.arange(tokens, device="cuda"),
            token_ids=torch.cat(drawn),
            guided=torch.zeros(tokens, dtype=torch.bool, device="cuda"),
            uniforms=torch.rand(tokens, device="cuda"),
            behavior_log_probs=torch.full((tokens,), float("nan"), device="cuda"),
            sequence=torch.zeros(tokens, dtype=torch.int64, device="cuda"),
        )
        return cls(hidden, weight, normal(tokens, pair[1]), normal(VOCABULARY, pair[1], 0.05), loss_tokens)

    def leaves(self) -> tuple[Tensor, Tensor]:
        """Hidden states and weight of the student, to take gradients of."""
        return self.hidden.detach().requires_grad_(True), self.weight.detach().requires_grad_(True)


@dataclass(frozen=True)
class Cost:
    milliseconds: float  # median
    peak_gib: float  # above what the inputs hold; the head weight's gradient apart where there is one
    error: float | None = None  # of both gradients, relative to fp32


Step = Callable[[Problem], tuple[Tensor, Tensor] | None]


def ours(chunk_tokens: int | None = None) -> Step:
    """TrOPD by the chunked head; gradients of hidden states and weight."""

    layout = HeadLayout(VOCABULARY, chunk_tokens=chunk_tokens)

    def step(p: Problem) -> tuple[Tensor, Tensor]:
        h, w = p.leaves()
        scores = teacher_scores(
            p.teacher_hidden[None], p.teacher_weight, p.tokens.rows, p.tokens.token_ids, TOP_K, layout
        )
        out = head_loss(h[None], w, p.tokens, scores, objectives.build("tropd"), layout, scale=1 / len(p.tokens))
        out.loss.backward()
        assert h.grad is not None and w.grad is not None
        return h.grad, w.grad

    return step


def plain_loss(h: Tensor, w: Tensor, p: Problem) -> Tensor:
    """TrOPD the way one writes it first: two log-softmaxes over [T, V]."""
    ids = p.tokens.token_ids[:, None]
    teacher = (p.teacher_hidden @ p.teacher_weight.t()).float().log_softmax(-1)
    student = (h @ w.t()).float().log_softmax(-1)
    top = teacher.topk(TOP_K, -1)
    scores = TeacherScores(teacher.gather(1, ids)[:, 0], top.values, top.indices)
    loss, _ = objectives.build("tropd")(
        token_scores(student.gather(1, torch.cat([ids, top.indices], 1)), p.tokens, scores)
    )
    return loss.mean()


def plain(compiled: bool) -> Step:
    """Two log-softmaxes over [T, V], as they are or through torch.compile."""
    loss = torch.compile(plain_loss) if compiled else plain_loss

    def step(p: Problem) -> tuple[Tensor, Tensor]:
        h, w = p.leaves()
        loss(h, w, p).backward()
        assert h.grad is not None and w.grad is not None
        return h.grad, w.grad

    return step


def liger_jsd(p: Problem) -> None:
    """Liger 0.8.5's chunked fused linear JSD, both heads."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    h, w = p.leaves()
    loss = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.5, compiled=True)
    out = loss(h, w, p.teacher_hidden, p.teacher_weight, p.tokens.token_ids)
    (out[0] if isinstance(out, tuple) else out).backward()


def trl_divergence(beta: float) -> Step:
    """TRL 1.16's chunked divergence: forward KL at 0, reverse KL at 1, JSD between."""

    def step(p: Problem) -> None:
        from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

        h, w = p.leaves()
        out = ChunkedDivergenceFunction.apply(h, w, None, p.teacher_hidden, p.teacher_weight, None, beta)
        out[0].mean().backward()

    return step


def cce(p: Problem) -> None:
    """CCE 25.1.1's linear cross-entropy: the student's head alone."""
    from cut_cross_entropy import linear_cross_entropy

    h, w = p.leaves()
    linear_cross_entropy(h, w, p.tokens.token_ids, impl="cce").backward()


# Name -> (a maker of the step, whether it computes TrOPD)
PEERS: dict[str, tuple[Callable[[], Step], bool]] = {
    "plain torch: TrOPD": (lambda: plain(False), True),
    "torch.compile: TrOPD": (lambda: plain(True), True),
    "Liger 0.8.5: fused linear JSD": (lambda: liger_jsd, False),
    "TRL 1.16: forward KL": (lambda: trl_divergence(0.0), False),
    "TRL 1.16: JSD": (lambda: trl_divergence(0.5), False),
    "CCE 25.1.1: cross-entropy, one head": (lambda: cce, False),
}


def median_ms(step: Callable[[], object], repeats: int = 5, warm_up: int = 2) -> float:
    """Of ``repeats`` timed runs, by device events."""
    for _ in range(warm_up):
        step()
    torch.cuda.synchronize()
    times = []
    for _ in range(repeats):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        step()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end))
    return sorted(times)[len(times) // 2]


def cost(step: Step, problem: Problem, *, repeats: int = 5, weight_gradient: bool = True) -> Cost:
    """Time and peak. The weight's gradient, in the weight's dtype, is not counted where the step makes one."""
    for _ in range(2):
        step(problem)
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step(problem)
    torch.cuda.synchronize()
    own = problem.weight.numel() * problem.weight.element_size() if weight_gradient else 0
    peak = (torch.cuda.max_memory_allocated() - before - own) / 2**30
    return Cost(median_ms(lambda: step(problem), repeats, 0), peak)


def limit_ms(problem: Problem, most: int = 8192) -> float:
    """The four products of the two heads on random data; beyond ``most`` tokens in proportion."""
    count = min(most, problem.hidden.size(0))
    h, t, w, tw = problem.hidden[:count], problem.teacher_hidden[:count], problem.weight, problem.teacher_weight
    logits = torch.empty(count, VOCABULARY, device="cuda", dtype=h.dtype)
    total = median_ms(lambda: torch.mm(t, tw.t(), out=logits)) + median_ms(lambda: torch.mm(h, w.t(), out=logits))
    logits.normal_()
    back_h, back_w = torch.empty_like(h), torch.empty_like(w)
    total += median_ms(lambda: (torch.mm(logits, w, out=back_h), torch.mm(logits.t(), h, out=back_w)))
    return total * problem.hidden.size(0) / count


def gradient_error(step: Step, pair: tuple[int, int]) -> float:
    """Both gradients of a TrOPD step against the plain loss in fp32 on the same inputs."""
    p = Problem.random(ERROR_TOKENS, pair)
    got = step(p)
    assert got is not None
    wide = Problem(p.hidden.float(), p.weight.float(), p.teacher_hidden.float(), p.teacher_weight.float(), p.tokens)
    h, w = wide.leaves()
    plain_loss(h, w, wide).backward()
    assert h.grad is not None and w.grad is not None
    # Gates drawn within rounding of their probability may fall either way: such tokens are left out of both.
    rows = (got[0].float() - h.grad).norm(dim=-1) < 0.1 * h.grad.norm(dim=-1)
    assert rows.float().mean() > 0.9, "gradients of more than a tenth of the tokens differ by more than 10%"
    return float((got[0].float() - h.grad)[rows].norm() / h.grad[rows].norm())


@contextmanager
def in_turn() -> Iterator[None]:
    """One chunk after another, without streams beside each other."""
    from nemo_tropd.loss import head

    original = head.run_chunks

    def one_after_another(*arguments: Any, slots: int, device: torch.device) -> None:
        original(*arguments, slots=1, device=device)

    setattr(head, "run_chunks", one_after_another)  # noqa: B010 - another signature
    try:
        yield
    finally:
        head.run_chunks = original


def table(tokens: int, pair: tuple[int, int], chunks: tuple[int | None, ...] = (None, 1024, 4096)) -> Table:
    """Limit, ours and peers at one size, every row measured in this process."""
    problem = Problem.random(tokens, pair)
    limit = limit_ms(problem)
    title = f"T {tokens:,}, V {VOCABULARY:,}, H {pair[0]} from {pair[1]}, bf16, {torch.cuda.get_device_name()}"
    out = Table("loss of both heads", "ms", "x limit", "extra peak GiB", "gradient error", title=title)
    out.add_row("limit: four matrix products", f"{limit:.2f}", "1", "", "")

    def row(name: str, step: Step, *, exact: bool) -> None:
        try:
            c = cost(step, problem)
            error = f"{gradient_error(step, pair):.1e}" if exact else ""
            out.add_row(name, f"{c.milliseconds:.2f}", f"{c.milliseconds / limit:.3f}", f"{c.peak_gib:.2f}", error)
        except torch.OutOfMemoryError:
            out.add_row(name, "out of memory", "", "", "")
        except ImportError as problem_:
            out.add_row(name, f"not installed ({problem_.name})", "", "", "")
        gc.collect()
        torch.cuda.empty_cache()

    for chunk in chunks:
        name = (
            f"chunks of {chunk}"
            if chunk
            else f"chunks of {inputs.chunk_size(tokens, VOCABULARY, problem.hidden, None)}"
        )
        row(f"ours: TrOPD, {name}", ours(chunk), exact=True)
    with in_turn():
        row("ours: one after another", ours(None), exact=False)
    for name, (make, exact) in PEERS.items():
        row(name, make(), exact=exact)
    if tokens <= 8192:
        logits = torch.empty(tokens, VOCABULARY, device="cuda", dtype=torch.bfloat16).normal_()
        out.add_row(
            "torch.topk of the teacher's logits alone", f"{median_ms(lambda: logits.topk(TOP_K, -1), 3, 1):.2f}"
        )
    return out
