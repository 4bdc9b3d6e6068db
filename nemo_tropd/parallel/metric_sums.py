"""Sums of per-token metrics over micro-batches and ranks."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from nemo_tropd.batch import TokenBatch
from nemo_tropd.parallel.agreement import World


class MetricSums:
    """Only ranks of the last pipeline stage with tensor rank 0 add values, so nothing is counted twice."""

    def __init__(self) -> None:
        self.sums: dict[str, float] = {}
        self.minima: dict[str, float] = {}
        self.bad: list[tuple[str, int, int]] = []  # what was not finite, on which rank, in which sequence
        self.kept: list[dict[str, Any]] = []  # sequences with their tokens' log-ratios and gates, for the report

    def add(self, sums: Mapping[str, float], minima: Mapping[str, float] | None = None) -> None:
        """Add one micro-batch's sums; keep the smallest of its minima."""
        for name, value in sums.items():
            self.sums[name] = self.sums.get(name, 0.0) + float(value)
        for name, value in (minima or {}).items():
            self.minima[name] = min(self.minima.get(name, math.inf), float(value))

    def gather(self) -> MetricSums:
        """The total over all ranks, on every rank (collective)."""
        total = MetricSums()
        for sums, minima, kept, bad in World().gather_objects((self.sums, self.minima, self.kept, self.bad)):
            total.add(sums, minima)
            total.kept += kept
            total.bad += bad
        total.kept.sort(key=lambda sequence: sequence["sequence_id"])
        return total

    def mean(self, name: str, count: float) -> float:
        """``sums[name] / count``; NaN if ``count`` is 0."""
        return self.sums[name] / count if count and name in self.sums else math.nan


class DeviceSums:
    """Sums and minima that stay on the device while micro-batches run: the host waits for them once, in ``collect``."""

    def __init__(self, most_kept: int = 0) -> None:
        self.most_kept = most_kept  # sequences whose tokens are kept: of all ranks that many remain, the first ones
        self.bad: list[tuple[str, int, int]] = []  # see MetricSums
        self._sums: dict[str, Tensor] = {}
        self._minima: dict[str, Tensor] = {}
        self._kept: list[tuple[TokenBatch, Mapping[str, Tensor]]] = []
        self._grouped: list[tuple[tuple[tuple[str, ...], ...], tuple[str, ...], Tensor]] = []

    def add(self, sums: Mapping[str, Tensor], minima: Mapping[str, Tensor] | None = None) -> None:
        """Add one micro-batch's sums, scalars; keep the smallest of its minima."""
        for name, value in sums.items():
            value = value.detach().double()
            self._sums[name] = self._sums[name] + value if name in self._sums else value
        for name, value in (minima or {}).items():
            value = value.detach().double()
            self._minima[name] = torch.minimum(self._minima[name], value) if name in self._minima else value

    def keep(self, batch: TokenBatch, per_token: Mapping[str, Tensor]) -> None:
        """The loss tokens of the first ``most_kept`` sequences, by their ids, are kept with the per-token metrics
        ``log_ratio`` and ``trust`` [T]."""
        self._kept.append((batch, per_token))

    def by_group(self, batch: TokenBatch, values: Mapping[str, Tensor]) -> None:
        """Add ``values`` [T] of a micro-batch's loss tokens to the sums ``GROUP/NAME`` of their sequences' groups."""
        if batch.groups:
            table = torch.stack([v.detach().double() for v in values.values()])
            sums = table.new_zeros(len(values), len(batch.groups))
            self._grouped.append((batch.groups, tuple(values), sums.index_add_(1, batch.loss_tokens().sequence, table)))

    def collect(self) -> MetricSums:
        """The same on the host. A minimum over nothing (infinite) is left out."""
        total = MetricSums()
        total.bad = self.bad
        if self._sums:
            values = torch.stack([*self._sums.values(), *self._minima.values()]).tolist()
            minima = zip(self._minima, values[len(self._sums) :], strict=True)
            total.add(
                dict(zip(self._sums, values[: len(self._sums)], strict=True)),
                {name: value for name, value in minima if value != math.inf},
            )
        grouped = torch.cat([sums.flatten() for _, _, sums in self._grouped]).tolist() if self._grouped else []
        found = iter(grouped)
        for groups, names, _ in self._grouped:
            for name in names:
                for of, value in zip(groups, found, strict=False):  # as many as there are sequences
                    total.add({f"{group}/{name}": value for group in of})
        total.kept = self._first_sequences()
        return total

    def _first_sequences(self) -> list[dict[str, Any]]:
        found = []
        for batch, per_token in self._kept:
            ids, tokens = batch.sequence_ids.tolist(), batch.loss_tokens()
            found += [(ids[b], b, tokens, per_token) for b in tokens.sequence.unique().tolist()]
        kept = []
        for sequence_id, b, tokens, per_token in sorted(found, key=lambda one: one[0])[: self.most_kept]:
            columns = {
                "token_ids": tokens.token_ids,
                "log_ratio": per_token["log_ratio"],
                "gate": per_token["trust"],
                "guided": tokens.guided,
            }
            rows = tokens.sequence == b
            kept.append({"sequence_id": sequence_id, **{k: v[rows].tolist() for k, v in columns.items()}})
        return kept
