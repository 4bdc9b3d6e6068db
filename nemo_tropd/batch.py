"""What travels between the rooms: rollouts, token batches, the teacher's scores, and what an objective sees.

Legend of shape letters, used everywhere:
    B  sequences in a micro-batch           S  positions in a padded sequence
    T  tokens that enter the loss           K  candidates taken from the teacher's top k
    V  the true vocabulary size             H  hidden size
    ``_local`` marks a tensor-parallel shard of the logical size.

Alignment, in one place: the model's output at position t scores token t + 1. ``TokenBatch.pack`` shifts once; every
tensor of a ``TokenBatch`` is indexed by the position t of the *output*, and ``labels[t]`` is the token it scores.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Rollout:
    """One sequence: a prompt, tokens the teacher wrote (may be none), and the student's continuation.

    ``response_log_probs`` are the engine's log-probabilities (nats) of ``response_ids`` under the weights numbered
    ``weight_version``. ``sequence_id`` names the sequence within its step, and with the step and the run's seed fixes
    every random draw made for it. ``finished`` is False when the length limit cut the response.
    """

    prompt_ids: list[int]
    prefix_ids: list[int]
    response_ids: list[int]
    response_log_probs: list[float]
    weight_version: int
    sequence_id: int
    prompt_index: int
    finished: bool

    def __post_init__(self) -> None:
        if not self.prompt_ids:
            raise ValueError(
                "a rollout needs a prompt of at least one token: the first token has no output to score it"
            )
        if len(self.response_ids) != len(self.response_log_probs):
            raise ValueError(
                f"a rollout has {len(self.response_ids)} response tokens "
                f"but {len(self.response_log_probs)} log-probabilities"
            )

    @property
    def token_ids(self) -> list[int]:
        return [*self.prompt_ids, *self.prefix_ids, *self.response_ids]

    @property
    def loss_tokens(self) -> int:
        """Tokens that enter the loss: teacher prefix and response, never the prompt."""
        return len(self.prefix_ids) + len(self.response_ids)


@dataclass(frozen=True)
class TeacherScores:
    """The frozen teacher's view of T tokens, reduced from its logits; replicated over tensor-parallel ranks, fp32."""

    log_probs: Tensor  # [T]     log pi_T(x_t)
    top_k_log_probs: Tensor  # [T, K]  normalised over the full true vocabulary, descending
    top_k_ids: Tensor  # [T, K]  int64, global token ids
    entropy: Tensor | None = None  # [T]     nats, only where an objective asks for it


@dataclass(frozen=True)
class TokenScores:
    """All an objective sees: log-probabilities (nats, fp32), never logits, shards or process groups."""

    student_log_probs: Tensor  # [T]     log pi_S(x_t), carries gradient
    student_top_k_log_probs: Tensor  # [T, K]  log pi_S(v) for v in the teacher's top k, carries gradient
    teacher_log_probs: Tensor  # [T]
    teacher_top_k_log_probs: Tensor  # [T, K]  normalised over the full vocabulary
    guided: Tensor  # [T] bool: the token was written by the teacher
    uniforms: Tensor  # [T] the gate's draws in [0, 1), the same on every rank
    student_entropy: Tensor | None = None  # [T], detached
    teacher_entropy: Tensor | None = None  # [T]
    behavior_log_probs: Tensor | None = None  # [T] log-probability under the weights that sampled the token
    reference_log_probs: Tensor | None = None  # [T]


@dataclass(frozen=True)
class LossTokens:
    """The tokens of one micro-batch that enter the loss: row i is the i-th loss token, sequence by sequence."""

    rows: Tensor  # [T] int64: index of the token's output position in the flattened [B * S] micro-batch
    token_ids: Tensor  # [T] int64: the token that was sampled
    guided: Tensor  # [T] bool
    uniforms: Tensor  # [T] fp32
    behavior_log_probs: Tensor  # [T] fp32; NaN for prefix tokens, which the student did not sample
    sequence: Tensor  # [T] int64: index of the sequence within the micro-batch

    def __len__(self) -> int:
        return int(self.rows.numel())


