"""Every rank's view of the rollout engine, or engines: one on rank 0 for all, or one in every rank's own process.

Whatever goes wrong on one rank is raised on every rank, or ends them all, so that none is left waiting.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import count
from typing import TypeVar, cast

from torch import Tensor

from nemo_tropd.batch import Rollout
from nemo_tropd.parallel import agreement
from nemo_tropd.parallel.signals import STOP, Stopped
from nemo_tropd.parallel.topology import Topology
from nemo_tropd.rollout import arrays
from nemo_tropd.rollout import engine as api
from nemo_tropd.rollout.restart import RestartRule

T = TypeVar("T")
FinishedTogether = Callable[[list[Rollout], bool], None]
# All of them to every rank: micro-batches are laid out by everyone's lengths, metrics count them, and what a teacher
# reads is not what its data rank trains on. As arrays a step's are some tens of MB, next to GBs of gradients.
ROLLOUTS = agreement.Codec(arrays.encode, arrays.decode)
# Steps of an engine between two votes of its ranks: of 5 to 300 ms each, beside which a vote is nothing.
VOTE_STEPS = 8


@dataclass(eq=False, repr=False)
class Rollouts(ABC):
    """What the trainer and the model use. Collective but for ``close``: every rank calls it in the same order."""

    ranks: agreement.World
    make_engine: Callable[[], api.RolloutEngine]  # called at the first use
    weights: Callable[[], Iterator[tuple[str, Tensor]]]  # the trainer's, as a stream that every rank must exhaust
    vocab_size: int  # ids from here on are refused
    restarts: int = field(default=0, init=False)
    last_refresh: api.RefreshStats | None = field(default=None, init=False)
    _engine: api.RolloutEngine | None = field(default=None, init=False)  # where this rank has one, while it runs
    _started: bool = field(default=False, init=False)  # the same on every rank, as is the version of the weights
    _version: int | None = field(default=None, init=False)

    @abstractmethod
    def generate(
        self, requests: Sequence[api.RolloutRequest] | None, version: int, finished: FinishedTogether | None = None
    ) -> list[Rollout]:
        """One rollout a request, in order, on every rank; all generated with the weights ``version``, which an engine
        is given first if it has others. ``requests`` counts on rank 0. Raises EngineError on all ranks; Stopped, if the
        rollouts take longer than ``FINISH_S`` after a request to stop: they are given up, and the engines with them or
        put to sleep.

        ``finished`` is given them on every rank as they are finished, in the same portions, while others are generated,
        and with them whether the last one is; once more, perhaps in other words, where an engine died meanwhile and is
        replaced. What a rank raises there it raises alone. ValueError if engines do not tell."""

    def refresh(self, version: int) -> api.RefreshStats:
        """Hand the trainer's weights to the engines as ``version``."""
        self._version = None
        return self._bring_to(version)

    def sleep(self) -> None:
        """Hand the engines' memory to the trainer until the next refresh or rollout."""
        if self._started and self._agree(lambda: self._running().sleep()):
            self._version = None

    def close(self, *, run_over: bool = False) -> None:
        """End this rank's engine. Each rank may call it whenever it stops."""
        if self._engine is not None:
            self._engine.close(run_over=run_over)
        self._engine, self._started, self._version = None, False, None

    @abstractmethod
    def _agree(self, work: Callable[[], T]) -> T:
        """Collective: do ``work`` where engines are; what one raises, all raise."""

    @abstractmethod
    def _stream(self, version: int) -> api.RefreshStats:
        """Collective: send the weights."""

    def _bring_to(self, version: int) -> api.RefreshStats:
        """Collective: start the engines if need be and give them the current weights unless they have ``version``."""
        if not self._started:
            self._begin()
            self._started, self._version = True, None
        if self._version != version:
            self.last_refresh = self._stream(version)
            self._version = version
        assert self.last_refresh is not None
        return self.last_refresh

    def _begin(self) -> None:
        self._agree(self._start)

    def _start(self) -> None:
        engine, self._engine = self._engine or self.make_engine(), None
        try:
            engine.start()
        except BaseException:
            engine.close()
            raise
        self._engine = engine

    def _running(self) -> api.RolloutEngine:
        assert self._engine is not None
        return self._engine


