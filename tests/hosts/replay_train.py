"""examples/train_tropd.py with rollouts from a double, so that a run takes seconds; a script for docker/launch.sh.

REPLAY_SECONDS lengthens each generate call, so that a test can interfere with a step.
"""

import os
import sys
import time

from nemo_tropd.parallel.signals import STOP, die_with_parent
from nemo_tropd.quiet import quiet_libraries

STOP.install()
die_with_parent()
quiet_libraries()

from nemo_tropd.command_line import compose_command_line  # noqa: E402
from nemo_tropd.launch.__main__ import ROOT  # noqa: E402
from nemo_tropd.training import run  # noqa: E402
from tests.doubles import GivenEngines, ReplayEngine  # noqa: E402

VOCABULARY = 131  # of the tiny tokenizer


class SlowEngine(ReplayEngine):
    """Takes its time."""

    def generate(self, requests):
        """The double's own, later."""
        time.sleep(float(os.environ.get("REPLAY_SECONDS", "0")))
        return super().generate(requests)


if __name__ == "__main__":
    run.main(
        compose_command_line(sys.argv[1:], ROOT / "conf"),
        GivenEngines(lambda: SlowEngine(VOCABULARY)),
    )
