"""Layer specs: Transformer Engine's where it can run, else Megatron's local ones with a norm that shards sequences."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig


def uses_transformer_engine() -> bool:
    """True where Transformer Engine is installed and a CUDA device is present: the one place that decides."""
    return torch.cuda.is_available() and importlib.util.find_spec("transformer_engine") is not None


def layer_spec(config: TransformerConfig) -> ModuleSpec | TransformerBlockSubmodules:
    """The decoder's spec for ``config``, for the pipeline stage of this process."""
    if uses_transformer_engine():
        return get_gpt_layer_with_transformer_engine_spec(qk_layernorm=config.qk_layernorm)
    layer = get_gpt_layer_local_spec(qk_layernorm=config.qk_layernorm, normalization="RMSNorm")
    layer.submodules.input_layernorm = RMSNorm
    layer.submodules.pre_mlp_layernorm = RMSNorm
    if config.qk_layernorm:
        attention = layer.submodules.self_attention.submodules
        attention.q_layernorm = RMSNorm
        attention.k_layernorm = RMSNorm
    return TransformerBlockSubmodules(layer_specs=[layer] * get_num_layers_to_build(config), layer_norm=RMSNorm)


class RMSNorm(torch.nn.RMSNorm):
    """torch's RMSNorm in Megatron's call shape, with weights whose gradients are summed over sequence shards.

    Megatron's own wrapper (transformer/torch_norm.py) refuses sequence parallelism and ignores the parameters' dtype.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **kwargs: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype, device=torch.get_default_device())
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
