"""Page-locked host memory: what a GPU copies to and from at its link's speed, and beside the host's work."""

import weakref

import torch
from torch import Tensor


def pin(buffer: Tensor, owner: object) -> None:
    """Page-lock the contiguous ``buffer`` until ``owner`` is gone. torch's own pinned memory comes in powers of two: up
    to double. Raises RuntimeError (torch's CudaError) if the system does not allow it."""
    runtime = torch.cuda.cudart()
    torch.cuda.check_error(runtime.cudaHostRegister(buffer.data_ptr(), buffer.numel() * buffer.element_size(), 0))
    weakref.finalize(owner, lambda kept: runtime.cudaHostUnregister(kept.data_ptr()), buffer)
