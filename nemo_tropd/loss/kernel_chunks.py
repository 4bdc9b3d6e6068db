"""A chunk of tokens through the head on a GPU: the steps of ``chunks.TorchChunks``, by Triton's kernels.

Logits stay in the products' dtype and are never copied: the student's gradient is written over them. Two buffers, so
that the product of one chunk can run while another is reduced (see ``overlap``). Padding columns go through the
products, which are faster at round sizes, and nowhere else.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.distributed import ReduceOp

from nemo_tropd.batch import Sampling
from nemo_tropd.parallel.vocab import SoftmaxTopK, VocabShard, merge_softmax_top_k

from . import kernels, kernels_exact, kernels_top_k
from .chunks import TheirColumns, TorchComparison
from .sampled import Kept, without_repeats

if TYPE_CHECKING:
    from .teacher import Distributions


class KernelChunks:
    """See ``chunks.TorchChunks`` for the contract. bf16, fp16 or fp32; the shard must have at least one true column."""

    wide_dtype = torch.float32

    def __init__(self, weight: Tensor, shard: VocabShard, most: int, slots: int, sampling: Sampling) -> None:
        self.weight, self.shard, self.columns = weight.detach(), shard, weight.size(0)
        self.sampling, self.scale = sampling, 1 / sampling.temperature
        stride = kernels.aligned(self.columns)
        self._buffers = [weight.new_empty(most, stride) for _ in range(slots)]

    def compute(self, states: Tensor, slot: int) -> Tensor:
        """[C, columns] in the products' dtype, padding included; overwrites what this slot held."""
        logits = self._buffers[slot][: states.size(0), : self.columns]
        return torch.mm(states, self.weight.t(), out=logits)

    def student(
        self, logits: Tensor, token_ids: Tensor, *, entropy: bool, overwrite: bool = True
    ) -> KernelStudentChunk:
        """token_ids [C, N] global -> their log-probabilities. One read; one MAX and one SUM over the group. With top-k,
        the winning blocks are read again, and one gather comes first."""
        shard, kept = self.shard, None
        local = token_ids - shard.start
        if self.sampling.top_k:
            out, values, ids = self._stream_top_k(logits, local, self.sampling.top_k, entropy)
            kept = Kept.of(values, ids, self.sampling, shard)
        else:
            out = kernels.stream(logits, shard.width, local, entropy=entropy, scale=self.scale)
        top, sums, columns, entropies = out.top, out.sums, out.columns, out.entropy
        if shard.group is not None:
            top, sums, columns, entropies = _reduce(out, local, shard)
        log_sum = sums.log()
        log_probs, log_z = columns - log_sum[:, None], log_sum + top
        if kept is not None:
            log_probs = torch.cat([log_probs, kept.logits - log_z[:, None]], 1)
            local = torch.cat([local, kept.ids - shard.start], 1)
        return KernelStudentChunk(
            log_probs=log_probs,
            log_z=log_z,
            entropy=None if entropies is None else log_sum + entropies / sums,
            kept=kept,
            logits=logits,
            local=local,
            product=self,
        )

    def teacher(
        self, logits: Tensor, token_ids: Tensor, k: int, *, entropy: bool, overwrite: bool = True
    ) -> SoftmaxTopK:
        """token_ids [C, N] global -> top k, log-probabilities, entropy. One read and the winning blocks; one gather."""
        shard = self.shard
        local = token_ids - shard.start
        out, values, ids = self._stream_top_k(logits, local, k, entropy)
        owned = (local >= 0) & (local < shard.width)
        fixed = [out.top, out.sums, *([] if out.entropy is None else [out.entropy])]
        parts = torch.cat([torch.stack(fixed, 1), torch.where(owned, out.columns + out.top[:, None], 0.0)], 1)
        return merge_softmax_top_k(values, ids, parts, k, shard, entropy=entropy)

    def compare(
        self,
        objective: Distributions,
        student: KernelStudentChunk,
        logits: Tensor,
        theirs: Tensor,
        columns: TheirColumns,
    ) -> KernelComparison | TorchComparison:
        """See ``chunks.TorchChunks``; the logits stay as they are. An objective without a kernel goes by torch, from
        fp32 copies of both."""
        width, formula = self.shard.width, objective.kernel
        if formula is None:
            log_p, log_q = (
                z[:, :width].float().mul_(self.scale).sub_(log_z[:, None])
                for z, log_z in ((logits, student.log_z), (theirs, columns.log_z))
            )
            sums = self.shard.reduce(objective.sums(log_p, log_q).contiguous(), ReduceOp.SUM)
            return TorchComparison(objective, student, log_p, log_q, sums)
        pair = kernels_exact.Pair(logits, theirs, width, student.log_z, columns.log_z, self.scale)
        sums = self.shard.reduce(kernels_exact.sums(pair, *formula), ReduceOp.SUM)
        return KernelComparison(pair, formula, sums, student, columns.log_probs)

    def _stream_top_k(
        self, logits: Tensor, local: Tensor, k: int, entropy: bool
    ) -> tuple[kernels.Streamed, Tensor, Tensor]:
        """One read, and this shard's top k: logits / temperature and global ids, [C, <= k]."""
        width, own_k = self.shard.width, min(k, self.shard.width)
        sub_block = kernels_top_k.sub_block_for(width, own_k)
        out = kernels.stream(logits, width, local, entropy=entropy, sub_block=sub_block, scale=self.scale)
        assert out.block_maxima is not None
        values, ids = kernels_top_k.top_k(logits, width, own_k, out.block_maxima, sub_block)
        return out, values if self.scale == 1 else values * self.scale, ids + self.shard.start


