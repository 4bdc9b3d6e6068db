"""Triton kernels of objectives that see both distributions: their sums over a row of both models' logits, and their
gradient written over the student's. Rows, buffers and padding as in ``loss.kernels``.

A formula stands for an objective of ``nemo_tropd.objectives`` and computes what its torch functions do:
reverse w = p R; forward F = sum of q (log q - log p); jsd and proximal w = p log(M / p), M = s q + (1 - s) p; trust and
threshold w = p a R, with sum of p (1 - a), of w log p and, if full, F. A product with 0 is 0, as in the limit.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .kernels import aligned, check_rows, merged_columns, power_of_two

TILE = 2048  # columns a program handles at a time
WARPS = 8
FORMULAS = {"reverse": 0, "forward": 1, "jsd": 2, "proximal": 3, "trust": 4, "threshold": 5}
SUMS = (1, 1, 2, 1, 4, 4)  # of each formula, in the order of its objective's


@dataclass(frozen=True)
class Pair:
    """A chunk of both models' logits, and what makes log-probabilities of them."""

    student: Tensor  # [C, columns], bf16, fp16 or fp32
    teacher: Tensor  # [C, columns of its own]
    width: int  # columns that count
    student_log_z: Tensor  # [C] fp32, of logits * scale, over all shards
    teacher_log_z: Tensor
    scale: float


@triton.jit
def _weights(lp, lq, p, log_share, log_rest, FORMULA: tl.constexpr):
    """w, 1 - a and log M of each column; the last two only if the formula has them."""
    r = lq - lp
    distrust = r
    mixture = r
    if FORMULA == 0:
        w = p * r
    elif FORMULA == 2 or FORMULA == 3:
        x = lq + log_share
        y = lp + log_rest
        most = tl.maximum(x, y)
        mixture = most + tl.log(tl.exp(x - most) + tl.exp(y - most))
        w = p * (mixture - lp)
    elif FORMULA == 4 or FORMULA == 5:
        if FORMULA == 4:
            a = tl.exp(tl.minimum(r, 0.0))
        else:
            a = tl.where(r >= 0, 1.0, 0.0)
        distrust = tl.where(p == 0, 0.0, p * (1 - a))
        w = tl.where(a == 0, 0.0, p * (a * r))
    else:
        w = r
    return tl.where(p == 0, 0.0, w), distrust, mixture


