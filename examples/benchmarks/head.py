"""Time and memory of the loss: ours, plain torch, and, if they can be imported, TRL's and Liger's.

    python examples/benchmarks/head.py                 # times with all, then memory at a longer batch
                                                       # with a GPU: limit, ours and peers at six sizes
    python examples/benchmarks/head.py --tokens 512 --vocabulary 32768 --hidden 256 --only "ours: TrOPD"

One row is one forward and backward over both heads (student and teacher). On a CPU it runs in a process of its own, and
the peak counts the gradients of hidden states and weight. TRL and Liger compute a divergence over the full vocabulary;
CCE (on a GPU) a cross-entropy of the student's head. None of them finds a top k or computes a gate, and none is among
this project's pins. To measure them, install them into a folder of their own:

    pip install --target /tmp/peers --no-deps trl==1.16.0 accelerate liger-kernel==0.8.5
    PYTHONPATH=/tmp/peers python examples/benchmarks/head.py
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from nemo_tropd import objectives
from nemo_tropd.batch import LossTokens, TeacherScores, TeacherStates
from nemo_tropd.loss import head, inputs
from nemo_tropd.loss.head import LossOptions, head_loss, teacher_scores, token_scores
from nemo_tropd.loss.inputs import HeadLayout
from nemo_tropd.loss.teacher import TeacherHead

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # this file is run, its siblings are imported

from examples.benchmarks.isolated import IsolatedError, isolated, memory_kib
from examples.benchmarks.roofline import PAIRS, Head, floor_line, measure_rates

TOP_K = 64
VOCABULARY = 151936  # on a GPU
TOKENS = (2048, 8192, 32768)  # on a GPU
ERROR_TOKENS = 512  # of the fp32 reference


@dataclass(frozen=True)
class Shape:
    """Tokens, vocabulary, the student's hidden size and the teacher's (None: the student's); bf16 or fp32."""

    tokens: int
    vocabulary: int
    hidden: int
    dtype: torch.dtype = torch.float32
    teacher_hidden: int | None = None
    device: str = "cpu"

    @property
    def text(self) -> str:
        pair = f"{self.hidden}" + (f" from {self.teacher_hidden}" if self.teacher_hidden else "")
        return f"T {self.tokens:,}, V {self.vocabulary:,}, H {pair}, {str(self.dtype).removeprefix('torch.')}"


@dataclass(frozen=True)
class Cost:
    milliseconds: float  # on a CPU the fastest of the repeats, on a GPU their median
    peak_mib: float  # above what inputs and libraries hold; on a GPU without the gradient of the head's weight

    @property
    def peak_gib(self) -> float:
        return self.peak_mib / 1024


@dataclass(frozen=True)
class Problem:
    """Random hidden states and heads; the tokens are sampled from the student."""

    hidden: Tensor  # [T, H]
    weight: Tensor  # [V, H]
    teacher_hidden: Tensor
    teacher_weight: Tensor
    tokens: LossTokens

    @classmethod
    def random(cls, shape: Shape) -> Problem:
        """Fresh inputs on every call, from torch's own generator."""

        def normal(rows: int, columns: int, scale: float = 1.0) -> Tensor:
            return (torch.randn(rows, columns, device=shape.device) * scale).to(shape.dtype)

        count, teacher_size = shape.tokens, shape.teacher_hidden or shape.hidden
        hidden, weight = normal(count, shape.hidden), normal(shape.vocabulary, shape.hidden, 0.05)
        sampled = [(part @ weight.t()).float().softmax(-1).multinomial(1)[:, 0] for part in hidden.split(512)]
        tokens = LossTokens(
            rows=torch.arange(count, device=shape.device),
            token_ids=torch.cat(sampled),
            guided=torch.zeros(count, dtype=torch.bool, device=shape.device),
            uniforms=torch.rand(count, device=shape.device),
            behavior_log_probs=torch.full((count,), float("nan"), device=shape.device),
            sequence=torch.zeros(count, dtype=torch.int64, device=shape.device),
        )
        return cls(hidden, weight, normal(count, teacher_size), normal(shape.vocabulary, teacher_size, 0.05), tokens)

    def gradients(self, loss: Loss) -> tuple[Tensor, Tensor]:
        """Of the student's hidden states and weight, by one forward and backward."""
        hidden, weight = self.hidden.detach().requires_grad_(True), self.weight.detach().requires_grad_(True)
        loss(hidden, weight, self).backward()
        assert hidden.grad is not None and weight.grad is not None
        return hidden.grad, weight.grad


# Of the student's hidden states [T, H] and weight [V, H], both with gradients, and the problem that they are of.
Loss = Callable[[Tensor, Tensor, Problem], Tensor]


def ours(h: Tensor, w: Tensor, p: Problem, chunk_tokens: int | None = None) -> Tensor:
    """TrOPD on the chunked heads, called as the trainer does: without a look at results, which waits for the device."""
    layout, tokens = HeadLayout(w.size(0), chunk_tokens=chunk_tokens), p.tokens
    scores = teacher_scores(
        p.teacher_hidden[None], p.teacher_weight, tokens.rows, tokens.token_ids, TOP_K, layout, carry_bad=True
    )
    objective, options = objectives.build("tropd"), LossOptions(carry_bad=True)
    return head_loss(h[None], w, tokens, scores, objective, layout, scale=1 / len(tokens), options=options).loss


def ours_exact(h: Tensor, w: Tensor, p: Problem, objective: str = "tropd_exact") -> Tensor:
    """An objective that sees both distributions; the teacher's hidden states, kept for the step, are an input."""
    teacher = TeacherHead(TeacherStates(p.teacher_hidden), p.teacher_weight, TOP_K if objective == "tropd_exact" else 1)
    layout, scale = HeadLayout(w.size(0)), 1 / len(p.tokens)
    return head_loss(h[None], w, p.tokens, teacher, objectives.build(objective), layout, scale=scale).loss


def plain(h: Tensor, w: Tensor, p: Problem) -> Tensor:
    """TrOPD as first written down: two log-softmaxes over [T, V]."""
    ids = p.tokens.token_ids[:, None]
    teacher = (p.teacher_hidden @ p.teacher_weight.t()).float().log_softmax(-1)
    student = (h @ w.t()).float().log_softmax(-1)
    top = teacher.topk(TOP_K, -1)
    scores = TeacherScores(teacher.gather(1, ids)[:, 0], top.values, top.indices)
    columns = student.gather(1, torch.cat([ids, top.indices], 1))
    loss, _ = objectives.build("tropd")(token_scores(columns, p.tokens, scores))
    return loss.mean()


@cache
def _compiled() -> Loss:
    return torch.compile(plain)


def trl(h: Tensor, w: Tensor, p: Problem, beta: float) -> Tensor:
    """TRL 1.16's chunked divergence over the full vocabulary: forward KL at 0, reverse KL at 1, JSD between."""
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    return ChunkedDivergenceFunction.apply(h, w, None, p.teacher_hidden, p.teacher_weight, None, beta)[0].mean()


def liger(h: Tensor, w: Tensor, p: Problem, chunk: int) -> Tensor:
    """Liger 0.8.5's chunked fused linear JSD over the full vocabulary; compiled on a GPU."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss = LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.5, compiled=h.is_cuda, chunk_size=chunk
    )
    out = loss(h, w, p.teacher_hidden, p.teacher_weight, p.tokens.token_ids)
    return out[0] if isinstance(out, tuple) else out


def cce(h: Tensor, w: Tensor, p: Problem) -> Tensor:
    """CCE 25.1.1's linear cross-entropy: the student's head alone."""
    from cut_cross_entropy import linear_cross_entropy

    return linear_cross_entropy(h, w, p.tokens.token_ids, impl="cce")


VARIANTS: dict[str, Loss] = {
    "ours: TrOPD": ours,
    "ours: TrOPD, exact": ours_exact,
    "ours: reverse KL, exact": partial(ours_exact, objective="opd_exact"),
    "plain torch: TrOPD": plain,
    "torch.compile: TrOPD": lambda h, w, p: _compiled()(h, w, p),
    "TRL: forward KL": partial(trl, beta=0.0),
    "TRL: JSD": partial(trl, beta=0.5),
    "Liger: JSD, chunks of 128": partial(liger, chunk=128),
    "Liger: JSD, chunks of 1024": partial(liger, chunk=1024),
    "CCE: cross-entropy, student's head": cce,
}
OWN = ("ours: TrOPD", "plain torch: TrOPD")
TROPD = (*OWN, "torch.compile: TrOPD")
GPU_ONLY = ("torch.compile: TrOPD", "CCE: cross-entropy, student's head")


def measure(variant: str, shape: Shape, threads: int, repeats: int, timeout_s: float = 300) -> Cost | str:
    """The cost of ``variant`` on the CPU, or the reason why there is none: not installed, failed or too slow."""
    try:
        return isolated(_cpu_cost, variant, shape, threads, repeats, limit_s=timeout_s)
    except IsolatedError as error:
        return str(error)


def _cpu_cost(variant: str, shape: Shape, threads: int, repeats: int) -> Cost | str:
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    loss = VARIANTS[variant]
    try:  # a small step first, which loads libraries and starts threads
        Problem.random(replace(shape, tokens=16, vocabulary=512, hidden=32)).gradients(loss)
    except ImportError as missing:
        return f"not installed ({missing.name})"
    problem = Problem.random(shape)
    problem.gradients(loss)
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        problem.gradients(loss)
        times.append(time.perf_counter() - started)
    return Cost(1e3 * min(times), _cpu_peak_kib(problem, loss) / 1024)


def _cpu_peak_kib(problem: Problem, loss: Loss) -> int:
    """The kernel's high-water mark of this process, reset first, above what is resident before."""
    # Freed memory must be returned at once, or it would hide what the step allocates: one mapping per tensor.
    libc = ctypes.CDLL(None)
    libc.mallopt(-3, 1 << 17)  # M_MMAP_THRESHOLD
    libc.malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = memory_kib("VmRSS")
    problem.gradients(loss)
    return memory_kib("VmHWM") - before


def median_ms(step: Callable[[], object]) -> float:
    """Milliseconds on the GPU, by triton's benchmark: warm, with the L2 cache cleared before each run."""
    from triton.testing import do_bench

    return float(do_bench(step, return_mode="median"))


def gpu_cost(loss: Loss, problem: Problem) -> Cost:
    """Time and peak on the GPU; the weight's gradient, in the weight's dtype, is not counted in the peak."""
    for _ in range(2):
        problem.gradients(loss)
    free_gpu()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    problem.gradients(loss)
    torch.cuda.synchronize()
    own = problem.weight.numel() * problem.weight.element_size()
    peak = (torch.cuda.max_memory_allocated() - before - own) / 2**20
    return Cost(median_ms(lambda: problem.gradients(loss)), peak)


def free_gpu() -> None:
    """Return unused memory to the GPU."""
    gc.collect()
    torch.cuda.empty_cache()


def limit_ms(problem: Problem, most: int = 8192) -> float:
    """The four products of the two heads on random data; beyond ``most`` tokens in proportion."""
    count = min(most, problem.hidden.size(0))
    h, t, w, tw = problem.hidden[:count], problem.teacher_hidden[:count], problem.weight, problem.teacher_weight
    logits = h.new_empty(count, w.size(0))
    total = median_ms(lambda: torch.mm(t, tw.t(), out=logits)) + median_ms(lambda: torch.mm(h, w.t(), out=logits))
    logits.normal_()
    back_h, back_w = torch.empty_like(h), torch.empty_like(w)
    total += median_ms(lambda: (torch.mm(logits, w, out=back_h), torch.mm(logits.t(), h, out=back_w)))
    return total * problem.hidden.size(0) / count


def gradient_error(loss: Loss, shape: Shape) -> float:
    """Relative error of a TrOPD loss's hidden gradient against the plain loss in fp32, at 512 tokens of ``shape``."""
    p = Problem.random(replace(shape, tokens=ERROR_TOKENS))
    got, _ = p.gradients(loss)
    wide = Problem(p.hidden.float(), p.weight.float(), p.teacher_hidden.float(), p.teacher_weight.float(), p.tokens)
    want, _ = wide.gradients(plain)
    # Gates sampled within rounding of their probability may fall either way: such tokens are left out of both.
    rows = (got.float() - want).norm(dim=-1) < 0.1 * want.norm(dim=-1)
    assert rows.float().mean() > 0.9, "gradients of more than a tenth of the tokens differ by more than 10%"
    return float((got.float() - want)[rows].norm() / want[rows].norm())


@contextmanager
def in_turn() -> Iterator[None]:
    """One chunk after another, without overlapping streams."""
    original = head.run_chunks

    def one_after_another(*arguments: Any, slots: int, device: torch.device) -> None:
        original(*arguments, slots=1, device=device)

    setattr(head, "run_chunks", one_after_another)  # noqa: B010 - another signature
    try:
        yield
    finally:
        head.run_chunks = original


def gpu_table(names: Sequence[str], shape: Shape) -> Table:
    """Limit, ours at several chunk sizes, and the other variants on the GPU, all measured in this process."""
    problem = Problem.random(shape)
    limit = limit_ms(problem)
    title = f"{shape.text}, {torch.cuda.get_device_name()}"
    table = Table("loss of both heads", "ms", "x limit", "extra peak GiB", "gradient error", title=title)
    table.add_row("limit: four matrix products", f"{limit:.2f}", "1", "", "")

    def row(name: str, loss: Loss, *, exact: bool) -> None:
        try:
            cost = gpu_cost(loss, problem)
            error = f"{gradient_error(loss, shape):.1e}" if exact else ""
            cells = (f"{cost.milliseconds:.2f}", f"{cost.milliseconds / limit:.3f}", f"{cost.peak_gib:.2f}", error)
            table.add_row(name, *cells)
        except torch.OutOfMemoryError:
            table.add_row(name, "out of memory")
        except ImportError as missing:
            table.add_row(name, f"not installed ({missing.name})")
        free_gpu()

    for name in names:
        if name != "ours: TrOPD":
            row(name, VARIANTS[name], exact=name in TROPD)
            continue
        automatic = inputs.chunk_size(shape.tokens, shape.vocabulary, problem.hidden, None)
        for chunk in (None, 1024, 4096):
            row(f"{name}, chunks of {chunk or automatic}", partial(ours, chunk_tokens=chunk), exact=True)
        with in_turn():
            row(f"{name}, one after another", ours, exact=False)
    if shape.tokens <= 8192:
        logits = problem.hidden.new_empty(shape.tokens, shape.vocabulary).normal_()
        table.add_row("torch.topk of the teacher's logits alone", f"{median_ms(lambda: logits.topk(TOP_K, -1)):.2f}")
    return table


def bench(variants: Sequence[str], shapes: Sequence[Shape], threads: int, repeats: int) -> None:
    """Measure and print one table per shape, and the model of what it must compute and move."""
    console = Console()
    rates = measure_rates(shapes[0].dtype, threads)
    for shape in shapes:
        title = f"{shape.text}, {threads} threads"
        table = Table("loss of both heads", "ms", "extra peak MiB", title=title)
        for variant in variants:
            with console.status(f"{title}: {variant}"):
                cost = measure(variant, shape, threads, repeats)
            cells = (cost, "") if isinstance(cost, str) else (f"{cost.milliseconds:.0f}", f"{cost.peak_mib:.0f}")
            table.add_row(variant, *cells)
        console.print(table)
        model = Head(shape.tokens, shape.vocabulary, shape.hidden, shape.hidden, TOP_K, max(4, shape.dtype.itemsize))
        console.print(floor_line(model, rates), highlight=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, help="default: 512, then 1024 and 4096; on a GPU 2048, 8192 and 32768")
    parser.add_argument("--vocabulary", type=int, default=32768, help="on a CPU (default 32768)")
    parser.add_argument("--hidden", type=int, default=256, help="of both models, on a CPU (default 256)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", nargs="+", choices=list(VARIANTS), metavar="NAME", help="; ".join(VARIANTS))
    options = parser.parse_args()
    if torch.cuda.is_available():
        for hidden, teacher in PAIRS:
            for tokens in [options.tokens] if options.tokens else TOKENS:
                shape = Shape(tokens, VOCABULARY, hidden, torch.bfloat16, teacher, "cuda")
                Console(width=120).print(gpu_table(options.only or list(VARIANTS), shape))
        return
    names = options.only or [name for name in VARIANTS if name not in GPU_ONLY]
    dtype = getattr(torch, options.dtype)
    shape = Shape(options.tokens or 512, options.vocabulary, options.hidden, dtype)
    bench(names, [shape], options.threads, options.repeats)
    if options.tokens is None:
        # What a long batch needs: the plain loss grows with T times V, ours with the hidden states' gradient only.
        long = [Shape(tokens, 49152, 576, dtype) for tokens in (1024, 4096)]
        bench([name for name in names if name in OWN], long, options.threads, 1)


if __name__ == "__main__":
    main()
