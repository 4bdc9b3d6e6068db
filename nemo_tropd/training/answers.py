"""Exact match of a response with a known answer, by math-verify in a process of its own (answer_judge.py).

Models write things like 9^9^9^9, and no signal interrupts Python once sympy has begun to evaluate that: the kernel
enforces a time and a memory limit. The child exits with this process, but not by the signals that stop a run.
"""

import atexit
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

from nemo_tropd.parallel.signals import SIGNALS

TIME_LIMIT_S = 5
MEMORY_LIMIT_BYTES = 4 << 30
_LONGEST_RESPONSE = 4000  # characters; a longer response is cut from its start, since the answer comes last


class AnswerError(RuntimeError):
    """The judge could not be run, or the known answer is not a mathematical expression."""


def exact_match(response: str, answer: str) -> bool:
    """Does the response end in the right answer? Safe to call from any thread or process.

    ``answer`` is a number or a mathematical expression; of a worked solution in GSM8K's style, what follows ``####``.
    The response's answer is the last expression that math-verify finds in it, a boxed one first. Wrong is also one that
    has none, that cannot be judged within the limits, or at which the judging process dies twice (said on stderr).
    Raises AnswerError if ``answer`` has no expression, or when the judging process cannot run.
    """
    return _JUDGE.ask(response[-_LONGEST_RESPONSE:], answer.rpartition("####")[2])


class _Judge:
    """The child process, started when first needed and again after it was killed."""

    def __init__(self) -> None:
        self._child: subprocess.Popen[str] | None = None
        self._lock = threading.Lock()

    def ask(self, response: str, answer: str) -> bool:
        with self._lock:
            reply = self._reply([response, answer])
            if isinstance(reply, int) and reply != -signal.SIGALRM:
                reply = self._reply([response, answer])
        if isinstance(reply, int):
            if reply != -signal.SIGALRM:
                why = f"the process that judges answers died twice (code {reply}); the right answer is {answer!r}"
                print(f"a response counts as wrong: {why}", file=sys.stderr, flush=True)
            return False
        verdict = json.loads(reply)
        if verdict is None:
            raise AnswerError(f"the known answer {answer!r} is not a number or a mathematical expression")
        return bool(verdict)

    def _reply(self, question: list[str]) -> str | int:
        """The judge's line, or the code it exited with."""
        child = self._child = self._child or self._start()
        assert child.stdin is not None and child.stdout is not None
        try:
            child.stdin.write(json.dumps(question) + "\n")
            child.stdin.flush()
            reply = child.stdout.readline()
        except OSError:  # it died before it could be asked
            reply = ""
        if reply.endswith("\n"):
            return reply
        self._child = None
        return child.wait()

    def _start(self) -> subprocess.Popen[str]:
        script = Path(__file__).with_name("answer_judge.py")
        # -P keeps this folder's modules from being found under the names of installed ones.
        command = [sys.executable, "-P", str(script), str(TIME_LIMIT_S), str(MEMORY_LIMIT_BYTES), str(os.getpid())]
        before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # inherited: the judge unblocks what it ignores
        try:
            child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        except OSError as error:
            raise AnswerError(f"cannot start {' '.join(command)}: {error}") from error
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        atexit.register(child.kill)  # nothing, if it has ended and was waited for
        assert child.stdout is not None
        if not child.stdout.readline():
            code = child.wait()
            raise AnswerError(f"the process that judges answers exited with code {code}; its error output is above")
        return child


_JUDGE = _Judge()
