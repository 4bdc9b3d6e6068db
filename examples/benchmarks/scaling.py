"""Every recipe from its own GPUs to 512: seconds a step as written and in the best way, memory, bytes on the wire, and
what would break first, as tables and a picture.

    python examples/benchmarks/scaling.py [--out DIR]

Works from the planner alone, in seconds. Also writes the line in each recipe that states its plan. The global batch
stays the paper's (512 rollouts), so data parallelism divides the same work over more ranks. Seconds of the best way are
the planner's estimates, those of what breaks first lower bounds from peak rates of a DGX H100; none is a measurement.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_tropd.files import complete_file, write_text
from nemo_tropd.loss.inputs import CHUNK_BYTES
from nemo_tropd.planner.degrees import layout, positions
from nemo_tropd.planner.engine import engine_tensor
from nemo_tropd.planner.memory import placement
from nemo_tropd.planner.rates import PEAK_BYTES, PEAK_FLOPS, PEAK_LINK, PEAK_NETWORK
from nemo_tropd.planner.ways import gpus_of
from nemo_tropd.planner.wire import ROLLOUT_TOKEN

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # this file is run, its siblings are imported

from examples.benchmarks import scaling_ways
from examples.benchmarks.recipes import Recipe, gpu_recipes, plan_recipe, write_lines
from examples.benchmarks.scaling_ways import Choice

ROOT = Path(__file__).resolve().parents[2]
MOST = 512
NODE = 8
# The colors of Okabe and Ito, which the color-blind tell apart.
COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#000000", "#8C6D1F", "#6A3D9A", "#7F7F7F")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "<", ">")


@dataclass(frozen=True)
class Point:
    """One recipe on one number of GPUs."""

    gpus: int
    memory: float  # bytes a GPU
    kinds: dict[str, float]  # bytes a GPU sends in a step, by kind
    compute_s: float  # products of student and teacher at peak rate
    inside_s: float  # tensor-parallel traffic at peak rate
    outside_s: float  # all other traffic, if there are several nodes
    writing_s: float  # the longest response: every token reads the student's weights once, on each GPU its shard

    @property
    def wire(self) -> float:
        """Bytes a GPU sends in a step."""
        return sum(self.kinds.values())


def point(recipe: Recipe) -> Point:
    """The figures of a planned recipe.

    A multiply-add is two operations: two for a parameter and token forward, four backward, and recomputation forward
    once more. Attention's own products, which grow with length, are left out.
    """
    cfg, ranks = recipe.cfg, layout(recipe.cfg)
    forward = {None: 1.0, "selective": 1.5, "full": 2.0}[cfg.model.recompute]
    student = (2 * forward + 4) * recipe.student.parameters()
    operations = positions(cfg) * (student + 2 * recipe.teacher.parameters()) / ranks.world_size
    wire = recipe.wire
    within_node = ["student, tensor parallel", "teacher, tensor parallel", "teacher's scores"]
    if placement(cfg, recipe.machine) == "colocated":
        within_node.append("weights to the engines")
    inside = sum(wire[kind] for kind in within_node)
    outside = sum(wire.values()) - inside
    gpus, _ = gpus_of(cfg, recipe.machine)
    several = gpus > cfg.trainer.devices
    return Point(
        gpus=gpus,
        memory=recipe.memory.steps,
        kinds=wire,
        compute_s=operations / PEAK_FLOPS,
        inside_s=(inside + (0 if several else outside)) / PEAK_LINK,
        outside_s=outside / PEAK_NETWORK if several else 0.0,
        writing_s=cfg.model.rollout.max_new_tokens
        * (2 * recipe.student.parameters() / engine_tensor(cfg, recipe.machine) / PEAK_BYTES),
    )


def scale(path: Path) -> list[Recipe]:
    """A recipe on its own GPUs, then on full nodes, doubled up to 512 GPUs or to one rollout a data-parallel rank, its
    engines' hosts with its own."""
    chunk = CHUNK_BYTES["cuda"]
    recipe = plan_recipe(path, chunk)
    cfg, recipes = recipe.cfg, [recipe]
    (gpus, _), data, engines = gpus_of(cfg, recipe.machine), layout(cfg).data, cfg.model.rollout.dedicated.engines
    times = 2
    while gpus >= NODE and times * gpus <= MOST and cfg.model.global_batch_size % (times * data) == 0:
        more = {"trainer.num_nodes": times * cfg.trainer.num_nodes}
        more |= {"model.rollout.dedicated.engines": times * engines} if engines else {}
        recipes.append(plan_recipe(path, chunk, more))
        times *= 2
    return recipes


