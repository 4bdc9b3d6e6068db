"""Rollout engines on hosts of their own: the trainer's side (``rollout.engine_host`` is the other).

Rank 0 listens at an address. Every host connects to it, both prove the shared secret, the host says who it is and is
admitted or refused; then it is given its settings and starts an engine. Connections are greeted side by side, each
within a deadline, so that none can keep the others waiting.
"""

from __future__ import annotations

import secrets
import socket
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import NoReturn

import torch

from nemo_tropd.batch import Rollout
from nemo_tropd.rollout.engine import EngineDied, EngineError, RolloutRequest
from nemo_tropd.rollout.vllm.remote import GRACE_S, Member, RemoteEngine
from nemo_tropd.rollout.vllm.settings import EngineSettings, model_fingerprint
from nemo_tropd.rollout.vllm.wire import (
    GREETING_BYTES,
    PROTOCOL,
    Close,
    Disconnected,
    Done,
    Failed,
    Greeting,
    Hello,
    JoinGroup,
    Wire,
)
from nemo_tropd.rollout.weights.broadcast import Broadcast, WeightGroup, open_store

_GREETING_TIMEOUT_S = 10.0
_ACCEPT_POLL_S = 0.2
_GREETED_AT_ONCE = 64
_SHOWN = 20  # refusals, after which a flood of strangers is only counted


class _Door:
    """Admits hosts while it is open. ``joined`` has them by index."""

    def __init__(self, engines: DedicatedEngines, secret: bytes) -> None:
        self.joined: dict[int, Member] = {}
        self.refused = 0
        self._engines, self._secret = engines, secret
        self._model = model_fingerprint(engines.settings.model_dir)
        self._lock = threading.Lock()
        self._greeted: set[Wire] = set()
        self._closed = False

    def greet(self, connected: socket.socket, address: str) -> None:
        """Greet a new connection, in a thread of its own."""
        wire = Wire(connected)
        with self._lock:
            full = len(self._greeted) >= _GREETED_AT_ONCE
            if not full:
                self._greeted.add(wire)
        if full:
            wire.close()
            self._say(address, f"{_GREETED_AT_ONCE} others are being greeted")
        else:
            threading.Thread(target=self._greet, args=(wire, address), daemon=True).start()

    def forget_lost(self) -> None:
        """Drop hosts that have gone again."""
        with self._lock:
            for member in [m for m in self.joined.values() if m.wire.lost()]:
                member.wire.close()
                del self.joined[member.index]

    def close(self) -> list[Member]:
        """Admit nobody any more; the hosts that have joined, by index."""
        with self._lock:
            self._closed = True
            for wire in self._greeted:
                wire.close()
            return [self.joined[i] for i in sorted(self.joined)]

    def _greet(self, wire: Wire, address: str) -> None:
        deadline = time.monotonic() + _GREETING_TIMEOUT_S

        def left() -> float:
            return deadline - time.monotonic()

        refusal: str | None
        try:
            wire.prove(self._secret, listening=True, timeout_s=left())
            wire.send(Greeting(PROTOCOL, str(self._engines.settings.model_dir.absolute())), left())
            hello = wire.receive(Hello, timeout_s=left(), most_bytes=GREETING_BYTES)
            with self._lock:
                refusal = self._engines.refusal(hello, self._model, self.joined)
                if refusal is None:
                    wire.send(Done(), left())
                    name = f"engine host {hello.index} (process {hello.process} on {hello.host[:64]!r})"
                    self._greeted.discard(wire)  # before anybody sees it closed
                    if not self._closed:
                        self.joined[hello.index] = Member(hello.index, name, wire)
                        print(f"{name} joined", flush=True)
                        return
                    refusal = "all hosts have joined"
            with suppress(Disconnected):
                wire.send(Failed("EngineError", refusal), max(1.0, left()))
        except (Disconnected, TimeoutError, ValueError) as error:
            refusal = str(error)
        with self._lock:
            self._greeted.discard(wire)
            closed = self._closed
        wire.close()
        if not closed:
            self._say(address, refusal)

    def _say(self, address: str, reason: str) -> None:
        with self._lock:  # print() writes a line and its end apart: two threads' lines would run into one
            self.refused += 1
            if self.refused <= _SHOWN:
                print(f"refused a connection from {address}: {reason}", flush=True)
            elif self.refused == _SHOWN + 1:
                print("refused more connections, which are not shown", flush=True)


