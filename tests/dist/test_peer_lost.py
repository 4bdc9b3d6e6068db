"""When a rank is gone, the others say which; other errors pass as they are."""

from __future__ import annotations

import contextlib
import os
import random
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist

from nemo_tropd.config import ConfigError
from nemo_tropd.parallel.roll_call import (
    PeerLost,
    RollCall,
    answer_time_s,
    collective_timeout_s,
    failed_collective,
    named_peers,
)
from tests.dist.run_distributed import run_distributed

pytestmark = pytest.mark.random


def start(timeout_s: float) -> Any:
    from nemo_tropd.parallel.topology import Topology

    return Topology.start(timeout_s=collective_timeout_s(timeout_s))


def silent_peer(rank: int, world_size: int, missing: int, timeout_s: float) -> str:
    """Rank ``missing`` sends no more heartbeats and closes its connections; returns what the others say."""
    topology = start(200)
    ones = torch.ones(3)
    call = RollCall.start(topology, timeout_s)
    assert call is not None
    dist.all_reduce(ones)
    assert ones[0] == world_size
    if rank == missing:
        call.stop()
        time.sleep(call.beat_s)
        dist.destroy_process_group()
        return ""
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(RollCall, "start", classmethod(lambda cls, t, s: call))
            with named_peers(topology, timeout_s):
                dist.all_reduce(ones)
    except PeerLost as lost:
        return str(lost)
    return "nothing was noticed"


@pytest.mark.timeout(200)
def test_the_missing_rank_is_named() -> None:
    missing = random.choice([1, 2])
    answers = run_distributed(silent_peer, 3, missing, 60.0, timeout_s=150, init_gloo=False)
    for rank, text in enumerate(answers):
        if rank != missing:
            assert text.startswith(f"rank {rank} on "), text
            assert f"rank {missing} on " in text and "did not respond" in text, text
            assert "trainer.distributed_timeout_s = 60 s" in text and "checkpoints are kept" in text


def other_error(rank: int, world_size: int) -> str:
    """An error that is no collective's passes unchanged, and the groups still work."""
    topology = start(60)
    with contextlib.suppress(ConfigError), named_peers(topology, 60):
        raise ConfigError("model.seed", rank, "no")
    ones = torch.ones(1)
    dist.all_reduce(ones)
    topology.stop()
    return str(ones.item())


def test_other_errors_pass() -> None:
    assert run_distributed(other_error, 2, timeout_s=100, init_gloo=False) == ["2.0", "2.0"]


def test_what_counts_as_a_failed_collective() -> None:
    gloo = RuntimeError("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [::1]:3")
    wrapped = ValueError("writing failed")
    wrapped.__cause__ = gloo
    assert failed_collective(gloo) and failed_collective(wrapped)
    assert failed_collective(dist.DistBackendError("NCCL error: unhandled system error"))
    for other in (RuntimeError("shape mismatch"), OSError("disk full"), ValueError("gloo")):
        assert not failed_collective(other)


def test_times_fit_in_the_configured_time() -> None:
    for timeout in (4.0, 60.0, 3600.0):
        assert collective_timeout_s(timeout) + answer_time_s(timeout) == timeout and answer_time_s(timeout) > 0


def test_a_world_of_one_has_nobody_to_miss(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    topology = start(60)
    try:
        assert RollCall.start(topology, 60) is None
        with pytest.raises(RuntimeError, match="gloo"), named_peers(topology, 60):
            raise RuntimeError("gloo says so")
    finally:
        topology.stop()
    assert "MASTER_ADDR" not in os.environ
