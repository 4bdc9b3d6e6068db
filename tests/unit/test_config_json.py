"""Every key of a config.json is modelled, harmless, fixed or refused; rotary settings mean what transformers means."""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_tropd.convert.config_json import FIXED, HARMLESS, MODELLED
from nemo_tropd.convert.families import FAMILIES, ConversionError, ModelShape, shape_of_config
from nemo_tropd.convert.rope import KNOWN, vllm_overrides
from nemo_tropd.gpt.rope import rotary_frequencies, softmax_scale

pytestmark = pytest.mark.random

FAMILY_CONFIGS = {"llama": "LlamaConfig", "mistral": "MistralConfig", "qwen2": "Qwen2Config", "qwen3": "Qwen3Config"}
SIZES: dict[str, Any] = {
    "hidden_size": 256, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 2, "vocab_size": 90,
    "num_key_value_heads": 2, "max_position_embeddings": 4096,
}  # fmt: skip


def config(family: str = "llama", **changes: Any) -> dict[str, Any]:
    return {"architectures": [FAMILIES[family].architecture], "model_type": family, **SIZES, **changes}


def shape(family: str = "llama", **changes: Any) -> ModelShape:
    return shape_of_config(config(family, **changes), "config.json")


def test_every_key_of_transformers_own_classes_is_classified() -> None:
    """A key that a new transformers adds fails here, until someone has read what it does."""
    import transformers
    from transformers.modeling_rope_utils import RopeParameters

    assert FAMILY_CONFIGS.keys() == FAMILIES.keys()
    known = MODELLED | FIXED.keys() | HARMLESS | {"_name_or_path"}  # and all that begin with a low line
    for family, name in FAMILY_CONFIGS.items():
        cls = getattr(transformers, name)
        keys = {field.name for field in dataclasses.fields(cls)} | cls().to_dict().keys()
        assert not keys - known, (family, keys - known)
    # The two of longrope, a kind that is refused.
    assert RopeParameters.__annotations__.keys() - KNOWN == {"short_factor", "long_factor"}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_config_that_transformers_writes_itself_is_read(family: str) -> None:
    import transformers

    made = getattr(transformers, FAMILY_CONFIGS[family])(**SIZES)
    read = shape_of_config({**made.to_dict(), "architectures": [FAMILIES[family].architecture]})
    assert read.rope_theta == made.rope_parameters["rope_theta"] and read.window == getattr(
        made, "sliding_window", None
    )
    defaults = getattr(transformers, FAMILY_CONFIGS[family])()
    bare = {k: v for k, v in SIZES.items() if k not in ("max_position_embeddings", "num_key_value_heads")}
    missing = shape_of_config({**bare, "num_attention_heads": 32, "model_type": family})
    assert missing.max_positions == defaults.max_position_embeddings
    assert missing.kv_heads == (defaults.num_key_value_heads or 32) and missing.norm_eps == defaults.rms_norm_eps
    assert missing.tied == defaults.tie_word_embeddings and missing.window == getattr(defaults, "sliding_window", None)


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("qwen2", {"dual_chunk_attention_config": {"chunk_size": 8192}}, "unknown dual_chunk_attention_config"),
    ("llama", {"attn_logit_softcapping": 50.0}, "unknown attn_logit_softcapping = 50.0"),
    ("llama", {"embedding_multiplier": 12, "residual_multiplier": 0.2}, "embedding_multiplier = 12, residual_mul"),
    ("mistral", {"llama_4_scaling": {"beta": 0.1}}, "unknown llama_4_scaling"),
    ("llama", {"auto_map": {"AutoModel": "modeling.py"}}, "unknown auto_map"),
    ("llama", {"original_max_position_embeddings": 2048}, "unknown original_max_position_embeddings"),
    ("llama", {"is_causal": False}, "unsupported is_causal = False"),
    ("llama", {"qkv_bias": False, "attention_bias": True}, "unsupported qkv_bias = False"),
    ("llama", {"attention_bias": "yes"}, "attention_bias must be true or false"),
    ("qwen3", {"attention_bias": True}, "unsupported attention_bias = True; supported: False"),
    ("mistral", {"mlp_bias": True}, "unsupported mlp_bias = True"),
    ("qwen2", {"quantization_config": {"quant_method": "gptq"}}, "quantised weights need the checkpoint they were"),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 4096}, "unsupported use_sliding_window"),
    ("llama", {"per_layer_config": {"0": {"intermediate_size": 32}}}, "unsupported per_layer_config"),
    ("llama", {"model_type": "qwen2"}, "model_type 'qwen2' is not that of architecture LlamaForCausalLM"),
    ("llama", {"partial_rotary_factor": 0.5}, "unsupported partial_rotary_factor"),
    ("qwen3", {"layer_types": ["full_attention"]}, "layer_types names 1 layers, num_hidden_layers is 2"),
    ("qwen3", {"layer_types": [{}, "full_attention"]}, "unsupported layer_types \\['{}'\\]"),
    ("llama", {"num_hidden_layers": 10**9}, "num_hidden_layers = 1000000000: give at most 1000"),
    ("llama", {"rms_norm_eps": 10**400}, "rms_norm_eps must be a positive number, not 1000"),
    ("llama", {"hidden_size": 10**30}, "hidden_size must be a positive integer of at most 2147483647, not 1000000000"),
    ("qwen2", {"vocab_size": 2**31}, "vocab_size must be a positive integer of at most 2147483647, not 2147483648"),
    ("llama", {"head_dim": 31}, "head_dim = 31: rotary embeddings turn pairs of dimensions: give an even number"),
    ("qwen2", {"hidden_size": 62}, "head_dim = 31: "),
    ("llama", {"rope_theta": 1}, "rope_theta = 1.0: give a number above 1"),
    ("llama", {"rope_scaling": {"type": "linear", "factor": 1e300}}, "factor must be a positive number of at most 1e"),
    ("llama", {"rope_scaling": {"type": "yarn", "factor": 1e300}}, "factor must be a positive number of at most 1e"),
    ("mistral", {"sliding_window": "all"}, "sliding_window must be a positive integer"),
    ("llama", {"rope_scaling": {"type": "su", "factor": 2}}, "unsupported rope type 'su'; supported: 'default'"),
    ("llama", {"rope_scaling": {"rope_type": "longrope", "long_factor": [1.0]}}, "unsupported rope type 'longrope'"),
    ("qwen2", {"rope_scaling": {"type": "default", "mrope_section": [16, 24, 24]}}, "rope keys \\['mrope_section'\\]"),
    ("llama", {"rope_scaling": {"rope_type": "yarn"}}, "rope type 'yarn' needs \\['factor'\\]"),
    ("llama", {"rope_scaling": {"rope_type": "linear", "factor": -2}}, "factor must be a positive number"),
    ("llama", {"rope_scaling": {"rope_type": "yarn", "factor": 4, "beta_fast": 1}}, "beta_fast = 1.0 must be greater"),
    ("llama", {"rope_scaling": {"rope_type": "yarn", "factor": 4, "truncate": 0}}, "truncate must be true or false"),
    (
        "llama",
        {"rope_scaling": {"rope_type": "llama3", "factor": 8, "low_freq_factor": 4, "high_freq_factor": 4}},
        "high_freq_factor = 4.0 must be greater than low_freq_factor = 4.0",
    ),
    (
        "qwen2",
        {"rope_scaling": {"type": "yarn", "factor": 4.0}, "rope_parameters": {"rope_theta": 1e6}},
        "rope_scaling = .*rope_parameters = .*differ.*keep one",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("family", "changes", "said"), REFUSED)
