"""Exact match: right, wrong, nothing, and what no time limit in Python could stop."""

import os
import random
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


MATH = [
    r"3\sqrt{13}", "6 - 5i", r"\text{Evelyn}", r"\left( 3, \frac{\pi}{2} \right)", "1,-2", r"(-\infty, 0)", "2k",
    r"\begin{pmatrix} -2 \\ -14 \\ -7 \end{pmatrix}", r"2^{100}", r"\frac 59", r"11,\! 111,\! 111,\! 100", "p - q",
    r"\text{(C)}", r"\text{June 20}", "6r^2-4r-24", r"10\%", r"\$18.90", "3, 5, 7", "52_8", r"90^\circ", "y = 2x + 3",
    r"\left(\frac{3}{5},\frac{8}{3}\right]", r"70 \text{ square units}", r"\sin^2 y", r"5\text{ cm}^2", "2:3",
    "3:30 pm", "2024-01-05", "192.168.0.1", "1e3", r"0.\overline{3}", "10 km", "60 m/s", "sqrt(2)", "3pi/4", "2**10",
    "5 and 6",
]  # fmt: skip


@pytest.mark.parametrize("answer", MATH)
def test_a_known_answer_itself_is_right(answer):
    assert exact_match(rf"The final answer is $\boxed{{{answer}}}$.", answer) is True
    assert exact_match(rf"\boxed{{{answer}}}", rf"It is $\boxed{{{answer}}}$, since it is.") is True


@pytest.mark.parametrize(
    ("boxed", "answer"),
    [
        ("3", r"3\sqrt{13}"), ("5", "6 - 5i"), ("0", r"(-\infty, 0)"), ("20", r"\text{June 20}"), ("6", "6r^2-4r-24"),
        ("-7", r"\begin{pmatrix} -2 \\ -14 \\ -7 \end{pmatrix}"), ("3", r"\left( 3, \frac{\pi}{2} \right)"),
        ("2", "2k"), ("2", "2^{100}"), ("59", r"\frac 59"), ("7", "3, 5, 7"), ("1", "1,-2"), ("(2,1)", "(1,2)"),
        ("(-2,7)", "[-2,7]"), ("52_7", "52_8"), (r"0.\overline{4}", r"0.\overline{3}"), ("100", r"11,\! 111,\! 100"),
        ("1e5", "1e3"), (r"10\text{ m}", "10 km"), ("60 m/s", "60 km/h"), (r"\text{west}", r"\text{east}"),
    ],
)  # fmt: skip
def test_a_part_of_a_known_answer_is_wrong(boxed, answer):
    assert exact_match(rf"$\boxed{{{boxed}}}$", answer) is False


