"""Exact divergences between student and teacher over the full true vocabulary, for evaluation: no gradient."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed import ProcessGroup, ReduceOp

from nemo_tropd.parallel.vocab import VocabShard, check_finite

from .chunks import ChunkLogits
from .inputs import HiddenRows, check_head, chunk_size

NAMES = ("reverse_kl", "forward_kl", "one_minus_tv", "student_entropy", "teacher_entropy")


@torch.no_grad()
def exact_divergences(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    rows: Tensor,
    *,
    student_group: ProcessGroup | None = None,
    teacher_group: ProcessGroup | None = None,
    vocab_size: int,
    sequence_parallel: bool = False,
    chunk_tokens: int | None = None,
) -> dict[str, Tensor]:
    """KL(S || T), KL(T || S), 1 - TV = sum min(pi_S, pi_T), H_S and H_T at ``rows``: [T] each, nats, fp32, replicated.

    Hidden states and weights as for ``head_loss``, each model with its own H; both models on the same ranks in the same
    order (give one group twice, or leave the teacher's out). Where the two are padded to different sizes, the teacher's
    logits are gathered, a chunk at a time. Raises ValueError for shapes that do not match and NonFiniteLogits for NaN.
    """
    teacher_group = student_group if teacher_group is None else teacher_group
    student = VocabShard.of(student_weight.size(0), student_group, vocab_size)
    teacher = VocabShard.of(teacher_weight.size(0), teacher_group, vocab_size)
    if student.size != teacher.size:
        raise ValueError(
            f"the student has {student.size} tensor-parallel ranks, the teacher {teacher.size}; give the same"
        )
    zeros = torch.zeros_like(rows)
    check_head(student_hidden, student_weight, rows, zeros, student, sequence_parallel)
    check_head(teacher_hidden, teacher_weight, rows, zeros, teacher, sequence_parallel)
    states = HiddenRows.of(student_hidden, rows, student, sequence_parallel)
    teacher_states = HiddenRows.of(teacher_hidden, rows, teacher, sequence_parallel)
    columns = max(student_weight.size(0), teacher_weight.size(0))
    # Both models' logits live at once, with the temporaries of the sums: a quarter of what one model's chunk may have.
    size = chunk_size(rows.numel(), 4 * columns, student_hidden, chunk_tokens)
    product = ChunkLogits(student_weight, student, min(size, rows.numel()))
    teacher_product = ChunkLogits(teacher_weight, teacher, min(size, rows.numel()))
    out = torch.empty(len(NAMES), rows.numel(), device=rows.device)
    for start in range(0, rows.numel(), size):
        chunk = slice(start, start + size)
        mine = product.compute(states.pick(chunk))
        theirs = teacher_product.compute(teacher_states.pick(chunk)).to(product.wide_dtype)
        out[:, chunk] = _divergences(mine, _align(theirs, teacher, student), student)
    return dict(zip(NAMES, out, strict=True))


def _align(logits: Tensor, shard: VocabShard, like: VocabShard) -> Tensor:
    """The logits of ``like``'s columns; gathered where the paddings differ, on which all ranks agree."""
    if shard.group is None:
        return logits
    if shard.columns == like.columns:
        return logits
    padded = torch.nn.functional.pad(logits, (0, shard.columns - shard.width))
    full = shard.gather(padded).transpose(0, 1).flatten(1)
    return full[:, like.start : like.start + like.width]


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
