"""Rollouts to micro-batches: padded ones of a number of sequences, or rows of a number of tokens."""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from nemo_tropd.batch import Rollout, TokenBatch
from nemo_tropd.data import PromptSet
from nemo_tropd.parallel.topology import Topology

NO_PROMPTS = PromptSet(())


@dataclass(frozen=True)
class Packer:
    """How a run lays rollouts out in micro-batches. ``tokens_per_micro_batch`` None: ``micro_batch_size`` sequences of
    similar length, padded with ``pad_id``. Else sequences end to end in rows of at most that many tokens, filled
    evenly. Under sequence parallelism every width is a multiple of the tensor-parallel size. ``seed`` is the run's, for
    the gate's draws."""

    topology: Topology
    pad_id: int
    micro_batch_size: int
    tokens_per_micro_batch: int | None
    seed: int

    def pack(self, rollouts: Sequence[Rollout], step: int, prompts: PromptSet = NO_PROMPTS) -> list[TokenBatch]:
        """This data-parallel rank's micro-batches: the same number on every rank, some of them empty if need be. Every
        rank must pass the same ``rollouts``. Raises ValueError for one that is longer than a row.

        ``prompts``, which the rollouts' ``prompt_index`` counts, may name several teachers or tell them something else:
        a micro-batch then is one teacher's, and has what it reads. Their order is that of the names."""
        if not prompts:
            return self._packed(rollouts, step, prompts)
        return [
            replace(batch, teacher=name)
            for name, own in _by_teacher(rollouts, prompts)
            for batch in self._packed(own, step, prompts)
        ]

    def owners(self, rollouts: Sequence[Rollout], prompts: PromptSet) -> dict[int, int]:
        """The data-parallel rank of each sequence, by number, in the layout of ``pack``."""
        return {
            r.sequence_id: rank
            for _, own in _by_teacher(rollouts, prompts)
            for rank, parts in enumerate(self._parts(own, {r.sequence_id: _told(r, prompts) for r in own}))
            for part in parts
            for r in part
        }

    def _parts(self, rollouts: Sequence[Rollout], read: Mapping[int, Rollout]) -> list[list[list[Rollout]]]:
        """The sequences of each micro-batch of each data-parallel rank."""
        row, ranks = self.tokens_per_micro_batch, self.topology.data_size
        if row is None:
            size = self.micro_batch_size
            count = math.ceil(math.ceil(len(rollouts) / ranks) / size)
            owned = [sorted(rollouts[rank::ranks], key=lambda r: -r.length) for rank in range(ranks)]
            return [[own[i * size : (i + 1) * size] for i in range(count)] for own in owned]
        # As long as the longer of what student and teacher read.
        lengths = [max(r.length, read[r.sequence_id].length) for r in rollouts]
        bins = even_bins(lengths, row, multiple_of=ranks)
        return [[[rollouts[i] for i in b] for b in bins[rank::ranks]] for rank in range(ranks)]

    def _packed(self, rollouts: Sequence[Rollout], step: int, prompts: PromptSet) -> list[TokenBatch]:
        topology = self.topology
        lay_out = TokenBatch.pack if self.tokens_per_micro_batch is None else TokenBatch.concatenate
        multiple = topology.tensor_size if topology.sequence_parallel else 1
        read = {r.sequence_id: _told(r, prompts) for r in rollouts}
        parts = self._parts(rollouts, read)[topology.data_rank]

        def laid_out(part: Sequence[Rollout]) -> TokenBatch:
            return lay_out(part, pad_id=self.pad_id, seed=self.seed, step=step, pad_to_multiple=multiple)

        batches = []
        for part in parts:
            told = [read[r.sequence_id] for r in part]
            other = any(a is not b for a, b in zip(part, told, strict=True))
            groups = tuple(prompts.groups(r.prompt_index) for r in part)
            batch = replace(
                laid_out(part), told=laid_out(told) if other else None, groups=groups if any(groups) else ()
            )
            batches.append(batch.to(topology.device))
        return batches

    def on_every_rank(self) -> Packer:
        """The same layout, with all micro-batches on every data-parallel rank."""
        return replace(self, topology=replace(self.topology, data_rank=0, data_size=1))


def _by_teacher(rollouts: Sequence[Rollout], prompts: PromptSet) -> Iterator[tuple[str, list[Rollout]]]:
    by_teacher: dict[str, list[Rollout]] = {}
    for r in rollouts:
        by_teacher.setdefault(prompts[r.prompt_index].teacher, []).append(r)
    for name in sorted(by_teacher):
        yield name, by_teacher[name]


def _told(rollout: Rollout, prompts: PromptSet) -> Rollout:
    """The rollout as its teacher reads it."""
    told = prompts[rollout.prompt_index].told_ids if prompts else ()
    return replace(rollout, prompt_ids=told) if told else rollout


def even_bins(lengths: Sequence[int], capacity: int, *, multiple_of: int = 1) -> list[list[int]]:
    """Indices of ``lengths`` in bins of at most ``capacity``, as few as first-fit decreasing needs, evenly filled.
    Their number is a multiple of ``multiple_of``, with empty bins at the end if that many are not needed. Fullest
    first; the same on every process for the same lengths. Raises ValueError for a length above ``capacity``."""
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    if order and lengths[order[0]] > capacity:
        raise ValueError(f"a sequence of {lengths[order[0]]} tokens does not fit a micro-batch of {capacity}")
    bins = _first_fit(lengths, order, capacity)
    count = math.ceil(len(bins) / multiple_of) * multiple_of
    bins = _spread(lengths, order, capacity, count) or [*bins, *([] for _ in range(count - len(bins)))]
    return sorted(bins, key=lambda b: (-sum(lengths[i] for i in b), b))


def _first_fit(lengths: Sequence[int], order: Sequence[int], capacity: int) -> list[list[int]]:
    bins: list[list[int]] = []
    room: list[int] = []
    for i in order:
        place = next((b for b, left in enumerate(room) if left >= lengths[i]), len(bins))
        if place == len(bins):
            bins.append([])
            room.append(capacity)
        bins[place].append(i)
        room[place] -= lengths[i]
    return bins


def _spread(lengths: Sequence[int], order: Sequence[int], capacity: int, count: int) -> list[list[int]] | None:
    """Longest first, each into the emptiest of ``count`` bins; None if that exceeds ``capacity``."""
    bins: list[list[int]] = [[] for _ in range(count)]
    loads = [(0, b) for b in range(count)]
    for i in order:
        load, b = heapq.heappop(loads)
        if load + lengths[i] > capacity:
            return None
        bins[b].append(i)
        heapq.heappush(loads, (load + lengths[i], b))
    return bins
