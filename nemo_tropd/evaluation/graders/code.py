"""Programs: HumanEval's checks of a function, LiveCodeBench's tests by standard input and by calls; all sandboxed.

A program sees its inputs alone. What it should have answered stays in this process, save for HumanEval, whose checks
are Python and run beside the function they check.
"""

import base64
import hashlib
import inspect
import json
import os
import pickletools
import re
import secrets
import zlib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from decimal import Decimal, InvalidOperation
from functools import lru_cache
from typing import Any, NamedTuple

from nemo_tropd.config import ConfigError
from nemo_tropd.evaluation.graders.blocks import blocks, without_prose
from nemo_tropd.evaluation.graders.contract import Form, Verdict, said, settings
from nemo_tropd.evaluation.sandbox import Limits, Outcome, SandboxError, missing, run

# where a base model that completes a function goes on to something else
_NEXT = re.compile(r"\n(?:class |def |#|@|if |print|assert|```|~~~|<)")
_MODULES = [
    "string",
    "re",
    "datetime",
    "collections",
    "heapq",
    "bisect",
    "copy",
    "math",
    "random",
    "statistics",
    "itertools",
    "functools",
    "operator",
    "io",
    "sys",
    "json",
]
_DIGITS = 50_000  # of integers as text, in LiveCodeBench's own runner; Python's own limit is 4300
# what that runner has imported before a program runs
_PRELUDE = "\n".join(
    [f"from {m} import *" for m in [*_MODULES, "builtins", "typing"]]
    + [f"import {m}" for m in _MODULES]
    + ["sys.setrecursionlimit(50000)", f"sys.set_int_max_str_digits({_DIGITS})"]
)
_TEXTS = {"BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "UNICODE"}
_PICKLED = _TEXTS | {"PROTO", "FRAME", "MEMOIZE", "BINPUT", "LONG_BINPUT", "PUT", "STOP"}
_TEST = "{input, output, testtype}: texts, and stdin or functional"
_LARGEST_TESTS = 1 << 30  # bytes


class _Program(NamedTuple):
    """``before``: what runs before the code, in the same module; the code's own imports from the future stay first.
    ``amid_prose``: only a part of the code may be code."""

    code: str
    before: str = ""
    amid_prose: bool = False


class _CodeGrader:
    """Options ``time_limit_s`` (of processor time, for each test, in whole seconds), ``memory_gib`` and ``workers``,
    programs at once (by default one for each processor)."""

    def __init__(self, options: Mapping[str, object], **defaults: Any) -> None:
        chosen = settings(options, workers=len(os.sched_getaffinity(0)), **defaults)
        try:
            missing()
        except SandboxError as error:
            raise ConfigError("grader", type(self).__name__, f"no program can be run here: {error}") from error
        seconds, self._workers = chosen["time_limit_s"], chosen["workers"]
        # A busy machine gives a program its processor time later.
        wall, memory = 3 * seconds + 5, int(chosen["memory_gib"] * (1 << 30))
        self._limits = Limits(seconds=wall, cpu_seconds=max(1, round(seconds)), memory_bytes=memory)

    def grade(self, items: Sequence[tuple[object, str]]) -> list[Verdict]:
        with ThreadPoolExecutor(self._workers) as pool:
            return list(pool.map(lambda item: self._verdict(item[0], said(item[1])), items))

    def _verdict(self, reference: Any, response: str) -> Verdict:
        program = self._program(reference, response)
        if program is None or not program.code.strip():
            return Verdict(False, None, "no program")
        wrong = self._wrong(reference, program)
        # Samples vote for one program only when they are the same to the letter.
        digest = hashlib.sha256(program.code.strip().encode(errors="replace")).hexdigest()[:12]
        return Verdict(wrong is None, digest, wrong or "")

    def _program(self, reference: Any, response: str) -> _Program | None:
        raise NotImplementedError

    def _wrong(self, reference: Any, program: _Program) -> str | None:
        raise NotImplementedError


class HumanEvalGrader(_CodeGrader):
    """Columns: ``problem``, a function's head, ``test`` and ``entry_point``. The program is the response's last block
    of code, or one with the function, closed or not; or the function amid prose; else the response completes it."""

    def __init__(self, prompt: str, columns: Mapping[str, str], options: Mapping[str, object]) -> None:
        self._form = Form(prompt, columns, ("problem", "test", "entry_point"), hidden=("test",))
        super().__init__(options, time_limit_s=3.0, memory_gib=1.0)

    def question(self, row: Mapping[str, object], sample_seed: int) -> tuple[str, object]:
        return self._form.text(row), [str(self._form.value(row, name)) for name in ("problem", "test", "entry_point")]

    def _program(self, reference: Any, response: str) -> _Program | None:
        head, _, name = reference
        defines = re.compile(rf"^(?:async )?def {re.escape(name)}\b", re.MULTILINE)
        response, found = response.replace("\r\n", "\n"), blocks(response)
        # its imports and helpers, without the head itself
        before = head[: max((match.start() for match in defines.finditer(head)), default=0)]
        for closed in (True, False):
            if defining := [block.text for block in found if block.closed is closed and defines.search(block.text)]:
                return _Program(defining[-1], before, amid_prose=not closed)
        if defines.search(response) and not response.lstrip("\n")[:1].isspace():  # what begins indented goes on
            return _Program(response, before, amid_prose=True)
        bodies = [block.text for block in found if block.closed or block.first]
        text = bodies[-1] if bodies else response
        return _Program(head + _NEXT.split("\n" + text, maxsplit=1)[0][1:] + "\n") if text.strip() else None

    def _wrong(self, reference: Any, program: _Program) -> str | None:
        _, test, name = reference
        mark = secrets.token_hex(8)  # a program that ends early does not print it
        code = repr(program.code)
        if program.amid_prose:
            code = f"module.__dict__.pop('without_prose')({code}, {name!r})"
        cut = inspect.getsource(without_prose) if program.amid_prose else ""
        text = (
            # the program may close, or put another in place of, what print writes to
            f"import os\nreplies = os.dup(1)\n{_module(cut, code, program.before)}"
            f"exec({test!r}, module.__dict__)\nexec('check({name})', module.__dict__)\n"
            f"os.write(replies, b'\\n{mark}\\n')\n"
        )
        outcome = run(text, limits=self._limits)
        passed = outcome.status == "ended" and outcome.code == 0 and f"\n{mark}\n" in outcome.stdout
        return None if passed else _why(outcome) or "the checks were not reached"


class LiveCodeBenchGrader(_CodeGrader):
    """Columns, in the form of livecodebench/code_generation_lite: ``problem``, ``starter_code``, ``public_tests``,
    ``private_tests`` and ``metadata``. The prompt's places: {problem}, and {format}, how to answer. The program is the
    response's last block of code that is closed, as there. A test by standard input compares lines, or the numbers in
    them."""

    def __init__(self, prompt: str, columns: Mapping[str, str], options: Mapping[str, object]) -> None:
        secret = ("public_tests", "private_tests", "metadata")
        needed = ("problem", "starter_code", *secret)
        self._form = Form(prompt, columns, needed, hidden=secret, made=("format",))
        super().__init__(options, time_limit_s=6.0, memory_gib=4.0)

    def question(self, row: Mapping[str, object], sample_seed: int) -> tuple[str, object]:
        starter = str(row.get(self._form.column("starter_code")) or "")
        how = (
            "You will use the following starter code to write the solution to the problem and enclose your code within "
            f"delimiters.\n```python\n{starter}\n```"
            if starter
            else "Read the inputs from stdin solve the problem and write the answer to stdout (do not directly test on "
            "the sample inputs). Enclose your code within delimiters as follows. Ensure that when the python program "
            "runs, it reads the inputs, runs the algorithm and writes output to STDOUT.\n```python\n# YOUR CODE HERE\n"
            "```"
        )
        tests = [self._form.value(row, "public_tests"), self._form.value(row, "private_tests")]
        tests = [text if isinstance(text, str) else json.dumps(text) for text in tests]
        _tests(*tests)
        name = self._function(self._form.value(row, "metadata"))
        if name is None and any(test["testtype"] == "functional" for test in _tests(*tests)):
            raise ConfigError("columns.metadata", row[self._form.column("metadata")], "its tests call a func_name")
        return self._form.text(row, format=how), [*tests, name]

    @staticmethod
    def _function(metadata: object) -> str | None:
        try:
            found = json.loads(metadata) if isinstance(metadata, str) else metadata
        except (ValueError, RecursionError):
            found = None
        name = found.get("func_name") if isinstance(found, Mapping) else ""
        if name is not None and not (isinstance(name, str) and name.isidentifier()):
            raise ConfigError("columns.metadata", metadata, 'give JSON such as {}, or {"func_name": "solve"}')
        return name

    def _program(self, reference: Any, response: str) -> _Program | None:
        closed = [block.text for block in blocks(response) if block.closed]
        return _Program(closed[-1]) if closed else None

    def _wrong(self, reference: Any, program: _Program) -> str | None:
        public, private, name = reference
        code = program.code
        for i, test in enumerate(_tests(public, private)):
            calls = test["testtype"] != "stdin"
            # twice what is right, each character as long as JSON writes it
            room = max(self._limits.output_bytes, 2 * len(json.dumps(test["output"])))
            limits = replace(self._limits, output_bytes=room)
            outcome = run(_call(code, name) if calls else _script(code), test["input"], limits)
            why = _why(outcome)
            if why is None and not (_same_value if calls else _same_lines)(outcome.stdout, test["output"]):
                why = "wrong output"
            if why is not None:
                return f"test {i + 1}: {why}"
        return None


def _why(outcome: Outcome) -> str | None:
    """Why a program has failed, whatever it printed."""
    if outcome.status != "ended":
        return f"over its limit: {outcome.status}" if outcome.status != "killed" else "killed"
    return (
        None if outcome.code == 0 else (outcome.stderr.strip().splitlines() or [f"exit code {outcome.code}"])[-1][:200]
    )


def _module(prelude: str, code: str, before: str = "") -> str:
    """A program that runs ``code``, an expression, as a module, whose ``if __name__ == "__main__"`` is not its own."""
    return (
        "import sys, types\nmodule = sys.modules['solution'] = types.ModuleType('solution')\n"
        f"exec({prelude!r}, module.__dict__)\ncode = {code}\n"
        f"exec({before!r}, module.__dict__)\n"
        "exec(compile(code, 'solution.py', 'exec'), module.__dict__)\n"
    )


def _script(code: str) -> str:
    return f"exec({_PRELUDE!r})\nexec(compile({code!r}, 'solution.py', 'exec'))\n"


def _call(code: str, name: str) -> str:
    """Prints the result of the call as JSON, and nothing that the code itself prints."""
    return (
        f"import json, os, sys\nsys.set_int_max_str_digits({_DIGITS})\n"
        "arguments = [json.loads(line) for line in sys.stdin.read().split('\\n') if line]\n"
        "replies = os.fdopen(os.dup(1), 'w')\nos.dup2(2, 1)\n"
        f"{_module(_PRELUDE, repr(code))}"
        "owner = module.Solution() if hasattr(module, 'Solution') else module\n"
        f"result = json.dumps(getattr(owner, {name!r})(*arguments), default=lambda value: value.item())\n"  # NumPy's
        "print(result, file=replies, flush=True)\n"
    )


def _same_value(printed: str, expected: str) -> bool:
    try:
        # Decimal, since an int of so many digits is not read here
        return bool(json.loads(printed, parse_int=Decimal) == json.loads(expected, parse_int=Decimal))
    except (ValueError, RecursionError):
        return False


def _same_lines(printed: str, expected: str) -> bool:
    ours, theirs = ([line.strip() for line in text.strip().split("\n")] for text in (printed, expected))
    return len(ours) == len(theirs) and all(a == b or _same_numbers(a, b) for a, b in zip(ours, theirs, strict=True))


def _same_numbers(ours: str, theirs: str) -> bool:
    try:
        return [Decimal(word) for word in ours.split()] == [Decimal(word) for word in theirs.split()]
    except InvalidOperation:
        return False


@lru_cache(maxsize=4)
def _tests(public: str, private: str) -> list[dict[str, str]]:
    tests: list[dict[str, str]] = []
    for name, text in (("public_tests", public), ("private_tests", private)):
        try:
            found = json.loads(text)
        except (ValueError, RecursionError):
            found = _unpacked(f"columns.{name}", text)
        if not isinstance(found, list) or not all(map(_is_test, found)):
            raise ConfigError(f"columns.{name}", text[:80], f"give a JSON list of {_TEST}")
        tests += found
    if not tests:
        raise ConfigError("columns.public_tests", public[:80], "there is no test at all")
    return tests


def _is_test(found: object) -> bool:
    return (
        isinstance(found, dict)
        and all(isinstance(found.get(key), str) for key in ("input", "output"))
        and found.get("testtype") in ("stdin", "functional")
    )


def _unpacked(key: str, text: str) -> object:
    """The JSON in base64 of zlib of a pickled text; it is not unpickled, since that would run what a stranger wrote."""
    try:
        unpacker = zlib.decompressobj()
        pickled = unpacker.decompress(base64.b64decode(text, validate=True), _LARGEST_TESTS)
        if not unpacker.eof:
            raise ValueError(f"incomplete, or more than {_LARGEST_TESTS} bytes")
        codes = [(code.name, argument) for code, argument, _ in pickletools.genops(pickled)]
        texts = [argument for name, argument in codes if name in _TEXTS]
        if len(texts) != 1 or not {name for name, _ in codes} <= _PICKLED:
            raise ValueError("the pickle holds something else than one text")
        return json.loads(str(texts[0]))
    except (zlib.error, ValueError, RecursionError) as error:
        raise ConfigError(key, text[:80], f"neither JSON nor base64 of zlib of a pickle of JSON: {error}") from error
