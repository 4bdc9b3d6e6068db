"""A benchmark's table, on the console and as Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from nemo_tropd.files import write_text


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A line for the header, one below it, and one for each row."""
    lines = [header, ["---"] * len(header), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def show(title: str, header: Sequence[str], rows: Sequence[Sequence[str]], out: Path | None) -> None:
    """Print the table; write it to the Markdown file ``out``, too, if one is given."""
    table = Table(*header, title=title)
    for row in rows:
        table.add_row(*row)
    Console(width=120).print(table)
    if out:
        write_text(out, markdown(header, rows))
