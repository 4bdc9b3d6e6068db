"""Log-probabilities and top-k of logits whose vocabulary is split over tensor-parallel ranks. Needs torch alone.

The vocabulary contract: rank r of a group of size P has columns ``r * V_local .. (r + 1) * V_local - 1``; columns at
and past the true ``vocab_size`` are padding and never enter a maximum, a top-k or a sum. ``group=None`` is one rank.
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
# Columns per block of the two-step top-k: the k blocks with the largest maxima contain the k largest values.
_TOP_K_BLOCK = 64


class NonFiniteLogits(ValueError):
    """Logits of at least one row are NaN or infinite, so that they have no log-probabilities."""


@dataclass(frozen=True)
class VocabShard:
    """The true columns ``start .. start + width - 1`` of this rank; ``group`` is None for a group of one."""

    start: int
    width: int
    vocab_size: int
    group: ProcessGroup | None
    columns: int  # of the shard, padding included: the same on every rank

    @classmethod
    def of(cls, columns: int, group: ProcessGroup | None, vocab_size: int | None) -> VocabShard:
        """The shard of a rank with ``columns`` columns, padding included; ValueError if the group has too few."""
        size, rank = (1, 0) if group is None else (dist.get_world_size(group), dist.get_rank(group))
        total = columns * size
        true = total if vocab_size is None else vocab_size
        if not 0 < true <= total:
            raise ValueError(f"vocab_size is {true}, but {size} rank(s) of {columns} columns have {total}")
        start = min(rank * columns, true)
        return cls(start, max(0, min(true - rank * columns, columns)), true, group if size > 1 else None, columns)

    @property
    def size(self) -> int:
        return 1 if self.group is None else dist.get_world_size(self.group)

    def locate(self, token_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Local column (0 if another rank has it) and ownership of global ids, both shaped like ``token_ids``."""
        local = token_ids - self.start
        owned = (local >= 0) & (local < self.width)
        return torch.where(owned, local, 0), owned

    def reduce(self, tensor: Tensor, op: Any) -> Tensor:
        """All-reduce in place over the group; the tensor itself without a group."""
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


def resplit(rows: Tensor, columns: int, start: int, group: ProcessGroup | None) -> Tensor:
    """[columns, H]: from row ``start`` on those of a matrix that ``group`` has in equal parts, ``rows`` [V_local, H]; 0
    past its end. One broadcast a part, so that no rank ever has all of them."""
    size, rank = (1, 0) if group is None else (dist.get_world_size(group), dist.get_rank(group))
    found, each = rows.new_zeros(columns, rows.size(1)), rows.size(0)
    for part in range(size):
        piece = rows.contiguous() if part == rank else torch.empty_like(rows)
        if group is not None:
            dist.broadcast(piece, src=dist.get_global_rank(group, part), group=group)
        low, high = max(start, part * each), min(start + columns, (part + 1) * each)
        if low < high:
            found[low - start : high - start] = piece[low - part * each : high - part * each]
    return found


@dataclass(frozen=True)
class TopK:
    """The k largest of each row over the full true vocabulary, descending; detached, replicated over the group."""

    log_probs: Tensor  # [..., k] fp32
    token_ids: Tensor  # [..., k] int64, global
    log_z: Tensor  # [...] fp32, log-sum-exp of the row's logits


@dataclass(frozen=True)
class SoftmaxColumns:
    """The softmax of C rows over the full true vocabulary, at N columns of each, and what its gradient needs.

    Replicated over the group, all but ``exponentials``, ``local`` and ``owned``, which are this shard's.
    """

    log_probs: Tensor  # [C, N] wide: fp32, or fp64 for fp64 logits
    log_z: Tensor  # [C] wide, log-sum-exp of the row's logits; NaN or infinite if a logit is
    entropy: Tensor | None  # [C] wide, nats
    denominator: Tensor  # [C]: exponentials / denominator is the softmax
    exponentials: Tensor | None  # [C, width] wide, exp(z - the row's maximum); None unless the logits were overwritten
    local: Tensor  # [C, N], see VocabShard.locate
    owned: Tensor  # [C, N] bool


