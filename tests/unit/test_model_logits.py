"""Logits of each family with each rotary scaling and with its biases are transformers', at positions beyond the
original context, padded and end to end; the weights come back as they were."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_tropd.convert.families import read_shape
from nemo_tropd.convert.hf_export import hf_stream
from nemo_tropd.convert.hf_files import HfCheckpoint
from nemo_tropd.convert.hf_import import load_hf
from nemo_tropd.gpt.build import build_gpt, head_weight
from nemo_tropd.parallel.topology import Topology
from tests.tiny_models import make_tiny

TOLERANCE = 1e-4
POSITIONS, ORIGINAL = 96, 24
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": ORIGINAL}
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": ORIGINAL,
}  # fmt: skip
LAST = {"max_position_embeddings": POSITIONS}  # within it dynamic scaling is none
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama llama3": ("llama", {"rope_parameters": LLAMA3}),
    "llama linear": ("llama", {"rope_parameters": LINEAR}),
    "llama dynamic": ("llama", {"rope_parameters": DYNAMIC, **LAST}),
    "llama yarn of DeepSeek": ("llama", {"rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 0.4}}),
    "llama attention bias": ("llama", {"attention_bias": True}),
    "llama feed-forward bias": ("llama", {"mlp_bias": True}),
    "llama both biases": ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False}),
    "mistral": ("mistral", {"sliding_window": None}),
    "mistral window": ("mistral", {"sliding_window": POSITIONS, "tie_word_embeddings": False}),
    "mistral yarn": ("mistral", {"sliding_window": None, "rope_parameters": {**YARN, "factor": None}, **LAST}),
    "qwen2 yarn of the model card": (
        "qwen2",
        {"rope_parameters": None, "rope_theta": 1e4, "use_sliding_window": False, "sliding_window": 32}
        | {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": ORIGINAL}},
    ),
    "qwen2 linear": ("qwen2", {"rope_parameters": LINEAR, "max_window_layers": 1}),
    "qwen3 switched off": ("qwen3", {"sliding_window": 8, "layer_types": ["full_attention"] * 2}),
    "qwen3 yarn": ("qwen3", {"rope_parameters": {**YARN, "attention_factor": 1.7, "beta_fast": 20, "truncate": False}}),
}
ROPES: dict[str, dict[str, Any]] = {
    "default": {},
    "llama3": {"rope_parameters": LLAMA3},
    "linear": {"rope_parameters": LINEAR},
    "dynamic": {"rope_parameters": DYNAMIC, **LAST},
    "yarn": {"rope_parameters": YARN},
}
for family in ("mistral", "qwen2", "qwen3"):  # what is left of each with each; the llama's are above
    no_window = {"sliding_window": None} if family == "mistral" else {}
    for kind, rope in ROPES.items():
        CASES.setdefault(f"{family} {kind}", (family, {**no_window, **rope}))


@torch.no_grad()
@pytest.mark.parametrize("case", CASES)
def test_logits_are_transformers_and_weights_come_back(case: str, tmp_path: Path, topology: Topology) -> None:
    from megatron.core.packed_seq_params import PackedSeqParams
    from transformers import AutoModelForCausalLM

    family, changes = CASES[case]
    folder = make_tiny(tmp_path, family, seed=len(case), vocab=131, changes=changes)
    shape = read_shape(folder)
    model = build_gpt(shape, topology, trainable=False)
    for parameter in model.parameters():
        parameter.fill_(float("nan"))
    load_hf(model, folder, shape, topology)
    source = HfCheckpoint(folder, shape)
    back = dict(hf_stream(model, shape, topology))
    assert back.keys() == dict(shape.hf_tensors()).keys()
    assert all(torch.equal(tensor, source.read(name)) for name, tensor in back.items())
    ids = torch.randint(0, 131, (2, POSITIONS), generator=torch.Generator().manual_seed(1))
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    wanted = reference(ids).logits
    assert wanted.std() > 0.5  # logits worth comparing

    def logits(hidden: torch.Tensor) -> torch.Tensor:
        return (hidden @ head_weight(model).T)[..., : shape.vocab_size]

    positions = torch.arange(POSITIONS).expand(2, -1)
    assert (logits(model(ids, positions, None)) - wanted).abs().max() < TOLERANCE
    bounds = torch.tensor([0, POSITIONS, 2 * POSITIONS], dtype=torch.int32)
    packed = PackedSeqParams("thd", bounds, bounds, max_seqlen_q=POSITIONS, max_seqlen_kv=POSITIONS)
    hidden = model(ids.view(1, -1), positions.reshape(1, -1), None, packed_seq_params=packed)
    assert (logits(hidden).view_as(wanted) - wanted).abs().max() < TOLERANCE
