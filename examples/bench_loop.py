"""Seconds, memory and matrix products of a step, by phase: ours and TRL's DistillationTrainer side by side.

    python examples/bench_loop.py                     # the SmolLM2 pair and a tiny one; on a GPU also 1.5B from 7B
    python examples/bench_loop.py --only tiny --out table.md

Models have random weights and rollouts are written beforehand, the same for both. TRL is not among this project's pins:

    pip install --target /tmp/peers --no-deps trl==1.16.0 accelerate
    PYTHONPATH=/tmp/peers python examples/bench_loop.py
"""

import argparse
from pathlib import Path

import torch

from nemo_tropd.quiet import quiet_libraries
from nemo_tropd.study.loop_bench import CPU_CASES, GPU_CASES, bench


def main() -> None:
    quiet_libraries()
    cases = GPU_CASES if torch.cuda.is_available() else CPU_CASES
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(cases), default=list(cases), metavar="PAIR")
    parser.add_argument("--no-trl", action="store_true", help="measure ours alone")
    parser.add_argument("--out", type=Path, help="write the table there, as Markdown")
    options = parser.parse_args()
    table = bench({name: cases[name] for name in options.only}, trl=not options.no_trl)
    if options.out:
        temporary = options.out.with_name(f".{options.out.name}.tmp")
        temporary.write_text(table, encoding="utf-8")
        temporary.rename(options.out)


if __name__ == "__main__":
    main()
