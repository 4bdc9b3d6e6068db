"""The process behind answers.py: reads [response, answer] as JSON lines, writes [right, answer found].

Beyond the time limit of a question the kernel kills the process with SIGALRM; beyond the memory limit the verdict is
that nothing is right. It ends with its pipe, or soon after its owner, and with no signal that stops a run.
"""

import importlib
import json
import logging
import os
import random
import re
import resource
import select
import signal
import sys
from collections.abc import Callable
from importlib.util import find_spec
from types import ModuleType
from typing import Any

_NOTHING = (False, None)
_ONE = re.compile(r"\$[^$]+\$")
_PART = re.compile(r"\\(?:begin|end)\s*\{\w+\*?\}|\\[a-zA-Z]+|\b(?:and|or)\b|\d+|[a-zA-Z]")


def expressions() -> Callable[..., object]:
    """What judges by math-verify: (response, answer) -> (right, answer found)."""
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

    logging.getLogger("math_verify").setLevel(logging.CRITICAL)  # it warns at each call without a time limit
    targets = (LatexExtractionConfig(), ExprExtractionConfig())

    def complete(answer: str, gold: list[object]) -> bool:
        """math-verify passes over what it cannot parse, 52_8's base or a letter: whatever number or letter of a formula
        makes no difference is such a thing."""
        if isinstance(gold[0], str):
            return False
        for part in _PART.finditer(answer):
            if changed := _changed(part.group()):
                other = answer[: part.start()] + changed + answer[part.end() :]
                parsed = parse(other, extraction_config=targets, parsing_timeout=None)
                if parsed and _text(parsed) == _text(gold):
                    return False
        return True

    def judge(response: str | None, answer: str) -> tuple[bool, str | None]:
        """Is ``response`` right, and what is its answer (None: no expression)? Or for None, is all of ``answer`` one?

        math-verify's own time limits are off.
        """
        gold = parse(answer, extraction_config=targets, parsing_timeout=None)
        if response is None:
            return bool(gold) and (not _ONE.fullmatch(answer) or complete(answer, gold)), None
        found = parse(response, extraction_config=targets, parsing_timeout=None)
        right = bool(gold and found) and verify(gold, found, timeout_seconds=None)
        return right, _text(found) if found else None

    return judge


def _changed(part: str) -> str | None:
    """Another number or letter; None for a command or a conjunction."""
    if part[0].isdigit():
        return str(int(part[:1]) % 9 + 1) + part[1:]
    return {"x": "y"}.get(part, "x") if len(part) == 1 else None


def _text(found: list[object]) -> str:
    """Equal answers in other forms mostly have one text: that of the expression, not of what was said."""
    try:
        return str(found[0])
    except ValueError:  # a number of too many digits
        return str(found[-1])


def ifbench() -> Callable[..., object]:
    """What judges by IFBench's own checks: a verdict for each instruction; without a question, the data it lacks."""
    spacy = ModuleType("spacy.cli")
    spacy.download = lambda *_: None  # type: ignore[attr-defined]
    # At import the package downloads a model that none of its checks uses.
    sys.modules["spacy.cli"] = sys.modules["spacy"] = spacy
    data = ("tokenizers/punkt_tab", "corpora/stopwords", "taggers/averaged_perceptron_tagger_eng")
    return _instructions("ifbench.evaluation_lib", lambda response, prompt: {prompt: response}, data)


def ifeval() -> Callable[..., object]:
    """As ``ifbench``, by the checks of lm-eval's IFEval."""
    spec = find_spec("lm_eval")
    assert spec is not None and spec.submodule_search_locations is not None  # graders/instructions.py has looked
    for name in ("lm_eval", "lm_eval.tasks"):  # which import every framework that the package knows
        module = sys.modules[name] = ModuleType(name)
        module.__path__ = [os.path.join(folder, *name.split(".")[1:]) for folder in spec.submodule_search_locations]
    import langdetect

    langdetect.DetectorFactory.seed = 0
    return _instructions("lm_eval.tasks.ifeval.utils", lambda response, prompt: response, ("tokenizers/punkt_tab",))


def _instructions(library: str, answered: Callable[[str, str], Any], data: tuple[str, ...]) -> Callable[..., object]:
    import nltk

    nltk.download = lambda *_, **__: True  # checks ask for their data again each time
    package = importlib.import_module(library)

    def judge(*question: Any) -> list[Any]:
        if not question:
            return [name.rpartition("/")[2] for name in data if not _found(nltk, name)]
        mode, prompt, names, arguments, response = question
        given = [{k: v for k, v in some.items() if v is not None} for some in arguments]
        random.seed(0)
        check = getattr(package, f"test_instruction_following_{mode}")
        output = check(package.InputExample(0, names, prompt, given), answered(response, prompt))
        return [bool(followed) for followed in output.follow_instruction_list]

    return judge


def _found(nltk: Any, name: str) -> bool:
    try:
        nltk.data.find(name)
    except LookupError:
        return False
    return True


def main() -> None:
    """Judge what comes on standard input; arguments: seconds, bytes, the process that asks, and what judges."""
    seconds, memory, owner = (int(argument) for argument in sys.argv[1:4])
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    for stop in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(stop, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())  # answers.py had them blocked until here
    replies, sys.stdout = sys.stdout, sys.stderr  # packages print
    judge = {"expressions": expressions, "ifbench": ifbench, "ifeval": ifeval}[sys.argv[4]]()
    print("ready", file=replies, flush=True)
    while True:
        # A process that the owner has forked may hold the pipe open after the owner is gone.
        while not select.select([sys.stdin], [], [], 1.0)[0]:
            if os.getppid() != owner:
                return
        line = sys.stdin.readline()
        if not line:
            return
        question = json.loads(line)
        signal.alarm(seconds)
        try:
            verdict = judge(*question)
        except (MemoryError, RecursionError):
            verdict = _NOTHING
        signal.alarm(0)
        print(json.dumps(verdict), file=replies, flush=True)


if __name__ == "__main__":
    main()
