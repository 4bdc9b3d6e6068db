"""The frozen teacher's head, a chunk at a time: reduced to scores, or beside the student's for exact objectives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from nemo_tropd.batch import LossTokens, Sampling, TeacherScores, TeacherStates
from nemo_tropd.parallel.vocab import SoftmaxTopK, VocabShard, check_k

from .backend import backend
from .chunks import TheirColumns, TorchChunks
from .inputs import HeadLayout, check_tokens, chunk_size, kernels_serve

if TYPE_CHECKING:
    from .kernel_chunks import KernelChunks

# Wide tensors as large as a chunk's logits, of both models and in between, that torch has of an exact objective.
TORCH_COPIES = 8


class Distributions(Protocol):
    """What the head needs of an objective that sees both distributions; see ``objectives.exact``."""

    @property
    def needs_top_k(self) -> bool: ...
    @property
    def kernel(self) -> tuple[str, float] | None: ...
    def sums(self, log_p: Tensor, log_q: Tensor) -> Tensor: ...
    def value(self, sums: Tensor) -> Tensor: ...
    def logit_gradient(self, log_p: Tensor, log_q: Tensor, sums: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class TeacherHead:
    """What ``head_loss`` takes in place of TeacherScores if the objective sees distributions. ``weight`` is split over
    the tensor-parallel group at the same columns as the student's; it may be padded otherwise behind the last one."""

    states: TeacherStates
    weight: Tensor  # [V_local, H']
    top_k: int = 1


def check_teacher(
    tokens: LossTokens,
    teacher: TeacherScores | TeacherHead,
    objective: object,
    shard: VocabShard,
    layout: HeadLayout,
    *,
    trusted: bool,
) -> None:
    """ValueError for a teacher that is not what the objective needs, or does not fit the tokens or the student."""
    name, exact = getattr(objective, "name", objective), getattr(objective, "needs_distributions", False)
    if not isinstance(teacher, TeacherHead):
        if exact:
            raise ValueError(f"objective {name!r} needs the teacher's states and head: give head_loss a TeacherHead")
        check_tokens(tokens, teacher, shard, trusted=trusted)
        return
    if not exact:
        raise ValueError(f"objective {name!r} needs TeacherScores, not a TeacherHead")
    if layout.sampling.top_k:
        raise ValueError(f"objective {name!r} compares complete distributions, but tokens were cut: {layout.sampling}")
    check_tokens(tokens, None, shard, trusted=trusted)
    hidden, weight = teacher.states.hidden, teacher.weight
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.size(1) != weight.size(1) or hidden.dtype != weight.dtype:
        shapes = f"states {tuple(hidden.shape)} {hidden.dtype} and weight {tuple(weight.shape)} {weight.dtype}"
        raise ValueError(f"the teacher's {shapes} do not go together; give [T, H'] and [V_local, H']")
    count = -(-len(tokens) // (shard.size if teacher.states.split else 1))
    if hidden.size(0) != count:
        raise ValueError(f"the teacher has states of {hidden.size(0)} tokens, not {count}: {teacher.states.split=}")
    theirs = layout.shard(weight)
    if theirs.columns != shard.columns and shard.size > 1:
        columns = f"{theirs.columns} columns a rank, the student's {shard.columns}"
        raise ValueError(f"the teacher's head has {columns}; split both at the same (TeacherSharing.head_like)")
    check_k(teacher.top_k, layout.vocab_size)


class ScoreTable:
    """The TeacherScores of T tokens, filled a chunk at a time."""

    def __init__(self, rows: Tensor, k: int, dtype: torch.dtype, *, entropy: bool = False) -> None:
        """``rows`` [T] is for its length and device."""
        count, device = rows.numel(), rows.device
        self.log_z = torch.empty(count, dtype=dtype, device=device)
        self.scores = TeacherScores(
            torch.empty_like(self.log_z),
            torch.empty(count, k, dtype=dtype, device=device),
            torch.empty(count, k, dtype=torch.int64, device=device),
            torch.empty_like(self.log_z) if entropy else None,
        )

    def put(self, chunk: slice, out: SoftmaxTopK) -> SoftmaxTopK:
        """``out``, of which column 0 is the sampled token's, is what ``chunk`` has."""
        s = self.scores
        s.log_probs[chunk], self.log_z[chunk] = out.log_probs[:, 0], out.log_z
        s.top_k_log_probs[chunk], s.top_k_ids[chunk] = out.top_k_log_probs, out.top_k_ids
        if s.entropy is not None and out.entropy is not None:
            s.entropy[chunk] = out.entropy
        return out

    def mark_bad(self, chunk: slice = slice(None)) -> None:
        """NaN and id 0 for tokens whose logits are not finite: the place of the largest NaN may be no id."""
        bad = ~self.log_z[chunk].isfinite()
        self.scores.log_probs[chunk].masked_fill_(bad, torch.nan)
        self.scores.top_k_ids[chunk].masked_fill_(bad[:, None], 0)


class TeacherBeside:
    """The teacher's logits of the student's chunks; its scores come out on the way."""

    def __init__(self, teacher: TeacherHead, token_ids: Tensor, layout: HeadLayout, most: int, slots: int) -> None:
        """``token_ids`` [T]; chunks of at most ``most`` tokens, ``slots`` of them in flight."""
        weight, count = teacher.weight, token_ids.numel()
        self.shard, self.k, self.token_ids = layout.shard(weight), teacher.top_k, token_ids
        states = teacher.states.hidden.to(weight.device, non_blocking=True)
        if teacher.states.split and count:
            states = self.shard.gather(states).flatten(0, 1)[:count]
        self.states = states
        sampling = Sampling(layout.sampling.temperature)
        self.product: TorchChunks | KernelChunks = backend(weight, self.shard, most, slots, sampling)
        self.table = ScoreTable(token_ids, self.k, self.product.wide_dtype)

    def compute(self, chunk: slice, slot: int) -> Tensor:
        """Logits [C, columns] of the teacher; see ``TorchChunks.compute``."""
        return self.product.compute(self.states[chunk], slot)

    def reduce(self, chunk: slice, logits: Tensor) -> TheirColumns:
        """Put the chunk's scores in the table; they are those of the sampled token and the top k, in this order. Leaves
        the logits as they are. One gather."""
        ids = self.token_ids[chunk, None]
        self.table.put(chunk, self.product.teacher(logits, ids, self.k, entropy=False, overwrite=False))
        self.table.mark_bad(chunk)
        s = self.table.scores
        columns = torch.cat([s.log_probs[chunk, None], s.top_k_log_probs[chunk]], 1)
        return TheirColumns(self.table.log_z[chunk], columns)


def exact_chunk_size(
    tokens: int, teacher: TeacherHead, hidden: Tensor, weight: Tensor, objective: Distributions, layout: HeadLayout
) -> int:
    """Tokens a chunk in which both models' logits keep to the bound that one's have elsewhere."""
    streamed = kernels_serve(weight) and kernels_serve(teacher.weight) and objective.kernel is not None
    copies = 1 + -(-teacher.weight.element_size() // weight.element_size()) if streamed else TORCH_COPIES
    return chunk_size(tokens, copies * weight.size(0), hidden, layout.chunk_tokens)
