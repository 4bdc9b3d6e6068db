"""What a step asks of its parts: which prompts, which draws, counts over the global batch, numbers of steps."""

from __future__ import annotations

import random
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nemo_tropd.batch import Rollout, TokenBatch, gate_uniforms
from nemo_tropd.data import Prompt, PromptOrder, PromptSet
from nemo_tropd.parallel.metric_sums import MetricSums
from nemo_tropd.rollout.engine import RolloutRequest
from nemo_tropd.training.guidance import Guidance
from nemo_tropd.training.optimizer import StepResult
from nemo_tropd.training.packing import Packer
from nemo_tropd.training.step import TrainStep

pytestmark = pytest.mark.random

BATCH, SAMPLES, PROMPTS = 6, 2, 7


class Recorder:
    """Model and optimizer in one: writes down every call, in order."""

    def __init__(self, seed: int, leader: bool, data_rank: int) -> None:
        self.settings = SimpleNamespace(
            seed=seed, global_batch_size=BATCH, rollout=SimpleNamespace(samples_per_prompt=SAMPLES)
        )
        self.topology: Any = SimpleNamespace(
            is_leader=leader, synchronize=lambda: None, data_rank=data_rank, data_size=2, tensor_size=1,
            sequence_parallel=False, device=torch.device("cpu"), any_rank=bool,
        )  # fmt: skip
        self.calls: list[str] = []
        self.requests: Sequence[RolloutRequest] | None = None
        self.batches: Sequence[TokenBatch] = ()
        self.counts: dict[str, Any] = {}
        # Of unequal lengths, one without a token that enters the loss.
        self.rollouts = [Rollout([5] * (i + 1), [], [6] * i, [-1.0] * i, 0, i, i, True) for i in range(BATCH)]

    def __getattr__(self, name: str) -> Any:
        return lambda *args: self.calls.append(" ".join([name, *map(str, args)]))

    def infer(self, requests: Sequence[RolloutRequest] | None) -> list[Rollout]:
        self.requests = requests
        return self.rollouts

    def score(self, batches: Sequence[TokenBatch]) -> list[None]:
        self.batches = batches
        return [None] * len(batches)

    def get_loss_and_metrics(self, batches: Any, scores: Any, **counts: Any) -> tuple[float, MetricSums]:
        assert batches is self.batches and len(scores) == len(batches)
        self.calls.append("gradients")
        self.counts = counts
        return 0.0, MetricSums()

    def step(self, step: int) -> StepResult:
        self.calls.append(f"step {step}")
        return StepResult(1.0, True, 0.1)


PROMPT_SET = PromptSet(tuple(Prompt(str(i), "", (), None, (10 + i, 3), "here") for i in range(PROMPTS)))


def run(step: int, seed: int, *, leader: bool = True, data_rank: int = 0) -> Recorder:
    made: Any = Recorder(seed, leader, data_rank)
    TrainStep(
        made,
        made,
        prompts=PROMPT_SET,
        guidance=Guidance(seed=seed, total_steps=100, max_new_tokens=9, samples_per_prompt=SAMPLES),
        packer=Packer(made.topology, pad_id=0, micro_batch_size=2, tokens_per_micro_batch=None, seed=seed),
    ).run(step, keep_tokens=True)
    return made


def test_the_requests_are_those_of_the_steps_prompts() -> None:
    seed = random.getrandbits(40)
    for step in (0, 1, random.randrange(2, 1000)):
        places = PromptOrder(PROMPTS, seed).batch(step, BATCH // SAMPLES)
        wanted = Guidance(seed=seed, total_steps=100, max_new_tokens=9, samples_per_prompt=SAMPLES).plan(
            [PROMPT_SET[i] for i in places], step, prompt_indices=places
        )
        assert run(step, seed).requests == wanted
    assert run(3, seed, leader=False).requests is None


@pytest.mark.parametrize("data_rank", [0, 1])
def test_losses_are_divided_by_the_global_batch(data_rank: int) -> None:
    """Every rank passes its own micro-batches, and the counts over all ranks'."""
    made = run(4, 1, data_rank=data_rank)
    assert [r.sequence_id for b in made.batches for r in b.rollouts] == ([4, 2, 0] if data_rank == 0 else [5, 3, 1])
    assert made.counts == {"step": 4, "loss_tokens": 0 + 1 + 2 + 3 + 4 + 5, "sequences": 5, "keep_tokens": True}


def test_the_gates_draws_are_the_steps() -> None:
    seed, step = random.getrandbits(60), random.randrange(1, 10**6)
    for batch in run(step, seed).batches:
        wanted = [gate_uniforms(seed, step, r.sequence_id, 2 * r.sequence_id)[r.sequence_id :] for r in batch.rollouts]
        assert torch.equal(batch.loss_tokens().uniforms, torch.cat(wanted))


def test_gradients_are_cleared_made_applied_and_numbered_in_this_order() -> None:
    calls = run(4, 1).calls
    assert [c for c in calls if c.split()[0] in ("zero_grad", "gradients", "step", "finish_training_step")] == [
        "zero_grad", "gradients", "step 4", "finish_training_step 5",
    ]  # fmt: skip
