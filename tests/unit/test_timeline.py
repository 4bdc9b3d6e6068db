"""What a timeline makes of intervals: cut at a step's ends, added up, few, and read again only as they were written."""

from __future__ import annotations

import json
import math
import random
import socket
import threading
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nemo_tropd import timeline as module
from nemo_tropd.batch import Rollout
from nemo_tropd.parallel import stopwatch
from nemo_tropd.parallel.stopwatch import Stopwatch
from nemo_tropd.rollout.engine import Abandoned, EngineDied, Finished, RefreshStats, RolloutRequest
from nemo_tropd.rollout.timed import TimedEngine
from nemo_tropd.rollout.vllm import wire as w
from nemo_tropd.rollout.vllm.remote import RemoteEngine
from nemo_tropd.rollout.vllm.settings import EngineSettings
from nemo_tropd.timeline import LANES, MOST_BARS, Lane, StepTimes, Timeline, length
from nemo_tropd.training import metrics
from nemo_tropd.training.metrics import PhaseTimer, TimelineFile
from tests.doubles import OnEveryRank, ReplayEngine
from tests.tiny_models import make_tiny


class Clock:
    """Stands still unless it is told."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now

    perf_counter = monotonic

    def wait(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    for user in (module, stopwatch, metrics):
        monkeypatch.setattr(user, "time", found)
    return found


def test_what_crosses_a_step_is_cut_at_its_ends(clock: Clock) -> None:
    timeline = Timeline()
    generated = timeline.begin("engines", "weights 0")
    clock.wait(5)
    began = clock.now
    clock.wait(1)
    with timeline.doing("teacher", "scoring"):
        clock.wait(2)
    generated()
    clock.wait(1)
    generated()  # nothing more
    sent = timeline.begin("weights", "send")
    clock.wait(4)
    first = timeline.step_done(1, began)
    assert (first.step, first.seconds, first.pause) == (1, 8.0, None)
    assert first.lanes == {
        "engines": Lane(3.0, [(0.0, 3.0, "weights 0")]),
        "teacher": Lane(2.0, [(1.0, 3.0, "scoring")]),
        "student": Lane(0.0, []),
        "weights": Lane(4.0, [(4.0, 8.0, "send")]),  # goes on
    }
    assert first.idle == {"engines": 5 / 8, "teacher": 6 / 8, "student": 1.0, "weights": 0.5}
    with timeline.doing("engines", "weights 0"):  # a validation's, say, between two steps
        clock.wait(3)
    began = clock.now
    clock.wait(2)
    sent()
    clock.wait(2)
    second = timeline.step_done(2, began)
    assert (second.step, second.seconds, second.pause) == (2, 4.0, 3.0)
    assert second.lanes["weights"] == Lane(2.0, [(0.0, 2.0, "send")]) and second.lanes["engines"] == Lane(0.0, [])
    began = clock.now
    clock.wait(1)
    assert all(lane == Lane(0.0, []) for lane in timeline.step_done(3, began).lanes.values())


def test_what_fails_was_at_work_until_then(clock: Clock) -> None:
    timeline, began = Timeline(), clock.now
    with pytest.raises(ZeroDivisionError), timeline.doing("student", "optimizer"):
        clock.wait(2)
        raise ZeroDivisionError
    clock.wait(1)
    assert timeline.step_done(1, began).lanes["student"].bars == [(0.0, 2.0, "optimizer")]


def test_several_members_have_lanes_of_their_own(clock: Clock) -> None:
    timeline, began = Timeline(), clock.now
    timeline.members("engines", 3)
    timeline.members("engines", 3)  # of another engine in its place
    ends = [timeline.begin(f"engines/{i}", "weights 7") for i in (0, 2)]
    clock.wait(2)
    ends[0]()
    clock.wait(2)
    times = timeline.step_done(1, began)
    assert list(times.lanes) == ["engines/0", "engines/1", "engines/2", "teacher", "student", "weights"]
    assert [one.busy for one in times.members("engines")] == [2.0, 0.0, 4.0] and times.idle["engines"] == 0.5


def test_overlaps_count_once(clock: Clock) -> None:
    """As questions to a server do."""
    timeline, began = Timeline(), clock.now
    for begin, end in ((1, 3), (2, 5), (7, 8), (4, 4.5)):
        timeline.add("teacher", "scoring", began + begin, began + end)
    clock.wait(10)
    lane = timeline.step_done(1, began).lanes["teacher"]
    assert lane == Lane(5.0, [(1.0, 5.0, "scoring"), (7.0, 8.0, "scoring")])


@pytest.mark.random
def test_the_length_of_a_union() -> None:
    spans = [(a, a + random.randint(0, 9)) for a in (random.randint(0, 99) for _ in range(random.randint(0, 30)))]
    assert length(spans) == len({second for begin, end in spans for second in range(begin, end)})


def test_many_short_ones_are_written_as_few_and_counted_exactly(clock: Clock) -> None:
    timeline, began = Timeline(), clock.now
    for i in range(50 * MOST_BARS):
        timeline.add("teacher", "scoring", began + i, began + i + 0.25)
    timeline.add("teacher", "early", began + 1.5, began + 1.6)
    clock.wait(100 * MOST_BARS)
    lane = timeline.step_done(1, began).lanes["teacher"]
    assert lane.busy == pytest.approx(0.25 * 50 * MOST_BARS + 0.1) and len(lane.bars) <= 2 * MOST_BARS
    assert lane.bars[0][0] == 0 and max(end for _, end, _ in lane.bars) == 50 * MOST_BARS - 0.75
    assert (1.5, 1.6, "early") in lane.bars  # of another kind


def test_nothing_is_recorded_elsewhere_than_on_rank_0(clock: Clock) -> None:
    timeline = Timeline(enabled=False)
    timeline.begin("engines", "")()
    timeline.add("engines", "", 0.0, 1.0)
    with timeline.doing("engines", ""):
        clock.wait(1)
    assert not timeline._done and not timeline._open


def test_threads_write_while_one_reads() -> None:
    timeline, stop = Timeline(), threading.Event()
    written = [0, 0]

    def write(i: int) -> None:
        while not stop.is_set():
            timeline.begin(LANES[i], "")()
            written[i] += 1

    threads = [threading.Thread(target=write, args=(i,)) for i in (0, 1)]
    for thread in threads:
        thread.start()
    began = module.time.monotonic()
    while min(written) < 300:
        times = timeline.step_done(1, began)
        assert all(0 <= lane.busy <= times.seconds + 1e-5 for lane in times.lanes.values())
    stop.set()
    for thread in threads:
        thread.join()


def test_phases_are_lanes_until_the_device_is_there(clock: Clock) -> None:
    timeline, began = Timeline(), clock.now
    timer = PhaseTimer(lambda: clock.wait(1), timeline)
    for phase in ("rollout", "teacher", "student", "optimizer", "refresh"):
        with timer.phase(phase):
            clock.wait(2)
    times = timeline.step_done(1, began)
    assert times.lanes == {
        "engines": Lane(0.0, []),  # which say themselves when they work
        "teacher": Lane(3.0, [(3.0, 6.0, "scoring")]),
        "student": Lane(6.0, [(6.0, 9.0, "forward and backward"), (9.0, 12.0, "optimizer")]),
        "weights": Lane(3.0, [(12.0, 15.0, "copy")]),
    }
    assert set(timer.seconds.values()) == {3.0}


class Slow(ReplayEngine):
    """Takes two seconds for rollouts and one for weights; dies if there are no requests."""

    def __init__(self, clock: Clock) -> None:
        super().__init__(9)
        self.clock, self.calls = clock, list[str]()

    def check_room(self) -> None:
        self.calls.append("check_room")

    def start(self) -> None:
        self.calls.append("start")

    def generate(self, requests: Sequence[RolloutRequest], finished: Finished | None = None) -> list[Rollout]:
        self.clock.wait(2)
        if not requests:
            raise EngineDied("killed")
        return super().generate(requests, finished)

    def update_weights(self, stream: Iterable[tuple[str, Tensor]], version: int) -> RefreshStats:
        self.clock.wait(1)
        return super().update_weights(stream, version)

    def sleep(self) -> bool:
        self.calls.append("sleep")
        return True

    def close(self, *, run_over: bool = False) -> None:
        self.calls.append(f"close {run_over}")


def test_an_engine_on_a_timeline_is_that_engine(clock: Clock) -> None:
    timeline, began, engine = Timeline(), clock.now, Slow(clock)
    timed, told = TimedEngine(engine, timeline), list[Rollout]()
    timed.check_room()
    timed.start()
    stats = timed.update_weights(iter([("w", torch.zeros(3))]), 4)
    asked = [RolloutRequest([1], [], 5, i, i, 4) for i in range(2)]
    assert stats == RefreshStats(0.0, 12, 1) and timed.generate(asked, told.append) == told == engine.generate(asked)
    with pytest.raises(EngineDied):
        timed.generate([])
    assert timed.sleep()
    timed.close(run_over=True)
    assert engine.calls == ["check_room", "start", "sleep", "close True"]
    lanes = timeline.step_done(1, began).lanes
    assert lanes["weights"].bars == [(0.0, 1.0, "send")]
    assert lanes["engines"].bars == [(1.0, 3.0, "weights 4"), (5.0, 7.0, "weights 4")]
    with pytest.raises(Abandoned):
        TimedEngine(OnEveryRank(engine), timeline).generate(asked, wanted=lambda: False)


class Members(RemoteEngine):
    """Two or three, each a thread of this test that does as its script says."""

    def __init__(self, folder: Path, *scripts: Callable[[], Any]) -> None:
        super().__init__(EngineSettings(folder, "float32", 64), answer_timeout_s=60)
        self.scripts, self.threads = scripts, list[threading.Thread]()

    def start(self) -> None:
        for i, script in enumerate(self.scripts):
            ours, theirs = socket.socketpair()
            self._members.append(w.Wire(ours, f"member {i}"))
            self.threads.append(threading.Thread(target=self.live, args=(w.Wire(theirs), script), daemon=True))
            self.threads[-1].start()
        self._ready = True

    @staticmethod
    def live(wire: w.Wire, script: Callable[[], Any]) -> None:
        with suppress(w.Disconnected, ZeroDivisionError):
            while True:
                asked = wire.receive(w.Request)
                script()
                wire.send(w.Generated(w.Packed(ReplayEngine(131).generate(asked.requests))))
        wire.close()

    def close(self, *, run_over: bool = False) -> None:
        self._let_go()
        for thread in self.threads:
            thread.join()

    def _describe(self, members: Sequence[w.Wire], reason: str) -> str:
        return reason


class Watched(TimedEngine):
    """Says when the first member has answered."""

    answered = threading.Event()

    def _seen(self, member: int, message: w.Message) -> None:
        super()._seen(member, message)
        if member == 0 and isinstance(message, w.Generated):
            self.answered.set()


def test_members_work_until_each_has_answered(tmp_path: Path) -> None:
    timeline, began = Timeline(), module.time.monotonic()
    Watched.answered = answered = threading.Event()
    later = list[float]()

    def second() -> None:
        assert answered.wait(60)
        later.append(module.time.monotonic() - began)
        module.time.sleep(0.05)

    scripts: list[Callable[[], None]] = [lambda: None, second, lambda: None]
    engine = Members(make_tiny(tmp_path / "model", vocab=131), *scripts)
    timed = Watched(engine, timeline)
    timed.start()
    asked = [RolloutRequest([1], [], 5, i, i, 4) for i in range(2)]
    assert timed.generate(asked) == ReplayEngine(131).generate(asked)
    times = timeline.step_done(1, began)
    ((b0, e0, whose),), ((b1, e1, _),), third = (one.bars for one in times.members("engines"))
    assert b0 < e0 < later[0] + 1e-5 < e1 and b1 < e0 and whose == "weights 0" and third == []
    timed.close()


def test_members_that_are_gone_are_at_work_no_more(tmp_path: Path) -> None:
    timeline, began = Timeline(), module.time.monotonic()
    engine = Members(make_tiny(tmp_path / "model", vocab=131), lambda: threading.Event().wait(0.2), lambda: 1 / 0)
    timed = TimedEngine(engine, timeline)
    timed.start()
    with pytest.raises(EngineDied):
        timed.generate([RolloutRequest([1], [], 5, i, i, 4) for i in range(2)])
    assert not timeline._open
    assert all(one.busy > 0 for one in timeline.step_done(1, began).members("engines"))
    timed.close()


def test_a_stopwatch_without_a_gpu(clock: Clock) -> None:
    watch = Stopwatch(torch.device("cpu"))
    for _ in range(2):
        clock.wait(1)
        with watch.running():
            clock.wait(2)
    assert watch.intervals() == [(101.0, 103.0), (104.0, 106.0)] and watch.intervals() == []


class Event:
    """A double of a GPU's event: the device is 10 seconds behind the host, and its clock began long ago."""

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.at = stopwatch.time.monotonic() + (10 if stopwatch.time.monotonic() > 100 else 0)

    def elapsed_time(self, later: Event) -> float:
        return 1000 * (later.at - self.at)


