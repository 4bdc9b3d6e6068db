"""Names the ranks that do not answer when a collective fails or takes too long.

torch says that a connection was closed or that time ran out, and on which operation, but not which rank is missing. So
every rank counts up under a key of its own in a store, from a thread, through a connection of its own. When a
collective fails, the ranks whose count stands still are the ones that do not answer; where the store itself does not
answer, they are the ranks of the store's host. A rank that gives up says so under its key, and the others do not blame
it.
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
from typing import Any, TypeVar

import psutil
import torch.distributed as dist

from nemo_tropd.parallel.addresses import addresses_of, own_addresses
from nemo_tropd.parallel.topology import Topology

T = TypeVar("T")
_LEFT = "left:"
# gloo, and Megatron's checkpoint around it, raise plain RuntimeErrors with the library's name in the source's path.
_COLLECTIVE = re.compile(r"gloo|NCCL|TCPStore")


class PeerLost(RuntimeError):
    """Ranks did not answer: says which, on which hosts, for how long, and what is left of the run."""


@dataclass(frozen=True)
class Member:
    """One rank, as the others know it."""

    rank: int
    host: str
    hosts_store: bool


def answer_time_s(timeout_s: float) -> float:
    """Seconds of ``timeout_s`` that are kept for finding out who does not answer."""
    return min(15.0, timeout_s / 4)


def collective_timeout_s(timeout_s: float) -> float:
    """What a collective may take, so that the missing ranks are named within ``timeout_s``."""
    return timeout_s - answer_time_s(timeout_s)


class RollCall:
    """This rank's sign of life, and its view of the others'. Start it collectively, on every rank."""

    def __init__(self, members: Sequence[Member], rank: int, prefix: str, timeout_s: float) -> None:
        """``timeout_s``: trainer.distributed_timeout_s. The store is the one torchrun names in MASTER_ADDR."""
        self.members, self.rank, self.timeout_s = list(members), rank, timeout_s
        # Two looks at the counts, a beat and a half apart, and one unanswered question fit in the answer time.
        self.beat_s = answer_time_s(timeout_s) / 5
        self._keys = [f"{prefix}/{m.rank}" for m in self.members]
        self._address = (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
        self._store = self._connect()
        self._asking = self._connect()  # a client answers one question at a time, and the beat must not wait
        self._done = threading.Event()
        self._count = 0
        # One rank a host, and where collectives do not raise, so that the store is not asked by all of them.
        self._watches = dist.get_backend() == "nccl" and os.environ.get("LOCAL_RANK", "0") == "0"
        self._seen: dict[int, tuple[str, float]] = {}
        self._told: set[int] = set()
        self._thread = threading.Thread(target=self._beat, name="roll-call", daemon=True)
        self._thread.start()

    @classmethod
    def start(cls, topology: Topology, timeout_s: float) -> RollCall | None:
        """Collective. None where there is nobody else to miss."""
        if topology.world_size == 1 or "MASTER_ADDR" not in os.environ:
            return None
        address = os.environ["MASTER_ADDR"]
        own = Member(topology.rank, _host_name(), _is_this_machine(address))
        members: list[Any] = [None] * topology.world_size
        dist.all_gather_object(members, own, group=topology.control_group)
        prefix = topology.broadcast_object(f"nemo_tropd/roll_call/{uuid.uuid4().hex}")
        return cls(members, topology.rank, prefix, timeout_s)

    def stop(self) -> None:
        """End the thread."""
        self._done.set()

    def find(self) -> PeerLost:
        """Look who answers; takes at most ``answer_time_s``. Marks this rank as gone."""
        first = self._ask(self._counts)
        if isinstance(first, list):
            time.sleep(1.5 * self.beat_s)
        second = self._ask(self._counts) if isinstance(first, list) else first
        reasons: dict[int, str] = {}
        if isinstance(first, list) and isinstance(second, list):
            others = [m for m in self.members if m.rank != self.rank]
            reasons = {m.rank: second[m.rank][len(_LEFT) :] for m in others if second[m.rank].startswith(_LEFT)}
            silent = [m for m in others if m.rank not in reasons and second[m.rank] == first[m.rank]]
            how = f"no sign of life in {1.5 * self.beat_s:.1f} s"
        else:
            silent = self._lost_with_store(refused=isinstance(second, RuntimeError))
            how = f"nor does the store at {self._address[0]}:{self._address[1]}"
        text = self._describe(silent, reasons, how)
        blamed = ", ".join(str(m.rank) for m in silent) or next(iter(reasons.values()), "")
        self.stop()
        self._ask(lambda store: store.set(self._keys[self.rank], _LEFT + blamed))
        return PeerLost(text)

    def _lost_with_store(self, *, refused: bool) -> list[Member]:
        """Whom a store that does not answer takes along: its host, or where that refuses, the rank that kept it."""
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
            what = f"{_ranks(silent)} did not answer ({how})"
        elif blamed:
            missing = [m for m in self.members if m.rank in blamed]
            what = f"{_ranks(missing)} did not answer, as ranks {', '.join(map(str, sorted(reasons)))} found before"
        elif reasons:
            what = f"ranks {', '.join(map(str, sorted(reasons)))} gave up first; their own messages say why"
        else:
            what = "a collective failed, yet every rank still gives signs of life: one of them is too slow"
        return (
            f"{here}: {what}. A collective may take trainer.distributed_timeout_s = {self.timeout_s:g} s. Whole "
            f"checkpoints are kept: the same command goes on from the last one; look at the named hosts' own output, "
            f"their network (trainer.rendezvous, GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME) and memory"
        )

    def _beat(self) -> None:
        while not self._done.is_set():
            self._count += 1
            try:
                self._store.set(self._keys[self.rank], str(self._count))
                if self._watches:
                    self._watch(self._counts(self._store))
            except RuntimeError:
                pass  # find() says what it means
            self._done.wait(self.beat_s)

    def _watch(self, counts: list[str]) -> None:
        """Say who is silent before NCCL's watchdog ends this process, which it does without raising anything here."""
        now = time.monotonic()
        for m, count in zip(self.members, counts, strict=True):
            if self._seen.get(m.rank, ("", 0.0))[0] != count:
                self._seen[m.rank] = (count, now)
        limit = collective_timeout_s(self.timeout_s) - 2 * self.beat_s
        silent = [m for m in self.members if now - self._seen[m.rank][1] > limit and m.rank not in self._told]
        if silent:
            self._told.update(m.rank for m in silent)
            print(self._describe(silent, {}, f"no sign of life in {limit:.0f} s"), file=sys.stderr, flush=True)

    def _counts(self, store: dist.Store) -> list[str]:
        if store.check(self._keys):
            return [value.decode() for value in store.multi_get(self._keys)]
        # multi_get would wait for a rank that never wrote.
        return [store.get(k).decode() if store.check([k]) else "" for k in self._keys]

    def _ask(self, question: Callable[[dist.Store], T]) -> T | RuntimeError | None:
        """The answer, the store's error, or None where nothing comes in a beat, as behind a cut link."""
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
    PeerLost the groups are broken, no collective must be called again, and SIGTERM is ignored: the process is to end.
    """
    call = RollCall.start(topology, timeout_s)
    try:
        yield
    except BaseException as error:
        if call is None or not failed_collective(error):
            raise
        # torchrun ends a host's other ranks as soon as the first has left; each is to say its word before.
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        lost = call.find()
        print(f"PeerLost: {lost}", file=sys.stderr, flush=True)
        if topology.is_leader:
            time.sleep(answer_time_s(timeout_s))  # its process keeps the store that the others ask
        raise lost from error
    finally:
        if call is not None:
            call.stop()


def failed_collective(error: BaseException) -> bool:
    """Whether ``error``, or what it came from, is a failed collective."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, dist.DistError):
            return True
        # torch's CheckpointException carries the ranks' own errors as text, and is no Exception.
        told = isinstance(seen, RuntimeError) or type(seen).__name__ == "CheckpointException"
        if told and _COLLECTIVE.search(str(seen)):
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
    """Name and the address the others use, since names repeat on badly named nodes."""
    interface = os.environ.get("NCCL_SOCKET_IFNAME") or os.environ.get("GLOO_SOCKET_IFNAME")
    addresses = psutil.net_if_addrs().get(interface or "", [])
    address = next((a.address for a in addresses if a.family == socket.AF_INET), None)
    return f"{socket.gethostname()} ({address})" if address else socket.gethostname()


def _is_this_machine(host: str) -> bool:
    try:
        return bool(addresses_of(host) & own_addresses())
    except OSError:
        return False
