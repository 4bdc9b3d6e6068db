"""All GPU checks in one command: ``python examples/benchmarks/gpu_check/check.py``.

They run in the order of their worth, each in a process of its own, so that neither its memory nor its failure affects
the next. A row is in rows.jsonl and table.md, and on the disk, before the next one is measured: what ends this command
early leaves the rows so far, and --resume continues. Exit code 0: every check ran and holds; 1: one did not; 2: there
is no CUDA device.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from importlib import metadata
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))  # this file is run, its siblings are imported

from examples.benchmarks.gpu_check.rows import CHECKS, Check, Row
from examples.benchmarks.isolated import IsolatedError, isolated, isolated_stream

MARK = {True: "held", False: "NOT HELD", None: ""}
REHEARSAL = "REHEARSAL on a CPU with tiny models: no figure is a GPU's"


class Journal:
    """rows.jsonl and table.md of a folder, to which rows are appended."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.lines, self.table = folder, folder / "rows.jsonl", folder / "table.md"
        if not self.table.exists():
            _append(self.table, "| check | point | measured | wanted | |\n|---|---|---|---|---|\n")

    def add(self, check: str, row: Row) -> None:
        """Put ``row`` on the disk and print it."""
        _append(self.lines, json.dumps({"check": check, **asdict(row)}) + "\n")
        cells = [" ".join(text.split()) for text in (check, row.point, row.measured, row.wanted, MARK[row.held])]
        _append(self.table, "| " + " | ".join(text.replace("|", "\\|") for text in cells) + " |\n")
        print(": ".join(cells[:3]), f"({cells[3] or 'for information'})", cells[4], flush=True)

    def note(self, what: str, check: str) -> None:
        """That a check "began" or "ended"."""
        _append(self.lines, json.dumps({what: check}) + "\n")

    def state(self) -> dict[str, bool | None]:
        """Of each check that began, the last time: whether all rows held; None if it did not end."""
        held: dict[str, bool] = {}
        ended: dict[str, bool] = {}
        for line in self.lines.read_text(encoding="utf-8").splitlines() if self.lines.exists() else []:
            try:
                entry = json.loads(line)
            except ValueError:  # cut off
                continue
            if name := entry.get("began"):
                held[name] = True
                ended.pop(name, None)
            elif name := entry.get("ended"):
                ended[name] = held[name]
            elif entry["held"] is False:
                held[entry["check"]] = False
        return {name: ended.get(name) for name in held}


def _append(path: Path, text: str) -> None:
    with path.open("ab+") as file:
        if file.tell() and (file.seek(-1, os.SEEK_END), file.read())[1] != b"\n":
            text = "\n" + text  # behind a line that was cut off
        file.write(text.encode())
        file.flush()
        os.fsync(file.fileno())


def run(checks: Sequence[Check], journal: Journal, end: float, *, rehearsal: bool = False) -> None:
    """Run those of ``checks`` that fit before ``end`` of the monotonic clock."""
    for check in checks:
        left = end - time.monotonic()
        if check.seconds > left:
            text = f"{max(left, 0):.0f} s were left and it takes about {check.seconds:.0f}: --resume {journal.folder}"
            journal.add(check.name, Row("not run", text))
            continue
        journal.note("began", check.name)
        for row in _rows(check, journal.folder / f"{check.name}.log", min(2 * check.seconds, left), rehearsal):
            journal.add(check.name, row)
        journal.note("ended", check.name)


def _rows(check: Check, log: Path, limit_s: float, rehearsal: bool) -> Iterator[Row]:
    """What ``check`` yields; how it failed, if it does."""
    began, count, failure = time.monotonic(), 0, ""
    try:
        for row in isolated_stream(_measure, check.where, rehearsal, limit_s=limit_s, log=log):
            count += 1
            yield row
    except IsolatedError as error:
        failure = str(error)
    failure = failure or ("" if count else "it measured nothing")
    if failure:
        yield Row("failed", f"after {time.monotonic() - began:.0f} s: {failure}; see {log}", "an end", False)


def _measure(where: str, rehearsal: bool) -> Iterator[Row]:
    module, function = where.split(":")
    measure = getattr(importlib.import_module(module), function)
    yield from measure(rehearsal=True) if rehearsal else measure()


def machine() -> str:
    """The GPU and the versions that are measured; empty without a CUDA device. In a process of its own, since what asks
    a GPU takes memory of it."""
    try:
        return isolated(_machine, limit_s=120)
    except IsolatedError as error:
        print(f"torch did not answer: {error}", file=sys.stderr)
        return ""


def _machine() -> str:
    import torch

    if not torch.cuda.is_available():
        return ""
    free, total = (size / 2**30 for size in torch.cuda.mem_get_info())
    versions = []
    for package in ("torch", "triton", "transformer-engine", "megatron-core", "vllm", "trl"):
        try:
            versions.append(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            versions.append(f"{package} absent")
    return f"{torch.cuda.get_device_name()}, {free:.1f} of {total:.1f} GiB free; {', '.join(versions)}"


def main() -> None:
    """See the module's text."""
    names = [check.name for check in CHECKS]
    questions = "\n".join(f"  {c.name:8} {c.seconds:4.0f} s  {c.question}?" for c in CHECKS)
    parser = argparse.ArgumentParser(
        description=f"{__doc__}\nChecks, with the seconds they are expected to take:\n{questions}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--only", nargs="+", choices=names, metavar="CHECK", help="run these, also if they have ended")
    parser.add_argument("--minutes", type=float, default=10.0, help="for all; what does not fit is listed as not run")
    parser.add_argument("--out", type=Path, help="a folder for the rows (default: runs/gpu-check/TIME)")
    parser.add_argument("--resume", type=Path, metavar="FOLDER", help="run what has not ended in this folder")
    parser.add_argument("--rehearse", action="store_true", help="on a CPU, with tiny models, those that can")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # ends what the check has started, too
    end = time.monotonic() + 60 * options.minutes
    chosen = [c for c in CHECKS if c.name in (options.only or names) and (c.rehearses or not options.rehearse)]
    folder = options.resume or options.out or Path("runs", "gpu-check", time.strftime("%Y%m%d-%H%M%S"))
    if (folder / "rows.jsonl").is_file() != bool(options.resume):
        parser.error(f"{folder} has {'no rows to resume' if options.resume else 'rows: give it with --resume'}")
    if not chosen:
        parser.error(f"these need a GPU: {', '.join(options.only)}")
    seen = REHEARSAL if options.rehearse else machine()
    if not seen:
        print("gpu-check needs a CUDA device, and torch sees none: nothing was checked")
        sys.exit(2)
    journal = Journal(folder)
    journal.add("machine", Row("measured on", seen))
    done = {name for name, held in journal.state().items() if held is not None}
    run([c for c in chosen if options.only or c.name not in done], journal, end, rehearsal=options.rehearse)
    state = journal.state()
    good = all(state.get(c.name) for c in chosen)
    print(f"{'every check held' if good else 'not every check ran and held'}: {journal.table}")
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
