"""Safetensors files, read and written one tensor at a time, and the folder of a Hugging Face checkpoint.

Format: 8 bytes little-endian header length, a JSON header {name: {dtype, shape, data_offsets}}, then the bytes.
Reading and writing by hand keeps memory at one tensor: the library maps whole files, and writes a file from tensors
all in memory.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from nemo_tropd.convert.families import ConversionError, ModelShape

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


class SafetensorsFile:
    """One file's header, checked against the file's length when opened. Raises ConversionError for a damaged file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            length = path.stat().st_size
        except FileNotFoundError:
            raise ConversionError(f"{path} does not exist, though the checkpoint's index names it") from None
        with path.open("rb") as file:
            start = file.read(8)
            header_length = int.from_bytes(start, "little")
            if len(start) < 8 or header_length > length - 8:
                raise ConversionError(f"{path} is truncated: {length} bytes do not hold its header; fetch it again")
            try:
                header = json.loads(file.read(header_length))
            except ValueError as error:
                raise ConversionError(f"{path} is not a safetensors file: its header is not JSON ({error})") from None
        header.pop("__metadata__", None)
        self.entries: dict[str, dict[str, Any]] = header
        self.data_start = 8 + header_length
        expected = self.data_start + max((e["data_offsets"][1] for e in header.values()), default=0)
        if expected > length:
            raise ConversionError(f"{path} is truncated: {length} bytes where its header promises {expected}")

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.entries[name]["shape"])

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        """The tensor, or a range of its rows, in its own dtype."""
        entry = self.entries[name]
        dtype = DTYPES.get(entry["dtype"])
        if dtype is None:
            raise ConversionError(f"{self.path}: {name} is {entry['dtype']}; understood are {', '.join(DTYPES)}")
        shape = self.shape(name)
        begin, end = entry["data_offsets"]
        if rows is not None:
            first, last, _ = rows.indices(shape[0])
            shape = (max(0, last - first), *shape[1:])
            begin += first * math.prod(shape[1:]) * dtype.itemsize
            end = begin + math.prod(shape) * dtype.itemsize
        buffer = torch.empty(end - begin, dtype=torch.uint8)
        with self.path.open("rb") as file:
            file.seek(self.data_start + begin)
            got = file.readinto(buffer.numpy()) if end > begin else 0  # type: ignore[arg-type]
        if got != end - begin:
            raise ConversionError(f"{self.path} is truncated: {name} ended after {got} of {end - begin} bytes")
        return buffer.view(dtype).view(shape)


class HfCheckpoint:
    """The weights of a Hugging Face folder, checked on opening against the names and shapes ``shape`` asks for.

    Raises ConversionError naming a missing file or tensor, a tensor nobody asks for, both shapes where they differ,
    and a truncated file.
    """

    def __init__(self, directory: str | Path, shape: ModelShape) -> None:
        self.directory = Path(directory)
        self._files: dict[str, SafetensorsFile] = {}
        for path in _weight_files(self.directory):
            file = SafetensorsFile(path)
            self._files.update(dict.fromkeys(file.entries, file))
        wanted = dict(shape.hf_tensors())
        missing = [name for name in wanted if name not in self._files]
        if missing:
            raise ConversionError(f"{self.directory} lacks {len(missing)} of {len(wanted)} tensors: {_some(missing)}")
        for name, expected in wanted.items():
            found = self._files[name].shape(name)
            if found != expected:
                raise ConversionError(
                    f"{self.directory}: {name} has shape {list(found)} where config.json asks for {list(expected)}"
                )
        # A tied head is stored by some writers; rotary buffers are computed anew.
        extra = [n for n in self._files if n not in wanted and n != "lm_head.weight" and "rotary_emb" not in n]
        if extra:
            raise ConversionError(
                f"{self.directory} holds {len(extra)} tensors that a {shape.family} model has no place for: "
                f"{_some(extra)}"
            )

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        """The tensor, or a range of its rows, in the dtype it is stored in."""
        return self._files[name].read(name, rows)

    def dtype(self, name: str) -> torch.dtype:
        return DTYPES[self._files[name].entries[name]["dtype"]]


