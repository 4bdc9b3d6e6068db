"""What a known answer is, by its form: a number, a formula, one of the two with a unit, or text."""

import re
import unicodedata
from typing import Literal, NamedTuple


class Known(NamedTuple):
    """``value`` is what math-verify is to parse (of ``text`` nothing is), ``unit`` are words as :func:`_unit` has
    them, ``text`` is the answer as texts are compared."""

    form: Literal["number", "formula", "text"]
    value: str
    unit: tuple[str, ...]
    text: str


_TEXT = re.compile(r"\\(?:text(?:bf|it|rm|normal)?|mbox|mathrm|mathbf|operatorname)\s*\{([^{}]*)\}")
_SPACING = re.compile(r"\\[!,;:> ]|(?<!\\)~|\\(?:q?quad|left|right|displaystyle)(?![a-zA-Z])")
_WHOLE = re.compile(r"\$\$(.+)\$\$|\$([^$]+)\$|\\\((.+)\\\)|\\\[(.+)\\\]", re.DOTALL)
_CURRENCY = "$\u20ac\u00a3\u00a5\u20b9"
_NUMBER = r"[-+\u2212]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|[-+\u2212]?\.\d+"
_FRACTION = r"-?\d+\s*/\s*\d+|-?\d*\\[dt]?frac\{\d+\}\{\d+\}|\d+\s+\d+/\d+"
_AMOUNT = rf"[{_CURRENCY}]?\s*(?:{_NUMBER})\s*[{_CURRENCY}%]?|{_FRACTION}"
_PLAIN = re.compile(rf"[{_CURRENCY}]?\s*(?:{_NUMBER})\s*[{_CURRENCY}%]?")
# A ratio, a time, a date, a version or a range: its numbers are not to be computed with.
_PARTS = re.compile(r"\d\s*:\s*\d|\d+\.\d+\.\d|\d+[-\u2013]\d+[-\u2013]\d|\d+/\d+/\d|\d'\s*\d|^\d+[-\u2013]\d+$")
_PART = re.compile(r"\d+(?:\s*:\s*\d+)+|\d+(?:\.\d+){2,}|\d+(?:[-/\u2013]\d+)+|\d+'\s*\d+")
_FUNCTIONS = r"(?<![\\a-zA-Z])(pi|sin|cos|tan|cot|sec|csc|arcsin|arccos|arctan|ln|log|exp)(?![a-zA-Z])"
_WORD = re.compile(r"(?<![\\a-zA-Z])(?!(?:and|or|begin|end|[pbvB]?matrix|cases|array)\b)[^\W\d_]{3,}")
_WORDS = re.compile(r"[(\[\"']*[^\W\d_][)\].\"']*|[^\W\d_]{2}[^\\$=^]*")
_MONTHS = (
    *("january", "february", "march", "april", "may", "june", "july", "august", "september", "october"),
    *("november", "december"),
)
_SAME_UNITS = (
    "km kilometer kilometre|m meter metre|cm centimeter centimetre|mm millimeter millimetre|kg kilogram kilo|g gram gm|"
    "mg milligram|l liter litre|ml milliliter millilitre|h hr hour|min minute|s sec second|ft foot feet|in inch|"
    "yd yard|mi mile|lb pound|oz ounce|c celsius|f fahrenheit|k kelvin|mi/h mph|km/h kmh kph|hz hertz|j joule|"
    "n newton|w watt|kw kilowatt|v volt|a ampere amp|pa pascal|ad ce|bc bce|man men|woman women|child children|"
    "person people|dollar usd|euro eur|yr year"
)
_UNITS = {name: names.split()[0] for names in _SAME_UNITS.split("|") for name in names.split()}
# What may follow a number that has no unit.
_NO_UNIT = re.compile(
    "a about after ago all also altogether an and are as at away because before but by each every exactly for from "
    "had has have he hence i if in is it left less more most of off on only or out over per remain remaining she since "
    "so such that the them then there therefore these they this those thus to together total under was we were when "
    "where which while who will with would you".replace(" ", "|")
)


