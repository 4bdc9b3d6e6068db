"""What a checkpoint restores, which one is taken, and which runs may not resume from it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_tropd.config import ConfigError
from nemo_tropd.parallel.topology import Topology
from nemo_tropd.training.checkpoint import Checkpoints, RunState, check_resumable
from tests.tiny_models import make_tiny
from tests.unit.test_optimizer import Student

pytestmark = pytest.mark.random

STATE = RunState(
    step=3, seed=11, global_batch_size=8, samples_per_prompt=2, prompts="p", teacher="t", student="s", skipped_steps=1
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_tiny(tmp_path / "hf", "qwen2", layers=1, seed=int(torch.randint(2**31, ())))


def test_a_resumed_student_takes_the_steps_of_one_that_went_on(
    folder: Path, topology: Topology, tmp_path: Path
) -> None:
    """Weights, moments and the count of steps, against AdamW on from the step after the checkpoint."""
    checkpoints = Checkpoints(tmp_path / "run", topology, hf_source=folder, keep=2)
    trained = Student(folder, topology)
    for step in range(3):
        trained.step(step)
    checkpoints.save(trained.ddp.module, trained.optimizer, STATE)
    resumed = Student(folder, topology)
    latest = checkpoints.latest()
    assert latest is not None
    assert checkpoints.load(latest, resumed.ddp.module, resumed.optimizer) == STATE
    resumed.wanted, resumed.first, resumed.second = trained.wanted, trained.first, trained.second
    resumed.applied = trained.applied
    resumed.check()
    for step in (3, 4):
        resumed.step(step)
        resumed.check()


def test_the_newest_complete_checkpoints_are_kept_and_the_rest_removed(
    folder: Path, topology: Topology, tmp_path: Path
) -> None:
    checkpoints = Checkpoints(tmp_path / "run", topology, hf_source=folder, keep=2)
    (checkpoints.dir / ".tmp-step_00000001").mkdir(parents=True)  # as a killed run leaves it
    assert checkpoints.latest() is None
    checkpoints.remove_unfinished()
    student = Student(folder, topology)
    for step in (2, 9, 10):  # in the order of numbers, not of their text
        path = checkpoints.save(student.ddp.module, student.optimizer, replace(STATE, step=step))
        assert checkpoints.latest() == path and (path / "hf" / "config.json").is_file()
    assert sorted(p.name for p in checkpoints.dir.iterdir()) == ["step_00000009", "step_00000010"]
    (checkpoints.dir / ".tmp-step_00000011").mkdir()  # as a killed run leaves it
    assert checkpoints.latest() == path
    checkpoints.remove_unfinished()
    assert sorted(p.name for p in checkpoints.dir.iterdir()) == ["step_00000009", "step_00000010"]


OTHERS: dict[str, tuple[str, Any]] = {
    "seed": ("model.seed", 12),
    "global_batch_size": ("model.global_batch_size", 16),
    "samples_per_prompt": ("model.rollout.samples_per_prompt", 1),
    "prompts": ("model.data.path", "q"),
    "teacher": ("model.teacher.path", "u"),
    "student": ("pretrained_checkpoint.restore_from_path", "v"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_run_of_other_settings_may_not_resume(name: str) -> None:
    key, value = OTHERS[name]
    with pytest.raises(ConfigError) as error:
        check_resumable(STATE, replace(STATE, step=0, **{name: value}))
    assert str(error.value).startswith(f"{key} = {value!r}: ") and repr(getattr(STATE, name)) in str(error.value)
    check_resumable(STATE, replace(STATE, step=0, skipped_steps=0))
