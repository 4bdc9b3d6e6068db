"""Exact match: right, wrong, nothing, and what no time limit in Python could stop."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

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


@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_the_signals_that_stop_a_run_do_not_end_the_judge(stop):
    assert exact_match("19", "19")
    child = answers._JUDGE._child
    os.kill(child.pid, stop)
    assert exact_match("19", "19") and not exact_match("18", "19")
    assert answers._JUDGE._child is child


def test_a_stop_before_the_judge_is_ready_does_not_end_it(monkeypatch):
    judge = answers._Judge()
    started = subprocess.Popen

    def start(*args, **kw):
        child = started(*args, **kw)
        os.kill(child.pid, signal.SIGTERM)
        return child

    monkeypatch.setattr(subprocess, "Popen", start)
    assert judge.ask("19", "19")


def test_a_killed_judge_is_started_once_more_and_then_the_answer_is_wrong(monkeypatch, capsys):
    judge = answers._Judge()
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
        "from nemo_tropd.training import answers\n"
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
