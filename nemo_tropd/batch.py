"""What travels between the rooms: rollouts, token batches, the teacher's scores, and what an objective sees.

Legend of shape letters, used everywhere:
    B  sequences in a micro-batch           S  positions in a padded sequence
    T  tokens that enter the loss           K  candidates taken from the teacher's top k
    V  the true vocabulary size             H  hidden size
    ``_local`` marks a tensor-parallel shard of the logical size.

Alignment, in one place: the model's output at position t scores token t + 1. ``TokenBatch.pack`` and
``TokenBatch.concatenate`` shift once; every tensor of a ``TokenBatch`` is indexed by the position t of the *output*,
and ``labels[t]`` is the token it scores.

Two layouts: ``pack`` pads B sequences to one length, [B, S]. ``concatenate`` lays them end to end in one row, [1, S]
with B = 1, and ``segments`` says where each begins; only the row's tail is padded.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import accumulate
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

R = TypeVar("R")
# Of a rollout's arrays: int and double of C, 4 and 8 bytes wherever torch runs.
_CODES = {"prompt_ids": "i", "prefix_ids": "i", "response_ids": "i", "response_log_probs": "d"}


@dataclass(frozen=True)
class Sampling:
    """The distribution that tokens are sampled from and trained on: softmax(z / temperature), restricted to its
    ``top_k`` most probable tokens, then to the fewest of those with ``top_p`` of their mass, and renormalised."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0: the full vocabulary

    def __post_init__(self) -> None:
        if not self.temperature >= 0.0:
            raise ValueError(f"temperature is {self.temperature}; it must be 0 (greedy) or more")
        if not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"top_p is {self.top_p}; it must lie in (0, 1]")
        if self.top_k < 0:
            raise ValueError(f"top_k is {self.top_k}; it must be 0 (the full vocabulary) or more")

    def __str__(self) -> str:
        words = "softmax(logits)" if self.temperature == 1 else f"softmax(logits / {self.temperature:g})"
        if self.top_k:
            words += f", top-k {self.top_k}"
        if self.top_p < 1:
            words += f", then top-p {self.top_p:g}"
        return words


PLAIN = Sampling()


class Flat(array):
    """Numbers of one C type, end to end in memory, that read as a list of Python's numbers: slices and sums are lists,
    and it equals the list of its numbers. ``np.asarray`` sees them where they are."""

    __slots__ = ()
    __hash__ = None

    def __eq__(self, other: object) -> bool:
        return self.tolist() == other if isinstance(other, list) else super().__eq__(other)

    def __ne__(self, other: object) -> bool:
        return self.tolist() != other if isinstance(other, list) else super().__ne__(other)

    def __getitem__(self, place: Any) -> Any:
        found = super().__getitem__(place)
        return found.tolist() if isinstance(place, slice) else found

    def __add__(self, other: Any) -> Any:
        return [*self, *other]

    def __radd__(self, other: Any) -> Any:
        return [*other, *self]


@dataclass(frozen=True)
class Rollout:
    """One sequence: a prompt, a prefix of teacher tokens (may be empty), and the student's continuation.

    Ids and log-probabilities are kept as ``Flat``, 4 bytes an id and 8 a log-probability, whatever sequence they are
    given as. Raises ValueError without a prompt, for an id that is no int32, and for another number of
    log-probabilities than of response tokens.
    """

    prompt_ids: Sequence[int]
    prefix_ids: Sequence[int]
    response_ids: Sequence[int]
    response_log_probs: Sequence[float]  # the engine's, nats, as sampled, under the weights of ``weight_version``
    weight_version: int
    sequence_id: int  # within its step; with step and seed it determines every random draw
    prompt_index: int
    finished: bool  # False if the length limit cut the response

    def __post_init__(self) -> None:
        for name, code in _CODES.items():
            given = getattr(self, name)
            if not (isinstance(given, Flat) and given.typecode == code):
                try:
                    object.__setattr__(self, name, Flat(code, given))
                except OverflowError as error:
                    raise ValueError(f"a rollout's {name} has a number that does not fit 32 bits") from error
        if not self.prompt_ids:
            raise ValueError("a rollout needs a prompt of at least one token: the first has no output to score it")
        tokens, scored = len(self.response_ids), len(self.response_log_probs)
        if tokens != scored:
            raise ValueError(f"a rollout has {tokens} response tokens but {scored} log-probabilities")

    @property
    def token_ids(self) -> Sequence[int]:
        """All of them, in a new ``Flat``."""
        ids = Flat("i", self.prompt_ids)
        ids.extend(self.prefix_ids)
        ids.extend(self.response_ids)
        return ids

    @property
    def length(self) -> int:
        """Tokens, the prompt's among them."""
        return len(self.prompt_ids) + self.loss_tokens

    @property
    def loss_tokens(self) -> int:
        """Tokens that enter the loss: teacher prefix and response, never the prompt."""
        return len(self.prefix_ids) + len(self.response_ids)

    @property
    def plain(self) -> dict[str, Any]:
        """Its fields by name, with lists: what JSON can hold."""
        return {name: list(value) if name in _CODES else value for name, value in vars(self).items()}


