"""One round: a run that is disturbed, started again until it is finished, and compared with an undisturbed one."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file

from nemo_tropd.batch import Rollout
from nemo_tropd.rollout.engine import Finished, RolloutRequest
from nemo_tropd.rollout.weights import senders
from tests.chaos import disturb
from tests.chaos.world import Hosts, World
from tests.e2e.tiny_run import ROOT, TinyRun
from tests.ports import free_port

STEPS, RANKS, VOCABULARY = 6, 2, 131
EXACT = ("loss", "grad_norm", "trust_fraction", "log_ratio_mean")
KEYS: dict[str, object] = {
    "trainer.tropd.max_steps": STEPS,
    "trainer.tropd.save_interval": 2,
    "trainer.tropd.val_check_interval": 3,
    "trainer.tropd.keep_checkpoints": 2,
    "trainer.distributed_timeout_s": 20,
    "model.rollout.request_timeout_s": 18,
    "exp_manager.create_tensorboard_logger": False,
}
HANG_S = 90.0  # no attempt may take longer, whatever happens to it
LEFT_S = 10.0  # no process may outlive its agent longer


SECRET = "a secret of chaos"


@dataclass(frozen=True)
class Kind:
    """Of a round."""

    engine: bool  # vLLM; else a double whose rollouts depend on the weights
    ahead: int  # model.rollout.steps_ahead
    hosts: bool  # two engine hosts instead of an engine beside rank 0

    @classmethod
    def drawn(cls, seed: int, engine_share: float, only: str | None) -> Kind:
        """The kind of the round ``seed``; ``only`` as 0, 1 or 2 steps ahead, with an h for hosts."""
        draw = random.Random(-seed)
        engine, ahead, hosts = draw.random() < engine_share, draw.randrange(3), draw.random() < 0.4
        if only is not None:
            ahead, hosts = int(only.rstrip("h")), only.endswith("h")
        return cls(engine, ahead, hosts)

    def __str__(self) -> str:
        return f"{'vllm' if self.engine else 'double'} {self.ahead}{'h' if self.hosts else ''}"

    def keys(self, address: str) -> dict[str, object]:
        """What it adds to the command line."""
        found: dict[str, object] = {"model.rollout.steps_ahead": self.ahead}
        if self.hosts:
            waits = 50 if self.engine else 10
            found |= {"trainer.distributed_timeout_s": 60 if self.engine else 20}
            found |= {"model.rollout.placement": "dedicated", "model.rollout.dedicated.engines": 2}
            found |= {"model.rollout.dedicated.address": address, "model.rollout.dedicated.timeout_s": waits}
        if not self.engine:
            found["model.rollout.request_timeout_s"] = 6
        return found


@dataclass
class Report:
    """What happened in a round, and what was wrong."""

    seed: int
    kind: Kind
    events: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    attempts: int = 0
    seconds: float = 0.0

    def line(self) -> str:
        """One row of the table."""
        outcome = "; ".join(self.faults) if self.faults else "equal to the bit"
        cells = (self.seed, self.kind, self.attempts, round(self.seconds), ", ".join(self.events), outcome)
        return f"| {' | '.join(map(str, cells))} |"


def slow_engine() -> Any:
    """A double of an engine, whose rollouts depend on the weights."""
    from tests.doubles import WeighedEngine

    class SlowEngine(WeighedEngine):
        def generate(self, requests: Sequence[RolloutRequest], finished: Finished | None = None) -> list[Rollout]:
            time.sleep(0.1)
            return super().generate(requests, finished)

    return SlowEngine(VOCABULARY)


def serve_here(index: int, address: str, engine: bool) -> None:
    """What an engine host does."""
    from nemo_tropd.rollout import engine_host
    from tests.doubles import Hosted

    torch.set_num_threads(1)
    os.environ["NEMO_TROPD_SECRET"] = SECRET
    if not engine:
        vars(engine_host)["own_engine"] = lambda *_: Hosted(slow_engine())
    sys.argv = ["engine_host", "--join", address, "--index", str(index), "--wait-s", "600"]
    engine_host.main()


def train_here(overrides: list[str], kind: Kind, clock_s: float) -> None:
    """What each rank does."""
    from nemo_tropd.command_line import compose_command_line
    from nemo_tropd.rollout.placement import Engines
    from nemo_tropd.training import run
    from tests.doubles import ReplayEngine

    torch.set_num_threads(1)
    if clock_s:
        true_time = time.time
        time.time = lambda: true_time() + clock_s

    class Doubles(Engines):
        def student(self, cfg):
            return super().student(cfg) if kind.hosts else slow_engine()

        def teacher(self, cfg):
            return ReplayEngine(VOCABULARY)

    os.environ["NEMO_TROPD_SECRET"] = SECRET
    run.main(compose_command_line(overrides, ROOT / "conf"), None if kind.engine else Doubles(VOCABULARY))


class Rounds:
    """Rounds over the same models; ``folder`` is one file system of small size, if it could be mounted."""

    def __init__(self, folder: Path, kill: str | None = None) -> None:
        """``kill``: what happens in each round is that this one of ``disturb.VICTIMS`` is killed, between two steps."""
        self.folder, self._kill = folder, kill
        self.tiny = TinyRun.make(folder / "models")
        self._expected: dict[Kind, tuple[dict[int, list[float]], dict[str, torch.Tensor]]] = {}
        self.hosts: Hosts | None = None  # of the round
        self._address = ""

    def overrides(self, run_dir: Path, kind: Kind) -> list[str]:
        """The run's command line."""
        keys: dict[str, object] = {**KEYS, **kind.keys(self._address)}
        keys["model.teacher.cache_dir"] = run_dir.parent / "responses"
        if self._kill:  # what happens is before or after the teacher's engine, which takes half the time to start
            keys["model.tropd.guidance.enabled"] = False
        return self.tiny.overrides(run_dir, data=RANKS, **keys)

    def start(self, run_dir: Path, kind: Kind, clock_s: float = 0.0) -> World:
        """One attempt."""
        overrides = self.overrides(run_dir, kind)
        return World(RANKS, lambda: train_here(overrides, kind, clock_s), {}, run_dir.parent / "log")

    @contextmanager
    def _with_hosts(self, kind: Kind, base: Path) -> Iterator[None]:
        if kind.hosts:
            self._address = address = f"127.0.0.1:{free_port()}"
            self.hosts = Hosts(2, lambda index: serve_here(index, address, kind.engine), base / "log")
        try:
            yield
        finally:
            if self.hosts is not None:
                self.hosts.end()
            self.hosts = None

    def expected(self, kind: Kind) -> tuple[dict[int, list[float]], dict[str, torch.Tensor]]:
        """Figures and weights of an undisturbed run of this kind: what engine hosts generate is scored one by one,
        which moves last bits of the weights, on which a double's rollouts depend."""
        if kind not in self._expected:
            run_dir = self.folder / f"straight_{kind}".replace(" ", "_") / "run"
            run_dir.parent.mkdir()
            with self._with_hosts(kind, run_dir.parent):
                code = self.start(run_dir, kind).wait(4 * HANG_S)
            assert code == 0, (run_dir.parent / "log").read_text()[-3000:]
            self._expected[kind] = (figures(run_dir), load_file(run_dir / "hf" / "model.safetensors"))
        return self._expected[kind]

    def play(self, seed: int, kind: Kind) -> Report:
        """One round; everything in it follows from ``seed``, except how fast the processes are."""
        expected = self.expected(kind)
        draw, report, began = random.Random(seed), Report(seed, kind), time.monotonic()
        base = self.folder / f"round_{seed}"
        base.mkdir()
        run_dir = base / "run"
        with shared_folder() as shared:
            with self._with_hosts(kind, base):
                self._attempts(run_dir, report, draw)
            left = sorted(os.listdir(shared))
        if not report.faults:
            report.faults += differences(run_dir, expected)
        if left:
            report.faults.append(f"left in shared memory: {left}")
        report.seconds = time.monotonic() - began
        if not report.faults:
            disturb.remove(base)
        return report

    def _attempts(self, run_dir: Path, report: Report, draw: random.Random) -> None:
        for _ in range(1 if self._kill else draw.randint(1, 3)):
            self._attempt(run_dir, report, draw, disturbed=True)
            disturb.recover(run_dir, self.hosts)
            if not self._kill and draw.random() < 0.4:
                report.events.append(disturb.damage_files(run_dir, draw))
        for _ in range(3):
            before = written(run_dir / "summary.json")
            if report.faults or self._attempt(run_dir, report, draw, disturbed=False) == 0:
                break
            disturb.recover(run_dir, self.hosts)
        else:
            report.faults.append("three undisturbed attempts did not finish the run")
        if self.hosts is not None and not report.faults and written(run_dir / "summary.json") != before:
            codes = [self.hosts.code(index, LEFT_S) for index in range(self.hosts.count)]
            if codes != [0] * self.hosts.count:
                report.faults.append(f"engine hosts ended with {codes} after the run")

    def _attempt(self, run_dir: Path, report: Report, draw: random.Random, *, disturbed: bool) -> int | None:
        report.attempts += 1
        clock_s = 0.0 if self._kill else draw.choice([0.0, 0.0, 86400.0, -86400.0])
        if clock_s:
            report.events.append(f"clock {clock_s / 3600:+.0f} h")
        done_before = len(lines(run_dir))
        world = self.start(run_dir, report.kind, clock_s)
        what = ""
        if disturbed and self._kill:
            step = draw.randrange(1, STEPS - 1)
            while len(lines(run_dir)) < step and world.wait(0.05) is None:
                pass
            what = disturb.kill_named(world, self.hosts, self._kill, draw)
            report.events.append(f"{what} after step {step}")
        elif disturbed:
            with_hosts = self.hosts is not None and draw.random() < 0.5
            name = draw.choice(sorted(disturb.WITH_HOSTS if with_hosts else disturb.RUNNING))
            world.wait(draw.uniform(0.0, 12.0 if report.kind.engine else 4.0))
            if world.exit_code is not None:
                what = f"{name} came too late"
            elif with_hosts:
                assert self.hosts is not None
                what = disturb.WITH_HOSTS[name](world, self.hosts, draw)
            else:
                what = disturb.RUNNING[name](world, run_dir, draw)
            report.events.append(what)
            if "HANGS" in what:
                report.faults.append(what)
        # vLLM starts twice in an attempt, for teacher and student.
        patience = 3 * HANG_S if report.kind.engine else HANG_S
        code = world.wait(patience)
        processes = world.processes()
        if code is None:
            ranks = world.ranks()
            if len(ranks) == 1 and ranks[0].status() == psutil.STATUS_STOPPED:
                # The others ended well, or torchrun would have ended this one: nobody is left to notice.
                report.events.append("which the others had no need of")
            else:
                report.faults.append(f"hangs {patience:.0f} s after: {what or 'nothing'}")
            for process in processes:
                process.kill()
            world.wait(5)
        self._check_nobody_left(run_dir, report)
        stopped = what.startswith(tuple(s.name for s in disturb.STOPS)) and "twice" not in what
        # Of an attempt that was stopped before its first step the last line is another's, which may have been killed.
        did_some = len(lines(run_dir)) > done_before
        if stopped and did_some and code is not None and last_step(run_dir) > max(saved_steps(run_dir), default=0):
            report.faults.append(f"step {last_step(run_dir)} is lost after {what}")
        return code

    def _check_nobody_left(self, run_dir: Path, report: Report) -> None:
        """Ranks and helpers carry the name of this process's session in no way: look for who works in the folder."""
        deadline = time.monotonic() + LEFT_S
        ours = set(self.hosts.pids.values()) if self.hosts is not None else set()
        while left := descendants_of_dead(os.getpid(), ours):
            if time.monotonic() > deadline:
                report.faults.append(f"outlived their agent: {[' '.join(p.cmdline())[:80] for p in left]}")
                for process in left:
                    process.kill()
                return
            time.sleep(0.1)


