"""What the GPU check runs, in the order of its worth, and a line of its table."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """A point, what was measured (with its unit), what was wanted, and whether it held; None: for information only."""

    point: str
    measured: str
    wanted: str = ""
    held: bool | None = None


@dataclass(frozen=True)
class Check:
    """One measurement: ``where`` is MODULE:FUNCTION and yields rows; ``seconds`` are expected, twice that allowed.
    ``rehearses``: the function takes ``rehearsal=True`` and then runs something tiny on a CPU."""

    name: str
    question: str
    where: str
    seconds: float
    rehearses: bool = False


_HERE = "examples.benchmarks.gpu_check."
CHECKS = (
    # Without this one nothing trains.
    Check(
        "loop",
        "does the loop run with the engine in the trainer's process, and do both agree after each sleep",
        _HERE + "runs:loop",
        seconds=75,
        rehearses=True,
    ),
    # Which recipes fit, and what to speed up.
    Check(
        "step",
        "is each phase's memory within the plan, and where do a step's seconds go",
        _HERE + "step:step",
        seconds=95,
        rehearses=True,
    ),
    # What was built to make it fast.
    Check(
        "head",
        "how near are the fused heads to their matrix products, and what does overlap gain",
        _HERE + "head:head",
        seconds=60,
    ),
    Check(
        "teacher",
        "what does an FP8 teacher gain, and how far are its log-probabilities",
        _HERE + "teacher:teacher",
        seconds=60,
    ),
    Check("trl", "how do TRL's time and memory compare, where it is installed", _HERE + "step:beside_trl", seconds=90),
    # What tests on a CPU have shown but for the device.
    Check("kernels", "do tests/gpu pass", _HERE + "head:kernel_tests", seconds=45),
    Check(
        "student",
        "are packing, fused gradients and the optimizer right",
        _HERE + "student:student",
        seconds=45,
    ),
    Check(
        "ahead",
        "do engines in processes of their own have the present weights, also a step ahead and across a resume",
        _HERE + "runs:ahead",
        seconds=120,
        rehearses=True,
    ),
    Check("resume", "does a run with teacher prefixes resume", _HERE + "runs:resume", seconds=150),
)