@dataclass(frozen=True)
class KernelStudentChunk:
    """Log-probabilities of N columns a token, those of ``kept`` last, and what their gradient needs."""

    log_probs: Tensor  # [C, N] fp32, of softmax(z / temperature), replicated over the group
    log_z: Tensor  # [C]
    entropy: Tensor | None  # [C], nats
    kept: Kept | None
    logits: Tensor  # [C, columns]
    local: Tensor  # [C, N]
    product: KernelChunks

    def logit_gradient(self, grad: Tensor) -> Tensor:
        """scatter(grad) - softmax * sum(grad), [C, columns], from grad [C, N]; overwrites the logits."""
        local, grad, log_probs = self.local, grad.contiguous(), self.log_probs.detach()
        if self.kept is not None:
            local, grad = without_repeats(local, grad, self.kept.ids.size(1))
        width, scale = self.product.shard.width, self.product.scale
        kernels.write_gradient(self.logits, width, local, self.log_z, grad, log_probs, scale=scale)
        return self.logits

    def add_columns(self, slope: Tensor, grad: Tensor) -> Tensor:
        """See ``chunks.StudentChunk``."""
        owned = (self.local >= 0) & (self.local < slope.size(1))
        return slope.scatter_add_(1, torch.where(owned, self.local, 0), torch.where(owned, grad, 0.0))

    def narrow(self, wide: Tensor) -> Tensor:
        """``wide`` [C, width] over the logits, padding 0."""
        self.logits[:, : wide.size(1)].copy_(wide)
        self.logits[:, wide.size(1) :].zero_()
        return self.logits


@dataclass(frozen=True)
class KernelComparison:
    """Both models' logits at a chunk, what an exact objective sums over them, and its gradient."""

    pair: kernels_exact.Pair
    formula: tuple[str, float]
    sums: Tensor  # [C, n], over all shards
    student: KernelStudentChunk
    their_log_probs: Tensor  # [C, N]

    def logit_gradient(self, grad: Tensor, exact: Tensor) -> Tensor:
        """See ``chunks.TorchComparison``; [C, columns], overwrites the student's logits."""
        columns = self.student.local, self.student.log_probs.detach(), self.their_log_probs
        gradients = grad.contiguous(), exact.contiguous()
        kernels_exact.write_gradient(self.pair, *self.formula, self.sums, gradients, columns)
        return self.pair.student


def _reduce(out: kernels.Streamed, local: Tensor, shard: VocabShard) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Maximum, sum of exponentials, columns and entropy's sum over the full vocabulary, relative to its maximum."""
    top = shard.reduce(out.top.clone(), ReduceOp.MAX)
    shift = torch.where(out.sums > 0, out.top - top, 0.0)  # a shard of -inf alone adds nothing
    scale = shift.exp()
    owned = (local >= 0) & (local < shard.width)
    # In the order of softmax_columns, which a rank whose shard is padding alone takes part with.
    sums = [out.sums * scale, *([] if out.entropy is None else [scale * (out.entropy - shift * out.sums)])]
    columns = torch.where(owned, out.columns + (out.top - top)[:, None], 0.0)
    packed = shard.reduce(torch.cat([torch.stack(sums, 1), columns], 1), ReduceOp.SUM)
    return top, packed[:, 0], packed[:, len(sums) :], packed[:, 1] if out.entropy is not None else None
