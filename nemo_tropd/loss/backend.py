"""Chooses the torch or the Triton backend for a head weight and splits tokens into chunks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from nemo_tropd.batch import Sampling
from nemo_tropd.parallel.vocab import VocabShard

from .chunks import TorchChunks
from .inputs import HeadLayout, chunk_size, kernels_serve

if TYPE_CHECKING:
    from .kernel_chunks import KernelChunks


def head_chunks(
    hidden: Tensor, weight: Tensor, shard: VocabShard, tokens: int, layout: HeadLayout, size: int | None = None
) -> tuple[TorchChunks | KernelChunks, list[slice], int]:
    """The backend for ``weight`` [V_local, H], the chunks of ``tokens`` tokens, and how many may be in flight.
    ``size``: tokens a chunk, unless what bounds the logits of one model is to choose."""
    size = size or chunk_size(tokens, weight.size(0), hidden, layout.chunk_tokens)
    chunks = [slice(i, min(i + size, tokens)) for i in range(0, tokens, size)]
    slots = min(2, max(1, len(chunks))) if kernels_serve(weight) and shard.width else 1
    return backend(weight, shard, min(size, tokens), slots, layout.sampling), chunks, slots


def backend(weight: Tensor, shard: VocabShard, most: int, slots: int, sampling: Sampling) -> TorchChunks | KernelChunks:
    """The backend for ``weight``, with ``slots`` buffers for chunks of at most ``most`` tokens (torch has one)."""
    if kernels_serve(weight) and shard.width:
        from .kernel_chunks import KernelChunks  # imports Triton, which CPU installations lack

        return KernelChunks(weight, shard, most, slots, sampling)
    return TorchChunks(weight, shard, most, sampling)