def crossing(points: Sequence[Point], quantity: str) -> int | None:
    """The first number of GPUs at which ``quantity`` takes longer than the products; None if there is none."""
    return next((p.gpus for p in points if getattr(p, quantity) > p.compute_s), None)


def table(curves: Mapping[str, Sequence[Point]], choices: Mapping[str, Sequence[Choice]]) -> str:
    """The page in Markdown."""
    lines = [
        "# The recipes up to 512 GPUs: time, memory, bytes on the wire",
        "",
        "`python examples/benchmarks/scaling.py` (or `make scaling`) writes this page from the planner alone; no "
        "figure here was measured. The batch is the recipe's whatever the number of GPUs, so data parallelism divides "
        "the same work, and all responses have the greatest length.",
        "",
        *scaling_ways.section(choices),
        "## Memory and bytes on the wire",
        "",
        "As written. GB are 10^9 bytes a GPU that trains; wire is what one of them sends in a step.",
        "",
        "| recipe | GPUs | memory GB | tensor parallel GB | gradients GB | weights to engines GB | other GB |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, points in curves.items():
        for p in points:
            tensor = sum(v for k, v in p.kinds.items() if "tensor parallel" in k)
            gradients, weights = p.kinds["gradients, data parallel"], p.kinds["weights to the engines"]
            other = p.wire - tensor - gradients - weights
            cells = (f"{x / 1e9:.{1 if x >= 1e10 else 2}f}" for x in (p.memory, tensor, gradients, weights, other))
            lines.append(f"| {name if p is points[0] else ''} | {p.gpus} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", *_breaks_first(curves)]) + "\n"


