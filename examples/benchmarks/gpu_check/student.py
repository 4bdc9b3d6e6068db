"""The student on a GPU: random weights of a 1.5B shape with Transformer Engine layers, through our own passes.

Random weights stand in for real ones: the same speed and memory, and log-probabilities that any mistake in how
sequences are laid out would change.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from examples.benchmarks.gpu_check.rows import Row
from examples.benchmarks.head import free_gpu, median_ms
from examples.benchmarks.random_weights import random_weights
from examples.benchmarks.shapes import SHAPES
from nemo_tropd import objectives
from nemo_tropd.batch import Rollout, TeacherScores, TokenBatch
from nemo_tropd.config import OptimConfig
from nemo_tropd.gpt.build import build_gpt, head_weight
from nemo_tropd.gpt.ddp import data_parallel, recompute_fields
from nemo_tropd.gpt.forward import run_model
from nemo_tropd.loss.head import score_tokens
from nemo_tropd.loss.inputs import HeadLayout
from nemo_tropd.model.student_pass import StudentPass
from nemo_tropd.parallel.topology import Topology
from nemo_tropd.training.optimizer import StudentOptimizer

SHAPE = SHAPES["Qwen2.5-1.5B-Instruct"]
TOKENS, TOP_K = 8192, 64
NOISE = 1.2  # times what bf16 makes of one sequence at a time
GRADIENT_NOISE = 0.02  # relative: what sums rounded to bf16 may differ by from sums in fp32


def student() -> Iterator[Row]:
    """Packing, time and memory of a row, gradients, the optimizer, waits."""
    topology = Topology.start(seed=1)
    try:
        yield from _points(topology)
    finally:
        topology.stop()


def _points(topology: Topology) -> Iterator[Row]:
    model = build_gpt(SHAPE, topology, dtype=torch.bfloat16)
    # Initialized as a model of few layers: what attention finds then shows in the log-probabilities.
    random_weights(3, 4)(model)
    student = data_parallel(model, topology, distributed_optimizer=True)
    optimizer = StudentOptimizer(
        OptimConfig(lr=1e-5, distributed=True), student, dtype=torch.bfloat16, clip=1.0, max_steps=10
    )
    yield _same_log_probs(student, topology)
    yield from _one_row(student, topology)
    yield _layer_gradients(student, topology)
    yield _optimizer_step(student, optimizer, topology)
    step = _pass_of(student, topology, [_row(_rollouts([TOKENS // 4] * 4, seed=2), topology)])
    waits = _waits(step)
    text = f"{len(waits)}{': ' if waits else ''}{', '.join(waits)}"
    yield Row("times the host waits for the device in a pass of one row", text)


def _same_log_probs(student: DistributedDataParallel, topology: Topology) -> Row:
    """Packed and padded, each against one sequence at a time in fp32, as far as that is in bf16; then without the
    sequences' boundaries."""
    rollouts = _rollouts([700, 33, 1024, 4, 301], seed=1)
    exact = build_gpt(SHAPE, topology, dtype=torch.float32)
    for wide, own in zip(exact.parameters(), student.module.parameters(), strict=True):
        wide.data.copy_(own)
    each = [_padded([r], topology) for r in rollouts]
    want = _log_probs(exact, each, topology)
    del exact
    alone = _log_probs(student.module, each, topology)
    packed = _log_probs(student.module, [_row(rollouts, topology)], topology)
    padded = _log_probs(student.module, [_padded(rollouts, topology)], topology)
    joined = Rollout(rollouts[0].token_ids[:1], [i for r in rollouts for i in r.token_ids][1:], [], [], 0, 0, 0, True)
    scored = _row(rollouts, topology).loss_tokens().rows
    broken = _log_probs(student.module, [_padded([joined], topology)], topology)[scored]
    one, row, pad, contrast = ((x - want).abs().mean().item() for x in (alone, packed, padded, broken))
    return Row(
        "log-probabilities against one sequence at a time in fp32, mean |difference|",
        f"one at a time {one:.5f} nats, packed {row:.5f}, padded {pad:.5f}; without boundaries {contrast:.4f}",
        f"packed and padded at most {NOISE} of one at a time; without boundaries far from it",
        max(row, pad) <= NOISE * one and contrast > 4 * row,
    )


