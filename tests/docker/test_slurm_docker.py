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
# Runs the command, but for the one that only pyxis' container has: then what it is told itself, and the variables.
SRUN = """#!/bin/bash
told=("$@")
while [[ $1 == -* ]]; do shift; done
[[ $1 == /opt/* ]] || exec "$@"
printf '%s\\n' "${told[@]}"
env
"""


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
        "WANDB_API_KEY": "key",
        "NEMO_TROPD_SECRET": "sixteen characters",
        "NEMO_TROPD_TEACHER_TOKEN": "token",
        "NEMO_TROPD_VERBOSE": "1",
    }
    others = {"HOME": "/home/someone", "NEMO_TROPD_CACHE": "/scratch/someone", "NEMO_TROPD_PYTHON": "/usr/bin/python3"}
    told = container(tmp_path, **others, **passed)
    assert {f"{name}={value}" for name, value in passed.items()} <= set(told)
    # Paths of the host, which the container has not.
    assert not any(line.startswith(("PATH=", *(f"{name}=" for name in others))) for line in told)


def test_the_file_with_the_secret_is_where_its_variable_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By whatever name, also a relative one; a path that is the container's own is left as it is."""
    secret = tmp_path / "keys" / "a secret"
    secret.parent.mkdir()
    secret.write_text("sixteen characters")
    (tmp_path / "link").symlink_to(secret)
    monkeypatch.chdir(tmp_path)
    for named in (str(secret), "link", "keys/a secret"):
        told = container(tmp_path, NEMO_TROPD_SECRET_FILE=named)
        assert told[told.index("--mount") + 1] == f"type=bind,source={secret},target={secret},readonly"
        assert told.index("--mount") < told.index("image") and f"NEMO_TROPD_SECRET_FILE={secret}" in told
        told = container(
            tmp_path, NEMO_TROPD_SECRET_FILE=named, NEMO_TROPD_CONTAINER="pyxis", NEMO_TROPD_MOUNTS="/a:/b"
        )
        assert f"--container-mounts=/a:/b,{secret}:{secret}:ro" in told
        assert f"NEMO_TROPD_SECRET_FILE={secret}" in told
    told = container(tmp_path, NEMO_TROPD_SECRET_FILE="/workspace/runs/secret")
    assert "--mount" not in told and "NEMO_TROPD_SECRET_FILE=/workspace/runs/secret" in told
    assert "--mount" not in container(tmp_path)
