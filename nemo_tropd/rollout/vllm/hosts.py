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
from dataclasses import dataclass, field

import torch

from nemo_tropd.rollout.engine import EngineDied, EngineError
from nemo_tropd.rollout.vllm import wire as w
from nemo_tropd.rollout.vllm.remote import GRACE_S, RemoteEngine
from nemo_tropd.rollout.vllm.settings import EngineSettings, model_fingerprint
from nemo_tropd.rollout.weights.senders import WeightGroup, open_store

_GREETING_TIMEOUT_S = 10.0
_ACCEPT_POLL_S = 0.2
_GREETED_AT_ONCE = 64
_SHOWN = 20  # refusals, after which a flood of strangers is only counted


class _Door:
    """Admits ``count`` hosts, one for each index."""

    def __init__(self, settings: EngineSettings, count: int, secret: bytes) -> None:
        self.joined: dict[int, w.Wire] = {}
        self.refused = 0
        self._count, self._secret = count, secret
        self._model_dir, self._model = settings.model_dir.absolute(), model_fingerprint(settings.model_dir)
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        self._lock = threading.Lock()
        self._places = threading.Semaphore(_GREETED_AT_ONCE)
        self._closed = False

    def admit(self, connected: socket.socket, address: str) -> None:
        """Greet a new connection, in a thread of its own."""
        if self._places.acquire(blocking=False):
            threading.Thread(target=self._greet, args=(w.Wire(connected), address), daemon=True).start()
        else:
            connected.close()
            self._say(address, f"{_GREETED_AT_ONCE} others are being greeted")

    def present(self) -> list[w.Wire]:
        """The hosts that have joined and not gone again, by index. Once they are complete nobody is admitted."""
        with self._lock:
            self.joined = {i: member for i, member in sorted(self.joined.items()) if not member.lost()}
            self._closed = len(self.joined) == self._count
            return list(self.joined.values())

    def close(self) -> None:
        """Admit nobody any more and let those go that have joined."""
        with self._lock:
            self._closed = True
            for member in self.joined.values():
                member.close()

    def _greet(self, wire: w.Wire, address: str) -> None:
        deadline = time.monotonic() + _GREETING_TIMEOUT_S

        def left() -> float:
            return deadline - time.monotonic()

        try:
            wire.prove(self._secret, listening=True, timeout_s=left())
            wire.send(w.Greeting(w.PROTOCOL, str(self._model_dir)), left())
            hello = wire.receive(w.Hello, timeout_s=left(), most_bytes=w.GREETING_BYTES)
            with self._lock:
                refusal = self._refusal(hello)
                if refusal is None:
                    wire.send(w.Done(), left())
                    wire.name = f"engine host {hello.index} (process {hello.process} on {hello.host[:64]!r})"
                    self.joined[hello.index] = wire
                    print(f"{wire.name} joined", flush=True)
                    return
            with suppress(w.Disconnected):
                wire.send(w.Failed("EngineError", refusal), max(1.0, left()))
        except (w.Disconnected, TimeoutError, ValueError) as error:
            refusal = str(error)
        finally:
            self._places.release()
        self._say(address, refusal)
        wire.close()

    def _refusal(self, hello: w.Hello) -> str | None:
        """Why the host that said ``hello`` is not admitted beside those that joined; None if it is."""
        index = hello.index
        if self._closed:
            return "all hosts have joined"
        if hello.protocol != w.PROTOCOL:
            return (
                f"the trainer has version {w.PROTOCOL} of the protocol and this host version {hello.protocol}; run the "
                "same nemo_tropd on all hosts"
            )
        if not 0 <= index < self._count:
            return f"--index {index}: model.rollout.dedicated.engines is {self._count}, so use 0 to {self._count - 1}"
        if hello.device != self._device:
            return f"the trainer computes on {self._device} and this host on {hello.device[:16]!r}; use one kind"
        if hello.model != self._model:
            what = "has another model than the trainer's at" if hello.model else "has no checkpoint at"
            return f"--index {index} {what} {self._model_dir}; copy the student's checkpoint to that path of the host"
        if index in self.joined and not self.joined[index].lost():
            return f"--index {index} is taken by {self.joined[index].name}"
        return None

    def _say(self, address: str, reason: str) -> None:
        with self._lock:  # print() writes a line and its end apart: two threads' lines would run into one
            if self._closed:
                return
            self.refused += 1
            if self.refused <= _SHOWN:
                print(f"refused a connection from {address}: {reason}", flush=True)
            elif self.refused == _SHOWN + 1:
                print("refused more connections, which are not shown", flush=True)


