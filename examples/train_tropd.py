"""Train a student by TrOPD.

    torchrun --nproc_per_node=3 examples/train_tropd.py --config-name smollm2_cpu
    torchrun --nproc_per_node=8 examples/train_tropd.py --config-name RECIPE model.optim.lr=1e-5

Any key of nemo_tropd/config.py can be set on the command line; ``check_only=true`` prints the plan and ends.
"""

import sys
from pathlib import Path

from nemo_tropd.quiet import quiet_libraries

quiet_libraries()  # before the libraries are imported: most of their warnings come with the import

from nemo.core.config import hydra_runner  # noqa: E402
from omegaconf import DictConfig  # noqa: E402

from nemo_tropd.config import ConfigError, fail  # noqa: E402
from nemo_tropd.config_checks import check_command_line  # noqa: E402
from nemo_tropd.training.run import main  # noqa: E402

CONF = Path(__file__).resolve().parents[1] / "conf"


@hydra_runner(config_path="../conf", config_name="base")
def run(cfg: DictConfig) -> None:
    """Hydra composes the configuration; the run checks it and goes."""
    main(cfg)


if __name__ == "__main__":
    try:
        check_command_line(sys.argv[1:], CONF)
    except ConfigError as error:
        fail(error)
    run()