def known(answer: str) -> Known:
    """The form of a known answer, of a worked solution what it boxes last. Whether a "formula" is one, only the judge
    can say."""
    if len(re.findall(r"\\(?:boxed|fbox)\b", answer)) == 1 and (inner := boxed(answer)) is not None:
        answer = inner
    answer = answer.strip()
    while whole := _WHOLE.fullmatch(answer):
        answer = next(group for group in whole.groups() if group is not None).strip()
    text = untexted(answer)
    plain = re.sub(r"^\$([^$]+)\$", r"\1", tidy(answer))
    if re.fullmatch(r"(?:[^$]|\$(?=\s*\.?\d))*", plain):
        plain = plain.replace("$", "")  # dollars
    if "$" in plain or r"\boxed" in plain:  # expressions within a sentence
        return Known("formula", answer, (), text)
    if _PLAIN.fullmatch(plain):
        return Known("number", plain, (), text)
    if _PARTS.search(untexted(plain)):
        return Known("text", "", (), text)
    if found := amount(plain):
        value, unit = found
        return Known("number" if _PLAIN.fullmatch(value) else "formula", _judgeable(value), unit, text)
    formula = latex(plain)
    if _WORD.search(untexted(formula)) or _WORDS.fullmatch(untexted(formula)):
        return Known("text", "", (), text)
    return Known("formula", f"${formula}$", (), text)


def _judgeable(value: str) -> str:
    return value if _PLAIN.fullmatch(value) else f"${latex(value)}$"


def tidy(answer: str) -> str:
    """LaTeX without what is no part of a number in it: spacing, braces about a comma, a backslash before % and $, the
    sign of degrees."""
    answer = re.sub(r"\s*\^\s*(?:\{\s*\\circ\s*\}|\\circ(?![a-zA-Z]))|\s*\u00b0", " ", answer)
    answer = re.sub(r"\\!\s*", "", answer).replace("{,}", ",").replace(r"\%", "%").replace(r"\$", "$")
    return " ".join(_SPACING.sub(" ", answer).split())


def latex(formula: str) -> str:
    """A formula as a person or a program may have written it, 3*pi/4 or 2**10, in LaTeX."""
    formula = re.sub(_FUNCTIONS, r"\\\1 ", formula.replace("**", "^")).replace("infinity", r"\infty")
    formula = re.sub(r"(?<=[\w)])\s*\*\s*(?=[\w(\\])", r" \\cdot ", formula)
    formula = re.sub(r"\^\s?(-?\d{2,})", r"^{\1}", formula)
    return re.sub(r"(?<![\\a-zA-Z])sqrt\s?\(([^()]*)\)", r"\\sqrt{\1}", formula)


def untexted(text: str) -> str:
    r"""Without \text{} and its like about words."""
    return _TEXT.sub(r"\1", text)


def boxed(text: str) -> str | None:
    """What is boxed last; None if nothing is, or its brace is open."""
    start = max(text.rfind(r"\boxed{"), text.rfind(r"\fbox{"))
    if start < 0:
        return None
    start, depth = text.index("{", start) + 1, 1
    for i in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[i], 0)
        if depth == 0:
            return text[start:i]
    return None


def amount(text: str) -> tuple[str, tuple[str, ...]] | None:
    r"""A number and its unit, 10 km, or a formula and its unit in \text{}; None if ``text`` is something else. Up to
    three words are a unit, one if it is a name."""
    text = re.sub(rf"^\$({_AMOUNT})\$", r"\1", tidy(text).rstrip("."))
    if match := re.fullmatch(r"(.*\S)\s*\\(?:text|mathrm|mbox|textrm)\s*\{([^{}\d]*)\}\s*(\^\s*\{?\d\}?)?", text):
        value, words = match.group(1).rstrip(" ^"), match.group(2).strip() + (match.group(3) or "")
        if (known_unit := _unit(words)) and not _WORD.search(untexted(latex(value))):
            return value, known_unit
    if based := re.fullmatch(r"(\d+)\s*_\s*\{?(\d+)\}?", text):
        return based.group(1), ("base" + based.group(2),)
    match = re.fullmatch(rf"({_AMOUNT})(\s*)([^\W\d_][^\d=+*,\\(){{}}]*(?:\^?\{{?\d\}}?)?)", text)
    if not match or match.group(1).endswith("%"):
        return None
    value, space, words = match.group(1).strip(), match.group(1)[-1].isspace() or match.group(2), match.group(3)
    unit, names = _unit(words), words.split()
    short = len(words.strip(".")) == 1 or not space
    if not unit or len(names) > 3 or (len(names) > 1 and words != words.lower() and "degree" not in words):
        return None
    if short and words not in ("st", "nd", "rd", "th") and not (unit[0] in _UNITS.values() and (space or words[1:])):
        return None  # 2k and 3xy are products
    if set(names) & {"and", "or", "to"} or any(_month(name) for name in names):
        return None
    mixed = re.fullmatch(r"(\d+)\s+(\d+)/(\d+)", value)
    return (rf"{mixed[1]}\frac{{{mixed[2]}}}{{{mixed[3]}}}" if mixed else value), unit


