"""Exact match of a response with a known answer, by math-verify."""

from __future__ import annotations

import logging
import re

from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

# math-verify's own time limits are signals, which only a process's main thread may set; a response longer than this
# is cut instead, from its start, since the answer comes last.
_LONGEST_RESPONSE = 4000
_TARGETS = (ExprExtractionConfig(), LatexExtractionConfig())

# It logs a warning for each call without time limits.
logging.getLogger("math_verify").setLevel(logging.ERROR)


def exact_match(response: str, answer: str) -> bool:
    """Does the response end in the right answer?

    ``answer`` is a number or a mathematical expression; of a worked solution in GSM8K's style, what follows ``####``.
    The response's answer is the last expression that math-verify finds in it (a boxed one first). A response without
    any is wrong. Works in any thread or process.

    Raises ValueError when ``answer`` itself holds no expression, since no response could then be right.
    """
    gold = _parse(answer.rpartition("####")[2])
    if not gold:
        raise ValueError(f"the known answer {answer!r} is not a number or a mathematical expression")
    found = _parse(_GROUPED.sub(r"\1\2", response[-_LONGEST_RESPONSE:]))
    return bool(found) and verify(gold, found, timeout_seconds=None)


_GROUPED = re.compile(r"(\d),(\d{3})(?!\d)")


def _parse(text: str) -> list[object]:
    return parse(text, extraction_config=_TARGETS, parsing_timeout=None)
