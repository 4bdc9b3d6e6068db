"""The chunked head: hidden states and a vocabulary shard of the head's weight in, loss and gradients out.

For each chunk of tokens: head product, log-sum-exp and K + 1 columns, objective, gradient over the logits, two products
back. Gradients are made in the forward pass, so logits live for one chunk and nothing is recomputed.

Collectives over the tensor-parallel group: student, one MAX and one SUM a chunk, before them one gather if tokens were
sampled with top-k; teacher, one gather a chunk; then one all-reduce of the hidden gradient (under sequence parallelism
one gather of the hidden states and one reduce-scatter of their gradient). Backward has none.

Every rank of the group must have the same tokens and teacher scores. Errors about them are raised on all ranks at once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nemo_tropd.batch import LossTokens, TeacherScores, TokenScores
from nemo_tropd.parallel.vocab import SoftmaxTopK, check_finite, check_k

from .backend import head_chunks
from .chunks import StudentChunk
from .inputs import HeadLayout, HiddenRows, check_head, check_tokens, first_bad
from .overlap import read_by_caller, run_chunks
from .sampled import as_sampled
from .weight_gradient import WeightGradient, add_scaled, scale_in_place

if TYPE_CHECKING:
    from .kernel_chunks import KernelStudentChunk

ObjectiveFunction = Callable[[TokenScores], tuple[Tensor, dict[str, Tensor]]]


@dataclass(frozen=True)
class HeadLoss:
    """The loss of one micro-batch and its metrics; all but ``loss`` is detached."""

    loss: Tensor  # scalar fp32, times ``scale``; carries the gradient of hidden and weight
    metrics: dict[str, Tensor]  # fp64 sums over student tokens; also tokens, guided_tokens, loss, guided_loss
    minima: dict[str, Tensor]  # over student tokens, +inf if there are none
    per_token: dict[str, Tensor]  # [T] each: every metric of the objective
    bad: tuple[str, int] | None = None  # with ``carry_bad``: what is not finite, and the first such token


@dataclass(frozen=True)
class LossOptions:
    """What only some calls of ``head_loss`` need."""

    token_weights: Tensor | None = None  # [T] factors of the tokens' losses, see ``sequence_mean_weights``
    reference_log_probs: Tensor | None = None  # [T] under a reference model, for objectives that need one
    # Backward adds the weight's gradient to ``weight.main_grad`` (Megatron's DDP buffer, usually fp32) and sets
    # ``grad_added_to_main_grad``; autograd then gets zeros. For every micro-batch or for none.
    accumulate_main_grad: bool = False
    # The trainer's way, whose rows and ids are checked before they are on the device: they are not looked at again.
    # Logits or losses that are not finite are no error: loss and gradients become NaN, so that every rank sees it in
    # the gradient norm, and ``HeadLoss.bad`` says what it was.
    carry_bad: bool = False


PLAIN = LossOptions()


def head_loss(
    hidden: Tensor,
    weight: Tensor,
    tokens: LossTokens,
    teacher: TeacherScores,
    objective: ObjectiveFunction,
    layout: HeadLayout,
    *,
    scale: float | Tensor,
    options: LossOptions = PLAIN,
) -> HeadLoss:
    """scale * sum over tokens of token_weights * objective, with gradients of ``hidden`` and ``weight``.

    hidden [B, S, H], under sequence parallelism [B, S / P, H]; weight [V_local, H] of the same dtype (bf16, fp16, fp32
    or fp64): pass the model's own Parameter. ``scale`` is 1 / N, N the loss tokens of the global batch.

    A micro-batch without tokens costs nothing and gives zeros. Raises ValueError for shapes that do not match, ids or
    rows out of range, k above the vocabulary, and NonFiniteLogits if the head product is NaN or infinite.
    """
    shard = layout.shard(weight)
    trusted = options.carry_bad
    check_head(hidden, weight, tokens.rows, tokens.token_ids, shard, layout.sequence_parallel, trusted=trusted)
    check_tokens(tokens, teacher, shard, trusted=trusted)
    if options.accumulate_main_grad and weight.requires_grad and getattr(weight, "main_grad", None) is None:
        raise ValueError(
            "accumulate_main_grad needs weight.main_grad; wrap the model in Megatron's DDP, or leave it off"
        )
    for name in ("token_weights", "reference_log_probs"):
        values = getattr(options, name)
        if values is not None and values.shape != tokens.rows.shape:
            raise ValueError(f"{name} has shape {tuple(values.shape)}; the micro-batch has {len(tokens)} loss tokens")
    run = _Run(tokens, teacher, objective, layout, scale, options, torch.is_grad_enabled())
    loss = _ChunkedHead.apply(hidden, weight, run)
    return HeadLoss(loss, run.sums, run.minima, run.per_token, run.bad)


@torch.no_grad()
def teacher_scores(
    hidden: Tensor,
    weight: Tensor,
    rows: Tensor,
    token_ids: Tensor,
    k: int,
    layout: HeadLayout,
    *,
    entropy: bool = False,
    carry_bad: bool = False,
) -> TeacherScores:
    """The frozen teacher's log pi_T(x), its top k and, if asked, its entropy, at ``rows`` of its hidden states, all at
    the layout's temperature and never cut.

    Shapes and errors as for ``head_loss``; rows and token_ids [T]. Results are fp32 (fp64 for an fp64 model),
    replicated. ``carry_bad``: tokens whose logits are not finite get NaN and id 0, and rows and ids are trusted.
    """
    shard = layout.shard(weight)
    check_head(hidden, weight, rows, token_ids, shard, layout.sequence_parallel, trusted=carry_bad)
    check_k(k, layout.vocab_size)
    states = HiddenRows.of(hidden, rows, shard, layout.sequence_parallel)
    product, chunks, slots = head_chunks(hidden, weight, shard, rows.numel(), layout)
    wide = product.wide_dtype
    log_probs, log_z, entropies = (torch.empty(rows.shape, dtype=wide, device=rows.device) for _ in range(3))
    top = torch.empty(rows.numel(), k, dtype=wide, device=rows.device)
    ids = torch.empty(rows.numel(), k, dtype=torch.int64, device=rows.device)

    def reduce(chunk: slice, logits: Tensor) -> SoftmaxTopK:
        out = product.teacher(logits, token_ids[chunk, None], k, entropy=entropy)
        log_probs[chunk], log_z[chunk] = out.log_probs[:, 0], out.log_z
        top[chunk], ids[chunk] = out.top_k_log_probs, out.top_k_ids
        if out.entropy is not None:
            entropies[chunk] = out.entropy
        return out

    def compute(chunk: slice, slot: int) -> Tensor:
        return product.compute(states.pick(chunk), slot)

    run_chunks(chunks, compute, reduce, lambda chunk, out: None, slots=slots, device=rows.device)
    if carry_bad:
        bad = ~log_z.isfinite()
        log_probs.masked_fill_(bad, torch.nan)
        ids.masked_fill_(bad[:, None], 0)  # the place of the largest NaN may be no id
    else:
        check_finite(log_z, "teacher logits")
    return TeacherScores(log_probs, top, ids, entropies if entropy else None)


@torch.no_grad()
def score_tokens(
    hidden: Tensor,
    weight: Tensor,
    tokens: LossTokens,
    teacher: TeacherScores,
    layout: HeadLayout,
    *,
    entropy: bool = False,
    reference_log_probs: Tensor | None = None,
    carry_bad: bool = False,
) -> TokenScores:
    """All of a micro-batch's ``TokenScores`` without gradient: for a first pass over the global batch, for instance.
    Shapes, errors and ``carry_bad`` as for ``head_loss``. Results are fp32 (fp64 for an fp64 model), replicated."""
    shard = layout.shard(weight)
    check_head(hidden, weight, tokens.rows, tokens.token_ids, shard, layout.sequence_parallel, trusted=carry_bad)
    check_tokens(tokens, teacher, shard, trusted=carry_bad)
    states = HiddenRows.of(hidden, tokens.rows, shard, layout.sequence_parallel)
    product, chunks, _ = head_chunks(hidden, weight, shard, len(tokens), layout)
    ids = _columns(tokens, teacher)
    log_probs = torch.empty(ids.shape, dtype=product.wide_dtype, device=ids.device)
    log_z, entropies = (torch.empty(len(tokens), dtype=product.wide_dtype, device=ids.device) for _ in range(2))
    for chunk in chunks:
        out = product.student(product.compute(states.pick(chunk), 0), ids[chunk], entropy=entropy)
        log_probs[chunk], log_z[chunk] = as_sampled(out.log_probs, out.kept, tokens, chunk), out.log_z
        if out.entropy is not None:
            entropies[chunk] = out.entropy
    if not carry_bad:
        check_finite(log_z, "student logits")
    return token_scores(
        log_probs, tokens, teacher, entropy=entropies if entropy else None, reference_log_probs=reference_log_probs
    )


def sequence_mean_weights(tokens: LossTokens, global_tokens: int, global_sequences: int) -> Tensor:
    """[T] weights that turn a sum scaled by 1 / global_tokens into the mean over sequences of each sequence's mean.
    For objectives whose ``denominator`` is ``sequences``. ``global_sequences`` counts those with a loss token."""
    lengths = torch.bincount(tokens.sequence)[tokens.sequence]
    return global_tokens / (global_sequences * lengths.double())


@dataclass
class _Run:
    """One call's arguments, and what it leaves besides the loss."""

    tokens: LossTokens
    teacher: TeacherScores
    objective: ObjectiveFunction
    layout: HeadLayout
    scale: float | Tensor
    options: LossOptions
    grad_enabled: bool
    sums: dict[str, Tensor] = field(default_factory=dict)
    minima: dict[str, Tensor] = field(default_factory=dict)
    per_token: dict[str, Tensor] = field(default_factory=dict)
    bad: tuple[str, int] | None = None

    def objective_gradient(
        self, out: StudentChunk | KernelStudentChunk, chunk: slice
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Loss [C] (weighted, unscaled, detached), gradient [C, columns] of the scaled sum over the temperature, by
        which logits were divided, and metrics of one chunk."""
        with torch.enable_grad():
            columns, reference = out.log_probs.requires_grad_(self.grad_enabled), self.options.reference_log_probs
            scores = token_scores(
                as_sampled(columns, out.kept, self.tokens, chunk), self.tokens, self.teacher,
                entropy=out.entropy, reference_log_probs=reference, chunk=chunk,
            )  # fmt: skip
            loss, metrics = self.objective(scores)
            for name, values in {"loss": loss, **metrics}.items():
                if (shape := values.shape) != scores.student_log_probs.shape:
                    raise ValueError(f"the objective's {name!r} has shape {tuple(shape)}; give one value a token")
            if self.options.token_weights is not None:
                loss = loss * self.options.token_weights[chunk].to(loss.dtype)
            grad = torch.zeros_like(columns)
            if loss.requires_grad:
                scale = self.scale / self.layout.sampling.temperature
                (grad,) = torch.autograd.grad((loss * scale).sum(), columns)
        return loss.detach(), grad, metrics

    def close(self, loss: Tensor, metrics: list[dict[str, Tensor]]) -> None:
        """Sums, minima and per-token values of all chunks."""
        guided = self.tokens.guided
        student = ~guided
        self.per_token = {name: torch.cat([m[name] for m in metrics]) for name in metrics[0]}
        self.sums = {name: torch.where(student, v, 0).double().sum() for name, v in self.per_token.items()}
        self.sums |= {"loss": torch.where(student, loss, 0).sum(), "guided_loss": torch.where(guided, loss, 0).sum()}
        self.sums |= {"tokens": student.sum().double(), "guided_tokens": guided.sum().double()}
        if (ratio := self.per_token.get("log_ratio")) is not None:
            floor = loss.new_full((1,), float("inf"))
            least = torch.cat([floor, torch.where(student, ratio.double(), torch.inf)]).min()
            self.minima = {"log_ratio": least}


class _Pass:
    """All chunks of one micro-batch: their losses, and the gradients of the hidden states and the weight."""

    def __init__(self, hidden: Tensor, weight: Tensor, run: _Run, *, want_hidden: bool, want_weight: bool) -> None:
        self.run, shard, layout = run, run.layout.shard(weight), run.layout
        self.states = HiddenRows.of(hidden, run.tokens.rows, shard, layout.sequence_parallel)
        self.product, self.chunks, self.slots = head_chunks(hidden, weight, shard, len(run.tokens), layout)
        # An empty micro-batch goes through the objective once, for the names of its metrics.
        self.chunks = self.chunks or [slice(0, 0)]
        self.ids = _columns(run.tokens, run.teacher)
        self.entropy = getattr(run.objective, "needs_student_entropy", False)
        self.grad_hidden = torch.zeros_like(self.states.states) if want_hidden else None
        count = len(self.chunks) if len(run.tokens) else 0
        self.grad_weight = WeightGradient(weight, self.product.columns, count) if want_weight else None
        self.losses: list[Tensor] = []
        self.metrics: list[dict[str, Tensor]] = []
        self.log_z: list[Tensor] = []
        self._picked: dict[int, Tensor] = {}  # hidden states [C, H] of the chunks in flight, by their first token

    def compute(self) -> None:
        device = self.ids.device
        run_chunks(self.chunks, self._product, self._reduce, self._back, slots=self.slots, device=device)
        read_by_caller([*self.losses, *self.log_z, *(v for m in self.metrics for v in m.values())], device)

    def _product(self, chunk: slice, slot: int) -> Tensor:
        picked = self._picked[chunk.start] = self.states.pick(chunk)
        return self.product.compute(picked, slot)

    def _reduce(self, chunk: slice, logits: Tensor) -> Tensor | None:
        """Log-probabilities, objective and the logits' gradient [C, columns], written over the logits."""
        out = self.product.student(logits, self.ids[chunk], entropy=self.entropy)
        loss, grad, values = self.run.objective_gradient(out, chunk)
        self.losses.append(loss)
        self.metrics.append(values)
        self.log_z.append(out.log_z)
        return None if self.grad_hidden is None and self.grad_weight is None else out.logit_gradient(grad)

    def _back(self, chunk: slice, slope: Tensor | None) -> None:
        picked = self._picked.pop(chunk.start)
        if slope is None:
            return
        if self.grad_hidden is not None:
            self.grad_hidden.index_copy_(0, self.states.index[chunk], slope @ self.product.weight)
        if self.grad_weight is not None:
            self.grad_weight.add(slope, picked)


class _ChunkedHead(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, run: _Run) -> Tensor:
        want_hidden, want_weight = (run.grad_enabled and ctx.needs_input_grad[i] for i in (0, 1))
        work = _Pass(hidden, weight, run, want_hidden=want_hidden, want_weight=want_weight)
        work.compute()
        losses, log_z, options = torch.cat(work.losses), torch.cat(work.log_z), run.options
        if options.carry_bad:
            run.bad = first_bad(run.teacher, options.reference_log_probs, log_z, losses)
        else:
            check_finite(log_z, "student logits")
        grad_hidden = work.grad_hidden
        grad_weight = None if work.grad_weight is None else work.grad_weight.total
        for values in filter(torch.is_tensor, (losses, grad_hidden, grad_weight) if run.bad else ()):
            values.fill_(torch.nan)
        if grad_hidden is not None:
            grad_hidden = work.states.reduce_gradient(grad_hidden)
        run.close(losses.double(), work.metrics)
        # Neither is an input or an output of this function, so save_for_backward is not for them.
        ctx.grads = (grad_hidden, grad_weight)
        ctx.weight, ctx.accumulate_main_grad = weight, options.accumulate_main_grad
        return (losses.double().sum() * run.scale).float()

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        if ctx.grads is None:
            raise RuntimeError("the head's gradients were already used: call head_loss again before another backward")
        (grad_hidden, grad_weight), ctx.grads = ctx.grads, None
        weight, ctx.weight = ctx.weight, None
        if grad_hidden is not None:
            scale_in_place(grad_hidden, grad_output)
        if grad_weight is not None and ctx.accumulate_main_grad:
            add_scaled(weight.main_grad, grad_weight, grad_output)
            weight.grad_added_to_main_grad = True
            # Zeros rather than nothing: DDP's hook must run, and a tied embedding adds its own gradient to them.
            grad_weight = torch.zeros_like(weight)
        elif grad_weight is not None:
            grad_weight = scale_in_place(grad_weight, grad_output).to(weight.dtype)
        return grad_hidden, grad_weight, None


def _columns(tokens: LossTokens, teacher: TeacherScores) -> Tensor:
    """[T, K + 1]: the sampled token, then the teacher's top k."""
    return torch.cat([tokens.token_ids[:, None], teacher.top_k_ids], 1)


def token_scores(
    columns: Tensor,
    tokens: LossTokens,
    teacher: TeacherScores,
    *,
    entropy: Tensor | None = None,
    reference_log_probs: Tensor | None = None,
    chunk: slice = slice(None),
) -> TokenScores:
    """What an objective sees of the tokens in ``chunk``, of which ``columns`` [C, K + 1] and ``entropy`` [C] are."""
    return TokenScores(
        student_log_probs=columns[:, 0],
        student_top_k_log_probs=columns[:, 1:],
        teacher_log_probs=teacher.log_probs[chunk],
        teacher_top_k_log_probs=teacher.top_k_log_probs[chunk],
        guided=tokens.guided[chunk],
        uniforms=tokens.uniforms[chunk],
        student_entropy=entropy,
        teacher_entropy=None if teacher.entropy is None else teacher.entropy[chunk],
        behavior_log_probs=tokens.behavior_log_probs[chunk],
        reference_log_probs=None if reference_log_probs is None else reference_log_probs[chunk],
    )
