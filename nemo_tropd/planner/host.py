"""Host memory of a GPU node, estimated: processes, what is pinned, what a checkpoint gathers on its way to the disk."""

from collections.abc import Sequence

from nemo_tropd.config import ConfigError, TropdConfig
from nemo_tropd.config_keys import value_at
from nemo_tropd.convert.families import ModelShape
from nemo_tropd.planner.degrees import (
    answer_bytes,
    joins_here,
    layout,
    positions,
    student_degrees,
    teacher_generates,
)
from nemo_tropd.planner.machine import HOST_ENGINE, HOST_RANK, Machine
from nemo_tropd.planner.memory import (
    Memory,
    Of,
    checkpoint_bytes,
    placement,
    stage_parameters,
    states_bytes,
    teacher_weights,
)
from nemo_tropd.planner.verdict import gib, part_lines
from nemo_tropd.planner.wire import ROLLOUT_TOKEN

# Bytes of a rollout's token on every rank: an int32 and a double as it is kept, and the bytes that it comes in.
ROLLOUT_TOKEN_KEPT = 12 + ROLLOUT_TOKEN
EXPORT = 2e9  # a file of weights as it is written, and the largest tensor


def host_memory(
    cfg: TropdConfig,
    student: ModelShape,
    teacher: ModelShape,
    machine: Machine,
    *,
    exact: bool = False,
    others: Sequence[Of] = (),
    beside: int | None = None,
) -> Memory:
    """Of the host that needs most, rank 0's: all its ranks together. ``machine`` is a GPU's; ``exact`` and ``others``
    as in ``planner.memory``; ``beside``: engines of their own on that host, by default all if they join there."""
    devices, numbers = cfg.trainer.devices, sum(stage_parameters(student, student_degrees(cfg)))
    m = cfg.model
    resident = {
        "processes": devices * HOST_RANK,
        "rollouts": devices * positions(cfg) * ROLLOUT_TOKEN_KEPT,
    }
    teachers = ((cfg, teacher), *others)
    if served := sum(bool(of.model.teacher.url) for of, _ in teachers):  # scoring early, they are asked together
        resident["servers' answers"] = served * devices * answer_bytes(cfg)
    if pinned := sum(teacher_weights(*of) for of in teachers if of[0].model.teacher.offload):
        resident["teacher, pinned"] = devices * pinned
    if exact and m.teacher.offload_states:
        # torch takes pinned memory in powers of two
        states = max(states_bytes(*of) for of in teachers)
        resident["teacher's hidden states, pinned"] = 2 * devices * states
    if (where := placement(cfg, machine)) == "process":
        resident["engine"] = HOST_ENGINE
    here = (m.rollout.dedicated.engines or 0) if joins_here(cfg) else 0
    if where == "dedicated" and (here := here if beside is None else beside):
        resident["engines beside the ranks"] = here * HOST_ENGINE
    if steps := m.rollout.steps_ahead:  # the newest weights, and those whose rollouts are not done
        resident["weights for rollouts"] = (
            (steps + 1) * student.parameters() * (2 if cfg.trainer.precision == "bf16" else 4)
        )
    # Every rank copies what it writes; what data-parallel ranks have in common is written once.
    written = checkpoint_bytes(cfg, numbers) / layout(cfg).data
    phases = {"checkpoint": {"states on their way": devices * written}, "export": {"files": EXPORT}}
    before = {}
    if teacher_generates(cfg) and not all(of.model.teacher.url for of, _ in teachers):
        before["teacher generates"] = {"processes": devices * HOST_RANK, "engines": devices * HOST_ENGINE}
    return Memory(resident, phases, 0.0, before)


def host_lines(memory: Memory, machine: Machine) -> list[tuple[str, str]]:
    """What a host holds, part by part and phase by phase."""
    has = f"{gib(machine.host)}, this host" if machine.host is not None else "not known here: not checked"
    peak = ("memory of a host", f"{gib(memory.total)} at its peak (estimated)")
    return [*part_lines(memory, "host memory"), peak, ("memory of a host, available", has)]


def check_host(cfg: TropdConfig, memory: Memory, machine: Machine) -> None:
    """Raise ConfigError, with all sizes, if a host that is known does not have the memory."""
    if machine.host is None or memory.total <= machine.host:
        return
    parts = memory.parts(memory.peak_phase)
    key, remedy = "trainer.devices", "use hosts with more memory, or more hosts with fewer ranks each"
    if parts.get("teacher, pinned", 0.0) >= memory.total - machine.host:
        key, remedy = "model.teacher.offload", "set it to false and raise model.teacher.tensor_model_parallel_size"
    if parts.get("teacher's hidden states, pinned", 0.0) >= memory.total - machine.host:
        key, remedy = "model.teacher.offload_states", "set it to false, or lower model.global_batch_size"
    sizes = ", ".join(f"{part} {gib(size)}" for part, size in parts.items())
    raise ConfigError(
        key,
        value_at(cfg, key),
        f"a host needs {gib(memory.total)} during {memory.peak_phase}, but has {gib(machine.host)}: {sizes}; {remedy}",
    )
