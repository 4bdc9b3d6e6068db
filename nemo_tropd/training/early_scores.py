"""Rollouts that are finished are scored while others are still generated, if engine and teacher share no device.

Data-parallel rank i scores the sequences whose number modulo the ranks is i, each alone: the scores do not depend on
which is finished first. Once a step's rollouts are laid out in micro-batches, scores go to the ranks that train on
them, 4 bytes a number.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from nemo_tropd.batch import Rollout, TeacherScores, TeacherStates, TokenBatch
from nemo_tropd.data import PromptSet
from nemo_tropd.model.tropd_model import MegatronTrOPDModel
from nemo_tropd.parallel.agreement import on_every_rank
from nemo_tropd.parallel.exchange import to_owners
from nemo_tropd.rollout.engine import EngineError
from nemo_tropd.served.early import EarlyQuestions
from nemo_tropd.served.teacher import ServedTeacher
from nemo_tropd.teacher.early import EarlyScorer
from nemo_tropd.teacher.sharing import TeacherSharing, unpacked_scores
from nemo_tropd.timeline import EARLY, OFF, Timeline
from nemo_tropd.training.packing import Packer

AnyTeacher = TeacherSharing | ServedTeacher


class Early(Protocol):
    """One teacher's scores of sequences, one by one."""

    def add(self, sequence_id: int, batch: TokenBatch) -> None: ...

    def ready(self) -> set[int]: ...

    def collect(self) -> dict[int, Tensor]: ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class EarlyScoring:
    """The teachers ``names`` of ``model`` that score early; ``packer``, ``prompts``, ``timeline`` as of a step."""

    model: MegatronTrOPDModel
    packer: Packer
    prompts: PromptSet
    names: Collection[str]
    timeline: Timeline = OFF

    @contextmanager
    def of_step(self, step: int) -> Iterator[EarlyScores]:
        """The scores of one step's rollouts."""
        teachers = dict.fromkeys(self.model.teachers[name] for name in sorted(self.names))
        scores = EarlyScores(self, step, {teacher: self._early(teacher) for teacher in teachers})
        try:
            yield scores
        finally:
            for early in scores.of.values():
                early.close()

    def _early(self, teacher: AnyTeacher) -> Early:
        if isinstance(teacher, ServedTeacher):
            return EarlyQuestions(
                teacher, self.model.settings.tropd.top_k, partial(self.timeline.begin, "teacher", EARLY)
            )

        def score(batches: Sequence[TokenBatch]) -> list[TeacherScores | None]:
            found = self.model.score_by(teacher, batches)
            return [None if isinstance(one, TeacherStates) else one for one in found]

        return EarlyScorer(teacher.teacher, score, partial(self.timeline.add, "teacher", EARLY))


class EarlyScores:
    """Made by ``EarlyScoring.of_step``."""

    def __init__(self, scoring: EarlyScoring, step: int, of: Mapping[AnyTeacher, Early]) -> None:
        self.of = of
        self._model, self._packer, self._prompts, self._step = scoring.model, scoring.packer, scoring.prompts, step
        self._seen: dict[int, Rollout] = {}
        self._late: set[int] = set()  # scored when nothing was generated any more
        self.fraction = 0.0  # of the loss tokens that were scored while others were generated

    def finished(self, rollouts: Sequence[Rollout], all_done: bool) -> None:
        """Take finished rollouts, the same on every rank; with ``all_done`` no others are being generated any more. One
        whose number was here before replaces that one: an engine died, and its successor generated it again."""
        topology = self._packer.topology
        for r in rollouts:
            if self._seen.get(r.sequence_id) == r:
                continue
            self._seen[r.sequence_id] = r
            (self._late.add if all_done else self._late.discard)(r.sequence_id)
            early = self.of.get(self._teacher_of(r))
            if early is not None and r.loss_tokens and r.sequence_id % topology.data_size == topology.data_rank:
                (batch,) = self._packer.on_every_rank().pack([r], self._step, self._prompts)
                early.add(r.sequence_id, batch)

    def all_finished(self) -> None:
        """Every rollout has been taken (collective)."""
        tokens = {r.sequence_id: r.loss_tokens for r in self._seen.values()}
        ready = {i for early in self.of.values() for i in early.ready()}
        everywhere = set().union(*self._model.topology.gather_objects(ready))
        self.fraction = sum(tokens[i] for i in everywhere - self._late) / max(sum(tokens.values()), 1)

    def scores(
        self, rollouts: Sequence[Rollout], batches: Sequence[TokenBatch]
    ) -> list[TeacherScores | TeacherStates | None]:
        """As the model's ``score``, of the micro-batches that hold ``rollouts`` (collective)."""
        found: list[TeacherScores | TeacherStates | None] = [None] * len(batches)
        owners = self._packer.owners(rollouts, self._prompts)
        for teacher, places in self._model.by_teacher(batches):
            own = [batches[i] for i in places]
            mine = [r for r in rollouts if r.loss_tokens and self._teacher_of(r) is teacher]
            early = self.of.get(teacher)
            scored = self._model.score_by(teacher, own) if early is None else self._moved(teacher, mine, owners, own)
            for i, one in zip(places, scored, strict=True):
                found[i] = one
        return found

    def _moved(
        self, teacher: AnyTeacher, rollouts: Sequence[Rollout], owners: Mapping[int, int], batches: Sequence[TokenBatch]
    ) -> Sequence[TeacherScores | None]:
        topology, served = self._model.topology, isinstance(teacher, ServedTeacher)
        collected = on_every_rank(topology, self.of[teacher].collect, unexpected=EngineError)
        top_k, entropy = self._model.settings.tropd.top_k, self._model.objective.needs_teacher_entropy
        if not topology.is_last_stage:
            return [None] * len(batches)
        empty = torch.empty(0, 1 + entropy + 2 * top_k, dtype=torch.int32, device=topology.device)
        packed = None
        if not served or topology.tensor_rank == 0:
            ids = [r.sequence_id for r in rollouts]
            for i in list(collected):
                collected[i] = collected[i].to(topology.device)
            moved = to_owners(
                collected,
                {i: i % topology.data_size for i in ids},
                {i: owners[i] for i in ids},
                {r.sequence_id: r.loss_tokens for r in rollouts},
                empty,
                topology.data_group,
            )
            own = [moved[r.sequence_id] for batch in batches for r in batch.rollouts if r.loss_tokens]
            packed = torch.cat([empty, *own])
            del moved, own
        if isinstance(teacher, ServedTeacher):
            return teacher.unpacked(packed, batches, top_k)
        assert packed is not None
        parts = packed.split([batch.count_loss_tokens for batch in batches])
        return [unpacked_scores(part, top_k, entropy=entropy) for part in parts]

    def _teacher_of(self, rollout: Rollout) -> AnyTeacher:
        return self._model.teachers[self._prompts[rollout.prompt_index].teacher]
