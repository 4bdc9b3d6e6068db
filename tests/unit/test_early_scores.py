"""Which rank scores which rollout early, and what becomes of one that is generated again."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from nemo_tropd.batch import Rollout, TokenBatch
from nemo_tropd.data import Prompt, PromptSet
from nemo_tropd.training.early_scores import EarlyScores, EarlyScoring
from nemo_tropd.training.packing import Packer


class Recorded:
    """Scores of a teacher that keeps what it is given."""

    def __init__(self) -> None:
        self.given, self.closed = list[tuple[int, TokenBatch]](), 0

    def add(self, sequence_id: int, batch: TokenBatch) -> None:
        self.given.append((sequence_id, batch))

    def ready(self) -> set[int]:
        return {i for i, _ in self.given[:-1]}  # still at the last one

    def collect(self) -> Mapping[int, Tensor]:
        raise NotImplementedError

    def close(self) -> None:
        self.closed += 1


def scoring(data_rank: int, monkeypatch: pytest.MonkeyPatch, *names: str) -> tuple[EarlyScoring, dict[str, Recorded]]:
    """Of the first of two data-parallel ranks, or the second; the teachers a and b have prompts in turn."""
    topology: Any = SimpleNamespace(
        data_rank=data_rank, data_size=2, tensor_size=1, sequence_parallel=False, device=torch.device("cpu"),
        gather_objects=lambda own: [own, set()],
    )  # fmt: skip
    teachers = {name: object() for name in "ab"}
    prompts = PromptSet(tuple(Prompt(f"p:{i}", "", (), None, (5, 6), "fresh", teacher="ab"[i % 2]) for i in range(8)))
    model: Any = SimpleNamespace(teachers=teachers, topology=topology)
    made = {name: Recorded() for name in "ab"}
    by_teacher = {teachers[name]: made[name] for name in "ab"}
    monkeypatch.setattr(EarlyScoring, "_early", lambda self, teacher: by_teacher[teacher])
    packer = Packer(topology, 0, 2, None, 1)
    monkeypatch.setattr(Packer, "on_every_rank", lambda self: self)
    monkeypatch.setattr(
        Packer, "pack", lambda self, rollouts, step, prompts: [SimpleNamespace(rollouts=rollouts, step=step)]
    )
    return EarlyScoring(model, packer, prompts, names), made


def rollout(number: int, *ids: int) -> Rollout:
    return Rollout([1], [], list(ids), [-1.0] * len(ids), 0, number, number, True)


@pytest.mark.parametrize("data_rank", [0, 1])
def test_each_data_rank_scores_its_own(data_rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    early, made = scoring(data_rank, monkeypatch, "a", "b")
    with early.of_step(7) as scores:
        scores.finished([rollout(5, 9), rollout(0, 9, 9)], False)
        scores.finished([rollout(i, 9) for i in (1, 4)], False)
        scores.finished([rollout(i, 9) for i in (2, 3)] + [rollout(6), rollout(7)], True)  # two are empty
        mine = made["ab"[data_rank]]
        assert [i for i, _ in mine.given] == ([0, 4, 2] if data_rank == 0 else [5, 1, 3])
        assert all(b.step == 7 and [r.sequence_id for r in b.rollouts] == [i] for i, b in mine.given)
        assert not made["ba"[data_rank]].given  # its prompts are the other rank's
        scores.all_finished()
        assert scores.fraction == pytest.approx(3 / 7 if data_rank == 0 else 2 / 7)  # the late ones do not count
    assert [made[name].closed for name in "ab"] == [1, 1]


def test_what_a_new_engine_generates_otherwise_is_scored_again(monkeypatch: pytest.MonkeyPatch) -> None:
    early, made = scoring(0, monkeypatch, "a")
    with pytest.raises(ZeroDivisionError), early.of_step(0) as scores:
        scores.finished([rollout(0, 9, 8), rollout(2, 9)], False)
        scores.finished([rollout(0, 9, 8), rollout(2, 7)], False)
        assert [(i, b.rollouts[0].response_ids) for i, b in made["a"].given] == [(0, [9, 8]), (2, [9]), (2, [7])]
        raise ZeroDivisionError
    assert made["a"].closed == 1 and not made["b"].closed


def test_teachers_that_do_not_score_early_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    early, made = scoring(0, monkeypatch, "b")
    with early.of_step(0) as scores:
        scores.finished([rollout(0, 9), rollout(1, 9)], True)
        assert isinstance(scores, EarlyScores) and not made["a"].given and not made["b"].given