@dataclass(eq=False, repr=False)
class RankZeroRollouts(Rollouts):
    """One engine, on rank 0; the other ranks only gather weights. If it dies, it is restarted once for each version of
    the weights, with the current ones, and the same requests are sampled again."""

    def __post_init__(self) -> None:
        self._rule = RestartRule(self.close, says=self.ranks.is_leader)

    def generate(
        self, requests: Sequence[api.RolloutRequest] | None, version: int, finished: FinishedTogether | None = None
    ) -> list[Rollout]:
        def asked() -> Sequence[api.RolloutRequest]:
            if requests is None:
                raise api.EngineError("rank 0 must pass a list of requests")
            return requests

        def check(rollouts: Sequence[Rollout], of: Sequence[api.RolloutRequest]) -> None:
            api.check_rollouts(rollouts, of, version=version, vocab_size=self.vocab_size)

        def sampled() -> list[Rollout]:
            rollouts = self._running().generate(asked())
            check(rollouts, asked())
            return rollouts

        def generate() -> list[Rollout]:
            self._bring_to(version)
            return self._agree(sampled, ROLLOUTS) if finished is None else self._in_parts(asked, check, finished)

        return self._with_restart(generate, version)

    def _in_parts(
        self,
        asked: Callable[[], Sequence[api.RolloutRequest]],
        check: Callable[[Sequence[Rollout], Sequence[api.RolloutRequest]], None],
        finished: FinishedTogether,
    ) -> list[Rollout]:
        """As ``generate``; every rollout travels to the other ranks once, when it is finished."""
        found: dict[int, Rollout] = {}

        def take(some: list[Rollout], all_done: bool) -> None:
            found.update((r.sequence_id, r) for r in some)
            finished(some, all_done)

        parts = agreement.Parts(take, ROLLOUTS)

        def sampled() -> list[int]:
            by_id = {r.sequence_id: r for r in asked()}

            def put(r: Rollout) -> None:
                check([r], [by_id[r.sequence_id]] if r.sequence_id in by_id else [])
                parts.put(r)

            self._running().generate(asked(), put)
            return list(by_id)

        order = agreement.on_rank_zero(self.ranks, sampled, unexpected=api.EngineError, may_stop=True, parts=parts)
        if found.keys() != set(order):
            raise api.EngineError(f"the engine has told of {len(found)} of {len(order)} rollouts")
        return [found[i] for i in order]

    def refresh(self, version: int) -> api.RefreshStats:
        refresh = super().refresh
        return self._with_restart(lambda: refresh(version), version)

    def _agree(self, work: Callable[[], T], codec: agreement.Codec[T] = agreement.PICKLED) -> T:
        return agreement.on_rank_zero(self.ranks, work, unexpected=api.EngineError, may_stop=True, codec=codec)

    def _stream(self, version: int) -> api.RefreshStats:
        return agreement.on_stream(
            self.ranks,
            self.weights(),
            lambda stream: self._running().update_weights(stream, version),
            unexpected=api.EngineError,
        )

    def _with_restart(self, work: Callable[[], T], version: int) -> T:
        try:
            return self._rule(work, version)
        finally:
            self.restarts = self._rule.restarts


class EveryRankRollouts(Rollouts):
    """An engine on every rank; data-parallel groups share the requests. A failed engine is not restarted: it shares the
    trainer's process, and a CUDA error in it is the trainer's own. One that is stopped in the middle of its rollouts
    sleeps, as after any others: a checkpoint is saved next, with the memory that it always has."""

    ranks: Topology  # no pipeline
    make_engine: Callable[[], api.RankEngine]

    def generate(
        self, requests: Sequence[api.RolloutRequest] | None, version: int, finished: FinishedTogether | None = None
    ) -> list[Rollout]:
        if finished is not None:
            raise ValueError("engines in the trainer's own processes do not tell of rollouts while they generate")
        everything: list[api.RolloutRequest] = self.ranks.broadcast_object(list(requests or []))
        self._bring_to(version)
        groups = self.ranks.data_size

        def sampled() -> bytearray:
            try:
                part = everything[self.ranks.data_rank :: groups]
                return arrays.encode(self._running().generate(part, wanted=self._vote()))
            except api.Abandoned as error:
                raise Stopped("asked to stop") from error

        try:
            own = self._agree(sampled)
        except Stopped:
            self.sleep()
            raise
        # One tensor rank speaks for its group, whose ranks generated the same.
        parts = self.ranks.gather_objects((self.ranks.data_rank, own) if self.ranks.tensor_rank == 0 else None)
        ordered: list[Rollout | None] = [None] * len(everything)
        for data_rank, part in filter(None, parts):
            ordered[data_rank::groups] = arrays.decode(part)
        rollouts = [r for r in ordered if r is not None]
        api.check_rollouts(rollouts, everything, version=version, vocab_size=self.vocab_size)
        return rollouts

    def _vote(self) -> api.Wanted:
        """Whether rollouts are still wanted, by the engine's own count of steps: all ranks of a tensor group give up
        behind the same one, for each step has collectives of its own. The request may have reached one of them alone,
        or each at another moment."""
        steps = count(1)
        return lambda: bool(next(steps) % VOTE_STEPS) or not self.ranks.any_tensor_rank(STOP.overdue)

    def _running(self) -> api.RankEngine:
        return cast(api.RankEngine, super()._running())

    def _agree(self, work: Callable[[], T]) -> T:
        return agreement.on_every_rank(self.ranks, work, unexpected=api.EngineError, patience=_patience)

    def _begin(self) -> None:
        def make() -> api.RankEngine:
            engine = self.make_engine()
            engine.check_room()
            return engine

        self._engine = self._agree(make)
        super()._begin()

    def _stream(self, version: int) -> api.RefreshStats:
        stream = self.weights()

        def update() -> api.RefreshStats:
            try:
                return self._running().update_weights(stream, version)
            except BaseException:
                with suppress(Exception):  # what came first is raised
                    for _ in stream:
                        pass
                raise

        return self._agree(update)


def _patience(error: BaseException) -> float:
    """The other ranks may be in a collective of vLLM, which this one has left; a run survives no error of an engine on
    every rank. A stop is no error: all ranks leave the engine."""
    return math.inf if isinstance(error, Stopped | api.Abandoned) else agreement.ALONE_AFTER_S
