"""Log-probabilities and top-k on shards, TP 8 on gloo, against float64 torch on the full vocabulary.

TP 2 and 4 run the same cases in test_head_parallel.py, in the processes that are up there anyway.
"""

from __future__ import annotations

import random
import time

import pytest
import torch
import torch.distributed as dist

from nemo_tropd.parallel.vocab import NonFiniteLogits, vocab_parallel_log_probs, vocab_parallel_top_k
from tests.dist.checks import Checks, counted
from tests.dist.run_distributed import run_distributed

pytestmark = pytest.mark.random


def check_vocabulary(checks: Checks, rank: int, world_size: int, seed: int) -> None:
    generator, group = torch.Generator().manual_seed(seed), dist.group.WORLD
    # Uneven true vocabularies; 19 of 48 leaves whole shards of padding.
    for total, vocab_size in ((48, 41), (48, 19), (48, 48), (4096, 4001)):
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            case = f"V {vocab_size} of {total}, {dtype}"
            full = (torch.randn(4, 3, total, generator=generator) * 3).to(dtype)
            full[..., vocab_size:] = 1e4
            local = full.chunk(world_size, -1)[rank].clone().requires_grad_(True)
            wide = full[..., :vocab_size].double().requires_grad_(True)
            ids = torch.randint(0, vocab_size, (4, 3, 5), generator=generator)
            weights = torch.randn(4, 3, 5, generator=generator)
            with counted() as forward:
                got = vocab_parallel_log_probs(local, ids, group, vocab_size)
            with counted() as backward:
                (got * weights).sum().backward()
            checks.true(case + " collectives", dict(forward) == {"MAX": 1, "SUM": 1} and not backward, forward)
            want = wide.log_softmax(-1).gather(-1, ids)
            (want * weights).sum().backward()
            grad = torch.nn.functional.pad(wide.grad, (0, total - vocab_size)).chunk(world_size, -1)[rank]
            checks.close(case + " log-probs", got, want, 1e-5)
            checks.close(case + " gradient", local.grad, grad, 1e-2 if dtype == torch.bfloat16 else 1e-5)
            for k in (1, 7, 19):
                with counted() as forward:
                    top = vocab_parallel_top_k(local, k, group, vocab_size)
                checks.true(case + " gathers", dict(forward) == {"all_gather_into_tensor": 1}, forward)
                log_probs = wide.detach().log_softmax(-1)
                checks.close(case + f" top {k}", top.log_probs, log_probs.topk(k, -1).values, 1e-5)
                checks.close(case + " log z", top.log_z, wide.logsumexp(-1), 1e-5)
                # Ties (many in bf16) may fall either way, but an id must carry its own value.
                checks.close(case + f" ids {k}", log_probs.gather(-1, top.token_ids), top.log_probs, 1e-5)
    if rank == world_size - 1:
        local.data[1, 1, 0] = float("nan") if local.size(-1) else 0.0
    for call in (lambda: vocab_parallel_log_probs(local, ids, group), lambda: vocab_parallel_top_k(local, 2, group)):
        with pytest.raises(NonFiniteLogits, match="logits: row 4"):
            call()


def work(rank: int, world_size: int, seed: int) -> list[str]:
    checks = Checks()
    check_vocabulary(checks, rank, world_size, seed)
    return checks.failures


def test_vocabulary_on_eight_shards() -> None:
    seed = random.randrange(10**6)
    for rank, failures in enumerate(run_distributed(work, 8, seed, timeout_s=240)):
        assert not failures, f"seed {seed}, rank {rank}:\n" + "\n".join(failures)
