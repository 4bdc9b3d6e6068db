"""Rollouts of later steps by vLLM: in a child process and on two hosts, stopped, resumed, and with a host that dies."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nemo_tropd.training.run import train
from tests import faults
from tests.chaos.disturb import VICTIMS
from tests.e2e.compose import compose_config
from tests.e2e.tiny_run import ROOT, TinyRun, environment, train_lines
from tests.ports import free_port

AHEAD, LAST = "model.rollout.steps_ahead", 5
EXACT = ("loss", "grad_norm", "trust_fraction", "log_ratio_mean", "response_tokens", "importance_weight", "weights_lag")
KEYS: dict[str, object] = {
    "model.tropd.guidance.enabled": False,
    "model.data.held_out": 0,
    "trainer.tropd.max_steps": LAST,
    "trainer.tropd.save_interval": 2,
}
PHASES = ("vllm rollout", "teacher", "student", "optimizer", "vllm refresh", "validation", "save")
VALIDATED: dict[str, object] = {"model.data.held_out": 4, "trainer.tropd.val_check_interval": 2}


def figures(run_dir: Path) -> dict[int, list[float]]:
    """What must be the same to the bit, by step; of a repeated step, the last."""
    return {int(line["step"]): [line[name] for name in EXACT] for line in train_lines(run_dir)}


def ask_to_stop() -> None:
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.2)  # a thread reads it


@pytest.mark.random
def test_vllm_ahead_gives_the_same_steps_through_stops(tiny: TinyRun, engines, tmp_path: Path) -> None:
    for k in (1, 2):
        keys = KEYS | VALIDATED | {AHEAD: k}
        train(compose_config(tiny.overrides(tmp_path / f"straight_{k}", **keys)), engines)
        wanted = figures(tmp_path / f"straight_{k}")
        assert [line[-1] for line in wanted.values()] == [min(n, k) for n in range(LAST)]
        run_dir, cfg = tmp_path / f"stopped_{k}", tiny.overrides(tmp_path / f"stopped_{k}", **keys)
        done = 0
        for phase in random.sample(PHASES, 2):
            with faults.planted(phase, ask_to_stop, rank=0, occurrence=1):
                outcome = train(compose_config(cfg), engines)
            assert outcome is not None and outcome.stopped_by_signal and done <= outcome.step < LAST, phase
            done = outcome.step
        train(compose_config(cfg), engines)
        assert figures(run_dir) == wanted
    first, second = (figures(tmp_path / f"straight_{k}") for k in (1, 2))
    assert first[2] == second[2] and first[3] != second[3]  # by the first weights; by the second, and the first


@pytest.mark.random
@pytest.mark.timeout(900)
def test_a_killed_process_changes_no_step() -> None:
    """Two ranks, and a victim, between two steps, that is another one in every run; rank 0 and 1, engine and host take
    turns with one step ahead and two."""
    victim, k = random.choice(VICTIMS), random.choice((1, 2))
    kind = f"{k}h" if victim == "host" or (victim != "engine" and random.random() < 0.5) else str(k)
    command = [sys.executable, "-m", "tests.chaos", "--rounds", "1", "--engine-share", "1", "--kind", kind]
    command += ["--kill", victim]
    done = subprocess.run(
        command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=880, check=False
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert f"SIGKILL to {victim}" in done.stdout or "an engine host gets SIGKILL" in done.stdout
    assert done.stdout.count("equal to the bit") == 1, done.stdout


class TwoHosts:
    """Engine hosts as a user starts them."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.address = folder, f"127.0.0.1:{free_port()}"
        self.secret = folder / "secret"
        self.secret.write_text("a secret of this test\n")
        self.running = {index: self.start(index) for index in (0, 1)}

    def start(self, index: int) -> subprocess.Popen[bytes]:
        """Host number ``index``."""
        command = [sys.executable, "-m", "nemo_tropd.rollout.engine_host", "--join", self.address]
        command += ["--index", str(index), "--secret-file", str(self.secret)]
        with (self.folder / f"host{index}.log").open("a") as log:
            return subprocess.Popen(command, cwd=self.folder, env=environment(), stdout=log, stderr=log)

    def kill_and_start_again(self) -> None:
        """Host 1."""
        self.running[1].kill()
        self.running[1].wait()
        self.running[1] = self.start(1)

    def said(self) -> str:
        """All that they have written."""
        return "".join((self.folder / f"host{index}.log").read_text() for index in (0, 1))


@pytest.mark.timeout(900)
def test_hosts_ahead_wait_for_a_stopped_run_and_one_that_is_killed_changes_nothing(
    tiny: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    hosts = TwoHosts(tmp_path)
    keys = KEYS | {
        AHEAD: 2,
        "model.rollout.placement": "dedicated",
        "model.rollout.dedicated.address": hosts.address,
        "model.rollout.dedicated.engines": 2,
        "model.rollout.dedicated.timeout_s": 190,
        "model.encoder_seq_length": 160,
        "model.rollout.max_new_tokens": 80,  # so that hosts are generating when one is killed
    }
    monkeypatch.setenv("NEMO_TROPD_SECRET_FILE", str(hosts.secret))
    try:
        with faults.planted("student", ask_to_stop, rank=0, occurrence=LAST - 1):
            straight = train(compose_config(tiny.overrides(tmp_path / "straight", **keys)))
        assert straight is not None and straight.step == LAST - 1
        with faults.planted("teacher", hosts.kill_and_start_again, rank=0, occurrence=2):
            killed = train(compose_config(tiny.overrides(tmp_path / "killed", **keys)))
        assert killed is not None and killed.step == LAST
        assert [host.wait(30) for host in hosts.running.values()] == [0, 0], hosts.said()
    finally:
        for host in hosts.running.values():
            host.kill()
            host.wait()
    wanted, found = figures(tmp_path / "straight"), figures(tmp_path / "killed")
    assert {step: found[step] for step in wanted} == wanted and len(wanted) == LAST - 1 and len(found) == LAST
    out = capfd.readouterr().out
    assert "the rollout engine died and is replaced: engine host 1 (process" in out
