"""What enters the head: hidden states picked by row, and every check on shapes and ids. Letters as in batch.py."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from nemo_tropd.batch import PLAIN, LossTokens, Sampling, TeacherScores
from nemo_tropd.parallel.vocab import VocabShard, check_ids, check_integers, check_k

# Bytes that the logits of all chunks in flight may take, with all their copies. Larger chunks gain little: the products
# are long enough. On a GPU two chunks are in flight: twice 2048 tokens of 151,936 bf16 logits.
CHUNK_BYTES = {"cpu": 32 << 20, "cuda": 5 << 28}
# Products are fastest with complete tiles: on a GPU a chunk of more tokens than this has a multiple of it.
WHOLE_TILES = 256
KERNEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class HeadLayout:
    """How the head of one model is split over ranks, how its tokens are cut into chunks, and what they are scored by.
    ValueError for a ``sampling`` that has no gradient, or that only a sorted vocabulary could tell."""

    vocab_size: int  # the true size (the tokenizer's): columns past it are padding, which enters nothing
    group: ProcessGroup | None = None  # the tensor-parallel group
    sequence_parallel: bool = False
    chunk_tokens: int | None = None  # None: as many as a memory bound allows
    sampling: Sampling = PLAIN  # of the student's tokens; of a teacher only the temperature counts

    def __post_init__(self) -> None:
        s = self.sampling
        if not s.temperature > 0 or (s.top_p < 1 and not s.top_k):
            raise ValueError(f"{s}: give a temperature above 0, and with top_p below 1 a top_k")

    def shard(self, weight: Tensor) -> VocabShard:
        """The shard that ``weight`` [V_local, H] is; ValueError if all shards are too narrow for the vocabulary."""
        return VocabShard.of(weight.size(0), self.group, self.vocab_size)


@dataclass(frozen=True)
class HiddenRows:
    """Hidden states as a matrix whose rows are picked by ``index``; under sequence parallelism, all ranks' states.
    The matrix keeps the order in which ranks were gathered, so that gathering and scattering move contiguous blocks."""

    states: Tensor  # [rows, H]
    index: Tensor  # [T] rows of ``states``
    shape: torch.Size  # of the hidden states as given
    group: ProcessGroup | None
    sequence_parallel: bool

    @classmethod
    def of(cls, hidden: Tensor, rows: Tensor, shard: VocabShard, sequence_parallel: bool) -> HiddenRows:
        """hidden [B, S, H], or [B, S / P, H] with ``sequence_parallel``; rows [T] index the flattened [B * S]."""
        split = sequence_parallel and shard.group is not None
        states, index = hidden.detach(), rows
        if split:
            batch, part = hidden.size(0), hidden.size(1)
            row, position = rows // (part * shard.size), rows % (part * shard.size)
            index = (position // part) * (batch * part) + row * part + position % part
            states = shard.gather(states)
        return cls(states.reshape(-1, hidden.size(-1)), index, hidden.shape, shard.group, split)

    def pick(self, chunk: slice) -> Tensor:
        """[C, H], contiguous."""
        return self.states.index_select(0, self.index[chunk])

    def reduce_gradient(self, grad: Tensor) -> Tensor:
        """Sum over the group of ``grad`` [rows, H], shaped like the hidden states given: one collective."""
        if self.group is not None and self.sequence_parallel:
            part = grad.new_empty(grad.size(0) // dist.get_world_size(self.group), grad.size(1))
            dist.reduce_scatter_tensor(part, grad, group=self.group)
            grad = part
        elif self.group is not None:
            dist.all_reduce(grad, group=self.group)
        return grad.view(self.shape)


def kernels_serve(tensor: Tensor) -> bool:
    """True if Triton's kernels stream the logits: on a GPU, for bf16, fp16 and fp32; the same on every rank."""
    return tensor.device.type == "cuda" and tensor.dtype in KERNEL_DTYPES


