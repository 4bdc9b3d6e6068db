"""Runs of a tiny model under random faults; each must end as an undisturbed run does, to the bit.

    make chaos                                    100 rounds, a fifth of them with the real engine
    make chaos ARGS="--rounds 12 --engine-share 0 --seed 7"
    make chaos ARGS="--hours 1"
    make chaos ARGS="--rounds 6 --engine-share 1 --kind 2h"   steps_ahead 2, two engine hosts; of 0 0h 1 1h 2 2h
    make chaos ARGS="--rounds 2 --engine-share 1 --kind 1 --kill engine"   that alone; or "rank 0", "rank 1", host

Rollouts are 0, 1 or 2 steps ahead, by an engine beside rank 0 or by two engine hosts. Faults: signals to the agent or a
rank, SIGKILL to any process, stalled and frozen ranks, cut connections, a full disk (needs the right to mount a small
tmpfs), damaged files, clocks off by a day; signals, kills, stalls and freezes of engine hosts. Prints a table and exits
with 1 if any round lost a step, hung, left a process or a file behind, or ended otherwise than the undisturbed run. The
folder of such a round is kept.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib
import os
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path

from nemo_tropd.imports import without_collections
from nemo_tropd.quiet import quiet_libraries
from tests.chaos.disturb import VICTIMS
from tests.default_signals import default_signals

os.environ.setdefault("OMP_NUM_THREADS", "1")
PRELOADED = (
    "nemo_tropd.training.run",
    "nemo_tropd.report",
    "nemo_tropd.command_line",
    "tests.doubles",
    "lightning.pytorch",
)
_PR_SET_CHILD_SUBREAPER = 36


def main() -> int:
    """See above."""
    parser = argparse.ArgumentParser(prog="make chaos", description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--hours", type=float, default=None, help="go on for so long instead of --rounds")
    parser.add_argument("--seed", type=int, default=None, help="of the first round; each next one is one more")
    parser.add_argument("--engine-share", type=float, default=0.2, help="share of the rounds with vLLM as the engine")
    parser.add_argument("--kind", default=None, help="of all rounds, instead of one drawn for each")
    parser.add_argument("--kill", default=None, help="that this is killed between two steps is all that happens")
    options = parser.parse_args()
    if options.kill not in (None, *VICTIMS):
        parser.error(f"--kill {options.kill}: one of {', '.join(VICTIMS)}")
    first = random.SystemRandom().randrange(1 << 20) if options.seed is None else options.seed
    default_signals()
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)  # to see who outlives an agent
    with without_collections(freeze=True):  # a collection in a fork would copy every page that it looks at
        quiet_libraries()
        for name in PRELOADED:
            importlib.import_module(name)
        from tests.chaos.round import Kind, Rounds, mount_small, unmount
        from tests.empty_charts import empty_charts

    empty_charts()

    folder = Path(tempfile.mkdtemp(prefix="chaos_"))
    mounted = mount_small(folder)
    if not mounted:
        print("no small file system could be mounted: the disk is never full", flush=True)
        from tests.chaos import disturb

        del disturb.RUNNING["full disk"]
    bad, began = 0, time.monotonic()
    try:
        rounds = Rounds(folder, options.kill)
        print("| seed | kind | attempts | seconds | what happened | outcome |\n|---|---|---|---|---|---|", flush=True)
        number = 0
        while time.monotonic() - began < options.hours * 3600 if options.hours else number < options.rounds:
            seed = first + number
            number += 1
            report = rounds.play(seed, Kind.drawn(seed, options.engine_share, options.kind))
            print(report.line(), flush=True)
            if report.faults:
                bad += 1
                kept = Path(tempfile.mkdtemp(prefix=f"chaos_failed_{seed}_"))
                shutil.copytree(folder / f"round_{seed}", kept, dirs_exist_ok=True)
                shutil.rmtree(folder / f"round_{seed}")
                print(f"kept: {kept}", flush=True)
    finally:
        if mounted:
            unmount(folder)
        shutil.rmtree(folder, ignore_errors=True)
    print(
        f"{number} rounds from seed {first} in {(time.monotonic() - began) / 60:.1f} min, {bad} with a fault",
        flush=True,
    )
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
