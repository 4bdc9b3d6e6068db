"""What the plan refuses before a model is built, and what it says."""

from __future__ import annotations

import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from nemo_tropd.config import ConfigError
from nemo_tropd.data import Prompt, PromptError, PromptKeys, PromptSet, PromptSplit
from nemo_tropd.data.conversations import checked
from nemo_tropd.data.prompts import Share
from nemo_tropd.parallel.agreement import World
from nemo_tropd.training.plan import _answer_notes, make_plan, print_plan
from nemo_tropd.training.start import agreed_fingerprint
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
    sampled = {"model.rollout.temperature": 0.6, "model.rollout.top_k": 20}
    cfg = compose_config(tiny.overrides(tmp_path / "run", tensor=2, **sampled))
    made = make_plan(cfg)
    print_plan(cfg, made)
    shown = capsys.readouterr().out
    assert "trained on" in shown and "softmax(logits / 0.6), top-k 20" in shown
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
    for label in ("time of a step", "cache of an engine", "memory of a host", "before the steps, teacher generates"):
        assert label in shown
    with pytest.raises(
        ConfigError, match=r"trainer\.devices = 1: the plan needs 4\.\d+ GiB .*No single part is as large"
    ):
        plan(tiny, tmp_path / "run", **{"trainer.gpu_memory_gib": 3}, check_only=True)


