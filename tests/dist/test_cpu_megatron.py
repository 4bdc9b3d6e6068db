"""The shims: what they change for Megatron, what they leave alone, and the marks a gradient norm depends on."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.dist.run_distributed import run_distributed
from tests.tiny_models import make_tiny


def _check_shims(rank: int, world_size: int) -> None:
    from nemo_tropd.parallel.cpu import enable_cpu_megatron

    enable_cpu_megatron()
    enable_cpu_megatron()
    assert torch.zeros(1, device="cuda").device.type == "cpu"
    assert torch.empty(1, device=torch.device("cuda", 0)).device.type == "cpu"
    assert torch.zeros(1).type() == "torch.FloatTensor"  # only megatron's own code reads another name

    from megatron.core.tensor_parallel import mappings

    matrix = torch.arange(6.0).view(2, 3) * (rank + 1)
    for view in (matrix, matrix.t(), matrix[:, 1:]):
        reduced = mappings._reduce(view.clone(memory_format=torch.preserve_format), dist.group.WORLD)
        torch.testing.assert_close(reduced, view / (rank + 1) * 3)


def _check_topology(rank: int, world_size: int) -> tuple[int, ...]:
    from nemo_tropd.parallel.topology import Topology

    with pytest.raises(ValueError, match=r"4 processes .* 3 x pipeline parallel 1 = 3"):
        Topology.start(3)
    with pytest.raises(ValueError, match="at least 1"):
        Topology.start(0)
    topology = Topology.start(2, 1, sequence_parallel=True)
    assert topology.sequence_parallel and topology.data_size == 2
    tokens = torch.tensor(float(topology.data_rank + 1))
    dist.all_reduce(tokens, group=topology.data_group)
    assert tokens.item() == 3
    assert topology.broadcast_object({"from": rank}, src=2) == {"from": 2}
    assert topology.any_rank(rank == 3) and not topology.any_rank(False)
    topology.barrier()
    topology.stop()
    topology = Topology.start(1, 2, sequence_parallel=True)
    assert not topology.sequence_parallel
    assert topology.is_leader == (rank == 0)
    return topology.tensor_rank, topology.data_rank, topology.pipeline_rank


def test_topology_ranks_and_objects():
    assert run_distributed(_check_topology, 4) == [(0, 0, 0), (0, 1, 0), (0, 0, 1), (0, 1, 1)]


def _threads_left(rank: int, world_size: int) -> list[int]:
    from nemo_tropd.parallel.topology import Topology

    found = []
    for degrees in ((2, 1), (1, 2), (2, 1), (1, 1)):
        topology = Topology.start(*degrees, teacher_tensor_parallel=2 if degrees == (1, 1) else None)
        if degrees == (2, 1):
            topology = topology.with_teacher(1)
        topology.barrier()
        topology.stop()
        del topology
        gc.collect()
        dist.barrier()  # the default group is the caller's, and stays
        found.append(len(os.listdir("/proc/self/task")))
    return found


def test_a_run_leaves_no_groups_and_their_threads_to_the_next():
    for found in run_distributed(_threads_left, 4):
        assert max(found) - min(found) <= 4, found


def _gloo_loops(rank: int, world_size: int) -> list[int]:
    """Threads that look for what has come, with Megatron's groups: after a sum over a group, and without them."""
    from nemo_tropd.parallel.topology import Topology

    def loops() -> int:
        names = [Path(f"/proc/self/task/{task}/comm").read_text().strip() for task in os.listdir("/proc/self/task")]
        return names.count("gloo_tcp_loop")

    before, topology = loops(), Topology.start(2, 1)
    total = torch.tensor(float(rank))
    dist.all_reduce(total, group=topology.data_group)
    assert total.item() == 2 * (rank % 2) + 2
    found = loops()
    topology.stop()
    return [before, found]


def test_the_groups_of_a_rank_have_one_thread_that_looks_for_work():
    for before, found in run_distributed(_gloo_loops, 4):
        assert before == 1 and found == 2, "the caller's group has its own"


def _counted_once(folder: str) -> tuple[int, int]:
    """Numbers of the whole model: as the gradient norm counts them over ranks, and as they are."""
    from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate

    from nemo_tropd.convert.families import read_shape
    from nemo_tropd.gpt.build import build_gpt
    from nemo_tropd.parallel.topology import Topology

    topology = Topology.start(2, 1)
    shape = read_shape(folder)
    model = build_gpt(shape, topology)
    mine = sum(p.numel() for p in model.parameters() if param_is_not_tensor_parallel_duplicate(p))
    counted = torch.tensor(mine)
    dist.all_reduce(counted)
    padding = (shape.padded_vocab(2) - shape.vocab_size) * shape.hidden * (1 if shape.tied else 2)
    return int(counted), shape.parameters() + padding


def _shims_and_counts(rank: int, world_size: int, folders: list[str]) -> list[tuple[int, int]]:
    from megatron.core import parallel_state

    _check_shims(rank, world_size)
    counts = []
    for folder in folders:
        counts.append(_counted_once(folder))
        parallel_state.destroy_model_parallel()
    return counts


def test_shims_and_a_gradient_norm_that_counts_every_parameter_once(tmp_path: Path):
    folders = [str(make_tiny(tmp_path / "a", "qwen2", True)), str(make_tiny(tmp_path / "b", "qwen3", False))]
    for counts in run_distributed(_shims_and_counts, 2, folders):
        for counted, expected in counts:
            assert counted == expected
