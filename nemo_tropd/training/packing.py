"""Rollouts to micro-batches: padded ones of a number of sequences, or rows of a number of tokens."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from nemo_tropd.batch import Rollout, TokenBatch
from nemo_tropd.parallel.topology import Topology


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

    def pack(self, rollouts: Sequence[Rollout], step: int) -> list[TokenBatch]:
        """This data-parallel rank's micro-batches: the same number on every rank, some of them empty if need be. Every
        rank must pass the same ``rollouts``. Raises ValueError for one that is longer than a row."""
        lay_out: Callable[..., TokenBatch]
        topology, row = self.topology, self.tokens_per_micro_batch
        multiple = topology.tensor_size if topology.sequence_parallel else 1
        if row is None:
            own = sorted(rollouts[topology.data_rank :: topology.data_size], key=lambda r: -len(r.token_ids))
            size = self.micro_batch_size
            count = math.ceil(math.ceil(len(rollouts) / topology.data_size) / size)
            parts = [own[i * size : (i + 1) * size] for i in range(count)]
            lay_out = TokenBatch.pack
        else:
            bins = even_bins([len(r.token_ids) for r in rollouts], row, multiple_of=topology.data_size)
            parts = [[rollouts[i] for i in b] for b in bins[topology.data_rank :: topology.data_size]]
            lay_out = TokenBatch.concatenate
        return [
            lay_out(part, pad_id=self.pad_id, seed=self.seed, step=step, pad_to_multiple=multiple).to(topology.device)
            for part in parts
        ]

    def on_every_rank(self) -> Packer:
        """The same layout, with all micro-batches on every data-parallel rank."""
        return replace(self, topology=replace(self.topology, data_rank=0, data_size=1))


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
