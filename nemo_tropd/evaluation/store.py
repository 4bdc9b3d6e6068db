"""Answers kept on disk: a file of JSON lines for each benchmark, model, sampling and length.

The first line holds these settings; the file is named by their digest. Answers are appended a batch at a time. Every
line carries a digest of itself and the size of its batch: a batch that was cut short is removed when the file is next
opened, so what a resumed evaluation asks for is what an undisturbed one would have asked for next.
"""

import fcntl
import hashlib
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

from nemo_tropd.config import ConfigError


@dataclass(frozen=True)
class Answer:
    """What a model answered to one sample of a problem."""

    problem: int
    sample: int
    prompt: str  # digest of the prompt's token ids
    text: str
    tokens: int
    finished: bool  # False: cut at the length limit


Key = tuple[int, int, str]  # problem, sample, prompt


class AnswerFile:
    """The answers of one benchmark under one model and its settings."""

    def __init__(self, folder: Path, settings: Mapping[str, Any], model: str) -> None:
        """Reads what is there. ``model`` names it for people. Raises ConfigError for a file of other settings."""
        self._head: dict[str, Any] = {"settings": dict(settings), "model": model}
        self.path = folder / f"{_digest(self._head['settings'])}.jsonl"
        self.answers: dict[Key, Answer] = {}
        self._kept, self._batches = 0, 0  # bytes of complete batches, and how many there are
        self._file: BinaryIO | None = None
        self._read()

    @contextmanager
    def held(self) -> Iterator[None]:
        """Appending, alone: ConfigError if another evaluation is writing the file."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab") as self._file:
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise ConfigError("out", str(self.path), "another evaluation is writing these answers") from error
            for number in self._read():  # once more: another one may have come further
                print(f"{self.path}, line {number} is damaged: generated anew", file=sys.stderr, flush=True)
            self._file.truncate(self._kept)
            if not self._kept:
                self._write([self._head])
            yield

    def append(self, answers: Sequence[Answer]) -> None:
        """Keep one batch; it is on the disk when this returns. Only within :meth:`held`."""
        self._write([{**asdict(a), "batch": self._batches, "of": len(answers)} for a in answers])
        self._batches += 1
        self.answers.update({(a.problem, a.sample, a.prompt): a for a in answers})

    def _write(self, bodies: Sequence[Mapping[str, Any]]) -> None:
        assert self._file is not None
        lines = (json.dumps({**body, "digest": _digest(body)}, ensure_ascii=False).encode() for body in bodies)
        self._file.write(b"".join(line + b"\n" for line in lines))
        self._file.flush()
        os.fsync(self._file.fileno())

    def _read(self) -> list[int]:
        """Take the answers of complete batches; returns the numbers of damaged lines."""
        self.answers, self._kept, self._batches = {}, 0, 0
        lines = self.path.read_bytes().splitlines(keepends=True) if self.path.is_file() else []
        if lines and not lines[-1].endswith(b"\n"):
            lines.pop()  # the process was killed while it wrote
        if not lines:
            return []
        self._check_head(_parsed(lines[0]))
        bodies = [_parsed(line) for line in lines[1:]]
        if last := next((body for body in reversed(bodies) if body), None):
            first = next(i for i, body in enumerate(bodies) if body and body["batch"] == last["batch"])
            complete = len(bodies) - first >= last["of"]
            self._batches = last["batch"] + complete
            if not complete:
                del bodies[first:]
        for body in filter(None, bodies):
            answer = Answer(**{name: body[name] for name in Answer.__dataclass_fields__})
            self.answers[answer.problem, answer.sample, answer.prompt] = answer
        self._kept = sum(map(len, lines[: 1 + len(bodies)]))
        return [number for number, body in enumerate(bodies, start=2) if body is None]

    def _check_head(self, found: dict[str, Any] | None) -> None:
        ours, theirs = self._head["settings"], (found or {}).get("settings")
        if not isinstance(theirs, dict):
            raise ConfigError("out", str(self.path), "its first line is damaged: move the file away")
        for name in sorted(ours.keys() | theirs.keys()):
            if ours.get(name) != theirs.get(name):
                what = f"its answers were given with {name} = {theirs.get(name)!r}, not {ours.get(name)!r}"
                raise ConfigError("out", str(self.path), f"{what}: move the file away, or choose another folder")


def prompt_digest(ids: Sequence[int]) -> str:
    """Names a prompt by its token ids."""
    return _digest({"ids": list(ids)})


def _digest(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()[:16]


def _parsed(line: bytes) -> dict[str, Any] | None:
    """The line's content; None if it is not one unchanged entry."""
    try:
        body = json.loads(line)
        return body if body.pop("digest") == _digest(body) else None
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
