"""What a step's rollouts cost on their way: from an engine's host to rank 0, and from rank 0 to every rank.

    python examples/benchmarks/rollouts.py [--rollouts 512] [--tokens 8096] [--ranks 2 4] [--out FILE]

On loopback, every sender and receiver a process of its own: as arrays, which is how they travel, and as lists of
Python's numbers, MessagePack to rank 0 and pickled to the ranks. Seconds until the last receiver has them, the median
of several; MiB are the receiver's, at most while they arrive, and once they are there.
"""

from __future__ import annotations

import argparse
import gc
import os
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # this file is run, its siblings are imported

from examples.benchmarks.isolated import isolated, memory_kib
from examples.benchmarks.tables import show
from nemo_tropd.batch import Rollout
from nemo_tropd.parallel.agreement import PICKLED, World, on_rank_zero
from nemo_tropd.rollout.collective import ROLLOUTS
from nemo_tropd.rollout.vllm import wire as w

HEADER = ("from, to", "as", "bytes a token", "seconds", "MiB at most", "MiB then")
LIMIT_S = 600.0
VOCABULARY = 151_936
REPEATS = 3


@dataclass(frozen=True)
class Listed:
    """A rollout of lists, as they once were."""

    prompt_ids: list[int]
    prefix_ids: list[int]
    response_ids: list[int]
    response_log_probs: list[float]
    weight_version: int
    sequence_id: int
    prompt_index: int
    finished: bool


class GeneratedLists(w.Message):
    """As ``wire.Generated``."""

    rollouts: list[Listed]


@dataclass(frozen=True)
class Arrived:
    """What one receiver saw."""

    seconds: float
    most_mib: float
    held_mib: float


def made(kind: type[Rollout] | type[Listed], count: int, tokens: int) -> list[Any]:
    """Random rollouts, with log-probabilities of single precision, as vLLM's are."""
    draw = np.random.default_rng(1)

    def one(i: int) -> Any:
        ids = draw.integers(VOCABULARY, size=tokens).tolist()
        log_probs = (-draw.exponential(size=tokens)).astype(np.float32).tolist()
        return kind([1], [], ids, log_probs, 0, i, i, True)

    return [one(i) for i in range(count)]


def _kind(arrays: bool) -> type[Rollout] | type[Listed]:
    return Rollout if arrays else Listed


def _measured(arrive: Callable[[], Any]) -> Arrived:
    """``arrive`` a few times; a first small one is the caller's."""
    seconds, held = [], 0
    gc.collect()
    before = memory_kib("VmRSS")
    for _ in range(REPEATS):
        began = time.monotonic()
        rollouts = arrive()
        seconds.append(time.monotonic() - began)
        gc.collect()
        held = memory_kib("VmRSS")
        del rollouts
    return Arrived(median(seconds), (memory_kib("VmHWM") - before) / 1024, (held - before) / 1024)


def one_rank(rank: int, world_size: int, store: str, arrays: bool, size: tuple[int, int]) -> Arrived:
    """A rank's part in the broadcasts of rank 0's rollouts."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    rollouts = made(_kind(arrays), *size) if rank == 0 else []
    codec: Any = ROLLOUTS if arrays else PICKLED
    on_rank_zero(World(), lambda: rollouts[:1], codec=codec)

    def arrive() -> list[Any]:
        dist.barrier()
        return on_rank_zero(World(), lambda: rollouts, codec=codec)

    found = _measured(arrive)
    dist.barrier()
    dist.destroy_process_group()
    return found


def engine_host(port: int, arrays: bool, size: tuple[int, int]) -> None:
    """Answers with as many of its rollouts as it is asked for."""
    rollouts = made(_kind(arrays), *size)
    with socket.create_server(("127.0.0.1", port)) as listener:
        wire = w.Wire(listener.accept()[0])
    while isinstance(request := wire.receive(w.Request), w.Update):
        some = rollouts[: request.version]
        wire.send(w.Generated(w.Packed(some)) if arrays else GeneratedLists(some))
    wire.close()


def rank_zero(port: int, arrays: bool, count: int) -> Arrived:
    """Asks the engine's host."""
    deadline = time.monotonic() + LIMIT_S
    while True:
        try:
            wire = w.Wire(socket.create_connection(("127.0.0.1", port)))
            break
        except ConnectionRefusedError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)

    def arrive(asked: int = count) -> Sequence[Any]:
        wire.send(w.Update(asked))
        answer = wire.receive(w.Generated if arrays else GeneratedLists)
        assert len(answer.rollouts) == asked
        found: Sequence[Any] = answer.rollouts
        return found

    arrive(1)
    found = _measured(arrive)
    wire.send(w.Close())
    return found


def _together(*calls: Callable[[], Any]) -> list[Any]:
    with ThreadPoolExecutor(len(calls)) as pool:
        return [done.result() for done in [pool.submit(call) for call in calls]]


def from_host(arrays: bool, size: tuple[int, int]) -> Arrived:
    """Over TCP to rank 0."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    _, found = _together(
        lambda: isolated(engine_host, port, arrays, size, limit_s=LIMIT_S),
        lambda: isolated(rank_zero, port, arrays, size[0], limit_s=LIMIT_S),
    )
    return found


def to_ranks(world_size: int, arrays: bool, size: tuple[int, int]) -> Arrived:
    """Over gloo to every rank: the last one's seconds, the most memory of those that receive."""
    with tempfile.TemporaryDirectory() as folder:
        store = str(Path(folder) / "store")
        found = _together(
            *(
                lambda rank=rank: isolated(one_rank, rank, world_size, store, arrays, size, limit_s=LIMIT_S)
                for rank in range(world_size)
            )
        )
    others = found[1:]
    return Arrived(*(max(getattr(one, name) for one in others) for name in ("seconds", "most_mib", "held_mib")))


def rows(size: tuple[int, int], ranks: Sequence[int]) -> list[list[str]]:
    """Cells of the table."""
    found: list[list[str]] = []

    def add(way: str, name: str, content: int, one: Arrived) -> None:
        a_token = content / (size[0] * size[1])
        found.append([way, name, f"{a_token:.2f}", f"{one.seconds:.3f}", f"{one.most_mib:.0f}", f"{one.held_mib:.0f}"])

    for arrays, name in ((False, "lists"), (True, "arrays")):
        some = made(_kind(arrays), *size)
        message = w.Generated(w.Packed(some)) if arrays else GeneratedLists(some)
        add("engine host, rank 0", name, len(w.encode(message)), from_host(arrays, size))
        content = len((ROLLOUTS if arrays else PICKLED).encode(some))
        del some, message
        for world_size in ranks:
            add(f"rank 0, {world_size} ranks", name, content, to_ranks(world_size, arrays, size))
    return sorted(found, key=lambda row: [r[0] for r in found].index(row[0]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rollouts", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=8096, help="of each response")
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--out", type=Path, help="also write the table to this Markdown file")
    options = parser.parse_args()
    found = rows((options.rollouts, options.tokens), options.ranks)
    show(f"{options.rollouts} rollouts of {options.tokens} tokens", HEADER, found, options.out)


if __name__ == "__main__":
    main()
