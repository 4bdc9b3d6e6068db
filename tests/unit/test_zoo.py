"""The zoo has the shape of what is published, and the product takes every folder of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nemo_tropd.convert.families import read_shape
from nemo_tropd.convert.hf_files import HfCheckpoint
from nemo_tropd.convert.weight_files import weight_files
from nemo_tropd.rollout.vllm.settings import EngineSettings
from tests.zoo import PAIRS, make
from tests.zoo.makers import CHECKPOINTS

RECIPES = Path(__file__).resolve().parents[2] / "conf"


def test_every_recipe_has_its_pair() -> None:
    recipes = {path.stem for path in RECIPES.glob("*.yaml")} - {"base", "gpu"}
    assert recipes == PAIRS.keys()
    for recipe, pair in PAIRS.items():
        text = (RECIPES / f"{recipe}.yaml").read_text()
        assert all(f"/{name}\n" in text for name in pair), recipe


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_folder_of_the_zoo_is_read(name: str, tmp_path: Path) -> None:
    from transformers import AutoConfig

    folder = make(name, tmp_path, 3)
    shape = read_shape(folder)
    HfCheckpoint(folder, shape)
    config = AutoConfig.from_pretrained(folder)
    assert (shape.family, shape.rope_theta) == (config.model_type, config.rope_parameters["rope_theta"])
    assert shape.tied == config.tie_word_embeddings and shape.max_positions == config.max_position_embeddings
    tokens = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    known = len(tokens["model"]["vocab"].keys() | {t["content"] for t in tokens["added_tokens"]})
    assert shape.vocab_size - known >= CHECKPOINTS[name].rows_beyond
    settings = EngineSettings(folder, "float32", 64)
    assert settings.end_ids and settings.shapes[0].keys() >= {n for n, _ in shape.hf_tensors()}
    assert len(weight_files(folder)) == CHECKPOINTS[name].shards
