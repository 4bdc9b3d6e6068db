"""What training adds to the student's model: recomputation, gradient buffers and their sum over data-parallel ranks."""

from typing import Any

from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from nemo_tropd.config import RECOMPUTE
from nemo_tropd.gpt.specs import fuse_gradient_accumulation
from nemo_tropd.parallel.topology import Topology


def recompute_fields(mode: str | None) -> dict[str, Any]:
    """Fields of TransformerConfig for ``model.recompute``.

    ``selective`` recomputes the feed-forward part, whose activations are the widest. Megatron's own default, the core
    attention, would gain nothing: FlashAttention, and torch's on CPU, keep no scores in the first place.
    """
    fields: dict[str | None, dict[str, Any]] = {
        None: {},
        "selective": {"recompute_granularity": "selective", "recompute_modules": ["mlp"]},
        "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
    }
    assert fields.keys() == set(RECOMPUTE)
    return fields[mode]


def data_parallel(student: GPTModel, topology: Topology, *, distributed_optimizer: bool) -> DistributedDataParallel:
    """The student in Megatron's DDP: fp32 gradient buffers, summed over data-parallel ranks while backward runs.

    Gathering parameters is not overlapped with the next forward pass: the engine's refresh needs all of them as soon as
    the optimizer has stepped.
    """
    config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=distributed_optimizer,
        overlap_grad_reduce=topology.data_size > 1,
    )
    model = DistributedDataParallel(student.config, config, student)
    if topology.data_size > 1:
        student.config.no_sync_func = model.no_sync
    student.config.finalize_model_grads_func = _finalize_without_division
    fuse_gradient_accumulation(student)
    return model


def _finalize_without_division(model: list[Any], num_tokens: Tensor | None = None, **kw: Any) -> None:
    """The loss is already divided by the global token count, so Megatron must not divide again."""
    finalize_model_grads(model, None, **kw)
