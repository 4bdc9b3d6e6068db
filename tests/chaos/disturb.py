"""What can happen to a run: signals, kills, stalls, cut connections, a full disk, damaged files, a wrong clock."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from nemo_tropd import files
from tests.chaos.world import Hosts, World

DEAD = 4_194_305  # above any process number
STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def signal_agent(world: World, run_dir: Path, draw: random.Random) -> str:
    """A scheduler's preemption: the agent gets it, and passes it on."""
    number = draw.choice(STOPS)
    os.kill(world.agent, number)
    return f"{number.name} to the agent"


def signal_rank(world: World, run_dir: Path, draw: random.Random) -> str:
    """One rank alone gets it."""
    number, ranks = draw.choice(STOPS), world.ranks()
    if not ranks:
        return "nothing: no rank"
    with contextlib.suppress(psutil.NoSuchProcess):
        draw.choice(ranks).send_signal(number)
    return f"{number.name} to a rank"


def signal_twice(world: World, run_dir: Path, draw: random.Random) -> str:
    """Somebody insists: the run gives up at once."""
    os.kill(world.agent, signal.SIGTERM)
    time.sleep(3.2)
    with contextlib.suppress(ProcessLookupError):
        os.kill(world.agent, signal.SIGTERM)
    return "SIGTERM twice to the agent"


def kill_any(world: World, run_dir: Path, draw: random.Random) -> str:
    """SIGKILL, as the OOM killer sends it, to any of the processes."""
    processes = world.processes()
    if not processes:
        return "nothing: no process"
    victim = draw.choice(processes)
    what = "agent" if victim.pid == world.agent else "rank" if victim in world.ranks() else "helper"
    with contextlib.suppress(psutil.NoSuchProcess):
        victim.kill()
    return f"SIGKILL to a {what}"


def stall_rank(world: World, run_dir: Path, draw: random.Random) -> str:
    """A slow peer."""
    ranks, seconds = world.ranks(), draw.uniform(0.5, 4)
    if not ranks:
        return "nothing: no rank"
    victim = draw.choice(ranks)
    with contextlib.suppress(psutil.NoSuchProcess):
        victim.suspend()
        time.sleep(seconds)
        victim.resume()
    return f"a rank stalls for {seconds:.1f} s"


def freeze_rank(world: World, run_dir: Path, draw: random.Random) -> str:
    """A host that hangs for good."""
    ranks = world.ranks()
    if not ranks:
        return "nothing: no rank"
    with contextlib.suppress(psutil.NoSuchProcess):
        draw.choice(ranks).suspend()
    return "a rank freezes"


def cut_connections(world: World, run_dir: Path, draw: random.Random) -> str:
    """Every TCP connection of one rank is aborted."""
    ranks = world.ranks()
    if not ranks:
        return "nothing: no rank"
    ports: set[int] = set()
    with contextlib.suppress(psutil.NoSuchProcess):
        connections = draw.choice(ranks).net_connections("tcp")
        ports = {c.laddr.port for c in connections if c.status == psutil.CONN_ESTABLISHED}
    for port in ports:
        subprocess.run(["ss", "-K", "sport", "=", f":{port}"], capture_output=True, check=False)
    return f"{len(ports)} connections of a rank are cut"


def fill_disk(world: World, run_dir: Path, draw: random.Random) -> str:
    """No room is left until this attempt is over (``recover`` makes it again)."""
    ballast = run_dir.parent / "ballast"
    with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
        while file.write(bytes(1 << 16)):
            pass
    return "the disk is full"


RUNNING: dict[str, Callable[[World, Path, random.Random], str]] = {
    "signal to the agent": signal_agent,
    "signal to a rank": signal_rank,
    "second signal": signal_twice,
    "kill": kill_any,
    "stall": stall_rank,
    "freeze": freeze_rank,
    "cut": cut_connections,
    "full disk": fill_disk,
}


def kill_host(world: World, hosts: Hosts, draw: random.Random) -> str:
    """As the OOM killer does; somebody starts it again."""
    hosts.replace(draw.randrange(hosts.count))
    return "an engine host gets SIGKILL, and is started again"


def stop_host(world: World, hosts: Hosts, draw: random.Random) -> str:
    """Its machine is needed; it gets another one."""
    index, number = draw.randrange(hosts.count), draw.choice(STOPS)
    hosts.send(index, number)
    ended = hosts.code(index, 12)
    hosts.replace(index)
    return f"an engine host gets {number.name}, {'and is' if ended is not None else 'HANGS, is'} started again"


