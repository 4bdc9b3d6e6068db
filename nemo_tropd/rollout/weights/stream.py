"""The trainer's side of a weight refresh: a stream of Hugging Face tensors, checked and cut into safetensors buckets.

A bucket is a file in shared memory: the engine maps it, so nothing is copied through a pipe, and the trainer holds at
most one bucket beside its own weights.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from nemo_tropd.rollout.engine import EngineError, WeightStreamError

_FILE_PREFIX = "nemo_tropd-weights-"
_STALE_AFTER_S = 60.0
_NAMED_AT_MOST = 8


def checkpoint_shapes(model_dir: Path) -> tuple[dict[str, tuple[int, ...]], frozenset[str]]:
    """Shapes of the tensors of a Hugging Face checkpoint by name, and the names a stream may leave out.

    Those are the head of a tied model and rotary frequencies that old checkpoints stored. Raises EngineError when there
    is no readable safetensors file.
    """
    files = sorted(model_dir.glob("*.safetensors"))
    if not files:
        raise EngineError(f"{model_dir} holds no safetensors file; give a Hugging Face checkpoint in that format")
    shapes: dict[str, tuple[int, ...]] = {}
    for file in files:
        try:
            with safe_open(str(file), framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 - not a mapping
                    shapes[name] = tuple(tensors.get_slice(name).get_shape())
        except SafetensorError as error:
            raise EngineError(f"{file} is not a whole safetensors file ({error}); fetch or convert it again") from error
    tied = bool(json.loads((model_dir / "config.json").read_text()).get("tie_word_embeddings", False))
    optional = {name for name in shapes if name.endswith("rotary_emb.inv_freq")}
    if tied:
        optional.add("lm_head.weight")
        shapes.setdefault("lm_head.weight", shapes.get("model.embed_tokens.weight", ()))
    return shapes, frozenset(optional)


def checked_stream(
    stream: Iterable[tuple[str, Tensor]], shapes: dict[str, tuple[int, ...]], optional: frozenset[str]
) -> Iterator[tuple[str, Tensor]]:
    """Pass ``stream`` on; raise WeightStreamError when it does not hold exactly the tensors of ``shapes``."""
    missing = dict.fromkeys(name for name in shapes if name not in optional)
    seen: set[str] = set()
    for name, tensor in stream:
        if name not in shapes:
            raise WeightStreamError(f"the stream holds {name}, which the engine's model does not have")
        if name in seen:
            raise WeightStreamError(f"the stream holds {name} twice")
        if tuple(tensor.shape) != shapes[name]:
            raise WeightStreamError(
                f"{name} comes as {list(tensor.shape)} but the engine's model has {list(shapes[name])}"
            )
        seen.add(name)
        missing.pop(name, None)
        yield name, tensor
    if missing:
        named = ", ".join(list(missing)[:_NAMED_AT_MOST])
        more = f" and {len(missing) - _NAMED_AT_MOST} more" if len(missing) > _NAMED_AT_MOST else ""
        raise WeightStreamError(f"the stream ended without {len(missing)} of the model's tensors: {named}{more}")


def buckets(
    stream: Iterable[tuple[str, Tensor]], *, bucket_bytes: int, dtype: torch.dtype
) -> Iterator[tuple[dict[str, Tensor], int]]:
    """Group tensors, cast to ``dtype``, into buckets of at most ``bucket_bytes`` (or one tensor, if it is larger).

    Yields (tensors by name, bytes). A tensor of the stream must stay as it is until its bucket has been consumed.
    """
    held: dict[str, Tensor] = {}
    held_bytes = 0
    for name, tensor in stream:
        size = tensor.numel() * dtype.itemsize
        if held and held_bytes + size > bucket_bytes:
            yield held, held_bytes
            held, held_bytes = {}, 0
        held[name] = tensor.detach().to(device="cpu", dtype=dtype).contiguous()
        held_bytes += size
    if held:
        yield held, held_bytes


class BucketFiles:
    """Safetensors files in a folder of shared memory, named after this process; at most one exists at a time."""

    def __init__(self, folder: Path | None = None) -> None:
        """``folder`` is /dev/shm unless given. Raises EngineError when it is no folder that can be written to.

        Removes what processes that are gone have left there.
        """
        self.folder = folder or Path("/dev/shm")
        if not (self.folder.is_dir() and os.access(self.folder, os.W_OK)):
            raise EngineError(
                f"weights are handed over in {self.folder}, which cannot be written to; name another folder"
            )
        self._remove_stale()
        self._current: Path | None = None

    def send(self, tensors: dict[str, Tensor], size: int, receive: Callable[[str], None]) -> None:
        """Write one bucket of ``size`` bytes, have it received, and remove it whatever happens."""
        free = shutil.disk_usage(self.folder).free
        if free < size + (1 << 20):
            raise EngineError(
                f"{self.folder} has {free >> 20} MiB free but a bucket of weights takes {size >> 20} MiB; enlarge it "
                "(docker run --shm-size), make buckets smaller, or name another folder"
            )
        handle, name = tempfile.mkstemp(prefix=f"{_FILE_PREFIX}{os.getpid()}-", suffix=".safetensors", dir=self.folder)
        os.close(handle)
        self._current = Path(name)
        try:
            save_file(tensors, name)
            receive(name)
        finally:
            self.close()

    def close(self) -> None:
        """Remove the file that an interrupted ``send`` may have left."""
        if self._current is not None:
            self._current.unlink(missing_ok=True)
            self._current = None

    def _remove_stale(self) -> None:
        for file in self.folder.glob(f"{_FILE_PREFIX}*.safetensors"):
            owner = re.match(rf"{_FILE_PREFIX}(\d+)-", file.name)
            if owner is None or Path(f"/proc/{owner.group(1)}").exists():
                continue
            try:
                # Another container may share the folder but not the process numbers; its files live for seconds.
                if time.time() - file.stat().st_mtime > _STALE_AFTER_S:
                    file.unlink()
            except FileNotFoundError:
                continue
