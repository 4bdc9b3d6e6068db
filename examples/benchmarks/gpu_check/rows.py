"""One line of the GPU check's table."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """A point, what was measured (with its unit), what was wanted, and whether it held; None: for information only."""

    point: str
    measured: str
    wanted: str = ""
    held: bool | None = None
