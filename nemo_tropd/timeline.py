"""Who was at work when: intervals of each step by lane, as rank 0 sees them. Imports nothing of ours.

Lanes: ``engines`` generate (of several members each is a lane of its own: engines/0, engines/1, ...), the ``teacher``
scores, the ``student`` passes forward and backward and takes its optimizer's step, ``weights`` are copied and sent.
Times are the host's monotonic clock's; work that a step waits for anyway counts until the device has done it.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

LANES = ("engines", "teacher", "student", "weights")
COPY, SEND = "copy", "send"  # what is done with weights: on the trainer's side, and on the engines'
EARLY = "early scoring"
MOST_BARS = 100  # of a lane in a step: what is nearer to each other than so many could show is written as one

Bar = tuple[float, float, str]  # begin, end, what


@dataclass(frozen=True)
class Lane:
    """What one lane did in a step."""

    busy: float  # seconds in which it did anything
    bars: list[Bar]  # in order of their beginnings, in seconds from the step's; of one kind they do not overlap


@dataclass(frozen=True)
class StepTimes:
    """Who did what in one step: a line of timeline.jsonl."""

    step: int  # steps done by its end, as in metrics.jsonl
    seconds: float
    pause: float | None  # seconds since the last step's end; None: this process's first step
    lanes: dict[str, Lane]
    placement: str = ""  # where engines are: model.rollout.placement, with auto resolved
    steps_ahead: int = 0  # model.rollout.steps_ahead

    def members(self, lane: str) -> list[Lane]:
        """The lanes that are a lane's: itself, or its members."""
        return [one for name, one in self.lanes.items() if name.partition("/")[0] == lane]

    @property
    def idle(self) -> dict[str, float]:
        """The share of the step in which a lane did nothing; of several members, the mean."""
        busy = {name: [one.busy for one in self.members(name)] for name in LANES}
        return {name: 1 - sum(b) / (len(b) * self.seconds) for name, b in busy.items() if b}

    def entry(self) -> dict[str, Any]:
        """For JSON; ``read`` reads it."""
        return asdict(self)

    @classmethod
    def read(cls, entry: Mapping[str, Any]) -> StepTimes:
        """What ``entry`` gave. ValueError for anything that it cannot have given."""
        try:
            step, seconds, pause = entry["step"], _seconds(entry["seconds"]), entry["pause"]
            lanes = {
                str(name): Lane(_seconds(lane["busy"], seconds), [_bar(bar, seconds) for bar in lane["bars"]])
                for name, lane in entry["lanes"].items()
            }
            placement, ahead = entry["placement"], entry["steps_ahead"]
            if not set(LANES) <= {name.partition("/")[0] for name in lanes}:
                raise ValueError("without all lanes")
            if not all(type(n) is int and n >= 0 for n in (step, ahead)) or seconds <= 0:
                raise ValueError("a step's number, duration or steps ahead")
            if not isinstance(placement, str):
                raise ValueError("the engines' placement")
            pause = None if pause is None else _seconds(pause)
            return cls(step, seconds, pause, lanes, placement, ahead)
        except (KeyError, TypeError, AttributeError, OverflowError) as error:
            raise ValueError(f"not a step's times: {type(error).__name__}: {error}") from error


