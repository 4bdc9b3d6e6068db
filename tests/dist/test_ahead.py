"""Rollouts of later steps, generated while earlier ones train: by which weights, and the same after any interruption."""

from __future__ import annotations

import math
import os
import random
import shutil
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from nemo_tropd.batch import Rollout
from nemo_tropd.config import ConfigError
from nemo_tropd.parallel.agreement import World
from nemo_tropd.parallel import agreement, signals
from nemo_tropd.parallel.signals import STOP
from nemo_tropd.rollout.ahead import AheadRollouts, EngineThread
from nemo_tropd.rollout.engine import EngineDied, EngineError, Finished, RolloutRequest
from nemo_tropd.training.ahead import FILE, load_rollouts, save_rollouts
from nemo_tropd.training.objective import build_objective
from nemo_tropd.training.plan import make_plan
from nemo_tropd.training.run import train
from nemo_tropd.training.step import _effective
from tests.dist.run_distributed import run_distributed
from tests.doubles import GivenEngines, ReplayEngine, WeighedEngine
from tests.e2e.tiny_run import TinyRun, train_lines
from tests.faults import planted
from tests.dist.test_early_scores import composed

VOCABULARY, BATCH = 131, 4
AHEAD = "model.rollout.steps_ahead"
SAME = ("loss", "grad_norm", "trust_fraction", "log_ratio_mean", "outlier_forward_kl", "weights_lag", "response_tokens")


@dataclass
class Script:
    """What the engines of a run do, and did."""

    generated: list[tuple[int, int]] = field(default_factory=list)  # version, requests
    starts: int = 0
    calls: int = 0
    at: dict[int, Any] = field(default_factory=dict)  # what happens in the n-th call of generate
    ends: list[bool] = field(default_factory=list)  # whether an engine was told at its end that the run is over


class ScriptedEngine(WeighedEngine):
    """Keeps a record, and fails as it is told."""

    def __init__(self, script: Script) -> None:
        super().__init__(VOCABULARY)
        self.script, self.closed = script, threading.Event()

    def start(self) -> None:
        self.script.starts += 1

    def generate(self, requests: Sequence[RolloutRequest], finished: Finished | None = None) -> list[Rollout]:
        self.script.calls += 1
        if (happens := self.script.at.get(self.script.calls)) is not None:
            happens(self)
        self.script.generated.append((self.version, len(requests)))
        return super().generate(requests, finished)

    def close(self, *, run_over: bool = False) -> None:
        self.closed.set()
        self.script.ends.append(run_over)


class Engines(GivenEngines):
    """The student's; the teacher's keeps its weights."""

    def teacher(self, cfg: Any) -> ReplayEngine:
        return ReplayEngine(VOCABULARY)


def go(tiny: TinyRun, run_dir: Path, k: int, script: Script, **keys: object) -> list[dict[str, Any]]:
    keys = {"trainer.tropd.max_steps": 6, "model.data.held_out": 0, "trainer.tropd.val_check_interval": 0} | keys
    keys |= {"trainer.tropd.save_interval": keys.get("trainer.tropd.save_interval", 1), AHEAD: k}
    cfg = composed(tiny.overrides(run_dir, **keys))
    train(cfg, Engines(lambda: ScriptedEngine(script)))
    return train_lines(run_dir)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    return TinyRun.make(tmp_path_factory.mktemp("ahead"))


@dataclass
class Undisturbed:
    """Six steps each, by steps ahead."""

    lines: dict[int, list[dict[str, Any]]] = field(default_factory=dict)
    scripts: dict[int, Script] = field(default_factory=dict)


@pytest.fixture(scope="module")
def all_undisturbed(tiny: TinyRun) -> Undisturbed:
    found = Undisturbed()
    for k in (0, 1, 2):
        found.scripts[k] = Script()
        found.lines[k] = go(tiny, tiny.root / f"undisturbed_{k}", k, found.scripts[k])
    return found


@pytest.fixture
def undisturbed(all_undisturbed: Undisturbed) -> dict[int, list[dict[str, Any]]]:
    return all_undisturbed.lines


def same(lines: list[dict[str, Any]], others: list[dict[str, Any]]) -> None:
    assert [line["step"] for line in lines] == [line["step"] for line in others]
    for line, other in zip(lines, others, strict=True):
        assert {key: line[key] for key in SAME} == {key: other[key] for key in SAME}, line["step"]


