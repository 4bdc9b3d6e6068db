"""Alignment, masks and draws of a packed micro-batch."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from nemo_tropd.batch import Rollout, TokenBatch, gate_uniforms
from tests.oracles import philox

pytestmark = pytest.mark.random


def rollout(rng: random.Random, sequence_id: int) -> Rollout:
    ids = [[rng.randrange(5, 90) for _ in range(rng.randint(*span))] for span in ((1, 6), (0, 3), (0, 7))]
    return Rollout(ids[0], ids[1], ids[2], [-rng.random() for _ in ids[2]], 3, sequence_id, sequence_id, True)


@pytest.fixture
def rollouts() -> list[Rollout]:
    rng = random.Random(random.random())
    return [rollout(rng, i) for i in range(7)]


def pack(rollouts: list[Rollout], **kw: int) -> TokenBatch:
    return TokenBatch.pack(rollouts, pad_id=0, seed=5, step=2, **kw)


def test_each_output_position_scores_the_next_token(rollouts: list[Rollout]) -> None:
    batch = pack(rollouts)
    for b, r in enumerate(rollouts):
        n, start, middle = len(r.token_ids), len(r.prompt_ids), len(r.prompt_ids) + len(r.prefix_ids)
        assert batch.input_ids[b, :n].tolist() == r.token_ids
        scored = batch.loss_mask[b].nonzero()[:, 0].tolist()
        assert scored == list(range(start - 1, n - 1))
        assert [batch.labels[b, t].item() for t in scored] == r.token_ids[start:]
        assert batch.guided[b].nonzero()[:, 0].tolist() == list(range(start - 1, middle - 1))
        behavior = batch.behavior_log_probs[b]
        assert behavior[middle - 1 : n - 1].tolist() == pytest.approx(r.response_log_probs)
        assert behavior.isnan().sum() == behavior.numel() - len(r.response_ids)


def test_loss_tokens_are_the_masked_positions(rollouts: list[Rollout]) -> None:
    batch = pack(rollouts)
    tokens = batch.loss_tokens()
    assert len(tokens) == batch.count_loss_tokens == sum(r.loss_tokens for r in rollouts)
    assert tokens.token_ids.tolist() == [i for r in rollouts for i in r.token_ids[len(r.prompt_ids) :]]
    assert tokens.sequence.tolist() == [b for b, r in enumerate(rollouts) for _ in range(r.loss_tokens)]


def test_draws_do_not_depend_on_packing(rollouts: list[Rollout]) -> None:
    together = pack(rollouts, pad_to_multiple=8)
    for b, r in enumerate(rollouts):
        alone = pack([r])
        mask = alone.loss_mask[0]
        kept = together.uniforms[b, : mask.numel()][mask[: together.uniforms.size(1)]]
        assert torch.equal(kept, alone.uniforms[0][mask])


def test_draws_are_uniform_and_differ_by_seed_step_and_sequence() -> None:
    base = gate_uniforms(1, 2, 3, 4000)
    assert base.min() >= 0 and base.max() < 1 and abs(base.mean() - 0.5) < 0.03
    assert torch.equal(gate_uniforms(1, 2, 3, 10), base[:10])
    for other in ((2, 2, 3), (1, 3, 3), (1, 2, 4)):
        assert abs(torch.corrcoef(torch.stack([base, gate_uniforms(*other, 4000)]))[0, 1]) < 0.1


def gate_draws(seed: int, step: int, sequence_id: int, count: int) -> list[float]:
    """The upper 24 bits of each word, as a fraction."""
    return [(word >> 40) / 2**24 for word in philox.stream((seed, step), count, word_2=sequence_id)]


def test_draws_are_philox_words_of_their_key_and_sequence() -> None:
    wide = 2**64 - 1 - random.getrandbits(9)  # a float64 cannot tell it from its neighbours
    for seed, step, sequence in ((wide, 3, 5), (random.getrandbits(40), wide, 0), (-1, 0, random.getrandbits(50))):
        assert gate_uniforms(seed, step, sequence, 23).tolist() == gate_draws(seed, step, sequence, 23)


@pytest.mark.parametrize("layout", [TokenBatch.pack, TokenBatch.concatenate])
def test_the_draws_of_a_batch_are_those_of_seed_step_sequence_and_position(layout: Any) -> None:
    seed, step = random.getrandbits(62), random.randrange(1, 10**6)
    rng = random.Random(random.random())
    rollouts = [rollout(rng, sequence) for sequence in (41, 1000 + random.randrange(1000), 0)]
    rollouts.insert(1, Rollout([4, 5], [6], [7, 8], [-1.0, -2.0], 3, 7, 7, True))  # these draws enter the loss
    batch = layout(rollouts, pad_id=0, seed=seed, step=step)
    wanted = [
        draw
        for r in rollouts
        for draw in gate_draws(seed, step, r.sequence_id, len(r.token_ids) - 1)[len(r.prompt_ids) - 1 :]
    ]
    assert batch.loss_tokens().uniforms.tolist() == wanted


def test_empty_micro_batch_has_no_loss_tokens() -> None:
    batch = pack([])
    assert batch.input_ids.shape == (1, 2) and batch.count_loss_tokens == 0 and len(batch.loss_tokens()) == 0


def test_a_rollout_without_prompt_or_with_wrong_lengths_is_refused() -> None:
    with pytest.raises(ValueError, match="prompt of at least one token"):
        Rollout([], [], [1], [-1.0], 0, 0, 0, True)
    with pytest.raises(ValueError, match="2 response tokens but 1 log-probabilities"):
        Rollout([1], [], [1, 2], [-1.0], 0, 0, 0, True)