def test_what_may_change_the_function_is_refused_by_name(family: str, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConversionError, match=rf"config\.json: .*{said}"):
        shape(family, **changes)


def test_what_is_off_or_harmless_passes() -> None:
    plain = shape()
    for off in (None, False, 0, 0.0, "", [], {}):
        assert shape(a_key_of_next_year=off) == plain
    harmless = {
        "torch_dtype": "bfloat16",
        "unsloth_version": "2025.1",
        "_attn_implementation": "sdpa",
        "eos_token_id": 7,
    }
    assert shape(**harmless, sliding_window=None, quantization_config=None, is_causal=True) == plain
    for family in ("qwen2", "qwen3"):
        switched_off = {"use_sliding_window": False, "sliding_window": 32, "max_window_layers": 1}
        assert shape(family, **switched_off, layer_types=["full_attention"] * 2) == shape(family)


def test_the_longest_sequence_is_where_the_function_stays_the_same() -> None:
    def longest(family: str = "llama", **changes: Any) -> int:
        return shape(family, **changes).longest()[0]

    assert longest() == longest("mistral", sliding_window=None) == longest("mistral", sliding_window=4096) == 4096
    assert (
        longest("mistral", sliding_window=512) == 512
        and "sliding_window" in shape("mistral", sliding_window=512).longest()[1]
    )
    assert longest("llama", sliding_window=512) == 512  # transformers knows none there, vLLM applies it
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096}
    assert longest("qwen2", rope_scaling=yarn) == 16384
    assert longest("qwen2", rope_scaling={**yarn, "original_max_position_embeddings": 1024}) == 4096
    assert longest(rope_scaling={"type": "linear", "factor": 2}) == 8192
    dynamic = shape(rope_scaling={"type": "dynamic", "factor": 4.0})
    assert dynamic.longest()[0] == 4096 and "'dynamic' depends on" in dynamic.longest()[1]


