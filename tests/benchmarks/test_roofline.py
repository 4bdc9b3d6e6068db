"""The kernels compiled for Hopper and Blackwell without a GPU, and the model of what they move."""

from __future__ import annotations

import pytest

from examples.benchmarks.roofline import GPUS, Head
from tests.dist.run_distributed import run_distributed

# Measured on one H100, T 8192, V 151,936, student 1536, teacher 3584, bf16: what the model must reproduce.
MEASURED_LIMIT_MS = (25.8, 28.6)
MEASURED_PASSES_MS = {
    "teacher: log-sum-exp and block maxima": 0.91,
    "student: log-sum-exp and columns": 0.88,
    "student: gradient over the logits": 1.81,
}


@pytest.mark.parametrize("capability", [90, 100])
def test_no_spills_and_wide_accesses(capability: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a process of its own: another test may have had Triton interpret."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    run_distributed(check, 1, capability, timeout_s=240, init_gloo=False)


def check(rank: int, world_size: int, capability: int) -> None:
    """Compile every case; the streaming loops must load and store what the model says, 128 bits at a time."""
    from tests.benchmarks.kernel_report import cases, compile_case

    found = cases()
    assert len(found) == 24
    for case in found:
        r = compile_case(case, capability)
        print(
            f"sm_{capability} {case.dtype} {case.name}: {r.registers} registers, {r.shared_bytes} B shared, "
            f"{r.wide_loads} wide loads and {r.wide_stores} wide stores a tile and thread, "
            f"{r.loop_load_bytes:g} B read and {r.loop_store_bytes:g} B written a column"
        )
        assert r.spills == 0 and r.stack_bytes == 0, f"{case.name}: {r.spills} spills"
        assert 16 < r.registers <= 128
        assert r.wide_loads > 0 and (r.wide_stores > 0) == (case.stores > 0)
        assert (r.loop_load_bytes, r.loop_store_bytes) == (case.loads, case.stores), case.name
        # 1024 threads and more keep loads in flight; of two rows at a time 768 are enough.
        assert r.programs_per_multiprocessor >= (3 if "both" in case.name else 4)


def test_the_model_says_what_the_kernels_move() -> None:
    """Bytes of logits a token: the compiled loops' bytes a column, times the columns."""
    head = Head()
    assert head.bytes_a_token() == {
        "teacher read": 2 * 151936,
        "student read": 4 * 151936,
        "student written": 2 * 151936,
    }
    row, exact = 2 * 151936, Head(exact=True)
    assert list(exact.bytes_a_token().values()) == [3 * row, 3 * row, row]  # stream; sums; gradient, written once
    assert exact.products() == head.products()
    assert exact.peak_bytes() - head.peak_bytes() == 8192 * 3584 * 2  # the teacher's hidden states
    assert sum(head.products().values()) == 2 * 8192 * 151936 * (3584 + 3 * 1536)


def test_the_model_reproduces_what_was_measured_on_an_h100() -> None:
    head, gpu = Head(), GPUS["h100"]
    times = head.milliseconds(gpu)
    for measured in MEASURED_LIMIT_MS:
        assert abs(head.limit(gpu) / measured - 1) < 0.15
    for name, measured in MEASURED_PASSES_MS.items():
        assert abs(times[name] / measured - 1) < 0.15, (name, times[name])


def test_the_model_scales() -> None:
    gpu = GPUS["h100"]
    short, long = Head(tokens=8192), Head(tokens=32768)
    assert long.limit(gpu) == pytest.approx(4 * short.limit(gpu))
    grown = long.peak_bytes() - short.peak_bytes()
    # Only what every token keeps grows: its hidden gradient and the teacher's scores.
    assert grown == 24576 * (1536 * 2 + 64 * 20)
    assert Head(tensor_parallel=8).limit(gpu) == pytest.approx(short.limit(gpu) / 8)
