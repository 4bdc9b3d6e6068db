"""Rollouts to micro-batches: padded ones of a number of sequences, or rows of a number of tokens."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Sequence

from nemo_tropd.batch import Rollout, TokenBatch
from nemo_tropd.parallel.topology import Topology


def pack_micro_batches(
    rollouts: Sequence[Rollout],
    topology: Topology,
    *,
    micro_batch_size: int,
    pad_id: int,
    seed: int,
    step: int,
    tokens_per_micro_batch: int | None = None,
) -> list[TokenBatch]:
    """This data-parallel rank's micro-batches: the same number on every rank, empty ones among them where need be.

    ``tokens_per_micro_batch`` None: ``micro_batch_size`` sequences of like length, padded. Else sequences end to end in
    rows of at most that many tokens, filled evenly. Under sequence parallelism the tensor-parallel size divides every
    width.

    Every rank must pass the same ``rollouts``. Raises ValueError for one that is longer than a row.
    """
    lay_out: Callable[..., TokenBatch]
    multiple = topology.tensor_size if topology.sequence_parallel else 1
    if tokens_per_micro_batch is None:
        own = sorted(rollouts[topology.data_rank :: topology.data_size], key=lambda r: -len(r.token_ids))
        count = math.ceil(math.ceil(len(rollouts) / topology.data_size) / micro_batch_size)
        parts = [own[i * micro_batch_size : (i + 1) * micro_batch_size] for i in range(count)]
        lay_out = TokenBatch.pack
    else:
        lengths = [len(r.token_ids) for r in rollouts]
        bins = even_bins(lengths, tokens_per_micro_batch, multiple_of=topology.data_size)
        parts = [[rollouts[i] for i in b] for b in bins[topology.data_rank :: topology.data_size]]
        lay_out = TokenBatch.concatenate
    return [
        lay_out(part, pad_id=pad_id, seed=seed, step=step, pad_to_multiple=multiple).to(topology.device)
        for part in parts
    ]


def even_bins(lengths: Sequence[int], capacity: int, *, multiple_of: int = 1) -> list[list[int]]:
    """Indices of ``lengths`` in bins of at most ``capacity``, as few as first-fit decreasing needs, evenly filled.

    Their number is a multiple of ``multiple_of``, with empty bins at the end where that many are not needed. Fullest
    first; the same on every process for the same lengths. Raises ValueError for a length above ``capacity``.
    """
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
    """Longest first, each into the emptiest of ``count`` bins; None where that passes ``capacity``."""
    bins: list[list[int]] = [[] for _ in range(count)]
    loads = [(0, b) for b in range(count)]
    for i in order:
        load, b = heapq.heappop(loads)
        if load + lengths[i] > capacity:
            return None
        bins[b].append(i)
        heapq.heappush(loads, (load + lengths[i], b))
    return bins
