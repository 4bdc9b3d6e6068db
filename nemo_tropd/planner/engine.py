"""The student's rollout engines: how many, what they are asked for in a step, and how much of it their caches hold."""

import math
from dataclasses import dataclass

from nemo_tropd.config import TropdConfig
from nemo_tropd.convert.families import ModelShape
from nemo_tropd.planner.degrees import BYTES, layout
from nemo_tropd.planner.machine import ENGINE_WORKSPACE, GIB, Machine
from nemo_tropd.planner.memory import engine_bytes, placement


def token_bytes(shape: ModelShape, dtype: str) -> int:
    """Bytes of one token's keys and values in all layers."""
    return 2 * shape.layers * shape.size("kv") * BYTES[dtype]


@dataclass(frozen=True)
class EngineLoad:
    """One of a step's engines, if every response has the greatest length."""

    engines: int
    tensor: int  # GPUs of each
    sequences: int  # that one is asked for
    longest: int  # tokens of a sequence, prompt included
    holds: float  # tokens whose keys and values fit

    at_once: int  # sequences that are generated together

    @property
    def waves(self) -> int:
        return math.ceil(self.sequences / self.at_once)

    def line(self, cfg: TropdConfig) -> tuple[str, str]:
        asked = self.sequences * self.longest
        text = f"{self.holds:,.0f} tokens at a time (estimated) of {asked:,} that its {self.sequences} sequences take "
        text += "at the greatest length"
        if self.waves == 1:
            return "cache of an engine", f"{text}: all together"
        limit = cfg.model.rollout.max_num_seqs
        if self.at_once == limit:
            return "cache of an engine", f"{text}: {self.waves} waves of model.rollout.max_num_seqs={limit}"
        why = f"{self.waves} waves of {self.at_once}; those that do not fit wait, or are computed again"
        return "cache of an engine", f"{text}: {why} (model.rollout.gpu_memory_utilization)"


def cache_tokens(cfg: TropdConfig, student: ModelShape, machine: Machine) -> float:
    """Tokens whose keys and values an engine holds: what its weights and workspace leave of its share."""
    r, tensor = cfg.model.rollout, engine_tensor(cfg, machine)
    if machine.kind == "cpu":
        return r.kv_cache_gib * GIB / token_bytes(student, r.dtype)
    weights = student.parameters() * BYTES[r.dtype] / tensor
    free = engine_bytes(cfg, student, machine) - weights - ENGINE_WORKSPACE
    return max(free, 0.0) / (token_bytes(student, r.dtype) / tensor)


def engine_tensor(cfg: TropdConfig, machine: Machine) -> int:
    """GPUs of each engine: those of a tensor-parallel group if it lives in the ranks' processes."""
    return cfg.model.tensor_model_parallel_size if placement(cfg, machine) == "colocated" else 1


def engine_load(cfg: TropdConfig, student: ModelShape, machine: Machine) -> EngineLoad:
    """What ``cfg`` asks of each of the student's engines in a step."""
    m, where = cfg.model, placement(cfg, machine)
    engines = {"process": 1, "dedicated": m.rollout.dedicated.engines or 1, "colocated": layout(cfg).data}[where]
    sequences = math.ceil(m.global_batch_size / engines)
    longest = min(m.encoder_seq_length, m.data.max_prompt_tokens + m.rollout.max_new_tokens)
    holds = cache_tokens(cfg, student, machine)
    at_once = max(1, min(m.rollout.max_num_seqs, sequences, int(holds // longest)))
    return EngineLoad(engines, engine_tensor(cfg, machine), sequences, longest, holds, at_once)