def softmax_columns(
    logits: Tensor, token_ids: Tensor, shard: VocabShard, *, entropy: bool = False, overwrite: bool = False
) -> SoftmaxColumns:
    """The log-softmax that every loss and score goes through, unless a Triton kernel has streamed the logits.

    logits [C, width], the shard's true columns; token_ids [C, N] global, the same on every rank. One MAX and one SUM.
    ``overwrite``: the exponentials replace the logits, which must be wide. Callers pass ``log_z`` to ``check_finite``.
    """
    wide = torch.promote_types(logits.dtype, torch.float32)
    top = logits.new_full((logits.size(0),), float("-inf"), dtype=wide)
    if shard.width:
        # A MAX over ranks need not carry a NaN to all of them; the SUM below does.
        top = logits.amax(-1).to(wide)
        top = torch.where(top.isnan(), float("-inf"), top)
    shard.reduce(top, ReduceOp.MAX)
    local, owned = shard.locate(token_ids)
    fixed = 2 if entropy else 1
    packed = top.new_zeros(logits.size(0), fixed + token_ids.size(1))
    if shard.width:
        packed[:, fixed:] = torch.where(owned, logits.gather(1, local).to(wide) - top[:, None], 0.0)
    _sum_exponentials(logits, top, packed[:, :fixed], overwrite=overwrite)
    shard.reduce(packed, ReduceOp.SUM)
    denominator = packed[:, 0]
    log_sum = denominator.log()
    return SoftmaxColumns(
        log_probs=packed[:, fixed:] - log_sum[:, None],
        log_z=log_sum + top,
        entropy=log_sum + packed[:, 1] / denominator if entropy else None,
        denominator=denominator,
        exponentials=logits if overwrite else None,
        local=local,
        owned=owned,
    )


@dataclass(frozen=True)
class SoftmaxTopK:
    """The k most probable tokens of C rows over the full true vocabulary, and what is asked of N columns of each.

    Detached, wide (fp32, or fp64 for fp64 logits) and replicated over the group.
    """

    log_probs: Tensor  # [C, N]
    top_k_log_probs: Tensor  # [C, K] descending
    top_k_ids: Tensor  # [C, K] int64, global
    log_z: Tensor  # [C]; NaN or infinite if a logit is
    entropy: Tensor | None  # [C], nats


def softmax_top_k(
    logits: Tensor, token_ids: Tensor, k: int, shard: VocabShard, *, entropy: bool = False, overwrite: bool = False
) -> SoftmaxTopK:
    """Arguments as for :func:`softmax_columns`, without gradient. One gather over the group."""
    wide = torch.promote_types(logits.dtype, torch.float32)
    values, columns = largest(logits, min(k, shard.width))
    values, fixed = values.to(wide), 3 if entropy else 2
    own = values.new_zeros(logits.size(0), fixed + token_ids.size(1))
    own[:, 0] = values[:, 0] if shard.width else float("-inf")
    if shard.width:
        local, owned = shard.locate(token_ids)
        own[:, fixed:] = torch.where(owned, logits.gather(1, local).to(wide), 0.0)
        # A shard of -inf alone adds nothing, and -inf less itself would be NaN.
        anchor = torch.where(own[:, 0] == float("-inf"), 0.0, own[:, 0])
        _sum_exponentials(logits, anchor, own[:, 1:fixed], overwrite=overwrite)
    return merge_softmax_top_k(values, columns + shard.start, own, k, shard, entropy=entropy)


