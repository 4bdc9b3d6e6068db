"""Benchmarks during training: asked of the run's own engine, scored before, during and after, and not a bit changed."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from nemo_tropd.batch import Rollout, Sampling
from nemo_tropd.config import ConfigError, TropdConfig
from nemo_tropd.data import load_tokenizer
from nemo_tropd.rollout.engine import Finished, RolloutEngine, RolloutRequest
from nemo_tropd.training.plan import make_plan
from tests.dist.run_distributed import run_distributed
from tests.doubles import ReplayEngine, SayingEngine
from tests.e2e.compose import compose_config
from tests.e2e.tiny_run import ROOT, TinyRun, train_lines
from tests.unit.test_report import Page

PROBLEMS, END, STEPS = 4, 3, 3
SUMS = {"grader": "math", "columns": {"problem": "q", "answer": "sum"}, "temperature": 0, "max_new_tokens": 30}


def make(root: Path) -> dict[str, Any]:
    """Models, problems and a benchmark's file; the keys of a run that has it."""
    TinyRun.make(root)
    rows = [{"q": f"{i} and {i}?", "sum": str(2 * i)} for i in range(PROBLEMS)]
    (root / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (root / "sums.yaml").write_text(yaml.safe_dump({**SUMS, "path": str(root / "sums.jsonl")}))
    return {
        "model.validation.benchmarks": f"[{root / 'sums.yaml'}]",
        "model.validation.benchmark_interval": 2,
        "model.validation.score_teacher": True,
    }


class Learner(SayingEngine):
    """With the weights after n steps it answers the first n problems; the rest of its requests it replays."""

    def __init__(self, tokenizer: Any, knows: int | None = None) -> None:
        super().__init__(tokenizer, END, self.answer)
        self.replay, self.knows = ReplayEngine(131), knows

    def answer(self, r: RolloutRequest) -> str:
        knows, asked = self.version if self.knows is None else self.knows, self.tokenizer.decode(r.prompt_ids)
        problem = int(re.findall(r"(\d) ?and", asked)[-1])
        return f"\\boxed{{{2 * problem if problem < knows else 99}}}"

    def generate(self, requests: Sequence[RolloutRequest], finished: Finished | None = None) -> list[Rollout]:
        self.replay.version = self.version
        said = iter(super().generate([r for r in requests if r.sampling == Sampling(0.0, 0.95, 0)]))
        others = iter(self.replay.generate([r for r in requests if r.sampling is None]))
        rollouts = [next(others if r.sampling is None else said) for r in requests]
        return [Rollout(**{**vars(r), "weight_version": self.version}) for r in rollouts]


class Both:
    """The student learns, the teacher knows all but one."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer = load_tokenizer(folder, "model")

    def student(self, cfg: TropdConfig) -> RolloutEngine:
        return Learner(self.tokenizer)

    def teacher(self, cfg: TropdConfig) -> RolloutEngine:
        return Learner(self.tokenizer, PROBLEMS - 1)


def run_here(rank: int, world_size: int, root: str, runs: dict[str, dict[str, Any]]) -> None:
    from nemo_tropd.quiet import quiet_libraries

    quiet_libraries()
    from nemo_tropd.training.run import train

    tiny = TinyRun.at(Path(root))
    for name, keys in runs.items():
        train(compose_config(tiny.overrides(Path(root) / name, data=2, **keys)), Both(tiny.student))


@pytest.mark.timeout(300)
def test_benchmarks_during_training(tmp_path: Path) -> None:
    keys = make(tmp_path)
    run_distributed(run_here, 2, str(tmp_path), {"with": keys, "without": {}}, timeout_s=280)
    lines = [json.loads(line) for line in (tmp_path / "with" / "metrics.jsonl").read_text().splitlines()]
    found = {line["step"]: line for line in lines if line["kind"] == "validation"}
    assert {step: line["benchmark/sums"] for step, line in found.items()} == {0: 0.0, 2: 0.5, 3: 0.75}
    assert {line["benchmark/sums/teacher"] for line in found.values()} == {0.75}
    assert {line["benchmark/sums/of"] for line in found.values()} == {PROBLEMS}
    # its own interval: the held-out prompts were validated before and after alone
    assert [step for step, line in found.items() if "forward_kl" in line] == [0, 3]
    exact = ("loss", "grad_norm", "trust_fraction", "log_ratio_mean", "mismatch_mean_abs")
    a, b = ([[line[k] for k in exact] for line in train_lines(tmp_path / name)] for name in ("with", "without"))
    assert a == b and len(a) == STEPS
    kept = json.loads((tmp_path / "with" / "validation" / "step_00000003.json").read_text())["benchmarks"]["sums"]
    assert kept["line"].startswith("sums, student: 75.0% ± 25.0% [30.1 to 95.4] right (truncated 0.0%, unparsed 0.0%)")
    assert "| at most 30 new tokens; greedy; n = 1;" in kept["line"] and "teacher: 75.0%" in kept["teacher"]["line"]
    text = Page((tmp_path / "with" / "report.html").read_text(encoding="utf-8")).text
    assert "sums: 0% right before, 75% after; the teacher: 75%, 100% of that gap closed." in text
    assert "<h3>Benchmarks</h3>" in (tmp_path / "with" / "report.html").read_text(encoding="utf-8")
    summary = json.loads((tmp_path / "with" / "summary.json").read_text())
    assert summary["answers"][0] == {"prompt": "0 and 0?", "before": "\\boxed{99}", "after": "\\boxed{0}"}


def test_the_demos_task_asks_for_nothing_that_it_trains_on() -> None:
    folder = ROOT / "examples" / "prompts"
    lines = (folder / "capitals_test.jsonl").read_text().splitlines()
    countries = [json.loads(line)["question"].removesuffix("?").rpartition(" of ")[2] for line in lines]
    named = re.compile(rf"\b({'|'.join(countries)})\b")
    assert len(countries) == 24 and named.search("Is it Peru?")
    for file in ("instructions.jsonl", "capitals.jsonl"):
        for line in (folder / file).read_text().splitlines():
            prompt = json.loads(line)["prompt"]
            assert "capital" not in prompt or not named.search(prompt), prompt


def test_what_cannot_be_is_refused_in_the_plan(tmp_path: Path) -> None:
    make(tmp_path)
    tiny, own = TinyRun.at(tmp_path), tmp_path / "sums.yaml"
    key = "model.validation.benchmarks"
    for given, words in (
        ("[amie24]", rf"{key}\[0\].name = 'amie24': there is no such benchmark; there are aime24"),
        ("[7]", f"{key} = .7.: give a list of names, or of dictionaries with a name"),
        ("[{limit: 7}]", "give a list of names"),
        (f"[{{name: {own}, sample: 2}}]", rf"{key}\[0\].sample = 2: there is no such key; did you mean {key}\[0\].samples"),
        (f"[{{name: {own}, max_new_tokens: 90}}]", rf"{key}\[0\].max_new_tokens = 90: with the longest prompt of .* 96"),
        (f"[{own},{own}]", rf"{key}\[1\].name = 'sums': is there twice"),
        (f"[{{name: {own}, package: no-such-package, path: null, file: a}}]", "not installed: pip install"),
        (f"[{{name: {own}, grader: maths}}]", rf"{key}\[0\].grader = 'maths': there is no such grader"),
    ):
        with pytest.raises(ConfigError, match=words):
            make_plan(compose_config(tiny.overrides(tmp_path / "run", **{key: given})))
