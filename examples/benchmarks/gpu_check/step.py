"""The step of a recipe's pair on one GPU, 1.5B from 7B in FP8: memory and time by phase, and TRL's trainer beside it.

Random weights of the right shapes: the speed and memory of real ones, and no statement about quality.
"""

from __future__ import annotations

import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from examples.benchmarks.gpu_check.rows import Row
from examples.benchmarks.gpu_check.runs import line_row
from examples.benchmarks.isolated import isolated, memory_kib
from examples.benchmarks.loop import CPU_CASES, GPU_CASES, OurLoop, measure_ours, measure_trl, missing_for_trl
from examples.benchmarks.loop_case import SHAPES, FixedRollouts, LoopCase
from nemo_tropd.config import TropdConfig
from nemo_tropd.convert.families import ModelShape
from nemo_tropd.planner.machine import Machine
from nemo_tropd.rollout.engine import RolloutRequest

CASE = GPU_CASES["1.5B from 7B"]
OVERHEAD, REFRESH_S, SPEEDUP, ROLLOUT_SHARE = 0.05, 0.1, 1.5, 0.95
_AS_OURS = "with both"
_PLAINLY = {  # seeds, log-probabilities
    "alone": (False, False), "with a seed each": (True, False), "with log-probabilities": (False, True),
    _AS_OURS: (True, True),
}  # fmt: skip
_WATCHED = 1  # the step whose memory is measured: the first one makes the optimizer's states
_PLAN_PHASES = {
    "rollout": "rollouts", "teacher": "teacher scores", "student": "student passes", "optimizer": "optimizer step",
    "refresh": "weights to the engine",
}  # fmt: skip


def step(*, rehearsal: bool = False) -> Iterator[Row]:
    """1.5B from 7B in FP8 with the engine on the same GPU. A rehearsal has rollouts made beforehand, and no verdict."""
    from nemo_tropd.parallel.topology import Topology

    case = replace(CPU_CASES["tiny"] if rehearsal else CASE, warmup=2, timed=2)
    topology = Topology.start(seed=1)
    try:
        with tempfile.TemporaryDirectory() as folder:
            ours = OurLoop(case, Path(folder), topology)
            make = partial(FixedRollouts, case.completions()) if rehearsal else partial(_engine, ours)
            for row in measured(ours, make):
                yield replace(row, held=None) if rehearsal else row
    finally:
        topology.stop()


def measured(ours: OurLoop, make: Callable[[], Any]) -> Iterator[Row]:
    """Steps of ``ours`` on the engine that ``make`` makes: memory of one by phase, seconds of the others."""
    engines: list[Any] = []

    def kept() -> Any:
        engines.append(make())
        return engines[-1]

    case, lines = ours.case, []
    memory = PhaseMemory(ours.topology.device, _WATCHED)
    for number, line in enumerate(ours.steps(kept, shown=memory)):
        lines.append(line)
        if live := hasattr(engines[0], "llm"):
            yield line_row({**line, "step": number + 1, "kind": "train"})
        if number == _WATCHED:
            memory.close()
            yield from _memory_rows(ours.cfg, case, memory.peaks)
        if number == case.warmup + case.timed - 1:
            yield from _time_rows(ours.cfg, case, min(lines[case.warmup :], key=lambda r: r["seconds/step"]))
            if live:
                yield from _rollout_rows(engines[0], case)


class PhaseMemory:
    """GiB in use on the device, by whatever, or on a CPU by this process: the most in each phase of one step, looked at
    every 5 ms and at its end. What torch keeps from an earlier phase is handed back first, since no phase needs it."""

    def __init__(self, device: torch.device, step: int) -> None:
        self.device, self.step, self.phase = device, step, ""
        self.peaks: dict[str, float] = {}
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def __call__(self, step: int, phase: str) -> None:
        """``phase`` of ``step`` begins."""
        self._look()
        self.phase = ""
        if step == self.step:
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            self.phase = phase

    def close(self) -> None:
        """The step is over."""
        self._over.set()
        self._thread.join()
        self._look()

    def _watch(self) -> None:
        while not self._over.wait(0.005):
            self._look()

    def _look(self) -> None:
        if phase := self.phase:
            self.peaks[phase] = max(self.peaks.get(phase, 0.0), used_gib(self.device))


def used_gib(device: torch.device) -> float:
    """GiB in use on a GPU, or by this process."""
    if device.type != "cuda":
        return memory_kib("VmRSS") / 2**20
    free, total = torch.cuda.mem_get_info(device)
    return (total - free) / 2**30


def _plan(cfg: TropdConfig, case: LoopCase) -> tuple[TropdConfig, ModelShape, ModelShape, Machine]:
    from nemo_tropd.training.plan import machine_of

    return cfg, SHAPES[case.student], SHAPES[case.teacher], machine_of(cfg)


def _memory_rows(cfg: TropdConfig, case: LoopCase, peaks: dict[str, float]) -> Iterator[Row]:
    from nemo_tropd.planner.memory import estimate

    plan = estimate(*_plan(cfg, case))
    for phase, used in peaks.items():
        if (name := _PLAN_PHASES[phase]) not in plan.phases:  # rollouts of an engine elsewhere
            continue
        parts = plan.parts(name)
        planned = sum(parts.values()) / 2**30
        largest = ", ".join(f"{p} {b / 2**30:.1f}" for p, b in sorted(parts.items(), key=lambda i: -i[1])[:4])
        text = f"{used:.1f} GiB, {used / planned:.0%} of the plan ({largest}, ...)"
        yield Row(f"memory in use, {name}", text, f"at most the plan's {planned:.1f} GiB", used <= planned)


