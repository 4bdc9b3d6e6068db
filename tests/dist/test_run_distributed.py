"""The runner itself: results by rank, and every way a rank can fail is named."""

import os
import random
import time

import numpy as np
import pytest
import torch

from tests.dist.run_distributed import DistributedFailure, run_distributed

pytestmark = pytest.mark.random


def _sum(rank: int, world_size: int, base: torch.Tensor) -> tuple[int, torch.Tensor]:
    total = base + rank
    torch.distributed.all_reduce(total)
    return rank, total


def _raise_on_one(rank: int, world_size: int) -> None:
    if rank == 1:
        raise ValueError("the second rank's own words")
    torch.distributed.barrier()


def _die(rank: int, world_size: int) -> None:
    if rank == 0:
        os._exit(3)
    time.sleep(60)


def _hang(rank: int, world_size: int) -> None:
    if rank == 1:
        time.sleep(600)


def _surroundings(rank: int, world_size: int) -> tuple[object, ...]:
    left_by_another = getattr(os, "left_behind", None)
    os.left_behind = rank
    return left_by_another, os.environ.get("GIVEN"), torch.initial_seed(), random.random(), float(np.random.rand())


def test_ranks_have_the_callers_environment_own_generators_and_nothing_of_other_ranks(monkeypatch):
    seen = []
    for value in ("one", "two"):
        monkeypatch.setenv("GIVEN", value)
        seen.append(run_distributed(_surroundings, 2, timeout_s=60))
        assert [rank[:2] for rank in seen[-1]] == [(None, value)] * 2
    first, second = ([rank[2:] for rank in run] for run in seen)
    assert first == second  # of the test's own seed
    assert all(mine != theirs for mine, theirs in zip(*first, strict=True))


def test_results_come_back_by_rank():
    base = torch.randn(4)
    results = run_distributed(_sum, 2, base, timeout_s=60)
    assert [rank for rank, _ in results] == [0, 1]
    for _, total in results:
        torch.testing.assert_close(total, 2 * base + 1)


def test_the_failing_rank_is_named_with_its_traceback():
    with pytest.raises(DistributedFailure, match=r"(?s)rank 1: Traceback.*the second rank's own words"):
        run_distributed(_raise_on_one, 2, timeout_s=60)


def test_a_rank_that_dies_is_named():
    with pytest.raises(DistributedFailure, match="rank 0: died without a word, exit code 3"):
        run_distributed(_die, 2, timeout_s=60)


def test_a_rank_that_hangs_is_named_and_killed():
    start = time.monotonic()
    with pytest.raises(DistributedFailure, match=r"still running: ranks \[1\]"):
        run_distributed(_hang, 2, timeout_s=10)
    assert time.monotonic() - start < 100
