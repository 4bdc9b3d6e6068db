"""An engine that generates for later steps while the trainer trains.

Rank 0 has a thread that works through a queue: which requests, by which version of the weights. It gives the engine a
version when the first requests that want it are reached; until the last of them are done a copy of those weights stays
in rank 0's host memory, so that an engine that died can be replaced. Collectives are the main thread's alone.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from nemo_tropd.batch import Rollout
from nemo_tropd.parallel import agreement
from nemo_tropd.parallel.signals import Stopped
from nemo_tropd.rollout import engine as api
from nemo_tropd.rollout.collective import ROLLOUTS, FinishedTogether, RankZeroRollouts
from nemo_tropd.rollout.restart import RestartRule
from nemo_tropd.rollout.weights.copies import HostCopy

Name = int | str  # of what was begun: a step, or something that is no step
_END_S = 20.0


@dataclass
class _Work:
    requests: Sequence[api.RolloutRequest]
    version: int
    rollouts: Future[list[Rollout]]


class EngineThread:
    """Rank 0's engine, and the queue of what it is to generate."""

    def __init__(self, make_engine: Callable[[], api.RolloutEngine], vocab_size: int) -> None:
        self._restarting = RestartRule(self._end)
        self.last_refresh: api.RefreshStats | None = None
        self._make_engine, self._vocab_size = make_engine, vocab_size
        self._queue: queue.SimpleQueue[_Work | None] = queue.SimpleQueue()
        self._engine: api.RolloutEngine | None = None
        self._has: int | None = None  # the version of the engine's weights
        self._kept: dict[int, HostCopy] = {}
        self._free: list[HostCopy] = []  # of versions that nobody wants: the next ones are copied there
        self._wanted: dict[int, int] = {}  # how many times, by version, in the queue
        self._newest = -1
        self._lock = threading.Lock()
        self._closed = False
        self._thread = threading.Thread(target=self._live, name="rollouts-ahead", daemon=True)
        self._thread.start()

    def keep(self, version: int, weights: Iterator[tuple[str, Tensor]]) -> int:
        """Copy what version ``version`` is, a later one than all before. Returns its bytes."""
        with self._lock:
            copy = self._free.pop() if self._free else HostCopy()
        size = copy.take(weights)
        with self._lock:
            self._kept[version], self._newest = copy, version
            self._drop()
        return size

    def put(self, requests: Sequence[api.RolloutRequest], version: int) -> Future[list[Rollout]]:
        """Generate by ``version``, after all that was put before, which wanted no later version. Without requests the
        engine is started, if need be, and given these weights."""
        work = _Work(list(requests), version, Future())
        with self._lock:
            self._wanted[version] = self._wanted.get(version, 0) + 1
        self._queue.put(work)
        return work.rollouts

    @property
    def restarts(self) -> int:
        """How often the engine was replaced."""
        return self._restarting.restarts

    def close(self, *, run_over: bool) -> None:
        """End the engine, whatever it does, and the thread."""
        with self._lock:
            self._closed, engine = True, self._engine
        if engine is not None:
            engine.close(run_over=run_over)  # under the thread's call, which then fails
        self._queue.put(None)
        self._thread.join(_END_S)

    def _live(self) -> None:
        if torch.cuda.is_available():  # weights on their way do not wait for the step's kernels, nor these for them
            torch.cuda.set_stream(torch.cuda.Stream())
        failed: BaseException | None = None
        while (work := self._queue.get()) is not None:
            try:
                if failed is not None:
                    raise failed
                work.rollouts.set_result(
                    self._restarting(partial(self._generated, work), work.version, lambda: self._closed)
                )
            except BaseException as error:
                if not isinstance(error, api.RequestError):
                    failed = error
                work.rollouts.set_exception(error)
            with self._lock:
                self._wanted[work.version] -= 1
                self._drop()

    def _drop(self) -> None:
        for version in [v for v in self._kept if v != self._newest and not self._wanted.get(v)]:
            self._free.append(self._kept.pop(version))

    def _generated(self, work: _Work) -> list[Rollout]:
        engine = self._with_weights(work.version)
        rollouts = engine.generate(work.requests) if work.requests else []
        api.check_rollouts(rollouts, work.requests, version=work.version, vocab_size=self._vocab_size)
        return rollouts

    def _with_weights(self, version: int) -> api.RolloutEngine:
        with self._lock:  # close() has been before, or finds the engine
            self._check_open()
            if new := self._engine is None:
                self._engine, self._has = self._make_engine(), None
        assert self._engine is not None
        if new:
            self._engine.start()
            self._check_open()  # what was closed before it started is closed again
        if self._has != version:
            self._has = None
            with self._lock:
                weights = self._kept[version]
            self.last_refresh = self._engine.update_weights(iter(weights.tensors.items()), version)
            self._has = version
        return self._engine

    def _check_open(self) -> None:
        if self._closed:
            raise api.EngineDied("the engine is not running")

    def _end(self) -> None:
        if self._engine is not None:
            self._engine.close()
        self._engine = None


