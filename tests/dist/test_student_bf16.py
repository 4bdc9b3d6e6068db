"""bf16 with fp32 gradients and master weights: three steps over data-parallel ranks against one process, and the head's
gradient, which goes to the fp32 buffer whole."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.dist.run_distributed import run_distributed
from tests.tiny_models import make_tiny

pytestmark = pytest.mark.random

VOCABULARY, STEPS = 131, 3


def _rollouts(seed: int, step: int) -> list[Any]:
    from nemo_tropd.batch import Rollout

    draw = random.Random(f"{seed} {step}")
    rollouts = []
    for i in range(6):
        prompt, response = ([draw.randrange(VOCABULARY) for _ in range(draw.randint(2, 20))] for _ in range(2))
        rollouts.append(Rollout(prompt, [], response, [-1.0] * len(response), 0, i, i, True))
    return rollouts


def _train(topology: Any, folder: Path, *, dtype: torch.dtype, distributed: bool, seed: int) -> dict[str, Any]:
    """Three steps; gradient norms, losses, final weights, and the head's first gradient, summed over ranks."""
    from nemo_tropd import objectives
    from nemo_tropd.config import OptimConfig
    from nemo_tropd.convert.families import read_shape
    from nemo_tropd.convert.hf_import import load_hf
    from nemo_tropd.gpt.build import build_gpt, head_weight
    from nemo_tropd.gpt.ddp import data_parallel
    from nemo_tropd.loss.inputs import HeadLayout
    from nemo_tropd.model.student_pass import StudentPass
    from nemo_tropd.teacher.scorer import TeacherScorer
    from nemo_tropd.training.optimizer import StudentOptimizer
    from nemo_tropd.training.packing import Packer

    shape = read_shape(folder)
    model = build_gpt(shape, topology, dtype=dtype)
    load_hf(model, folder, shape, topology)
    start = {name: p.detach().float().flatten().clone() for name, p in model.named_parameters()}
    student = data_parallel(model, topology, distributed_optimizer=distributed)
    assert student.ddp_config.overlap_grad_reduce == (topology.data_size > 1)
    # Of a rate at which a step that moves each weight by its gradient's sign changes the loss little: at 1e-2 the signs
    # of the smallest ones, which are roundings, moved the next norm by 19% in one draw of a hundred.
    optimizer = StudentOptimizer(
        OptimConfig(lr=2e-3, distributed=distributed), student, dtype=dtype, clip=1.0, max_steps=STEPS
    )
    teacher = TeacherScorer(folder.with_name("teacher"), topology, dtype=dtype, vocab_size=VOCABULARY)
    found: dict[str, Any] = {"norms": [], "losses": []}
    for step in range(STEPS):
        rollouts = _rollouts(seed, step)
        packer = Packer(topology, pad_id=0, micro_batch_size=1, tokens_per_micro_batch=48, seed=seed)
        batches = packer.pack(rollouts, step)
        scores = teacher.score(batches, top_k=8, entropy=False, chunk_tokens=None)
        one_pass = StudentPass(
            student,
            topology,
            objectives.build("fkl"),
            loss_tokens=sum(r.loss_tokens for r in rollouts),
            sequences=len(rollouts),
            layout=HeadLayout(VOCABULARY, topology.tensor_group),
        )
        if step == 0 and not distributed:
            with _head_through_autograd():
                optimizer.zero_grad()
                one_pass.run(batches, scores, [None] * len(batches))
            found["head_through_autograd"] = head_weight(model).main_grad.clone()
        optimizer.zero_grad()
        sums = one_pass.run(batches, scores, [None] * len(batches))
        if step == 0 and not distributed:
            found["head"] = head_weight(model).main_grad.clone()
        found["losses"].append(sums.gather().sums["loss"])
        result = optimizer.step(step)
        assert result.applied
        found["norms"].append(result.grad_norm)
    found["moved"] = torch.cat([p.detach().float().flatten() - start[name] for name, p in model.named_parameters()])
    found["weights"] = {name: p.detach().float().clone() for name, p in model.named_parameters()}
    found["dtypes"] = {(p.dtype, p.main_grad.dtype) for p in model.parameters()}
    return found


@contextmanager
def _head_through_autograd() -> Iterator[None]:
    """The head gives its weight's gradient to autograd, in the weight's own bf16, as if there were no fp32 buffer."""
    from nemo_tropd.model import student_pass

    original = student_pass.head_loss

    def without_buffer(*args: Any, **options: Any) -> Any:
        given = options.pop("options")
        assert given.accumulate_main_grad == (args[1].dtype == torch.bfloat16)
        return original(*args, options=replace(given, accumulate_main_grad=False), **options)

    student_pass.head_loss = without_buffer
    try:
        yield
    finally:
        student_pass.head_loss = original


def _run(rank: int, world_size: int, folders: list[str], seed: int) -> list[dict[str, dict[str, Any]]]:
    from nemo_tropd.parallel.topology import Topology

    topology = Topology.start()
    cases = ("plain", "distributed") if world_size > 1 else ("plain", "fp32")
    return [
        {
            name: _train(
                topology,
                Path(folder),
                dtype=torch.float32 if name == "fp32" else torch.bfloat16,
                distributed=name == "distributed",
                seed=seed,
            )
            for name in cases
        }
        for folder in folders
    ]


def _relative(got: Tensor, want: Tensor) -> float:
    return float((got - want).norm() / want.norm())


@pytest.mark.timeout(150)
def test_bf16_takes_the_same_steps_on_data_parallel_ranks(tmp_path: Path) -> None:
    seed = int(torch.randint(0, 2**31, ()))
    folders = []
    for tied in (True, False):
        folders.append(str(make_tiny(tmp_path / str(tied) / "student", "qwen2", tied, hidden=64, seed=1)))
        make_tiny(tmp_path / str(tied) / "teacher", "qwen2", tied, hidden=64, seed=2)
    (one,) = run_distributed(_run, 1, folders, seed)
    two = run_distributed(_run, 2, folders, seed)
    for folder, single, first, second in zip(folders, one, *two, strict=True):
        where, exact, reference = (seed, folder), single["fp32"], single["plain"]
        assert reference["dtypes"] == {(torch.bfloat16, torch.float32)}
        assert reference["norms"] == pytest.approx(exact["norms"], rel=0.05), where
        assert _relative(reference["moved"], exact["moved"]) < 0.5, where
        for case in (reference, first["plain"]):
            # They differ by roundings to bf16 alone: none where the head took one chunk and nothing shares its weight.
            assert _relative(case["head"], case["head_through_autograd"]) < 1e-2, where
        for ranks, name in product((first, second), ("plain", "distributed")):
            assert ranks[name]["losses"] == pytest.approx(reference["losses"], rel=1e-2), (where, name)
            assert ranks[name]["norms"] == pytest.approx(reference["norms"], rel=3e-2), (where, name)
            assert _relative(ranks[name]["moved"], reference["moved"]) < 0.15, (where, name)
        assert _relative(first["plain"]["head"], reference["head"]) < 1e-2, where
        for name in ("plain", "distributed"):
            for key, weight in first[name]["weights"].items():
                assert torch.equal(weight, second[name]["weights"][key]), (where, name, key)
