"""A chunk of tokens through the head on a GPU: the steps of ``chunks.TorchChunks``, by Triton's kernels.

Logits stay in the products' dtype and are never copied: the student's gradient is written over them. Two buffers, so
that the product of one chunk can run while another is reduced (see ``overlap``). Padding columns go through the
products, which are faster at round sizes, and nowhere else.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ReduceOp

from nemo_tropd.parallel.vocab import SoftmaxTopK, VocabShard, merge_softmax_top_k

from . import kernels, kernels_top_k


class KernelChunks:
    """See ``chunks.TorchChunks`` for the contract. bf16, fp16 or fp32; the shard must have at least one true column."""

    wide_dtype = torch.float32

    def __init__(self, weight: Tensor, shard: VocabShard, most: int, slots: int) -> None:
        self.weight, self.shard, self.columns = weight.detach(), shard, weight.size(0)
        stride = kernels.aligned(self.columns)
        self._buffers = [weight.new_empty(most, stride) for _ in range(slots)]

    def compute(self, states: Tensor, slot: int) -> Tensor:
        """[C, columns] in the products' dtype, padding included; overwrites what this slot held."""
        logits = self._buffers[slot][: states.size(0), : self.columns]
        return torch.mm(states, self.weight.t(), out=logits)

    def student(self, logits: Tensor, token_ids: Tensor, *, entropy: bool) -> KernelStudentChunk:
        """token_ids [C, N] global -> their log-probabilities. One read; one MAX and one SUM over the group."""
        shard = self.shard
        local = token_ids - shard.start
        out = kernels.stream(logits, shard.width, local, entropy=entropy)
        top, sums, columns, entropies = out.top, out.sums, out.columns, out.entropy
        if shard.group is not None:
            top, sums, columns, entropies = _reduce(out, local, shard)
        log_sum = sums.log()
        return KernelStudentChunk(
            log_probs=columns - log_sum[:, None],
            log_z=log_sum + top,
            entropy=None if entropies is None else log_sum + entropies / sums,
            logits=logits,
            local=local,
            width=shard.width,
        )

    def teacher(self, logits: Tensor, token_ids: Tensor, k: int, *, entropy: bool) -> SoftmaxTopK:
        """token_ids [C, N] global -> top k, log-probabilities, entropy. One read and the winning blocks; one gather."""
        shard = self.shard
        own_k = min(k, shard.width)
        sub_block = kernels_top_k.sub_block_for(shard.width, own_k)
        local = token_ids - shard.start
        out = kernels.stream(logits, shard.width, local, entropy=entropy, sub_block=sub_block)
        assert out.block_maxima is not None
        values, ids = kernels_top_k.top_k(logits, shard.width, own_k, out.block_maxima, sub_block)
        owned = (local >= 0) & (local < shard.width)
        fixed = [out.top, out.sums, *([] if out.entropy is None else [out.entropy])]
        parts = torch.cat([torch.stack(fixed, 1), torch.where(owned, out.columns + out.top[:, None], 0.0)], 1)
        return merge_softmax_top_k(values, ids + shard.start, parts, k, shard, entropy=entropy)


@dataclass(frozen=True)
class KernelStudentChunk:
    """Log-probabilities of N columns a token, and what their gradient needs."""

    log_probs: Tensor  # [C, N] fp32, replicated over the group
    log_z: Tensor  # [C]
    entropy: Tensor | None  # [C], nats
    logits: Tensor  # [C, columns]
    local: Tensor  # [C, N]
    width: int

    def logit_gradient(self, grad: Tensor) -> Tensor:
        """scatter(grad) - softmax * sum(grad), [C, columns], from grad [C, N]; overwrites the logits."""
        grad, log_probs = grad.contiguous(), self.log_probs.detach()
        kernels.write_gradient(self.logits, self.width, self.local, self.log_z, grad, log_probs)
        return self.logits


def _reduce(out: kernels.Streamed, local: Tensor, shard: VocabShard) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Maximum, sum of exponentials, columns and entropy's sum over the full vocabulary, relative to its maximum."""
    top = shard.reduce(out.top.clone(), ReduceOp.MAX)
    shift = torch.where(out.sums > 0, out.top - top, 0.0)  # a shard of -inf alone adds nothing
    scale = shift.exp()
    owned = (local >= 0) & (local < shard.width)
    parts = [(out.sums * scale)[:, None], torch.where(owned, out.columns + (out.top - top)[:, None], 0.0)]
    if out.entropy is not None:
        parts.append((scale * (out.entropy - shift * out.sums))[:, None])
    packed = shard.reduce(torch.cat(parts, 1), ReduceOp.SUM)
    count = local.size(1)
    return top, packed[:, 0], packed[:, 1 : 1 + count], packed[:, -1] if out.entropy is not None else None
