"""What the benchmark of the loop runs: shapes with random weights, fixed rollouts, operation counts, matrix rates."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from examples.benchmarks.isolated import memory_kib
from examples.benchmarks.shapes import SHAPES as planner_shapes
from nemo_tropd.batch import Rollout
from nemo_tropd.config import TropdConfig
from nemo_tropd.convert.families import ModelShape
from nemo_tropd.rollout.engine import Finished, RefreshStats, RolloutRequest, Wanted

_ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
PHASES = ("rollout", "teacher", "student", "optimizer", "refresh")
SMOLLM2, SMOLLM2_24L = planner_shapes["SmolLM2-135M-Instruct"], planner_shapes["smollm2-student-24l"]
SHAPES = {
    "tiny": replace(SMOLLM2, layers=2, hidden=128, ffn=384, heads=4, kv_heads=2, head_dim=32, vocab_size=4096),
    "smollm2-135m": SMOLLM2,
    "smollm2-24l": SMOLLM2_24L,
    "1.5b": planner_shapes["Qwen2.5-1.5B-Instruct"],
    # As many rows as the student has, which TRL demands.
    "7b": replace(planner_shapes["Qwen2.5-7B-Instruct"], vocab_size=151936),
}


@dataclass(frozen=True)
class LoopCase:
    """One pair and one batch. ``precision``: "32" or "bf16"; every sequence has the same lengths."""

    student: str
    teacher: str
    sequences: int
    prompt_tokens: int
    new_tokens: int
    tokens_per_micro_batch: int
    precision: str = "32"
    teacher_fp8: str | None = None
    top_k: int = 64
    warmup: int = 1
    timed: int = 2

    @property
    def length(self) -> int:
        """Tokens of a sequence."""
        return self.prompt_tokens + self.new_tokens

    @property
    def tokens(self) -> int:
        """Tokens per step that enter the loss."""
        return self.sequences * self.new_tokens

    def prompts(self) -> list[list[int]]:
        """Random prompts, the same for both trainers."""
        return _random_ids(self.sequences, self.prompt_tokens, SHAPES[self.student].vocab_size, 1)

    def completions(self) -> list[list[int]]:
        """Random responses, one per prompt, the same for both trainers."""
        return _random_ids(self.sequences, self.new_tokens, SHAPES[self.student].vocab_size, 2)


@dataclass
class LoopCost:
    """Of the fastest timed step."""

    seconds: dict[str, float] = field(default_factory=dict)
    step_s: float = 0.0
    peak_gib: float = 0.0
    peak_of: str = ""
    matrix_share: float | None = None

    @property
    def not_rollout_s(self) -> float:
        """Seconds of a step outside its rollouts."""
        return self.step_s - self.seconds.get("rollout", 0.0)


def _random_ids(count: int, length: int, vocab: int, seed: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(10, vocab, (count, length), generator=generator).tolist()


def write_config(shape: ModelShape, folder: Path, dtype: str) -> Path:
    """A folder with the config.json of a Hugging Face checkpoint, and no weights."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "architectures": [_ARCHITECTURES[shape.family]],
        "model_type": shape.family,
        "attention_bias": False,
        "hidden_act": "silu",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.ffn,
        "max_position_embeddings": shape.max_positions,
        "num_attention_heads": shape.heads,
        "num_hidden_layers": shape.layers,
        "num_key_value_heads": shape.kv_heads,
        "rms_norm_eps": shape.norm_eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": shape.rope_theta},
        "tie_word_embeddings": shape.tied,
        "dtype": dtype,
        "vocab_size": shape.vocab_size,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return folder


def config_of(case: LoopCase, folder: Path) -> TropdConfig:
    """A run's configuration for ``case``; model directories are made under ``folder``."""
    dtype = "bfloat16" if case.precision == "bf16" else "float32"
    cfg = TropdConfig()
    cfg.trainer.precision = case.precision
    cfg.pretrained_checkpoint.restore_from_path = str(write_config(SHAPES[case.student], folder / "student", dtype))
    m = cfg.model
    m.global_batch_size, m.encoder_seq_length = case.sequences, case.length
    m.tokens_per_micro_batch = case.tokens_per_micro_batch
    m.optim.lr = 1e-6
    m.tropd.top_k = min(case.top_k, SHAPES[case.student].vocab_size)
    m.tropd.guidance.enabled = False
    m.teacher.path = str(write_config(SHAPES[case.teacher], folder / "teacher", dtype))
    m.teacher.fp8 = case.teacher_fp8
    m.teacher.admission.prompts = 0  # random weights have nothing to admit
    m.rollout.samples_per_prompt, m.rollout.max_new_tokens = 1, case.new_tokens
    m.rollout.dtype, m.data.path, m.data.max_prompt_tokens = dtype, str(folder), case.prompt_tokens
    return cfg


