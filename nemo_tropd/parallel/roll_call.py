"""What the ranks tell each other outside collectives: heartbeats, failures and requests to stop.

torch says neither which rank is missing nor why. So a thread of every rank, each second, counts up in the store that
torchrun names, passes on a request to stop, and looks for a failure that another rank announced: the ranks then exit,
also out of a call that would never return. Ranks that fall silent are named by those that miss them.
"""

from __future__ import annotations

import datetime
import json
import os
import pickle
import re
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TypeVar

import torch.distributed as dist

from nemo_tropd.parallel.addresses import addresses_of, host_name, name_origin, own_addresses
from nemo_tropd.parallel.agreement import RankError, portable
from nemo_tropd.parallel.signals import STOP, Stopped

T = TypeVar("T")
_LEFT = "left:"
FOLLOW_S = 3.0  # what a rank may take to exit by itself once another has announced a failure
LINGER_S = 5.0  # what the rank that serves the store waits for others, which may be starved, to read why all end
# gloo, and Megatron's checkpoint around it, raise plain RuntimeErrors with the library's name in the source's path.
_COLLECTIVE = re.compile(r"gloo|NCCL|TCPStore")
_runs = 0  # run directories that this process has trained: each has keys of its own


class PeerLost(RuntimeError):
    """Ranks did not respond: names them, their hosts, the time limit, and how to resume the run."""


