"""Noise and signal of a gradient, from those of several batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Gradients:
    """Sums over batches of one objective's gradients and of their squared lengths."""

    total: list[Tensor] | None = None  # one of each parameter
    squares: float = 0.0
    count: int = 0

    def add(self, gradient: list[Tensor]) -> None:
        self.squares += _squares(gradient)
        self.count += 1
        if self.total is None:
            self.total = gradient
        else:
            torch._foreach_add_(self.total, gradient)

    def noise_to_signal(self) -> tuple[float, float]:
        """(noise^2 / signal^2, signal^2), unbiased both."""
        of_mean = _squares(self.total or []) / self.count**2
        noise = (self.squares / self.count - of_mean) * self.count / (self.count - 1)
        signal = of_mean - noise / self.count
        return noise / signal, signal


def _squares(tensors: Sequence[Tensor]) -> float:
    return sum(float(norm) ** 2 for norm in torch._foreach_norm(list(tensors)))
