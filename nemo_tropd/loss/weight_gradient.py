"""The head weight's gradient: summed over chunks, scaled by backward's gradient, added to Megatron's buffer."""

import torch
from torch import Tensor

from .inputs import kernels_serve

# Up to so many chunks are summed in the weight's own dtype on a GPU: a rounding each, half a percent in all for 16 of
# bf16, and no second copy of the gradient. More of them are summed in fp32.
CHUNKS_IN_OWN_DTYPE = 16


class WeightGradient:
    """The sum over chunks of slope^T states, ``total`` [V_local, H]."""

    def __init__(self, weight: Tensor, columns: int, chunks: int) -> None:
        """``columns`` rows of the weight take part, the others get zero; without ``chunks`` all do."""
        few = CHUNKS_IN_OWN_DTYPE if kernels_serve(weight) else 1
        dtype = weight.dtype if chunks <= few else torch.promote_types(weight.dtype, torch.float32)
        self.total = torch.empty(weight.shape, dtype=dtype, device=weight.device)
        self._true = self.total[:columns]
        self.total[columns if chunks else 0 :].zero_()
        self._fresh = True
        self._part: Tensor | None = None

    def add(self, slope: Tensor, states: Tensor) -> None:
        """slope [C, columns], states [C, H], both of the weight's dtype."""
        if not slope.size(0):
            return
        if self._true.dtype == slope.dtype:
            torch.mm(slope.t(), states, out=self._true) if self._fresh else self._true.addmm_(slope.t(), states)
        elif slope.device.type == "cuda":
            # Products of bf16 summed in fp32 by the matrix library itself: no product is ever stored.
            if self._fresh:
                torch.mm(slope.t(), states, out_dtype=self._true.dtype, out=self._true)
            else:
                torch.addmm(self._true, slope.t(), states, out_dtype=self._true.dtype, out=self._true)
        else:
            self._part = torch.empty_like(self._true, dtype=slope.dtype) if self._part is None else self._part
            part = torch.mm(slope.t(), states, out=self._part)
            self._true.copy_(part) if self._fresh else self._true.add_(part)
        self._fresh = False


def scale_in_place(values: Tensor, factor: Tensor) -> Tensor:
    """values *= factor. On a GPU a factor of 1, the usual one, costs nothing, and the device is never waited for."""
    if kernels_serve(values):
        from .kernels import scale_

        return scale_(values, factor)
    return values.mul_(factor)


def add_scaled(total: Tensor, part: Tensor, factor: Tensor) -> None:
    """total += factor * part; ``total`` is Megatron's gradient buffer, usually fp32."""
    if kernels_serve(part) and total.is_contiguous():
        from .kernels import add_scaled_

        add_scaled_(total, part, factor)
    else:
        total.add_(part * factor)
