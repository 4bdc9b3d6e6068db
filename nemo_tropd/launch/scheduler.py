"""Reads this node's part of a run from a scheduler's environment variables.

| scheduler | detected by | variables read |
|---|---|---|
| a torchrun worker | TORCHELASTIC_RUN_ID and LOCAL_RANK | none: this process already is a rank |
| Slurm | SLURM_JOB_ID | SLURM_STEP_NUM_NODES, SLURM_STEP_NODELIST, SLURM_STEP_TASKS_PER_NODE, SLURM_GPUS_ON_NODE |
| PyTorchJob | PET_NNODES | PET_NPROC_PER_NODE, PET_RDZV_ENDPOINT, else PET_MASTER_ADDR or MASTER_ADDR and its port |
| torchrun's customary names | NNODES, or WORLD_SIZE and RANK, with MASTER_ADDR | NPROC_PER_NODE, MASTER_PORT |
| none | | one node |
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from nemo_tropd.config import RENDEZVOUS_PORT, ConfigError

# Removed from the environment: torchrun and its workers get these values as arguments.
CONSUMED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "NNODES", "NODE_RANK", "NPROC_PER_NODE")
_FIRST_SLURM_PORT, _SLURM_PORTS = 10000, 20000  # below Linux's ephemeral ports (32768 and up)


@dataclass(frozen=True)
class Allocation:
    """What the scheduler allocated to the run and to this node. None: the scheduler does not say."""

    scheduler: str
    nodes: int | None = None
    processes: int | None = None  # per node
    rendezvous: str | None = None  # host:port
    run_id: str | None = None
    is_worker: bool = False  # this process is a rank started by torchrun


def read_allocation(env: Mapping[str, str]) -> Allocation:
    """The allocation that ``env`` describes. ConfigError names the variable, its value and what to change."""
    if "TORCHELASTIC_RUN_ID" in env and "LOCAL_RANK" in env:
        return Allocation("a torchrun worker", is_worker=True)
    if "SLURM_JOB_ID" in env:
        return _slurm(env)
    if "PET_NNODES" in env:
        return _torchrun(env, "PyTorchJob", "PET_NNODES", "PET_NPROC_PER_NODE")
    if "MASTER_ADDR" in env:
        nodes = "NNODES" if "NNODES" in env else "WORLD_SIZE"
        return _torchrun(env, "torchrun's variables", nodes, "NPROC_PER_NODE")
    return Allocation("no scheduler")


def _slurm(env: Mapping[str, str]) -> Allocation:
    job = env["SLURM_JOB_ID"]
    of_job = _number(env, "SLURM_JOB_NUM_NODES") or _number(env, "SLURM_NNODES") or 1
    nodes = _number(env, "SLURM_STEP_NUM_NODES")
    if nodes is None and of_job > 1:
        remedy = "start the launcher with srun --ntasks-per-node=1, as docker/slurm.sbatch does"
        why = f"the job has {of_job} nodes, but srun did not start this process: {remedy}"
        raise ConfigError("SLURM_STEP_NUM_NODES", None, why)
    tasks = env.get("SLURM_STEP_TASKS_PER_NODE", "1")
    if nodes is not None and re.sub(r"\(x\d+\)", "", tasks).strip("1,"):
        why = "torchrun starts the ranks of a node itself: use srun --ntasks-per-node=1"
        raise ConfigError("SLURM_STEP_TASKS_PER_NODE", tasks, why)
    names = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST") or ""
    first = first_host(names) if names else "localhost"
    if not job.isdigit():
        raise ConfigError("SLURM_JOB_ID", job, "must be a number; set it as Slurm does, or unset it")
    return Allocation(
        "Slurm",
        nodes=nodes or 1,
        processes=_number(env, "SLURM_GPUS_ON_NODE"),
        rendezvous=f"{first}:{_FIRST_SLURM_PORT + int(job) % _SLURM_PORTS}",
        run_id=f"slurm-{job}",
    )


def _torchrun(env: Mapping[str, str], scheduler: str, nodes: str, processes: str) -> Allocation:
    ranks = _number(env, processes)
    count = _number(env, nodes)
    if nodes == "WORLD_SIZE" and count and ranks and count % ranks == 0:
        count //= ranks  # PyTorchJob counts processes, not pods, if it knows how many a pod has
    address = env.get("PET_MASTER_ADDR") or env.get("MASTER_ADDR")
    port = env.get("PET_MASTER_PORT") or env.get("MASTER_PORT") or str(RENDEZVOUS_PORT)
    rendezvous = env.get("PET_RDZV_ENDPOINT") or (f"{address}:{port}" if address else None)
    return Allocation(
        scheduler,
        nodes=count,
        processes=ranks,
        rendezvous=rendezvous,
        run_id=env.get("PET_RDZV_ID") or (re.sub(r"[^\w.-]", "-", rendezvous) if rendezvous else None),
    )


def _number(env: Mapping[str, str], name: str) -> int | None:
    text = env.get(name)
    if not text or (name.endswith("NPROC_PER_NODE") and text in ("auto", "gpu", "cpu")):
        return None
    low, _, high = text.partition(":")
    if high and high != low:
        raise ConfigError(name, text, "a run has a fixed number of nodes: give one number, not a range")
    if not low.isdigit() or int(low) < 1:
        raise ConfigError(name, text, "must be an integer of at least 1")
    return int(low)


def first_host(names: str) -> str:
    """The first host of a Slurm host list: ``dgx[007-009,12],login`` gives ``dgx007``. ConfigError if it is none."""
    found = re.match(r"([^\[\],\s]*)(?:\[([0-9]+)[^\]]*\]([^\[\],\s]*))?(?=,|$)", names)
    if not found or not found.group(0):
        raise ConfigError("SLURM_JOB_NODELIST", names, "is not a valid host list; set trainer.rendezvous=host:port")
    return "".join(part or "" for part in found.groups())
