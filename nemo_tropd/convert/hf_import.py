"""Hugging Face weights into a built model's shards."""

from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import Module, Parameter

from nemo_tropd.convert.families import ConversionError, ModelShape, Row
from nemo_tropd.convert.hf_files import HfCheckpoint, is_finite
from nemo_tropd.convert.layouts import Region, merge, regions

# Transformer Engine fuses a norm into the linear layer after it; a distributed checkpoint always uses these names.
FUSED_NORMS = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
}


class Place(Protocol):
    """The part of the topology that filling a shard needs."""

    @property
    def tensor_rank(self) -> int: ...
    @property
    def tensor_size(self) -> int: ...


class WeightSource(Protocol):
    """Anything that can read a block of a full Megatron parameter."""

    def read(self, row: Row, region: Region) -> Tensor: ...


class HfSource:
    """The Megatron parameters of a Hugging Face folder, block by block; ConversionError as ``HfCheckpoint``."""

    def __init__(self, hf_dir: str | Path, shape: ModelShape) -> None:
        self.checkpoint, self.shape = HfCheckpoint(hf_dir, shape), shape

    def read(self, row: Row, region: Region) -> Tensor:
        """The block, in the dtype of the files."""
        ranges = [slice(start, start + length) for start, length in zip(*region, strict=True)]
        if row.layout == "query_key_value":  # its rows are spread over three tensors
            return merge(row, [self.checkpoint.read(name) for name, _ in row.hf], self.shape)[tuple(ranges)]
        index, first = 0, region.offsets[0]
        if row.layout == "gate_up":  # a block never has rows of both
            index, first = divmod(first, self.shape.ffn)
        ranges[0] = slice(first, first + region.sizes[0])
        return self.checkpoint.read(row.hf[index][0], *ranges)


def load_hf(model: Module, hf_dir: str | Path, shape: ModelShape, topology: Place) -> None:
    """Fill every parameter of ``model`` on this rank from ``hf_dir``, cast to its dtype; no collective.

    Rows past the vocabulary become zero. Raises ConversionError as ``HfCheckpoint`` does, before anything is written,
    and for values that are not finite.
    """
    fill_model(model, HfSource(hf_dir, shape), shape, topology)


@torch.no_grad()
def fill_model(model: Module, source: WeightSource, shape: ModelShape, topology: Place) -> None:
    """``load_hf`` from any source."""
    for parameter, row in local_rows(model, shape):
        blocks = regions(row, topology.tensor_rank, topology.tensor_size, shape)
        part = torch.cat([source.read(row, block) for block in blocks])
        if part.numel() and not is_finite(part):
            remedy = "download the checkpoint again, or use another one"
            raise ConversionError(f"{', '.join(_not_finite(source, row))} has NaN or infinite values: {remedy}")
        padding = parameter.size(0) - part.size(0) if row.layout == "vocabulary" else 0
        if (part.size(0) + padding, *part.shape[1:]) != parameter.shape:
            raise ConversionError(f"{row.megatron}: shard {list(part.shape)} does not fit {list(parameter.shape)}")
        if padding:
            parameter[: part.size(0)].copy_(part)
            parameter[part.size(0) :].zero_()
        else:
            parameter.copy_(part)  # at once: a quantized parameter computes its scales from its source


def _not_finite(source: WeightSource, row: Row) -> list[str]:
    """The stored tensors of a row with values that are not finite; the row's own name if the source does not tell."""
    if not isinstance(source, HfSource):
        return [row.megatron]
    checkpoint, names = source.checkpoint, [name for name, _ in row.hf]
    return [f"{checkpoint.directory}: {n}" for n in names if not bool(checkpoint.read(n).isfinite().all())]


def local_rows(model: Module, shape: ModelShape) -> Iterator[tuple[Parameter, Row]]:
    """Each parameter of this rank with its row of the table, layers numbered over the full model.
    A tied head has the embedding's row. Raises ConversionError for a parameter that the family's table lacks."""
    inner = unwrap(model)
    rows = {row.megatron: row for row in shape.rows()}
    numbers = [layer.layer_number - 1 for layer in inner.decoder.layers]  # type: ignore[union-attr]
    for name, parameter in inner.named_parameters():
        row = rows.get(_global_name(name, numbers, shape.tied))
        if row is None:
            raise ConversionError(f"parameter {name} is not in the {shape.family} table")
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
