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
        before, self.tensors, size, device = self.tensors, {}, 0, None
        for name, tensor in stream:
            held = before.get(name)
            if held is None or held.shape != tensor.shape or held.dtype != tensor.dtype:
                held = torch.empty(tensor.shape, dtype=tensor.dtype)
                if tensor.is_cuda and held.nbytes >= _PINNED_FROM:
                    pin(held, self)
            held.copy_(tensor.detach(), non_blocking=True)
            self.tensors[name] = held
            size += held.nbytes
            device = tensor.device if tensor.is_cuda else device
        if device is not None:
            torch.cuda.current_stream(device).synchronize()
        return size