def stall_host(world: World, hosts: Hosts, draw: random.Random) -> str:
    """A slow one."""
    index, seconds = draw.randrange(hosts.count), draw.uniform(0.5, 3)
    hosts.send(index, signal.SIGSTOP)
    time.sleep(seconds)
    hosts.send(index, signal.SIGCONT)
    return f"an engine host stalls for {seconds:.1f} s"


def freeze_host(world: World, hosts: Hosts, draw: random.Random) -> str:
    """One that hangs until the run has ended."""
    hosts.send(draw.randrange(hosts.count), signal.SIGSTOP)
    return "an engine host freezes"


def stop_all(world: World, hosts: Hosts, draw: random.Random) -> str:
    """The end of a job: every process of it is asked to stop."""
    os.kill(world.agent, signal.SIGTERM)
    for index in range(hosts.count):
        hosts.send(index, signal.SIGTERM)
    return "SIGTERM to the agent and all engine hosts"


WITH_HOSTS: dict[str, Callable[[World, Hosts, random.Random], str]] = {
    "kill a host": kill_host,
    "stop a host": stop_host,
    "stall a host": stall_host,
    "freeze a host": freeze_host,
    "stop everything": stop_all,
}


VICTIMS = ("rank 0", "rank 1", "engine", "host")


def kill_named(world: World, hosts: Hosts | None, victim: str, draw: random.Random) -> str:
    """SIGKILL to one of ``VICTIMS``, which lives."""
    if victim == "host":
        assert hosts is not None
        return kill_host(world, hosts, draw)
    if victim == "engine":
        found = [p for p in world.processes() if "nemo_tropd.rollout.vllm" in p.cmdline()]
    else:
        found = sorted(world.ranks(), key=lambda p: p.pid)[int(victim[-1]) :]
    found[0].kill()
    return f"SIGKILL to {victim}"


def recover(run_dir: Path, hosts: Hosts | None) -> None:
    """What an operator does between two attempts."""
    (run_dir.parent / "ballast").unlink(missing_ok=True)
    if hosts is not None:
        hosts.tend()


def damage_files(run_dir: Path, draw: random.Random) -> str:
    """Between two attempts: files that power loss or a bad disk leaves behind; one good checkpoint stays."""
    checkpoints = sorted((run_dir / "checkpoints").glob("step_" + 8 * "[0-9]"))
    finished = (run_dir / "summary.json").is_file()  # the next attempt will only say so, and remove nothing
    choices: list[Callable[[], str]] = [] if finished else [lambda: _left_overs(run_dir)]
    if len(checkpoints) > 1:
        choices += [lambda: _damage(draw.choice(_files(checkpoints[-1])), draw)] * 3
    for pattern in ("validation/*.json", "summary.json", "config.yaml", "*.jsonl"):
        found = sorted(run_dir.glob(pattern))
        if found:
            choices.append(lambda found=found: _damage(draw.choice(found), draw))
    return draw.choice(choices)() if choices else "no file to damage"


def _files(folder: Path) -> list[Path]:
    """What the resume needs of a checkpoint."""
    return sorted(p for p in folder.iterdir() if p.is_file())


def _damage(path: Path, draw: random.Random) -> str:
    if path.suffix == ".jsonl":
        with path.open("a") as file:
            file.write('{"step": 3, "ki')
        return f"{path.name} ends in half a line"
    how = draw.choice(["emptied", "cut"])
    content = path.read_bytes()
    path.write_bytes(b"" if how == "emptied" else content[: len(content) // 2])
    return f"{path.parent.name}/{path.name} {how}"


def _left_overs(run_dir: Path) -> str:
    """As killed runs leave them."""
    run_dir.mkdir(parents=True, exist_ok=True)
    for name in ("checkpoints/.tmp-step_00000099", f".hf.tmp-{files._MACHINE}-0123abcd-{DEAD}"):
        (run_dir / name).mkdir(parents=True, exist_ok=True)
        (run_dir / name / "junk").write_text("half")
    return "left-overs of a killed run"


def remove(path: Path) -> None:
    """The directory of a round."""
    shutil.rmtree(path, ignore_errors=True)
