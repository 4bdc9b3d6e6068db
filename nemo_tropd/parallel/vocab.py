"""Log-probabilities and top-k of logits whose vocabulary is split over tensor-parallel ranks.

The vocabulary contract: rank r of a group of size P holds columns ``r * V_local .. (r + 1) * V_local - 1``; columns at
and past the true ``vocab_size`` are padding and never enter a maximum, a top-k or a sum. ``group=None`` is one rank.
Needs torch alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup, ReduceOp

# Rows are upcast a block at a time, so that no fp32 copy of all the logits ever exists.
_BLOCK_BYTES = 64 << 20
# Columns per block of the two-step top-k: the k blocks with the largest maxima hold the k largest values.
_TOP_K_BLOCK = 64


class NonFiniteLogits(ValueError):
    """Logits of at least one row are NaN or infinite, so that they have no log-probabilities."""


@dataclass(frozen=True)
class VocabShard:
    """The true columns ``start .. start + width - 1`` held by this rank; ``group`` is None for a group of one."""

    start: int
    width: int
    vocab_size: int
    group: ProcessGroup | None
    columns: int  # held in all, padding included: the same on every rank

    @classmethod
    def of(cls, columns: int, group: ProcessGroup | None, vocab_size: int | None) -> VocabShard:
        """The shard of a rank that holds ``columns`` columns, padding included; ValueError if they are too few."""
        size, rank = (1, 0) if group is None else (dist.get_world_size(group), dist.get_rank(group))
        total = columns * size
        true = total if vocab_size is None else vocab_size
        if not 0 < true <= total:
            raise ValueError(f"vocab_size is {true}, but {size} rank(s) of {columns} columns hold {total}")
        start = min(rank * columns, true)
        return cls(start, max(0, min(true - rank * columns, columns)), true, group if size > 1 else None, columns)

    @property
    def size(self) -> int:
        return 1 if self.group is None else dist.get_world_size(self.group)

    def locate(self, token_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Local column (0 where another rank has it) and ownership of global ids, both shaped like ``token_ids``."""
        local = token_ids - self.start
        owned = (local >= 0) & (local < self.width)
        return torch.where(owned, local, 0), owned

    def reduce(self, tensor: Tensor, op: Any) -> Tensor:
        """All-reduce in place over the group; the tensor itself where there is no group."""
        if self.group is not None:
            dist.all_reduce(tensor, op=op, group=self.group)
        return tensor

    def gather(self, tensor: Tensor) -> Tensor:
        """[P, *tensor.shape]: every rank's tensor."""
        if self.group is None:
            return tensor[None]
        out = tensor.new_empty(self.size, *tensor.shape)
        dist.all_gather_into_tensor(out.view(-1, *tensor.shape[1:]), tensor.contiguous(), group=self.group)
        return out


@dataclass(frozen=True)
class TopK:
    """The k largest of each row over the full true vocabulary, descending; detached, replicated over the group."""

    log_probs: Tensor  # [..., k] fp32
    token_ids: Tensor  # [..., k] int64, global
    log_z: Tensor  # [...] fp32, log-sum-exp of the row's logits


def vocab_parallel_log_probs(
    logits: Tensor, token_ids: Tensor, group: ProcessGroup | None = None, vocab_size: int | None = None
) -> Tensor:
    """log softmax of the full row at ``token_ids``: [..., N] fp32, the same on every rank, differentiable.

    logits [..., V_local] of any float type; token_ids [..., N] global, the same on every rank. Forward: one MAX and one
    SUM over the group; backward: none, since every rank computes the same loss from the same log-probabilities.
    The gradient has the logits' dtype, zero in padded columns. Raises ValueError for shapes that do not match or ids
    out of range and NonFiniteLogits for NaN, on every rank alike.
    """
    shard = VocabShard.of(logits.size(-1), group, vocab_size)
    if token_ids.shape[:-1] != logits.shape[:-1]:
        raise ValueError(
            f"token_ids {tuple(token_ids.shape)} and logits {tuple(logits.shape)} differ in their leading dimensions"
        )
    check_ids(token_ids, shard.vocab_size, "token_ids")
    rows = logits.reshape(-1, logits.size(-1))
    return _LogProbs.apply(rows, token_ids.reshape(rows.size(0), -1), shard).view(token_ids.shape)