def test_older_weights_are_used_as_said(all_undisturbed: Undisturbed) -> None:
    of = [all_undisturbed.lines[k] for k in (0, 1, 2)]
    for k, script in all_undisturbed.scripts.items():
        assert script.starts == 1 and script.generated == [(max(0, n - k), BATCH) for n in range(6)]
        if k:
            assert [line["weights_lag"] for line in of[k]] == [min(n, k) for n in range(6)]
            assert all(0 < line["effective_fraction"] <= 1 for line in of[k])
            assert all(0 < line["importance_weight"] <= 2 for line in of[k])
    assert "weights_lag" not in of[0][0] and "importance_weight" not in of[0][0]
    tokens = [[line["response_tokens"] for line in lines] for lines in of]
    # The first step's are the same; the second's by one step ahead are the first weights' own.
    assert tokens[0][0] == tokens[1][0] == tokens[2][0] and tokens[1][1] == tokens[2][1]
    assert len({tuple(t) for t in tokens}) == 3


def test_the_effective_sample_size() -> None:
    """Of the weights 1, 2, 2 and 0.5."""
    sums = {"importance_weight": 5.5, "importance_weight_squared": 9.25}
    assert _effective(sums, 4) == pytest.approx(5.5**2 / (4 * 9.25))
    assert math.isnan(_effective({}, 4)) and math.isnan(_effective({**sums, "importance_weight_squared": 0.0}, 0))


def dies(engine: ScriptedEngine) -> None:
    raise EngineDied("killed")


def fails(engine: ScriptedEngine) -> None:
    raise EngineError("this call is the last")


def stops(engine: ScriptedEngine) -> None:
    STOP.signal, STOP._asked = 15, 1e18  # asked for, never overdue


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("call", [1, 2, 4])
def test_an_engine_that_dies_is_replaced_by_one_with_the_same_weights(
    tiny: TinyRun,
    undisturbed: dict[int, list[dict[str, Any]]],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    k: int,
    call: int,
) -> None:
    script = Script(at={call: dies})
    same(go(tiny, tmp_path, k, script), undisturbed[k])
    assert script.starts == 2 and capfd.readouterr().out.count("engine died and is replaced: killed") == 1
    if call == 4:
        with pytest.raises(EngineError, match=f"crashed twice at weight version {3 - k}; last error: killed"):
            go(tiny, tmp_path / "twice", k, Script(at={4: dies, 5: dies}))


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("interval", [1, 2])
def test_a_run_that_ended_anyhow_resumes_to_the_bit(
    tiny: TinyRun, undisturbed: dict[int, list[dict[str, Any]]], tmp_path: Path, k: int, interval: int
) -> None:
    keys = {"trainer.tropd.save_interval": interval}
    with pytest.raises(EngineError, match="this call is the last"):
        go(tiny, tmp_path, k, Script(at={5: fails}), **keys)
    script = Script()
    lines = go(tiny, tmp_path, k, script, **keys)
    last = {line["step"]: line for line in lines}  # some steps were done twice
    same([last[step] for step in sorted(last)], undisturbed[k])
    # Those that the checkpoint had were not generated again.
    assert (
        len(script.generated) < 6
        and script.generated == [(max(0, n - k), BATCH) for n in range(6)][-len(script.generated) :]
    )


@pytest.mark.parametrize("k", [1, 2])
def test_a_stop_keeps_what_is_being_generated(
    tiny: TinyRun, undisturbed: dict[int, list[dict[str, Any]]], tmp_path: Path, k: int
) -> None:
    try:
        first = go(tiny, tmp_path, k, Script(at={4: stops}), **{"trainer.tropd.save_interval": 50})
    finally:
        STOP.signal = None
    assert 0 < len(first) < 6
    (path,) = (tmp_path / "checkpoints").iterdir()
    held = load_rollouts(path, {len(first) + i: max(0, len(first) + i - k) for i in range(k)})
    assert sorted(held) == [len(first) + i for i in range(k)] and all(len(r) == BATCH for r in held.values())
    script = Script()
    same(go(tiny, tmp_path, k, script), undisturbed[k])
    assert len(script.generated) == 6 - len(first) - k


