"""What a checkpoint restores, which one is taken, and which runs may not resume from it."""

from __future__ import annotations

import errno
import os
import re
import shlex
import shutil
from dataclasses import replace
from pathlib import Path
from traceback import StackSummary
from typing import Any
from unittest.mock import Mock

import psutil
import pytest
import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

from nemo_tropd.config import ConfigError, TropdConfig
from nemo_tropd.objectives import build
from nemo_tropd.parallel.topology import Topology
from nemo_tropd.training import checkpoint
from nemo_tropd.training.checkpoint import Checkpoints, complete_checkpoints
from nemo_tropd.training.checkpoint_writer import write_in_this_process
from nemo_tropd.training.metrics import MetricsLog
from nemo_tropd.training.resume import CheckpointError, RunState, check_resumable, first_state
from nemo_tropd.training.trainer import TEACHER_REMEDY, TropdTrainer
from tests.e2e.compose import compose_config
from tests.tiny_models import make_tiny
from tests.unit.test_optimizer import Student

pytestmark = pytest.mark.random

SETTINGS: dict[str, Any] = {
    "model.seed": 11,
    "model.global_batch_size": 8,
    "model.rollout.samples_per_prompt": 2,
    "model.data.path": "p",
    "model.teacher.path": "t",
    "pretrained_checkpoint.restore_from_path": "s",
}
STATE = RunState(step=3, settings=SETTINGS, run_id="r", skipped_steps=1)


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
    latest = complete_checkpoints(checkpoints.dir)[-1]
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
    assert complete_checkpoints(checkpoints.dir) == []
    checkpoints.remove_unfinished()
    student = Student(folder, topology)
    for step in (2, 9, 10):  # in the order of numbers, not of their text
        path = checkpoints.save(student.ddp.module, student.optimizer, replace(STATE, step=step))
        assert complete_checkpoints(checkpoints.dir)[-1] == path and (path / "hf" / "config.json").is_file()
    assert sorted(p.name for p in checkpoints.dir.iterdir()) == ["step_00000009", "step_00000010"]
    # A process of Megatron's would get a stop's signal, too, and take the stop's own checkpoint with it.
    ours = [p for p in psutil.process_iter(["ppid", "cmdline"]) if p.info["ppid"] == os.getpid()]
    assert not [p for p in ours if "spawn_main" in " ".join(p.info["cmdline"] or ())]
    (checkpoints.dir / ".tmp-step_00000011").mkdir()  # as a killed run leaves it
    assert complete_checkpoints(checkpoints.dir)[-1] == path
    checkpoints.remove_unfinished()
    assert sorted(p.name for p in checkpoints.dir.iterdir()) == ["step_00000009", "step_00000010"]


OTHERS: dict[str, Any] = {
    "model.seed": 12,
    "model.global_batch_size": 16,
    "model.rollout.samples_per_prompt": 1,
    "model.data.path": "q",
    "model.teacher.path": "u",
    "pretrained_checkpoint.restore_from_path": "v",
}


@pytest.mark.parametrize("key", OTHERS)
def test_a_run_of_other_settings_may_not_resume(key: str) -> None:
    value, other = OTHERS[key], replace(STATE, step=0, settings={**SETTINGS, key: OTHERS[key]})
    with pytest.raises(ConfigError) as error:
        check_resumable(STATE, other)
    assert str(error.value).startswith(f"{key} = {value!r}: ") and repr(SETTINGS[key]) in str(error.value)
    check_resumable(STATE, replace(STATE, step=0, skipped_steps=0))
    assert check_resumable(STATE, other, [key]) == [f"{key}: {SETTINGS[key]} up to step 3, {value} from here on"]


def test_the_advice_names_all_that_is_to_be_accepted() -> None:
    """What was accepted already, too: the advice would else lead from one key to the other and back."""
    settings = {**SETTINGS, "model.seed": 12, "model.global_batch_size": 16}
    advice = "accept_changes='[model.seed,model.global_batch_size]'"
    for accepted in ([], ["model.seed"]):
        with pytest.raises(ConfigError, match=re.escape(advice)):
            check_resumable(STATE, replace(STATE, settings=settings), accepted)


