"""Layer specs: Transformer Engine's if it can run, else Megatron's local ones with a norm that shards sequences and
attention that takes concatenated sequences.
"""

import importlib.util
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor


def uses_transformer_engine() -> bool:
    """True if Transformer Engine is installed and there is a CUDA device: the one place that decides."""
    return torch.cuda.is_available() and importlib.util.find_spec("transformer_engine") is not None


def layer_spec(
    config: TransformerConfig, *, qkv_bias: bool = False, projection_bias: bool = False
) -> ModuleSpec | TransformerBlockSubmodules:
    """The decoder's spec for ``config``, for the pipeline stage of this process. Attention has the biases given here;
    the config's ``add_bias_linear`` is for the feed-forward part."""
    if uses_transformer_engine():
        fused = getattr(config, "use_transformer_engine_op_fuser", False)  # a field of later megatron-core versions
        layer = get_gpt_layer_with_transformer_engine_spec(
            qk_layernorm=config.qk_layernorm,
            use_te_op_fuser=fused,
            use_te_activation_func=config.use_te_activation_func,
        )
        _set_biases(layer, config, qkv_bias, projection_bias)
        return layer
    layer = get_gpt_layer_local_spec(qk_layernorm=config.qk_layernorm, normalization="RMSNorm")
    layer.submodules.input_layernorm = RMSNorm
    layer.submodules.pre_mlp_layernorm = RMSNorm
    attention = layer.submodules.self_attention.submodules
    attention.core_attention = SegmentAttention
    if config.qk_layernorm:
        attention.q_layernorm = RMSNorm
        attention.k_layernorm = RMSNorm
    _set_biases(layer, config, qkv_bias, projection_bias)
    return TransformerBlockSubmodules(layer_specs=[layer] * get_num_layers_to_build(config), layer_norm=RMSNorm)


def _set_biases(layer: ModuleSpec, config: TransformerConfig, qkv_bias: bool, projection_bias: bool) -> None:
    """Megatron knows no model with biases in attention alone, or in the feed-forward part alone."""
    attention = layer.submodules.self_attention.submodules
    if qkv_bias != (config.add_bias_linear or config.add_qkv_bias):
        attention.linear_qkv = _with_bias(attention.linear_qkv, qkv_bias)
    if projection_bias != config.add_bias_linear:
        attention.linear_proj = _with_bias(attention.linear_proj, projection_bias)


def _with_bias(linear: Any, bias: bool) -> Any:
    """A linear layer's class that has a bias or not, whatever it is told."""

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        linear.__init__(self, *args, **{**kwargs, "bias": bias})

    return type(linear.__name__, (linear,), {"__init__": init})


def fuse_gradient_accumulation(model: torch.nn.Module) -> None:
    """Have Transformer Engine's products add weight gradients straight to the fp32 ``main_grad`` of Megatron's DDP.

    Call it once DDP has made those buffers. TransformerConfig's own flag cannot be used: Megatron's output layer reads
    it, too, and asks for apex (tensor_parallel/layers.py, ColumnParallelLinear.__init__).
    """
    for module in model.modules():
        if hasattr(module, "fuse_wgrad_accumulation"):
            setattr(module, "fuse_wgrad_accumulation", True)  # noqa: B010 - Module's type knows tensors alone


class SegmentAttention(DotProductAttention):
    """Megatron's local attention, which refuses concatenated sequences, with one causal attention a sequence for them.
    Source: torch's scaled_dot_product_attention, softmax in fp32. No dropout."""

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """Padded: as Megatron's, [S, B, heads, D] -> [S, B, heads * D]. Concatenated: query [S, heads, D], key and
        value [S, groups, D] -> [S, heads, D]."""
        if packed_seq_params is None:
            return super().forward(query, key, value, attention_mask, attn_mask_type, attention_bias)
        lengths = packed_seq_params.cu_seqlens_q.diff().tolist()
        parts = zip(query.split(lengths), key.split(lengths), value.split(lengths), strict=True)
        return torch.cat([self._causal(*part) for part in parts])

    def _causal(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        query, key, value = (x.transpose(0, 1)[None] for x in (query, key, value))
        out = F.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=self.softmax_scale, enable_gqa=query.size(1) != key.size(1)
        )
        return out[0].transpose(0, 1)


class RMSNorm(torch.nn.RMSNorm):
    """torch's RMSNorm in Megatron's call shape, with weights whose gradients are summed over sequence shards.

    Megatron's own wrapper (transformer/torch_norm.py) refuses sequence parallelism and ignores the parameters' dtype.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **kwargs: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype, device=torch.get_default_device())
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