@triton.jit
def _sums_kernel(
    student, teacher, student_log_z, teacher_log_z, out,
    rows, student_stride, teacher_stride, width, limit, factor, log_share, log_rest, share,
    FORMULA: tl.constexpr, FULL: tl.constexpr, COUNT: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    lowest = -float("inf")
    for row in range(tl.program_id(0), rows, tl.num_programs(0)):
        r = tl.cast(row, tl.int64)
        z = tl.load(student_log_z + row)
        t = tl.load(teacher_log_z + row)
        # A sum a lane: lanes are added up once a row.
        first = tl.zeros((TILE,), tl.float32)
        second = tl.zeros((TILE,), tl.float32)
        third = tl.zeros((TILE,), tl.float32)
        fourth = tl.zeros((TILE,), tl.float32)
        for i in range(0, tl.cdiv(limit, TILE)):
            o = i * TILE + tl.arange(0, TILE)
            x = tl.load(student + r * student_stride + o, mask=o < limit, other=lowest).to(tl.float32)
            y = tl.load(teacher + r * teacher_stride + o, mask=o < limit, other=lowest).to(tl.float32)
            lp = tl.where(o < width, x, lowest) * factor - z
            lq = tl.where(o < width, y, lowest) * factor - t
            p = tl.exp(lp)
            if FORMULA == 1:
                q = tl.exp(lq)
                first += tl.where(q == 0, 0.0, q * (lq - lp))
            else:
                w, distrust, mixture = _weights(lp, lq, p, log_share, log_rest, FORMULA)
                first += w
                if FORMULA == 2:
                    q = tl.exp(lq)
                    second += tl.where(q == 0, 0.0, q * (lq - mixture))
                if FORMULA >= 4:
                    second += distrust
                    third += tl.where(w == 0, 0.0, w * lp)
                    if FULL:
                        q = tl.exp(lq)
                        fourth += tl.where(q == 0, 0.0, q * (lq - lp))
        one = tl.sum(first, 0)
        if FORMULA == 2:
            one *= 1 - share
        tl.store(out + r * COUNT, one)
        if COUNT > 1:
            tl.store(out + r * COUNT + 1, tl.sum(second, 0))
        if COUNT > 2:
            tl.store(out + r * COUNT + 2, tl.sum(third, 0))
            tl.store(out + r * COUNT + 3, tl.sum(fourth, 0))


@triton.jit
def _slope(
    lp, lq, one, two, exact, total, log_share, log_rest, share, FORMULA: tl.constexpr, FULL: tl.constexpr
):  # fmt: skip
    """exact * (p W - w [+ D (p - q)]) - p total."""
    p = tl.exp(lp)
    if FORMULA == 1:
        dense = p - tl.exp(lq)
    else:
        w, _, _ = _weights(lp, lq, p, log_share, log_rest, FORMULA)
        if FORMULA == 2:
            w *= 1 - share
        dense = p * one - w
        if FULL:
            dense += two * (p - tl.exp(lq))
    return tl.where(exact == 0, 0.0, dense * exact) - p * total


@triton.jit
def _exact_gradient_kernel(
    student, teacher, student_log_z, teacher_log_z, sums, exact_in, ids, grad, log_probs, their_log_probs,
    rows, student_stride, teacher_stride, width, limit, end, count, factor, log_share, log_rest, share,
    FORMULA: tl.constexpr, FULL: tl.constexpr, SUMS: tl.constexpr, COUNT: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    for row in range(tl.program_id(0), rows, tl.num_programs(0)):
        r = tl.cast(row, tl.int64)
        base = student + r * student_stride
        z = tl.load(student_log_z + row)
        t = tl.load(teacher_log_z + row)
        exact = tl.load(exact_in + row)
        one = tl.load(sums + r * SUMS)
        two = 0.0
        if SUMS > 1:
            two = tl.load(sums + r * SUMS + 1)
        j = tl.arange(0, COUNT)
        valid = j < count
        column = tl.load(ids + r * count + j, mask=valid, other=-1)
        g = tl.load(grad + r * count + j, mask=valid, other=0.0)
        total = tl.sum(g, 0)
        for i in range(0, tl.cdiv(end, TILE)):
            o = i * TILE + tl.arange(0, TILE)
            x = tl.load(base + o, mask=o < limit, other=0.0).to(tl.float32)
            y = tl.load(teacher + r * teacher_stride + o, mask=o < limit, other=0.0).to(tl.float32)
            slope = _slope(
                x * factor - z, y * factor - t, one, two, exact, total, log_share, log_rest, share, FORMULA, FULL
            )  # fmt: skip
            tl.store(base + o, tl.where(o < width, slope, 0.0).to(student.dtype.element_ty), mask=o < end)
        merged = merged_columns(column, g, j, valid)
        lp = tl.load(log_probs + r * count + j, mask=valid, other=0.0)
        lq = tl.load(their_log_probs + r * count + j, mask=valid, other=0.0)
        own = _slope(lp, lq, one, two, exact, total, log_share, log_rest, share, FORMULA, FULL)
        owned = valid & (column >= 0) & (column < width)
        # Other threads of this program wrote these places a moment ago.
        tl.debug_barrier()
        tl.store(base + column, (merged + own).to(student.dtype.element_ty), mask=owned)


def sums(pair: Pair, formula: str, number: float, *, programs: int | None = None) -> Tensor:
    """This shard's sums, [C, n] fp32. One read of both models' logits."""
    rows, kind = _checked(pair), FORMULAS[formula]
    out = torch.empty(rows, SUMS[kind], dtype=torch.float32, device=pair.student.device)
    if rows:
        _sums_kernel[(min(rows, programs or rows),)](
            pair.student, pair.teacher, pair.student_log_z, pair.teacher_log_z, out,
            rows, pair.student.stride(0), pair.teacher.stride(0), pair.width, aligned(pair.width), pair.scale,
            *_numbers(number), FORMULA=kind, FULL=kind > 3 and number > 0, COUNT=SUMS[kind], TILE=TILE,
            num_warps=WARPS,
        )  # fmt: skip
    return out


def write_gradient(
    pair: Pair,
    formula: str,
    number: float,
    totals: Tensor,
    gradients: tuple[Tensor, Tensor],
    columns: tuple[Tensor, Tensor, Tensor],
    *,
    programs: int | None = None,
) -> None:
    """Overwrite the student's logits with the gradient over them; padding gets 0.

    totals [C, n] over all shards. gradients: of the columns [C, N] and of the value [C], fp32. columns: their ids on
    this shard, and both models' normalised log-probabilities there, [C, N] each; see ``kernels.write_gradient``.
    """
    rows, kind = _checked(pair), FORMULAS[formula]
    grad, exact = gradients
    if rows:
        _exact_gradient_kernel[(min(rows, programs or rows),)](
            pair.student, pair.teacher, pair.student_log_z, pair.teacher_log_z, totals, exact, columns[0], grad,
            *columns[1:], rows, pair.student.stride(0), pair.teacher.stride(0), pair.width, aligned(pair.width),
            aligned(pair.student.size(1)), grad.size(1), pair.scale, *_numbers(number),
            FORMULA=kind, FULL=kind > 3 and number > 0, SUMS=SUMS[kind], COUNT=power_of_two(grad.size(1)), TILE=TILE,
            num_warps=WARPS,
        )  # fmt: skip


def _checked(pair: Pair) -> int:
    for logits in (pair.student, pair.teacher):
        check_rows(logits, pair.width)
    return pair.student.size(0)


def _numbers(share: float) -> tuple[float, float, float]:
    """log s, log(1 - s) and s."""
    return math.log(share) if share > 0 else 0.0, math.log1p(-share) if share < 1 else -math.inf, share
