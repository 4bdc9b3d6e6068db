"""The server of one engine: does what the trainer asks over a ``Wire``, in a child process or on an engine host.

The child process keeps vLLM away from the trainer's distributed group, thread settings, signals and CPU shims, and
makes the engine's death an ordinary event. ``rollout.engine_host`` is the life of an engine host.
"""

from __future__ import annotations

import socket
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

from safetensors.torch import load_file
from torch import Tensor

from nemo_tropd.batch import Rollout
from nemo_tropd.rollout.engine import Abandoned, EngineError, MemberEngine, RolloutRequest, WeightStreamError
from nemo_tropd.rollout.vllm import wire as w
from nemo_tropd.rollout.vllm.in_process import ColocatedEngine
from nemo_tropd.rollout.vllm.settings import EngineSettings
from nemo_tropd.rollout.weights.senders import WeightGroup

# (settings, OpenMP threads, seconds an answer may take) -> an engine that is not started
EngineMaker = Callable[[EngineSettings, int, float], MemberEngine]


@dataclass(eq=False)
class EngineServer:
    """One engine and the operations the trainer may ask for. The engine outlives a lost trainer."""

    make_engine: EngineMaker
    local: bool  # the trainer is on this machine, and may name files in which weights are
    _engine: MemberEngine | None = None
    _made_of: w.Open | None = None
    _group: WeightGroup | None = None

    def serve(self, wire: w.Wire) -> bool:
        """Do what the trainer asks until it says that the run is over (True) or is gone (False)."""
        try:
            while not isinstance(request := wire.receive(w.Request), w.Close):
                if not isinstance(request, (w.More, w.Abandon)):  # for a call that has ended meanwhile
                    wire.send(self._reply(wire, request))
            return True
        except (w.Disconnected, TimeoutError) as error:
            print(f"lost the connection to rank 0: {error}", flush=True)
            return False
        finally:
            if self._group is not None:
                self._group.close()
                self._group = None
            wire.close()

    def close(self) -> None:
        """End the engine."""
        engine, self._engine, self._made_of = self._engine, None, None
        if engine is not None:
            engine.close()

    def _reply(self, wire: w.Wire, request: w.Request) -> w.Reply:
        try:
            return self._do(wire, request)
        except BaseException as error:
            self.close()  # whatever it was doing is half done
            if isinstance(error, (w.Disconnected, TimeoutError)) or not isinstance(error, Exception):
                raise
            traceback.print_exc()
            kind = type(error).__name__
            known = isinstance(error, EngineError)
            return w.Failed(kind, str(error)) if known else w.Failed("EngineError", f"{kind}: {error}")

    def _do(self, wire: w.Wire, request: w.Request) -> w.Reply:
        match request:
            case w.Open():
                self._open(request)
            case w.JoinGroup():
                self._group = WeightGroup.join(request, own_address=wire.own_address)
            case w.Generate():
                return self._generate(wire, request)
            case w.Update():
                self._running().update_weights(self._received(wire), request.version)
            case _:
                raise EngineError(f"rank 0 sent {type(request).__name__} outside of an update of the weights")
        return w.Done()

    def _generate(self, wire: w.Wire, request: w.Generate) -> w.Generated:
        trainer = _Waiting(wire, request.more)
        told = partial(_send_part, wire) if request.in_parts else None
        further = trainer.further if request.more else None
        try:
            rollouts = self._running().generate(request.requests, told, further, trainer.wants)
        except Abandoned as error:
            print(error, flush=True)
            return w.Generated(w.Packed())
        return w.Generated(w.Packed() if request.in_parts else w.Packed(rollouts))

    def _open(self, request: w.Open) -> None:
        if self._engine is not None and self._made_of == request:
            return  # its weights are refreshed before it generates
        self.close()
        settings = w.decode(bytes(request.settings), EngineSettings)
        self._engine, self._made_of = self.make_engine(settings, request.threads, request.answer_timeout_s), request
        self._engine.start()

    def _received(self, wire: w.Wire) -> Iterator[tuple[str, Tensor]]:
        """The stream of weights, as rank 0 sends it."""
        while not isinstance(bucket := wire.receive(w.Bucket | w.Finish), w.Finish):
            if bucket.path is not None:
                if not self.local:
                    raise WeightStreamError("rank 0 named a file of weights, but it is another machine")
                tensors = load_file(bucket.path)  # mapped; a removed file lives as long as that
            elif self._group is None:
                raise WeightStreamError("weights were announced before JoinGroup")
            else:
                tensors = self._group.receive(bucket)
            wire.send(w.Done())
            yield from tensors.items()

    def _running(self) -> MemberEngine:
        if self._engine is None:
            raise EngineError("the engine is not running")
        return self._engine


def _send_part(wire: w.Wire, rollout: Rollout) -> None:
    """To a trainer that may be gone: which is found out between two steps."""
    with suppress(w.Disconnected):
        wire.send(w.Part(w.Packed([rollout])))


class _Waiting:
    """The trainer while the engine generates for it: whether it waits, and what it asks for in addition if ``more`` may
    come."""

    def __init__(self, wire: w.Wire, more: bool) -> None:
        self._wire, self._over, self._waits = wire, not more, True
        self._further: list[RolloutRequest] = []

    def wants(self) -> bool:
        """Not once it is gone, or has said so."""
        while self._waits and self._wire.wait_readable(0.0):
            self._read()
        return self._waits

    def further(self, wait: bool) -> list[RolloutRequest] | None:
        """``engine.Further``; None from a trainer that does not wait."""
        while self.wants() and wait and not (self._over or self._further):
            self._read()
        some, self._further = self._further, []
        return some if some or (self._waits and not self._over) else None

    def _read(self) -> None:
        try:
            message: w.More | w.Abandon = self._wire.receive(w.More | w.Abandon)
        except (w.Disconnected, TimeoutError):
            self._waits = False
            return
        if isinstance(message, w.Abandon):
            self._waits = False
        else:
            self._further += message.requests
            self._over = message.last


def serve_owner(fd: int) -> None:
    """The life of the child process, over its end of a socket pair."""
    server = EngineServer(lambda settings, *_: ColocatedEngine(settings, sleeps=False), local=True)
    server.serve(w.Wire(socket.socket(fileno=fd)))
