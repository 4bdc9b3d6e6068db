"""Plant every fault of ``faults/`` in a copy of the repository and see that its tests fail.

    make mutants                                    all of them
    make mutants ARGS="--only loss --only batch"    the rooms named
    make mutants ARGS="--quick"                     without the slow ones

A fault is killed when one of its tests fails on what it checks: an assertion, or an error that the program raises. A
test that breaks on an import or a misspelt name has noticed nothing. All tests must first pass without any fault, the
quick ones before the quick faults, the slow ones before the slow.
Exit code 1 if a fault survives, cannot be planted, or the tests fail without it.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import shutil
import signal
import sys
import tempfile
import time
import types
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import pytest

from nemo_tropd.imports import without_collections
from tests.mutants.fault import FAULTS, Fault

ROOT = Path(__file__).resolve().parents[2]
LEFT_OUT = shutil.ignore_patterns(".git", ".venv", "__pycache__", ".*_cache", "build", "*.egg-info", "shared")
# Imported once, before the forks: each fault's tests then start at once. Nothing of the repository is among them.
PRELOADED = (
    "torch", "numpy", "safetensors.torch", "omegaconf", "hydra", "transformers", "transformers.models.qwen3",
    "transformers.models.auto.modeling_auto", "datasets", "math_verify", "matplotlib.figure", "jinja2", "rich.console",
    "rich.progress", "megatron.core", "megatron.core.models.gpt", "megatron.core.models.gpt.gpt_layer_specs",
    "megatron.core.distributed", "megatron.core.optimizer", "megatron.core.pipeline_parallel.schedules",
    "megatron.core.dist_checkpointing", "megatron.core.dist_checkpointing.strategies.fully_parallel",
    "megatron.core.dist_checkpointing.strategies.filesystem_async", "nemo.core", "nemo.utils.exp_manager",
    "lightning.pytorch", "torch.distributed.checkpoint", "torch.distributed.run",
)  # fmt: skip
CRASHES = ("ImportError", "ModuleNotFoundError", "SyntaxError", "NameError", "UnboundLocalError", "AttributeError")
CRASHED = re.compile(rf"^(E\s+)?({'|'.join(CRASHES)}): ", re.MULTILINE)  # in the traceback of another process
LIMIT_S = 900


@dataclass(frozen=True)
class Verdict:
    """What became of one run of tests."""

    killer: str | None  # the test that failed as it should
    trouble: str | None  # why nothing can be concluded
    seconds: float


def main() -> int:
    parser = argparse.ArgumentParser(prog="make mutants", description=__doc__.splitlines()[0])
    parser.add_argument("--only", action="append", metavar="ROOM", help=", ".join(sorted({f.room for f in FAULTS})))
    parser.add_argument("--quick", action="store_true", help="leave out the faults that only slow tests notice")
    parser.add_argument("--match", default="", metavar="TEXT", help="only faults with TEXT in their description")
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="faults at a time, each in its own copy")
    options = parser.parse_args()
    chosen = [f for f in FAULTS if (not options.only or f.room in options.only) and not (options.quick and f.slow)]
    chosen = sorted((f for f in chosen if options.match in f.what), key=lambda f: f.slow)
    if not chosen:
        parser.error("no fault is left: " + parser.format_usage())
    warnings.simplefilter("ignore")
    with without_collections(freeze=True):  # a collection in a fork would copy every page that it looks at
        for name in PRELOADED:
            importlib.import_module(name)
    verdicts: list[Verdict] = []
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder, ThreadPoolExecutor(options.jobs) as pool:
        copies: SimpleQueue[Path] = SimpleQueue()
        for i in range(options.jobs):
            shutil.copytree(ROOT, Path(folder) / str(i) / "tree", ignore=LEFT_OUT)
            copies.put(Path(folder) / str(i) / "tree")
        for slow in sorted({f.slow for f in chosen}):
            group = [f for f in chosen if f.slow == slow]
            without = clean(copies, list(dict.fromkeys(t for f in group for t in f.tests)))
            if without:
                verdicts += [Verdict(None, without, 0.0)] * len(group)
            else:
                verdicts += pool.map(lambda fault: plant(copies, fault), group)
    return report(chosen, verdicts)


def clean(copies: SimpleQueue[Path], tests: Sequence[str]) -> str | None:
    """What is wrong with the tests as they are."""
    copy = copies.get()
    verdict = run_tests(copy, tests, stop_at_first=False, limit_s=max(LIMIT_S, 300.0 * len(tests)))
    copies.put(copy)
    wrong = verdict.killer or verdict.trouble
    print(f"{len(tests)} tests without any fault: {wrong or 'all pass'}, {verdict.seconds:.0f} s", flush=True)
    return f"the tests do not pass without a fault: {wrong}" if wrong else None


def plant(copies: SimpleQueue[Path], fault: Fault) -> Verdict:
    """Run the fault's tests with the fault in place in one of the copies, and take it out again."""
    copy = copies.get()
    path = copy / fault.file
    original = path.read_text()
    try:
        path.write_text(fault.planted(original))
        verdict = run_tests(copy, fault.tests)
    except ValueError as error:
        verdict = Verdict(None, str(error), 0.0)
    finally:
        path.write_text(original)
        copies.put(copy)
    print(line(fault, verdict), flush=True)
    return verdict


