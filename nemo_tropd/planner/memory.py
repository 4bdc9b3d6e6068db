"""Memory of one rank in bytes, in the worst case of its settings: full rows and responses of maximum length.

Activations are counted tensor by tensor as Megatron's layers keep them for the backward pass (no attention scores,
except by the local attention on CPU, for padded rows); Korthikanti et al. 2022 (arXiv 2205.05198) count the same way.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache

from nemo_tropd.config import TropdConfig
from nemo_tropd.convert.families import ModelShape
from nemo_tropd.planner.degrees import (
    BYTES,
    FP32,
    Degrees,
    answer_bytes,
    early_bytes,
    layout,
    loss_tokens,
    micro_batches,
    positions,
    row_tokens,
    student_degrees,
    teacher_degrees,
    teacher_generates,
)
from nemo_tropd.planner.machine import CPU_ENGINE, FRAGMENTATION, GIB, NCCL_GROUP, Machine, graphs_bytes
from nemo_tropd.rollout.placement import placement_of, teacher_utilization

EXACT_COPIES = 8  # loss.teacher.TORCH_COPIES, which a plan, made without torch, cannot import
# Bytes per position of a micro-batch's tensors: ids, positions and labels in int64, three masks, two floats.
BATCH_POSITION = 35
_HEAD = "teacher's head, split as the student's"
Of = tuple[TropdConfig, ModelShape]  # a teacher in the configuration of a run whose only one it is


@dataclass(frozen=True)
class Memory:
    """Estimated bytes of the rank that needs the most, or of a host.

    ``resident`` is allocated all through the steps; of ``phases`` one is active at a time; both by part. ``engine`` is
    the rollout engine's own process on rank 0's GPU or host, all through the steps; an engine inside the ranks'
    processes is among the parts instead. ``before``: phases before the first step, each with all that it holds.
    """

    resident: Mapping[str, float]
    phases: Mapping[str, Mapping[str, float]]
    engine: float
    before: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    def parts(self, phase: str) -> dict[str, float]:
        """All that is held in ``phase``, by part."""
        return dict(self.before[phase]) if phase in self.before else {**self.resident, **self.phases[phase]}

    def size(self, phase: str) -> float:
        """Bytes of ``phase``, the engine's own process among them."""
        return sum(self.parts(phase).values()) + (0.0 if phase in self.before else self.engine)

    @property
    def peak_phase(self) -> str:
        return max((*self.phases, *self.before), key=self.size)

    @property
    def rank(self) -> float:
        return sum(self.parts(self.peak_phase).values())

    @property
    def total(self) -> float:
        return self.size(self.peak_phase)

    @property
    def steps(self) -> float:
        """Bytes at the peak of the steps: an engine before them takes its share, whatever it needs."""
        return max(self.size(phase) for phase in self.phases)


@cache
def stage_parameters(shape: ModelShape, degrees: Degrees) -> tuple[float, float]:
    """(parameters in layers, parameters in embedding and head) of the fullest rank, with the padded vocabulary."""
    layers, ends = [0.0] * degrees.pipeline, [0.0] * degrees.pipeline
    vocabulary = shape.padded_vocab(degrees.tensor) / degrees.tensor * shape.hidden
    for row in shape.rows():
        stage = row.stage(shape, degrees.pipeline)
        if row.layout == "vocabulary":
            ends[stage] += vocabulary
        else:
            numbers = sum(math.prod(shape.size(d) for d in dimensions) for _, dimensions in row.hf)
            layers[stage] += numbers / (1 if row.split_dimension is None else degrees.tensor)
    if shape.tied and degrees.pipeline > 1:
        ends[-1] += vocabulary  # the head's copy of the embedding
    fullest = max(range(degrees.pipeline), key=lambda stage: layers[stage] + ends[stage])
    return layers[fullest], ends[fullest]


