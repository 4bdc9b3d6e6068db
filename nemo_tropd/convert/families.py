"""The supported model families: one table of tensor names and shapes each. Imports no torch.

To add a family, add a table to ``FAMILIES`` and a parity test.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

Layout = Literal["copy", "vocabulary", "query_key_value", "gate_up", "columns"]
VOCAB_MULTIPLE = 128  # the padded vocabulary divides by this many rows for each tensor-parallel rank


class ConversionError(ValueError):
    """A checkpoint that cannot be converted: what is wrong, the value seen, what to change."""


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3's frequency scaling: wavelengths beyond ``original_max_positions / low_freq_factor`` are stretched by
    ``factor``, those below ``original_max_positions / high_freq_factor`` are kept, those between are blended."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_positions: int


@dataclass(frozen=True)
class ModelShape:
    """The architecture of a checkpoint. ``vocab_size`` is the number of rows of the embedding in the HF files."""

    family: str
    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab_size: int
    tied: bool
    norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    max_positions: int
    qkv_bias: bool
    qk_norm: bool

    def size(self, dimension: str) -> int:
        """The length of a dimension by its name in the tables."""
        sizes = {"vocab": self.vocab_size, "hidden": self.hidden, "ffn": self.ffn, "head": self.head_dim}
        return {**sizes, "q": self.heads * self.head_dim, "kv": self.kv_heads * self.head_dim}[dimension]

    def padded_vocab(self, tensor_parallel: int) -> int:
        """The vocabulary padded so that every tensor-parallel shard is a multiple of 128 rows."""
        multiple = VOCAB_MULTIPLE * tensor_parallel
        return -(-self.vocab_size // multiple) * multiple

    def parameters(self) -> int:
        """The number of trained values, without vocabulary padding; a tied head counts once."""
        return sum(math.prod(shape) for _, shape in self.hf_tensors())

    def rows(self) -> Iterator[Row]:
        """Every Megatron parameter of the full model, in the order of the forward pass."""
        present = [row for row in FAMILIES[self.family].table if row.when is None or row.when(self)]
        layered = [row for row in present if "{i}" in row.megatron]
        yield from (row for row in present if row.is_embedding)
        for layer in range(self.layers):
            yield from (row.at(layer) for row in layered)
        yield from (row for row in present if row not in layered and not row.is_embedding)

    def hf_tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Name and shape of every tensor of the Hugging Face checkpoint, in the order of the forward pass."""
        for row in self.rows():
            for name, dimensions in row.hf:
                yield name, tuple(self.size(d) for d in dimensions)

    def hf_optional_tensors(self) -> dict[str, tuple[int, ...]]:
        """Tensors that a Hugging Face checkpoint or weight stream may contain beside ``hf_tensors``, by name and shape.
        A tied model's head repeats the embedding; rotary frequencies, which old checkpoints stored, are recomputed."""
        names = [f"model.layers.{layer}.self_attn.rotary_emb.inv_freq" for layer in range(self.layers)]
        optional: dict[str, tuple[int, ...]] = dict.fromkeys(names, (self.head_dim // 2,))
        if self.tied:
            optional["lm_head.weight"] = (self.vocab_size, self.hidden)
        return optional

    def describe(self) -> str:
        """One human-readable line: family, layers, sizes, parameters."""
        return (
            f"{self.family}, {self.layers} layers, hidden {self.hidden}, {self.heads} query and {self.kv_heads} "
            f"key/value heads, vocabulary {self.vocab_size}, {self.parameters() / 1e6:.1f}M parameters"
            + (", tied" if self.tied else "")
        )

    def check_layout(self, tensor_parallel: int, pipeline_parallel: int) -> None:
        """Raise ConversionError, with the supported degrees, unless the model can be split this way."""
        split = {"query heads": self.heads, "key/value heads": self.kv_heads, "feed-forward columns": self.ffn}
        for what, count in split.items():
            if tensor_parallel < 1 or count % tensor_parallel:
                degrees = (n for n in range(1, self.kv_heads + 1) if not any(size % n for size in split.values()))
                raise ConversionError(
                    f"{count} {what} cannot be split over tensor parallel {tensor_parallel}; supported degrees of this "
                    f"model ({self.heads} query, {self.kv_heads} key/value heads): {', '.join(map(str, degrees))}"
                )
        if pipeline_parallel < 1 or self.layers % pipeline_parallel:
            stages = ", ".join(str(n) for n in range(1, self.layers + 1) if self.layers % n == 0)
            raise ConversionError(
                f"{self.layers} layers cannot be split over pipeline parallel {pipeline_parallel}; "
                f"supported degrees: {stages}"
            )


@dataclass(frozen=True)
class Row:
    """One Megatron parameter, by its name in a distributed checkpoint, and the HF tensors it is made of.

    copy             one tensor, the same on every tensor-parallel rank
    vocabulary       one tensor, padded to the padded vocabulary, rows split over ranks
    query_key_value  q, k, v interleaved by key/value group: [q of group 0, k 0, v 0, q of group 1, ...], groups split
    gate_up          gate above up; each rank has its rows of gate above its rows of up
    columns          one tensor, its second dimension split over ranks
    """

    megatron: str
    hf: tuple[tuple[str, tuple[str, ...]], ...]  # names and dimensions
    layout: Layout
    when: Callable[[ModelShape], bool] | None = None
    layer: int | None = None  # set on the rows of one layer

    @property
    def is_embedding(self) -> bool:
        return self.megatron.startswith("embedding.")

    def stage(self, shape: ModelShape, pipeline_parallel: int) -> int:
        """The pipeline stage that owns the parameter; the last stage's copy of a tied head does not count."""
        if self.layer is not None:
            return self.layer // (shape.layers // pipeline_parallel)
        return 0 if self.is_embedding else pipeline_parallel - 1

    @property
    def split_dimension(self) -> int | None:
        """The dimension split by tensor parallelism; None if every rank has the full parameter."""
        return {"copy": None, "columns": 1}.get(self.layout, 0)

    def at(self, layer: int) -> Row:
        hf = tuple((name.replace("{i}", str(layer)), dimensions) for name, dimensions in self.hf)
        return Row(self.megatron.replace("{i}", str(layer)), hf, self.layout, self.when, layer)


@dataclass(frozen=True)
class Family:
    """The defaults for keys missing from a ``config.json`` of this family, and its table."""

    architecture: str
    table: tuple[Row, ...]
    qkv_bias: bool = False
    qk_norm: bool = False
    kv_heads_default: int | None = None
    head_dim_default: int | None = None


_L = "model.layers.{i}."
_M = "decoder.layers.{i}."


def _row(megatron: str, layout: Layout, *hf: str, when: Callable[[ModelShape], bool] | None = None) -> Row:
    """A row of a table; each of ``hf`` is a name and its dimensions."""
    return Row(megatron, tuple((name, tuple(sizes)) for name, *sizes in map(str.split, hf)), layout, when)


_LLAMA: tuple[Row, ...] = (
    _row("embedding.word_embeddings.weight", "vocabulary", "model.embed_tokens.weight vocab hidden"),
    _row(_M + "input_layernorm.weight", "copy", _L + "input_layernorm.weight hidden"),
    _row(
        _M + "self_attention.linear_qkv.weight",
        "query_key_value",
        _L + "self_attn.q_proj.weight q hidden",
        _L + "self_attn.k_proj.weight kv hidden",
        _L + "self_attn.v_proj.weight kv hidden",
    ),
    _row(_M + "self_attention.linear_proj.weight", "columns", _L + "self_attn.o_proj.weight hidden q"),
    _row(_M + "pre_mlp_layernorm.weight", "copy", _L + "post_attention_layernorm.weight hidden"),
    _row(
        _M + "mlp.linear_fc1.weight",
        "gate_up",
        _L + "mlp.gate_proj.weight ffn hidden",
        _L + "mlp.up_proj.weight ffn hidden",
    ),
    _row(_M + "mlp.linear_fc2.weight", "columns", _L + "mlp.down_proj.weight hidden ffn"),
    _row("decoder.final_layernorm.weight", "copy", "model.norm.weight hidden"),
    _row("output_layer.weight", "vocabulary", "lm_head.weight vocab hidden", when=lambda shape: not shape.tied),
)
_QKV_BIAS = _row(
    _M + "self_attention.linear_qkv.bias",
    "query_key_value",
    _L + "self_attn.q_proj.bias q",
    _L + "self_attn.k_proj.bias kv",
    _L + "self_attn.v_proj.bias kv",
)
_QK_NORM = (
    _row(_M + "self_attention.q_layernorm.weight", "copy", _L + "self_attn.q_norm.weight head"),
    _row(_M + "self_attention.k_layernorm.weight", "copy", _L + "self_attn.k_norm.weight head"),
)

FAMILIES: dict[str, Family] = {
    "llama": Family("LlamaForCausalLM", _LLAMA),
    "qwen2": Family("Qwen2ForCausalLM", (*_LLAMA, _QKV_BIAS), qkv_bias=True, kv_heads_default=32),
    "qwen3": Family("Qwen3ForCausalLM", (*_LLAMA, *_QK_NORM), qk_norm=True, kv_heads_default=32, head_dim_default=128),
}


def read_shape(hf_dir: str | Path) -> ModelShape:
    """The shape described by ``hf_dir/config.json``. Raises ConversionError if it cannot be converted faithfully."""
    path = Path(hf_dir) / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConversionError(f"{path} does not exist: a Hugging Face checkpoint folder is needed") from None
    except (ValueError, RecursionError) as error:
        raise ConversionError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(config, dict):
        raise ConversionError(f"{path} must contain a JSON object, not {type(config).__name__}")
    return shape_of_config(config, str(path))


def shape_of_config(config: dict[str, Any], where: str = "config.json") -> ModelShape:
    """The shape of a parsed Hugging Face config. Raises ConversionError as ``read_shape`` does."""
    kinds = {"architectures": list, "layer_types": list, "rope_scaling": dict, "rope_parameters": dict}
    for key, kind in kinds.items():
        if not isinstance(config.get(key) or kind(), kind):
            raise ConversionError(f"{where}: {key} must be a {kind.__name__}, not {config[key]!r}")
    family = _find_family(config, where)
    _refuse_unsupported(config, where)
    heads, hidden = (_positive(config, key, where) for key in ("num_attention_heads", "hidden_size"))
    table = FAMILIES[family]
    head_dim = _positive(config, "head_dim", where, table.head_dim_default or hidden // heads)
    kv_heads = _positive(config, "num_key_value_heads", where, table.kv_heads_default or heads)
    if heads % kv_heads:
        raise ConversionError(f"{where}: {heads} query heads do not divide into {kv_heads} key/value heads")
    theta, scaling = _rope(config, where)
    return ModelShape(
        family=family,
        layers=_positive(config, "num_hidden_layers", where),
        hidden=hidden,
        ffn=_positive(config, "intermediate_size", where),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        vocab_size=_positive(config, "vocab_size", where),
        tied=bool(config.get("tie_word_embeddings", False)),
        norm_eps=_number(config, "rms_norm_eps", where, 1e-6),
        rope_theta=theta,
        rope_scaling=scaling,
        max_positions=_positive(config, "max_position_embeddings", where, 32768 if family != "llama" else 2048),
        qkv_bias=table.qkv_bias,
        qk_norm=table.qk_norm,
    )


def _find_family(config: dict[str, Any], where: str) -> str:
    named = config.get("architectures") or []
    for name, family in FAMILIES.items():
        if family.architecture in named or (not named and config.get("model_type") == name):
            return name
    supported = ", ".join(family.architecture for family in FAMILIES.values())
    raise ConversionError(
        f"{where}: unsupported architecture {named or config.get('model_type')}; supported: {supported}"
    )


def _refuse_unsupported(config: dict[str, Any], where: str) -> None:
    """Refuse settings under which the same weights would mean another function."""
    refused = {
        "attention_bias": False,
        "mlp_bias": False,
        "use_sliding_window": False,
        "hidden_act": "silu",
        "partial_rotary_factor": 1.0,
        "quantization_config": None,
    }
    for key, supported in refused.items():
        if config.get(key, supported) not in (supported, None):
            raise ConversionError(f"{where}: unsupported {key} = {config[key]!r}; supported: {supported!r}")
    other = sorted(set(config.get("layer_types") or ["full_attention"]) - {"full_attention"})
    if other:
        raise ConversionError(f"{where}: unsupported layer_types {other}; supported: 'full_attention'")


def _rope(config: dict[str, Any], where: str) -> tuple[float, RopeScaling | None]:
    """Rotary base and scaling, from the newer ``rope_parameters`` or the older ``rope_theta`` and ``rope_scaling``."""
    rope = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    theta = _number(rope if "rope_theta" in rope else config, "rope_theta", where, 10000.0)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return theta, None
    if kind != "llama3":
        raise ConversionError(f"{where}: unsupported rope type {kind!r}; supported: 'default', 'llama3'")
    needed = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    if missing := [key for key in needed if key not in rope]:
        raise ConversionError(f"{where}: rope type 'llama3' needs {missing}")
    return theta, RopeScaling(
        factor=_number(rope, "factor", where),
        low_freq_factor=_number(rope, "low_freq_factor", where),
        high_freq_factor=_number(rope, "high_freq_factor", where),
        original_max_positions=_positive(rope, "original_max_position_embeddings", where),
    )


def _positive(config: dict[str, Any], key: str, where: str, default: int | None = None) -> int:
    value = default if config.get(key) is None else config[key]
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConversionError(f"{where}: {key} must be a positive integer, not {value!r}")
    return value


def _number(config: dict[str, Any], key: str, where: str, default: float | None = None) -> float:
    value = default if config.get(key) is None else config[key]
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
        raise ConversionError(f"{where}: {key} must be a positive number, not {value!r}")
    return float(value)
