"""What every host runs, and what must come of it."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from tests.e2e.tiny_run import ROOT, TinyRun, train_lines

STEPS, SAVE_EVERY = 4, 2
VOCABULARY = 131  # of the tiny tokenizer
EXACT = ("loss", "grad_norm", "trust_fraction", "log_ratio_mean", "outlier_forward_kl")


def figures(run_dir: Path) -> list[tuple[float, ...]]:
    """What must be the same to the bit, step by step; of a repeated step, the last."""
    by_step = {line["step"]: line for line in train_lines(run_dir)}
    return [tuple(by_step[s][k] for k in EXACT) for s in sorted(by_step)]


def launch_command(tiny: TinyRun, run_dir: Path, ranks: int = 4, **keys: object) -> list[str]:
    """What each host runs; 4 ``ranks`` are TP 2 x DP 2."""
    script = ROOT / "tests" / "hosts" / "replay_train.py"
    words = [str(ROOT / "docker" / "launch.sh"), "--script", str(script)]
    return [*words, *launch_overrides(tiny, run_dir, ranks, **keys)]


def launch_overrides(tiny: TinyRun, run_dir: Path, ranks: int = 4, **keys: object) -> list[str]:
    """The settings of ``launch_command``."""
    settings = {
        "trainer.tropd.max_steps": STEPS,
        "trainer.tropd.save_interval": SAVE_EVERY,
        "trainer.tropd.keep_checkpoints": STEPS,
        "model.data.held_out": 0,
        "model.rollout.request_timeout_s": 30,
        **keys,
    }
    tensor = 2 if ranks == 4 else 1
    return tiny.overrides(run_dir, tensor=tensor, data=ranks // tensor, **settings)


def until(condition: Callable[[], bool], what: str, within_s: float = 300) -> None:
    """Wait for ``condition``."""
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {within_s} s: {what}"
        time.sleep(0.1)


def has_step(run_dir: Path, step: int) -> Callable[[], bool]:
    """Whether the checkpoint after ``step`` is whole."""
    return lambda: (run_dir / "checkpoints" / f"step_{step:08d}").is_dir()