class DedicatedEngines(RemoteEngine):
    """A ``RolloutEngine`` of many hosts. If one fails all are let go, and those that live join the next one."""

    def __init__(
        self,
        settings: EngineSettings,
        *,
        address: tuple[str, int],
        engines: int,
        secret: bytes,
        threads: int = 1,
        bucket_mib: int = 256,
        timeout_s: float = 300.0,
        answer_timeout_s: float = 3600.0,
    ) -> None:
        """Settings only; nothing is opened.

        ``address``: host and port to listen at; on no other interface than that host's.
        ``engines``: hosts, whose indices are 0 to ``engines`` - 1. ``secret``: what they must know.
        ``threads``: OpenMP threads of an engine on CPU.
        ``bucket_mib``: size of a bucket of weights; rank 0 and hosts hold up to two.
        ``timeout_s``: for all hosts to join, and for a bucket of weights.
        ``answer_timeout_s``: for the rollouts of one call.
        """
        super().__init__(
            settings, threads=threads, bucket_mib=bucket_mib, timeout_s=timeout_s, answer_timeout_s=answer_timeout_s
        )
        if engines < 1:
            raise EngineError(f"engines is {engines}; it must be at least 1")
        self._address, self._count, self._secret = address, engines, secret
        self._device = "cuda" if torch.cuda.is_available() else "cpu"  # of the hosts, too
        self._start_timeout_s = 600.0
        self._refreshed = False  # whether the hosts' weights have come from here

    def start(self) -> None:
        """Wait for every host to join, and for its engine to start.

        Raises EngineError naming the indices that did not join, or the host whose engine could not start.
        """
        if self._members:
            raise EngineError("the engines are running; close them before they are started again")
        self._members, self._refreshed = self._gather(), False
        try:
            self._open(self._start_timeout_s)
            self._join_group()
        except BaseException:
            self._let_go()
            raise

    def generate(self, requests: Sequence[RolloutRequest]) -> list[Rollout]:
        """See ``RolloutEngine.generate``."""
        if self._members and not self._refreshed and requests:
            raise EngineError("the engine hosts have not received weights yet: call update_weights() before generate()")
        return super().generate(requests)

    def close(self, *, run_over: bool = False) -> None:
        """Leave the hosts, which wait for the trainer to come back; if the run is over they are told to exit."""
        for member in self._members if run_over else ():
            with suppress(Disconnected):
                member.wire.send(Close())
        self._let_go()

    def refusal(self, hello: Hello, model: str, joined: dict[int, Member]) -> str | None:
        """Why the host that said ``hello`` is not admitted beside those that ``joined``; None if it is."""
        index, path = hello.index, self.settings.model_dir.absolute()
        if hello.protocol != PROTOCOL:
            return (
                f"the trainer has version {PROTOCOL} of the protocol and this host version {hello.protocol}; run the "
                "same nemo_tropd on all hosts"
            )
        if not 0 <= index < self._count:
            return f"--index {index}: model.rollout.dedicated.engines is {self._count}, so use 0 to {self._count - 1}"
        if hello.device != self._device:
            return f"the trainer computes on {self._device} and this host on {hello.device[:16]!r}; use one kind"
        if hello.model != model:
            what = f"has another model than the trainer's at {path}" if hello.model else f"has no checkpoint at {path}"
            return f"--index {index} {what}; copy the student's checkpoint to that path of the host"
        if index in joined and not joined[index].wire.lost():
            return f"--index {index} is taken by {joined[index]}"
        return None

    def _gather(self) -> list[Member]:
        host, port = self._address
        try:
            family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
            listener = socket.create_server((host, port), family=family)
        except OSError as error:
            raise EngineError(
                f"cannot listen for engine hosts at {host}:{port} ({error.strerror or error}); set "
                "model.rollout.dedicated.address to an address of this machine and a port that is free"
            ) from error
        door, deadline = _Door(self, self._secret), time.monotonic() + self._timeout_s
        print(f"waiting for {self._count} engine host(s): {self._command('I')}", flush=True)
        with listener:
            listener.settimeout(_ACCEPT_POLL_S)
            while len(door.joined) < self._count:
                if time.monotonic() > deadline:
                    raise self._missing(door)
                with suppress(TimeoutError):
                    connected, address = listener.accept()
                    door.greet(connected, f"{address[0]}:{address[1]}")
                door.forget_lost()
        return door.close()

    def _missing(self, door: _Door) -> EngineError:
        absent = [str(i) for i in range(self._count) if i not in door.joined]
        for member in door.close():
            member.wire.close()
        refused = f" ({door.refused} connection(s) were refused, see above)" if door.refused else ""
        return EngineError(
            f"engine host(s) {', '.join(absent)} of {self._count} did not join within {self._timeout_s:g} s{refused}; "
            f"start each on its machine: {self._command('I')}; the run resumes from its last complete checkpoint"
        )

    def _command(self, index: object) -> str:
        host, port = self._address
        shown = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        return f"python -m nemo_tropd.rollout.engine_host --join {shown} --index {index}"

    def _join_group(self) -> None:
        size, own_address = len(self._members) + 1, self._members[0].wire.own_address
        prefix = secrets.token_hex(16)
        try:
            store = open_store(own_address, self._timeout_s)
            for member in self._members:
                where = JoinGroup(own_address, store.port, prefix, member.index + 1, size, self._timeout_s)
                self._send(member, where)
            group = WeightGroup(
                store,
                prefix=prefix,
                rank=0,
                size=size,
                device=self._device,
                own_address=own_address,
                timeout_s=self._timeout_s,
            )
        except RuntimeError as error:
            if isinstance(error, EngineError):
                raise
            self._died(self._lost(GRACE_S), f"the weights' process group could not be made: {error}", error)
        self._weights = Broadcast(group)
        self._answers(self._members, self._timeout_s)

    def _updated(self) -> None:
        self._refreshed = True

    def _died(self, members: Sequence[Member], reason: str, cause: BaseException | None = None) -> NoReturn:
        self._let_go()
        names = " and ".join(map(str, members)) or "an engine host"
        again = self._command(members[0].index if len(members) == 1 else "I")
        raise EngineDied(
            f"{names}: {reason}; if the process has exited, restart it with {again}; the last checkpoint is complete"
        ) from cause
