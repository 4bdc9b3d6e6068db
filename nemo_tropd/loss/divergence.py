"""Exact divergences between student and teacher over the full true vocabulary, for evaluation: no gradient."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed import ProcessGroup, ReduceOp

from nemo_tropd.parallel.vocab import VocabShard, check_finite

from .chunks import TorchChunks
from .inputs import HiddenRows, check_head, chunk_size

NAMES = ("reverse_kl", "forward_kl", "one_minus_tv", "student_entropy", "teacher_entropy")


@torch.no_grad()
def exact_divergences(
    student_hidden: Tensor | None,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    rows: Tensor,
    *,
    student_group: ProcessGroup | None = None,
    teacher_group: ProcessGroup | None = None,
    vocab_size: int,
    sequence_parallel: bool = False,
    teacher_sequence_parallel: bool | None = None,
    chunk_tokens: int | None = None,
) -> dict[str, Tensor]:
    """KL(S || T), KL(T || S), 1 - TV = sum min(pi_S, pi_T), H_S and H_T at ``rows``: [T] each, nats, fp32, replicated.

    Hidden states and weights as for ``head_loss``, each model with its own H. Where the two are not split alike (other
    groups, or padded to other sizes), the teacher's logits are gathered over its group, a chunk at a time; leave out
    the teacher's group and sequence parallelism where they are the student's. A rank that only holds part of the
    teacher takes part in the gathers with ``student_hidden`` None, and gets an empty dictionary.
    Raises ValueError for shapes that do not match and NonFiniteLogits for NaN.
    """
    teacher_group = student_group if teacher_group is None else teacher_group
    student = VocabShard.of(student_weight.size(0), student_group, vocab_size)
    teacher = VocabShard.of(teacher_weight.size(0), teacher_group, vocab_size)
    if teacher_sequence_parallel is None:
        teacher_sequence_parallel = sequence_parallel
    zeros = torch.zeros_like(rows)
    check_head(teacher_hidden, teacher_weight, rows, zeros, teacher, teacher_sequence_parallel)
    teacher_states = HiddenRows.of(teacher_hidden, rows, teacher, teacher_sequence_parallel)
    columns = max(student.columns, teacher.columns * (1 if _alike(teacher, student) else teacher.size))
    # Both models' logits live at once, with the temporaries of the sums: a quarter of what one model's chunk may have.
    # The size rests on what every rank that takes part in a gather knows.
    size = chunk_size(rows.numel(), 4 * columns, teacher_hidden, chunk_tokens)
    states = None
    if student_hidden is not None:
        check_head(student_hidden, student_weight, rows, zeros, student, sequence_parallel)
        states = HiddenRows.of(student_hidden, rows, student, sequence_parallel)
        product = TorchChunks(student_weight, student, min(size, rows.numel()))
    teacher_product = TorchChunks(teacher_weight, teacher, min(size, rows.numel()))
    out = torch.empty(len(NAMES), rows.numel(), device=rows.device)
    for start in range(0, rows.numel(), size):
        chunk = slice(start, start + size)
        theirs = _align(teacher_product.compute(teacher_states.pick(chunk)), teacher, student)
        if states is not None:
            mine = product.compute(states.pick(chunk))
            out[:, chunk] = _divergences(mine, theirs.to(product.wide_dtype), student)
    return {} if states is None else dict(zip(NAMES, out, strict=True))


def _alike(shard: VocabShard, other: VocabShard) -> bool:
    """Both are split into the same columns; all ranks agree."""
    return shard.size == other.size and shard.columns == other.columns


def _align(logits: Tensor, shard: VocabShard, like: VocabShard) -> Tensor:
    """The logits of ``like``'s columns; gathered where the two are not split alike."""
    if _alike(shard, like):
        return logits
    if shard.group is not None:
        padded = torch.nn.functional.pad(logits, (0, shard.columns - shard.width))
        logits = shard.gather(padded).transpose(0, 1).flatten(1)
    return logits[:, like.start : like.start + like.width]


def _divergences(student: Tensor, teacher: Tensor, shard: VocabShard) -> Tensor:
    """[5, C] in the order of NAMES, from the logits [C, width] of the same columns."""
    log_s, log_t = _log_softmax(torch.stack([student, teacher]), shard)
    s, t = log_s.exp(), log_t.exp()
    sums = torch.stack(
        [
            (s * (log_s - log_t)).sum(-1),
            (t * (log_t - log_s)).sum(-1),
            torch.minimum(s, t).sum(-1),
            -(s * log_s).sum(-1),
            -(t * log_t).sum(-1),
        ]
    )
    return shard.reduce(sums, ReduceOp.SUM)


def _log_softmax(logits: Tensor, shard: VocabShard) -> Tensor:
    """Over the full vocabulary; logits [2, C, width]."""
    top = logits.new_full(logits.shape[:-1], float("-inf"))
    if shard.width:
        top = logits.amax(-1)
        top = torch.where(top.isnan(), float("-inf"), top)
    shard.reduce(top, ReduceOp.MAX)
    log_z = shard.reduce((logits - top[..., None]).exp().sum(-1), ReduceOp.SUM).log() + top
    check_finite(log_z[0], "student logits")
    check_finite(log_z[1], "teacher logits")
    return logits - log_z[..., None]
