"""Every rank's view of the rollout engine, or engines: one on rank 0 for all, or one in every rank's own process.

All methods are collective: every rank calls them in the same order. Whatever goes wrong on one rank is raised on every
rank, so that none is left waiting.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, TypeVar

from torch import Tensor

from nemo_tropd.batch import Rollout
from nemo_tropd.parallel import agreement
from nemo_tropd.parallel.signals import Stopped
from nemo_tropd.rollout.engine import (
    EngineDied,
    EngineError,
    RefreshStats,
    RequestError,
    RolloutEngine,
    RolloutRequest,
)

T = TypeVar("T")


class Rollouts(Protocol):
    """What the trainer and the model use; collective, the same on every rank."""

    last_refresh: RefreshStats | None

    def generate(self, requests: Sequence[RolloutRequest] | None, version: int) -> list[Rollout]: ...

    def refresh(self, version: int) -> RefreshStats: ...

    def sleep(self) -> None: ...

    def close(self, *, run_over: bool = False) -> None: ...


def check_versions(rollouts: Sequence[Rollout], requests: Sequence[RolloutRequest], version: int) -> None:
    """The one check of the invariant that a step's rollouts are all there and of the weights ``version``.

    Raises EngineError.
    """
    if len(rollouts) != len(requests):
        raise EngineError(f"got {len(rollouts)} of {len(requests)} rollouts")
    for rollout in rollouts:
        if rollout.weight_version != version:
            raise EngineError(
                f"sequence {rollout.sequence_id} was generated with weight version {rollout.weight_version} instead of "
                f"{version}; the engine was not refreshed"
            )


class RankZeroRollouts:
    """Rollouts and refreshes for all ranks, with one restart of a dead engine for each version of the weights."""

    def __init__(
        self,
        ranks: agreement.AllRanks,
        make_engine: Callable[[], RolloutEngine],
        weights: Callable[[], Iterator[tuple[str, Tensor]]],
    ) -> None:
        """``make_engine`` is called on rank 0 alone, at the first use and after a death.

        ``weights`` gives the trainer's current weights as a stream that every rank must exhaust; only rank 0's
        has anything.
        """
        self._ranks = ranks
        self._make_engine = make_engine
        self._weights = weights
        self._engine: RolloutEngine | None = None  # on rank 0, while it runs
        self._running = False  # the same on every rank
        self._version: int | None = None  # of the weights in the engine; the same on every rank
        self._last_restart: int | None = None  # the version during which the engine was last restarted
        self.restarts = 0
        self.last_refresh: RefreshStats | None = None

    def generate(self, requests: Sequence[RolloutRequest] | None, version: int) -> list[Rollout]:
        """Collective: one rollout a request, in order, on every rank; all generated with the weights ``version``.

        ``requests`` counts on rank 0 and is None elsewhere. An engine that is not running is started, one that
        has other weights is refreshed. If it dies, it is restarted once with the current weights and the same
        requests are sampled again. Raises EngineError (on all ranks) at the second death under one version.
        """

        def generate() -> list[Rollout]:
            self._bring_to(version)
            return self._on_rank_zero(lambda: self._generated(requests, version), may_stop=True)

        return self._with_restart(generate, version)

    def refresh(self, version: int) -> RefreshStats:
        """Collective: hand the trainer's weights to the engine as ``version``, with one restart as in ``generate``."""

        def renew() -> RefreshStats:
            self._version = None
            return self._bring_to(version)

        return self._with_restart(renew, version)

    def sleep(self) -> None:
        """Collective: hand the engine's memory to the trainer until the next refresh or rollout."""
        if self._running and self._on_rank_zero(self._fall_asleep):
            self._version = None

    def close(self, *, run_over: bool = False) -> None:
        """End the engine. Not collective: each rank may call it whenever it stops."""
        if self._engine is not None:
            self._engine.close(run_over=run_over)
        self._engine, self._running, self._version = None, False, None

    def _fall_asleep(self) -> bool:
        assert self._engine is not None
        return self._engine.sleep()

    def _generated(self, requests: Sequence[RolloutRequest] | None, version: int) -> list[Rollout]:
        if requests is None:
            raise EngineError("rank 0 must pass a list of requests")
        assert self._engine is not None
        rollouts = self._engine.generate(requests)
        check_versions(rollouts, requests, version)
        return rollouts

    def _on_rank_zero(self, work: Callable[[], T], *, may_stop: bool = False) -> T:
        return agreement.on_rank_zero(self._ranks, work, unexpected=EngineError, may_stop=may_stop)

    def _with_restart(self, work: Callable[[], T], version: int) -> T:
        while True:
            try:
                return work()
            except EngineDied as death:
                self.close()
                if self._last_restart == version:
                    raise EngineError(
                        f"the rollout engine crashed twice at weight version {version}; last error: {death}"
                    ) from death
                self._last_restart = version
                self.restarts += 1
            except (EngineError, Stopped) as error:  # an engine that was still generating is of no more use, either
                if not isinstance(error, RequestError):
                    self.close()
                raise

    def _bring_to(self, version: int) -> RefreshStats:
        """Collective: start the engine if need be and give it the current weights unless it has ``version``."""
        if not self._running:
            self._on_rank_zero(self._start, may_stop=True)
            self._running, self._version = True, None
        if self._version != version:
            self.last_refresh = self._stream(version)
            self._version = version
        assert self.last_refresh is not None
        return self.last_refresh

    def _start(self) -> None:
        engine = self._make_engine()
        try:
            engine.start()
        except BaseException:
            engine.close()
            raise
        self._engine = engine

    def _stream(self, version: int) -> RefreshStats:
        """Collective: every rank exhausts its stream, come what may, since gathering the weights takes all of them."""

        def update(stream: Iterator[tuple[str, Tensor]]) -> RefreshStats:
            assert self._engine is not None
            return self._engine.update_weights(stream, version)

        return agreement.on_stream(self._ranks, self._weights(), update, unexpected=EngineError)


