"""Fetching the pinned wheels: what a missing index, a wrong pin and an odd archive lead to."""

from __future__ import annotations

import subprocess
import zipfile
from pathlib import Path
from typing import Any

import pytest

from tests.contract import wheels


@pytest.fixture
def pip(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """A stand-in for pip: gives the answer it is told, and writes a wheel where that is a success."""
    monkeypatch.setenv("NEMO_TROPD_CACHE", str(tmp_path))
    calls: list[list[str]] = []

    def answer(code: int, words: str = "") -> list[list[str]]:
        def run(command: list[str], **_: Any) -> Any:
            calls.append(command)
            if code == 0:
                with zipfile.ZipFile(Path(command[command.index("--dest") + 1]) / "vllm.whl", "w") as archive:
                    archive.writestr("vllm/__init__.py", "x = 1\n")
                    archive.writestr("vllm/kernel.so", "not source")
                    archive.writestr("../outside.py", "y = 2\n")
            return subprocess.CompletedProcess(command, code, "", words)

        monkeypatch.setattr(subprocess, "run", run)
        return calls

    return answer


def test_only_python_files_are_kept_and_fetched_once(pip: Any, tmp_path: Path) -> None:
    calls = pip(0)
    folder = wheels.python_files("vllm")
    assert wheels.python_files("vllm") == folder
    assert len(calls) == 1 and f"vllm=={wheels.pinned('vllm')}" in calls[0]
    found = sorted(p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*") if p.is_file())
    assert found == [f"contracts/vllm-{wheels.pinned('vllm')}/vllm/__init__.py"]


def test_without_an_index_the_reason_is_given(pip: Any, tmp_path: Path) -> None:
    pip(1, "ERROR: Could not find a version (from versions: none)\nERROR: No matching distribution found for vllm")
    with pytest.raises(wheels.NoIndex, match=r"vllm==.*No matching distribution"):
        wheels.python_files("vllm")
    assert not list((tmp_path / "contracts").glob("*"))


def test_a_pin_that_the_index_does_not_have_is_a_failure(pip: Any) -> None:
    pip(1, "ERROR: Could not find a version that satisfies the requirement (from versions: 0.23.0, 0.24.1)")
    with pytest.raises(RuntimeError, match=r"0\.23\.0, 0\.24\.1"):
        wheels.python_files("vllm")


def test_pins_are_read_by_their_whole_name(tmp_path: Path) -> None:
    pins = tmp_path / "requirements.txt"
    pins.write_text("transformer-engine-cu13==1.0\ntransformer-engine[core]==2.5.1\n# vllm==9\n")
    assert wheels.pinned("transformer-engine", pins) == "2.5.1"
    with pytest.raises(ValueError, match="does not pin vllm"):
        wheels.pinned("vllm", pins)
