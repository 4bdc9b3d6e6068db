"""Small folders in the exact shape of public checkpoints: the keys of config.json and generation_config.json as they
are published, tokenizer class and template, shard layout, dtype, and embedding rows beyond the tokenizer's tokens.

Sizes are small and weights random; nothing of a checkpoint is copied. Token ids are those of the small tokenizer.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from tests.tiny_models import random_weights, write_weights
from tests.zoo.tokenizers import CHATML, SHAPES, Shape, write_tokenizer

SHAPES["smollm2"] = Shape(
    "llama",
    "GPT2Tokenizer",
    CHATML,
    ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<repo_name>", "<reponame>", "<file_sep>", "<jupyter_start>"),
    "<|im_end|>",
    "<|im_end|>",
    "<|im_start|>",
)

Tokens = str | tuple[str, ...] | None


@dataclass(frozen=True)
class Checkpoint:
    """One public checkpoint. ``config`` and ``generation`` hold what is published beside sizes and token ids."""

    architecture: str
    tokenizer: str
    config: Mapping[str, Any]
    generation: Mapping[str, Any]
    eos: Tokens
    generation_eos: Tokens
    bos: str | None = None
    pad: str | None = None
    rows_beyond: int = 32  # embedding rows past the tokenizer's tokens, at least
    layers: int = 2
    heads: int = 4
    kv_heads: int = 2
    hidden: int = 128  # heads of 32: vLLM's attention on CPU takes no less
    ffn: int = 192
    shards: int = 2
    files: Mapping[str, str] = field(default_factory=dict)  # further files of the public folder


_COMMON: dict[str, Any] = {
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "torch_dtype": "bfloat16",
    "use_cache": True,
}
_QWEN2 = {**_COMMON, "model_type": "qwen2", "rms_norm_eps": 1e-06, "use_sliding_window": False}
_QWEN25 = {**_QWEN2, "max_position_embeddings": 32768, "rope_theta": 1000000.0, "transformers_version": "4.43.1"}
_QWEN25_GENERATION = {
    "do_sample": True,
    "repetition_penalty": 1.05,
    "temperature": 0.7,
    "top_k": 20,
    "top_p": 0.8,
    "transformers_version": "4.37.0",
}
_R1 = {**_QWEN2, "max_position_embeddings": 131072, "rope_theta": 10000, "use_mrope": False}
_R1_GENERATION = {
    "_from_model_config": True,
    "do_sample": True,
    "temperature": 0.6,
    "top_p": 0.95,
    "transformers_version": "4.39.3",
}
_QWEN3 = {
    **_COMMON,
    "attention_bias": False,
    "max_position_embeddings": 40960,
    "model_type": "qwen3",
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "transformers_version": "4.51.0",
    "use_sliding_window": False,
}
_QWEN3_GENERATION = {
    "do_sample": True,
    "temperature": 0.6,
    "top_k": 20,
    "top_p": 0.95,
    "transformers_version": "4.51.0",
}
_LLAMA = {**_COMMON, "attention_bias": False, "mlp_bias": False, "model_type": "llama", "pretraining_tp": 1}
_LLAMA3 = {
    **_LLAMA,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
}
_LLAMA3_GENERATION = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "transformers_version": "4.42.3"}
_LLAMA3_ENDS = ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>")
_SMOLLM2 = {
    **_LLAMA,
    "initializer_range": 0.041666666666666664,
    "is_llama_config": True,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-05,
    "rope_interleaved": False,
    "rope_scaling": None,
    "rope_theta": 100000,
    "tie_word_embeddings": True,
    "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16", "fp16": "float16"}},
    "transformers_version": "4.42.3",
}


def _qwen25(tied: bool, window: int, max_window_layers: int, rows_beyond: int, **sizes: Any) -> Checkpoint:
    extra = {"max_window_layers": max_window_layers, "sliding_window": window, "tie_word_embeddings": tied}
    return Checkpoint(
        "Qwen2ForCausalLM",
        "qwen2.5",
        {**_QWEN25, **extra},
        _QWEN25_GENERATION,
        eos="<|im_end|>",
        generation_eos=("<|im_end|>", "<|endoftext|>"),
        bos="<|endoftext|>",
        pad="<|endoftext|>",
        rows_beyond=rows_beyond,
        **sizes,
    )


def _r1_qwen(rows_beyond: int, **settings: Any) -> Checkpoint:
    """DeepSeek's distilled Qwen2, and what was trained from it."""
    sizes = {name: settings.pop(name) for name in ("layers", "hidden", "heads", "shards") if name in settings}
    return Checkpoint(
        "Qwen2ForCausalLM",
        "r1-qwen",
        {**_R1, "tie_word_embeddings": False, **settings},
        _R1_GENERATION,
        eos="<｜end▁of▁sentence｜>",
        generation_eos="<｜end▁of▁sentence｜>",
        bos="<｜begin▁of▁sentence｜>",
        rows_beyond=rows_beyond,
        **sizes,
    )


