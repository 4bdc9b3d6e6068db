"""How the benchmarks import one another, and which heavy libraries they may import."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests.commands import run_command
from tests.unit.test_structure import circle

ROOT = Path(__file__).resolve().parents[2]
FILES = {
    ".".join(file.relative_to(ROOT).with_suffix("").parts): file
    for file in sorted((ROOT / "examples" / "benchmarks").rglob("*.py"))
}
COMMANDS = [
    file.relative_to(ROOT).as_posix() for file in FILES.values() if 'if __name__ == "__main__":' in file.read_text()
]
# library -> the only modules that import it
ONE_PLACE = {
    "triton": {"examples.benchmarks.head"},
    "vllm": {"examples.benchmarks.gpu_check.step"},
    "transformer_engine": set(),
}


def imported(file: Path) -> set[str]:
    """Modules that a file imports, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module or "")
    return found


def test_no_circles_between_benchmarks() -> None:
    arrows = {name: imported(file) & set(FILES) for name, file in FILES.items()}
    assert sum(map(len, arrows.values())) > 20
    assert not circle(arrows), " -> ".join(circle(arrows))


def test_heavy_libraries_are_imported_in_one_place() -> None:
    for library, places in ONE_PLACE.items():
        found = {name for name, file in FILES.items() if any(m.split(".")[0] == library for m in imported(file))}
        assert found == places, library


def test_there_are_commands() -> None:
    assert {Path(command).stem for command in COMMANDS} >= {"head", "loop", "roofline", "scaling", "compare", "check"}


@pytest.mark.timeout(600)
def test_a_command_runs_as_a_file_from_any_directory(tmp_path: Path) -> None:
    """Their modules are found without PYTHONPATH."""
    for command in COMMANDS:
        done = run_command(ROOT / command, "--help", cwd=tmp_path)
        assert done.returncode == 0 and done.stdout.startswith("usage:"), (command, done.stdout, done.stderr)