class Timeline:
    """Records intervals; any thread may. One that is not ``enabled`` records nothing: on ranks other than 0."""

    def __init__(self, *, enabled: bool = True) -> None:
        self.enabled = enabled
        self._lock = threading.Lock()
        self._lanes = dict.fromkeys(LANES)  # in order
        self._open: dict[int, tuple[str, str, float]] = {}  # lane, what, begin, by number
        self._done: list[tuple[str, str, float, float]] = []
        self._count = 0
        self._last_end: float | None = None

    def members(self, lane: str, count: int) -> None:
        """Have ``count`` members stand for a lane, also those that do nothing."""
        with self._lock:
            names = [f"{lane}/{i}" for i in range(count)]
            self._lanes = dict.fromkeys(n for old in LANES for n in (names if old == lane else [old]))

    def begin(self, lane: str, what: str) -> Callable[[], None]:
        """From now on ``lane`` does ``what``, until the function that is returned is called; twice is fine."""
        if not self.enabled:
            return _nothing
        began = time.monotonic()
        with self._lock:
            self._count += 1
            number = self._count
            self._open[number] = lane, what, began

        def end() -> None:
            ended = time.monotonic()
            with self._lock:
                if self._open.pop(number, None) is not None:
                    self._done.append((lane, what, began, ended))

        return end

    @contextmanager
    def doing(self, lane: str, what: str) -> Iterator[None]:
        """What ``begin`` records, until the block ends, whatever ends it."""
        end = self.begin(lane, what)
        try:
            yield
        finally:
            end()

    def add(self, lane: str, what: str, begin: float, end: float) -> None:
        """An interval that is known only now, of the step that is going on."""
        if self.enabled:
            with self._lock:
                self._done.append((lane, what, begin, end))

    def step_done(self, step: int, began: float) -> StepTimes:
        """The step that began at ``began`` ends now: its times. Of what goes on, or began before, that is the part that
        lies in the step; what is over is forgotten."""
        ended = time.monotonic()
        with self._lock:
            spans = [*self._done, *((lane, what, begin, ended) for lane, what, begin in self._open.values())]
            self._done = [span for span in self._done if span[3] > ended]
            names, last, self._last_end = list(self._lanes), self._last_end, ended
        bars: dict[str, list[Bar]] = {name: [] for name in names}
        for lane, what, begin, end in spans:
            begin, end = max(begin, began) - began, min(end, ended) - began
            if lane in bars and end > begin:
                bars[lane].append((begin, end, what))
        pause = None if last is None else max(began - last, 0.0)
        lanes = {name: _lane(found, ended - began) for name, found in bars.items()}
        return StepTimes(step, round(ended - began, 6), None if pause is None else round(pause, 6), lanes)


OFF = Timeline(enabled=False)


def length(intervals: Iterable[tuple[float, float]]) -> float:
    """Of their union."""
    total, reached = 0.0, -math.inf
    for begin, end in sorted(intervals):
        total += max(end - max(begin, reached), 0.0)
        reached = max(reached, end)
    return total


def _lane(bars: Sequence[Bar], seconds: float) -> Lane:
    busy = length((begin, end) for begin, end, _ in bars)
    few = _joined(bars, 0.0)
    if len(few) > MOST_BARS:
        few = _joined(few, seconds / MOST_BARS)
    return Lane(round(busy, 6), [(round(begin, 6), round(end, 6), what) for begin, end, what in few])


def _joined(bars: Sequence[Bar], gap: float) -> list[Bar]:
    """Those of one kind that overlap, or have at most ``gap`` between them, as one."""
    found: dict[str, list[Bar]] = {}
    for begin, end, what in sorted(bars):
        of_kind = found.setdefault(what, [])
        if of_kind and begin <= of_kind[-1][1] + gap:
            first, last, _ = of_kind.pop()
            begin, end = first, max(last, end)
        of_kind.append((begin, end, what))
    return sorted(bar for of_kind in found.values() for bar in of_kind)


def _seconds(value: Any, most: float = math.inf) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{value!r} is not a number of seconds")
    if not (math.isfinite(value) and 0 <= value <= most + 1e-5):  # each was rounded
        raise ValueError(f"{value!r} seconds")
    return min(float(value), most)


def _bar(bar: Any, seconds: float) -> Bar:
    begin, end, what = bar
    begin, end = _seconds(begin, seconds), _seconds(end, seconds)
    if begin > end or not isinstance(what, str):
        raise ValueError(f"{bar!r} is not an interval")
    return begin, end, what


def _nothing() -> None:
    pass
