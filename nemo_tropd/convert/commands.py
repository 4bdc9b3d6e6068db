"""Conversion of checkpoint folders in both directions, with a manifest of the source's and the output's files."""

from __future__ import annotations

import hashlib
import importlib.metadata
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nemo_tropd.convert.families import read_shape
from nemo_tropd.convert.folders import SIDECAR, check_free_to_write, copy_sidecar, new_folder, write_hf_sidecar
from nemo_tropd.convert.hf_files import MAX_SHARD_BYTES, write_weights
from nemo_tropd.convert.hf_import import HfSource
from nemo_tropd.convert.layouts import split
from nemo_tropd.convert.megatron_files import MegatronSource, write_checkpoint
from nemo_tropd.files import write_json

Progress = Callable[[int, int], None]  # bytes done, bytes in all
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
MANIFEST = "manifest.json"


def hf_to_megatron(
    hf_dir: str | Path,
    out_dir: str | Path,
    *,
    tensor_parallel: int = 1,
    pipeline_parallel: int = 1,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> None:
    """Write ``hf_dir`` as a distributed checkpoint (see ``megatron_files``), which loads at any degrees.

    ``tensor_parallel`` x ``pipeline_parallel`` is the intended layout: checked against the architecture, and the blocks
    on disk are cut for it. ``dtype`` defaults to the embedding's. One block is in memory at a time. Raises
    ConversionError before anything is written if the source is incomplete, ``out_dir`` exists or the disk is too small.
    """
    hf_dir, out_dir = Path(hf_dir), Path(out_dir)
    shape = read_shape(hf_dir)
    shape.check_layout(tensor_parallel, pipeline_parallel)
    source = HfSource(hf_dir, shape)
    dtype = dtype or source.checkpoint.dtype(next(shape.hf_tensors())[0])
    total = shape.parameters() * dtype.itemsize
    with new_folder(out_dir, overwrite, total) as folder:
        write_checkpoint(
            folder, source, shape, dtype, tensor_parallel=tensor_parallel, progress=_counter(progress, total)
        )
        write_hf_sidecar(folder, hf_dir)
        layout = {"tensor_parallel": tensor_parallel, "pipeline_parallel": pipeline_parallel}
        _write_manifest(folder, "hf-to-megatron", hf_dir, dtype, layout)


def megatron_to_hf(
    checkpoint_dir: str | Path,
    out_dir: str | Path,
    *,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: Progress | None = None,
) -> None:
    """Write a distributed checkpoint, converted or saved by training at any degrees, as a Hugging Face folder.

    Config and tokenizer come from the checkpoint's ``hf`` folder. ``dtype`` defaults to the stored one. One file of at
    most ``max_shard_bytes`` is in memory at a time. Raises ConversionError before anything is written if the checkpoint
    is incomplete, ``out_dir`` exists or the disk is too small.
    """
    checkpoint_dir, out_dir = Path(checkpoint_dir), Path(out_dir)
    check_free_to_write(out_dir, overwrite, 0)
    source = MegatronSource(checkpoint_dir)
    shape = source.shape
    dtype = dtype or source.dtype
    total = shape.parameters() * dtype.itemsize
    count = _counter(progress, total)

    def stream() -> Iterator[tuple[str, Tensor]]:
        for row in shape.rows():
            for name, tensor in split(row, source.read_full(row), shape):
                yield name, tensor
                count(tensor.numel() * dtype.itemsize)

    with new_folder(out_dir, overwrite, total) as folder:
        write_weights(folder, stream(), dict(shape.hf_tensors()), dtype, max_shard_bytes)
        copy_sidecar(checkpoint_dir / SIDECAR, folder, dtype)
        _write_manifest(folder, "megatron-to-hf", checkpoint_dir, dtype, {})


def _counter(progress: Progress | None, total: int) -> Callable[[int], None]:
    done = 0

    def count(size: int) -> None:
        nonlocal done
        done += size
        if progress is not None:
            progress(done, total)

    return count


def _write_manifest(folder: Path, direction: str, source: Path, dtype: torch.dtype, layout: dict[str, int]) -> None:
    manifest: dict[str, Any] = {
        "made_by": f"nemo_tropd {importlib.metadata.version('nemo_tropd')} {direction}",
        "dtype": str(dtype).removeprefix("torch."),
        **layout,
        "source": {"name": source.resolve().name, "files": _hashes(source)},
        "files": _hashes(folder),
    }
    write_json(folder / MANIFEST, manifest)


def _hashes(folder: Path) -> dict[str, dict[str, int | str]]:
    """Size and SHA-256 of every file under ``folder`` except its manifest."""
    hashes: dict[str, dict[str, int | str]] = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != MANIFEST:
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            hashes[str(path.relative_to(folder))] = {"bytes": path.stat().st_size, "sha256": digest}
    return hashes