def _settings(kind: str) -> dict[str, Any]:
    """Random settings of one kind; sometimes without those that have defaults."""
    draw = random.uniform
    made: dict[str, Any] = {"rope_type": kind, "rope_theta": draw(1e4, 1e6), "factor": draw(1.5, 40)}
    if kind == "llama3":
        made |= {"low_freq_factor": draw(0.5, 2), "high_freq_factor": draw(3, 8)}
        made["original_max_position_embeddings"] = random.choice([512, 2048])
    if kind == "yarn":
        made["original_max_position_embeddings"] = random.choice([256, 1024, 2048])
        extra = {
            "beta_fast": draw(20, 40), "beta_slow": draw(0.5, 2), "truncate": random.random() < 0.5,
            "attention_factor": draw(0.5, 2), "mscale": draw(0.5, 1.5), "mscale_all_dim": draw(0.5, 1.5),
        }  # fmt: skip
        made |= dict(random.sample(list(extra.items()), random.randint(0, len(extra))))
        if random.random() < 0.3:
            made["factor"] = None
    return made


@pytest.mark.parametrize("kind", ["llama3", "yarn", "linear", "dynamic"])
def test_frequencies_and_magnitude_are_transformers(kind: str) -> None:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    for _ in range(40):
        settings = _settings(kind)
        wanted, attention = ROPE_INIT_FUNCTIONS[kind](LlamaConfig(**SIZES, rope_parameters=dict(settings)))
        read = shape(rope_parameters=settings)
        plain = settings["rope_theta"] ** (-torch.arange(0, 128, 2).float() / 128)
        torch.testing.assert_close(rotary_frequencies(plain, read), wanted, rtol=2e-5, atol=0)
        scale = softmax_scale(read)
        assert (scale or 128**-0.5) == pytest.approx(attention**2 / 128**0.5, rel=1e-9), settings


