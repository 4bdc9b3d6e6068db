"""Exact match: right, wrong, nothing, and what no time limit in Python could stop."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from nemo_tropd.evaluation import answers
from nemo_tropd.evaluation.answers import AnswerError, exact_match, judged_as


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


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        ("19", "expression"), ("-2.5", "expression"), (r"$\frac{1}{2}$", "expression"), ("1,234", "expression"),
        ("12 cm", "expression"), ("x = 4", "expression"), ("so\n#### 36", "expression"), (r"\boxed{7}", "expression"),
        ("plenty", "text"), ("Paris", "text"), ("B", "text"), ("(C)", "text"), ("True", "text"), ("Apollo 11", "text"),
        ("北京", "text"), ("C++", "text"), ("they did\n#### New York", "text"),
        ("word " * 40, None), ("a line\nand another", None), ("...", None), ("####", None),
    ],
)  # fmt: skip
def test_a_known_answer_is_judged_as_what_it_is(answer, kind):
    assert judged_as(answer) == kind


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("Paris", "paris"),
        ("It is in France.\nThe answer is Paris.", "Paris"),
        ("**Answer:** Paris", "Paris"),
        ("The correct answer is: **Paris**.", " Paris "),
        (r"\boxed{\text{Paris}} it is, not Rome", "Paris"),
        ("The answer is Paris. It lies on the Seine.", "Paris"),
        ("I think\n#### new  york", "so\n#### New York"),
        ("The answer is (B).", "B"),
        ("Answer: B) Paris", "B"),
        (r"\boxed{B}", "(B)"),
        ("**b**", "B"),
        ("Answer: C++", "C++"),
        ("the answer is Rome\nno: the answer is Paris", "Paris"),
        ("True", "True"),
        ("It was\nApollo 11", "Apollo 11"),
    ],
)
def test_right_texts(response, answer):
    assert exact_match(response, answer) is True


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("", "Paris"),
        ("Paris is nice, but the answer is Rome", "Paris"),
        ("Paris, Texas", "Paris"),
        ("not Paris", "Paris"),
        ("A good question", "A"),
        ("Answer: C", "C++"),
        ("11", "Apollo 11"),
        ("\\boxed{Paris", "Rome"),
        ("Paris\nor not", "Paris"),
    ],
)
def test_wrong_texts(response, answer):
    assert exact_match(response, answer) is False


def test_any_of_several_answers_is_right():
    assert exact_match("so 4", ("4", "four")) and exact_match("Four.", ("4", "four"))
    assert exact_match("five", ("4", "four")) is False
    assert exact_match("five", ("4", "word " * 40)) is False


def test_an_answer_that_cannot_be_judged_is_neither_right_nor_wrong():
    assert exact_match("19", "a line\nand another") is None and exact_match("19", ("...", "word " * 40)) is None


def test_numbers_and_words_need_no_judge(monkeypatch):
    monkeypatch.setattr(answers._JUDGE, "ask", None)
    judged_as.cache_clear()
    assert judged_as("19") == "expression" and judged_as("plenty") == "text"


@pytest.mark.timeout(60)
@pytest.mark.parametrize("response", [r"$9^{9^{9^9}}$", r"\boxed{99999999!}"])
def test_an_endless_computation_is_wrong_and_harms_nothing(response, monkeypatch):
    monkeypatch.setattr(answers, "TIME_LIMIT_S", 1)
    monkeypatch.setattr(answers, "_JUDGE", answers.Judge())
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
    monkeypatch.setattr(answers, "_JUDGE", answers.Judge())
    monkeypatch.setattr(answers, "MEMORY_LIMIT_BYTES", "nonsense")
    with pytest.raises(AnswerError, match="exited with code 1"):
        exact_match("19", "19")


@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_the_signals_that_stop_a_run_do_not_end_the_judge(stop):
    assert exact_match("19", "19")
    child = answers._JUDGE._child
    os.kill(child.pid, stop)
    assert exact_match("19", "19") and not exact_match("18", "19")
    assert answers._JUDGE._child is child


def test_a_stop_before_the_judge_is_ready_does_not_end_it(monkeypatch):
    judge = answers.Judge()
    started = subprocess.Popen

    def start(*args, **kw):
        child = started(*args, **kw)
        os.kill(child.pid, signal.SIGTERM)
        return child

    monkeypatch.setattr(subprocess, "Popen", start)
    assert judge.ask("19", "19")


def test_a_killed_judge_is_started_once_more_and_then_the_answer_is_wrong(monkeypatch, capsys):
    judge = answers.Judge()
    assert judge.ask("19", "19")
    judge._child.kill()
    assert judge.ask("19", "19")
    start = judge._start

    def start_dying():
        child = start()
        child.kill()
        child.wait()
        return child

    monkeypatch.setattr(judge, "_start", start_dying)
    judge._child.kill()
    assert not judge.ask("19", "19")
    assert "counts as wrong: the process that judges answers died twice (code -9)" in capsys.readouterr().err
    monkeypatch.undo()
    assert judge.ask("19", "19")


def test_the_judge_ends_with_its_owner_though_another_process_holds_its_pipe():
    """The owner is killed; a child that it forked lives on with all its open files."""
    script = (
        "import os, time\n"
        "from nemo_tropd.evaluation import answers\n"
        "assert answers.exact_match('19', '19')\n"
        "print(answers._JUDGE._child.pid, os.fork() or time.sleep(60), flush=True)\n"
        "time.sleep(60)\n"
    )
    owner = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    judge, forked = map(int, owner.stdout.readline().split())
    try:
        owner.kill()
        deadline = time.monotonic() + 20
        while Path(f"/proc/{judge}/cmdline").exists() and Path(f"/proc/{judge}/cmdline").read_bytes():
            assert time.monotonic() < deadline, "the judge outlived its owner"
            time.sleep(0.1)
        assert Path(f"/proc/{forked}").exists()
    finally:
        os.kill(forked, signal.SIGKILL)
        owner.wait()
