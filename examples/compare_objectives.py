"""Train the same student with every objective on a small task and draw what happens.

    python examples/compare_objectives.py                                 # all objectives, three seeds, 200 steps
    python examples/compare_objectives.py --objectives opd tropd --seeds 1 --steps 100 --out /tmp/compare

The task: twelve digits in, their running sums modulo 10 out; the student starts from a mostly wrong rule. Writes a
figure (PNG), a table (Markdown) and every curve (JSON) to --out. Runs found there are not repeated.
"""

import argparse
import sys
from pathlib import Path

from nemo_tropd.study.compare import compare
from nemo_tropd.study.running_sums import OBJECTIVE_NAMES


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--objectives", nargs="+", default=list(OBJECTIVE_NAMES), metavar="NAME")
    parser.add_argument("--seeds", type=int, default=3, help="seeds 0 .. N-1 (default 3)")
    parser.add_argument("--steps", type=int, default=200, help="optimizer steps a run (default 200)")
    parser.add_argument("--out", type=Path, default=Path("examples/figures"))
    parser.add_argument("--processes", type=int, help="runs at a time (default: one a core)")
    options = parser.parse_args()
    try:
        compare(options.objectives, options.seeds, options.steps, options.out, options.processes)
    except ValueError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
