"""Multiple choice: options in a shuffled order, and the letter that a response settles on."""

import random
import re
import string
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

from nemo_tropd.config import ConfigError
from nemo_tropd.evaluation.answers import final_texts, plain
from nemo_tropd.evaluation.graders.contract import Form, Verdict, said, settings

_LONGEST_RESPONSE = 4000  # characters; a longer response is cut from its start, since the answer comes last
# "A" and "I" are also words: before another one they are letters only if that cannot follow the word.
_A = r"A(?! (?!(?:because|since|as|and|with|is|was|due|for|which|but|so|while|will|would|has)\b)[a-z])"
_I = r"I(?! (?!(?:because|since|as|and|with)\b)[a-z])"
# Of two letters neither is a choice: A or B, A/B, A, B.
_TWO = (
    r"(?!\W{0,4}(?:/|&|\b(?:and|or)\b)\W{0,4}[A-Z](?![\w'’]|\W? (?:is|was|are)\b)"
    r"|, ?\W?[A-Z]\b\W*(?:$|,|and\b|or\b))"
)
_LETTER = rf"\W{{0,4}}([B-HJ-Z]|{_A}|{_I})(?![\w'’]){_TWO}"
_BOX, _SMALL = r"\\(?:boxed|fbox) ?\{(?i:\W{0,3}(?:option|choice)\b)?", r"\W{0,4}([a-z])"
_BOXED = re.compile(rf"{_BOX}(?:{_LETTER}|{_SMALL}\W{{0,3}}\}})", re.MULTILINE)
_STATE = (
    r"(?i:\b(?:answer|choice|option) ?(?:is|was|(?:would|must|should|could|appears to|seems to) be|[:=–→]) ?:? ?"
    r"(?:(?:therefore|thus|indeed|likely|probably|clearly) )?(?:(?:the )?(?:option|choice|letter)\b)?)"
)
_STATED = re.compile(rf"{_STATE}(?:{_LETTER}|{_SMALL}\W{{0,3}}$)", re.MULTILINE)
_RIGHT = re.compile(
    r"(?i:\b(nor|or|and|if|whether|neither|not|statement|why) )?(?i:option |choice )?\(?\b([A-Z])\b\)?"
    r" is (?:the )?(?:correct|right|best)\b"
)
_START = re.compile(r"\W{0,4}([A-Z]) ?(?:[).:\]]|,(?! ?\(?[A-Z]\b))")  # of a line: B) Paris
_BRACKETS = re.compile(r"\(([A-Z])\)")
_ALONE = re.compile(r"(?i:option |choice )?[^A-Za-z]{0,4}([A-Za-z])[^A-Za-z]{0,4}")
_MARKUP = re.compile(
    r"[*_`$]+|\\(?:text|math)(?:rm|bf|it|sf|normal)?(?=\{)|\\(?:rm|bf|it|sf)\b ?|</?(?:b|i|em|strong|p)>|</answer>"
)


class ChoiceGrader:
    """Does the response settle on the right option?

    Columns: ``question``; and either ``choices``, a list, with ``answer``, the right one's index, letter or text, or
    ``correct`` with ``wrong1``, ``wrong2`` and so on, one text each. The prompt's places: {question}, {options}, a line
    "A) text" each, and {letters}, "ABCD". Option ``shuffle``: an own order for each sample seed (the default).
    """

    def __init__(self, prompt: str, columns: Mapping[str, str], options: Mapping[str, object]) -> None:
        self._shuffle = settings(options, shuffle=True)["shuffle"]
        self._wrong = sorted(name for name in columns if re.fullmatch(r"wrong[1-9]\d?", name))
        listed = ("choices", "answer") if "choices" in columns or not self._wrong else ("correct",)
        secret = (*listed, *self._wrong)
        self._form = Form(
            prompt, columns, ("question", *listed), self._wrong, hidden=secret, made=("options", "letters")
        )

    def question(self, row: Mapping[str, object], sample_seed: int) -> tuple[str, object]:
        options, right = self._options(row)
        order = list(range(len(options)))
        if self._shuffle:
            random.Random(sample_seed).shuffle(order)
        letters = string.ascii_uppercase[: len(options)]
        shown = [options[i] for i in order]
        lines = "\n".join(f"{letter}) {option}" for letter, option in zip(letters, shown, strict=True))
        reference = {"letter": letters[order.index(right)], "options": shown}
        return self._form.text(row, options=lines, letters=letters), reference

    def _options(self, row: Mapping[str, object]) -> tuple[list[str], int]:
        """The options as the row has them, and the right one's index."""
        if self._wrong:
            names = ["correct", *self._wrong]
            return [str(self._form.value(row, name)).strip() for name in names], 0
        options = self._form.value(row, "choices")
        if not isinstance(options, list | tuple) or not 2 <= len(options) <= 26:
            raise ConfigError("columns.choices", options, "name a column with a list of 2 to 26 options")
        texts, known = [str(option).strip() for option in options], self._form.value(row, "answer")
        letter = str(known).strip().upper()
        if str(known).strip() in texts and not isinstance(known, int):
            right = texts.index(str(known).strip())
        elif len(letter) == 1 and letter.isalpha():
            right = string.ascii_uppercase.find(letter)
        else:
            right = int(letter) if letter.isdecimal() and len(letter) < 4 else -1
        if not 0 <= right < len(texts):
            raise ConfigError("columns.answer", known, f"neither index, letter nor text of one of {texts}")
        return texts, right

    def grade(self, items: Sequence[tuple[object, str]]) -> list[Verdict]:
        return [self._verdict(reference, said(response)) for reference, response in items]

    def _verdict(self, reference: Any, response: str) -> Verdict:
        options = reference["options"]
        letter = _letter(response, options)
        # A vote counts options, whose letters differ among samples.
        answer = None if letter is None else options[string.ascii_uppercase.index(letter)]
        return Verdict(letter == reference["letter"], answer, letter or "")


def _letter(response: str, options: Sequence[str]) -> str | None:
    """The letter boxed last; else stated last as the answer; else alone on the last line or the first; else the only
    one that is said to be right, that begins a line, or that stands in brackets on the last; else that of the only
    option whose text the response ends in."""
    letters = string.ascii_uppercase[: len(options)]
    complete, response = len(response) <= _LONGEST_RESPONSE, response[-_LONGEST_RESPONSE:]
    text = _MARKUP.sub("", unicodedata.normalize("NFKC", response).replace("<answer>", "answer: "))
    lines = [" ".join(line.split()) for line in text.splitlines() if line.strip()]
    if not lines:
        return None
    small = not any(len(option) == 1 and option.isalpha() for option in options)  # else a small letter may be an option
    for pattern in (_BOXED, _STATED):
        found = [large or (lower.upper() if small else "") for large, lower in pattern.findall("\n".join(lines))]
        if found := [letter for letter in found if letter and letter in letters]:
            return found[-1]
    for line in (lines[-1], lines[0]) if complete else lines[-1:]:
        if (alone := _ALONE.fullmatch(line)) and alone.group(1).upper() in letters:
            return alone.group(1).upper()
    right = {letter for before, letter in _RIGHT.findall("\n".join(lines)) if not before}
    starts = {match.group(1) for line in lines if (match := _START.match(line))}
    for candidates in (right, starts, set(_BRACKETS.findall(lines[-1]))):
        if len(candidates) == 1 and candidates <= set(letters):
            return candidates.pop()
    ends = final_texts(response)
    named = [letter for letter, option in zip(letters, options, strict=True) if plain(option) in ends]
    return named[0] if len(named) == 1 else None
