"""Megatron's distributed checkpoint, read and written block by block, without Megatron and without a process group.

A folder, converted or saved by training at any degrees, has:

    .metadata, __R_N.distcp     torch.distributed.checkpoint: every weight under ``model.`` + Megatron's sharded key,
                                e.g. ``model.decoder.layers.mlp.linear_fc1.weight`` [layers, 2 * ffn, hidden]; training
                                adds optimizer state beside it, which export ignores
    common.pt, metadata.json    required by Megatron's dist_checkpointing
    hf/                         config, tokenizer and so on (``folders.write_hf_sidecar``)
"""

import functools
import io
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.nn import Module

from nemo_tropd.convert.families import ConversionError, ModelShape, Row, read_shape
from nemo_tropd.convert.folders import SIDECAR
from nemo_tropd.convert.hf_import import FUSED_NORMS, Place, WeightSource, fill_model
from nemo_tropd.convert.layouts import Region, full_shape, regions
from nemo_tropd.convert.metadata_file import read_metadata
from nemo_tropd.files import refusal, write_json

PREFIX = "model."
_SEPARATE_NORMS = {plain: fused for fused, plain in FUSED_NORMS.items()}
_BLOCK_BYTES = 256 * 2**20  # a larger block of the vocabulary is stored in pieces
_FORMAT = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
_COMMON_FORMAT = {"common_backend": "torch", "common_backend_version": 1}


def stored_key(row: Row) -> tuple[str, tuple[int, ...]]:
    """Megatron's key for a parameter, without prefix, and the indices in front of its own: (layer,) or ()."""
    if row.layer is None:
        return row.megatron, ()
    rest = row.megatron.removeprefix(f"decoder.layers.{row.layer}.")
    return f"decoder.layers.{_SEPARATE_NORMS.get(rest, rest)}", (row.layer,)


class MegatronSource:
    """The weights of a checkpoint folder saved at any degrees; only requested blocks are read. Raises ConversionError
    for a folder that is no distributed checkpoint, a missing or truncated file, a missing parameter, another shape."""

    def __init__(self, directory: str | Path, shape: ModelShape | None = None) -> None:
        self.directory = Path(directory)
        if why := refusal(directory):
            raise ConversionError(f"{directory}: {why}")
        if not (self.directory / ".metadata").is_file():
            raise ConversionError(f"{directory} has no .metadata file: it is not a complete distributed checkpoint")
        self.shape = shape or read_shape(self.directory / SIDECAR)
        self._reader = dcp.FileSystemReader(self.directory)
        self._metadata = check_files(self.directory)
        self._reader.set_up_storage_reader(self._metadata, is_coordinator=True)
        for row in self.shape.rows():
            self._find(row)

    @property
    def widest_dtype(self) -> torch.dtype:
        """The dtype that holds every stored parameter exactly."""
        stored = (self._find(row)[1].properties.dtype for row in self.shape.rows())
        return functools.reduce(torch.promote_types, stored)

    def read(self, row: Row, region: Region) -> Tensor:
        """The block, in the dtype it is stored in."""
        key, stored, front = self._find(row)
        block = ChunkStorageMetadata(
            torch.Size((*front, *region.offsets)), torch.Size(((1,) * len(front)) + tuple(region.sizes))
        )
        items = create_read_items_for_chunk_list(key, stored, [block])
        if sum(math.prod(item.lengths) for item in items) != math.prod(block.sizes):
            raise ConversionError(f"{self.directory}: {key} is incomplete: parts of it are not stored")
        target = torch.empty(block.sizes, dtype=stored.properties.dtype)
        try:
            self._reader.read_data(LoadPlan(items), _ReadInto(target)).wait()
        except (RuntimeError, EOFError, ValueError, OSError) as error:
            raise ConversionError(f"{self.directory}: {key} cannot be read: {error}") from error
        return target.view(region.sizes)

    def read_full(self, row: Row) -> Tensor:
        """The full parameter, without vocabulary padding."""
        size = full_shape(row, self.shape)
        return self.read(row, Region((0,) * len(size), size))

    def _find(self, row: Row) -> tuple[str, TensorStorageMetadata, tuple[int, ...]]:
        """Key, metadata and leading indices of a parameter; layers may be stacked under one key or have one each."""
        stacked, front = stored_key(row)
        single = stacked if row.layer is None else stacked.replace("layers.", f"layers.{row.layer}.", 1)
        expected = full_shape(row, self.shape)
        for key, leading in ((stacked, front), (single, ())):
            stored = self._metadata.state_dict_metadata.get(PREFIX + key)
            if not isinstance(stored, TensorStorageMetadata):
                continue
            found = tuple(stored.size)
            wanted = ((self.shape.layers,) if leading else ()) + expected
            padded = row.layout == "vocabulary" and found[0] >= expected[0] and found[1:] == expected[1:]
            if found != wanted and not padded:
                raise ConversionError(
                    f"{self.directory}: {PREFIX + key} has shape {list(found)}, but config.json asks for {list(wanted)}"
                )
            return PREFIX + key, stored, leading
        raise ConversionError(f"{self.directory} lacks {PREFIX + stacked}")


