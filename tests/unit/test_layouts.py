"""Where each number of a Hugging Face checkpoint lies in Megatron, head by head and rank by rank; Llama 3's rotary."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from nemo_tropd.convert.families import FAMILIES, ModelShape, RopeScaling, Row, shape_of_config
from nemo_tropd.convert.layouts import merge, regions, split, unshard
from nemo_tropd.gpt.rope import scaled_frequencies

pytestmark = pytest.mark.random

HEADS, GROUPS, HEAD, HIDDEN, FFN, VOCABULARY = 8, 4, 6, 12, 20, 131
SHAPE = shape_of_config(
    {
        "architectures": ["Qwen2ForCausalLM"], "hidden_size": HIDDEN, "intermediate_size": FFN, "head_dim": HEAD,
        "num_attention_heads": HEADS, "num_key_value_heads": GROUPS, "num_hidden_layers": 2, "vocab_size": VOCABULARY,
        "tie_word_embeddings": False,
    }
)  # fmt: skip


def of_layout(layout: str) -> Row:
    """The first weight with this layout, of layer 1."""
    (row, *_) = (
        r for r in SHAPE.rows() if r.layout == layout and r.layer in (None, 1) and r.megatron.endswith("weight")
    )
    return row


def tensors(row: Row, shape: ModelShape = SHAPE) -> list[Tensor]:
    return [torch.randn([shape.size(d) for d in dimensions]) for _, dimensions in row.hf]


def held(row: Row, whole: Tensor, rank: int, size: int) -> Tensor:
    """What ``regions`` gives a rank of the whole parameter."""
    blocks = [
        whole[tuple(slice(start, start + n) for start, n in zip(r.offsets, r.sizes, strict=True))]
        for r in regions(row, rank, size, SHAPE)
    ]
    return torch.cat(blocks)


def test_queries_keys_and_values_are_interleaved_by_group() -> None:
    row = of_layout("query_key_value")
    q, k, v = tensors(row)
    each = HEADS // GROUPS
    wanted = []
    for group in range(GROUPS):
        wanted += [q[h * HEAD : (h + 1) * HEAD] for h in range(group * each, (group + 1) * each)]
        wanted += [k[group * HEAD : (group + 1) * HEAD], v[group * HEAD : (group + 1) * HEAD]]
    whole = merge(row, [q, k, v], SHAPE)
    assert torch.equal(whole, torch.cat(wanted))
    rows_of_two_groups = 2 * (each + 2) * HEAD
    assert torch.equal(held(row, whole, 1, 2), whole[rows_of_two_groups:])


@pytest.mark.parametrize("size", [1, 2, 4])
def test_each_rank_holds_its_rows_of_gate_above_its_rows_of_up(size: int) -> None:
    row, part = of_layout("gate_up"), FFN // size
    gate, up = tensors(row)
    assert [name.rpartition(".")[0].rpartition(".")[2] for name, _ in row.hf] == ["gate_proj", "up_proj"]
    for rank in range(size):
        mine = slice(rank * part, (rank + 1) * part)
        assert torch.equal(held(row, merge(row, [gate, up], SHAPE), rank, size), torch.cat([gate[mine], up[mine]]))


@pytest.mark.parametrize("size", [1, 2, 4])
def test_outputs_are_split_by_column_and_the_vocabulary_by_row(size: int) -> None:
    row = of_layout("columns")
    (whole,) = tensors(row)
    part = whole.size(1) // size
    for rank in range(size):
        assert torch.equal(held(row, whole, rank, size), whole[:, rank * part : (rank + 1) * part])
    row, part = of_layout("vocabulary"), SHAPE.padded_vocab(size) // size
    (whole,) = tensors(row)
    for rank in range(size):
        assert torch.equal(held(row, whole, rank, size), whole[rank * part : (rank + 1) * part])  # may be nothing


@pytest.mark.parametrize("size", [1, 2, 4])
def test_the_ranks_parts_make_the_tensors_again(size: int) -> None:
    for row in SHAPE.rows():
        given = tensors(row)
        whole = merge(row, given, SHAPE)
        parts = [held(row, whole, rank, size) for rank in range(size)]
        again = dict(split(row, unshard(row, parts, SHAPE), SHAPE))
        assert list(again) == [name for name, _ in row.hf]
        assert all(torch.equal(tensor, wanted) for tensor, wanted in zip(again.values(), given, strict=True)), row


def test_a_tied_head_has_no_tensor_of_its_own() -> None:
    names = {tied: {n for n, _ in replace(SHAPE, tied=tied).hf_tensors()} for tied in (True, False)}
    assert names[False] - names[True] == {"lm_head.weight"} and names[True] < names[False]
    assert set(FAMILIES) == {"llama", "mistral", "qwen2", "qwen3"}


def test_rotary_frequencies_are_scaled_as_transformers_scales_them() -> None:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    factor, low, high, original = random.uniform(2, 32), random.uniform(0.5, 2), random.uniform(3, 8), 8192
    settings = {
        "rope_type": "llama3", "rope_theta": 500000.0, "factor": factor, "low_freq_factor": low,
        "high_freq_factor": high, "original_max_position_embeddings": original,
    }  # fmt: skip
    config = LlamaConfig(hidden_size=256, num_attention_heads=2, rope_parameters=settings)
    wanted, attention = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = 500000.0 ** (-torch.arange(0, 128, 2).float() / 128)
    got = scaled_frequencies(plain, RopeScaling(factor, low, high, original))
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=0)
    assert attention == 1.0
    assert got[0] == plain[0]  # kept
    torch.testing.assert_close(got[-1], plain[-1] / factor, rtol=1e-5, atol=0)  # stretched
