"""A teacher that spans data-parallel ranks: what a rank keeps while their micro-batches are scored."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nemo_tropd.batch import TeacherStates
from nemo_tropd.parallel.ranks import RankLayout
from nemo_tropd.teacher import sharing
from nemo_tropd.teacher.sharing import TeacherSharing


class CountingTeacher:
    """Its states are one number each; knows how many of them are still held."""

    shape, dtype = SimpleNamespace(hidden=1), torch.float32

    def __init__(self) -> None:
        self.alive = weakref.WeakSet[torch.Tensor]()
        self.most = 0
        self.on_host: set[bool] = set()

    def scoring(self) -> Any:
        return nullcontext()

    def states(self, batches: Sequence[Any], *, on_host: bool = False) -> list[TeacherStates]:
        self.on_host.add(on_host)
        made = [torch.full((1, 1), float(batch.number)) for batch in batches]
        for tensor in made:
            self.alive.add(tensor)
        self.most = max(self.most, len(self.alive))
        return [TeacherStates(tensor) for tensor in made]


class Batch:
    """One loss token."""

    count_loss_tokens = 1

    def __init__(self, number: int) -> None:
        self.number, self.for_teacher = number, self


def batches(first: int) -> list[Any]:
    return [Batch(first + i) for i in range(4)]


@pytest.mark.parametrize("on_host", [False, True])
def test_states_of_other_data_ranks_are_not_kept(on_host: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of a step are gigabytes a data rank: the plan counts this rank's own."""
    teacher: Any = CountingTeacher()
    topology: Any = SimpleNamespace(ranks=RankLayout(4, 1, 1, 4), rank=2)
    shared = TeacherSharing(teacher, topology)
    monkeypatch.setattr(shared, "_all_batches", lambda own: [batches(0), batches(4), own, batches(12)])
    found = shared.states(batches(8), on_host=on_host)
    assert [int(s.hidden) for s in found if s is not None] == [8, 9, 10, 11]
    assert teacher.most <= 4 + 1 and teacher.on_host == {on_host}


def test_states_that_travel_are_kept_where_they_are_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    """One micro-batch is on the device at a time."""
    teacher: Any = CountingTeacher()
    topology: Any = SimpleNamespace(
        ranks=RankLayout(2, 2, 1, 1), rank=0, device=torch.device("cpu"), model_group=None, is_last_stage=True,
        teacher_control_group=None,
    )  # fmt: skip
    homes: list[int] = []

    def broadcast(sent: torch.Tensor, src: int, group: Any) -> None:
        if src == 1:
            sent.fill_(-1.0)

    def kept(states: torch.Tensor) -> torch.Tensor:
        homes.append(int(states))
        return states

    monkeypatch.setattr(sharing.dist, "broadcast", broadcast)
    monkeypatch.setattr(sharing, "kept", kept)
    found = TeacherSharing(teacher, topology).states(batches(8), on_host=True)
    assert [int(s.hidden) for s in found if s is not None] == homes == [8, -1, 10, -1] and teacher.on_host == {True}
