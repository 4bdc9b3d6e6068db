"""Seconds, memory and matrix products of a step, by phase: ours and TRL's DistillationTrainer side by side.

    python examples/benchmarks/loop.py                # the SmolLM2 pair and a tiny one; on a GPU also 1.5B from 7B
    python examples/benchmarks/loop.py --only tiny --out table.md

Each is measured in a process of its own. Weights are random, so times and memory are those of real models and nothing
is learned. Rollouts are made beforehand and the same for both. TRL is not among this project's pins:

    pip install --target /tmp/peers --no-deps trl==1.16.0 accelerate
    PYTHONPATH=/tmp/peers python examples/benchmarks/loop.py
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from rich.console import Console
from rich.table import Table

from nemo_tropd.files import write_text
from nemo_tropd.quiet import quiet_libraries

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # this file is run, its siblings are imported

from examples.benchmarks.isolated import IsolatedError, isolated
from examples.benchmarks.loop_case import (
    PHASES,
    SHAPES,
    FixedRollouts,
    LoopCase,
    LoopCost,
    config_of,
    ideal_seconds,
    peak,
)
from examples.benchmarks.random_weights import random_weights

CPU_CASES = {
    "tiny": LoopCase("tiny", "tiny", 8, 16, 48, 256, timed=3),
    "SmolLM2 pair": LoopCase("smollm2-24l", "smollm2-135m", 4, 32, 64, 192),
}
GPU_CASES = {
    "SmolLM2 pair": LoopCase("smollm2-24l", "smollm2-135m", 64, 64, 256, 10240, "bf16", timed=3),
    "1.5B from 7B": LoopCase("1.5b", "7b", 128, 128, 256, 6144, "bf16", "tensorwise", timed=3),
}


def fill_random(model: Any) -> None:
    """Every parameter, in place, as a fresh model has it."""
    random_weights(1, len(model.decoder.layers))(model)


class OurLoop:
    """Our trainer's step over ``case``."""

    def __init__(self, case: LoopCase, folder: Path, topology: Any) -> None:
        from nemo_tropd.model.tropd_model import MegatronTrOPDModel, StudentSource
        from nemo_tropd.training.objective import build_objective
        from nemo_tropd.training.optimizer import StudentOptimizer

        self.case, self.cfg, self.topology = case, config_of(case, folder), topology
        self.student_dir = folder / "student"
        self.model = MegatronTrOPDModel(
            OmegaConf.structured(self.cfg.model),
            None,
            topology=topology,
            objective=build_objective(self.cfg),
            student=StudentSource(self.student_dir, case.precision, SHAPES[case.student].vocab_size, fill=fill_random),
        )
        self.optimizer = StudentOptimizer(
            self.cfg.model.optim, self.model.ddp, dtype=self.model.dtype_of_run, clip=1.0, max_steps=100
        )
        self.model.prepare_for_training()
        self._kind: type | None = None  # of the rollouts that train_step has attached

    def run(self) -> LoopCost:
        """The fastest of the timed steps on rollouts made beforehand."""
        case, device, timed = self.case, self.topology.device, []
        for number, values in enumerate(self.steps(lambda: FixedRollouts(case.completions()))):
            if number >= case.warmup:
                timed.append(values)
            elif device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
        best = min(timed, key=lambda r: r["seconds/step"])
        return LoopCost({name: best[f"seconds/{name}"] for name in PHASES}, best["seconds/step"], *peak(device))

    def steps(
        self, make_engine: Callable[[], Any], shown: Callable[[int, str], None] = lambda number, phase: None
    ) -> Iterator[dict[str, float]]:
        """The metrics of each step, warm-up included, as it ends; the engine is closed at the end. ``shown`` is called
        as a phase of a step begins."""
        from nemo_tropd.rollout.collective import EveryRankRollouts

        rollouts = EveryRankRollouts(self.topology, make_engine, self.model.device_stream, self.model.vocab_size)
        self.model.attach_rollouts(rollouts)
        step = self._step()
        try:
            self.model.send_weights(0)
            for number in range(self.case.warmup + self.case.timed):
                yield step.run(number, keep_tokens=False, shown=partial(shown, number)).values
        finally:
            rollouts.close()

    def train_step(
        self, make_engine: Callable[[], Any], early: Sequence[str], *, ahead: int = 0, last: int = 0
    ) -> Callable[[int], dict[str, float]]:
        """A step, by number, with one engine for all ranks, which tells the teachers ``early`` of finished rollouts, or
        works ``ahead`` steps ahead up to step ``last``; returns its metrics. An engine is kept until it is closed."""
        from nemo_tropd.rollout.ahead import AheadRollouts
        from nemo_tropd.rollout.collective import RankZeroRollouts

        kind = AheadRollouts if ahead else RankZeroRollouts
        if self._kind is not kind:
            own = kind(self.topology, make_engine, self.model.leader_stream, self.model.vocab_size)
            self.model.attach_rollouts(own)
            self.model.send_weights(0)
            self._kind = kind
        step = self._step(early, ahead, last)
        return lambda number: step.run(number, keep_tokens=False).values

    def _step(self, early: Sequence[str] = (), ahead: int = 0, last: int = 0) -> Any:
        from nemo_tropd.data import Prompt, PromptSet
        from nemo_tropd.rollout.ahead import AheadRollouts
        from nemo_tropd.training.ahead import Ahead
        from nemo_tropd.training.guidance import Guidance
        from nemo_tropd.training.packing import Packer
        from nemo_tropd.training.step import TrainStep

        case, m, rollouts = self.case, self.cfg.model, self.model.rollouts
        make_ahead = None
        if ahead:
            assert isinstance(rollouts, AheadRollouts)
            make_ahead = partial(Ahead, rollouts, steps=ahead, last=last)
        ids = enumerate(case.prompts())
        return TrainStep(
            self.model,
            self.optimizer,
            prompts=PromptSet(tuple(Prompt(str(i), "", (), None, tuple(one), "random") for i, one in ids)),
            guidance=Guidance(seed=1, total_steps=100, max_new_tokens=case.new_tokens),
            packer=Packer(self.topology, 0, m.micro_batch_size, m.tokens_per_micro_batch, m.seed),
            early=early,
            ahead=make_ahead,
        )