def test_a_teacher_that_answers_benchmarks_alone_is_planned_for(
    tiny: TinyRun, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No held-out prompt and no prefix wants it: its engines, their time and memory are in the plan all the same."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setenv("COLUMNS", "1000")
    keys = {"model.data.held_out": 0, "model.tropd.guidance.enabled": False, "model.encoder_seq_length": 256}
    keys |= {"trainer.gpu_memory_gib": 40, "check_only": True, "model.validation.benchmarks": "[capitals]"}
    for scored in (False, True):
        cfg = compose_config(tiny.overrides(tmp_path / "run", **keys, **{"model.validation.score_teacher": scored}))
        print_plan(cfg, make_plan(cfg))
        shown = capsys.readouterr().out
        line = "24 answers to benchmarks of at most 16: 384 tokens by 1 engine on rank 0's node"
        assert (line in shown) == scored
        assert shown.count("memory: before the steps, teacher generates") == 2 * scored, "of the GPU, of the host"


def test_more_than_the_host_has_is_refused(tiny: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("nemo_tropd.training.plan.host_bytes", lambda: 2.0 * 2**30)
    with pytest.raises(ConfigError, match=r"the plan needs .* \(2 ranks of .* per host\) .* only 2\.00 GiB"):
        plan(tiny, tmp_path / "run", data=2)


def test_a_cache_larger_than_the_host_is_named(tiny: TinyRun, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^model\.rollout\.kv_cache_gib = 100000\.0: .* is engine: lower it"):
        plan(tiny, tmp_path / "run", **{"model.rollout.kv_cache_gib": 100000})


def test_missing_checkpoint(tiny: TinyRun, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"restore_from_path = '/nowhere'.*no such directory"):
        plan(tiny, tmp_path, **{"pretrained_checkpoint.restore_from_path": "/nowhere"})


def test_a_name_or_a_folder_around_a_checkpoint_gets_the_remedy(tiny: TinyRun, tmp_path: Path) -> None:
    key = "pretrained_checkpoint.restore_from_path"
    with pytest.raises(ConfigError, match=r"nothing is downloaded during a run: hf download Qwen/Qwen3-4B --local-dir"):
        plan(tiny, tmp_path / "run", **{key: "Qwen/Qwen3-4B"})
    for within in ("old/hf", "models--a--b/snapshots/0a"):
        (tmp_path / within).parent.mkdir(parents=True)
        (tmp_path / within).symlink_to(tiny.student)
        around = tmp_path / within.split("/")[0]
        with pytest.raises(ConfigError, match=rf"has no config\.json; the checkpoint is in {tmp_path / within}"):
            plan(tiny, tmp_path / "run", **{key: around})


def test_a_model_in_the_run_directory_is_refused(tiny: TinyRun, tmp_path: Path) -> None:
    shutil.copytree(tiny.teacher, tmp_path / "run" / "hf")
    with pytest.raises(ConfigError, match=r"model\.teacher\.path = .*lies in the run directory .*explicit_log_dir"):
        plan(tiny, tmp_path / "run", **{"model.teacher.path": tmp_path / "run" / "hf"})
    with pytest.raises(ConfigError, match=r"restore_from_path = .*lies in the run directory"):
        plan(tiny, tiny.student)


def test_a_cache_directory_that_cannot_be_is_refused(tiny: TinyRun, tmp_path: Path) -> None:
    keys = {"model.teacher.cache_dir": tiny.prompts / "cache"}
    with pytest.raises(ConfigError, match=r"model\.teacher\.cache_dir = .*prompts\.jsonl is a file, not a directory"):
        plan(tiny, tmp_path / "run", **keys)
    assert plan(
        tiny, tmp_path / "run", **keys, **{"model.data.held_out": 0, "model.tropd.guidance.enabled": False}
    )  # nothing to keep


def test_a_small_file_and_a_teacher_that_is_the_student_are_said(
    tiny: TinyRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = {"model.teacher.path": tiny.student, "model.global_batch_size": 64, "trainer.tropd.max_steps": 7}
    cfg = compose_config(tiny.overrides(tmp_path / "run", **keys))
    made = make_plan(cfg)
    assert ("teacher", "the student's own folder: at first there is nothing to learn from it") in made.notes
    print_plan(cfg, made)
    said = "28 to train, 4 held out; 16.0 times each in a run, some of them 3 times in a step"
    assert said in " ".join(capsys.readouterr().out.replace("│", " ").split())


def test_corrupt_checkpoint(tiny: TinyRun, tmp_path: Path) -> None:
    broken = shutil.copytree(tiny.student, tmp_path / "broken")
    (broken / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"restore_from_path.*config\.json"):
        plan(tiny, tmp_path, **{"pretrained_checkpoint.restore_from_path": broken})


@pytest.mark.parametrize("changes", [{"dtype": "bf17"}, {"model_type": None}])
def test_a_config_that_the_engine_could_not_load(tiny: TinyRun, tmp_path: Path, changes: dict[str, Any]) -> None:
    folder = shutil.copytree(tiny.teacher, tmp_path / "odd")
    config = {**json.loads((folder / "config.json").read_text()), **changes}
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    with pytest.raises(
        ConfigError, match=r"model\.teacher\.path = .*transformers, and so vLLM, cannot load its config"
    ):
        plan(tiny, tmp_path / "run", **{"model.teacher.path": folder})


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


def test_an_exact_objective_is_planned_for_and_samples_must_be_complete(tiny: TinyRun, tmp_path: Path) -> None:
    exact = {"model.tropd.objective": "tropd_exact"}
    held = plan(tiny, tmp_path / "run", **exact).memory.resident
    assert held["teacher's hidden states"] > 0 and "teacher's hidden states" not in plan(tiny, tmp_path).memory.resident
    with pytest.raises(
        ConfigError, match=r"model\.rollout\.top_k = 20: tropd_exact compares the complete .* set it to 0"
    ):
        plan(tiny, tmp_path / "run", **exact, **{"model.rollout.top_k": 20})
    with pytest.raises(ConfigError, match=r"model\.tropd\.outlier = 'mask': tropd_exact: .*fkl_full"):
        plan(tiny, tmp_path / "run", **exact, **{"model.tropd.outlier": "mask"})


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


def test_answers_of_every_kind_are_counted(
    tiny: TinyRun, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = ["Paris", 4, None, math.nan, ["4", "four"], "B", "word " * 40, {"value": 3}, True, "", "$x^2$"]
    held = [Prompt(str(i), "", (), checked_answer(a), (i,), "here") for i, a in enumerate(answers)]
    notes = _answer_notes(PromptSplit(PromptSet(()), PromptSet(tuple(held)), 0))
    counted = "3 as expressions, 3 as text, 1 not judged (longer than a line), 4 unknown"
    assert notes == [("answers", f"of 11 held-out prompts: {counted}")]
    monkeypatch.setenv("RANK", "1")
    assert _answer_notes(PromptSplit(PromptSet(()), PromptSet(tuple(held)), 0)) == []


def checked_answer(answer: object) -> Any:
    found = checked({"prompt": "a", "answer": answer}, "here", PromptKeys())
    assert found is not None
    return found.answer


def test_several_sources_and_what_was_left_out_are_shown(
    tiny: TinyRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in "ab":
        lines = [{"question": f"{name} {'count ' * (i % 4)}{i}?", "answer": "Paris"} for i in range(12)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    sources = f"[{{path:{tmp_path}/a.jsonl,weight:3,prompt_key:question}},{{path:{tmp_path}/b.jsonl}}]"
    keys = {"model.data.sources": sources, "model.data.prompt_key": "question", "model.data.path": "null"}
    cfg = compose_config(
        tiny.overrides(tmp_path / "run", **keys, **{"model.data.max_prompt_tokens": 40, "model.data.overlong": "drop"})
    )
    made = make_plan(cfg)
    print_plan(cfg, made)
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert f"{made.prompts.dropped // 2} of 12 prompts dropped: longer than 40 tokens" in shown and made.prompts.dropped
    assert "3 held out, 7" in shown and "1 held out, 2" in shown and "of each epoch" in shown
    assert "of 4 held-out prompts: 4 as text" in shown
    for key, value in (("model.data.path", tmp_path / "a.jsonl"), ("model.data.sources", "[]")):
        with pytest.raises(
            ConfigError, match=r"^model\.data\.path = .*: (choose: set it to null|give the prompts' file)"
        ):
            plan(tiny, tmp_path / "run", **keys | {key: value})


class Ranks(World):
    """Worlds of ranks that call one after the other: the first pass hears what each says, the second answers."""

    def __init__(self) -> None:
        self.said: list[Any] = []
        self.answers = False

    def gather_objects(self, obj: Any) -> list[Any]:
        if not self.answers:
            self.said.append(obj)
            raise KeyboardInterrupt
        return self.said


def fingerprints(ranks: list[PromptSplit]) -> list[str]:
    world = Ranks()
    for split in ranks:
        with pytest.raises(KeyboardInterrupt):
            agreed_fingerprint(split, world)
    world.answers = True
    return [agreed_fingerprint(split, world) for split in ranks]


def test_ranks_that_read_other_prompts_are_named() -> None:
    def split(train: int, held: int, answer: str = "4", shares: tuple[Share, ...] = ()) -> PromptSplit:
        prompts = [Prompt(str(i), "", (), answer, (i,), "here") for i in range(train + held)]
        return PromptSplit(PromptSet(tuple(prompts[:train]), shares), PromptSet(tuple(prompts[train:])), 0)

    assert len(set(fingerprints([split(5, 2)] * 4))) == 1
    cases = {
        r"training prompts of rank 2 are not those of rank 0: rank 2 on .* reads 4 of them, rank 0 on .* 5": split(
            4, 2
        ),
        r"held-out prompts of rank 2 are .* reads 3 of them, rank 0 on .* 2": split(5, 3),
        r"training prompts of rank 2 are .* reads 5 of them, rank 0 on .* 5": split(5, 2, "5"),
        r"training prompts of rank 2 are": split(5, 2, shares=(Share(2, 1.0), Share(3, 1.0))),
    }
    for message, other in cases.items():
        with pytest.raises(PromptError, match=message):
            fingerprints([split(5, 2), split(5, 2), other])
    with pytest.raises(PromptError, match=r"prompts of ranks 1, 3 are not those of rank 0: rank 1 on"):
        fingerprints([split(5, 2), split(4, 2), split(5, 2), split(6, 2)])


def test_unwritable_run_directory(tiny: TinyRun, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match="is a file, not a directory"):
        plan(tiny, tmp_path / "file" / "run")
    if os.geteuid():
        (tmp_path / "closed").mkdir(mode=0o500)
        with pytest.raises(ConfigError, match="cannot be written"):
            plan(tiny, tmp_path / "closed" / "run")


REFUSED = {
    "pretrained_checkpoint.restore_from_path": "the system refuses it",
    "model.teacher.path": "the system refuses it",
    "model.teacher.cache_dir": "the system refuses it",
    "exp_manager.explicit_log_dir": "the system refuses it",
    "model.data.path": "cannot be looked at",
    "model.data.chat_template": "cannot be read",
}


@pytest.mark.parametrize("key", REFUSED)
def test_a_path_that_the_system_refuses_is_named(tiny: TinyRun, tmp_path: Path, key: str) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    paths = {"name too long": tmp_path / "new" / ("a" * 256), "file name too long": "/" + "abc/" * 1200}
    if key not in ("model.data.path", "model.data.chat_template"):
        paths["symbolic links"] = tmp_path / "loop" / "run"
    for why, path in paths.items():
        if key in ("model.data.path", "model.data.chat_template") and why == "name too long":
            path = tmp_path / ("a" * 256)
        with pytest.raises((ConfigError, PromptError), match=rf"(?is)^({key} = ')?/.*{REFUSED[key]} .*{why}"):
            plan(tiny, tmp_path / "run", **{key: path})


def test_a_run_that_exists_is_not_overwritten(tiny: TinyRun, tmp_path: Path) -> None:
    (tmp_path / "run" / "checkpoints" / "step_00000001").mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"has 1 checkpoint\(s\)"):
        plan(tiny, tmp_path / "run", **{"exp_manager.resume_if_exists": False})
