"""Hugging Face folder -> Megatron distributed checkpoint, and back.

    python examples/convert_checkpoint.py hf-to-megatron --hf DIR --out DIR [--tp N --pp N --dtype bf16|fp32]
    python examples/convert_checkpoint.py megatron-to-hf --checkpoint DIR --out DIR [--dtype bf16|fp32]

Peak memory beyond Python's own, for a model of 1.5 GB whose largest tensor has 0.2 GB: to Megatron 0.48 GB, all but
0.04 GB of it pages of the source file that the system can drop; to Hugging Face 1.1 GB, since one output file of at
most 1 GB is built in memory. Both depend on the largest tensor, not on the model; --verify loads both models.
"""

import argparse
import sys

import torch
from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn

from nemo_tropd.command_line import printable
from nemo_tropd.convert.commands import DTYPES, hf_to_megatron, megatron_to_hf
from nemo_tropd.convert.families import ConversionError, read_shape


def main() -> int:
    args = parse_arguments()
    with Progress("{task.description}", BarColumn(), DownloadColumn(), TimeRemainingColumn()) as bar:
        task = bar.add_task(args.direction, total=None)
        options = {"dtype": DTYPES.get(args.dtype), "overwrite": args.overwrite}
        options["progress"] = lambda done, total: bar.update(task, completed=done, total=total)
        try:
            if "hf" in args:
                hf_to_megatron(args.hf, args.out, tensor_parallel=args.tp, pipeline_parallel=args.pp, **options)
            else:
                megatron_to_hf(args.checkpoint, args.out, **options)
        except ConversionError as error:
            print(f"error: {printable(str(error))}", file=sys.stderr)
            return 1
    hf_dir, checkpoint_dir = (args.hf, args.out) if "hf" in args else (args.out, args.checkpoint)
    print(f"{args.out}: {read_shape(hf_dir).describe()}")
    if args.verify:
        print(f"largest logit difference: {largest_logit_difference(checkpoint_dir, hf_dir):.2e}")
    return 0


@torch.no_grad()
def largest_logit_difference(checkpoint_dir: str, hf_dir: str, *, length: int = 64, seed: int = 0) -> float:
    """The largest |difference| between Megatron's and transformers' logits, fp32, over ``length`` random tokens.

    Both models are in memory in fp32, one after the other. Starts and stops a topology of one process.
    """
    from transformers import AutoModelForCausalLM

    from nemo_tropd.convert.megatron_files import load_megatron
    from nemo_tropd.gpt.build import build_gpt, head_weight
    from nemo_tropd.parallel.topology import Topology

    shape = read_shape(hf_dir)
    ids = torch.randint(0, shape.vocab_size, (1, length), generator=torch.Generator().manual_seed(seed))
    topology = Topology.start(seed=seed)
    try:
        ids = ids.to(topology.device)
        model = build_gpt(shape, topology, trainable=False)
        load_megatron(model, checkpoint_dir, shape, topology)
        hidden = model(ids, torch.arange(length, device=ids.device)[None], None)
        logits = (hidden @ head_weight(model).T)[..., : shape.vocab_size]
        del model
        reference: torch.nn.Module = AutoModelForCausalLM.from_pretrained(hf_dir, dtype=torch.float32)
        reference.to(topology.device).eval()
        return (logits - reference(ids).logits).abs().max().item()
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
        command.add_argument("--dtype", choices=sorted(DTYPES), help="default: as stored")
        command.add_argument("--overwrite", action="store_true", help="replace the output folder")
        command.add_argument("--verify", action="store_true", help="compare the logits of both sides")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
