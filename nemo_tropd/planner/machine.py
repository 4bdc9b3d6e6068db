"""The memory a plan may use."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

GIB = 2**30

# Of a GPU's memory, what torch's allocator cannot use because its free blocks have other sizes.
FRAGMENTATION = 0.04
# A process of a GPU rank before its first tensor: CUDA context, NCCL's buffers, workspaces of cuBLAS and cuDNN.
GPU_CONTEXT = 2.0 * GIB
# What vLLM keeps of a GPU while it sleeps: CUDA graphs and workspaces.
ASLEEP = 1.5 * GIB
# A rank's process on CPU beside its tensors: torch, Megatron, NeMo and Transformers, imported, and gloo's buffers.
CPU_PROCESS = 0.85 * GIB
# The CPU engine's processes before their weights, all together.
CPU_ENGINE = 2.5 * GIB


@dataclass(frozen=True)
class Machine:
    """Where a run is planned to happen."""

    kind: Literal["gpu", "cpu"]
    bytes: float  # of one GPU, or of the whole host
    chunk_bytes: float  # of logits the chunked head may hold, see loss.inputs.CHUNK_BYTES
    where: str = ""  # how ``bytes`` is known, for a person

    @property
    def process(self) -> float:
        """Bytes of a rank's process that belong to no tensor."""
        return GPU_CONTEXT if self.kind == "gpu" else CPU_PROCESS


def host_bytes() -> float:
    """Bytes of memory this host may use: its own, or its control group's limit where that is lower."""
    total = float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            limit = Path(file).read_text(encoding="ascii").strip()
        except OSError:
            continue
        if limit.isdigit():
            total = min(total, float(limit))
    return total