@dataclass(eq=False, repr=False, kw_only=True)
class DedicatedEngines(RemoteEngine):
    """A ``RolloutEngine`` of many hosts. If one fails all are let go, and those that live join the next one.
    ``timeout_s`` is also for all hosts to join. Rank 0 and hosts hold up to two buckets of weights."""

    address: tuple[str, int]  # host and port to listen at; on no other interface than that host's
    engines: int  # hosts, whose indices are 0 to ``engines`` - 1
    secret: bytes  # what they must know
    _given_up: threading.Event = field(default_factory=threading.Event, init=False)

    def start(self) -> None:
        """Raises EngineError naming the indices that did not join, or the host whose engine could not start."""
        if self._members:
            raise EngineError("the engines are running; close them before they are started again")
        self._given_up.clear()
        self._members = self._gather()
        try:
            self._open()
            self._join_group()
        except BaseException:
            self._let_go()
            raise

    def close(self, *, run_over: bool = False) -> None:
        """Leave the hosts, which wait for the trainer to come back; if the run is over they are told to exit. Another
        thread's ``start`` that waits for hosts ends with EngineDied."""
        self._given_up.set()
        for member in self._members if run_over else ():
            with suppress(w.Disconnected):
                member.send(w.Close())
        self._let_go()

    def _gather(self) -> list[w.Wire]:
        host, port = self.address
        try:
            family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
            listener = socket.create_server((host, port), family=family)
        except OSError as error:
            raise EngineError(
                f"cannot listen for engine hosts at {host}:{port} ({error.strerror or error}); set "
                "model.rollout.dedicated.address to an address of this machine and a port that is free"
            ) from error
        door, deadline = _Door(self.settings, self.engines, self.secret), time.monotonic() + self.timeout_s
        print(f"waiting for {self.engines} engine host(s): {self._command('I')}", flush=True)
        with listener:
            listener.settimeout(_ACCEPT_POLL_S)
            while len(members := door.present()) < self.engines:
                if self._given_up.is_set():
                    door.close()
                    raise EngineDied("the engines were closed before all hosts had joined")
                if time.monotonic() > deadline:
                    door.close()
                    absent = ", ".join(str(i) for i in range(self.engines) if i not in door.joined)
                    refused = f" ({door.refused} connection(s) were refused, see above)" if door.refused else ""
                    raise EngineError(
                        f"engine host(s) {absent} of {self.engines} did not join within {self.timeout_s:g} s{refused}; "
                        f"start each on its machine: {self._command('I')}; the run resumes from its last complete "
                        "checkpoint"
                    )
                with suppress(TimeoutError):
                    connected, address = listener.accept()
                    door.admit(connected, f"{address[0]}:{address[1]}")
        return members

    def _command(self, index: object) -> str:
        host, port = self.address
        shown = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        return f"python -m nemo_tropd.rollout.engine_host --join {shown} --index {index}"

    def _join_group(self) -> None:
        size, own_address, name = len(self._members) + 1, self._members[0].own_address, secrets.token_hex(16)
        try:
            store = open_store(own_address, self.timeout_s)

            def place(rank: int) -> w.JoinGroup:
                return w.JoinGroup(own_address, store.port, name, rank, size, self.timeout_s)

            for rank, member in enumerate(self._members, start=1):
                self._send(member, place(rank))
            self._weights = WeightGroup(store, place(0), own_address=own_address)
        except EngineError:
            raise
        except RuntimeError as error:
            self._died(self._lost(GRACE_S), f"the weights' process group could not be made: {error}", error)
        self._answers(self._members, self.timeout_s)

    def _describe(self, members: Sequence[w.Wire], reason: str) -> str:
        names = " and ".join(member.name for member in members) or "an engine host"
        again = self._command(self._members.index(members[0]) if len(members) == 1 else "I")
        return f"{names}: {reason}; if the process has exited, restart it with {again}; the last checkpoint is complete"