class FixedRollouts:
    """A ``RankEngine`` that returns rollouts made beforehand, so that the rest of a step can be compared."""

    def __init__(self, completions: Sequence[Sequence[int]]) -> None:
        self.completions, self.version = completions, 0

    def check_room(self) -> None:
        """It needs none."""

    def start(self) -> None:
        """Nothing to start."""

    def generate(
        self, requests: Sequence[RolloutRequest], finished: Finished | None = None, *, wanted: Wanted | None = None
    ) -> list[Rollout]:
        """The completion of each request's prompt; log-probabilities of a uniform guess."""
        rollouts = [
            Rollout(
                prompt_ids=r.prompt_ids,
                prefix_ids=[],
                response_ids=list(self.completions[r.prompt_index]),
                response_log_probs=[-10.0] * len(self.completions[r.prompt_index]),
                weight_version=self.version,
                sequence_id=r.sequence_id,
                prompt_index=r.prompt_index,
                finished=False,
            )
            for r in requests
        ]
        if finished is not None:
            for r in rollouts:
                finished(r)
        return rollouts

    def update_weights(self, stream: Iterable[tuple[str, Tensor]], version: int) -> RefreshStats:
        """Consumes the stream, so that the trainer's part of a refresh is measured."""
        began = time.monotonic()
        size = sum(t.numel() * t.element_size() for _, t in stream)
        self.version = version
        return RefreshStats(time.monotonic() - began, size, 1)

    def sleep(self) -> bool:
        """It has no memory to free."""
        return False

    def close(self, *, run_over: bool = False) -> None:
        """Nothing to close."""


def operations(shape: ModelShape, case: LoopCase) -> tuple[float, float]:
    """Multiplications and additions of the layers' matrix products and of the head's, one forward pass of a step.

    Layers see every token, attention half of its square; the head sees the tokens of the loss. Norms, activations and
    softmaxes are no matrix products.
    """
    q, kv = shape.size("q"), shape.size("kv")
    weights = shape.hidden * (q + 2 * kv) + q * shape.hidden + 3 * shape.hidden * shape.ffn
    every = case.sequences * case.length
    layers = 2.0 * shape.layers * every * (weights + case.length * q)
    return layers, 2.0 * case.tokens * shape.hidden * shape.vocab_size


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations per second of one large product on this machine, the best of eight; float8_e4m3fn takes unit
    scales."""
    size = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    one = torch.ones((), device=device)

    def product() -> None:
        if dtype == torch.float8_e4m3fn:
            torch._scaled_mm(a, b.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16)
        else:
            a @ b

    best = float("inf")
    for _ in range(8):
        synchronize(device)
        began = time.perf_counter()
        product()
        synchronize(device)
        best = min(best, time.perf_counter() - began)
    return 2.0 * size**3 / best


def ideal_seconds(case: LoopCase, device: torch.device) -> float:
    """Seconds a step would take outside rollouts if it were matrix products alone, at the measured rates."""
    dtype = torch.bfloat16 if case.precision == "bf16" else torch.float32
    rate = matrix_rate(device, dtype)
    layer_rate = matrix_rate(device, torch.float8_e4m3fn) if case.teacher_fp8 else rate
    student_layers, student_head = operations(SHAPES[case.student], case)
    teacher_layers, teacher_head = operations(SHAPES[case.teacher], case)
    return 3 * (student_layers + student_head) / rate + teacher_layers / layer_rate + teacher_head / rate


def synchronize(device: torch.device) -> None:
    """Wait for a GPU; a CPU never needs it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak(device: torch.device) -> tuple[float, str]:
    """GiB, and of what: torch's peak on a GPU since it was last reset, the process's resident peak on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30, "torch's allocations"
    return memory_kib("VmHWM") / 2**20, "the process"
