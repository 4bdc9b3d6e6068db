"""Evaluate models on a benchmark, or on a list of them.

    python examples/evaluate.py --config-name NAME model=DIR [compare=[DIR,...]] [key=value ...]

NAME is a file of conf/benchmarks/. DIR is a Hugging Face folder, a run's directory or a Megatron checkpoint. Every key
is in nemo_tropd/evaluation/settings.py; of one of several benchmarks it is set by BENCHMARK.key=value. The same command
resumes an evaluation that was stopped.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def convert(checkpoint: Path, out: Path) -> None:
    """A Megatron checkpoint as a Hugging Face folder."""
    from examples.convert_checkpoint import megatron_to_hf

    megatron_to_hf(checkpoint, out)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))  # this file is run, its sibling is imported
    from nemo_tropd.evaluation.command import main

    main(sys.argv[1:], ROOT / "conf" / "benchmarks", convert, usage=__doc__ or "")
