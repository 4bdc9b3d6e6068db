"""Heartbeats of all ranks: names the ranks that do not respond when a collective fails or times out.

torch reports that a connection was closed or that an operation timed out, but not which rank is missing. So every rank
increments a counter under a key of its own in a store, from a thread, over a connection of its own. When a collective
fails, the ranks whose counter has stopped are the ones that do not respond; if the store itself does not respond, they
are the ranks of its host. A rank that gives up records that under its key, and the others do not report it as lost.
"""

from __future__ import annotations

import datetime
import os
import re
import signal
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import psutil
import torch.distributed as dist

from nemo_tropd.parallel.addresses import addresses_of, own_addresses
from nemo_tropd.parallel.topology import Topology

T = TypeVar("T")
_LEFT = "left:"
# gloo, and Megatron's checkpoint around it, raise plain RuntimeErrors with the library's name in the source's path.
_COLLECTIVE = re.compile(r"gloo|NCCL|TCPStore")


class PeerLost(RuntimeError):
    """Ranks did not respond: names them, their hosts, the time limit, and how to resume the run."""


@dataclass(frozen=True)
class Member:
    """One rank, as the others know it."""

    rank: int
    host: str
    hosts_store: bool


def answer_time_s(timeout_s: float) -> float:
    """Seconds of ``timeout_s`` reserved for finding out which ranks do not respond."""
    return min(15.0, timeout_s / 4)


def collective_timeout_s(timeout_s: float) -> float:
    """Seconds that a collective may take, so that the missing ranks are named within ``timeout_s``."""
    return timeout_s - answer_time_s(timeout_s)


