"""Ctrl-C and SIGTERM finish the step, save a checkpoint and stop the run; a second one, later, stops it at once."""

from __future__ import annotations

import signal
import time
from types import FrameType

# Launchers forward one Ctrl-C more than once.
SAME_REQUEST_S = 3.0


class StopRequest:
    """Remembers that a signal asked the run to stop. Install before the first step, on every rank."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self._asked = 0.0
        self._previous: dict[int, object] = {}

    def __bool__(self) -> bool:
        return self.signal is not None

    def install(self) -> None:
        """Handle SIGINT and SIGTERM."""
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._remember)

    def remove(self) -> None:
        """Restore the previous handlers."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._previous.clear()

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None:
            if time.monotonic() - self._asked < SAME_REQUEST_S:
                return
            raise KeyboardInterrupt(f"second signal {signal.Signals(number).name}: stopping without a checkpoint")
        self.signal, self._asked = number, time.monotonic()
