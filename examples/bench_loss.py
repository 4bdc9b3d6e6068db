"""Time and memory of the loss: ours, plain torch, and, where they can be imported, TRL's and Liger's.

    python examples/bench_loss.py                      # times with all, then memory at a longer batch
                                                       # with a GPU: limit, ours and peers at six sizes
    python examples/bench_loss.py --tokens 512 --vocabulary 32768 --hidden 256 --only "ours: TrOPD"

One row is one forward and backward over both heads (student and teacher), in a process of its own; the peak counts the
gradients of hidden states and weight. TRL and Liger compute a divergence over the full vocabulary and no top k.
They are not among this project's pins. To measure them, put them somewhere else and name the place:

    pip install --target /tmp/peers --no-deps trl==1.16.0 accelerate liger-kernel==0.8.5
    PYTHONPATH=/tmp/peers python examples/bench_loss.py
"""

import argparse

import torch
from rich.console import Console

from nemo_tropd.study.bench import OWN, VARIANTS, Shape, bench
from nemo_tropd.study.head_peers import PAIRS, TOKENS, table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int)
    parser.add_argument("--vocabulary", type=int, default=32768)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", nargs="+", choices=list(VARIANTS), default=list(VARIANTS), metavar="NAME")
    options = parser.parse_args()
    if torch.cuda.is_available():
        for pair in PAIRS:
            for tokens in [options.tokens] if options.tokens else TOKENS:
                Console(width=120).print(table(tokens, pair))
        return
    dtype = getattr(torch, options.dtype)
    shape = Shape(options.tokens or 512, options.vocabulary, options.hidden, dtype)
    bench(options.only, [shape], options.threads, options.repeats)
    if options.tokens is None:
        # What a long batch needs: the plain loss grows with T times V, ours with the hidden states' gradient only.
        long = [Shape(tokens, 49152, 576, dtype) for tokens in (1024, 4096)]
        bench([name for name in options.only if name in OWN], long, options.threads, 1)


if __name__ == "__main__":
    main()
