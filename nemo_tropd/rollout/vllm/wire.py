"""The wire between the trainer and an engine's server: typed messages in frames, with a deadline for each.

``multiprocessing.connection`` frames the bytes and proves the shared secret (HMAC); ``msgspec`` encodes the messages
as MessagePack and checks the types of what arrives; rollouts are one field of bytes, whose sizes ``rollout.arrays``
checks. Nothing is unpickled: only ``send_bytes`` and ``recv_bytes`` are used. The wire is authenticated when it is
opened, not encrypted.
"""

from __future__ import annotations

import queue
import select
import socket
import threading
from collections import UserList
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing import AuthenticationError
from multiprocessing.connection import Connection, answer_challenge, deliver_challenge
from multiprocessing.connection import wait as wait_for
from typing import Any

import msgspec

from nemo_tropd.batch import Rollout
from nemo_tropd.rollout import arrays
from nemo_tropd.rollout.engine import RolloutRequest

PROTOCOL = 7  # of the messages; trainer and hosts must run the same
GREETING_BYTES = 1 << 16  # of the messages before a host is admitted
_MOST_BYTES = 1 << 30
_MESSAGE_TIMEOUT_S = 120.0  # for the rest of a message whose first byte has come, and for sending one
# A peer whose machine or link is gone sends no end of stream: the kernel gives it up after about a minute.
_TCP_OPTIONS = {
    socket.TCP_KEEPIDLE: 20,
    socket.TCP_KEEPINTVL: 10,
    socket.TCP_KEEPCNT: 4,
    socket.TCP_USER_TIMEOUT: 60_000,
    socket.TCP_NODELAY: 1,
}


class Disconnected(Exception):
    """The other side is gone, or sent what is no message: the connection is of no use afterwards."""


class Packed(UserList[Rollout]):
    """Rollouts that travel as ``rollout.arrays`` encodes them."""


class Message(msgspec.Struct, tag=True):
    """Everything that travels is one of the classes below."""


class Greeting(Message):  # trainer to host, first
    protocol: int
    model_dir: str


class Hello(Message):  # host to trainer: who it is
    protocol: int
    index: int
    device: str
    host: str
    process: int
    model: str  # settings.model_fingerprint of its copy


class Open(Message):  # start the engine
    settings: msgspec.Raw  # an encoded EngineSettings, which is checked by the engine's machine
    threads: int
    answer_timeout_s: float


class JoinGroup(Message):  # the process group that weights are broadcast over
    address: str
    port: int
    prefix: str
    rank: int
    size: int
    timeout_s: float


class Generate(Message):
    requests: list[RolloutRequest]
    in_parts: bool = False  # rollouts as they are finished, in Parts; Generated then is the end, and empty
    more: bool = False  # with in_parts: More follow while these are generated


class More(Message):  # further requests of a Generate
    requests: list[RolloutRequest]
    last: bool  # no More follows


class Abandon(Message):  # nobody waits for the rest of a Generate
    """The answer may end early."""


class Update(Message):  # weights follow: buckets, then Finish
    version: int


class Bucket(Message):  # tensors of one dtype
    names: list[str]
    shapes: list[list[int]]
    dtype: str
    path: str | None = None  # a safetensors file of this machine; None: the broadcast that follows


class Finish(Message):
    """No more buckets."""


class Close(Message):
    """The run is over."""


class Done(Message):
    """It was done as asked."""


class Part(Message):
    rollouts: Packed


class Generated(Message):
    rollouts: Packed


class Failed(Message):
    kind: str  # the name of an EngineError
    error: str


Request = Open | JoinGroup | Generate | More | Abandon | Update | Bucket | Finish | Close
Reply = Done | Generated | Failed
Answer = Part | Reply


def encode(value: Any) -> bytes:
    """MessagePack of a message or a dataclass; paths become absolute and text, rollouts bytes."""
    return msgspec.msgpack.encode(value, enc_hook=_plain)


def decode(data: bytes, kind: Any) -> Any:
    """What ``encode`` encoded. Raises ValueError for anything else."""
    try:
        return msgspec.msgpack.decode(data, type=kind, dec_hook=_of_plain)
    except (msgspec.MsgspecError, RecursionError) as error:
        raise ValueError(str(error)) from error


# msgspec 0.22 looks into a class when it first decodes one, and ends the process if two threads do so at once.
_SEEN_THROUGH = [msgspec.msgpack.Decoder(kind) for kind in (Request, Answer)]


def _plain(value: Any) -> Any:
    return arrays.encode(value) if isinstance(value, Packed) else str(value.absolute())


def _of_plain(kind: Any, plain: Any) -> Any:
    if kind is not Packed:
        return kind(plain)
    if not isinstance(plain, bytes):
        raise ValueError(f"rollouts are bytes, not {type(plain).__name__}")
    return Packed(arrays.decode(plain))


