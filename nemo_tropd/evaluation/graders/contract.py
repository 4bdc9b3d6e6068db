"""What a grader is, and what all graders share: places in a prompt, columns of a row, options, the end of a thought."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from nemo_tropd.config import ConfigError

# {problem}, but not the braces of \boxed{answer}
_PLACE = re.compile(r"(?<![\w\\])\{(\w+)\}")


class Verdict(NamedTuple):
    """On one response. ``answer`` is what a vote among samples counts; None if nothing could be parsed."""

    correct: bool
    answer: str | None
    detail: str = ""


class Grader(Protocol):
    """Thread-safe; the same arguments always give the same results."""

    def question(self, row: Mapping[str, object], sample_seed: int) -> tuple[str, object]:
        """The user's turn for a row of the benchmark, and a reference, JSON-serialisable, that :meth:`grade` needs.
        Raises ConfigError for a row that cannot be asked or judged."""
        ...

    def grade(self, items: Sequence[tuple[object, str]]) -> list[Verdict]:
        """Verdicts on (reference, response) pairs, in order. What a model thought counts for nothing."""
        ...


class Form:
    """A prompt's text with its places, and the columns that a grader reads.

    ``needed`` are the names that ``columns`` must give a column for, ``allowed`` those it may; ``hidden`` are the ones
    among them, and ``made`` others, that a prompt cannot, or can, have a place for.
    """

    def __init__(
        self,
        prompt: str,
        columns: Mapping[str, str],
        needed: Sequence[str],
        allowed: Sequence[str] = (),
        hidden: Sequence[str] = (),
        made: Sequence[str] = (),
    ) -> None:
        known = (*needed, *allowed)
        for name in columns:
            if name not in known:
                raise ConfigError(f"columns.{name}", columns[name], f"this grader knows only {', '.join(known)}")
        for name in needed:
            if name not in columns:
                raise ConfigError(f"columns.{name}", None, "name the column that has it")
        places = {*made, *columns} - set(hidden)
        for place in _PLACE.findall(prompt):
            if place not in places:
                offered = ", ".join(f"{{{p}}}" for p in sorted(places))
                raise ConfigError("prompt", prompt, f"{{{place}}} is not among its possible places: {offered}")
        self._prompt, self._columns = prompt, columns

    def column(self, name: str) -> str:
        return self._columns[name]

    def value(self, row: Mapping[str, object], name: str) -> Any:
        """The row's value in the column for ``name``."""
        column = self._columns[name]
        if row.get(column) is None:
            raise ConfigError(f"columns.{name}", column, f"a row has nothing there; its columns: {', '.join(row)}")
        return row[column]

    def text(self, row: Mapping[str, object], **made: str) -> str:
        """The prompt, filled."""

        def fill(place: re.Match[str]) -> str:
            name = place.group(1)
            return made[name] if name in made else str(self.value(row, name))

        return _PLACE.sub(fill, self._prompt)


def settings(options: Mapping[str, object], **defaults: Any) -> dict[str, Any]:
    """``defaults`` overridden by ``options``; ConfigError for one that is unknown or of another type. A number is
    above 0."""
    for name, value in options.items():
        if name not in defaults:
            raise ConfigError(f"options.{name}", value, f"this grader knows only {', '.join(defaults) or 'none'}")
        default = defaults[name]
        number = isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool)
        if not number and type(value) is not type(default):
            raise ConfigError(f"options.{name}", value, f"give a {type(default).__name__}, such as {default!r}")
        if isinstance(value, int | float) and not isinstance(value, bool) and not 0 < value < float("inf"):
            raise ConfigError(f"options.{name}", value, "give a number above 0")
    return {**defaults, **options}


def said(response: str) -> str:
    """The response after its last thought; nothing if a thought was begun and not ended."""
    return response.rpartition("</think>")[2].partition("<think>")[0]
