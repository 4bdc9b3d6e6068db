"""Composes and plans the GPU recipes in ``conf/``, and maintains the plan line in each of them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from examples.benchmarks.shapes import known_shape
from nemo_tropd.command_line import compose_command_line
from nemo_tropd.config import ConfigError, TropdConfig, with_teacher
from nemo_tropd.config_checks import resolve
from nemo_tropd.config_teacher import DEFAULT_TEACHER
from nemo_tropd.convert.families import ModelShape
from nemo_tropd.files import write_text
from nemo_tropd.planner.degrees import layout, loss_tokens, student_degrees, teacher_degrees
from nemo_tropd.planner.engine import engine_load
from nemo_tropd.planner.machine import GIB, Machine
from nemo_tropd.planner.memory import Memory
from nemo_tropd.planner.seconds import spoken
from nemo_tropd.planner.ways import Way, Work, way_of
from nemo_tropd.planner.wire import estimate_wire

MARK = "# Plan: "


@dataclass(frozen=True)
class Recipe:
    """One recipe, planned for the GPU memory it states in ``trainer.gpu_memory_gib``."""

    path: Path
    cfg: TropdConfig
    student: ModelShape
    teacher: ModelShape
    machine: Machine
    work: Work
    memory: Memory
    host: Memory
    wire: dict[str, float]

    @property
    def name(self) -> str:
        return self.path.stem

    @property
    def way(self) -> Way:
        """Where its engines are, and the seconds of a step."""
        return way_of(self.cfg, self.work)

    @property
    def line(self) -> str:
        """Layout, tokens, memory and time of a step, as the file must state them."""
        ranks, m, way = layout(self.cfg), self.cfg.model, self.way
        waves = engine_load(self.cfg, self.student, self.machine).waves
        own = f", teacher tensor {ranks.teacher_tensor}" if ranks.teacher_tensor is not None else ""
        sequence = " with sequence parallel" if m.sequence_parallel else ""
        when = f"{way.ahead} step{'s' * (way.ahead > 1)} ahead" if way.ahead else "in turns"
        apart = f", {way.engines} more for engines, {when}" if way.engines else ""
        return (
            f"{MARK}{ranks.world_size} GPUs = tensor {ranks.tensor}{sequence} x pipeline {ranks.pipeline} x data "
            f"{ranks.data}{own}{apart}; at most {loss_tokens(self.cfg):,} tokens per step; "
            f"{self.memory.steps / 1e9:.0f} of {self.machine.bytes / 1e9:.0f} GB per GPU, "
            f"{self.host.total / 1e9:.0f} GB per host; rollouts in {waves} wave{'s' * (waves > 1)}, at most "
            f"{spoken(way.seconds)} per step (estimated)."
        ).replace("1 GPUs", "1 GPU", 1 if ranks.world_size == 1 else 0)


def plan_recipe(path: Path, chunk_bytes: float, overrides: Mapping[str, object] | None = None) -> Recipe:
    """Compose ``path`` with ``overrides`` and plan it from the public shapes; needs neither GPU nor checkpoint.

    Raises:
        ConfigError: an invalid setting, a layout that the models cannot be split into, or too little memory.
    """
    given = [f"{key}={value}" for key, value in (overrides or {}).items()]
    with _no_launcher():
        cfg = resolve(compose_command_line([f"--config-name={path.stem}", *given], path.parent.absolute()))
    if cfg.trainer.gpu_memory_gib is None:
        raise ConfigError(
            "trainer.gpu_memory_gib",
            None,
            f"{path.name} is not a GPU recipe; set the memory of the GPU it is for, in GiB",
        )
    machine = Machine("gpu", cfg.trainer.gpu_memory_gib * GIB, chunk_bytes, "trainer.gpu_memory_gib")
    student = _shape("pretrained_checkpoint.restore_from_path", cfg.pretrained_checkpoint.restore_from_path)
    teacher = _shape("model.teacher.path", cfg.model.teacher.path)
    further = {name: with_teacher(cfg, name).model.teacher.path for name in cfg.model.teachers}
    teachers = {DEFAULT_TEACHER: teacher, **{name: _shape("model.teachers", path) for name, path in further.items()}}
    work = Work(student, teachers, machine)
    student.check_layout(student_degrees(cfg).tensor, student_degrees(cfg).pipeline)
    for of, shape in work.of(cfg):
        shape.check_layout(teacher_degrees(of).tensor, teacher_degrees(of).pipeline)
    work.check(cfg)
    wire = estimate_wire(cfg, student, teacher, machine)
    return Recipe(path, cfg, student, teacher, machine, work, work.memory(cfg), work.host(cfg), wire)


def gpu_recipes(conf: Path) -> list[Path]:
    """The recipes for GPUs: the files based on ``gpu.yaml``."""
    return [p for p in sorted(conf.glob("*.yaml")) if "\n  - gpu\n" in p.read_text(encoding="utf-8")]


def write_lines(conf: Path, chunk_bytes: float) -> list[Path]:
    """Rewrite the plan line of every recipe; returns the files that changed."""
    changed = []
    for path in gpu_recipes(conf):
        text = path.read_text(encoding="utf-8")
        comments = [line for line in text.splitlines() if line.startswith("#") and not line.startswith(MARK)]
        rest = [line for line in text.splitlines() if not line.startswith("#")]
        new = "\n".join([*comments, plan_recipe(path, chunk_bytes).line, *rest]) + "\n"
        if new != text:
            write_text(path, new)
            changed.append(path)
    return changed


def _shape(key: str, path: str) -> ModelShape:
    shape = known_shape(path)
    if shape is None:
        raise ConfigError(key, path, "unknown architecture; add it to examples/benchmarks/shapes.py")
    return shape


@contextmanager
def _no_launcher() -> Iterator[None]:
    """Hides torchrun's WORLD_SIZE: a recipe is planned for the number of ranks it states."""
    world = os.environ.pop("WORLD_SIZE", None)
    try:
        yield
    finally:
        if world is not None:
            os.environ["WORLD_SIZE"] = world
