"""The timeline of real steps with doubles for engines, which wait for what the test has them wait for, and no clock."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from nemo_tropd.batch import Rollout
from nemo_tropd.model.tropd_model import MegatronTrOPDModel
from nemo_tropd.report.records import read_run
from nemo_tropd.rollout.engine import EngineDied, EngineError, Finished, RolloutRequest
from nemo_tropd.teacher.early import EarlyScorer
from nemo_tropd.timeline import COPY, EARLY, LANES, SEND, Bar, StepTimes
from nemo_tropd.training.run import train
from tests.dist.run_distributed import run_distributed
from tests.dist.test_ahead import VOCABULARY, Script, go
from tests.dist.test_early_scores import APART, composed
from tests.doubles import GivenEngines, ReplayEngine
from tests.e2e.tiny_run import TinyRun, train_lines

WAIT_S = 60  # for what happens anyway: a test that fails ends


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    return TinyRun.make(tmp_path_factory.mktemp("timeline"))


def written(run_dir: Path) -> list[StepTimes]:
    """Every line, also of steps that were done twice."""
    return [StepTimes.read(json.loads(line)) for line in (run_dir / "timeline.jsonl").read_text().splitlines()]


def bars(times: StepTimes, lane: str, what: str = "") -> list[Bar]:
    return [bar for bar in times.lanes[lane].bars if what in bar[2]]


def idle_is_logged(run_dir: Path) -> None:
    for line, times in zip(train_lines(run_dir), written(run_dir), strict=True):
        assert {lane: line[f"idle/{lane}"] for lane in LANES} == times.idle
        assert all(0 <= share <= 1 for share in times.idle.values()) and line["step"] == times.step
        assert times.seconds >= line["seconds/step"]


def test_in_turns_one_works_after_another(tiny: TinyRun, tmp_path: Path) -> None:
    go(tiny, tmp_path, 0, Script())
    steps = written(tmp_path)
    assert [(one.step, one.placement, one.steps_ahead) for one in steps] == [(n, "process", 0) for n in range(1, 7)]
    assert steps[0].pause is None and all(one.pause is not None for one in steps[1:])
    for one in steps:
        ((g0, g1, whose),), ((t0, t1, _),) = one.lanes["engines"].bars, one.lanes["teacher"].bars
        passes, optimizer = one.lanes["student"].bars
        ((c0, c1, _),), ((s0, s1, _),) = bars(one, "weights", COPY), bars(one, "weights", SEND)
        assert whose == f"weights {one.step - 1}" and (passes[2], optimizer[2]) == ("forward and backward", "optimizer")
        order = [0.0, g0, g1, t0, t1, passes[0], passes[1], optimizer[0], optimizer[1], c0, s0, s1, c1, one.seconds]
        assert order == sorted(order)
    idle_is_logged(tmp_path)


class Steps:
    """What the steps of a run have reached: engines in their n-th call, the trainer in the passes of its n-th step."""

    def __init__(self) -> None:
        self.reached: dict[tuple[str, int], threading.Event] = {}
        self._lock = threading.Lock()

    def _event(self, what: str, number: int) -> threading.Event:
        with self._lock:
            return self.reached.setdefault((what, number), threading.Event())

    def reach(self, what: str, number: int) -> None:
        self._event(what, number).set()

    def wait(self, what: str, number: int) -> None:
        assert self._event(what, number).wait(WAIT_S), (what, number)


# By steps ahead: the passes of which step wait until which call of generate has begun, and which call goes on until
# the passes of which step. Call c is for step c - 1, and waits in the queue from the end of step c - 2 - k on.
GATES = {
    1: ({n: n + 2 for n in range(5)}, {n + 2: n for n in range(5)}),
    2: ({0: 3, 1: 4, 3: 6}, {3: 0, 4: 2, 6: 3}),
}


@pytest.mark.parametrize("k", [1, 2])
def test_engines_that_work_ahead_do_so_while_the_student_trains(
    tiny: TinyRun, tmp_path: Path, k: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps, passes, (begun, until) = Steps(), MegatronTrOPDModel.get_loss_and_metrics, GATES[k]

    def generate(call: int, engine: object) -> None:
        steps.reach("call", call)
        if call in until:
            steps.wait("passes", until[call])

    def watched(self: MegatronTrOPDModel, *args: Any, step: int, **options: Any) -> Any:
        if step in begun:
            steps.wait("call", begun[step])
        steps.reach("passes", step)
        return passes(self, *args, step=step, **options)

    monkeypatch.setattr(MegatronTrOPDModel, "get_loss_and_metrics", watched)
    script = Script(at={call: partial(generate, call) for call in range(1, 7)})
    go(tiny, tmp_path, k, script, **{"trainer.tropd.save_interval": 50})  # saving waits for rollouts
    found = written(tmp_path)
    assert [(one.step, one.steps_ahead) for one in found] == [(n, k) for n in range(1, 7)]
    for call, step in until.items():
        ((begin, end, _),) = bars(found[step], "student", "forward")
        of_call = bars(found[step], "engines", f"weights {max(0, call - 1 - k)}")
        assert any(b < end and e > begin for b, e, _ in of_call), (call, found[step])
    if k == 2:  # call 4 goes on in the next step
        last, first = found[1].lanes["engines"].bars[-1], found[2].lanes["engines"].bars[0]
        assert (last[1:], first[0], first[2]) == ((found[1].seconds, "weights 1"), 0.0, "weights 1")
    for one in found:
        assert bars(one, "weights", COPY)[0][0] >= bars(one, "student", "optimizer")[0][1]
    assert any(bars(one, "weights", SEND) for one in found)
    for one in found:  # one thread takes weights and generates; the first weights are there before the first step
        spans = sorted([*bars(one, "weights", SEND), *one.lanes["engines"].bars])
        assert all(a[1] <= b[0] for a, b in pairwise(spans)), spans
    assert found[0].lanes["engines"].bars[0][2] == "weights 0"
    idle_is_logged(tmp_path)
    assert [one.step for one in read_run(tmp_path).timeline] == [1, 2, 3, 4, 5, 6]


class TellsThenWaits(ReplayEngine):
    """Ends one rollout, waits until that is scored, and ends the others."""

    def __init__(self) -> None:
        super().__init__(VOCABULARY)
        self.scored = threading.Semaphore(0)

    def generate(self, requests: Sequence[RolloutRequest], finished: Finished | None = None) -> list[Rollout]:
        first, *others = rollouts = super().generate(requests)
        if finished is not None:
            finished(first)
            assert self.scored.acquire(timeout=WAIT_S)
            for r in others:
                finished(r)
                assert self.scored.acquire(timeout=WAIT_S)
        return rollouts


def test_early_scores_are_beside_their_generation(
    tiny: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NEMO_TROPD_SECRET", "of these tests, long enough")
    engine, add = TellsThenWaits(), EarlyScorer.add

    def watched(self: EarlyScorer, *args: Any) -> None:
        add(self, *args)
        engine.scored.release()

    monkeypatch.setattr(EarlyScorer, "add", watched)
    keys = {"trainer.tropd.max_steps": 2, "model.data.held_out": 0, "trainer.tropd.val_check_interval": 0, **APART}
    train(composed(tiny.overrides(tmp_path, **keys)), GivenEngines(lambda: engine))
    assert all(line["scored_early_fraction"] > 0 for line in train_lines(tmp_path))
    for one in written(tmp_path):
        ((begin, end, _),), (after,) = one.lanes["engines"].bars, bars(one, "teacher", "scoring")[-1:]
        early = bars(one, "teacher", EARLY)
        assert early and all(begin <= b < e <= end for b, e, _ in early) and after[2] == "scoring"
        assert after[0] >= end and one.placement == "dedicated"
    idle_is_logged(tmp_path)


def dies(engine: object) -> None:
    raise EngineDied("killed")


def fails(engine: object) -> None:
    raise EngineError("this call is the last")


@pytest.mark.parametrize("k", [0, 1])
def test_a_resumed_run_goes_on_with_its_timeline(tiny: TinyRun, tmp_path: Path, k: int) -> None:
    """Steps that were done twice are there once, as they were at last. An engine that dies has worked until then."""
    keys = {"trainer.tropd.save_interval": 2}
    with pytest.raises(EngineError, match="this call is the last"):
        go(tiny, tmp_path, k, Script(at={2: dies, 5: fails}), **keys)
    before = written(tmp_path)
    assert [one.step for one in before] == [1, 2, 3]
    assert k or [len(one.lanes["engines"].bars) for one in before] == [1, 2, 1]
    with (tmp_path / "timeline.jsonl").open("a") as file:
        file.write('{"step": 4, "seco')
    go(tiny, tmp_path, k, Script(), **keys)
    found = read_run(tmp_path)
    assert [one.step for one in found.timeline] == [1, 2, 3, 4, 5, 6]
    assert found.timeline[:2] == before[:2] and found.timeline[2] != before[2]
    assert [one.pause is None for one in found.timeline] == [True, False, True, False, False, False]
    assert found.train.keys() == {one.step for one in found.timeline}
    text = (tmp_path / "report.html").read_text()
    assert ("Timeline, Step" in text) and "has no timeline" not in text


def on_ranks(rank: int, world_size: int, root: str) -> int:
    from nemo_tropd.quiet import quiet_libraries

    quiet_libraries()
    os.environ["WORLD_SIZE"] = str(world_size)
    from nemo_tropd.timeline import Timeline

    recorded: list[object] = []
    begin = Timeline.begin
    Timeline.begin = lambda self, *args: (recorded.append(args) if self.enabled else None, begin(self, *args))[1]
    go(TinyRun.at(Path(root)), Path(root) / "ranks", 0, Script(), tensor=2, **{"trainer.tropd.max_steps": 2})
    return len(recorded)


@pytest.mark.timeout(200)
def test_rank_0_alone_writes(tiny: TinyRun) -> None:
    first, second = run_distributed(on_ranks, 2, str(tiny.root), timeout_s=180)
    assert first > 0 and second == 0
    assert [one.step for one in written(tiny.root / "ranks")] == [1, 2]
    idle_is_logged(tiny.root / "ranks")