@dataclass(eq=False, repr=False)
class AheadRollouts(RankZeroRollouts):
    """As ``RankZeroRollouts``; in addition ``begin`` and ``take`` are the two halves of ``generate``."""

    _thread: EngineThread | None = field(default=None, init=False)  # on rank 0, from the first use on
    _rollouts: dict[Name, Future[list[Rollout]]] = field(default_factory=dict, init=False)  # on rank 0

    def begin(self, name: Name, requests: Sequence[api.RolloutRequest], version: int) -> None:
        """Rank 0 alone: generate ``requests`` by the weights ``version``, which ``refresh`` has had and none that was
        begun before is behind."""
        self._rollouts[name] = self._running_thread().put(requests, version)

    def preload(self, name: Name, rollouts: list[Rollout]) -> None:
        """Rank 0 alone: rollouts that were generated before the run was resumed."""
        self._rollouts[name] = Future()
        self._rollouts[name].set_result(rollouts)

    def take(self, name: Name) -> list[Rollout]:
        """What was begun under ``name``, on every rank (collective); it stays. Raises EngineError, or Stopped."""
        rollouts = self._agree(lambda: self._rollouts[name].result(), ROLLOUTS)
        self.restarts = self.ranks.broadcast_object(self._thread.restarts if self._thread else 0)
        return rollouts

    def forget(self, name: Name) -> None:
        """What was begun under ``name`` is not needed any more."""
        self._rollouts.pop(name, None)

    def finished(self, numbers: Sequence[int]) -> dict[int, list[Rollout]] | None:
        """What was begun under ``numbers`` once all of it is there, on rank 0 (collective). None on every rank if it
        takes too long after a request to stop. The rollouts stay to be taken."""
        found: dict[int, list[Rollout]] = {}

        def wait() -> None:
            found.update({number: self._rollouts[number].result() for number in numbers})

        try:
            agreement.on_rank_zero(self.ranks, wait, unexpected=api.EngineError, may_stop=True)
        except Stopped:
            return None
        return found

    def generate(
        self, requests: Sequence[api.RolloutRequest] | None, version: int, finished: FinishedTogether | None = None
    ) -> list[Rollout]:
        """After all that was begun."""
        if finished is not None:
            raise ValueError("an engine that works ahead does not tell of rollouts while it generates")

        def sampled() -> list[Rollout]:
            if requests is None:
                raise api.EngineError("rank 0 must pass a list of requests")
            return self._running_thread().put(requests, version).result()

        return self._agree(sampled, ROLLOUTS)

    def refresh(self, version: int) -> api.RefreshStats:
        """Copy the trainer's weights to rank 0's host memory; the engine takes them when it needs them. The first time
        wait until it has started: a run that finds all of its rollouts in a checkpoint has one to tell of its end, and
        one that has no engine says so before it trains."""
        kept = agreement.on_stream(self.ranks, self.weights(), self._copied(version), unexpected=api.EngineError)
        self.last_refresh = kept
        if not self._started:
            self._agree(lambda: self._running_thread().put([], version).result())
            self._started = True
        return kept

    def sleep(self) -> None:
        """It does not share a device."""

    def close(self, *, run_over: bool = False) -> None:
        if self._thread is not None:
            self._thread.close(run_over=run_over)
        self._thread, self._rollouts, self._started = None, {}, False

    def _copied(self, version: int) -> Callable[[Iterator[tuple[str, Tensor]]], api.RefreshStats]:
        def copy(stream: Iterator[tuple[str, Tensor]]) -> api.RefreshStats:
            began = time.monotonic()
            size = self._running_thread().keep(version, stream)
            return api.RefreshStats(time.monotonic() - began, size, 1)

        return copy

    def _running_thread(self) -> EngineThread:
        if self._thread is None:
            self._thread = EngineThread(self.make_engine, self.vocab_size)
        return self._thread
