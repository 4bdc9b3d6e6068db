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
from nemo_tropd.convert.layouts import Region, merge, regions

# Transformer Engine fuses a norm into the linear layer after it; a distributed checkpoint always uses these names.
FUSED_NORMS = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
}


class Place(Protocol):
    """What this room needs to know of the topology to fill a shard."""

    @property
    def tensor_rank(self) -> int: ...
    @property
    def tensor_size(self) -> int: ...


class WeightSource(Protocol):
    """Anything that can give a block of a whole Megatron parameter."""

    def read(self, row: Row, region: Region) -> Tensor: ...


class HfSource:
    """The Megatron parameters of a Hugging Face folder, made block by block as they are asked for.

    Raises ConversionError as ``HfCheckpoint`` does.
    """

    def __init__(self, hf_dir: str | Path, shape: ModelShape) -> None:
        self.checkpoint = HfCheckpoint(hf_dir, shape)
        self.shape = shape

    def read(self, row: Row, region: Region) -> Tensor:
        """The block, in the dtype of the files."""
        if row.layout in ("vocabulary", "gate_up"):  # whole rows of one tensor: nothing else is read
            rows_each = self.shape.size(row.hf[0][1][0])
            index, first = divmod(region.offsets[0], rows_each) if region.sizes[0] else (0, 0)
            return self.checkpoint.read(row.hf[index][0], slice(first, first + region.sizes[0]))
        whole = merge(row, [self.checkpoint.read(name) for name, _ in row.hf], self.shape)
        for dimension, (start, length) in enumerate(zip(*region, strict=True)):
            whole = whole.narrow(dimension, start, length)
        return whole


def load_hf(
    model: Module, hf_dir: str | Path, shape: ModelShape, topology: Place, dtype: torch.dtype | None = None
) -> None:
    """Fill every parameter of ``model`` on this rank from the safetensors files in ``hf_dir``, one at a time.

    Values are cast to the parameter's dtype, by way of ``dtype`` where given. Rows past the vocabulary become zero. No
    collective is involved. Raises ConversionError as ``HfCheckpoint`` does, before anything is written.
    """
    fill_model(model, HfSource(hf_dir, shape), shape, topology, dtype)


@torch.no_grad()
def fill_model(
    model: Module, source: WeightSource, shape: ModelShape, topology: Place, dtype: torch.dtype | None = None
) -> None:
    """``load_hf`` from any source."""
    for parameter, row in local_rows(model, shape):
        blocks = regions(row, topology.tensor_rank, topology.tensor_size, shape)
        part = torch.cat([source.read(row, block) for block in blocks])
        padding = parameter.size(0) - part.size(0) if row.layout == "vocabulary" else 0
        if (part.size(0) + padding, *part.shape[1:]) != parameter.shape:
            raise ConversionError(f"{row.megatron}: shard {list(part.shape)} does not fit {list(parameter.shape)}")
        part = part if dtype is None else part.to(dtype)
        if padding:
            parameter[: part.size(0)].copy_(part)
            parameter[part.size(0) :].zero_()
        else:
            parameter.copy_(part)  # whole: a quantized parameter takes its scales from what it is given


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
    return f"decoder.layers.{layer_numbers[int(index)]}.{FUSED_NORMS.get(rest, rest)}"
