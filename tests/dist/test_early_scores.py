"""Scores of rollouts that are finished while others are generated: the same steps, whichever is finished first."""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from nemo_tropd.batch import Rollout
from nemo_tropd.command_line import compose_command_line
from nemo_tropd.config import TropdConfig
from nemo_tropd.config_checks import resolve
from nemo_tropd.config_teacher import DEFAULT_TEACHER
from nemo_tropd.rollout.engine import Finished, RolloutRequest
from nemo_tropd.training.early_scores import EarlyScores
from nemo_tropd.training.plan_models import early_teachers
from tests.dist.run_distributed import run_distributed
from tests.dist.test_served_run import tokenizer_of
from tests.dist.test_training_layouts import FOLLOWS, ROW, VOCABULARY, taught
from tests.doubles import GivenEngines, ReplayEngine
from tests.e2e.compose import CONF
from tests.e2e.tiny_run import TinyRun, train_lines
from tests.fake_vllm import FakeVllm, of_checkpoint, serving
from tests.tiny_models import make_tiny

APART: dict[str, object] = {
    "model.rollout.placement": "dedicated",
    "model.rollout.dedicated.address": "127.0.0.1:1",
    "model.rollout.dedicated.engines": 1,
    "model.rollout.dedicated.timeout_s": 100,
}
HINTED = ("model.data.path", "model.data.teacher_prompt_key")  # else it would be the student itself
OFF: dict[str, object] = {"model.teacher.score_early": False}
URL = "model.teacher.url"
LAYOUTS: dict[int, dict[str, dict[str, object]]] = {
    2: {
        "rows": {"data": 2, ROW: 110, "model.teacher.offload": True, **APART},
        "follows": {"tensor": 2, FOLLOWS: 1, **APART},
    },
    4: {
        "taught": {"data": 2, "tensor": 2, ROW: 110, **APART},
        "padded": {"data": 2, "pipeline": 2, "model.micro_batch_size": 3, **APART},
        "served": {"data": 2, "tensor": 2, ROW: 110, URL: "given"},
    },
}


class InPortions(ReplayEngine):
    """Finishes rollouts in an order of its own, a portion at a time."""

    def __init__(self, seed: int) -> None:
        super().__init__(VOCABULARY)
        self.draw, self.told = random.Random(seed), 0

    def generate(self, requests: Sequence[RolloutRequest], finished: Finished | None = None) -> list[Rollout]:
        rollouts = super().generate(requests)
        for r in self.draw.sample(rollouts, len(rollouts)) if finished else ():
            time.sleep(self.draw.choice([0, 0, 0.15]))
            self.told += 1
            finished(r)
        return rollouts


def composed(overrides: list[str]) -> TropdConfig:
    """As on a command line."""
    return resolve(compose_command_line(["--config-name", "base", *overrides], CONF))


def train_all(rank: int, world_size: int, root: str, url: str, seed: int) -> list[tuple[str, int, list[float]]]:
    """Every layout of this world size: scored afterwards, and twice as they are finished."""
    from nemo_tropd.quiet import quiet_libraries

    quiet_libraries()
    from nemo_tropd.training.run import train

    os.environ |= {"WORLD_SIZE": str(world_size), "NEMO_TROPD_SECRET": "of these tests, long enough"}
    tiny, seen = TinyRun.at(Path(root)), []
    took: list[float] = []
    collect = EarlyScores.all_finished
    EarlyScores.all_finished = lambda self: (collect(self), took.append(self.fraction))[0]
    for name, layout in LAYOUTS[world_size].items():
        for run, more in (("off", OFF), ("first", {}), ("second", {})):
            others = {k: v for k, v in taught(tiny.root).items() if name == "taught" or k in HINTED}
            own = {"model.teacher.path": tiny.student} if name == "follows" else {}
            keys = {**(others if name in ("taught", "follows") else {}), **own, **layout, **more}
            degrees = {d: int(str(keys.pop(d, 1))) for d in ("tensor", "data", "pipeline")}
            if URL in keys:
                keys |= {URL: url, "model.teacher.server.give_up_s": 60}
            steps = {"trainer.tropd.max_steps": 2, "model.data.held_out": 0, "trainer.tropd.val_check_interval": 0}
            run_dir = tiny.root / "runs" / f"{name}_{world_size}_{run}"
            cfg = composed(tiny.overrides(run_dir, **degrees, **{**keys, **steps}))
            engine = InPortions(seed + len(run))
            took.clear()
            train(cfg, GivenEngines(lambda engine=engine: engine))
            seen.append((run_dir.name, engine.told, list(took)))
    return seen


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("early")
    tiny = TinyRun.make(root)
    make_tiny(root / "coder", layers=2, seed=3, hidden=128, head_dim=32)
    records = [json.loads(line) for line in tiny.prompts.read_text().splitlines()]
    for i, record in enumerate(records):
        record |= {"subject": ("coder", None, "again")[i % 3], "hint": "so: " + record["prompt"] if i % 2 else None}
    (root / "taught.jsonl").write_text("\n".join(map(json.dumps, records)) + "\n")
    return root