@dataclass(frozen=True)
class TeacherScores:
    """The frozen teacher's view of T tokens, reduced from its logits; replicated over tensor-parallel ranks, fp32."""

    log_probs: Tensor  # [T]     log pi_T(x_t)
    top_k_log_probs: Tensor  # [T, K]  normalised over the full true vocabulary, descending
    top_k_ids: Tensor  # [T, K]  int64, global token ids
    entropy: Tensor | None = None  # [T]     nats, only if an objective needs it


@dataclass(frozen=True)
class TeacherStates:
    """The frozen teacher's hidden states at T loss tokens, kept for an objective that sees its whole distributions."""

    hidden: Tensor  # [T, H'], of the teacher's dtype, on the device or in host memory
    split: bool = False  # [ceil(T / P), H'] instead: this tensor-parallel rank's share of the tokens


@dataclass(frozen=True)
class TokenScores:
    """All an objective sees: log-probabilities (nats, fp32), never logits, shards or process groups.

    All are of softmax(z / temperature). Where ``Sampling`` cuts that, the student's own tokens have the renormalised
    log-probability under which they were sampled. Its top k and entropy, its view of teacher prefixes, and the teacher
    are never cut: a forward KL to a distribution with zeros is infinite.
    """

    student_log_probs: Tensor  # [T]     log pi_S(x_t), carries gradient
    student_top_k_log_probs: Tensor  # [T, K]  log pi_S(v) for v in the teacher's top k, carries gradient
    teacher_log_probs: Tensor  # [T]
    teacher_top_k_log_probs: Tensor  # [T, K]  normalised over the full vocabulary
    guided: Tensor  # [T] bool: the token is the teacher's
    uniforms: Tensor  # [T] the gate's draws in [0, 1), the same on every rank
    student_entropy: Tensor | None = None  # [T], detached
    teacher_entropy: Tensor | None = None  # [T]
    behavior_log_probs: Tensor | None = None  # [T] log-probability under the weights that sampled the token
    reference_log_probs: Tensor | None = None  # [T]
    exact: Tensor | None = None  # [T] an exact objective's value, carries its gradient
    sums: Tensor | None = None  # [T, n] its sums over both complete distributions, detached


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
class Segments:
    """Where the sequences of a concatenated row lie: sequence i takes positions bounds[i] .. bounds[i + 1] - 1."""

    bounds: Tensor  # [sequences + 1] int32, from 0 to the row's width; a padded tail is a sequence of its own, the last
    longest: int  # tokens of the longest, the tail included