class Wire:
    """One end of a connected socket, TCP or local. One thread may send while another receives; besides, only ``lost``
    and ``close`` are for any thread."""

    def __init__(self, connected: socket.socket, name: str = "") -> None:
        """Takes the socket over; ``name`` is what errors call the other side."""
        self.name, self.own_address = name, ""
        self.seen: Callable[[Message], None] = lambda message: None  # is told of what is sent and received
        connected.settimeout(None)
        if connected.family != socket.AF_UNIX:
            connected.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for option, value in _TCP_OPTIONS.items():
                connected.setsockopt(socket.IPPROTO_TCP, option, value)
            self.own_address = connected.getsockname()[0]
        self._socket, self._connection = connected, Connection(connected.dup().detach())
        self._late = ""  # what took too long, so that this side shut the connection down

    def prove(self, secret: bytes, *, listening: bool, timeout_s: float) -> None:
        """Each side proves ``secret`` to the other. Raises Disconnected if one cannot, or TimeoutError."""
        order = (deliver_challenge, answer_challenge)
        try:
            with self._within(timeout_s):
                for step in order if listening else reversed(order):
                    step(self._connection, secret)
        except AuthenticationError as error:
            raise Disconnected("it does not have the same secret (NEMO_TROPD_SECRET)") from error
        except AssertionError as error:
            raise Disconnected("it sent something that is no proof of the secret") from error

    def send(self, message: Message, timeout_s: float = _MESSAGE_TIMEOUT_S) -> None:
        """Send one message, in at most ``timeout_s`` seconds. Raises Disconnected."""
        self.seen(message)
        data = encode(message)
        if len(data) > _MOST_BYTES:
            raise Disconnected(f"a message of {len(data)} bytes is over the limit of {_MOST_BYTES}")
        try:
            with self._within(timeout_s, f"it took no message within {timeout_s:g} s"):
                self._connection.send_bytes(data)
        except TimeoutError as error:
            raise Disconnected(str(error)) from error

    def receive(self, kind: Any, *, timeout_s: float | None = None, most_bytes: int = _MOST_BYTES) -> Any:
        """One message of class ``kind`` (or a union), complete within ``timeout_s`` seconds; without that its beginning
        may take forever, the rest two minutes. Raises Disconnected or TimeoutError."""
        if timeout_s is None:
            self.wait_readable(None)
        with self._within(_MESSAGE_TIMEOUT_S if timeout_s is None else timeout_s):
            data = self._connection.recv_bytes(most_bytes)
        try:
            message = decode(data, kind)
        except ValueError as error:
            raise Disconnected(f"received a malformed message ({str(error)[:200]})") from error
        self.seen(message)
        return message

    def wait_readable(self, timeout_s: float | None) -> bool:
        """Whether a message, or the end, begins to arrive within ``timeout_s`` (None: wait forever)."""
        return self._connection.poll(timeout_s)

    def lost(self) -> bool:
        """Whether the other side has closed or broken the connection, or this side has closed it."""
        if self._socket.fileno() < 0:
            return True
        state = select.poll()  # not select: that one refuses descriptors past 1023, which a large job can reach
        state.register(self._socket.fileno(), select.POLLRDHUP)
        return bool(state.poll(0))

    def close(self) -> None:
        """Close the connection, also under another thread's read; twice is fine."""
        self._shut_down()
        self._socket.close()

    def _shut_down(self) -> None:
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    @contextmanager
    def _within(self, timeout_s: float, late: str = "") -> Iterator[None]:
        """Shut the connection down after ``timeout_s``, so that a peer that drips bytes cannot stretch a read: that
        raises TimeoutError, any other end Disconnected."""
        late, expired = late or f"no complete message within {timeout_s:g} s", threading.Event()

        def expire() -> None:
            expired.set()
            self._late = late
            self._shut_down()

        timer = threading.Timer(max(timeout_s, 0.0), expire)
        timer.daemon = True
        timer.start()
        try:
            yield
        except (EOFError, OSError) as error:
            if expired.is_set():
                raise TimeoutError(late) from error
            broke = isinstance(error, OSError) and f"the connection broke ({error.strerror or error})"
            raise Disconnected(self._late or broke or "the connection was closed") from error
        finally:
            timer.cancel()


class Outbox:
    """Sends to one member in a thread of its own. A member that sends while it is sent to then holds up nobody: the
    other thread goes on reading, from all of them."""

    def __init__(self, wire: Wire) -> None:
        self.error: Disconnected | None = None  # nothing is sent after that
        self._wire = wire
        self._waiting: queue.SimpleQueue[Message | None] = queue.SimpleQueue()
        threading.Thread(target=self._live, name="outbox", daemon=True).start()

    def put(self, message: Message) -> None:
        """Send it behind those that were put before."""
        self._waiting.put(message)

    def close(self) -> None:
        """End the thread, once it has sent what was put."""
        self._waiting.put(None)

    def _live(self) -> None:
        while (message := self._waiting.get()) is not None:
            try:
                self._wire.send(message)
            except Disconnected as error:
                self.error = error
                return


def readable(wires: Sequence[Wire], timeout_s: float) -> list[Wire]:
    """Those at which a message, or the end, begins to arrive within ``timeout_s``; waits for the first."""
    ready = wait_for([wire._connection for wire in wires], timeout_s)
    return [wire for wire in wires if wire._connection in ready]