def _qwen3(tied: bool, *, eos: str = "<|im_end|>", layers: int = 2, hidden: int = 64, **settings: Any) -> Checkpoint:
    kv_heads = settings.pop("kv_heads", 2)
    generation = dict(settings.pop("generation", _QWEN3_GENERATION))
    ends = settings.pop("generation_eos", ("<|im_end|>", "<|endoftext|>"))
    return Checkpoint(
        "Qwen3ForCausalLM",
        "qwen3",
        # Queries are wider than the hidden states, as in the public ones.
        {**_QWEN3, "head_dim": 32, "max_window_layers": layers, "tie_word_embeddings": tied, **settings},
        generation,
        eos=eos,
        generation_eos=ends,
        bos="<|endoftext|>",
        pad="<|endoftext|>",
        layers=layers,
        hidden=hidden,
        kv_heads=kv_heads,
    )


def _smollm2(layers: int) -> Checkpoint:
    return Checkpoint(
        "LlamaForCausalLM",
        "smollm2",
        _SMOLLM2,
        {"_from_model_config": True, "transformers_version": "4.42.3"},
        eos="<|im_end|>",
        generation_eos="<|im_end|>",
        bos="<|im_start|>",
        pad="<|im_end|>",
        rows_beyond=0,
        layers=layers,
        heads=9,
        kv_heads=3,
        hidden=288,
        ffn=384,
        shards=1,
    )


def _llama3(factor: float, tied: bool, version: str, shards: int) -> Checkpoint:
    scaling = {**_LLAMA3["rope_scaling"], "factor": factor}
    extra = {"rope_scaling": scaling, "tie_word_embeddings": tied, "transformers_version": version}
    return Checkpoint(
        "LlamaForCausalLM",
        "llama3",
        {**_LLAMA3, **extra, **({"head_dim": 32} if tied else {})},
        _LLAMA3_GENERATION,
        eos=_LLAMA3_ENDS,
        generation_eos=_LLAMA3_ENDS,
        bos="<|begin_of_text|>",
        rows_beyond=0,
        shards=shards,
    )


CHECKPOINTS: dict[str, Checkpoint] = {
    "DeepSeek-R1-Distill-Qwen-1.5B": _r1_qwen(
        32, sliding_window=4096, max_window_layers=21, transformers_version="4.44.0", shards=1
    ),
    # Trained from DeepSeek-R1-Distill-Qwen-7B, whose embedding has 128 rows more than the 1.5B's.
    "Skywork-OR1-7B": _r1_qwen(
        160,
        sliding_window=None,
        max_window_layers=28,
        rope_scaling=None,
        transformers_version="4.48.3",
        layers=3,
        heads=6,
        hidden=192,
    ),
    "Skywork-OR1-Math-7B": _r1_qwen(
        160, sliding_window=4096, max_window_layers=28, transformers_version="4.47.1", layers=3, heads=6, hidden=192
    ),
    "Qwen2.5-1.5B-Instruct": _qwen25(True, 32768, 21, 32, shards=1),
    "Qwen2.5-7B-Instruct": _qwen25(False, 131072, 28, 160, layers=3, heads=6, hidden=192),
    "Qwen2.5-14B-Instruct": _qwen25(False, 131072, 70, 160, heads=8, kv_heads=4, hidden=256),
    "Qwen2.5-72B-Instruct": _qwen25(False, 131072, 70, 160, heads=8, kv_heads=8, hidden=256, layers=3),
    # Fine-tuned from the base model, whose config ends with <|endoftext|>, and saved by a later transformers.
    "Qwen3-SFT-1.7B": _qwen3(
        True,
        eos="<|endoftext|>",
        generation={"max_new_tokens": 2048, "transformers_version": "4.57.1"},
        generation_eos="<|endoftext|>",
        max_position_embeddings=32768,
        layer_types=["full_attention"] * 2,
        transformers_version="4.57.1",
    ),
    "Qwen3-Nemotron-4B": _qwen3(
        True, layers=3, hidden=96, layer_types=["full_attention"] * 3, rope_scaling=None, transformers_version="4.55.0"
    ),
    "Qwen3-4B": _qwen3(True),
    "Qwen3-8B": _qwen3(False),
    "Qwen3-14B": _qwen3(False, layers=3, hidden=96),
    "Qwen3-32B": _qwen3(False, layers=3, hidden=128, kv_heads=4),  # its recipe splits it over four GPUs
    "smollm2-135m-instruct": _smollm2(3),
    "smollm2-student-26l": _smollm2(2),
    "Llama-3.1-8B-Instruct": _llama3(8.0, False, "4.42.3", 2),
    "Llama-3.2-1B-Instruct": _llama3(32.0, True, "4.45.0.dev0", 1),
    "DeepSeek-R1-Distill-Llama-8B": Checkpoint(
        "LlamaForCausalLM",
        "r1-llama",
        {**_LLAMA3, "tie_word_embeddings": False, "transformers_version": "4.43.0.dev0"},
        _R1_GENERATION,
        eos="<｜end▁of▁sentence｜>",
        generation_eos="<｜end▁of▁sentence｜>",
        bos="<｜begin▁of▁sentence｜>",
    ),
    "Mistral-7B-Instruct-v0.3": Checkpoint(
        "MistralForCausalLM",
        "llama2",
        {
            **_COMMON,
            "max_position_embeddings": 32768,
            "model_type": "mistral",
            "rms_norm_eps": 1e-05,
            "rope_theta": 1000000.0,
            "sliding_window": None,
            "tie_word_embeddings": False,
            "transformers_version": "4.42.0.dev0",
        },
        {"_from_model_config": True, "transformers_version": "4.42.0.dev0"},
        eos="</s>",
        generation_eos="</s>",
        bos="<s>",
        rows_beyond=0,
        # The same weights again, in the maker's own format, which nothing here may read.
        files={"consolidated.safetensors": "", "params.json": "{}", "tokenizer.model.v3": ""},
    ),
}

