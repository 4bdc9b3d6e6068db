"""Hugging Face folder -> Megatron distributed checkpoint, and back.

    python examples/convert_checkpoint.py hf-to-megatron --hf DIR --out DIR [--tp N --pp N --dtype bf16|fp32]
    python examples/convert_checkpoint.py megatron-to-hf --checkpoint DIR --out DIR [--dtype bf16|fp32]

Peak memory beyond Python's own, for a model of 1.5 GB whose largest tensor has 0.2 GB: to Megatron 0.48 GB, all but
0.04 GB of it pages of the source file that the system can drop; to Hugging Face 1.1 GB, since one output file of at
most 1 GB is built in memory. Both depend on the largest tensor, not on the model; --verify loads both models.
"""

import argparse
import hashlib
import importlib.metadata
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn
from torch import Tensor

from nemo_tropd.command_line import printable
from nemo_tropd.convert.families import ConversionError, read_shape
from nemo_tropd.convert.folders import SIDECAR, check_free_to_write, copy_sidecar, new_folder, write_hf_sidecar
from nemo_tropd.convert.hf_files import MAX_SHARD_BYTES, write_weights
from nemo_tropd.convert.hf_import import HfSource
from nemo_tropd.convert.layouts import split
from nemo_tropd.convert.megatron_files import MegatronSource, write_checkpoint
from nemo_tropd.files import write_json

BytesDone = Callable[[int, int], None]  # bytes done, bytes in all
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
MANIFEST = "manifest.json"
# Largest difference of logits over the largest logit, for weights of any dtype: 2e-6 on a CPU, of models of 2 to 36
# layers, by orders of additions. On a GPU Transformer Engine multiplies fp32 in TF32, which has 10 bits.
VERIFY_BOUND = {"cpu": 1e-4, "cuda": 2e-2}


def hf_to_megatron(
    hf_dir: str | Path,
    out_dir: str | Path,
    *,
    tensor_parallel: int = 1,
    pipeline_parallel: int = 1,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
    progress: BytesDone | None = None,
) -> None:
    """Write ``hf_dir`` as a distributed checkpoint (see ``megatron_files``), which loads at any degrees.

    ``tensor_parallel`` x ``pipeline_parallel`` is the intended layout: checked against the architecture, and the blocks
    on disk are cut for it. ``dtype`` defaults to the widest stored one. One block is in memory at a time. Raises
    ConversionError before anything is written if the source is incomplete, the disk is too small, or
    ``out_dir`` exists without ``overwrite``, is the source, lies in it or holds it.
    """
    hf_dir, out_dir = Path(hf_dir), Path(out_dir)
    check_free_to_write(out_dir, overwrite, 0, hf_dir)
    shape = read_shape(hf_dir)
    shape.check_layout(tensor_parallel, pipeline_parallel)
    source = HfSource(hf_dir, shape)
    dtype = dtype or source.checkpoint.widest_dtype
    total = shape.parameters() * dtype.itemsize
    with new_folder(out_dir, overwrite, total, source=hf_dir) as folder:
        write_checkpoint(
            folder, source, shape, dtype, tensor_parallel=tensor_parallel, progress=_counter(progress, total)
        )
        write_hf_sidecar(folder, hf_dir)
        layout = {"tensor_parallel": tensor_parallel, "pipeline_parallel": pipeline_parallel}
        _write_manifest(folder, "hf-to-megatron", hf_dir, dtype, layout)


def megatron_to_hf(
    checkpoint_dir: str | Path,
    out_dir: str | Path,
    *,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: BytesDone | None = None,
) -> None:
    """Write a distributed checkpoint, converted or saved by training at any degrees, as a Hugging Face folder.

    Config and tokenizer come from the checkpoint's ``hf`` folder. ``dtype`` defaults to the widest stored one. One file
    of at most ``max_shard_bytes`` is in memory at a time. Raises ConversionError before anything is written if the
    checkpoint is incomplete, the disk is too small, or ``out_dir`` exists without ``overwrite``, is the source, lies
    in it or holds it.
    """
    checkpoint_dir, out_dir = Path(checkpoint_dir), Path(out_dir)
    check_free_to_write(out_dir, overwrite, 0, checkpoint_dir)
    source = MegatronSource(checkpoint_dir)
    shape = source.shape
    dtype = dtype or source.widest_dtype
    total = shape.parameters() * dtype.itemsize
    count = _counter(progress, total)

    def stream() -> Iterator[tuple[str, Tensor]]:
        for row in shape.rows():
            for name, tensor in split(row, source.read_full(row), shape):
                yield name, tensor
                count(tensor.numel() * dtype.itemsize)

    with new_folder(out_dir, overwrite, total, source=checkpoint_dir) as folder:
        write_weights(folder, stream(), dict(shape.hf_tensors()), dtype, max_shard_bytes)
        copy_sidecar(checkpoint_dir / SIDECAR, folder, dtype)
        _write_manifest(folder, "megatron-to-hf", checkpoint_dir, dtype, {})


def _counter(progress: BytesDone | None, total: int) -> Callable[[int], None]:
    done = 0

    def count(size: int) -> None:
        nonlocal done
        done += size
        if progress is not None:
            progress(done, total)

    return count


