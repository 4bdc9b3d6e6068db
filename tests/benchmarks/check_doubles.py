"""Doubles of the GPU check's measurements; each runs in a process of its own, so nothing heavy is imported here."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from examples.benchmarks.gpu_check import check
from examples.benchmarks.gpu_check.rows import Check, Row


def two() -> Iterator[Row]:
    yield Row("first", "1 | 2", "under 3", True)
    yield Row("second", "4")


def crashes() -> Iterator[Row]:
    yield Row("before", "1")
    raise ValueError("no such\nkernel")


def dies() -> Iterator[Row]:
    yield Row("before", "1")
    os.abort()


def hangs() -> Iterator[Row]:
    # What asks for the stacks must not be what ends it.
    child = subprocess.Popen(["sh", "-c", "trap '' USR1; exec sleep 600"])
    yield Row("began", f"{os.getpid()} {child.pid}")
    time.sleep(600)


def nothing() -> Iterator[Row]:
    yield from ()


def double(function: Callable[[], Any], seconds: float = 30.0) -> Check:
    return Check(function.__name__, "?", f"{__name__}:{function.__name__}", seconds)


def appends(file: Path) -> None:
    with file.open("a") as out:
        out.write('{"n": 1}\n{"n": 2')  # the second line is never completed
    raise KeyError("later")


if __name__ == "__main__":  # the command, with these as its checks, on a machine that says it has a GPU
    check.CHECKS = tuple(
        Check(f.__name__, "?", f"tests.benchmarks.check_doubles:{f.__name__}", seconds)
        for f, seconds in ((two, 5.0), (hangs, 20.0), (nothing, 5.0))
    )
    setattr(check, "machine", lambda: "a GPU")  # noqa: B010 - of another signature
    check.main()