# recipe of conf/: its student and its teacher
PAIRS: dict[str, tuple[str, ...]] = {
    "deepseek-1.5b-from-skywork-7b-1n8g": ("DeepSeek-R1-Distill-Qwen-1.5B", "Skywork-OR1-7B"),
    "deepseek-1.5b-from-skywork-math-7b-1n8g": ("DeepSeek-R1-Distill-Qwen-1.5B", "Skywork-OR1-Math-7B"),
    "deepseek-1.5b-from-two-7b-1n8g": ("DeepSeek-R1-Distill-Qwen-1.5B", "Skywork-OR1-Math-7B", "Skywork-OR1-7B"),
    "qwen2.5-1.5b-from-qwen2.5-14b-2n8g-ahead": ("Qwen2.5-1.5B-Instruct", "Qwen2.5-14B-Instruct"),
    "qwen2.5-1.5b-from-qwen2.5-7b-1n1g-fp8": ("Qwen2.5-1.5B-Instruct", "Qwen2.5-7B-Instruct"),
    "qwen2.5-14b-from-qwen2.5-72b-4n8g": ("Qwen2.5-14B-Instruct", "Qwen2.5-72B-Instruct"),
    "qwen3-1.7b-from-qwen3-4b-1n8g": ("Qwen3-SFT-1.7B", "Qwen3-Nemotron-4B"),
    "qwen3-4b-from-qwen3-14b-1n8g": ("Qwen3-4B", "Qwen3-14B"),
    "qwen3-8b-from-qwen3-32b-2n8g": ("Qwen3-8B", "Qwen3-32B"),
    "smollm2_1gpu": ("smollm2-student-26l", "smollm2-135m-instruct"),
    "smollm2_cpu": ("smollm2-student-26l", "smollm2-135m-instruct"),
}


def make(name: str, folder: Path, seed: int) -> Path:
    """Write ``folder`` in the shape of the checkpoint ``name``; returns it. KeyError for a name that is not here."""
    c = CHECKPOINTS[name]
    tokens = write_tokenizer(folder, c.tokenizer)
    ids = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    known = {**ids["model"]["vocab"], **{t["content"]: t["id"] for t in ids["added_tokens"]}}

    def number(what: Tokens) -> Any:
        return [known[token] for token in what] if isinstance(what, tuple) else known[what] if what else None

    rows = tokens if c.rows_beyond == 0 else -(-(tokens + c.rows_beyond) // 32) * 32
    sizes = {
        "architectures": [c.architecture],
        "bos_token_id": number(c.bos),
        "eos_token_id": number(c.eos),
        "hidden_size": c.hidden,
        "intermediate_size": c.ffn,
        "num_attention_heads": c.heads,
        "num_hidden_layers": c.layers,
        "num_key_value_heads": c.kv_heads,
        "vocab_size": rows,
    }
    _write_json(folder / "config.json", dict(sorted({**c.config, **sizes}.items())))
    generation = {**c.generation, "bos_token_id": number(c.bos), "eos_token_id": number(c.generation_eos)}
    if c.pad and "_from_model_config" not in c.generation:
        generation["pad_token_id"] = number(c.pad)
    _write_json(folder / "generation_config.json", dict(sorted(generation.items())))
    weights = {n: w.to(torch.bfloat16).contiguous() for n, w in random_weights(folder, seed).items()}
    write_weights(folder, weights, c.shards)
    for file, text in c.files.items():
        (folder / file).write_text(text)
    return folder


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