def _write_manifest(folder: Path, direction: str, source: Path, dtype: torch.dtype, layout: dict[str, int]) -> None:
    manifest: dict[str, Any] = {
        "made_by": f"nemo_tropd {importlib.metadata.version('nemo_tropd')} {direction}",
        "dtype": str(dtype).removeprefix("torch."),
        **layout,
        "source": {"name": source.resolve().name, "files": _hashes(source)},
        "files": _hashes(folder),
    }
    write_json(folder / MANIFEST, manifest)


def _hashes(folder: Path) -> dict[str, dict[str, int | str]]:
    """Size and SHA-256 of every file under ``folder`` except its manifest."""
    hashes: dict[str, dict[str, int | str]] = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != MANIFEST:
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            hashes[str(path.relative_to(folder))] = {"bytes": path.stat().st_size, "sha256": digest}
    return hashes


def main() -> int:
    args = parse_arguments()
    try:
        return _convert(args)
    except (ConversionError, OSError) as error:
        print(f"error: {printable(str(error))}", file=sys.stderr)
        return 1


def _convert(args: argparse.Namespace) -> int:
    with Progress("{task.description}", BarColumn(), DownloadColumn(), TimeRemainingColumn()) as bar:
        task = bar.add_task(args.direction, total=None)
        options = {"dtype": DTYPES.get(args.dtype), "overwrite": args.overwrite}
        options["progress"] = lambda done, total: bar.update(task, completed=done, total=total)
        if "hf" in args:
            hf_to_megatron(args.hf, args.out, tensor_parallel=args.tp, pipeline_parallel=args.pp, **options)
        else:
            megatron_to_hf(args.checkpoint, args.out, **options)
    hf_dir, checkpoint_dir = (args.hf, args.out) if "hf" in args else (args.out, args.checkpoint)
    written = json.loads((Path(args.out) / MANIFEST).read_text(encoding="utf-8"))["dtype"]
    print(f"{args.out}: {read_shape(hf_dir).describe()}, in {written}")
    if not args.verify:
        return 0
    found = compare_logits(checkpoint_dir, hf_dir, getattr(torch, written))
    print(f"largest logit difference: {found.largest:.2e}, of at most {found.bound:.2e}")
    if found.largest <= found.bound:
        return 0
    print("error: the two sides are not the same model: do not use what was written", file=sys.stderr)
    return 1


class Comparison(NamedTuple):
    """The largest |difference| of two models' logits, and what it is at most if they are the same."""

    largest: float
    bound: float


@torch.no_grad()
def compare_logits(
    checkpoint_dir: str | Path, hf_dir: str | Path, dtype: torch.dtype, *, length: int = 64, seed: int = 0
) -> Comparison:
    """Megatron's and transformers' logits over ``length`` random tokens, fewer if the model's attention or context is
    shorter; computed in fp32 from weights rounded to ``dtype``, that of what was written.

    Both models are in memory in fp32, one after the other. Starts and stops a topology of one process.
    """
    from transformers import AutoModelForCausalLM

    from nemo_tropd.convert.megatron_files import load_megatron
    from nemo_tropd.gpt.build import build_gpt, head_weight
    from nemo_tropd.parallel.topology import Topology

    def rounded(model: torch.nn.Module) -> None:
        for parameter in model.parameters():
            parameter.copy_(parameter.to(dtype))

    shape = read_shape(hf_dir)
    length = min(length, shape.longest()[0])
    ids = torch.randint(0, shape.vocab_size, (1, length), generator=torch.Generator().manual_seed(seed))
    topology = Topology.start(seed=seed)
    try:
        ids = ids.to(topology.device)
        model = build_gpt(shape, topology, trainable=False)
        load_megatron(model, checkpoint_dir, shape, topology)
        rounded(model)
        hidden = model(ids, torch.arange(length, device=ids.device)[None], None)
        logits = (hidden @ head_weight(model).T)[..., : shape.vocab_size]
        del model
        reference: torch.nn.Module = AutoModelForCausalLM.from_pretrained(hf_dir, dtype=torch.float32)
        reference.to(topology.device).eval()
        rounded(reference)
        wanted = reference(ids).logits
        largest = (logits - wanted).abs().max().item()
        return Comparison(largest, VERIFY_BOUND[topology.device.type] * wanted.abs().max().item())
    finally:
        topology.stop()


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    directions = parser.add_subparsers(dest="direction", required=True)
    to_megatron, to_hf = directions.add_parser("hf-to-megatron"), directions.add_parser("megatron-to-hf")
    to_megatron.add_argument("--hf", required=True, help="Hugging Face folder")
    to_megatron.add_argument("--tp", type=int, default=1, help="tensor parallel degree: blocks are cut for it")
    to_megatron.add_argument("--pp", type=int, default=1, help="pipeline parallel degree, checked")
    to_hf.add_argument("--checkpoint", required=True, help="distributed checkpoint, converted or from training")
    for command in (to_megatron, to_hf):
        command.add_argument("--out", required=True, help="folder to write")
        command.add_argument("--dtype", choices=sorted(DTYPES), help="default: the widest that is stored")
        command.add_argument("--overwrite", action="store_true", help="replace the output folder")
        command.add_argument("--verify", action="store_true", help="compare both sides' logits: code 1 if they differ")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