def test_a_cap_that_nobody_set_is_accepted_with_the_steps_ahead_that_it_follows() -> None:
    ahead, cap = "model.rollout.steps_ahead", "model.tropd.params.importance_cap"

    def state(steps: int, value: float | None) -> RunState:
        return replace(STATE, settings={**SETTINGS, ahead: steps, cap: value})

    for saved, now in ((state(0, None), state(1, 2.0)), (state(2, 2.0), state(0, None))):
        with pytest.raises(ConfigError, match=rf"^{ahead} = .*accept_changes='\[{ahead}\]'"):
            check_resumable(saved, now)
        lines = check_resumable(saved, now, [ahead])
        assert [line.partition(":")[0] for line in lines] == [ahead, cap]
    for saved, now in (
        (state(0, None), state(1, 3.0)), (state(0, 1.5), state(1, 2.0)), (state(1, 2.0), state(1, None))
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=f"^{cap} = "):
            check_resumable(saved, now, [ahead])


@pytest.mark.parametrize("key", ["trainer.precision", "model.optim.name", "model.optim.distributed"])
def test_optimizer_states_of_another_kind_are_refused_though_accepted(key: str) -> None:
    saved, now = (replace(STATE, settings={**SETTINGS, "model.seed": seed, key: seed}) for seed in (11, 12))
    with pytest.raises(ConfigError, match=rf"^{key} = 12: .* made with 11, .*restore that") as error:
        check_resumable(saved, now, [key, "model.seed"])
    assert "remove" not in str(error.value) and "accept_changes" not in str(error.value)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.EIO, "Input/output error"), "rerun the command when the file system works"),
        (MemoryError(), "out of memory"),
        (torch.OutOfMemoryError("CUDA out of memory"), "out of memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"), "out of memory"),
        (RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer"), "the ranks lost each other"),
        (FileNotFoundError(errno.ENOENT, "No such file or directory"), None),
        (EOFError("common.pt is empty"), None),
        (KeyError("optimizer.state.exp_avg"), None),
    ],
)
@pytest.mark.parametrize("collected", [False, True])
def test_only_a_checkpoints_own_fault_is_called_damage(error: Exception, said: str | None, collected: bool) -> None:
    """A good one, which a machine or its network failed to read, is neither set aside nor said to be damaged."""
    raised = checkpoint.CheckpointException("read", {1: (error, StackSummary())}) if collected else error
    made = checkpoint._load_error(Path("run/step_00000003"), raised)
    assert isinstance(made, checkpoint.DamagedCheckpoint) == (said is None)
    assert str(made).startswith("run/step_00000003 ") and (said or "it is damaged") in str(made)


def test_a_run_that_follows_the_advice_for_a_teacher_that_is_not_finite_resumes() -> None:
    required = ["pretrained_checkpoint.restore_from_path=s", "model.teacher.path=t", "model.data.path=d"]
    before = [*required, "trainer.precision=bf16", "model.teacher.fp8=tensorwise"]
    advised = compose_config([*before, *shlex.split(TEACHER_REMEDY.partition(" set ")[2])])
    was, now = (first_state(cfg, build("tropd"), {}, "r") for cfg in (compose_config(before), advised))
    lines = check_resumable(was, now, advised.trainer.tropd.accept_changes)
    assert lines == [
        f"model.teacher.{what} up to step 0, {value} from here on"
        for what, value in (("fp8: tensorwise", None), ("precision: bf16", "32"))
    ]


def test_every_setting_is_classified() -> None:
    """What is neither free nor adjustable is kept: a key added to the schema is kept until somebody says otherwise."""
    cfg = TropdConfig()
    cfg.pretrained_checkpoint.restore_from_path = cfg.model.teacher.path = cfg.model.data.path = "x"
    state = first_state(cfg, build("tropd"), {}, "r")
    assert {"model.seed", "model.tropd.gate", "model.rollout.top_k", "trainer.precision"} <= state.settings.keys()
    assert {"model.optim.lr", "model.optim.sched.min_lr", "trainer.tropd.max_steps"} <= state.adjustable.keys()
    kept = state.settings.keys() | state.adjustable.keys()
    assert not {"model.micro_batch_size", "model.tokens_per_micro_batch", "model.rollout.placement", "name"} & kept
    assert not state.settings.keys() & state.adjustable.keys()


