"""Triton kernels of the teacher's top k: of a row of logits, only the blocks that can contain a winner are read again.

``kernels.stream`` keeps the maxima of blocks of columns. The k largest of them bound the k-th largest value from below;
the blocks above that bound are collected, and the few candidates in them ranked. Rows, buffers and padding as in
``loss.kernels``.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .kernels import aligned, check_rows, power_of_two

COLLECT_TILE = 1024  # columns a program handles at a time
# Sizes of the blocks whose maxima are kept: the largest that still leaves four blocks a candidate.
SUB_BLOCKS = (256, 128, 64, 32)


@triton.jit
def _key(x):
    """Order-preserving map of fp32 to unsigned 32-bit integers; both zeros alike."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    return tl.where(bits < 0, ~bits, bits ^ -2147483648).to(tl.uint32, bitcast=True)


@triton.jit
def _value(key):
    bits = key.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ -2147483648, ~bits).to(tl.float32, bitcast=True)


@triton.jit
def _winning_blocks_kernel(
    maxima, threshold_out, list_out, count_out, rows, blocks, k,
    BLOCKS: tl.constexpr, LIST: tl.constexpr, LOW_BIT: tl.constexpr,
):  # fmt: skip
    for row in range(tl.program_id(0), rows, tl.num_programs(0)):
        r = tl.cast(row, tl.int64)
        j = tl.arange(0, BLOCKS)
        real = j < blocks
        key = _key(tl.load(maxima + r * blocks + j, mask=real, other=-float("inf")))
        # The k-th largest key, bit by bit from the top; the lowest key of all if there are fewer than k blocks.
        threshold = tl.full((), 0, tl.uint32)
        bit = tl.full((), 2147483648, tl.uint32)
        for _ in range(0, 32 - LOW_BIT):
            tried = threshold | bit
            enough = tl.sum((real & (key >= tried)).to(tl.int32), 0) >= k
            threshold = tl.where(enough, tried, threshold)
            bit = bit >> 1
        chosen = real & (key >= threshold)
        place = tl.cumsum(chosen.to(tl.int32), 0) - 1
        tl.store(list_out + r * LIST + place, j, mask=chosen & (place < LIST))
        tl.store(count_out + row, tl.sum(chosen.to(tl.int32), 0))
        tl.store(threshold_out + row, threshold)


@triton.jit
def _collect_kernel(
    logits, thresholds, lists, list_counts, keys_out, ids_out, counts_out,
    rows, stride, width, limit, k,
    LIST: tl.constexpr, CAP: tl.constexpr, SUB: tl.constexpr, GROUP: tl.constexpr, TILE: tl.constexpr,
    LOW_BIT: tl.constexpr,
):  # fmt: skip
    lowest = -float("inf")
    for row in range(tl.program_id(0), rows, tl.num_programs(0)):
        r = tl.cast(row, tl.int64)
        base = logits + r * stride
        listed = tl.load(list_counts + row)
        threshold = tl.load(thresholds + row)
        found = 0
        if listed <= LIST:
            for i in range(0, tl.cdiv(listed, GROUP)):
                g = i * GROUP + tl.arange(0, GROUP)
                block = tl.load(lists + r * LIST + g, mask=g < listed, other=0)
                o = block[:, None] * SUB + tl.arange(0, SUB)[None, :]
                x = tl.load(base + o, mask=(g < listed)[:, None] & (o < limit), other=lowest).to(tl.float32)
                kept = (g < listed)[:, None] & (o < width) & (_key(x) >= threshold)
                o = tl.reshape(o, (GROUP * SUB,))
                key = tl.reshape(_key(x), (GROUP * SUB,))
                kept = tl.reshape(kept, (GROUP * SUB,))
                place = found + tl.cumsum(kept.to(tl.int32), 0) - 1
                here = kept & (place < CAP)
                tl.store(keys_out + r * CAP + place, key, mask=here)
                tl.store(ids_out + r * CAP + place, o, mask=here)
                found += tl.sum(kept.to(tl.int32), 0)
        if (listed > LIST) | (found > CAP):
            # Too many ties or too flat a row: the exact k-th key of all of it, then what lies above it, then of its
            # equals the lowest ids. Slow and rare.
            tl.debug_barrier()  # what was collected above is overwritten, by other threads
            threshold = tl.full((), 0, tl.uint32)
            bit = tl.full((), 2147483648, tl.uint32)
            for _ in range(0, 32 - LOW_BIT):
                tried = threshold | bit
                above = 0
                for i in range(0, tl.cdiv(limit, TILE)):
                    o = i * TILE + tl.arange(0, TILE)
                    key = _key(tl.load(base + o, mask=o < limit, other=lowest).to(tl.float32))
                    above += tl.sum(((o < width) & (key >= tried)).to(tl.int32), 0)
                threshold = tl.where(above >= k, tried, threshold)
                bit = bit >> 1
            found = 0
            # With the low bits left out, every key of the threshold's value has them all set or all clear.
            highest = threshold | ((tl.full((), 1, tl.uint32) << LOW_BIT) - 1)
            for equal in range(0, 2):
                for i in range(0, tl.cdiv(limit, TILE)):
                    o = i * TILE + tl.arange(0, TILE)
                    key = _key(tl.load(base + o, mask=o < limit, other=lowest).to(tl.float32))
                    same = (key >= threshold) & (key <= highest)
                    kept = (o < width) & tl.where(equal == 1, same, key > highest)
                    place = found + tl.cumsum(kept.to(tl.int32), 0) - 1
                    here = kept & (place < k)
                    tl.store(keys_out + r * CAP + place, key, mask=here)
                    tl.store(ids_out + r * CAP + place, o, mask=here)
                    found = tl.minimum(found + tl.sum(kept.to(tl.int32), 0), k)
        tl.store(counts_out + row, found)


