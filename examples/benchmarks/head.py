"""Time and memory of the loss: ours, plain torch, and, if they can be imported, TRL's and Liger's.

    python examples/benchmarks/head.py                 # times with all, then memory at a longer batch
                                                       # with a GPU: limit, ours and peers at six sizes
    python examples/benchmarks/head.py --tokens 512 --vocabulary 32768 --hidden 256 --only "ours: TrOPD"

One row is one forward and backward over both heads (student and teacher), in a process of its own; the peak counts the
gradients of hidden states and weight. TRL and Liger compute a divergence over the full vocabulary and no top k.
They are not among this project's pins. To measure them, put them somewhere else and name the place:

    pip install --target /tmp/peers --no-deps trl==1.16.0 accelerate liger-kernel==0.8.5
    PYTHONPATH=/tmp/peers python examples/benchmarks/head.py
"""

from __future__ import annotations

import argparse
import ctypes
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from nemo_tropd import objectives
from nemo_tropd.batch import LossTokens, TeacherScores
from nemo_tropd.loss.head import head_loss, teacher_scores, token_scores
from nemo_tropd.loss.inputs import HeadLayout

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # this file is run, its siblings are imported

from examples.benchmarks.head_peers import PAIRS, TOKENS, table
from examples.benchmarks.isolated import IsolatedError, isolated, memory_kib
from examples.benchmarks.roofline import Head

TOP_K = 64


@dataclass(frozen=True)
class Shape:
    """Tokens, vocabulary, hidden size of both models; bf16 or fp32."""

    tokens: int
    vocabulary: int
    hidden: int
    dtype: torch.dtype = torch.float32


@dataclass(frozen=True)
class Cost:
    milliseconds: float  # the fastest of the repeats
    peak_mib: float  # above what inputs and libraries hold, gradients of hidden states and weight included


@dataclass(frozen=True)
class Inputs:
    hidden: Tensor  # [1, T, H] requires grad
    weight: Tensor  # [V, H] requires grad
    teacher_hidden: Tensor
    teacher_weight: Tensor
    tokens: LossTokens

    @classmethod
    def random(cls, shape: Shape) -> Inputs:
        g = torch.Generator().manual_seed(0)
        count = shape.tokens

        def normal(*size: int) -> Tensor:
            return torch.randn(*size, generator=g).to(shape.dtype)

        tokens = LossTokens(
            rows=torch.arange(count),
            token_ids=torch.randint(0, shape.vocabulary, (count,), generator=g),
            guided=torch.zeros(count, dtype=torch.bool),
            uniforms=torch.rand(count, generator=g),
            behavior_log_probs=torch.full((count,), float("nan")),
            sequence=torch.zeros(count, dtype=torch.int64),
        )
        return cls(
            normal(1, count, shape.hidden).requires_grad_(True),
            (normal(shape.vocabulary, shape.hidden) * 0.05).requires_grad_(True),
            normal(1, count, shape.hidden),
            normal(shape.vocabulary, shape.hidden) * 0.05,
            tokens,
        )


def ours(x: Inputs) -> Tensor:
    """TrOPD on the chunked heads."""
    layout = HeadLayout(x.weight.size(0))
    scores = teacher_scores(x.teacher_hidden, x.teacher_weight, x.tokens.rows, x.tokens.token_ids, TOP_K, layout)
    objective = objectives.build("tropd")
    return head_loss(x.hidden, x.weight, x.tokens, scores, objective, layout, scale=1 / len(x.tokens)).loss


def plain(x: Inputs) -> Tensor:
    """TrOPD the way one writes it first: two log-softmaxes over [T, V]."""
    ids = x.tokens.token_ids[:, None]
    teacher = (x.teacher_hidden[0] @ x.teacher_weight.t()).float().log_softmax(-1)
    student = (x.hidden[0] @ x.weight.t()).float().log_softmax(-1)
    top = teacher.topk(TOP_K, -1)
    scores = TeacherScores(teacher.gather(1, ids)[:, 0], top.values, top.indices)
    columns = student.gather(1, torch.cat([ids, top.indices], 1))
    loss, _ = objectives.build("tropd")(token_scores(columns, x.tokens, scores))
    return loss.mean()


def trl(x: Inputs, beta: float) -> Tensor:
    """TRL's chunked divergence over the full vocabulary: forward KL at 0, JSD at 0.5."""
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    out = ChunkedDivergenceFunction.apply(
        x.hidden[0], x.weight, None, x.teacher_hidden[0], x.teacher_weight, None, beta
    )
    return out[0].mean()


