"""Dataclass fields that say which values they take: ``lr: float = number(5e-6, at_least=0)``. Standard library alone.

A field also takes None if its default is None or it is ``optional``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import Field, field, fields, is_dataclass
from datetime import date
from typing import Any

FLOAT_MAX = 3.4028234e38  # the largest fp32
INT_MAX = 2**31 - 1
_LONGEST_NAME = 128
_NAME = r"[A-Za-z0-9_][A-Za-z0-9_-]*"

Check = Callable[[object], str | None]
"""What to give instead of the value, or None for a value that will do."""


def choice(default: str | None, *others: str) -> Any:
    """One of the given words."""
    known = (default, *others)
    words = ", ".join(word for word in known if word is not None)

    def check(value: object) -> str | None:
        return None if value in known else f"choose one of {words}"

    return _field(default, check)


def number(
    default: float | tuple[float, ...] | None,
    *,
    above: float = -math.inf,
    at_least: float = -math.inf,
    at_most: float = math.inf,
    below: float = math.inf,
    optional: bool = False,
) -> Any:
    """A finite number within bounds; with a tuple as the default, as many of them."""
    low = f"above {above:g}" if above > -math.inf else f"of at least {at_least:g}" if at_least > -math.inf else ""
    high = f"below {below:g}" if below < math.inf else f"at most {at_most:g}" if at_most < math.inf else ""
    bounds = " and ".join(part for part in (low, high) if part)

    def check(value: object) -> str | None:
        if not isinstance(value, int | float) or isinstance(value, bool) or not abs(value) <= FLOAT_MAX:
            return f"give a finite number {bounds}".rstrip()
        return None if above < value < below and at_least <= value <= at_most else f"give a number {bounds}"

    return _field(default, _each(check, default) if isinstance(default, tuple) else check, optional)


def integer(default: int | None, *, at_least: int, at_most: int = INT_MAX) -> Any:
    """An integer from ``at_least`` to ``at_most``."""

    def check(value: object) -> str | None:
        if isinstance(value, int) and not isinstance(value, bool) and at_least <= value <= at_most:
            return None
        too_large = at_most != INT_MAX or (isinstance(value, int) and value > at_most)
        return f"give an integer of at least {at_least}" + (f" and at most {at_most}" if too_large else "")

    return _field(default, check)


def flag(default: bool | None) -> Any:
    """True or false."""
    return _field(default, lambda value: None if isinstance(value, bool) else "give true or false")


def text(default: str | None, *, optional: bool = False) -> Any:
    """A string that is not blank."""

    def check(value: object) -> str | None:
        fits = isinstance(value, str) and value.strip() and "\0" not in value
        return None if fits else "give a string that is not empty"

    return _field(default, check, optional)


def day(default: str) -> Any:
    """A date, YYYY-MM-DD."""

    def check(value: object) -> str | None:
        try:
            fits = isinstance(value, str) and date.fromisoformat(value).isoformat() == value
        except ValueError:
            fits = False
        return None if fits else f"give a date, such as {default}"

    return _field(default, check)


def file_name(default: str) -> Any:
    """The name of one file or folder, without a path to it."""

    def check(value: object) -> str | None:
        fits = isinstance(value, str) and re.fullmatch(r"(?!\.+$)[^/\s]([^/]*[^/\s])?", value) and value.isprintable()
        if isinstance(value, str) and fits and len(value.encode()) <= _LONGEST_NAME:
            return None
        return f"it names a folder: give 1 to {_LONGEST_NAME} printable characters without / and outer spaces"

    return _field(default, check)


def endpoint(default: str | None, *, default_port: int | None = None) -> Any:
    """``host:port`` or ``[v6]:port``; with a default port, ``host`` alone, too."""
    return _field(default, lambda value: None if split_endpoint(value, default_port) else ENDPOINT_WANTED)


ENDPOINT_WANTED = "must be host:port with a port of 1 to 65535, such as 10.0.0.1:29600"


def split_endpoint(value: object, default_port: int | None = None) -> tuple[str, int] | None:
    """Host and port of ``host:port`` or ``[v6]:port``, without a port only if there is a default; else None."""
    given = value if isinstance(value, str) else ""
    found = re.fullmatch(r"(\[[0-9a-fA-F:.]+\]|[^:\[\]\s]+)(?::([0-9]{1,5}))?", given)
    port = int(found.group(2)) if found and found.group(2) else default_port
    return (found.group(1).strip("[]"), port) if found and port and port < 65536 and _is_host(found.group(1)) else None


def _is_host(name: str) -> bool:
    try:
        name.strip("[]").encode("idna").decode("idna")
    except UnicodeError:  # an empty part, one of more than 63 characters, or letters that no host name has
        return False
    return name.isprintable()  # that encoding drops characters that nobody sees


def sections(of: type[Any]) -> dict[str, Check]:
    """Metadata of a list of dictionaries with the fields of one dataclass, each of which is checked."""
    known = {f.name: f for f in fields(of)}

    def check(value: object) -> str | None:
        if not isinstance(value, list) or not all(isinstance(entry, Mapping) for entry in value):
            return f"give a list of dictionaries with the keys {', '.join(known)}"
        for i, entry in enumerate(value):
            if unknown := [key for key in entry if key not in known]:
                return f"[{i}].{unknown[0]}: there is no such key; choose of {', '.join(known)}"
            for name, f in known.items():
                if wrong := complaint(f, entry.get(name, f.default)):
                    return f"[{i}].{name} = {entry.get(name)!r}: {wrong}"
        return None

    return {"check": check}


def named_sections(of: type[Any], *keys: str) -> dict[str, Check]:
    """Metadata of a dictionary of dictionaries by name, each with some of the ``keys`` of one dataclass, the first of
    them always."""

    def check(value: object) -> str | None:
        if not isinstance(value, Mapping) or not all(isinstance(entry, Mapping) for entry in value.values()):
            return f"give names with the keys {', '.join(keys)}, such as {{code: {{{keys[0]}: ...}}}}"
        for name, entry in value.items():
            if not isinstance(name, str) or not re.fullmatch(_NAME, name):
                return f"[{name!r}]: name it by letters, digits, _ and -"
            for key, bad, wrong in refused_entries(of, keys, entry):
                return f"{name}.{key} = {bad!r}: {wrong}"
        return None

    return {"check": check}


def refused_entries(of: type[Any], keys: Sequence[str], entry: Mapping[Any, Any]) -> Iterator[tuple[str, object, str]]:
    """(key, value, what to give instead) of what is wrong with a dictionary of some ``keys`` of a dataclass, the first
    of them always."""
    known = {f.name: f for f in fields(of) if f.name in keys}
    for key in (key for key in entry if key not in known):  # first: it may be the one that misses, mistyped
        yield str(key), entry[key], f"there is no such key; choose of {', '.join(keys)}"
    for key in (keys[0], *(key for key in entry if key in known)):
        if wrong := complaint(known[key], entry.get(key)):
            yield key, entry.get(key), wrong


def _is_plain(value: object) -> bool:
    if isinstance(value, Mapping):
        return all(isinstance(key, str) and key and _is_plain(entry) for key, entry in value.items())
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    if isinstance(value, float):
        return math.isfinite(value)
    return value is None or isinstance(value, str | bool | int)


def _free_form(value: object) -> str | None:
    return None if isinstance(value, Mapping) and _is_plain(value) else "give names with plain, finite values"


def _names(value: object) -> str | None:
    fits = isinstance(value, list) and all(isinstance(v, str) for v in value)
    return None if fits else "give a list of names, such as [a,b]"


def _entries(value: object) -> str | None:
    def fits(v: object) -> bool:
        named = v.get("name") if isinstance(v, Mapping) and _is_plain(v) else v
        return isinstance(named, str) and bool(named)

    wanted = "give a list of names, or of dictionaries with a name and what differs, such as [a,{name: b, limit: 9}]"
    return None if isinstance(value, list) and all(map(fits, value)) else wanted


def _tokens(value: object) -> str | None:
    def fits(v: object) -> bool:
        return bool(v) if isinstance(v, str) else isinstance(v, int) and not isinstance(v, bool) and 0 <= v <= INT_MAX

    return None if isinstance(value, list) and all(map(fits, value)) else "give a list of texts or ids, such as [a,7]"


def _flag_or_text(value: object) -> str | None:
    fits = isinstance(value, bool) or (isinstance(value, str) and value.strip() and "\0" not in value)
    return None if fits else "give true, false or a string that is not empty"


def _urls(value: object) -> str | None:
    def fits(v: object) -> bool:
        found = re.fullmatch(r"https?://(\[[0-9a-fA-F:.]+\]|[^\s:/?#@\[\]]+)(?::([0-9]{1,5}))?(/[^\s?#@]*)?", str(v))
        port = int(found[2] or 80) if found else 0
        return isinstance(v, str) and found is not None and 0 < port < 65536 and _is_host(found[1])

    given = value if isinstance(value, list) else [value]
    return None if value is None or (given and all(map(fits, given))) else "give http://HOST:PORT, or a list of such"


# Metadata of a dictionary with any keys (strings, finite numbers, booleans, None, and lists or dictionaries of these),
# of lists of names, of names with changes and of tokens, of servers, and of a string that may be true or false instead.
FREE_FORM, NAMES, ENTRIES = {"check": _free_form}, {"check": _names}, {"check": _entries}
TOKENS, URLS, FLAG_OR_TEXT = {"check": _tokens}, {"check": _urls}, {"check": _flag_or_text}


def _each(check: Check, default: tuple[float, ...]) -> Check:
    def check_each(value: object) -> str | None:
        if not isinstance(value, list | tuple) or len(value) != len(default):
            return f"give a list of {len(default)} numbers, such as [{','.join(map(str, default))}]"
        return next((f"each entry: {wrong}" for wrong in map(check, value) if wrong), None)

    return check_each


def _field(default: Any, check: Check, optional: bool = False) -> Any:
    optional = optional or default is None

    def check_or_none(value: object) -> str | None:
        wrong = None if value is None and optional else check(value)
        return f"{wrong}, or null" if wrong and optional else wrong

    return field(default=default, metadata={"check": check_or_none})


def complaint(of: Field[Any], value: object) -> str | None:
    """What the field would take instead of ``value``; None if it takes it, or says nothing about its values."""
    check: Check | None = of.metadata.get("check")
    return check(value) if check else None


def refused(instance: Any, prefix: str = "") -> Iterator[tuple[str, object, str]]:
    """(dotted name, value, what to give instead) of every field of a dataclass, nested ones too, with a bad value."""
    for of in fields(instance):
        value = getattr(instance, of.name)
        if is_dataclass(value):
            yield from refused(value, f"{prefix}{of.name}.")
        elif wrong := complaint(of, value):
            yield prefix + of.name, value, wrong
