"""Measurements in a process of their own, so that one's memory or failure is not the next one's."""

from __future__ import annotations

import multiprocessing
import time
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

_MESSAGE = 300  # characters kept of an error


class IsolatedError(RuntimeError):
    """A function failed in its process; the text says how."""


def isolated(function: Callable[..., Any], *arguments: Any, limit_s: float) -> Any:
    """``function(*arguments)`` in a spawned process, which is killed after ``limit_s`` seconds.

    Raises IsolatedError if the function raises, the process dies or the limit is exceeded.
    """
    (result,) = _values(_once, (function, arguments), limit_s)
    return result


def isolated_stream(function: Callable[..., Iterator[Any]], *arguments: Any, limit_s: float) -> Iterator[Any]:
    """What ``function(*arguments)`` yields in a spawned process, as it comes; ``limit_s`` is for all of it.

    Raises IsolatedError like :func:`isolated`, after what was yielded before.
    """
    return _values(function, arguments, limit_s)


def _once(function: Callable[..., Any], arguments: tuple[Any, ...]) -> Iterator[Any]:
    yield function(*arguments)


def _values(function: Callable[..., Iterator[Any]], arguments: tuple[Any, ...], limit_s: float) -> Iterator[Any]:
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(sender, function, arguments))
    process.start()
    sender.close()
    deadline = time.monotonic() + limit_s
    try:
        while True:
            if not receiver.poll(max(0.0, deadline - time.monotonic())):
                raise IsolatedError(f"not done in {limit_s:g} s")
            kind, value = receiver.recv()
            if kind == "end":
                return
            if kind == "error":
                raise IsolatedError(value)
            yield value
    except EOFError:
        process.join(5)
        raise IsolatedError(f"died, exit code {process.exitcode}") from None
    finally:
        receiver.close()
        process.kill()
        process.join()


def _child(pipe: Connection, function: Callable[..., Iterator[Any]], arguments: tuple[Any, ...]) -> None:
    try:
        for value in function(*arguments):
            pipe.send(("value", value))
        pipe.send(("end", None))
    except BaseException as error:
        traceback.print_exc()
        pipe.send(("error", f"{type(error).__name__}: {error}"[:_MESSAGE]))


def memory_kib(field: str) -> int:
    """KiB of this process: ``VmRSS`` resident now, ``VmHWM`` resident at most. Raises OSError without such a field."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1])
    raise OSError(f"/proc/self/status has no {field}")
