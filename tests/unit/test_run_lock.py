"""The lock of a run's directory where a file system has none, and where nothing can be written."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from nemo_tropd.config import ConfigError
from nemo_tropd.training import run_lock

_HOLD = """
import fcntl, sys, time
file = open(sys.argv[1], "a")
fcntl.flock(file, fcntl.LOCK_EX)
print("held", flush=True)
time.sleep(60)
"""


def test_a_killed_process_holds_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / run_lock.NAME
    path.write_text("process 4711 on elsewhere 00ff\n")
    holder = subprocess.Popen([sys.executable, "-c", _HOLD, str(path)], stdout=subprocess.PIPE)
    assert holder.stdout is not None and holder.stdout.readline()
    monkeypatch.setattr(run_lock, "_ENDING_S", 0.0)
    held = pytest.raises(ConfigError, match=r"^k = .*: process 4711 on elsewhere is running in this directory")
    with held, run_lock.run_lock(tmp_path, "k"):
        pass
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with run_lock.run_lock(tmp_path, "k"):
        assert path.read_text().startswith(f"process {os.getpid()} on {os.uname().nodename} ")


def test_a_file_system_without_locks_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def without(*args: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", without)
    with run_lock.run_lock(tmp_path / "run", "k"):
        assert "cannot be locked ([Errno 37] No locks available): nothing keeps a second run" in capsys.readouterr().out


def test_a_directory_that_cannot_be_made_is_refused_by_its_key(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    refused = pytest.raises(ConfigError, match=r"^exp_manager\.exp_dir = .*cannot be made or written to")
    with refused, run_lock.run_lock(tmp_path / "file" / "run", "exp_manager.exp_dir"):
        pass
