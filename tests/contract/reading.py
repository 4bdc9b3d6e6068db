"""The second reading: which lines of ours rest on which lines of the pinned wheels. Prints the page as Markdown:

python -m tests.contract.reading
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path

from tests.contract.wheels import PACKAGES, pinned, python_files

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
FILES = ("reading_engine.toml", "reading_train.toml")
READ = (*PACKAGES, "torch", "nemo-toolkit")


class ReadingError(ValueError):
    """An entry that does not say what it must, or whose text is not where it says."""


@dataclass(frozen=True)
class Entry:
    """One line of ours and the line of a wheel it rests on. Texts may span lines; each is in its file exactly once."""

    ours: str  # a file of this repository
    line: str  # its text that relies on the wheel
    relies: str  # what must hold, and what goes wrong otherwise
    wheel: str  # the package, as docker/requirements-gpu.txt names it
    file: str  # inside the wheel
    text: str  # what shows it

    def our_line(self) -> int:
        """The number of our line; ReadingError where the text is not there, or not once."""
        return _number(ROOT / self.ours, self.line, self.ours)

    def wheel_line(self) -> int:
        """The number of the wheel's line; NoIndex where the wheel cannot be had."""
        return _number(python_files(self.wheel) / self.file, self.text, f"{self.wheel}: {self.file}")


def entries(file: Path) -> list[Entry]:
    """Raises ReadingError for a key that is unknown, missing or empty, and for a package that cannot be read."""
    names, found = {f.name for f in fields(Entry)}, []
    for at, raw in enumerate(tomllib.loads(file.read_text(encoding="utf-8")).get("entry", []), start=1):
        where = f"{file.name}, entry {at}"
        if wrong := names ^ set(raw):
            raise ReadingError(f"{where}: unknown or missing {', '.join(sorted(wrong))}")
        if empty := [name for name in names if not (isinstance(raw[name], str) and raw[name].strip())]:
            raise ReadingError(f"{where}: no text in {', '.join(sorted(empty))}")
        if raw["wheel"] not in READ:
            raise ReadingError(f"{where}: wheel = {raw['wheel']}: choose one of {', '.join(READ)}")
        found.append(Entry(**{name: text.strip("\n") for name, text in raw.items()}))
    return found


def everything() -> list[Entry]:
    """The entries of both sides."""
    return [entry for name in FILES if (HERE / name).is_file() for entry in entries(HERE / name)]


def _number(path: Path, text: str, shown: str) -> int:
    if not path.is_file():
        raise ReadingError(f"{shown}: there is no such file")
    content = path.read_text(encoding="utf-8")
    if (count := content.count(text)) != 1:
        raise ReadingError(f"{shown}: {count} times instead of once: {text}")
    return content[: content.index(text)].count("\n") + 1


def page() -> Iterator[str]:
    """The list as Markdown, with the numbers of today's lines."""
    yield f"# What our lines rest on: {', '.join(f'{package} {pinned(package)}' for package in READ)}"
    last = ""
    for entry in everything():
        if entry.ours != last:
            yield f"\n## {entry.ours}\n"
        last = entry.ours
        yield f"- line {entry.our_line()}: {entry.relies}"
        yield from _quoted(entry.line)
        yield f"  {entry.wheel}, {entry.file}:{entry.wheel_line()}"
        yield from _quoted(entry.text)


def _quoted(text: str) -> Iterator[str]:
    yield "  ```python"
    yield from (f"  {line}" for line in text.splitlines())
    yield "  ```"


if __name__ == "__main__":
    for line in page():
        print(line)
