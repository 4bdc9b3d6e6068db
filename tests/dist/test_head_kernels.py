"""The Triton kernels in Triton's interpreter, on CPU: each against fp32 torch, and the whole head on 1 and 2 ranks.

Triton reads TRITON_INTERPRET when it is first imported, so every case runs in a process started for it.
"""

from __future__ import annotations

import random
import math
import os
import time
from dataclasses import replace
from itertools import product
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from nemo_tropd.batch import Sampling
from nemo_tropd.loss import backend, inputs, teacher, weight_gradient
from nemo_tropd.loss.head import head_loss, teacher_scores
from nemo_tropd.loss.inputs import HeadLayout
from nemo_tropd.objectives.tropd_exact import ExactTrOPD
from tests.dist.checks import Checks
from tests.dist.run_distributed import run_distributed
from tests.dist.test_head_parallel import (
    LAYOUTS,
    TOLERANCE,
    check_empty,
    check_errors,
    check_exact,
    check_micro_batches,
    check_teacher,
    run_head,
    shard,
)
from tests.oracles.exact import EXACT, FINITE
from tests.oracles.micro_batch import VARIANTS, make, objective_and_loss

pytestmark = pytest.mark.random

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Gradients are rounded to the logits' dtype once, when they are written (the interpreter cuts bf16 off).
ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-3}
# rows, columns, k: one row, odd sizes, fewer columns than a tile, several tiles, k of all columns and of one
SHAPES = ((1, 4097, 64), (3, 1000, 16), (2, 9001, 64), (2, 70, 64), (3, 33, 33), (5, 300, 1), (4, 5000, 100))
KINDS = ("random", "flat", "peaked", "ties", "minus infinity")


def cases(each: int) -> list[tuple[str, torch.dtype, tuple[int, int, int]]]:
    """Every kind with every dtype, each in ``each`` of the shapes; another choice on every run."""
    chosen = torch.randint(len(SHAPES), (1,)).item()
    return [
        (kind, dtype, SHAPES[(chosen + 5 * n + i) % len(SHAPES)])
        for n, (kind, dtype) in enumerate(product(KINDS, DTYPES))
        for i in range(each)
    ]


