"""Graders: right answers in many forms are right, wrong ones wrong, hostile ones bounded; bad settings are named."""

import json

import pytest

from nemo_tropd.config import ConfigError
from nemo_tropd.evaluation import graders
from nemo_tropd.evaluation.graders import Verdict

MATH = {"problem": "question", "answer": "solution"}


def math(prompt="{problem}"):
    return graders.build("math", prompt, MATH, {})


def asked(grader, row, seed=0):
    """The user's turn and the reference, which must survive a JSON file."""
    text, reference = grader.question(row, seed)
    return text, json.loads(json.dumps(reference))


def test_a_prompts_places_are_filled_and_other_braces_are_kept():
    text, _ = asked(math("{problem}\nAnswer within \\boxed{} or \\boxed{answer}."), {"question": "{n} + 1?", "solution": 3})
    assert text == "{n} + 1?\nAnswer within \\boxed{} or \\boxed{answer}."


@pytest.mark.parametrize(
    ("name", "prompt", "columns", "options", "message"),
    [
        ("maths", "{problem}", MATH, {}, "grader = 'maths': there is no such grader; choose one of math"),
        ("math", "{question}", MATH, {}, "{question} is not among its possible places: {problem}"),
        ("math", "{answer}", MATH, {}, "{answer} is not among its possible places"),
        ("math", "{problem}", {"problem": "p"}, {}, "columns.answer = None: name the column"),
        ("math", "{problem}", {**MATH, "hint": "h"}, {}, "columns.hint = 'h': this grader knows only problem, answer"),
        ("math", "{problem}", MATH, {"shuffle": True}, "options.shuffle = True: this grader knows only none"),
    ],
)
def test_bad_settings_are_named(name, prompt, columns, options, message):
    with pytest.raises(ConfigError) as error:
        graders.build(name, prompt, columns, options)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "1 + 1?"}, "columns.answer = 'solution': a row has nothing there; its columns: question"),
        ({"question": "?", "solution": "word " * 40}, "neither an expression nor a line of text"),
    ],
)
def test_a_row_that_cannot_be_asked_is_named(row, message):
    with pytest.raises(ConfigError) as error:
        math().question(row, 0)
    assert message in str(error.value)


def test_expressions():
    _, reference = asked(math(), {"question": "?", "solution": r"\frac{1}{2}"})
    right = [r"\boxed{\frac12}", "so 0.5", "$1/2$", "I thought 3.</think>It is 1/2.", "<think>3</think>\n#### 0.5"]
    wrong = ["2", r"\boxed{-\frac12}", r"1/2</think>\boxed{2}"]
    nothing = ["", "no idea", "<think>it is 1/2", r"</think> a <think>\boxed{\frac12}", r"\boxed{9^{9^{9^9}}}"]
    verdicts = math().grade([(reference, response) for response in right + wrong + nothing])
    assert [v.correct for v in verdicts] == [True] * 5 + [False] * 8
    assert [v.answer is None for v in verdicts] == [False] * 8 + [True] * 5
    assert verdicts[5] == Verdict(False, "2")


def test_equal_expressions_vote_for_one_answer():
    _, reference = asked(math(), {"question": "?", "solution": 25})
    verdicts = math().grade([(reference, r) for r in (r"\boxed{025}", "25", "$25$", "it is 25.", r"\boxed{5^2}")])
    assert [v.correct for v in verdicts] == [True] * 5
    assert {v.answer for v in verdicts[:4]} == {"25"}
