"""The machine a run is planned for, and the memory a plan may use."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

GIB = 2**30
FRAGMENTATION = 0.04  # share of a GPU's memory that torch's allocator loses
# Estimated, until a GPU has shown them:
GPU_CONTEXT = 1.5 * GIB  # of a GPU rank's process before its first tensor: CUDA, cuBLAS and cuDNN
NCCL_GROUP = 0.25 * GIB  # a communicator's buffers
ENGINE_WORKSPACE = 3.0 * GIB  # of an engine's share of a GPU: activations of its longest step, sampling, libraries
HOST_RANK = 5.0 * GIB  # host memory of a GPU rank's process: imported libraries, CUDA's and vLLM's pinned buffers
HOST_ENGINE = 5.0 * GIB  # of an engine's own process on a GPU host, for each of its GPUs
CPU_PROCESS = 0.85 * GIB  # of a CPU rank's process besides its tensors: imported libraries, gloo's buffers
CPU_ENGINE = 2.5 * GIB  # of all processes of the CPU engine before they load weights


@dataclass(frozen=True)
class Machine:
    """The hardware a run is planned for."""

    kind: Literal["gpu", "cpu"]
    bytes: float  # of one GPU, or of the entire host
    chunk_bytes: float  # of logits the chunked head may keep, see loss.inputs.CHUNK_BYTES
    where: str = ""  # where ``bytes`` comes from, human-readable
    host: float | None = None  # bytes of a GPU node's host; None: of another machine, so nothing is refused by it

    @property
    def process(self) -> float:
        """Bytes of a rank's process besides its tensors and communicators."""
        return GPU_CONTEXT if self.kind == "gpu" else CPU_PROCESS


def graphs_bytes(tensor: int) -> float:
    """What vLLM holds on a GPU beside its share, asleep or awake: CUDA graphs and workspaces; over several GPUs also
    its own communicators and buffers of its all-reduce (NeMo-RL's issue 223: 0.8 GB on one GPU, up to 7.4 on two)."""
    return 1.5 * GIB if tensor == 1 else 3.0 * GIB


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