def rows_of(kind: str, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """Logits [rows, columns] with a shape that a streaming maximum or a top k may stumble over."""
    z = torch.randn(rows, columns) * 3
    if kind == "flat":
        z = torch.full_like(z, 0.5)
        z[:, ::3] = -0.0  # equal to 0.0, which has another bit pattern
        z[:, 1::3] = 0.0
    elif kind == "peaked":
        z = z - 60
        z[torch.arange(rows), torch.randint(columns, (rows,))] = 40.0
    elif kind == "ties":
        z = z.round()
    elif kind == "minus infinity":
        z[torch.rand_like(z) < 0.3] = -math.inf
        z[:, 0] = 1.0
        z[0, 1:] = -math.inf  # what is left of a row may be one column
    return z.to(dtype)


def poisoned(z: Tensor) -> Tensor:
    """``z`` in a buffer whose further columns hold NaN: padding of the vocabulary and of the row."""
    from nemo_tropd.loss import kernels

    buffer = torch.full((z.size(0), kernels.aligned(z.size(1)) + 32), math.nan, dtype=z.dtype)
    buffer[:, : z.size(1)] = z
    return buffer


def relative(got: Tensor, want: Tensor) -> float:
    """Of the norms; NaN anywhere gives NaN, which is below nothing."""
    return float((got.double() - want.double()).norm() / want.double().norm().clamp(min=1e-30))


def check_streams(checks: Checks) -> None:
    from nemo_tropd.loss import kernels, kernels_top_k

    for n, (kind, dtype, (rows, width, k)) in enumerate(cases(2)):
        case = f"{kind} {dtype} [{rows}, {width}] k {k}"
        z = rows_of(kind, rows, width, dtype)
        logits, f = poisoned(z), z.float()
        ids = torch.stack([torch.randperm(width)[: min(width, 5)] for _ in range(rows)])
        ids[:, 0] = torch.tensor([-1, width])[torch.randint(2, (rows,))]  # another rank's
        sub, scale = kernels_top_k.sub_block_for(width, k), (1.0, 1 / 0.6)[n % 2]
        out = kernels.stream(logits, width, ids, entropy=True, sub_block=sub, programs=2, scale=scale)
        case, raw, f = f"{case} scale {scale:.2f}", f, f * torch.tensor(scale)
        top = f.amax(-1)
        raised = (f - top[:, None]).exp()
        checks.true(case + " maximum", torch.equal(out.top, top), out.top)
        checks.true(case + " sum", relative(out.sums, raised.sum(-1)) < 1e-5, out.sums)
        assert out.entropy is not None and out.block_maxima is not None
        want = torch.special.entr(raised).sum(-1)
        checks.true(case + " entropy", bool(((out.entropy - want).abs() <= 1e-5 * (1 + want)).all()))
        columns = torch.where((ids >= 0) & (ids < width), f.gather(1, ids.clamp(0, width - 1)) - top[:, None], 0.0)
        same = torch.equal(out.columns, columns) if scale == 1 else torch.allclose(out.columns, columns, 1e-5, 1e-4)
        checks.true(case + " columns", same, out.columns)
        values, found = kernels_top_k.top_k(logits, width, k, out.block_maxima, sub, programs=2)
        order = (raw + 0.0).sort(dim=-1, descending=True, stable=True)
        checks.true(case + " top k", torch.equal(values, order.values[:, :k]), values)
        checks.true(case + " lower ids first", torch.equal(found, order.indices[:, :k]), found)


def check_gradients(checks: Checks) -> None:
    from nemo_tropd.loss import kernels

    for n, (kind, dtype, (rows, width, _)) in enumerate(cases(2)):
        z = rows_of(kind, rows, width, dtype)
        logits, f = poisoned(z)[:, : width + 5], z.float()
        count = min(width, 9)
        ids = torch.stack([torch.randperm(width)[:count] for _ in range(rows)])
        ids[: rows // 2 + 1, 0] = ids[: rows // 2 + 1, -1]  # the sampled token is in the top k
        ids[-1, 1] = width + 3  # another rank's
        owned = ids < width
        local = torch.where(owned, ids, 0)
        scale = (1.0, 1 / 1.3)[n % 2]
        log_z = (f * scale).logsumexp(-1)
        log_probs = torch.where(owned, f.gather(1, local) * scale - log_z[:, None], -1.0)
        grad = torch.randn(rows, count)
        want = -(f * scale - log_z[:, None]).exp() * grad.sum(-1, keepdim=True)
        want.scatter_add_(1, local, torch.where(owned, grad, 0.0))
        kernels.write_gradient(logits, width, ids, log_z, grad, log_probs, programs=2, scale=scale)
        case = f"gradient {kind} {dtype} [{rows}, {width}]"
        error = relative(logits[:, :width].float(), want)
        checks.true(case, error < ROUNDING[dtype], error)
        checks.true(case + " padding", bool((logits[:, width:] == 0).all()), logits[:, width:])


def check_scaling(checks: Checks) -> None:
    from nemo_tropd.loss import kernels

    for dtype in DTYPES:
        values, total = torch.randn(5001).to(dtype), torch.randn(5001)
        for factor in (1.0, 0.25):
            want = (values.float() * factor).to(dtype)
            got = kernels.scale_(values.clone(), torch.tensor(factor))
            checks.true(f"scale {dtype} {factor}", torch.equal(got, want))
            got = kernels.add_scaled_(total.clone(), values, torch.tensor(factor))
            checks.true(f"add {dtype} {factor}", torch.equal(got, total + values.float() * factor))


def check_weight_gradient(checks: Checks) -> None:
    """A sum of chunks in bf16 loses under a percent; of more chunks it is kept in fp32."""
    slopes, states = torch.randn(34, 64, 50).bfloat16(), torch.randn(34, 64, 24).bfloat16()
    for chunks, dtype, tolerance in ((1, torch.bfloat16, 4e-3), (16, torch.bfloat16, 1e-2), (34, torch.float32, 4e-3)):
        total = weight_gradient.WeightGradient(torch.full((56, 24), math.nan, dtype=torch.bfloat16), 50, chunks)
        for slope, state in zip(slopes[:chunks], states[:chunks], strict=True):
            total.add(slope, state)
        want = torch.einsum("ncv,nch->vh", slopes[:chunks].double(), states[:chunks].double())
        error = relative(total.total[:50], want)
        checks.true(f"{chunks} chunks", total.total.dtype == dtype and error < tolerance, error)
        checks.true(f"{chunks} chunks: padding", bool((total.total[50:] == 0).all()))


def check_refusals(checks: Checks) -> None:
    from nemo_tropd.loss import kernels, kernels_top_k

    z = torch.randn(2, 40)
    for text, call in {
        "rows that start a multiple": lambda: kernels.stream(z, 40, torch.zeros(2, 1, dtype=torch.int64)),
        "width 0": lambda: kernels.stream(poisoned(z), 0, torch.zeros(2, 1, dtype=torch.int64)),
        "k is 41": lambda: kernels_top_k.top_k(poisoned(z), 40, 41, torch.zeros(2, 2), 32),
    }.items():
        with pytest.raises(ValueError, match=text):
            call()
        checks.true(text, True)


def check_head(checks: Checks, seed: int) -> None:
    """Every objective through the kernels against float64 on the full vocabulary, value and both gradients.

    Each in one of both dtypes, the other by turns in another run.
    """
    group, dtypes = dist.group.WORLD, (torch.float32, torch.bfloat16)
    for i, variant in enumerate(VARIANTS):
        dtype, layout, parallel, chunk = dtypes[(seed + i) % 2], i // 2 % 2, bool(i // 4 % 2), (None, 5)[i // 8 % 2]
        # Under bf16's rounding a draw or a threshold may fall to the other side: those inputs are fixed, and tame.
        fixed = dtype == torch.bfloat16
        mb = make(4 if fixed else seed + i, **LAYOUTS[0 if fixed else layout])
        if fixed:
            mb = replace(mb, hidden=mb.hidden / 4, teacher_hidden=mb.teacher_hidden / 4)
        case = f"{variant} {layout} chunk {chunk} sp {parallel} {dtype}"
        out, h, w, (want, want_h, want_w, size) = run_head(mb, variant, dtype, chunk, group, parallel, 1 / 37)
        checks.close(case + " loss", out.loss, want, TOLERANCE[dtype], size)
        checks.close(case + " hidden", h.grad, want_h, TOLERANCE[dtype])
        checks.close(case + " weight", w.grad, want_w, TOLERANCE[dtype])


def check_head_as_sampled(checks: Checks, seed: int) -> None:
    """Cut to the most probable tokens, some of which are the teacher's: each place of the gradient is written once."""
    group = dist.group.WORLD
    cases = (("tropd", Sampling(0.6, 0.95, 20)), ("jsd", Sampling(1.3, 0.9, 60)), ("entropy_opd", Sampling(0.5)))
    for i, (variant, sampling) in list(enumerate(cases))[:: dist.get_world_size()]:
        mb = make(seed + i, sampling=sampling, **LAYOUTS[i % 2])
        chunk, parallel = (None, 5)[i % 2], bool(i // 2)
        out, h, w, (want, *grads, size) = run_head(mb, variant, torch.float32, chunk, group, parallel, 1 / 37)
        case = f"{variant} {sampling}"
        checks.close(case + " loss", out.loss, want, 1e-5, size)
        checks.close(case + " hidden", h.grad, grads[0], 1e-5)
        checks.close(case + " weight", w.grad, grads[1], 1e-5)


def check_exact_kernels(checks: Checks) -> None:
    """Sums and gradient of both models' rows against the objective's own torch functions, with columns on top."""
    from nemo_tropd import objectives
    from nemo_tropd.loss import kernels_exact

    shapes = ((3, 2500), (2, 70), (1, 2048))
    for n, (variant, dtype) in enumerate(product(EXACT, DTYPES)):
        (rows, width), kind = shapes[n % 3], KINDS[(n // 3 + int(torch.randint(2, ()))) % len(KINDS)]
        objective = objectives.build(variant.partition(":")[0], **EXACT[variant])
        formula, scale = objective.kernel, (1.0, 1 / 0.7)[n % 2]
        z, t = rows_of("random", rows, width, dtype), rows_of(kind, rows, width, dtype)
        if variant not in FINITE and kind == "minus infinity":
            continue
        their_z = (t.float() * scale).logsumexp(-1)
        log_q = t.float() * scale - their_z[:, None]
        while True:  # a tie of both falls as rounding has it
            log_z = (z.float() * scale).logsumexp(-1)
            log_p = z.float() * scale - log_z[:, None]
            ties = (log_q - log_p).abs() < 1e-3
            if not ties.any():
                break
            z[ties] -= 1
        student, teacher = poisoned(z)[:, : width + 5], poisoned(t)[:, : width + 21]
        pair = kernels_exact.Pair(student, teacher, width, log_z, their_z, scale)
        wide_p, wide_q = log_p.double(), log_q.double()
        case, want = f"exact {variant} {kind} {dtype} [{rows}, {width}]", objective.sums(wide_p, wide_q)
        sums = kernels_exact.sums(pair, *formula, programs=2)
        checks.true(case + " sums", relative(sums, want) < 2e-5, (sums, want))
        count = min(width, 9)
        ids = torch.stack([torch.randperm(width)[:count] for _ in range(rows)])
        ids[0, 0] = ids[0, -1]  # the sampled token is in the top k
        ids[-1, 1] = width + 3  # another rank's
        owned, local = ids < width, ids.clamp(max=width - 1)
        columns = [torch.where(owned, x.gather(1, local), -1.0) for x in (log_p, log_q)]
        grad, exact = torch.randn(rows, count), torch.randn(rows)
        exact[0] = 0.0
        slope = objective.logit_gradient(wide_p, wide_q, sums.double()) * exact[:, None]
        slope = slope - wide_p.exp() * grad.sum(-1, keepdim=True).double()
        slope.scatter_add_(1, local, torch.where(owned, grad, 0.0).double())
        kernels_exact.write_gradient(pair, formula[0], formula[1], sums, (grad, exact), (ids, *columns), programs=2)
        error = relative(student[:, :width].float(), slope)
        checks.true(case + " gradient", error < ROUNDING[dtype], error)
        checks.true(case + " padding", bool((student[:, width:] == 0).all()))


def check_exact_head(checks: Checks, seed: int) -> None:
    """The head by these kernels, and with an objective of a user's own, which has none."""
    check_exact(checks, dist.group.WORLD, seed, torch.float32, list(EXACT)[seed % 2 :: 2])
    with mock.patch.object(ExactTrOPD, "kernel", None):
        check_exact(checks, dist.group.WORLD, seed + 1, torch.float32, ["tropd_exact:full"])


def check_paths_agree(checks: Checks, seed: int) -> None:
    """Teacher scores and loss by the kernels and by torch, with a vocabulary of several tiles."""
    from nemo_tropd import objectives

    rank, ranks = dist.get_rank(), dist.get_world_size()
    mb = make(seed, vocab_size=9001, padding=7 if ranks == 1 else 15, k=64, batch=1, length=6)
    results = []
    for serve in (_every_dtype, _never):
        _kernels(serve)
        w, t = (shard(x, rank, ranks, torch.float32) for x in (mb.weight, mb.teacher_weight))
        h = mb.hidden.float().requires_grad_(True)
        layout = HeadLayout(mb.vocab_size, dist.group.WORLD, chunk_tokens=4)
        scores = teacher_scores(
            mb.teacher_hidden.float(), t, mb.tokens.rows, mb.tokens.token_ids, 64, layout, entropy=True
        )
        out = head_loss(h, w, mb.tokens, scores, objectives.build("tropd"), layout, scale=0.1)
        out.loss.backward()
        results.append((scores, out.loss.detach(), h.grad, w.grad))
    _kernels(_every_dtype)
    (mine, *values), (theirs, *wanted) = results
    checks.true("paths: ids", torch.equal(mine.top_k_ids, theirs.top_k_ids))
    for name in ("log_probs", "top_k_log_probs", "entropy"):
        checks.close(f"paths: {name}", getattr(mine, name), getattr(theirs, name), 1e-5)
    # Losses of both signs cancel in the sum: its error is measured against the sum of their sizes.
    size = 0.1 * objective_and_loss("tropd", mb.world(mb.hidden, mb.weight))[1].abs().sum()
    for name, got, want in zip(("loss", "hidden", "weight"), values, wanted, strict=True):
        checks.close(f"paths: {name}", got, want, 1e-5, size if name == "loss" else None)


def check_a_shard_of_padding_alone(checks: Checks, seed: int) -> None:
    """Its rank goes by torch, the others by the kernels: both must mean the same by what they sum."""
    mb = make(seed, vocab_size=40, padding=40)
    run = run_head(mb, "entropy_opd", torch.float32, 5, dist.group.WORLD, False, 0.1)
    out, h, w, (want, want_h, want_w, size) = run
    checks.close("padding alone: loss", out.loss, want, 1e-5, size)
    checks.close("padding alone: hidden", h.grad, want_h, 1e-5)
    checks.close("padding alone: weight", w.grad, want_w, 1e-5)


def _every_dtype(tensor: Tensor) -> bool:
    return tensor.dtype in inputs.KERNEL_DTYPES


def _never(tensor: Tensor) -> bool:
    return False


def _kernels(serve: object) -> None:
    for module in (inputs, backend, teacher, weight_gradient):
        module.kernels_serve = serve


def _patch_once() -> None:
    """The interpreter puts its own functions into triton.language at a launch, and looks through all of it again for
    each call of a device function: half of its time. What is there already is not looked for."""
    from triton.language.core import is_builtin
    from triton.runtime import interpreter

    real, first = interpreter._patch_builtin, dict[Any, str | None]()

    def patch(package: Any, *rest: Any) -> None:
        if package not in first:
            first[package] = next((n for n in dir(package) if is_builtin(getattr(package, n))), None)
        name = first[package]
        if name is not None and is_builtin(getattr(package, name)):
            real(package, *rest)

    interpreter._patch_builtin = patch


def work(rank: int, world_size: int, seed: int) -> tuple[list[str], int, float]:
    started, checks, group = time.monotonic(), Checks(), dist.group.WORLD
    torch.manual_seed(seed)
    _patch_once()
    _kernels(_every_dtype)
    if world_size == 1:
        check_streams(checks)
        check_gradients(checks)
        check_scaling(checks)
        check_weight_gradient(checks)
        check_refusals(checks)
        check_exact_kernels(checks)
    check_exact_head(checks, seed)
    check_head(checks, seed)
    check_head_as_sampled(checks, seed)
    check_teacher(checks, group, seed)
    check_empty(checks, group)
    check_micro_batches(checks, group, None, seed)
    check_errors(checks, group)
    check_paths_agree(checks, seed)
    check_a_shard_of_padding_alone(checks, seed)
    return checks.failures, checks.count, time.monotonic() - started


@pytest.mark.timeout(560)
@pytest.mark.parametrize("world_size", [1, 2])
def test_kernels(world_size: int) -> None:
    seed = random.randrange(10**6)
    print(f"seed {seed}")
    with mock.patch.dict(os.environ, {"TRITON_INTERPRET": "1"}):
        results = run_distributed(work, world_size, seed, timeout_s=540, fresh=True)
    for rank, (failures, count, seconds) in enumerate(results):
        print(f"rank {rank}: {count} checks in {seconds:.1f} s")
        assert count > (400 if world_size == 1 else 150)
        assert not failures, f"seed {seed}, rank {rank}:\n" + "\n".join(failures)
