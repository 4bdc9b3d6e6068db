"""The keys of a Hugging Face config.json: which are modelled, which must have one value, and which have no effect on
the model's function. A key that is none of these is refused unless it is off. Imports no torch.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


class ConversionError(ValueError):
    """A checkpoint that cannot be converted: what is wrong, the value seen, what to change."""


_MOST = 2**31 - 1  # of a size


def keys(names: str) -> frozenset[str]:
    """The names in a text."""
    return frozenset(names.split())


# Read by families.py and rope.py.
MODELLED = keys(
    "architectures model_type vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads "
    "num_key_value_heads head_dim max_position_embeddings rms_norm_eps tie_word_embeddings rope_theta rope_scaling "
    "rope_parameters sliding_window layer_types"
)
# The one value under which the weights mean the function that is built. None always passes: it is "not given".
FIXED: dict[str, Any] = {
    "hidden_act": "silu",
    "attention_bias": False,  # of Qwen3: vLLM builds its o_proj without one; families with ``biases`` model it
    "mlp_bias": False,
    "use_sliding_window": False,
    "partial_rotary_factor": 1.0,
    "is_encoder_decoder": False,
    "is_causal": True,
    "qkv_bias": None,  # vLLM reads it of every Llama, whatever its value
    "per_layer_config": None,
    "quantization_config": None,
}
# About training, generation, saving or display.
HARMLESS = keys(
    "attention_dropout auto_find_batch_size base_model begin_suppress_tokens bos_token bos_token_id "
    "chunk_size_feed_forward decoder_start_token_id do_sample dtype eos_token eos_token_id finetuning_task "
    "gradient_checkpointing id2label initializer_range is_llama_config keys_to_ignore_at_inference label2id "
    "length_penalty max_length max_sequence_length max_window_layers min_length model_max_length name_or_path "
    "neftune_noise_alpha num_beam_groups num_beams num_labels num_return_sequences output_attentions "
    "output_hidden_states pad_token_id prefix pretraining_tp problem_type repetition_penalty return_dict "
    "sep_token_id seq_length suppress_tokens task_specific_params temperature tie_last_hidden_states "
    "tokenizer_class tokenizer_model_max_length top_k top_p torch_dtype transformers.js_config "
    "transformers_version typical_p unk_token_id use_cache"
)
_HARMLESS_PREFIXES = ("_", "unsloth_")  # transformers' private attributes; marks of a training tool


def read_config(hf_dir: str | Path) -> dict[str, Any]:
    """The object in ``hf_dir/config.json``; ConversionError if there is none."""
    path = Path(hf_dir) / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConversionError(f"{path} does not exist: a Hugging Face checkpoint folder is needed") from None
    except (ValueError, RecursionError) as error:
        raise ConversionError(f"{path} is not valid JSON: {error}") from None
    except OSError as error:
        raise ConversionError(f"{path} cannot be read: {error}") from None
    if not isinstance(config, dict):
        raise ConversionError(f"{path} must contain a JSON object, not {type(config).__name__}")
    return config


def check_keys(config: dict[str, Any], modelled: frozenset[str], where: str) -> None:
    """Raise ConversionError for a key under which the same weights would mean another function, or may.
    ``modelled``: keys that the family reads beside MODELLED."""
    for key, supported in FIXED.items():
        if key not in modelled and config.get(key) not in (supported, None):
            why = "; quantised weights need the checkpoint they were made from" if key == "quantization_config" else ""
            raise ConversionError(f"{where}: unsupported {key} = {config[key]!r}; supported: {supported!r}{why}")
    known = MODELLED | modelled | FIXED.keys() | HARMLESS
    unknown = {
        key: value
        for key, value in config.items()
        if key not in known and not key.startswith(_HARMLESS_PREFIXES) and value not in (None, False, 0, "", [], {})
    }
    if unknown:
        named = ", ".join(f"{key} = {value!r:.60}" for key, value in sorted(unknown.items()))
        raise ConversionError(
            f"{where}: unknown {named}: it may change what the weights compute. If it does not (compare logits with "
            "Hugging Face's), remove it from a copy of the folder; if it does, this model is not supported"
        )


def positive(config: dict[str, Any], key: str, where: str, default: int | None = None) -> int:
    """A positive integer below 2**31; a key that is missing or null is ``default``."""
    value = default if config.get(key) is None else config[key]
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= _MOST:
        most = f" of at most {_MOST}" if isinstance(value, int) and value > 1 else ""
        raise ConversionError(f"{where}: {key} must be a positive integer{most}, not {value!r:.60}")
    return value


def number(
    config: dict[str, Any], key: str, where: str, default: float | None = None, most: float = sys.float_info.max
) -> float:
    """A positive number, at most ``most``; a key that is missing or null is ``default``."""
    value = default if config.get(key) is None else config[key]
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value <= most:
        limit = f" of at most {most:g}" if most < sys.float_info.max else ""
        raise ConversionError(f"{where}: {key} must be a positive number{limit}, not {value!r:.60}")
    return float(value)


def flag(config: dict[str, Any], key: str, where: str, default: bool = False) -> bool:
    """True or false; a key that is missing or null is ``default``."""
    value = default if config.get(key) is None else config[key]
    if not isinstance(value, bool):
        raise ConversionError(f"{where}: {key} must be true or false, not {value!r}")
    return value
