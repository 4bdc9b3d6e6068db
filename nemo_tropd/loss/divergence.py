"""Exact divergences between student and teacher over the full true vocabulary, for evaluation: no gradient."""

import torch
from torch import Tensor
from torch.distributed import ReduceOp

from nemo_tropd.parallel.vocab import VocabShard, softmax_top_k

from .chunks import TorchChunks
from .inputs import HeadLayout, HiddenRows, check_head, chunk_size

NAMES = ("reverse_kl", "forward_kl", "one_minus_tv", "student_entropy", "teacher_entropy", "top1_agreement")


@torch.no_grad()
def exact_divergences(
    student_hidden: Tensor | None,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    rows: Tensor,
    layout: HeadLayout,
    *,
    teacher_layout: HeadLayout | None = None,
    teacher_rows: Tensor | None = None,
) -> dict[str, Tensor]:
    """KL(S || T), KL(T || S), 1 - TV = sum min(pi_S, pi_T), H_S and H_T at ``rows``, and whether the best token is the
    same: [T] each, nats, fp32, replicated. Always of the complete softmax at temperature 1, whatever
    ``layout.sampling`` is: models are compared, not samples.

    Hidden states and weights as for ``head_loss``, each model with its own H; rows [T], and [T] of the teacher's states
    if the same tokens lie elsewhere there. If the two are not split alike, the teacher's logits are gathered over its
    group, a chunk at a time; the student's ``layout`` cuts both into chunks.
    A rank that only has part of the teacher gives ``student_hidden`` None and gets an empty dictionary. Tokens whose
    logits are not finite have NaN. Raises ValueError for shapes or vocabularies that do not match.
    """
    teacher_layout = teacher_layout or layout
    theirs, ours = teacher_layout.vocab_size, layout.vocab_size
    if theirs != ours:
        raise ValueError(f"the teacher's vocab_size is {theirs}, the student's {ours}; divergences need one vocabulary")
    student, teacher = layout.shard(student_weight), teacher_layout.shard(teacher_weight)
    zeros, theirs_at = torch.zeros_like(rows), rows if teacher_rows is None else teacher_rows
    check_head(teacher_hidden, teacher_weight, theirs_at, zeros, teacher, teacher_layout.sequence_parallel)
    teacher_states = HiddenRows.of(teacher_hidden, theirs_at, teacher, teacher_layout.sequence_parallel)
    columns = max(student.columns, teacher.columns * (1 if _alike(teacher, student) else teacher.size))
    # Both models' logits live at once, with the temporaries of the sums: a quarter of what one model's chunk may have.
    # The size rests on what every rank that takes part in a gather knows.
    size = chunk_size(rows.numel(), 4 * columns, teacher_hidden, layout.chunk_tokens)
    states = None
    if student_hidden is not None:
        check_head(student_hidden, student_weight, rows, zeros, student, layout.sequence_parallel)
        states = HiddenRows.of(student_hidden, rows, student, layout.sequence_parallel)
        product = TorchChunks(student_weight, student, min(size, rows.numel()))
    teacher_product = TorchChunks(teacher_weight, teacher, min(size, rows.numel()))
    out = torch.empty(len(NAMES), rows.numel(), device=rows.device)
    for start in range(0, rows.numel(), size):
        chunk = slice(start, start + size)
        aligned = _align(teacher_product.compute(teacher_states.pick(chunk)), teacher, student)
        if states is not None:
            mine = product.compute(states.pick(chunk))
            out[:, chunk] = _divergences(mine, aligned.to(product.wide_dtype), student)
    return {} if states is None else dict(zip(NAMES, out, strict=True))


def _alike(shard: VocabShard, other: VocabShard) -> bool:
    """Both are split into the same columns; all ranks agree."""
    return shard.size == other.size and shard.columns == other.columns


def _align(logits: Tensor, shard: VocabShard, like: VocabShard) -> Tensor:
    """The logits of ``like``'s columns; gathered if the two are not split alike."""
    if _alike(shard, like):
        return logits
    if shard.group is not None:
        padded = torch.nn.functional.pad(logits, (0, shard.columns - shard.width))
        logits = shard.gather(padded).transpose(0, 1).flatten(1)
    return logits[:, like.start : like.start + like.width]


def _divergences(student: Tensor, teacher: Tensor, shard: VocabShard) -> Tensor:
    """[6, C] in the order of NAMES, from the logits [C, width] of the same columns."""
    (log_s, log_t), best = _log_softmax(torch.stack([student, teacher]), shard)
    s, t = log_s.exp(), log_t.exp()
    entropies = [-(s * log_s).sum(-1), -(t * log_t).sum(-1)]
    kl = [(s * (log_s - log_t)).sum(-1), (t * (log_t - log_s)).sum(-1)]
    sums = shard.reduce(torch.stack([*kl, torch.minimum(s, t).sum(-1), *entropies]), ReduceOp.SUM)
    same = (best[0] == best[1]).to(sums.dtype)
    return torch.cat([sums, torch.where(sums[0].isfinite(), same, torch.nan)[None]])


def _log_softmax(logits: Tensor, shard: VocabShard) -> tuple[Tensor, Tensor]:
    """Over the full vocabulary, and its most probable ids [2, C]; logits [2, C, width]."""
    rows = logits.flatten(0, 1)
    no_ids = torch.empty(rows.size(0), 0, dtype=torch.int64, device=rows.device)
    found = softmax_top_k(rows, no_ids, 1, shard)
    return logits - found.log_z.view(*logits.shape[:-1], 1), found.top_k_ids.view(logits.shape[:-1])
