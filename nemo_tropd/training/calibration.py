"""The tokens on which an FP8 teacher is admitted: held-out prompts with the teacher's own answers."""

from nemo_tropd.batch import TokenBatch
from nemo_tropd.config import TeacherConfig
from nemo_tropd.data import PromptSet
from nemo_tropd.training.packing import Packer
from nemo_tropd.training.teacher_responses import TeacherResponses


def calibration_batches(
    cfg: TeacherConfig, held_out: PromptSet, responses: TeacherResponses | None, packer: Packer
) -> list[TokenBatch]:
    """The run's own micro-batches of them, all on every rank, with the gate's draws of the run's first step; none
    without FP8 (collective). ``responses`` are those of rank 0; None elsewhere."""
    count = cfg.admission.prompts
    if cfg.fp8 is None or not count:
        return []
    written = responses.rollouts(p.token_ids for p in list(held_out)[:count]) if responses is not None else []
    return packer.on_every_rank().pack(packer.topology.broadcast_object(written), step=0)
