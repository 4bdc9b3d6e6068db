"""Scores of a teacher behind servers, for the student's ranks.

Of each data-parallel rank the first of its last stage asks for its own micro-batches; one broadcast takes all their
scores to the other tensor-parallel ranks of that stage. Earlier stages need none.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor

from nemo_tropd.batch import Sampling, TeacherScores, TokenBatch
from nemo_tropd.loss.head import teacher_scores
from nemo_tropd.loss.inputs import HeadLayout
from nemo_tropd.parallel.agreement import on_every_rank
from nemo_tropd.parallel.topology import Topology
from nemo_tropd.rollout.engine import EngineError
from nemo_tropd.served.answers import Scores, Vocabulary, scoring
from nemo_tropd.served.client import Servers
from nemo_tropd.teacher.sharing import packed_scores, unpacked_scores

# Validation's estimates, from tokens instead of complete distributions, have names of their own.
SAMPLED = "_sampled"


class ServedTeacher:
    """What ``TeacherSharing`` is to the model, but for complete distributions and entropies, which servers do not
    give. ``name`` tells the teacher's responses from another's."""

    def __init__(self, servers: Servers, topology: Topology, vocabulary: Vocabulary, name: str) -> None:
        self.servers, self.topology, self.vocabulary, self.name = servers, topology, vocabulary, name
        self._asked = 0

    @property
    def asks(self) -> bool:
        """Whether this rank is one that asks."""
        return self.topology.is_last_stage and self.topology.tensor_rank == 0

    def reach(self) -> None:
        """Each rank that asks reaches the servers, and they have the teacher of the self-test (collective;
        ServerError)."""
        on_every_rank(self.topology, lambda: self.servers.reach() if self.asks else None, unexpected=EngineError)

    def score(
        self,
        batches: Sequence[TokenBatch],
        *,
        top_k: int,
        entropy: bool = False,
        chunk_tokens: int | None = None,
        temperature: float = 1.0,
    ) -> list[TeacherScores | None]:
        """The teacher's scores of this data rank's micro-batches, on all ranks of the last stage, None elsewhere
        (collective). ServerError on every rank if one gets none; ValueError for what servers cannot give."""
        if entropy or temperature != 1:
            raise ValueError("a teacher behind a server has no entropies, and a temperature of 1")
        batches = [batch.for_teacher for batch in batches]
        own = on_every_rank(
            self.topology, lambda: self._ask(batches, top_k) if self.asks else None, unexpected=EngineError
        )
        return self.unpacked(own, batches, top_k)

    def unpacked(self, own: Tensor | None, batches: Sequence[TokenBatch], top_k: int) -> list[TeacherScores | None]:
        """The packed scores of all loss tokens, which the ranks that ask have, on all ranks of the last stage, None
        elsewhere (collective)."""
        topology, counts = self.topology, [batch.count_loss_tokens for batch in batches]
        total: int = sum(counts)
        if not topology.is_last_stage:
            return [None] * len(batches)
        all_packed = torch.empty(total, 1 + 2 * top_k, dtype=torch.int32, device=topology.device)
        if own is not None:
            all_packed.copy_(own)
        if topology.tensor_size > 1 and total:
            dist.broadcast(all_packed, src=dist.get_global_rank(topology.tensor_group, 0), group=topology.tensor_group)
        return [unpacked_scores(part, top_k, entropy=False) for part in all_packed.split(counts)]

    def _ask(self, batches: Sequence[TokenBatch], top_k: int) -> Tensor:
        """Packed scores of the loss tokens, batch by batch and sequence by sequence."""
        sequences = [r for batch in batches for r in batch.rollouts]
        found = self.servers.ask(
            [scoring(r.token_ids, len(r.prompt_ids), top_k, self.vocabulary) for r in sequences if r.loss_tokens]
        )
        self.asked()
        return torch.cat([torch.empty(0, 1 + 2 * top_k, dtype=torch.int32), *map(packed, found)])

    def asked(self) -> None:
        """After the answers of a step, before they are used: a server that changed meanwhile is seen now
        (ServerError)."""
        self._asked += 1
        if self._asked % self.servers.settings.check_interval == 0:
            self.servers.vouch()

    @torch.no_grad()
    def divergences(
        self,
        batches: Sequence[TokenBatch],
        student_hidden: Sequence[Tensor | None],
        student_head: Tensor | None,
        layout: HeadLayout,
    ) -> list[dict[str, Tensor] | None]:
        """Estimates at each micro-batch's loss tokens, [T] each: of the reverse KL and 1 - TV where the student sampled
        them, of the forward KL where the teacher did; the student's entropy and top-1 agreement are exact."""
        scores, plain = self.score(batches, top_k=1), replace(layout, sampling=Sampling())
        found: list[dict[str, Tensor] | None] = []
        for batch, teacher, hidden in zip(batches, scores, student_hidden, strict=True):
            if teacher is None or hidden is None or student_head is None:
                found.append(None)
                continue
            tokens = batch.loss_tokens()
            student = teacher_scores(
                hidden, student_head, tokens.rows, tokens.token_ids, 1, plain, entropy=True, carry_bad=True
            )
            ratio = student.log_probs - teacher.log_probs
            assert student.entropy is not None
            found.append(
                {
                    "reverse_kl" + SAMPLED: ratio,
                    "forward_kl" + SAMPLED: -ratio,
                    "one_minus_tv" + SAMPLED: (-ratio).exp().clamp(max=1),
                    "top1_agreement": (student.top_k_ids == teacher.top_k_ids)[:, 0].double(),
                    "student_entropy": student.entropy,
                    "tokens" + SAMPLED: torch.ones_like(ratio),
                }
            )
        return found


def packed(scores: Scores) -> Tensor:
    """The scores of one sequence as they travel, int32 [T, 1 + 2 K]."""
    parts = (torch.from_numpy(x) for x in (scores.log_probs, scores.top_k_log_probs, scores.top_k_ids))
    return packed_scores(TeacherScores(*parts))
