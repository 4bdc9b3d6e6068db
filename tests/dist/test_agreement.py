"""What one rank raises, expected or not, is raised on every rank, and nobody waits."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist

from nemo_tropd.config import ConfigError
from nemo_tropd.parallel.agreement import RankError, World, on_every_rank, on_rank_zero, on_stream
from nemo_tropd.rollout.engine import EngineDied, EngineError
from tests.dist.run_distributed import run_distributed

WORLD = 3


class Unexpected(BaseException):
    """As torch's CheckpointException, it derives from BaseException."""


def outcome(work: Callable[[], Any]) -> tuple[str, str, str]:
    """What came back: "result" or the exception's class, its text, and its cause's class."""
    try:
        return "result", repr(work()), ""
    except Exception as error:
        return type(error).__name__, str(error), type(error.__cause__).__name__


def failing(error: BaseException) -> Callable[[], None]:
    def work() -> None:
        raise error

    return work


ERRORS: dict[str, BaseException] = {
    "ours": EngineDied("engine 3 is gone"),
    "ours with three arguments": ConfigError("model.seed", -1, "must be 0 or more"),
    "a stranger's": KeyError("surprise"),
    "no Exception": Unexpected("collapsed"),
    "an exit": SystemExit(3),
}


def everything(rank: int, world_size: int) -> dict[str, Any]:
    world = World()
    found: dict[str, Any] = {}
    for name, error in ERRORS.items():
        found[f"zero: {name}"] = outcome(lambda error=error: on_rank_zero(world, failing(error)))
        found[f"every: {name}"] = outcome(
            lambda error=error: on_every_rank(world, failing(error) if rank == 1 else lambda: rank)
        )
    found["zero: as an EngineError"] = outcome(
        lambda: on_rank_zero(world, failing(ValueError("odd")), unexpected=EngineError)
    )
    found["zero: a result that cannot be pickled"] = outcome(lambda: on_rank_zero(world, threading.Lock))
    found["zero: fine"] = outcome(lambda: on_rank_zero(world, lambda: {"rank": rank}))
    found["every: fine"] = outcome(lambda: on_every_rank(world, lambda: rank))
    found["every: two fail"] = outcome(lambda: on_every_rank(world, failing(ValueError(f"rank {rank}")) if rank else int))
    for name, (consumer, torn) in {"fine": (4, 9), "rank 0 fails": (1, 9), "rank 2's stream tears": (4, 2)}.items():
        found[f"stream: {name}"] = outcome(lambda c=consumer, t=torn: streamed(world, rank, c, t))
    dist.barrier()  # every rank is at the same collective: nothing of the above left one behind
    return found


def streamed(world: World, rank: int, consumed: int, torn: int) -> list[float]:
    left: list[int] = []

    def stream() -> Iterator[float]:
        for i in range(4):
            total = torch.tensor([float(i + rank)])
            dist.all_reduce(total)
            left.append(i)
            yield float(total)
        if rank == 2 and torn == 2:
            raise MemoryError("no memory left")

    def consume(items: Iterator[float]) -> list[float]:
        seen = []
        for item in items:
            if len(seen) == consumed:
                raise EngineDied("full")
            seen.append(item)
        return seen

    try:
        return on_stream(world, stream(), consume)
    finally:
        assert left == [0, 1, 2, 3], "a stream was not exhausted"


@pytest.fixture(scope="module")
def by_rank() -> list[dict[str, Any]]:
    return run_distributed(everything, WORLD, timeout_s=120)


@pytest.mark.parametrize("kind", ["zero", "every"])
@pytest.mark.parametrize(
    ("name", "expected", "text"),
    [
        ("ours", "EngineDied", "engine 3 is gone"),
        ("ours with three arguments", "ConfigError", "model.seed = -1: must be 0 or more"),
        ("a stranger's", "RankError", "KeyError: 'surprise'"),
        ("no Exception", "RankError", "collapsed"),
        ("an exit", "RankError", "SystemExit: 3"),
    ],
)
def test_an_exception_of_one_rank_is_raised_on_every_rank(
    by_rank: list[dict[str, Any]], kind: str, name: str, expected: str, text: str
) -> None:
    failing_rank = 0 if kind == "zero" else 1
    for rank, found in enumerate(by_rank):
        raised, message, cause = found[f"{kind}: {name}"]
        assert raised == expected and text in message
        assert cause == (type(ERRORS[name]).__name__ if rank == failing_rank else "NoneType")


def test_an_unexpected_exception_arrives_as_the_class_asked_for(by_rank: list[dict[str, Any]]) -> None:
    assert {found["zero: as an EngineError"][:2] for found in by_rank} == {("EngineError", "ValueError: odd")}


def test_a_result_that_cannot_be_pickled_is_an_error_on_every_rank(by_rank: list[dict[str, Any]]) -> None:
    for found in by_rank:
        raised, message, _ = found["zero: a result that cannot be pickled"]
        assert raised == RankError.__name__ and "TypeError" in message


def test_results_reach_every_rank(by_rank: list[dict[str, Any]]) -> None:
    for rank, found in enumerate(by_rank):
        assert found["zero: fine"][:2] == ("result", "{'rank': 0}")
        assert found["every: fine"][:2] == ("result", str(rank))


def test_of_several_failures_the_lowest_rank_is_shown(by_rank: list[dict[str, Any]]) -> None:
    assert {found["every: two fail"][:2] for found in by_rank} == {("RankError", "ValueError: rank 1")}


def test_every_rank_exhausts_its_stream_whatever_fails(by_rank: list[dict[str, Any]]) -> None:
    for found in by_rank:
        assert found["stream: fine"][:2] == ("result", "[3.0, 6.0, 9.0, 12.0]")
        assert found["stream: rank 0 fails"][:2] == ("EngineDied", "full")
        assert found["stream: rank 2's stream tears"][:2] == ("RankError", "MemoryError: no memory left")
