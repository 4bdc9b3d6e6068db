"""All GPU checks in one command and one table: ``python examples/benchmarks/gpu_check/check.py [SUBJECT ...]``.

Each subject runs in a process of its own, so that neither its memory nor its failure affects the next one. Rows are
printed when a subject ends, and all of them again in one table. Exit code 0: every check holds, 1: one does not hold or
failed, 2: there is no CUDA device.
"""

from __future__ import annotations

import argparse
import importlib
import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))  # this file is run, its siblings are imported

from examples.benchmarks.gpu_check.rows import Row
from examples.benchmarks.isolated import IsolatedError, isolated_stream

ROOT = Path(__file__).resolve().parents[3]

# Subject -> (module with ``check()``, seconds it may take). In the order in which they run.
SUBJECTS: dict[str, tuple[str, float]] = {
    "head": ("examples.benchmarks.gpu_check.head", 200),
    "teacher": ("examples.benchmarks.gpu_check.teacher", 120),
    "loop": ("examples.benchmarks.gpu_check.loop", 225),
    "pair": ("examples.benchmarks.gpu_check.pair", 200),
    "student": ("examples.benchmarks.gpu_check.student", 90),
}
TOTAL_S = 480.0  # of all subjects together; a subject's own limit is cut to what is left
MARK = {True: "[green]held[/]", False: "[red]not held[/]", None: ""}


def main() -> None:
    """See the module's text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("subjects", nargs="*", help=f"some of: {', '.join(SUBJECTS)}; none: all")
    parser.add_argument("--tests", action="store_true", help="run the tests in tests/gpu first")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    options = parser.parse_args()
    unknown = [name for name in options.subjects if name not in SUBJECTS]
    if unknown:
        parser.error(f"unknown subject {', '.join(unknown)}; known: {', '.join(SUBJECTS)}")
    console = Console(width=150)
    if not torch.cuda.is_available():
        console.print("gpu-check needs a CUDA device, and torch sees none: nothing was checked")
        sys.exit(2)
    rows = run(options.subjects or list(SUBJECTS), console, tests=options.tests)
    if options.json:
        options.json.write_text(json.dumps([{"subject": s, **asdict(r)} for s, r in rows], indent=1) + "\n")
    sys.exit(1 if any(row.held is False for _, row in rows) else 0)


def run(subjects: Sequence[str], console: Console, *, tests: bool = False) -> list[tuple[str, Row]]:
    """Run the subjects and print the table."""
    began = time.monotonic()
    rows: list[tuple[str, Row]] = []
    if tests:
        rows.append(("tests", _tests()))
        _show(console, *rows[-1])
    for name in subjects:
        for row in _subject(name, TOTAL_S - (time.monotonic() - began)):
            rows.append((name, row))
            _show(console, name, row)
    title = f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {time.monotonic() - began:.0f} s"
    table = Table("subject", "point", "measured", "wanted", "", title=title)
    for name, row in rows:
        table.add_row(name, row.point, row.measured, row.wanted, MARK[row.held])
    console.print(table)
    return rows


def _show(console: Console, name: str, row: Row) -> None:
    console.print(f"{name}: {row.point}: {row.measured} ({row.wanted or 'for information'}) {MARK[row.held]}")


def _tests() -> Row:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/gpu"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        print(done.stdout[-6000:], done.stderr[-2000:], flush=True)
    last = done.stdout.strip().splitlines()[-1] if done.stdout.strip() else f"exit code {done.returncode}"
    return Row("tests/gpu", last.strip("= "), "all pass", done.returncode == 0)


def _subject(name: str, left_s: float) -> list[Row]:
    module, most = SUBJECTS[name]
    seconds = min(most, left_s)
    if seconds <= 0:
        return [Row("done in time", f"not started: {TOTAL_S:g} s had passed", f"{TOTAL_S:g} s for all", False)]
    rows: list[Row] = []
    try:
        for row in isolated_stream(_subject_rows, module, limit_s=seconds):
            rows.append(row)
    except IsolatedError as error:
        rows.append(Row("ends without an error", str(error)[:200], f"in at most {most:g} s", False))
    return rows


def _subject_rows(module: str) -> Iterator[Row]:
    for row in importlib.import_module(module).check():
        print(f"{row.point}: {row.measured}", flush=True)
        yield row


if __name__ == "__main__":
    main()
