"""The supported model families: one table of tensor names and shapes each. Imports no torch.

To add a family whose layers are Llama's in another dress:

1. Add an entry to ``FAMILIES``: its architecture, its table (rows of ``_LLAMA`` and what it has beside them) and the
   defaults that its transformers config class gives to missing keys.
2. Classify every key of that config class: read here, or in config_json.py's ``FIXED`` or ``HARMLESS``. Read its vLLM
   model too: what the engine computes otherwise (a bias, a window) must be refused, or overridden in rope.py.
3. What a layer does otherwise is a flag of ``ModelShape``, read by gpt/build.py (``transformer_config``) and
   gpt/specs.py; memory that it takes is counted in planner/memory.py.
4. Add it to tests/tiny_models.py, to ``FAMILY_CONFIGS`` in tests/unit/test_config_json.py (all keys are classified) and
   to tests/unit/test_model_logits.py (its logits are transformers', its export is its source).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from nemo_tropd.convert.config_json import ConversionError, check_keys, flag, number, positive, read_config
from nemo_tropd.convert.rope import RopeScaling, read_rope

Layout = Literal["copy", "vocabulary", "query_key_value", "gate_up", "columns"]
_MOST_LAYERS = 1000
VOCAB_MULTIPLE = 128  # the padded vocabulary divides by this many rows for each tensor-parallel rank


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
    attention_bias: bool = False  # of the output projection; ``qkv_bias`` then holds, too
    mlp_bias: bool = False
    window: int | None = None  # positions that attention sees, if that is less than all

    def longest(self) -> tuple[int, str]:
        """The longest sequence for which the model that is built is the checkpoint's, in tokens, and why."""
        s, limit = self.rope_scaling, self.max_positions
        why = f"max_position_embeddings = {limit}"
        if s is not None and s.kind in ("yarn", "linear"):
            original = s.original_max_positions if s.kind == "yarn" else limit
            limit, why = int(original * s.factor), f"the {original} x {s.factor:g} positions of rope type {s.kind!r}"
        elif s is not None and s.kind == "dynamic":
            why += ", from where on rope type 'dynamic' depends on the batch"
        if self.window is not None and self.window < limit:
            return self.window, f"sliding_window = {self.window}, as far back as attention sees"
        return limit, why

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
        return _parameters(self)

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
        A tied model's head repeats the embedding; rotary frequencies, which old checkpoints stored, are recomputed.
        ``hf_files`` also knows the tables made from them."""
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
            + (f", rotary scaling {self.rope_scaling.kind} x {self.rope_scaling.factor:g}" if self.rope_scaling else "")
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


@cache
def _parameters(shape: ModelShape) -> int:
    return sum(math.prod(sizes) for _, sizes in shape.hf_tensors())


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
    max_positions_default: int = 32768
    biases: bool = False  # attention_bias and mlp_bias are modelled
    window_switch: bool = False  # sliding_window counts only under use_sliding_window
    window_default: int | None = None


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
    when=lambda shape: shape.qkv_bias,
)
_BIASES = (
    _QKV_BIAS,
    _row(
        _M + "self_attention.linear_proj.bias",
        "copy",
        _L + "self_attn.o_proj.bias hidden",
        when=lambda shape: shape.attention_bias,
    ),
    _row(
        _M + "mlp.linear_fc1.bias",
        "gate_up",
        _L + "mlp.gate_proj.bias ffn",
        _L + "mlp.up_proj.bias ffn",
        when=lambda shape: shape.mlp_bias,
    ),
    _row(_M + "mlp.linear_fc2.bias", "copy", _L + "mlp.down_proj.bias hidden", when=lambda shape: shape.mlp_bias),
)
_QK_NORM = (
    _row(_M + "self_attention.q_layernorm.weight", "copy", _L + "self_attn.q_norm.weight head"),
    _row(_M + "self_attention.k_layernorm.weight", "copy", _L + "self_attn.k_norm.weight head"),
)

_QWEN: dict[str, Any] = {"kv_heads_default": 32, "window_switch": True}
FAMILIES: dict[str, Family] = {
    "llama": Family("LlamaForCausalLM", (*_LLAMA, *_BIASES), max_positions_default=2048, biases=True),
    "mistral": Family(
        "MistralForCausalLM", _LLAMA, kv_heads_default=8, max_positions_default=131072, window_default=4096
    ),
    "qwen2": Family("Qwen2ForCausalLM", (*_LLAMA, _QKV_BIAS), qkv_bias=True, **_QWEN),
    "qwen3": Family("Qwen3ForCausalLM", (*_LLAMA, *_QK_NORM), qk_norm=True, head_dim_default=128, **_QWEN),
}


def read_shape(hf_dir: str | Path) -> ModelShape:
    """The shape described by ``hf_dir/config.json``. Raises ConversionError if it cannot be converted faithfully."""
    return shape_of_config(read_config(hf_dir), str(Path(hf_dir) / "config.json"))


def shape_of_config(config: dict[str, Any], where: str = "config.json") -> ModelShape:
    """The shape of a parsed Hugging Face config. Raises ConversionError as ``read_shape`` does."""
    kinds = {"architectures": list, "layer_types": list, "rope_scaling": dict, "rope_parameters": dict}
    for key, kind in kinds.items():
        if not isinstance(config.get(key) or kind(), kind):
            raise ConversionError(f"{where}: {key} must be a {kind.__name__}, not {config[key]!r}")
    name = _find_family(config, where)
    family = FAMILIES[name]
    check_keys(config, frozenset(("attention_bias", "mlp_bias") if family.biases else ()), where)
    layers = positive(config, "num_hidden_layers", where)
    if layers > _MOST_LAYERS:  # names of that many tensors would fill the memory before one of them is missed
        raise ConversionError(f"{where}: num_hidden_layers = {layers}: give at most {_MOST_LAYERS}")
    types = config.get("layer_types") or ["full_attention"] * layers
    if other := sorted({str(kind) for kind in types} - {"full_attention"}):
        raise ConversionError(f"{where}: unsupported layer_types {other}; supported: 'full_attention'")
    if len(types) != layers:  # transformers, and with it vLLM, would not load it
        raise ConversionError(f"{where}: layer_types names {len(types)} layers, num_hidden_layers is {layers}")
    heads, hidden = (positive(config, key, where) for key in ("num_attention_heads", "hidden_size"))
    kv_heads = positive(config, "num_key_value_heads", where, family.kv_heads_default or heads)
    if heads % kv_heads:
        raise ConversionError(f"{where}: {heads} query heads do not divide into {kv_heads} key/value heads")
    max_positions = positive(config, "max_position_embeddings", where, family.max_positions_default)
    head_dim = positive(config, "head_dim", where, family.head_dim_default or hidden // heads)
    if head_dim % 2:
        raise ConversionError(
            f"{where}: head_dim = {head_dim}: rotary embeddings turn pairs of dimensions: give an even number"
        )
    theta, scaling = read_rope(config, max_positions, where)
    attention_bias = family.biases and flag(config, "attention_bias", where)
    return ModelShape(
        family=name,
        layers=layers,
        hidden=hidden,
        ffn=positive(config, "intermediate_size", where),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        vocab_size=positive(config, "vocab_size", where),
        tied=flag(config, "tie_word_embeddings", where),
        norm_eps=number(config, "rms_norm_eps", where, 1e-6),
        rope_theta=theta,
        rope_scaling=scaling,
        max_positions=max_positions,
        qkv_bias=family.qkv_bias or attention_bias,
        qk_norm=family.qk_norm,
        attention_bias=attention_bias,
        mlp_bias=family.biases and flag(config, "mlp_bias", where),
        window=_window(config, family, where),
    )


def _window(config: dict[str, Any], family: Family, where: str) -> int | None:
    """The sliding window. vLLM applies that of a Llama, too, whose transformers class knows none."""
    if family.window_switch or config.get("sliding_window", family.window_default) is None:
        return None
    return positive(config, "sliding_window", where, family.window_default)


def _find_family(config: dict[str, Any], where: str) -> str:
    named = config.get("architectures") or []
    for name, family in FAMILIES.items():
        if family.architecture in named or (not named and config.get("model_type") == name):
            if config.get("model_type") not in (None, name):
                why = f"of architecture {family.architecture}: some programs read the one, some the other"
                raise ConversionError(f"{where}: model_type {config['model_type']!r} is not that {why}")
            return name
    supported = ", ".join(family.architecture for family in FAMILIES.values())
    raise ConversionError(
        f"{where}: unsupported architecture {named or config.get('model_type')}; supported: {supported}"
    )