def liger(x: Inputs, chunk: int) -> Tensor:
    """Liger's chunked fused linear JSD over the full vocabulary."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, compiled=False, chunk_size=chunk)
    return loss(x.hidden[0], x.weight, x.teacher_hidden[0], x.teacher_weight, x.tokens.token_ids)


VARIANTS: dict[str, Callable[[Inputs], Tensor]] = {
    "ours: TrOPD": ours,
    "plain torch: TrOPD": plain,
    "TRL: forward KL": lambda x: trl(x, 0.0),
    "TRL: JSD": lambda x: trl(x, 0.5),
    "Liger: JSD, chunks of 128": lambda x: liger(x, 128),
    "Liger: JSD, chunks of 1024": lambda x: liger(x, 1024),
}
OWN = ("ours: TrOPD", "plain torch: TrOPD")


def measure(variant: str, shape: Shape, threads: int, repeats: int, timeout_s: float = 300) -> Cost | str:
    """The cost of ``variant`` in a fresh process, or why there is none: it is not installed, failed or was too slow."""
    try:
        return isolated(_cost, variant, shape, threads, repeats, limit_s=timeout_s)
    except IsolatedError as error:
        return f"not installed ({error})" if error.error in ("ImportError", "ModuleNotFoundError") else str(error)


def _cost(variant: str, shape: Shape, threads: int, repeats: int) -> Cost:
    torch.set_num_threads(threads)
    step = VARIANTS[variant]
    _once(step, Inputs.random(Shape(16, 512, 32, shape.dtype)))  # libraries loaded, threads up
    inputs = Inputs.random(shape)
    _once(step, inputs)
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        _once(step, inputs)
        times.append(time.perf_counter() - started)
    return Cost(1e3 * min(times), _peak_kib(step, inputs) / 1024)


def _once(step: Callable[[Inputs], Tensor], inputs: Inputs) -> None:
    inputs.hidden.grad = inputs.weight.grad = None
    step(inputs).backward()


def _peak_kib(step: Callable[[Inputs], Tensor], inputs: Inputs) -> int:
    """By the kernel's high-water mark of this process, set back to what is resident before."""
    inputs.hidden.grad = inputs.weight.grad = None
    # Freed memory must leave the process at once, or it would hide what the step takes: a mapping for every tensor.
    libc = ctypes.CDLL(None)
    libc.mallopt(-3, 1 << 17)  # M_MMAP_THRESHOLD
    libc.malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = memory_kib("VmRSS")
    _once(step, inputs)
    return memory_kib("VmHWM") - before


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


def floor_line(shape: Shape, rates: Rates) -> str:
    """Operations, bytes, and the time that this machine needs for them at least."""
    head = Head(
        shape.tokens, shape.vocabulary, shape.hidden, shape.hidden, TOP_K, itemsize=max(4, shape.dtype.itemsize)
    )
    flop, least, moved = sum(head.products().values()), sum(head.passes().values()), head.torch_bytes()
    floor = flop / rates.gigaflops / 1e6 + least / rates.gigabytes_per_second / 1e6
    ours = flop / rates.gigaflops / 1e6 + moved / rates.gigabytes_per_second / 1e6
    return (
        f"model: {flop / 1e9:.1f} GFLOP in products; {least / 1e9:.2f} GB at least, {moved / 1e9:.2f} GB by the torch "
        f"path. Here ({rates.gigaflops:.0f} GFLOP/s, {rates.gigabytes_per_second:.1f} GB/s measured): floor "
        f"{floor:.0f} ms, torch path {ours:.0f} ms. On a GPU: make roofline GPU=h100"
    )


def bench(variants: Sequence[str], shapes: Sequence[Shape], threads: int, repeats: int) -> None:
    """Measure and print one table a shape, with the model of what it must compute and move beside it."""
    console = Console()
    rates = measure_rates(shapes[0].dtype, threads)
    for shape in shapes:
        title = f"T {shape.tokens}, V {shape.vocabulary:,}, H {shape.hidden}, {str(shape.dtype).removeprefix('torch.')}"
        table = Table("loss of both heads", "ms", "extra peak MiB", title=f"{title}, {threads} threads")
        for variant in variants:
            with console.status(f"{title}: {variant}"):
                cost = measure(variant, shape, threads, repeats)
            cells = (cost, "") if isinstance(cost, str) else (f"{cost.milliseconds:.0f}", f"{cost.peak_mib:.0f}")
            table.add_row(variant, *cells)
        console.print(table)
        console.print(floor_line(shape, rates), highlight=False)


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
