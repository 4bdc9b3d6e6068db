"""What the plan refuses before a model is built, and what it says."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from nemo_tropd.config import ConfigError
from nemo_tropd.data import PromptError
from nemo_tropd.training.plan import make_plan, print_plan
from tests.e2e.compose import compose_config
from tests.e2e.tiny_run import TinyRun
from tests.tiny_models import make_tiny


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    return TinyRun.make(tmp_path_factory.mktemp("plan"))


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)


def plan(tiny: TinyRun, run_dir: Path, **keys: object):
    degrees = {k: int(str(keys.pop(k, 1))) for k in ("tensor", "data", "pipeline")}
    return make_plan(compose_config(tiny.overrides(run_dir, **degrees, **keys)))


def test_a_plan_is_made_and_printed(tiny: TinyRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cfg = compose_config(tiny.overrides(tmp_path / "run", tensor=2))
    made = make_plan(cfg)
    print_plan(cfg, made)
    shown = capsys.readouterr().out
    assert "2 = tensor 2 x pipeline 1 x data 1" in shown and "131 tokens" in shown and "memory of a rank" in shown
    assert made.vocab_size == 131 and len(made.prompts.held_out) == 4
    assert not (tmp_path / "run").exists()


CASES = [("bf16", False, True), ("bf16", True, False), (32, False, False)]


@pytest.mark.parametrize(("precision", "fast", "said"), CASES)
def test_the_plan_says_if_bf16_would_be_slow(
    tiny: TinyRun,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    precision: object,
    fast: bool,
    said: bool,
) -> None:
    monkeypatch.setattr("nemo_tropd.training.plan.fast_bf16", lambda: fast)
    cfg = compose_config(tiny.overrides(tmp_path / "run", **{"trainer.precision": precision}))
    print_plan(cfg, make_plan(cfg))
    assert ("trainer.precision=32" in capsys.readouterr().out) == said


def test_a_plan_for_a_gpu_that_is_not_here(
    tiny: TinyRun, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    keys = {"trainer.gpu_memory_gib": 40}
    with pytest.raises(ConfigError, match=r"gpu_memory_gib = 40\.0: this machine has no GPU: set it to null"):
        plan(tiny, tmp_path / "run", **keys)
    cfg = compose_config(tiny.overrides(tmp_path / "run", **keys, check_only=True, data=2))
    made = make_plan(cfg)
    print_plan(cfg, made)
    shown = capsys.readouterr().out
    assert made.machine.kind == "gpu" and "40.00 GiB, trainer.gpu_memory_gib" in shown and "2 engines" in shown
    with pytest.raises(
        ConfigError, match=r"trainer\.devices = 1: the plan needs 3\.\d+ GiB .*No single part is as large"
    ):
        plan(tiny, tmp_path / "run", **{"trainer.gpu_memory_gib": 3}, check_only=True)


def test_more_than_the_host_has_is_refused(tiny: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("nemo_tropd.training.plan.host_bytes", lambda: 2.0 * 2**30)
    with pytest.raises(ConfigError, match=r"the plan needs .* \(2 ranks of .* per host\) .* only 2\.00 GiB"):
        plan(tiny, tmp_path / "run", data=2)


def test_missing_checkpoint(tiny: TinyRun, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"restore_from_path = '/nowhere'.*no such directory"):
        plan(tiny, tmp_path, **{"pretrained_checkpoint.restore_from_path": "/nowhere"})


def test_corrupt_checkpoint(tiny: TinyRun, tmp_path: Path) -> None:
    broken = shutil.copytree(tiny.student, tmp_path / "broken")
    (broken / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"restore_from_path.*config\.json"):
        plan(tiny, tmp_path, **{"pretrained_checkpoint.restore_from_path": broken})


def test_tensor_parallel_that_does_not_divide_the_heads(tiny: TinyRun, tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"4 query heads cannot be split over tensor parallel 3; supported degrees of.*: 1, 2"
    ):
        plan(tiny, tmp_path, tensor=3)


def test_teacher_of_another_tokenizer(tiny: TinyRun, tmp_path: Path) -> None:
    other = make_tiny(tmp_path / "other", vocab=140, hidden=64, head_dim=32)
    with pytest.raises(ConfigError, match=r"model\.teacher\.path.*differs from the student's in \d+ tokens"):
        plan(tiny, tmp_path, **{"model.teacher.path": other})


def test_context_longer_than_the_model(tiny: TinyRun, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"encoder_seq_length = 100000.*max_position_embeddings"):
        plan(tiny, tmp_path, **{"model.encoder_seq_length": 100000})


def test_top_k_above_the_vocabulary(tiny: TinyRun, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"top_k = 500: the vocabulary has only 131"):
        plan(tiny, tmp_path, **{"model.tropd.top_k": 500})


def test_unknown_objective_and_parameter(tiny: TinyRun, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"objective = 'tropo'.*known: opd"):
        plan(tiny, tmp_path, **{"model.tropd.objective": "tropo"})
    with pytest.raises(ConfigError, match=r"'opd'.*gate"):
        plan(tiny, tmp_path, **{"model.tropd.objective": "opd", "model.tropd.gate": "soft"})


def test_a_parameter_that_the_objective_does_not_take_is_named_by_its_key(tiny: TinyRun, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^model\.tropd\.params\.tau = 'low': tropd: give a finite number"):
        plan(tiny, tmp_path, **{"+model.tropd.params.tau": "low"})
    with pytest.raises(ConfigError, match=r"^model\.tropd\.params\.gate = 'hard': tropd: choose one of bernoulli"):
        plan(tiny, tmp_path, **{"+model.tropd.params.gate": "hard"})


def test_a_cache_for_less_than_one_sequence(tiny: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(
        ConfigError, match=r"^model\.rollout\.kv_cache_gib = 1e-06: .*encoder_seq_length = 96 needs"
    ) as e:
        plan(tiny, tmp_path, **{"model.rollout.kv_cache_gib": 1e-6})
    enough = float(str(e.value).split("needs ")[1].split()[0])
    plan(tiny, tmp_path, **{"model.rollout.kv_cache_gib": enough})


@pytest.mark.parametrize(
    ("content", "message"),
    [("", "has no prompts"), ('{"prompt": "a"}\n{"prompt": \n', "line 2: not JSON"), ('{"text": "a"}\n', "'text'")],
)
def test_bad_prompt_files(tiny: TinyRun, tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text(content)
    with pytest.raises(PromptError, match=message):
        plan(tiny, tmp_path, **{"model.data.path": file})


def test_prompt_longer_than_the_context(tiny: TinyRun, tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text(json.dumps({"prompt": "count " * 60}) + "\n")
    with pytest.raises(PromptError, match=r"prompts\.jsonl, line 1: the prompt has \d+ tokens"):
        plan(tiny, tmp_path, **{"model.data.path": file})


def test_an_answer_that_is_no_number(tiny: TinyRun, tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"capital {i}?", "answer": "Paris"}) + "\n" for i in range(9)))
    with pytest.raises(PromptError, match="Paris"):
        plan(tiny, tmp_path, **{"model.data.path": file})


def test_unwritable_run_directory(tiny: TinyRun, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match="is a file, not a directory"):
        plan(tiny, tmp_path / "file" / "run")
    if os.geteuid():
        (tmp_path / "closed").mkdir(mode=0o500)
        with pytest.raises(ConfigError, match="cannot be written"):
            plan(tiny, tmp_path / "closed" / "run")


def test_a_run_that_exists_is_not_overwritten(tiny: TinyRun, tmp_path: Path) -> None:
    (tmp_path / "run" / "checkpoints" / "step_00000001").mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"has 1 checkpoint\(s\)"):
        plan(tiny, tmp_path / "run", **{"exp_manager.resume_if_exists": False})
