"""Sums of per-token metrics over micro-batches and ranks."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch.distributed as dist
from torch import Tensor

from nemo_tropd.batch import TokenBatch


class MetricSums:
    """Sums and minima of per-token metrics over micro-batches and ranks.

    Only ranks of the last pipeline stage with tensor rank 0 add values, so nothing is counted twice.
    """

    def __init__(self) -> None:
        self.sums: dict[str, float] = {}
        self.minima: dict[str, float] = {}
        self.kept: list[dict[str, Any]] = []  # sequences with their tokens' log-ratios and gates, for the report

    def add(self, sums: Mapping[str, float], minima: Mapping[str, float] | None = None) -> None:
        """Add one micro-batch's sums; keep the smallest of its minima."""
        for name, value in sums.items():
            self.sums[name] = self.sums.get(name, 0.0) + float(value)
        for name, value in (minima or {}).items():
            self.minima[name] = min(self.minima.get(name, math.inf), float(value))

    def keep(self, batch: TokenBatch, per_token: Mapping[str, Tensor]) -> None:
        """Keep each sequence's loss tokens with the per-token metrics ``log_ratio`` and ``trust`` [T]."""
        tokens = batch.loss_tokens()
        for b, sequence_id in enumerate(batch.sequence_ids.tolist()):
            rows = (tokens.sequence == b).nonzero(as_tuple=True)[0]
            if rows.numel():
                self.kept.append(
                    {
                        "sequence_id": sequence_id,
                        "token_ids": tokens.token_ids[rows].tolist(),
                        "log_ratio": per_token["log_ratio"][rows].tolist(),
                        "gate": per_token["trust"][rows].tolist(),
                        "guided": tokens.guided[rows].tolist(),
                    }
                )

    def gather(self) -> MetricSums:
        """The total over all ranks, on every rank (collective)."""
        total = MetricSums()
        if not dist.is_initialized() or dist.get_world_size() == 1:
            total.add(self.sums, self.minima)
            total.kept = list(self.kept)
            return total
        parts: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(parts, (self.sums, self.minima, self.kept))
        for sums, minima, kept in parts:
            total.add(sums, minima)
            total.kept += kept
        total.kept.sort(key=lambda sequence: sequence["sequence_id"])
        return total

    def mean(self, name: str, count: float) -> float:
        """``sums[name] / count``; NaN where nothing was counted."""
        return self.sums[name] / count if count and name in self.sums else math.nan