@pytest.mark.parametrize(
    ("boxed", "answer"),
    [
        ("0.5", r"\dfrac{1}{2}"), (r"\frac{1}{2}", r"\dfrac{1}{2}"), ("p-q", "p - q"), ("-q+p", "p - q"),
        ("[-2, 7]", "[-2,7]"), (r"\sqrt{2}", "sqrt(2)"), (r"\pi", "pi"), ("(1, 2)", "(1,2)"), ("1024", "2**10"),
        (r"\frac{3\pi}{4}", "3*pi/4"), ("9i+6", "6+9i"), ("B,A", "A,B"), ("5, 6", "5 and 6"), ("18.90", r"\$18.90"),
        (r"3\frac{1}{2}", "3 1/2 cups"), ("3.5 cups", "3 1/2 cups"), (r"\frac{3}{4}\text{ cup}", "3/4 cup"),
        (r"60\text{ km per hour}", "60 km/h"), (r"3\sqrt2", r"3 \sqrt{2} \text{ cm}"), ("52", "52_8"),
        ("June 20", r"\text{June 20}"),
    ],
)  # fmt: skip
def test_an_equal_answer_is_right(boxed, answer):
    assert exact_match(rf"\boxed{{{boxed}}}", answer) is True


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("The answer is 3:45 pm", "3:30 pm"), ("The answer is 3:30 am", "3:30 pm"), ("#### 5:45", "#### 5:15"),
        ("The ratio is 2:1.", "2:3"), ("The answer is 2024-02-04", "2024-01-05"), ("The answer is 10 m", "10 km"),
        ("She walks 10 m in all", "10 km"), ("The answer is 12 oranges", "12 apples"), ("1789 BC", "1789 AD"),
        ("The answer is 5 July", "5 May"), ("July 5", "5 May"), ("192.168.0.7", "192.168.0.1"), ("1.2.9", "1.2.3"),
        ("100 Fahrenheit", "100 Celsius"), ("100 °F", "100 °C"), ("10 in", "10 cm"), ("20", "10-20"), ("9 km", "10 km"),
        ("The answer is 1/2 cup", "1/2 teaspoon"), ("The answer is 2 only", "2 and 4"), ("5 feet", "5 May 1990"),
    ],
)  # fmt: skip
def test_another_unit_time_or_date_is_wrong(response, answer):
    assert exact_match(response, answer) is False


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("It leaves at 3:30 PM.", "3:30 pm"), ("3:30", "3:30 pm"), ("3:30 p.m.", "3:30 pm"), ("2 : 3", "2:3"),
        ("There are 12 apples.", "12 apples"), ("She has 12 left.", "12 apples"), ("12 red apples", "12 apples"),
        ("So 12", "12 apples"), ("They met on 5 May.", "5 May"), ("May 5th", "5 May"), ("1789", "1789 AD"),
        ("It takes 10 kilometers", "10 km"), ("$10$ km", "10 km"), ("The roots are 3, 5, 7.", "3, 5, 7"),
        ("It is (1, 2).", "(1,2)"), ("it's 100 degrees Celsius", "100 Celsius"), ("The answer is x^2 + 1", "x^2+1"),
        ("The answer is 2024-01-05.", "2024-01-05"), ("60 mph", "60 miles per hour"), ("so 5 dollars", "$5"),
        ("Version 1.2.3.", "1.2.3"), ("10 in", "10 inches"), ("The answer is 10%", "10%"), ("4", "x = 4"),
    ],
)  # fmt: skip
def test_the_same_unit_or_none_is_right(response, answer):
    assert exact_match(response, answer) is True


def _drawn(draw: random.Random) -> tuple[str, str]:
    """A known answer in MATH's forms, and the same with one number or word changed."""
    a, b = draw.sample(range(11, 60), 2)
    form = draw.choice(
        [
            "%d", "-%d", r"\frac{%d}{61}", r"\dfrac{61}{%d}", r"%d\sqrt{67}", r"61 - %di", r"(%d, 61)", r"[-%d,\infty)",
            r"\left( 61, \frac{%d\pi}{67} \right)", r"\begin{pmatrix} 61 \\ %d \end{pmatrix}", "%dx^2 + 61x - 3",
            "x^{%d}+3", "61, %d, -67", r"%d\%%", r"%d \text{ cm}", r"\text{June %d}", "y = %dx + 1", "61_%d", "%d:61",
            r"(-\infty, %d) \cup (61, \infty)", r"%d^\circ", r"\$61.%d5",
        ]
    )  # fmt: skip
    return form % a, form % b


@pytest.mark.parametrize("seed", range(40))
def test_drawn_answers_are_right_and_changed_ones_wrong(seed):
    answer, other = _drawn(random.Random(seed))
    assert exact_match(rf"so $\boxed{{{answer}}}$", answer) is True
    assert exact_match(rf"so $\boxed{{{other}}}$", answer) is False


def test_any_of_several_answers_is_right():
    assert exact_match("so 4", ("4", "four")) and exact_match("Four.", ("4", "four"))
    assert exact_match("five", ("4", "four")) is False
    assert exact_match("five", ("4", "word " * 40)) is False


def test_an_answer_that_cannot_be_judged_is_neither_right_nor_wrong():
    assert exact_match("19", "a line\nand another") is None and exact_match("19", ("...", "word " * 40)) is None


def test_numbers_and_words_need_no_judge(monkeypatch):
    monkeypatch.setattr(answers._JUDGE, "ask", None)
    answers._known.cache_clear()
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
