"""The engine's side of a weight refresh: a backend of vLLM's weight-transfer API that reads safetensors buckets.

vLLM imports this module in every worker process (``worker_extension_cls``), which registers the backend there.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

BACKEND = "tropd_buckets"


@dataclass
class BucketInit(WeightTransferInitInfo):
    """Nothing is agreed beforehand: every bucket names its own file."""


@dataclass
class BucketUpdate(WeightTransferUpdateInfo):
    """One bucket: the path of a safetensors file under Hugging Face names."""

    path: str = ""


def _tensors(path: str) -> Iterator[tuple[str, Tensor]]:
    with safe_open(path, framework="pt", device="cpu") as bucket:
        for name in bucket.keys():  # noqa: SIM118 - not a mapping
            # No copy is made although a layer is only put together once its last tensor has come, maybe two buckets
            # later: the sender never writes to a file again, and a removed file lives as long as it is mapped.
            yield name, bucket.get_tensor(name)


def repack_shared_matrices(model: nn.Module) -> int:
    """Pack anew every matrix that a CPU kernel keeps a packed copy of; returns how many.

    With tied embeddings the layerwise reload refreshes the embedding but leaves the head on a packed copy of the
    *old* matrix (vLLM 0.32): outputs look almost right, some tenths of a nat off.
    """
    packed = 0
    module: Any
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if getattr(module, "cpu_linear", None) is not None and weight is not None and weight.numel() > 0:
            module.quant_method.process_weights_after_loading(module)
            packed += 1
    return packed


class BucketTransferEngine(WeightTransferEngine[BucketInit, BucketUpdate]):
    """Several buckets between start and finish; a layer is rebuilt when all of its tensors have come."""

    init_info_cls = BucketInit
    update_info_cls = BucketUpdate

    def init_transfer_engine(self, init_info: BucketInit) -> None:
        """No connection to open."""

    def start_weight_update(self) -> None:
        initialize_layerwise_reload(self.model)

    def update_weights(self, update_info: dict) -> None:
        self.receive_weights(self.parse_update_info(update_info))
        if self.device.type != "cpu":  # without an accelerator vLLM's own synchronisation raises
            torch.accelerator.synchronize()

    def receive_weights(self, update_info: BucketUpdate) -> None:
        model: Any = self.model
        model.load_weights(_tensors(update_info.path))

    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)
        repack_shared_matrices(self.model)

    def shutdown(self) -> None:
        """Nothing is held between refreshes."""


class WorkerExtension:
    """Mixed into vLLM's worker; empty, since its import is what counts."""


if BACKEND not in WeightTransferEngineFactory._registry:
    WeightTransferEngineFactory.register_engine(BACKEND, BucketTransferEngine)
