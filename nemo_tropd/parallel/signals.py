"""SIGTERM, SIGINT and SIGHUP ask the run to stop; a second one, later, ends the process at once.

A thread reads them from a file descriptor: a Python handler would not run while the main thread waits in a collective.
Imports nothing but the standard library, so that a script can call ``STOP.install()`` before anything else.
"""

import ctypes
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
SAME_REQUEST_S = 3.0  # launchers forward one request more than once
FINISH_S = 10.0  # after a request: rollouts that take longer are given up, and steps whose gradient begins later
_PR_SET_PDEATHSIG = 1


class Stopped(RuntimeError):
    """The run was asked to stop and has left the phase it was in; raised on every rank."""


class StopRequest:
    """Whether this process, or through the roll call another rank's, was asked to stop."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self._asked = 0.0
        self._previous: dict[int, object] = {}

    def __bool__(self) -> bool:
        return self.signal is not None

    @property
    def overdue(self) -> bool:
        """Whether the request is older than ``FINISH_S``."""
        return self.signal is not None and time.monotonic() - self._asked > FINISH_S

    def install(self) -> None:
        """Handle the signals from now on; one that is ignored (nohup) stays ignored. In the main thread."""
        if self._previous:
            return
        ours, self._wakeup = socket.socketpair()
        self._wakeup.setblocking(False)
        for number in SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._previous[number] = signal.signal(number, _awaken)
        signal.set_wakeup_fd(self._wakeup.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self._listen, args=(ours,), name="signals", daemon=True).start()

    @contextmanager
    def handled(self) -> Iterator[None]:
        """Handle the signals inside, unless ``install`` has; a world that outlives the run gets its handlers back."""
        installs = not self._previous and threading.current_thread() is threading.main_thread()
        if installs:
            self.install()
        try:
            yield
        finally:
            if installs:
                signal.set_wakeup_fd(-1)
                self._wakeup.close()
                for number, handler in self._previous.items():
                    signal.signal(number, handler)  # type: ignore[arg-type]
                self._previous.clear()
                self.signal = None

    def ask(self, number: int = signal.SIGTERM) -> None:
        """Ask for a stop, as the signal ``number`` does."""
        if self.signal is None:
            self._asked = time.monotonic()
            self.signal = number

    def _listen(self, ours: socket.socket) -> None:
        while numbers := ours.recv(64):
            for number in numbers:
                if number not in SIGNALS:
                    continue
                if self and time.monotonic() - self._asked > SAME_REQUEST_S:
                    name = signal.Signals(number).name
                    print(f"second signal ({name}): exiting without a checkpoint", file=sys.stderr, flush=True)
                    os._exit(128 + number)
                self.ask(number)


def _awaken(number: int, frame: object) -> None:
    """Only has the interpreter write the signal's number to the file descriptor."""


STOP = StopRequest()


def die_with_parent() -> None:
    """Have the kernel kill this process when its parent dies, by whatever cause (Linux; elsewhere nothing)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
