"""Random weights for models of real shapes: the speed and the memory of real ones."""

from __future__ import annotations

from collections.abc import Callable

import torch
from megatron.core.models.gpt import GPTModel

from nemo_tropd.teacher.offload import storages


def random_weights(seed: int, layers: int, std: float = 0.02) -> Callable[[GPTModel], None]:
    """Returns a function that fills every parameter in place with the same bf16 values, whatever format stores them.

    Norms are 1, biases 0, matrices normal with Megatron's spread: ``std``, for projections into the residual stream
    divided by sqrt(2 layers).
    """

    @torch.no_grad()
    def fill(model: GPTModel) -> None:
        for number, (name, parameter) in enumerate(model.named_parameters()):
            if "norm" in name:
                parameter.fill_(1.0)
            elif name.endswith(".bias"):
                parameter.zero_()
            else:
                into_residual = "linear_proj" in name or "linear_fc2" in name
                spread = std / (2 * layers) ** 0.5 if into_residual else std
                generator = torch.Generator(parameter.device).manual_seed(seed + number)
                drawn = torch.randn(parameter.shape, generator=generator, device=parameter.device, dtype=torch.bfloat16)
                parameter.copy_(drawn.mul_(spread))

    return fill


def weight_bytes(model: torch.nn.Module) -> int:
    """Bytes of parameters and buffers, each storage counted once."""
    return sum(storage.nbytes() for storage in storages(model))
