"""One chunk of tokens through the head: logits in, a few columns of log-probabilities out, gradients back.

Only the shard's true columns are ever computed: padding costs nothing and cannot leak. Products run in the hidden
states' dtype; everything after them in fp32 (fp64 for fp64 models). Buffers are allocated once for all chunks.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.distributed import ReduceOp

from nemo_tropd.batch import PLAIN, Sampling
from nemo_tropd.parallel.vocab import SoftmaxColumns, SoftmaxTopK, VocabShard, largest, softmax_columns, softmax_top_k

from .sampled import Kept

if TYPE_CHECKING:
    from .kernel_chunks import KernelStudentChunk
    from .teacher import Distributions


class TorchChunks:
    """The head of one model, a chunk at a time, by torch alone; what runs on CPU and for fp64 models."""

    def __init__(self, weight: Tensor, shard: VocabShard, most: int, sampling: Sampling = PLAIN) -> None:
        self.weight, self.shard, self.sampling = weight.detach()[: shard.width], shard, sampling
        self.columns = shard.width
        self.wide_dtype = torch.promote_types(weight.dtype, torch.float32)
        self._logits = weight.new_empty(most, shard.width)
        same = self.wide_dtype == weight.dtype
        self._wide = self._logits if same else weight.new_empty(most, shard.width, dtype=self.wide_dtype)

    def compute(self, states: Tensor, slot: int = 0) -> Tensor:
        """states [C, H] -> logits / temperature [C, columns], wide; the caller may overwrite them, and the next
        call does."""
        logits = torch.mm(states, self.weight.t(), out=self._logits[: states.size(0)])
        wide = logits if self._wide is self._logits else self._wide[: states.size(0)].copy_(logits)
        return wide if self.sampling.temperature == 1 else wide.div_(self.sampling.temperature)

    def narrow(self, wide: Tensor) -> Tensor:
        """``wide`` in the dtype of products; overwrites the logits."""
        return wide if wide.dtype == self.weight.dtype else self._logits[: wide.size(0)].copy_(wide)

    def student(self, logits: Tensor, token_ids: Tensor, *, entropy: bool, overwrite: bool = True) -> StudentChunk:
        """token_ids [C, N] global -> log-probabilities; may overwrite ``logits``. One MAX and one SUM over the group;
        with top-k, one gather before them."""
        shard, kept = self.shard, None
        if self.sampling.top_k:
            values, columns = largest(logits, min(self.sampling.top_k, shard.width))
            kept = Kept.of(values, columns + shard.start, self.sampling, shard)
        softmax = softmax_columns(logits, token_ids, shard, entropy=entropy, overwrite=overwrite)
        if kept is not None:
            more = (kept.logits - softmax.log_z[:, None], *shard.locate(kept.ids))
            both = zip((softmax.log_probs, softmax.local, softmax.owned), more, strict=True)
            log_probs, local, owned = (torch.cat(pair, 1) for pair in both)
            softmax = replace(softmax, log_probs=log_probs, local=local, owned=owned)
        return StudentChunk(softmax.log_probs, softmax.log_z, softmax.entropy, kept, softmax, self)

    def teacher(
        self, logits: Tensor, token_ids: Tensor, k: int, *, entropy: bool, overwrite: bool = True
    ) -> SoftmaxTopK:
        """token_ids [C, N] global -> top k, log-probabilities, entropy; may overwrite ``logits``. One gather."""
        return softmax_top_k(logits, token_ids, k, self.shard, entropy=entropy, overwrite=overwrite)

    def compare(
        self, objective: Distributions, student: StudentChunk, logits: Tensor, theirs: Tensor, columns: TheirColumns
    ) -> TorchComparison:
        """``objective``'s sums over the distributions of ``logits`` and of the teacher's, ``theirs``; overwrites both.
        One SUM over the group."""
        log_p = logits.sub_(student.log_z[:, None])
        log_q = theirs.sub_(columns.log_z[:, None])
        sums = self.shard.reduce(objective.sums(log_p, log_q).contiguous(), ReduceOp.SUM)
        return TorchComparison(objective, student, log_p, log_q, sums)


@dataclass(frozen=True)
class TheirColumns:
    """What the teacher has at the columns of a chunk of the student's."""

    log_z: Tensor  # [C]
    log_probs: Tensor  # [C, N]


@dataclass(frozen=True)
class StudentChunk:
    """Log-probabilities of N columns a token, those of ``kept`` last, and what their gradient needs."""

    log_probs: Tensor  # [C, N] wide, of softmax(z / temperature), replicated over the group
    log_z: Tensor  # [C]
    entropy: Tensor | None  # [C], nats
    kept: Kept | None
    softmax: SoftmaxColumns
    product: TorchChunks

    def logit_gradient(self, grad: Tensor) -> Tensor:
        """grad [C, N] -> scatter(grad) - softmax * sum(grad), [C, width], products' dtype; overwrites exponentials."""
        softmax = self.softmax
        assert softmax.exponentials is not None
        slope = softmax.exponentials.mul_((-grad.sum(-1) / softmax.denominator)[:, None])
        return self.product.narrow(self.add_columns(slope, grad))

    def add_columns(self, slope: Tensor, grad: Tensor) -> Tensor:
        """slope [C, width] += scatter(grad), grad [C, N]."""
        if slope.size(1):
            # Added, not written: the sampled token may be in the top k.
            slope.scatter_add_(1, self.softmax.local, torch.where(self.softmax.owned, grad, 0.0))
        return slope

    def narrow(self, wide: Tensor) -> Tensor:
        """See ``TorchChunks.narrow``."""
        return self.product.narrow(wide)


@dataclass(frozen=True)
class TorchComparison:
    """Both models' distributions at a chunk, what an exact objective sums over them, and its gradient."""

    objective: Distributions
    student: StudentChunk | KernelStudentChunk
    log_p: Tensor  # [C, width] wide
    log_q: Tensor
    sums: Tensor  # [C, n], over all shards

    def logit_gradient(self, grad: Tensor, exact: Tensor) -> Tensor:
        """[C, width], products' dtype, from the gradients of the columns, grad [C, N], and of the objective's value,
        exact [C]. A token whose value has none gets none, even if the value is infinite."""
        slope = self.objective.logit_gradient(self.log_p, self.log_q, self.sums)
        slope = slope.mul_(exact[:, None]).masked_fill_((exact == 0)[:, None], 0.0)
        slope.sub_(self.log_p.exp_().mul_(grad.sum(-1, keepdim=True)))
        return self.student.narrow(self.student.add_columns(slope, grad))
