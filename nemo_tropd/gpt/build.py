"""GPTModel from the shape of a Hugging Face checkpoint; its last stage gives hidden states, never logits.

Call it as ``model(input_ids, position_ids, None)``, [B, S] int64 and **no attention mask**: both layer specs apply the
causal mask by themselves, which is all a right-padded batch needs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn import Parameter

from nemo_tropd.convert.hf_import import local_rows
from nemo_tropd.gpt.rope import rotary_frequencies, softmax_scale
from nemo_tropd.gpt.specs import layer_spec, uses_transformer_engine
from nemo_tropd.parallel.topology import Topology

if TYPE_CHECKING:
    from nemo_tropd.convert.families import ModelShape


class HiddenOutput(ColumnParallelLinear):
    """An output layer that keeps its weight and returns the hidden states, for a head that works in chunks."""

    def forward(
        self, input_: Tensor, weight: Tensor | None = None, runtime_gather_output: bool | None = None
    ) -> tuple[Tensor, None]:
        return input_, None


def build_gpt(
    shape: ModelShape,
    topology: Topology,
    *,
    dtype: torch.dtype = torch.float32,
    trainable: bool = True,
    **overrides: Any,
) -> GPTModel:
    """This rank's shard of the model, with undefined weights: ``convert.hf_import.load_hf`` or a checkpoint fills them.

    The last stage returns hidden states after the final norm, [B, S, H], or [B, S/TP, H] under sequence parallelism. A
    model that is not ``trainable`` is in evaluation mode. ``overrides`` are further fields of TransformerConfig. Raises
    ConversionError if the architecture does not split over the topology's degrees, before anything is allocated.
    """
    shape.check_layout(topology.tensor_size, topology.pipeline_size)
    config = transformer_config(shape, topology, dtype, **overrides)
    model = GPTModel(
        config=config,
        transformer_layer_spec=layer_spec(config, qkv_bias=shape.qkv_bias, projection_bias=shape.attention_bias),
        vocab_size=shape.padded_vocab(topology.tensor_size),
        max_sequence_length=shape.max_positions,
        pre_process=topology.is_first_stage,
        post_process=topology.is_last_stage,
        share_embeddings_and_output_weights=shape.tied,
        position_embedding_type="rope",
        rotary_base=shape.rope_theta,
        parallel_output=True,
        pg_collection=process_groups(topology),
    )
    model.rotary_pos_emb.inv_freq = rotary_frequencies(model.rotary_pos_emb.inv_freq, shape)
    if topology.is_last_stage:
        model.output_layer.__class__ = HiddenOutput
    _mark_split_parameters(model, shape)
    model.to(topology.device)
    if not trainable:
        model.eval().requires_grad_(False)
    return model


def process_groups(topology: Topology) -> ProcessGroupCollection | None:
    """The groups of a model that is not split as Megatron's global state says; None for one that is.
    Only what a forward pass without a pipeline asks for differs from the global state."""
    if topology.from_megatron:
        return None
    groups = ProcessGroupCollection.use_mpu_process_groups()
    groups.tp = groups.mp = groups.tp_cp = groups.expt_tp = topology.tensor_group
    groups.pp = topology.pipeline_group
    groups.dp = groups.dp_cp = groups.expt_dp = topology.data_group
    groups.embd = groups.pos_embd = None
    return groups


def head_weight(model: GPTModel) -> Parameter:
    """The output head's shard, [V_padded / TP, H]: the embedding if tied. Last stage only."""
    if model.share_embeddings_and_output_weights:
        return model.shared_embedding_or_output_weight()
    return model.output_layer.weight


def transformer_config(
    shape: ModelShape, topology: Topology, dtype: torch.dtype, **overrides: Any
) -> TransformerConfig:
    """Megatron's config for this architecture and topology.

    Losses are normalised by the global token count, so ``calculate_per_token_loss`` is on: DDP then sums gradients.
    Pipeline stages exchange the shape of every micro-batch, since their lengths differ.
    """
    on_cuda = topology.device.type == "cuda"
    fields: dict[str, Any] = {
        "num_layers": shape.layers,
        "hidden_size": shape.hidden,
        "ffn_hidden_size": shape.ffn,
        "num_attention_heads": shape.heads,
        "num_query_groups": shape.kv_heads,
        "kv_channels": shape.head_dim,
        "tensor_model_parallel_size": topology.tensor_size,
        "pipeline_model_parallel_size": topology.pipeline_size,
        "sequence_parallel": topology.sequence_parallel,
        "variable_seq_lengths": topology.pipeline_size > 1,
        "moe_token_dispatcher_type": "alltoall",  # no experts here: the default refuses variable_seq_lengths
        "normalization": "RMSNorm",
        "layernorm_epsilon": shape.norm_eps,
        "gated_linear_unit": True,
        "activation_func": F.silu,
        "add_bias_linear": shape.mlp_bias,
        "add_qkv_bias": shape.qkv_bias,
        "softmax_scale": softmax_scale(shape),
        "qk_layernorm": shape.qk_norm,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "attention_softmax_in_fp32": True,
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "bf16": dtype == torch.bfloat16,
        # Every weight is read from a checkpoint, so none is initialized.
        "perform_initialization": False,
        "use_cpu_initialization": not on_cuda,
        "calculate_per_token_loss": True,
        "masked_softmax_fusion": False,  # of the local attention alone, by apex; Transformer Engine's has its own
        "bias_activation_fusion": on_cuda,
        "bias_dropout_fusion": False,  # without dropout one addition, which torch would compile for each length anew
        "gradient_accumulation_fusion": False,  # see specs.fuse_gradient_accumulation
        "persist_layer_norm": uses_transformer_engine(),
        # The unfused one waits for the device twice a layer to learn where concatenated sequences begin.
        "apply_rope_fusion": uses_transformer_engine(),
        "deallocate_pipeline_outputs": on_cuda,
    }
    return TransformerConfig(**{**fields, **overrides})


def _mark_split_parameters(model: GPTModel, shape: ModelShape) -> None:
    """Say which parameters tensor parallel splits; Megatron does so only if it also initializes their values.
    The gradient norm counts a parameter without the mark on tensor rank 0 alone."""
    for parameter, row in local_rows(model, shape):
        dimension = row.split_dimension
        if dimension is not None:
            for attribute in ("tensor_model_parallel", "partition_dim", "partition_stride"):
                parameter.__dict__.pop(attribute, None)
            set_tensor_model_parallel_attributes(parameter, True, dimension, 1)
