"""Rollouts to micro-batches: bins, the same number on every rank, and rows laid end to end."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nemo_tropd.batch import Rollout, TokenBatch, gate_uniforms
from nemo_tropd.config import ConfigError, TropdConfig
from nemo_tropd.config_checks import check
from nemo_tropd.training.packing import Packer, even_bins
from tests.unit.test_batch import rollout

pytestmark = pytest.mark.random


def topology(rank: int = 0, ranks: int = 1, tensor: int = 1, sequence: bool = False) -> Any:
    return SimpleNamespace(
        data_rank=rank, data_size=ranks, tensor_size=tensor, sequence_parallel=sequence, device=torch.device("cpu")
    )


def several(count: int) -> list[Rollout]:
    rng = random.Random(random.random())
    return [rollout(rng, i) for i in range(count)]


def pack(rollouts: list[Rollout], place: Any, tokens: int | None) -> list[TokenBatch]:
    return Packer(place, pad_id=0, micro_batch_size=2, tokens_per_micro_batch=tokens, seed=5).pack(rollouts, step=2)


def test_bins_hold_everything_once_within_capacity_and_few() -> None:
    rng = random.Random(random.random())
    for _ in range(200):
        capacity, multiple = rng.randint(10, 60), rng.randint(1, 4)
        lengths = [rng.randint(1, capacity) for _ in range(rng.randint(0, 30))]
        bins = even_bins(lengths, capacity, multiple_of=multiple)
        assert sorted(i for b in bins for i in b) == list(range(len(lengths)))
        loads = [sum(lengths[i] for i in b) for b in bins]
        assert all(load <= capacity for load in loads) and loads == sorted(loads, reverse=True)
        assert len(bins) % multiple == 0
        # Any two bins of a first fit hold more than one bin's capacity between them.
        assert len(bins) - (multiple - 1) <= 2 * sum(lengths) / capacity + 1


def test_bins_are_evenly_filled() -> None:
    assert [sorted(b) for b in even_bins([5, 5, 5, 5, 5, 5], 20)] == [[0, 2, 4], [1, 3, 5]]
    assert even_bins([4], 9, multiple_of=3) == [[0], [], []]
    assert even_bins([7, 2], 7) == [[0], [1]]  # a full row is a row


def test_bins_that_cannot_be_even_stay_within_capacity() -> None:
    # Longest first into the emptiest would make 7 and 5; first fit makes 6 and 6.
    assert [sorted(b) for b in even_bins([3, 3, 2, 2, 2], 6)] == [[0, 1], [2, 3, 4]]


def test_a_sequence_longer_than_a_row_is_refused() -> None:
    with pytest.raises(ValueError, match="a sequence of 9 tokens does not fit a micro-batch of 8"):
        even_bins([3, 9], 8)


@pytest.mark.parametrize(("ranks", "count"), [(1, 9), (3, 10), (4, 2), (2, 0)])
@pytest.mark.parametrize("tokens", [None, 24])
def test_every_rank_has_as_many_and_together_they_have_all(ranks: int, count: int, tokens: int | None) -> None:
    rollouts = several(count)
    parts = [pack(rollouts, topology(r, ranks, tensor=2, sequence=True), tokens) for r in range(ranks)]
    assert len({len(p) for p in parts}) == 1
    batches = [b for p in parts for b in p]
    assert sorted(r.sequence_id for b in batches for r in b.rollouts) == list(range(count))
    assert sum(b.count_loss_tokens for b in batches) == sum(r.loss_tokens for r in rollouts)
    assert all(b.input_ids.size(1) % 2 == 0 for b in batches)
    if tokens is not None:
        assert all(b.input_ids.shape[0] == 1 and sum(b.lengths) <= tokens for b in batches)


def test_a_row_holds_what_its_sequences_hold_alone() -> None:
    rollouts = several(6)
    row = TokenBatch.concatenate(rollouts, pad_id=0, seed=5, step=2, pad_to_multiple=8)
    assert row.segments is not None and row.input_ids.size(1) % 8 == 0
    bounds = row.segments.bounds.tolist()
    assert bounds[-1] == row.input_ids.size(1) and row.segments.longest == int(row.segments.bounds.diff().max())
    tokens, seen = row.loss_tokens(), 0
    for i, r in enumerate(rollouts):
        alone = TokenBatch.pack([r], pad_id=0, seed=5, step=2)
        n, begin = len(r.token_ids), bounds[i]
        assert bounds[i + 1] - begin == n == row.lengths[i]
        assert row.position_ids[0, begin : begin + n].tolist() == list(range(n))
        assert row.input_ids[0, begin : begin + n].tolist() == r.token_ids
        own = alone.loss_tokens()
        here = slice(seen, seen + len(own))
        seen += len(own)
        assert torch.equal(tokens.rows[here] - begin, own.rows)
        for name in ("token_ids", "guided", "uniforms"):
            assert torch.equal(getattr(tokens, name)[here], getattr(own, name)), name
        torch.testing.assert_close(tokens.behavior_log_probs[here], own.behavior_log_probs, equal_nan=True)
        assert tokens.sequence[here].tolist() == [i] * len(own)
    assert seen == len(tokens)  # the tail is not scored
    assert not row.loss_mask[0, sum(len(r.token_ids) for r in rollouts) :].any()


def of_lengths(*lengths: tuple[int, int]) -> list[Rollout]:
    """Rollouts of (prompt, response) tokens each, no two tokens alike."""
    fresh = iter(range(5, 10**6))
    return [
        Rollout([next(fresh) for _ in range(p)], [], [next(fresh) for _ in range(n)], [-1.0] * n, 0, i, i, True)
        for i, (p, n) in enumerate(lengths)
    ]


def test_the_first_position_of_a_sequence_is_its_own() -> None:
    """After a prompt of one token, the first position already scores: it lies on the bound between two sequences."""
    row = TokenBatch.concatenate(of_lengths((1, 2), (1, 3), (1, 1)), pad_id=0, seed=5, step=2)
    assert row.loss_tokens().rows.tolist() == [0, 1, 3, 4, 5, 7]
    assert row.loss_tokens().sequence.tolist() == [0, 0, 1, 1, 1, 2]


@pytest.mark.parametrize("tokens", [None, 24])
def test_every_micro_batch_has_the_draws_of_its_seed_and_step(tokens: int | None) -> None:
    rollouts, seed, step, pad = several(9), random.getrandbits(60), random.randrange(1, 10**6), 91
    packer = Packer(
        topology(tensor=8, sequence=True), pad, micro_batch_size=2, tokens_per_micro_batch=tokens, seed=seed
    )
    for batch in packer.pack(rollouts, step):
        draws = [gate_uniforms(seed, step, r.sequence_id, len(r.token_ids) - 1) for r in batch.rollouts]
        scored = [u[len(r.prompt_ids) - 1 :] for u, r in zip(draws, batch.rollouts, strict=True)]
        assert torch.equal(batch.loss_tokens().uniforms, torch.cat(scored))
        assert (batch.input_ids == pad).sum() == batch.input_ids.numel() - sum(len(r.token_ids) for r in batch.rollouts)


@pytest.mark.parametrize("tokens", [None, 7])
def test_widths_divide_under_sequence_parallelism_alone(tokens: int | None) -> None:
    rollouts = of_lengths((3, 4), (2, 5))
    for tensor, sequence, width in ((2, True, 8), (4, True, 8), (3, True, 9), (2, False, 7), (1, False, 7)):
        batches = pack(rollouts, topology(tensor=tensor, sequence=sequence), tokens)
        assert [b.input_ids.size(1) for b in batches] == [width] * (1 if tokens is None else 2)


def test_moving_a_batch_keeps_its_loss_tokens() -> None:
    row = TokenBatch.concatenate(several(3), pad_id=0, seed=1, step=1)
    moved = row.to(torch.device("cpu"))
    assert moved.selected is not None and moved.loss_tokens() is moved.selected
    for name in ("rows", "token_ids", "guided", "uniforms", "sequence"):
        assert torch.equal(getattr(moved.selected, name), getattr(row.loss_tokens(), name)), name


def test_an_empty_row_is_one_unscored_sequence() -> None:
    row = TokenBatch.concatenate([], pad_id=0, seed=1, step=1, pad_to_multiple=4)
    assert row.input_ids.shape == (1, 4) and len(row.loss_tokens()) == 0
    assert row.segments is not None and row.segments.bounds.tolist() == [0, 4]


@pytest.mark.parametrize(
    ("key", "value", "remedy"),
    [
        ("tokens_per_micro_batch", 4096, "the longest sequence, model.encoder_seq_length = 9216, must fit"),
        ("recompute", "block", "choose one of selective, full, or null"),
    ],
)
def test_settings_that_cannot_work_are_refused(key: str, value: object, remedy: str) -> None:
    cfg = TropdConfig()
    cfg.model.data.path = "prompts.jsonl"
    check(cfg)
    setattr(cfg.model, key, value)
    with pytest.raises(ConfigError, match=remedy) as error:
        check(cfg)
    assert str(error.value).startswith(f"model.{key} = {value!r}: ")
