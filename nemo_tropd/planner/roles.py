"""Which rank does what, as a few human-readable lines."""

from nemo_tropd.config import TropdConfig
from nemo_tropd.parallel.ranks import RankLayout, nodes_of
from nemo_tropd.planner.degrees import layout
from nemo_tropd.planner.machine import Machine
from nemo_tropd.planner.memory import placement


def engine_groups(cfg: TropdConfig, machine: Machine) -> list[tuple[int, ...]]:
    """The ranks of each rollout engine: rank 0 if the engine is its child process, one engine per tensor-parallel group
    if it lives in the ranks' own processes, none if engines have hosts of their own."""
    ranks, where = layout(cfg), placement(cfg, machine)
    if where != "colocated":
        return [(0,)] if where == "process" else []
    return [ranks.tensor_group(first) for first in range(0, ranks.world_size, ranks.tensor)]


def roles(cfg: TropdConfig, machine: Machine) -> list[tuple[str, str]]:
    """(role, ranks) of a run, one line per role; says which tensor-parallel groups span several nodes."""
    ranks, devices, served = layout(cfg), cfg.trainer.devices, bool(cfg.model.teacher.url)
    student = [ranks.tensor_group(first) for first in range(0, ranks.world_size, ranks.tensor)]
    lines = [
        ("rank 0", "prompts, metrics, checkpoints, report"),
        ("student", _groups(student, "tensor group", devices) + _pipeline(ranks)),
        (
            "teacher",
            "on servers, asked by one rank of each data-parallel group" if served else _teacher(ranks, devices),
        ),
    ]
    if placement(cfg, machine) == "process":
        return [*lines, ("rollouts", "one engine, a child process of rank 0")]
    if placement(cfg, machine) == "dedicated":
        d = cfg.model.rollout.dedicated
        hosts = ("rollouts", f"{d.engines} engine host(s) that join rank 0 at {d.address}; none on the ranks")
        shared = "from one queue, the longest expected first: the last bits depend on who is faster"
        fixed = "in fixed shares, so that the last bits do not depend on time (model.rollout.dedicated.queue)"
        several = [("requests to hosts", shared if d.queue else fixed)] if (d.engines or 1) > 1 else []
        return [*lines, hosts, *several]
    asleep = ", asleep while they train" if cfg.model.rollout.sleep else ""
    where = f"{_groups(engine_groups(cfg, machine), 'engine', devices)}, in the ranks' own processes{asleep}"
    return [*lines, ("rollouts", where)]


def _pipeline(ranks: RankLayout) -> str:
    if ranks.pipeline == 1:
        return ""
    stages = (f"{s * ranks.stage_size}-{(s + 1) * ranks.stage_size - 1}" for s in range(ranks.pipeline))
    return f"; stages {', '.join(stages)}"


def _teacher(ranks: RankLayout, devices: int) -> str:
    if ranks.teacher_tensor is None:
        return "split like the student, on the same ranks"
    text = _groups(list(ranks.teacher_groups()), "group", devices)
    if ranks.owners > 1:
        return f"{text}, each serves {ranks.owners} data-parallel ranks"
    return f"{text}, {ranks.replicas} of them share a data-parallel rank's micro-batches"


def _groups(groups: list[tuple[int, ...]], what: str, devices: int) -> str:
    """The first two groups and the last; how many span nodes."""
    shown = groups if len(groups) <= 3 else [groups[0], groups[1], groups[-1]]
    names = [f"{g[0]}-{g[-1]}" if len(g) > 1 else str(g[0]) for g in shown]
    if len(groups) > 3:
        names.insert(2, "...")
    crossing = sum(nodes_of(group, devices) > 1 for group in groups)
    plural = "" if len(groups) == 1 else "s"
    note = f" ({crossing} of them across nodes: slow without NVLink between nodes)" if crossing else ""
    first = "rank" if groups == [(0,)] else "ranks"
    return f"{len(groups)} {what}{plural}, {first} {', '.join(names)}{note}"
