"""Every rank with an engine of its own, in its own process: the trainer's view of ``ColocatedEngine``.

A tensor-parallel group is one engine. Each group writes its share of a step's requests; the rollouts are then gathered,
so that every rank holds all of them in the order of the requests, as with one engine for all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, TypeVar

from torch import Tensor

from nemo_tropd.batch import Rollout
from nemo_tropd.parallel.agreement import on_every_rank
from nemo_tropd.rollout.engine import EngineError, RefreshStats, RolloutEngine, RolloutRequest

T = TypeVar("T")


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
    """Collective like ``RolloutSupervisor``, whose place it takes. A failed engine is not restarted: it shares the
    trainer's process, and a CUDA error in it is the trainer's own."""

    def __init__(
        self,
        ranks: EngineRanks,
        make_engine: Callable[[], RolloutEngine],
        weights: Callable[[], Iterator[tuple[str, Tensor]]],
    ) -> None:
        """``make_engine`` is called on every rank at the first use; ``weights`` streams whole tensors to every rank."""
        self._ranks, self._make_engine, self._weights = ranks, make_engine, weights
        self._engine: RolloutEngine | None = None
        self._version: int | None = None  # of the weights in the engines; the same on every rank
        self.restarts = 0
        self.last_refresh: RefreshStats | None = None

    def generate(self, requests: Sequence[RolloutRequest] | None, version: int) -> list[Rollout]:
        """See ``RolloutSupervisor.generate``."""
        everything: list[RolloutRequest] | None = self._ranks.broadcast_object(list(requests or []))
        assert everything is not None
        if self._version != version:
            self.refresh(version)
        groups = self._ranks.data_size
        own = self._together(lambda: self._running().generate(everything[self._ranks.data_rank :: groups]))
        # One tensor rank speaks for its group, whose ranks wrote the same.
        parts = self._ranks.gather_objects((self._ranks.data_rank, own) if self._ranks.tensor_rank == 0 else None)
        ordered: list[Rollout | None] = [None] * len(everything)
        for part in parts:
            if part is not None:
                ordered[part[0] :: groups] = part[1]
        rollouts = [r for r in ordered if r is not None]
        wrong = {r.weight_version for r in rollouts} - {version}
        if wrong or len(rollouts) != len(everything):
            raise EngineError(
                f"{len(rollouts)} of {len(everything)} rollouts came, and weights {sorted(wrong)} wrote some, not "
                f"{version}"
            )
        return rollouts

    def refresh(self, version: int) -> RefreshStats:
        """See ``RolloutSupervisor.refresh``."""
        self._version = None
        self.last_refresh = self._together(lambda: self._running().update_weights(self._weights(), version))
        self._version = version
        return self.last_refresh

    def sleep(self) -> None:
        """Hand the engines' memory to the trainer until the next refresh or rollout."""
        if self._engine is not None and self._together(self._engine.sleep):
            self._version = None

    def close(self) -> None:
        """End this rank's engine."""
        if self._engine is not None:
            self._engine.close()
        self._engine, self._version = None, None

    def _running(self) -> RolloutEngine:
        if self._engine is None:
            engine = self._make_engine()
            engine.start()
            self._engine = engine
        return self._engine

    def _together(self, work: Callable[[], T]) -> T:
        return on_every_rank(self._ranks, work, unexpected=EngineError)