@dataclass(frozen=True)
class TokenBatch:
    """One micro-batch, padded or concatenated. Every [B, S] tensor is indexed by output position."""

    input_ids: Tensor  # [B, S] int64
    position_ids: Tensor  # [B, S] int64
    labels: Tensor  # [B, S] int64: labels[t] = input_ids[t + 1]
    loss_mask: Tensor  # [B, S] bool: labels[t] is a prefix or response token
    guided: Tensor  # [B, S] bool
    uniforms: Tensor  # [B, S] fp32
    behavior_log_probs: Tensor  # [B, S] fp32, NaN if the student did not sample the token
    lengths: Tensor  # [sequences] int64: true length of each rollout
    sequence_ids: Tensor  # [sequences] int64
    rollouts: tuple[Rollout, ...] = field(default=(), compare=False)
    segments: Segments | None = None  # of a concatenated row; None: padded
    selected: LossTokens | None = field(default=None, compare=False)  # kept by ``to``, so that no device is waited for
    teacher: str = "default"  # of all its sequences
    # What the teacher reads in its place: the same loss tokens in the same order, after other prompts. None: the same.
    told: TokenBatch | None = None
    groups: tuple[tuple[str, ...], ...] = ()  # of each sequence: under which its metrics are kept apart

    @property
    def count_loss_tokens(self) -> int:
        return int(self.loss_mask.sum())

    @property
    def for_teacher(self) -> TokenBatch:
        """What the teacher reads."""
        return self.told or self

    def loss_tokens(self) -> LossTokens:
        """The tokens that enter the loss, flattened."""
        if self.selected is not None:
            return self.selected
        rows = self.loss_mask.flatten().nonzero(as_tuple=True)[0]
        sequence = rows // self.input_ids.size(1)
        if self.segments is not None:
            sequence = torch.searchsorted(self.segments.bounds[1:], rows.to(torch.int32), right=True)
        return LossTokens(
            rows=rows,
            token_ids=self.labels.flatten()[rows],
            guided=self.guided.flatten()[rows],
            uniforms=self.uniforms.flatten()[rows],
            behavior_log_probs=self.behavior_log_probs.flatten()[rows],
            sequence=sequence,
        )

    def to(self, device: torch.device) -> TokenBatch:
        """The same batch with every tensor on ``device``. Its loss tokens are picked before it moves."""
        return replace(
            _moved(self, device),
            selected=_moved(self.loss_tokens(), device),
            segments=None if self.segments is None else _moved(self.segments, device),
            told=None if self.told is None else self.told.to(device),
        )

    @classmethod
    def pack(
        cls, rollouts: Sequence[Rollout], *, pad_id: int, seed: int, step: int, pad_to_multiple: int = 1
    ) -> TokenBatch:
        """Pad ``rollouts`` to a common length and shift labels by one; ``uniforms``: see :func:`gate_uniforms`.
        An empty list gives one fully masked row, so that every rank can run the same number of micro-batches."""
        width = _round_up(max([2, *(r.length for r in rollouts)]), pad_to_multiple)
        places = [(b, 0) for b in range(len(rollouts))]
        return cls._filled(rollouts, places, (max(len(rollouts), 1), width), pad_id, seed, step)

    @classmethod
    def concatenate(
        cls, rollouts: Sequence[Rollout], *, pad_id: int, seed: int, step: int, pad_to_multiple: int = 1
    ) -> TokenBatch:
        """Lay ``rollouts`` end to end in one row, [1, S], and shift labels by one within each; else as :meth:`pack`.
        If S must be a multiple, the tail becomes a sequence of its own, none of whose tokens is scored."""
        ends = list(accumulate((r.length for r in rollouts), initial=0))
        width = _round_up(max(ends[-1], 2), pad_to_multiple)
        places = [(0, start) for start in ends[:-1]]
        batch = cls._filled(rollouts, places, (1, width), pad_id, seed, step)
        bounds = torch.tensor(ends if ends[-1] == width else [*ends, width], dtype=torch.int32)
        lengths = bounds.diff()
        positions = torch.arange(width) - torch.repeat_interleave(bounds[:-1].long(), lengths)
        return replace(batch, position_ids=positions[None], segments=Segments(bounds, longest=int(lengths.max())))

    @classmethod
    def _filled(
        cls,
        rollouts: Sequence[Rollout],
        places: Sequence[tuple[int, int]],
        shape: tuple[int, int],
        pad_id: int,
        seed: int,
        step: int,
    ) -> TokenBatch:
        """Rollout i from (row, position) ``places[i]`` of [B, S] tensors on; the rest is ``pad_id`` and masked."""
        ids, labels = torch.full(shape, pad_id), torch.full(shape, pad_id)
        mask, guided = torch.zeros(shape, dtype=torch.bool), torch.zeros(shape, dtype=torch.bool)
        uniforms = torch.zeros(shape, dtype=torch.float32)
        behavior = torch.full(shape, float("nan"), dtype=torch.float32)
        for r, (row, begin) in zip(rollouts, places, strict=True):
            tokens = torch.from_numpy(np.asarray(r.token_ids))
            start = begin + len(r.prompt_ids) - 1  # the output that scores the first token after the prompt
            middle, end = start + len(r.prefix_ids), begin + len(tokens) - 1
            ids[row, begin : end + 1] = tokens
            labels[row, begin:end] = tokens[1:]
            mask[row, start:end] = True
            guided[row, start:middle] = True
            uniforms[row, begin:end] = gate_uniforms(seed, step, r.sequence_id, end - begin)
            behavior[row, middle:end] = torch.from_numpy(np.asarray(r.response_log_probs))
        return cls(
            input_ids=ids,
            position_ids=torch.arange(shape[1]).expand(shape).contiguous(),
            labels=labels,
            loss_mask=mask,
            guided=guided,
            uniforms=uniforms,
            behavior_log_probs=behavior,
            lengths=torch.tensor([r.length for r in rollouts] or [0]),
            sequence_ids=torch.tensor([r.sequence_id for r in rollouts] or [-1]),
            rollouts=tuple(rollouts),
        )


def _round_up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple


def _moved(record: R, device: torch.device) -> R:
    """A copy of a dataclass of ours with its tensors on ``device``."""
    values = {f.name: getattr(record, f.name) for f in fields(record)}  # type: ignore[arg-type]
    moved: dict[str, Any] = {k: v.to(device) for k, v in values.items() if isinstance(v, Tensor)}
    return replace(record, **moved)  # type: ignore[type-var]


def gate_uniforms(seed: int, step: int, sequence_id: int, positions: int) -> Tensor:
    """Draws in [0, 1) for output positions 0 .. positions - 1 of one sequence; shape [positions], fp32.
    A function of (seed, step, sequence, position) alone, never of rank, packing, micro-batch or parallel layout."""
    mask = (1 << 64) - 1
    # As arrays: numpy converts a list with a number above 2**63 through float64, and seeds would collide.
    key = np.array([seed & mask, step & mask], dtype=np.uint64)
    counter = np.array([0, 0, sequence_id & mask, 0], dtype=np.uint64)
    stream = np.random.Philox(key=key, counter=counter)
    # The top 24 bits: every value is exact in fp32, so no rounding can reach 1.
    raw = (stream.random_raw(positions) >> np.uint64(40)).astype(np.float32)
    return torch.from_numpy(raw * np.float32(2.0**-24))
