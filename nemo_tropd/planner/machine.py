"""The machine a run is planned for, and the memory a plan may use."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

GIB = 2**30
FRAGMENTATION = 0.04  # share of a GPU's memory that torch's allocator loses
GPU_CONTEXT = 2.0 * GIB  # of a GPU rank's process before its first tensor: CUDA, NCCL, cuBLAS and cuDNN
ASLEEP = 1.5 * GIB  # what vLLM keeps on a GPU while asleep: CUDA graphs and workspaces
CPU_PROCESS = 0.85 * GIB  # of a CPU rank's process besides its tensors: imported libraries, gloo's buffers
CPU_ENGINE = 2.5 * GIB  # of all processes of the CPU engine before they load weights


@dataclass(frozen=True)
class Machine:
    """The hardware a run is planned for."""

    kind: Literal["gpu", "cpu"]
    bytes: float  # of one GPU, or of the entire host
    chunk_bytes: float  # of logits the chunked head may keep, see loss.inputs.CHUNK_BYTES
    where: str = ""  # where ``bytes`` comes from, human-readable

    @property
    def process(self) -> float:
        """Bytes of a rank's process besides its tensors."""
        return GPU_CONTEXT if self.kind == "gpu" else CPU_PROCESS


def host_bytes() -> float:
    """Bytes of memory this host may use: the machine's, or the cgroup's limit if that is lower."""
    total = float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            limit = Path(file).read_text(encoding="ascii").strip()
        except OSError:
            continue
        if limit.isdigit():
            total = min(total, float(limit))
    return total
