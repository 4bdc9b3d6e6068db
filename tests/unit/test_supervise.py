"""The supervisor of torchrun: restarts it when killed, kills it when it hangs without ranks, leaves no orphans."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import psutil
import pytest

from nemo_tropd.launch.agent import RENDEZVOUS_LOST
from nemo_tropd.launch.supervise import Supervisor
from tests.dist.run_distributed import run_distributed

KILL_SELF = "import os, signal, pathlib; p = pathlib.Path({path!r}); first = not p.exists(); p.touch();"


def supervised(rank: int, world_size: int, code: str, restarts: int, patience_s: float) -> tuple[int, int]:
    """In a process of its own, since it handles signals and adopts orphans: exit code, and children left."""
    exit_code = Supervisor([sys.executable, "-c", code], {}, restarts, patience_s).run()
    return exit_code, len(psutil.Process().children(recursive=True))


def run(code: str, restarts: int, patience_s: float = 60) -> tuple[int, int]:
    (result,) = run_distributed(supervised, 1, code, restarts, patience_s, timeout_s=100, init_gloo=False)
    return result


def test_a_killed_agent_is_restarted_and_its_orphans_are_killed(tmp_path: Path) -> None:
    path = str(tmp_path / "once")
    code = KILL_SELF.format(path=path) + (
        "import subprocess; first and subprocess.Popen(['sleep', '600'], start_new_session=True);"
        "os.kill(os.getpid(), signal.SIGKILL) if first else exit(7)"
    )
    assert run(code, restarts=1) == (7, 0)


@pytest.mark.parametrize(("code", "expected"), [("exit(0)", 0), ("exit(3)", 3)])
def test_other_exit_codes_are_final(code: str, expected: int) -> None:
    assert run(code, restarts=5) == (expected, 0)


def test_restarts_are_counted() -> None:
    assert run("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", restarts=1) == (128 + 9, 0)


def test_an_agent_that_hangs_without_ranks_is_killed() -> None:
    began = time.monotonic()
    assert run("import time; time.sleep(600)", restarts=0, patience_s=2) == (RENDEZVOUS_LOST, 0)
    assert time.monotonic() - began < 90