def vocab_parallel_top_k(
    logits: Tensor, k: int, group: ProcessGroup | None = None, vocab_size: int | None = None
) -> TopK:
    """The k most probable tokens of each row; logits [..., V_local] of any float type. One packed gather, no gradient.

    Ties at the k-th place may fall either way, on every rank alike. Raises ValueError for k outside 1..vocab_size and
    NonFiniteLogits for NaN, on every rank alike.
    """
    shard = VocabShard.of(logits.size(-1), group, vocab_size)
    check_k(k, shard.vocab_size)
    rows = logits.detach().reshape(-1, logits.size(-1))[:, : shard.width]
    wide = torch.promote_types(logits.dtype, torch.float32)
    values, columns = largest(rows, min(k, shard.width))
    sums = torch.full((rows.size(0), 1), float("-inf"), dtype=wide, device=rows.device)
    if shard.width:
        for block in _row_blocks(rows):
            sums[block, 0] = rows[block].to(wide).logsumexp(-1)
    values, ids, gathered = merge_top_k(values.to(wide), columns + shard.start, sums, k, shard)
    log_z = gathered[..., 0].logsumexp(0)
    check_finite(log_z, "logits")
    shape = logits.shape[:-1]
    return TopK((values - log_z[:, None]).float().view(*shape, k), ids.view(*shape, k), log_z.float().view(shape))


