"""The collective wrapper around the one engine, with an engine that can be told to fail."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from nemo_tropd.batch import Rollout
from nemo_tropd.parallel.agreement import World, on_rank_zero
from nemo_tropd.rollout.engine import (
    EngineDied,
    EngineError,
    Finished,
    RefreshStats,
    RequestError,
    RolloutRequest,
    WeightStreamError,
)
from nemo_tropd.rollout.collective import RankZeroRollouts
from tests.dist.run_distributed import run_distributed


VOCABULARY = 97


@dataclass
class Script:
    """What happens to the engines of one test: events shared by all of them, in order."""

    fail: dict[str, Exception] = field(default_factory=dict)  # "generate 2": raised by the second generate
    log: list[str] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)

    def event(self, name: str) -> None:
        self.counts[name] = self.counts.get(name, 0) + 1
        key = f"{name} {self.counts[name]}"
        if key in self.fail:
            self.log.append(f"{key} fails")
            raise self.fail[key]
        self.log.append(name)


class ScriptedEngine:
    """Rollouts are a function of the request and the sum of the weights it was given."""

    def __init__(self, script: Script, slow_s: float = 0.0) -> None:
        self.script, self.slow_s, self.total, self.version = script, slow_s, float("nan"), -1

    def start(self) -> None:
        self.script.event("start")

    def generate(self, requests: Sequence[RolloutRequest], finished: Finished | None = None) -> list[Rollout]:
        self.script.event("generate")
        time.sleep(self.slow_s)
        return [
            Rollout(
                r.prompt_ids,
                [],
                [r.seed % VOCABULARY],
                [-self.total],
                self.version,
                r.sequence_id,
                r.prompt_index,
                True,
            )
            for r in requests
        ]

    def update_weights(self, stream: Iterable[tuple[str, Tensor]], version: int) -> RefreshStats:
        self.total, count = 0.0, 0
        for _, tensor in stream:
            count += 1
            if count == 2:
                self.script.event("bucket")
            self.total += float(tensor.sum())
        self.version = version
        self.script.event("refresh")
        return RefreshStats(0.1, 4 * count, count)

    def sleep(self) -> bool:
        return False

    def close(self, *, run_over: bool = False) -> None:
        self.script.event("close")


class Model:
    """Weights spread over the ranks: gathering any of them takes all ranks."""

    def __init__(self, rank: int) -> None:
        self.rank, self.step, self.exhausted = rank, 0, 0

    def stream(self) -> Iterator[tuple[str, Tensor]]:
        for i in range(4):
            part = torch.tensor([float((self.step + 1) * (i + 1))])
            dist.all_reduce(part)
            if self.rank == 0:
                yield f"layer{i}", part
        self.exhausted += 1


def requests(rank: int) -> list[RolloutRequest] | None:
    return [RolloutRequest([1, 2], [], 1000 + i, i, i, 4) for i in range(3)] if rank == 0 else None


def supervisor_of(rank: int, fail: dict[str, Exception]) -> tuple[RankZeroRollouts, Model, Script]:
    script, model = Script(dict(fail)), Model(rank)

    def make() -> ScriptedEngine:
        assert rank == 0, "only the leader owns an engine"
        return ScriptedEngine(script)

    return RankZeroRollouts(World(), make, model.stream, VOCABULARY), model, script


def two_steps(rank: int, world_size: int, fail: dict[str, Exception]) -> dict:
    supervisor, model, script = supervisor_of(rank, fail)
    seen: list = []
    error: tuple[str, str] | None = None
    try:
        for step in range(2):
            model.step = step
            if step:
                supervisor.refresh(step)
            seen.append(
                [
                    (r.response_ids, r.response_log_probs, r.weight_version)
                    for r in supervisor.generate(requests(rank), step)
                ]
            )
    except EngineError as raised:
        error = type(raised).__name__, str(raised)
    supervisor.close()
    dist.barrier()
    return {
        "seen": seen,
        "error": error,
        "log": script.log,
        "exhausted": model.exhausted,
        "restarts": supervisor.restarts,
        "stats": supervisor.last_refresh,
    }


def expected(world_size: int) -> list:
    return [[([(1000 + i) % 97], [-10.0 * world_size * (step + 1)], step) for i in range(3)] for step in range(2)]


def stale_version(rank: int, world_size: int) -> str:
    supervisor, _, _ = supervisor_of(rank, {})
    supervisor.generate(requests(rank), 0)
    if rank == 0:
        supervisor._engine.version = 5
    with pytest.raises(EngineError) as raised:
        supervisor.generate(requests(rank), 0)
    return str(raised.value)


def slow_work(rank: int, world_size: int) -> tuple[str, float]:
    began = time.monotonic()
    value = on_rank_zero(World(), lambda: time.sleep(1.5) or "done", heartbeat_s=0.2)
    return value, time.monotonic() - began


def torn_stream(rank: int, world_size: int) -> str:
    class Torn(Model):
        def stream(self) -> Iterator[tuple[str, Tensor]]:
            yield from super().stream()
            if self.rank == 1:
                raise RuntimeError("rank 1 has no memory left")

    supervisor = RankZeroRollouts(World(), lambda: ScriptedEngine(Script()), Torn(rank).stream, VOCABULARY)
    with pytest.raises(EngineError) as raised:
        supervisor.generate(requests(rank), 0)
    return str(raised.value)


DIED = "killed"
ONE_DEATH = ["generate 1", "generate 2", "bucket 1", "bucket 2", "refresh 2"]
TWO_DEATHS_IN_A_STEP = ["generate 1, generate 2", "generate 2, refresh 3", "bucket 2, generate 2"]
DEATHS_IN_TWO_STEPS = "generate 1, generate 3"
FATAL: dict[str, Exception] = {
    "start 1": EngineError("no model"),
    "generate 1": RequestError("prompt 3 is too long"),
    "refresh 1": WeightStreamError("without lm_head"),
    "bucket 1": KeyError("surprise"),
}
WORLD = 3


def every_scenario(rank: int, world_size: int) -> dict[str, Any]:
    """One group of processes for all scenarios: starting it is what takes the time."""
    results: dict[str, Any] = {"quiet": two_steps(rank, world_size, {})}
    for events in [*ONE_DEATH, *TWO_DEATHS_IN_A_STEP, DEATHS_IN_TWO_STEPS]:
        deaths = {event: EngineDied(f"{DIED} at {event}") for event in events.split(", ")}
        results[f"dies at {events}"] = two_steps(rank, world_size, deaths)
    for event, error in FATAL.items():
        results[f"fails at {event}"] = two_steps(rank, world_size, {event: error})
    for scenario in (stale_version, slow_work, torn_stream):
        results[scenario.__name__] = scenario(rank, world_size)
    return results


@pytest.fixture(scope="module")
def by_rank() -> list[dict[str, Any]]:
    return run_distributed(every_scenario, WORLD, timeout_s=120)


def test_every_rank_gets_the_same_rollouts_and_each_version_is_streamed_once(by_rank: list[dict[str, Any]]) -> None:
    results = [of_rank["quiet"] for of_rank in by_rank]
    for result in results:
        assert result["seen"] == expected(WORLD)
        assert result["error"] is None and result["exhausted"] == 2 and result["restarts"] == 0
        assert result["stats"] == RefreshStats(0.1, 16, 4)
    assert results[0]["log"] == ["start", "bucket", "refresh", "generate", "bucket", "refresh", "generate", "close"]
    assert all(result["log"] == [] for result in results[1:])


@pytest.mark.parametrize("event", ONE_DEATH)
def test_a_death_is_followed_by_one_restart_with_the_current_weights(by_rank: list[dict[str, Any]], event: str) -> None:
    for of_rank in by_rank:
        result = of_rank[f"dies at {event}"]
        assert result["seen"] == expected(WORLD), result["error"]
        assert result["error"] is None and result["restarts"] == 1 and result["exhausted"] == 3


@pytest.mark.parametrize("events", TWO_DEATHS_IN_A_STEP)
def test_a_second_death_in_one_step_is_an_error_on_every_rank(by_rank: list[dict[str, Any]], events: str) -> None:
    results = [of_rank[f"dies at {events}"] for of_rank in by_rank]
    for result in results:
        assert result["error"] is not None
        kind, text = result["error"]
        assert kind == "EngineError" and "crashed twice" in text and f"{DIED} at {events.split(', ')[1]}" in text
    assert results[0]["log"].count("start") == results[0]["log"].count("close") == 2


def test_deaths_in_two_steps_are_each_forgiven(by_rank: list[dict[str, Any]]) -> None:
    for of_rank in by_rank:
        result = of_rank[f"dies at {DEATHS_IN_TWO_STEPS}"]
        assert result["seen"] == expected(WORLD) and result["restarts"] == 2


@pytest.mark.parametrize("event", FATAL)
def test_the_leaders_errors_reach_every_rank_and_are_not_retried(by_rank: list[dict[str, Any]], event: str) -> None:
    error = FATAL[event]
    known = isinstance(error, EngineError)
    for of_rank in by_rank:
        result = of_rank[f"fails at {event}"]
        assert result["seen"] == [] and result["restarts"] == 0
        assert result["error"] == (
            type(error).__name__ if known else "EngineError",
            str(error) if known else f"KeyError: {error}",
        )
    assert by_rank[0][f"fails at {event}"]["log"].count("close") == 1


def test_rollouts_of_other_weights_are_refused(by_rank: list[dict[str, Any]]) -> None:
    for of_rank in by_rank:
        assert of_rank["stale_version"] == (
            "sequence 0 was generated with weight version 5 instead of 0; the engine was not refreshed"
        )


def test_long_work_of_the_leader_is_waited_for_in_short_waits(by_rank: list[dict[str, Any]]) -> None:
    for of_rank in by_rank:
        value, seconds = of_rank["slow_work"]
        assert value == "done" and seconds >= 1.4


def test_a_rank_that_cannot_stream_stops_all_ranks(by_rank: list[dict[str, Any]]) -> None:
    texts = [of_rank["torn_stream"] for of_rank in by_rank]
    assert texts == ["RuntimeError: rank 1 has no memory left"] * WORLD


class TellingEngine(ScriptedEngine):
    """Tells of its rollouts from the last to the first; ``wrong`` says what it tells instead."""

    def __init__(self, script: Script, wrong: str) -> None:
        super().__init__(script)
        self.wrong = wrong

    def generate(self, requests: Sequence[RolloutRequest], finished: Finished | None = None) -> list[Rollout]:
        rollouts = super().generate(requests)
        assert finished is not None
        for i, r in enumerate(reversed(rollouts)):
            if i == 1:
                time.sleep(0.4)  # longer than the leader looks
                self.script.event("second")
            if self.wrong == "silent" and i == 2:
                continue
            finished(replace(r, response_ids=[VOCABULARY]) if self.wrong == "id" and i == 1 else r)
        return rollouts


def told_of(rank: int, world_size: int, fail: dict[str, Exception], wrong: str) -> dict[str, Any]:
    """What this rank takes while rank 0's engine generates, and what comes of it."""
    script, model, taken, done = Script(dict(fail)), Model(rank), [], []
    supervisor = RankZeroRollouts(World(), lambda: TellingEngine(script, wrong), model.stream, VOCABULARY)

    def take(some: list[Rollout], all_done: bool) -> None:
        taken.append([r.sequence_id for r in some])
        done.append(all_done)

    found: dict[str, Any] = {}
    try:
        found["seen"] = [r.sequence_id for r in supervisor.generate(requests(rank), 0, take)]
    except EngineError as raised:
        found["error"] = str(raised)
    supervisor.close()
    dist.barrier()
    return found | {"done": done, "taken": taken, "log": script.log, "restarts": supervisor.restarts}


