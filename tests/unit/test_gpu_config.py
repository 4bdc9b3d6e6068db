"""Megatron takes the configs that a GPU's models get: of the CPU's release here, of the GPU's in tests/contract."""

from __future__ import annotations

from itertools import product
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from megatron.core.models.common.embeddings import rope_utils

from examples.benchmarks.shapes import SHAPES
from nemo_tropd.config import RECOMPUTE
from nemo_tropd.gpt import build
from nemo_tropd.gpt.ddp import recompute_fields
from nemo_tropd.parallel.topology import Topology
from nemo_tropd.teacher.fp8 import MULTIPLES, Fp8Settings

LAYOUTS = ((1, 1, False), (2, 1, True), (2, 2, True), (1, 2, False))


def test_megatron_takes_the_configs_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """It checks fields against each other when a config is made, and what fused functions there are."""
    monkeypatch.setattr(build, "uses_transformer_engine", lambda: True)
    for name in ("fused_apply_rotary_pos_emb", "fused_apply_rotary_pos_emb_thd"):
        monkeypatch.setattr(rope_utils, name, lambda *parts: None)
    shape = SHAPES["Qwen2.5-1.5B-Instruct"]
    fp8 = [Fp8Settings(recipe, kept, ends) for recipe, kept, ends in product(MULTIPLES, (True, False), (0, 1))]
    models: list[dict[str, Any]] = [*map(recompute_fields, RECOMPUTE), *(f.transformer_fields() for f in fp8)]
    for (tensor, pipeline, split), fields in product(LAYOUTS, models):
        place = SimpleNamespace(
            device=torch.device("cuda"), tensor_size=tensor, pipeline_size=pipeline, sequence_parallel=split
        )
        config = build.transformer_config(shape, cast(Topology, place), torch.bfloat16, **fields)
        assert all(getattr(config, name) == value for name, value in fields.items())
        assert config.apply_rope_fusion and config.bias_activation_fusion and config.calculate_per_token_loss
