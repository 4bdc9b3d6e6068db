"""Rotary frequencies of every kind of scaling, in radians a position."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from nemo_tropd.convert.families import ModelShape
    from nemo_tropd.convert.rope import RopeScaling


def rotary_frequencies(plain: Tensor, shape: ModelShape) -> Tensor:
    """The frequencies of ``shape`` from those without scaling, [head_dim / 2], same dtype and device."""
    scaling = shape.rope_scaling
    if scaling is None or scaling.kind == "dynamic":  # the same up to shape.longest()
        return plain
    if scaling.kind == "linear":
        return plain / scaling.factor
    if scaling.kind == "yarn":
        return yarn_frequencies(plain, scaling, shape.rope_theta)
    return scaled_frequencies(plain, scaling)


def softmax_scale(shape: ModelShape) -> float | None:
    """What attention's scores are multiplied by, if that is not 1 / sqrt(head_dim). Yarn multiplies cosine and sine, so
    queries and keys, by its attention factor, which multiplies scores by its square: the same with fused kernels and
    concatenated sequences, for which Megatron drops the factor."""
    factor = 1.0 if shape.rope_scaling is None else shape.rope_scaling.attention_factor
    return None if factor == 1.0 else factor**2 / math.sqrt(shape.head_dim)


def scaled_frequencies(frequencies: Tensor, scaling: RopeScaling) -> Tensor:
    """Llama 3's scaled rotary frequencies, same shape and dtype as ``frequencies``.
    Source: Llama 3.1 reference code, apply_scaling. Megatron's own version fixes all but the factor."""
    wavelengths = 2 * math.pi / frequencies
    turns = scaling.original_max_positions / wavelengths
    blend = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    blended = (1 - blend) * frequencies / scaling.factor + blend * frequencies
    scaled = torch.where(turns < scaling.low_freq_factor, frequencies / scaling.factor, blended)
    return torch.where(turns > scaling.high_freq_factor, frequencies, scaled)


def yarn_frequencies(frequencies: Tensor, scaling: RopeScaling, theta: float) -> Tensor:
    """Yarn's frequencies, same shape and dtype as ``frequencies``. Source: arXiv 2309.00071, section 3.2, and its
    reference code, whose ramp runs over dimensions. Megatron's own version takes its settings from other fields."""
    width = 2 * frequencies.numel()

    def dimension(turns: float) -> float:
        """Where a frequency turns that often in the original length."""
        return width * math.log(scaling.original_max_positions / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dimension(scaling.beta_fast), dimension(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    steps = torch.arange(frequencies.numel(), dtype=torch.float32, device=frequencies.device)
    ramp = ((steps - low) / (high - low or 0.001)).clamp(0, 1)
    return frequencies / scaling.factor * ramp + frequencies * (1 - ramp)
