"""The layout of a Megatron parameter over its Hugging Face tensors and over tensor-parallel ranks (see ``Row``)."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from nemo_tropd.convert.families import ModelShape, Row


def merge(row: Row, tensors: Sequence[Tensor], shape: ModelShape) -> Tensor:
    """HF tensors, in the row's order -> the full Megatron parameter, without vocabulary padding."""
    if row.layout == "query_key_value":
        groups = [t.reshape(shape.kv_heads, -1, *t.shape[1:]) for t in tensors]
        return torch.cat(groups, dim=1).flatten(0, 1)
    if row.layout == "gate_up":
        return torch.cat(list(tensors))
    return tensors[0]


def split(row: Row, full: Tensor, shape: ModelShape) -> Iterator[tuple[str, Tensor]]:
    """The full Megatron parameter -> (HF name, tensor); the inverse of ``merge``."""
    names = [name for name, _ in row.hf]
    if row.layout == "query_key_value":
        rows = [shape.size(dimensions[0]) // shape.kv_heads for _, dimensions in row.hf]
        groups = full.reshape(shape.kv_heads, sum(rows), *full.shape[1:])
        for name, part in zip(names, groups.split(rows, dim=1), strict=True):
            yield name, part.flatten(0, 1)
    elif row.layout == "gate_up":
        yield from zip(names, full.chunk(2), strict=True)
    else:
        yield names[0], full


class Region(NamedTuple):
    """A block of the full parameter: its offset and length in each dimension."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]


def regions(row: Row, rank: int, size: int, shape: ModelShape) -> list[Region]:
    """The blocks of the full parameter that, stacked along the first dimension, are the shard of tensor rank ``rank``.
    Vocabulary padding is not part of the full parameter: the last ranks may get less than their shard, or nothing."""
    full = full_shape(row, shape)
    dimension = row.split_dimension
    if dimension is None:
        return [Region((0,) * len(full), full)]
    if row.layout == "vocabulary":
        length = shape.padded_vocab(size) // size
        first = min(rank * length, full[0])
        return [_block(full, 0, first, min(length, full[0] - first))]
    if row.layout == "gate_up":
        part = shape.ffn // size
        return [_block(full, 0, half * shape.ffn + rank * part, part) for half in (0, 1)]
    part = full[dimension] // size
    return [_block(full, dimension, rank * part, part)]


def _block(full: tuple[int, ...], dimension: int, start: int, length: int) -> Region:
    before, after = full[:dimension], full[dimension + 1 :]
    return Region((*(0 for _ in before), start, *(0 for _ in after)), (*before, length, *after))


def unshard(row: Row, shards: Sequence[Tensor], shape: ModelShape) -> Tensor:
    """The full parameter from the shards of all ranks, without vocabulary padding."""
    dimension = row.split_dimension
    if dimension is None:
        return shards[0]
    if row.layout == "vocabulary":
        return torch.cat(list(shards))[: shape.vocab_size]
    if row.layout == "gate_up":
        halves = [part.chunk(2) for part in shards]
        return torch.cat([*(gate for gate, _ in halves), *(up for _, up in halves)])
    return torch.cat(list(shards), dimension)


def full_shape(row: Row, shape: ModelShape) -> tuple[int, ...]:
    """The shape of the full parameter, without vocabulary padding."""
    first = sum(shape.size(dimensions[0]) for _, dimensions in row.hf)
    return (first, *(shape.size(d) for d in row.hf[0][1][1:]))
