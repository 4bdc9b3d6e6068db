"""The supervisor of torchrun: restarts it when killed, kills it when it hangs without ranks, leaves no orphans."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from nemo_tropd.launch import __main__ as launch
from nemo_tropd.launch.agent import RENDEZVOUS_LOST
from nemo_tropd.launch.scheduler import CONSUMED
from nemo_tropd.launch.supervise import Supervisor
from tests.dist.run_distributed import run_distributed
from tests.e2e.tiny_run import ROOT, TinyRun

KILL_SELF = "import os, signal, pathlib; p = pathlib.Path({path!r}); first = not p.exists(); p.touch();"


def supervised(rank: int, world_size: int, code: str, restarts: int, patience_s: float) -> tuple[int, int]:
    """In a process of its own, since it handles signals and adopts orphans: exit code, and children left."""
    exit_code = Supervisor([sys.executable, "-c", code], {}, restarts, patience_s, 120).run()
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


RANK = """
import signal, sys, time
def leave(number, frame):
    print(f"rank got {signal.Signals(number).name}", flush=True)
    sys.exit(0)
for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
    signal.signal(number, leave)
print("rank is up", flush=True)
time.sleep(60)
"""
AGENT = f"import subprocess, sys; sys.exit(subprocess.call([sys.executable, '-c', {RANK!r}]))"
SUPERVISE = (
    "import sys; from nemo_tropd.launch.supervise import Supervisor; "
    "sys.exit(Supervisor([sys.executable, '-c', {code!r}], {{}}, {restarts}, 60, 120).run())"
)


def started(code: str, restarts: int, until: str) -> subprocess.Popen[str]:
    """A supervisor of ``code`` that has printed ``until``."""
    command = [sys.executable, "-c", SUPERVISE.format(code=code, restarts=restarts)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT)
    assert process.stdout is not None
    for line in process.stdout:
        if until in line:
            return process
    raise AssertionError(f"no line {until!r}")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_signals_go_to_the_ranks_whose_clean_end_is_the_launchers(number: signal.Signals) -> None:
    process = started(AGENT, 3, "rank is up")
    process.send_signal(number)
    output, _ = process.communicate(timeout=30)
    assert f"rank got {number.name}" in output and process.returncode == 0, output


@pytest.mark.random
def test_a_signal_to_every_process_of_the_job_ends_it_as_well(tmp_path: Path) -> None:
    """As schedulers, and terminals that are closed, send it; with the real torchrun."""
    script, number = tmp_path / "rank.py", random.choice([signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
    saves = "import time; time.sleep(1); print('saved', flush=True); sys.exit(0)"
    script.write_text(RANK.replace("sys.exit(0)", saves))
    torchrun = ["-m", "nemo_tropd.launch.agent", "--nproc_per_node=2", "--master_port=0", str(script)]
    code = f"import sys, os; os.execv(sys.executable, [sys.executable, *{torchrun!r}])"
    process = started(code, 3, "rank is up")
    assert process.stdout is not None
    while "rank is up" not in process.stdout.readline():
        pass
    everyone = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for each in random.sample(everyone, len(everyone)):
        each.send_signal(number)
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 0 and output.count("saved") == 2, (number, output)


@pytest.mark.parametrize(("code", "expected"), [(2, 2), (7, 1)])
def test_the_first_failed_ranks_expected_error_is_the_agents_code(code: int, expected: int, tmp_path: Path) -> None:
    script = tmp_path / "rank.py"
    script.write_text(f"import os, time; time.sleep(60 * int(os.environ['RANK'])); os._exit({code})")
    torchrun = ["-m", "nemo_tropd.launch.agent", "--nproc_per_node=2", "--master_port=0", str(script)]
    done = subprocess.run([sys.executable, *torchrun], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == expected, done.stderr


@pytest.mark.parametrize("when", ["before a rank runs", "between two attempts"])
def test_a_signal_that_finds_no_rank_is_not_lost(when: str) -> None:
    code, until = "print('up', flush=True); import time; time.sleep(60)", "up"
    if when == "between two attempts":
        code, until = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "restarting it"
    process = started(code, 5, until)
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 0 and "restarting it" not in output, output
    assert time.monotonic() - began < 10


def test_ranks_that_do_not_stop_are_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    deaf = AGENT.replace("signal.signal(number, leave)", "signal.signal(number, signal.SIG_IGN)")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    quick = SUPERVISE.replace("60, 120)", "60, 1)")
    command = [sys.executable, "-c", quick.format(code=deaf, restarts=0)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT)
    assert process.stdout is not None
    assert "rank is up" in process.stdout.readline()
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=30)
    assert "ranks still run after 1 s (trainer.stop_timeout_s)" in output and process.returncode == 128 + 9


def test_the_configuration_says_how_long_ranks_may_take_to_stop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []

    class Recorder(Supervisor):
        def run(self) -> int:
            waits.append(self.stop_timeout_s)
            return 0

    monkeypatch.setattr(launch, "Supervisor", Recorder)
    for name in [*CONSUMED, "TORCHELASTIC_RUN_ID"]:
        monkeypatch.delenv(name, raising=False)
    overrides = TinyRun.at(tmp_path).overrides(tmp_path / "run")
    assert launch.main(overrides) == launch.main([*overrides, "trainer.stop_timeout_s=900"]) == 0
    assert waits == [150, 900]


@pytest.mark.parametrize(
    ("command", "library"), [("examples/train_tropd.py", "yaml"), ("-m nemo_tropd.launch.agent", "torch")]
)
def test_a_rank_and_an_agent_end_with_who_started_them(command: str, library: str, tmp_path: Path) -> None:
    """From their first import on."""
    (tmp_path / f"{library}.py").write_text(
        "import pathlib, time\npathlib.Path(__file__).with_name('began').touch()\ntime.sleep(60)\n"
    )
    code = (
        f"import subprocess, sys, time; child = subprocess.Popen([sys.executable, *{command.split()!r}]);"
        "print(child.pid, flush=True); time.sleep(60)"
    )
    env = os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}", "TORCHELASTIC_RUN_ID": "none"}
    owner = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=env, cwd=ROOT)
    assert owner.stdout is not None
    child = psutil.Process(int(owner.stdout.readline()))
    try:
        deadline = time.monotonic() + 60
        while not (tmp_path / "began").exists():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        owner.kill()
        owner.wait()
        psutil.wait_procs([child], timeout=10)
        assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE
    finally:
        owner.kill()
        with suppress(psutil.NoSuchProcess):
            child.kill()
