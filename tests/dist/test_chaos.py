"""A short session of ``make chaos``: other rounds in every run, each of which ends as an undisturbed run does."""

from __future__ import annotations

import random
import subprocess
import sys

import pytest

from tests.e2e.tiny_run import ROOT, environment

ROUNDS = 6


@pytest.mark.random
@pytest.mark.timeout(900)
def test_six_rounds_of_chaos() -> None:
    seed = random.randrange(1 << 20)
    command = [sys.executable, "-m", "tests.chaos", "--rounds", str(ROUNDS), "--engine-share", "0", "--seed", str(seed)]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=880, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert done.stdout.count("equal to the bit") == ROUNDS
