"""Values that are not finite, on one rank alone: the step is skipped alike on all, and too many end the run."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from nemo_tropd.training.validation import Validation
from tests.dist.run_distributed import run_distributed
from tests.doubles import replay_engines
from tests.e2e.tiny_run import TinyRun, train_lines

STEP = 1  # of the steps 0, 1 and 2
WHAT = {
    "student": "the student's logits on rank",
    "teacher": "the teacher's logits on rank",
    "gradient": "the gradient of ",
}


@contextmanager
def poisoned(what: str, here: bool, always: bool) -> Iterator[list[list[bool]]]:
    """NaN on this rank if ``here``, in step 1 or ``always``. Gives what the optimizer did in each step: whether it was
    applied, and whether weights and optimizer states stayed as they were."""
    from nemo_tropd.model import student_pass, tropd_model
    from nemo_tropd.teacher import scorer
    from nemo_tropd.training.optimizer import StudentOptimizer
    from nemo_tropd.training.step import TrainStep

    steps: list[list[bool]] = []
    active = False

    def run_step(self: Any, step: int, **kw: Any) -> Any:
        nonlocal active
        active = here and (always or step == STEP)
        return run(self, step, **kw)

    def spoiled(values: Any, by: str) -> Any:
        return values * math.nan if active and what == by and values is not None else values

    def optimize(self: Any, step: int) -> Any:
        def state() -> list[Any]:
            groups = [group.get("step") for group in self.megatron.param_groups]
            moments = [v.clone() for s in self.megatron.optimizer.state.values() for v in s.values()]
            return [groups, *(p.detach().clone() for p in self.model.module.parameters()), *moments]

        if active and what == "gradient":
            next(self.model.module.parameters()).main_grad.view(-1)[5] = math.inf
        before = state()
        result = update(self, step)
        after = state()
        same = len(before) == len(after) and all(
            torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in zip(before, after, strict=True)
        )
        steps.append([result.applied, same])
        return result

    def divergence_pass(*args: Any) -> Any:
        return [h * math.nan if here and h is not None else h for h in score(*args)]

    run, update, forward, score = TrainStep.run, StudentOptimizer.step, student_pass.run_model, scorer.pipeline_forward
    with (
        mock.patch.object(TrainStep, "run", run_step),
        mock.patch.object(StudentOptimizer, "step", optimize),
        mock.patch.object(student_pass, "run_model", lambda *a: spoiled(forward(*a), "student")),
        mock.patch.object(tropd_model, "pipeline_forward", divergence_pass if what == "student" else score),
        mock.patch.object(scorer, "pipeline_forward", lambda *a: [spoiled(h, "teacher") for h in score(*a)]),
    ):
        yield steps


def run_here(rank: int, world_size: int, root: str, runs: list[tuple[str, str, int, bool, dict[str, Any]]]) -> Any:
    """Train each of ``runs`` (name, what is bad, on which rank, always, keys); the error and the optimizer's steps."""
    from nemo_tropd.quiet import quiet_libraries

    quiet_libraries()
    from nemo_tropd.training.run import train
    from tests.e2e.compose import compose_config

    tiny, results = TinyRun.at(Path(root)), []
    for name, what, where, always, keys in runs:
        common = {"model.tropd.guidance.enabled": False, "trainer.tropd.save_interval": 9}
        cfg = compose_config(tiny.overrides(Path(root) / name, **common, **keys))
        error = ""
        with poisoned(what, rank == where, always) as steps:
            try:
                train(cfg, replay_engines(131))
            except Exception as raised:
                error = f"{type(raised).__name__}: {raised}"
        results.append((error, steps))
    return results


@pytest.mark.timeout(220)
def test_a_bad_value_on_one_rank_skips_the_step_on_all_and_too_many_end_the_run(tmp_path: Path) -> None:
    TinyRun.make(tmp_path)
    none = {"model.data.held_out": 0}
    few = {"trainer.tropd.max_skipped_steps": 1}
    runs: list[tuple[str, str, int, bool, dict[str, Any]]] = [
        ("student-data", "student", 1, False, {"data": 2, "model.data.held_out": 2}),
        ("student-tensor", "student", 0, False, {"tensor": 2, **none}),
        ("teacher-tensor", "teacher", 1, False, {"tensor": 2, **none}),
        ("gradient-pipeline", "gradient", 0, False, {"pipeline": 2, **none}),
        ("teacher-data", "teacher", 0, True, {"data": 2, **none, **few, "model.tropd.objective": "entropy_opd"}),
    ]
    by_rank = run_distributed(run_here, 2, str(tmp_path), runs, timeout_s=200)
    for i, (name, what, _, always, _) in enumerate(runs):
        run_dir = tmp_path / name
        lines = [json.loads(x, parse_constant=pytest.fail) for x in (run_dir / "metrics.jsonl").read_text().splitlines()]
        kept = sorted((run_dir / "skipped").iterdir())
        for rank in (0, 1):
            error, steps = by_rank[rank][i]
            if always:
                assert steps == [[False, True]] * 2, (name, steps)
                assert error.startswith("TrainingError: step 2: 2 steps in a row were skipped"), error
                assert WHAT[what] in error and "raise max_skipped_steps" in error
                assert ("model.teacher.precision=32" in error) == (what == "teacher")
            else:
                assert not error and steps == [[True, False], [False, True], [True, False]], (name, error, steps)
        assert [path.name for path in kept] == ["step_00000001.json", "step_00000002.json"][0 if always else 1 :]
        skipped = json.loads(kept[-1].read_text(), parse_constant=pytest.fail)
        assert WHAT[what] in skipped["not_finite"][0] and len(skipped["rollouts"]) == 4
        assert what == "gradient" or "prompts.jsonl" in skipped["not_finite"][0]
        trained = [line for line in lines if line["kind"] == "train"]
        assert [line["applied"] for line in trained] == ([0.0, 0.0] if always else [1.0, 0.0, 1.0])
    assert len(train_lines(tmp_path / "student-data")) == 3
    validation = json.loads((tmp_path / "student-data" / "validation" / "step_00000003.json").read_text())
    assert "reverse_kl" in validation["dropped"] and not {"reverse_kl", "student_entropy"} & validation["metrics"].keys()
    assert "reverse_kl not finite, left out" in Validation(**validation).line()
