"""docker/slurm.sbatch with docker: which GPUs and variables a container is given, whose daemon knows no Slurm."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# Each argument on a line of its own, then the variables of the file it is given.
DOCKER = """#!/bin/bash
printf '%s\\n' "$@"
while [[ $1 != --env-file ]]; do shift; done
cat "$2"
"""
SRUN = '#!/bin/bash\nwhile [[ $1 == -* ]]; do shift; done\nexec "$@"\n'


def container(folder: Path, **variables: str) -> list[str]:
    """What docker is told in a job with these variables."""
    for name, text in (("docker", DOCKER), ("srun", SRUN)):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    kept = {"PATH": f"{folder}:{os.environ['PATH']}", "SLURM_SUBMIT_DIR": str(ROOT)}
    done = subprocess.run(
        ["bash", str(ROOT / "docker" / "slurm.sbatch"), "--config-name", "base"],
        env=kept | {"NEMO_TROPD_CONTAINER": "docker", "NEMO_TROPD_IMAGE": "image"} | variables,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.splitlines()


@pytest.mark.parametrize(
    ("variables", "gpus"),
    [
        ({}, "all"),
        ({"SLURM_JOB_GPUS": "0,1", "SLURM_STEP_GPUS": "4,5"}, '"device=4,5"'),
        ({"SLURM_JOB_GPUS": "6"}, '"device=6"'),
    ],
)
def test_a_job_of_a_part_of_a_node_is_given_its_own_gpus(tmp_path: Path, variables: dict[str, str], gpus: str) -> None:
    """Slurm numbers CUDA_VISIBLE_DEVICES within the job's own devices, so that it would name others in a container."""
    told = container(tmp_path, CUDA_VISIBLE_DEVICES="0,1", **variables)
    assert told[told.index("--gpus") + 1] == gpus
    assert not any(line.startswith("CUDA_VISIBLE_DEVICES") for line in told)
    assert told[told.index("image") : told.index("image") + 4] == ["image", "train", "--config-name", "base"]


def test_what_nccl_gloo_torch_and_vllm_read_reaches_the_container(tmp_path: Path) -> None:
    passed = {
        "NCCL_SOCKET_IFNAME": "ib0",
        "TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC": "900",
        "GLOO_SOCKET_IFNAME": "ib0",
        "UCX_NET_DEVICES": "mlx5_0:1",
        "VLLM_LOGGING_LEVEL": "INFO",
        "PYTORCH_ALLOC_CONF": "expandable_segments:True",
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
        "SLURM_NODEID": "1",
        "NEMO_TROPD_SECRET": "sixteen characters",
    }
    told = container(tmp_path, HOME="/home/someone", **passed)
    assert {f"{name}={value}" for name, value in passed.items()} <= set(told)
    assert not any(line.startswith(("HOME=", "PATH=")) for line in told)