def test_a_stopwatch_of_a_gpu_takes_its_events(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "Event", Event)
    watch = Stopwatch(torch.device("cuda"))
    clock.wait(1)
    with watch.running():
        clock.wait(2)
    assert watch.intervals() == [(111.0, 113.0)]


def times(step: int = 3, **changes: Any) -> StepTimes:
    lanes = {lane: Lane(1.0, [(0.5, 1.5, "what")]) for lane in LANES}
    return replace(StepTimes(step, 4.0, None, lanes, "dedicated", 1), **changes)


def test_a_line_is_read_as_it_was_written(tmp_path: Path) -> None:
    file = TimelineFile(tmp_path, "process", 2)
    written = [times(1), times(2, pause=0.25, lanes={**times().lanes, "engines": Lane(0.0, [])})]
    for one in written:
        file.write(one)
    with (tmp_path / "timeline.jsonl").open("a") as half:
        half.write('{"step": 3, "sec')  # as a killed run leaves it
    TimelineFile(tmp_path, "process", 2).write(times(3))
    whole = [line for line in (tmp_path / "timeline.jsonl").read_text().splitlines() if line.endswith("}")]
    said = [replace(one, placement="process", steps_ahead=2) for one in [*written, times(3)]]
    assert [StepTimes.read(json.loads(line)) for line in whole] == said


