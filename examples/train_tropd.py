"""Train a student by TrOPD.

    torchrun examples/train_tropd.py --config-name smollm2_cpu
    torchrun --nproc_per_node=8 examples/train_tropd.py --config-name RECIPE model.optim.lr=1e-5

Any key of nemo_tropd/config.py can be set on the command line; ``check_only=true`` prints the plan and exits.
"""

import os
import sys
from pathlib import Path

from nemo_tropd.parallel.signals import STOP, die_with_parent

CONF = Path(__file__).resolve().parents[1] / "conf"

if __name__ == "__main__":
    STOP.install()  # before seconds of imports: a request to stop during them is not lost
    if "TORCHELASTIC_RUN_ID" in os.environ:
        die_with_parent()  # torchrun: ranks must not train on without it
    from nemo_tropd.command_line import compose_command_line, fail
    from nemo_tropd.config import ConfigError
    from nemo_tropd.config_checks import resolve
    from nemo_tropd.files import name_compiler_cache
    from nemo_tropd.imports import without_collections
    from nemo_tropd.quiet import quiet_libraries

    try:
        cfg = compose_command_line(sys.argv[1:], CONF, usage=__doc__ or "")
        resolve(cfg)
    except ConfigError as error:
        fail(error)
    name_compiler_cache()
    with without_collections(freeze=True):
        quiet_libraries()  # before the libraries are imported: most of their warnings come with the import
        from nemo_tropd.training.run import main  # seconds of imports, after the settings are known to be good

    main(cfg)