def _time_rows(cfg: TropdConfig, case: LoopCase, line: dict[str, float]) -> Iterator[Row]:
    from nemo_tropd.planner.seconds import step_seconds
    from nemo_tropd.planner.wire import estimate_wire

    seconds, all_s = {phase: line[f"seconds/{phase}"] for phase in _PLAN_PHASES}, line["seconds/step"]
    plan = _plan(cfg, case)
    planned = ", ".join(f"{k} {v:.2f}" for k, v in step_seconds(*plan, estimate_wire(*plan)).items())
    yield Row(
        f"{case.student} from {case.teacher}, {case.sequences} x {case.new_tokens} tokens: seconds by phase",
        ", ".join(f"{k} {v:.3f}" for k, v in seconds.items()) + f"; {case.tokens / all_s:,.0f} tokens/s",
        f"the plan's at most: {planned}" if planned else "",
    )
    rest = 1 - sum(seconds[name] for name in ("rollout", "teacher", "student")) / all_s
    text = f"{rest:.1%} of {all_s:.2f} s"
    yield Row("outside rollouts, teacher and student", text, f"at most {OVERHEAD:.0%}", rest <= OVERHEAD)
    refresh = seconds["refresh"]
    yield Row("refresh, waking included", f"{refresh:.3f} s", f"at most {REFRESH_S} s", refresh <= REFRESH_S)


def _rollout_rows(engine: Any, case: LoopCase) -> Iterator[Row]:
    """Tokens a second through our engine and through vLLM itself; what the engine gives back by sleeping."""
    device = torch.device("cuda")
    requests = [RolloutRequest(p, [], i, i, i, case.new_tokens) for i, p in enumerate(case.prompts())]
    engine.generate(requests[:8])  # wakes the cache
    began = time.perf_counter()
    ours = sum(len(r.response_ids) for r in engine.generate(requests)) / (time.perf_counter() - began)
    plain = {name: _generate_plainly(engine.llm, case, *what) for name, what in _PLAINLY.items()}
    least = ROLLOUT_SHARE * plain[_AS_OURS]
    yield Row(
        f"rollouts against plain vLLM, {case.sequences} x {case.new_tokens}",
        f"{ours:,.0f} tokens/s; vLLM {', '.join(f'{name} {rate:,.0f}' for name, rate in plain.items())}",
        f"at least {ROLLOUT_SHARE} of vLLM's {_AS_OURS}", ours >= least,
    )  # fmt: skip
    awake = used_gib(device)
    engine.sleep()
    freed = awake - used_gib(device)
    yield Row("the sleeping engine gives back", f"{freed:.1f} of {awake:.1f} GiB in use", "over 10", freed > 10)


def _generate_plainly(llm: Any, case: LoopCase, seeds: bool, log_probs: bool) -> float:
    """Tokens a second of vLLM by itself, with or without what training asks of it."""
    from vllm import SamplingParams, TokensPrompt

    prompts = [TokensPrompt(prompt_token_ids=p) for p in case.prompts()]
    parameters = [
        SamplingParams(
            temperature=1.0,
            max_tokens=case.new_tokens,
            detokenize=False,
            seed=i if seeds else None,
            logprobs=0 if log_probs else None,
            ignore_eos=True,
        )
        for i in range(len(prompts))
    ]
    llm.reset_prefix_cache()
    began = time.perf_counter()
    outputs = llm.generate(prompts, parameters, use_tqdm=False)
    return sum(len(output.outputs[0].token_ids) for output in outputs) / (time.perf_counter() - began)


def _engine(ours: OurLoop) -> Any:
    """As a run has it, on a folder without weights."""
    from nemo_tropd.rollout.vllm.in_process import ColocatedEngine
    from nemo_tropd.rollout.vllm.settings import EngineSettings

    case, r = ours.case, ours.cfg.model.rollout
    return ColocatedEngine(
        EngineSettings(
            ours.student_dir,
            dtype=r.dtype,
            max_model_len=case.length,
            max_num_seqs=case.sequences,
            eos_ids=(),
            weights_shapes=dict(SHAPES[case.student].hf_tensors()),
            kv_cache_gib=None,
            gpu_memory_utilization=r.gpu_memory_utilization,
            enforce_eager=False,
        )
    )


def beside_trl() -> Iterator[Row]:
    """1.5B from 7B on rollouts made beforehand, the same for both."""
    if missing := missing_for_trl():
        yield Row("TRL's DistillationTrainer", f"not installed: {', '.join(missing)}")
        return
    costs = []
    for name, measure in (("ours", measure_ours), ("TRL", measure_trl)):
        with tempfile.TemporaryDirectory() as folder:
            costs.append(isolated(measure, CASE, folder, limit_s=3600))
        seconds, share = costs[-1].not_rollout_s, costs[-1].matrix_share
        text = f"{seconds:.2f} s, {CASE.tokens / seconds:,.0f} tokens/s, matrix products {share:.0%}"
        yield Row(f"{name}: a step outside rollouts", f"{text}, peak {costs[-1].peak_gib:.1f} GiB")
    ours, other = costs
    ratio = other.not_rollout_s / ours.not_rollout_s
    yield Row("TRL's time to ours", f"{ratio:.2f}", f"at least {SPEEDUP}", ratio >= SPEEDUP)
    text = f"{ours.peak_gib / other.peak_gib:.2f}"
    yield Row("our peak to TRL's", text, "below 1", ours.peak_gib < other.peak_gib)
