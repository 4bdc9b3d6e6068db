"""The noise of the gradient on the small task: sampled objectives beside their exact twins, at the same states.

    python examples/benchmarks/objectives/noise.py                     # 64 batches of 8 answers, at three moments

The student as it starts, and after 50 and 100 steps of ``tropd_exact``, answers batches of problems; each objective's
gradient of each batch is taken. Noise^2 / signal^2 is the variance of one batch's gradient around the mean of all, over
the mean's square (both unbiased): the number of such batches whose mean has as much noise as signal.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))  # this file is run, its siblings are imported

from examples.benchmarks.objectives.gradients import Gradients
from examples.benchmarks.objectives.running_sums import (
    VARIANTS,
    Curve,
    DigitModel,
    distill_step,
    generate,
    loss_tokens,
    prepare,
    random_digits,
    sequence,
)
from nemo_tropd import objectives

PAIRS = ("opd", "opd_exact", "fkl_outlier", "fkl_outlier:soft", "fkl_outlier:exact", "topd", "topd_exact")
MOMENTS = (0, 50, 100)


def noise(name: str, models: tuple[DigitModel, DigitModel], batches: int, size: int) -> tuple[float, float]:
    """(noise^2 / signal^2, |signal|) of an objective, a name of ``make compare``, for one student and teacher."""
    student, teacher = models
    base, params = VARIANTS.get(name, (name, {}))
    objective, generator = objectives.build(base, **params), torch.Generator().manual_seed(3)
    gradients = Gradients()
    for step in range(batches):
        digits = random_digits(size, generator)
        answer = generate(student, digits, generator, teacher, torch.zeros(size))
        tokens = loss_tokens(answer, torch.zeros(size), step, seed=3)
        student.zero_grad()
        distill_step(
            objective, sequence(digits, answer)[:, :-1], tokens, (student, teacher, teacher), Curve.empty(name)
        )
        gradients.add([p.grad.double() for p in student.parameters() if p.grad is not None])
    ratio, signal = gradients.noise_to_signal()
    return ratio, signal**0.5 if signal > 0 else float("nan")


def main() -> None:
    """See the module's text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, default=64)
    parser.add_argument("--size", type=int, default=8, help="answers a batch (default 8)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    table = Table("noise^2 / signal^2 of a batch", *(f"after {m} steps" for m in MOMENTS))
    rows: dict[str, list[str]] = {name: [] for name in PAIRS}
    teacher, student = prepare().build()
    optimizer, generator = torch.optim.Adam(student.parameters(), lr=1e-3), torch.Generator().manual_seed(1)
    for step in range(MOMENTS[-1] + 1):
        if step in MOMENTS:
            for name in PAIRS:
                ratio, signal = noise(name, (student, teacher), options.batches, options.size)
                rows[name].append(f"{ratio:.2f} (signal {signal:.3f})")
            student.zero_grad()
        digits = random_digits(64, generator)
        answer = generate(student, digits, generator, teacher, torch.zeros(64))
        tokens = loss_tokens(answer, torch.zeros(64), step, seed=1)
        objective = objectives.build("tropd_exact")
        distill_step(objective, sequence(digits, answer)[:, :-1], tokens, (student, teacher, teacher), Curve.empty(""))
        optimizer.step()
        optimizer.zero_grad()
    for name, cells in rows.items():
        table.add_row(name, *cells)
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
