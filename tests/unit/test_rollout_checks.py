"""What an engine generated is checked before anything is trained on it: the student's rollouts, the teacher's text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nemo_tropd.batch import Rollout
from nemo_tropd.parallel.agreement import World
from nemo_tropd.rollout.collective import EveryRankRollouts, RankZeroRollouts, Rollouts
from nemo_tropd.rollout.engine import EngineError, Finished, RolloutRequest, Sampling
from nemo_tropd.training.teacher_responses import TeacherResponses
from tests.doubles import OnEveryRank, ReplayEngine

VOCABULARY, PROMPT, MOST = 50, 17, 6


class WrongEngine(ReplayEngine):
    """Changes the last rollout."""

    def __init__(self, **changes: Any) -> None:
        super().__init__(VOCABULARY)
        self.changes = changes

    def generate(self, requests: Sequence[RolloutRequest], finished: Finished | None = None) -> list[Rollout]:
        *others, last = super().generate(requests)
        rollouts = [*others, replace(last, **self.changes)]
        if finished is not None:
            for r in rollouts:
                finished(r)
        return rollouts


class OneRank(World):
    """A world of one."""

    data_rank, data_size, tensor_rank = 0, 1, 0


def answer(*ids: int, log_prob: float = -1.0, finished: bool = True) -> dict[str, Any]:
    return {"response_ids": list(ids), "response_log_probs": [log_prob] * len(ids), "finished": finished}


WRONG = {
    "an id past the vocabulary": (answer(4, 50), "token id 50, outside the vocabulary of 50"),
    "a negative id": (answer(-1, 4), "token id -1, outside the vocabulary of 50"),
    "not a number": (answer(4, log_prob=float("nan")), "log-probability nan for token id 4"),
    "infinite": (answer(4, log_prob=float("-inf")), "log-probability -inf for token id 4"),
    "too long": (answer(*range(MOST + 1)), "7 tokens, finished; 6 were asked for"),
    "empty": (answer(), "0 tokens, finished; 6 were asked for"),
    "cut short": (answer(4, 5, finished=False), "2 tokens, not finished; 6 were asked for"),
    "another prompt": ({"prompt_ids": [9]}, "another prompt or prefix than was asked for"),
    "another prefix": ({"prefix_ids": [9]}, "another prompt or prefix than was asked for"),
    "another place": ({"sequence_id": 3}, "sequence 3 of prompt 17 in the place of sequence 1"),
}


@pytest.mark.parametrize("kind", [RankZeroRollouts, EveryRankRollouts])
@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_rollouts_are_refused_by_prompt_and_value(kind: type[Rollouts], wrong: str) -> None:
    changes, text = WRONG[wrong]
    asked = [RolloutRequest([1, 2], [3], i, i, 16 + i, MOST) for i in range(2)]
    right = kind(OneRank(), lambda: OnEveryRank(WrongEngine()), lambda: iter(()), VOCABULARY)
    assert len(right.generate(asked, 0)) == 2
    rollouts = kind(OneRank(), lambda: OnEveryRank(WrongEngine(**changes)), lambda: iter(()), VOCABULARY)
    with pytest.raises(EngineError) as raised:
        rollouts.generate(asked, 0)
    assert str(raised.value) == f"prompt {PROMPT}: the engine generated {text}"


@pytest.mark.parametrize("wrong", ["an id past the vocabulary", "not a number", "cut short"])
def test_wrong_teacher_responses_are_refused_and_not_kept(tmp_path: Path, wrong: str) -> None:
    changes, text = WRONG[wrong]

    def responses() -> TeacherResponses:
        settings: Any = {"teacher": "t", "sampling": Sampling(), "max_new_tokens": MOST, "vocab_size": VOCABULARY}
        return TeacherResponses(tmp_path, **settings)

    with pytest.raises(EngineError, match=f"prompt 1: the engine generated {text}"):
        responses().ensure([[1, 2], [3]], lambda: WrongEngine(**changes))
    assert len(responses()) == 0


class FromTheTeacher(Exception):
    pass


def test_what_a_rank_raises_while_it_takes_rollouts_leaves_it_as_it_is() -> None:
    """Its traceback and code are those of the part that failed; the roll call ends the other ranks."""
    asked = [RolloutRequest([1, 2], [3], i, i, 16 + i, MOST) for i in range(2)]
    rollouts = RankZeroRollouts(OneRank(), lambda: ReplayEngine(VOCABULARY), lambda: iter(()), VOCABULARY)

    def take(some: list[Rollout], all_done: bool) -> None:
        raise FromTheTeacher

    with pytest.raises(FromTheTeacher):
        rollouts.generate(asked, 0, take)
