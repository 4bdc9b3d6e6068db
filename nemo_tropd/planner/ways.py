"""The ways to run a configuration on a number of GPUs, and which takes the least time a step: engines in turns with the
trainer on its GPUs, or on GPUs of their own, in turns or one step ahead.

What is chosen is where engines are, how many GPUs train and ``model.rollout.steps_ahead``, and for each of these what
makes room for the engines' caches: their share of a GPU and ``model.teacher.offload``. The rest stays as it is written.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from nemo_tropd.config import ConfigError, TropdConfig, loaded_as, with_teacher
from nemo_tropd.config_keys import value_at
from nemo_tropd.convert.families import ModelShape
from nemo_tropd.planner import rates
from nemo_tropd.planner.degrees import joins_here, layout
from nemo_tropd.planner.engine import engine_load
from nemo_tropd.planner.host import check_host, host_memory
from nemo_tropd.planner.machine import Machine
from nemo_tropd.planner.memory import Memory, Of, estimate, placement
from nemo_tropd.planner.pace import Pace, step_pace
from nemo_tropd.planner.seconds import spoken
from nemo_tropd.planner.teacher_engines import teacher_engines
from nemo_tropd.planner.verdict import check_kv_cache, check_memory, gib
from nemo_tropd.planner.wire import estimate_wire
from nemo_tropd.rollout.placement import teacher_utilization

WORTH_SAYING = 1.05  # times the seconds of the best way
ADDRESS = "HOST:29600"  # of rank 0, which nobody knows yet
MOST_SEQUENCES = 256  # of an engine at a time: the schema's default
KEYS = (
    *("trainer.num_nodes", "trainer.devices", "model.optim.distributed", "model.teacher.offload"),
    *("model.rollout.placement", "model.rollout.dedicated.address", "model.rollout.dedicated.engines"),
    *("model.rollout.steps_ahead", "model.rollout.gpu_memory_utilization", "model.rollout.max_num_seqs"),
)


@dataclass(frozen=True)
class Work:
    """The models of a run, the machine it is for, and what its objective needs (keywords of ``memory.estimate``)."""

    student: ModelShape
    teachers: Mapping[str, ModelShape]  # that score, by name, each once
    machine: Machine
    needs: Mapping[str, bool] = field(default_factory=dict)

    @property
    def exact(self) -> bool:
        """Whether the objective needs the teacher's distributions."""
        return self.needs.get("exact", False)

    def of(self, cfg: TropdConfig) -> list[Of]:
        """The teachers, each in the configuration of a run whose only one it is."""
        return [(with_teacher(cfg, name), shape) for name, shape in self.teachers.items()]

    def pace(self, cfg: TropdConfig, length: float = rates.LENGTH) -> Pace:
        """Of a step, as if the slowest teacher scored all of it; ``length`` as in ``step_seconds``."""
        own, shape = max(self.of(cfg), key=lambda of: of[1].parameters())
        wire = estimate_wire(own, self.student, shape, self.machine, exact=self.exact)
        held = [name for name in self.teachers if not with_teacher(cfg, name).model.teacher.url]
        several = len({loaded_as(cfg.model, name, cfg.trainer.precision) for name in held}) > 1
        return step_pace(
            own, self.student, shape, self.machine, wire, exact=self.exact, in_turns=several, length=length
        )

    def memory(self, cfg: TropdConfig) -> Memory:
        """Of a rank."""
        (own, shape), *others = self.of(cfg)
        return estimate(own, self.student, shape, self.machine, others=others, **self.needs)

    def host(self, cfg: TropdConfig, beside: int | None = None) -> Memory:
        """Of rank 0's host; ``beside`` as in ``host_memory``."""
        (own, shape), *others = self.of(cfg)
        return host_memory(own, self.student, shape, self.machine, exact=self.exact, others=others, beside=beside)

    def check(self, cfg: TropdConfig, beside: int | None = None) -> None:
        """ConfigError if ``cfg`` does not fit, on a GPU or on a host whose memory is known."""
        check_memory(cfg, self.memory(cfg), self.machine)
        check_host(cfg, self.host(cfg, beside), self.machine)
        for own, shape in self.of(cfg):
            check_kv_cache(own, self.student, shape, self.machine)
            if not own.model.teacher.url:
                teacher_engines(own, shape, self.machine)


