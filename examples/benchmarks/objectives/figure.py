"""The comparison's figure: accuracy, gradient norm, trust and reverse KL over steps, one row of panels a family."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from examples.benchmarks.objectives.running_sums import Curve

# TrOPD stands in every row, in black; the others in the colors of Okabe and Ito, which the color-blind tell apart.
FAMILIES = {
    "reward clipped or masked": (
        "opd", "clip_outlier", "mask_outlier", "entropy_opd", "reopold", "reopold_2stage", "tropd:mask",
    ),
    "other targets": ("opd", "jsd", "topd", "gopd", "eopd"),
    "complete distributions": ("opd", "opd_exact", "fkl_exact", "jsd_exact", "topd_exact", "tropd_exact"),
    "without prefixes": ("fkl_outlier", "fkl_outlier:exact"),
    "forward KL": ("fkl", "fkl_outlier", "fkl_outlier:threshold", "fkl_outlier:soft", "aopd", "tropd_aopd"),
}  # fmt: skip
COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#8C6D1F")
PANELS = {
    "accuracy": "accuracy (greedy)",
    "gradient_norm": "gradient norm",
    "trust": "trusted share of tokens",
    "reverse_kl": "reverse KL, nats a token",
}


def draw(curves: Sequence[Curve], path: Path) -> None:
    """A PNG at ``path``: lines are means over seeds, bands reach from the lowest to the highest seed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    runs: dict[str, list[Curve]] = {}
    for curve in curves:
        runs.setdefault(curve.objective, []).append(curve)
    families = families_of(runs)
    figure, axes = plt.subplots(
        len(families), len(PANELS), figsize=(15, 3.1 * len(families) + 0.4), sharex=True, sharey="col", squeeze=False
    )
    for row, (title, names) in zip(axes, families.items(), strict=True):
        lines = [(n, COLORS[i % len(COLORS)], 1.5) for i, n in enumerate(names)]
        lines += [("tropd", "black", 2.2)] if "tropd" in runs else []
        for axis, quantity in zip(row, PANELS, strict=True):
            for name, color, width in lines:
                _line(axis, runs[name], quantity, name, color, width)
            axis.spines[["top", "right"]].set_visible(False)
            axis.grid(axis="y", color="#dddddd", linewidth=0.6)
        row[0].set_ylim(0, 1.03)
        row[1].set_yscale("log")
        row[2].set_ylim(0, 1.03)
        row[0].set_ylabel(title)
        row[-1].legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    for axis, label in zip(axes[0], PANELS.values(), strict=True):
        axis.set_title(label, fontsize=11)
    for axis in axes[-1]:
        axis.set_xlabel("step")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def families_of(names: Collection[str]) -> dict[str, list[str]]:
    """The rows of panels: families with those of their members that are among ``names``. One that has a single member,
    which stands beside others elsewhere, says nothing and is left out."""
    found = {title: [n for n in members if n in names] for title, members in FAMILIES.items()}
    elsewhere = {n for members in found.values() if len(members) > 1 for n in members}
    shown = {t: members for t, members in found.items() if len(members) > 1 or set(members) - elsewhere}
    return shown or {"": []}


def _line(axis: Any, runs: list[Curve], quantity: str, name: str, color: str, width: float) -> None:
    values = np.array([getattr(c, quantity) for c in runs])
    steps = np.array(runs[0].accuracy_steps) if quantity == "accuracy" else np.arange(values.shape[1])
    if quantity != "accuracy":
        values = np.stack([_smooth(v) for v in values])
    axis.fill_between(steps, values.min(0), values.max(0), color=color, alpha=0.12, linewidth=0)
    axis.plot(steps, values.mean(0), color=color, linewidth=width, label=name)


def _smooth(values: np.ndarray, reach: int = 4) -> np.ndarray:
    """The mean of up to ``reach`` values to either side."""
    return np.array([values[max(0, i - reach) : i + reach + 1].mean() for i in range(len(values))])
