"""The arithmetic of ranks: their places, their groups, which teacher replica scores what. Imports no torch.

Ranks are laid out tensor first, then data, pipeline last. A teacher with a tensor-parallel degree of its own has no
pipeline: every rank has a shard of all of it, and the replicas that see the same micro-batches share them.
"""

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class RankLayout:
    """Degrees of a run. ``teacher_tensor`` is None if the teacher is split exactly as the student is. Raises
    ValueError, with the numbers, if the degrees do not fit together."""

    world_size: int
    tensor: int = 1
    pipeline: int = 1
    teacher_tensor: int | None = None

    def __post_init__(self) -> None:
        tensor, pipeline, teacher = self.tensor, self.pipeline, self.teacher_tensor
        if tensor < 1 or pipeline < 1:
            raise ValueError(f"tensor parallel {tensor} and pipeline parallel {pipeline} must both be at least 1")
        if self.world_size % (tensor * pipeline):
            raise ValueError(
                f"{self.world_size} processes cannot be split into tensor parallel {tensor} x pipeline parallel "
                f"{pipeline} = {tensor * pipeline}: start a multiple of that many processes, or change the degrees"
            )
        if teacher is None:
            return
        if teacher == tensor:
            object.__setattr__(self, "teacher_tensor", None)
        elif teacher < 1 or (tensor % teacher and teacher % tensor):
            raise ValueError(
                f"the teacher's tensor parallel {teacher} must divide the student's {tensor} or be a multiple of it"
            )
        elif self.stage_size % teacher:
            raise ValueError(
                f"the teacher's tensor parallel {teacher} must divide the {self.stage_size} ranks of a pipeline stage "
                f"(tensor {tensor} x data {self.data})"
            )

    @property
    def data(self) -> int:
        """Data-parallel degree."""
        return self.world_size // (self.tensor * self.pipeline)

    @property
    def stage_size(self) -> int:
        """Ranks of one pipeline stage, which are consecutive."""
        return self.tensor * self.data

    def place(self, rank: int) -> tuple[int, int, int]:
        """(tensor rank, data rank, pipeline rank)."""
        return rank % self.tensor, rank % self.stage_size // self.tensor, rank // self.stage_size

    def rank(self, tensor: int, data: int, pipeline: int) -> int:
        """The rank at a place."""
        return tensor + self.tensor * data + self.stage_size * pipeline

    def tensor_group(self, rank: int) -> tuple[int, ...]:
        """The ranks that share the student's layers with ``rank``."""
        first = rank - rank % self.tensor
        return tuple(range(first, first + self.tensor))

    def model_group(self, rank: int) -> tuple[int, ...]:
        """The ranks that have one student and see the same rollouts: tensor x pipeline, ascending."""
        _, data, _ = self.place(rank)
        return tuple(self.rank(t, data, p) for p in range(self.pipeline) for t in range(self.tensor))

    @property
    def teacher_degree(self) -> int:
        """Tensor-parallel ranks of one teacher."""
        return self.teacher_tensor or self.tensor

    @property
    def owners(self) -> int:
        """Data-parallel ranks whose micro-batches one teacher replica sees."""
        return max(1, self.teacher_degree // self.tensor)

    @property
    def replicas(self) -> int:
        """Teacher replicas that share the same micro-batches; 1 if the teacher is split as the student is."""
        if self.teacher_tensor is None:
            return 1
        return self.pipeline * max(1, self.tensor // self.teacher_tensor)

    def teacher_groups(self) -> Iterator[tuple[int, ...]]:
        """Every group of ranks that has one teacher of its own degree; consecutive, within a pipeline stage."""
        for first in range(0, self.world_size, self.teacher_degree):
            yield tuple(range(first, first + self.teacher_degree))

    def teacher_group(self, rank: int) -> tuple[int, ...]:
        """The group of ``rank`` among :meth:`teacher_groups`."""
        first = rank - rank % self.teacher_degree
        return tuple(range(first, first + self.teacher_degree))

    def owner(self, rank: int) -> int:
        """Which of the data ranks that its teacher replica sees ``rank`` belongs to, from 0."""
        return self.place(rank)[1] % self.owners

    def replica(self, rank: int) -> int:
        """Which of the :attr:`replicas` ``rank`` belongs to, from 0."""
        if self.teacher_tensor is None:
            return 0
        tensor, _, stage = self.place(rank)
        return stage * max(1, self.tensor // self.teacher_tensor) + tensor // self.teacher_tensor

    def scorer_of(self, owner: int, batch: int) -> int:
        """The replica that scores micro-batch number ``batch`` of data rank ``owner``: in turn."""
        return (batch * self.owners + owner) % self.replicas

    def source(self, rank: int, replica: int) -> int:
        """The first rank of ``rank``'s model group that belongs to ``replica``: it passes that replica's scores on."""
        return next(r for r in self.model_group(rank) if self.replica(r) == replica)


def nodes_of(ranks: tuple[int, ...], devices: int) -> int:
    """How many nodes of ``devices`` ranks each the ranks lie on."""
    return len({rank // devices for rank in ranks})
