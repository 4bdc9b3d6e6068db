"""The fused heads on a GPU: nearness to their products, what overlap gains, peers, the top k; and tests/gpu."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from examples.benchmarks.gpu_check.rows import Row
from examples.benchmarks.head import (
    TOP_K,
    VARIANTS,
    VOCABULARY,
    Cost,
    Loss,
    Problem,
    Shape,
    free_gpu,
    gpu_cost,
    gradient_error,
    in_turn,
    limit_ms,
    median_ms,
    ours,
    ours_exact,
    plain,
)
from examples.benchmarks.roofline import GPUS, PAIRS, Head
from nemo_tropd.loss import kernels, kernels_top_k
from nemo_tropd.parallel.signals import die_with_parent

ROOT = Path(__file__).resolve().parents[3]
MOST = 1.15  # times the products
MOST_GIB = 1.3
ERROR = 1.2  # times what plain torch makes of the same dtype
PEERS = ("plain torch: TrOPD", "TRL: forward KL", "Liger: JSD, chunks of 1024", "CCE: cross-entropy, student's head")
UNJUDGED = PEERS[-1]  # it has one head of the two


def head() -> Iterator[Row]:
    """Forward and backward of both heads, 8192 tokens; then the second pair, the growth, the top k alone."""
    problem = Problem.random(_shape(8192, PAIRS[0]))
    limit, model = limit_ms(problem), Head(8192, VOCABULARY, *PAIRS[0], TOP_K)
    gpu = next((g for g in GPUS.values() if g.name.split()[0] in torch.cuda.get_device_name()), GPUS["h100"])
    modelled, passes = model.limit(gpu), sum(model.milliseconds(gpu).values()) - model.limit(gpu)
    yield Row(f"{_name(problem)}: the four products", f"{limit:.2f} ms; the model of {gpu.name}: {modelled:.2f}")
    mine = gpu_cost(ours, problem)
    ratio = mine.milliseconds / limit
    yield Row(
        "forward and backward", f"{mine.milliseconds:.2f} ms = {ratio:.3f} x the products", f"at most {MOST} x",
        ratio <= MOST,
    )  # fmt: skip
    yield Row("extra peak", f"{mine.peak_gib:.2f} GiB", f"at most {MOST_GIB}", mine.peak_gib <= MOST_GIB)
    with in_turn():
        alone = gpu_cost(ours, problem)
    gain = alone.milliseconds - mine.milliseconds
    yield Row(
        "overlap, against one chunk after another",
        f"{alone.milliseconds:.2f} ms without, gains {gain:.2f} of {alone.milliseconds - limit:.2f} ms beside the "
        f"products; the model's passes: {passes:.2f} ms",
        "a gain", gain > 0,
    )  # fmt: skip
    for peer in PEERS:
        yield _against(peer, VARIANTS[peer], problem, mine)
    for objective in ("tropd_exact", "opd_exact"):
        cost = gpu_cost(partial(ours_exact, objective=objective), problem)
        text = f"{cost.milliseconds:.2f} ms = {cost.milliseconds / limit:.3f} x the products, {cost.peak_gib:.2f} GiB"
        yield Row(f"{objective}, forward and backward", text, f"at most {MOST_GIB} GiB", cost.peak_gib <= MOST_GIB)
    for chunk in (1024, 4096):
        cost = gpu_cost(partial(ours, chunk_tokens=chunk), problem)
        yield Row(f"chunks of {chunk}", f"{cost.milliseconds / limit:.3f} x the products, {cost.peak_gib:.2f} GiB")
    del problem
    free_gpu()
    for pair in PAIRS:
        error, other = (gradient_error(f, _shape(512, pair)) for f in (partial(ours, chunk_tokens=256), plain))
        yield Row(
            f"H {pair[0]}: gradient against fp32", f"{error:.1e}, plain torch in bf16 {other:.1e}",
            f"at most {ERROR} of plain torch's", error <= ERROR * other,
        )  # fmt: skip
        free_gpu()
    yield from _top_k()
    for tokens, pair in ((8192, PAIRS[1]), (32768, PAIRS[0])):
        problem = Problem.random(_shape(tokens, pair))
        cost, limit = gpu_cost(ours, problem), limit_ms(problem)
        text = f"{cost.milliseconds:.2f} ms = {cost.milliseconds / limit:.3f} x the products, {cost.peak_gib:.2f} GiB"
        yield Row(
            f"{_name(problem)}: forward and backward", text, f"at most {MOST} x", cost.milliseconds <= MOST * limit
        )
        del problem
        free_gpu()


def _against(name: str, loss: Loss, problem: Problem, mine: Cost) -> Row:
    try:
        cost = gpu_cost(loss, problem)
    except torch.OutOfMemoryError:
        return Row(name, "out of memory")
    except ImportError as error:
        return Row(name, f"not installed ({error.name})")
    finally:
        free_gpu()
    better = mine.milliseconds < cost.milliseconds and mine.peak_gib < cost.peak_gib
    text = f"{cost.milliseconds:.2f} ms, {cost.peak_gib:.2f} GiB"
    return Row(name, text, "" if name == UNJUDGED else "ours faster and lighter", None if name == UNJUDGED else better)


def _top_k() -> Iterator[Row]:
    """Exact, also among equal logits, and timed with the log-sum-exp that comes with it."""
    logits = torch.randn(8192, kernels.aligned(VOCABULARY), device="cuda", dtype=torch.bfloat16)
    ids = torch.zeros(len(logits), 1, device="cuda", dtype=torch.int64)
    sub = kernels_top_k.sub_block_for(VOCABULARY, TOP_K)

    def top_k(z: torch.Tensor = logits) -> tuple[torch.Tensor, torch.Tensor]:
        streamed = kernels.stream(z, VOCABULARY, ids[: len(z)], sub_block=sub)
        assert streamed.block_maxima is not None
        return kernels_top_k.top_k(z, VOCABULARY, TOP_K, streamed.block_maxima, sub)

    values, found = top_k()
    order = logits[:256, :VOCABULARY].float().sort(dim=-1, descending=True, stable=True)
    same = torch.equal(values[:256], order.values[:, :TOP_K]) and torch.equal(found[:256], order.indices[:, :TOP_K])
    flat = bool((top_k(torch.zeros_like(logits[:4]))[1] == torch.arange(TOP_K, device="cuda")).all())
    yield Row("top 64 are a stable sort's; of equal logits the lowest ids", f"{same}, {flat}", "True", same and flat)
    mine, theirs = median_ms(top_k), median_ms(lambda: logits.topk(TOP_K, -1))
    yield Row(
        "top 64 with log-sum-exp against torch.topk", f"{mine:.2f} against {theirs:.2f} ms = {theirs / mine:.1f} x",
        "at least 5 x", theirs >= 5 * mine,
    )  # fmt: skip


def kernel_tests() -> Iterator[Row]:
    """tests/gpu, in a process of its own."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/gpu"]
    options: dict[str, Any] = {"capture_output": True, "text": True, "check": False, "preexec_fn": die_with_parent}
    done = subprocess.run(command, cwd=ROOT, **options)
    print(done.stdout[-20000:], done.stderr[-5000:], flush=True)
    last = done.stdout.strip().splitlines()[-1] if done.stdout.strip() else f"exit code {done.returncode}"
    passed = done.returncode == 0 and re.search(r"\d+ passed", last) is not None
    yield Row("tests/gpu", last.strip("= "), "all pass, none skipped", passed and "skipped" not in last)


def _name(problem: Problem) -> str:
    return f"T {len(problem.hidden)}, H {problem.hidden.size(1)} from {problem.teacher_hidden.size(1)}"


def _shape(tokens: int, pair: tuple[int, int]) -> Shape:
    return Shape(tokens, VOCABULARY, pair[0], torch.bfloat16, pair[1], "cuda")