def run_tests(copy: Path, tests: Sequence[str], *, stop_at_first: bool = True, limit_s: float = LIMIT_S) -> Verdict:
    """Run ``tests`` in a process that imports nemo_tropd from ``copy``, as do the processes it starts."""
    began, result = time.monotonic(), copy.parent / "result.json"
    result.unlink(missing_ok=True)
    pid = os.fork()
    if pid == 0:
        try:
            _run_here(copy, tests, stop_at_first, result)
        finally:
            os._exit(1)
    while time.monotonic() - began < limit_s:
        if os.waitpid(pid, os.WNOHANG)[0]:
            break
        time.sleep(0.02)
    else:
        os.killpg(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        return Verdict(None, f"no end within {limit_s:.0f} s", limit_s)
    seconds = time.monotonic() - began
    if not result.is_file():
        return Verdict(None, f"the tests' process died: {(copy.parent / 'output.txt').read_text()[-2000:]}", seconds)
    content = json.loads(result.read_text())
    return Verdict(content["killer"], content["trouble"], seconds)


def _run_here(copy: Path, tests: Sequence[str], stop_at_first: bool, result: Path) -> None:
    os.setsid()
    out = os.open(copy.parent / "output.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(out, 1)
    os.dup2(out, 2)
    os.chdir(copy)
    # No byte code of ours is kept: a fault may have the size and the second of the line that it replaces.
    sys.dont_write_bytecode = True
    os.environ.update(PYTHONPATH=str(copy), PYTHONDONTWRITEBYTECODE="1")
    for name in [n for n in sys.modules if n.split(".")[0] in ("tests", "examples", "nemo_tropd")]:
        del sys.modules[name]
    sys.path[:] = [str(copy), *(p for p in sys.path if Path(p).resolve() != ROOT)]
    sys.modules["__main__"] = types.ModuleType("__main__")  # which spawned processes would import
    recorder = Recorder(copy)
    options = ["-q", "-p", "no:cacheprovider", "--tb=short", *(["-x"] if stop_at_first else [])]
    code = pytest.main([*options, *tests], plugins=[recorder])
    result.with_suffix(".part").write_text(json.dumps(recorder.verdict(int(code))))
    result.with_suffix(".part").rename(result)
    os._exit(0)


class Recorder:
    """What failed, and whether it failed on what the test checks."""

    def __init__(self, copy: Path) -> None:
        self.copy = copy
        self.failures: list[str] = []
        self.crashes: list[str] = []
        self.passed = 0

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
        report = yield
        self.passed += report.when == "call" and report.passed
        if report.failed:
            assert call.excinfo is not None
            crash = call.excinfo.typename in CRASHES or CRASHED.search(report.longreprtext)
            # Several processes may have run, and checked, in a fixture that a module's tests share.
            in_test = report.when == "call" or call.excinfo.typename == "DistributedFailure"
            failed_in_test = in_test and not crash
            name = item.nodeid.rpartition("/")[2]
            (self.failures if failed_in_test else self.crashes).append(
                name if failed_in_test else f"{name} ({report.when}): {report.longreprtext[-600:]}"
            )
        return report

    def verdict(self, code: int) -> dict[str, str | None]:
        """``code`` is pytest's: 0 all passed, 1 some failed, above that it could not run."""
        where = Path(sys.modules["nemo_tropd"].__file__ or "").resolve() if "nemo_tropd" in sys.modules else None
        trouble = None
        if where is not None and self.copy.resolve() not in where.parents:
            trouble = f"the tests imported {where}, not the copy"
        elif code > 1 or not (self.passed or self.failures or self.crashes):
            trouble = f"pytest could not run them (exit code {code})"
        elif self.crashes and not self.failures:
            trouble = f"broken, not failed: {self.crashes[0]}"
        return {"killer": None if trouble or not self.failures else self.failures[0], "trouble": trouble}


def line(fault: Fault, verdict: Verdict) -> str:
    """One line of the table."""
    fate = "killed" if verdict.killer else "TROUBLE" if verdict.trouble else "SURVIVED"
    why = verdict.killer or verdict.trouble or ", ".join(t.rpartition("/")[2] for t in fault.tests)
    return f"{fate:8} {fault.room:11} {verdict.seconds:6.1f} s  {fault.what}: {why}"


def report(faults: Sequence[Fault], verdicts: Sequence[Verdict]) -> int:
    """The table by room; the exit code."""
    both = sorted(zip(faults, verdicts, strict=True), key=lambda pair: pair[0].room)
    print("\n" + "\n".join(line(fault, verdict) for fault, verdict in both) + "\n")
    for room in sorted({f.room for f in faults}):
        own = [v for f, v in both if f.room == room]
        killed = sum(v.killer is not None for v in own)
        print(f"{room:11} {killed} of {len(own)} killed, {sum(v.seconds for v in own):.0f} s")
    alive = [f for f, v in both if v.killer is None]
    print(f"{len(both) - len(alive)} of {len(both)} faults killed" + (f"; {len(alive)} not" if alive else ""))
    return 1 if alive else 0


if __name__ == "__main__":
    raise SystemExit(main())
