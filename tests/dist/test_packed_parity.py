"""Sequences laid end to end against one sequence at a time: log-probabilities of student and teacher, and gradients."""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests.dist.checks import Checks
from tests.dist.run_distributed import run_distributed
from tests.tiny_models import make_tiny

pytestmark = pytest.mark.random

TOLERANCE = 1e-5
VOCABULARY, K = 131, 8
LENGTHS = (41, 3, 18, 26, 9, 33, 2)  # the longest beyond Llama 3's original 32 positions
ROW = 64


class Case(NamedTuple):
    family: str
    tied: bool
    tensor: int = 1
    pipeline: int = 1
    sequence: bool = False
    recompute: str | None = None  # of the concatenated passes; the others compute nothing again


def _rollouts(seed: int) -> list[Any]:
    from nemo_tropd.batch import Rollout

    draw = random.Random(seed)
    rollouts = []
    for i, length in enumerate(LENGTHS):
        ids = [draw.randrange(VOCABULARY) for _ in range(length)]
        start = draw.randint(1, max(1, length // 2))
        middle = draw.randint(start, length)
        response = ids[middle:]
        rollouts.append(
            Rollout(ids[:start], ids[start:middle], response, [-draw.random() for _ in response], 0, i, i, True)
        )
    return rollouts


class Side:
    """One way of laying out the same rollouts: everything it gives, by sequence."""

    def __init__(self, student: Any, teacher: Any, topology: Any, batches: list[Any], count: int) -> None:
        from nemo_tropd import objectives
        from nemo_tropd.loss.head import score_tokens
        from nemo_tropd.loss.inputs import HeadLayout
        from nemo_tropd.gpt.build import head_weight
        from nemo_tropd.gpt.forward import pipeline_forward
        from nemo_tropd.model.student_pass import StudentPass

        model = student.module
        scores = teacher.score(batches, top_k=K, entropy=False, chunk_tokens=None)
        layout = HeadLayout(VOCABULARY, topology.tensor_group, topology.sequence_parallel)
        self.values: dict[str, list[Tensor]] = {"student": [], "teacher": [], "top_k": []}
        order: list[tuple[int, int]] = []
        hidden = pipeline_forward(model, batches, topology)
        for batch, score, states in zip(batches, scores, hidden, strict=True):
            if score is None or states is None:
                continue
            tokens = batch.loss_tokens()
            seen = score_tokens(states, head_weight(model), tokens, score, layout)
            self.values["student"].append(seen.student_log_probs)
            self.values["teacher"].append(score.log_probs)
            self.values["top_k"].append(score.top_k_log_probs)
            order += [(int(batch.sequence_ids[s]), i) for i, s in enumerate(tokens.sequence.tolist())]
        by_sequence = sorted(range(len(order)), key=order.__getitem__)
        self.joined = {name: torch.cat(v)[by_sequence] for name, v in self.values.items() if v}
        student.zero_grad_buffer()
        one_pass = StudentPass(
            student,
            topology,
            objectives.build("tropd"),
            loss_tokens=count,
            sequences=len(LENGTHS),
            layout=layout,
        )
        self.sums = one_pass.run(batches, scores, [None] * len(batches))
        self.gradients = {name: p.main_grad.clone() for name, p in model.named_parameters()}


def _check_case(checks: Checks, root: str, case: Case, seed: int) -> None:
    from megatron.core import parallel_state

    from nemo_tropd.convert.families import read_shape
    from nemo_tropd.convert.hf_import import load_hf
    from nemo_tropd.gpt.build import build_gpt
    from nemo_tropd.gpt.ddp import data_parallel, recompute_fields
    from nemo_tropd.parallel.topology import Topology
    from nemo_tropd.teacher.scorer import TeacherScorer
    from nemo_tropd.training.packing import Packer

    topology = Topology.start(case.tensor, case.pipeline, case.sequence)
    folder = Path(root) / f"{case.family}-{case.tied}"
    shape = read_shape(folder)
    teacher = TeacherScorer(Path(root) / f"{case.family}-teacher", topology, dtype=torch.float32, vocab_size=VOCABULARY)
    rollouts = _rollouts(seed)
    count = sum(r.loss_tokens for r in rollouts)

    def side(recompute: str | None, tokens: int | None) -> Side:
        model = build_gpt(shape, topology, **recompute_fields(recompute))
        load_hf(model, folder, shape, topology)
        student = data_parallel(model, topology, distributed_optimizer=False)
        packer = Packer(topology, pad_id=0, micro_batch_size=1, tokens_per_micro_batch=tokens, seed=seed)
        return Side(student, teacher, topology, packer.pack(rollouts, step=1), count)

    alone, packed = side(None, None), side(case.recompute, ROW)
    for name, want in alone.joined.items():
        apart = float(((packed.joined[name] - want).abs() / want.abs().clamp(min=1)).max())
        checks.true(f"{case} {name}", apart < TOLERANCE, apart)
    for name, want in alone.gradients.items():
        # A rank's part can be tiny beside the rest (3 of 131 embedding rows): the error is one of the parameter.
        size = want.double().square().sum()
        dist.all_reduce(size, group=topology.tensor_group)
        checks.close(f"{case} {name}", packed.gradients[name], want, TOLERANCE, size.sqrt())
    checks.true(f"{case} metrics", packed.sums.sums.keys() == alone.sums.sums.keys())
    for name, value in alone.sums.sums.items():
        seen = packed.sums.sums[name]
        checks.true(f"{case} {name}", seen == pytest.approx(value, rel=1e-4, abs=1e-6), (seen, value))
    topology.barrier()
    parallel_state.destroy_model_parallel()


def _check_cases(rank: int, world_size: int, root: str, cases: list[Case], seed: int) -> tuple[int, list[str]]:
    checks = Checks()
    for case in cases:
        _check_case(checks, root, case, seed)
    return checks.count, checks.failures


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("packed")
    for family, tied in (("llama3", True), ("qwen2", False), ("qwen3", True)):
        make_tiny(root / f"{family}-{tied}", family, tied, hidden=64, seed=3)
        make_tiny(root / f"{family}-teacher", family, not tied, hidden=64, seed=4)
    return root


@pytest.mark.timeout(200)
@pytest.mark.parametrize(
    ("world_size", "cases"),
    [
        pytest.param(
            1,
            [Case("llama3", True), Case("qwen2", False, recompute="full"), Case("qwen3", True, recompute="selective")],
            id="one",
        ),
        pytest.param(
            2,
            [
                Case("llama3", True, tensor=2, recompute="full"),
                Case("qwen2", False, tensor=2, sequence=True, recompute="selective"),
                Case("qwen3", True, tensor=2, sequence=True, recompute="full"),
                Case("llama3", True, pipeline=2),
                Case("qwen2", False, pipeline=2, recompute="full"),
            ],
            id="two",
        ),
        pytest.param(4, [Case("qwen3", True, tensor=2, pipeline=2, sequence=True)], id="four"),
    ],
)
def test_concatenated_sequences_are_the_sequences(root: Path, world_size: int, cases: list[Case]) -> None:
    seed = random.randrange(2**31)
    for rank, (count, failures) in enumerate(run_distributed(_check_cases, world_size, str(root), cases, seed)):
        assert count >= 10 * len(cases) and not failures, (rank, seed, failures)
