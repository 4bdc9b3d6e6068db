"""What multi-process tests share: failures collected by case, collectives counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from torch import Tensor


class Checks:
    """Collects failures with their case, so that one run reports all of them."""

    def __init__(self) -> None:
        self.failures: list[str] = []
        self.count = 0

    def close(self, case: str, got: Tensor, want: Tensor, tolerance: float, size: Tensor | None = None) -> None:
        """Relative to ``size``, by default the norm of what is wanted."""
        self.count += 1
        got, want = got.detach().double(), want.detach().double()
        error = float((got - want).norm() / (want.norm() if size is None else size).clamp(min=1e-9))
        if not error < tolerance:
            self.failures.append(f"{case}: relative error {error:.2e}")

    def true(self, case: str, ok: bool, seen: object = "") -> None:
        self.count += 1
        if not ok:
            self.failures.append(f"{case}: {seen}")


@contextmanager
def counted() -> Iterator[Counter]:
    """Counts the collectives that are started, by name and operation."""
    counts: Counter = Counter()
    names = ("all_reduce", "all_gather_into_tensor", "reduce_scatter_tensor", "all_gather", "broadcast")
    original = {name: getattr(dist, name) for name in names}

    def wrap(name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            op = kwargs.get("op")
            counts["MAX" if op == dist.ReduceOp.MAX else "SUM" if op == dist.ReduceOp.SUM else name] += 1
            return original[name](*args, **kwargs)

        return call

    for name in names:
        setattr(dist, name, wrap(name))
    try:
        yield counts
    finally:
        for name in names:
            setattr(dist, name, original[name])
