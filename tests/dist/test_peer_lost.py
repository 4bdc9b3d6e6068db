"""When a rank is gone, the others say which; other errors pass as they are."""

from __future__ import annotations

import io
import json
import os
import random
import time
from collections.abc import Callable
from contextlib import redirect_stderr
from typing import Any

import pytest
import torch
import torch.distributed as dist

from nemo_tropd.config import ConfigError
from nemo_tropd.parallel import roll_call
from nemo_tropd.parallel.agreement import RankError
from nemo_tropd.parallel.roll_call import (
    PeerFailed,
    PeerLost,
    RollCall,
    answer_time_s,
    collective_timeout_s,
    failed_collective,
)
from nemo_tropd.data import PromptError
from nemo_tropd.rollout.engine import EngineError
from tests.dist.run_distributed import run_distributed

pytestmark = pytest.mark.random


def start(timeout_s: float) -> Any:
    from nemo_tropd.parallel.topology import Topology

    return Topology.start(timeout_s=collective_timeout_s(timeout_s))


def silent_peer(rank: int, world_size: int, missing: int, timeout_s: float) -> str:
    """Rank ``missing`` sends no more heartbeats and closes its connections; returns what the others say."""
    topology = start(200)
    ones, printed = torch.ones(3), io.StringIO()
    try:
        with redirect_stderr(printed), RollCall(timeout_s) as call:
            assert call.together(lambda: rank) == rank
            dist.all_reduce(ones)
            assert ones[0] == world_size
            if rank == missing:
                call.stop()
                time.sleep(call.beat_s)
                dist.destroy_process_group()
                return ""
            dist.all_reduce(ones)
    except PeerLost as lost:
        assert f"PeerLost: {lost}\n(" in printed.getvalue(), printed.getvalue()  # and the collective's own words
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
    """An error that is no collective's passes unchanged, announced by its rank; the others leave a collective."""
    topology = start(60)
    try:
        with RollCall(60) as call:
            call.together(lambda: None)
            if rank == 1:
                raise ConfigError("model.seed", rank, "no")
            dist.all_reduce(torch.ones(1))
    except ConfigError as error:
        dist.destroy_process_group()
        time.sleep(1)
        return str(error)
    except PeerFailed as failed:
        return str(failed)
    topology.stop()
    return "nothing was noticed"


def test_other_errors_pass() -> None:
    """Rank 0 hears in the collective that rank 1 has left, or is ended out of it."""
    zero, one = run_distributed(other_error, 2, timeout_s=100, init_gloo=False)
    assert one.startswith("model.seed = 1: no")
    assert zero.startswith("rank 1 on ") and "ConfigError: model.seed = 1: no" in zero


def together(rank: int, world_size: int) -> list[str]:
    """What each rank gets: of good work, of one rank's errors, and of a request to stop on one."""
    from nemo_tropd.parallel.signals import STOP, Stopped

    def failing(error: Exception) -> Callable[[], int]:
        def work() -> int:
            if rank == 1:
                raise error
            return rank

        return work

    found = []
    with RollCall(60) as call:
        found.append(str(call.together(lambda: rank)))
        call.announce = lambda error: None  # which would end the other ranks
        call.stop()
        for i, error in enumerate((PromptError("line 3"), OSError("no such disk"))):
            call._prefix = f"again/{i}"
            call._asking.set(call._member_key(rank), json.dumps(vars(call.members[rank])))
            try:
                found.append(str(call.together(failing(error))))
            except Exception as raised:
                found.append(f"{type(raised).__name__}: {raised}; {raised.__notes__}")
        call._prefix = "stop"
        call._asking.set(call._member_key(rank), json.dumps(vars(call.members[rank])))
        if rank == 1:
            STOP.ask()
        try:
            call.together(lambda: rank)
        except Stopped as stopped:
            found.append(type(stopped).__name__)
            call._linger()  # as at the end of a run: the others may still read
    return found