def chunk_size(tokens: int, columns: int, hidden: Tensor, chunk_tokens: int | None) -> int:
    """Tokens a chunk: ``chunk_tokens``, or as many as keep the logits within ``CHUNK_BYTES``, evenly split.
    Depends on sizes that all ranks share, never on a rank's true columns."""
    if chunk_tokens is not None:
        if chunk_tokens < 1:
            raise ValueError(f"chunk_tokens is {chunk_tokens}; give a number of tokens above 0, or None")
        return chunk_tokens
    own, wide = hidden.element_size(), torch.promote_types(hidden.dtype, torch.float32).itemsize
    copies = 2 * own if kernels_serve(hidden) else wide if wide == own else wide + own
    most = max(1, CHUNK_BYTES.get(hidden.device.type, CHUNK_BYTES["cuda"]) // max(1, columns * copies))
    tile = WHOLE_TILES if hidden.device.type == "cuda" and most >= WHOLE_TILES else 1
    most -= most % tile
    chunks = max(1, -(-tokens // most))
    size = max(1, -(-tokens // chunks))
    return size if size <= tile else size + -size % tile


def check_head(
    hidden: Tensor,
    weight: Tensor,
    rows: Tensor,
    token_ids: Tensor,
    shard: VocabShard,
    sequence_parallel: bool,
    *,
    trusted: bool = False,
) -> None:
    """ValueError for hidden states, weight, rows or sampled ids that do not fit together. ``trusted``: rows and ids are
    not looked at, which on a GPU waits for all that was launched before."""
    if hidden.dim() != 3:
        raise ValueError(f"hidden has shape {tuple(hidden.shape)}; give [B, S, H], batch first")
    if weight.dim() != 2 or weight.size(1) != hidden.size(2):
        shapes = f"weight is {tuple(weight.shape)} but hidden {tuple(hidden.shape)}"
        raise ValueError(f"{shapes}; give weight [V_local, H] of the same H")
    if hidden.dtype != weight.dtype or not hidden.is_floating_point():
        raise ValueError(f"hidden is {hidden.dtype} but weight {weight.dtype}; give the same floating type")
    if rows.dim() != 1 or token_ids.shape != rows.shape:
        raise ValueError(f"rows {tuple(rows.shape)} and token_ids {tuple(token_ids.shape)} must both be [T]")
    check_integers(token_ids, "token_ids")
    if trusted:
        return
    positions = hidden.size(0) * hidden.size(1) * (shard.size if sequence_parallel else 1)
    outside = (rows < 0) | (rows >= positions)
    # One look at the device for both.
    if not bool((outside | (token_ids < 0) | (token_ids >= shard.vocab_size)).any()):
        return
    if bool(outside.any()):
        i = int(outside.nonzero()[0])
        raise ValueError(f"rows[{i}] is {int(rows[i])}, outside the {positions} output positions of the micro-batch")
    check_ids(token_ids, shard.vocab_size, "token_ids")


def first_bad(
    teacher: TeacherScores, reference: Tensor | None, log_z: Tensor, losses: Tensor
) -> tuple[str, int] | None:
    """What is not finite, where it began, and the first such token; one look at the device. All tensors are [T]."""
    causes = {"the teacher's logits": teacher.log_probs.isnan()}
    if reference is not None:
        causes["the reference's logits"] = reference.isnan()
    causes |= {"the student's logits": ~log_z.isfinite(), "the loss": ~losses.isfinite()}
    found = torch.stack(list(causes.values())).nonzero()
    if not len(found):
        return None
    cause, token = found[0].tolist()
    return list(causes)[cause], token


def check_tokens(
    tokens: LossTokens, teacher: TeacherScores | None, shard: VocabShard, *, trusted: bool = False
) -> None:
    """ValueError for per-token tensors that are not [T] and for a teacher's top k that is not [T, K] of true ids, which
    are not looked at if ``trusted``."""
    count = len(tokens)
    named = {f"tokens.{name}": getattr(tokens, name) for name in ("guided", "uniforms", "behavior_log_probs")}
    if teacher is not None:
        named |= {"teacher.log_probs": teacher.log_probs, "teacher.entropy": teacher.entropy}
    for name, values in named.items():
        if values is not None and values.shape != (count,):
            raise ValueError(f"{name} has shape {tuple(values.shape)}; the micro-batch has {count} loss tokens")
    if teacher is None:
        return
    ids = teacher.top_k_ids
    if ids.dim() != 2 or ids.size(0) != count or ids.shape != teacher.top_k_log_probs.shape:
        both = f"teacher.top_k_ids {tuple(ids.shape)} and top_k_log_probs {tuple(teacher.top_k_log_probs.shape)}"
        raise ValueError(f"{both} must both be [{count}, K]")
    check_k(ids.size(1), shard.vocab_size)
    if not trusted:
        check_ids(ids, shard.vocab_size, "teacher.top_k_ids")
