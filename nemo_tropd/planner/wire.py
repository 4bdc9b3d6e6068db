"""Bytes that a GPU sends per step, by kind: worst case, as in ``planner.memory``, by ring collectives."""

from nemo_tropd.config import TropdConfig
from nemo_tropd.convert.families import ModelShape
from nemo_tropd.planner.degrees import (
    BYTES,
    FP32,
    Degrees,
    layout,
    loss_tokens,
    positions,
    student_degrees,
    teacher_degrees,
)
from nemo_tropd.planner.machine import Machine
from nemo_tropd.planner.memory import BATCH_POSITION, placement, stage_parameters

# Bytes of a rollout's token as rank 0 sends it to every rank: id and log-probability, see rollout/arrays.py.
ROLLOUT_TOKEN = 8


def ring(size: float, ranks: int, *, reduce: bool = False) -> float:
    """Bytes one of ``ranks`` sends to gather or scatter ``size`` bytes, or with ``reduce`` to all-reduce them."""
    return (2 if reduce else 1) * size * (ranks - 1) / ranks


def estimate_wire(
    cfg: TropdConfig, student: ModelShape, teacher: ModelShape, machine: Machine, *, exact: bool = False
) -> dict[str, float]:
    """Bytes sent by one rank per step of a checked configuration, by kind. ``exact``: as ``planner.memory`` has it."""
    ranks, own, theirs = layout(cfg), student_degrees(cfg), teacher_degrees(cfg)
    m, width = cfg.model, BYTES[cfg.trainer.precision]
    teacher_width = BYTES[m.teacher.precision or cfg.trainer.precision]
    mine = positions(cfg) / ranks.data
    scored = loss_tokens(cfg) / ranks.data
    numbers = sum(stage_parameters(student, own))
    # A layer's two blocks each reduce the hidden states, forward and backward; recomputation adds a forward pass.
    passes = {None: 2, "selective": 2.5, "full": 3}[m.recompute]
    hidden = ring(mine * student.hidden * width, own.tensor)
    again = 2 if own.sequence > 1 else 0  # backward gathers each block's input again, for the weights' gradients
    student_tensor = hidden * (2 * passes * 2 + again) * student.layers / own.pipeline
    student_head = ring(mine * student.hidden * width, own.tensor, reduce=True)
    columns = ring(scored * (m.tropd.top_k + 4) * FP32, own.tensor, reduce=True)
    columns += scored * 2 * m.rollout.top_k * FP32 * (own.tensor - 1)  # the tokens that sampling kept
    # A teacher group scores the rows of several data-parallel ranks, or a share of one's.
    share = 0.0 if m.teacher.url else ranks.owners / ranks.replicas
    seen = mine * share
    teacher_hidden = ring(seen * teacher.hidden * teacher_width, theirs.tensor, reduce=True)
    candidates = scored * share * (m.tropd.top_k * (FP32 + 8) + 3 * FP32) * (theirs.tensor - 1)
    sends = 2 if own.pipeline > 2 else 1 if own.pipeline == 2 else 0
    return {
        "student, tensor parallel": student_tensor + student_head + columns,
        "teacher, tensor parallel": teacher_hidden * 2 * teacher.layers / theirs.pipeline + candidates,
        "pipeline": sends * mine * student.hidden * width / own.sequence,
        "gradients, data parallel": _data_parallel(cfg, numbers, width),
        "weights to the engines": _refresh(cfg, student, own, machine),
        "rollouts": positions(cfg) * ROLLOUT_TOKEN if ranks.world_size > 1 else 0.0,
        "teacher's scores": _scores(cfg, scored, teacher.hidden * teacher_width if exact else None),
    }


def _data_parallel(cfg: TropdConfig, numbers: float, width: int) -> float:
    """All-reduce of the gradients; with the distributed optimizer, reduce-scatter, and all-gather of the weights."""
    data = layout(cfg).data
    if not cfg.model.optim.distributed:
        return ring(numbers * FP32, data, reduce=True)
    return ring(numbers * FP32, data) + ring(numbers * width, data)


def _scores(cfg: TropdConfig, scored: float, hidden: float | None) -> float:
    """What a teacher with its own tensor degree adds: scores sent within a model group, micro-batches to owners. Where
    hidden states of ``hidden`` bytes stand for the scores, sequence parallelism gathers them, too."""
    ranks = layout(cfg)
    each = (1 + 2 * cfg.model.tropd.top_k) * FP32 if hidden is None else hidden
    passed = scored * each if ranks.replicas > 1 or (cfg.model.teacher.url and ranks.tensor > 1) else 0.0
    if hidden is not None and teacher_degrees(cfg).sequence > 1:
        passed += ring(scored * hidden, ranks.tensor)
    return passed + (ranks.owners - 1) * positions(cfg) / ranks.data * BATCH_POSITION


def _refresh(cfg: TropdConfig, student: ModelShape, own: Degrees, machine: Machine) -> float:
    """The student's weights, tensor by tensor, gathered from all ranks of a model group for its engine: by rank 0's
    group for a child-process engine, by every group for colocated engines; to dedicated hosts rank 0 also broadcasts
    them once, by NCCL's ring."""
    group = own.tensor * own.pipeline
    bytes_ = student.parameters() * BYTES[cfg.model.rollout.dtype]
    sent = ring(bytes_, group)
    if placement(cfg, machine) == "dedicated":
        return sent + bytes_
    return sent if placement(cfg, machine) == "colocated" or group > 1 else 0.0
