"""Build the teacher and student checkpoints of the CPU recipe and print their paths.

python examples/make_smollm2.py [--cache-dir DIR] [--drop 12 14 16 18 20 22]
"""

import argparse
import sys
import time
from pathlib import Path

from nemo_tropd.convert.families import ConversionError
from nemo_tropd.convert.smollm2 import STUDENT_LAYERS_DROPPED, build_smollm2, build_student
from nemo_tropd.files import default_cache_dir


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache-dir", type=Path, default=default_cache_dir(), help="where to put the checkpoints")
    parser.add_argument("--drop", type=int, nargs="+", default=STUDENT_LAYERS_DROPPED, help="teacher layers to drop")
    options = parser.parse_args()
    start = time.perf_counter()
    try:
        print(f"teacher {build_smollm2(options.cache_dir)}")
        print(f"student {build_student(options.cache_dir, options.drop)}")
    except ConversionError as error:
        sys.exit(f"error: {error}")
    print(f"{time.perf_counter() - start:.1f} s")


if __name__ == "__main__":
    main()