def test_every_rank_takes_rollouts_while_others_are_generated() -> None:
    found = run_distributed(told_of, 2, {}, "")
    assert [f["seen"] for f in found] == [[0, 1, 2]] * 2
    assert found[0]["taken"] == found[1]["taken"] and found[0]["taken"][0] == [2]
    assert sum(found[0]["taken"], []) == [2, 1, 0]
    assert found[0]["done"] == found[1]["done"] and not found[0]["done"][0]  # the second was still to come


def test_after_a_crash_what_was_told_is_told_again() -> None:
    found = run_distributed(told_of, 2, {"second 1": EngineDied("killed")}, "")
    assert [f["seen"] for f in found] == [[0, 1, 2]] * 2 and [f["restarts"] for f in found] == [1, 1]
    assert sum(found[1]["taken"], []) == [2, 2, 1, 0] == sum(found[0]["taken"], [])


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        ("id", "prompt 1: the engine generated token id 97, outside the vocabulary of 97"),
        ("silent", "the engine has told of 2 of 3 rollouts"),
    ],
)
def test_what_is_wrong_with_a_part_is_raised_on_every_rank(wrong: str, text: str) -> None:
    found = run_distributed(told_of, 2, {}, wrong)
    assert all(f["error"].startswith(text) for f in found) and found[0]["log"][-1] == "close"
