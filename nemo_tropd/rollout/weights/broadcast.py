"""The process group that weights are broadcast over: the trainer's leader is rank 0, engine host I is rank I + 1.

It is no part of the trainer's default group, so engine hosts come and go without it. NCCL where the ranks have GPUs,
else gloo. A bucket travels as one flat tensor of bytes, so no dtype is rounded on the way.
Source: torch 2.11 and 2.13, torch/csrc/distributed/c10d/{ProcessGroupGloo,ProcessGroupNCCL,TCPStore}.cpp.
"""

from __future__ import annotations

import math
import socket
import threading
from collections.abc import Iterator, Mapping
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from nemo_tropd.rollout.engine import WeightStreamError
from nemo_tropd.rollout.vllm.settings import DTYPES

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
    """The leader's store, seen from an engine host."""
    return dist.TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=timeout_s))


class WeightGroup:
    """One rank's end of the group. Collective: every rank makes it, and gives the same broadcasts in the same order."""

    def __init__(
        self, store: dist.TCPStore, *, rank: int, size: int, device: str, own_address: str, timeout_s: float
    ) -> None:
        """Meet the others. ``device``: cpu or cuda, the same on all. ``own_address``: where gloo listens for them.

        Raises RuntimeError where a rank does not come within ``timeout_s``.
        """
        self._store = store  # the leader's serves the others for as long as it is held
        self.device = torch.device(device)
        self._pending: list[Any] = []
        meeting = dist.PrefixStore("weights", store)
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
        """Start to send the leader's ``flat`` (uint8, on ``device``) into the others' of the same size."""
        self._pending = [self._group.broadcast(flat, 0), flat]

    def finish_broadcast(self) -> None:
        """Wait for the broadcast. Raises RuntimeError where it failed or took longer than the group's timeout."""
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


def describe_bucket(tensors: Mapping[str, Tensor], dtype: str) -> dict[str, Any]:
    """What a host must know to take a bucket apart."""
    return {"names": list(tensors), "shapes": [list(t.shape) for t in tensors.values()], "dtype": dtype}


def flatten(tensors: Mapping[str, Tensor], device: torch.device) -> Tensor:
    """uint8 [bytes] on ``device``: contiguous tensors of one dtype, one after the other."""
    return torch.cat([t.reshape(-1).view(torch.uint8) for t in tensors.values()]).to(device)


def empty_bucket(header: Mapping[str, Any], device: torch.device) -> Tensor:
    """uint8 [bytes] for the bucket that ``header`` describes; a new one each time, since engines keep views of it.

    Raises WeightStreamError for a header that describes no bucket.
    """
    try:
        width = DTYPES[header["dtype"]].itemsize
        sizes = [math.prod(shape) for shape in header["shapes"]]
        if len(sizes) != len(header["names"]) or any(n < 0 for shape in header["shapes"] for n in shape):
            raise ValueError
    except (KeyError, TypeError, ValueError) as error:
        raise WeightStreamError("the leader announced a bucket of weights that cannot be") from error
    return torch.empty(width * sum(sizes), dtype=torch.uint8, device=device)


def take_apart(header: Mapping[str, Any], flat: Tensor) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of every tensor in a bucket, as views of ``flat``."""
    dtype, at = DTYPES[header["dtype"]], 0
    for name, shape in zip(header["names"], header["shapes"], strict=True):
        size = dtype.itemsize * math.prod(shape)
        yield name, flat[at : at + size].view(dtype).view(shape)
        at += size
