"""The engine's side of a weight refresh: methods that vLLM mixes into its worker (``worker_extension_cls``).

On a GPU the tensors are copied into the parameters as they are: an unquantized model's parameters keep their place and
form, so CUDA graphs stay valid. On CPU vLLM packs matrices for its kernels, so there a layer is rebuilt (vLLM's
layerwise reload) once all of its tensors have come.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import set_current_vllm_config
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload


class WorkerExtension:
    """A refresh is begin, load, finish. Names are ours alone: vLLM refuses a clash with its worker's."""

    device: torch.device  # of vLLM's worker, as are the next two
    vllm_config: Any
    model_runner: Any

    def begin_tropd_refresh(self) -> None:
        if self.device.type == "cpu":
            with set_current_vllm_config(self.vllm_config):
                initialize_layerwise_reload(self.model_runner.get_model())

    def load_tropd_tensors(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Take in (Hugging Face name, full tensor) pairs; each tensor-parallel rank keeps its own part of each."""
        with set_current_vllm_config(self.vllm_config), torch.device(self.device), torch.no_grad():
            self.model_runner.get_model().load_weights(tensors)

    def finish_tropd_refresh(self) -> None:
        if self.device.type == "cpu":
            with set_current_vllm_config(self.vllm_config):
                finalize_layerwise_reload(self.model_runner.get_model(), self.vllm_config.model_config)
                repack_shared_matrices(self.model_runner.get_model())


def repack_shared_matrices(model: nn.Module) -> None:
    """Pack anew every matrix that a CPU kernel keeps a packed copy of: with tied embeddings the layerwise reload leaves
    the head on a copy of the *old* matrix (vLLM 0.32), and outputs look almost right, some tenths of a nat off."""
    module: Any
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if getattr(module, "cpu_linear", None) is not None and weight is not None and weight.numel() > 0:
            module.quant_method.process_weights_after_loading(module)
