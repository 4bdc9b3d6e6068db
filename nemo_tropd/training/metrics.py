"""Metrics of a run: one line a step in metrics.jsonl, passed on to the loggers of exp_manager; seconds by phase."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO


class PhaseTimer:
    """Seconds by phase of one step. ``synchronize`` waits for the device; it is called where a phase ends, only there:
    inside a phase the device runs behind the program."""

    def __init__(self, synchronize: Callable[[], None] = lambda: None) -> None:
        self.seconds: dict[str, float] = {}
        self.synchronize = synchronize
        self.start = time.perf_counter()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the time spent inside to ``name``."""
        began = time.perf_counter()
        try:
            yield
            self.synchronize()
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - began

    def total(self) -> float:
        """Seconds since the timer was made."""
        return time.perf_counter() - self.start


class MetricsLog:
    """Appends one JSON object a line to RUN/metrics.jsonl and passes numbers on to exp_manager's loggers."""

    def __init__(self, run_dir: Path, loggers: list[Any]) -> None:
        self.path = run_dir / "metrics.jsonl"
        self.loggers = loggers
        _mend_last_line(self.path)
        self._file: TextIO = self.path.open("a", encoding="utf-8")

    def write(self, step: int, kind: str, values: Mapping[str, float]) -> None:
        """Log ``values`` of ``step``; ``kind`` is train or validation. Values that are not finite become null."""
        finite = {k: (v if math.isfinite(v) else None) for k, v in values.items()}
        self._file.write(json.dumps({"step": step, "kind": kind, **finite}) + "\n")
        self._file.flush()
        numbers = {f"{kind}/{k}": v for k, v in finite.items() if v is not None}
        for logger in self.loggers:
            logger.log_metrics(numbers, step=step)

    def close(self) -> None:
        """Flush every logger and close the file."""
        for logger in self.loggers:
            logger.save()
            logger.finalize("success")
        self._file.close()


def _mend_last_line(path: Path) -> None:
    """End a line that a killed run left unfinished, so that the next one starts on its own."""
    if path.exists() and path.stat().st_size:
        with path.open("rb+") as file:
            file.seek(-1, 2)
            if file.read(1) != b"\n":
                file.write(b"\n")