def teacher_weights(cfg: TropdConfig, teacher: ModelShape) -> float:
    """Bytes of the teacher's weights on the fullest rank.

    In FP8 a layer's parameter takes one byte, plus a 4-byte scale per 128 x 128 block (or per tensor), or in mxfp8 a
    byte per 32. Embedding and head stay in bf16, and so do model.teacher.fp8_first_last_bf16 layers at each end.
    """
    t = cfg.model.teacher
    width = BYTES[t.precision or cfg.trainer.precision] * (not t.url)
    layers, ends = stage_parameters(teacher, teacher_degrees(cfg))
    if t.fp8 is None:
        return (layers + ends) * width
    wide = min(2 * t.fp8_first_last_bf16, teacher.layers) / teacher.layers
    narrow = 1 + {"mxfp8": 1 / 32, "blockwise": 4 / 128**2}.get(t.fp8, 0.0)
    if not t.fp8_param:
        narrow += width  # Transformer Engine keeps the cast weights beside those they are cast from
    return layers * (wide * width + (1 - wide) * narrow) + ends * width


def layer_activations(shape: ModelShape, degrees: Degrees, width: int, *, fused: bool) -> tuple[float, float, float]:
    """Bytes per position of one layer: (kept outside the feed-forward part, kept in it, its input alone).

    If layers are not ``fused``, torch also keeps the gate's output, and for both norms the normalised value and its
    input in fp32.
    """
    h, f, q, kv = (shape.size(d) for d in ("hidden", "ffn", "q", "kv"))
    # Two residuals and two norm outputs; queries, keys, values after RoPE and before their norms; attention's output.
    attention = 4 * h / degrees.sequence + (2 * q + 2 * kv + (q + kv if shape.qk_norm else 0)) / degrees.tensor
    feed_forward = (3 if fused else 4) * f / degrees.tensor
    statistics = FP32 * (shape.heads / degrees.tensor + 2)
    if not fused:
        statistics += 2 * FP32 * h / degrees.sequence * (1 if width == FP32 else 2)
    return width * attention + statistics, width * feed_forward, width * h / degrees.sequence


def padded_attention(shape: ModelShape, degrees: Degrees, width: int, length: int) -> float:
    """Bytes per position that Megatron's local attention keeps of a padded row: probabilities in fp32 and in the
    layers' dtype, and keys and values repeated for every query head."""
    probabilities = shape.heads / degrees.tensor * length * (FP32 + (width if width < FP32 else 0))
    return probabilities + 2 * width * shape.size("q") / degrees.tensor


def student_activations(cfg: TropdConfig, shape: ModelShape, machine: Machine) -> dict[str, float]:
    """Bytes kept for the backward pass by all micro-batches in flight, and the working memory of one layer's passes."""
    degrees, width, rows = student_degrees(cfg), BYTES[cfg.trainer.precision], row_tokens(cfg)
    attention, feed_forward, entry = layer_activations(shape, degrees, width, fused=machine.kind == "gpu")
    if machine.kind == "cpu" and cfg.model.tokens_per_micro_batch is None:
        attention += padded_attention(shape, degrees, width, cfg.model.encoder_seq_length)
    both = attention + feed_forward
    modes = {None: (both, 0.0), "selective": (attention, feed_forward), "full": (entry, both)}
    kept, again = modes[cfg.model.recompute]
    in_flight = min(degrees.pipeline, micro_batches(cfg))
    # Backward needs the gradients of a layer's widest tensors and of the hidden states at the same time.
    working = again + width * (3 * shape.ffn / degrees.tensor + 3 * shape.hidden)
    # The embedding's output, the final norm's input and output.
    ends = 3 * width * shape.hidden / degrees.sequence
    return {
        "activations": rows * (kept * shape.layers / degrees.pipeline * in_flight + ends),
        "backward of one layer": rows * working,
    }


def head_bytes(
    cfg: TropdConfig, shape: ModelShape, degrees: Degrees, machine: Machine, *, gradient: bool, exact: bool = False
) -> float:
    """Bytes of the chunked head: logits of the chunks in flight, and with ``gradient`` (the student) both gradients.
    ``exact``: the teacher's logits, too, and on a CPU what torch makes in between."""
    width, rows = BYTES[cfg.trainer.precision], row_tokens(cfg)
    columns = shape.padded_vocab(degrees.tensor) / degrees.tensor
    copies = 2 * width if machine.kind == "gpu" else width + (FP32 if width < FP32 else 0)
    copies *= (2 if machine.kind == "gpu" else EXACT_COPIES) if exact else 1
    chunk = cfg.model.tropd.chunk_tokens
    logits = min(columns * copies * (chunk or rows), math.inf if chunk else machine.chunk_bytes)
    if not gradient:
        return logits
    # The weight's gradient is accumulated in fp32, and returned to autograd in the weight's own dtype.
    weight = columns * shape.hidden * (FP32 + width)
    hidden = rows * shape.hidden * width * (1 if degrees.sequence == 1 else 2)
    return logits + weight + hidden


