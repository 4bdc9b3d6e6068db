"""Keeps torchrun running on this node: restarts it if it was killed or lost the rendezvous.

torchrun restarts dead ranks; without this, nothing would restart a dead torchrun, and its orphaned ranks would keep the
GPUs.
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

from nemo_tropd.launch.agent import RENDEZVOUS_LOST

_PR_SET_CHILD_SUBREAPER = 36
_POLL_S = 1.0
_PAUSE_S = 2.0  # before a restart: the other nodes need a moment to notice


class Supervisor:
    """Runs one agent at a time, forwards signals to it, and kills the orphans it leaves behind."""

    def __init__(self, command: list[str], env: Mapping[str, str], restarts: int, patience_s: float) -> None:
        """``patience_s``: seconds torchrun may have no live rank; must exceed the time it may wait for other nodes."""
        self.command, self.env, self.restarts, self.patience_s = command, dict(env), restarts, patience_s
        self._agent: subprocess.Popen[bytes] | None = None
        self._stopping = False

    def run(self) -> int:
        """Run until no restart is due; returns the exit code of the last agent."""
        # Ranks that lose their torchrun become children of this process, so that they can be found and killed.
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._forward)
        left = self.restarts
        while True:
            # A new session, so that Ctrl-C in a terminal reaches the ranks once, through torchrun, and not twice.
            self._agent = subprocess.Popen(self.command, env=self.env, start_new_session=True)
            code = self._wait(self._agent)
            self._remove_orphans()
            killed = code < 0
            if self._stopping or left == 0 or not (killed or code == RENDEZVOUS_LOST):
                return 128 - code if killed else code
            left -= 1
            why = f"was killed by {signal.Signals(-code).name}" if killed else "lost the rendezvous"
            print(f"torchrun {why}; restarting it ({left} restart(s) left)", file=sys.stderr, flush=True)
            time.sleep(_PAUSE_S)

    def _wait(self, agent: subprocess.Popen[bytes]) -> int:
        """The agent's exit code. Behind a cut link torchrun waits for its store forever although its ranks are gone;
        it is then killed here, and counts as one that lost the rendezvous."""
        alive = time.monotonic()
        while True:
            try:
                return agent.wait(_POLL_S)
            except subprocess.TimeoutExpired:
                if _has_live_child(agent.pid):
                    alive = time.monotonic()
            if time.monotonic() - alive > self.patience_s:
                print(
                    f"torchrun has had no live rank for {self.patience_s:.0f} s; killing it",
                    file=sys.stderr,
                    flush=True,
                )
                agent.kill()
                agent.wait()
                return RENDEZVOUS_LOST

    def _forward(self, number: int, frame: FrameType | None) -> None:
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
        while True:  # reap adopted orphans
            try:
                if os.waitpid(-1, os.WNOHANG)[0] == 0:
                    return
            except ChildProcessError:
                return


def _has_live_child(pid: int) -> bool:
    try:
        return any(child.status() != psutil.STATUS_ZOMBIE for child in psutil.Process(pid).children())
    except psutil.NoSuchProcess:  # it or a child exited between the two calls: the next poll tells
        return True
