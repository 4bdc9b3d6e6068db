"""Seconds a step with rollouts in turns with training, and with rollouts one step ahead of it.

    python examples/benchmarks/ahead.py [--pair "SmolLM2 pair"] [--ratios 0.25 0.5 1 2 4] [--steps 3] [--out FILE]

Real training, and an engine of given speed: for each ratio of its time to the trainer's, the median step beside the sum
of both (model.rollout.steps_ahead 0) and beside the longer of both (1).
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import count
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # this file is run, its siblings are imported

from examples.benchmarks.early_scores import PacedRollouts, run, unequal
from examples.benchmarks.loop import OurLoop
from examples.benchmarks.loop_case import LoopCase
from nemo_tropd.parallel.topology import Topology

HEADER = ("generating, s", "training, s", "in turns, s", "/ sum", "one step ahead, s", "/ longer")


def _same(engine: PacedRollouts) -> PacedRollouts:
    return engine


def _timed(step: Callable[[int], dict[str, float]], numbers: Iterator[int], steps: int) -> float:
    """The median step, after one whose rollouts may be of the speed before."""
    return median([step(next(numbers))["seconds/step"] for _ in range(steps + 1)][1:])


def measure(case: LoopCase, ratios: Sequence[float], steps: int) -> list[tuple[float, float, float, float]]:
    """For each ratio the seconds of generating, of training, and of a step with rollouts 0 and 1 steps ahead."""
    topology = Topology.start(seed=1)
    found: dict[int, list[float]] = {0: [], 1: []}
    training, all_steps = 0.0, 2 + (len(ratios) + 1) * (steps + 1)
    with tempfile.TemporaryDirectory() as folder:
        loop = OurLoop(case, Path(folder), topology)
        for ahead, medians in found.items():
            engine = PacedRollouts(unequal(case))
            step = loop.train_step(partial(_same, engine), (), ahead=ahead, last=all_steps)
            numbers = count()
            _timed(step, numbers, 1)
            training = training or _timed(step, numbers, steps)
            for ratio in ratios:
                engine.seconds = ratio * training
                medians.append(_timed(step, numbers, steps))
            loop.model.rollouts.close()
    topology.stop()
    return [(r * training, training, turns, one) for r, turns, one in zip(ratios, found[0], found[1], strict=True)]


def rows(measured: Sequence[tuple[float, float, float, float]]) -> list[list[str]]:
    """Cells of the table."""
    return [
        [
            f"{generating:.2f}", f"{training:.2f}",
            f"{turns:.2f}", f"{turns / (generating + training):.2f}",
            f"{ahead:.2f}", f"{ahead / max(generating, training):.2f}",
        ]
        for generating, training, turns, ahead in measured
    ]  # fmt: skip


if __name__ == "__main__":
    run(__doc__ or "", [0.25, 0.5, 1, 2, 4], HEADER, lambda *given: rows(measure(*given)))
