"""This process's place in the parallel layout: ranks, groups and device, on CPU with gloo and on GPUs with NCCL."""

from __future__ import annotations

import datetime
import os
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from nemo_tropd.parallel.agreement import World
from nemo_tropd.parallel.cpu import enable_cpu_megatron
from nemo_tropd.parallel.ranks import RankLayout


@dataclass(frozen=True)
class Topology(World):
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
    control_group: ProcessGroup  # every rank, gloo: Python objects, rollouts and flags, never the model
    device: torch.device
    sequence_parallel: bool
    owns_process_group: bool
    ranks: RankLayout
    model_group: ProcessGroup  # tensor x pipeline: the ranks that have one student and see the same rollouts
    teacher_group: ProcessGroup  # the ranks that have one teacher among them
    # The same ranks on gloo, if a teacher sees several data ranks' rollouts.
    teacher_control_group: ProcessGroup | None
    from_megatron: bool = True  # False: a teacher's own groups, which Megatron's global state does not know
    timeout_s: float = 600.0  # of a collective
    tensor_control_group: ProcessGroup | None = None  # the student's tensor group on gloo; None: it has one rank
    # This rank's groups of teachers beside the student, which Megatron does not know either; of every copy.
    own_groups: list[ProcessGroup] = field(default_factory=list, compare=False, repr=False)

    @property
    def is_leader(self) -> bool:
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
        teacher_tensor_parallel: int | None = None,
    ) -> Topology:
        """Join the world that torchrun describes (RANK, WORLD_SIZE, ...), or be a world of one without it; a default
        process group that is already up is used as it is. Sets the device, Megatron's groups and its random numbers.
        ``sequence_parallel`` is off at tensor parallel 1. ``teacher_tensor_parallel`` None: the teacher is split as the
        student is, pipeline included. Raises ValueError if the degrees do not fit together."""
        started = dist.is_initialized()
        world_size = dist.get_world_size() if started else int(os.environ.get("WORLD_SIZE", "1"))
        ranks = RankLayout(world_size, tensor_parallel, pipeline_parallel, teacher_tensor_parallel)
        enable_cpu_megatron()
        device = _choose_device()
        timeout = datetime.timedelta(seconds=timeout_s)
        if not started:
            _init_process_group(device, timeout)
        control_group = dist.group.WORLD if _on_gloo() else dist.new_group(backend="gloo", timeout=timeout)
        assert control_group is not None

        from megatron.core import parallel_state as state
        from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

        state.initialize_model_parallel(
            tensor_model_parallel_size=tensor_parallel,
            pipeline_model_parallel_size=pipeline_parallel,
            distributed_timeout_minutes=timeout_s / 60,  # a timedelta takes fractions; Megatron only hands it on
        )
        own_groups: list[ProcessGroup] = [] if _on_gloo() else [control_group]
        tensor_group = state.get_tensor_model_parallel_group()
        teacher_group, teacher_control = _teacher_groups(ranks, tensor_group, timeout, own_groups)
        model_parallel_cuda_manual_seed(seed)  # attention forks the tracker even if every dropout is zero
        return cls(
            rank=dist.get_rank(),
            world_size=world_size,
            tensor_rank=state.get_tensor_model_parallel_rank(),
            tensor_size=tensor_parallel,
            pipeline_rank=state.get_pipeline_model_parallel_rank(),
            pipeline_size=pipeline_parallel,
            data_rank=state.get_data_parallel_rank(),
            data_size=world_size // (tensor_parallel * pipeline_parallel),
            tensor_group=tensor_group,
            pipeline_group=state.get_pipeline_model_parallel_group(),
            data_group=state.get_data_parallel_group(),
            control_group=control_group,
            device=device,
            sequence_parallel=sequence_parallel and tensor_parallel > 1,
            owns_process_group=not started,
            ranks=ranks,
            model_group=state.get_model_parallel_group(),
            teacher_group=teacher_group,
            teacher_control_group=teacher_control,
            timeout_s=timeout_s,
            tensor_control_group=_tensor_control_group(ranks, tensor_group, timeout, own_groups),
            own_groups=own_groups,
        )

    def with_teacher(self, tensor_parallel: int | None) -> Topology:
        """The topology beside a teacher of this tensor-parallel degree, with its groups (collective)."""
        ranks = replace(self.ranks, teacher_tensor=tensor_parallel)
        if ranks == self.ranks:
            return self
        timeout = datetime.timedelta(seconds=self.timeout_s)
        group, control = _teacher_groups(ranks, self.tensor_group, timeout, self.own_groups)
        return replace(self, ranks=ranks, teacher_group=group, teacher_control_group=control)

    def for_teacher(self) -> Topology:
        """The topology of the teacher's model: this one, or one of its own group if it has a degree of its own, without
        pipeline and sequence parallelism; its replicas know nothing of each other."""
        if self.ranks.teacher_tensor is None:
            return self
        from megatron.core import parallel_state as state

        alone = state.get_context_parallel_group()  # contexts are never split, so this is a group of one
        return replace(
            self,
            tensor_rank=dist.get_rank(self.teacher_group),
            tensor_size=self.ranks.teacher_degree,
            tensor_group=self.teacher_group,
            pipeline_rank=0,
            pipeline_size=1,
            pipeline_group=alone,
            data_rank=0,
            data_size=1,
            data_group=alone,
            model_group=self.teacher_group,
            sequence_parallel=False,
            from_megatron=False,
        )

    def _group(self) -> ProcessGroup:
        return self.control_group

    def any_tensor_rank(self, flag: bool) -> bool:
        """True if ``flag`` is True on any rank of the student's tensor group. All of these call it."""
        if self.tensor_control_group is None:
            return bool(flag)
        votes = torch.tensor([int(flag)])
        dist.all_reduce(votes, op=dist.ReduceOp.MAX, group=self.tensor_control_group)
        return bool(votes.item())

    def synchronize(self) -> None:
        """Wait until this rank's device has finished all queued work; a CPU always has."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def barrier(self) -> None:
        """Wait for every rank."""
        if self.world_size > 1:
            dist.barrier(group=self.control_group)

    def stop(self, *, failed: bool = False) -> None:
        """Destroy every group that was made since ``start``, the default process group among them if ``start`` made it.
        After a failure no other rank is waited for: it may be gone, or in another collective."""
        from megatron.core import parallel_state as state

        if not failed:
            self.barrier()
        alone = failed and self.world_size > 1
        if not (alone or self.owns_process_group):
            # Megatron forgets most of its own. Each has threads, which on gloo look for work a hundred times a second.
            for group in [*self.own_groups, *_of_megatron()]:
                dist.destroy_process_group(group)
        state.destroy_model_parallel()
        if self.owns_process_group and not alone:
            dist.destroy_process_group()
        self.own_groups.clear()


def _of_megatron() -> Iterator[ProcessGroup]:
    """This rank's groups that Megatron made. Source: megatron-core 0.16, parallel_state.create_group."""
    from megatron.core import parallel_state as state

    return (group for group in state._global_process_group_list or () if group is not None)


