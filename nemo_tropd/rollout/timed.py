"""An engine that says on a timeline when it generates and when it takes weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import cast

from torch import Tensor

from nemo_tropd.batch import Rollout
from nemo_tropd.rollout import engine as api
from nemo_tropd.rollout.vllm import wire as w
from nemo_tropd.rollout.vllm.remote import RemoteEngine
from nemo_tropd.timeline import SEND, Timeline

ENGINES, WEIGHTS = "engines", "weights"  # lanes


class TimedEngine:
    """``engine``, a ``RolloutEngine`` or ``RankEngine``, as it is. Of several members each generates from when it is
    asked until it has answered."""

    def __init__(self, engine: api.RolloutEngine, timeline: Timeline) -> None:
        self._engine, self._timeline = engine, timeline
        self._version = 0  # of its weights
        self._generating: dict[int, Callable[[], None]] = {}  # by member: what ends it on the timeline

    def check_room(self) -> None:
        """Of a ``RankEngine`` alone."""
        cast(api.RankEngine, self._engine).check_room()

    def start(self) -> None:
        self._engine.start()
        members = self._engine.members if isinstance(self._engine, RemoteEngine) else ()
        if len(members) > 1:
            self._timeline.members(ENGINES, len(members))
            for i, member in enumerate(members):
                member.seen = partial(self._seen, i)

    def generate(
        self,
        requests: Sequence[api.RolloutRequest],
        finished: api.Finished | None = None,
        *,
        wanted: api.Wanted | None = None,
    ) -> list[Rollout]:
        """``wanted``: of a ``RankEngine`` alone."""
        try:
            with self._timeline.doing(ENGINES, self._whose):  # not shown where members have lanes of their own
                if wanted is not None:
                    return cast(api.RankEngine, self._engine).generate(requests, finished, wanted=wanted)
                return self._engine.generate(requests, finished)
        finally:
            for i in list(self._generating):
                self._generating.pop(i)()

    def update_weights(self, stream: Iterable[tuple[str, Tensor]], version: int) -> api.RefreshStats:
        self._version = version
        with self._timeline.doing(WEIGHTS, SEND):
            return self._engine.update_weights(stream, version)

    def sleep(self) -> bool:
        return self._engine.sleep()

    def close(self, *, run_over: bool = False) -> None:
        self._engine.close(run_over=run_over)

    @property
    def _whose(self) -> str:
        return f"weights {self._version}"

    def _seen(self, member: int, message: w.Message) -> None:
        if isinstance(message, w.Generate):
            self._generating[member] = self._timeline.begin(f"{ENGINES}/{member}", self._whose)
        elif isinstance(message, w.Generated | w.Failed) and member in self._generating:
            self._generating.pop(member)()
