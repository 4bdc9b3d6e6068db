"""Functions in a process of their own: results, errors, deaths, limits."""

from __future__ import annotations

import os
import time

import pytest

from examples.benchmarks.isolated import IsolatedError, isolated, isolated_stream, memory_kib


def test_results_and_errors_come_back() -> None:
    assert isolated(os.path.join, "a", "b", limit_s=120) == os.path.join("a", "b")
    with pytest.raises(IsolatedError, match=r"FileNotFoundError.*no-such-file"):
        isolated(os.stat, "/no-such-file", limit_s=120)
    with pytest.raises(IsolatedError, match="died, exit code 3"):
        isolated(os._exit, 3, limit_s=120)


def test_a_process_past_its_limit_is_killed() -> None:
    began = time.monotonic()
    with pytest.raises(IsolatedError, match=r"not done in 0\.5 s"):
        isolated(time.sleep, 100, limit_s=0.5)
    assert time.monotonic() - began < 60


def test_what_came_before_a_failure_is_kept() -> None:
    seen: list[int] = []
    with pytest.raises(IsolatedError, match="TypeError"):
        for value in isolated_stream(map, abs, [-1, 2, "x", 4], limit_s=120):
            seen.append(value)
    assert seen == [1, 2]


def test_memory_of_this_process() -> None:
    assert 1024 < memory_kib("VmRSS") <= memory_kib("VmHWM")
    with pytest.raises(OSError, match="no VmNothing"):
        memory_kib("VmNothing")
