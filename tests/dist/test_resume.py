"""Resuming on several ranks: the distributed optimizer, other layouts, and what only rank 0 may decide."""

from __future__ import annotations

import os
import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.dist.run_distributed import run_distributed
from tests.doubles import replay_engines
from tests.e2e.tiny_run import TinyRun, train_lines

KEYS: dict[str, Any] = {
    "model.data.held_out": 0,
    "model.tropd.guidance.enabled": False,
    "trainer.tropd.keep_checkpoints": 9,
    "exp_manager.create_tensorboard_logger": False,
    "model.optim.distributed": True,
}
# (run directory, steps, tensor, data, pipeline)
RUNS = [
    ("straight", 3, 1, 4, 1),
    ("resumed", 1, 1, 4, 1),
    ("resumed", 3, 1, 4, 1),
    ("moved", 1, 2, 2, 1),
    ("moved", 2, 1, 4, 1),
    ("moved", 3, 1, 2, 2),
]


def resume_everywhere(rank: int, world_size: int, root: str) -> list[str]:
    """Every run of RUNS, one after the other; then a directory that one rank does not see: what is said of it."""
    from nemo_tropd.quiet import quiet_libraries

    quiet_libraries()
    from nemo_tropd.config import ConfigError
    from nemo_tropd.parallel.topology import Topology
    from nemo_tropd.training import checkpoint, run_lock, start
    from nemo_tropd.training.run import train
    from tests.e2e.compose import compose_config

    tiny = TinyRun.at(Path(root))

    def go(name: str, steps: int, tensor: int = 1, data: int = 4, pipeline: int = 1) -> Any:
        keys = {**KEYS, "trainer.tropd.max_steps": steps}
        overrides = tiny.overrides(Path(root) / name, tensor=tensor, data=data, pipeline=pipeline, **keys)
        return train(compose_config(overrides), replay_engines(131))

    for run in RUNS:
        go(*run)
    if rank == 0:
        shutil.copytree(Path(root) / "resumed" / "hf", Path(root) / "resumed_at_3" / "hf")
    if rank:  # rank 0 alone looks for checkpoints: what another rank would find does not matter
        checkpoint.complete_checkpoints = start.newest_readable = lambda *args: 1 / 0
    go("resumed", 4)
    assert go("resumed", 4) is None
    topology, run_dir = Topology.start(), Path(root) / "resumed"
    run_lock._SEEN_S = 0.5
    if rank == 3:  # as where its node has a directory of its own under the same path
        run_lock.NAME = ".lock-of-this-node"
    said = []
    with run_lock.run_lock(run_dir, "k") if rank == 0 else nullcontext():
        topology.barrier()
        try:
            run_lock.check_shared(run_dir, "k", topology)
        except ConfigError as error:
            said.append(str(error))
    return said


@pytest.mark.timeout(400)
def test_a_run_of_four_ranks_resumes_everywhere(tmp_path: Path) -> None:
    TinyRun.make(tmp_path)
    said = run_distributed(resume_everywhere, 4, str(tmp_path), timeout_s=200)

    def figures(name: str, key: str) -> list[float]:
        by_step = {line["step"]: line[key] for line in train_lines(tmp_path / name)}
        return [by_step[step] for step in (1, 2, 3)]

    for key in ("loss", "grad_norm"):
        assert figures("resumed", key) == figures("straight", key)
    assert figures("moved", "loss") == pytest.approx(figures("straight", "loss"), rel=1e-5)
    names = ("straight", "moved", "resumed_at_3")
    straight, moved, resumed = (load_file(tmp_path / n / "hf" / "model.safetensors") for n in names)
    assert all(torch.equal(resumed[name], tensor) for name, tensor in straight.items())
    initial = load_file(tmp_path / "student" / "model.safetensors")
    for name, tensor in straight.items():
        assert (moved[name] - tensor).norm() < 5e-3 * (tensor - initial[name]).norm(), name
    step = tmp_path / "resumed" / "checkpoints"
    assert torch.load(step / "step_00000003" / "common.pt", weights_only=True)["run_state"]["step"] == 3
    for (unshared,) in said:
        assert unshared.startswith("k = ") and "share it with rank 3 on " in unshared
        assert os.uname().nodename in unshared and "rank 2 on" not in unshared