class SafetensorsWriter:
    """A set of files laid out in advance, so that tensors can arrive one at a time and in any order.

    ``tensors`` gives name and shape of all of them; files hold at most ``max_shard_bytes`` each (a larger tensor has a
    file alone). ``close`` writes the index and raises ConversionError where a tensor never came.
    """

    def __init__(
        self,
        directory: Path,
        tensors: Iterable[tuple[str, tuple[int, ...]]],
        dtype: torch.dtype,
        max_shard_bytes: int = 5 * 10**9,
    ) -> None:
        self.directory = directory
        self.dtype = dtype
        self._shards: list[dict[str, tuple[int, ...]]] = []
        self._places: dict[str, tuple[Path, int, tuple[int, ...]]] = {}
        used = max_shard_bytes
        for name, shape in tensors:
            size = math.prod(shape) * dtype.itemsize
            if not self._shards or used + size > max_shard_bytes:
                self._shards.append({})
                used = 0
            self._shards[-1][name] = shape
            used += size
        for number, shard in enumerate(self._shards, 1):
            name = SINGLE if len(self._shards) == 1 else f"model-{number:05d}-of-{len(self._shards):05d}.safetensors"
            self._start_file(directory / name, shard)
        self._waiting = set(self._places)
        self._open: tuple[Path, BinaryIO] | None = None

    @property
    def total_bytes(self) -> int:
        return sum(math.prod(shape) * self.dtype.itemsize for _, _, shape in self._places.values())

    def write(self, name: str, tensor: Tensor) -> None:
        """Put the tensor, cast to the writer's dtype, at its place."""
        if name not in self._places:
            raise ConversionError(f"{name} is not a tensor of this checkpoint")
        path, offset, shape = self._places[name]
        if tuple(tensor.shape) != shape:
            raise ConversionError(f"{name} came with shape {list(tensor.shape)} where {list(shape)} was expected")
        if name not in self._waiting:
            raise ConversionError(f"{name} came twice")
        if self._open is None or self._open[0] != path:
            self._close_file()
            self._open = (path, path.open("r+b"))
        raw = tensor.detach().to("cpu", self.dtype).contiguous().view(-1).view(torch.uint8)
        self._open[1].seek(offset)
        self._open[1].write(raw.numpy().data)
        self._waiting.discard(name)

    def close(self) -> None:
        """Flush, write the index of more than one file, and check that every tensor came."""
        self._close_file()
        if self._waiting:
            raise ConversionError(f"{len(self._waiting)} tensors never came: {_some(sorted(self._waiting))}")
        if len(self._shards) > 1:
            weight_map = {name: path.name for name, (path, _, _) in self._places.items()}
            index = {"metadata": {"total_size": self.total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
            (self.directory / INDEX).write_text(json.dumps(index, indent=2) + "\n")

    def _start_file(self, path: Path, shard: Mapping[str, tuple[int, ...]]) -> None:
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for name, shape in shard.items():
            end = offset + math.prod(shape) * self.dtype.itemsize
            header[name] = {"dtype": DTYPE_NAMES[self.dtype], "shape": list(shape), "data_offsets": [offset, end]}
            offset = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # tensors start at a multiple of 8 bytes
        for name, shape in shard.items():
            self._places[name] = (path, 8 + len(text) + header[name]["data_offsets"][0], shape)
        with path.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(8 + len(text) + offset)

    def _close_file(self) -> None:
        if self._open is not None:
            self._open[1].flush()
            os.fsync(self._open[1].fileno())
            self._open[1].close()
            self._open = None


def _weight_files(directory: Path) -> list[Path]:
    index = directory / INDEX
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError) as error:
            raise ConversionError(f"{index} cannot be read: {error!r}") from None
        return [directory / name for name in names]
    if (directory / SINGLE).is_file():
        return [directory / SINGLE]
    raise ConversionError(
        f"{directory} holds neither {SINGLE} nor {INDEX}: only safetensors checkpoints are read, convert others first"
    )


def _some(names: list[str], count: int = 3) -> str:
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + more
