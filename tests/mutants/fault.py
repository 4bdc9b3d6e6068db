"""The faults of ``faults/``: one line of the program each, what it becomes, and the tests that must notice.

Each file of the folder is a room of faults. ``line`` must be found exactly once in its file, indentation aside;
``becomes`` takes its place. Whoever changes such a line changes it there (tests/unit/test_mutants.py says which), and
asks whether the fault still means the same.
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).with_name("faults")


@dataclass(frozen=True)
class Fault:
    """One line that is wrong. At least one of ``tests`` must fail while it is in place."""

    room: str
    what: str
    file: str
    line: str
    becomes: str
    tests: tuple[str, ...]
    slow: bool = False  # its tests start several processes or train

    def planted(self, source: str) -> str:
        """``source`` with the fault. Raises ValueError unless the line is there exactly once."""
        lines = source.splitlines(keepends=True)
        found = [i for i, text in enumerate(lines) if text.strip() == self.line]
        if len(found) != 1:
            raise ValueError(f"{self.file}: the line is there {len(found)} times: {self.line}")
        text = lines[found[0]]
        lines[found[0]] = text.replace(self.line, self.becomes)
        return "".join(lines)


def _room(file: Path) -> list[Fault]:
    content = tomllib.loads(file.read_text())
    if set(content) != {"fault"}:
        raise ValueError(f"{file.name}: only [[fault]] belongs here, but there is {sorted(content)}")
    return [Fault(file.stem.replace("_", " "), **{**f, "tests": tuple(f["tests"])}) for f in content["fault"]]


FAULTS = [fault for file in sorted(FOLDER.glob("*.toml")) for fault in _room(file)]
