"""The wire between the trainer and an engine's server: typed messages in frames, with a deadline for each.

``multiprocessing.connection`` frames the bytes and proves the shared secret (HMAC); ``msgspec`` encodes the messages
as MessagePack and checks the types of what arrives. Nothing is unpickled: only ``send_bytes`` and ``recv_bytes`` are
used. The wire is authenticated when it is opened, not encrypted.
"""

from __future__ import annotations

import select
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing import AuthenticationError
from multiprocessing.connection import Connection, answer_challenge, deliver_challenge
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from nemo_tropd.batch import Rollout
from nemo_tropd.rollout.engine import RolloutRequest

T = TypeVar("T")

PROTOCOL = 2  # of the messages; trainer and hosts must run the same
GREETING_BYTES = 1 << 16  # of the messages before a host is admitted
_MOST_BYTES = 1 << 30
_MESSAGE_TIMEOUT_S = 120.0  # for the rest of a message whose first byte has come, and for sending one
# A peer whose machine or link is gone sends no end of stream: the kernel gives it up after about a minute.
_KEEP_ALIVE = ((socket.TCP_KEEPIDLE, 20), (socket.TCP_KEEPINTVL, 10), (socket.TCP_KEEPCNT, 4))
_USER_TIMEOUT_MS = 60_000


class Disconnected(Exception):
    """The other side is gone, or sent what is no message: the connection is of no use afterwards."""


class Message(msgspec.Struct, tag=True, frozen=True):
    """Everything that travels is one of the classes below."""


class Greeting(Message, frozen=True):
    """Trainer to host, first."""

    protocol: int
    model_dir: str


class Hello(Message, frozen=True):
    """Host to trainer: who it is. ``model`` is ``settings.model_fingerprint`` of its copy of the model."""

    protocol: int
    index: int
    device: str
    host: str
    process: int
    model: str


class Open(Message, frozen=True):
    """Start the engine; ``settings`` are an encoded EngineSettings, which is checked by the engine's machine."""

    settings: msgspec.Raw
    threads: int
    answer_timeout_s: float


class JoinGroup(Message, frozen=True):
    """Join the process group that weights are broadcast over."""

    address: str
    port: int
    prefix: str
    rank: int
    size: int
    timeout_s: float


class Generate(Message, frozen=True):
    requests: list[RolloutRequest]


class Update(Message, frozen=True):
    """Weights follow: buckets, then ``Finish``."""

    version: int


class Bucket(Message, frozen=True):
    """Tensors of one dtype: in the safetensors file ``path`` of this machine, or in the broadcast that follows."""

    names: list[str]
    shapes: list[list[int]]
    dtype: str
    path: str | None = None


class Finish(Message, frozen=True):
    pass


class Close(Message, frozen=True):
    """The run is over."""


class Done(Message, frozen=True):
    pass


class Generated(Message, frozen=True):
    rollouts: list[Rollout]


class Failed(Message, frozen=True):
    """``kind`` is the name of an EngineError."""

    kind: str
    error: str


Request = Open | JoinGroup | Generate | Update | Bucket | Finish | Close
Reply = Done | Generated | Failed


def encode(value: Any) -> bytes:
    """MessagePack of a message or a dataclass; paths become text."""
    return msgspec.msgpack.encode(value, enc_hook=_to_text)


def decode(data: bytes, kind: Any) -> Any:
    """What ``encode`` encoded. Raises ValueError for anything else."""
    try:
        return msgspec.msgpack.decode(data, type=kind, dec_hook=_from_text)
    except (msgspec.MsgspecError, RecursionError) as error:
        raise ValueError(str(error)) from error


def _to_text(value: Any) -> str:
    if isinstance(value, Path):
        return str(value.absolute())
    raise NotImplementedError(f"{type(value).__name__} does not travel")


def _from_text(kind: type[T], value: Any) -> T:
    if issubclass(kind, Path) and isinstance(value, str):
        return kind(value)
    raise NotImplementedError(f"{kind.__name__} does not travel")