@dataclass(frozen=True)
class Way:
    """One of them."""

    cfg: TropdConfig
    place: str  # of the engines, as ``placement_of`` says
    pace: Pace
    refusal: str = ""  # why it does not fit; "": it fits

    @property
    def trainers(self) -> int:
        """GPUs that train."""
        return self.cfg.trainer.num_nodes * self.cfg.trainer.devices

    @property
    def engines(self) -> int:
        """GPUs that generate and do nothing else."""
        return self.cfg.model.rollout.dedicated.engines or 0 if self.place == "dedicated" else 0

    @property
    def ahead(self) -> int:
        """``model.rollout.steps_ahead``."""
        return self.cfg.model.rollout.steps_ahead

    @property
    def seconds(self) -> float:
        """Of a step, estimated."""
        return self.pace.seconds

    @property
    def spoken(self) -> str:
        """Who does what, human-readable."""
        when = f"{self.ahead} step{'s' * (self.ahead > 1)} ahead" if self.ahead else "in turns"
        if self.place != "dedicated":
            where = "on the trainer's GPUs" if self.place == "colocated" else "in one process beside rank 0"
            return f"engines {where}, {when}"
        one, alone = self.trainers == 1, self.engines == 1
        return f"{self.trainers} GPU{'' if one else 's'} train{'s' * one}, {self.engines} generate{'s' * alone}, {when}"

    def keys(self, written: TropdConfig) -> dict[str, object]:
        """What it sets otherwise than ``written``."""
        return {key: value for key in KEYS if (value := value_at(self.cfg, key)) != value_at(written, key)}


def with_keys(cfg: TropdConfig, keys: Mapping[str, object]) -> TropdConfig:
    """A copy with other values of dotted keys, which are not checked."""
    for key, value in keys.items():
        cfg = _with(cfg, key.split("."), value)
    return cfg


def _with(section: Any, path: Sequence[str], value: object) -> Any:
    name, *rest = path
    return replace(section, **{name: _with(getattr(section, name), rest, value) if rest else value})


def way_of(cfg: TropdConfig, work: Work, beside: int | None = None) -> Way:
    """The way that ``cfg`` states. ``beside`` as in ``host_memory``."""
    refusal = ""
    try:
        work.check(cfg, beside)
    except ConfigError as error:
        refusal = str(error)
    return Way(cfg, placement(cfg, work.machine), work.pace(cfg), refusal)


def gpus_of(cfg: TropdConfig, machine: Machine) -> tuple[int, int]:
    """The GPUs that ``cfg`` takes, with those of engines, and how many of them a node has: as many as it has ranks, or
    all if engines are on rank 0's own."""
    trainers, own = cfg.trainer.num_nodes * cfg.trainer.devices, placement(cfg, machine) == "dedicated"
    gpus = trainers + (cfg.model.rollout.dedicated.engines or 0 if own else 0)
    return gpus, gpus if own and joins_here(cfg) else cfg.trainer.devices


def ways(cfg: TropdConfig, work: Work, gpus: int, node: int) -> list[Way]:
    """Every way to run ``cfg`` on ``gpus`` GPUs, ``node`` to a node: first as ``cfg`` states it, if that takes as many,
    then the others, each by what makes it fastest. One that does not fit says why; one whose ranks cannot be divided
    among tensor, pipeline and data parallelism is none."""
    found = [way_of(cfg, work)] if gpus_of(cfg, work.machine) == (gpus, node) else []
    return [*found, *(way for way in _others(cfg, work, gpus, node) if way is not None)]


def best(found: Sequence[Way]) -> Way | None:
    """The first of those that take the least time a step, if any fits."""
    return min((way for way in found if not way.refusal), key=lambda way: way.seconds, default=None)


def reason(chosen: Way, found: Sequence[Way]) -> str:
    """Why ``chosen``, the best of ``found``, is it: a part of a sentence."""
    together = best([way for way in found if way.place != "dedicated"])
    apart = best([way for way in found if way.place == "dedicated"])
    if chosen.place != "dedicated":
        who = "all GPUs generate" if chosen.place == "colocated" else "one engine generates"
        share = f"{who}, which takes {chosen.pace.engines / chosen.seconds:.0%} of a step"
        if apart is None:
            tried = any(way.place == "dedicated" for way in found)
            return f"{share}, and {'no way with engines of their own fits' if tried else 'there are no other ways'}"
        return f"{share}; with engines of their own it is {spoken(apart.seconds)} at best ({apart.spoken})"
    rest = f"{'beside' if chosen.ahead else 'before'} {spoken(chosen.pace.trainer)} of all else"
    own = f"on GPUs of its own it takes {spoken(chosen.pace.engines)}, {rest}"
    if together is None:
        tried = any(way.place != "dedicated" for way in found)
        why = (
            "engines do not fit on the trainer's GPUs"
            if tried
            else "these GPUs are no complete nodes that could do both"
        )
        return f"{why}; {own.replace(' it ', ' generation ')}"
    part = together.pace.engines / together.seconds
    where = "all GPUs do both" if together.place == "colocated" else "one engine is beside rank 0"
    return f"generation takes {part:.0%} of {spoken(together.seconds)} where {where}; {own}"


def cost(chosen: Way, work: Work) -> str:
    """What generating ahead costs; "" in turns."""
    if not chosen.ahead:
        return ""
    copies = gib(work.host(chosen.cfg).resident["weights for rollouts"])
    old = f"{chosen.ahead} step{'s' * (chosen.ahead > 1)}"
    return f"it costs rollouts by weights {old} older than the student's, and {copies} of rank 0's host for copies"


