"""The engines with which the teacher generates before a run: on the GPUs of rank 0's node, which are empty then."""

from collections.abc import Mapping
from dataclasses import dataclass

from nemo_tropd.config import ConfigError, TropdConfig
from nemo_tropd.convert.families import ModelShape
from nemo_tropd.planner.machine import CPU_ENGINE, GIB, Machine
from nemo_tropd.planner.memory import BYTES
from nemo_tropd.planner.verdict import gib
from nemo_tropd.rollout.placement import TEACHER_UTILIZATION

# What the estimate of time assumes: vLLM reads all weights for each token of its sequences, at a good part of an H100's
# 3.35e12 bytes/s, and launches a step in a few milliseconds. A CPU multiplies bf16 and fp32 at this rate a core or so.
_BYTES_PER_S, _STEP_S, _CPU_FLOPS = 2e12, 5e-3, 3e10
_WORKSPACE = 3 * GIB  # activations and graphs of an engine on a GPU


@dataclass(frozen=True)
class TeacherEngines:
    """How many engines generate, and over how many GPUs each is split."""

    count: int
    tensor: int


def teacher_engines(cfg: TropdConfig, teacher: ModelShape, machine: Machine) -> TeacherEngines:
    """As many engines as rank 0's node has room for; one on a CPU. Raises ConfigError if there is none."""
    r, devices = cfg.model.rollout, cfg.trainer.devices if machine.kind == "gpu" else 1
    weights = teacher.parameters() * BYTES[r.dtype]
    cache: float = 2 * teacher.layers * teacher.size("kv") * cfg.model.encoder_seq_length * BYTES[r.dtype]
    if machine.kind == "cpu":
        cache, spare = r.kv_cache_gib * GIB, machine.bytes - cfg.trainer.devices * machine.process - CPU_ENGINE
    else:
        spare = TEACHER_UTILIZATION * machine.bytes - _WORKSPACE
    degrees = [n for n in range(1, devices + 1) if not (devices % n or teacher.heads % n or teacher.kv_heads % n)]
    for degree in degrees:
        if (weights + cache) / degree <= spare:
            return TeacherEngines(devices // degree, degree)
    most = f"{gib(max(spare, 0) * max(degrees))} of {max(degrees)} device(s) of a node"
    raise ConfigError(
        "model.teacher.path",
        cfg.model.teacher.path,
        f"to generate prefixes and held-out answers, the teacher needs {gib(weights)} for its weights in "
        f"{r.dtype} and {gib(cache)} for a sequence, more than the {most}: use devices with more memory, or set "
        "model.tropd.guidance.enabled=false and model.data.held_out=0",
    )


def generation_lines(
    engines: TeacherEngines,
    teacher: ModelShape,
    machine: Machine,
    cfg: TropdConfig,
    wanted: Mapping[tuple[int, ...], int],
) -> list[tuple[str, str]]:
    """What the teacher generates before the first step, at most: tokens, engines, time."""
    full, tokens = cfg.model.teacher.response_tokens or cfg.model.rollout.max_new_tokens, sum(wanted.values())
    prefixes = [length for length in wanted.values() if length < full]
    answers = len(wanted) - len(prefixes)
    parts = [f"{len(prefixes):,} prefixes of at most {max(prefixes):,} tokens"] if prefixes else []
    parts += [f"{answers:,} answers of at most {full:,}"] if answers else []
    where = "on the CPU"
    if machine.kind == "gpu":
        where = f"on rank 0's node, each on {engines.tensor} GPU{'s' * (engines.tensor > 1)}"
        step = _STEP_S + teacher.parameters() * BYTES[cfg.model.rollout.dtype] / engines.tensor / _BYTES_PER_S
        at_once = engines.count * cfg.model.rollout.max_num_seqs
        longest = max(wanted.values())  # sequences that run alone at the end take as long as any
        seconds = step * max(tokens / at_once, longest)
    else:
        seconds = tokens * 2 * teacher.parameters() / _CPU_FLOPS
    made = f"{tokens:,} tokens by {engines.count} engine{'s' * (engines.count > 1)} {where}"
    return [("the teacher generates", f"{' and '.join(parts)}: {made}, about {duration(seconds)} if none is cached")]


def duration(seconds: float) -> str:
    """Human-readable, rounded up to a minute."""
    minutes = max(1, round(seconds / 60 + 0.5))
    return f"{minutes} min" if minutes < 120 else f"{minutes / 60:.0f} h"
