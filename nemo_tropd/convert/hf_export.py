"""A model's shards as Hugging Face tensors: the stream that feeds the rollout engine, and the folder on disk."""

from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Module

from nemo_tropd.convert.families import ConversionError, ModelShape, Row, read_shape
from nemo_tropd.convert.folders import check_apart, copy_sidecar, new_folder
from nemo_tropd.convert.hf_files import MAX_SHARD_BYTES, write_weights
from nemo_tropd.convert.hf_import import local_rows, unwrap
from nemo_tropd.convert.layouts import full_shape, split, unshard
from nemo_tropd.parallel.agreement import World, on_stream
from nemo_tropd.parallel.topology import Topology


def hf_stream(model: Module, shape: ModelShape, topology: Topology) -> Iterator[tuple[str, Tensor]]:
    """As ``leader_stream``, on the CPU: tensors are contiguous and belong to the caller."""
    for name, tensor in leader_stream(model, shape, topology):
        yield name, torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor)


def leader_stream(model: Module, shape: ModelShape, topology: Topology) -> Iterator[tuple[str, Tensor]]:
    """The model as (HF name, full tensor) pairs on its device, in the order of the forward pass, on rank 0.

    **Every rank must exhaust it**: collective over the model's data rank 0. One parameter is in flight at a time;
    tensors have the model's dtype and the true vocabulary. One may be a view of a parameter, or of what others are
    views of: read it before the next optimizer step, and never write to it. A tied head is not repeated.
    """
    if topology.data_rank != 0:
        return
    dtype: torch.dtype = unwrap(model).config.params_dtype  # type: ignore[union-attr, assignment]
    mine = {row.megatron: parameter for parameter, row in local_rows(model, shape)}
    for row in shape.rows():
        owner = row.stage(shape, topology.pipeline_size)
        full: Tensor | None = None
        if topology.pipeline_rank == owner:
            full = _gather_shards(mine[row.megatron].detach().to(dtype), row, shape, topology)
        if owner != 0:
            full = _send_to_first_stage(full, row, shape, topology, owner, dtype)
        if topology.is_leader:
            assert full is not None
            yield from split(row, full, shape)


def device_stream(model: Module, shape: ModelShape, topology: Topology) -> Iterator[tuple[str, Tensor]]:
    """The model as (HF name, full tensor) pairs on the model's device, in its dtype, **on every rank**.

    Every rank of a tensor-parallel group must exhaust it; one parameter is gathered at a time. A tensor may be a view
    of a parameter: read it before the next optimizer step, and never write to it. A tied head is not repeated. Raises
    ConversionError under pipeline parallelism.
    """
    if topology.pipeline_size > 1:
        raise ConversionError("device_stream needs pipeline parallel 1: a rank must hold a shard of every layer")
    mine = {row.megatron: parameter for parameter, row in local_rows(model, shape)}
    for row in shape.rows():
        part = mine[row.megatron].detach()
        parts = [part]
        if topology.tensor_size > 1 and row.split_dimension is not None:
            parts = [torch.empty_like(part) for _ in range(topology.tensor_size)]
            dist.all_gather(parts, part.contiguous(), group=topology.tensor_group)
        yield from split(row, unshard(row, parts, shape), shape)


def _gather_shards(part: Tensor, row: Row, shape: ModelShape, topology: Topology) -> Tensor | None:
    """The full parameter on tensor rank 0 of a stage, None on its other ranks."""
    if topology.tensor_size == 1 or row.split_dimension is None:
        return unshard(row, [part], shape) if topology.tensor_rank == 0 else None
    group, part = topology.tensor_group, part.contiguous()
    parts = [torch.empty_like(part) for _ in range(topology.tensor_size)] if topology.tensor_rank == 0 else None
    dist.gather(part, parts, dst=dist.get_global_rank(group, 0), group=group)
    return unshard(row, parts, shape) if parts is not None else None


def _send_to_first_stage(
    full: Tensor | None, row: Row, shape: ModelShape, topology: Topology, owner: int, dtype: torch.dtype
) -> Tensor | None:
    """From tensor rank 0 of stage ``owner`` to tensor rank 0 of the first stage."""
    if topology.tensor_rank != 0 or topology.pipeline_rank not in (0, owner):
        return None
    group = topology.pipeline_group
    if topology.pipeline_rank == owner:
        assert full is not None
        dist.send(full.contiguous(), dst=dist.get_global_rank(group, 0), group=group)
        return None
    received = torch.empty(full_shape(row, shape), dtype=dtype, device=topology.device)
    dist.recv(received, src=dist.get_global_rank(group, owner), group=group)
    return received


def save_hf(
    stream: Iterator[tuple[str, Tensor]],
    out_dir: str | Path,
    *,
    source_dir: str | Path,
    dtype: torch.dtype,
    overwrite: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write ``stream`` as a Hugging Face folder, which appears once complete (collective; rank 0 writes).

    Weights are sharded safetensors in ``dtype``, one shard in memory at a time; config, tokenizer and the like are
    ``source_dir``'s (``folders.copy_sidecar``). Raises ConversionError, on every rank, if the folder exists and
    ``overwrite`` is off, it is or holds ``source_dir``, the disk is too small, or rank 0 fails to write.
    """
    out_dir = Path(out_dir)

    def write(stream: Iterator[tuple[str, Tensor]]) -> None:
        try:
            check_apart(out_dir, Path(source_dir), inside=True)
            shape = read_shape(source_dir)
            with new_folder(out_dir, overwrite, shape.parameters() * dtype.itemsize) as folder:
                write_weights(folder, stream, dict(shape.hf_tensors()), dtype, max_shard_bytes)
                copy_sidecar(Path(source_dir), folder, dtype)
        except OSError as error:
            raise ConversionError(f"cannot write {out_dir}: {error}") from error

    on_stream(World(), stream, write, unexpected=ConversionError)
