"""SmolLM2's student under tensor parallel 3 takes the steps that one process takes: real weights, fixed rollouts."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from nemo_tropd.batch import TeacherScores, TeacherStates
from tests.dist.run_distributed import run_distributed

pytestmark = pytest.mark.random

VOCABULARY, STEPS = 49_152, 3
TEXT = (
    "<|im_start|>user\nWhy is the sky blue?<|im_end|>\n<|im_start|>assistant\nSunlight is scattered by the molecules "
    "of the air, and blue light, whose waves are short, is scattered far more than red.<|im_end|>\n"
)


def _train(rank: int, world_size: int, student: str, ids: list[int], seed: int) -> tuple[list[dict[str, float]], float]:
    """Three steps in fp32, rows of 64 tokens: each step's metrics, and how far the weights moved."""
    from nemo_tropd import objectives
    from nemo_tropd.batch import Rollout
    from nemo_tropd.config import OptimConfig
    from nemo_tropd.convert.families import read_shape
    from nemo_tropd.convert.hf_import import load_hf
    from nemo_tropd.gpt.build import build_gpt
    from nemo_tropd.gpt.ddp import data_parallel
    from nemo_tropd.loss.inputs import HeadLayout
    from nemo_tropd.model.student_pass import StudentPass
    from nemo_tropd.parallel.topology import Topology
    from nemo_tropd.teacher.scorer import TeacherScorer
    from nemo_tropd.training.optimizer import StudentOptimizer
    from nemo_tropd.training.packing import Packer

    topology = Topology.start(world_size)
    folder = Path(student)
    shape = read_shape(folder)
    model = build_gpt(shape, topology)
    load_hf(model, folder, shape, topology)
    ddp = data_parallel(model, topology, distributed_optimizer=False)
    optimizer = StudentOptimizer(OptimConfig(lr=1e-4), ddp, dtype=torch.float32, clip=1.0, max_steps=STEPS)
    teacher = TeacherScorer(
        folder.with_name("smollm2-135m-instruct"), topology, dtype=torch.float32, vocab_size=VOCABULARY
    )
    start = [p.detach().clone() for p in model.parameters()]
    draw, found = random.Random(seed), []
    layout = HeadLayout(VOCABULARY, topology.tensor_group)
    for step in range(STEPS):
        lengths = [draw.randint(12, 40) for _ in range(3)]
        rollouts = [Rollout(ids[:9], [], ids[9:n], [-1.0] * (n - 9), 0, i, i, True) for i, n in enumerate(lengths)]
        packer = Packer(topology, pad_id=0, micro_batch_size=1, tokens_per_micro_batch=64, seed=seed)
        batches = packer.pack(rollouts, step)
        scores = teacher.score(batches, top_k=64, entropy=False, chunk_tokens=None)
        optimizer.zero_grad()
        tokens = sum(r.loss_tokens for r in rollouts)
        one_pass = StudentPass(ddp, topology, objectives.build("tropd"), loss_tokens=tokens, sequences=3, layout=layout)
        sums = one_pass.run(batches, scores, [None] * len(batches)).gather()
        found.append({**sums.sums, "grad_norm": optimizer.step(step).grad_norm})
    moved = sum(float((p - q).detach().square().sum()) for p, q in zip(model.parameters(), start, strict=True))
    topology.barrier()
    return found, moved


@pytest.mark.timeout(200)
def test_three_ranks_take_the_steps_of_one() -> None:
    from transformers import AutoTokenizer

    from examples.make_smollm2 import build_student

    student = build_student()
    ids = AutoTokenizer.from_pretrained(student)(TEXT)["input_ids"]
    seed = int(torch.randint(0, 2**31, ()))
    ((one, moved),) = run_distributed(_train, 1, str(student), ids, seed, timeout_s=180)
    assert len(one) == STEPS and moved > 0
    for three, _ in run_distributed(_train, 3, str(student), ids, seed, timeout_s=180):
        for step, (got, want) in enumerate(zip(three, one, strict=True)):
            # Means of terms that cancel are near 0: what rounding does to them does not shrink with them.
            means = {k: v / want["tokens"] for k, v in want.items() if k not in ("loss", "grad_norm")}
            assert {k: got[k] / got["tokens"] for k in means} == pytest.approx(means, rel=1e-4, abs=1e-5), (seed, step)
            for k in ("loss", "grad_norm"):
                assert got[k] == pytest.approx(want[k], rel=1e-4, abs=1e-4), (seed, step, k)


def _two_teachers(rank: int, world_size: int, student: str, ids: list[int], seed: int) -> None:
    """SmolLM2 teaches some sequences, its pruned self the others: scores and losses to the bit those of runs with one
    teacher each."""
    from omegaconf import OmegaConf

    from nemo_tropd import objectives
    from nemo_tropd.batch import Rollout
    from nemo_tropd.config import ModelConfig
    from nemo_tropd.data import Prompt, PromptSet
    from nemo_tropd.model.tropd_model import MegatronTrOPDModel, StudentSource
    from nemo_tropd.parallel.topology import Topology
    from nemo_tropd.training.packing import Packer

    topology, draw = Topology.start(world_size), random.Random(seed)
    cfg = ModelConfig()
    cfg.teacher.path, cfg.data.path = str(Path(student).with_name("smollm2-135m-instruct")), "unused"
    cfg.teachers = {"pruned": {"path": student, "offload": True}}
    lengths = [draw.randint(12, 40) for _ in range(4)]
    rollouts = [Rollout(ids[:9], [], ids[9:n], [-1.0] * (n - 9), 0, i, i, True) for i, n in enumerate(lengths)]
    names = ["default", "pruned", *draw.choices(["default", "pruned"], k=2)]
    prompts = PromptSet(tuple(Prompt(str(i), "", (), None, tuple(ids[:9]), "", teacher=n) for i, n in enumerate(names)))
    batches = Packer(topology, 0, 1, 64, seed).pack(rollouts, 0, prompts)

    def results(teachers: tuple[str, ...]) -> dict[int, tuple[TeacherScores | TeacherStates | None, float]]:
        model = MegatronTrOPDModel(
            OmegaConf.structured(cfg), None, topology=topology, objective=objectives.build("tropd"),
            student=StudentSource(Path(student), "32", VOCABULARY), teachers=teachers,
        )  # fmt: skip
        own = [i for i, batch in enumerate(batches) if batch.teacher in teachers]
        found = {}
        for i, scores in zip(own, model.score([batches[i] for i in own]), strict=True):
            counts = {"step": 0, "loss_tokens": 100, "sequences": 4}
            found[i] = scores, model.get_loss_and_metrics([batches[i]], [scores], **counts)[0]
        return found

    both = results(("default", "pruned"))
    assert len(both) == len(batches) > 1 and len({batch.teacher for batch in batches}) == 2
    for name in ("default", "pruned"):
        for i, (scores, loss) in results((name,)).items():
            assert loss == both[i][1] and (loss != 0.0 or name == "pruned")  # that is what the student is
            for field in ("log_probs", "top_k_log_probs", "top_k_ids"):
                assert torch.equal(getattr(scores, field), getattr(both[i][0], field))


@pytest.mark.timeout(300)
def test_two_teachers_are_two_runs_with_one_each() -> None:
    from transformers import AutoTokenizer

    from examples.make_smollm2 import build_student

    student = build_student()
    ids = AutoTokenizer.from_pretrained(student)(TEXT)["input_ids"]
    run_distributed(_two_teachers, 1, str(student), ids, random.getrandbits(30), timeout_s=240)
