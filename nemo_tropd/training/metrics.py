"""What a run logs: metrics and a timeline, one line a step each; rollouts for the report; seconds by phase."""

import json
import math
import os
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, TextIO

from nemo_tropd.batch import Rollout
from nemo_tropd.data import token_texts
from nemo_tropd.timeline import COPY, OFF, StepTimes, Timeline

# Of the phases in which the trainer works: the lane and what it does. In the others it waits for engines, which say
# themselves when they work.
_LANES = {
    "teacher": ("teacher", "scoring"),
    "student": ("student", "forward and backward"),
    "optimizer": ("student", "optimizer"),
    "refresh": ("weights", COPY),
}


class PhaseTimer:
    """Seconds by phase of one step, and on ``timeline`` when they were. ``synchronize`` waits for the device, at the
    end of a phase."""

    def __init__(self, synchronize: Callable[[], None], timeline: Timeline = OFF) -> None:
        self.seconds: dict[str, float] = {}
        self.synchronize, self.timeline = synchronize, timeline
        self.start = time.perf_counter()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the time spent inside to ``name``."""
        began = time.perf_counter()
        lane = _LANES.get(name)
        try:
            with self.timeline.doing(*lane) if lane else nullcontext():
                yield
                self.synchronize()
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - began

    @contextmanager
    def paused(self) -> Iterator[None]:
        """The time spent inside counts for nothing."""
        began = time.perf_counter()
        yield
        self.start += time.perf_counter() - began

    def total(self) -> float:
        """Seconds since the timer was made."""
        return time.perf_counter() - self.start


class MetricsLog:
    """Appends one JSON object a line to RUN/metrics.jsonl and passes numbers on to exp_manager's loggers."""

    def __init__(self, run_dir: Path, loggers: list[Any]) -> None:
        self.path = run_dir / "metrics.jsonl"
        self.loggers = loggers
        self._file = _appended(self.path)

    def write(self, step: int, kind: str, values: Mapping[str, float]) -> None:
        """Log ``values`` of ``step``; ``kind`` is train or validation. Values that are not finite become null."""
        finite = {k: (v if math.isfinite(v) else None) for k, v in values.items()}
        self._file.write(json.dumps({"step": step, "kind": kind, **finite}) + "\n")
        self._file.flush()
        numbers = {f"{kind}/{k}": v for k, v in finite.items() if v is not None}
        for logger in self.loggers:
            logger.log_metrics(numbers, step=step)

    def sync(self) -> None:
        """Have the disk keep what was written."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Flush every logger and close the file."""
        for logger in self.loggers:
            logger.save()
            logger.finalize("success")
        self._file.close()


class TimelineFile:
    """Appends the times of steps to RUN/timeline.jsonl. As in metrics.jsonl a step that is there again, because the run
    went back to a checkpoint, voids what was written from there on."""

    def __init__(self, run_dir: Path, placement: str, steps_ahead: int) -> None:
        """Where the run's engines are, and how many steps ahead they work."""
        self.placement, self.steps_ahead = placement, steps_ahead
        self._file = _appended(run_dir / "timeline.jsonl")

    def write(self, times: StepTimes) -> None:
        """One line."""
        times = replace(times, placement=self.placement, steps_ahead=self.steps_ahead)
        self._file.write(json.dumps(times.entry()) + "\n")
        self._file.flush()


class RolloutFile:
    """Appends rollouts, token by token, to RUN/rollouts.jsonl. Not every step's are there, so each line says which part
    of the run it is of, and after which step that began: what earlier parts wrote of later steps is void."""

    def __init__(self, run_dir: Path, tokenizer: Any, began_after: int) -> None:
        """``began_after``: the steps that this process does not do itself."""
        self.path, self.tokenizer = run_dir / "rollouts.jsonl", tokenizer
        self._of = {"part": secrets.token_hex(4), "began_after": began_after}

    def write(self, step: int, rollouts: Sequence[Rollout], kept: Sequence[dict[str, Any]]) -> None:
        """``kept``: sequences as in ``MetricSums.kept``."""
        by_id = {r.sequence_id: r for r in rollouts}
        with _appended(self.path) as file:
            for sequence in kept:
                line = {
                    "step": step,
                    **self._of,
                    "prompt": self.tokenizer.decode(list(by_id[sequence["sequence_id"]].prompt_ids)),
                    "tokens": token_texts(self.tokenizer, sequence["token_ids"]),
                    **{name: sequence[name] for name in ("log_ratio", "gate", "guided")},
                }
                file.write(json.dumps(line, ensure_ascii=False) + "\n")


def _appended(path: Path) -> TextIO:
    """``path``, open at the beginning of a line."""
    file: TextIO = path.open("a", encoding="utf-8")
    if file.tell():
        with path.open("rb") as written:
            written.seek(-1, os.SEEK_END)
            if written.read() != b"\n":
                file.write("\n")  # after a line that a killed run left incomplete
    return file
