"""Megatron writes checkpoints here in the rank's own process, from memory that is free again afterwards.

Its own writer forks a process with threads, waits without a limit even for killed children, and collects their results
through a manager process that a signal to the process group ends (with a stop's own save) and that outlives the rank.
"""

import queue
from typing import Any

from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

_FORKING, _COPYING = "write_preloaded_data_multiproc", "preload_tensors"


def write_in_this_process() -> None:
    """Replace Megatron's processes, for all saves of this process that follow. megatron-core 0.19 writes with threads;
    of its processes only the manager is left."""
    filesystem_async._results_queue = queue.Queue()
    if hasattr(FileSystemWriterAsync, _FORKING):
        setattr(FileSystemWriterAsync, _FORKING, staticmethod(_write))
    setattr(FileSystemWriterAsync, _COPYING, staticmethod(_to_host))


def _to_host(buckets: list[Any], non_blocking: bool = True) -> list[Any]:
    """In the place of ``preload_tensors``, whose copies torch page-locks: up to double the size, and it keeps them."""
    return [
        (path, key, (objects, [(item, tensor.to("cpu")) for item, tensor in tensors]))
        for path, key, (objects, tensors) in buckets
    ]


def _write(transforms: list[Any], use_msc: bool, rank: int, buckets: list[Any], results: queue.Queue[Any]) -> None:
    """In the place of ``write_preloaded_data_multiproc``: one bucket, a file, after the other."""
    written: dict[int, Any] = {}
    for i, bucket in enumerate(buckets):
        answer: queue.Queue[Any] = queue.Queue()
        pending: queue.Queue[int] = queue.Queue()
        pending.put(i)
        FileSystemWriterAsync.write_preloaded_data(transforms, i, bucket, answer, pending, use_fsync=True)
        _, outcome = answer.get()
        if isinstance(outcome, Exception):
            results.put(outcome)
            return
        written[i] = outcome
    results.put(written)