def largest(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """``values.topk(k)`` of a [C, W] tensor; over wide rows two to four times faster: it reads only winning blocks."""
    count, width = values.shape
    blocks = width // _TOP_K_BLOCK
    if k == 0 or blocks < 4 * k or width % _TOP_K_BLOCK or not values.is_contiguous():
        top = values.topk(k, -1)
        return top.values, top.indices
    table = values.view(count * blocks, _TOP_K_BLOCK)
    winners = table.amax(-1).view(count, blocks).topk(k, -1, sorted=False).indices
    rows = winners + blocks * torch.arange(count, device=values.device)[:, None]
    top = table.index_select(0, rows.flatten()).view(count, -1).topk(k, -1)
    columns = winners.gather(1, top.indices // _TOP_K_BLOCK) * _TOP_K_BLOCK + top.indices % _TOP_K_BLOCK
    return top.values, columns


def merge_top_k(
    values: Tensor, token_ids: Tensor, columns: Tensor, k: int, shard: VocabShard
) -> tuple[Tensor, Tensor, Tensor]:
    """One packed gather: each rank's local top (values and global ids [C, <= k]) merged, and its ``columns`` [C, E].

    Returns values [C, k], ids [C, k] and the gathered columns [P, C, E]. A rank of fewer than k columns adds -inf.
    """
    if shard.group is None:
        return values, token_ids, columns[None]
    # Ids travel as floats: exact up to 2^24 in fp32, above that the whole parcel is fp64.
    parcel = values.dtype if shard.vocab_size <= 1 << 24 else torch.float64
    missing = k - values.size(1)
    packed = torch.cat(
        [
            torch.nn.functional.pad(values, (0, missing), value=float("-inf")),
            torch.nn.functional.pad(token_ids, (0, missing)),
            columns,
        ],
        1,
        out=torch.empty(values.size(0), 2 * k + columns.size(1), dtype=parcel, device=values.device),
    )
    gathered = shard.gather(packed)
    # Ranks hold ascending ids and each rank's equals come in order: a stable sort puts the lower id first.
    merged = gathered[:, :, :k].permute(1, 0, 2).flatten(1).sort(dim=-1, descending=True, stable=True)
    ids = gathered[:, :, k : 2 * k].permute(1, 0, 2).flatten(1).gather(1, merged.indices[:, :k]).long()
    return merged.values[:, :k].to(values.dtype), ids, gathered[:, :, 2 * k :].to(columns.dtype)


def check_integers(token_ids: Tensor, what: str) -> None:
    """ValueError for ids that are no integers."""
    if token_ids.is_floating_point() or token_ids.dtype == torch.bool:
        raise ValueError(f"{what} has dtype {token_ids.dtype}; give integers")


def check_ids(token_ids: Tensor, vocab_size: int, what: str) -> None:
    """ValueError naming the tensor, the index and the value of the first id outside the true vocabulary."""
    check_integers(token_ids, what)
    bad = (token_ids < 0) | (token_ids >= vocab_size)
    if bool(bad.any()):
        where = tuple(bad.nonzero()[0].tolist())
        raise ValueError(f"{what}{list(where)} is {int(token_ids[where])}, outside the vocabulary 0..{vocab_size - 1}")


def check_k(k: int, vocab_size: int) -> None:
    """ValueError unless 1 <= k <= vocab_size."""
    if not 1 <= k <= vocab_size:
        raise ValueError(f"k is {k}; give 1..{vocab_size}, the size of the vocabulary")


def check_finite(log_z: Tensor, what: str) -> None:
    """NonFiniteLogits naming the tensor and its first bad row; ``log_z`` is replicated: every rank raises at once."""
    bad = ~log_z.isfinite()
    if bool(bad.any()):
        row = int(bad.flatten().nonzero()[0])
        raise NonFiniteLogits(
            f"{what}: row {row} has a NaN or infinite value ({int(bad.sum())} of {bad.numel()} rows do); "
            f"its log-sum-exp is {float(log_z.flatten()[row])}"
        )


def _row_blocks(rows: Tensor) -> list[slice]:
    step = max(1, _BLOCK_BYTES // max(1, 4 * rows.size(1)))
    return [slice(i, i + step) for i in range(0, rows.size(0), step)]


class _LogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, token_ids: Tensor, shard: VocabShard) -> Tensor:
        wide = torch.promote_types(logits.dtype, torch.float32)
        rows = logits[:, : shard.width]
        top = rows.new_full((rows.size(0),), float("-inf"), dtype=wide)
        if shard.width:
            # A MAX over ranks need not carry a NaN to all of them; the SUM below does.
            top = rows.amax(-1).to(wide).nan_to_num(nan=float("-inf"), posinf=float("inf"), neginf=float("-inf"))
        shard.reduce(top, ReduceOp.MAX)
        local, owned = shard.locate(token_ids)
        packed = rows.new_zeros(rows.size(0), 1 + token_ids.size(1), dtype=wide)
        if shard.width:
            for block in _row_blocks(rows):
                packed[block, 0] = (rows[block] - top[block, None]).exp_().sum(-1)
            packed[:, 1:] = torch.where(owned, rows.gather(1, local).to(wide) - top[:, None], 0.0)
        shard.reduce(packed, ReduceOp.SUM)
        log_sum = packed[:, :1].log()
        check_finite(log_sum + top[:, None], "logits")
        ctx.save_for_backward(logits, local, owned, log_sum[:, 0] + top)
        ctx.width = shard.width
        return (packed[:, 1:] - log_sum).float()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        logits, local, owned, log_z = ctx.saved_tensors
        out = torch.zeros_like(logits)
        grad = grad.to(log_z.dtype)
        total = grad.sum(-1, keepdim=True)
        rows = logits[:, : ctx.width]
        if ctx.width:
            for block in _row_blocks(rows):
                slope = (rows[block] - log_z[block, None]).exp_().mul_(-total[block])
                # Added, not written: the same id may be asked for more than once.
                slope.scatter_add_(1, local[block], torch.where(owned[block], grad[block], 0.0))
                out[block, : ctx.width] = slope.to(out.dtype)
        return out, None, None
