"""How long a GPU needs for the two heads and the loss at least: a model from operations and bytes, run anywhere.

python examples/roofline.py --gpu h100
python examples/roofline.py --gpu b200 --tokens 16384 --vocabulary 151936 --hidden 5120 --teacher-hidden 8192 --tp 8
"""

import argparse

from rich.console import Console

from nemo_tropd.study.head_model import GPUS, Head, print_roofline

PAIRS = ((1536, 3584), (2560, 5120))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", choices=list(GPUS), default="h100")
    parser.add_argument("--tokens", type=int, help="default: 2048, 8192 and 32768")
    parser.add_argument("--vocabulary", type=int, default=151936)
    parser.add_argument("--hidden", type=int)
    parser.add_argument("--teacher-hidden", type=int)
    parser.add_argument("--tp", type=int, default=1, help="tensor-parallel degree; the times are those of one rank")
    options = parser.parse_args()
    if (options.hidden is None) != (options.teacher_hidden is None):
        parser.error("--hidden and --teacher-hidden go together")
    pairs = PAIRS if options.hidden is None else ((options.hidden, options.teacher_hidden),)
    heads = [
        Head(tokens, options.vocabulary, pair[0], pair[1], tensor_parallel=options.tp)
        for pair in pairs
        for tokens in ([options.tokens] if options.tokens else [2048, 8192, 32768])
    ]
    print_roofline(GPUS[options.gpu], heads, Console(width=max(110, 44 + 18 * len(heads))))


if __name__ == "__main__":
    main()
