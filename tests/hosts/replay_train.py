"""examples/train_tropd.py with rollouts from a double, so that a run takes seconds; a script for docker/launch.sh.

REPLAY_SECONDS lengthens each generate call, so that a test can interfere with a step. STOP_PHASE and STOP_OCCURRENCE
name a phase of tests.faults that writes this process's id to STOP_MARKER and then takes two seconds longer.
"""

import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from nemo_tropd.imports import without_collections
from nemo_tropd.parallel.signals import STOP, die_with_parent
from nemo_tropd.quiet import quiet_libraries

STOP.install()
die_with_parent()

with without_collections(freeze=True):
    quiet_libraries()
    from nemo_tropd.batch import Rollout
    from nemo_tropd.command_line import compose_command_line
    from nemo_tropd.files import complete_file
    from nemo_tropd.launch.__main__ import ROOT
    from nemo_tropd.rollout.engine import Finished, RolloutRequest
    from nemo_tropd.training import run
    from tests.doubles import GivenEngines, ReplayEngine
    from tests.empty_charts import empty_charts
    from tests.faults import plant
    from tests.hosts.launching import VOCABULARY

empty_charts()


class SlowEngine(ReplayEngine):
    """Takes its time."""

    def generate(self, requests: Sequence[RolloutRequest], finished: Finished | None = None) -> list[Rollout]:
        """The double's own, later."""
        time.sleep(float(os.environ.get("REPLAY_SECONDS", "0")))
        return super().generate(requests, finished)


def dawdle() -> None:
    """Say that the phase has begun, and take a while."""
    marker = Path(os.environ["STOP_MARKER"])
    with complete_file(marker) as temporary:
        temporary.write_text(str(os.getpid()))
    time.sleep(2)


if __name__ == "__main__":
    if phase := os.environ.get("STOP_PHASE"):
        plant(phase, dawdle, rank=0, occurrence=int(os.environ["STOP_OCCURRENCE"]))
    run.main(
        compose_command_line(sys.argv[1:], ROOT / "conf"),
        GivenEngines(lambda: SlowEngine(VOCABULARY)),
    )