@dataclass(frozen=True)
class TokenBatch:
    """One micro-batch, right-padded. Every [B, S] tensor is indexed by output position (see the module's text)."""

    input_ids: Tensor  # [B, S] int64
    position_ids: Tensor  # [B, S] int64
    labels: Tensor  # [B, S] int64: labels[t] = input_ids[t + 1]
    loss_mask: Tensor  # [B, S] bool: labels[t] is a prefix or response token
    guided: Tensor  # [B, S] bool
    uniforms: Tensor  # [B, S] fp32
    behavior_log_probs: Tensor  # [B, S] fp32, NaN where the student did not sample the token
    lengths: Tensor  # [B] int64: true length of each sequence
    sequence_ids: Tensor  # [B] int64
    rollouts: tuple[Rollout, ...] = field(default=(), compare=False)

    @property
    def count_loss_tokens(self) -> int:
        return int(self.loss_mask.sum())

    def loss_tokens(self) -> LossTokens:
        """Flatten to the tokens that enter the loss."""
        rows = self.loss_mask.flatten().nonzero(as_tuple=True)[0]
        return LossTokens(
            rows=rows,
            token_ids=self.labels.flatten()[rows],
            guided=self.guided.flatten()[rows],
            uniforms=self.uniforms.flatten()[rows],
            behavior_log_probs=self.behavior_log_probs.flatten()[rows],
            sequence=rows // self.input_ids.size(1),
        )

    def to(self, device: torch.device) -> TokenBatch:
        """The same batch with every tensor on ``device``."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        moved: dict[str, Any] = {k: v.to(device) for k, v in values.items() if isinstance(v, Tensor)}
        return replace(self, **moved)

    @classmethod
    def pack(
        cls,
        rollouts: Sequence[Rollout],
        *,
        pad_id: int,
        seed: int,
        step: int,
        pad_to_multiple: int = 1,
        width: int | None = None,
    ) -> TokenBatch:
        """Pad ``rollouts`` to a common length (or to ``width``) and shift labels by one.

        The draws in ``uniforms`` depend on (seed, step, sequence_id, position in the sequence) alone. An empty list
        gives one fully masked row of the smallest length, so that every rank can run the same number of micro-batches.
        """
        longest = max((len(r.token_ids) for r in rollouts), default=1)
        width = -(-max(longest, 2, width or 0) // pad_to_multiple) * pad_to_multiple
        rows = max(len(rollouts), 1)
        ids = torch.full((rows, width), pad_id, dtype=torch.int64)
        mask = torch.zeros(rows, width, dtype=torch.bool)
        guided = torch.zeros(rows, width, dtype=torch.bool)
        uniforms = torch.zeros(rows, width, dtype=torch.float32)
        behavior = torch.full((rows, width), float("nan"), dtype=torch.float32)
        for b, r in enumerate(rollouts):
            tokens, start, middle = r.token_ids, len(r.prompt_ids), len(r.prompt_ids) + len(r.prefix_ids)
            n = len(tokens)
            ids[b, :n] = torch.tensor(tokens, dtype=torch.int64)
            mask[b, start - 1 : n - 1] = True
            guided[b, start - 1 : middle - 1] = True
            uniforms[b, : n - 1] = gate_uniforms(seed, step, r.sequence_id, n - 1)
            behavior[b, middle - 1 : n - 1] = torch.tensor(r.response_log_probs, dtype=torch.float32)
        labels = torch.full_like(ids, pad_id)
        labels[:, :-1] = ids[:, 1:]
        return cls(
            input_ids=ids,
            position_ids=torch.arange(width).expand(rows, width).contiguous(),
            labels=labels,
            loss_mask=mask,
            guided=guided,
            uniforms=uniforms,
            behavior_log_probs=behavior,
            lengths=torch.tensor([len(r.token_ids) for r in rollouts] or [0], dtype=torch.int64),
            sequence_ids=torch.tensor([r.sequence_id for r in rollouts] or [-1], dtype=torch.int64),
            rollouts=tuple(rollouts),
        )


def gate_uniforms(seed: int, step: int, sequence_id: int, positions: int) -> Tensor:
    """Draws in [0, 1) for output positions 0 .. positions - 1 of one sequence; shape [positions], fp32.

    A counter-based generator (Philox) keyed by (seed, step) and counted by sequence: the draw of a token is a function
    of (seed, step, sequence, position) alone, never of rank, packing, micro-batch or parallel layout.
    """
    mask = (1 << 64) - 1
    # As arrays: numpy takes a list that holds a number past 2**63 through float64, and seeds would run together.
    key = np.array([seed & mask, step & mask], dtype=np.uint64)
    counter = np.array([0, 0, sequence_id & mask, 0], dtype=np.uint64)
    stream = np.random.Philox(key=key, counter=counter)
    # The top 24 bits: every value is exact in fp32, so no rounding can reach 1.
    raw = (stream.random_raw(positions) >> np.uint64(40)).astype(np.float32)
    return torch.from_numpy(raw * np.float32(2.0**-24))
