"""A teacher whose tensor-parallel degree is not the student's: which rank scores which micro-batch.

Of a smaller degree, several replicas see the same rollouts, take the micro-batches in turn and pass the scores on. Of a
larger one, a teacher spans several data-parallel ranks, which show each other their micro-batches first. Token ids and
scores travel, never logits (except in validation, which gathers them a chunk at a time); hidden states only for exact
objectives, and once, at the start, the head, split anew as the student's is.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from nemo_tropd.batch import TeacherScores, TeacherStates, TokenBatch
from nemo_tropd.loss.divergence import exact_divergences
from nemo_tropd.loss.inputs import HeadLayout
from nemo_tropd.parallel.topology import Topology
from nemo_tropd.parallel.vocab import resplit
from nemo_tropd.teacher.scorer import TeacherScorer, kept

R = TypeVar("R")


class TeacherSharing:
    """Scores and divergences for the student's ranks. ``topology`` is the student's; ``teacher`` is this rank's part of
    one that was built over ``topology.for_teacher()``."""

    def __init__(self, teacher: TeacherScorer, topology: Topology) -> None:
        self.teacher, self.topology, self.ranks = teacher, topology, topology.ranks
        self.own_degree = topology.ranks.teacher_tensor is not None
        self.owner = topology.ranks.owner(topology.rank)
        self.replica = topology.ranks.replica(topology.rank)

    def score(
        self,
        batches: Sequence[TokenBatch],
        *,
        top_k: int,
        entropy: bool,
        chunk_tokens: int | None,
        temperature: float = 1.0,
    ) -> list[TeacherScores | None]:
        """The teacher's scores of this data rank's micro-batches, as the teacher reads them, on all ranks of the last
        stage (collective). ``batches`` are the same number on every rank."""
        score = partial(
            self.teacher.score, top_k=top_k, entropy=entropy, chunk_tokens=chunk_tokens, temperature=temperature
        )
        return self._shared(batches, score, partial(self._pass_on, top_k=top_k, entropy=entropy))

    def states(self, batches: Sequence[TokenBatch], *, on_host: bool = False) -> list[TeacherStates | None]:
        """As :meth:`score`, the hidden states of the loss tokens instead; ``on_host``: kept in host memory."""
        states, pass_on = partial(self.teacher.states, on_host=on_host), partial(self._pass_states, on_host=on_host)
        return self._shared(batches, states, pass_on)

    @torch.no_grad()
    def head_like(self, columns: int) -> Tensor:
        """The teacher's head [columns, H'], ``columns`` on each of the student's tensor-parallel ranks as the student's
        own is: the teacher's shard, where that is the same and stays on the device, else a copy. Collective over the
        last stage's ranks, which alone may call it."""
        own, rank = self.teacher.topology, self.topology.tensor_rank
        with self.teacher.scoring():
            head, size = self.teacher.head.detach(), own.tensor_size
            if size == self.topology.tensor_size and (head.size(0) == columns or size == 1):
                return head if self.teacher.home is None else head.clone()
            return resplit(head, columns, rank * columns, own.tensor_group if size > 1 else None)

    def _shared(
        self,
        batches: Sequence[TokenBatch],
        score: Callable[[Sequence[TokenBatch]], list[R | None]],
        pass_on: Callable[[R | None, TokenBatch, int], R],
    ) -> list[R | None]:
        """``score`` of each micro-batch by the replica whose turn it is, and passed on to the others."""
        batches = [batch.for_teacher for batch in batches]
        if not self.own_degree:
            return score(batches)
        jobs = self._jobs(self._all_batches(batches))
        found: dict[int, R | None] = {}
        with self.teacher.scoring():
            for owner, i, batch in jobs:
                if self.ranks.scorer_of(owner, i) == self.replica:
                    (one,) = score([batch])  # one at a time: what another data rank owns is not kept
                    if owner == self.owner:
                        found[i] = one
        if self.ranks.replicas == 1:
            return [found[i] for i in range(len(batches))]
        turns = [self.ranks.scorer_of(self.owner, i) for i in range(len(batches))]
        passed = [pass_on(found.pop(i, None), batches[i], replica) for i, replica in enumerate(turns)]
        return list(passed) if self.topology.is_last_stage else [None] * len(batches)

    @torch.no_grad()
    def divergences(
        self,
        batches: Sequence[TokenBatch],
        student_hidden: Sequence[Tensor | None],
        student_head: Tensor | None,
        layout: HeadLayout,
    ) -> list[dict[str, Tensor] | None]:
        """``exact_divergences`` at each micro-batch's loss tokens; None except on the last stage (collective).
        The student's are as ``pipeline_forward`` and ``head_weight`` give them; ``layout`` is its own, too."""
        if self.own_degree and not self.topology.is_last_stage:
            return [None] * len(batches)
        found: list[dict[str, Tensor] | None] = [None] * len(batches)
        read = [batch.for_teacher for batch in batches]
        jobs = self._jobs(self._all_batches(read) if self.own_degree else [read])
        with self.teacher.scoring():
            for (owner, i, batch), hidden in zip(jobs, self.teacher.hidden([b for _, _, b in jobs]), strict=True):
                if hidden is None or student_head is None:
                    continue
                mine, rows = not self.own_degree or owner == self.owner, batch.loss_tokens().rows
                values = exact_divergences(
                    student_hidden[i] if mine else None,
                    student_head,
                    hidden,
                    self.teacher.head,
                    batches[i].loss_tokens().rows if mine else rows,
                    layout,
                    teacher_layout=self.teacher.layout(layout.chunk_tokens),
                    teacher_rows=rows,
                )
                if mine:
                    found[i] = values
        return found

    def _all_batches(self, batches: Sequence[TokenBatch]) -> list[list[TokenBatch]]:
        """The micro-batches of each data rank that this rank's teacher sees, in the data ranks' order."""
        if self.topology.teacher_control_group is None:
            return [list(batches)]
        shown = None
        if self.topology.tensor_rank == 0:
            shown = [replace(b.to(torch.device("cpu")), rollouts=()) for b in batches]
        box: list[list[TokenBatch] | None] = [None] * self.ranks.teacher_degree
        dist.all_gather_object(box, shown, group=self.topology.teacher_control_group)
        everyone = [[b.to(self.topology.device) for b in part] for part in box if part is not None]
        everyone[self.owner] = list(batches)
        return everyone

    @staticmethod
    def _jobs(everyone: Sequence[Sequence[TokenBatch]]) -> list[tuple[int, int, TokenBatch]]:
        """(data rank, number, micro-batch), in an order that all agree on."""
        return [(owner, i, part[i]) for i in range(len(everyone[0])) for owner, part in enumerate(everyone)]

    def _pass_on(
        self, scores: TeacherScores | None, batch: TokenBatch, replica: int, *, top_k: int, entropy: bool
    ) -> TeacherScores:
        """The scores that ``replica`` made of ``batch``, on every rank of the model group. One broadcast."""
        tokens, device = batch.count_loss_tokens, self.topology.device
        packed = torch.empty(tokens, (2 if entropy else 1) + 2 * top_k, dtype=torch.int32, device=device)
        source = self.ranks.source(self.topology.rank, replica)
        if self.topology.rank == source:
            assert scores is not None
            packed.copy_(packed_scores(scores))
        if tokens:
            dist.broadcast(packed, src=source, group=self.topology.model_group)
        return unpacked_scores(packed, top_k, entropy=entropy)

    def _pass_states(
        self, states: TeacherStates | None, batch: TokenBatch, replica: int, *, on_host: bool
    ) -> TeacherStates:
        """As :meth:`_pass_on`, hidden states."""
        hidden = self.teacher.shape.hidden, self.teacher.dtype
        tokens, device = batch.count_loss_tokens, self.topology.device
        sent = torch.empty(tokens, hidden[0], dtype=hidden[1], device=device)
        if states is not None:
            sent = states.hidden.to(device, non_blocking=True)
        if tokens:
            dist.broadcast(sent, src=self.ranks.source(self.topology.rank, replica), group=self.topology.model_group)
        return TeacherStates(kept(sent) if on_host else sent)


def packed_scores(scores: TeacherScores) -> Tensor:
    """The scores as they travel, int32 [T, 1 + 2 K], one more with entropies: the bits of fp32 numbers, and ids."""
    columns = [scores.log_probs[:, None], scores.top_k_log_probs]
    if scores.entropy is not None:
        columns.insert(1, scores.entropy[:, None])
    floats = torch.cat([c.float() for c in columns], 1).contiguous()
    return torch.cat([floats.view(torch.int32), scores.top_k_ids.to(torch.int32)], 1)


def unpacked_scores(packed: Tensor, top_k: int, *, entropy: bool) -> TeacherScores:
    """The scores that ``packed_scores`` packed."""
    fixed = 2 if entropy else 1
    floats = packed[:, : fixed + top_k].contiguous().view(torch.float32)
    return TeacherScores(
        log_probs=floats[:, 0].contiguous(),
        top_k_log_probs=floats[:, fixed:].contiguous(),
        top_k_ids=packed[:, fixed + top_k :].to(torch.int64),
        entropy=floats[:, 1].contiguous() if entropy else None,
    )