def check_files(directory: Path) -> Any:
    """The checkpoint's .metadata. Raises ConversionError if a file that it names is missing or cut."""
    metadata, ends = read_metadata(directory), dict[str, int]()
    for info in metadata.storage_data.values():
        ends[info.relative_path] = max(ends.get(info.relative_path, 0), info.offset + info.length)
    for name, end in ends.items():
        path = directory / name
        if not path.is_file():
            raise ConversionError(f"{path} does not exist, but the checkpoint's .metadata names it")
        if path.stat().st_size < end:
            raise ConversionError(f"{path} is truncated: {path.stat().st_size} bytes instead of {end}")
    return metadata


def load_megatron(model: Module, directory: str | Path, shape: ModelShape, topology: Place) -> None:
    """``hf_import.load_hf`` from a checkpoint folder saved at any degrees; ConversionError as ``MegatronSource``."""
    fill_model(model, MegatronSource(directory, shape), shape, topology)


def write_checkpoint(
    directory: Path,
    source: WeightSource,
    shape: ModelShape,
    dtype: torch.dtype,
    *,
    tensor_parallel: int = 1,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Write the weights of ``source`` as a distributed checkpoint, one block in memory at a time, without padding.

    Blocks are the shards of ``tensor_parallel`` ranks, so that loading at that degree reads nothing twice; it loads at
    any other degree too. ``progress`` is called with the bytes of each block.
    """
    planner = _StreamingPlanner(list(_blocks(shape, dtype, tensor_parallel)), source, dtype, progress)
    writer = dcp.FileSystemWriter(directory, thread_count=1)
    try:
        dcp.save({}, storage_writer=writer, planner=planner, no_dist=True)
    except CheckpointException as error:  # a BaseException around what went wrong, by rank
        cause, _ = next(iter(error.failures.values()))
        raise cause from None
    torch.save({}, directory / "common.pt")
    write_json(directory / "metadata.json", {**_FORMAT, **_COMMON_FORMAT})


@dataclass(frozen=True)
class _Block:
    row: Row
    region: Region
    item: WriteItem


def _blocks(shape: ModelShape, dtype: torch.dtype, tensor_parallel: int) -> Iterator[_Block]:
    properties = TensorProperties(dtype=dtype)
    for row in shape.rows():
        key, front = stored_key(row)
        size = torch.Size(((shape.layers,) if front else ()) + full_shape(row, shape))
        for rank in range(tensor_parallel if row.split_dimension is not None else 1):
            for held in regions(row, rank, tensor_parallel, shape):
                for region in _pieces(held, dtype):
                    offsets = torch.Size((*front, *region.offsets))
                    chunk = ChunkStorageMetadata(offsets, torch.Size(((1,) * len(front)) + tuple(region.sizes)))
                    item = WriteItem(
                        index=MetadataIndex(PREFIX + key, offsets),
                        type=WriteItemType.SHARD,
                        tensor_data=TensorWriteData(chunk=chunk, properties=properties, size=size),
                    )
                    yield _Block(row, region, item)


def _pieces(region: Region, dtype: torch.dtype) -> Iterator[Region]:
    """The region in runs of rows of at most ``_BLOCK_BYTES``; nothing if it is empty."""
    rows = max(1, _BLOCK_BYTES // (math.prod(region.sizes[1:]) * dtype.itemsize))
    for first in range(0, region.sizes[0], rows):
        yield Region(
            (region.offsets[0] + first, *region.offsets[1:]),
            (min(rows, region.sizes[0] - first), *region.sizes[1:]),
        )


class _StreamingPlanner(SavePlanner):
    """Plans blocks without having them; reads each when the writer asks for its bytes."""

    def __init__(
        self, blocks: list[_Block], source: WeightSource, dtype: torch.dtype, progress: Callable[[int], None] | None
    ) -> None:
        self.blocks = {(block.item.index.fqn, block.item.index.offset): block for block in blocks}
        self.source, self.dtype, self.progress = source, dtype, progress

    def set_up_planner(
        self, state_dict: Any, storage_meta: StorageMeta | None = None, is_coordinator: bool = False
    ) -> None: ...

    def create_local_plan(self) -> SavePlan:
        return SavePlan([block.item for block in self.blocks.values()])

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        return create_default_global_save_plan(all_plans)

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        return new_plan

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        block = self.blocks[(write_item.index.fqn, write_item.index.offset)]
        assert write_item.tensor_data is not None
        data = self.source.read(block.row, block.region).to(self.dtype).contiguous()
        if self.progress is not None:
            self.progress(data.nbytes)
        return data.view(write_item.tensor_data.chunk.sizes)


class _ReadInto(LoadPlanner):
    """Copies everything the reader delivers into one tensor."""

    def __init__(self, target: Tensor) -> None:
        self.target = target

    def set_up_planner(
        self, state_dict: Any, metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None: ...

    def create_local_plan(self) -> LoadPlan:
        raise NotImplementedError("the plan is made by MegatronSource.read")

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        return global_plan

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        return central_plan

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        raise ConversionError(f"{read_item.storage_index.fqn} is an object, not a tensor")

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        view = self.target
        for dimension, (start, length) in enumerate(zip(read_item.dest_offsets, read_item.lengths, strict=True)):
            view = view.narrow(dimension, start, length)
        return view

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None: ...
