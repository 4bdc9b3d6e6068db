"""Weights to engine hosts: broadcast over a process group in which the trainer's rank 0 is 0, engine host I is I + 1.

It is no part of the trainer's default group, so engine hosts come and go without it. NCCL if the ranks have GPUs,
else gloo. A bucket travels as one flat tensor of bytes, so no dtype is rounded on the way.
Source: torch 2.11 and 2.13, torch/csrc/distributed/c10d/{ProcessGroupGloo,ProcessGroupNCCL,TCPStore}.cpp.
"""

from __future__ import annotations

import math
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from nemo_tropd.rollout.engine import DTYPES, WeightStreamError
from nemo_tropd.rollout.vllm.wire import Bucket

_CLOSE_TIMEOUT_S = 2.0


def open_store(address: str, timeout_s: float) -> dist.TCPStore:
    """The store where the group meets, on a free port of ``address`` alone (torch's default is every interface)."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.bind((address, 0))
    port = listener.getsockname()[1]
    return dist.TCPStore(
        address,
        port,
        is_master=True,
        wait_for_workers=False,
        timeout=timedelta(seconds=timeout_s),
        master_listen_fd=listener.detach(),
    )


def join_store(host: str, port: int, timeout_s: float) -> dist.TCPStore:
    """The trainer's store, seen from an engine host."""
    return dist.TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=timeout_s))


class WeightGroup:
    """One rank's end of the group. Collective: every rank makes it, and gives the same broadcasts in the same order."""

    def __init__(
        self,
        store: dist.TCPStore,
        *,
        prefix: str,
        rank: int,
        size: int,
        device: str,
        own_address: str,
        timeout_s: float,
    ) -> None:
        """Meet the others. ``device``: cpu or cuda, the same on all. ``own_address``: where gloo listens for them.
        ``prefix`` of the store's keys: hosts are told it over authenticated connections, strangers cannot guess it.

        Raises RuntimeError if a rank does not come within ``timeout_s``.
        """
        self._store = store  # the trainer's serves the others for as long as it is held
        self.device = torch.device(device)
        self._pending: list[Any] = []
        meeting = dist.PrefixStore(prefix, store)
        timeout = timedelta(seconds=timeout_s)
        if self.device.type == "cuda":
            options = dist.ProcessGroupNCCL.Options()
            options._timeout = timeout
            self._group: Any = dist.ProcessGroupNCCL(meeting, rank, size, options)
        else:
            gloo = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
            gloo._timeout = timeout
            gloo._devices = [dist.ProcessGroupGloo.create_device(hostname=own_address)]
            self._group = dist.ProcessGroupGloo(meeting, rank, size, gloo)

    def start_broadcast(self, flat: Tensor) -> None:
        """Start to send rank 0's ``flat`` (uint8, on ``device``) into the others' of the same size."""
        self._pending = [self._group.broadcast(flat, 0), flat]

    def finish_broadcast(self) -> None:
        """Wait for the broadcast. Raises RuntimeError if it failed or took longer than the group's timeout."""
        self._pending[0].wait()
        if self.device.type == "cuda":
            torch.cuda.current_stream().synchronize()  # wait() only orders the stream behind the broadcast
        self._pending = []

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


class Broadcast:
    """Rank 0's side: weights to all engine hosts at once."""

    def __init__(self, group: WeightGroup) -> None:
        self.group = group

    def send(self, tensors: Mapping[str, Tensor], tell: Callable[[Bucket], None], confirm: Callable[[], None]) -> None:
        """Broadcast one bucket. Raises RuntimeError if the broadcast fails, or what ``confirm`` raises.

        ``confirm`` waits for every host's answer: waiting for the broadcast would neither see a host's end nor know
        whose it was.
        """
        tell(describe(tensors))
        self.group.start_broadcast(flatten(tensors, self.group.device))
        confirm()
        self.group.finish_broadcast()

    def close(self) -> None:
        """Leave the group."""
        self.group.close()


def describe(tensors: Mapping[str, Tensor], path: str | None = None) -> Bucket:
    """What a receiver must know to take a bucket apart; all tensors have one dtype."""
    dtype = next(iter(tensors.values())).dtype
    shapes = [list(t.shape) for t in tensors.values()]
    return Bucket(list(tensors), shapes, next(name for name, known in DTYPES.items() if known == dtype), path)


def flatten(tensors: Mapping[str, Tensor], device: torch.device) -> Tensor:
    """uint8 [bytes] on ``device``: contiguous tensors of one dtype, one after the other."""
    return torch.cat([t.reshape(-1).view(torch.uint8) for t in tensors.values()]).to(device)


def empty_bucket(bucket: Bucket, device: torch.device) -> Tensor:
    """uint8 [bytes] for what is announced; a new one each time, since engines keep views of it.

    Raises WeightStreamError if it describes no bucket.
    """
    sizes = [math.prod(shape) for shape in bucket.shapes]
    negative = any(n < 0 for shape in bucket.shapes for n in shape)
    if bucket.dtype not in DTYPES or len(sizes) != len(bucket.names) or negative:
        raise WeightStreamError("malformed weight-bucket header from rank 0")
    return torch.empty(DTYPES[bucket.dtype].itemsize * sum(sizes), dtype=torch.uint8, device=device)


def take_apart(bucket: Bucket, flat: Tensor) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of every tensor in a bucket, as views of ``flat``."""
    dtype, at = DTYPES[bucket.dtype], 0
    for name, shape in zip(bucket.names, bucket.shapes, strict=True):
        size = dtype.itemsize * math.prod(shape)
        yield name, flat[at : at + size].view(dtype).view(shape)
        at += size
