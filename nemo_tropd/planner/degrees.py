"""How a run is split, and the sizes that follow from its settings alone."""

import math
from dataclasses import dataclass

from nemo_tropd.config import TropdConfig, guided, host_and_port
from nemo_tropd.parallel.ranks import RankLayout

BYTES = {"32": 4, "bf16": 2, "float32": 4, "bfloat16": 2, "float16": 2}
FP32 = 4
ANSWER_ENTRY = 64  # bytes of a candidate in a server's answer, as JSON


@dataclass(frozen=True)
class Degrees:
    """Parallel degrees of one model."""

    tensor: int
    pipeline: int
    sequence: int  # divisor of the hidden states between matrix products: ``tensor`` under sequence parallelism, else 1


def layout(cfg: TropdConfig) -> RankLayout:
    """The ranks of a run. Raises ValueError as RankLayout does."""
    m, ranks = cfg.model, cfg.trainer.num_nodes * cfg.trainer.devices
    tensor, pipeline = m.tensor_model_parallel_size, m.pipeline_model_parallel_size
    return RankLayout(ranks, tensor, pipeline, m.teacher.tensor_model_parallel_size)


def student_degrees(cfg: TropdConfig) -> Degrees:
    """The student's degrees."""
    m, tensor = cfg.model, cfg.model.tensor_model_parallel_size
    return Degrees(tensor, m.pipeline_model_parallel_size, tensor if m.sequence_parallel else 1)


def teacher_degrees(cfg: TropdConfig) -> Degrees:
    """The teacher's degrees: the student's, or its own tensor degree without pipeline and sequence parallelism."""
    ranks = layout(cfg)
    return student_degrees(cfg) if ranks.teacher_tensor is None else Degrees(ranks.teacher_degree, 1, 1)


def teacher_answers_benchmarks(cfg: TropdConfig) -> bool:
    """Whether the teacher answers the run's benchmarks before the first step."""
    v = cfg.model.validation
    return v.score_teacher and bool(v.benchmarks)


def teacher_generates(cfg: TropdConfig) -> bool:
    """Whether the teacher has engines before the first step: for held-out prompts, prefixes or benchmarks."""
    return bool(cfg.model.data.held_out) or guided(cfg) or teacher_answers_benchmarks(cfg)


def row_tokens(cfg: TropdConfig) -> int:
    """Positions in the largest micro-batch."""
    m = cfg.model
    return m.tokens_per_micro_batch or m.micro_batch_size * m.encoder_seq_length


def loss_tokens(cfg: TropdConfig) -> int:
    """Upper bound on the tokens in the loss of one step; a teacher prefix counts towards max_new_tokens."""
    return cfg.model.global_batch_size * cfg.model.rollout.max_new_tokens


def positions(cfg: TropdConfig) -> int:
    """Upper bound on the positions of one step over all data-parallel ranks, prompts included."""
    m = cfg.model
    return m.global_batch_size * min(m.encoder_seq_length, m.data.max_prompt_tokens + m.rollout.max_new_tokens)


def joins_here(cfg: TropdConfig) -> bool:
    """Whether engines of their own are on rank 0's host: they join at an address that no other can reach."""
    address = cfg.model.rollout.dedicated.address
    host = address and host_and_port("model.rollout.dedicated.address", address)[0]
    return bool(host) and (host in ("localhost", "::1") or str(host).startswith("127."))


def scores_early(cfg: TropdConfig, place: str, *, exact: bool, in_turns: bool) -> bool:
    """Whether the teacher scores rollouts as they are finished: where it does not share a device with the student's
    engine, which is at ``place``. ``exact``: the objective needs distributions; ``in_turns``: the ranks hold other
    teachers, too."""
    m, t = cfg.model, cfg.model.teacher
    if not t.score_early or place == "colocated":
        return False
    if m.rollout.steps_ahead:  # the teacher scores while engines are at later steps anyway
        return False
    # With a degree of its own data-parallel ranks score together, and an exact objective wants no scores.
    same = t.tensor_model_parallel_size in (None, m.tensor_model_parallel_size)
    return bool(t.url) or (place == "dedicated" and same and not exact and not (t.offload and in_turns))


def early_bytes(cfg: TropdConfig, place: str) -> dict[str, float]:
    """Bytes of a rank's scores on their way, if the teacher scores early; ``place`` is the engine's."""
    t = cfg.model.teacher
    if not t.score_early or place == "colocated" or not (t.url or place == "dedicated"):
        return {}
    packed = 4 * (1 + 2 * cfg.model.tropd.top_k)  # of a token, as it leaves one rank, and as it reaches another
    return {"scores that move": 2 * loss_tokens(cfg) * packed / layout(cfg).data}


def answer_bytes(cfg: TropdConfig) -> float:
    """Host bytes of a rank that asks a teacher's servers: the texts of all answers in flight, at their longest."""
    m = cfg.model
    return m.teacher.server.requests * m.encoder_seq_length * (m.tropd.top_k + 1) * ANSWER_ENTRY


def micro_batches(cfg: TropdConfig) -> int:
    """Micro-batches of one data-parallel rank and step if all responses have maximum length."""
    data = layout(cfg).data
    if cfg.model.tokens_per_micro_batch is None:
        return math.ceil(cfg.model.global_batch_size / data / cfg.model.micro_batch_size)
    return math.ceil(positions(cfg) / data / cfg.model.tokens_per_micro_batch)
