"""docker/slurm.sbatch on a real slurmctld and two slurmds of this machine (Debian: slurmctld, slurmd, slurm-client)."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.tiny_run import ROOT, environment
from tests.hosts.conftest import Reference
from tests.hosts.launching import figures, launch_command, until
from tests.ports import free_port, free_ports

pytestmark = pytest.mark.timeout(600)
COMMANDS = ("slurmctld", "slurmd", "sbatch", "srun", "squeue")
CONF = """\
ClusterName=tiny
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/none
CredType=cred/none
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool.%n
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd.%n.pid
SlurmctldLogFile={root}/slurmctld.log
SlurmdLogFile={root}/slurmd.%n.log
SlurmctldPort={ports[0]}
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs={cpus} State=UNKNOWN
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs={cpus} State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """A cluster of two nodes, up; yields the environment of its commands, and ends it."""
    missing = [name for name in COMMANDS if not shutil.which(name)]
    if missing:
        pytest.skip(f"Slurm is not installed: no {', '.join(missing)}")
    if os.geteuid() != 0:
        pytest.skip("slurmd needs root")
    root = tmp_path_factory.mktemp("slurm")
    (root / "state").mkdir()
    host = socket.gethostname().split(".")[0]
    conf = root / "slurm.conf"
    conf.write_text(CONF.format(host=host, root=root, ports=free_ports(3), cpus=os.cpu_count()))
    env = {**environment(), "SLURM_CONF": str(conf)}
    daemons = []
    with (root / "daemons.log").open("w") as log:
        for command in (["slurmctld", "-D"], ["slurmd", "-D", "-N", "n1"], ["slurmd", "-D", "-N", "n2"]):
            daemons.append(subprocess.Popen(command, env=env, stdout=log, stderr=log))
    try:

        def idle() -> bool:
            told = subprocess.run(["sinfo", "-h", "-o", "%t"], env=env, capture_output=True, text=True, check=False)
            return told.stdout.split() == ["idle"]

        with contextlib.suppress(AssertionError):
            until(idle, "two idle nodes", 40)
        if not idle():
            pytest.skip(f"Slurm does not come up here: {(root / 'daemons.log').read_text()[-500:]}")
        yield env
    finally:
        subprocess.run(["scancel", "--user=root"], env=env, capture_output=True, timeout=30, check=False)
        for daemon in reversed(daemons):
            daemon.terminate()
        for daemon in daemons:
            try:
                daemon.wait(20)
            except subprocess.TimeoutExpired:
                daemon.kill()


def submit(env: dict[str, str], folder: Path, *arguments: str) -> tuple[str, Path]:
    """sbatch from the repository's root; the job's number and its output."""
    log = folder / "job.log"
    command = [
        "sbatch",
        "--parsable",
        "--nodes=2",
        f"--output={log}",
        str(ROOT / "docker" / "slurm.sbatch"),
        *arguments,
    ]
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().split(";")[0], log


def state(env: dict[str, str], job: str) -> str:
    """What Slurm says of the job."""
    told = subprocess.run(["scontrol", "show", "job", job], env=env, capture_output=True, text=True, check=False).stdout
    return told.split("JobState=")[1].split()[0] if "JobState=" in told else "UNKNOWN"


def finish(env: dict[str, str], job: str, within_s: float = 300) -> str:
    """Wait for the job's end; its last state."""
    deadline = time.monotonic() + within_s
    while state(env, job) in ("PENDING", "RUNNING", "CONFIGURING", "COMPLETING") and time.monotonic() < deadline:
        time.sleep(0.5)
    return state(env, job)


def test_sbatch_trains_on_two_nodes(slurm: dict[str, str], reference: Reference, tmp_path: Path) -> None:
    """Data parallel over two nodes of one rank each: the reference's steps, up to rounding."""
    port = free_port()
    run_dir = reference.root / "slurm"
    # The nodes' names mean nothing to this machine's resolver, so the meeting place is given.
    keys = {
        "trainer.num_nodes": 2,
        "trainer.devices": 1,
        "trainer.rendezvous": f"127.0.0.1:{port}",
        "model.tensor_model_parallel_size": 1,
    }
    overrides = launch_command(reference.tiny, run_dir, **keys)[1:]
    job, log = submit(slurm, tmp_path, *overrides)
    assert finish(slurm, job) == "COMPLETED", log.read_text()[-4000:]
    assert log.read_text().count("launch: Slurm: 2 node(s) x 1 rank(s)") == 2
    for ours, theirs in zip(figures(run_dir), reference.expected, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-5)


def test_a_job_of_another_size_than_the_recipe_is_refused(
    slurm: dict[str, str], reference: Reference, tmp_path: Path
) -> None:
    job, log = submit(slurm, tmp_path, *launch_command(reference.tiny, reference.root / "refused")[1:])
    assert finish(slurm, job, 100) == "FAILED"
    assert "trainer.num_nodes = 1: Slurm gives 2 node(s)" in log.read_text()