class RollCall:
    """This rank's heartbeat, and its view of the others'. Start it collectively, on every rank."""

    def __init__(self, members: Sequence[Member], rank: int, prefix: str, timeout_s: float) -> None:
        """``timeout_s``: trainer.distributed_timeout_s. The store is the one torchrun names in MASTER_ADDR."""
        self.members, self.rank, self.timeout_s = list(members), rank, timeout_s
        # Two reads of the counters, a beat and a half apart, and one unanswered request fit in the answer time.
        self.beat_s = answer_time_s(timeout_s) / 5
        self._keys = [f"{prefix}/{m.rank}" for m in self.members]
        self._address = (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
        self._store = self._connect()
        self._asking = self._connect()  # a client handles one request at a time, and the heartbeat must not wait
        self._done = threading.Event()
        self._count = 0
        # One rank a host, and only with NCCL, whose collectives do not raise: not all ranks poll the store.
        self._watches = dist.get_backend() == "nccl" and os.environ.get("LOCAL_RANK", "0") == "0"
        self._seen: dict[int, tuple[str, float]] = {}
        self._told: set[int] = set()
        self._thread = threading.Thread(target=self._beat, name="roll-call", daemon=True)
        self._thread.start()

    @classmethod
    def start(cls, topology: Topology, timeout_s: float) -> RollCall | None:
        """Collective. None if this is the only rank."""
        if topology.world_size == 1 or "MASTER_ADDR" not in os.environ:
            return None
        address = os.environ["MASTER_ADDR"]
        own = Member(topology.rank, _host_name(), _is_this_machine(address))
        members = topology.gather_objects(own)
        prefix = topology.broadcast_object(f"nemo_tropd/roll_call/{uuid.uuid4().hex}")
        return cls(members, topology.rank, prefix, timeout_s)

    def stop(self) -> None:
        """End the thread."""
        self._done.set()

    def find(self) -> PeerLost:
        """Find out which ranks respond, within ``answer_time_s``, and mark this rank as gone."""
        first = self._ask(self._counts)
        if isinstance(first, list):
            time.sleep(1.5 * self.beat_s)
        second = self._ask(self._counts) if isinstance(first, list) else first
        reasons: dict[int, str] = {}
        if isinstance(first, list) and isinstance(second, list):
            others = [m for m in self.members if m.rank != self.rank]
            reasons = {m.rank: second[m.rank][len(_LEFT) :] for m in others if second[m.rank].startswith(_LEFT)}
            silent = [m for m in others if m.rank not in reasons and second[m.rank] == first[m.rank]]
            how = f"no heartbeat in {1.5 * self.beat_s:.1f} s"
        else:
            silent = self._lost_with_store(refused=isinstance(second, RuntimeError))
            how = f"nor does the store at {self._address[0]}:{self._address[1]}"
        text = self._describe(silent, reasons, how)
        blamed = ", ".join(str(m.rank) for m in silent) or next(iter(reasons.values()), "")
        self.stop()
        self._ask(lambda store: store.set(self._keys[self.rank], _LEFT + blamed))
        return PeerLost(text)

    def _lost_with_store(self, *, refused: bool) -> list[Member]:
        """The ranks lost with a store that does not respond: its host's, or if that refuses connections, the rank that
        served it."""
        hosts = [m for m in self.members if m.hosts_store and m.rank != self.rank]
        kept_by_rank = os.environ.get("TORCHELASTIC_USE_AGENT_STORE", "False") != "True"
        if refused and kept_by_rank and self.rank != 0:
            return [self.members[0]]
        return [m for m in hosts if m.host != self.members[self.rank].host] or hosts

    def _describe(self, silent: Sequence[Member], reasons: dict[int, str], how: str) -> str:
        own = self.members[self.rank]
        here = f"rank {own.rank} on {own.host}"
        blamed = sorted({int(r) for text in reasons.values() for r in re.findall(r"\d+", text)} - {self.rank})
        if silent:
            what = f"{_ranks(silent)} did not respond ({how})"
        elif blamed:
            missing = [m for m in self.members if m.rank in blamed]
            what = f"{_ranks(missing)} did not respond, as ranks {', '.join(map(str, sorted(reasons)))} found earlier"
        elif reasons:
            what = f"ranks {', '.join(map(str, sorted(reasons)))} gave up first; their own messages say why"
        else:
            what = "a collective failed, but all ranks still send heartbeats: one of them is too slow"
        return (
            f"{here}: {what}. The limit is trainer.distributed_timeout_s = {self.timeout_s:g} s. Complete checkpoints "
            f"are kept: rerun the same command to resume from the last one. Check the output of the named hosts, their "
            f"network (trainer.rendezvous, GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME) and memory"
        )

    def _beat(self) -> None:
        while not self._done.is_set():
            self._count += 1
            try:
                self._store.set(self._keys[self.rank], str(self._count))
                if self._watches:
                    self._watch(self._counts(self._store))
            except RuntimeError:
                pass  # find() reports what it means
            self._done.wait(self.beat_s)

    def _watch(self, counts: list[str]) -> None:
        """Report silent ranks before NCCL's watchdog kills this process, which raises nothing here."""
        now = time.monotonic()
        for m, count in zip(self.members, counts, strict=True):
            if self._seen.get(m.rank, ("", 0.0))[0] != count:
                self._seen[m.rank] = (count, now)
        limit = collective_timeout_s(self.timeout_s) - 2 * self.beat_s
        silent = [m for m in self.members if now - self._seen[m.rank][1] > limit and m.rank not in self._told]
        if silent:
            self._told.update(m.rank for m in silent)
            print(self._describe(silent, {}, f"no heartbeat in {limit:.0f} s"), file=sys.stderr, flush=True)

    def _counts(self, store: dist.Store) -> list[str]:
        if store.check(self._keys):
            return [value.decode() for value in store.multi_get(self._keys)]
        # multi_get would wait for a rank that has not set its key yet.
        return [store.get(k).decode() if store.check([k]) else "" for k in self._keys]

    def _ask(self, question: Callable[[dist.Store], T]) -> T | RuntimeError | None:
        """The answer, the store's error, or None if nothing comes within a beat, as behind a cut link."""
        box: list[T | RuntimeError] = []

        def ask() -> None:
            try:
                box.append(question(self._asking))
            except RuntimeError as error:
                box.append(error)

        thread = threading.Thread(target=ask, name="roll-call-question", daemon=True)
        thread.start()
        thread.join(self.beat_s)
        return box[0] if box else None

    def _connect(self) -> dist.TCPStore:
        host, port = self._address
        patience = datetime.timedelta(seconds=max(1.0, collective_timeout_s(self.timeout_s)))
        return dist.TCPStore(host, port, is_master=False, timeout=patience, wait_for_workers=False)


@contextmanager
def named_peers(topology: Topology, timeout_s: float) -> Iterator[None]:
    """Collective failures inside become PeerLost, printed by each rank that saw one.

    ``timeout_s``: trainer.distributed_timeout_s; the topology's groups have ``collective_timeout_s`` of it. After
    PeerLost the groups are broken, no collective may be called again, and SIGTERM is ignored: the process must exit.
    """
    call = RollCall.start(topology, timeout_s)
    try:
        yield
    except BaseException as error:
        if call is None or not failed_collective(error):
            raise
        # torchrun kills a host's other ranks as soon as the first has exited; each should print its message before.
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        lost = call.find()
        print(f"PeerLost: {lost}", file=sys.stderr, flush=True)
        if topology.is_leader:
            time.sleep(answer_time_s(timeout_s))  # its process serves the store that the others read
        raise lost from error
    finally:
        if call is not None:
            call.stop()


def failed_collective(error: BaseException) -> bool:
    """Whether ``error``, or an exception in its chain, is a failed collective."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, dist.DistError):
            return True
        # torch's CheckpointException has the ranks' own errors as text, and is not an Exception.
        carries_text = isinstance(seen, RuntimeError) or type(seen).__name__ == "CheckpointException"
        if carries_text and _COLLECTIVE.search(str(seen)):
            return True
        seen = seen.__cause__ or seen.__context__
    return False


def _ranks(members: Sequence[Member]) -> str:
    by_host: dict[str, list[int]] = {}
    for m in members:
        by_host.setdefault(m.host, []).append(m.rank)
    return "; ".join(
        f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))} on {host}" for host, ranks in by_host.items()
    )


def _host_name() -> str:
    """Host name, and the address that the others use, since host names are not always unique."""
    interface = os.environ.get("NCCL_SOCKET_IFNAME") or os.environ.get("GLOO_SOCKET_IFNAME")
    addresses = psutil.net_if_addrs().get(interface or "", [])
    address = next((a.address for a in addresses if a.family == socket.AF_INET), None)
    return f"{socket.gethostname()} ({address})" if address else socket.gethostname()


def _is_this_machine(host: str) -> bool:
    try:
        return bool(addresses_of(host) & own_addresses())
    except OSError:
        return False
