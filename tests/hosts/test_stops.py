"""Signals to torchrun and to docker/launch.sh: what is finished is saved, and nobody outlives who started it."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.e2e.tiny_run import ROOT, TinyRun, environment
from tests.hosts.launching import launch_command, until

pytestmark = pytest.mark.timeout(600)
STEPS = 500


def processes_of(run_dir: Path) -> list[psutil.Process]:
    """All processes whose command names the run directory."""
    named = (p for p in psutil.process_iter(["cmdline", "status"]) if p.info["status"] != psutil.STATUS_ZOMBIE)
    return [p for p in named if any(str(run_dir) in word for word in p.info["cmdline"] or [])]


class Attempt:
    """One start of the run, with the output in a file."""

    def __init__(self, tiny: TinyRun, run_dir: Path, how: str) -> None:
        self.run_dir, self.log = run_dir, run_dir.with_suffix(".log")
        self.begun = self.steps()
        keys = {
            "trainer.tropd.max_steps": STEPS,
            "trainer.tropd.save_interval": 2,
            "model.tropd.guidance.enabled": "false",
        }
        command = launch_command(tiny, run_dir, ranks=1 + (how == "torchrun"), **keys)
        if how == "torchrun":
            script = command.index("--script") + 1
            torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=0"]
            rendezvous = ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
            command = [*torchrun, *rendezvous, *command[script:]]
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=environment(REPLAY_SECONDS="0.2"), stdout=self.log.open("w"),
            stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip

    def steps(self) -> int:
        """The last step of the metrics."""
        metrics = self.run_dir / "metrics.jsonl"
        lines = metrics.read_text().splitlines() if metrics.is_file() else []
        return max((int(json.loads(line)["step"]) for line in lines if line.endswith("}")), default=0)

    def signal_after_steps(self, number: signal.Signals, steps: int = 3) -> int:
        """Send it once some steps are done; the exit code."""
        try:
            until(lambda: self.steps() >= self.begun + steps or self.process.poll() is not None, "steps", 240)
            assert self.process.poll() is None, self.log.read_text()[-3000:]
            self.process.send_signal(number)
            self.process.wait(60)
            until(lambda: not processes_of(self.run_dir), "all processes are gone", 10)
            return self.process.returncode
        finally:
            for process in processes_of(self.run_dir):
                process.kill()

    def saved(self) -> int:
        """The newest checkpoint's step."""
        return max(int(path.name.removeprefix("step_")) for path in (self.run_dir / "checkpoints").glob("step_*"))


def test_a_run_goes_through_every_kind_of_stop(tmp_path: Path) -> None:
    tiny, run_dir = TinyRun.make(tmp_path), tmp_path / "run"
    for how, number in (("torchrun", signal.SIGTERM), ("launch.sh", signal.SIGHUP)):
        attempt = Attempt(tiny, run_dir, how)
        code = attempt.signal_after_steps(number)
        said = attempt.log.read_text()
        assert code == (0 if how == "launch.sh" else 1), said  # torchrun ends every signal with an error of its own
        assert attempt.saved() == attempt.steps() > attempt.begun, said
        assert f"stopping after step {attempt.steps()}" in said and "BrokenPipe" not in said
    for how in ("launch.sh", "torchrun"):
        attempt = Attempt(tiny, run_dir, how)
        attempt.signal_after_steps(signal.SIGKILL)
        assert f"resuming from {run_dir}" in attempt.log.read_text()
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines() if line.endswith("}")]
    by_step: dict[int, set[float]] = {}
    for line in lines:
        if line["kind"] == "train":
            by_step.setdefault(line["step"], set()).add(line["loss"])
    assert sorted(by_step) == list(range(1, max(by_step) + 1))
