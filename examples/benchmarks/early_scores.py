"""What it saves to score rollouts that are finished while others are still generated.

    python examples/benchmarks/early_scores.py [--pair "SmolLM2 pair"] [--ratios 0.5 1 2 4] [--out FILE]

Steps with real training, a real teacher on the ranks and an engine of given speed: rollouts of an eighth to all of the
longest length, each finished when an engine that generates all of them at once would have it. For each ratio of the
engine's time to the teacher's, steps that score afterwards and steps that score early take turns in one process.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # this file is run, its siblings are imported

from examples.benchmarks.loop import OurLoop
from examples.benchmarks.loop_case import FixedRollouts, LoopCase
from examples.benchmarks.tables import show
from nemo_tropd.batch import Rollout
from nemo_tropd.config_teacher import DEFAULT_TEACHER
from nemo_tropd.parallel.topology import Topology
from nemo_tropd.quiet import quiet_libraries
from nemo_tropd.rollout.engine import Finished, RolloutRequest, Wanted

CASES = {
    "SmolLM2 pair": LoopCase("smollm2-24l", "smollm2-135m", 8, 32, 96, 256),
    "tiny": LoopCase("tiny", "tiny", 8, 16, 48, 256),
}
HEADER = ("generating, s", "scoring, s", "step, scored after, s", "step, scored early, s", "early / after", "limit")


class PacedRollouts(FixedRollouts):
    """Rollouts made beforehand; the longest is finished after ``seconds``, others in proportion to their length."""

    def __init__(self, completions: Sequence[Sequence[int]]) -> None:
        super().__init__(completions)
        self.seconds = 0.0

    def generate(
        self, requests: Sequence[RolloutRequest], finished: Finished | None = None, *, wanted: Wanted | None = None
    ) -> list[Rollout]:
        """As the other's, in time."""
        rollouts = [replace(r, finished=True) for r in super().generate(requests)]
        longest, began = max(len(r.response_ids) for r in rollouts), time.monotonic()
        for r in sorted(rollouts, key=lambda r: len(r.response_ids)):
            time.sleep(max(0.0, began + self.seconds * len(r.response_ids) / longest - time.monotonic()))
            if finished is not None:
                finished(r)
        return rollouts


def unequal(case: LoopCase) -> list[list[int]]:
    """The case's completions, cut to an eighth, two eighths, ... of their length, in turn."""
    return [ids[: max(1, len(ids) * (i % 8 + 1) // 8)] for i, ids in enumerate(case.completions())]


def measure(case: LoopCase, ratios: Sequence[float], steps: int) -> list[tuple[float, float, float, float]]:
    """For each ratio the seconds of generating, of scoring, of a step that scores afterwards, and of one that scores
    early: medians."""
    topology = Topology.start(seed=1)
    found = []
    with tempfile.TemporaryDirectory() as folder:
        loop = OurLoop(case, Path(folder), topology)
        engine = PacedRollouts(unequal(case))
        after, early = (loop.train_step(lambda: engine, names) for names in ((), (DEFAULT_TEACHER,)))
        for number, step in enumerate((after, early, after)):  # the last one's times are warm
            values = step(number)
        scoring, number = values["seconds/teacher"], 3
        for ratio in ratios:
            engine.seconds = ratio * scoring
            seconds: dict[bool, list[float]] = {False: [], True: []}
            for _ in range(steps):
                for which, step in ((False, after), (True, early)):
                    seconds[which].append(step(number)["seconds/step"])
                    number += 1
            found.append((engine.seconds, scoring, median(seconds[False]), median(seconds[True])))
        loop.model.rollouts.close()
    topology.stop()
    return found


def rows(measured: Sequence[tuple[float, float, float, float]]) -> list[list[str]]:
    """Cells of the table; the limit is a step whose shorter one of generating and scoring costs nothing."""
    return [
        [
            *(f"{value:.2f}" for value in (generating, scoring, after, early)),
            f"{early / after:.3f}",
            f"{(after - min(generating, scoring)) / after:.3f}",
        ]
        for generating, scoring, after, early in measured
    ]


def run(
    text: str,
    ratios: Sequence[float],
    header: Sequence[str],
    cells: Callable[[LoopCase, Sequence[float], int], list[list[str]]],
) -> None:
    """A benchmark with engines of given speed: its command line, and ``cells`` of a case, ratios, steps as a table."""
    parser = argparse.ArgumentParser(description=text.splitlines()[0])
    parser.add_argument("--pair", choices=list(CASES), default=next(iter(CASES)))
    parser.add_argument("--ratios", type=float, nargs="+", default=ratios)
    parser.add_argument("--steps", type=int, default=3, help="of each kind and ratio")
    parser.add_argument("--out", type=Path, help="also write the table to this Markdown file")
    options = parser.parse_args()
    quiet_libraries()
    found = cells(CASES[options.pair], options.ratios, options.steps)
    show(f"{options.pair}, {torch.get_num_threads()} threads", header, found, options.out)


if __name__ == "__main__":
    run(__doc__ or "", [0.5, 1, 2, 4], HEADER, lambda *given: rows(measure(*given)))
