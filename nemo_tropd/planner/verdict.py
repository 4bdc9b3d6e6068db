"""Does the plan fit the machine? As rows of a table, and as an error that says what to change."""

import math

from nemo_tropd.config import ConfigError, TropdConfig
from nemo_tropd.config_keys import value_at
from nemo_tropd.convert.families import ModelShape
from nemo_tropd.planner.degrees import BYTES
from nemo_tropd.planner.engine import engine_tensor, token_bytes
from nemo_tropd.planner.machine import ENGINE_WORKSPACE, GIB, Machine
from nemo_tropd.planner.memory import Memory

CPU_BLOCK = 128  # positions in a block of vLLM's cache on CPU
# part of the plan -> (the key that changes it most, what to do)
REMEDIES: dict[str, tuple[str, str]] = {
    "student": ("model.tensor_model_parallel_size", "raise it"),
    "gradients": ("model.tensor_model_parallel_size", "raise it"),
    "optimizer": ("model.optim.distributed", "set it to true with data-parallel ranks, or raise tensor parallel"),
    "teacher": (
        "model.teacher.tensor_model_parallel_size",
        "raise it, choose model.teacher.fp8, or set model.teacher.offload=true",
    ),
    "teacher's turn": ("model.teacher.tensor_model_parallel_size", "raise it, or choose model.teacher.fp8"),
    "teacher's head, split as the student's": ("model.tensor_model_parallel_size", "raise it"),
    "micro-batches and scores": ("model.global_batch_size", "lower it, or model.tropd.top_k"),
    "engine": ("model.rollout.gpu_memory_utilization", "lower it, or set model.rollout.sleep=true"),
    "engine awake": ("model.rollout.gpu_memory_utilization", "lower it"),
    "activations": ("model.recompute", "set it to full, or lower the tokens of a micro-batch"),
    "backward of one layer": ("model.tensor_model_parallel_size", "raise it, or lower the tokens of a micro-batch"),
    "teacher's layer": ("model.tensor_model_parallel_size", "raise it, or lower the tokens of a micro-batch"),
    "head": ("model.tensor_model_parallel_size", "raise it"),
    "reference": ("model.tensor_model_parallel_size", "raise it"),
    "engine's weights": ("model.tensor_model_parallel_size", "raise it"),
    "teacher in bf16": (
        "model.teacher.tensor_model_parallel_size",
        "raise it, or skip the comparison with model.teacher.admission.prompts=0",
    ),
    "hidden states of the held-out": ("model.data.held_out", "lower it, or model.validation.max_new_tokens"),
    "hidden states of a step": ("model.global_batch_size", "lower it"),
    "servers' answers": ("model.teacher.server.requests", "lower it"),
}


def gib(size: float) -> str:
    """``size`` bytes, human-readable."""
    return f"{size / GIB:.2f} GiB" if size >= 0.01 * GIB else f"{size / 2**20:.2f} MiB"


def needed(cfg: TropdConfig, memory: Memory, machine: Machine) -> float:
    """Bytes to compare with ``machine.bytes``: one rank and the engine on a GPU, all ranks and the engine on a host."""
    return memory.total if machine.kind == "gpu" else cfg.trainer.devices * memory.rank + memory.engine


def part_lines(memory: Memory, label: str) -> list[tuple[str, str]]:
    """(part, size): the resident parts, then every phase with its own."""
    lines = [(f"{label}: {part}", gib(size)) for part, size in memory.resident.items()]
    for phase, parts in (*memory.before.items(), *memory.phases.items()):
        sizes = ", ".join(f"{part} {gib(size)}" for part, size in parts.items())
        mark = " (the peak)" if phase == memory.peak_phase else ""
        when = "before the steps, " if phase in memory.before else "during "
        lines.append((f"{label}: {when}{phase}", f"{gib(sum(parts.values()))}{mark}: {sizes}"))
    return lines


def memory_lines(memory: Memory, machine: Machine) -> list[tuple[str, str]]:
    """What a rank holds, part by part and phase by phase."""
    lines = part_lines(memory, "memory")
    lines.append(("memory of a rank", f"{gib(memory.rank)} at its peak (estimated)"))
    if memory.engine:
        lines.append(("memory of the engine", f"{gib(memory.engine)} next to rank 0"))
    return [*lines, ("memory available", f"{gib(machine.bytes)}, {machine.where}")]


def check_memory(cfg: TropdConfig, memory: Memory, machine: Machine) -> None:
    """Raise ConfigError, with all sizes and the key that affects the largest part, if the plan does not fit."""
    need = needed(cfg, memory, machine)
    if need <= machine.bytes:
        return
    parts = memory.parts(memory.peak_phase)
    if memory.engine and memory.peak_phase in memory.phases:
        parts["engine"] = memory.engine
    largest = max((part for part in parts if part in REMEDIES), key=lambda part: parts[part])
    key, remedy = REMEDIES[largest]
    if largest == "engine" and machine.kind == "cpu":
        key, remedy = "model.rollout.kv_cache_gib", "lower it"
    advice = f"The largest part that a key can change is {largest}: {remedy}"
    if parts[largest] < need - machine.bytes:
        key = "trainer.devices"
        advice = "No single part is as large as what is missing: use more devices, or devices with more memory"
    numbers = ", ".join(f"{part} {gib(size)}" for part, size in sorted(parts.items(), key=lambda p: -p[1]) if size)
    each = "" if machine.kind == "gpu" else f" ({cfg.trainer.devices} ranks of {gib(memory.rank)} per host)"
    raise ConfigError(
        key,
        value_at(cfg, key),
        f"the plan needs {gib(need)}{each} during {memory.peak_phase}, but only {gib(machine.bytes)} are available "
        f"({machine.where}): {numbers}. {advice}",
    )


def check_kv_cache(cfg: TropdConfig, student: ModelShape, teacher: ModelShape, machine: Machine) -> None:
    """Raise ConfigError, with the least that is enough, if an engine's cache cannot hold one sequence of the greatest
    length, as vLLM would at its start; the teacher's on GPUs is looked at by ``teacher_engines``."""
    r, length = cfg.model.rollout, cfg.model.encoder_seq_length
    needs = f"one sequence of model.encoder_seq_length = {length} needs"
    if machine.kind == "cpu":
        blocks = math.ceil(length / CPU_BLOCK) + 1  # vLLM keeps one block for itself
        engines = (student,) if cfg.model.teacher.url else (student, teacher)
        least = max(token_bytes(s, r.dtype) for s in engines) * blocks * CPU_BLOCK
        if r.kv_cache_gib * GIB < least:
            enough = math.ceil(least / GIB * 1000) / 1000
            raise ConfigError("model.rollout.kv_cache_gib", r.kv_cache_gib, f"{needs} {enough:g} GiB; raise it")
        return
    tensor = engine_tensor(cfg, machine)
    weights = student.parameters() * BYTES[r.dtype] / tensor
    share = (weights + ENGINE_WORKSPACE + length * token_bytes(student, r.dtype) / tensor) / machine.bytes
    if r.gpu_memory_utilization < share:
        remedy = f"raise it to {math.ceil(share * 100) / 100:g}" if share <= 0.95 else "use tensor parallelism"
        why = f"beside the engine's weights ({gib(weights)}) and workspace, {needs} a share of {share:.2f}; {remedy}"
        raise ConfigError("model.rollout.gpu_memory_utilization", r.gpu_memory_utilization, why)
