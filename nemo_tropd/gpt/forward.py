"""Passes without gradients through a GPTModel that gives hidden states, over any pipeline layout."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func
from torch import Tensor

from nemo_tropd.batch import TokenBatch
from nemo_tropd.parallel.topology import Topology


def run_model(model: torch.nn.Module, batch: TokenBatch) -> Tensor:
    """Hidden states on the last stage [B, S, H] (sequence parallel [B, S/TP, H]), activations to send on the others.
    In a concatenated row attention and rotary positions begin anew with each sequence."""
    return model(batch.input_ids, batch.position_ids, None, packed_seq_params=packed_parameters(batch))


def packed_parameters(batch: TokenBatch) -> PackedSeqParams | None:
    """Megatron's description of a concatenated row; None for a padded batch."""
    if batch.segments is None:
        return None
    bounds, longest = batch.segments.bounds, batch.segments.longest
    return PackedSeqParams(
        qkv_format="thd", cu_seqlens_q=bounds, cu_seqlens_kv=bounds, max_seqlen_q=longest, max_seqlen_kv=longest
    )


@torch.no_grad()
def pipeline_forward(model: GPTModel, batches: Sequence[TokenBatch], topology: Topology) -> list[Tensor | None]:
    """Hidden states of each batch on the last pipeline stage, None on the others (collective over the pipeline)."""
    if topology.pipeline_size == 1:
        return [run_model(model, batch) for batch in batches]
    if not batches:
        return []

    def forward_step(data: Iterator[TokenBatch], chunk: torch.nn.Module) -> tuple[Tensor, Callable[..., Any]]:
        def collect(hidden: Tensor, non_loss_data: bool = False) -> Tensor:
            return hidden

        return run_model(chunk, next(data)), collect

    rows, width = batches[0].input_ids.shape
    hidden = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iter(batches),
        model=[model],
        num_microbatches=len(batches),
        seq_length=width,
        micro_batch_size=rows,
        forward_only=True,
        collect_non_loss_data=True,
    )
    return list(hidden) if topology.is_last_stage else [None] * len(batches)
