"""One picture of a run: six panels as PNG."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

from nemo_tropd.report.records import RunRecord, read_run, smooth, thin

# Okabe and Ito's colours, which differ for every kind of colour vision.
_BLUE, _RED, _GREEN, _PURPLE, _SKY, _ORANGE, _GRAY = (
    "#0072b2", "#d55e00", "#009e73", "#b0568f", "#56b4e9", "#e69f00", "#8c959f",
)  # fmt: skip


def write_figure(run_dir: str | os.PathLike[str], path: str | os.PathLike[str]) -> Path:
    """Draw a run as one PNG of 2 x 3 panels at ``path``: KLs, trust, gradient norm, mismatch and seconds a phase.

    A panel whose metrics were not logged says so. Raises ReportError when the directory holds no metrics.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    record, target = read_run(Path(run_dir)), Path(path)
    # A figure of its own, without pyplot: no global state, no display.
    figure = Figure(figsize=(12, 6.4), dpi=130, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(f"{record.name}: {record.steps} steps", x=0.01, ha="left", fontsize=13)
    axes = figure.subplots(2, 3).ravel()
    _validations(axes[0], record, "Reverse KL, own text", "reverse_kl", _BLUE)
    _validations(axes[1], record, "Forward KL, teacher's answers", "forward_kl", _RED)
    _train(
        axes[2],
        record,
        "Trust and guided fraction",
        [("trust_fraction", "trusted", _GREEN), ("guided_fraction", "guided", _PURPLE)],
    )
    _train(axes[3], record, "Gradient norm", [("grad_norm", "", _RED)])
    _train(
        axes[4],
        record,
        "Engine against trainer",
        [("mismatch_max_abs", "largest", _RED), ("mismatch_mean_abs", "mean", _BLUE)],
        log=True,
    )
    _phases(axes[5], record)
    for axis, unit in zip(axes, ("nats a token", "nats a token", "share", "", "nats", "seconds"), strict=True):
        axis.set_ylabel(unit)
        axis.set_xlabel("step")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", color="#e3e7eb", linewidth=0.8)
        axis.set_axisbelow(True)
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(target.name + ".part")
    figure.savefig(part, format="png")
    part.replace(target)
    return target


def _validations(axis: Any, record: RunRecord, title: str, name: str, color: str) -> None:
    axis.set_title(title, loc="left", fontweight="bold", fontsize=11)
    points = record.series("validation", name)
    if not points:
        _missing(axis)
        return
    axis.plot(*zip(*points, strict=True), color=color, marker="o", linewidth=2)
    axis.set_ylim(bottom=0, top=1.12 * max(y for _, y in points))
    for x, y in {points[0], points[-1]}:
        axis.annotate(f"{y:.2f}", (x, y), textcoords="offset points", xytext=(0, 8), ha="center", fontsize=9)
    axis.margins(x=0.08)


def _train(axis: Any, record: RunRecord, title: str, series: list[tuple[str, str, str]], *, log: bool = False) -> None:
    axis.set_title(title, loc="left", fontweight="bold", fontsize=11)
    drawn = 0
    for name, label, color in series:
        points = [p for p in record.series("train", name) if p[1] > 0 or not log]
        if points:
            axis.plot(*zip(*points, strict=True), color=color, linewidth=0.9, alpha=0.35)
            axis.plot(*zip(*smooth(thin(points), log=log), strict=True), color=color, linewidth=2, label=label or None)
            drawn += 1
    if not drawn:
        _missing(axis)
        return
    if log:
        axis.set_yscale("log")
        axis.yaxis.set_minor_formatter("")
        low, high = axis.get_ylim()
        axis.set_ylim(10 ** math.floor(math.log10(low)), 10 ** math.ceil(math.log10(high)))
    else:
        axis.set_ylim(bottom=0)
    if drawn > 1:
        axis.legend(frameon=False, fontsize=9)


def _phases(axis: Any, record: RunRecord) -> None:
    axis.set_title("Time of a step", loc="left", fontweight="bold", fontsize=11)
    names = record.phases()
    if not names:
        _missing(axis)
        return
    steps = sorted(record.train)
    layers = [[record.train[s].get(f"seconds/{n}", 0.0) for s in steps] for n in names]
    colors = [_BLUE, _RED, _GREEN, _PURPLE, _SKY, _ORANGE, _GRAY]
    axis.stackplot(steps, layers, labels=names, colors=[colors[i % len(colors)] for i in range(len(names))])
    totals = sorted(sum(column) for column in zip(*layers, strict=True))
    usual = totals[int(0.95 * (len(totals) - 1))]
    # One slow step must not press all others flat; and the legend wants room.
    axis.set_ylim(top=1.4 * (usual if totals[-1] > 2 * usual else totals[-1]))
    axis.legend(frameon=False, fontsize=8, ncols=3, loc="upper right")


def _missing(axis: Any) -> None:
    axis.text(0.5, 0.5, "not logged", transform=axis.transAxes, ha="center", va="center", color="#59636e")
