"""Seconds of a step by phase, estimated from ``rates`` for full rows and responses of the greatest length: on GPUs."""

import math
from collections.abc import Mapping
from functools import cache

from nemo_tropd.config import TropdConfig
from nemo_tropd.convert.families import ModelShape
from nemo_tropd.planner import rates
from nemo_tropd.planner.degrees import BYTES, FP32, layout, micro_batches, positions, student_degrees
from nemo_tropd.planner.engine import EngineLoad, engine_load, token_bytes
from nemo_tropd.planner.machine import Machine
from nemo_tropd.planner.memory import checkpoint_bytes, optimizer_bytes, placement, stage_parameters, teacher_weights

AGAIN = {None: 0.0, "selective": 0.7, "full": 1.0}  # of a forward pass, that the backward pass computes again


def forward_flops(shape: ModelShape, tokens: float, longest: float) -> float:
    """Operations of a pass over ``tokens`` in sequences of ``longest``; reading the embedding is none."""
    products = shape.parameters() - (0 if shape.tied else shape.vocab_size * shape.hidden)
    return tokens * (2 * products + 2 * shape.layers * shape.size("q") * longest)


def token_seconds(shape: ModelShape, dtype: str, tensor: int, sequences: float, context: float) -> float:
    """Of an engine over ``tensor`` GPUs, to generate one token of each of ``sequences``: weights and cache are read."""
    read = shape.parameters() * BYTES[dtype] + sequences * context * token_bytes(shape, dtype)
    products = 2 * sequences * shape.parameters()
    waits = 2 * shape.layers * rates.ALL_REDUCE_S if tensor > 1 else 0.0
    return rates.STEP_S + waits + max(read / rates.BYTES, products / rates.FLOPS) / tensor


def _rollouts(cfg: TropdConfig, student: ModelShape, load: EngineLoad, length: float) -> float:
    """Of an engine. Responses have ``length`` times the greatest length on average, and one of them has it: no fewer
    tokens are waited for one after the other, and more where caches or a limit let fewer sequences be alive."""
    r, prompt = cfg.model.rollout, cfg.model.data.max_prompt_tokens
    mean = length * r.max_new_tokens
    at_once = max(1, min(r.max_num_seqs, load.sequences, int(load.holds // (prompt + mean))))
    turns = max(1.0, math.ceil(load.sequences / at_once) * length)
    each = token_seconds(student, r.dtype, load.tensor, load.sequences * length / turns, prompt + mean / 2)
    prompts = forward_flops(student, load.sequences * prompt, prompt)
    return turns * r.max_new_tokens * each + prompts / load.tensor / rates.FLOPS


def step_seconds(
    cfg: TropdConfig,
    student: ModelShape,
    teacher: ModelShape,
    machine: Machine,
    wire: Mapping[str, float],
    *,
    length: float = rates.LENGTH,
) -> dict[str, float]:
    """Seconds of a step by phase; nothing for a CPU, whose rates are not known. ``length``: of responses on average, as
    a share of the greatest. Which phases run beside one another is ``pace``'s to say."""
    if machine.kind == "cpu":
        return {}
    m, ranks, load = cfg.model, layout(cfg), engine_load(cfg, student, machine)
    there = (m.data.max_prompt_tokens + length * m.rollout.max_new_tokens) / load.longest
    tokens, mean = positions(cfg) * there, load.longest * there
    bubble = 1 + (ranks.pipeline - 1) / micro_batches(cfg)
    scored = forward_flops(teacher, tokens, mean) / ranks.world_size / rates.FLOPS
    scored = 0.0 if m.teacher.url else scored  # a server's speed is not known
    scored = scored / (rates.FP8_GAIN if m.teacher.fp8 else 1.0) + there * wire["teacher, tensor parallel"] / rates.LINK
    if m.teacher.offload:
        scored += teacher_weights(cfg, teacher) / rates.HOST_LINK
    passes = forward_flops(student, tokens, mean) * (3 + AGAIN[m.recompute]) / ranks.world_size / rates.FLOPS
    between = rates.NETWORK if cfg.trainer.num_nodes > 1 else rates.LINK
    numbers = sum(stage_parameters(student, student_degrees(cfg)))
    states = optimizer_bytes(cfg, numbers) + numbers * FP32
    sent = there * (wire["student, tensor parallel"] + wire["pipeline"]) / rates.LINK
    return {
        "rollouts": _rollouts(cfg, student, load, length),
        "teacher": scored * (bubble if ranks.teacher_tensor is None else 1.0),
        "student": passes * bubble + sent,
        "gradients and optimizer": wire["gradients, data parallel"] / between + 2 * states / rates.BYTES,
        **_weights(cfg, student, machine, load, wire["weights to the engines"]),
    }


@cache
def _tensors(shape: ModelShape) -> int:
    return sum(1 for _ in shape.hf_tensors())


def _weights(
    cfg: TropdConfig, student: ModelShape, machine: Machine, load: EngineLoad, wire: float
) -> dict[str, float]:
    """From the trainer to the engines; by way of rank 0's memory if they generate for later steps."""
    where, r = placement(cfg, machine), cfg.model.rollout
    size = student.parameters() * BYTES[r.dtype]
    tensors = _tensors(student) * rates.TENSOR_S
    taken = 2 * size / load.tensor / rates.BYTES + tensors
    if where == "process":  # to a file in memory and from there
        taken += 2 * size / rates.HOST_COPY
    if r.steps_ahead:
        broadcast = size if where == "dedicated" else 0.0
        copied = student.parameters() * BYTES[cfg.trainer.precision] / rates.HOST_LINK
        return {
            "weights to the host": (wire - broadcast) / rates.LINK + copied + tensors,
            "weights to the engine": taken + (copied + broadcast / rates.NETWORK if broadcast else 0.0),
        }
    taken += wire / (rates.NETWORK if where == "dedicated" else rates.LINK)
    return {"weights to the engine": taken + (rates.WAKE_S if where == "colocated" and r.sleep else 0.0)}


def checkpoint_seconds(cfg: TropdConfig, student: ModelShape) -> float:
    """To save a checkpoint: every node writes its share."""
    return checkpoint_bytes(cfg, student.parameters()) / cfg.trainer.num_nodes / rates.DISK


def spoken(seconds: float) -> str:
    """Human-readable."""
    number, unit = (
        (seconds, "s") if seconds < 100 else (seconds / 60, "min") if seconds < 7200 else (seconds / 3600, "h")
    )
    return f"{number:.{1 if number < 10 else 0}f} {unit}"
