"""Seconds of a step by phase, estimated from ``rates`` for full rows and responses of the greatest length: on GPUs."""

from collections.abc import Mapping

from nemo_tropd.config import TropdConfig
from nemo_tropd.convert.families import ModelShape
from nemo_tropd.planner import rates
from nemo_tropd.planner.degrees import BYTES, FP32, layout, micro_batches, positions, student_degrees
from nemo_tropd.planner.engine import EngineLoad, engine_load, token_bytes
from nemo_tropd.planner.machine import Machine
from nemo_tropd.planner.memory import checkpoint_bytes, optimizer_bytes, placement, stage_parameters, teacher_weights

AGAIN = {None: 0.0, "selective": 0.7, "full": 1.0}  # of a forward pass, that the backward pass computes again


def forward_flops(shape: ModelShape, tokens: float, longest: int) -> float:
    """Operations of a pass over ``tokens`` in sequences of ``longest``; reading the embedding is none."""
    products = shape.parameters() - (0 if shape.tied else shape.vocab_size * shape.hidden)
    return tokens * (2 * products + 2 * shape.layers * shape.size("q") * longest)


def token_seconds(shape: ModelShape, dtype: str, tensor: int, sequences: int, context: float) -> float:
    """Of an engine over ``tensor`` GPUs, to generate one token of each of ``sequences``: weights and cache are read."""
    read = shape.parameters() * BYTES[dtype] + sequences * context * token_bytes(shape, dtype)
    products = 2 * sequences * shape.parameters()
    waits = 2 * shape.layers * rates.ALL_REDUCE_S if tensor > 1 else 0.0
    return rates.STEP_S + waits + max(read / rates.BYTES, products / rates.FLOPS) / tensor


def _rollouts(cfg: TropdConfig, student: ModelShape, load: EngineLoad) -> float:
    m = cfg.model
    context = m.data.max_prompt_tokens + m.rollout.max_new_tokens / 2
    each = token_seconds(student, m.rollout.dtype, load.tensor, load.at_once, context)
    prompts = forward_flops(student, load.sequences * m.data.max_prompt_tokens, m.data.max_prompt_tokens)
    return load.waves * m.rollout.max_new_tokens * each + prompts / load.tensor / rates.FLOPS


def step_seconds(
    cfg: TropdConfig, student: ModelShape, teacher: ModelShape, machine: Machine, wire: Mapping[str, float]
) -> dict[str, float]:
    """Seconds of a step by phase; nothing for a CPU, whose rates are not known."""
    if machine.kind == "cpu":
        return {}
    m, ranks, load = cfg.model, layout(cfg), engine_load(cfg, student, machine)
    tokens, numbers = positions(cfg), sum(stage_parameters(student, student_degrees(cfg)))
    bubble = 1 + (ranks.pipeline - 1) / micro_batches(cfg)
    scored = forward_flops(teacher, tokens, load.longest) / ranks.world_size / rates.FLOPS
    scored = 0.0 if m.teacher.url else scored  # a server's speed is not known
    scored = scored / (rates.FP8_GAIN if m.teacher.fp8 else 1.0) + wire["teacher, tensor parallel"] / rates.LINK
    if m.teacher.offload:
        scored += teacher_weights(cfg, teacher) / rates.HOST_LINK
    passes = forward_flops(student, tokens, load.longest) * (3 + AGAIN[m.recompute]) / ranks.world_size / rates.FLOPS
    between = rates.NETWORK if cfg.trainer.num_nodes > 1 else rates.LINK
    states = optimizer_bytes(cfg, numbers) + numbers * FP32
    where = placement(cfg, machine)
    sent = student.parameters() * BYTES[m.rollout.dtype]
    refresh = 2 * sent / load.tensor / rates.BYTES + sum(1 for _ in student.hf_tensors()) * rates.TENSOR_S
    refresh += wire["weights to the engines"] / (rates.NETWORK if where == "dedicated" else rates.LINK)
    return {
        "rollouts": _rollouts(cfg, student, load),
        "teacher": scored * (bubble if ranks.teacher_tensor is None else 1.0),
        "student": passes * bubble + (wire["student, tensor parallel"] + wire["pipeline"]) / rates.LINK,
        "gradients and optimizer": wire["gradients, data parallel"] / between + 2 * states / rates.BYTES,
        "weights to the engine": refresh + (rates.WAKE_S if where == "colocated" and m.rollout.sleep else 0.0),
    }


def checkpoint_seconds(cfg: TropdConfig, student: ModelShape) -> float:
    """To save a checkpoint: every node writes its share."""
    return checkpoint_bytes(cfg, student.parameters()) / cfg.trainer.num_nodes / rates.DISK


def time_lines(cfg: TropdConfig, student: ModelShape, seconds: Mapping[str, float]) -> list[tuple[str, str]]:
    """Where the time of a step and of the run goes."""
    if not seconds:
        return []
    step, t = sum(seconds.values()), cfg.trainer.tropd
    parts = ", ".join(f"{phase} {spoken(value)}" for phase, value in seconds.items())
    saves = -(-t.max_steps // t.save_interval) if t.save_interval else 1  # the last step is always saved
    save = checkpoint_seconds(cfg, student)
    text = f"at most {spoken(t.max_steps * step + saves * save)}: {t.max_steps} steps, {saves} checkpoint(s) of "
    return [
        ("time of a step", f"at most {spoken(step)} (estimated, every response of the greatest length): {parts}"),
        ("time of a run", f"{text}{spoken(save)}; what comes before the first step and validations apart"),
    ]


def spoken(seconds: float) -> str:
    """Human-readable."""
    number, unit = (
        (seconds, "s") if seconds < 100 else (seconds / 60, "min") if seconds < 7200 else (seconds / 3600, "h")
    )
    return f"{number:.{1 if number < 10 else 0}f} {unit}"
