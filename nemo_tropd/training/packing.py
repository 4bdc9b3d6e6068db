"""Rollouts to micro-batches."""

from __future__ import annotations

import math
from collections.abc import Sequence

from nemo_tropd.batch import Rollout, TokenBatch
from nemo_tropd.parallel.topology import Topology


def pack_micro_batches(
    rollouts: Sequence[Rollout], topology: Topology, *, micro_batch_size: int, pad_id: int, seed: int, step: int
) -> list[TokenBatch]:
    """This data-parallel rank's micro-batches: the same number on every rank, sequences of like length together."""
    own = sorted(rollouts[topology.data_rank :: topology.data_size], key=lambda r: -len(r.token_ids))
    count = math.ceil(math.ceil(len(rollouts) / topology.data_size) / micro_batch_size)
    multiple = topology.tensor_size if topology.sequence_parallel else 1
    return [
        TokenBatch.pack(
            own[i * micro_batch_size : (i + 1) * micro_batch_size],
            pad_id=pad_id,
            seed=seed,
            step=step,
            pad_to_multiple=multiple,
        ).to(topology.device)
        for i in range(count)
    ]
