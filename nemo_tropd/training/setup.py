"""A checked configuration, the plan made from it, and this process's place in the parallel layout."""

from dataclasses import dataclass
from pathlib import Path

from nemo_tropd.config import TropdConfig
from nemo_tropd.parallel.topology import Topology
from nemo_tropd.training.packing import Packer
from nemo_tropd.training.plan import Plan
from nemo_tropd.training.start import Start


@dataclass(frozen=True)
class Setup:
    """What the parts of a run are made from."""

    cfg: TropdConfig
    plan: Plan
    topology: Topology
    start: Start | None = None  # known once the run directory is open

    @property
    def student_path(self) -> Path:
        """The Hugging Face checkpoint that the student starts from."""
        return Path(self.cfg.pretrained_checkpoint.restore_from_path)

    @property
    def run_dir(self) -> Path:
        """Where everything that the run writes goes."""
        return self.plan.run_dir

    def packer(self) -> Packer:
        """The one layout of micro-batches: of steps, of validations, and of the check that admits an FP8 teacher."""
        m = self.cfg.model
        return Packer(
            self.topology,
            pad_id=self.plan.pad_id,
            micro_batch_size=m.micro_batch_size,
            tokens_per_micro_batch=m.tokens_per_micro_batch,
            seed=m.seed,
        )
