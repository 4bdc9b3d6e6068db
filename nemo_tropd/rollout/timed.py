"""An engine that says on a timeline when it generates and when it takes weights."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import cast

from torch import Tensor

from nemo_tropd.batch import Rollout
from nemo_tropd.rollout import engine as api
from nemo_tropd.timeline import SEND, Timeline


class TimedEngine:
    """``engine``, a ``RolloutEngine`` or ``RankEngine``, as it is."""

    def __init__(self, engine: api.RolloutEngine, timeline: Timeline) -> None:
        self._engine, self._timeline = engine, timeline
        self._version = 0  # of its weights

    def check_room(self) -> None:
        """Of a ``RankEngine`` alone."""
        cast(api.RankEngine, self._engine).check_room()

    def start(self) -> None:
        self._engine.start()

    def generate(self, requests: Sequence[api.RolloutRequest], finished: api.Finished | None = None) -> list[Rollout]:
        with self._timeline.doing("engines", f"weights {self._version}"):
            return self._engine.generate(requests, finished)

    def update_weights(self, stream: Iterable[tuple[str, Tensor]], version: int) -> api.RefreshStats:
        self._version = version
        with self._timeline.doing("weights", SEND):
            return self._engine.update_weights(stream, version)

    def sleep(self) -> bool:
        return self._engine.sleep()

    def close(self, *, run_over: bool = False) -> None:
        self._engine.close(run_over=run_over)
