"""Exact match: right, wrong, nothing, and what no time limit in Python could stop."""

import threading

import pytest

from nemo_tropd.training import answers
from nemo_tropd.training.answers import AnswerError, exact_match


@pytest.mark.parametrize(
    "response",
    [
        "19",
        "12 + 7 = 19",
        "The answer is 19.",
        "18 would be wrong, so she has 19 pens.",
        "#### 19",
        "**19**",
        r"It is $12 + 7 = 19$.",
        r"\boxed{19} is right, not 4",
        "19.0",
        "$19",
    ],
)
def test_right_answers(response):
    assert exact_match(response, "19")


@pytest.mark.parametrize(
    "response",
    [
        "",
        "I do not know.",
        "12 + 7 = 9",
        "-19",
        "190",
        "1,900",
        "1.9",
        "19 pens, then 4",
        r"\boxed{4} not 19",
        "(" * 3000,
    ],
)
def test_wrong_answers(response):
    assert not exact_match(response, "19")


def test_equal_values_in_other_forms():
    assert exact_match("one half, 0.5", r"\frac{1}{2}")
    assert exact_match("it costs 1,234,567 dollars", "1234567")
    assert exact_match("so 36", "6 times 6 makes it\n#### 36")
    assert not exact_match("so 6", "6 times 6 makes it\n#### 36")


def test_a_known_answer_without_value_is_an_error():
    with pytest.raises(AnswerError, match="'plenty' is not a number"):
        exact_match("19", "plenty")


@pytest.mark.timeout(60)
@pytest.mark.parametrize("response", [r"$9^{9^{9^9}}$", r"\boxed{99999999!}"])
def test_an_endless_computation_is_wrong_and_harms_nothing(response, monkeypatch):
    monkeypatch.setattr(answers, "TIME_LIMIT_S", 1)
    monkeypatch.setattr(answers, "_JUDGE", answers._Judge())
    assert not exact_match(response, "19")
    assert exact_match("19", "19")


def test_threads_ask_at_once():
    wrong: list[int] = []

    def ask(n: int) -> None:
        if not exact_match(f"it is {n}", str(n)) or exact_match(f"it is {n}", str(n + 1)):
            wrong.append(n)

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(12)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong


def test_a_judge_that_cannot_run_is_an_error(monkeypatch):
    monkeypatch.setattr(answers, "_JUDGE", answers._Judge())
    monkeypatch.setattr(answers, "MEMORY_LIMIT_BYTES", "nonsense")
    with pytest.raises(AnswerError, match="exited with code 1"):
        exact_match("19", "19")
