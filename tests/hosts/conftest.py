"""The reference: the same run on one host, made once."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.e2e.tiny_run import ROOT, TinyRun, environment
from tests.hosts.launching import figures, launch_command


@dataclass(frozen=True)
class Reference:
    """Tiny models, and the figures of TP 2 x DP 2 on one host."""

    tiny: TinyRun
    root: Path
    expected: list[tuple[float, ...]]


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    """Made with docker/launch.sh, without a scheduler."""
    root = tmp_path_factory.mktemp("hosts")
    tiny = TinyRun.make(root)
    command = launch_command(tiny, root / "one")
    done = subprocess.run(
        command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=400, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return Reference(tiny, root, figures(root / "one"))
