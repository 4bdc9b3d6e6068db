"""A host of one rollout engine, on a machine (or a GPU) that trains nothing.

    python -m nemo_tropd.rollout.engine_host --join HOST:PORT --index I [--secret-file FILE]

One such process an engine; ``CUDA_VISIBLE_DEVICES`` chooses its GPU. HOST:PORT is the trainer's
``model.rollout.dedicated.address``, I counts from 0. The secret is the trainer's: in FILE, in NEMO_TROPD_SECRET or in
the file that NEMO_TROPD_SECRET_FILE names. The settings come from the trainer; the student's checkpoint must be
readable here under the same path. It exits with code 0 when the run is over; if the trainer stops or is lost (it may
resume from its last checkpoint) it waits ``--wait-s`` seconds for it, then exits with code 2. Asked to stop (SIGTERM,
SIGINT, SIGHUP) it stays as long as the trainer waits for rollouts after such a request, which may have gone to every
process of the job: until the trainer has left, or ten seconds. A second signal ends it at once.
"""

import argparse
import errno
import math
import os
import socket
import struct
import sys
import threading
import time
from pathlib import Path

import torch

from nemo_tropd.config import ConfigError
from nemo_tropd.files import name_compiler_cache
from nemo_tropd.parallel.signals import STOP, Stopped
from nemo_tropd.rollout.engine import EngineError, MemberEngine
from nemo_tropd.rollout.meeting import meeting_point
from nemo_tropd.rollout.secret import read_secret
from nemo_tropd.rollout.vllm import wire as w
from nemo_tropd.rollout.vllm.child import VllmEngine
from nemo_tropd.rollout.vllm.in_process import ColocatedEngine
from nemo_tropd.rollout.vllm.server import EngineMaker, EngineServer
from nemo_tropd.rollout.vllm.settings import EngineSettings, model_fingerprint

_RETRY_S = 0.5
_CONNECT_TIMEOUT_S = 10.0
_GREETING_TIMEOUT_S = 30.0


def own_engine(settings: EngineSettings, threads: int, answer_timeout_s: float) -> MemberEngine:
    """vLLM: in this process on a GPU; else in a child process, since a CPU engine's threads are set by variables that
    must be there before Python starts."""
    if torch.cuda.is_available():
        return ColocatedEngine(settings, sleeps=False)
    return VllmEngine(settings, threads=threads, answer_timeout_s=answer_timeout_s)


def serve(join: tuple[str, int], index: int, make_engine: EngineMaker, *, secret: bytes, wait_s: float) -> None:
    """Host ``index``'s life: returns when the trainer has said that the run is over. Raises EngineError if no trainer
    that has the secret listens for ``wait_s`` seconds, or it refuses this host; Stopped if it was asked to stop and no
    trainer is connected."""
    server = EngineServer(make_engine, local=False)
    try:
        while not server.serve(_join(join, index, secret, wait_s)):
            print("waiting for rank 0 to listen again", flush=True)
    finally:
        server.close()


def _join(join: tuple[str, int], index: int, secret: bytes, wait_s: float) -> w.Wire:
    deadline, shown = time.monotonic() + wait_s, ""
    while True:
        if STOP:
            raise Stopped("asked to stop")
        try:
            return _introduced(w.Wire(_connect(join)), index, secret)
        except (w.Disconnected, OSError) as error:
            reason = getattr(error, "strerror", None) or str(error)
        if time.monotonic() > deadline:
            raise EngineError(
                f"no trainer with this host's secret listened at {join[0]}:{join[1]} for {wait_s:g} s ({reason}); is "
                "that its model.rollout.dedicated.address, and does it run with model.rollout.placement=dedicated?"
            )
        if reason != shown:
            print(f"cannot join {join[0]}:{join[1]} yet: {reason}", flush=True)
            shown = reason
        time.sleep(_RETRY_S)


def _connect(join: tuple[str, int]) -> socket.socket:
    connection = socket.create_connection(join, timeout=_CONNECT_TIMEOUT_S)
    if connection.getsockname() == connection.getpeername():
        # Nobody listens at a port of this machine that the kernel also gives to clients, and it gave it to this one:
        # which then talks to itself, and the trainer cannot listen there. Reset, the port is free at once.
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.close()
        raise ConnectionRefusedError(errno.ECONNREFUSED, os.strerror(errno.ECONNREFUSED))
    return connection


def _introduced(wire: w.Wire, index: int, secret: bytes) -> w.Wire:
    """Raises EngineError if the trainer refuses this host, Disconnected or TimeoutError if there is no trainer."""
    try:
        wire.prove(secret, listening=False, timeout_s=_GREETING_TIMEOUT_S)
        greeting = wire.receive(w.Greeting, timeout_s=_GREETING_TIMEOUT_S, most_bytes=w.GREETING_BYTES)
        model = model_fingerprint(Path(greeting.model_dir)) if greeting.protocol == w.PROTOCOL else ""
        device = "cuda" if torch.cuda.is_available() else "cpu"
        wire.send(w.Hello(w.PROTOCOL, index, device, socket.gethostname(), os.getpid(), model))
        answer = wire.receive(w.Done | w.Failed, timeout_s=_GREETING_TIMEOUT_S, most_bytes=w.GREETING_BYTES)
        if isinstance(answer, w.Failed):
            raise EngineError(f"rank 0 refused this host: {answer.error}")
    except BaseException:
        wire.close()
        raise
    return wire


def _leave_when_overdue() -> None:
    while not STOP.overdue:
        time.sleep(_RETRY_S)
    assert STOP.signal is not None
    print("asked to stop, and the trainer has not left: exiting", file=sys.stderr, flush=True)
    os._exit(128 + STOP.signal)


def _index(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r}: give a number from 0 to engines - 1")
    return int(text)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 <= seconds < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r}: give a number of seconds, of at least 0")
    return seconds


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line; ``join`` is host and port. Raises ConfigError for an address that there cannot be."""
    parser = argparse.ArgumentParser(prog="python -m nemo_tropd.rollout.engine_host", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--join", required=True, metavar="HOST:PORT", help="model.rollout.dedicated.address")
    parser.add_argument("--index", required=True, type=_index, metavar="I", help="from 0 to engines - 1, each once")
    parser.add_argument("--secret-file", metavar="FILE", help="has the secret that the trainer has, too")
    wait = "seconds to wait for the trainer to listen (default %(default)g)"
    parser.add_argument("--wait-s", type=_seconds, default=3600.0, help=wait)
    given = parser.parse_args(arguments)
    given.join = meeting_point("--join", given.join)
    return given


def main() -> None:
    STOP.install()
    try:
        _host(parse(sys.argv[1:]))
    except Stopped:
        assert STOP.signal is not None
        raise SystemExit(128 + STOP.signal) from None
    except (ConfigError, EngineError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        raise SystemExit(2) from None


def _host(given: argparse.Namespace) -> None:
    name_compiler_cache()
    # vLLM's own NCCL group would end this process if the trainer is lost during a broadcast; it is to wait for it.
    os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "0")
    threading.Thread(target=_leave_when_overdue, name="stop", daemon=True).start()
    secret = read_secret(given.secret_file)
    serve(given.join, given.index, own_engine, secret=secret, wait_s=given.wait_s)


if __name__ == "__main__":
    main()
