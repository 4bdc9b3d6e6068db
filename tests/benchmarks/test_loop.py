"""What the benchmark of the loop counts and runs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from examples.benchmarks.loop_case import SHAPES, FixedRollouts, LoopCase, operations, write_config
from nemo_tropd.convert.families import read_shape
from nemo_tropd.rollout.engine import RolloutRequest

CASE = LoopCase("tiny", "tiny", 3, 5, 11, 64)


@pytest.mark.parametrize("name", sorted(SHAPES))
def test_a_written_config_is_read_as_the_shape_it_came_from(tmp_path: Path, name: str) -> None:
    assert read_shape(write_config(SHAPES[name], tmp_path, "float32")) == SHAPES[name]


@pytest.mark.parametrize("changes", [{}, {"heads": 8, "kv_heads": 8, "head_dim": 16}, {"layers": 3, "ffn": 200}])
def test_operations_are_those_torch_counts(tmp_path: Path, changes: dict[str, int]) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    shape = replace(SHAPES["tiny"], **changes)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.from_pretrained(write_config(shape, tmp_path, "float32")), attn_implementation="eager"
    )
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.tensor(CASE.prompts())[:, :1].expand(CASE.sequences, CASE.length))
    layers, head = operations(shape, CASE)
    # torch counts the whole square of attention, and the head on every token.
    unseen_half = 2.0 * shape.layers * CASE.sequences * CASE.length**2 * shape.size("q")
    everywhere = head * CASE.length / CASE.new_tokens
    assert counter.get_total_flops() == pytest.approx(layers + unseen_half + everywhere, rel=1e-9)


def test_fixed_rollouts_are_the_completions_of_the_asked_prompts() -> None:
    engine = FixedRollouts(CASE.completions())
    asked = [RolloutRequest(CASE.prompts()[i], [], 0, i, i, CASE.new_tokens) for i in (2, 0)]
    assert engine.update_weights(iter([("w", torch.ones(3, dtype=torch.bfloat16))]), 7).bytes == 6
    rollouts = engine.generate(asked)
    assert [r.response_ids for r in rollouts] == [CASE.completions()[i] for i in (2, 0)]
    assert {r.weight_version for r in rollouts} == {7} and not engine.sleep()
