"""FP8 emulated on a CPU with torch's float8 types, to see what rounding to 8 bits does to a real teacher.

This is an emulation, not Transformer Engine: weights and inputs of the four linear layers of each transformer layer are
scaled and cast to e4m3 as TE's recipes do it, then multiplied exactly in fp32 and rounded to bf16. What it leaves out:
the tensor cores' own accumulation (fewer bits than fp32 on Hopper), and speed, which is that of a CPU.
Embedding, norms, attention's products and head stay in bf16, as under TE.

Scales, from transformer_engine 2.20.2 (common/recipe, Float8CurrentScaling and Float8BlockScaling; the defaults):
    tensorwise   448 / max|x| over the tensor
    blockwise    448 / max|x| over 1 x 128 of an input and 128 x 128 of a weight, rounded down to a power of two
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from torch import Tensor

from nemo_tropd.parallel.topology import Topology
from nemo_tropd.teacher.fp8 import Fp8Settings
from nemo_tropd.teacher.scorer import TeacherScorer

E4M3_MAX = 448.0
BLOCK = 128
RECIPES = ("tensorwise", "blockwise")


def emulate_fp8(model: GPTModel, settings: Fp8Settings) -> int:
    """Make the layers' linear modules of a bf16 or fp32 model compute as in emulated FP8; returns how many.

    The weights as they are now are cast. Tensor parallel 1 and Megatron's local layers alone: ValueError otherwise.
    """
    if settings.recipe not in RECIPES:
        raise ValueError(f"FP8 recipe {settings.recipe!r} is not emulated; choose one of {', '.join(RECIPES)}")
    if model.config.tensor_model_parallel_size != 1:
        raise ValueError(f"emulated at tensor parallel 1 only, not {model.config.tensor_model_parallel_size}")
    ends, last, count = settings.first_last_bf16, len(model.decoder.layers), 0
    for number, layer in enumerate(model.decoder.layers):
        if not ends <= number < last - ends:
            continue
        for module in layer.modules():
            if isinstance(module, ColumnParallelLinear | RowParallelLinear):
                weight = cast_weight(module.weight.detach(), settings.recipe)
                module._forward_impl = partial(_product, quantized=weight, recipe=settings.recipe)
                count += 1
    if not count:
        raise ValueError("the model has no linear layer of Megatron's local spec to emulate")
    return count


class Quantized:
    """e4m3 values [R, C] and what they are to be multiplied with, broadcast over tiles of ``tile`` rows and columns."""

    def __init__(self, values: Tensor, inverse_scales: Tensor, tile: tuple[int, int]) -> None:
        self.values, self.inverse_scales, self.tile = values, inverse_scales, tile

    def dequantize(self) -> Tensor:
        """fp32 [R, C]; exact, since a product of an e4m3 and a power of two, or near enough: one fp32 rounding."""
        rows, columns = self.values.shape
        scales = self.inverse_scales.repeat_interleave(self.tile[0], 0)[:rows]
        return self.values.float() * scales.repeat_interleave(self.tile[1], 1)[:, :columns]


def cast_weight(weight: Tensor, recipe: str) -> Quantized:
    """A weight [out, in] as the recipe casts it."""
    return _cast(weight, (BLOCK, BLOCK), powers_of_two=True) if recipe == "blockwise" else _cast_whole(weight)


def cast_input(rows: Tensor, recipe: str) -> Quantized:
    """An input [tokens, in] as the recipe casts it; tensorwise, all its tokens share one scale."""
    return _cast(rows, (1, BLOCK), powers_of_two=True) if recipe == "blockwise" else _cast_whole(rows)


def _cast_whole(matrix: Tensor) -> Quantized:
    return _cast(matrix, (max(matrix.size(0), 1), max(matrix.size(1), 1)), powers_of_two=False)


def _cast(matrix: Tensor, tile: tuple[int, int], *, powers_of_two: bool) -> Quantized:
    rows, columns = matrix.shape
    wide = matrix.float()
    padded = F.pad(wide, (0, -columns % tile[1], 0, -rows % tile[0]))
    tiles = padded.view(padded.size(0) // tile[0], tile[0], padded.size(1) // tile[1], tile[1])
    scales = E4M3_MAX / tiles.abs().amax((1, 3))
    if powers_of_two:
        scales = (scales.view(torch.int32) & 0x7F800000).view(torch.float32)  # the exponent alone: rounded down
    scales = torch.where(scales.isfinite(), scales, 1.0)  # a tile of zeros
    values = (tiles * scales[:, None, :, None]).clamp(-E4M3_MAX, E4M3_MAX).view_as(padded)[:rows, :columns]
    return Quantized(values.to(torch.float8_e4m3fn), 1 / scales, tile)


def _product(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *_: Any,
    quantized: Quantized,
    recipe: str,
    **__: Any,
) -> Tensor:
    """Stands in for the modules' own product, called as megatron-core calls that; ``weight`` was cast before."""
    rows = cast_input(input.reshape(-1, input.size(-1)), recipe).dequantize()
    out = F.linear(rows, quantized.dequantize(), None if bias is None else bias.float())
    return out.to(input.dtype).view(*input.shape[:-1], -1)


class EmulatedScorer(TeacherScorer):
    """A teacher whose layers run in emulated FP8; otherwise a ``TeacherScorer``, FP8's padding included."""

    def __init__(
        self, source: Path, topology: Topology, *, dtype: torch.dtype, vocab_size: int, fp8: Fp8Settings
    ) -> None:
        super().__init__(source, topology, dtype=dtype, vocab_size=vocab_size)
        emulate_fp8(self.model, fp8)
        self.fp8 = fp8
