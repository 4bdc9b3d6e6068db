"""The list of faults that ``make mutants`` plants holds: every line is there once, every test exists."""

from __future__ import annotations

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from tests.mutants.__main__ import ROOT
from tests.mutants.fault import FAULTS


@cache
def functions(file: str) -> set[str]:
    return {node.name for node in ast.parse((ROOT / file).read_text()).body if isinstance(node, ast.FunctionDef)}


def test_every_fault_can_be_planted_and_has_a_test_that_may_notice() -> None:
    for fault in FAULTS:
        source = (ROOT / fault.file).read_text()
        planted = fault.planted(source)
        read = (lambda text: ast.dump(ast.parse(text))) if fault.file.endswith(".py") else str.split
        assert read(planted) != read(source), f"{fault.what} changes nothing"
        assert fault.tests, fault.what
        for test in fault.tests:
            file, _, name = test.partition("::")
            assert name.partition("[")[0] in functions(file), f"{fault.what}: {test} does not exist"


def test_a_planted_fault_names_only_what_is_there(tmp_path: Path) -> None:
    """Else its tests break on the name, and nobody knows whether they would notice the fault."""
    for i, fault in enumerate(FAULTS):
        if fault.file.endswith(".py"):
            (tmp_path / f"{fault.room.replace(' ', '_')}_{i}.py").write_text(
                fault.planted((ROOT / fault.file).read_text())
            )
    ruff = [sys.executable, "-m", "ruff", "check", "--isolated", "--no-cache", "--select", "F821,F823"]
    found = subprocess.run([*ruff, "--output-format", "concise", tmp_path], capture_output=True, text=True)
    assert found.returncode == 0, found.stdout + found.stderr


def test_faults_are_many_and_told_apart() -> None:
    assert len(FAULTS) >= 40
    assert len({(f.room, f.what) for f in FAULTS}) == len({(f.file, f.line, f.becomes) for f in FAULTS}) == len(FAULTS)


def test_a_line_that_is_not_there_once_is_refused() -> None:
    fault = FAULTS[0]
    for source in ("", f"{fault.line}\n    {fault.line}\n"):
        with pytest.raises(ValueError, match="the line is there"):
            fault.planted(source)
