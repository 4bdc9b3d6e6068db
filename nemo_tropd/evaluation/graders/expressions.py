"""Answers that are numbers, mathematical expressions or short texts."""

from collections.abc import Mapping, Sequence
from typing import cast

from nemo_tropd.config import ConfigError
from nemo_tropd.evaluation.answers import judged, judged_as
from nemo_tropd.evaluation.graders.contract import Form, Verdict, said, settings


class MathGrader:
    """Is the response's last expression, a boxed one first, equal to the known answer, by math-verify?

    Columns: ``problem`` and ``answer``, a number, an expression (LaTeX needs no $), a short text, or a list of such of
    which any is right. A unit after a number may be absent from the response, but not be another.
    """

    def __init__(self, prompt: str, columns: Mapping[str, str], options: Mapping[str, object]) -> None:
        settings(options)
        self._form = Form(prompt, columns, ("problem", "answer"), hidden=("answer",))

    def question(self, row: Mapping[str, object], sample_seed: int) -> tuple[str, object]:
        known = self._form.value(row, "answer")
        answers = [str(a) for a in known] if isinstance(known, list | tuple) else [str(known)]
        if not any(map(judged_as, answers)):
            raise ConfigError("columns.answer", known, "neither an expression nor a line of text; name another column")
        return self._form.text(row), answers

    def grade(self, items: Sequence[tuple[object, str]]) -> list[Verdict]:
        verdicts = (judged(said(response), cast(list[str], reference)) for reference, response in items)
        return [Verdict(bool(right), answer) for right, answer in verdicts]