def test_the_same_settings_in_old_new_nested_and_null_form() -> None:
    yarn = {"factor": 4.0, "original_max_position_embeddings": 1024}
    forms: list[dict[str, Any]] = [
        {"rope_theta": 5e5, "rope_scaling": {"type": "yarn", **yarn}},
        {"rope_theta": 5e5, "rope_scaling": {"rope_type": "yarn", **yarn}, "rope_parameters": None},
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 5e5, **yarn}, "rope_scaling": None},
        {"rope_parameters": {"full_attention": {"rope_type": "yarn", "rope_theta": 5e5, **yarn}}},
        {"rope_theta": 5e5, "rope_parameters": {"rope_type": "yarn", **yarn, "attention_factor": None, "mscale": None}},
    ]
    read = [shape("qwen3", **form) for form in forms]
    assert read[0].rope_theta == 5e5 and read[0].rope_scaling is not None and read[0].rope_scaling.kind == "yarn"
    assert all(other == read[0] for other in read)
    nothing: list[dict[str, Any]] = [
        {}, {"rope_scaling": None, "rope_parameters": None, "rope_theta": None}, {"rope_parameters": {}},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 10000}}, {"rope_scaling": {"type": None}},
        {"rope_parameters": {"full_attention": None}}, {"rope_parameters": {"rope_type": None, "rope_theta": None}},
    ]  # fmt: skip
    assert {(s.rope_theta, s.rope_scaling) for s in (shape(**form) for form in nothing)} == {(10000.0, None)}


def test_vllm_is_told_what_its_versions_read_differently() -> None:
    def told(**changes: Any) -> dict[str, Any]:
        return vllm_overrides(config(**changes), 4096, "config.json")

    assert told() == told(rope_scaling={"type": "dynamic", "factor": 2.0}) == {}
    assert told(rope_scaling=_settings("llama3")) == {}
    linear = told(rope_scaling={"type": "linear", "factor": 2})["rope_parameters"]
    assert isinstance(linear["factor"], float) and linear["rope_theta"] == 10000.0
    nested = told(rope_parameters={"full_attention": {"rope_theta": 5.0}})
    assert nested == {"rope_parameters": {"rope_type": "default", "rope_theta": 5.0}}
    made = told(
        rope_scaling={"type": "yarn", "factor": None, "original_max_position_embeddings": 1024, "beta_fast": None}
    )
    rope = made["rope_parameters"]
    assert (rope["factor"], rope["beta_fast"], made["max_position_embeddings"]) == (4.0, 32.0, 4096)
    # 0.32 takes the first as it is; 0.24 multiplies the second by its own magnitude unless the third says not to.
    assert rope["attention_factor"] == rope["attn_factor"] == pytest.approx(0.1 * 1.3862943611 + 1)
    assert rope["apply_yarn_scaling"] is False


def test_the_engine_gets_it_and_reads_config_json_alone(tmp_path: Path) -> None:
    from nemo_tropd.rollout.vllm.settings import EngineSettings

    (tmp_path / "config.json").write_text(json.dumps(config(rope_scaling={"type": "linear", "factor": 3})))
    arguments = EngineSettings(tmp_path, "float32", 64, weights_shapes={"w": (1,)}).llm_arguments()
    assert arguments["hf_overrides"]["rope_parameters"]["factor"] == 3.0 and arguments["config_format"] == "hf"
    (tmp_path / "config.json").write_text(json.dumps(config()))
    assert "hf_overrides" not in EngineSettings(tmp_path, "float32", 64, weights_shapes={"w": (1,)}).llm_arguments()
    # What config.json does not say is the class's, for the engine as for the trainer.
    yarn = {"type": "yarn", "factor": None, "original_max_position_embeddings": 1024}
    bare = {k: v for k, v in config("qwen2", rope_scaling=yarn).items() if k != "max_position_embeddings"}
    (tmp_path / "config.json").write_text(json.dumps(bare))
    arguments = EngineSettings(tmp_path, "float32", 64, weights_shapes={"w": (1,)}).llm_arguments()
    trained = shape_of_config(bare).rope_scaling
    assert trained is not None
    assert arguments["hf_overrides"]["rope_parameters"]["factor"] == trained.factor == 32768 / 1024
