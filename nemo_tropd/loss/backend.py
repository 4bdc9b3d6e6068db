"""Chooses the torch or the Triton backend for a head weight and splits tokens into chunks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from nemo_tropd.parallel.vocab import VocabShard

from .chunks import TorchChunks
from .inputs import HeadLayout, chunk_size, kernels_serve

if TYPE_CHECKING:
    from .kernel_chunks import KernelChunks


def head_chunks(
    hidden: Tensor, weight: Tensor, shard: VocabShard, tokens: int, layout: HeadLayout
) -> tuple[TorchChunks | KernelChunks, list[slice], int]:
    """The backend for ``weight`` [V_local, H], the chunks of ``tokens`` tokens, and how many may be in flight."""
    size = chunk_size(tokens, weight.size(0), hidden, layout.chunk_tokens)
    chunks = [slice(i, min(i + size, tokens)) for i in range(0, tokens, size)]
    most = min(size, tokens)
    if kernels_serve(weight) and shard.width:
        from .kernel_chunks import KernelChunks  # imports Triton, which CPU installations lack

        slots = min(2, max(1, len(chunks)))
        return KernelChunks(weight, shard, most, slots, layout.sampling), chunks, slots
    return TorchChunks(weight, shard, most, layout.sampling), chunks, 1
