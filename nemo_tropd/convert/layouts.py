"""How a Megatron parameter is laid out over its Hugging Face tensors and over tensor-parallel ranks (see ``Row``)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from nemo_tropd.convert.families import ModelShape, Row


def merge(row: Row, tensors: Sequence[Tensor], shape: ModelShape) -> Tensor:
    """HF tensors, in the row's order -> the whole Megatron parameter, without vocabulary padding."""
    if row.layout == "query_key_value":
        groups = [t.reshape(shape.kv_heads, -1, *t.shape[1:]) for t in tensors]
        return torch.cat(groups, dim=1).flatten(0, 1)
    if row.layout == "gate_up":
        return torch.cat(list(tensors))
    return tensors[0]


def split(row: Row, whole: Tensor, shape: ModelShape) -> Iterator[tuple[str, Tensor]]:
    """The whole Megatron parameter -> (HF name, tensor); the inverse of ``merge``."""
    names = [name for name, _ in row.hf]
    if row.layout == "query_key_value":
        rows = [shape.size(dimensions[0]) // shape.kv_heads for _, dimensions in row.hf]
        groups = whole.reshape(shape.kv_heads, sum(rows), *whole.shape[1:])
        for name, part in zip(names, groups.split(rows, dim=1), strict=True):
            yield name, part.flatten(0, 1)
    elif row.layout == "gate_up":
        yield from zip(names, whole.chunk(2), strict=True)
    else:
        yield names[0], whole


def shard(row: Row, whole: Tensor, rank: int, size: int, shape: ModelShape) -> Tensor:
    """The part of ``whole`` that tensor rank ``rank`` of ``size`` holds; rows past the vocabulary are zero."""
    dimension = row.split_dimension
    if dimension is None:
        return whole
    if row.layout == "vocabulary":
        length = shape.padded_vocab(size) // size
        part = whole[rank * length : (rank + 1) * length]
        return torch.cat([part, part.new_zeros(length - part.size(0), *part.shape[1:])])
    if row.layout == "gate_up":
        return torch.cat([half.chunk(size)[rank] for half in whole.chunk(2)])
    return whole.chunk(size, dimension)[rank]


def unshard(row: Row, shards: Sequence[Tensor], shape: ModelShape) -> Tensor:
    """The whole parameter of all ranks' parts, padding cut; the inverse of ``shard``."""
    dimension = row.split_dimension
    if dimension is None:
        return shards[0]
    if row.layout == "vocabulary":
        return torch.cat(list(shards))[: shape.vocab_size]
    if row.layout == "gate_up":
        halves = [part.chunk(2) for part in shards]
        return torch.cat([*(gate for gate, _ in halves), *(up for _, up in halves)])
    return torch.cat(list(shards), dimension)


def whole_shape(row: Row, shape: ModelShape) -> tuple[int, ...]:
    """The shape of the whole parameter, without vocabulary padding."""
    first = sum(shape.size(dimensions[0]) for _, dimensions in row.hf)
    return (first, *(shape.size(d) for d in row.hf[0][1][1:]))
