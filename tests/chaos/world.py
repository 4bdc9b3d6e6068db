"""A run's processes as torchrun starts them, forked from a process that has imported everything, to save seconds.

The agent forks the ranks, each in a session of its own. If one fails it sends the others SIGTERM and, later, SIGKILL; a
signal to itself it passes on to the ranks' process groups, as torchrun does.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NoReturn

import psutil

from tests.ports import free_port

GRACE_S = 8.0  # between SIGTERM and SIGKILL to a rank


class World:
    """One start of ``ranks`` ranks that each call ``rank_main``; output is appended to ``log``."""

    def __init__(self, ranks: int, rank_main: Callable[[], object], env: Mapping[str, str], log: Path) -> None:
        self._ranks = ranks
        sys.stdout.flush()
        sys.stderr.flush()
        self.agent = os.fork()
        if self.agent == 0:
            code = 1
            try:
                _redirect(log)
                os.environ.update(env)
                code = _agent(ranks, rank_main)
            finally:
                os._exit(code)
        self.exit_code: int | None = None

    def wait(self, seconds: float) -> int | None:
        """The agent's exit code, negative for a signal; None if it has not exited by then."""
        deadline = time.monotonic() + seconds
        while self.exit_code is None:
            pid, status = os.waitpid(self.agent, os.WNOHANG)
            if pid:
                self.exit_code = os.waitstatus_to_exitcode(status)
            elif time.monotonic() > deadline:
                return None
            else:
                time.sleep(0.02)
        return self.exit_code

    def processes(self) -> list[psutil.Process]:
        """The agent, its ranks, and what they started: all that lives now, the agent first."""
        with contextlib.suppress(psutil.NoSuchProcess):
            agent = psutil.Process(self.agent)
            return [p for p in (agent, *agent.children(recursive=True)) if _lives(p)]
        return []

    def ranks(self) -> list[psutil.Process]:
        """The ranks that live now."""
        with contextlib.suppress(psutil.NoSuchProcess):
            return [p for p in psutil.Process(self.agent).children() if _lives(p)]
        return []


class Hosts:
    """Engine hosts beside a run, forks of this process that call ``host_main`` with their index; they outlive attempts
    at the run, and somebody starts them again."""

    def __init__(self, count: int, host_main: Callable[[int], object], log: Path) -> None:
        self._main, self._log, self.count = host_main, log, count
        self.pids: dict[int, int] = {}
        self._codes: dict[int, int] = {}
        self.tend()

    def tend(self) -> None:
        """Start those that have ended, or have not begun; wake up those that were frozen."""
        for index in range(self.count):
            if self.code(index, 0) is not None or index not in self.pids:
                self._start(index)
            self.send(index, signal.SIGCONT)

    def send(self, index: int, number: int) -> None:
        """A signal to one of them."""
        if self.code(index, 0) is None:
            os.kill(self.pids[index], number)

    def replace(self, index: int) -> None:
        """Kill it and start another one."""
        self.send(index, signal.SIGKILL)
        self.code(index, 10)
        self._start(index)

    def code(self, index: int, seconds: float) -> int | None:
        """Its exit code, negative for a signal; None if it has not ended by then."""
        deadline = time.monotonic() + seconds
        while index in self.pids and index not in self._codes:
            pid, status = os.waitpid(self.pids[index], os.WNOHANG)
            if pid:
                self._codes[index] = os.waitstatus_to_exitcode(status)
            elif time.monotonic() > deadline:
                return None
            else:
                time.sleep(0.02)
        return self._codes.get(index)

    def end(self) -> None:
        """All of them."""
        for index in range(self.count):
            self.send(index, signal.SIGKILL)
            self.code(index, 10)

    def _start(self, index: int) -> None:
        self._codes.pop(index, None)
        sys.stdout.flush()
        sys.stderr.flush()
        self.pids[index] = os.fork()
        if self.pids[index] == 0:
            os.setsid()
            _redirect(self._log)
            _call(lambda: self._main(index))


def _lives(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _redirect(log: Path) -> None:
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for descriptor in (1, 2):
        os.dup2(output, descriptor)


def _agent(ranks: int, rank_main: Callable[[], object]) -> int:
    from nemo_tropd.parallel.signals import die_with_parent

    os.setsid()
    die_with_parent()
    asked: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda number, frame: asked.append(number))
    port = free_port()
    running = {_rank(rank, ranks, port, rank_main) for rank in range(ranks)}
    passed_on, failed, kill_at = 0, False, float("inf")
    while running:
        for pid in list(running):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                running.discard(pid)
                failed = failed or status != 0
        if passed_on < len(asked) or (failed and kill_at == float("inf")):
            number = asked[-1] if passed_on < len(asked) else signal.SIGTERM
            passed_on = len(asked)
            kill_at = min(kill_at, time.monotonic() + GRACE_S)
            _signal_all(running, number)
        if time.monotonic() > kill_at:
            print("agent: the ranks did not exit in time; killing them", flush=True)
            _signal_all(running, signal.SIGKILL)
            kill_at = time.monotonic() + GRACE_S
        time.sleep(0.02)
    return 1 if failed or asked else 0


def _signal_all(groups: set[int], number: int) -> None:
    for pid in groups:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, number)


def _rank(rank: int, ranks: int, port: int, rank_main: Callable[[], object]) -> int:
    pid = os.fork()
    if pid:
        return pid
    os.setsid()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(ranks),
        LOCAL_WORLD_SIZE=str(ranks),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        GLOO_SOCKET_IFNAME="lo",
        TORCHELASTIC_RUN_ID="chaos",
        TORCHELASTIC_USE_AGENT_STORE="False",
    )
    from nemo_tropd.parallel.signals import STOP, die_with_parent

    STOP.install()  # as examples/train_tropd.py begins
    die_with_parent()
    _call(rank_main)


def _call(main: Callable[[], object]) -> NoReturn:
    """What a fork does, and its end."""
    code = 1
    try:
        main()
        code = 0
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else 1
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
