"""The process behind answers.py: reads [response, answer] as JSON lines, writes true, false or null.

Null: the answer is not a mathematical expression. Run as a script with a time limit (seconds a question) and a memory
limit (bytes): beyond the first, the kernel kills the process with SIGALRM; beyond the second, the verdict is false.
"""

import json
import logging
import resource
import signal
import sys

from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

_TARGETS = (LatexExtractionConfig(), ExprExtractionConfig())


def judge(response: str, answer: str) -> bool | None:
    """True, false, or None if ``answer`` has no expression. math-verify's own time limits are off."""
    gold = parse(answer, extraction_config=_TARGETS, parsing_timeout=None)
    if not gold:
        return None
    found = parse(response, extraction_config=_TARGETS, parsing_timeout=None)
    return bool(found) and verify(gold, found, timeout_seconds=None)


def main() -> None:
    """Judge the pairs that come on standard input, within the seconds and bytes given as arguments."""
    seconds, memory = int(sys.argv[1]), int(sys.argv[2])
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the trainer's to handle; this process exits with its pipe
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)  # it warns at each call without a time limit
    for line in sys.stdin:
        response, answer = json.loads(line)
        signal.alarm(seconds)
        try:
            verdict = judge(response, answer)
        except (MemoryError, RecursionError):
            verdict = False
        signal.alarm(0)
        print(json.dumps(verdict), flush=True)


if __name__ == "__main__":
    main()
