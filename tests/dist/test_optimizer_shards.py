"""The distributed optimizer's states in a checkpoint: no rank holds more than its own, and the files are Megatron's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.dist.run_distributed import run_distributed
from tests.tiny_models import make_tiny

pytestmark = pytest.mark.random


def save_and_load(rank: int, world_size: int, root: str, tensor: int) -> dict[str, Any]:
    """A checkpoint before the first step; after one, a checkpoint of ours and one of Megatron's gathered kind; each
    loaded by an optimizer of ours."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing import ShardedTensor
    from megatron.core.dist_checkpointing.dict_utils import nested_values

    from nemo_tropd.config import OptimConfig
    from nemo_tropd.convert.families import read_shape
    from nemo_tropd.convert.hf_import import load_hf
    from nemo_tropd.gpt.build import build_gpt
    from nemo_tropd.gpt.ddp import data_parallel
    from nemo_tropd.parallel.topology import Topology
    from nemo_tropd.training.checkpoint import Checkpoints, newest_readable
    from nemo_tropd.training.optimizer import StudentOptimizer
    from nemo_tropd.training.resume import RunState

    topology, folder = Topology.start(tensor), Path(root)
    shape = read_shape(folder / "hf")

    def student() -> tuple[Any, StudentOptimizer]:
        model = build_gpt(shape, topology, dtype=torch.bfloat16)
        load_hf(model, folder / "hf", shape, topology)
        ddp = data_parallel(model, topology, distributed_optimizer=True)
        cfg = OptimConfig(lr=1e-2, distributed=True)
        return ddp, StudentOptimizer(cfg, ddp, dtype=torch.bfloat16, clip=1.0, max_steps=9)

    def states(optimizer: StudentOptimizer) -> list[torch.Tensor]:
        (part,) = optimizer.parts
        found = ((p, part.optimizer.state[p]) for group in part.optimizer.param_groups for p in group["params"])
        return [t for p, state in found for t in (p, *(state[key] for key in sorted(state)))]

    def step(ddp: Any, optimizer: StudentOptimizer) -> None:
        ddp.zero_grad_buffer()
        for parameter, gradient in zip(ddp.module.parameters(), gradients, strict=True):
            parameter.main_grad.copy_(gradient)
        ddp.finish_grad_sync()
        assert optimizer.step(0).applied

    checkpoints = Checkpoints(folder / "run", topology, hf_source=folder / "hf", keep=1)
    ddp, optimizer = student()
    gradients = [torch.randn_like(parameter.main_grad) for parameter in ddp.module.parameters()]
    path = checkpoints.save(ddp.module, optimizer, RunState(0, {}, {}, "r"))
    resumed, begun = student()
    checkpoints.load(path, resumed.module, begun)
    step(resumed, begun)
    step(ddp, optimizer)
    wanted, (part,) = [t.detach().clone() for t in states(optimizer)], optimizer.parts
    model_state = ddp.module.sharded_state_dict(prefix="model.")
    pieces = optimizer.sharded_state_dict(model_state)["param_state"]
    held = sum(t.data.numel() for t in nested_values(pieces) if isinstance(t, ShardedTensor))

    path = checkpoints.save(ddp.module, optimizer, RunState(1, {}, {}, "r"))
    found, state, damage = newest_readable(checkpoints.dir)
    assert (found, state.step if state else None, damage) == (path, 1, [])
    kind = {"distrib_optim_sharding_type": "fully_reshardable"}
    state_dict = part.sharded_state_dict(ddp.module.sharded_state_dict(prefix="model."), metadata=kind)
    if rank == 0:
        (folder / "theirs").mkdir()
    topology.barrier()
    content = {"optimizer": state_dict, "model": ddp.module.sharded_state_dict(prefix="model.")}
    dist_checkpointing.save({**content, "run_state": vars(state)}, str(folder / "theirs"))

    same = [all(torch.equal(a, b) for a, b in zip(states(begun), wanted, strict=True))]
    for source in (path, folder / "theirs"):
        other, loader = student()
        checkpoints.load(source, other.module, loader)
        same.append(all(torch.equal(a, b) for a, b in zip(states(loader), wanted, strict=True)))
        weights = zip(other.module.parameters(), ddp.module.parameters(), strict=True)
        same.append(all(torch.equal(a, b) for a, b in weights))
    return {"held": held, "own": sum(t.numel() for t in wanted if t.dim()), "same": same, "path": str(path)}


@pytest.mark.parametrize("tensor", [1, 2])
def test_each_rank_saves_and_loads_its_own_states_in_megatrons_files(tensor: int, tmp_path: Path) -> None:
    import torch.distributed.checkpoint as dcp

    make_tiny(tmp_path / "hf", "qwen3", layers=2, seed=int(torch.randint(2**31, ())))
    ranks = run_distributed(save_and_load, 2, str(tmp_path), tensor)
    for rank in ranks:
        assert rank["held"] == rank["own"], "a rank keeps more than its share for a checkpoint"
        assert rank["same"] == [True] * 5

    def tensors(folder: Path) -> dict[str, torch.Tensor]:
        metadata = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
        found = {k: torch.empty(m.size, dtype=m.properties.dtype) for k, m in metadata.items() if hasattr(m, "size")}
        dcp.load(found, storage_reader=dcp.FileSystemReader(folder), no_dist=True)
        return found

    ours, theirs = tensors(Path(ranks[0]["path"])), tensors(tmp_path / "theirs")
    assert ours.keys() == theirs.keys() and any("exp_avg_sq" in key for key in ours)
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    if tensor == 1:
        sizes = [sum(f.stat().st_size for f in Path(ranks[0]["path"]).glob(f"__{rank}_*")) for rank in (0, 1)]
        assert max(sizes) < 1.3 * min(sizes), "the ranks share the writing"