def optimizer_bytes(cfg: TropdConfig, numbers: float) -> float:
    """Bytes of fp32 master weights (unless the model's are fp32) and of the optimizer's fp32 moments."""
    moments = {"adam": 2, "sgd": 1}[cfg.model.optim.name]
    master = 1 if cfg.trainer.precision == "bf16" else 0
    return FP32 * (moments + master) * numbers / (layout(cfg).data if cfg.model.optim.distributed else 1)


def checkpoint_bytes(cfg: TropdConfig, numbers: float) -> float:
    """Bytes of ``numbers`` weights and of all their optimizer states, over all data-parallel ranks."""
    states, sharded = optimizer_bytes(cfg, numbers), cfg.model.optim.distributed
    if sharded:
        states *= layout(cfg).data
    if cfg.model.teacher.follow_steps is not None:  # of the student's shape, and saved beside it
        states += numbers * BYTES[cfg.model.teacher.precision or cfg.trainer.precision]
    if sharded and cfg.trainer.precision == "32":
        states += FP32 * numbers  # the sharded optimizer also saves the weights that it updates
    return states + numbers * BYTES[cfg.trainer.precision]


def placement(cfg: TropdConfig, machine: Machine) -> str:
    """process, colocated or dedicated: what ``model.rollout.placement`` means on ``machine``."""
    return placement_of(cfg, on_gpu=machine.kind == "gpu")


def engine_bytes(cfg: TropdConfig, student: ModelShape, machine: Machine) -> float:
    """Bytes of the rollout engine: vLLM's share of a GPU, or on CPU its weights, cache and processes."""
    r = cfg.model.rollout
    if machine.kind == "gpu":
        return r.gpu_memory_utilization * machine.bytes
    return student.parameters() * BYTES[r.dtype] + r.kv_cache_gib * GIB + CPU_ENGINE


def estimate(
    cfg: TropdConfig,
    student: ModelShape,
    teacher: ModelShape,
    machine: Machine,
    *,
    reference: bool = False,
    first_pass: bool = False,
    exact: bool = False,
    others: Sequence[Of] = (),
) -> Memory:
    """The memory of a checked configuration on ``machine``. Keywords: what the objective needs, and ``others``: further
    teachers, each in the configuration of a run whose only one it is. They score in turn; what is not offloaded stays.
    """
    own, ranks, width = student_degrees(cfg), layout(cfg), BYTES[cfg.trainer.precision]
    numbers, teachers = sum(stage_parameters(student, own)), [(cfg, teacher), *others]
    largest = max(teachers, key=lambda of: (not of[0].model.teacher.url) * of[1].parameters())
    scoring, (stay, held) = _most(_scoring(*of, machine) for of in teachers), _weights(teachers)
    resident = {
        "process": process_bytes(cfg, machine, others),
        "student": numbers * width,
        "gradients": numbers * FP32,
        "optimizer": optimizer_bytes(cfg, numbers),
        **({"teacher": stay} if stay else {}),
        "micro-batches and scores": _batch_bytes(cfg),
    }
    if reference:
        resident["reference"] = numbers * BYTES[cfg.model.teacher.precision or cfg.trainer.precision]
    phases: dict[str, dict[str, float]] = {
        "teacher scores": {**scoring, **held},
        "student passes": {
            **student_activations(cfg, student, machine),
            "head": head_bytes(cfg, student, own, machine, gradient=True, exact=exact),
        },
        "optimizer step": {"largest update": 2 * FP32 * _largest(student, own)},
        "weights to the engine": {"gathered tensors": 3 * student.vocab_size * student.hidden * width},
    }
    if exact:
        resident |= _most((_beside(of[0], student, of[1], machine) for of in teachers), add=_HEAD)
    alone = _forward(cfg, student, own, machine)
    if cfg.model.data.held_out:
        phases["validation"] = {**_validation(largest[0], student, largest[1], alone, scoring), **held}
    if first_pass:
        kept = positions(cfg) / ranks.data * student.hidden / own.sequence * width
        phases["first pass of the student"] = {"hidden states of a step": kept, **alone}
    if machine.kind == "gpu":
        resident["fragments"] = FRAGMENTATION * machine.bytes
    before = _before(cfg, teachers, machine, resident, scoring)
    if placement(cfg, machine) != "colocated":
        apart = placement(cfg, machine) == "dedicated"
        return Memory(resident, phases, 0.0 if apart else engine_bytes(cfg, student, machine), before)
    _add_engine(cfg, student, machine, resident, phases)
    return Memory(resident, phases, 0.0, before)


