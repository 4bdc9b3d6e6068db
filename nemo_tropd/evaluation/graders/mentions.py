"""Short facts in a response's own words: is the known answer in it?"""

import re
from collections.abc import Mapping, Sequence
from typing import cast

from nemo_tropd.config import ConfigError
from nemo_tropd.evaluation.graders.contract import Form, Verdict, said, settings

_WORD = re.compile(r"\w+")


class MentionsGrader:
    """Does the response have the known answer, as whole words and without regard to case?

    Columns: ``problem`` and ``answer``, a text or a list of texts of which any is right. An answer that lists all there
    is would be right, too: keep max_new_tokens low.
    """

    def __init__(self, prompt: str, columns: Mapping[str, str], options: Mapping[str, object]) -> None:
        settings(options)
        self._form = Form(prompt, columns, ("problem", "answer"), hidden=("answer",))

    def question(self, row: Mapping[str, object], sample_seed: int) -> tuple[str, object]:
        known = self._form.value(row, "answer")
        answers = [str(a).strip() for a in (known if isinstance(known, list | tuple) else [known])]
        if not answers or not all(_words(a).strip() for a in answers):
            raise ConfigError("columns.answer", known, "a known answer is empty; name another column")
        return self._form.text(row), answers

    def grade(self, items: Sequence[tuple[object, str]]) -> list[Verdict]:
        return [self._verdict(cast(list[str], reference), said(response)) for reference, response in items]

    @staticmethod
    def _verdict(answers: Sequence[str], response: str) -> Verdict:
        found = [a for a in answers if _words(a) in _words(response)]
        return Verdict(bool(found), found[0] if found else response.strip() or None)


def _words(text: str) -> str:
    """Between single spaces, and with one at each end."""
    return f" {' '.join(_WORD.findall(text.casefold()))} "
