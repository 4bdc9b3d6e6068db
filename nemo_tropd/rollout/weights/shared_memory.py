"""Weights to an engine on this machine: each bucket a safetensors file in shared memory.

The engine maps the file, so nothing is copied through a pipe, and the trainer holds at most one bucket beside its own
weights.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from nemo_tropd.rollout.engine import EngineError
from nemo_tropd.rollout.vllm.wire import Bucket
from nemo_tropd.rollout.weights.broadcast import describe

_FILE_PREFIX = "nemo_tropd-weights-"
_STALE_AFTER_S = 60.0


def read_bucket(path: str) -> Iterator[tuple[str, Tensor]]:
    """(Hugging Face name, tensor) of every tensor in the file."""
    with safe_open(path, framework="pt", device="cpu") as bucket:
        for name in bucket.keys():  # noqa: SIM118 - not a mapping
            # No copy is made although a layer is only put together once its last tensor has come, maybe two buckets
            # later: the sender never writes to a file again, and a removed file lives as long as it is mapped.
            yield name, bucket.get_tensor(name)


class SharedMemory:
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

    def send(self, tensors: Mapping[str, Tensor], tell: Callable[[Bucket], None], confirm: Callable[[], None]) -> None:
        """Write one bucket, tell the engine, wait until it has ``confirm``\\ ed, and remove the file come what may."""
        size = sum(t.numel() * t.element_size() for t in tensors.values())
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
            save_file(dict(tensors), name)
            tell(describe(tensors, path=name))
            confirm()
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
            with suppress(OSError):
                found = file.lstat()
                # Another container may share the folder but not the process numbers; its files live for seconds.
                if found.st_uid == os.getuid() and time.time() - found.st_mtime > _STALE_AFTER_S:
                    file.unlink()
