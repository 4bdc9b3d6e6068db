"""Keeps torchrun running on this node: starts it again when it was killed or lost the other nodes.

torchrun starts dead ranks again; nothing would start a dead torchrun again, and its orphaned ranks would keep the GPUs.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from types import FrameType

import psutil

from nemo_tropd.launch.agent import MEETING_LOST

_PR_SET_CHILD_SUBREAPER = 36
_LOOK_S = 1.0
_PAUSE_S = 2.0  # before another try: the other nodes need a moment to notice


class Supervisor:
    """Runs one agent at a time, passes signals on to it, and removes what it leaves behind."""

    def __init__(self, command: list[str], env: Mapping[str, str], restarts: int, patience_s: float) -> None:
        """``patience_s``: how long torchrun may be without a living rank; longer than it may wait for other nodes."""
        self.command, self.env, self.restarts, self.patience_s = command, dict(env), restarts, patience_s
        self._agent: subprocess.Popen[bytes] | None = None
        self._stopping = False

    def run(self) -> int:
        """The exit code of the last agent."""
        # Ranks that lose their torchrun become children of this process, where they can be found.
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._pass_on)
        left = self.restarts
        while True:
            # A session of its own: Ctrl-C in a terminal reaches the ranks once, through torchrun, and not twice.
            self._agent = subprocess.Popen(self.command, env=self.env, start_new_session=True)
            code = self._wait(self._agent)
            self._remove_orphans()
            killed = code < 0
            if self._stopping or left == 0 or not (killed or code == MEETING_LOST):
                return 128 - code if killed else code
            left -= 1
            why = f"was killed by {signal.Signals(-code).name}" if killed else "lost the other nodes"
            print(f"torchrun {why}: starting it again, {left} more time(s) if need be", file=sys.stderr, flush=True)
            time.sleep(_PAUSE_S)

    def _wait(self, agent: subprocess.Popen[bytes]) -> int:
        """The agent's exit code. Behind a cut link torchrun waits for its store without end, though its ranks are gone
        and their failure is known: then it is ended here, as one that lost the others."""
        alive = time.monotonic()
        while True:
            try:
                return agent.wait(_LOOK_S)
            except subprocess.TimeoutExpired:
                if _has_living_child(agent.pid):
                    alive = time.monotonic()
            if time.monotonic() - alive > self.patience_s:
                print(f"torchrun has had no rank for {self.patience_s:.0f} s: ending it", file=sys.stderr, flush=True)
                agent.kill()
                agent.wait()
                return MEETING_LOST

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        self._stopping = True
        if self._agent is not None and self._agent.poll() is None:
            self._agent.send_signal(number)

    def _remove_orphans(self) -> None:
        orphans = psutil.Process().children(recursive=True)
        for orphan in orphans:
            try:
                orphan.kill()
            except psutil.NoSuchProcess:
                continue
        psutil.wait_procs(orphans, timeout=10)
        while True:  # reap what was never ours to wait for
            try:
                if os.waitpid(-1, os.WNOHANG)[0] == 0:
                    return
            except ChildProcessError:
                return


def _has_living_child(pid: int) -> bool:
    try:
        return any(child.status() != psutil.STATUS_ZOMBIE for child in psutil.Process(pid).children())
    except psutil.NoSuchProcess:  # it, or a child, just ended: the next look tells
        return True
