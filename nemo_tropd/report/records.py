"""A run's files as the report reads them: metrics.jsonl, timeline.jsonl, rollouts.jsonl, summary.json.

A killed run leaves traces that must not show: a truncated last line, steps that were logged and then repeated from an
earlier checkpoint, values that were not finite (written as null).
"""

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from nemo_tropd.timeline import StepTimes

Points = list[tuple[int, float]]
UNFINISHED_STEPS, UNFINISHED_SHARE = 10, 0.05  # the trainer's are the same


class ReportError(RuntimeError):
    """A run directory without metrics."""


@dataclass(frozen=True)
class TokenTrace:
    """One rollout, token by token."""

    step: int
    prompt: str
    tokens: list[str]
    log_ratio: list[float | None]  # log pi_T - log pi_S in nats; None for a token that the teacher wrote
    gate: list[float | None]  # the trust gate: 1 inside, 0 outside, between them for a soft gate
    guided: list[bool]  # of the teacher's prefix


@dataclass(frozen=True)
class RunRecord:
    """Everything the report shows. Metrics are by step, then by name; ``notes`` says what could not be read."""

    name: str
    steps: int
    train: dict[int, dict[str, float]]
    validation: dict[int, dict[str, float]]
    before: dict[str, float]
    after: dict[str, float]
    answers: list[dict[str, str]] = field(default_factory=list)
    rollouts: list[TokenTrace] = field(default_factory=list)
    timeline: list[StepTimes] = field(default_factory=list)  # by step, in order
    config: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def length(self) -> str:
        """The number of steps in words."""
        return f"{self.steps} step" + ("" if self.steps == 1 else "s")

    def series(self, kind: str, name: str) -> Points:
        """(step, value) of the steps that logged the metric, in order; ``kind`` is train or validation."""
        by_step = self.train if kind == "train" else self.validation
        return [(step, by_step[step][name]) for step in sorted(by_step) if name in by_step[step]]

    def seconds(self) -> list[tuple[str, Points]]:
        """Seconds by phase, all for the same steps; then as ``other`` what steps took beyond them, if over 1 %."""
        timed = {s: values for s, values in sorted(self.train.items()) if any(k.startswith("seconds/") for k in values)}
        phases = dict.fromkeys(k for v in timed.values() for k in v if k.startswith("seconds/") and k != "seconds/step")
        layers = [(k.removeprefix("seconds/"), [(s, v.get(k, 0.0)) for s, v in timed.items()]) for k in phases]
        known = {s: sum(v.get(k, 0.0) for k in phases) for s, v in timed.items()}
        rest = [(s, max(v.get("seconds/step", known[s]) - known[s], 0.0)) for s, v in timed.items()]
        if sum(y for _, y in rest) > 0.01 * sum(v.get("seconds/step", 0.0) for v in timed.values()):
            layers.append(("other", rest))
        return layers


def read_run(run_dir: str | Path, summary: dict[str, Any] | None = None) -> RunRecord:
    """Read a run's directory; ``summary`` stands for its summary.json. Raises ReportError if it has no metrics."""
    folder = Path(run_dir)
    if not (folder / "metrics.jsonl").is_file():
        raise ReportError(f"{folder} has no metrics.jsonl: it is not the directory of a run that has started")
    notes: list[str] = []
    train, validation = _read_metrics(folder / "metrics.jsonl", notes)
    if not train and not validation:
        raise ReportError(f"{folder / 'metrics.jsonl'} has no metrics yet: report on the run after its first step")
    notes += _unfinished(train)
    summary = summary or _read_summary(folder / "summary.json", notes)
    first, last = (validation[min(validation)], validation[max(validation)]) if validation else ({}, {})
    versions = summary.get("versions")
    return RunRecord(
        name=str(summary.get("name") or folder.resolve().name),
        steps=max([*train, *validation]),
        train=train,
        validation=validation,
        before=_numbers(summary.get("before") or {}) or first,
        after=_numbers(summary.get("after") or {}) or (last if len(validation) > 1 else {}),
        answers=[dict(a) for a in summary.get("answers") or [] if isinstance(a, Mapping) and a.get("prompt")],
        rollouts=_read_rollouts(folder / "rollouts.jsonl", notes),
        timeline=_read_timeline(folder / "timeline.jsonl", notes),
        config=str(summary.get("config") or ""),
        versions={str(k): str(v) for k, v in versions.items()} if isinstance(versions, Mapping) else {},
        notes=notes,
    )


def _parse(text: str) -> Any:
    """JSON whose strings are all writable as UTF-8: halves of a surrogate pair, which JSON can escape, become ``?``."""
    value = json.loads(text)
    if re.search(r"\\u[dD][89a-fA-F]", text):
        value = json.loads(json.dumps(value, ensure_ascii=False).encode("utf-8", errors="replace"))
    return value


def _json_lines(path: Path, notes: list[str]) -> Iterator[dict[str, Any]]:
    """Objects of a JSONL file. A truncated last line is left out; other unreadable lines are noted."""
    if not path.is_file():
        return
    bad: list[int] = []
    with path.open(encoding="utf-8", errors="replace", newline="\n") as file:
        for number, line in enumerate(file, start=1):
            try:
                entry = _parse(line)
            except (json.JSONDecodeError, RecursionError):
                entry = None
            if isinstance(entry, dict) and isinstance(entry.get("step"), int):
                yield entry
            elif line.endswith("\n") and line.strip():
                bad.append(number)
    if bad:
        notes.append(f"{path.name}: {len(bad)} unreadable line(s) left out, the first is line {bad[0]}")


