"""Run a function in several gloo processes on this machine, under a deadline."""

from __future__ import annotations

import contextlib
import datetime
import multiprocessing
import os
import pickle
import signal
import socket
import threading
import time
import traceback
from collections.abc import Callable
from multiprocessing import forkserver, reduction
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any
from unittest import mock

import torch

from tests.ports import free_port
from tests.random_inputs import start_generators

GRACE_S = 2.0  # after a first failure, for the other ranks' own tracebacks


class DistributedFailure(AssertionError):
    """A rank raised, died or was too slow; the text names it."""


def run_distributed(
    fn: Callable[..., Any],
    world_size: int,
    *args: Any,
    timeout_s: float = 120,
    init_gloo: bool = True,
    fresh: bool = False,
) -> list[Any]:
    """Call ``fn(rank, world_size, *args)`` in ``world_size`` processes of its own; return what they returned, by rank.

    ``fn`` is a module-level function, ``args`` and results are picklable (tensors travel by value). Each process has
    RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT, one torch thread, generators started from
    torch's seed here and its rank, and a default gloo process group that is already up (``init_gloo=False`` leaves that
    to ``fn``). It is a fork of a server that has imported ``rank_imports`` and done nothing else; ``fresh`` starts an
    interpreter instead, for what is read from the environment when a library is imported. All processes and whatever
    they started are killed ``timeout_s`` after their start or soon after the first failure. Raises DistributedFailure
    naming the rank.
    """
    context = process_context(fresh)
    port = free_port()
    processes: list[Any] = []
    pipes: list[Connection] = []
    try:
        for rank in range(world_size):
            ours, theirs = context.Pipe(duplex=False)
            values = child_environment(rank, world_size, port)
            call = (theirs, fn, rank, world_size, args, timeout_s, init_gloo)
            # Unpickled first of all: what ``fn``'s module reads and prints when it is imported is then right, too.
            surroundings = _Surroundings({**os.environ, **values}, f"{torch.initial_seed()} {rank}")
            process = context.Process(target=_child, args=(surroundings, *call), name=f"rank{rank}")
            with mock.patch.dict(os.environ, values):
                process.start()  # the first one waits for the server's imports
            theirs.close()
            processes.append(process)
            pipes.append(ours)
        return _collect(processes, pipes, time.monotonic() + timeout_s, timeout_s)
    finally:
        for process in processes:
            _kill(process)
        for pipe in pipes:
            pipe.close()


def process_context(fresh: bool = False) -> Any:
    """Of multiprocessing: forks of the warm server, or interpreters."""
    if fresh:
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.dist.rank_imports"])
    # Read when torch is imported; a pool of threads would not be forked.
    with mock.patch.dict(os.environ, {"OMP_NUM_THREADS": "1"}):
        forkserver.ensure_running()
    return context


class _Surroundings:
    """The caller's environment and streams: a process that unpickles this has them, and generators of its own."""

    def __init__(self, values: dict[str, str], seed: str) -> None:
        self.values, self.seed = values, seed

    def __reduce__(self) -> tuple[Any, ...]:
        return _enter, (self.values, self.seed, reduction.DupFd(1), reduction.DupFd(2))


def _enter(values: dict[str, str], seed: str, *streams: Any) -> None:
    os.environ.clear()
    os.environ.update(values)
    for target, stream in enumerate(streams, start=1):
        if (given := stream.detach()) != target:
            os.dup2(given, target)
            os.close(given)
    start_generators(seed)


def _collect(processes: list[BaseProcess], pipes: list[Connection], deadline: float, timeout_s: float) -> list[Any]:
    results: dict[int, Any] = {}
    failures: list[str] = []
    waiting = {pipe: rank for rank, pipe in enumerate(pipes)}
    while waiting:
        ready = wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            break
        for pipe in ready:
            assert isinstance(pipe, Connection)
            rank = waiting.pop(pipe)
            try:
                ok, payload = pickle.loads(pipe.recv_bytes())
            except EOFError:
                processes[rank].join(GRACE_S)
                ok, payload = False, f"died without a word, exit code {processes[rank].exitcode}"
            if ok:
                results[rank] = payload
            else:
                failures.append(f"rank {rank}: {payload}")
                deadline = min(deadline, time.monotonic() + GRACE_S)
    if failures:
        raise DistributedFailure("\n".join(failures))
    if waiting:
        raise DistributedFailure(f"after {timeout_s:g} s still running: ranks {sorted(waiting.values())}")
    return [results[rank] for rank in range(len(pipes))]


def _child(
    surroundings: None,
    pipe: Connection,
    fn: Callable[..., Any],
    rank: int,
    world_size: int,
    args: tuple[Any, ...],
    timeout_s: float,
    init_gloo: bool,
) -> None:
    os.setsid()  # one process group a rank, so that its own children end with it
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    try:
        if init_gloo:
            torch.distributed.init_process_group("gloo", timeout=datetime.timedelta(seconds=timeout_s))
        message = (True, fn(rank, world_size, *args))
        payload = pickle.dumps(message)
    except BaseException:
        payload = pickle.dumps((False, traceback.format_exc()))
    pipe.send_bytes(payload)
    pipe.close()
    # A peer may still read from this rank's half of a connection: leave together where that is possible.
    if init_gloo and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.killpg(os.getpgid(0), signal.SIGKILL)


def _kill(process: BaseProcess) -> None:
    if process.pid is None:
        return
    if process.is_alive():
        process.join(0.5)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()  # it may have been too young to have a group
    process.join()


def child_environment(rank: int, world_size: int, port: int) -> dict[str, str]:
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",
    }


