"""Programs as models write them: where their code is in a response, and what LiveCodeBench's own runner allows."""

import json

import pytest

from nemo_tropd.config import ConfigError
from nemo_tropd.evaluation import graders
from nemo_tropd.evaluation.graders.blocks import blocks, without_prose

HEAD = 'from typing import List\n\n\ndef total(a: List[int]) -> int:\n    """The sum."""\n'
TASK = {"prompt": HEAD, "test": "def check(f):\n    assert f([1, 2]) == 3\n", "entry_point": "total"}
HUMANEVAL = {"problem": "prompt", "test": "test", "entry_point": "entry_point"}
WHOLE = "def total(a: List[int]) -> int:\n    return sum(a)\n"
LIVECODEBENCH = {
    "problem": "question", "starter_code": "starter", "public_tests": "public", "private_tests": "private",
    "metadata": "metadata",
}  # fmt: skip


def humaneval(*responses):
    grader = graders.build("humaneval", "{problem}", HUMANEVAL, {})
    return grader.grade([(grader.question(TASK, 0)[1], response) for response in responses])


def livecodebench(tests, metadata="{}", private="[]"):
    grader = graders.build("livecodebench", "{problem}\n{format}", LIVECODEBENCH, {})
    public = tests if isinstance(tests, str) else json.dumps(tests)
    row = {"question": "?", "starter": "", "public": public, "private": private, "metadata": metadata}
    return grader, grader.question(row, 0)[1]


def test_blocks_are_found_as_they_are_written():
    for opening in ("```", "```python", "```Python", "``` py", "```python title='x.py'", "````py", "~~~python"):
        fence = opening[: opening.rindex(opening[0]) + 1]
        for closing in (fence, f"{fence}  ", f"{fence} which adds.", f"  {fence}"):
            assert blocks(f"Thus:\r\n{opening}\r\nx = 1\r\n{closing}\r\nDone") == [("x = 1\n", True, False)]
    assert blocks("1. So:\n   ```\n   if a:\n       b\n  c\n   ```") == [("if a:\n    b\nc\n", True, False)]
    assert blocks("```\nreturn a```\n") == [("return a\n", True, True)]
    assert blocks("````\n```\n````\n") == [("```\n", True, True)]
    assert blocks("```py\na\n```py\nb") == [("a\n", False, True), ("b\n", False, False)]
    assert blocks("```py in a line```\nso ```") == [] and blocks("") == []


def test_a_function_is_found_wherever_it_is():
    fenced = [
        f"```python\nfrom __future__ import annotations\n{WHOLE}```",
        f"```python\n'''Adds.'''\nfrom __future__ import annotations\n{WHOLE}```",
        f"So:\n```python\n{WHOLE}", f"```python\n{WHOLE}\nThis is right, isn't it?", f"```\r\n{WHOLE}```\r\n",
        f"First\n```\n1 / 0\n```\nand\n```python\n{WHOLE}", f"```python\n{WHOLE}``` as asked", "```\n    return sum(a)",
    ]  # fmt: skip
    bare = [
        f"{WHOLE}\nThis works, since it's the sum:\n```\n3\n```", f"Sure!\n\n{WHOLE}\nDone", f"{WHOLE}\nExplanation\n",
        f"Easy\nimport math\n\ndef same(x):\n    return math.floor(x)\n\n{WHOLE[:-1]} + same(0)\nThat's it.",
        f"    return sum(a)\n\n{WHOLE.replace('sum(a)', '0')}",
    ]  # fmt: skip
    ends = [
        f"```python\n{WHOLE}import atexit\natexit.register(lambda: print('bye'))\n```",
        f"```python\n{WHOLE}import sys, io\nsys.stdout = io.StringIO()\n```",
    ]
    right = [*fenced, *bare, *ends]
    wrong = [
        f"```python\n{WHOLE}\nThis is right.\n```",  # a closed block is all code
        "def total(a):\n    x = 0\n    for x in a", "def total(a) adds.",
        "```python\ndef total(a):\n    return (sum(a)",
        f"{WHOLE}\nassert total([1]) == 2\nThat is all.", "total = 3\ndef total(a):\nprose",
    ]  # fmt: skip
    verdicts = humaneval(*right, *wrong)
    assert [v.correct for v in verdicts] == [True] * len(right) + [False] * len(wrong), verdicts


def test_prose_is_cut_at_once_and_to_the_line():
    assert without_prose("a\nfrom x import y\ndef f(): pass\nThis is it.", "f") == "from x import y\ndef f(): pass\n"
    assert without_prose("It's\ndef f():\n    return (\nso", "f") == "It's\ndef f():\n    return (\nso"
    prose = "It's a line (of many.\n" * 20_000
    assert without_prose(f"def f(): pass\n{prose}", "f") == "def f(): pass\n"


def stdin(output, given=""):
    return [{"input": given, "output": output, "testtype": "stdin"}]


def call(output, given="1"):
    return [{"input": given, "output": output, "testtype": "functional"}]


@pytest.mark.parametrize(
    ("tests", "program", "correct"),
    [
        (stdin("ab " * 700_000), "print('ab ' * 700_000)", True),
        (stdin("1"), "print('1' * 1_000_000)", False),
        (stdin("5000"), "print(len(str(10**4999)))", True),
        (stdin("1" + "0" * 4999, "1" + "0" * 4999), "print(int(input()))", True),
        (call(json.dumps("é" * 400_000)), "def f(a): return 'é' * 400_000", True),
        (call("1" + "0" * 4999, "1" + "0" * 4999), "def f(a): return a", True),
        (call("1" + "0" * 4999), "def f(a): return 10**4999 + 1", False),
        (call("[1, 2.5, true]"), "import numpy as np\ndef f(a): return [np.int64(1), np.float64(2.5), np.True_]", True),
        (call("[1]"), "import numpy as np\ndef f(a): return [np.int64(2)]", False),
    ],
)
def test_programs_may_do_what_they_may_there(tests, program, correct):
    grader, reference = livecodebench(tests, '{"func_name": "f"}')
    verdict = grader.grade([(reference, f"```python\n{program}\n```")])[0]
    assert verdict.correct is correct, verdict


def test_a_program_that_prints_without_end_is_stopped():
    grader, reference = livecodebench(stdin("1"))
    verdict = grader.grade([(reference, "```python\nwhile True: print('a' * 1000)\n```")])[0]
    assert verdict == (False, verdict.answer, "test 1: over its limit: output")


@pytest.mark.parametrize("metadata", ["[]", "", "no JSON", "[" * 100_000, '{"func_name": 5}', '{"func_name": ""}', 3])
def test_metadata_that_says_nothing_is_named(metadata):
    with pytest.raises(ConfigError, match=r"columns\.metadata = .* give JSON such as \{\}"):
        livecodebench(stdin("1"), metadata)


def test_calls_need_the_name_of_a_function():
    with pytest.raises(ConfigError, match=r"columns\.metadata = '\{\}': its tests call a func_name"):
        livecodebench(call("1"))
    with pytest.raises(ConfigError, match="its tests call a func_name"):
        livecodebench(stdin("1"), {}, json.dumps(call("1")))


@pytest.mark.parametrize(
    "tests",
    [
        [1], ["input output testtype"], [{"input": "", "output": 5, "testtype": "stdin"}], "[" * 100_000,
        [{"input": None, "output": "", "testtype": "stdin"}], [{"input": "", "output": "", "testtype": "other"}],
    ],
)  # fmt: skip
def test_tests_of_another_form_are_named(tests):
    with pytest.raises(ConfigError, match=r"columns\.public_tests"):
        livecodebench(tests)