@pytest.mark.random
@pytest.mark.timeout(300)
@pytest.mark.parametrize("world_size", [2, 4])
def test_the_same_steps_whichever_rollout_is_finished_first(root: Path, world_size: int) -> None:
    fake = FakeVllm(of_checkpoint(root / "teacher"), VOCABULARY, tokenizer_of(root / "teacher"), max_model_len=200)
    fake.name = str(root / "teacher")
    with serving(fake) as url:
        of_ranks = run_distributed(train_all, world_size, str(root), url, random.randrange(1 << 30), timeout_s=280)
    told = {name: (count, fractions) for name, count, fractions in of_ranks[0]}
    assert [fractions for _, _, fractions in of_ranks[-1]] == [fractions for _, _, fractions in of_ranks[0]]
    for name in LAYOUTS[world_size]:
        runs = (root / "runs" / f"{name}_{world_size}_{run}" for run in ("off", "first", "second"))
        off, first, second = map(train_lines, runs)
        assert told[f"{name}_{world_size}_off"] == (0, []) and "scored_early_fraction" not in off[0]
        for lines, run in ((first, "first"), (second, "second")):
            count, fractions = told[f"{name}_{world_size}_{run}"]
            assert count == 2 * 4 and fractions == [line["scored_early_fraction"] for line in lines]
            assert all(0 <= f <= 1 for f in fractions) and (name == "served" or max(fractions) > 0)
        for a, b, c in zip(off, first, second, strict=True):
            for key in ("loss", "grad_norm", "trust_fraction", "log_ratio_mean", "outlier_forward_kl"):
                assert b[key] == c[key], (name, key)
                rel = 2e-3 if name == "follows" else 1e-4  # its teacher has the first step's rounding, through Adam
                alike = a[key] if name == "served" else pytest.approx(a[key], rel=rel, abs=1e-5)
                assert b[key] == alike, (name, key)


def exchanged(rank: int, world_size: int, seed: int) -> list[bool]:
    """Random parts of random owners, over all ranks."""
    import torch.distributed as dist

    from nemo_tropd.parallel.exchange import to_owners

    draw, found = random.Random(seed), []
    for _ in range(5):
        numbers = draw.sample(range(1000), draw.randint(0, 9))
        makers, owners = ({i: draw.randrange(world_size) for i in numbers} for _ in range(2))
        rows = {i: draw.choice([0, 1, 5]) for i in numbers}
        values = {i: [draw.randrange(1 << 30) for _ in range(3 * rows[i])] for i in numbers}
        whole = {i: torch.tensor(v, dtype=torch.int32).reshape(-1, 3) for i, v in values.items()}
        own = {i: part for i, part in whole.items() if makers[i] == rank}
        assert dist.group.WORLD is not None
        got = to_owners(own, makers, owners, rows, torch.empty(0, 3, dtype=torch.int32), dist.group.WORLD)
        expected = {i: part for i, part in whole.items() if owners[i] == rank}
        found.append(got.keys() == expected.keys() and all(torch.equal(got[i], expected[i]) for i in expected))
    return found


@pytest.mark.random
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_parts_come_to_their_owners(world_size: int) -> None:
    assert all(all(found) for found in run_distributed(exchanged, world_size, random.randrange(1 << 30)))


def test_who_scores_early(tmp_path: Path) -> None:
    tiny = TinyRun.make(tmp_path)
    (tmp_path / "taught.jsonl").write_text(tiny.prompts.read_text())
    several = {**taught(tiny.root), "model.teachers.coder.path": tiny.teacher}

    class Exact:
        needs_distributions = True

    class Sampled:
        needs_distributions = False

    def who(place: str, objective: type = Sampled, used: Sequence[str] = (DEFAULT_TEACHER,), **keys: object) -> tuple:
        cfg = composed(tiny.overrides(tmp_path / "run", **keys))
        return early_teachers(cfg, used, place, objective())

    served: dict[str, object] = {URL: "http://nowhere:1", "model.teacher.server.give_up_s": 60}
    assert who("dedicated") == (DEFAULT_TEACHER,) and who("process") == who("colocated") == ()
    assert who("dedicated", Exact) == who("dedicated", **OFF) == ()
    assert who("process", **served) == who("dedicated", **served) == (DEFAULT_TEACHER,)
    assert who("colocated", **served) == who("process", **served, **OFF) == ()
    both = (DEFAULT_TEACHER, "coder")
    assert who("dedicated", used=both, **several) == both
    assert who("dedicated", used=both, **several, **{"model.teachers.coder.offload": True}) == (DEFAULT_TEACHER,)
    once: dict[str, object] = {"model.teacher.offload": True, "model.teachers.coder.path": tiny.teacher}
    assert who("dedicated", used=both, **{**several, **once}) == both  # one in memory
    assert who("dedicated", used=("coder",), **several, **{"model.teachers.coder.offload": True}) == ("coder",)
    degree: dict[str, object] = {"model.teachers.coder.tensor_model_parallel_size": 2}
    assert who("dedicated", used=both, data=2, **several, **degree) == (DEFAULT_TEACHER,)
