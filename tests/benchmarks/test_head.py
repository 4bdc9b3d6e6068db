"""The benchmark of the loss: what it measures, and that its variants of TrOPD are the same loss."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from examples.benchmarks.head import VARIANTS, Cost, Problem, Shape, in_turn, measure, ours, plain
from nemo_tropd.loss import head


def test_bench_measures() -> None:
    cost = measure("ours: TrOPD", Shape(256, 20000, 64), threads=1, repeats=1)
    assert isinstance(cost, Cost) and cost.milliseconds > 0
    # At least the two gradients and one chunk of logits; far from the plain loss's three [T, V].
    assert 5 < cost.peak_mib < 2 * 256 * 20000 * 4 / 2**20


def test_a_missing_peer_is_named() -> None:
    if importlib.util.find_spec("trl"):
        pytest.skip("TRL is installed")
    assert measure("TRL: JSD", Shape(64, 512, 32), threads=1, repeats=1) == "not installed (trl)"


@pytest.mark.parametrize("teacher_hidden", [None, 48])
def test_ours_and_plain_torch_are_the_same_loss(teacher_hidden: int | None) -> None:
    torch.manual_seed(3)
    problem = Problem.random(Shape(96, 700, 32, teacher_hidden=teacher_hidden))
    wanted = problem.gradients(plain)
    found = [problem.gradients(ours), problem.gradients(lambda h, w, p: ours(h, w, p, chunk_tokens=17))]
    for gradients in found:
        for got, want in zip(gradients, wanted, strict=True):
            assert want.norm() > 0 and (got - want).norm() <= 1e-4 * want.norm()


def test_one_after_another_is_undone() -> None:
    before = head.run_chunks
    with in_turn():
        assert head.run_chunks is not before
        Problem.random(Shape(32, 512, 16)).gradients(VARIANTS["ours: TrOPD"])
    assert head.run_chunks is before
