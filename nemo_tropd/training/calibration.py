"""The tokens on which an FP8 teacher is admitted: held-out prompts with the teacher's own answers."""

from __future__ import annotations

from dataclasses import replace

from nemo_tropd.batch import TokenBatch
from nemo_tropd.config import ModelConfig
from nemo_tropd.parallel.topology import Topology
from nemo_tropd.prompts import PromptSet
from nemo_tropd.rollout.teacher_responses import TeacherResponses
from nemo_tropd.training.packing import pack_micro_batches


def calibration_batches(
    cfg: ModelConfig,
    held_out: PromptSet,
    responses: TeacherResponses | None,
    topology: Topology,
    pad_id: int,
) -> list[TokenBatch]:
    """The same batches on every rank, with the gate's draws of the run's first step; none without FP8 (collective).

    ``responses`` are the leader's; None elsewhere.
    """
    count = cfg.teacher.admission.prompts
    if cfg.teacher.fp8 is None or not count:
        return []
    written = responses.rollouts(p.token_ids for p in list(held_out)[:count]) if responses is not None else []
    return pack_micro_batches(
        topology.broadcast_object(written),
        replace(topology, data_rank=0, data_size=1),
        micro_batch_size=cfg.micro_batch_size,
        pad_id=pad_id,
        seed=cfg.seed,
        step=0,
    )
