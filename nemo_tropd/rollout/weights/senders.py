"""How a bucket of weights reaches an engine: ``SharedMemory`` on this machine, ``WeightGroup`` on engine hosts.

In shared memory a bucket is a safetensors file, which the engine maps: nothing is copied through a pipe, and the
trainer holds at most one bucket beside its own weights. To engine hosts it is broadcast as one flat tensor of bytes, so
no dtype is rounded on the way, over a group in which the trainer's rank 0 is 0 and engine host I is I + 1: NCCL if the
ranks have GPUs, else gloo. It is no part of the trainer's default group, so engine hosts come and go without it.
Source: torch 2.11 and 2.13, torch/csrc/distributed/c10d/{ProcessGroupGloo,ProcessGroupNCCL,TCPStore}.cpp.
"""

from __future__ import annotations

import math
import os
import re
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor

from nemo_tropd.parallel.addresses import interface_of
from nemo_tropd.rollout.engine import DTYPES, EngineError, WeightStreamError
from nemo_tropd.rollout.vllm.in_process import environment
from nemo_tropd.rollout.vllm.wire import Bucket, JoinGroup

_FILE_PREFIX = "nemo_tropd-weights-"
_STALE_AFTER_S = 60.0
_SHARED = Path("/dev/shm")
_CLOSE_TIMEOUT_S = 2.0
_POLL_S = 0.001
Tensors = Mapping[str, Tensor]


def describe(tensors: Tensors, path: str | None = None) -> Bucket:
    """What a receiver must know to take a bucket apart; all tensors have one dtype."""
    held = list(tensors.values())
    dtype = next(name for name, dtype in DTYPES.items() if dtype == held[0].dtype)
    return Bucket(list(tensors), [list(t.shape) for t in held], dtype, path)


class SharedMemory:
    """Safetensors files in a folder of shared memory, named after this process; at most one exists at a time."""

    def __init__(self, folder: Path | None = None) -> None:
        """``folder`` is /dev/shm unless given; what processes that are gone have left there is removed. Raises
        EngineError when it is no folder that can be written to."""
        self.folder = folder or _SHARED
        if not (self.folder.is_dir() and os.access(self.folder, os.W_OK)):
            raise EngineError(f"weights are handed over in {self.folder}, which cannot be written to; name another one")
        for file in self.folder.glob(f"{_FILE_PREFIX}*.safetensors"):
            owner = re.match(rf"{_FILE_PREFIX}(\d+)-", file.name)
            if owner is None or Path(f"/proc/{owner.group(1)}").exists():
                continue
            with suppress(OSError):
                found = file.lstat()
                # Another container may share the folder but not the process numbers; its files live for seconds.
                if found.st_uid == os.getuid() and time.time() - found.st_mtime > _STALE_AFTER_S:
                    file.unlink()

    def send(self, tensors: Tensors, tell: Callable[[Bucket], None], confirm: Callable[[], object]) -> None:
        """Write one bucket, tell the engine, wait until it has ``confirm``\\ ed, and remove the file come what may."""
        size = sum(t.numel() * t.element_size() for t in tensors.values())
        free = shutil.disk_usage(self.folder).free
        if free < size + (1 << 20):
            raise EngineError(
                f"{self.folder} has {free >> 20} MiB free but a bucket of weights takes {size >> 20} MiB; enlarge it "
                "(docker run --shm-size), make buckets smaller, or name another folder"
            )
        handle, name = tempfile.mkstemp(prefix=f"{_FILE_PREFIX}{os.getpid()}-", suffix=".safetensors", dir=self.folder)
        try:
            os.close(handle)
            # Rows of one tensor may share its memory: safetensors saves of each what is its own.
            save_file({key: tensor.cpu().contiguous() for key, tensor in tensors.items()}, name)
            tell(describe(tensors, path=name))
            confirm()
        finally:
            Path(name).unlink(missing_ok=True)

    def close(self) -> None:
        """Nothing is left between two buckets."""


def open_store(address: str, timeout_s: float) -> dist.TCPStore:
    """The store where the group meets, on a free port of ``address`` alone (torch's default is every interface)."""
    listener = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_STREAM)
    listener.bind((address, 0))
    port, fd = listener.getsockname()[1], listener.detach()
    timeout = timedelta(seconds=timeout_s)
    return dist.TCPStore(address, port, is_master=True, wait_for_workers=False, timeout=timeout, master_listen_fd=fd)


