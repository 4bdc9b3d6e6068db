"""The check behind ``--verify``: a Megatron checkpoint and a Hugging Face folder compute the same logits."""

from __future__ import annotations

from pathlib import Path

import torch

from nemo_tropd.convert.families import read_shape
from nemo_tropd.convert.megatron_files import load_megatron
from nemo_tropd.gpt.build import build_gpt, head_weight
from nemo_tropd.parallel.topology import Topology


@torch.no_grad()
def largest_logit_difference(
    checkpoint_dir: str | Path, hf_dir: str | Path, *, length: int = 64, seed: int = 0
) -> float:
    """The largest |difference| between Megatron's and transformers' logits, fp32, over ``length`` random tokens.

    Both models are in memory in fp32, one after the other. Starts and stops a topology of one process.
    """
    from transformers import AutoModelForCausalLM

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
