"""Every recipe of conf/ on a pair of small checkpoints in the shape of those it names: plan, steps, resume, export."""

from __future__ import annotations

import json
import math
import random
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from nemo_tropd.training.plan import make_plan, print_plan
from nemo_tropd.training.run import train
from tests.doubles import replay_engines
from tests.e2e.compose import CONF, compose_config
from tests.e2e.tiny_run import train_lines
from tests.zoo import PAIRS, make

pytestmark = pytest.mark.random

RECIPES = sorted(p.stem for p in CONF.glob("*.yaml") if p.stem not in ("base", "gpu"))
# What a laptop changes: one rank in fp32, short texts, a small batch.
LAPTOP: dict[str, Any] = {
    "trainer.devices": 1,
    "trainer.num_nodes": 1,
    "trainer.gpu_memory_gib": "null",
    "trainer.precision": "32",
    "trainer.tropd.val_check_interval": 0,
    "model.tensor_model_parallel_size": 1,
    "model.sequence_parallel": False,
    "model.optim.distributed": False,
    "model.optim.lr": "1e-4",
    "model.teacher.precision": "null",
    "model.teacher.fp8": "null",
    "model.teacher.tensor_model_parallel_size": "null",
    "model.rollout.placement": "process",
    "model.rollout.dtype": "float32",
    "model.rollout.samples_per_prompt": 2,
    "model.rollout.max_new_tokens": 24,
    "model.rollout.kv_cache_gib": 0.5,
    "model.global_batch_size": 4,
    "model.encoder_seq_length": 384,
    "model.tokens_per_micro_batch": 512,
    "model.tropd.top_k": 16,
    "model.tropd.guidance.max_prefix_tokens": 8,
    "model.data.max_prompt_tokens": 320,
    "model.data.held_out": 2,
}


def write_prompts(path: Path) -> Path:
    """Prompts as people have them: a question, accents, code, a conversation of several turns."""
    records: list[dict[str, Any]] = []
    for number in range(8):
        a, b = random.randrange(100), random.randrange(100)
        records.append({"prompt": f"What is {a} + {b}?\nThink step by step.", "answer": str(a + b), "subject": "code"})
        records.append({"prompt": f"Écris «{number}» en français, s'il te plaît 🙂", "answer": None})
        turns = [("system", "You are careful."), ("user", f"x = {a}"), ("assistant", "Noted."), ("user", f"x * {b}?")]
        records.append({"messages": [{"role": role, "content": text} for role, text in turns], "answer": a * b})
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Any:
    made: dict[str, Path] = {}

    def of(recipe: str) -> dict[str, Path]:
        for name in PAIRS[recipe]:
            if name not in made:
                made[name] = make(name, tmp_path_factory.mktemp("zoo") / name, seed=random.getrandbits(30))
        student, teacher, *further = (made[name] for name in PAIRS[recipe])
        keys = {"pretrained_checkpoint.restore_from_path": student, "model.teacher.path": teacher}
        if further:  # a teacher per domain
            keys |= {"model.teachers.code.path": further[0], "model.data.teacher_key": "subject"}
        return keys

    return of


def test_every_recipe_has_a_pair() -> None:
    assert set(RECIPES) == set(PAIRS)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_trains_resumes_and_exports(recipe: str, pair: Any, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    paths = pair(recipe)
    keys = {
        **LAPTOP,
        **paths,
        "exp_manager.explicit_log_dir": tmp_path / "run",
        "model.teacher.cache_dir": tmp_path / "responses",
        "model.data.path": write_prompts(tmp_path / "prompts.jsonl"),
        "model.data.sources": "[]",
    }

    def settings(**changes: Any) -> Any:
        return compose_config([f"{key}={value}" for key, value in {**keys, **changes}.items()], recipe)

    plan = make_plan(settings())
    for steps in (1, 2):
        outcome = train(settings(**{"trainer.tropd.max_steps": steps}), replay_engines(plan.vocab_size))
        assert outcome is not None and outcome.step == steps
    lines = train_lines(tmp_path / "run")
    assert [line["step"] for line in lines] == [1, 2]
    assert all(math.isfinite(line["loss"]) and line["applied"] == 1.0 for line in lines)

    exported, student = tmp_path / "run" / "hf", paths["pretrained_checkpoint.restore_from_path"]
    model, info = AutoModelForCausalLM.from_pretrained(exported, output_loading_info=True, dtype="auto")
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert model.dtype == torch.float32  # the run's precision, not that of the folder it came from
    before = {name: value for file in student.glob("*.safetensors") for name, value in tensors(file)}
    after = {name: value for file in exported.glob("*.safetensors") for name, value in tensors(file)}
    assert before.keys() - {"lm_head.weight"} == after.keys() - {"lm_head.weight"}
    assert any(not torch.equal(after[name], before[name].float()) for name in after if "layernorm" not in name)
    text = "What is 1 + 2?\n  naïve 🙂"
    ours, theirs = (AutoTokenizer.from_pretrained(folder)(text).input_ids for folder in (exported, student))
    assert ours == theirs


def tensors(file: Path) -> list[tuple[str, torch.Tensor]]:
    with safe_open(file, framework="pt") as content:
        return [(name, content.get_tensor(name)) for name in content.keys()]  # noqa: SIM118


@pytest.mark.parametrize("recipe", [r for r in RECIPES if r != "smollm2_cpu"])
def test_the_plan_of_a_recipe_on_its_own_gpus_shows_what_the_teacher_generates(
    recipe: str, pair: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a machine without them: check_only=true, all else as in the file."""
    monkeypatch.setenv("COLUMNS", "500")
    keys = {**pair(recipe), "model.data.path": write_prompts(tmp_path / "prompts.jsonl"), "check_only": True}
    keys["model.data.sources"] = "[]"
    keys |= {"exp_manager.explicit_log_dir": tmp_path / "run", "model.data.held_out": 2}
    cfg = compose_config([f"{key}={value}" for key, value in keys.items()], recipe)
    print_plan(cfg, make_plan(cfg))
    shown = capsys.readouterr().out
    assert "the teacher generates" in shown and "on rank 0's node" in shown and "if none is cached" in shown
    assert "prefixes of at most" in shown and " min if" in shown
    assert sum(map(int, re.findall(r"(\d+) answers of at most", shown))) == 2  # of all teachers
    assert not (tmp_path / "run").exists()
