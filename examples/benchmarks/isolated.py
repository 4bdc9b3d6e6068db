"""Measurements in a process of their own, so that one's memory or failure is not the next one's."""

from __future__ import annotations

import faulthandler
import json
import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from nemo_tropd.files import name_compiler_cache
from nemo_tropd.parallel.signals import die_with_parent

_MESSAGE = 300  # characters kept of an error


class IsolatedError(RuntimeError):
    """A function failed in its process; the text says how."""


def isolated(function: Callable[..., Any], *arguments: Any, limit_s: float) -> Any:
    """``function(*arguments)`` in a spawned process, which is killed after ``limit_s`` seconds, or with this one.

    Raises IsolatedError if the function raises, the process dies or the limit is exceeded.
    """
    (result,) = _values(_once, (function, arguments), limit_s)
    return result


def isolated_stream(
    function: Callable[..., Iterator[Any]], *arguments: Any, limit_s: float, log: Path | None = None
) -> Iterator[Any]:
    """What ``function(*arguments)`` yields in a spawned process, as it comes; ``limit_s`` is for all of it. What the
    process prints goes to ``log``, if given, with its stacks at the limit; what it has started then ends with it, too.

    Raises IsolatedError like :func:`isolated`, after what was yielded before.
    """
    return _values(function, arguments, limit_s, log)


def followed(function: Callable[..., Any], *arguments: Any, limit_s: float, file: Path) -> Iterator[Any]:
    """The JSON lines that ``function(*arguments)`` appends to ``file`` in a spawned process, as they come.

    Raises IsolatedError like :func:`isolated`, after the lines written before.
    """

    def lines() -> list[str]:
        return file.read_text(encoding="utf-8").rpartition("\n")[0].splitlines() if file.is_file() else []

    seen = len(lines())
    with ThreadPoolExecutor(1) as pool:
        run = pool.submit(isolated, function, *arguments, limit_s=limit_s)
        over = False
        while not over:
            over = run.done()
            new = lines()[seen:]
            seen += len(new)
            yield from map(json.loads, new)
            time.sleep(0 if over else 0.1)
        run.result()


def _once(function: Callable[..., Any], arguments: tuple[Any, ...]) -> Iterator[Any]:
    yield function(*arguments)


def _values(
    function: Callable[..., Iterator[Any]], arguments: tuple[Any, ...], limit_s: float, log: Path | None = None
) -> Iterator[Any]:
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(sender, function, arguments, log))
    process.start()
    sender.close()
    deadline = time.monotonic() + limit_s
    try:
        while True:
            if not receiver.poll(max(0.0, deadline - time.monotonic())):
                _show_stacks(process)
                raise IsolatedError(f"not done in {limit_s:.4g} s")
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
        _end(process)


def _show_stacks(process: BaseProcess) -> None:
    """Where it hangs, and what it has started: in the log."""
    assert process.pid is not None
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGUSR1)
        process.join(2)


def _end(process: BaseProcess) -> None:
    """With what it has started."""
    assert process.pid is not None
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()  # without a log it is no group
    process.join()


def _child(
    pipe: Connection, function: Callable[..., Iterator[Any]], arguments: tuple[Any, ...], log: Path | None
) -> None:
    die_with_parent()
    name_compiler_cache()
    if log is not None:
        os.setsid()
        target = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(target, 1)
        os.dup2(target, 2)
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1)
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