class EngineRanks(Protocol):
    """What is needed of ``parallel.topology.Topology``; no pipeline."""

    @property
    def is_leader(self) -> bool: ...

    @property
    def data_rank(self) -> int: ...

    @property
    def data_size(self) -> int: ...

    @property
    def tensor_rank(self) -> int: ...

    def broadcast_object(self, obj: Any, src: int = 0) -> Any: ...

    def gather_objects(self, obj: Any) -> list[Any]: ...


class EveryRankRollouts:
    """Collective like ``RankZeroRollouts``, whose place it takes. A failed engine is not restarted: it shares the
    trainer's process, and a CUDA error in it is the trainer's own."""

    def __init__(
        self,
        ranks: EngineRanks,
        make_engine: Callable[[], RolloutEngine],
        weights: Callable[[], Iterator[tuple[str, Tensor]]],
    ) -> None:
        """``make_engine`` is called on every rank at the first use; ``weights`` streams full tensors to every rank."""
        self._ranks, self._make_engine, self._weights = ranks, make_engine, weights
        self._engine: RolloutEngine | None = None
        self._version: int | None = None  # of the weights in the engines; the same on every rank
        self.restarts = 0
        self.last_refresh: RefreshStats | None = None

    def generate(self, requests: Sequence[RolloutRequest] | None, version: int) -> list[Rollout]:
        """See ``RankZeroRollouts.generate``."""
        everything: list[RolloutRequest] | None = self._ranks.broadcast_object(list(requests or []))
        assert everything is not None
        if self._version != version:
            self.refresh(version)
        groups = self._ranks.data_size
        own = self._together(lambda: self._running().generate(everything[self._ranks.data_rank :: groups]))
        # One tensor rank speaks for its group, whose ranks generated the same.
        parts = self._ranks.gather_objects((self._ranks.data_rank, own) if self._ranks.tensor_rank == 0 else None)
        ordered: list[Rollout | None] = [None] * len(everything)
        for part in parts:
            if part is not None:
                ordered[part[0] :: groups] = part[1]
        rollouts = [r for r in ordered if r is not None]
        check_versions(rollouts, everything, version)
        return rollouts

    def refresh(self, version: int) -> RefreshStats:
        """See ``RankZeroRollouts.refresh``."""
        self._version = None
        self.last_refresh = self._together(lambda: self._running().update_weights(self._weights(), version))
        self._version = version
        return self.last_refresh

    def sleep(self) -> None:
        """Hand the engines' memory to the trainer until the next refresh or rollout."""
        if self._engine is not None and self._together(self._engine.sleep):
            self._version = None

    def close(self, *, run_over: bool = False) -> None:
        """End this rank's engine."""
        if self._engine is not None:
            self._engine.close(run_over=run_over)
        self._engine, self._version = None, None

    def _running(self) -> RolloutEngine:
        if self._engine is None:
            engine = self._make_engine()
            engine.start()
            self._engine = engine
        return self._engine

    def _together(self, work: Callable[[], T]) -> T:
        return agreement.on_every_rank(self._ranks, work, unexpected=EngineError)
