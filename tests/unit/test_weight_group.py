"""The group that weights are broadcast over, on GPUs: whose wait ends first, over which interface, and hosts that are
silent. NCCL is a double that enforces what torch's ProcessGroupNCCL.cpp and NCCL do."""

from __future__ import annotations

import os
import socket
import threading
import time
from datetime import timedelta
from types import SimpleNamespace
from typing import Any, ClassVar

import psutil
import pytest
import torch
import torch.distributed as dist

from nemo_tropd.parallel.addresses import host_name, interface_of
from nemo_tropd.rollout.vllm.wire import Bucket, JoinGroup
from nemo_tropd.rollout.weights import senders
from nemo_tropd.rollout.weights.senders import WeightGroup, open_store

WAIT_S = 0.3


class Nccl:
    """torch's ``ProcessGroupNCCL``: a timeout or an error that its watchdog sees first ends the process."""

    connects, ends = True, True  # whether the first call comes back, and broadcasts end
    made: ClassVar[list[Nccl]] = []

    class Options:
        _timeout = timedelta(minutes=10)

    def __init__(self, store: Any, rank: int, size: int, options: Any) -> None:
        # Read here and never again (TORCH_NCCL_ASYNC_ERROR_HANDLING, 3: the watchdog throws, which ends the process).
        self.watchdog_throws = os.environ.get("TORCH_NCCL_ASYNC_ERROR_HANDLING", "3") not in ("0", "2")
        self.timeout_s, self.aborted, self.broadcasts = options._timeout.total_seconds(), False, 0
        self.interface = os.environ.get("NCCL_SOCKET_IFNAME")
        Nccl.made.append(self)

    def broadcast(self, flat: torch.Tensor, source: int) -> Any:
        while not Nccl.connects:  # ncclCommInitRank: no timeout
            time.sleep(0.05)
        self.broadcasts += 1
        return SimpleNamespace(wait=lambda: None)  # orders the current stream behind the broadcast, nothing else

    def abort(self) -> None:
        self.aborted = True


@pytest.fixture
def place(monkeypatch: pytest.MonkeyPatch) -> JoinGroup:
    """A place in a group, on a machine with a GPU."""

    def event() -> Any:
        # Broadcasts that do not end block the stream until the communicator is aborted; the first connects.
        return SimpleNamespace(query=lambda: Nccl.ends or Nccl.made[-1].broadcasts < 2 or Nccl.made[-1].aborted)

    for name in ("zeros", "empty"):
        real = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *a, real=real, device=None, **k: real(*a, **k))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(record_event=event))
    monkeypatch.setattr(dist, "ProcessGroupNCCL", Nccl, raising=False)
    monkeypatch.setattr(Nccl, "connects", True)
    monkeypatch.setattr(Nccl, "ends", True)
    monkeypatch.setattr(Nccl, "made", [])
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "")  # what the test leaves in it goes
    monkeypatch.delenv("NCCL_SOCKET_IFNAME")
    monkeypatch.delenv("TORCH_NCCL_ASYNC_ERROR_HANDLING", raising=False)
    return JoinGroup("127.0.0.1", 0, "weights", 1, 2, WAIT_S)


def group(place: JoinGroup) -> WeightGroup:
    return WeightGroup(open_store("127.0.0.1", 5.0), place, own_address="127.0.0.1")


def loopback() -> str:
    """The name of this machine's interface with 127.0.0.1."""
    found = psutil.net_if_addrs().items()
    return next(name for name, of in found if any(a.family == socket.AF_INET and a.address == "127.0.0.1" for a in of))


def test_our_wait_ends_before_nccls_watchdog(place: JoinGroup, monkeypatch: pytest.MonkeyPatch) -> None:
    made = group(place)
    (nccl,) = Nccl.made
    assert nccl.timeout_s > WAIT_S and not nccl.watchdog_throws
    assert "TORCH_NCCL_ASYNC_ERROR_HANDLING" not in os.environ  # the trainer's own groups keep theirs
    monkeypatch.setattr(Nccl, "ends", False)
    began = time.monotonic()
    with pytest.raises(RuntimeError, match=r"did not end within 0.3 s"):
        made.receive(Bucket(["w"], [[4]], "float32"))
    assert WAIT_S <= time.monotonic() - began < nccl.timeout_s + 1 and nccl.aborted
    made.close()


def test_a_bucket_is_received_whole(place: JoinGroup) -> None:
    made = group(place)
    received = made.receive(Bucket(["a", "b"], [[2, 2], [3]], "bfloat16"))
    assert {name: (tuple(t.shape), t.dtype) for name, t in received.items()} == {
        "a": ((2, 2), torch.bfloat16),
        "b": ((3,), torch.bfloat16),
    }
    made.close()


def test_a_rank_that_does_not_connect_is_not_waited_for_forever(
    place: JoinGroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Nccl, "connects", False)
    result: list[BaseException] = []

    def make() -> None:
        try:
            group(place)
        except RuntimeError as error:
            result.append(error)

    thread = threading.Thread(target=make, daemon=True)
    thread.start()
    thread.join(5.0)
    Nccl.connects = True  # lets the double's thread go
    assert result and "could not connect all ranks within 0.3 s" in str(result[0])


def test_nccl_takes_the_interface_of_the_address(place: JoinGroup, monkeypatch: pytest.MonkeyPatch) -> None:
    name = loopback()
    assert interface_of("127.0.0.1") == name and interface_of("203.0.113.7") == ""
    group(place).close()
    assert Nccl.made[-1].interface == f"={name}" and f"({'127.0.0.1'})" in host_name()
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "ib0")  # the user's stays
    group(place).close()
    assert Nccl.made[-1].interface == "ib0"
    monkeypatch.delenv("NCCL_SOCKET_IFNAME")
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 8)
    senders._choose_interface("127.0.0.1")  # NCCL has chosen one for the ranks' own groups by now
    assert "NCCL_SOCKET_IFNAME" not in os.environ
