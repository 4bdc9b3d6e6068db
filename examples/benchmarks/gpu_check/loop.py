"""The loop on one GPU: a step of 1.5B from 7B in FP8 by phase, and TRL's trainer on the same models and rollouts.

Random weights of the right shapes: the same speed and memory as real ones, and no statement about quality.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from examples.benchmarks.gpu_check.rows import Row
from examples.benchmarks.isolated import IsolatedError, isolated
from examples.benchmarks.loop import GPU_CASES, OurLoop, measure_trl, missing_for_trl
from examples.benchmarks.loop_case import SHAPES, FixedRollouts, LoopCase, LoopCost, ideal_seconds

CASE = GPU_CASES["1.5B from 7B"]
OVERHEAD, REFRESH_S, SPEEDUP, ROLLOUT_SHARE = 0.05, 0.1, 1.5, 0.95
_OURS_LIMIT_S, _TRL_LIMIT_S = 130.0, 90.0


def check() -> Iterator[Row]:
    """The points of this subject."""
    with tempfile.TemporaryDirectory() as folder:
        fixed, live = isolated(measure, CASE, folder, limit_s=_OURS_LIMIT_S)
        yield from _step_rows(CASE, fixed, live)
    missing = missing_for_trl()
    if missing:
        yield Row("TRL's DistillationTrainer", f"not installed: {', '.join(missing)}")
        return
    with tempfile.TemporaryDirectory() as folder:
        try:
            other: LoopCost = isolated(measure_trl, CASE, folder, limit_s=_TRL_LIMIT_S)
        except IsolatedError as error:
            yield Row("TRL's DistillationTrainer", f"failed: {error}"[:200])
            return
    ratio = other.not_rollout_s / fixed.not_rollout_s
    yield Row(
        "TRL's time to ours, all but rollouts",
        f"{ratio:.2f}: {other.not_rollout_s:.2f} s to {fixed.not_rollout_s:.2f} s, {CASE.tokens:,} tokens in the loss",
        f"at least {SPEEDUP}",
        ratio >= SPEEDUP,
    )
    yield Row(
        "peak memory, all but rollouts",
        f"ours {fixed.peak_gib:.1f} GiB, TRL {other.peak_gib:.1f} GiB",
        "ours less",
        fixed.peak_gib < other.peak_gib,
    )


def _step_rows(case: LoopCase, fixed: LoopCost, live: LoopCost) -> Iterator[Row]:
    seconds = live.seconds
    phases = ", ".join(f"{name} {value:.3f}" for name, value in seconds.items())
    tokens = case.sequences * case.new_tokens
    yield Row(
        f"{case.student} from {case.teacher} in FP8, a step",
        f"{phases}; {live.step_s:.2f} s, {tokens / live.step_s:,.0f} tokens/s; engine started in "
        f"{live.notes['start_s']:.0f} s",
    )
    overhead = 1 - (seconds["rollout"] + seconds["teacher"] + seconds["student"]) / live.step_s
    yield Row(
        "overhead outside rollout, teacher, student", f"{overhead:.1%}", f"at most {OVERHEAD:.0%}", overhead <= OVERHEAD
    )
    yield Row(
        "refresh, wake included",
        f"{seconds['refresh']:.3f} s",
        f"at most {REFRESH_S} s",
        seconds["refresh"] <= REFRESH_S,
    )
    yield Row("peak of teacher, student, optimizer", f"{fixed.peak_gib:.1f} GiB; all together {live.peak_gib:.1f} GiB")
    yield Row("matrix products, share of time outside rollouts", f"{fixed.matrix_share:.0%}")
    cycles = case.warmup + case.timed
    yield Row(
        "engine against trainer, mean |difference|",
        f"{live.notes['mismatch']:.4f} nats at most in {cycles} cycles of sleep and refresh",
        "under 0.05, else try VLLM_USE_V2_MODEL_RUNNER=0",
        live.notes["mismatch"] < 0.05,
    )
    ours, plain = live.notes["rollout_tokens_s"], live.notes["plain_tokens_s"]
    yield Row(
        f"rollouts against plain vLLM, {case.sequences} x {case.new_tokens}",
        f"{ours:,.0f} to {plain:,.0f} tokens/s",
        f"at least {ROLLOUT_SHARE} of it",
        ours >= ROLLOUT_SHARE * plain,
    )
    asleep, awake = live.notes["asleep_gib"], live.notes["awake_gib"]
    yield Row("memory the sleeping engine gives back", f"{awake - asleep:.1f} GiB", "over 10 GiB", awake - asleep > 10)


def measure(case: LoopCase, folder: str) -> tuple[LoopCost, LoopCost]:
    """Our step on fixed rollouts, then with the engine on the same GPU, in this process."""
    import torch

    from nemo_tropd.parallel.topology import Topology
    from nemo_tropd.rollout.vllm.in_process import ColocatedEngine
    from nemo_tropd.rollout.vllm.settings import EngineSettings

    topology = Topology.start(seed=1)
    loop = OurLoop(case, Path(folder), topology)
    fixed = loop.run(lambda: FixedRollouts(case.completions()))
    fixed.matrix_share = ideal_seconds(case, topology.device) / fixed.not_rollout_s
    torch.cuda.empty_cache()
    shape = SHAPES[case.student]
    notes: dict[str, float] = {}
    engines: list[ColocatedEngine] = []

    def make() -> ColocatedEngine:
        engine = ColocatedEngine(
            EngineSettings(
                loop.student_dir,
                dtype="bfloat16",
                max_model_len=case.length,
                max_num_seqs=case.sequences,
                eos_ids=(),
                weights_shapes=dict(shape.hf_tensors()),
                kv_cache_gib=None,
                gpu_memory_utilization=0.35,
                enforce_eager=False,
            )
        )
        engines.append(engine)
        return engine

    def compare() -> None:
        notes.update(_rollout_speed(engines[0], loop, case))

    began = time.monotonic()
    live = loop.run(make, first=case.warmup + case.timed, before_closing=compare)
    notes["start_s"] = time.monotonic() - began - (case.warmup + case.timed) * live.step_s
    live.notes.update(notes)
    return fixed, live


def _rollout_speed(engine: Any, loop: OurLoop, case: LoopCase) -> dict[str, float]:
    """Tokens a second through our engine and through vLLM itself, and the device's memory awake and asleep (GiB)."""
    import torch

    from nemo_tropd.rollout.engine import RolloutRequest

    prompts = case.prompts()
    requests = [RolloutRequest(p, [], i, i, i, case.new_tokens) for i, p in enumerate(prompts)]
    engine.update_weights(loop.model.device_stream(), 99)
    engine.generate(requests[:8])
    began = time.perf_counter()
    generated = sum(len(r.response_ids) for r in engine.generate(requests))
    ours = generated / (time.perf_counter() - began)
    engine.llm.reset_prefix_cache()
    began = time.perf_counter()
    plain = _generate_plainly(engine.llm, prompts, case.new_tokens) / (time.perf_counter() - began)
    awake = _used_gib(torch)
    engine.sleep()
    return {
        "rollout_tokens_s": ours,
        "plain_tokens_s": plain,
        "awake_gib": awake,
        "asleep_gib": _used_gib(torch),
    }


def _used_gib(torch: Any) -> float:
    free, total = torch.cuda.mem_get_info()
    return (total - free) / 2**30


def _generate_plainly(llm: Any, prompts: list[list[int]], max_new_tokens: int) -> int:
    """What our engine is timed against: vLLM without seeds, log-probabilities or padding. Returns how many tokens were
    generated."""
    from vllm import SamplingParams, TokensPrompt

    parameters = SamplingParams(temperature=1.0, max_tokens=max_new_tokens, ignore_eos=True, detokenize=False)
    outputs = llm.generate([TokensPrompt(prompt_token_ids=p) for p in prompts], parameters, use_tqdm=False)
    return sum(len(output.outputs[0].token_ids) for output in outputs)