def _breaks_first(curves: Mapping[str, Sequence[Point]]) -> list[str]:
    lines = [
        "## What would break first",
        "",
        f"Seconds a step from sizes and peak rates of a DGX H100 ({PEAK_FLOPS / 1e12:.0f} dense bf16 Tflop/s, "
        f"{PEAK_LINK / 1e9:.0f} GB/s inside a node, {PEAK_NETWORK / 1e9:.0f} GB/s a GPU out of it, "
        f"{PEAK_BYTES / 1e12:.2f} TB/s of its own memory): lower bounds, to compare with each other "
        "only. *Products* are those of student and teacher; *writing* is the longest response, for each of whose "
        "tokens the engine reads the student's weights once; "
        "*between nodes* is all traffic but tensor parallelism's.",
        "",
        "| recipe | GPUs | products s | tensor parallel s | between nodes s | writing s | "
        "writing outlasts products from | between nodes outlasts products from |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, points in curves.items():
        last = points[-1]
        if last.gpus == 1:
            continue
        crossings = [crossing(points, quantity) for quantity in ("writing_s", "outside_s")]
        said = " | ".join("not up to here" if w is None else f"{w} GPUs" for w in crossings)
        numbers = f"{last.compute_s:.2f} | {last.inside_s:.2f} | {last.outside_s:.2f} | {last.writing_s:.1f}"
        lines.append(f"| {name} | {last.gpus} | {numbers} | {said} |")
    first = [w for w in (crossing(points, "writing_s") for points in curves.values() if points[-1].gpus > 1) if w]
    wire = [crossing(points, "outside_s") for points in curves.values() if points[-1].gpus > 1]
    early = min((w for w in wire if w), default=None)
    rollouts = max(p.kinds["rollouts"] for points in curves.values() for p in points)
    lines += [
        "",
        "1. **Writing.** A response of 8096 tokens is written one token after the other, and more GPUs do not shorten "
        f"it. It outlasts all products from {min(first)} GPUs on in the first recipe that it does: beyond that, GPUs "
        "wait for the longest response. Rollouts one step ahead hide all else behind it, and no more (above). A larger "
        "batch, or tensor parallelism in engines of their own, which is not built here, would be the remedies."
        if first
        else "1. **Writing** a response of 8096 tokens never outlasts the products here.",
        "2. **Gradients.** Their bytes a GPU stay as they are while the work a GPU falls: "
        + (
            f"the traffic between nodes outlasts the products from {early} GPUs on in the first recipe that it does."
            if early
            else "still, the traffic between nodes stays below the products up to here."
        )
        + " They are summed while the backward pass runs, so less than this shows.",
        "3. **One rollout a rank.** With 512 rollouts, 512 data-parallel ranks have one each, and the longest sets the "
        "pace of all; tokens are evenly filled into rows only while a rank has several.",
        "4. **Rank 0** sends every rollout to every rank over gloo, as arrays: "
        f"{ROLLOUT_TOKEN} bytes a token, {rollouts / 1e9:.2f} GB a step at most, whatever the number of ranks. It is "
        "the first thing to shard if the batch grows with the GPUs.",
        "5. **Memory** does not break: what data parallelism divides (optimizer states, micro-batches' scores) falls, "
        "the rest stays. A teacher of 72B in bf16 needs all eight GPUs of a node.",
    ]
    return lines


def draw(curves: Mapping[str, Sequence[Point]], choices: Mapping[str, Sequence[Choice]], path: Path) -> None:
    """A PNG at ``path``: seconds; memory, bytes and the ratio of waiting to work over the number of GPUs."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure = plt.figure(figsize=(15, 12), layout="constrained")
    parts: Any = figure.subfigures(2, 1, height_ratios=(7, 5), hspace=0.04)
    above, below = parts
    scaling_ways.draw(choices, above)
    axes = below.subplots(1, 3)
    for index, (name, points) in enumerate(curves.items()):
        style = {"color": COLORS[index % len(COLORS)], "marker": MARKERS[index % len(MARKERS)], "markersize": 5}
        gpus = [p.gpus for p in points]
        axes[0].plot(gpus, [p.memory / 1e9 for p in points], label=name, **style)
        if len(points) == 1:
            continue
        axes[1].plot(gpus, [p.wire / 1e9 for p in points], **style)
        axes[2].plot(gpus, [p.writing_s / p.compute_s for p in points], **style)
        outside = [(p.gpus, p.outside_s / p.compute_s) for p in points if p.outside_s]
        axes[2].plot(*zip(*outside, strict=True), linestyle=":", **{**style, "markersize": 3})
    axes[0].axhline(79 * 2**30 / 1e9, color="#888888", linewidth=1, linestyle="--")
    axes[0].text(1, 79 * 2**30 / 1e9 + 1, "an 80 GB GPU", color="#555555", fontsize=8)
    axes[0].set_ylim(0, 95)
    axes[2].axhline(1, color="#888888", linewidth=1, linestyle="--")
    titles = (
        "memory a GPU, GB",
        "bytes a GPU sends in a step, GB",
        "time over that of the products (lower bounds)\nsolid: writing the longest response, dotted: between nodes",
    )
    for axis, title in zip(axes, titles, strict=True):
        _dress(axis, title)
    axes[1].set_yscale("log")
    axes[2].set_yscale("log")
    below.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=8.5)
    with complete_file(path) as temporary:
        figure.savefig(temporary, dpi=110, format="png")
    plt.close(figure)


def _dress(axis: Any, title: str) -> None:
    axis.set_xscale("log", base=2)
    ticks = [2**i for i in range(10)]
    axis.set_xticks(ticks, [str(t) for t in ticks])
    axis.set_xlim(0.85, 620)
    axis.set_title(title, fontsize=10.5)
    axis.set_xlabel("GPUs")
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="y", color="#dddddd", linewidth=0.6)


def run(conf: Path, out: Path) -> list[Path]:
    """Write each recipe's plan line, the table and the plot; returns the recipes whose line changed."""
    changed = write_lines(conf, CHUNK_BYTES["cuda"])
    recipes = {path.stem: scale(path) for path in gpu_recipes(conf)}
    curves = {name: [point(recipe) for recipe in scaled] for name, scaled in recipes.items()}
    choices = {name: choices_of(scaled) for name, scaled in recipes.items()}
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / "scaling.md", table(curves, choices))
    draw(curves, choices, out / "scaling.png")
    return changed


def choices_of(recipes: Sequence[Recipe]) -> list[Choice]:
    """The best way for each of the numbers of GPUs that a recipe was scaled to."""
    return [scaling_ways.choice(recipe, min(NODE, gpus_of(recipe.cfg, recipe.machine)[0])) for recipe in recipes]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "examples" / "figures", help="folder of scaling.md and .png")
    out = parser.parse_args().out
    for path in run(ROOT / "conf", out):
        print(f"{path.relative_to(ROOT)} states a new plan")
    print(f"{out / 'scaling.md'}\n{out / 'scaling.png'}")


if __name__ == "__main__":
    main()
