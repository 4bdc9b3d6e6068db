"""End tokens, templates and vocabularies from the plan on: what is said, and that both engines, the teacher's cache and
the comparison on resume get the same."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from nemo_tropd.config import ConfigError, TropdConfig
from nemo_tropd.data import PromptError
from nemo_tropd.objectives import build
from nemo_tropd.report.records import read_run
from nemo_tropd.rollout.engine import Sampling
from nemo_tropd.rollout.placement import Engines
from nemo_tropd.training import run
from nemo_tropd.training.plan import Plan, make_plan, print_plan
from nemo_tropd.training.resume import check_resumable, first_state
from nemo_tropd.training.teacher_responses import TeacherResponses
from nemo_tropd.training.trainer import TropdTrainer
from tests.e2e.compose import compose_config
from tests.e2e.tiny_run import TinyRun


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TinyRun:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    return TinyRun.make(tmp_path)


def settings(tiny: TinyRun, **keys: object) -> TropdConfig:
    return compose_config(tiny.overrides(tiny.root / "run", **keys))


def edit(file: Path, **changes: Any) -> None:
    content = json.loads(file.read_text())
    file.write_text(json.dumps({k: v for k, v in {**content, **changes}.items() if v is not None}))


def end_line(plan: Plan) -> str:
    return dict(plan.notes)["end tokens"]


def test_the_plan_prints_end_tokens_and_names_differences(tiny: TinyRun, capsys: pytest.CaptureFixture[str]) -> None:
    cfg = settings(tiny)
    plan = make_plan(cfg)
    assert plan.end_ids == (3,) and plan.notes == (("end tokens", "<|im_end|> 3"),) and plan.pad_id == 0
    print_plan(cfg, plan)
    assert "<|im_end|> 3" in capsys.readouterr().out
    for name in ("config.json", "generation_config.json"):
        edit(tiny.student / name, eos_token_id=[2])
    edit(tiny.student / "tokenizer_config.json", eos_token="<unk>", pad_token=None)
    plan = make_plan(cfg)
    assert plan.end_ids == (1, 2, 3) == (*sorted({plan.pad_id, 2, 3}),)
    assert "the student's files name <unk> 1, <|im_start|> 2, the teacher's <|im_end|> 3" in end_line(plan)
    plan = make_plan(settings(tiny, **{"model.rollout.end_tokens": '["<unk>",7]'}))
    assert plan.end_ids == (1, 7) and "by model.rollout.end_tokens; not <|im_start|> 2" in end_line(plan)
    assert "ends the assistant's turn with '<|im_end|>" in dict(plan.notes)["template"]


def test_no_end_token_is_refused(tiny: TinyRun) -> None:
    for folder in (tiny.student, tiny.teacher):
        for name in ("config.json", "generation_config.json"):
            edit(folder / name, eos_token_id=None)
        edit(folder / "tokenizer_config.json", eos_token=None)
    with pytest.raises(ConfigError, match=r"^model\.rollout\.end_tokens = \[\]"):
        make_plan(settings(tiny))
    assert make_plan(settings(tiny, **{"model.rollout.end_tokens": "[3]"})).end_ids == (3,)


def test_engines_cache_and_resume_get_the_plans_end_tokens(tiny: TinyRun, monkeypatch: pytest.MonkeyPatch) -> None:
    edit(tiny.student / "generation_config.json", eos_token_id=[2, 3])
    given: list[TropdConfig] = []
    monkeypatch.setattr(run, "_with_plan", lambda cfg, *_: given.append(cfg))
    run.train(settings(tiny))
    (cfg,) = given
    for engine in (Engines(131).student(cfg), Engines(131).teacher(cfg)):
        assert engine.settings.end_ids == [2, 3]
    was, now = (first_state(c, build("tropd"), {}, "r") for c in (cfg, settings(tiny)))
    with pytest.raises(ConfigError, match=r"^model\.rollout\.end_tokens = \[\]: the run's checkpoint was .* \[2, 3\]"):
        check_resumable(was, now)
    folders = {cache(tiny.root, end_ids=ids, vocab_size=size) for ids in ((2,), (2, 3), [3, 2]) for size in (131, 130)}
    assert len(folders) == 4


def cache(folder: Path, **changes: Any) -> Path:
    keys = {"teacher": "t", "sampling": Sampling(1.0, 1.0, 0), "max_new_tokens": 4, **changes}
    return TeacherResponses(folder / "cache", **keys).folder


def test_keys_of_templates_reach_the_prompts(tiny: TinyRun) -> None:
    def first(**keys: object) -> str:
        plan = make_plan(settings(tiny, **keys))
        return str(plan.tokenizer.decode(plan.prompts.train[0].token_ids))

    text = "what is 1 plus 3?"
    assert first() == f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"
    assert first(**{"model.data.chat_template": "false"}) == text
    assert first(**{"model.data.system_prompt": "S"}).startswith("<|im_start|>system\nS<|im_end|>")
    (tiny.root / "t.jinja").write_text("{{ mark }}{{ messages[-1].content }}")
    keys = {"model.data.chat_template": tiny.root / "t.jinja", "+model.data.chat_template_kwargs.mark": "Q: "}
    assert first(**keys) == f"Q: {text}"
    (tiny.student / "chat_template.jinja").unlink()
    with pytest.raises(PromptError, match=r"no chat template: .*model\.data\.chat_template to a file, or to false"):
        make_plan(settings(tiny))
    assert first(**{"model.data.chat_template": "false"}) == text


def test_the_plan_names_another_template_of_the_teacher(tiny: TinyRun) -> None:
    template = tiny.teacher / "chat_template.jinja"
    template.write_text("You are good.\n" + template.read_text())
    line = dict(make_plan(settings(tiny)).notes)["template"]
    assert "the teacher's own template writes 'You are good.\\n<|im_start|>user" in line and "line 1" in line


def test_a_pair_with_more_tokens_in_one_of_them(tiny: TinyRun) -> None:
    file = tiny.student / "tokenizer.json"
    content = json.loads(file.read_text())
    extra = {"content": "<|PAD_TOKEN|>", "id": 131, "special": True, "normalized": False}
    extra |= {"single_word": False, "lstrip": False, "rstrip": False}
    file.write_text(json.dumps({**content, "added_tokens": [*content["added_tokens"], extra]}))
    edit(tiny.student / "tokenizer_config.json", pad_token="<|PAD_TOKEN|>")
    plan = make_plan(settings(tiny))
    assert plan.vocab_size == 131 and plan.pad_id == 3
    assert dict(plan.notes)["vocabulary"].startswith("<|PAD_TOKEN|> past the 131 ids")
    tiny.prompts.write_text(json.dumps({"prompt": "<|PAD_TOKEN|>"}) + "\n" + tiny.prompts.read_text())
    with pytest.raises(
        PromptError, match=r"prompts\.jsonl, line 1: the prompt has the token '<\|PAD_TOKEN\|>' \(131\)"
    ):
        make_plan(settings(tiny))


def test_a_broken_tokenizer_is_refused_by_its_key(tiny: TinyRun) -> None:
    shutil.copy(tiny.prompts, tiny.teacher / "tokenizer.json")
    with pytest.raises(ConfigError, match=r"^model\.teacher\.path = .*its tokenizer cannot be read"):
        make_plan(settings(tiny))


def test_a_run_whose_rollouts_never_end_says_so_once(tmp_path: Path) -> None:
    def said(*fractions: float) -> list[str]:
        lines: list[str] = []
        trainer = object.__new__(TropdTrainer)
        trainer.cfg, trainer._unfinished_in_a_row = TropdConfig(), 0
        trainer.progress = SimpleNamespace(say=lines.append)
        for value in fractions:
            trainer._count_unfinished(value)
        records = [{"step": i + 1, "kind": "train", "finished_fraction": v} for i, v in enumerate(fractions)]
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
        noted = [n for n in read_run(tmp_path).notes if "end token" in n]
        assert len(noted) == len(lines)
        return lines + noted

    assert said(*[0.0] * 9, 0.05, *[0.04] * 9) == []
    line, note = said(0.5, *[0.04] * 30)
    assert (
        "in 10 steps in a row fewer than 5% of the rollouts met an end token" in line
        and "max_new_tokens = 8096" in line
    )
    assert note.startswith("in 30 steps in a row fewer than 5%")
