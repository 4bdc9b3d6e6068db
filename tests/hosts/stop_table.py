"""A request to stop, in every phase of a run, through every way of starting it: ``python -m tests.hosts.stop_table``.

Not a test: it takes half an hour. Each row is a real command of one rank with replayed rollouts, stopped once it is
inside the phase, and resumed by the same command; the result must be that of a run that nothing stopped, to the bit.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

from tests.default_signals import default_signals
from tests.dist.test_stops import CASES, EXACT, KEYS
from tests.e2e.tiny_run import ROOT, TinyRun, environment, train_lines
from tests.hosts.launching import launch_command, until
from tests.hosts.test_stops import processes_of

# How the run is started, and whom the signal is sent to.
WAYS = {
    "torchrun, SIGTERM to torchrun": ("torchrun", "parent", signal.SIGTERM),
    "torchrun, SIGINT to all (Ctrl-C)": ("torchrun", "all", signal.SIGINT),
    "torchrun, SIGTERM to the rank": ("torchrun", "rank", signal.SIGTERM),
    "launch.sh, SIGTERM to it": ("launch.sh", "parent", signal.SIGTERM),
    "launch.sh, SIGHUP to all": ("launch.sh", "all", signal.SIGHUP),
}
LONGEST_S = 60.0


def command(tiny: TinyRun, run_dir: Path, how: str) -> list[str]:
    """What a user would type."""
    keys = {**KEYS, "model.data.held_out": 4, "model.teacher.cache_dir": run_dir.with_suffix(".cache")}
    words = launch_command(tiny, run_dir, ranks=1, **keys)
    if how == "launch.sh":
        return words
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=1", "--master_port=0"]
    rendezvous = ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
    return [*torchrun, *rendezvous, *words[words.index("--script") + 1 :]]


def row(tiny: TinyRun, run_dir: Path, way: str, phase: str, occurrence: int) -> tuple[float, int, list[str]]:
    """Start, stop inside the phase, wait: seconds to the end, exit code, checkpoints."""
    how, whom, number = WAYS[way]
    marker, log = run_dir.with_suffix(".inside"), run_dir.with_suffix(".log")
    planted = environment(STOP_PHASE=phase, STOP_OCCURRENCE=str(occurrence), STOP_MARKER=str(marker))
    words = command(tiny, run_dir, how)
    with log.open("w") as output:
        process = subprocess.Popen(
            words, cwd=ROOT, env=planted, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        until(lambda: marker.is_file() or process.poll() is not None, f"{phase} begins", 180)
        assert process.poll() is None, log.read_text()[-3000:]
        rank, sent = int(marker.read_text()), time.monotonic()
        if whom == "all":
            for each in processes_of(run_dir):
                each.send_signal(number)
        else:
            os.kill(rank if whom == "rank" else process.pid, number)
        code = process.wait(LONGEST_S)
        seconds = time.monotonic() - sent
        until(lambda: not processes_of(run_dir), "all processes are gone", 10)
    finally:
        for left in processes_of(run_dir):
            left.kill()
    return seconds, code, sorted(p.name for p in (run_dir / "checkpoints").glob("*"))


def finish(tiny: TinyRun, run_dir: Path, how: str) -> None:
    """The same command, to its end."""
    with run_dir.with_suffix(".log").open("a") as output:
        words = command(tiny, run_dir, how)
        subprocess.run(words, cwd=ROOT, env=environment(), check=True, stdout=output, stderr=output, timeout=240)


def same(ours: Path, theirs: Path) -> bool:
    """Whether two runs have the same figures and weights."""
    figures = [{line["step"]: [line[name] for name in EXACT] for line in train_lines(path)} for path in (ours, theirs)]
    weights = [load_file(path / "hf" / "model.safetensors") for path in (ours, theirs)]
    return figures[0] == figures[1] and all(torch.equal(weights[0][name], weights[1][name]) for name in weights[1])


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.hosts.stop_table", description=__doc__)
    parser.add_argument("--rows", type=int, default=None, help="only so many, drawn at random")
    options = parser.parse_args()
    default_signals()
    rows = [(way, phase, occurrence) for way in WAYS for phase, occurrence, _ in CASES if " that " not in phase]
    random.shuffle(rows)
    folder, wrong = Path(tempfile.mkdtemp(prefix="stop_table_")), 0
    tiny = TinyRun.make(folder)
    finish(tiny, folder / "straight", "launch.sh")
    print("| started, sent | phase | seconds to the end | exit code | left | resumed |\n|---|---|---|---|---|---|")
    for at, (way, phase, occurrence) in enumerate(rows[: options.rows]):
        run_dir = folder / f"run_{at}"
        try:
            seconds, code, left = row(tiny, run_dir, way, phase, occurrence)
            finish(tiny, run_dir, WAYS[way][0])
            equal = "the same" if same(run_dir, folder / "straight") else "OTHER"
            wrong += equal == "OTHER" or seconds > LONGEST_S
            kept = ", ".join(name.replace("step_0000000", "step ") for name in left) or "none"
            print(f"| {way} | {phase} | {seconds:.1f} | {code} | {kept} | {equal} |", flush=True)
            for path in folder.glob(f"run_{at}*"):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        except Exception as error:
            wrong += 1
            print(
                f"| {way} | {phase} | FAILED: {type(error).__name__}: {error} (see {run_dir}.log) | | | |", flush=True
            )
    if not wrong:
        shutil.rmtree(folder)
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