def _teacher_groups(
    ranks: RankLayout, tensor_group: ProcessGroup, timeout: datetime.timedelta, made: list[ProcessGroup]
) -> tuple[ProcessGroup, ProcessGroup | None]:
    """This rank's teacher group, and its gloo twin if data ranks show each other their rollouts (collective); ``made``
    gets what is new."""
    if ranks.teacher_tensor is None:
        return tensor_group, None
    rank = dist.get_rank()
    mine: tuple[ProcessGroup, ProcessGroup | None] | None = None
    for members in ranks.teacher_groups():
        group = dist.new_group(list(members), timeout=timeout)
        several = ranks.owners > 1
        twin = dist.new_group(list(members), timeout=timeout, backend="gloo") if several and not _on_gloo() else group
        if rank in members:
            mine = group, twin if several else None
            made += [group] if twin is group else [group, twin]
    assert mine is not None
    return mine


def _tensor_control_group(
    ranks: RankLayout, tensor_group: ProcessGroup, timeout: datetime.timedelta, made: list[ProcessGroup]
) -> ProcessGroup | None:
    """See ``Topology``; ``made`` gets it if it is new (collective)."""
    if ranks.tensor == 1:
        return None
    if _on_gloo():
        return tensor_group
    mine: ProcessGroup | None = None
    for members in sorted({ranks.tensor_group(rank) for rank in range(ranks.world_size)}):
        group = dist.new_group(list(members), timeout=timeout, backend="gloo")
        if dist.get_rank() in members:
            mine = group
            made.append(group)
    return mine


def _on_gloo() -> bool:
    return bool(dist.get_backend() == "gloo")


def _choose_device() -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    return device


def _init_process_group(device: torch.device, timeout: datetime.timedelta) -> None:
    backend = "nccl" if device.type == "cuda" else "gloo"
    # This group's monitor would end the process after a failure of any other NCCL group, engine hosts' among them.
    os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "0")
    if "RANK" in os.environ:
        dist.init_process_group(backend, timeout=timeout)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
