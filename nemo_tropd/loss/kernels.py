"""Triton kernels of the chunked head: what is left of a loss between its matrix products.

Every kernel streams rows of logits [C, stride] where a product left them, in their own dtype (bf16, fp16 or fp32), and
computes in fp32, with logits times ``scale`` (one over the temperature). Columns at and past ``width`` never count,
whatever they contain, and get gradient 0. Buffers end on a multiple of 16 columns (``aligned``), so that loads and
stores are 128 bits wide. Results are this shard's alone, and relative to the row's maximum on it;
``loss.kernel_chunks`` reduces them.

Each row has a program of its own, unless ``programs`` asks for fewer, which then walk several rows each and leave
multiprocessors to a product that runs beside. With TRITON_INTERPRET=1 set before Triton is first imported, all of it
runs on CPU tensors.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

ALIGN = 16  # columns: 128-bit accesses for every dtype
TILE = 4096  # columns a program handles at a time
WARPS = 8
GRADIENT_TILE = 4096


def aligned(columns: int) -> int:
    """The row length, in columns, of a buffer for ``columns`` columns."""
    return -(-columns // ALIGN) * ALIGN


@dataclass(frozen=True)
class Streamed:
    """One pass over a shard's logits [C, width]; partial results, relative to the shard's own maximum."""

    top: Tensor  # [C] fp32, the maximum; -inf for an empty shard. z is a logit times ``scale``
    sums: Tensor  # [C] fp32, sum of exp(z - top)
    columns: Tensor  # [C, N] fp32, z - top at the ids this shard owns, else 0
    entropy: Tensor | None  # [C] fp32, sum of -exp(z - top) (z - top)
    block_maxima: Tensor | None  # [C, blocks] fp32, of the logits as they are


@triton.jit
def _stream_kernel(
    logits, ids, top_out, sums_out, entropy_out, columns_out, maxima_out,
    rows, stride, width, limit, count, blocks, factor,
    COUNT: tl.constexpr, SUB: tl.constexpr, PER: tl.constexpr, ENTROPY: tl.constexpr, MAXIMA: tl.constexpr,
):  # fmt: skip
    TILE: tl.constexpr = SUB * PER
    lowest = -float("inf")
    for row in range(tl.program_id(0), rows, tl.num_programs(0)):
        r = tl.cast(row, tl.int64)
        base = logits + r * stride
        top = lowest
        total = 0.0
        weighted = 0.0  # sum of exp(z - top) (z - top)
        for i in range(0, tl.cdiv(limit, TILE)):
            o = i * TILE + tl.arange(0, TILE)
            # ``limit`` is ``width`` rounded up to whole 128-bit accesses; what lies between is masked afterwards.
            x = tl.load(base + o, mask=o < limit, other=lowest).to(tl.float32)
            x = tl.where(o < width, x, lowest)
            if MAXIMA:
                part = tl.max(tl.reshape(x, (PER, SUB)), 1)
                j = i * PER + tl.arange(0, PER)
                tl.store(maxima_out + r * blocks + j, part, mask=j < blocks)
                new = tl.maximum(top, tl.max(part, 0))
            else:
                new = tl.maximum(top, tl.max(x, 0))
            anchor = tl.where(new == lowest, 0.0, new)
            scale = tl.exp((top - anchor) * factor)
            y = (x - anchor) * factor
            p = tl.exp(y)
            if ENTROPY:
                moved = tl.where(total > 0, (top - anchor) * factor, 0.0)
                weighted = scale * (weighted + total * moved) + tl.sum(tl.where(p > 0, p * y, 0.0), 0)
            total = total * scale + tl.sum(p, 0)
            top = new
        tl.store(top_out + row, top * factor)
        tl.store(sums_out + row, total)
        if ENTROPY:
            tl.store(entropy_out + row, -weighted)
        j = tl.arange(0, COUNT)
        column = tl.load(ids + r * count + j, mask=j < count, other=-1)
        owned = (column >= 0) & (column < width)
        value = tl.load(base + column, mask=owned, other=0.0).to(tl.float32)
        tl.store(columns_out + r * count + j, tl.where(owned, (value - top) * factor, 0.0), mask=j < count)


def stream(
    logits: Tensor,
    width: int,
    local_ids: Tensor,
    *,
    entropy: bool = False,
    sub_block: int | None = None,
    programs: int | None = None,
    scale: float = 1.0,
) -> Streamed:
    """One read of ``logits`` [C, aligned], of which ``width`` columns count.

    local_ids [C, N] int32 or int64: columns of this shard; any other value (-1, another rank's) gives 0. ``sub_block``
    also keeps the maxima of blocks of so many columns.
    """
    check_rows(logits, width)
    rows, count = local_ids.shape
    device, wide = logits.device, torch.float32
    top, sums = (torch.empty(rows, dtype=wide, device=device) for _ in range(2))
    entropies = torch.empty(rows, dtype=wide, device=device) if entropy else None
    columns = torch.empty(rows, count, dtype=wide, device=device)
    blocks = -(-width // sub_block) if sub_block else 0
    maxima = torch.empty(rows, max(blocks, 1), dtype=wide, device=device) if sub_block else None
    if rows:
        sub = sub_block or 256
        _stream_kernel[(min(rows, programs or rows),)](
            logits, local_ids, top, sums, sums if entropies is None else entropies, columns,
            sums if maxima is None else maxima, rows, logits.stride(0), width, aligned(width), count, max(blocks, 1),
            float(scale), COUNT=power_of_two(count), SUB=sub, PER=TILE // sub, ENTROPY=entropy,
            MAXIMA=sub_block is not None, num_warps=WARPS,
        )  # fmt: skip
    return Streamed(top, sums, columns, entropies, maxima)


@triton.jit
def merged_columns(column, g, j, valid):
    """Gradients of a row's columns, each place's complete: the sampled token (column 0) may be among the others, which
    are distinct; both then get the sum of the two."""
    first = j == 0
    sampled = tl.sum(tl.where(first, column, 0), 0)
    twin = (column == sampled) & ~first & valid
    merged = g + tl.where(twin, tl.sum(tl.where(first, g, 0.0), 0), 0.0)
    return merged + tl.where(first, tl.sum(tl.where(twin, g, 0.0), 0), 0.0)


@triton.jit
def _gradient_kernel(
    logits, ids, log_z, grad, log_probs,
    rows, stride, width, limit, count, factor,
    COUNT: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    for row in range(tl.program_id(0), rows, tl.num_programs(0)):
        r = tl.cast(row, tl.int64)
        base = logits + r * stride
        z = tl.load(log_z + row)
        j = tl.arange(0, COUNT)
        valid = j < count
        column = tl.load(ids + r * count + j, mask=valid, other=-1)
        g = tl.load(grad + r * count + j, mask=valid, other=0.0)
        total = tl.sum(g, 0)
        for i in range(0, tl.cdiv(limit, TILE)):
            o = i * TILE + tl.arange(0, TILE)
            x = tl.load(base + o, mask=o < limit, other=0.0).to(tl.float32)
            y = tl.where(o < width, -tl.exp(x * factor - z) * total, 0.0)
            tl.store(base + o, y.to(logits.dtype.element_ty), mask=o < limit)
        merged = merged_columns(column, g, j, valid)
        p = tl.exp(tl.load(log_probs + r * count + j, mask=valid, other=0.0))
        owned = valid & (column >= 0) & (column < width)
        # Other threads of this program wrote these places a moment ago.
        tl.debug_barrier()
        tl.store(base + column, (merged - p * total).to(logits.dtype.element_ty), mask=owned)


def write_gradient(
    logits: Tensor,
    width: int,
    local_ids: Tensor,
    log_z: Tensor,
    grad: Tensor,
    log_probs: Tensor,
    *,
    programs: int | None = None,
    scale: float = 1.0,
) -> None:
    """Overwrite ``logits`` [C, aligned] with scatter(grad) - softmax(logits * scale) * sum(grad); padding gets 0.

    local_ids, grad (fp32), log_probs (fp32, normalised) [C, N]: within a row all ids of this shard but the first are
    distinct.
    log_z [C] fp32 over the full vocabulary.
    """
    check_rows(logits, width)
    rows, count = local_ids.shape
    if rows:
        _gradient_kernel[(min(rows, programs or rows),)](
            logits, local_ids, log_z, grad, log_probs,
            rows, logits.stride(0), width, aligned(logits.size(1)), count, float(scale),
            COUNT=power_of_two(count), TILE=GRADIENT_TILE, num_warps=WARPS,
        )  # fmt: skip


@triton.jit
def _scale_kernel(values, factor, size, BLOCK: tl.constexpr):
    f = tl.load(factor)
    if f != 1.0:
        o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(values + o, mask=o < size, other=0.0)
        tl.store(values + o, (x.to(tl.float32) * f).to(values.dtype.element_ty), mask=o < size)


def scale_(values: Tensor, factor: Tensor) -> Tensor:
    """values *= factor, contiguous and in place; costs nothing if the factor is 1, and never waits for it."""
    if values.numel():
        _scale_kernel[(triton.cdiv(values.numel(), 4096),)](
            values, factor.float().reshape(1), values.numel(), BLOCK=4096, num_warps=8
        )
    return values


@triton.jit
def _add_scaled_kernel(total, part, factor, size, BLOCK: tl.constexpr):
    f = tl.load(factor)
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    kept = o < size
    x = tl.load(part + o, mask=kept, other=0.0).to(tl.float32)
    t = tl.load(total + o, mask=kept, other=0.0).to(tl.float32)
    tl.store(total + o, (t + x * f).to(total.dtype.element_ty), mask=kept)


def add_scaled_(total: Tensor, part: Tensor, factor: Tensor) -> Tensor:
    """total += factor * part in one pass, both contiguous and of one size; dtypes may differ."""
    if total.numel():
        _add_scaled_kernel[(triton.cdiv(total.numel(), 4096),)](
            total, part, factor.float().reshape(1), total.numel(), BLOCK=4096, num_warps=8
        )
    return total


def check_rows(logits: Tensor, width: int) -> None:
    """ValueError unless the rows of ``logits`` are aligned and have ``width`` columns."""
    if logits.dim() != 2 or logits.stride(1) != 1 or logits.stride(0) % ALIGN or not 0 < width <= logits.size(1):
        raise ValueError(
            f"logits {tuple(logits.shape)}, strides {logits.stride()}, width {width}: give rows that start a multiple "
            f"of {ALIGN} columns apart, and a width within them"
        )
    if aligned(logits.size(1)) > logits.stride(0):
        raise ValueError(f"rows of {logits.size(1)} columns need room for {aligned(logits.size(1))}")


def power_of_two(count: int) -> int:
    """The least power of two that is at least ``count``."""
    return 1 << max(0, count - 1).bit_length()
