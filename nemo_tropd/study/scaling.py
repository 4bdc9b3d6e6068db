"""What grows with the number of GPUs: memory and bytes on the wire of every recipe, from one node's worth to 512.

The global batch stays the paper's (512 rollouts), so data parallelism divides the same work over more ranks. Times are
lower bounds from sizes and peak rates of a DGX H100, not measurements.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nemo_tropd.loss.inputs import CHUNK_BYTES
from nemo_tropd.planner.memory import layout, positions
from nemo_tropd.planner.recipes import Recipe, gpu_recipes, plan_recipe, write_lines

MOST = 512
NODE = 8
# Peak rates of one H100 in a DGX: dense bf16 operations, and bytes a second each way inside a node and out of it.
OPERATIONS = 989e12
INSIDE = 450e9
OUTSIDE = 50e9
# Bytes a second of an H100's own memory.
MEMORY = 3.35e12


@dataclass(frozen=True)
class Point:
    """One recipe on one number of GPUs."""

    gpus: int
    memory: float  # bytes a GPU
    kinds: dict[str, float]  # bytes a GPU sends in a step, by kind
    compute_s: float  # products of student and teacher at peak rate
    inside_s: float  # tensor-parallel traffic at peak rate
    outside_s: float  # all other traffic, where there are several nodes
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
    inside = sum(wire.kinds[kind] for kind in wire.within_node)
    outside = wire.total - inside
    several = cfg.trainer.num_nodes > 1
    return Point(
        gpus=ranks.world_size,
        memory=recipe.memory.total,
        kinds=dict(wire.kinds),
        compute_s=operations / OPERATIONS,
        inside_s=(inside + (0 if several else outside)) / INSIDE,
        outside_s=outside / OUTSIDE if several else 0.0,
        writing_s=cfg.model.rollout.max_new_tokens * 2 * recipe.student.parameters() / ranks.tensor / MEMORY,
    )


def scale(path: Path) -> list[Point]:
    """A recipe on its own GPUs, then on whole nodes, doubled up to 512 GPUs or to one rollout a data-parallel rank."""
    chunk = CHUNK_BYTES["cuda"]
    recipe = plan_recipe(path, chunk)
    cfg, points = recipe.cfg, [point(recipe)]
    ranks = layout(cfg)
    if ranks.world_size < NODE:
        return points
    nodes = 2 * cfg.trainer.num_nodes
    while nodes * NODE <= MOST and cfg.model.global_batch_size % (nodes * NODE // (ranks.tensor * ranks.pipeline)) == 0:
        points.append(point(plan_recipe(path, chunk, {"trainer.num_nodes": nodes})))
        nodes *= 2
    return points


def run(conf: Path, out: Path) -> list[Path]:
    """Write each recipe's plan line, the table and the plot; returns the recipes whose line changed."""
    from nemo_tropd.study.scaling_figure import draw, table

    changed = write_lines(conf, CHUNK_BYTES["cuda"])
    curves = {path.stem: scale(path) for path in gpu_recipes(conf)}
    out.mkdir(parents=True, exist_ok=True)
    page = out / "scaling.md"
    partial = page.with_suffix(".md.tmp")
    partial.write_text(table(curves), encoding="utf-8")
    partial.replace(page)
    draw(curves, out / "scaling.png")
    return changed


def crossing(points: Sequence[Point], quantity: str) -> int | None:
    """The first number of GPUs at which ``quantity`` takes longer than the products; None where none does."""
    return next((p.gpus for p in points if getattr(p, quantity) > p.compute_s), None)
