"""Short facts in a response's own words: is the known answer in it?"""

import re
import unicodedata
from collections.abc import Mapping, Sequence
from typing import cast

from nemo_tropd.config import ConfigError
from nemo_tropd.evaluation.graders.contract import Form, Verdict, said, settings

_THOUSANDS = re.compile(r"(?<!\d)\d{1,3}(?:,\d{3})+(?!\d)")
# A decimal number that is no part of a date; else a word, perhaps with the sign of a number or that of C++ and C#.
_WORD = re.compile(r"(?:(?<!\S)-)?(?<![\w.])\d+\.\d+(?!\w|\.\d)|(?:(?<!\S)-(?=\d))?[^\s+#.,-]+(?:[+#]+(?![^\s.,-]))?")
# Scripts without spaces between words, or with endings upon them: a character is a word.
_UNSPACED = re.compile("[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uac00-\ud7a3\uf900-\ufaff]")


class MentionsGrader:
    """Does the response have the known answer, as whole words and without regard to case, width, accents' coding and
    most punctuation? Signs and decimals of numbers count.

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
    text = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold()).replace("\u2212", "-")
    text = _THOUSANDS.sub(lambda found: found[0].replace(",", ""), text)
    text = _UNSPACED.sub(r" \g<0> ", "".join(_kept(c) for c in text))
    return f" {' '.join(_WORD.findall(text))} "


def _kept(character: str) -> str:
    """A letter, a digit, a mark upon one, or what may belong to a number or a name; of others a space or nothing."""
    kind = unicodedata.category(character)
    if kind == "Cf":  # a soft hyphen
        return ""
    return character if kind[0] in "LMN" or character in "+#-.," else " "