class Wire:
    """One end of a connected socket, TCP or local. Not for two threads at once, ``lost`` and ``close`` aside."""

    def __init__(self, connected: socket.socket) -> None:
        """Takes the socket over."""
        connected.settimeout(None)
        self.own_address = ""
        if connected.family != socket.AF_UNIX:
            connected.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for option, value in (*_KEEP_ALIVE, (socket.TCP_USER_TIMEOUT, _USER_TIMEOUT_MS), (socket.TCP_NODELAY, 1)):
                connected.setsockopt(socket.IPPROTO_TCP, option, value)
            self.own_address = connected.getsockname()[0]
        self._socket, self._connection = connected, Connection(connected.dup().detach())
        self._expired = False

    def prove(self, secret: bytes, *, listening: bool, timeout_s: float) -> None:
        """Prove ``secret`` to the other side and have it prove the same, before anything else is read from it.

        Raises Disconnected if it cannot, or TimeoutError.
        """
        with self._within(timeout_s):
            order = (deliver_challenge, answer_challenge)
            try:
                for step in order if listening else reversed(order):
                    step(self._connection, secret)
            except AuthenticationError as error:
                raise Disconnected("it does not have the same secret (NEMO_TROPD_SECRET)") from error
            except AssertionError as error:
                raise Disconnected("it sent something that is no proof of the secret") from error

    def send(self, message: Message, timeout_s: float = _MESSAGE_TIMEOUT_S) -> None:
        """Send one message, in at most ``timeout_s`` seconds. Raises Disconnected."""
        data = encode(message)
        if len(data) > _MOST_BYTES:
            raise Disconnected(f"a message of {len(data)} bytes is over the limit of {_MOST_BYTES}")
        try:
            with self._within(timeout_s):
                self._connection.send_bytes(data)
        except TimeoutError as error:
            raise Disconnected(f"it took no message within {timeout_s:g} s") from error

    def receive(self, kind: Any, *, timeout_s: float | None = None, most_bytes: int = _MOST_BYTES) -> Any:
        """Wait for one message of class ``kind`` (or a union), at most ``timeout_s`` seconds for all of it.

        Without ``timeout_s`` its beginning may take forever, the rest two minutes. Raises Disconnected or TimeoutError.
        """
        if timeout_s is None:
            with self._failures():
                self._connection.poll(None)
        with self._within(_MESSAGE_TIMEOUT_S if timeout_s is None else timeout_s):
            data = self._connection.recv_bytes(most_bytes)
        try:
            return decode(data, kind)
        except ValueError as error:
            raise Disconnected(f"received a malformed message ({str(error)[:200]})") from error

    def lost(self) -> bool:
        """Whether the other side has closed or broken the connection."""
        return bool(self._events(select.POLLRDHUP, 0) & (select.POLLRDHUP | select.POLLHUP | select.POLLERR))

    def wait_lost(self) -> None:
        """Return once the other side has closed or broken the connection."""
        self._events(select.POLLRDHUP, None)

    def wait_readable(self, timeout_s: float) -> bool:
        """Whether a message, or the end, begins to arrive within ``timeout_s``."""
        return bool(self._events(select.POLLIN, int(1000 * timeout_s)))

    def close(self) -> None:
        """Close the connection, also under another thread's read; twice is fine."""
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def _events(self, wanted: int, timeout_ms: int | None) -> int:
        if self._socket.fileno() < 0:
            return select.POLLHUP
        waiting = select.poll()  # not select: that one refuses descriptors past 1023, which a large job can reach
        waiting.register(self._socket.fileno(), wanted)
        found = waiting.poll(timeout_ms)
        return found[0][1] if found else 0

    @contextmanager
    def _within(self, timeout_s: float) -> Iterator[None]:
        """Shut the connection down after ``timeout_s``, so that a peer that drips bytes cannot stretch a read."""
        timer = threading.Timer(max(timeout_s, 0.0), self._expire)
        timer.daemon = True
        timer.start()
        try:
            with self._failures():
                yield
        except Disconnected as error:
            if self._expired:
                raise TimeoutError(f"no complete message within {timeout_s:g} s") from error
            raise
        finally:
            timer.cancel()

    def _expire(self) -> None:
        self._expired = True
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    @contextmanager
    def _failures(self) -> Iterator[None]:
        try:
            yield
        except EOFError as error:
            raise Disconnected("the connection was closed") from error
        except OSError as error:
            raise Disconnected(f"the connection broke ({error.strerror or error})") from error
