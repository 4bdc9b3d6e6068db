"""Before and after: which answers are set side by side, and how often something was asked."""

from __future__ import annotations

from typing import Any

import pytest

from nemo_tropd.training.summary import print_summary, summary_of
from nemo_tropd.training.trainer import Outcome
from nemo_tropd.training.validation import Validation
from tests.e2e.compose import compose_config


def pairs(before: list[dict[str, Any]], after: list[dict[str, Any]], *, benchmark: bool) -> list[tuple[str, str, str]]:
    """(prompt, before, after) of the summary of a run with these answers."""
    made = [
        Validation(step, {}, benchmarks={"b": {"answers": given, "line": ""}})
        if benchmark
        else Validation(step, {}, given)
        for step, given in enumerate((before, after))
    ]
    cfg = compose_config(["pretrained_checkpoint.restore_from_path=a", "model.teacher.path=b", "model.data.path=c"])
    return [(a["prompt"], a["before"], a["after"]) for a in summary_of(cfg, Outcome(1, False, *made), "id")["answers"]]


def answers(of: list[tuple[int, int]], **more: Any) -> list[dict[str, Any]]:
    """To (prompt, sample), with fields that are functions of both."""
    return [{"prompt": f"p{i}", "answer": f"{i}.{s}", **{k: f(i, s) for k, f in more.items()}} for i, s in of]


@pytest.mark.parametrize("benchmark", [False, True])
def test_answers_are_paired_by_prompt_and_sample(benchmark: bool) -> None:
    number = {"problem" if benchmark else "digest": lambda i, s: i, "sample": lambda i, s: s}
    before, after = (answers(of, **number) for of in ([(0, 0), (1, 0), (2, 0)], [(2, 0), (0, 0), (0, 1), (3, 0)]))
    assert pairs(before, after, benchmark=benchmark) == [("p0", "0.0", "0.0"), ("p2", "2.0", "2.0")]
    for a in (*before, *after):  # another prompt of the same text
        a["prompt"] = "p"
    assert pairs(before, after, benchmark=benchmark) == [("p", "0.0", "0.0"), ("p", "2.0", "2.0")]


@pytest.mark.parametrize("benchmark", [False, True])
def test_answers_of_earlier_versions_are_paired_if_all_prompts_are_the_same(benchmark: bool) -> None:
    before, after = answers([(0, 0), (1, 0)]), answers([(0, 0), (1, 0)], sample=lambda i, s: s)
    assert pairs(before, after, benchmark=benchmark) == [("p0", "0.0", "0.0"), ("p1", "1.0", "1.0")]
    for others in ([(0, 0), (0, 1)], [(0, 0), (0, 1), (1, 0), (1, 1)], [(0, 0)]):
        assert pairs(before, answers(others), benchmark=benchmark) == []


def test_the_table_says_of_how_many_answers_a_share_is(capsys: pytest.CaptureFixture[str]) -> None:
    content = {"name": "a", "steps": 1, "answers": [], "before": {"exact_match": 0.5}, "after": {"exact_match": 0.5}}
    for was, now, words in (
        (None, None, "exact match with known answers │"),
        (4.0, 4.0, "exact match with known answers (4 answers) │"),
        (4.0, 8.0, "exact match with known answers (4 answers before, 8 after) │"),
    ):
        for side, count in (("before", was), ("after", now)):
            content[side] = {"exact_match": 0.5} | ({} if count is None else {"exact_match_of": count})
        print_summary(content)
        assert words in capsys.readouterr().out
