"""What a start compares by content: read once, refused before anything is generated, and named when it has changed."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from nemo_tropd.config import ConfigError
from nemo_tropd.convert.fingerprint import checkpoint_fingerprint
from nemo_tropd.objectives import build
from nemo_tropd.training.resume import RunState, check_resumable, first_state
from nemo_tropd.training.start import _contents
from tests.e2e.compose import compose_config
from tests.e2e.tiny_run import TinyRun


@pytest.fixture
def tiny(tmp_path: Path) -> TinyRun:
    return TinyRun.make(tmp_path / "tiny")


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The files that are read for their digest."""
    digest, names = hashlib.file_digest, list[str]()

    def counted(file: Any, name: str) -> Any:
        names.append(file.name)
        return digest(file, name)

    monkeypatch.setattr(hashlib, "file_digest", counted)
    return names


def contents(tiny: TinyRun, prompts: str = "d", **keys: object) -> dict[str, object]:
    return _contents(compose_config(tiny.overrides(tiny.root / "run", **keys)), prompts)


def test_the_weights_are_read_at_the_first_start_alone(tiny: TinyRun, read: list[str]) -> None:
    assert contents(tiny) == contents(tiny) and len(read) == 2
    checkpoint_fingerprint(tiny.teacher, tiny.root / "responses" / "fingerprints.json")  # as the responses' cache does
    assert len(read) == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused_before_anything_is_generated(
    tiny: TinyRun, value: float, dtype: torch.dtype
) -> None:
    file, name = tiny.teacher / "model.safetensors", "model.layers.1.mlp.up_proj.weight"
    weights = {n: w.to(dtype) for n, w in load_file(file).items()}
    weights[name][3, 5] = value
    save_file(weights, file, metadata={"format": "pt"})
    for _ in range(2):  # what was refused is not remembered as good
        with pytest.raises(ConfigError, match=rf"^model\.teacher\.path = .*safetensors: {name} has NaN or infinite"):
            contents(tiny)


CHANGED: dict[str, object] = {
    "model.data.system_prompt": "Be brief.",
    "model.data.template_date": "2025-01-02",
    "model.data.held_out": 5,
    "+model.data.chat_template_kwargs.a": 1,
}


@pytest.mark.parametrize("key", CHANGED)
def test_the_key_that_changed_the_prompts_is_named(tiny: TinyRun, key: str) -> None:
    def state(prompts: str, **keys: object) -> RunState:
        cfg = compose_config(tiny.overrides(tiny.root / "run", **keys))
        made = first_state(cfg, build("tropd"), _contents(cfg, prompts), "r")
        return RunState.read(json.loads(json.dumps(vars(made))), "here")  # as a checkpoint keeps it

    name = key.lstrip("+").removesuffix(".a")
    was, now = state("1" * 20), state("2" * 20, **{key: CHANGED[key]})
    with pytest.raises(ConfigError, match=rf"^model\.data\.path = .*\({name} was .*, and is .*{CHANGED[key]}") as error:
        check_resumable(was, now)
    assert "accept_changes='[model.data.path]'" in str(error.value)
    with pytest.raises(ConfigError, match=r"\(what the files hold has changed, or the template or tokenizer\)"):
        check_resumable(was, state("2" * 20))
    del was.settings["model.data.path"]["keys"]  # of an older version
    with pytest.raises(ConfigError, match=rf"\(with these files, or with other values of .*{name}.*\)"):
        check_resumable(was, now)
    assert check_resumable(state("1" * 20), state("1" * 20, **{key: CHANGED[key]})) == []
