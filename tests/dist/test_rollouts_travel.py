"""Rollouts reach every rank as they were generated, by whatever way, and what goes wrong on the way all ranks hear."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from nemo_tropd.batch import Rollout
from nemo_tropd.parallel.agreement import Codec, Parts, RankError, World, on_rank_zero
from nemo_tropd.rollout.ahead import AheadRollouts
from nemo_tropd.rollout.collective import EveryRankRollouts, RankZeroRollouts
from nemo_tropd.rollout.engine import EngineError, Finished, RolloutRequest
from tests.doubles import OnEveryRank, ReplayEngine
from tests.dist.run_distributed import run_distributed

VOCABULARY = 151_936
PAST = 1 << 70  # no int64


class Writer(ReplayEngine):
    """Its log-probabilities are random, in double or single precision; tells of the last rollout first."""

    def __init__(self, exact: bool) -> None:
        super().__init__(VOCABULARY)
        self.exact = exact

    def generate(self, requests: Sequence[RolloutRequest], finished: Finished | None = None) -> list[Rollout]:
        """As the other's."""
        found = []
        for r in super().generate(requests):
            draw = random.Random(r.sequence_id)
            scores = [-draw.random() if self.exact else float(np.float32(-draw.random())) for _ in r.response_ids]
            cut = len(scores) == requests[len(found)].max_new_tokens
            found.append(replace(r, response_log_probs=scores, finished=not cut))
        for r in reversed(found if finished is not None else []):
            finished(r)
        return found


def requests(seed: int, count: int = 9) -> list[RolloutRequest]:
    draw = random.Random(seed)

    def ids(least: int) -> list[int]:
        return [draw.randrange(VOCABULARY) for _ in range(draw.randint(least, 5))]

    return [RolloutRequest(ids(1), ids(0), draw.getrandbits(60), i, 7 * i, 1 + 40 * (i % 3)) for i in range(count)]


def on_ranks(rank: int, world_size: int, seed: int, exact: bool) -> dict[str, list[Rollout]]:
    from nemo_tropd.parallel.topology import Topology

    topology = Topology.start(tensor_parallel=2 if world_size > 1 else 1)
    asked = requests(seed) if topology.is_leader else None

    def of(kind: Any) -> Any:
        return kind(topology, lambda: Writer(exact), lambda: iter(()), VOCABULARY)

    found = {"one engine": of(RankZeroRollouts).generate(asked, 0), "none": of(RankZeroRollouts).generate([], 0)}
    every = EveryRankRollouts(topology, lambda: OnEveryRank(Writer(exact)), lambda: iter(()), VOCABULARY)
    found["every rank's"] = every.generate(asked, 0)
    told: list[Rollout] = []
    found["in parts"] = of(RankZeroRollouts).generate(asked, 0, lambda some, _: told.extend(some))
    found["told"] = told
    ahead = of(AheadRollouts)
    ahead.refresh(0)
    if topology.is_leader:
        ahead.begin(4, asked, 0)
    found["ahead"] = ahead.take(4)
    assert ahead.restarts == 0
    ahead.close()
    topology.stop()
    return found


@pytest.mark.random
@pytest.mark.timeout(200)
@pytest.mark.parametrize(("world_size", "exact"), [(1, True), (2, False), (4, True)])
def test_every_rank_gets_the_rollouts_that_were_generated(world_size: int, exact: bool) -> None:
    seed = random.getrandbits(40)
    expected = Writer(exact).generate(requests(seed))
    assert any(not r.finished for r in expected) and any(r.finished for r in expected)
    for found in run_distributed(on_ranks, world_size, seed, exact, timeout_s=180):
        assert found.pop("none") == [] and found.pop("told") == expected[::-1]
        for way, rollouts in found.items():
            assert rollouts == expected, way


def outcome(work: Any) -> str:
    try:
        return repr(work())
    except EngineError as error:
        return str(error)


def encoded(numbers: list[int]) -> bytes:
    if 13 in numbers:
        raise KeyError("unlucky")
    return bytes(numbers)


NUMBERS = Codec(encoded, lambda data: list(bytes(data)))


def errors(rank: int, world_size: int) -> dict[str, Any]:
    asked = [replace(r, prompt_index=PAST) for r in requests(1, 2)] if rank == 0 else None

    def of(kind: Any) -> Any:
        return kind(World(), lambda: Writer(True), lambda: iter(()), VOCABULARY)

    found: dict[str, Any] = {"whole": outcome(lambda: of(RankZeroRollouts).generate(asked, 0))}
    found["in parts"] = outcome(lambda: of(RankZeroRollouts).generate(asked, 0, lambda some, _: None))
    taken: list[tuple[list[int], bool]] = []

    def take(some: list[int], last: bool) -> None:
        taken.append((some, last))
        time.sleep(0.4 if len(taken) == 1 else 0)  # meanwhile the work ends

    parts = Parts(take, NUMBERS)

    def work(*numbers: int) -> list[int]:
        for n in numbers:
            parts.put(n)
            time.sleep(0.1 if n == 1 else 0)
        return [7, 8]

    found["fine"] = on_rank_zero(World(), lambda: work(1, 2, 3), parts=parts, codec=NUMBERS)
    found["taken"] = list(taken)
    for name, numbers in {"a part": (1, 13), "the result": ()}.items():
        try:
            on_rank_zero(World(), lambda n=numbers: work(*n) if n else [13], parts=Parts(take, NUMBERS), codec=NUMBERS)
        except RankError as error:
            found[name] = str(error)
    return found


def test_an_error_on_the_way_is_every_ranks_and_parts_keep_their_order() -> None:
    for found in run_distributed(errors, 2):
        assert found["whole"].startswith("OverflowError: ") and found["in parts"].startswith("OverflowError: ")
        assert found["fine"] == [7, 8] and found["taken"] == [([1], False), ([2, 3], True)]
        assert found["a part"] == found["the result"] == "KeyError: 'unlucky'"
