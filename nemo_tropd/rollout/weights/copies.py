"""A copy of the weights in host memory."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from nemo_tropd.pinned import pin

_PINNED_FROM = 1 << 20  # bytes: what the allocator gives pages of its own; smaller tensors are soon copied anyway


class HostCopy:
    """One version of the weights, by name. Its memory, pinned if they come from a GPU, is used again by the next
    version: fresh pages, and copies from a GPU that go through another buffer, take longer than the copy itself."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}

    def take(self, stream: Iterable[tuple[str, Tensor]]) -> int:
        """Hold what ``stream`` has, and nothing else; it is there when this returns. Returns its bytes."""
        before, self.tensors, on_gpu = self.tensors, {}, False
        try:
            for name, tensor in stream:
                on_gpu = on_gpu or tensor.is_cuda
                self.tensors[name] = held = self._place(before.get(name), tensor)
                held.copy_(tensor.detach(), non_blocking=True)
        finally:
            if on_gpu:  # also if the stream fails: nothing is written to memory that is given back
                torch.cuda.current_stream().synchronize()
        return sum(held.nbytes for held in self.tensors.values())

    def _place(self, held: Tensor | None, tensor: Tensor) -> Tensor:
        """Memory for ``tensor``: what was ``held``, if it fits."""
        if held is None or (held.shape, held.dtype) != (tensor.shape, tensor.dtype):
            held = torch.empty(tensor.shape, dtype=tensor.dtype)
            if tensor.is_cuda and held.nbytes >= _PINNED_FROM:
                pin(held, self)
        return held
