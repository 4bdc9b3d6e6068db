"""Exact match of a response with a known answer: of expressions by math-verify in a process of its own
(answer_judge.py), of words and units by their text (known.py).

Models write things like 9^9^9^9, and no signal interrupts Python once sympy has begun to evaluate that: the kernel
enforces a time and a memory limit. The child exits with this process, but not by the signals that stop a run.
"""

import atexit
import json
import os
import re
import signal
import subprocess
import sys
import threading
import unicodedata
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from nemo_tropd.evaluation import known
from nemo_tropd.evaluation.known import Known
from nemo_tropd.parallel.signals import SIGNALS

TIME_LIMIT_S = 5
MEMORY_LIMIT_BYTES = 4 << 30
_LONGEST_RESPONSE = 4000  # characters; a longer response is cut from its start, since the answer comes last
_LONGEST_TEXT = 100  # characters of a known answer that a response can be expected to end in, to the letter
_SAID = re.compile(r"(?i)\banswer(?:[*_\s])*(?:is\b|:|=)[:=*_\s]*(\S.*)")
_EDGES = " \t*_\"'`$()[]{}.,;:!?\u2018\u2019\u201c\u201d"


class AnswerError(RuntimeError):
    """The judge could not be run."""


def exact_match(response: str, answer: str | Sequence[str]) -> bool | None:
    """Does the response end in the right answer, or in one of several? None if no known one can be judged. Safe to call
    from any thread or process.

    ``answer`` is a number, a mathematical expression, one of the two with a unit, or text; of a worked solution what
    it boxes, or in GSM8K's style what follows ``####``. The response's answer is the last expression that math-verify
    finds in it, a boxed one first, or its final text as an expression; a known answer's unit may be absent from it, but
    not be another. For text (:func:`judged_as`) it is what is boxed, follows "answer is" or stands in the last line,
    compared without case, outer punctuation and markup. A known answer repeated to the letter is right. Wrong is also a
    response that has none, that cannot be judged within the limits, or at which the judging process dies twice (said on
    stderr). Raises AnswerError when the judging process cannot run.
    """
    return judged(response, answer)[0]


def judged(response: str, answer: str | Sequence[str]) -> tuple[bool | None, str | None]:
    """:func:`exact_match`, and the response's answer: the right one of several, None if nothing could be parsed."""
    if not isinstance(answer, str):
        verdicts = [judged(response, one) for one in answer]
        return next((v for wanted in (True, False) for v in verdicts if v[0] is wanted), (None, None))
    response, (kind, wanted) = response[-_LONGEST_RESPONSE:], _known(answer)
    if kind == "expression":
        return _same_expression(response, wanted)
    return (_same_text(response, wanted.text), plain(_final_text(response)) or None) if kind else (None, None)


def judged_as(answer: str) -> str | None:
    """How a known answer is judged: as an "expression", if a number, or if all that is in it counts for math-verify,
    apart from a unit; else as "text"; or None, not at all: longer than a line of text."""
    return _known(answer)[0]


@cache
def _known(answer: str) -> tuple[str | None, Known]:
    found = known.known(answer.rpartition("####")[2])
    if found.form == "number" or (found.form == "formula" and _JUDGE.ask(None, found.value)):
        return "expression", found
    line = plain(found.text) and len(found.text) <= _LONGEST_TEXT and "\n" not in found.text
    return ("text" if line else None), found


def _same_expression(response: str, wanted: Known) -> tuple[bool, str | None]:
    final = _final_text(response)
    right, found = _JUDGE.verdict(response, wanted.value)
    if not right and (other := _final_formula(response, final, wanted)):
        right, again = _JUDGE.verdict(other, wanted.value)
        found = again if right else found
    if right and wanted.unit and not known.same_unit(wanted, final):
        return False, plain(final)  # a vote must not count it with the right ones
    if not right and _squeezed(final) == _squeezed(wanted.text):
        return True, found or final
    return right, found


def _final_formula(response: str, final: str, wanted: Known) -> str | None:
    """The final text as math-verify takes it for an expression, which it may not be where it stands."""
    if wanted.unit and (amount := known.amount(final)):
        return f"${known.latex(amount[0])}$"
    if wanted.form == "number" or len(final) > _LONGEST_TEXT or "$" in final or not final:
        return None
    if known.boxed(response) is None:
        final = re.sub(r"^(?:[^\W\d_]{2,}[\s:]+)+", "", final.strip().rstrip("."))
    elif known.latex(final) == final:
        return None  # judged already
    return f"${known.latex(known.tidy(final))}$"


def _squeezed(text: str) -> str:
    return re.sub(r"\s|\$|\.$", "", known.tidy(text).replace("\\dfrac", "\\frac"))


def final_texts(response: str) -> set[str]:
    """What a response may end in, as texts are compared: its final text, and the first sentence of that."""
    final = _final_text(response)
    return {plain(final), plain(re.split(r"(?<=[.!?])\s", final)[0])}


def _same_text(response: str, answer: str) -> bool:
    wanted, final, found = plain(answer), _final_text(response), final_texts(response)
    if len(wanted) == 1 and (letter := re.match(r"\W*(\w)[).:,]", final)):  # B) Paris
        found.add(plain(letter.group(1)))
    return wanted in found or _squeezed(final) == _squeezed(answer) or known.same_parts(answer, final)


def _final_text(response: str) -> str:
    """What is boxed last; else what follows the last "answer is"; else the last line."""
    if (inner := known.boxed(response)) is not None:
        return known.untexted(inner)
    said = _SAID.findall(response) or [line for line in response.rpartition("####")[2].splitlines() if line.strip()]
    return str(said[-1]) if said else ""


def plain(text: str) -> str:
    """Text without case, outer punctuation and markup, as texts are compared."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split()).strip(_EDGES)


class Judge:
    """The child process, started when first needed and again after it was killed. ``kind``: what it judges."""

    def __init__(self, kind: str = "expressions") -> None:
        self._kind = kind
        self._child: subprocess.Popen[str] | None = None
        self._lock = threading.Lock()

    def ask(self, response: str | None, answer: str) -> bool:
        """Is ``response`` right; or for None, is ``answer`` an expression?"""
        return self.verdict(response, answer)[0]

    def verdict(self, response: str | None, answer: str) -> tuple[bool, str | None]:
        """What :meth:`ask` says, and the response's answer."""
        right, found = self.reply([response, answer], f"the right answer is {answer!r}") or (False, None)
        return right, found

    def reply(self, question: list[Any], what: str) -> list[Any] | None:
        """The judge's reply; None if it took too long, or died twice, which stderr is told of, with ``what`` it was."""
        with self._lock:
            reply = self._reply(question)
            if isinstance(reply, int) and reply != -signal.SIGALRM:
                reply = self._reply(question)
        if isinstance(reply, str):
            return list(json.loads(reply))
        if reply != -signal.SIGALRM:
            why = f"the process that judges answers died twice (code {reply}); {what}"
            print(f"a response counts as wrong: {why}", file=sys.stderr, flush=True)
        return None

    def _reply(self, question: list[Any]) -> str | int:
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
        limits = (str(TIME_LIMIT_S), str(MEMORY_LIMIT_BYTES), str(os.getpid()))
        command = [sys.executable, "-P", str(script), *limits, self._kind]
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


_JUDGE = Judge()
