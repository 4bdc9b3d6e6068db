"""The server of one engine: does what the trainer asks over a ``Wire``, in a child process or on an engine host.

``python -m nemo_tropd.rollout.vllm.server FD`` is the child process that ``child.VllmEngine`` starts, never a person:
it keeps vLLM away from the trainer's distributed group, thread settings, signals and CPU shims, and makes the engine's
death an ordinary event. ``rollout.engine_host`` is the life of an engine host.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from nemo_tropd.rollout.engine import EngineError, RolloutEngine, WeightStreamError
from nemo_tropd.rollout.vllm.settings import EngineSettings
from nemo_tropd.rollout.vllm.wire import (
    Bucket,
    Close,
    Disconnected,
    Done,
    Failed,
    Finish,
    Generate,
    Generated,
    JoinGroup,
    Open,
    Reply,
    Request,
    Update,
    Wire,
    decode,
)
from nemo_tropd.rollout.weights.broadcast import WeightGroup, empty_bucket, join_store, take_apart
from nemo_tropd.rollout.weights.shared_memory import read_bucket

# (settings, OpenMP threads, seconds an answer may take) -> an engine that is not started
EngineMaker = Callable[[EngineSettings, int, float], RolloutEngine]


class EngineServer:
    """One engine and the operations the trainer may ask for. The engine outlives a lost trainer."""

    def __init__(self, make_engine: EngineMaker, *, local: bool) -> None:
        """``local``: the trainer is on this machine, and may name files in which weights are."""
        self._make_engine, self._local = make_engine, local
        self._engine: RolloutEngine | None = None
        self._made_of: Open | None = None
        self._group: WeightGroup | None = None

    def serve(self, wire: Wire) -> bool:
        """Do what the trainer asks until it says that the run is over (True) or is gone (False)."""
        try:
            while True:
                request = wire.receive(Request)
                if isinstance(request, Close):
                    return True
                wire.send(self._reply(wire, request))
        except Disconnected as error:
            print(f"lost the connection to rank 0: {error}", flush=True)
            return False
        except TimeoutError as error:
            print(f"rank 0 began a message and did not finish it: {error}", flush=True)
            return False
        finally:
            self._leave_group()
            wire.close()

    def close(self) -> None:
        """End the engine and leave the group."""
        self._leave_group()
        self._end_engine()

    def _reply(self, wire: Wire, request: Request) -> Reply:
        try:
            return self._do(wire, request)
        except BaseException as error:
            self._end_engine()  # whatever it was doing is half done
            if isinstance(error, (Disconnected, TimeoutError)) or not isinstance(error, Exception):
                raise
            traceback.print_exc()
            if isinstance(error, EngineError):
                return Failed(type(error).__name__, str(error))
            return Failed("EngineError", f"{type(error).__name__}: {error}")

    def _do(self, wire: Wire, request: Request) -> Reply:
        if isinstance(request, Generate):
            return Generated(self._running().generate(request.requests))
        if isinstance(request, Open):
            self._open(request)
        elif isinstance(request, JoinGroup):
            self._join_group(wire, request)
        elif isinstance(request, Update):
            self._running().update_weights(self._received(wire), request.version)
        else:
            raise EngineError(f"rank 0 sent {type(request).__name__} outside of an update of the weights")
        return Done()

    def _open(self, request: Open) -> None:
        if self._engine is not None and self._made_of == request:
            return  # its weights are refreshed before it generates
        self._end_engine()
        settings = decode(bytes(request.settings), EngineSettings)
        self._engine, self._made_of = self._make_engine(settings, request.threads, request.answer_timeout_s), request
        self._engine.start()

    def _join_group(self, wire: Wire, request: JoinGroup) -> None:
        self._group = WeightGroup(
            join_store(request.address, request.port, request.timeout_s),
            prefix=request.prefix,
            rank=request.rank,
            size=request.size,
            device="cuda" if torch.cuda.is_available() else "cpu",
            own_address=wire.own_address,
            timeout_s=request.timeout_s,
        )

    def _received(self, wire: Wire) -> Iterator[tuple[str, Tensor]]:
        """The stream of weights, as rank 0 sends it."""
        while True:
            bucket = wire.receive(Bucket | Finish)
            if isinstance(bucket, Finish):
                return
            if bucket.path is None:
                flat = self._broadcast_into(bucket)
                wire.send(Done())
                yield from take_apart(bucket, flat)
            elif self._local:
                yield from read_bucket(bucket.path)
                wire.send(Done())
            else:
                raise WeightStreamError("rank 0 named a file of weights, but it is another machine")

    def _broadcast_into(self, bucket: Bucket) -> Tensor:
        if self._group is None:
            raise WeightStreamError("weights were announced before JoinGroup")
        flat = empty_bucket(bucket, self._group.device)
        self._group.start_broadcast(flat)
        self._group.finish_broadcast()
        return flat

    def _running(self) -> RolloutEngine:
        if self._engine is None:
            raise EngineError("the engine is not running")
        return self._engine

    def _end_engine(self) -> None:
        engine, self._engine, self._made_of = self._engine, None, None
        if engine is not None:
            engine.close()

    def _leave_group(self) -> None:
        group, self._group = self._group, None
        if group is not None:
            group.close()


def _own_engine(settings: EngineSettings, threads: int, answer_timeout_s: float) -> RolloutEngine:
    from nemo_tropd.rollout.vllm.in_process import ColocatedEngine

    return ColocatedEngine(settings, sleeps=False)


def _end_session() -> None:
    """End this process and every worker vLLM started: they share a session of their own, led by this process."""
    sys.stdout.flush()
    sys.stderr.flush()
    if os.getpgid(0) == os.getpid():
        os.killpg(os.getpid(), signal.SIGKILL)
    os._exit(1)


def main() -> None:
    """Serve rank 0 of this machine until it closes the connection, however it went."""
    fd = int(sys.argv[1])
    os.set_inheritable(fd, False)
    wire = Wire(socket.socket(fileno=fd))

    def watch() -> None:
        wire.wait_lost()
        _end_session()

    threading.Thread(target=watch, daemon=True).start()
    try:
        EngineServer(_own_engine, local=True).serve(wire)
    except BaseException:
        traceback.print_exc()
    _end_session()


if __name__ == "__main__":
    main()
