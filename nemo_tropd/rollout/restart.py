"""When an engine that died is replaced: one rule for engines in turns with the trainer, and ahead of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

from nemo_tropd.parallel.signals import Stopped
from nemo_tropd.rollout import engine as api

T = TypeVar("T")


@dataclass
class RestartRule:
    """An engine that dies is replaced once for each version of the weights; one that fails otherwise, or is given up
    while it generates, is ended. ``end`` ends it, so that the next work makes another."""

    end: Callable[[], None]
    says: bool = True  # why the run waits for an engine, and what its user may have to start again
    restarts: int = field(default=0, init=False)
    _last: int | None = field(default=None, init=False)  # the version during which the engine was last replaced

    def __call__(self, work: Callable[[], T], version: int, given_up: Callable[[], bool] = lambda: False) -> T:
        """``work``, which needs the weights ``version``; once more, from its beginning, if the engine dies meanwhile.
        Raises EngineError if that happens twice, and the EngineDied itself if by then the run has ``given_up``."""
        while True:
            try:
                return work()
            except api.EngineDied as death:
                self.end()
                if given_up():
                    raise
                if self._last == version:
                    raise api.EngineError(
                        f"the rollout engine crashed twice at weight version {version}; last error: {death}"
                    ) from death
                self._last = version
                self.restarts += 1
                if self.says:
                    print(f"the rollout engine died and is replaced: {death}", flush=True)
            except (api.EngineError, Stopped) as error:  # one that was still generating is of no more use, either
                if not isinstance(error, api.RequestError):
                    self.end()
                raise
