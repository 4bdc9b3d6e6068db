"""Seconds a step of each recipe up to 512 GPUs, as it is written and in the best way: part of ``scaling.py``'s page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from examples.benchmarks.recipes import Recipe
from nemo_tropd.planner import rates
from nemo_tropd.planner.seconds import spoken
from nemo_tropd.planner.ways import WORTH_SAYING, Way, best, gpus_of, reason, ways

KINDS = {"written": "#888888", "in turns": "#0072B2", "ahead": "#D55E00"}
MINUTES = (1, 2, 4, 8)


@dataclass(frozen=True)
class Choice:
    """One recipe on one number of GPUs."""

    gpus: int
    written: Way
    best: Way
    reason: str
    shorter: tuple[float, float, float]  # seconds as written, of the best, of the least, with shorter responses

    @property
    def split(self) -> str:
        """GPUs that train + GPUs that generate; "" if all do both."""
        return f"{self.best.trainers}+{self.best.engines}" if self.best.engines else ""


def choice(recipe: Recipe, node: int) -> Choice:
    """The best way for a recipe on as many GPUs as it takes, in nodes of ``node``."""
    gpus, _ = gpus_of(recipe.cfg, recipe.machine)
    found = ways(recipe.cfg, recipe.work, gpus, node)
    chosen = best(found)
    assert chosen is not None, "a recipe as it is written fits"
    shorter = {id(way): recipe.work.pace(way.cfg, rates.SHORTER).seconds for way in found if not way.refusal}
    figures = shorter[id(found[0])], shorter[id(chosen)], min(shorter.values())
    return Choice(gpus, found[0], chosen, reason(chosen, found), figures)


def section(curves: Mapping[str, Sequence[Choice]]) -> list[str]:
    """The part of the page, in Markdown."""
    curves = {name.replace("\n", ", "): choices for name, choices in alike(curves).items()}
    lines = [
        "## Seconds a step, and the best way",
        "",
        "Estimated, from the rates in `nemo_tropd/planner/rates.py`, every response of the greatest length. *As "
        "written* is the recipe with more nodes (of its engines, too); *best* is the fastest way that fits: engines in "
        "turns with the trainer on its GPUs, or on GPUs of their own, in turns or one step ahead "
        "(`model.rollout.steps_ahead`), with as many GPUs to train as makes it fastest, the largest share of a GPU "
        "that engines can have, and the teacher on the device or offloaded. *Engines* and *all else* are the seconds "
        "of the best way in which engines work, and those of teacher, student and optimizer. "
        f"The last two columns are both with responses of {rates.SHORTER:g} of the greatest length on average (* where "
        "another way would then be faster by more than 5%).",
        "",
        "| recipe | GPUs | as written s | best s | who does what | engines s | all else s | shorter: as written s | "
        "best s |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, choices in curves.items():
        for c in choices:
            written, chosen, least = c.shorter
            numbers = f"{c.best.pace.engines:.0f} | {c.best.pace.trainer:.0f} | {written:.0f} | {chosen:.0f}"
            mark = "*" if chosen > WORTH_SAYING * least else ""
            who = "as written" if c.best is c.written else c.best.spoken
            first = name if c is choices[0] else ""
            lines.append(
                f"| {first} | {c.gpus} | {c.written.seconds:.0f} | {c.best.seconds:.0f} | {who} | {numbers}{mark} |"
            )
    lines += ["", "Why, on the recipe's own GPUs and on the most:", ""]
    for name, choices in curves.items():
        for c in choices[:: max(1, len(choices) - 1)]:
            where = f"{name}, {c.gpus} GPU{'s' * (c.gpus > 1)}"
            lines.append(f"- {where}, {spoken(c.best.seconds)}: {c.best.spoken}; {c.reason}.")
    return [*lines, ""]


def alike(curves: Mapping[str, Sequence[Choice]]) -> dict[str, Sequence[Choice]]:
    """Recipes whose seconds are the same, as one, under all their names."""
    found: dict[tuple[Any, ...], list[str]] = {}
    for name, choices in curves.items():
        found.setdefault(tuple((c.gpus, c.written.seconds, c.best.seconds) for c in choices), []).append(name)
    return {"\n".join(names): curves[names[0]] for names in found.values()}


def draw(curves: Mapping[str, Sequence[Choice]], figure: Any, columns: int = 4) -> None:
    """A panel a recipe (of those with several numbers of GPUs) in ``figure``: seconds over GPUs."""
    shown = {name: choices for name, choices in alike(curves).items() if len(choices) > 1}
    axes = figure.subplots(-(-(len(shown) + 1) // columns), columns, sharex=True, sharey=True).flatten()
    for axis, (name, choices) in zip(axes, shown.items(), strict=False):
        gpus = [c.gpus for c in choices]
        axis.plot(gpus, [c.written.seconds for c in choices], "--", color=KINDS["written"], marker="o", markersize=4)
        axis.plot(gpus, [c.best.seconds for c in choices], "-", color="#222222", linewidth=1)
        for c in choices:
            kind = "ahead" if c.best.ahead else "in turns"
            axis.plot([c.gpus], [c.best.seconds], "s", color=KINDS[kind], markersize=6, zorder=3)
            axis.annotate(
                c.split, (c.gpus, c.best.seconds), (-8, -13), textcoords="offset points", fontsize=7, ha="center"
            )
        axis.set_title(name, fontsize=8.5)
    for axis in axes[: len(shown)]:
        _dress(axis)
    for axis in axes[len(shown) :]:
        axis.set_axis_off()
    labels = {
        "in turns": "best: every GPU trains and generates, in turns",
        "ahead": "best: GPUs that train + GPUs that\ngenerate, one step ahead",
    }
    handles = axes[-1].plot([], [], "--o", color=KINDS["written"], markersize=4, label="as written")
    for kind, label in labels.items():
        handles += axes[-1].plot([], [], "s", color=KINDS[kind], label=label)
    axes[-1].legend(handles=handles, loc="center", frameon=False, fontsize=8.5)
    figure.suptitle("time of a step (estimated, every response of the greatest length)", fontsize=10.5)


def _dress(axis: Any) -> None:
    axis.set_xscale("log", base=2)
    ticks = [2**i for i in range(3, 10)]
    axis.set_xticks(ticks, [str(t) for t in ticks])
    axis.set_xlim(4.4, 720)
    axis.set_yscale("log", base=2)
    axis.set_yticks([60 * m for m in MINUTES], [f"{m} min" for m in MINUTES])
    axis.set_ylim(40, 700)
    axis.minorticks_off()
    axis.tick_params(labelbottom=True, labelleft=True, labelsize=8)
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="y", color="#dddddd", linewidth=0.6)
