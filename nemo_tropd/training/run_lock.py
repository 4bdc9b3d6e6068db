"""One run, one directory: rank 0 locks it for its life, and every rank must see the same directory."""

import fcntl
import os
import secrets
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nemo_tropd.config import ConfigError
from nemo_tropd.parallel.topology import Topology

NAME = ".lock"
_ENDING_S = 3.0  # a process that was killed may still hold its lock for a moment
_SEEN_S = 15.0  # file systems of networks show new files late


@contextmanager
def run_lock(directory: Path, key: str) -> Iterator[None]:
    """Hold ``directory``, which is made if need be; ``key`` names it in the configuration. The lock (flock) ends with
    the process, however that ends. Where the file system has none, a line says that nothing keeps a second run out.
    Raises ConfigError if another process holds it, or nothing can be written there."""
    path = directory / NAME
    try:
        directory.mkdir(parents=True, exist_ok=True)
        file = path.open("a+", encoding="utf-8")
    except OSError as error:
        raise ConfigError(key, str(directory), f"cannot be made or written to: {error}") from error
    with file:
        _take(file.fileno(), path, key)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()} {secrets.token_hex(8)}\n")
        file.flush()
        yield


def _take(handle: int, path: Path, key: str) -> None:
    deadline = time.monotonic() + _ENDING_S
    while True:
        try:
            return fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() < deadline:
                time.sleep(0.1)
                continue
            owner = path.read_text(encoding="utf-8").rpartition(" ")[0] or "another process"
            why = f"{owner} is running in this directory: wait for it, stop it, or choose another"
            raise ConfigError(key, str(path.parent), why) from None
        except OSError as error:
            return print(f"{path} cannot be locked ({error}): nothing keeps a second run out of it", flush=True)


def check_shared(directory: Path, key: str, topology: Topology) -> None:
    """Refuse a directory that is not the same on every rank (collective). Call it while rank 0 holds the lock. Raises
    ConfigError on every rank; names the ranks that see another directory, and their hosts."""
    path = directory / NAME
    held = topology.broadcast_object(path.read_text(encoding="utf-8") if topology.is_leader else "")
    deadline = time.monotonic() + _SEEN_S
    while not (seen := _sees(path, held)) and time.monotonic() < deadline:
        time.sleep(0.2)
    found = topology.gather_objects((seen, socket.gethostname()))
    blind = [f"rank {rank} on {host}" for rank, (sees, host) in enumerate(found) if not sees]
    if blind:
        why = f"rank 0 on {found[0][1]} writes there, but does not share it with {', '.join(blind)}"
        raise ConfigError(key, str(directory), f"{why}: give a directory that all nodes share")


def _sees(path: Path, held: str) -> bool:
    try:
        return path.read_text(encoding="utf-8") == held
    except OSError:
        return False