def measure_ours(case: LoopCase, folder: str) -> LoopCost:
    """Our step on fixed rollouts."""
    from nemo_tropd.parallel.topology import Topology

    topology = Topology.start(seed=1)
    try:
        cost = OurLoop(case, Path(folder), topology).run()
        cost.matrix_share = ideal_seconds(case, topology.device) / cost.not_rollout_s
    finally:
        topology.stop()
    return cost


def measure_trl(case: LoopCase, folder: str) -> LoopCost:
    """TRL's step on the same rollouts (see ``loop_trl``)."""
    from examples.benchmarks.loop_trl import measure

    return measure(case, Path(folder))


def missing_for_trl() -> list[str]:
    """What TRL needs and is not installed here."""
    return [name for name in ("trl", "accelerate", "datasets") if importlib.util.find_spec(name) is None]


def bench(cases: dict[str, LoopCase], *, trl: bool = True, limit_s: float = 900.0) -> str:
    """Measure all cases, print a table, return it as Markdown."""
    lines = [
        "| pair, tokens in the loss | | rollout | teacher | student | optimizer | refresh | outside rollouts, s "
        "| tokens/s outside rollouts | matrix products | peak GiB |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, case in cases.items():
        for who, measure in (("**ours**", measure_ours), ("TRL DistillationTrainer", measure_trl)):
            label = f"| {name}, {case.tokens:,} | {who} |"
            if measure is measure_trl and (not trl or (missing := missing_for_trl())):
                lines.append(f"{label} {'left out' if not trl else 'not installed: ' + ', '.join(missing)}" + " |" * 9)
                continue
            with tempfile.TemporaryDirectory() as folder:
                try:
                    cost = isolated(measure, case, folder, limit_s=limit_s)
                except IsolatedError as error:
                    lines.append(f"{label} failed: {error}" + " |" * 9)
                    continue
            lines.append(label + _cells(case, cost))
    _show(lines)
    return "\n".join(lines) + "\n"


def _cells(case: LoopCase, cost: LoopCost) -> str:
    phases = [f"{cost.seconds[p]:.3f}" if p in cost.seconds else "" for p in PHASES]
    share = f"{cost.matrix_share:.0%}" if cost.matrix_share is not None else ""
    rest = [f"{cost.not_rollout_s:.3f}", f"{case.tokens / cost.not_rollout_s:,.0f}", share, f"{cost.peak_gib:.2f}"]
    return " " + " | ".join([*phases, *rest]) + " |"


def _show(lines: Sequence[str]) -> None:
    header, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    table = Table(*header, title=f"torch {torch.__version__}, {torch.get_num_threads()} threads, {sys.platform}")
    for row in rows:
        table.add_row(*(cell.replace("**", "") for cell in row))
    Console(width=170).print(table)


def main() -> None:
    quiet_libraries()
    cases = GPU_CASES if torch.cuda.is_available() else CPU_CASES
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(cases), default=list(cases), metavar="PAIR")
    parser.add_argument("--no-trl", action="store_true", help="measure only ours")
    parser.add_argument("--out", type=Path, help="also write the table to this Markdown file")
    options = parser.parse_args()
    table = bench({name: cases[name] for name in options.only}, trl=not options.no_trl)
    if options.out:
        write_text(options.out, table)


if __name__ == "__main__":
    main()