def _numbers(entry: Mapping[str, Any]) -> dict[str, float]:
    """The finite numbers among an entry's values."""
    return {k: v for k, given in entry.items() if not isinstance(given, bool) and (v := _finite(given)) is not None}


def _read_metrics(path: Path, notes: list[str]) -> tuple[dict[int, dict[str, float]], dict[int, dict[str, float]]]:
    train: dict[int, dict[str, float]] = {}
    validation: dict[int, dict[str, float]] = {}
    for entry in _json_lines(path, notes):
        step, kind = entry.pop("step"), entry.pop("kind", None)
        if kind == "train":
            # A step logged again means the run went back to a checkpoint: what it had logged past it is void.
            if train and step <= next(reversed(train)):
                _forget_from(train, step)
                _forget_from(validation, step)
            train[step] = _numbers(entry)
        elif kind == "validation":
            _forget_from(validation, step)
            validation[step] = _numbers(entry)
    return train, validation


def _unfinished(train: Mapping[int, Mapping[str, float]]) -> Iterator[str]:
    """A note if there were many steps in a row in which all but no rollout met an end token."""
    longest = row = 0
    for values in train.values():
        row = row + 1 if values.get("finished_fraction", 1.0) < UNFINISHED_SHARE else 0
        longest = max(longest, row)
    if longest >= UNFINISHED_STEPS:
        yield (
            f"in {longest} steps in a row fewer than {UNFINISHED_SHARE:.0%} of the rollouts met an end token: see "
            "model.rollout.end_tokens and model.rollout.max_new_tokens"
        )


def _forget_from(by_step: dict[int, Any], step: int) -> None:
    for void in [s for s in by_step if s >= step]:
        del by_step[void]


def _read_rollouts(path: Path, notes: list[str]) -> list[TokenTrace]:
    kept: list[TokenTrace] = []
    broken, last, part = 0, 0, None
    for entry in _json_lines(path, notes):
        step = entry["step"]
        if step < last:
            kept = [r for r in kept if r.step < step]
        if entry.get("part") != part:  # in files of earlier versions there are none
            part, began_after = entry.get("part"), _finite(entry.get("began_after"))
            kept = [r for r in kept if r.step < step and (began_after is None or r.step <= began_after)]
        last = step
        columns = [entry.get(k) for k in ("tokens", "log_ratio", "gate", "guided")]
        if not all(isinstance(c, list) and len(c) == len(entry["tokens"]) for c in columns):
            broken += 1
            continue
        trace = TokenTrace(
            step=step,
            prompt=str(entry.get("prompt") or ""),
            tokens=[str(t) for t in entry["tokens"]],
            log_ratio=[_finite(v) for v in entry["log_ratio"]],
            gate=[_finite(v) for v in entry["gate"]],
            guided=[bool(v) for v in entry["guided"]],
        )
        if trace.tokens and trace not in kept:  # a bit-identical repetition of a step logs the same rollouts again
            kept.append(trace)
    if broken:
        notes.append(f"{path.name}: {broken} rollout(s) left out, since their columns differ in length")
    return kept


def _read_timeline(path: Path, notes: list[str]) -> list[StepTimes]:
    found: dict[int, StepTimes] = {}
    broken = 0
    for entry in _json_lines(path, notes):
        try:
            times = StepTimes.read(entry)
        except ValueError:
            broken += 1
            continue
        if found and times.step <= next(reversed(found)):
            _forget_from(found, times.step)
        found[times.step] = times
    if broken:
        notes.append(f"{path.name}: {broken} line(s) left out, since they are not the times of a step")
    return list(found.values())


def _read_summary(path: Path, notes: list[str]) -> dict[str, Any]:
    try:
        summary = _parse(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        validations = "before and after are the first and last validation"
        notes.append(f"summary.json is missing (the run has not ended): {validations}")
        return {}
    except (ValueError, RecursionError) as error:
        notes.append(f"summary.json is unreadable ({error})")
        return {}
    return summary if isinstance(summary, dict) else {}


def _finite(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def thin(points: Sequence[tuple[float, float]], limit: int = 300) -> list[tuple[float, float]]:
    """At most ``limit`` points: means over neighbouring ones."""
    if len(points) <= limit:
        return [(float(x), y) for x, y in points]
    size = math.ceil(len(points) / limit)
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    return [(sum(x for x, _ in g) / len(g), sum(y for _, y in g) / len(g)) for g in groups]


def smooth(points: Sequence[tuple[float, float]], *, log: bool = False) -> list[tuple[float, float]]:
    """The trend at each point: a straight line fitted to the tenth of the run around it, within the values seen there.
    ``log`` fits the logarithms, for positive values. Fewer than 20 points are returned unchanged."""
    if len(points) < 20:
        return list(points)
    width = max(len(points) // 10, 5)
    x, y = (np.array(column, dtype=np.float64) for column in zip(*points, strict=True))
    y = np.log(y) if log else y
    trend = []
    for i in range(len(points)):
        start = min(max(i - width // 2, 0), len(points) - width)
        near_x, near_y = x[start : start + width] - x[i], y[start : start + width]
        slope = np.cov(near_x, near_y, bias=True)[0, 1] / near_x.var()
        value = np.clip(near_y.mean() - slope * near_x.mean(), near_y.min(), near_y.max())
        trend.append((points[i][0], float(np.exp(value) if log else value)))
    return trend