def _add_engine(
    cfg: TropdConfig,
    student: ModelShape,
    machine: Machine,
    resident: dict[str, float],
    phases: dict[str, dict[str, float]],
) -> None:
    """An engine inside the ranks' own processes."""
    tensor, engine = student_degrees(cfg).tensor, engine_bytes(cfg, student, machine)
    graphs = graphs_bytes(tensor)
    if not cfg.model.rollout.sleep:
        resident["engine"] = engine + graphs
        return
    resident["engine asleep"] = graphs
    phases["rollouts"] = {"engine awake": engine}
    phases["weights to the engine"]["engine's weights"] = student.parameters() * BYTES[cfg.model.rollout.dtype] / tensor


def _weights(teachers: Sequence[Of]) -> tuple[float, dict[str, float]]:
    """Bytes of the teachers' weights that stay on the device, and of the largest that comes and goes."""
    size = [(teacher_weights(*of), of[0].model.teacher.offload) for of in teachers]
    away, stay = [n for n, offload in size if offload], sum(n for n, offload in size if not offload)
    return stay, {"teacher's turn" if stay else "teacher": max(away)} if away else {}


def _most(parts: Iterable[Mapping[str, float]], add: str = "") -> dict[str, float]:
    """The largest of each part, for what is there in turn; of the part ``add`` the sum."""
    found: dict[str, float] = {}
    for each in parts:
        for part, size in each.items():
            found[part] = found.get(part, 0.0) + size if part == add else max(found.get(part, 0.0), size)
    return found


def states_bytes(cfg: TropdConfig, teacher: ModelShape) -> float:
    """Bytes of the teacher's hidden states that an exact objective keeps for a step, on a rank of the last stage."""
    width, split = BYTES[cfg.model.teacher.precision or cfg.trainer.precision], teacher_degrees(cfg).sequence
    return loss_tokens(cfg) / layout(cfg).data * teacher.hidden * width / split


def _beside(cfg: TropdConfig, student: ModelShape, teacher: ModelShape, machine: Machine) -> dict[str, float]:
    """What exact objectives keep all through the steps: the teacher's hidden states, and its head if it is a copy."""
    own, theirs, found, t = student_degrees(cfg).tensor, teacher_degrees(cfg), dict[str, float](), cfg.model.teacher
    width, away = BYTES[t.precision or cfg.trainer.precision], t.offload_states and machine.kind == "gpu"
    if not away:
        found["teacher's hidden states"] = states_bytes(cfg, teacher)
    if away or theirs.sequence > 1:
        found["teacher's states of a micro-batch"] = row_tokens(cfg) * teacher.hidden * width
    columns = student.padded_vocab(own)
    alike = own == theirs.tensor and (own == 1 or columns == teacher.padded_vocab(own))
    if t.offload or not alike:
        found[_HEAD] = columns / own * teacher.hidden * width
    return found


def process_bytes(cfg: TropdConfig, machine: Machine, others: Sequence[Of] = ()) -> float:
    """Bytes of a rank's process besides its tensors; on a GPU with a communicator for each group it is in."""
    ranks = layout(cfg)
    groups = [ranks.world_size, ranks.tensor, ranks.data, ranks.pipeline]
    groups += {layout(of).teacher_tensor or 1 for of in (cfg, *(of for of, _ in others))}
    if ranks.tensor > 1 and ranks.pipeline > 1:
        groups.append(ranks.tensor * ranks.pipeline)
    return machine.process + (NCCL_GROUP * sum(size > 1 for size in groups) if machine.kind == "gpu" else 0.0)


def _batch_bytes(cfg: TropdConfig) -> float:
    """Bytes of one data-parallel rank's micro-batches and of the teacher's scores of them."""
    scores = loss_tokens(cfg) * (FP32 + cfg.model.tropd.top_k * (FP32 + 8))
    return (positions(cfg) * BATCH_POSITION + scores) / layout(cfg).data


