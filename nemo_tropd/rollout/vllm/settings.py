"""Validated engine settings and the ``vllm.LLM`` arguments made from them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from nemo_tropd.batch import Sampling
from nemo_tropd.config import ENGINE_TOKENS
from nemo_tropd.convert.families import ConversionError, shape_of_config
from nemo_tropd.convert.rope import vllm_overrides
from nemo_tropd.rollout.engine import DTYPES, EngineError
from nemo_tropd.rollout.weights.stream import checkpoint_shapes

_FIXED_ARGUMENTS: dict[str, Any] = {
    "skip_tokenizer_init": True,  # token ids in, token ids out
    "generation_config": "vllm",  # no sampling defaults from the checkpoint
    # Of what was sampled from: after temperature, top-k, top-p and the bias that takes padding rows out.
    "logprobs_mode": "processed_logprobs",
    "load_format": "safetensors",
    "config_format": "hf",  # else params.json, if a folder has the weights in Mistral's own format as well
    "worker_extension_cls": "nemo_tropd.rollout.weights.vllm_worker.WorkerExtension",
}
# Written by tools that copy a checkpoint, and of no meaning for its shape.
_IGNORED_KEYS = ("_name_or_path", "transformers_version")


def model_fingerprint(model_dir: Path) -> str:
    """A digest of the model's config.json and of its tensors' names and shapes; "" if there is no such checkpoint."""
    try:
        config = json.loads((model_dir / "config.json").read_text(encoding="utf-8"))
        shapes = checkpoint_shapes(model_dir)[0] if any(model_dir.glob("*.safetensors")) else {}
    except (OSError, ValueError, AttributeError, EngineError):
        return ""
    known = {k: v for k, v in config.items() if k not in _IGNORED_KEYS}
    return hashlib.sha256(json.dumps([known, sorted(shapes.items())], sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class EngineSettings:
    """A Hugging Face checkpoint and how it is to be run. Raises EngineError when ``model_dir`` is no such checkpoint.

    ``dtype``: float32, bfloat16 or float16.
    ``eos_ids``: tokens that end a response; None: those of the checkpoint's config files.
    ``true_vocab_size``: the tokenizer's; ids from there on are padding and never sampled. None: the model's rows.
    ``refreshable``: False for a frozen model, such as a teacher that generates responses.
    ``weights_shapes``: shapes of the model's tensors by Hugging Face name, if the folder has a config.json but no
    weights: they come by ``update_weights``. None: the folder's safetensors files hold them.
    ``kv_cache_gib``: memory of the key-value cache; None (GPU only) takes what ``gpu_memory_utilization`` leaves.
    ``enforce_eager``: False captures CUDA graphs, ``torch_compile`` then fuses kernels: a minute more at the start.
    """

    model_dir: Path
    dtype: str
    max_model_len: int
    max_num_seqs: int = 64
    seed: int = 0
    sampling: Sampling = field(default_factory=Sampling)
    eos_ids: tuple[int, ...] | None = None
    true_vocab_size: int | None = None
    refreshable: bool = True
    weights_shapes: Mapping[str, tuple[int, ...]] | None = None
    kv_cache_gib: float | None = 1.0
    gpu_memory_utilization: float = 0.9
    tensor_parallel: int = 1
    enforce_eager: bool = True
    torch_compile: bool = False

    def __post_init__(self) -> None:
        if not (self.model_dir / "config.json").is_file():
            raise EngineError(f"{self.model_dir} is not a Hugging Face checkpoint: it has no config.json")
        if self.dtype not in DTYPES:
            raise EngineError(f"dtype is {self.dtype!r}; the engine computes in one of {', '.join(DTYPES)}")
        if not self.shapes[0]:
            raise EngineError(f"{self.model_dir} has no tensors")

    @cached_property
    def model_rows(self) -> int:
        """Rows of the embedding, padding included."""
        return int(json.loads((self.model_dir / "config.json").read_text())["vocab_size"])

    @property
    def vocab_size(self) -> int:
        """Ids below this may be sampled."""
        return self.true_vocab_size or self.model_rows

    @cached_property
    def rope_overrides(self) -> dict[str, Any]:
        """What vLLM must read instead of config.json to rotate as the trainer does."""
        config = json.loads((self.model_dir / "config.json").read_text(encoding="utf-8"))
        try:
            where = str(self.model_dir / "config.json")
            return vllm_overrides(config, shape_of_config(config, where).max_positions, where)
        except ConversionError as error:
            raise EngineError(str(error)) from error

    @cached_property
    def shapes(self) -> tuple[dict[str, tuple[int, ...]], frozenset[str]]:
        """Shapes of the model's tensors by name, and the names a stream of weights may leave out."""
        if self.weights_shapes is not None:
            return dict(self.weights_shapes), frozenset()
        return checkpoint_shapes(self.model_dir)

    @cached_property
    def end_ids(self) -> list[int]:
        """Tokens that end a response, ascending."""
        if self.eos_ids is not None:
            return sorted(set(self.eos_ids))
        found: set[int] = set()
        for file in (self.model_dir / "config.json", self.model_dir / "generation_config.json"):
            value = json.loads(file.read_text()).get("eos_token_id") if file.is_file() else None
            found.update(value if isinstance(value, list) else [] if value is None else [value])
        return sorted(found)

    def llm_arguments(self) -> dict[str, Any]:
        """Keyword arguments of ``vllm.LLM``."""
        arguments: dict[str, Any] = {
            **_FIXED_ARGUMENTS,
            "model": str(self.model_dir),
            "dtype": self.dtype,
            "seed": self.seed,
            "max_model_len": self.max_model_len,
            "max_num_seqs": self.max_num_seqs,
            # A step takes complete prompts, so the list of requests alone decides what is computed together.
            "max_num_batched_tokens": max(self.max_model_len, ENGINE_TOKENS if self.enforce_eager else 8192),
            "enable_prefix_caching": True,
            "enforce_eager": self.enforce_eager,
            "tensor_parallel_size": self.tensor_parallel,
            "gpu_memory_utilization": self.gpu_memory_utilization,
        }
        if self.rope_overrides:
            arguments["hf_overrides"] = self.rope_overrides
        if self.weights_shapes is not None:
            arguments["load_format"] = "dummy"
        if self.enforce_eager:
            # A seeded request whose prompt is cut in chunks crashes on CPU.
            arguments["enable_chunked_prefill"] = False
        elif not self.torch_compile:
            arguments["compilation_config"] = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}
        if self.kv_cache_gib is not None:
            arguments["kv_cache_memory_bytes"] = int(self.kv_cache_gib * 2**30)
        return arguments