@contextmanager
def shared_folder() -> Iterator[str]:
    """Weights pass through a folder of the round's own: other runs of this machine have their files in /dev/shm."""
    with tempfile.TemporaryDirectory(prefix="chaos_", dir="/dev/shm") as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(senders, "_SHARED", Path(folder))
        yield folder


def descendants_of_dead(pid: int, ours: set[int]) -> list[psutil.Process]:
    """With this process as the subreaper, everything that outlives its parent becomes its child, as are ``ours``."""
    found = []
    for child in psutil.Process(pid).children():
        if child.pid in ours:
            continue
        try:
            if child.status() == psutil.STATUS_ZOMBIE:
                os.waitpid(child.pid, os.WNOHANG)
            else:
                found.append(child)
        except (psutil.NoSuchProcess, ChildProcessError):
            continue
    return found


def written(path: Path) -> int | None:
    """When the file was, if it is there."""
    return path.stat().st_mtime_ns if path.is_file() else None


def lines(run_dir: Path) -> list[dict[str, float]]:
    """The train lines of metrics.jsonl that are whole."""
    path, found = run_dir / "metrics.jsonl", []
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return [line for line in found if line["kind"] == "train"]


def figures(run_dir: Path) -> dict[int, list[float]]:
    """What must be the same to the bit, by step; of a repeated step, the last."""
    return {int(line["step"]): [line[name] for name in EXACT] for line in lines(run_dir)}


