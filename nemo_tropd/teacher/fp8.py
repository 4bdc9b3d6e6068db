"""Transformer Engine's FP8 for a frozen teacher: recipes, the hardware that has them, and the shapes they need.

A recipe says which values share a scale, which comes from the very tensor it serves ("current" scaling):
``tensorwise`` all of a tensor, ``blockwise`` 1 x 128 of an input and 128 x 128 of a weight, ``mxfp8`` 32 in a row.
Delayed scaling updates its history in backward passes, which a teacher never has, so it is refused.

Only the four linear layers of each transformer layer run in FP8; embedding, norms, attention and head stay in bf16.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F

from nemo_tropd.batch import Segments, TokenBatch
from nemo_tropd.config import ConfigError
from nemo_tropd.config_teacher import TeacherConfig
from nemo_tropd.convert.families import ModelShape
from nemo_tropd.parallel.topology import Topology

# Rows and columns of every FP8 product must be multiples of this. Source: transformer_engine 2.20.2,
# pytorch/utils.py assert_dim_for_fp8_exec (8 rows, 16 columns), and megatron-core's fp8_utils.get_fp8_align_size.
MULTIPLES = {"tensorwise": 16, "blockwise": 16, "mxfp8": 32}
# Source: transformer_engine 2.20.2, pytorch/quantization.py.
HARDWARE = {
    "tensorwise": "Ada, Hopper or later",
    "blockwise": "Hopper or later, with CUDA 12.9",
    "mxfp8": "Blackwell of compute capability 10.x or 11.x",
}


@dataclass(frozen=True)
class Fp8Settings:
    """How a model's layers run in FP8. ``recipe``: see the module's text."""

    recipe: str
    weights_in_fp8: bool = True
    first_last_bf16: int = 0  # layers at each end that stay in bf16

    @classmethod
    def of(cls, teacher: TeacherConfig) -> Fp8Settings | None:
        """What ``model.teacher`` asks for; None without FP8."""
        if teacher.fp8 is None:
            return None
        return cls(teacher.fp8, teacher.fp8_param, teacher.fp8_first_last_bf16)

    @property
    def multiple(self) -> int:
        """Tokens of a pass, and every dimension of a weight's shard, must be a multiple of this."""
        return MULTIPLES[self.recipe]

    def transformer_fields(self) -> dict[str, Any]:
        """Fields of megatron-core's TransformerConfig. e4m3: "hybrid" differs in the backward pass alone."""
        ends = self.first_last_bf16
        return {
            "fp8": "e4m3",
            "fp8_recipe": self.recipe,
            "fp8_param": self.weights_in_fp8,
            "fp8_dot_product_attention": False,
            "fp8_multi_head_attention": False,
            "first_last_layers_bf16": ends > 0,
            "num_layers_at_start_in_bf16": ends,
            "num_layers_at_end_in_bf16": ends,
        }

    def check_shape(self, shape: ModelShape, tensor_parallel: int, pipeline_parallel: int) -> None:
        """Raise ConfigError if the architecture's shards have no FP8 product."""
        sizes = {
            "hidden size": shape.hidden,
            "attention columns of a rank": shape.size("q") // tensor_parallel,
            "query, key and value rows of a rank": (shape.size("q") + 2 * shape.size("kv")) // tensor_parallel,
            "feed-forward columns of a rank": shape.ffn // tensor_parallel,
        }
        for what, size in sizes.items():
            if size % self.multiple:
                odd = f"the teacher's {what}, {size}, is not a multiple of {self.multiple}, as FP8 products require"
                remedy = "choose another tensor-parallel degree, or fp8=null"
                raise ConfigError("model.teacher.fp8", self.recipe, f"{odd}; {remedy}")
        most, ends = shape.layers // pipeline_parallel, self.first_last_bf16
        if ends > most:
            has = f"a pipeline stage of the teacher has {most} of its {shape.layers} layers"
            raise ConfigError("model.teacher.fp8_first_last_bf16", ends, f"{has}; choose at most {most}, or fp8=null")


def check_hardware(recipe: str) -> None:
    """Raise ConfigError unless the machine can run ``recipe``; on a machine with a GPU, Transformer Engine decides."""
    if reason := _missing_for(recipe):
        remedy = "set it to null to run the teacher in model.teacher.precision"
        raise ConfigError("model.teacher.fp8", recipe, f"{reason} ({recipe} needs {HARDWARE[recipe]}); {remedy}")


def _missing_for(recipe: str) -> str:
    if not torch.cuda.is_available():
        return "this machine has no CUDA device, and the CPU has no FP8 products"
    try:
        import transformer_engine.pytorch as te
    except ImportError as error:
        return f"Transformer Engine cannot be imported ({error})"
    checks = {
        "tensorwise": te.is_fp8_available,
        "blockwise": te.is_fp8_block_scaling_available,
        "mxfp8": te.is_mxfp8_available,
    }
    served, reason = checks[recipe](return_reason=True)
    return "" if served else str(reason)


def padded_width(rows: int, width: int, multiple: int, shards: int) -> int:
    """The least width >= ``width`` with which each of ``shards`` equal parts of [rows, width] tokens is a multiple.
    ``shards`` is the tensor-parallel degree under sequence parallelism, else 1."""
    step = multiple // math.gcd(multiple, rows) * shards
    return -(-width // step) * step


def pad_tokens(batch: TokenBatch, multiple: int, topology: Topology) -> TokenBatch:
    """The batch widened at its right end until FP8 takes its tokens; the same object if it fits already.
    ``loss_tokens`` stays the same, and no real token attends to what is added: in a concatenated row it is a sequence
    of its own."""
    rows, width = batch.input_ids.shape
    target = padded_width(rows, width, multiple, topology.tensor_size if topology.sequence_parallel else 1)
    if target == width:
        return batch
    changed: dict[str, Any] = {}
    for name in ("input_ids", "labels", "loss_mask", "guided", "uniforms", "behavior_log_probs"):
        fill = math.nan if name == "behavior_log_probs" else 0
        changed[name] = F.pad(getattr(batch, name), (0, target - width), value=fill)
    added = torch.arange(target - width, device=batch.position_ids.device).expand(rows, -1)
    changed["position_ids"] = torch.cat([batch.position_ids, added], 1)
    if batch.segments is not None:
        longest = max(batch.segments.longest, target - width)
        changed["segments"] = Segments(F.pad(batch.segments.bounds, (0, 1), value=target), longest)
    if batch.selected is not None:
        at = batch.selected.rows
        changed["selected"] = replace(batch.selected, rows=at // width * target + at % width)
    return replace(batch, **changed)
