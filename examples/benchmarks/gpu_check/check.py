"""Every GPU point in one command and one table: ``python examples/benchmarks/gpu_check/check.py [subject ...]``.

Each subject runs in a process of its own, so that one's memory or failure is not the next one's; its rows are shown as
they come, and all of them once more in one table at the end. Exit code 0: every point held, 1: one did not or failed,
2: there is no GPU here.
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))  # this file is run, its siblings are imported

from examples.benchmarks.gpu_check.rows import Row

# Subject -> (module with ``check()``, seconds it may take). In the order in which they run.
SUBJECTS: dict[str, tuple[str, float]] = {
    "head": ("examples.benchmarks.gpu_check.head", 150),
    "teacher": ("examples.benchmarks.gpu_check.teacher", 120),
    "loop": ("examples.benchmarks.gpu_check.loop", 225),
    "pair": ("examples.benchmarks.gpu_check.pair", 200),
    "student": ("examples.benchmarks.gpu_check.student", 90),
}
TOTAL_S = 480.0  # what a subject may take ends where this is used up
MARK = {True: "[green]held[/]", False: "[red]not held[/]", None: ""}


def main() -> None:
    """See the module's text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("subjects", nargs="*", help=f"some of: {', '.join(SUBJECTS)}; none: all")
    parser.add_argument("--tests", action="store_true", help="also run the tests of tests/gpu, first")
    parser.add_argument("--json", type=Path, help="write the rows there, too")
    options = parser.parse_args()
    unknown = [name for name in options.subjects if name not in SUBJECTS]
    if unknown:
        parser.error(f"no subject {', '.join(unknown)}; there are {', '.join(SUBJECTS)}")
    console = Console(width=150)
    if not torch.cuda.is_available():
        console.print("gpu-check needs a CUDA device and there is none: nothing was checked, nothing is claimed")
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
    folder = Path(__file__).parents[3] / "tests" / "gpu"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        print(done.stdout[-6000:], done.stderr[-2000:], flush=True)
    last = done.stdout.strip().splitlines()[-1] if done.stdout.strip() else f"exit code {done.returncode}"
    return Row("tests/gpu", last.strip("= "), "all pass", done.returncode == 0)


def _subject(name: str, left_s: float) -> list[Row]:
    module, most = SUBJECTS[name]
    seconds = min(most, left_s)
    if seconds <= 0:
        return [Row("done in time", f"not begun: {TOTAL_S:g} s were used up", f"{TOTAL_S:g} s for all", False)]
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(theirs, module))
    process.start()
    theirs.close()
    rows: list[Row] = []
    deadline = time.monotonic() + seconds
    try:
        while True:
            if not ours.poll(max(0.0, deadline - time.monotonic())):
                rows.append(Row("done in time", f"cut off after {seconds:.0f} s", f"at most {most:g} s", False))
                break
            answer = ours.recv()
            if answer is None:
                break
            rows.append(answer)
    except EOFError:
        process.join(5)
        rows.append(Row("ends well", f"died, exit code {process.exitcode}", "exit code 0", False))
    finally:
        process.kill()
        process.join()
    return rows


def _child(pipe: Connection, module: str) -> None:
    try:
        for row in importlib.import_module(module).check():
            print(f"{row.point}: {row.measured}", flush=True)
            pipe.send(row)
    except Exception as error:
        traceback.print_exc()
        pipe.send(Row("ends well", f"{type(error).__name__}: {error}"[:200], "no error", False))
    pipe.send(None)


if __name__ == "__main__":
    main()
