"""The optimizer's steps against AdamW in float64: clipping, decay, schedule, and what a bad gradient does."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from nemo_tropd.config import OptimConfig, SchedConfig
from nemo_tropd.convert.families import read_shape
from nemo_tropd.convert.hf_import import load_hf
from nemo_tropd.gpt.build import build_gpt
from nemo_tropd.gpt.ddp import data_parallel
from nemo_tropd.parallel.topology import Topology
from nemo_tropd.training.optimizer import StudentOptimizer
from tests.tiny_models import make_tiny

pytestmark = pytest.mark.random

LR, MIN_LR, WARMUP, STEPS, DECAY, BETAS, EPS, CLIP = 3e-2, 1e-3, 2, 6, 0.3, (0.8, 0.9), 1e-6, 2.0


class Student:
    """A tiny model under the optimizer, and its parameters in float64 under the formulas of AdamW."""

    def __init__(self, folder: Path, topology: Topology) -> None:
        shape = read_shape(folder)
        model = build_gpt(shape, topology)
        load_hf(model, folder, shape, topology)
        self.ddp = data_parallel(model, topology, distributed_optimizer=False)
        sched = SchedConfig(name="cosine", warmup_steps=WARMUP, min_lr=MIN_LR)
        cfg = OptimConfig(lr=LR, weight_decay=DECAY, betas=list(BETAS), eps=EPS, sched=sched)
        self.optimizer = StudentOptimizer(cfg, self.ddp, dtype=torch.float32, clip=CLIP, max_steps=STEPS)
        self.parameters = dict(model.named_parameters())
        self.wanted = {name: p.detach().double().clone() for name, p in self.parameters.items()}
        self.first = {name: torch.zeros_like(p) for name, p in self.wanted.items()}
        self.second = {name: torch.zeros_like(p) for name, p in self.wanted.items()}
        self.applied = 0

    def give(self, size: float) -> dict[str, Tensor]:
        """A random gradient of norm ``size`` in DDP's buffers."""
        self.ddp.zero_grad_buffer()
        grads = {name: torch.randn_like(p).double() for name, p in self.wanted.items()}
        norm = math.sqrt(sum(float(g.square().sum()) for g in grads.values()))
        for name, p in self.parameters.items():
            p.main_grad.copy_(grads[name] * (size / norm))
        return {name: p.main_grad.double().clone() for name, p in self.parameters.items()}

    def expect(self, grads: dict[str, Tensor], lr: float, size: float) -> None:
        """One step of AdamW (Loshchilov and Hutter): decay apart from the moments, none for norms and biases."""
        self.applied += 1
        shrink = min(1.0, CLIP / size)
        for name, g in grads.items():
            g, p = g * shrink, self.wanted[name]
            self.first[name] = BETAS[0] * self.first[name] + (1 - BETAS[0]) * g
            self.second[name] = BETAS[1] * self.second[name] + (1 - BETAS[1]) * g * g
            mean = self.first[name] / (1 - BETAS[0] ** self.applied)
            square = self.second[name] / (1 - BETAS[1] ** self.applied)
            decay = DECAY if p.dim() > 1 else 0.0
            self.wanted[name] = p - lr * (mean / (square.sqrt() + EPS) + decay * p)

    def step(self, step: int, size: float = 1.0) -> None:
        """One step on a random gradient, and the one expected."""
        self.expect(self.give(size), learning_rate(step), size)
        assert self.optimizer.step(step).applied

    def check(self) -> None:
        """The parameters are the expected ones."""
        for name, p in self.parameters.items():
            torch.testing.assert_close(p.detach().double(), self.wanted[name], rtol=2e-4, atol=2e-5, msg=name)


@pytest.fixture
def student(tmp_path: Path, topology: Topology) -> Student:
    return Student(make_tiny(tmp_path, "qwen2", layers=1, seed=int(torch.randint(2**31, ()))), topology)


def learning_rate(step: int) -> float:
    """A line from 0 to LR over the first WARMUP steps, then half a cosine to MIN_LR at the last."""
    done = step + 1
    if done <= WARMUP:
        return LR * done / WARMUP
    return MIN_LR + (LR - MIN_LR) * (1 + math.cos(math.pi * (done - WARMUP) / (STEPS - WARMUP))) / 2


def test_steps_are_those_of_clipped_adamw(student: Student) -> None:
    assert {name.rpartition(".")[2] for name in student.wanted} == {"weight", "bias"}
    for step, size in enumerate((0.5, 40.0, 1.9, 7.0, 0.1, 3.0)):
        grads = student.give(size)
        result = student.optimizer.step(step)
        assert result.applied and result.grad_norm == pytest.approx(size, rel=1e-5)
        assert result.learning_rate == pytest.approx(learning_rate(step), rel=1e-6)
        student.expect(grads, learning_rate(step), size)
        student.check()


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_a_gradient_that_is_not_finite_changes_nothing(student: Student, bad: float) -> None:
    """Not the weights, and not the moments: the next step is the one it would have been."""
    student.step(0)
    student.give(1.0)
    next(iter(student.parameters.values())).main_grad.view(-1)[3] = bad
    result = student.optimizer.step(1)
    assert not result.applied and not math.isfinite(result.grad_norm)
    student.check()
    student.step(2)
    student.check()


def test_a_resumed_schedule_goes_by_the_step(student: Student) -> None:
    """The rate is that of the step's number, whatever was stepped before."""
    for step in (4, 0, 2):
        student.give(1.0)
        assert student.optimizer.step(step).learning_rate == pytest.approx(learning_rate(step), rel=1e-6)
