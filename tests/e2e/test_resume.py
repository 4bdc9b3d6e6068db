"""What a run's directory survives: every optimizer, changed settings, damaged files, a second run, a lost export.

The engine replays the same tokens for the same request, so two ways to the same step can be compared to the bit.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from nemo_tropd.config import ConfigError
from nemo_tropd.report.records import read_run
from nemo_tropd.training.checkpoint import CheckpointError
from nemo_tropd.training.run import train
from nemo_tropd.training.trainer import Outcome
from tests.doubles import ReplayEngine, replay_engines
from tests.e2e.compose import compose_config
from tests.e2e.tiny_run import TinyRun, train_lines
from tests.faults import planted

STEPS = "trainer.tropd.max_steps"
BASE: dict[str, Any] = {
    "model.data.held_out": 0,
    "model.tropd.guidance.enabled": False,
    "trainer.tropd.keep_checkpoints": 9,
    "exp_manager.create_tensorboard_logger": False,
}
Go = Callable[..., Outcome | None]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    return TinyRun.make(tmp_path_factory.mktemp("models"))


@pytest.fixture
def go(models: TinyRun) -> Go:
    def run(run_dir: Path, steps: int, **keys: Any) -> Outcome | None:
        overrides = models.overrides(run_dir, **{**BASE, STEPS: steps, **keys})
        return train(compose_config(overrides), replay_engines(131))

    return run


@pytest.fixture(scope="module")
def finished(models: TinyRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three steps, copied by the tests that damage it."""
    run_dir = tmp_path_factory.mktemp("finished") / "run"
    train(compose_config(models.overrides(run_dir, **BASE)), replay_engines(131))
    return run_dir


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "copy"))


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    return load_file(run_dir / "hf" / "model.safetensors")


def losses(run_dir: Path) -> list[float]:
    return [{line["step"]: line["loss"] for line in train_lines(run_dir)}[step] for step in (1, 2, 3)]


def check_same(ours: Path, theirs: Path) -> None:
    assert losses(ours) == losses(theirs)
    assert all(torch.equal(tensor, weights(theirs)[name]) for name, tensor in weights(ours).items())


def step_dir(run_dir: Path, step: int) -> Path:
    return run_dir / "checkpoints" / f"step_{step:08d}"


# --- optimizers ---


@pytest.mark.parametrize("keys", [{"model.optim.name": "sgd"}, {"trainer.precision": "bf16"}], ids=["sgd", "bf16"])
def test_an_optimizer_resumes_to_the_bit(keys: dict[str, Any], go: Go, tmp_path: Path) -> None:
    keys = {**keys, "model.optim.lr": "1e-1" if "model.optim.name" in keys else "1e-3"}
    for name, parts in (("straight", [3]), ("resumed", [1, 3])):
        for steps in parts:
            go(tmp_path / name, steps, **keys)
    check_same(tmp_path / "resumed", tmp_path / "straight")
    other = {"model.optim.name": "adam"} if "model.optim.name" in keys else {"trainer.precision": "32"}
    (key, value), *_ = other.items()
    with pytest.raises(ConfigError, match=f"^{key} = '{value}'.*restore that") as error:
        go(tmp_path / "resumed", 4, **{**keys, **other})
    assert "remove" not in str(error.value) and step_dir(tmp_path / "resumed", 3).is_dir()


