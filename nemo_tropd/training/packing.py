"""Rollouts to micro-batches: padded ones of a number of sequences, or rows of a number of tokens."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Sequence
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
        by_teacher: dict[str, list[Rollout]] = {}
        for r in rollouts:
            by_teacher.setdefault(prompts[r.prompt_index].teacher, []).append(r)
        return [
            replace(batch, teacher=name)
            for name in sorted(by_teacher)
            for batch in self._packed(by_teacher[name], step, prompts)
        ]

    def _packed(self, rollouts: Sequence[Rollout], step: int, prompts: PromptSet) -> list[TokenBatch]:
        lay_out: Callable[..., TokenBatch]
        topology, row = self.topology, self.tokens_per_micro_batch
        multiple = topology.tensor_size if topology.sequence_parallel else 1
        read = {r.sequence_id: _told(r, prompts) for r in rollouts}
        if row is None:
            own = sorted(rollouts[topology.data_rank :: topology.data_size], key=lambda r: -len(r.token_ids))
            size = self.micro_batch_size
            count = math.ceil(math.ceil(len(rollouts) / topology.data_size) / size)
            parts = [own[i * size : (i + 1) * size] for i in range(count)]
            lay_out = TokenBatch.pack
        else:
            # As long as the longer of what student and teacher read.
            lengths = [max(len(r.token_ids), len(read[r.sequence_id].token_ids)) for r in rollouts]
            bins = even_bins(lengths, row, multiple_of=topology.data_size)
            parts = [[rollouts[i] for i in b] for b in bins[topology.data_rank :: topology.data_size]]
            lay_out = TokenBatch.concatenate

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


def _told(rollout: Rollout, prompts: PromptSet) -> Rollout:
    """The rollout as its teacher reads it."""
    told = prompts[rollout.prompt_index].told_ids if prompts else ()
    return replace(rollout, prompt_ids=list(told)) if told else rollout


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
