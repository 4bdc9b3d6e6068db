"""The tokens on which FP8 teachers are admitted: held-out prompts with the teachers' own answers."""

from nemo_tropd.batch import TokenBatch
from nemo_tropd.config import ModelConfig, teacher_named
from nemo_tropd.data import PromptSet
from nemo_tropd.training.packing import Packer
from nemo_tropd.training.teacher_responses import Responses, answers_everywhere


def calibration_batches(
    model: ModelConfig, held_out: PromptSet, responses: Responses | None, packer: Packer
) -> list[TokenBatch]:
    """The run's own micro-batches of them, all on every rank, with the gate's draws of the run's first step: of each
    teacher in FP8 the first ones (collective). ``responses`` are those of rank 0; None elsewhere."""
    count = model.teacher.admission.prompts
    measured = [name for name in held_out.teachers if teacher_named(model, name).fp8 is not None]
    if not measured or not count:
        return []
    chosen = [p for name in measured for p in [p for p in held_out if p.teacher == name][:count]]
    written = answers_everywhere(packer.topology, chosen, responses)
    return packer.on_every_rank().pack(written, 0, PromptSet(tuple(chosen)))