def test_a_checkpoint_whose_files_are_gone_is_not_finished(
    folder: Path, topology: Topology, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where another process removed it: no folder comes back without its weights, and older ones stay."""
    checkpoints = Checkpoints(tmp_path / "run", topology, hf_source=folder, keep=1)
    student = Student(folder, topology)
    first = checkpoints.save(student.ddp.module, student.optimizer, STATE)
    save = dist_checkpointing.save

    def save_and_lose(content: Any, path: str, *strategy: Any) -> None:
        save(content, path, *strategy)
        shutil.rmtree(path)

    monkeypatch.setattr(dist_checkpointing, "save", save_and_lose)
    with pytest.raises(CheckpointError, match="is gone: another process has removed it"):
        checkpoints.save(student.ddp.module, student.optimizer, replace(STATE, step=4))
    assert [p.name for p in checkpoints.dir.iterdir()] == [first.name]


def test_an_error_of_any_kind_on_rank_zero_is_a_checkpoint_error(
    folder: Path, topology: Topology, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreadable(*args: Any) -> None:
        raise UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte")

    checkpoints = Checkpoints(tmp_path / "run", topology, hf_source=folder, keep=1)
    student = Student(folder, topology)
    first = checkpoints.save(student.ddp.module, student.optimizer, STATE)
    monkeypatch.setattr(checkpoint, "write_hf_sidecar", unreadable)
    with pytest.raises(CheckpointError, match=r"UnicodeDecodeError.*earlier checkpoints are untouched"):
        checkpoints.save(student.ddp.module, student.optimizer, replace(STATE, step=4))
    assert complete_checkpoints(checkpoints.dir)[-1] == first


def test_everything_is_on_the_disk_before_an_older_checkpoint_goes(
    folder: Path, topology: Topology, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = Checkpoints(tmp_path / "run", topology, hf_source=folder, keep=1)
    student = Student(folder, topology)
    checkpoints.save(student.ddp.module, student.optimizer, STATE)
    events: list[tuple[str, str]] = []
    fsync, rename, rmtree = os.fsync, Path.rename, shutil.rmtree

    def log(event: str, path: str | Path) -> None:
        events.append((event, os.path.relpath(path, checkpoints.dir)))

    def logged_fsync(file: Any) -> None:
        log("fsync", os.readlink(f"/proc/self/fd/{file if isinstance(file, int) else file.fileno()}"))
        fsync(file)

    def logged_rename(path: Path, to: Path) -> Path:
        log("rename", path)
        return rename(path, to)

    def logged_rmtree(path: Path, **keys: Any) -> None:
        log("remove", path)
        rmtree(path, **keys)

    monkeypatch.setattr(os, "fsync", logged_fsync)
    monkeypatch.setattr(Path, "rename", logged_rename)
    monkeypatch.setattr(shutil, "rmtree", logged_rmtree)
    new = checkpoints.save(student.ddp.module, student.optimizer, replace(STATE, step=4))
    renamed, removed = events.index(("rename", ".tmp-step_00000004")), events.index(("remove", "step_00000003"))
    files = {Path(".tmp-step_00000004") / p.relative_to(new) for p in (new, *new.rglob("*"))}
    assert {str(p) for p in files} <= {path for event, path in events[:renamed] if event == "fsync"}
    assert ("fsync", ".") in events[renamed:removed]


class OnDevice:
    """A double of a GPU's tensor. A copy that does not block is page-locked memory, of the next power of two, which
    torch keeps for later copies: what a checkpoint needs for a moment a host would be without from then on."""

    def to(self, device: str, non_blocking: bool = False) -> torch.Tensor:
        assert device == "cpu" and not non_blocking
        return torch.ones(3)


def test_a_checkpoint_leaves_no_page_locked_memory_behind(tmp_path: Path, topology: Topology) -> None:
    write_in_this_process()
    writer = FileSystemWriterAsync(tmp_path)
    writer.write_buckets = [("path", "key", ([("object", "bytes")], [("item", OnDevice())]))]
    _, copy, _ = writer.get_save_function_and_args()
    ((path, key, (objects, ((item, tensor),))),) = copy()
    assert (path, key, objects, item) == ("path", "key", [("object", "bytes")], "item") and tensor.sum() == 3


def test_metrics_are_on_the_disk_before_the_checkpoint_of_their_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    monkeypatch.setattr(os, "fsync", lambda fd: events.append(Path(os.readlink(f"/proc/self/fd/{fd}")).name))
    trainer = Mock(log=MetricsLog(tmp_path, []), _with_ahead=lambda: (None, None))
    trainer.log.write(1, "train", {"loss": 1.0})
    trainer.checkpoints.save = lambda *args: events.append("checkpoint")
    TropdTrainer._save(trainer)
    trainer.log.close()
    assert events == ["metrics.jsonl", "checkpoint"]