def way_lines(cfg: TropdConfig, work: Work) -> list[tuple[str, str]]:
    """The best way on as many GPUs, its keys, reason and cost, if it is clearly faster than ``cfg`` with responses of
    the greatest length, and no slower with shorter ones."""
    if work.machine.kind == "cpu":
        return []
    gpus, node = gpus_of(cfg, work.machine)
    found, before = ways(cfg, work, gpus, node), work.pace(cfg, rates.SHORTER).seconds
    holds = [way for way in found if work.pace(way.cfg, rates.SHORTER).seconds <= before]
    written, chosen = found[0], best(holds)
    if chosen is None or written.seconds <= WORTH_SAYING * chosen.seconds:
        return []
    shorter = work.pace(chosen.cfg, rates.SHORTER).seconds
    keys = " ".join(f"{key}={_typed(value)}" for key, value in chosen.keys(cfg).items())
    other = f"{spoken(shorter)} instead of {spoken(before)} if responses have {rates.SHORTER:g} of the greatest length"
    text = f"{spoken(chosen.seconds)} a step instead of {spoken(written.seconds)} (estimated; {other} on average) on "
    text += f"{gpus} GPUs: "
    price = f"; {said}" if (said := cost(chosen, work)) else ""
    return [("a faster way", f"{text}{chosen.spoken}. {_sentence(reason(chosen, holds))}{price}. Set {keys}")]


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]


def _typed(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _others(cfg: TropdConfig, work: Work, gpus: int, node: int) -> Iterator[Way | None]:
    if gpus % node == 0:
        place = "process" if cfg.model.pipeline_model_parallel_size > 1 else "colocated"
        same = placement(cfg, work.machine) == place
        keys: dict[str, object] = {"trainer.num_nodes": gpus // node, "trainer.devices": node}
        keys |= {} if same else {"model.rollout.placement": place}
        for ahead in (0, 1) if place == "process" else (0,):
            yield _fastest(cfg, work, {**keys, "model.rollout.steps_ahead": ahead})
    address = "127.0.0.1:29600" if gpus <= node else ADDRESS
    for nodes, devices in _splits(gpus, node):
        engines = min(gpus - nodes * devices, cfg.model.global_batch_size)  # more would have nothing to do
        keys = {
            "trainer.num_nodes": nodes,
            "trainer.devices": devices,
            "model.rollout.placement": "dedicated",
            "model.rollout.dedicated.address": cfg.model.rollout.dedicated.address or address,
            "model.rollout.dedicated.engines": engines,
        }
        for ahead in (0, 1):
            beside = min(engines, node - devices) if nodes == 1 else 0
            yield _fastest(cfg, work, {**keys, "model.rollout.steps_ahead": ahead}, beside)


def _splits(gpus: int, node: int) -> Iterator[tuple[int, int]]:
    """(nodes, GPUs of each) that may train while the others generate: a part of one node, or complete nodes."""
    yield from ((1, devices) for devices in range(1, min(gpus, node)))
    yield from ((nodes, node) for nodes in range(1, -(-gpus // node)))


def _fastest(cfg: TropdConfig, work: Work, keys: Mapping[str, object], beside: int = 0) -> Way | None:
    """The best variant of a way, or one that does not fit; None if it cannot be launched."""
    new = with_keys(cfg, keys)
    try:
        data = max(layout(own).data for own, _ in work.of(new))  # the same for all
    except ValueError:
        return None
    m = new.model
    if m.global_batch_size % data:
        return None
    sequences = min(engine_load(new, work.student, work.machine).sequences, MOST_SEQUENCES)
    limits = {"model.rollout.max_num_seqs": max(m.rollout.max_num_seqs, sequences)}
    limits |= {"model.optim.distributed": m.optim.distributed and data > 1}
    found = [way_of(variant, work, beside) for variant in _variants(with_keys(new, limits), work)]
    return best(found) or min(found, key=lambda way: way.seconds)


def _variants(cfg: TropdConfig, work: Work) -> Iterator[TropdConfig]:
    """``cfg`` with the teacher on the device or not, and with the largest share of a GPU that engines can have."""
    given = [own.model.teacher for own, _ in work.of(cfg)]
    may = not any(t.url or (t.fp8 and not t.fp8_param) for t in given)
    for offload in dict.fromkeys((cfg.model.teacher.offload, False, may)):
        variant = with_keys(cfg, {"model.teacher.offload": offload})
        yield with_keys(variant, {"model.rollout.gpu_memory_utilization": _share(variant, work)})


def _share(cfg: TropdConfig, work: Work) -> float:
    """The largest share of a GPU that an engine can have, to a percent; that of ``cfg`` if there is no room for any."""
    given, size = cfg.model.rollout.gpu_memory_utilization, work.machine.bytes
    most = teacher_utilization(size)  # of a GPU of its own
    if placement(cfg, work.machine) != "dedicated":
        memory = work.memory(cfg)
        held = memory.size("rollouts") if "rollouts" in memory.phases else memory.steps
        most = min(most, given + (size - held) / size)
    found = math.floor(100 * most + 1e-9) / 100
    return found if found > 0 else given
