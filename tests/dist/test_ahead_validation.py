"""Validations of a run whose engine works ahead of the trainer: by which weights, who waits for what, and the same after
any interruption."""

from __future__ import annotations

import json
import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from nemo_tropd.model.tropd_model import MegatronTrOPDModel
from nemo_tropd.parallel.signals import STOP
from nemo_tropd.rollout.engine import EngineError
from nemo_tropd.training.ahead import load_rollouts
from tests.dist.run_distributed import run_distributed
from tests.dist.test_ahead import BATCH, Script, WeighedEngine, fails, go, same
from tests.e2e.tiny_run import TinyRun, train_lines

PROBLEMS, HELD_OUT, STEPS = 5, 3, 5
Lines = dict[int, list[dict[str, Any]]]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    tiny = TinyRun.make(tmp_path_factory.mktemp("validated"))
    rows = [{"q": f"{i} and {i}?", "sum": str(2 * i)} for i in range(PROBLEMS)]
    (tiny.root / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {"grader": "math", "columns": {"problem": "q", "answer": "sum"}, "temperature": 0, "max_new_tokens": 30}
    (tiny.root / "sums.yaml").write_text(yaml.safe_dump({**task, "path": str(tiny.root / "sums.jsonl")}))
    return tiny


def run(tiny: TinyRun, run_dir: Path, k: int, script: Script, **keys: object) -> list[dict[str, Any]]:
    """Held-out prompts at 0, 2, 4 and 5, benchmarks at 0, 3 and 5."""
    own = {
        "trainer.tropd.max_steps": STEPS,
        "trainer.tropd.val_check_interval": 2,
        "model.data.held_out": HELD_OUT,
        "model.validation.benchmarks": f"[{tiny.root / 'sums.yaml'}]",
        "model.validation.benchmark_interval": 3,
    }
    return go(tiny, run_dir, k, script, **(own | keys))


def validations(run_dir: Path) -> dict[str, str]:
    """The files, answers and all, and the metrics: of a step validated again the last."""
    found = {path.name: path.read_text() for path in sorted((run_dir / "validation").iterdir())}
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return found | {str(line["step"]): json.dumps(line) for line in lines if line["kind"] == "validation"}


def last(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    by_step = {line["step"]: line for line in lines}
    return [by_step[step] for step in sorted(by_step)]


@pytest.fixture(scope="module")
def undisturbed(tiny: TinyRun) -> dict[int, Path]:
    found = {}
    for k in (0, 1, 2):
        found[k] = tiny.root / f"undisturbed_{k}"
        run(tiny, found[k], k, Script())
    return found


def test_what_the_trainer_waits_for_comes_first(tiny: TinyRun, tmp_path: Path) -> None:
    script = Script()
    run(tiny, tmp_path, 1, script)
    held, benchmark, rollouts = HELD_OUT, PROBLEMS, BATCH
    assert script.generated == [
        *((0, held), (0, rollouts), (0, benchmark), (0, rollouts)),
        (1, rollouts),
        *((2, held), (2, rollouts)),
        *((3, benchmark), (3, rollouts)),
        (4, held),
        *((5, held), (5, benchmark)),
    ]
    kinds = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    kinds = [(line["kind"][0], line["step"]) for line in kinds]
    # Each before the next step's line, whenever its answers came.
    assert kinds == [
        *(("v", 0), ("t", 1), ("t", 2), ("v", 2), ("t", 3), ("v", 3)),
        *(("t", 4), ("v", 4), ("t", 5), ("v", 5)),
    ]


def test_it_is_the_student_of_its_step_that_is_validated(undisturbed: dict[int, Path]) -> None:
    """Losses differ with k from the second step on; before training they are one student."""
    of = [validations(undisturbed[k]) for k in (0, 1, 2)]
    files = [f"step_{step:08d}.json" for step in (0, 2, 3, 4, 5)]
    assert all(sorted(name for name in v if name.endswith("json")) == files for v in of)
    assert of[0][files[0]] == of[1][files[0]] == of[2][files[0]] and of[0]["0"] == of[1]["0"]
    assert len({v[files[1]] for v in of}) > 1
    for v in of:
        parts = {step: {"forward_kl", "benchmark/sums"} & json.loads(v[str(step)]).keys() for step in (0, 2, 3, 4, 5)}
        both, held, bench = {"forward_kl", "benchmark/sums"}, {"forward_kl"}, {"benchmark/sums"}
        assert parts == {0: both, 2: held, 3: bench, 4: held, 5: both}


def loss_of(wanted: int, monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Set once the loss of that step is there."""
    reached, loss = threading.Event(), MegatronTrOPDModel.get_loss_and_metrics

    def watched(self: Any, *args: Any, step: int, **more: Any) -> Any:
        found = loss(self, *args, step=step, **more)
        if step == wanted:
            reached.set()
        return found

    monkeypatch.setattr(MegatronTrOPDModel, "get_loss_and_metrics", watched)
    return reached


@pytest.mark.parametrize("call", [3, 8])
def test_the_step_goes_on_while_benchmarks_are_answered(
    tiny: TinyRun, undisturbed: dict[int, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: int
) -> None:
    """The third call answers the benchmark of step 0, the eighth that of step 3: not before that step's loss is there."""
    reached, waited = loss_of({3: 0, 8: 3}[call], monkeypatch), list[bool]()
    script = Script(at={call: lambda engine: waited.append(reached.wait(60))})
    same(run(tiny, tmp_path, 1, script), train_lines(undisturbed[1]))
    assert waited == [True] and validations(tmp_path) == validations(undisturbed[1])


@pytest.mark.parametrize(("k", "call", "interval"), [(1, 3, 1), (1, 8, 1), (1, 8, 3), (1, 9, 3), (2, 7, 3), (2, 9, 3)])
def test_a_run_that_ended_anyhow_validates_the_same(
    tiny: TinyRun, undisturbed: dict[int, Path], tmp_path: Path, k: int, call: int, interval: int
) -> None:
    keys = {"trainer.tropd.save_interval": interval}
    with pytest.raises(EngineError, match="this call is the last"):
        run(tiny, tmp_path, k, Script(at={call: fails}), **keys)
    same(last(run(tiny, tmp_path, k, Script(), **keys)), train_lines(undisturbed[k]))
    assert validations(tmp_path) == validations(undisturbed[k])


@pytest.mark.parametrize("k", [1, 2])
def test_a_stop_that_does_not_wait_for_answers_loses_neither_them_nor_the_rollouts(
    tiny: TinyRun, undisturbed: dict[int, Path], tmp_path: Path, k: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It comes in the middle of a step whose rollouts older weights have generated."""
    reached = loss_of(3, monkeypatch)

    def hangs(engine: WeighedEngine) -> None:
        assert reached.wait(60)
        STOP.signal, STOP._asked = 15, time.monotonic() - 100
        assert engine.closed.wait(60)

    # Of step 3: behind the rollouts of that step, which are there.
    script = Script(at={8 if k == 1 else 9: hangs})
    try:
        first = run(tiny, tmp_path, k, script, **{"trainer.tropd.save_interval": 50})
    finally:
        STOP.signal = None
    assert len(first) == 3 and "step_00000003.json" not in validations(tmp_path)
    (path,) = (tmp_path / "checkpoints").iterdir()
    steps = [3, 4][:k]
    assert path.name == "step_00000003" and sorted(load_rollouts(path, {step: step - k for step in steps})) == steps
    resumed = Script()
    same(run(tiny, tmp_path, k, resumed), train_lines(undisturbed[k]))
    assert validations(tmp_path) == validations(undisturbed[k])
    assert resumed.generated[0] == (3, PROBLEMS)


def test_a_stop_before_the_answers_validates_when_it_is_resumed(
    tiny: TinyRun, undisturbed: dict[int, Path], tmp_path: Path
) -> None:
    def stops(engine: WeighedEngine) -> None:
        STOP.signal, STOP._asked = 15, 1e18  # asked for, never overdue

    try:
        first = run(tiny, tmp_path, 1, Script(at={8: stops}), **{"trainer.tropd.save_interval": 50})
    finally:
        STOP.signal = None
    assert len(first) in (3, 4)
    same(run(tiny, tmp_path, 1, Script()), train_lines(undisturbed[1]))
    assert validations(tmp_path) == validations(undisturbed[1])


def on_ranks(rank: int, world_size: int, root: str) -> tuple[list[dict[str, Any]], dict[str, str]]:
    from nemo_tropd.quiet import quiet_libraries

    quiet_libraries()
    os.environ["WORLD_SIZE"] = str(world_size)
    tiny, script, run_dir = TinyRun.at(Path(root)), Script(), Path(root) / "ranks"
    run(tiny, run_dir, 1, script, data=2)
    assert len(script.generated) == (12 if rank == 0 else 0)
    return train_lines(run_dir), validations(run_dir)


@pytest.mark.timeout(200)
def test_on_several_ranks(tiny: TinyRun, undisturbed: dict[int, Path]) -> None:
    (lines, found), second = run_distributed(on_ranks, 2, str(tiny.root), timeout_s=100)
    assert (lines, found) == second and len(lines) == STEPS
    assert found.keys() == validations(undisturbed[1]).keys()
