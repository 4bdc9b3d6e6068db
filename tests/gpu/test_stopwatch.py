"""When work on a GPU was done, as its own events tell."""

from __future__ import annotations

import time

import pytest
import torch

from nemo_tropd.parallel.stopwatch import Stopwatch

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def test_work_counts_until_the_device_has_done_it() -> None:
    torch.cuda.synchronize()
    began = time.monotonic()
    watch = Stopwatch(torch.device("cuda", torch.cuda.current_device()))
    launched = []
    for _ in range(2):
        with watch.running():
            torch.cuda._sleep(200_000_000)  # cycles: some 0.1 s
        launched.append(time.monotonic())
    torch.cuda.synchronize()
    done = time.monotonic()
    (b1, e1), (b2, e2) = watch.intervals()
    assert began - 1e-3 <= b1 < e1 <= b2 < e2 <= done + 1e-3
    assert e1 - b1 == pytest.approx(e2 - b2, rel=0.5) and e2 - b1 > 0.9 * (e1 - b1 + e2 - b2)
    assert launched[1] < e2  # nobody waited