@triton.jit
def _rank_kernel(
    keys, ids, counts, values_out, ids_out, rows, k,
    CAP: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    for row in range(tl.program_id(0), rows, tl.num_programs(0)):
        r = tl.cast(row, tl.int64)
        count = tl.load(counts + row)
        j = tl.arange(0, CAP)
        key = tl.load(keys + r * CAP + j, mask=j < count, other=0)
        own = tl.load(ids + r * CAP + j, mask=j < count, other=0)
        place = tl.zeros((CAP,), tl.int32)
        for i in range(0, tl.cdiv(count, PART)):
            n = i * PART + tl.arange(0, PART)
            other = tl.load(keys + r * CAP + n, mask=n < count, other=0)
            other_id = tl.load(ids + r * CAP + n, mask=n < count, other=0)
            ahead = (other[None, :] > key[:, None]) | (
                (other[None, :] == key[:, None]) & (other_id[None, :] < own[:, None])
            )
            place += tl.sum((ahead & (n < count)[None, :]).to(tl.int32), 1)
        out = (j < count) & (place < k)
        tl.store(values_out + r * k + place, _value(key), mask=out)
        tl.store(ids_out + r * k + place, own.to(tl.int64), mask=out)


def sub_block_for(width: int, k: int) -> int:
    """Columns a block of ``stream``'s maxima, for a top k of rows of ``width``."""
    return next((size for size in SUB_BLOCKS if width >= 4 * k * size), SUB_BLOCKS[-1])


def top_k(
    logits: Tensor, width: int, k: int, block_maxima: Tensor, sub_block: int, *, programs: int | None = None
) -> tuple[Tensor, Tensor]:
    """The k largest of each row of ``logits`` [C, aligned] within ``width``: values [C, k] fp32 descending, and columns
    [C, k] int64; of equal values the lower columns come first, and are the ones kept at the k-th place.

    ``block_maxima`` from ``stream`` with the same ``sub_block``. Exact for any row: if more candidates turn up than
    there is room for, the row is searched anew. k must not exceed ``width``.
    """
    check_rows(logits, width)
    if not 1 <= k <= width:
        raise ValueError(f"k is {k}; give 1..{width}, the shard's columns")
    rows, blocks = block_maxima.shape
    device = logits.device
    room = max(128, power_of_two(2 * k))  # candidates, and blocks, kept a row
    values = torch.empty(rows, k, dtype=torch.float32, device=device)
    ids = torch.empty(rows, k, dtype=torch.int64, device=device)
    if not rows:
        return values, ids
    thresholds = torch.empty(rows, dtype=torch.uint32, device=device)
    lists = torch.empty(rows, room, dtype=torch.int32, device=device)
    list_counts, counts = (torch.empty(rows, dtype=torch.int32, device=device) for _ in range(2))
    keys = torch.empty(rows, room, dtype=torch.uint32, device=device)
    candidates = torch.empty(rows, room, dtype=torch.int32, device=device)
    low_bit = 16 if logits.dtype == torch.bfloat16 else 0  # a bf16 value's lower bits say nothing
    grid = (min(rows, programs or rows),)
    _winning_blocks_kernel[grid](
        block_maxima, thresholds, lists, list_counts, rows, blocks, k,
        BLOCKS=power_of_two(blocks), LIST=room, LOW_BIT=low_bit, num_warps=4,
    )  # fmt: skip
    _collect_kernel[grid](
        logits, thresholds, lists, list_counts, keys, candidates, counts,
        rows, logits.stride(0), width, aligned(width), k,
        LIST=room, CAP=room, SUB=sub_block, GROUP=max(1, COLLECT_TILE // sub_block), TILE=COLLECT_TILE,
        LOW_BIT=low_bit, num_warps=4,
    )  # fmt: skip
    _rank_kernel[grid](keys, candidates, counts, values, ids, rows, k, CAP=room, PART=32, num_warps=4)
    return values, ids
