"""A run with several teachers: stopped and resumed to the bit, and what a resumed run may change of them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from nemo_tropd.command_line import compose_command_line
from nemo_tropd.config import ConfigError
from nemo_tropd.config_checks import resolve
from nemo_tropd.training import checkpoint
from nemo_tropd.training.run import train
from tests.doubles import replay_engines
from tests.e2e.compose import CONF
from tests.e2e.tiny_run import TinyRun, train_lines, without_clock
from tests.tiny_models import make_tiny


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    tiny = TinyRun.make(tmp_path_factory.mktemp("models"))
    make_tiny(tiny.root / "coder", layers=1, seed=5, hidden=32, head_dim=32)
    records = [json.loads(line) for line in tiny.prompts.read_text().splitlines()]
    for name, part in (("a", records[::2]), ("b", records[1::2])):
        lines = [json.dumps({**record, "hint": f"{name}: {record['prompt']}"}) for record in part]
        (tiny.root / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    return tiny


def go(tiny: TinyRun, run_dir: Path, steps: int, coder: bool = True, **keys: Any) -> Any:
    a, b = tiny.root / "a.jsonl", tiny.root / "b.jsonl"
    settings = {
        "trainer.tropd.max_steps": steps,
        "trainer.tropd.keep_checkpoints": 9,
        "exp_manager.create_tensorboard_logger": False,
        "model.data.path": "null",
        "model.data.sources": f"[{{path: {a}, weight: 2}},{{path: {b}, teacher: coder, teacher_prompt_key: hint}}]",
        **({"model.teachers.coder.path": tiny.root / "coder", "model.teachers.coder.offload": True} if coder else {}),
        "model.tropd.guidance.anneal_steps": 4,
        **keys,
    }
    arguments = ["--config-name", "base", *tiny.overrides(run_dir, **settings)]
    return train(resolve(compose_command_line(arguments, CONF)), replay_engines(131))


def test_a_resumed_run_has_the_bits_of_a_straight_one(tiny: TinyRun, tmp_path: Path) -> None:
    go(tiny, tmp_path / "straight", 3)
    for steps in (1, 3):
        assert go(tiny, tmp_path / "resumed", steps).step == steps
    straight, resumed = train_lines(tmp_path / "straight"), train_lines(tmp_path / "resumed")
    for a, b in zip(straight, resumed, strict=True):
        assert without_clock(a) == without_clock(b)
    assert "source/a.jsonl/trust_fraction" in {k for line in straight for k in line}
    weights = [load_file(tmp_path / name / "hf" / "model.safetensors") for name in ("straight", "resumed")]
    assert all(weights[0][name].equal(weights[1][name]) for name in weights[0])
    page = (tmp_path / "straight" / "report.html").read_text()
    assert "Loss tokens by source" in page and "Trust fraction by teacher" in page

    moved = shutil.copytree(tiny.root / "coder", tmp_path / "moved")
    assert go(tiny, tmp_path / "resumed", 4, **{"model.teachers.coder.path": moved}).step == 4
    with pytest.raises(ConfigError, match=r"model.teachers = 'coder: .*teacher \(content .*accept_changes"):
        go(tiny, tmp_path / "resumed", 5, **{"model.teachers.coder.path": tiny.teacher})


FOLLOWS: dict[str, Any] = {"model.teacher.follow_steps": 2, "model.optim.lr": "1e-2", "coder": False}


def following(tiny: TinyRun) -> dict[str, Any]:
    source = f"[{{path: {tiny.root / 'a.jsonl'}, teacher_prompt_key: hint}}]"
    return {**FOLLOWS, "model.teacher.path": tiny.student, "model.data.sources": source}


@pytest.mark.parametrize("objective", ["tropd", "tropd_exact"])
def test_a_teacher_that_follows_the_student_is_resumed_as_it_was(tiny: TinyRun, tmp_path: Path, objective: str) -> None:
    """The checkpoint after step 3 has the teacher that the student was after step 2."""
    keys = {**following(tiny), "model.teacher.offload": True, "model.tropd.objective": objective}
    go(tiny, tmp_path / "straight", 5, **keys)
    for steps in (3, 5):
        go(tiny, tmp_path / "resumed", steps, **keys)
    go(tiny, tmp_path / "never", 5, **{**keys, "model.teacher.follow_steps": "null"})
    straight, resumed, never = (train_lines(tmp_path / name) for name in ("straight", "resumed", "never"))
    for a, b, c in zip(straight, resumed, never, strict=True):
        assert without_clock(a) == without_clock(b)
        assert (a["log_ratio_mean"] == c["log_ratio_mean"]) == (a["step"] <= 2)
    with pytest.raises(ConfigError, match=r"model.teacher.follow_steps = 3: the run's checkpoint was made with 2"):
        go(tiny, tmp_path / "resumed", 6, **{**keys, "model.teacher.follow_steps": 3})


@pytest.mark.parametrize("offload", [False, True])
def test_an_earlier_checkpoint_serves_if_the_newest_is_damaged_in_its_teacher(
    tiny: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], offload: bool
) -> None:
    keys = {**following(tiny), "model.teacher.offload": offload}
    go(tiny, tmp_path / "straight", 4, **keys)
    go(tiny, tmp_path / "resumed", 3, **keys)
    fill, tried = checkpoint._fill, list[str]()

    def damaged(model: Any, loaded: dict[str, Any], prefix: str) -> None:
        fill(model, loaded, prefix)
        tried.append(prefix)
        if tried == ["model.", "teacher."]:
            with torch.no_grad():
                next(iter(model.parameters())).fill_(7)
            raise ValueError("a weight has NaN or infinite values")

    monkeypatch.setattr(checkpoint, "_fill", damaged)
    assert go(tiny, tmp_path / "resumed", 4, **keys).step == 4
    assert tried == ["model.", "teacher."] * 2
    assert "step_00000003 cannot be loaded (it is damaged: ValueError: a weight has NaN" in capsys.readouterr().out
    last = [train_lines(tmp_path / name)[-1] for name in ("straight", "resumed")]
    assert last[0]["loss"] == last[1]["loss"] and last[0]["log_ratio_mean"] == last[1]["log_ratio_mean"]
