"""How long a GPU needs for the two heads and the loss at least: a model from operations and bytes, run anywhere.

    python examples/benchmarks/roofline.py --gpu h100
    python examples/benchmarks/roofline.py --gpu b200 --tokens 16384 --hidden 5120 --teacher-hidden 8192 --tp 8

Two numbers a part: operations of the matrix products, over the rate of the matrix units; bytes through device memory,
over its bandwidth. The products are the limit that no implementation of the loss can beat. Passes over the logits add
to it unless they overlap with products, which ``nemo_tropd.loss.overlap`` arranges.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table

from nemo_tropd.loss.weight_gradient import CHUNKS_IN_OWN_DTYPE

PAIRS = ((1536, 3584), (2560, 5120))


@dataclass(frozen=True)
class Gpu:
    """Rates to compute with."""

    name: str
    tflops: float  # bf16 matrix products
    terabytes_per_second: float  # device memory, read and written bytes together
    source: str


# The share of the datasheet's figures that an H100 reached; assumed for a GPU that was not measured.
_MATRIX_SHARE, _MEMORY_SHARE = 790 / 989, 2.94 / 3.35
GPUS = {
    "h100": Gpu("H100 SXM", 790, 2.94, "measured: 8192 x 8192 x 8192 product of random bf16, device copy"),
    "h200": Gpu("H200", 788, 4.3, "measured: 8192 x 8192 x 8192 product of random bf16, device copy"),
    "b200": Gpu("B200", 2250 * _MATRIX_SHARE, 8.0 * _MEMORY_SHARE, "datasheet, at the shares an H100 reaches"),
}


@dataclass(frozen=True)
class Head:
    """One forward and backward of the loss on one rank: T tokens, vocabulary V / TP, both hidden sizes."""

    tokens: int = 8192
    vocabulary: int = 151936
    student_hidden: int = 1536
    teacher_hidden: int = 3584
    top_k: int = 64
    itemsize: int = 2  # of logits, hidden states and weights
    sub_block: int = 256  # columns a block of the top k's maxima
    chunk_tokens: int = 2048
    tensor_parallel: int = 1
    exact: bool = False  # an objective that sees both distributions: half the tokens a chunk, two passes over both

    @property
    def columns(self) -> int:
        return self.vocabulary // self.tensor_parallel

    @property
    def logits_bytes(self) -> float:
        """One model's logits of all tokens, were they kept."""
        return float(self.tokens * self.columns * self.itemsize)

    def products(self) -> dict[str, float]:
        """Operations by matrix product."""
        pair = 2.0 * self.tokens * self.columns
        return {
            "teacher: head product": pair * self.teacher_hidden,
            "student: head product": pair * self.student_hidden,
            "student: gradient of the hidden states": pair * self.student_hidden,
            "student: gradient of the weight": pair * self.student_hidden,
        }

    def passes(self) -> dict[str, float]:
        """Bytes by pass over the logits; maxima, columns and ids count in the pass that writes them."""
        blocks = -(-self.columns // self.sub_block)
        kept = self.tokens * (self.top_k + 1) * 4.0
        maxima = self.tokens * blocks * 4.0
        winners = self.tokens * self.top_k * self.sub_block * self.itemsize
        candidates = self.tokens * 2 * self.top_k * 8.0
        gradient = {"student: gradient over the logits": 2 * self.logits_bytes + 4 * kept}
        if self.exact:
            gradient = {
                "both: an exact objective's sums": 2 * self.logits_bytes,
                "student: gradient from both, over the logits": 3 * self.logits_bytes + 5 * kept,
            }
        return {
            "teacher: log-sum-exp and block maxima": self.logits_bytes + maxima,
            "teacher: top k from the winning blocks": maxima
            + winners
            + 2 * candidates
            + self.tokens * self.top_k * 12.0,
            "student: log-sum-exp and columns": self.logits_bytes + 3 * kept,
            **gradient,
        }

    def accumulation(self) -> float:
        """Bytes to add every chunk's weight gradient but the first to the sum, and to bring an fp32 sum back."""
        chunks = -(-self.tokens // self.chunk_tokens)
        elements = float(self.columns * self.student_hidden)
        if chunks <= CHUNKS_IN_OWN_DTYPE:
            return 2.0 * (chunks - 1) * elements * self.itemsize
        return elements * (2.0 * (chunks - 1) * 4 + (4 - self.itemsize) + (4 + self.itemsize))

    def peak_bytes(self) -> float:
        """Extra memory, the weight's gradient apart: two chunks of logits (of an exact objective of half as many tokens
        and both models), hidden gradients, the teacher's scores and, if exact, its hidden states."""
        chunk = min(self.chunk_tokens, self.tokens)
        states = self.tokens * self.teacher_hidden * self.itemsize if self.exact else 0
        slots = 2 if self.tokens > chunk else 1
        hidden = self.tokens * self.student_hidden * self.itemsize
        products = 3 * chunk * self.student_hidden * self.itemsize
        kept = hidden + states + self.tokens * self.top_k * 20
        return float(slots * chunk * self.columns * self.itemsize + products + kept)

    def torch_bytes(self) -> float:
        """Bytes that ``loss.chunks.TorchChunks`` moves, logits and their exponentials alone.

        Teacher: written by the product; block maxima, shifted and raised (each read and written), summed: 7 passes.
        Student: the same, then scaled in place and read by two products: 11.
        """
        return 18 * self.logits_bytes

    def milliseconds(self, gpu: Gpu) -> dict[str, float]:
        """Part by part, as if each ran alone."""
        times = {name: 1e3 * flop / (gpu.tflops * 1e12) for name, flop in self.products().items()}
        rate = gpu.terabytes_per_second * 1e12
        times |= {name: 1e3 * size / rate for name, size in self.passes().items()}
        return times | {"student: weight gradients of chunks added": 1e3 * self.accumulation() / rate}

    def limit(self, gpu: Gpu) -> float:
        """The products alone, in milliseconds."""
        return 1e3 * sum(self.products().values()) / (gpu.tflops * 1e12)

    def bytes_a_token(self) -> dict[str, float]:
        """Of the logits alone: the teacher's read once, the student's read once, then read and written; an exact
        objective reads both twice more, and one of these is the student's last."""
        row = float(self.columns * self.itemsize)
        return {
            "teacher read": row * (3 if self.exact else 1),
            "student read": row * (3 if self.exact else 2),
            "student written": row,
        }


@dataclass(frozen=True)
class Rates:
    """What this machine does at its best."""

    gigaflops: float  # matrix products
    gigabytes_per_second: float  # copying, bytes read and written together


def measure_rates(dtype: torch.dtype, threads: int) -> Rates:
    """A large matrix product and a large copy, the best of five each."""
    torch.set_num_threads(threads)
    size = 1024
    a, b = torch.randn(size, size).to(dtype), torch.randn(size, size).to(dtype)
    source = torch.randn(1 << 25)
    target = torch.empty_like(source)

    def best(step: Callable[[], object]) -> float:
        times = []
        for _ in range(5):
            started = time.perf_counter()
            step()
            times.append(time.perf_counter() - started)
        return min(times)

    product, copy = best(lambda: a @ b), best(lambda: target.copy_(source))
    return Rates(2 * size**3 / product / 1e9, 2 * source.numel() * 4 / copy / 1e9)


def floor_line(head: Head, rates: Rates) -> str:
    """Operations, bytes, and the least time that this machine needs for them."""
    flop, least, moved = sum(head.products().values()), sum(head.passes().values()), head.torch_bytes()
    floor = flop / rates.gigaflops / 1e6 + least / rates.gigabytes_per_second / 1e6
    ours = flop / rates.gigaflops / 1e6 + moved / rates.gigabytes_per_second / 1e6
    return (
        f"model: {flop / 1e9:.1f} GFLOP in products; {least / 1e9:.2f} GB at least, {moved / 1e9:.2f} GB by the torch "
        f"path. Here ({rates.gigaflops:.0f} GFLOP/s, {rates.gigabytes_per_second:.1f} GB/s measured): floor "
        f"{floor:.0f} ms, torch path {ours:.0f} ms. On a GPU: make roofline GPU=h100"
    )


def print_roofline(gpu: Gpu, heads: list[Head], console: Console) -> None:
    """One table: parts by row, a pair of heads by column."""
    title = f"{gpu.name}: {gpu.tflops:.0f} TFLOP/s bf16, {gpu.terabytes_per_second:.2f} TB/s ({gpu.source})"
    table = Table(title=title, caption="a model: nothing here was run on a GPU", title_justify="left")
    table.add_column("milliseconds", no_wrap=True)
    for head in heads:
        split = f" TP {head.tensor_parallel}" if head.tensor_parallel > 1 else ""
        table.add_column(
            f"T {head.tokens:,} V {head.vocabulary:,}\nH {head.student_hidden} from {head.teacher_hidden}{split}",
            justify="right",
        )
    times = [head.milliseconds(gpu) for head in heads]
    for name in times[0]:
        table.add_row(name, *(f"{t[name]:.2f}" for t in times))
    table.add_section()
    limits = [head.limit(gpu) for head in heads]
    table.add_row("limit: the products alone", *(f"{limit:.2f}" for limit in limits), style="bold")
    totals = [sum(t.values()) for t in times]
    rows = {
        "everything one after another": [f"{t:.2f} ({t / n:.3f} x)" for t, n in zip(totals, limits, strict=True)],
        "all passes overlapped with products": [f"{n:.2f} (1 x)" for n in limits],
        "operations, TFLOP": [f"{sum(h.products().values()) / 1e12:.2f}" for h in heads],
        "logits moved, GB": [f"{h.tokens * sum(h.bytes_a_token().values()) / 1e9:.2f}" for h in heads],
        "extra peak, GiB (weight gradient apart)": [f"{h.peak_bytes() / 2**30:.2f}" for h in heads],
    }
    for name, cells in rows.items():
        table.add_row(name, *cells)
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", choices=list(GPUS), default="h100")
    parser.add_argument("--tokens", type=int, help="default: 2048, 8192 and 32768")
    parser.add_argument("--vocabulary", type=int, default=151936)
    parser.add_argument("--hidden", type=int)
    parser.add_argument("--teacher-hidden", type=int)
    parser.add_argument("--tp", type=int, default=1, help="tensor-parallel degree; the times are those of one rank")
    parser.add_argument("--exact", action="store_true", help="of an objective that sees both distributions in full")
    options = parser.parse_args()
    if (options.hidden is None) != (options.teacher_hidden is None):
        parser.error("--hidden and --teacher-hidden go together")
    pairs = PAIRS if options.hidden is None else ((options.hidden, options.teacher_hidden),)
    heads = [
        Head(tokens, options.vocabulary, pair[0], pair[1], tensor_parallel=options.tp, exact=options.exact)
        for pair in pairs
        for tokens in ([options.tokens] if options.tokens else [2048, 8192, 32768])
    ]
    print_roofline(GPUS[options.gpu], heads, Console(width=max(110, 44 + 18 * len(heads))))


if __name__ == "__main__":
    main()
