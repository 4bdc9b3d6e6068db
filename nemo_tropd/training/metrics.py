"""What a run logs: metrics, one line a step; rollouts for the report; seconds by phase."""

import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from nemo_tropd.batch import Rollout
from nemo_tropd.data import token_texts


class PhaseTimer:
    """Seconds by phase of one step. ``synchronize`` waits for the device, at the end of a phase."""

    def __init__(self, synchronize: Callable[[], None]) -> None:
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
        self._file: TextIO = self.path.open("a", encoding="utf-8")
        if self.path.stat().st_size and not self.path.read_bytes().endswith(b"\n"):
            self._file.write("\n")  # after a line that a killed run left incomplete

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


class RolloutFile:
    """Appends rollouts, token by token, to RUN/rollouts.jsonl."""

    def __init__(self, run_dir: Path, tokenizer: Any) -> None:
        self.path, self.tokenizer = run_dir / "rollouts.jsonl", tokenizer

    def write(self, step: int, rollouts: Sequence[Rollout], kept: Sequence[dict[str, Any]]) -> None:
        """``kept``: sequences as MetricSums.keep left them."""
        by_id = {r.sequence_id: r for r in rollouts}
        with self.path.open("a", encoding="utf-8") as file:
            for sequence in kept:
                line = {
                    "step": step,
                    "prompt": self.tokenizer.decode(by_id[sequence["sequence_id"]].prompt_ids),
                    "tokens": token_texts(self.tokenizer, sequence["token_ids"]),
                    **{name: sequence[name] for name in ("log_ratio", "gate", "guided")},
                }
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
