"""The process behind answers.py: reads [response, answer] as JSON lines, writes [right, answer found].

Beyond the time limit of a question the kernel kills the process with SIGALRM; beyond the memory limit the verdict is
false. It ends with its pipe, or soon after its owner, and with no signal that stops a run.
"""

import json
import logging
import os
import resource
import select
import signal
import sys

from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

_TARGETS = (LatexExtractionConfig(), ExprExtractionConfig())


def judge(response: str | None, answer: str) -> tuple[bool, str | None]:
    """Is ``response`` right, and what is its answer (None: no expression)? Or for None, has ``answer`` an expression?

    math-verify's own time limits are off.
    """
    gold = parse(answer, extraction_config=_TARGETS, parsing_timeout=None)
    if response is None:
        return bool(gold), None
    found = parse(response, extraction_config=_TARGETS, parsing_timeout=None)
    right = bool(gold and found) and verify(gold, found, timeout_seconds=None)
    return right, _text(found) if found else None


def _text(found: list[object]) -> str:
    """Equal answers in other forms mostly have one text: that of the expression, not of what was said."""
    try:
        return str(found[0])
    except ValueError:  # a number of too many digits
        return str(found[-1])


def main() -> None:
    """Judge the pairs that come on standard input; arguments: seconds, bytes, and the process that asks."""
    seconds, memory, owner = (int(argument) for argument in sys.argv[1:])
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    for stop in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(stop, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())  # answers.py had them blocked until here
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)  # it warns at each call without a time limit
    print("ready", flush=True)
    while True:
        # A process that the owner has forked may hold the pipe open after the owner is gone.
        while not select.select([sys.stdin], [], [], 1.0)[0]:
            if os.getppid() != owner:
                return
        line = sys.stdin.readline()
        if not line:
            return
        response, answer = json.loads(line)
        signal.alarm(seconds)
        try:
            verdict = judge(response, answer)
        except (MemoryError, RecursionError):
            verdict = False, None
        signal.alarm(0)
        print(json.dumps(verdict), flush=True)


if __name__ == "__main__":
    main()
