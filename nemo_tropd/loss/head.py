"""The chunked head: hidden states and a vocabulary shard of the head's weight in, loss and gradients out.

For each chunk of tokens: head product, log-sum-exp and K + 1 columns, objective, gradient over the logits, two products
back. Gradients are made in the forward pass, so logits live for one chunk and nothing is recomputed.

Collectives over the tensor-parallel group: student, one MAX and one SUM a chunk, before them one gather if tokens were
sampled with top-k; teacher, one gather a chunk; then one all-reduce of the hidden gradient (under sequence parallelism
one gather of the hidden states and one reduce-scatter of their gradient). Backward has none. An objective that sees
distributions takes the teacher along chunk by chunk: one more SUM a chunk, and one gather if its states are split.

Every rank of the group must have the same tokens and teacher scores. Errors about them are raised on all ranks at once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nemo_tropd.batch import LossTokens, TeacherScores, TokenScores
from nemo_tropd.parallel.vocab import SoftmaxTopK, check_finite, check_k

from .backend import head_chunks
from .call import Call, column_ids, token_scores
from .inputs import HeadLayout, HiddenRows, check_head, check_tokens, first_bad
from .overlap import read_by_caller, run_chunks
from .sampled import as_sampled
from .teacher import ScoreTable, TeacherBeside, TeacherHead, check_teacher, exact_chunk_size
from .weight_gradient import WeightGradient, add_scaled, scale_in_place

ObjectiveFunction = Callable[[TokenScores], tuple[Tensor, dict[str, Tensor]]]


@dataclass(frozen=True)
class HeadLoss:
    """The loss of one micro-batch and its metrics; all but ``loss`` is detached."""

    loss: Tensor  # scalar fp32, times ``scale``; carries the gradient of hidden and weight
    metrics: dict[str, Tensor]  # fp64 sums over student tokens; also tokens, guided_tokens, loss, guided_loss
    minima: dict[str, Tensor]  # over student tokens, +inf if there are none
    per_token: dict[str, Tensor]  # [T] each: every metric of the objective
    teacher_log_probs: Tensor  # [T] log pi_T(x)
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
    teacher: TeacherScores | TeacherHead,
    objective: ObjectiveFunction,
    layout: HeadLayout,
    *,
    scale: float | Tensor,
    options: LossOptions = PLAIN,
) -> HeadLoss:
    """scale * sum over tokens of token_weights * objective, with gradients of ``hidden`` and ``weight``.

    hidden [B, S, H], under sequence parallelism [B, S / P, H]; weight [V_local, H] of the same dtype (bf16, fp16, fp32
    or fp64): pass the model's own Parameter. ``scale`` is 1 / N, N the loss tokens of the global batch.
    ``teacher``: its scores, or for an objective that sees distributions its hidden states and head.

    A micro-batch without tokens costs nothing and gives zeros. Raises ValueError for shapes that do not match, ids or
    rows out of range, k above the vocabulary, and NonFiniteLogits if the head product is NaN or infinite.
    """
    shard = layout.shard(weight)
    trusted = options.carry_bad
    check_head(hidden, weight, tokens.rows, tokens.token_ids, shard, layout.sequence_parallel, trusted=trusted)
    check_teacher(tokens, teacher, objective, shard, layout, trusted=trusted)
    if options.accumulate_main_grad and weight.requires_grad and getattr(weight, "main_grad", None) is None:
        raise ValueError(
            "accumulate_main_grad needs weight.main_grad; wrap the model in Megatron's DDP, or leave it off"
        )
    for name in ("token_weights", "reference_log_probs"):
        values = getattr(options, name)
        if values is not None and values.shape != tokens.rows.shape:
            raise ValueError(f"{name} has shape {tuple(values.shape)}; the micro-batch has {len(tokens)} loss tokens")
    run = Call(tokens, teacher, objective, layout, scale, options, torch.is_grad_enabled())
    loss = _ChunkedHead.apply(hidden, weight, run)
    return HeadLoss(loss, run.sums, run.minima, run.per_token, run.scores.log_probs, run.bad)


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
    table = ScoreTable(rows, k, product.wide_dtype, entropy=entropy)

    def reduce(chunk: slice, logits: Tensor) -> SoftmaxTopK:
        return table.put(chunk, product.teacher(logits, token_ids[chunk, None], k, entropy=entropy))

    def compute(chunk: slice, slot: int) -> Tensor:
        return product.compute(states.pick(chunk), slot)

    run_chunks(chunks, compute, reduce, lambda chunk, out: None, slots=slots, device=rows.device)
    if carry_bad:
        table.mark_bad()
    else:
        check_finite(table.log_z, "teacher logits")
    return table.scores


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
    ids = column_ids(tokens, teacher)
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


class _Pass:
    """All chunks of one micro-batch: their losses, and the gradients of the hidden states and the weight."""

    def __init__(self, hidden: Tensor, weight: Tensor, run: Call, *, want_hidden: bool, want_weight: bool) -> None:
        self.run, shard, layout = run, run.layout.shard(weight), run.layout
        self.states = HiddenRows.of(hidden, run.tokens.rows, shard, layout.sequence_parallel)
        given, count, size, self.beside = run.teacher, len(run.tokens), None, None
        if isinstance(given, TeacherHead):
            size = exact_chunk_size(count, given, hidden, weight, run.objective, layout)
        self.product, self.chunks, self.slots = head_chunks(hidden, weight, shard, count, layout, size)
        if isinstance(given, TeacherHead):
            self.beside = TeacherBeside(given, run.tokens.token_ids, layout, min(size or 1, count), self.slots)
            run.scores = self.beside.table.scores
        # An empty micro-batch goes through the objective once, for the names of its metrics.
        self.chunks = self.chunks or [slice(0, 0)]
        self.entropy = getattr(run.objective, "needs_student_entropy", False)
        self.grad_hidden = torch.zeros_like(self.states.states) if want_hidden else None
        parts = len(self.chunks) if count else 0
        self.grad_weight = WeightGradient(weight, self.product.columns, parts) if want_weight else None
        self.losses: list[Tensor] = []
        self.metrics: list[dict[str, Tensor]] = []
        self.log_z: list[Tensor] = []
        self._picked: dict[int, Tensor] = {}  # hidden states [C, H] of the chunks in flight, by their first token

    def compute(self) -> None:
        device = self.run.tokens.rows.device
        run_chunks(self.chunks, self._product, self._reduce, self._back, slots=self.slots, device=device)
        read_by_caller([*self.losses, *self.log_z, *(v for m in self.metrics for v in m.values())], device)

    def _product(self, chunk: slice, slot: int) -> tuple[Tensor, Tensor | None]:
        """The student's logits and, for an exact objective, the teacher's."""
        picked = self._picked[chunk.start] = self.states.pick(chunk)
        theirs = None if self.beside is None else self.beside.compute(chunk, slot)
        return self.product.compute(picked, slot), theirs

    def _reduce(self, chunk: slice, both: tuple[Tensor, Tensor | None]) -> Tensor | None:
        """Log-probabilities, objective and the logits' gradient [C, columns], written over the student's logits."""
        (logits, theirs), run = both, self.run
        columns = None if self.beside is None or theirs is None else self.beside.reduce(chunk, theirs)
        ids = column_ids(run.tokens, run.scores, chunk)
        out: Any = self.product.student(logits, ids, entropy=self.entropy, overwrite=columns is None)
        compared = out
        if columns is not None and theirs is not None:
            compared = self.product.compare(run.objective, out, logits, theirs, columns)
        loss, grads, values = run.objective_gradient(out, chunk, None if columns is None else compared.sums)
        self.losses.append(loss)
        self.metrics.append(values)
        self.log_z.append(out.log_z)
        return None if self.grad_hidden is None and self.grad_weight is None else compared.logit_gradient(*grads)

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
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, run: Call) -> Tensor:
        want_hidden, want_weight = (run.grad_enabled and ctx.needs_input_grad[i] for i in (0, 1))
        work = _Pass(hidden, weight, run, want_hidden=want_hidden, want_weight=want_weight)
        work.compute()
        losses, log_z, options = torch.cat(work.losses), torch.cat(work.log_z), run.options
        if options.carry_bad:
            run.bad = first_bad(run.scores, options.reference_log_probs, log_z, losses)
        else:
            check_finite(log_z, "student logits")
            if work.beside is not None:
                check_finite(work.beside.table.log_z, "teacher logits")
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