def test_one_ranks_error_before_there_are_groups_is_everybodys() -> None:
    for rank, found in enumerate(run_distributed(together, 2, timeout_s=100, init_gloo=False)):
        assert found[0] == str(rank) and found[3] == "Stopped", found
        assert found[1].startswith("PromptError: line 3; ['raised on rank 1 on"), found
        assert found[2].startswith("RankError: OSError: no such disk; ['raised on rank 1 on"), found


def first_to_fail(rank: int, world_size: int, both: bool) -> str:
    """Rank 1 fails while rank 0 is still at work: until the other has left, then with an error of its own or without.
    What each rank's part in it ends with."""
    roll_call.FOLLOW_S = 60.0  # a rank at work may take as long

    def work() -> int:
        until = time.monotonic() + 60
        while rank == 0 and not call._asking.check([call._heard_keys[1]]) and time.monotonic() < until:
            time.sleep(0.05)
        if rank == 1 or both:
            raise PromptError(f"line {rank}")
        return rank

    try:
        with RollCall(100) as call:
            call.together(work)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was noticed"


@pytest.mark.parametrize("both", [False, True])
def test_the_rank_that_fails_first_leaves_at_once_with_its_own_error(both: bool) -> None:
    """An expected error on any rank is the run's: its exit code says that a restart does not help."""
    found = run_distributed(first_to_fail, 2, both, timeout_s=100, init_gloo=False)
    assert found == ["PromptError: line 0" if both else "PromptError: line 1", "PromptError: line 1"]


def starved(rank: int, world_size: int) -> tuple[float, float, str]:
    """Rank 0, which serves the store, fails at once; the other gets no processor for a while, nor do its heartbeats.
    Returns when each tells the others, when it has left, and its error; limits that also hold on a busy machine."""
    tells = 0.0
    if rank == 1:
        RollCall._beat = lambda self: None
    roll_call.FOLLOW_S, roll_call.LINGER_S = 30.0, 40.0
    try:
        with redirect_stderr(io.StringIO()), RollCall(60) as call:
            time.sleep(3.0 * rank)
            tells = time.monotonic()
            call.together(failing_at_0 if rank == 0 else lambda: rank)
    except (PeerFailed, OSError, RankError) as error:
        return tells, time.monotonic(), f"{type(error).__name__}: {error}"
    return tells, time.monotonic(), "nothing was noticed"


def failing_at_0() -> int:
    raise OSError("no such disk")


def test_the_rank_that_serves_the_store_waits_for_a_starved_one() -> None:
    (told, left, zero), (woke, _, one) = run_distributed(starved, 2, timeout_s=100, init_gloo=False)
    assert "no such disk" in zero and "no such disk" in one, (zero, one)
    assert woke < left < told + 40, (told, left, woke)  # no longer than the other one needs


def test_what_counts_as_a_failed_collective() -> None:
    gloo = RuntimeError("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [::1]:3")
    wrapped = ValueError("writing failed")
    wrapped.__cause__ = gloo
    assert failed_collective(gloo) and failed_collective(wrapped)
    assert failed_collective(dist.DistBackendError("NCCL error: unhandled system error"))
    quoting = EngineError("the engine's last lines: NCCL error, gloo, TCPStore")
    for other in (RuntimeError("shape mismatch"), OSError("disk full"), ValueError("gloo"), quoting):
        assert not failed_collective(other)


def test_times_fit_in_the_configured_time() -> None:
    for timeout in (4.0, 60.0, 3600.0):
        assert collective_timeout_s(timeout) + answer_time_s(timeout) == timeout and answer_time_s(timeout) > 0


def test_a_world_of_one_has_nobody_to_miss(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    topology = start(60)
    try:
        with pytest.raises(RuntimeError, match="gloo"), RollCall(60) as call:
            assert call.alone and call.together(lambda: 3) == 3
            raise RuntimeError("gloo says so")
    finally:
        topology.stop()
    assert "MASTER_ADDR" not in os.environ
