"""Keeps torchrun running on this node: restarts it if it was killed or lost the rendezvous.

torchrun restarts dead ranks; without this, nothing would restart a dead torchrun, and its orphaned ranks would keep the
GPUs.
"""

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from types import FrameType

import psutil

from nemo_tropd.launch.agent import RENDEZVOUS_LOST
from nemo_tropd.parallel.signals import SIGNALS

_PR_SET_CHILD_SUBREAPER = 36
_POLL_S = 0.25
_PAUSE_S = 2.0  # before a restart: the other nodes need a moment to notice


class Supervisor:
    """Runs one agent at a time, passes signals on, and kills the orphans it leaves behind. SIGTERM, SIGINT and SIGHUP
    go to the ranks, not to torchrun, which would end with an error although they have saved and exited normally. Ranks
    that have not exited ``stop_timeout_s`` later are killed with their torchrun."""

    def __init__(
        self, command: list[str], env: Mapping[str, str], restarts: int, patience_s: float, stop_timeout_s: float
    ) -> None:
        """``patience_s``: seconds torchrun may have no live rank; must exceed the time it may wait for other nodes."""
        self.command, self.env, self.restarts, self.patience_s = command, dict(env), restarts, patience_s
        self.stop_timeout_s = stop_timeout_s
        self._signals: list[int] = []  # received; the last one is not passed on yet if _pending
        self._pending = False
        self._stop_by = 0.0

    def run(self) -> int:
        """Run until no restart is due; returns the exit code of the last agent, 0 if a signal came before its ranks."""
        # Ranks that lose their torchrun become children of this process, so that they can be found and killed.
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        for number in SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:  # by nohup
                signal.signal(number, self._remember)
        left, code = self.restarts, 0
        while not self._signals:
            # A new session, so that Ctrl-C in a terminal reaches the ranks once, through this process, and not twice.
            agent = subprocess.Popen(self.command, env=self.env, start_new_session=True)
            code = self._wait(agent)
            self._remove_orphans()
            killed = code < 0
            if self._signals or left == 0 or not (killed or code == RENDEZVOUS_LOST):
                return 128 - code if killed else code
            left -= 1
            why = f"was killed by {signal.Signals(-code).name}" if killed else "lost the rendezvous"
            print(f"torchrun {why}; restarting it ({left} restart(s) left)", file=sys.stderr, flush=True)
            time.sleep(_PAUSE_S)
        return 0

    def _wait(self, agent: subprocess.Popen[bytes]) -> int:
        """The agent's exit code. Behind a cut link torchrun waits for its store forever although its ranks are gone;
        it is then killed here, and counts as one that lost the rendezvous."""
        alive = time.monotonic()
        asked: set[int] = set()  # ranks that have the last signal
        while True:
            try:
                return agent.wait(_POLL_S)
            except subprocess.TimeoutExpired:
                ranks = _live_children(agent.pid)
            if ranks:
                alive = time.monotonic()
            if self._signals:
                if self._pending:
                    self._pending, asked = False, set()
                if not ranks and not asked:  # nothing has begun
                    agent.kill()
                    agent.wait()
                    return 0
                for rank in ranks:
                    if rank.pid not in asked:  # among them those that torchrun has started since
                        asked.add(rank.pid)
                        with suppress(psutil.NoSuchProcess):
                            rank.send_signal(self._signals[-1])
                if time.monotonic() > self._stop_by:
                    why = f"ranks still run after {self.stop_timeout_s:g} s (trainer.stop_timeout_s)"
                    print(f"{why}; killing them: what was not saved is lost", file=sys.stderr, flush=True)
                    agent.kill()
                    return agent.wait()
            if time.monotonic() - alive > self.patience_s:
                print(f"no live rank of torchrun for {self.patience_s:.0f} s; killing it", file=sys.stderr, flush=True)
                agent.kill()
                agent.wait()
                return RENDEZVOUS_LOST

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if not self._signals:
            self._stop_by = time.monotonic() + self.stop_timeout_s
            print("stopping; rerun the same command to resume", file=sys.stderr, flush=True)
        self._signals.append(number)
        self._pending = True

    def _remove_orphans(self) -> None:
        orphans = psutil.Process().children(recursive=True)
        for orphan in orphans:
            with suppress(psutil.NoSuchProcess):
                orphan.kill()
        psutil.wait_procs(orphans, timeout=10)
        with suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:  # reap adopted orphans
                pass


def _live_children(pid: int) -> list[psutil.Process]:
    try:
        return [child for child in psutil.Process(pid).children() if child.status() != psutil.STATUS_ZOMBIE]
    except psutil.NoSuchProcess:  # it or a child exited between the two calls: the next poll tells
        return []