def test_a_run_that_has_applied_no_step_resumes(
    go: Go, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped before its first step, outside of the loop and in it, then after a step that was skipped."""
    from nemo_tropd.training import step as step_module
    from nemo_tropd.training.optimizer import StudentOptimizer

    run_dir = tmp_path / "run"

    def stop() -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.2)  # a thread reads it

    for phase in ("load", "engine start"):
        with planted(phase, stop, rank=0):
            outcome = go(run_dir, 3)
        assert outcome is not None and outcome.stopped_by_signal and outcome.step == 0
        assert not list(run_dir.glob("checkpoints/*"))

    step = StudentOptimizer.step

    def infinite(self: StudentOptimizer, number: int) -> Any:
        next(self.model.parameters()).main_grad.view(-1)[0] = math.inf
        return step(self, number)

    skipped = tmp_path / "skipped"
    with monkeypatch.context() as patched:
        patched.setattr(step_module.StudentOptimizer, "step", infinite)
        go(skipped, 1)
    assert [line["applied"] for line in train_lines(skipped)] == [0.0]
    for directory in (run_dir, skipped):
        outcome = go(directory, 3)
        assert outcome is not None and outcome.step == 3
    check_same(run_dir, finished)
    assert [line["applied"] for line in train_lines(skipped)] == [0.0, 1.0, 1.0]
    assert any(not torch.equal(t, weights(finished)[n]) for n, t in weights(skipped).items())


def test_steps_that_were_skipped_in_a_row_count_on_in_a_resumed_run(
    go: Go, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nemo_tropd.training.optimizer import StudentOptimizer
    from nemo_tropd.training.trainer import TrainingError

    step = StudentOptimizer.step

    def infinite(self: StudentOptimizer, number: int) -> Any:
        next(self.model.parameters()).main_grad.view(-1)[0] = math.inf
        return step(self, number)

    most = {"trainer.tropd.max_skipped_steps": 1}
    with monkeypatch.context() as patched:
        patched.setattr(StudentOptimizer, "step", infinite)
        go(tmp_path / "run", 1, **most)
        with pytest.raises(TrainingError, match="step 2: 2 steps in a row were skipped"):
            go(tmp_path / "run", 3, **most)
    outcome = go(tmp_path / "run", 3, **most)  # what was wrong has been changed
    assert outcome is not None and outcome.step == 3


@pytest.fixture
def closed(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """For each time that an engine was closed, whether it was told that the run is over."""
    found: list[bool] = []
    monkeypatch.setattr(ReplayEngine, "close", lambda self, *, run_over=False: found.append(run_over))
    return found


def test_a_stop_right_after_a_checkpoint_saves_nothing_twice(
    go: Go, tmp_path: Path, closed: list[bool], capsys: pytest.CaptureFixture[str]
) -> None:
    with planted("save", lambda: os.kill(os.getpid(), signal.SIGTERM), rank=0):
        outcome = go(tmp_path / "run", 3)
    assert outcome is not None and outcome.stopped_by_signal and outcome.step == 1
    assert capsys.readouterr().out.count("checkpoint ") == 1
    assert closed == [False]  # hosts of engines wait for the run


# --- settings ---


def test_a_new_learning_rate_is_used_and_said(go: Go, copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keys = {"model.optim.lr": "1e-5", "model.optim.betas": "[0.8,0.9]", "model.optim.weight_decay": 0.1}
    go(copy, 5, **keys, **{"model.optim.sched.name": "cosine", "model.optim.sched.min_lr": "1e-6"})
    out = capsys.readouterr().out
    for line in (
        "model.optim.lr: 0.001 up to step 3, 1e-05 from here on",
        "model.optim.betas: [0.9, 0.95] up to step 3, [0.8, 0.9] from here on",
        "model.optim.sched.name: constant up to step 3, cosine from here on",
        "trainer.tropd.max_steps: 3 up to step 3, 5 from here on",
    ):
        assert line in out
    rates = [line["learning_rate"] for line in train_lines(copy)]
    assert rates[:3] == [1e-3] * 3 and 1e-6 < rates[3] < 1e-5 and rates[4] == pytest.approx(1e-6)
    saved = torch.load(step_dir(copy, 5) / "common.pt", weights_only=True)
    groups = (
        saved["optimizer"]["optimizer"]["param_groups"]
        if "optimizer" in saved["optimizer"]
        else saved["optimizer"]["param_groups"]
    )
    assert {tuple(group["betas"]) for group in groups} == {(0.8, 0.9)}
    assert "lr: 1.0e-05" in (copy / "config.yaml").read_text()


def test_answers_before_and_after_are_to_the_same_questions(
    go: Go, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Though a resumed run takes another number of samples; and the rollouts of a killed one take none of its own."""
    keys = {"model.data.held_out": 4, "model.validation.kept_rollouts": 2, "trainer.tropd.val_check_interval": 0}
    go(tmp_path, 1, **keys)
    log = tmp_path / "rollouts.jsonl"
    log.write_bytes(log.read_bytes()[:-40])  # killed while it wrote
    assert "not measured alike" not in capsys.readouterr().out
    go(tmp_path, 2, **keys, **{"model.validation.samples_per_prompt": 2})
    line = "model.validation.samples_per_prompt: 1 at the first validation, 2 from here on: before and after are not"
    out = capsys.readouterr().out
    assert line in out and out.count("at the first validation") == 1
    answers = json.loads((tmp_path / "summary.json").read_text())["answers"]
    before, after = (
        json.loads((tmp_path / "validation" / f"step_0000000{step}.json").read_text())["answers"] for step in (0, 2)
    )
    assert len(answers) == 4 == len({a["digest"] for a in before}) and len(after) == 8
    for found, was in zip(answers, before, strict=True):
        (now,) = (a for a in after if (a["digest"], a["sample"]) == (was["digest"], 0))
        assert found == {"prompt": was["prompt"], "before": was["answer"], "after": now["answer"]}
    assert "exact match with known answers (4 answers before, 8 after)" in " ".join(out.split())
    shown = read_run(tmp_path).rollouts
    assert [(r.step, len(log.read_text().splitlines())) for r in shown] == [(1, 4), (2, 4), (2, 4)]


REFUSED = [
    ("model.seed", 7, "1234"),
    ("model.tropd.objective", "opd", "'tropd'"),
    ("model.tropd.gate", "soft", "'bernoulli'"),
    ("model.tropd.top_k", 4, "8"),
    ("model.rollout.temperature", 0.9, "1.0"),
    ("model.rollout.max_new_tokens", 10, "12"),
    ("model.tropd.guidance.enabled", True, "False"),
    ("+model.tropd.params.importance_cap", 2.0, "None"),
]


def test_what_alters_draws_or_loss_is_refused_by_key(go: Go, copy: Path, models: TinyRun, tmp_path: Path) -> None:
    """A finished run is not excepted: the directory is another run's. Nothing in it changes."""
    before = {p: p.stat().st_mtime_ns for p in copy.rglob("*") if p.is_file()}
    for key, value, was in REFUSED:
        for steps in (3, 4):
            with pytest.raises(ConfigError) as error:
                go(copy, steps, **{key: value})
            assert str(error.value).startswith(f"{key.removeprefix('+')} = {value!r}") and f"with {was}" in str(
                error.value
            )
            assert "trainer.tropd.accept_changes" in str(error.value)
    with pytest.raises(ConfigError, match=r"^trainer\.tropd\.max_steps = 2.*3 steps already"):
        go(copy, 2)
    after = {p: p.stat().st_mtime_ns for p in copy.rglob("*") if p.is_file() and p.name != ".lock"}
    assert after == {p: t for p, t in before.items() if p.name != ".lock"}


def test_models_are_known_by_their_content(go: Go, copy: Path, models: TinyRun, tmp_path: Path) -> None:
    """A moved folder resumes; other weights under the path it had do not, unless the user says so."""
    moved = shutil.copytree(models.teacher, tmp_path / "moved")
    student = shutil.copytree(models.student, tmp_path / "student")
    outcome = go(copy, 4, **{"model.teacher.path": moved, "pretrained_checkpoint.restore_from_path": student})
    assert outcome is not None and outcome.step == 4
    tensors = load_file(moved / "model.safetensors")
    save_file({name: tensor * 1.01 for name, tensor in tensors.items()}, moved / "model.safetensors")
    with pytest.raises(ConfigError, match=r"^model\.teacher\.path = .*content") as error:
        go(copy, 5, **{"model.teacher.path": moved})
    assert str(moved) in str(error.value)
    accepted = {"model.teacher.path": moved, "trainer.tropd.accept_changes": "[model.teacher.path]"}
    outcome = go(copy, 5, **accepted)
    assert outcome is not None and outcome.step == 5


def test_a_raised_max_steps_rewinds_neither_rate_nor_prefixes(
    go: Go, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = {
        "model.optim.sched.name": "linear",
        "model.tropd.guidance.enabled": True,
        "model.tropd.guidance.prefix_draw": "cap",
    }
    go(tmp_path / "run", 2, **keys)
    with pytest.raises(ConfigError, match=r"^model\.optim\.sched\.decay_steps = 2: .*steps 3 to 4 would learn nothing"):
        go(tmp_path / "run", 4, **keys)
    keys["model.optim.sched.min_lr"] = "1e-4"
    capsys.readouterr()
    go(tmp_path / "run", 4, **keys)
    out = capsys.readouterr().out
    assert "the learning rate (linear) still ends at step 2" in out
    assert "teacher prefixes still end at step 2" in out
    lines = train_lines(tmp_path / "run")
    assert [line["learning_rate"] for line in lines] == pytest.approx([2e-3 / 3, 1e-3 / 3, 1e-4, 1e-4])
    assert [line["guided_fraction"] > 0 for line in lines] == [True, True, False, False]


def test_a_single_step_of_a_decaying_schedule_learns(go: Go, models: TinyRun, tmp_path: Path) -> None:
    go(tmp_path / "run", 1, **{"model.optim.sched.name": "cosine"})
    assert train_lines(tmp_path / "run")[0]["learning_rate"] > 1e-4
    student = load_file(models.student / "model.safetensors")
    assert any(not torch.equal(tensor, student[name]) for name, tensor in weights(tmp_path / "run").items())


def test_a_checkpoint_of_another_version(go: Go, copy: Path) -> None:
    """A field that this version does not know is ignored; one that it needs and misses is not called damage."""
    path = step_dir(copy, 3) / "common.pt"
    common = torch.load(path, weights_only=True)
    common["run_state"]["from_the_future"] = 1
    torch.save(common, path)
    outcome = go(copy, 4)
    assert outcome is not None and outcome.step == 4
    path = step_dir(copy, 4) / "common.pt"
    common = torch.load(path, weights_only=True)
    common["run_state"] = {"step": 4, "seed": 1234, "version": "9.9"}
    torch.save(common, path)
    with pytest.raises(CheckpointError, match=r"another version of nemo_tropd \(9\.9; this is") as error:
        go(copy, 5)
    assert "remove" not in str(error.value) and "damaged" not in str(error.value)


# --- damaged files ---


def empty(path: Path) -> None:
    (path / "common.pt").write_bytes(b"")


def cut(path: Path) -> None:
    for shard in path.glob("*.distcp"):
        shard.write_bytes(shard.read_bytes()[:100])


def missing(path: Path) -> None:
    (path / "metadata.json").unlink()


def garbled(path: Path) -> None:
    (path / "metadata.json").write_text('{"sharded_ba')


def overwritten(path: Path) -> None:
    """Of the right size, so that only loading notices."""
    for shard in path.glob("*.distcp"):
        shard.write_bytes(bytes(shard.stat().st_size))


@pytest.mark.parametrize("damage", [empty, cut, missing, garbled, overwritten])
def test_the_checkpoint_before_a_damaged_one_is_used(
    damage: Callable[[Path], None], go: Go, finished: Path, copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (copy / "summary.json").unlink()
    damage(step_dir(copy, 3))
    if damage is empty:
        shutil.rmtree(copy / "hf")
        damage(step_dir(copy, 2))
    outcome = go(copy, 3)
    assert outcome is not None and outcome.step == 3
    out = capsys.readouterr().out
    assert f"{step_dir(copy, 3)} cannot be loaded (it is damaged" in out and "using the checkpoint before it" in out
    assert f"(step {1 if damage is empty else 2})" in out
    check_same(copy, finished)
    assert (copy / "checkpoints" / "step_00000003.damaged").is_dir() and step_dir(copy, 3).is_dir()


def test_with_no_readable_checkpoint_left_the_run_does_not_start_over(
    go: Go, copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for step in (1, 2, 3):
        (cut if step > 1 else overwritten)(step_dir(copy, step))
    with pytest.raises(CheckpointError, match=r"no checkpoint in .* can be loaded") as error:
        go(copy, 4)
    said = str(error.value) + capsys.readouterr().out
    assert all(
        f"{step_dir(copy, step)} cannot be loaded" in said and step_dir(copy, step).is_dir() for step in (1, 2, 3)
    )


def test_an_empty_json_is_absent_and_said(go: Go, copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (copy / "summary.json").write_text("")
    (copy / "validation").mkdir(exist_ok=True)
    (copy / "validation" / "step_00000000.json").write_text('{"step": 0, "met')
    assert go(copy, 3) is not None
    out = capsys.readouterr().out
    assert "summary.json is empty or damaged" in out and "step_00000000.json is empty or damaged" in out
    assert json.loads((copy / "summary.json").read_text())["steps"] == 3


# --- the end of a run ---


@pytest.mark.parametrize("lost", ["hf", "report.html"])
def test_a_finished_run_makes_lost_results_again(lost: str, go: Go, finished: Path, copy: Path) -> None:
    assert go(copy, 3) is None
    path = copy / lost
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    outcome = go(copy, 3)
    assert outcome is not None and outcome.step == 3 and path.exists()
    check_same(copy, finished)
    assert go(copy, 3) is None


def test_an_extended_run_killed_in_its_export_or_report_makes_both_again(
    go: Go, copy: Path, closed: list[bool]
) -> None:
    old = weights(copy)

    def killed() -> None:
        raise RuntimeError("killed")

    for phase in ("export", "report"):
        with planted(phase, killed, rank=0), pytest.raises(RuntimeError, match="killed"):
            go(copy, 4)
        assert step_dir(copy, 4).is_dir()
    outcome = go(copy, 4)
    assert outcome is not None and outcome.step == 4
    assert closed == [False, False, True]  # hosts of engines are told to exit once nothing is left to do
    assert any(not torch.equal(tensor, old[name]) for name, tensor in weights(copy).items())
    assert json.loads((copy / "summary.json").read_text())["steps"] == 4


# --- one run, one directory ---


def test_a_second_run_in_the_directory_is_refused(
    go: Go, copy: Path, models: TinyRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From within the first: by host and process, with nothing changed. Reading is allowed."""
    from nemo_tropd.training import run_lock
    from nemo_tropd.training.step import TrainStep

    monkeypatch.setattr(run_lock, "_ENDING_S", 0.0)
    one_step, refused = TrainStep.run, []

    def meddle(self: TrainStep, step: int, **keys: Any) -> Any:
        (copy / "checkpoints" / ".tmp-step_00000009").mkdir()
        before = sorted(copy.rglob("*"))
        held = rf"process {os.getpid()} on \S+ is running in this directory"
        with pytest.raises(ConfigError, match=held) as error, run_lock.run_lock(copy, "exp_manager.exp_dir"):
            pass
        refused.append(error.value.key)
        go(copy, 5, check_only=True)
        assert sorted(copy.rglob("*")) == before
        return one_step(self, step, **keys)

    with monkeypatch.context() as patched:
        patched.setattr(TrainStep, "run", meddle)
        outcome = go(copy, 4)
    assert outcome is not None and outcome.step == 4 and refused == ["exp_manager.exp_dir"]
    assert go(copy, 4) is None  # the file alone locks nothing


def test_left_overs_of_a_killed_run_are_removed(go: Go, copy: Path) -> None:
    """Also those that carry this process's id, or the name of another machine."""
    for name in (
        f".hf.tmp-elsewhere-0123abcd-{os.getpid()}",
        ".hf.tmp-elsewhere-0123abce-1",
        "checkpoints/.tmp-step_00000007",
    ):
        (copy / name).mkdir()
    go(copy, 4)
    assert not list(copy.glob(".hf*")) and not list(copy.glob("checkpoints/.*"))
