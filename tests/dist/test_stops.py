"""A request to stop, in every phase of a run, on one rank of two: no finished step is lost, and the run resumes."""

from __future__ import annotations

import gc
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests import faults
from tests.dist.run_distributed import run_distributed
from tests.doubles import replay_engines
from tests.e2e.tiny_run import TinyRun, train_lines

STEPS = 2
EXACT = ("loss", "grad_norm", "trust_fraction", "log_ratio_mean")
KEYS = {
    "trainer.tropd.max_steps": STEPS,
    "trainer.tropd.val_check_interval": 1,
    "trainer.tropd.save_interval": 9,  # what a stop saves is saved by nothing else
}
RANK_0 = ("responses", "engine start", "rollout", "refresh", "log", "report")
# Phase, which of its occurrences, and the step whose checkpoint the stop must leave behind (0: none yet).
CASES = [
    ("plan", 1, 0),
    ("responses", 1, 0),
    ("load", 1, 0),
    ("engine start", 1, 0),
    ("validation", 1, 0),
    ("rollout", 3, 1),
    ("pack", 3, 1),
    ("teacher", 1, 1),
    ("student", 2, 2),
    ("optimizer", 1, 1),
    ("refresh", 2, 1),
    ("log", 2, 1),
    ("save", 1, 2),
    ("export", 1, 2),
    ("report", 1, 2),
    ("rollout that takes for ever", 5, 1),
]
STRAIGHT = "plan that nothing stops"
PER_RUN = 6  # of the cases, other ones in every run: two runs each take seconds


def stop_in_each(rank: int, world_size: int, root: str, cases: list[tuple[str, int, int]], guilty: int) -> list[Any]:
    """For each case: seconds from the signal to the end, the steps done, and the checkpoints; then resume the run."""
    from nemo_tropd.quiet import quiet_libraries

    quiet_libraries()
    from nemo_tropd.parallel import signals
    from nemo_tropd.training.run import train
    from tests.e2e.compose import compose_config

    signals.FINISH_S = 0.5
    tiny, found = TinyRun.at(Path(root)), []
    for name in (phase for phase in faults.PHASES if phase != "plan"):
        __import__(faults.PHASES[name][0])
    for phase, occurrence, _ in cases:
        asked: list[float] = []

        def happens(phase: str = phase, asked: list[float] = asked) -> None:
            asked.append(time.monotonic())
            os.kill(os.getpid(), random.choice([signal.SIGTERM, signal.SIGHUP, signal.SIGINT]))
            time.sleep(60 if "for ever" in phase else 0.1)

        run_dir = Path(root) / "runs" / phase.replace(" ", "_")
        cfg = compose_config(
            tiny.overrides(run_dir, data=2, **KEYS, **{"model.teacher.cache_dir": Path(root) / f"cache_{phase}"})
        )
        where = 0 if phase.partition(" that")[0] in RANK_0 else guilty
        with faults.planted(phase.partition(" that")[0], happens, rank=where, occurrence=occurrence):
            outcome = train(cfg, replay_engines(131))
        assert outcome is not None
        saved = sorted(p.name for p in (run_dir / "checkpoints").glob("*")) if run_dir.is_dir() else []
        seconds = time.monotonic() - asked[0] if asked else 0.0
        print(phase, outcome.step, saved, f"{seconds:.1f} s", flush=True)
        gc.collect()  # a run's process groups hang in reference cycles, each with hundreds of threads
        again = train(cfg, replay_engines(131))
        gc.collect()
        found.append((phase, outcome.stopped_by_signal, outcome.step, saved, seconds, again is not None and again.step))
    return found


def figures(run_dir: Path) -> list[tuple[float, ...]]:
    by_step = {line["step"]: line for line in train_lines(run_dir)}
    return [tuple(by_step[s][k] for k in EXACT) for s in sorted(by_step)]


@pytest.mark.random
@pytest.mark.timeout(400)
def test_a_stop_in_any_phase_loses_nothing(tmp_path: Path) -> None:
    tiny = TinyRun.make(tmp_path)
    guilty, cases = random.choice([0, 1]), random.sample(CASES, PER_RUN)
    by_rank = run_distributed(stop_in_each, 2, str(tiny.root), [*cases, (STRAIGHT, 99, 0)], guilty, timeout_s=350)
    straight = tmp_path / "runs" / STRAIGHT.replace(" ", "_")
    wanted = load_file(straight / "hf" / "model.safetensors")
    for (phase, _, step), mine, theirs in zip(cases, *by_rank, strict=False):
        run_dir = tmp_path / "runs" / phase.replace(" ", "_")
        stopped = phase not in ("export", "report")  # which end by themselves, and with them the run
        assert mine[1:4] == theirs[1:4] == (stopped, step, [f"step_{step:08d}"] if step else []), phase
        assert max(mine[4], theirs[4]) < 10, phase
        assert (run_dir / "report.html").is_file(), phase
        assert figures(run_dir) == figures(straight), phase
        ours = load_file(run_dir / "hf" / "model.safetensors")
        assert all(torch.equal(ours[k], wanted[k]) for k in wanted), phase
        steps = [path.name for path in sorted((run_dir / "validation").iterdir())]
        assert steps == ["step_00000000.json", "step_00000001.json", "step_00000002.json"], phase
