"""Architectures of public checkpoints, so that a recipe can be planned on a machine that does not have them.

The numbers are those of each checkpoint's ``config.json`` on the Hugging Face hub; a test compares them with the
published parameter counts. The plan of a real run reads the checkpoint itself.
"""

from __future__ import annotations

from typing import Any

from nemo_tropd.convert.families import ModelShape, shape_of_config

# name: layers, hidden, ffn, query heads, key/value heads, vocabulary rows, tied, positions
_QWEN2: dict[str, tuple[int, int, int, int, int, int, bool, int]] = {
    "DeepSeek-R1-Distill-Qwen-1.5B": (28, 1536, 8960, 12, 2, 151936, False, 131072),
    "Skywork-OR1-Math-7B": (28, 3584, 18944, 28, 4, 152064, False, 131072),
    "Skywork-OR1-7B": (28, 3584, 18944, 28, 4, 152064, False, 131072),
    "Qwen2.5-1.5B": (28, 1536, 8960, 12, 2, 151936, True, 131072),
    "Qwen2.5-1.5B-Instruct": (28, 1536, 8960, 12, 2, 151936, True, 32768),
    "Qwen2.5-7B-Instruct": (28, 3584, 18944, 28, 4, 152064, False, 32768),
    "Qwen2.5-14B-Instruct": (48, 5120, 13824, 40, 8, 152064, False, 32768),
    "Qwen2.5-72B-Instruct": (80, 8192, 29568, 64, 8, 152064, False, 32768),
}
_QWEN3: dict[str, tuple[int, int, int, int, int, int, bool, int]] = {
    "Qwen3-SFT-1.7B": (28, 2048, 6144, 16, 8, 151936, True, 32768),
    "Qwen3-Nemotron-4B": (36, 2560, 9728, 32, 8, 151936, True, 40960),
    "Qwen3-1.7B": (28, 2048, 6144, 16, 8, 151936, True, 40960),
    "Qwen3-4B": (36, 2560, 9728, 32, 8, 151936, True, 40960),
    "Qwen3-8B": (36, 4096, 12288, 32, 8, 151936, False, 40960),
    "Qwen3-14B": (40, 5120, 17408, 40, 8, 151936, False, 40960),
    "Qwen3-32B": (64, 5120, 25600, 64, 8, 151936, False, 40960),
}
_LLAMA: dict[str, tuple[int, int, int, int, int, int, bool, int]] = {
    "SmolLM2-135M-Instruct": (30, 576, 1536, 9, 3, 49152, True, 8192),
    "smollm2-student-26l": (26, 576, 1536, 9, 3, 49152, True, 8192),
    "smollm2-student-24l": (24, 576, 1536, 9, 3, 49152, True, 8192),
}


def _shape(model_type: str, numbers: tuple[int, int, int, int, int, int, bool, int]) -> ModelShape:
    layers, hidden, ffn, heads, kv_heads, rows, tied, positions = numbers
    config: dict[str, Any] = {
        "model_type": model_type,
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": rows,
        "tie_word_embeddings": tied,
        "max_position_embeddings": positions,
    }
    return shape_of_config(config, model_type)


SHAPES: dict[str, ModelShape] = {
    name: _shape(model_type, numbers)
    for model_type, table in (("qwen2", _QWEN2), ("qwen3", _QWEN3), ("llama", _LLAMA))
    for name, numbers in table.items()
}


def known_shape(path: str) -> ModelShape | None:
    """The shape of a checkpoint folder by the last part of its path, ignoring case; None if it is not listed."""
    name = path.rstrip("/").rsplit("/", 1)[-1].lower()
    return next((shape for known, shape in SHAPES.items() if known.lower() == name), None)
