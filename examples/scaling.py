"""Memory and bytes on the wire of every recipe, from its own GPUs to 512: a table, a plot, and what would break first.

    python examples/scaling.py [--out DIR]

Works from the planner alone, in seconds. Also writes the line in each recipe that states its plan.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from nemo_tropd.study.scaling import run

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "examples" / "figures", help="folder of scaling.md and .png")
    out = parser.parse_args().out
    for path in run(ROOT / "conf", out):
        print(f"{path.relative_to(ROOT)} states a new plan")
    print(f"{out / 'scaling.md'}\n{out / 'scaling.png'}")


if __name__ == "__main__":
    main()
