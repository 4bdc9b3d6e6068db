"""When work on a device began and ended, though the host only launches it."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Stopwatch:
    """Nobody waits for the device: on a GPU the current stream's events say when it was there. It has nothing to do
    when a stopwatch is made, so that its clock and the host's begin together."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._began = time.monotonic()
        self._origin = self._mark()
        self._marks: list[tuple[float | torch.cuda.Event, float | torch.cuda.Event]] = []

    @contextmanager
    def running(self) -> Iterator[None]:
        """What is launched in the block is one interval."""
        begin = self._mark()
        yield
        self._marks.append((begin, self._mark()))

    def intervals(self) -> list[tuple[float, float]]:
        """Beginnings and ends on the host's monotonic clock; each is given once. On a GPU the caller has waited for all
        that was launched."""
        marks, self._marks = self._marks, []
        return [(self._time(begin), self._time(end)) for begin, end in marks]

    def _mark(self) -> float | torch.cuda.Event:
        if not self._on_gpu:
            return time.monotonic()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _time(self, mark: float | torch.cuda.Event) -> float:
        if isinstance(mark, float):
            return mark
        assert isinstance(self._origin, torch.cuda.Event)
        return self._began + self._origin.elapsed_time(mark) / 1000