@pytest.mark.parametrize(
    ("keys", "value"),
    [
        (["step"], -1), (["step"], True), (["step"], "3"), (["step"], 3.0), (["seconds"], 0), (["seconds"], math.nan),
        (["seconds"], "4"), (["seconds"], True), (["seconds"], 10**400), (["pause"], -1.0), (["pause"], math.inf),
        (["lanes"], []), (["lanes"], {}), (["lanes", "engines"], None), (["lanes", "engines"], []),
        (["lanes", "teacher", "busy"], 4.1), (["lanes", "teacher", "busy"], None), (["lanes", "teacher", "bars"], 3),
        (["lanes", "teacher", "bars", 0], [0.5, 1.5]), (["lanes", "teacher", "bars", 0], [1.5, 0.5, ""]),
        (["lanes", "teacher", "bars", 0], [0.5, 4.5, ""]), (["lanes", "teacher", "bars", 0], [-0.5, 1.5, ""]),
        (["lanes", "teacher", "bars", 0], [0.5, 1.5, 2]), (["lanes", "teacher", "bars", 0], "abc"),
        (["steps_ahead"], -1), (["steps_ahead"], None), (["placement"], None), (["placement"], {}),
    ],
)  # fmt: skip
def test_what_no_run_writes_is_refused(keys: list[Any], value: object) -> None:
    entry: Any = json.loads(json.dumps(times().entry()))
    assert StepTimes.read(entry) == times()
    place = entry
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = value
    with pytest.raises(ValueError):
        StepTimes.read(entry)
    if keys[-1] != 0:
        place.pop(keys[-1])
        with pytest.raises(ValueError):
            StepTimes.read(entry)