def _one_row(student: DistributedDataParallel, topology: Topology) -> Iterator[Row]:
    """Forward and backward, head included, of one full row."""
    batches = [_row(_rollouts([TOKENS // 4] * 4, seed=2), topology)]
    step = _pass_of(student, topology, batches)
    ms, peak = median_ms(step), _peak(step)
    parameters = SHAPE.parameters()
    rate = 6 * parameters * TOKENS / ms / 1e9
    yield Row(
        f"1.5B-shaped, {TOKENS} tokens packed, forward and backward with head",
        f"{ms:.1f} ms, {TOKENS / ms * 1e3:,.0f} tokens/s, {rate:.0f} TFLOP/s (6 N T, attention apart), "
        f"peak {peak:.1f} GiB",
    )
    config = student.module.config
    for name, value in recompute_fields("full").items():
        setattr(config, name, value)
    again_ms, again_peak = median_ms(step), _peak(step)
    for name in recompute_fields("full"):
        setattr(config, name, None)
    yield Row(
        "the same with model.recompute=full",
        f"{again_ms:.1f} ms, {again_ms / ms:.2f} x the time, peak {again_peak:.1f} GiB",
        "a lower peak",
        again_peak < peak,
    )


def _layer_gradients(student: DistributedDataParallel, topology: Topology) -> Row:
    """Every parameter's gradient over two rows: products that add to the fp32 buffer, against autograd's in bf16."""
    batches = [_row(_rollouts([TOKENS // 8] * 2, seed=seed), topology) for seed in (5, 6)]
    step = _pass_of(student, topology, batches)
    fused = [m for m in student.module.modules() if getattr(m, "fuse_wgrad_accumulation", False)]
    gradients: list[list[Tensor]] = []
    for on in (True, False):
        for module in fused:
            module.fuse_wgrad_accumulation = on
        step()
        gradients.append([p.main_grad.clone() for p in student.module.parameters()])
    for module in fused:
        module.fuse_wgrad_accumulation = True
    worst = max(_relative(a, b) for a, b in zip(*gradients, strict=True))
    return Row(
        "gradients added by Transformer Engine to the fp32 buffer against autograd's",
        f"{len(fused)} products, largest relative difference of a parameter {worst:.2e}",
        f"at most {GRADIENT_NOISE}, {4 * SHAPE.layers} products",
        worst <= GRADIENT_NOISE and len(fused) == 4 * SHAPE.layers,
    )


def _optimizer_step(student: DistributedDataParallel, optimizer: StudentOptimizer, topology: Topology) -> Row:
    """Clip, Adam on fp32 master weights, bf16 weights copied back; by Megatron's distributed optimizer."""
    batches = [_row(_rollouts([TOKENS // 8] * 2, seed=7), topology)]
    run = _pass_of(student, topology, batches)
    before = [p.detach().clone() for p in student.module.parameters()]
    seconds = []
    for step in range(3):
        run()
        torch.cuda.synchronize()
        began = time.perf_counter()
        result = optimizer.step(step)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    after = list(student.module.parameters())
    finite = all(bool(p.isfinite().all()) for p in after)
    moved = sum(not torch.equal(a, b) for a, b in zip(after, before, strict=True))
    kind = type(optimizer.megatron).__name__
    return Row(
        "one step of the distributed optimizer (first, later)",
        f"{seconds[0] * 1e3:.0f} ms, {min(seconds[1:]) * 1e3:.1f} ms; {kind}; norm {result.grad_norm:.3g}; "
        f"{moved} of {len(after)} parameters moved; {torch.cuda.memory_allocated() / 2**30:.1f} GiB held",
        "applied, finite, most moved",
        result.applied and finite and moved > len(after) / 2,
    )


def _pass_of(student: DistributedDataParallel, topology: Topology, batches: Sequence[TokenBatch]) -> Callable[[], Any]:
    """Clears the gradients, then forward and backward of ``batches``."""
    scores = [_teacher(batch) for batch in batches]
    count = sum(b.count_loss_tokens for b in batches)
    layout = HeadLayout(SHAPE.vocab_size, topology.tensor_group)
    one = StudentPass(student, topology, objectives.build("tropd"), loss_tokens=count, sequences=1, layout=layout)

    def run() -> None:
        student.zero_grad_buffer()
        one.run(batches, scores, [None] * len(batches))

    return run


@torch.no_grad()
def _log_probs(model: GPTModel, batches: Sequence[TokenBatch], topology: Topology) -> Tensor:
    """[T] of all batches' loss tokens, in order."""
    found = []
    for batch in batches:
        hidden, weight = run_model(model, batch), head_weight(model)
        layout = HeadLayout(SHAPE.vocab_size, topology.tensor_group)
        scores = score_tokens(hidden, weight, batch.loss_tokens(), _teacher(batch), layout)
        found.append(scores.student_log_probs)
    return torch.cat(found)


def _teacher(batch: TokenBatch) -> TeacherScores:
    """A made-up teacher: the pass costs the same whatever it says."""
    ids = batch.loss_tokens().token_ids
    generator = torch.Generator(ids.device).manual_seed(9)
    logits = torch.randn(len(ids), TOP_K, generator=generator, device=ids.device)
    top = logits.sort(descending=True)[0].log_softmax(-1) - 0.1
    steps = torch.arange(TOP_K, device=ids.device) * 2311
    return TeacherScores(top[:, 0], top, (ids[:, None] + steps) % SHAPE.vocab_size)


def _rollouts(lengths: Sequence[int], seed: int) -> list[Rollout]:
    """Random tokens: a prompt of one token, the rest the student's."""
    generator = torch.Generator().manual_seed(seed)
    rollouts = []
    for i, length in enumerate(lengths):
        ids = torch.randint(0, SHAPE.vocab_size, (length,), generator=generator).tolist()
        rollouts.append(Rollout(ids[:1], [], ids[1:], [-1.0] * (length - 1), 0, i, i, True))
    return rollouts


def _row(rollouts: Sequence[Rollout], topology: Topology) -> TokenBatch:
    return TokenBatch.concatenate(rollouts, pad_id=0, seed=0, step=0).to(topology.device)


def _padded(rollouts: Sequence[Rollout], topology: Topology) -> TokenBatch:
    return TokenBatch.pack(rollouts, pad_id=0, seed=0, step=0).to(topology.device)


def _waits(run: Callable[[], Any]) -> list[str]:
    """Files and lines."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return [f"{Path(w.filename).name}:{w.lineno}" for w in seen if "synchroniz" in str(w.message)]


def _peak(run: Callable[[], Any]) -> float:
    """GiB allocated at most during ``run``; weights, fp32 gradients and fp32 master weights included."""
    free_gpu()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() / 2**30


def _relative(got: Tensor, want: Tensor) -> float:
    return float((got.float() - want.float()).norm() / want.float().norm().clamp(min=1e-20))
