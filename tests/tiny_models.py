"""Tiny random Hugging Face checkpoints of every family, with a real tokenizer file and a chat template, made in a
moment."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from nemo_tropd.convert.families import read_shape

FAMILIES = ("llama", "llama3", "qwen2", "qwen3")  # llama3 is llama with Llama 3's rotary scaling
SPECIAL = ("<pad>", "<unk>", "<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}


def make_tiny(
    directory: str | Path,
    family: str = "qwen3",
    tied: bool = True,
    layers: int = 2,
    heads: int = 4,
    kv_heads: int = 2,
    vocab: int = 131,
    seed: int = 0,
    *,
    hidden: int = 32,
    head_dim: int = 16,
    dtype: torch.dtype = torch.float32,
    files: int = 1,
    spread: float | None = None,
    changes: dict[str, Any] | None = None,
) -> Path:
    """Write config, tokenizer and random weights; returns the folder. ``vocab`` counts the tokenizer's tokens (at least
    104: 4 special tokens, newline and printable ASCII) and the embedding's rows. ``changes``: keys of config.json.

    Weights are drawn so that logits spread over several nats, and norms and biases are not trivial. A model drawn like
    that may all but always say the same; with ``spread`` its logits have about that standard deviation instead, in
    nats, whatever the seed: an entropy of log(vocab) - spread^2 / 2, since its final states have a known length.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    _write_tokenizer(directory, vocab)
    config = _config(family, tied, layers, heads, kv_heads, vocab, hidden, head_dim, dtype)
    (directory / "config.json").write_text(json.dumps({**config, **(changes or {})}, indent=2) + "\n")
    generation = {"bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 0, "do_sample": True, "temperature": 0.7}
    (directory / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    weights = random_weights(directory, seed)
    if spread is not None:
        # Final states have length sqrt(hidden) before the final norm's weight, and each logit is one's product with a
        # row of the head.
        row = 0.3 if tied else 1.5 / hidden**0.5
        weights["model.norm.weight"] = torch.full((hidden,), spread / (row * hidden**0.5))
    write_weights(directory, {name: w.to(dtype).contiguous() for name, w in weights.items()}, files)
    return directory


def random_weights(directory: Path, seed: int) -> dict[str, torch.Tensor]:
    """fp32 values for every tensor that ``directory/config.json`` asks for; norms and biases are not trivial."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, size in read_shape(directory).hf_tensors():
        noise = torch.randn(size, generator=generator)
        if name.endswith("norm.weight"):
            weights[name] = 1 + 0.2 * noise
        elif name.endswith(".bias"):
            weights[name] = 0.3 * noise
        else:
            weights[name] = noise * (0.3 if "embed_tokens" in name else 1.5 / size[-1] ** 0.5)
    return weights


def _config(
    family: str,
    tied: bool,
    layers: int,
    heads: int,
    kv_heads: int,
    vocab: int,
    hidden: int,
    head_dim: int,
    dtype: torch.dtype,
) -> dict[str, Any]:
    if family not in {*FAMILIES, *_ARCHITECTURES}:
        raise ValueError(f"family {family!r} is not one of {FAMILIES} or {[*_ARCHITECTURES]}")
    name = "llama" if family == "llama3" else family
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": 10000.0 if name == "llama" else 1000000.0}
    if family == "llama3":
        rope = {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 32.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        }
    if name == "qwen2":
        head_dim = hidden // heads  # Qwen2 has no head size of its own
    return {
        "architectures": [_ARCHITECTURES[name]],
        "model_type": name,
        "attention_bias": False,
        "bos_token_id": 2,
        "eos_token_id": 3,
        "pad_token_id": 0,
        "head_dim": head_dim,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": 3 * hidden,
        "max_position_embeddings": 512,
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "num_key_value_heads": kv_heads,
        "rms_norm_eps": 1e-6,
        "rope_parameters": rope,
        "tie_word_embeddings": tied,
        "dtype": str(dtype).removeprefix("torch."),
        "use_cache": True,
        "vocab_size": vocab,
    }


def _write_tokenizer(directory: Path, vocab: int) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    characters = ["\n", *(chr(code) for code in range(32, 127))]
    tokens = [*SPECIAL, *characters]
    if vocab < len(tokens):
        raise ValueError(f"vocab {vocab} is below the {len(tokens)} tokens of the tiny tokenizer")
    tokens += [f"<extra_{i}>" for i in range(vocab - len(tokens))]
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
        "clean_up_tokenization_spaces": False,
        "model_max_length": 512,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    (directory / "chat_template.jinja").write_text(CHAT_TEMPLATE)


def write_weights(directory: Path, weights: dict[str, torch.Tensor], files: int) -> None:
    """As model.safetensors, or in ``files`` shards with an index."""
    if files == 1:
        save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
        return
    names = list(weights)
    weight_map = {}
    for number in range(files):
        part = names[number::files]
        file = f"model-{number + 1:05d}-of-{files:05d}.safetensors"
        save_file({name: weights[name] for name in part}, directory / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(part, file))
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
