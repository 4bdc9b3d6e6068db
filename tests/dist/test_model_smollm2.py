"""SmolLM2-135M-Instruct under tensor parallel 1 and 3 and pipeline parallel 2, on its own chat format."""

from __future__ import annotations

import pytest
import torch

from tests.dist.run_distributed import run_distributed
from tests.dist.test_model_parity import schedule_logits

TEXT = (
    "<|im_start|>user\nWhy is the sky blue?<|im_end|>\n<|im_start|>assistant\nSunlight is scattered by the molecules "
    "of the air, and blue light, whose waves are short, is scattered far more than red.<|im_end|>\n"
)


def _check(rank: int, world_size: int, folder: str, tensor: int, pipeline: int, ids: torch.Tensor):
    from nemo_tropd.convert.families import ConversionError, read_shape
    from nemo_tropd.convert.hf_import import load_hf
    from nemo_tropd.gpt.build import build_gpt
    from nemo_tropd.parallel.topology import Topology

    shape = read_shape(folder)
    with pytest.raises(ConversionError, match=r"9 query heads cannot be split over tensor parallel 2; supported degrees .*: 1, 3"):
        shape.check_layout(2, 1)
    topology = Topology.start(tensor, pipeline)
    model = build_gpt(shape, topology, trainable=False)
    load_hf(model, folder, shape, topology)
    logits = schedule_logits(model, topology, shape, [ids[:, :20], ids])
    topology.barrier()
    return logits[1] if topology.is_last_stage and topology.tensor_rank == 0 else None


def test_logits_are_those_of_double_precision():
    """Its logits reach 35, where transformers' own fp32 is up to 1e-4 from its fp64: that is the yardstick."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from examples.make_smollm2 import build_smollm2

    folder = build_smollm2()
    ids = torch.tensor([AutoTokenizer.from_pretrained(folder)(TEXT).input_ids])
    with torch.no_grad():
        exact, single = (
            AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)(ids).logits
            for dtype in (torch.float64, torch.float32)
        )
    tolerance = max(1e-4, 2 * (single - exact).abs().max().item())
    assert tolerance < 4e-4
    for tensor, pipeline in ((1, 1), (3, 1), (1, 2)):
        results = run_distributed(_check, tensor * pipeline, str(folder), tensor, pipeline, ids)
        (logits,) = [result for result in results if result is not None]
        assert (logits - exact).abs().max().item() < tolerance, (tensor, pipeline)