class PeerFailed(RuntimeError):
    """Another rank announced an error and left; its own output says more."""


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
    """This rank's part of it, as a context manager around all of a run; nothing to do in a world of one. An exception
    that leaves it is announced; a collective's becomes PeerFailed if another rank announced why, else PeerLost. No
    collective may be called after either."""

    def __init__(self, timeout_s: float) -> None:
        """``timeout_s``: trainer.distributed_timeout_s. Not collective. The store is the one torchrun names."""
        global _runs
        self.timeout_s = timeout_s
        # Two reads of the counters, a beat and a half apart, and one unanswered request fit in the answer time.
        self.beat_s = answer_time_s(timeout_s) / 5
        self._pause_s = min(1.0, self.beat_s)
        self.rank, self.world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        self.alone = self.world_size == 1 or "MASTER_ADDR" not in os.environ
        self.members: list[Member] = []
        self.failed = False
        self._why = ""  # what another rank announced
        if self.alone:
            return
        _runs += 1
        self._prefix = f"nemo_tropd/roll_call/{_runs}"
        self._keys = [f"{self._prefix}/{rank}" for rank in range(self.world_size)]
        self._heard_keys = [f"{key}/heard" for key in self._keys]  # set by ranks that know why all end
        self._address = (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
        self._no_store = "nor does the store at {}:{}".format(*self._address)
        own = Member(self.rank, host_name(), _is_this_machine(self._address[0]))
        self.members = [own if r == self.rank else Member(r, "an unknown host", False) for r in range(self.world_size)]
        self._done, self._deadline = threading.Event(), threading.Timer(0, lambda: None)
        self._responded = time.monotonic()  # when the store last did
        threading.Thread(target=self._guard, name="roll-call-guard", daemon=True).start()
        self._store = self._connect(serve=self.rank == 0 and not _agent_serves())
        self._asking = self._connect()  # a client handles one request at a time, and the heartbeat must not wait
        self._asking.set(self._member_key(self.rank), json.dumps(vars(own)))
        self._count = 0
        # One rank a host, and only with NCCL, whose collectives do not raise: not all ranks poll the store.
        self._watches = os.environ.get("LOCAL_RANK", "0") == "0"
        self._seen: dict[int, tuple[str, float]] = {}
        self._told: set[int] = set()
        self._thread = threading.Thread(target=self._beat, name="roll-call", daemon=True)
        self._thread.start()

    def __enter__(self) -> RollCall:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.alone or error is None:
            self.stop()
            return
        if isinstance(error, Stopped | PeerLost | PeerFailed):
            self._linger()  # others may not have read yet why all end
            return
        if failed_collective(error):
            if why := self._why or self._announced():
                self._report_elsewhere(why)
                left: RuntimeError = PeerFailed(why)
            else:
                left = self.find()
                cause = (str(error).strip().splitlines() or [""])[-1][:300]
                print(f"PeerLost: {left}\n({type(error).__name__}: {cause})", file=sys.stderr, flush=True)
            self._linger()
            raise left from error
        self.announce(error)
        self._linger()

    def stop(self) -> None:
        """End the thread, and what ``announce`` started."""
        if not self.alone:
            self._done.set()
            self._deadline.cancel()

    def announce(self, error: BaseException) -> None:
        """Tell all ranks that this one fails, and print the error unless another rank was first. Not collective. Call
        it before anything is taken down, which can take longer than others should wait."""
        if self.alone or self.failed or isinstance(error, Stopped | PeerLost | PeerFailed) or failed_collective(error):
            return
        self.failed = True
        # What takes down this rank's own parts may hang as well.
        self._deadline = threading.Timer(2 * FOLLOW_S, os._exit, (1,))
        self._deadline.daemon = True
        self._deadline.start()
        text = f"{name_origin(error)}: {type(error).__name__}: {error}"
        mine = json.dumps([self.rank, text])
        if self._ask(lambda store: store.compare_set(self._failure_key, "", mine).decode() == mine) is not False:
            expected = type(error).__module__.partition(".")[0] == __name__.partition(".")[0]
            lines = "" if expected else "".join(traceback.format_exception(error))
            print(f"\n{lines}{text}", file=sys.stderr, flush=True)

    def together(self, work: Callable[[], T]) -> T:
        """Every rank does ``work``, before there are process groups; returns this rank's result. Afterwards the hosts
        of all ranks are known. If any rank failed, every rank raises the error of the lowest of them that has failed by
        then, which names its rank and host; Stopped if any was asked to stop; PeerLost if one fell silent, or was not
        there in time."""
        if self.alone:
            return work()
        failure: BaseException | None = None
        try:
            result = work()
        except Exception as error:
            failure = error
        if failure is None and STOP:
            failure = Stopped("asked to stop")
        told = pickle.dumps(portable(failure, RankError) if failure is not None else None)
        self._asking.set(f"{self._prefix}/together/{self.rank}", told.hex())
        if failure is not None:
            self.announce(failure)  # here, where it has its traceback
        keys = [f"{self._prefix}/together/{rank}" for rank in range(self.world_size)]
        if why := self._await(keys):
            keys = [key for key in keys if self._asking.check([key])]
        else:
            self.members = [Member(**json.loads(self._asking.get(self._member_key(m.rank)))) for m in self.members]
        for answer in self._asking.multi_get(keys):
            told_error: BaseException | None = pickle.loads(bytes.fromhex(answer.decode()))
            if told_error is not None:
                raise told_error from failure
        if why:
            raise PeerFailed(why)
        return result

    def _await(self, keys: Sequence[str]) -> str:
        """Until all ``keys`` are set (then ""), or a rank, maybe this one, announced the failure that is returned."""
        began = time.monotonic()
        while not self._asking.check(list(keys)):
            if why := self._announced():
                self._report_elsewhere(why)
                return why
            if time.monotonic() - began > collective_timeout_s(self.timeout_s):
                lost = self.find()
                print(f"PeerLost: {lost}", file=sys.stderr, flush=True)
                raise lost
            time.sleep(0.1)
        return ""

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
            how = self._no_store
        text = self._describe(silent, reasons, how)
        blamed = ", ".join(str(m.rank) for m in silent) or next(iter(reasons.values()), "")
        self.failed = True
        self.stop()
        self._ask(lambda store: store.set(self._keys[self.rank], _LEFT + blamed))
        return PeerLost(text)

    def _lost_with_store(self, *, refused: bool) -> list[Member]:
        """The ranks lost with a store that does not respond: its host's, or if that refuses connections, the rank that
        served it."""
        hosts = [m for m in self.members if m.hosts_store and m.rank != self.rank]
        if refused and not _agent_serves() and self.rank != 0:
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

    @property
    def _failure_key(self) -> str:
        return f"{self._prefix}/failure"

    @property
    def _stop_key(self) -> str:
        return f"{self._prefix}/stop"

    def _member_key(self, rank: int) -> str:
        return f"{self._prefix}/member/{rank}"

    def _announced(self) -> str:
        """What a rank announced; "" if nothing, or if the store does not respond."""
        answer = self._ask(lambda s: s.get(self._failure_key) if s.check([self._failure_key]) else None)
        return str(json.loads(answer)[1]) if isinstance(answer, bytes) else ""

    def _report_elsewhere(self, why: str) -> None:
        """Once on every host but the one whose rank failed and printed why: their outputs may go to different files."""
        if os.environ.get("LOCAL_RANK", "0") == "0" and self.members[self.rank].host not in why.partition(": ")[0]:
            print(f"rank {self.rank}: stopping, since another rank failed: {why}", file=sys.stderr, flush=True)

    def _linger(self) -> None:
        """``stop``, but a rank that serves the store leaves last: the others read from it why it left."""
        self._ask(lambda store: store.set(self._heard_keys[self.rank], "1"))
        if self.rank == 0 and not _agent_serves():
            deadline = time.monotonic() + LINGER_S
            while time.monotonic() < deadline and self._ask(lambda store: store.check(self._heard_keys)) is False:
                time.sleep(0.1)
        self.stop()

    def _beat(self) -> None:
        while not self._done.is_set():
            self._count += 1
            try:
                self._store.set(self._keys[self.rank], str(self._count))
                stops = self._store.check([self._stop_key])
                self._responded = time.monotonic()  # to the question: nothing comes back from a set
                if STOP:
                    self._store.set(self._stop_key, "1")
                elif stops and not self._done.is_set():  # else it was meant for a run that is over
                    STOP.ask()
                if self._store.check([self._failure_key]) and not self.failed:
                    self._why = str(json.loads(self._store.get(self._failure_key))[1])
                    self._store.set(self._heard_keys[self.rank], "1")
                    self._follow(self._why)
                if self._watches and dist.is_initialized() and dist.get_backend() == "nccl":
                    self._watch(self._counts(self._store))
            except RuntimeError:
                pass  # find() reports what it means
            self._done.wait(self._pause_s)

    def _guard(self) -> None:
        """torch waits without a limit for a store whose process hangs; such a run is over."""
        while not self._done.wait(self._pause_s):
            if time.monotonic() - self._responded > self.timeout_s and not self.failed:
                silent = self._lost_with_store(refused=False) or self.members[:1]
                text = self._describe(silent, {}, self._no_store)
                print(f"PeerLost: {text}", file=sys.stderr, flush=True)
                os._exit(1)

    def _follow(self, why: str) -> None:
        """Another rank failed: end this process, whatever the main thread waits for."""
        if not self._done.wait(FOLLOW_S) and not self.failed:
            self._report_elsewhere(why)
            os._exit(1)

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

    def _connect(self, *, serve: bool = False) -> dist.TCPStore:
        """A connection of its own; with ``serve`` also the server, which torch will share when it makes its groups."""
        host, port = self._address
        patience = datetime.timedelta(seconds=max(1.0, collective_timeout_s(self.timeout_s)))
        return dist.TCPStore(
            host, port, is_master=serve, timeout=patience, wait_for_workers=False, multi_tenant=serve
        )  # fmt: skip


def failed_collective(error: BaseException) -> bool:
    """Whether ``error``, or an exception in its chain, is a failed collective."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, dist.DistError):
            return True
        # torch's CheckpointException has the ranks' own errors as text, and is not an Exception. Errors of this
        # package may quote an engine's last words.
        carries_text = type(seen) is RuntimeError or type(seen).__name__ == "CheckpointException"
        if carries_text and _COLLECTIVE.search(str(seen)):
            return True
        seen = seen.__cause__ or seen.__context__
    return False


def _agent_serves() -> bool:
    """Whether torchrun's own process serves the store, rather than rank 0's."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE", "False") == "True"


def _ranks(members: Sequence[Member]) -> str:
    by_host: dict[str, list[int]] = {}
    for m in members:
        by_host.setdefault(m.host, []).append(m.rank)
    return "; ".join(f"rank{'s' * (len(r) > 1)} {', '.join(map(str, r))} on {host}" for host, r in by_host.items())


def _is_this_machine(host: str) -> bool:
    try:
        return bool(addresses_of(host) & own_addresses())
    except OSError:
        return False