def test_a_step_that_is_given_up_after_its_rollouts_keeps_them(
    tiny: TinyRun, undisturbed: dict[int, list[dict[str, Any]]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stops_and_takes_long() -> None:
        STOP.ask()
        time.sleep(0.3)

    monkeypatch.setattr(signals, "FINISH_S", 0.1)
    monkeypatch.setattr(agreement, "_POLL_S", 5.0)  # what is finished is found so, however busy the machine is
    step = random.randrange(1, 6)
    try:
        with planted("teacher", stops_and_takes_long, rank=0, occurrence=step + 1):
            first = go(tiny, tmp_path, 1, Script(), **{"trainer.tropd.save_interval": 50})
    finally:
        STOP.signal = None
    assert len(first) == step
    (path,) = (tmp_path / "checkpoints").iterdir()
    assert len(load_rollouts(path, {step: step - 1})[step]) == BATCH
    script = Script()
    same(go(tiny, tmp_path, 1, script), undisturbed[1])
    assert len(script.generated) == 6 - step - 1


@pytest.mark.parametrize("damage", ["longer", "missing", "of zeros"])
def test_a_damaged_file_of_rollouts_is_a_damaged_checkpoint(
    tiny: TinyRun,
    undisturbed: dict[int, list[dict[str, Any]]],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    damage: str,
) -> None:
    with pytest.raises(EngineError):
        go(tiny, tmp_path, 1, Script(at={5: fails}))
    newest = sorted((tmp_path / "checkpoints").iterdir())[-1]
    path = newest / FILE
    path.write_bytes(bytes(path.stat().st_size) if damage == "of zeros" else path.read_bytes() + b"\0")
    if damage == "missing":
        path.unlink()
    last = {line["step"]: line for line in go(tiny, tmp_path, 1, Script())}
    same([last[step] for step in sorted(last)], undisturbed[1])
    out = capfd.readouterr().out
    assert f"{newest} cannot be loaded (it is damaged: " in out and "using the checkpoint before it" in out
    assert (FILE in out) == (damage != "of zeros") and newest.with_name(f"{newest.name}.damaged").is_dir()


def killed() -> None:
    raise RuntimeError("killed")


def test_an_engine_is_told_of_the_end_of_a_run_whose_rollouts_a_checkpoint_had(
    tiny: TinyRun, undisturbed: dict[int, list[dict[str, Any]]], tmp_path: Path
) -> None:
    """Engine hosts would wait for the trainer else."""
    with planted("student", killed, rank=0, occurrence=5), pytest.raises(RuntimeError, match="killed"):
        go(tiny, tmp_path, 2, Script())
    script = Script()
    same(go(tiny, tmp_path, 2, script), undisturbed[2])
    assert script.generated == [] and (script.starts, script.ends) == (1, [True])


def test_rollouts_of_other_data_are_generated_anew(
    tiny: TinyRun, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(EngineError):
        go(tiny, tmp_path, 2, Script(at={5: fails}))
    done = sorted(int(path.name[5:]) for path in (tmp_path / "checkpoints").iterdir())[-1]
    prompts = tmp_path / "others.jsonl"
    prompts.write_text("".join(reversed(tiny.prompts.read_text().splitlines(keepends=True))))
    script = Script()
    others = {"model.data.path": prompts, "trainer.tropd.accept_changes": "[model.data.path]"}
    go(tiny, tmp_path, 2, script, **others)
    assert script.generated[:3] == [(done, BATCH)] * 3
    assert f"rollouts of step {done + 1} answer other requests than this run's" in capfd.readouterr().out


def test_another_number_of_steps_is_refused_unless_accepted(tiny: TinyRun, tmp_path: Path) -> None:
    with pytest.raises(EngineError):
        go(tiny, tmp_path, 2, Script(at={5: fails}))
    with pytest.raises(ConfigError, match="model.rollout.steps_ahead = 1: the run's checkpoint was made with 2"):
        go(tiny, tmp_path, 1, Script())
    shutil.copytree(tmp_path, tmp_path.with_name("none"))
    script, accept = Script(), {"trainer.tropd.accept_changes": f"[{AHEAD}]"}
    done = sorted(int(path.name[5:]) for path in (tmp_path / "checkpoints").iterdir())[-1]
    lines = go(tiny, tmp_path, 1, script, **accept)
    lags = {line["step"]: line["weights_lag"] for line in lines}
    assert [lags[step] for step in (done + 1, done + 2)] == [2, 2] and lags[6] == (1 if done < 4 else 2)
    accept = {"trainer.tropd.accept_changes": f"[{AHEAD},model.tropd.params.importance_cap]"}
    script = Script()
    go(tiny, tmp_path.with_name("none"), 0, script, **accept)
    assert script.generated == [(n, BATCH) for n in range(done, 6)]


def on_ranks(rank: int, world_size: int, root: str, k: int) -> list[dict[str, Any]]:
    from nemo_tropd.quiet import quiet_libraries

    quiet_libraries()
    os.environ["WORLD_SIZE"] = str(world_size)
    tiny, script = TinyRun.at(Path(root)), Script()
    lines = go(tiny, Path(root) / f"ranks_{k}", k, script, tensor=2)
    assert script.starts == (rank == 0)
    return lines


@pytest.mark.timeout(200)
def test_on_several_ranks(tiny: TinyRun) -> None:
    """Tokens depend on the bits of the weights, so only the first two steps are those of one process."""
    first, second = run_distributed(on_ranks, 2, str(tiny.root), 1, timeout_s=180)
    assert first == second and [line["weights_lag"] for line in first] == [0, 1, 1, 1, 1, 1]


def test_what_is_refused_and_what_is_set(tiny: TinyRun, tmp_path: Path) -> None:
    def cfg(**keys: object) -> Any:
        return composed(tiny.overrides(tmp_path / "run", **keys))

    assert build_objective(cfg(**{AHEAD: 1})).importance_cap == 2 and build_objective(cfg()).importance_cap is None
    own = {"+model.tropd.params.importance_cap": 5.0}
    assert build_objective(cfg(**{AHEAD: 1}, **own)).importance_cap == 5
    assert build_objective(cfg(**{AHEAD: 1, "model.tropd.objective": "tropd_exact"})).importance_cap is None
    on_gpu = {"check_only": True, "trainer.gpu_memory_gib": 80}
    with pytest.raises(
        ConfigError, match="model.rollout.steps_ahead = 1: colocated engines and the trainer take turns"
    ):
        make_plan(cfg(**{AHEAD: 1}, **on_gpu))
    assert make_plan(cfg(**{AHEAD: 1, "model.rollout.placement": "process"}, **on_gpu)).early == ()


def test_weights_that_change_too_fast_are_said_once(tiny: TinyRun, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    go(tiny, tmp_path, 1, Script(), **{"trainer.tropd.max_steps": 4, "+model.tropd.params.importance_cap": 1e6})
    lines = train_lines(tmp_path)
    first = next(line for line in lines if line["effective_fraction"] < 0.5)
    said = [line for line in capfd.readouterr().out.splitlines() if "count as" in line]
    assert len(said) == 1 and f"step {first['step']}: rollouts of weights" in said[0]


@pytest.mark.random
def test_rollouts_in_a_file_come_back_as_they_were(tmp_path: Path) -> None:
    def some(step: int, count: int) -> list[Rollout]:
        def ids(least: int) -> list[int]:
            return [random.randrange(1 << 31) for _ in range(random.randint(least, 5))]

        found = []
        for i in range(count):
            response = ids(0)
            scores = [-random.random() * 10 for _ in response]
            found.append(Rollout(ids(1), ids(0), response, scores, step, i, 7 * i, random.random() < 0.5))
        return found

    rollouts = {step: some(step, random.randint(1, 4)) for step in random.sample(range(99), 3)}
    assert save_rollouts(rollouts, tmp_path) == (tmp_path / FILE).stat().st_size
    assert load_rollouts(tmp_path, {step: step for step in rollouts}) == rollouts


def test_only_the_copies_that_are_still_wanted_are_kept() -> None:
    import torch

    gate, script = threading.Semaphore(0), Script(at={n: lambda engine: gate.acquire() for n in range(1, 9)})
    weights = [("w", torch.zeros(3))]
    rollouts = AheadRollouts(World(), lambda: ScriptedEngine(script), lambda: iter(weights), VOCABULARY)
    asked = [RolloutRequest([1], [], 5, i, i, 4) for i in range(2)]
    for version in range(3):
        weights[0][1].fill_(version)
        rollouts.refresh(version)
        rollouts.begin(version, asked, version)
    thread = rollouts._thread
    assert thread is not None and sorted(thread._kept) == [0, 1, 2]
    assert [float(thread._kept[v].tensors["w"][0]) for v in range(3)] == [0, 1, 2]  # copies: the trainer's own go on
    used = {copy.tensors["w"].data_ptr() for copy in thread._kept.values()}
    assert len(used) == 3  # none is overwritten while it is wanted
    for version in range(3):
        gate.release()
        assert {r.weight_version for r in rollouts.take(version)} == {version}
    assert rollouts.finished([]) == {}
    gate.release()
    rollouts.generate(asked, 2)
    assert sorted(thread._kept) == [2]
    weights[0][1].fill_(3)
    rollouts.refresh(3)
    assert [float(copy.tensors["w"][0]) for copy in thread._kept.values()] == [3]
    assert thread._kept[3].tensors["w"].data_ptr() in used  # no memory is taken for it
    rollouts.begin(9, asked, 3)
    rollouts.close()  # while it generates
    gate.release()
    assert not thread._thread.is_alive() or thread._thread.join(5) is None


def test_an_engine_that_is_closed_while_it_starts_does_not_stay() -> None:
    script, starts, goes_on = Script(), threading.Event(), threading.Event()

    class Slow(ScriptedEngine):
        def start(self) -> None:
            starts.set()
            goes_on.wait(20)

    thread = EngineThread(lambda: Slow(script), VOCABULARY)
    thread.keep(0, iter([]))
    begun = thread.put([], 0)
    assert starts.wait(20)
    closes = threading.Thread(target=lambda: thread.close(run_over=False))
    closes.start()
    while not script.ends:
        closes.join(0.01)
    goes_on.set()
    closes.join(20)
    assert isinstance(begun.exception(20), EngineDied) and len(script.ends) == 2 and not thread._thread.is_alive()
