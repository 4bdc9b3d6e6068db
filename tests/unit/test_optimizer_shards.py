"""How the distributed optimizer's flat shards are cut for Megatron's files."""

from __future__ import annotations

import random

import pytest
import torch
from megatron.core.dist_checkpointing import ShardedTensor

from nemo_tropd.training.optimizer_shards import _rectangles

pytestmark = pytest.mark.random


def test_a_range_of_a_matrix_is_cut_at_its_rows() -> None:
    rows, columns = random.randint(3, 6), random.randint(3, 7)
    matrix = torch.arange(float(rows * columns)).view(rows, columns)
    begin = random.randrange(1, columns)  # within a row, as no boundary of a tiny model's shards is
    end = random.randrange(begin + columns, matrix.numel())
    found = torch.full_like(matrix, torch.nan)
    whole = ShardedTensor.from_rank_offsets("w", matrix)
    for part in _rectangles(whole, begin, matrix.flatten()[begin:end]):
        (row, column), (height, width) = part.global_offset, part.local_shape
        found[row : row + height, column : column + width] = part.data
    assert torch.equal(found.flatten()[begin:end], matrix.flatten()[begin:end])
    assert int(found.isnan().sum()) == matrix.numel() - (end - begin)