def merge_softmax_top_k(
    values: Tensor, token_ids: Tensor, own: Tensor, k: int, shard: VocabShard, *, entropy: bool
) -> SoftmaxTopK:
    """All shards' top k and partial sums, merged by one gather.

    values, token_ids (global) [C, <= k]; own [C, 2 or 3, + N]: the shard's maximum, its sum of exponentials relative to
    it, with ``entropy`` the sum of -p log p of those exponentials, then N logits, 0 if another rank has them.
    """
    values, ids, parts = merge_top_k(values, token_ids, own, k, shard)
    fixed = 3 if entropy else 2
    top = parts[..., 0].amax(0)
    shift = torch.where(parts[..., 1] > 0, parts[..., 0] - top, 0.0)  # an empty shard's maximum is -inf
    sums = parts[..., 1] * shift.exp()
    denominator = sums.sum(0)
    log_sum = denominator.log()
    return SoftmaxTopK(
        # In the order of operations of softmax_columns: equal models then have R = 0 to the bit (on one rank).
        log_probs=(parts[..., fixed:].sum(0) - top[:, None]) - log_sum[:, None],
        top_k_log_probs=(values - top[:, None]) - log_sum[:, None],
        top_k_ids=ids,
        log_z=log_sum + top,
        entropy=log_sum + (parts[..., 2] * shift.exp() - sums * shift).sum(0) / denominator if entropy else None,
    )


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
        shapes = f"token_ids {tuple(token_ids.shape)} and logits {tuple(logits.shape)}"
        raise ValueError(f"{shapes} differ in their leading dimensions")
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
    found = softmax_top_k(rows, rows.new_empty(rows.size(0), 0, dtype=torch.int64), k, shard)
    check_finite(found.log_z, "logits")
    shape = logits.shape[:-1]
    return TopK(
        found.top_k_log_probs.float().view(*shape, k), found.top_k_ids.view(*shape, k), found.log_z.float().view(shape)
    )


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
    # Ids travel as floats: exact up to 2^24 in fp32, above that all of the packed tensor is fp64.
    dtype = values.dtype if shard.vocab_size <= 1 << 24 else torch.float64
    missing = k - values.size(1)
    packed = torch.cat(
        [
            torch.nn.functional.pad(values, (0, missing), value=float("-inf")),
            torch.nn.functional.pad(token_ids, (0, missing)),
            columns,
        ],
        1,
        out=torch.empty(values.size(0), 2 * k + columns.size(1), dtype=dtype, device=values.device),
    )
    gathered = shard.gather(packed)
    # Ranks have ascending ids and each rank's equals come in order: a stable sort puts the lower id first.
    merged = gathered[:, :, :k].permute(1, 0, 2).flatten(1).sort(dim=-1, descending=True, stable=True)
    ids = gathered[:, :, k : 2 * k].permute(1, 0, 2).flatten(1).gather(1, merged.indices[:, :k]).long()
    return merged.values[:, :k].to(values.dtype), ids, gathered[:, :, 2 * k :].to(columns.dtype)


def check_integers(token_ids: Tensor, what: str) -> None:
    """ValueError unless the ids are integers."""
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


def _sum_exponentials(logits: Tensor, top: Tensor, out: Tensor, *, overwrite: bool) -> None:
    """``out`` [C, 1 or 2] = this shard's sums of exp(z - top), and of -p log p of these terms; ``overwrite``: the terms
    replace the logits, else no wide copy of more than a block of rows is made."""
    for block in [slice(None)] if overwrite else _row_blocks(logits):
        shifted = logits.sub_(top[:, None]) if overwrite else logits[block] - top[block, None]
        terms = shifted.exp_()
        out[block, 0] = terms.sum(-1)
        if out.size(1) == 2:
            out[block, 1] = torch.special.entr(terms).sum(-1)


def _row_blocks(rows: Tensor) -> list[slice]:
    step = max(1, _BLOCK_BYTES // max(1, 4 * rows.size(1)))
    return [slice(i, i + step) for i in range(0, rows.size(0), step)]


class _LogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, token_ids: Tensor, shard: VocabShard) -> Tensor:
        found = softmax_columns(logits[:, : shard.width], token_ids, shard)
        check_finite(found.log_z, "logits")
        ctx.save_for_backward(logits, found.local, found.owned, found.log_z)
        ctx.width = shard.width
        return found.log_probs.float()

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