class WeightGroup:
    """One rank's end of the group. Collective: every rank makes it, and gives the same broadcasts in the same order."""

    def __init__(self, store: dist.TCPStore, place: JoinGroup, *, own_address: str) -> None:
        """``place.rank`` is this rank's. Raises RuntimeError if the others do not come within ``place.timeout_s``."""
        self._store = store  # the trainer's serves the others for as long as it is held
        self._timeout_s = place.timeout_s
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._pending: list[Any] = []
        meeting, timeout = dist.PrefixStore(place.prefix, store), timedelta(seconds=place.timeout_s)
        self._group: Any
        if self.device.type == "cuda":
            _choose_interface(own_address)
            # This process waits no longer than the timeout, and then names who is silent. NCCL's watchdog would end the
            # process: its timeout comes later, and errors are left to us.
            options = dist.ProcessGroupNCCL.Options()
            options._timeout = 2 * timeout
            with environment({"TORCH_NCCL_ASYNC_ERROR_HANDLING": "0"}):
                self._group = dist.ProcessGroupNCCL(meeting, place.rank, place.size, options)
            self._meet()
        else:
            gloo = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
            gloo._timeout = timeout
            gloo._devices = [dist.ProcessGroupGloo.create_device(hostname=own_address)]
            self._group = dist.ProcessGroupGloo(meeting, place.rank, place.size, gloo)

    @classmethod
    def join(cls, place: JoinGroup, *, own_address: str) -> WeightGroup:
        """An engine host's end."""
        timeout = timedelta(seconds=place.timeout_s)
        store = dist.TCPStore(place.address, place.port, is_master=False, wait_for_workers=False, timeout=timeout)
        return cls(store, place, own_address=own_address)

    def send(self, tensors: Tensors, tell: Callable[[Bucket], None], confirm: Callable[[], object]) -> None:
        """Rank 0: broadcast one bucket. ``confirm`` waits for every host's answer: waiting for the broadcast would
        neither see a host's end nor know whose it was. Raises RuntimeError if the broadcast fails."""
        tell(describe(tensors))
        flat, at = torch.empty(sum(t.nbytes for t in tensors.values()), dtype=torch.uint8, device=self.device), 0
        for tensor in tensors.values():  # from where it is, without another copy of it
            part = flat[at : at + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            part.copy_(tensor, non_blocking=self.device.type == "cuda")
            at += tensor.nbytes
        self._start(flat)
        confirm()
        self._finish()

    def receive(self, bucket: Bucket) -> dict[str, Tensor]:
        """A host: the announced bucket's tensors, in memory of their own, since engines keep them. Raises
        WeightStreamError if it describes none, RuntimeError if the broadcast fails or takes too long."""
        sizes, dtype = [math.prod(shape) for shape in bucket.shapes], DTYPES.get(bucket.dtype)
        negative = any(n < 0 for shape in bucket.shapes for n in shape)
        if dtype is None or len(sizes) != len(bucket.names) or negative:
            raise WeightStreamError("malformed weight-bucket header from rank 0")
        flat = torch.empty(dtype.itemsize * sum(sizes), dtype=torch.uint8, device=self.device)
        self._start(flat)
        self._finish()
        parts = flat.view(dtype).split(sizes)
        return {n: part.view(s) for n, part, s in zip(bucket.names, parts, bucket.shapes, strict=True)}

    def close(self) -> None:
        """Leave the group without waiting for anybody; a broadcast that still runs is given up."""
        if self._group is None:
            return
        if self.device.type == "cuda":
            self._group.abort()
        # Destroying a gloo group waits for its broadcasts, and with a silent rank that takes until their timeout: it is
        # left to a thread then. A moment is allowed, since a thread that is still at it when Python ends aborts.
        left: list[Any] = [*self._pending, self._group, self._store]
        self._pending, self._group, self._store = [], None, None  # type: ignore[assignment]
        last = threading.Thread(target=left.clear, daemon=True)
        last.start()
        last.join(_CLOSE_TIMEOUT_S)

    def _meet(self) -> None:
        """NCCL connects at the first broadcast, in a call that waits forever for a rank that is gone."""
        met: list[BaseException | None] = []

        def broadcast(flat: Tensor) -> None:
            try:
                self._start(flat)
                met.append(None)
            except BaseException as error:
                met.append(error)

        flat = torch.zeros(1, dtype=torch.uint8, device=self.device)
        thread = threading.Thread(target=broadcast, args=(flat,), daemon=True)
        thread.start()
        thread.join(self._timeout_s)
        if not met:
            raise RuntimeError(f"NCCL could not connect all ranks within {self._timeout_s:g} s")
        if met[0] is not None:
            raise met[0]
        self._finish()

    def _start(self, flat: Tensor) -> None:
        self._pending = [self._group.broadcast(flat, 0), flat]

    def _finish(self) -> None:
        self._pending[0].wait()
        if self.device.type == "cuda":  # there wait() only orders the stream behind the broadcast
            done, until = torch.cuda.current_stream().record_event(), time.monotonic() + self._timeout_s
            while not done.query():
                if time.monotonic() > until:
                    self.close()  # else whatever waits for the device next would wait forever
                    raise RuntimeError(f"a broadcast of weights did not end within {self._timeout_s:g} s")
                time.sleep(_POLL_S)
        self._pending = []


def _choose_interface(own_address: str) -> None:
    """Have NCCL use the interface of ``own_address``, unless it is told another or, as a rank of several, uses one."""
    several = dist.is_initialized() and dist.get_world_size() > 1
    if not several and (name := interface_of(own_address)):
        os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={name}")  # the = asks for this very name