def _forward(cfg: TropdConfig, shape: ModelShape, degrees: Degrees, machine: Machine) -> dict[str, float]:
    """Bytes of a pass over one row without gradients."""
    width = BYTES[cfg.trainer.precision]
    attention, feed_forward, _ = layer_activations(shape, degrees, width, fused=machine.kind == "gpu")
    layer = row_tokens(cfg) * (attention + feed_forward)
    return {"layer": layer, "head": head_bytes(cfg, shape, degrees, machine, gradient=False)}


def _scoring(cfg: TropdConfig, teacher: ModelShape, machine: Machine) -> dict[str, float]:
    """Bytes while the teacher scores a step, its weights apart."""
    parts = early_bytes(cfg, placement(cfg, machine))
    if cfg.model.teacher.url:
        return parts | ({"servers' answers": answer_bytes(cfg)} if machine.kind == "cpu" else {})
    ranks, degrees = layout(cfg), teacher_degrees(cfg)
    parts |= {f"teacher's {part}": size for part, size in _forward(cfg, teacher, degrees, machine).items()}
    if ranks.owners > 1:  # a group sees the rollouts of several data-parallel ranks
        parts["other ranks' micro-batches"] = (ranks.owners - 1) * _batch_bytes(cfg)
    if degrees.pipeline > 1:  # the last stage gets them all before it scores the first
        kept = positions(cfg) / ranks.data * teacher.hidden / degrees.sequence
        parts["hidden states of a step"] = kept * BYTES[cfg.model.teacher.precision or cfg.trainer.precision]
    return parts


def _validation(
    cfg: TropdConfig, student: ModelShape, teacher: ModelShape, alone: dict[str, float], scoring: dict[str, float]
) -> dict[str, float]:
    """Bytes while divergences are measured, the teacher's weights apart: all hidden states of both are kept."""
    m, ranks, own, theirs = cfg.model, layout(cfg), student_degrees(cfg), teacher_degrees(cfg)
    new = m.validation.max_new_tokens or m.rollout.max_new_tokens
    tokens = min(m.encoder_seq_length, m.data.max_prompt_tokens + new)
    tokens *= math.ceil(m.data.held_out * m.validation.samples_per_prompt / ranks.data)
    both = student.hidden / own.sequence + (not m.teacher.url) * ranks.owners * teacher.hidden / theirs.sequence
    return {
        "hidden states of the held-out": tokens * both * BYTES[cfg.trainer.precision],
        "teacher's layer": scoring.get("teacher's layer", 0.0),
        "head": alone["head"] + scoring.get("teacher's head", 0.0),
    }


def _before(
    cfg: TropdConfig, teachers: Sequence[Of], machine: Machine, resident: Mapping[str, float], scoring: dict[str, float]
) -> dict[str, dict[str, float]]:
    """On a GPU: the phases before the first step (on a CPU ``teacher_engines`` looks after the one that there is)."""
    if machine.kind == "cpu":
        return {}
    found = dict[str, dict[str, float]]()
    if teacher_generates(cfg) and not all(of.model.teacher.url for of, _ in teachers):
        share = teacher_utilization(machine.bytes) * machine.bytes
        graphs = graphs_bytes(cfg.trainer.devices)
        found["teacher generates"] = {"process": machine.process, "teacher's engine": share, "its graphs": graphs}
    if measured := [of for of in teachers if of[0].model.teacher.fp8 and of[0].model.teacher.admission.prompts]:
        held = {part: resident[part] for part in ("process", "student", "gradients", "fragments")}
        if len(teachers) > 1 and "teacher" in resident:
            held["teacher"] = resident["teacher"]  # those that were loaded before
        wide = max(
            sum(stage_parameters(shape, teacher_degrees(of)))
            * BYTES[of.model.teacher.precision or cfg.trainer.precision]
            for of, shape in measured
        )
        found["FP8 admission"] = {**held, "teacher in bf16": wide, **scoring}
    return found


def _largest(shape: ModelShape, degrees: Degrees) -> float:
    """Elements of a rank's largest parameter."""
    return max(shape.padded_vocab(degrees.tensor) * shape.hidden, 2 * shape.ffn * shape.hidden) / degrees.tensor
