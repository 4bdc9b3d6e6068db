"""The optimizer's steps against AdamW in float64: clipping, decay, schedule, and what a bad gradient does."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from megatron.core.distributed import DistributedDataParallel
from torch import Tensor

from nemo_tropd.config import OptimConfig, SchedConfig
from nemo_tropd.convert.families import read_shape
from nemo_tropd.convert.hf_import import load_hf
from nemo_tropd.gpt.build import build_gpt
from nemo_tropd.gpt.ddp import data_parallel
from nemo_tropd.parallel.topology import Topology
from nemo_tropd.training.checkpoint import Checkpoints
from nemo_tropd.training.optimizer import StudentOptimizer
from nemo_tropd.training.resume import RunState
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


@pytest.mark.parametrize("distributed", [False, True])
def test_states_are_loaded_at_another_rate_and_decay(distributed: bool, tmp_path: Path, topology: Topology) -> None:
    """Since 0.19 Megatron finds a group's saved states by its rates, too: a run resumed at another one had none."""
    folder = make_tiny(tmp_path / "hf", "qwen2", layers=1)
    shape = read_shape(folder)

    def student(lr: float, min_lr: float, decay: float) -> tuple[DistributedDataParallel, StudentOptimizer]:
        model = build_gpt(shape, topology)
        load_hf(model, folder, shape, topology)
        ddp = data_parallel(model, topology, distributed_optimizer=distributed)
        sched = SchedConfig(name="cosine", min_lr=min_lr)
        cfg = OptimConfig(lr=lr, weight_decay=decay, sched=sched, distributed=distributed)
        return ddp, StudentOptimizer(cfg, ddp, dtype=torch.float32, clip=1.0, max_steps=9)

    ddp, optimizer = student(1e-2, 1e-4, 0.3)
    ddp.zero_grad_buffer()
    for parameter in ddp.module.parameters():
        parameter.main_grad.normal_()
    assert optimizer.step(0).applied
    checkpoints = Checkpoints(tmp_path / "run", topology, hf_source=folder, keep=1)
    path = checkpoints.save(ddp.module, optimizer, RunState(1, {}, {}, "r"))
    other, loader = student(3e-3, 1e-5, 0.1)
    checkpoints.load(path, other.module, loader)
    saved, loaded = ([s["exp_avg"] for s in one.parts[0].optimizer.state.values()] for one in (optimizer, loader))
    assert saved and all(torch.equal(a, b) for a, b in zip(saved, loaded, strict=True))
    groups = loader.megatron.param_groups
    assert {(g["max_lr"], g["min_lr"]) for g in groups} == {(3e-3, 1e-5)}
    other.zero_grad_buffer()
    assert loader.step(1).learning_rate < 3e-3
    assert {g["weight_decay"] for g in loader.megatron.param_groups} == {0.1, 0.0}
