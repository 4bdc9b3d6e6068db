"""The log-probability of a token under what it was sampled from: a softmax cut to its most probable tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nemo_tropd.batch import LossTokens, Sampling
from nemo_tropd.parallel.vocab import VocabShard, merge_top_k


@dataclass(frozen=True)
class Kept:
    """The tokens that top-k and top-p leave of C rows; detached, replicated over the group. A constant of the loss:
    gradients flow through the kept tokens' probabilities, never through the choice."""

    logits: Tensor  # [C, M] wide, divided by the temperature, descending
    ids: Tensor  # [C, M] global; of equal logits at the last place those of the lower ids
    kept: Tensor  # [C, M] bool: top-p may leave fewer than top-k

    @classmethod
    def of(cls, logits: Tensor, ids: Tensor, sampling: Sampling, shard: VocabShard) -> Kept:
        """From each shard's own ``top_k`` largest logits and global ids [C, <= top_k]. One gather over the group."""
        k = min(sampling.top_k, shard.vocab_size)
        logits, ids, _ = merge_top_k(logits, ids, logits[:, :0], k, shard)
        kept = torch.ones_like(ids, dtype=torch.bool)
        if sampling.top_p < 1:
            mass = logits.softmax(-1)
            # vLLM's rule: a token stays if those before it have less than top_p; the first always does.
            kept = mass.cumsum(-1) - mass < sampling.top_p
        return cls(logits, ids, kept)


def as_sampled(columns: Tensor, kept: Kept | None, tokens: LossTokens, chunk: slice) -> Tensor:
    """[C, N] from log-probabilities [C, N + M] of the full softmax, of which the last M are those of ``kept``: in the
    first column, the sampled token's, less the log of the kept mass unless the teacher wrote that token.

    The sampled token counts as kept: engine and trainer may differ about the last place in the last bits.
    """
    if kept is None:
        return columns
    count = columns.size(1) - kept.ids.size(1)
    own, ids = columns[:, 0], tokens.token_ids[chunk, None]
    among = ((kept.ids == ids) & kept.kept).any(-1)
    members = [columns[:, count:].masked_fill(~kept.kept, -torch.inf), own.masked_fill(among, -torch.inf)[:, None]]
    sampled = torch.where(tokens.guided[chunk], own, own - torch.cat(members, 1).logsumexp(-1))
    return torch.cat([sampled[:, None], columns[:, 1:count]], 1)


def without_repeats(local: Tensor, grad: Tensor, kept: int) -> tuple[Tensor, Tensor]:
    """``local`` and ``grad`` [C, N + kept] with every column of the last ``kept`` that is among columns 1 to N - 1 made
    nobody's (-1), its gradient added there: a kernel stores each place once."""
    first, last = local[:, 1:-kept], local[:, -kept:].contiguous()
    ordered, order = first.sort(-1)
    place = torch.searchsorted(ordered, last).clamp_(max=first.size(1) - 1)
    repeat = ordered.gather(1, place) == last
    moved = torch.where(repeat, grad[:, -kept:], 0.0)
    own = grad[:, 1:-kept].scatter_add(1, order.gather(1, place), moved)
    grad = torch.cat([grad[:, :1], own, grad[:, -kept:] - moved], 1)
    return torch.cat([local[:, :-kept], last.masked_fill(repeat, -1)], 1), grad
