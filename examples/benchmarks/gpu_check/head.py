"""The fused head on a GPU: nearness to the limit, memory, peers, the top k, and its growth with the tokens."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial

import torch

from examples.benchmarks.gpu_check.rows import Row
from examples.benchmarks.head import (
    TOP_K,
    VARIANTS,
    VOCABULARY,
    Cost,
    Problem,
    Shape,
    free_gpu,
    gpu_cost,
    gradient_error,
    in_turn,
    limit_ms,
    median_ms,
    ours,
)
from examples.benchmarks.roofline import PAIRS
from nemo_tropd.loss import kernels, kernels_top_k

MOST = 1.15  # times the limit
MOST_GIB = 1.3
ERROR = 1e-2
PEERS = [name for name in VARIANTS if name not in ("ours: TrOPD", "Liger: JSD, chunks of 128")]
HELD_PEERS = ("plain torch: TrOPD", "Liger: JSD, chunks of 1024", "TRL: forward KL")


def check() -> Iterator[Row]:
    """The rows; about two minutes on an H100."""
    yield from _kernels()
    costs: dict[int, Cost] = {}
    for pair in PAIRS:
        for tokens in (2048, 8192, 32768) if pair == PAIRS[0] else (8192,):
            problem = Problem.random(_shape(tokens, pair))
            limit = limit_ms(problem)
            mine = gpu_cost(ours, problem)
            costs.setdefault(tokens, mine)
            name = f"T {tokens}, H {pair[0]} from {pair[1]}"
            ratio = mine.milliseconds / limit
            yield Row(
                f"{name}: time over the limit of {limit:.2f} ms", f"{mine.milliseconds:.2f} ms = {ratio:.3f} x",
                f"at most {MOST} x", ratio <= MOST,
            )  # fmt: skip
            most = MOST_GIB + 2 * problem.hidden.numel() / 2**30 * (tokens > 8192)
            yield Row(f"{name}: extra peak", f"{mine.peak_gib:.2f} GiB", f"at most {most:.2f}", mine.peak_gib <= most)
            yield from _peers(name, problem, mine, limit)
            del problem
            free_gpu()
        error = gradient_error(partial(ours, chunk_tokens=256), _shape(512, pair))
        yield Row(f"H {pair[0]}: gradient against fp32", f"{error:.1e}", f"at most {ERROR:.0e}", error <= ERROR)
    growth = costs[32768].milliseconds / costs[8192].milliseconds
    yield Row("time at T 32768 over T 8192", f"{growth:.2f}", "4, within 5%", abs(growth / 4 - 1) < 0.05)
    yield from _variants()


def _kernels() -> Iterator[Row]:
    """The passes alone, and the top k against torch's, exact and timed."""
    rows = 8192
    logits = torch.randn(rows, kernels.aligned(VOCABULARY), device="cuda", dtype=torch.bfloat16)
    ids = torch.randint(VOCABULARY, (rows, TOP_K + 1), device="cuda")
    sub = kernels_top_k.sub_block_for(VOCABULARY, TOP_K)

    def top_k() -> tuple[torch.Tensor, torch.Tensor]:
        streamed = kernels.stream(logits, VOCABULARY, ids[:, :1], sub_block=sub)
        assert streamed.block_maxima is not None
        return kernels_top_k.top_k(logits, VOCABULARY, TOP_K, streamed.block_maxima, sub)

    values, found = top_k()
    order = logits[:256].float().sort(dim=-1, descending=True, stable=True)
    same = torch.equal(values[:256], order.values[:, :TOP_K]) and torch.equal(found[:256], order.indices[:, :TOP_K])
    yield Row("top 64: values and ids of a stable sort", str(same), "True", same)
    flat = torch.zeros_like(logits[:4])
    streamed = kernels.stream(flat, VOCABULARY, ids[:4, :1], sub_block=sub)
    assert streamed.block_maxima is not None
    flat_ids = kernels_top_k.top_k(flat, VOCABULARY, TOP_K, streamed.block_maxima, sub)[1]
    exact = bool((flat_ids == torch.arange(TOP_K, device="cuda")).all())
    yield Row("top 64 of equal logits: the lowest ids", str(exact), "True", exact)
    mine, theirs = median_ms(top_k), median_ms(lambda: logits.topk(TOP_K, -1))
    yield Row(
        "top 64 with log-sum-exp against torch.topk", f"{mine:.2f} against {theirs:.2f} ms = {theirs / mine:.1f} x",
        "at least 5 x", theirs >= 5 * mine,
    )  # fmt: skip
    out = kernels.stream(logits, VOCABULARY, ids)
    log_z, log_probs = out.top + out.sums.log(), out.columns - out.sums.log()[:, None]
    grad = torch.randn(rows, TOP_K + 1, device="cuda") / rows
    size = logits.numel() * 2 / 1e9
    for name, step, moved in (
        ("student log-sum-exp and columns", lambda: kernels.stream(logits, VOCABULARY, ids), size),
        (
            "student gradient in place",
            lambda: kernels.write_gradient(logits, VOCABULARY, ids, log_z, grad, log_probs),
            2 * size,
        ),
    ):
        ms = median_ms(step)
        yield Row(f"pass: {name}", f"{ms:.2f} ms, {moved / ms:.2f} TB/s")
    free_gpu()


def _peers(name: str, problem: Problem, mine: Cost, limit: float) -> Iterator[Row]:
    for peer in PEERS:
        try:
            theirs = gpu_cost(VARIANTS[peer], problem)
        except torch.OutOfMemoryError:
            theirs = Cost(math.inf, math.inf)
        except ImportError as error:
            yield Row(f"{name}: {peer}", f"not installed ({error.name})")
            continue
        finally:
            free_gpu()
        better = mine.milliseconds < theirs.milliseconds and mine.peak_gib < theirs.peak_gib
        seen = f"{theirs.milliseconds:.2f} ms = {theirs.milliseconds / limit:.2f} x, {theirs.peak_gib:.2f} GiB"
        yield Row(
            f"{name}: {peer}", "out of memory" if math.isinf(theirs.milliseconds) else seen,
            "ours faster and lighter" if peer in HELD_PEERS else "", better if peer in HELD_PEERS else None,
        )  # fmt: skip


def _variants() -> Iterator[Row]:
    """Chunk sizes, and what running passes beside products gives."""
    problem = Problem.random(_shape(8192, PAIRS[0]))
    limit = limit_ms(problem)
    for chunk in (1024, 2048, 4096):
        c = gpu_cost(partial(ours, chunk_tokens=chunk), problem)
        yield Row(f"chunks of {chunk}", f"{c.milliseconds / limit:.3f} x limit, {c.peak_gib:.2f} GiB")
        with in_turn():
            c = gpu_cost(partial(ours, chunk_tokens=chunk), problem)
        yield Row(
            f"chunks of {chunk}, one after another", f"{c.milliseconds / limit:.3f} x limit, {c.peak_gib:.2f} GiB"
        )


def _shape(tokens: int, pair: tuple[int, int]) -> Shape:
    return Shape(tokens, VOCABULARY, pair[0], torch.bfloat16, pair[1], "cuda")