def _unit(words: str) -> tuple[str, ...]:
    """Words in one form: km for Kilometres, cm2 for square centimeters, km/h for km per hour."""
    words = unicodedata.normalize("NFKC", untexted(words)).casefold().replace("\\", " ")
    words = re.sub(r"\b([a-z])\.\s?([a-z])\b\.?", r"\1\2", words)  # p.m.
    words = re.sub(r"\s*\}?\s*\^\s*\{?(\d)\}?", r"\1", words)
    words = re.sub(r"\s+per\s+|\s*/\s*", "/", words)
    words = re.sub(r"\b(?:square|sq)\.?\s+([a-z]+)", r"\g<1>2", words)
    words = re.sub(r"\b(?:cubic|cu)\.?\s+([a-z]+)", r"\g<1>3", words)
    found = re.findall(r"[^\W\d_]+\d?(?:/[^\W\d_]+\d?)*", words)
    return tuple("/".join(map(_one, name.split("/"))) for name in found if not name.startswith("degree"))


def _one(name: str) -> str:
    name, power = (name[:-1], name[-1]) if name[-1:].isdigit() else (name, "")
    if name not in _UNITS:
        name = re.sub(r"(?<=[a-z]{2})ies$", "y", re.sub(r"(?<=[xsh])es$", "", name))
        name = re.sub(r"(?<=[a-rt-z])s$", "", name) if len(name) > 2 else name
    return _UNITS.get(name, name) + power


def _month(word: str) -> bool:
    word = word.casefold().strip(".,")
    return len(word) >= 3 and any(month.startswith(word) for month in _MONTHS)


def same_unit(wanted: Known, final: str) -> bool:
    """Does the response's final text give ``wanted``'s unit, or none?"""
    found = amount(final)
    if found:
        unit: tuple[str, ...] = found[1]
    else:
        text = re.sub(r"\\[dt]?frac\s*\{(\d+)\}\s*\{(\d+)\}", r"\1/\2", tidy(untexted(final))).replace("$", " ")
        text = re.sub(r"\\[a-zA-Z]+", " ", text)
        text = re.sub(r"([a-z])\}?\s*\^\s*\{?([23])\}?", r"\1\2", text)
        numbers = list(re.finditer(rf"(?<![\w.])(?:{_NUMBER})(?:/\d+)?", text))
        value = wanted.value.replace(",", "").strip(_CURRENCY + "%")
        same = [n for n in numbers if n.group().replace(",", "") == value] or numbers
        if not same:
            return True
        rest = re.split(r"[.;:,!?](?:\s|$)|\d", text[same[-1].end() :])[0]
        unit = _unit(rest)
    names = set(wanted.unit)
    if names <= set(unit):
        return True
    own = unit[
        : next((i for i, name in enumerate(unit) if _NO_UNIT.fullmatch(name) and unit[i:] != ("in",)), len(unit))
    ]
    return set(own) <= names


def same_parts(wanted: str, final: str) -> bool:
    """Does the response's final text end in ``wanted``, which has several numbers, or a number and words? The last
    numbers of the text are its; a date's parts have any order; a bare time or ratio needs no unit."""
    if parts := _PART.match(wanted):
        theirs = [_numeral(part) for part in _PART.findall(tidy(final))]
        if not theirs or theirs[-1] != _numeral(parts.group()):
            return False
        unit = _unit(wanted[parts.end() :])
        rest = tidy(final)[list(_PART.finditer(tidy(final)))[-1].end() :]
        return same_unit(Known("text", "0", unit, wanted), "0 " + re.split(r"[;:,!?]", rest)[0])
    ours, theirs = _tokens(wanted), _tokens(final)
    date = any(map(_month, ours)) and any(map(str.isdigit, ours)) and all(_month(t) or t.isdigit() for t in ours)
    if not date and not wanted[:1].isdigit():
        return False  # no more than the words themselves
    for start in range(len(theirs) - len(ours), -1, -1):
        window = theirs[start : start + len(ours)]
        if window == ours or (date and sorted(window) == sorted(ours)):
            return not any(t[0].isdigit() for t in theirs[start + len(ours) :])
    return False


def _numeral(part: str) -> str:
    return re.sub(r"(?<!\d)0+(?=\d)", "", re.sub(r"\s", "", part).replace("\u2013", "-"))


def _tokens(text: str) -> list[str]:
    text = unicodedata.normalize("NFKC", untexted(tidy(text))).casefold()
    text = re.sub(r"(\d)(?:st|nd|rd|th)\b", r"\1", text)
    words = re.findall(r"\d+(?:,\d{3})*(?:\.\d+)?|[^\W\d_]+|[^\w\s.,$*\"]", text)
    return [next((m[:3] for m in _MONTHS if _month(w) and m.startswith(w)), w) for w in words if w not in ("of", "the")]
