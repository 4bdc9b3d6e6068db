"""What FP8 would do to a teacher, emulated on a CPU: top-64 KL, gate flips and error of R against bf16.

python examples/emulate_fp8.py                    # SmolLM2-135M-Instruct, 24 prompts; writes the table
"""

import argparse
from pathlib import Path

from nemo_tropd.study.fp8_teacher import study

HERE = Path(__file__).parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--new-tokens", type=int, default=48, help="of each answer, at most")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=HERE / "figures" / "fp8_teacher.md")
    options = parser.parse_args()
    prompts = HERE / "prompts" / "instructions.jsonl"
    study(prompts, options.out, prompts=options.prompts, new_tokens=options.new_tokens, seed=options.seed)


if __name__ == "__main__":
    main()
