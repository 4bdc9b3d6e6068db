"""The engines with which the teacher generates before a run: on the GPUs of rank 0's node, which are empty then."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from nemo_tropd.config import ConfigError, TropdConfig
from nemo_tropd.convert.families import ModelShape
from nemo_tropd.planner.degrees import BYTES
from nemo_tropd.planner.engine import token_bytes
from nemo_tropd.planner.machine import CPU_ENGINE, ENGINE_WORKSPACE, GIB, Machine
from nemo_tropd.planner.rates import CPU_FLOPS
from nemo_tropd.planner.seconds import token_seconds
from nemo_tropd.planner.verdict import gib
from nemo_tropd.rollout.placement import TEACHER_SEQUENCES, teacher_utilization


@dataclass(frozen=True)
class TeacherEngines:
    """How many engines generate, and over how many GPUs each is split."""

    count: int
    tensor: int


def teacher_engines(cfg: TropdConfig, teacher: ModelShape, machine: Machine) -> TeacherEngines:
    """As many engines as rank 0's node has room for; one on a CPU. Raises ConfigError if there is none."""
    r, devices = cfg.model.rollout, cfg.trainer.devices if machine.kind == "gpu" else 1
    weights = teacher.parameters() * BYTES[r.dtype]
    cache: float = token_bytes(teacher, r.dtype) * cfg.model.encoder_seq_length
    if machine.kind == "cpu":
        cache, spare = r.kv_cache_gib * GIB, machine.bytes - cfg.trainer.devices * machine.process - CPU_ENGINE
    else:
        spare = teacher_utilization(machine.bytes) * machine.bytes - ENGINE_WORKSPACE
    degrees = [n for n in range(1, devices + 1) if not (devices % n or teacher.heads % n or teacher.kv_heads % n)]
    for degree in degrees:
        if (weights + cache) / degree <= spare:
            return TeacherEngines(devices // degree, degree)
    most = f"{gib(max(spare, 0) * max(degrees))} of {max(degrees)} device(s) of a node"
    raise ConfigError(
        "model.teacher.path",
        cfg.model.teacher.path,
        f"to generate before the first step, the teacher needs {gib(weights)} for its weights in "
        f"{r.dtype} and {gib(cache)} for a sequence, more than the {most}: use devices with more memory, or set "
        "model.tropd.guidance.enabled=false, model.data.held_out=0 and model.validation.score_teacher=false",
    )


def generation_lines(
    engines: TeacherEngines,
    teacher: ModelShape,
    machine: Machine,
    cfg: TropdConfig,
    wanted: Mapping[tuple[int, ...], int],
    benchmarks: Sequence[int] = (),
) -> list[tuple[str, str]]:
    """What the teacher generates before the first step, at most: tokens, engines, time. ``benchmarks``: tokens of each
    answer to one."""
    full, lengths = (
        cfg.model.teacher.response_tokens or cfg.model.rollout.max_new_tokens,
        [*wanted.values(), *benchmarks],
    )
    if not lengths:
        return []
    tokens = sum(lengths)
    prefixes = [length for length in wanted.values() if length < full]
    answers = len(wanted) - len(prefixes)
    parts = [f"{len(prefixes):,} prefixes of at most {max(prefixes):,} tokens"] if prefixes else []
    parts += [f"{answers:,} answers of at most {full:,}"] if answers else []
    parts += [f"{len(benchmarks):,} answers to benchmarks of at most {max(benchmarks):,}"] if benchmarks else []
    where = "on the CPU"
    if machine.kind == "gpu":
        where = f"on rank 0's node, each on {engines.tensor} GPU{'s' * (engines.tensor > 1)}"
        longest, context = max(lengths), tokens / len(lengths) + cfg.model.data.max_prompt_tokens
        each = min(TEACHER_SEQUENCES, -(-len(lengths) // engines.count))
        step = token_seconds(teacher, cfg.model.rollout.dtype, engines.tensor, each, context)
        # Sequences that run alone at the end take as long as any.
        seconds = step * max(tokens / (engines.count * each), longest)
    else:
        seconds = tokens * 2 * teacher.parameters() / CPU_FLOPS
    made = f"{tokens:,} tokens by {engines.count} engine{'s' * (engines.count > 1)} {where}"
    return [("the teacher generates", f"{' and '.join(parts)}: {made}, about {duration(seconds)} if none is cached")]


def duration(seconds: float) -> str:
    """Human-readable, rounded up to a minute."""
    minutes = max(1, round(seconds / 60 + 0.5))
    return f"{minutes} min" if minutes < 120 else f"{minutes / 60:.0f} h"
