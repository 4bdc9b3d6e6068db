"""Hugging Face weights into a built model's shards."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import Module, Parameter

from nemo_tropd.convert.families import ConversionError, ModelShape, Row
from nemo_tropd.convert.hf_files import HfCheckpoint
from nemo_tropd.convert.layouts import merge, shard

# Transformer Engine fuses a norm into the linear layer that follows it.
_FUSED_NORMS = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
}


class Layout(Protocol):
    """What this room needs to know of the topology."""

    @property
    def tensor_rank(self) -> int: ...
    @property
    def tensor_size(self) -> int: ...


@torch.no_grad()
def load_hf(
    model: Module, hf_dir: str | Path, shape: ModelShape, topology: Layout, dtype: torch.dtype | None = None
) -> None:
    """Fill every parameter of ``model`` on this rank from the safetensors files in ``hf_dir``, one at a time.

    Values are cast to the parameter's dtype, by way of ``dtype`` where given. Rows past the vocabulary become zero. No
    collective is involved. Raises ConversionError as ``HfCheckpoint`` does, before anything is written.
    """
    checkpoint = HfCheckpoint(hf_dir, shape)
    for parameter, row in local_rows(model, shape):
        part = read_shard(checkpoint, row, topology.tensor_rank, topology.tensor_size, shape)
        if part.shape != parameter.shape:
            raise ConversionError(f"{row.megatron}: shard {list(part.shape)} does not fit {list(parameter.shape)}")
        parameter.copy_(part if dtype is None else part.to(dtype))


def read_shard(checkpoint: HfCheckpoint, row: Row, rank: int, size: int, shape: ModelShape) -> Tensor:
    """Tensor rank ``rank``'s part of one Megatron parameter; of a vocabulary, only its rows are read."""
    if row.layout == "vocabulary":
        name, length = row.hf[0][0], shape.padded_vocab(size) // size
        part = checkpoint.read(name, slice(rank * length, (rank + 1) * length))
        return torch.cat([part, part.new_zeros(length - part.size(0), *part.shape[1:])])
    return shard(row, merge(row, [checkpoint.read(name) for name, _ in row.hf], shape), rank, size, shape)


def local_rows(model: Module, shape: ModelShape) -> Iterator[tuple[Parameter, Row]]:
    """Each parameter of this rank with the table row it belongs to; layers are numbered over the whole model.

    The last stage's copy of a tied embedding comes with the embedding's row. Raises ConversionError for a parameter
    that the family's table does not know.
    """
    inner = unwrap(model)
    rows = {row.megatron: row for row in shape.rows()}
    numbers = [layer.layer_number - 1 for layer in inner.decoder.layers]  # type: ignore[union-attr]
    for name, parameter in inner.named_parameters():
        row = rows.get(_global_name(name, numbers, shape.tied))
        if row is None:
            raise ConversionError(f"{name} is a parameter that the {shape.family} table does not know")
        yield parameter, row


def unwrap(model: Module) -> Module:
    """The model inside DDP or Float16Module."""
    while hasattr(model, "module"):
        model = model.module  # type: ignore[assignment]
    return model


def _global_name(name: str, layer_numbers: list[int], tied: bool) -> str:
    if tied and name == "output_layer.weight":
        return "embedding.word_embeddings.weight"
    if not name.startswith("decoder.layers."):
        return name
    index, rest = name.removeprefix("decoder.layers.").split(".", 1)
    return f"decoder.layers.{layer_numbers[int(index)]}.{_FUSED_NORMS.get(rest, rest)}"
