"""Where this process stands: ranks, groups and device, the same on CPU with gloo and on GPUs with NCCL."""

from __future__ import annotations

import datetime
import os
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from nemo_tropd.parallel.cpu import enable_cpu_megatron

T = TypeVar("T")


@dataclass(frozen=True)
class Topology:
    """The process's place in tensor x data x pipeline; ranks are laid out tensor first, pipeline last."""

    rank: int
    world_size: int
    tensor_rank: int
    tensor_size: int
    pipeline_rank: int
    pipeline_size: int
    data_rank: int
    data_size: int
    tensor_group: ProcessGroup
    pipeline_group: ProcessGroup
    data_group: ProcessGroup
    control_group: ProcessGroup  # every rank, gloo: Python objects and flags, never tensors of the model
    device: torch.device
    sequence_parallel: bool
    owns_process_group: bool

    @property
    def is_leader(self) -> bool:
        """Global rank 0: first stage, tensor rank 0, data rank 0."""
        return self.rank == 0

    @property
    def is_first_stage(self) -> bool:
        return self.pipeline_rank == 0

    @property
    def is_last_stage(self) -> bool:
        return self.pipeline_rank == self.pipeline_size - 1

    @classmethod
    def start(
        cls,
        tensor_parallel: int = 1,
        pipeline_parallel: int = 1,
        sequence_parallel: bool = False,
        timeout_s: float = 600,
        seed: int = 0,
    ) -> Topology:
        """Join the world torchrun describes (RANK, WORLD_SIZE, ...), or be a world of one without it.

        A default process group that is already up is used as it is. ``sequence_parallel`` is off at tensor parallel 1,
        where it would mean nothing. Sets the device, Megatron's groups and its random number tracker. Raises ValueError
        before anything is started where the degrees do not divide the world size.
        """
        started = dist.is_initialized()
        world_size = dist.get_world_size() if started else int(os.environ.get("WORLD_SIZE", "1"))
        _check_degrees(world_size, tensor_parallel, pipeline_parallel)
        enable_cpu_megatron()
        device = _choose_device()
        timeout = datetime.timedelta(seconds=timeout_s)
        if not started:
            _init_process_group(device, timeout)
        on_gloo = dist.get_backend() == "gloo"
        control_group = dist.group.WORLD if on_gloo else dist.new_group(backend="gloo", timeout=timeout)
        assert control_group is not None

        from megatron.core import parallel_state as state
        from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

        state.initialize_model_parallel(
            tensor_model_parallel_size=tensor_parallel,
            pipeline_model_parallel_size=pipeline_parallel,
            distributed_timeout_minutes=max(1, round(timeout_s / 60)),
        )
        # The tracker is forked by attention even where every dropout is zero.
        model_parallel_cuda_manual_seed(seed)
        return cls(
            rank=dist.get_rank(),
            world_size=world_size,
            tensor_rank=state.get_tensor_model_parallel_rank(),
            tensor_size=tensor_parallel,
            pipeline_rank=state.get_pipeline_model_parallel_rank(),
            pipeline_size=pipeline_parallel,
            data_rank=state.get_data_parallel_rank(),
            data_size=world_size // (tensor_parallel * pipeline_parallel),
            tensor_group=state.get_tensor_model_parallel_group(),
            pipeline_group=state.get_pipeline_model_parallel_group(),
            data_group=state.get_data_parallel_group(),
            control_group=control_group,
            device=device,
            sequence_parallel=sequence_parallel and tensor_parallel > 1,
            owns_process_group=not started,
        )

    def sum_over_data(self, tensor: Tensor) -> Tensor:
        """The sum over data-parallel ranks, as a new tensor on ``tensor``'s device; ``tensor`` is left as it is."""
        total = tensor.detach().to(self.device).clone(memory_format=torch.contiguous_format)
        if self.data_size > 1:
            dist.all_reduce(total, group=self.data_group)
        return total.to(tensor.device)

    def broadcast_object(self, obj: T, src: int = 0) -> T:
        """Rank ``src``'s picklable object, on every rank. All ranks call it."""
        if self.world_size == 1:
            return obj
        box = [obj]
        dist.broadcast_object_list(box, src=src, group=self.control_group)
        return box[0]

    def any_rank(self, flag: bool) -> bool:
        """True where any rank says so. All ranks call it."""
        if self.world_size == 1:
            return bool(flag)
        votes = torch.tensor([int(flag)])
        dist.all_reduce(votes, op=dist.ReduceOp.MAX, group=self.control_group)
        return bool(votes.item())

    def barrier(self) -> None:
        """Wait for every rank."""
        if self.world_size > 1:
            dist.barrier(group=self.control_group)

    def stop(self) -> None:
        """Take Megatron's groups down, and the default process group where ``start`` made it."""
        from megatron.core import parallel_state as state

        self.barrier()
        state.destroy_model_parallel()
        if self.owns_process_group:
            dist.destroy_process_group()


def _check_degrees(world_size: int, tensor_parallel: int, pipeline_parallel: int) -> None:
    if tensor_parallel < 1 or pipeline_parallel < 1:
        raise ValueError(
            f"tensor parallel {tensor_parallel} and pipeline parallel {pipeline_parallel} must both be at least 1"
        )
    if world_size % (tensor_parallel * pipeline_parallel):
        raise ValueError(
            f"{world_size} processes cannot be split into tensor parallel {tensor_parallel} x pipeline parallel "
            f"{pipeline_parallel} = {tensor_parallel * pipeline_parallel}: start a multiple of that many processes, "
            "or change the degrees"
        )


def _choose_device() -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    return device


def _init_process_group(device: torch.device, timeout: datetime.timedelta) -> None:
    backend = "nccl" if device.type == "cuda" else "gloo"
    if "RANK" in os.environ:
        dist.init_process_group(backend, timeout=timeout)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
