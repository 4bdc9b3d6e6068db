"""One chunk of tokens through the head: logits in, a few columns of log-probabilities out, gradients back.

Only the shard's true columns are ever computed: padding costs nothing and cannot leak. Products run in the hidden
states' dtype; everything after them in fp32 (fp64 for fp64 models). Buffers are allocated once for all chunks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ReduceOp

from nemo_tropd.parallel.vocab import VocabShard, largest, merge_top_k

LOWEST = float("-inf")


class TorchChunks:
    """The head of one model, a chunk at a time, by torch alone; what runs on CPU and for fp64 models."""

    def __init__(self, weight: Tensor, shard: VocabShard, most: int) -> None:
        self.weight, self.shard = weight.detach()[: shard.width], shard
        self.columns = shard.width
        self.wide_dtype = torch.promote_types(weight.dtype, torch.float32)
        self._logits = weight.new_empty(most, shard.width)
        same = self.wide_dtype == weight.dtype
        self._wide = self._logits if same else weight.new_empty(most, shard.width, dtype=self.wide_dtype)

    def compute(self, states: Tensor, slot: int = 0) -> Tensor:
        """states [C, H] -> logits [C, columns], wide; the caller may overwrite them, and the next call does."""
        logits = torch.mm(states, self.weight.t(), out=self._logits[: states.size(0)])
        return logits if self._wide is self._logits else self._wide[: states.size(0)].copy_(logits)

    def narrow(self, wide: Tensor) -> Tensor:
        """``wide`` in the dtype of products; overwrites the logits."""
        if wide.dtype == self.weight.dtype:
            return wide
        return self._logits[: wide.size(0)].copy_(wide)

    def student(self, logits: Tensor, token_ids: Tensor, *, entropy: bool) -> StudentChunk:
        """token_ids [C, N] global -> their log-probabilities. One MAX and one SUM over the group."""
        shard = self.shard
        top = logits.new_full((logits.size(0),), LOWEST)
        if shard.width:
            # A MAX over ranks need not carry a NaN to all of them; the SUM below does.
            top = logits.amax(-1)
            top = torch.where(top.isnan(), LOWEST, top)
        shard.reduce(top, ReduceOp.MAX)
        local, owned = shard.locate(token_ids)
        fixed = 2 if entropy else 1
        packed = top.new_zeros(logits.size(0), fixed + token_ids.size(1))
        if shard.width:
            packed[:, fixed:] = torch.where(owned, logits.gather(1, local) - top[:, None], 0.0)
        raised = raise_above(logits, top)
        packed[:, 0] = raised.sum(-1)
        if entropy:
            packed[:, 1] = torch.special.entr(raised).sum(-1)
        shard.reduce(packed, ReduceOp.SUM)
        denominator = packed[:, 0]
        log_sum = denominator.log()
        return StudentChunk(
            log_probs=packed[:, fixed:] - log_sum[:, None],
            log_z=log_sum + top,
            entropy=log_sum + packed[:, 1] / denominator if entropy else None,
            exponentials=raised,
            denominator=denominator,
            local=local,
            owned=owned,
            product=self,
        )

    def teacher(self, logits: Tensor, token_ids: Tensor, k: int, *, entropy: bool) -> TeacherChunk:
        """token_ids [C] global -> top k, log-probability, entropy. One gather over the group."""
        shard = self.shard
        values, columns = largest(logits, min(k, shard.width))
        own = values.new_zeros(logits.size(0), 4 if entropy else 3)
        own[:, 0] = values[:, 0] if shard.width else LOWEST
        if shard.width:
            local, owned = shard.locate(token_ids[:, None])
            own[:, 2] = torch.where(owned, logits.gather(1, local), 0.0)[:, 0]
            raised = raise_above(logits, own[:, 0])
            own[:, 1] = raised.sum(-1)
            if entropy:
                own[:, 3] = torch.special.entr(raised).sum(-1)
        return merge_teacher(values, columns + shard.start, own, k, shard, entropy=entropy)


def raise_above(logits: Tensor, top: Tensor) -> Tensor:
    """exp(logits - top), [C, width]; overwrites ``logits``."""
    return logits.sub_(top[:, None]).exp_()


@dataclass(frozen=True)
class StudentChunk:
    """Log-probabilities of N columns a token, and what their gradient needs."""

    log_probs: Tensor  # [C, N] wide, replicated over the group
    log_z: Tensor  # [C]
    entropy: Tensor | None  # [C], nats
    exponentials: Tensor  # [C, width]
    denominator: Tensor  # [C]: exponentials / denominator is the softmax over the full vocabulary
    local: Tensor  # [C, N]
    owned: Tensor  # [C, N] bool
    product: TorchChunks

    def logit_gradient(self, grad: Tensor) -> Tensor:
        """scatter(grad) - softmax * sum(grad), [C, width] in the products' dtype, from grad [C, N]; overwrites the
        exponentials.
        """
        slope = self.exponentials.mul_((-grad.sum(-1) / self.denominator)[:, None])
        if slope.size(1):
            # Added, not written: the sampled token may be in the top k.
            slope.scatter_add_(1, self.local, torch.where(self.owned, grad, 0.0))
        return self.product.narrow(slope)


@dataclass(frozen=True)
class TeacherChunk:
    log_probs: Tensor  # [C] log pi_T(x)
    top_k_log_probs: Tensor  # [C, K] descending
    top_k_ids: Tensor  # [C, K] int64, global
    log_z: Tensor  # [C]
    entropy: Tensor | None  # [C], nats


def merge_teacher(
    values: Tensor, token_ids: Tensor, own: Tensor, k: int, shard: VocabShard, *, entropy: bool
) -> TeacherChunk:
    """All shards' top k and partial sums in one gather.

    values, token_ids (global) [C, <= k]; own [C, 3 or 4]: the shard's maximum, its sum of exponentials relative to it,
    the sampled token's logit (0 where another rank has it) and, with ``entropy``, the sum of -p log p of those
    exponentials.
    """
    values, ids, parts = merge_top_k(values, token_ids, own, k, shard)
    top = parts[..., 0].amax(0)
    shift = torch.where(parts[..., 1] > 0, parts[..., 0] - top, 0.0)  # an empty shard's maximum is -inf
    sums = parts[..., 1] * shift.exp()
    denominator = sums.sum(0)
    log_sum = denominator.log()
    return TeacherChunk(
        # In the student's order of operations: equal models then have R = 0 to the bit (on one rank).
        log_probs=(parts[..., 2].sum(0) - top) - log_sum,
        top_k_log_probs=(values - top[:, None]) - log_sum[:, None],
        top_k_ids=ids,
        log_z=log_sum + top,
        entropy=log_sum + (parts[..., 3] * shift.exp() - sums * shift).sum(0) / denominator if entropy else None,
    )