def last_step(run_dir: Path) -> int:
    """The last step that was finished: of the last line, which a resume from an earlier checkpoint sets back."""
    return int(found[-1]["step"]) if (found := lines(run_dir)) else 0


def saved_steps(run_dir: Path) -> list[int]:
    """The complete checkpoints' steps."""
    return [int(p.name.removeprefix("step_")) for p in (run_dir / "checkpoints").glob("step_" + 8 * "[0-9]")]


def differences(run_dir: Path, expected: tuple[dict[int, list[float]], dict[str, torch.Tensor]]) -> list[str]:
    """What is wrong with a finished run."""
    wrong = []
    steps, weights = expected
    if (found := figures(run_dir)) != steps:
        wrong.append(f"other figures in steps {[s for s in steps if found.get(s) != steps[s]]}")
    exported = run_dir / "hf" / "model.safetensors"
    if not exported.is_file():
        return [*wrong, "no export"]
    ours = load_file(exported)
    if ours.keys() != weights.keys() or not all(torch.equal(ours[k], weights[k]) for k in weights):
        wrong.append("other weights")
    wrong += [f"no {name}" for name in ("report.html", "summary.json") if not (run_dir / name).is_file()]
    wrong += [f"left over: {p.name}" for pattern in ("checkpoints/.*", ".hf*") for p in run_dir.glob(pattern)]
    return wrong


def mount_small(folder: Path, mebibytes: int = 96) -> bool:
    """A small file system at ``folder``; False where this may not be done."""
    folder.mkdir(parents=True, exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={mebibytes}m", "tmpfs", str(folder)]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def unmount(folder: Path) -> None:
    """What ``mount_small`` did."""
    subprocess.run(["umount", "-l", str(folder)], capture_output=True, check=False)
