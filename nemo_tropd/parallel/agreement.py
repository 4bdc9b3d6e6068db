"""Work of some ranks whose outcome all must share: what one raises, expected or not, is raised on every rank."""

import pickle
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import IntEnum
from functools import partial
from typing import Any, Generic, TypeVar, cast

import torch
import torch.distributed as dist

from nemo_tropd.parallel.addresses import name_origin
from nemo_tropd.parallel.signals import STOP, Stopped

S = TypeVar("S")
T = TypeVar("T")
_HEARTBEAT_S = 2.0  # below any timeout of a collective
_POLL_S = 0.25


class RankError(RuntimeError):
    """Another rank's unexpected exception: its class and text."""


@dataclass(frozen=True)
class Codec(Generic[T]):
    """How results travel: as bytes, which rank 0 makes and the others read."""

    encode: Callable[[T], bytes | bytearray]
    decode: Callable[[memoryview], T]


PICKLED: Codec[Any] = Codec(pickle.dumps, pickle.loads)


class _Kind(IntEnum):
    """What rank 0 says to the ranks that wait for it."""

    WORKING = 0
    PARTS = 1
    LAST_PARTS = 2
    RESULT = 3
    ERROR = 4


class World:
    """The ranks of the default process group, or a world of one without it."""

    @property
    def is_leader(self) -> bool:
        """Global rank 0: first stage, tensor rank 0, data rank 0."""
        return not self._several() or dist.get_rank() == 0

    def broadcast_object(self, obj: T, src: int = 0) -> T:
        """Rank ``src``'s picklable object, on every rank. All ranks call it."""
        box = [obj]
        if self._several():
            dist.broadcast_object_list(box, src=src, group=self._group())
        return box[0]

    def broadcast_bytes(self, number: int, data: bytes | bytearray) -> tuple[int, memoryview]:
        """Rank 0's number and bytes, on every rank; two tensors, or one without bytes. All ranks call it."""
        if not self._several():
            return number, memoryview(data)
        device = "cuda" if dist.get_backend(self._group()) == "nccl" else "cpu"
        header = torch.tensor([number, len(data)], device=device)
        dist.broadcast(header, src=0, group=self._group())
        number, size = header.tolist()
        if not size:
            return number, memoryview(b"")
        if self.is_leader:  # torch takes only memory that may be written
            own = torch.frombuffer(data if isinstance(data, bytearray) else bytearray(data), dtype=torch.uint8)
            content = own.to(device)
        else:
            content = torch.empty(size, dtype=torch.uint8, device=device)
        dist.broadcast(content, src=0, group=self._group())
        return number, content.cpu().numpy().data

    def gather_objects(self, obj: T) -> list[T]:
        """Every rank's picklable object, by rank, on every rank. All ranks call it."""
        everyone = [obj]
        if self._several():
            everyone *= dist.get_world_size()
            dist.all_gather_object(everyone, obj, group=self._group())
        return everyone

    def _group(self) -> dist.ProcessGroup | None:
        return None

    @staticmethod
    def _several() -> bool:
        return dist.is_initialized() and dist.get_world_size() > 1


class Parts(Generic[S]):
    """What rank 0's work puts aside for all ranks while it goes on. ``take`` is given the new ones, in order, and
    whether the work is done by then. It may be collective, so what a rank raises there it raises alone."""

    def __init__(self, take: Callable[[list[S], bool], None], codec: Codec[list[S]] = PICKLED) -> None:
        self.take, self.codec = take, codec
        self._waiting, self._news = deque[tuple[S, bytes | bytearray]](), threading.Event()

    def put(self, part: S) -> None:
        """In the thread of the work, whose error it is if the part cannot be encoded."""
        self._waiting.append((part, self.codec.encode([part])))
        self._news.set()

    def end(self) -> None:
        """The work is done."""
        self._news.set()

    def wait(self, timeout_s: float) -> None:
        """Until there is another one, or the work is done."""
        self._news.wait(timeout_s)
        self._news.clear()

    @property
    def waiting(self) -> bool:
        """Whether there are any that no rank has taken."""
        return bool(self._waiting)

    def drained(self) -> tuple[list[S], bytes]:
        """Those that are there, and what ``read`` makes of them elsewhere."""
        some = [self._waiting.popleft() for _ in range(len(self._waiting))]
        return [part for part, _ in some], pickle.dumps([data for _, data in some])

    def read(self, data: memoryview) -> list[S]:
        """What rank 0 has drained."""
        return [part for one in pickle.loads(data) for part in self.codec.decode(memoryview(one))]


def on_rank_zero(
    ranks: World,
    work: Callable[[], T],
    *,
    unexpected: type[Exception] = RankError,
    heartbeat_s: float = _HEARTBEAT_S,
    may_stop: bool = False,
    parts: Parts[Any] | None = None,
    codec: Codec[T] = PICKLED,
) -> T:
    """Collective: rank 0 does ``work``; every rank returns its result, by ``codec``, or raises its exception. Rank 0
    reports every ``heartbeat_s`` seconds that it still works, which may take longer than the process group's timeout.
    An exception whose class is not of this package arrives as an ``unexpected`` that names it. With ``may_stop`` every
    rank raises Stopped if the work, then abandoned, is not done ``FINISH_S`` after a request. What the work has put in
    ``parts`` every rank takes while rank 0 goes on, all of it before the result."""
    if not ranks.is_leader:
        return cast(T, _heard(ranks, parts, codec))
    result: list[T] = []
    cause: list[BaseException] = []
    message: list[tuple[_Kind, bytes | bytearray]] = []

    def attempt() -> None:
        try:
            result.append(work())
            message.append((_Kind.RESULT, codec.encode(result[0])))  # here, since what cannot be is an error, too
        except BaseException as error:
            cause.append(error)
            message.append((_Kind.ERROR, pickle.dumps(portable(error, unexpected))))
        finally:
            if parts is not None:
                parts.end()

    worker = threading.Thread(target=attempt, name="rank-0-work", daemon=True)
    worker.start()
    reported, look_s = time.monotonic(), min(_POLL_S, heartbeat_s)
    wait = partial(worker.join, look_s) if parts is None else partial(parts.wait, look_s)
    wait()
    while not message or (parts is not None and parts.waiting and not cause):
        if may_stop and STOP.overdue:
            stopped = Stopped("asked to stop")
            ranks.broadcast_bytes(_Kind.ERROR, pickle.dumps(stopped))
            raise stopped
        if parts is not None and parts.waiting:
            some, content = parts.drained()
            last = bool(message)
            ranks.broadcast_bytes(_Kind.LAST_PARTS if last else _Kind.PARTS, content)
            parts.take(some, last)
            reported = time.monotonic()
        if time.monotonic() - reported >= heartbeat_s:
            ranks.broadcast_bytes(_Kind.WORKING, b"")
            reported = time.monotonic()
        if not message:
            wait()
    ranks.broadcast_bytes(*message[0])
    if cause:
        raise portable(cause[0], unexpected) from cause[0]
    return result[0]


def _heard(ranks: World, parts: Parts[Any] | None, codec: Codec[Any]) -> Any:
    """On the other ranks: what rank 0 says, until it is done."""
    while True:
        kind, content = ranks.broadcast_bytes(_Kind.WORKING, b"")
        match kind:
            case _Kind.PARTS | _Kind.LAST_PARTS if parts is not None:
                parts.take(parts.read(content), kind == _Kind.LAST_PARTS)
            case _Kind.ERROR:
                raise pickle.loads(content)
            case _Kind.RESULT:
                return codec.decode(content)


def on_every_rank(ranks: World, work: Callable[[], T], *, unexpected: type[Exception] = RankError) -> T:
    """Collective: every rank does ``work`` and returns its own result; if any failed, all raise the exception of the
    lowest of those ranks. Exceptions travel as in :func:`on_rank_zero`."""
    result: list[T] = []
    cause: BaseException | None = None
    try:
        result.append(work())
    except BaseException as error:
        cause = error
    errors = ranks.gather_objects(portable(cause, unexpected) if cause is not None else None)
    failed = next((error for error in errors if error is not None), None)
    if failed is not None:
        raise failed from cause
    return result[0]


def on_stream(
    ranks: World,
    stream: Iterator[S],
    consume: Callable[[Iterator[S]], T],
    *,
    unexpected: type[Exception] = RankError,
) -> T:
    """Collective: rank 0 does ``consume(stream)``; every rank returns its result, or raises what any rank raised.
    Whatever happens, every rank exhausts its own ``stream``, whose items are made by collectives."""

    def work() -> T | None:
        try:
            return consume(stream) if ranks.is_leader else None
        finally:
            for _ in stream:
                pass

    return cast(T, ranks.gather_objects(on_every_rank(ranks, work, unexpected=unexpected))[0])


def portable(error: BaseException, unexpected: type[Exception]) -> BaseException:
    """``error`` itself if it is of this package and survives pickling, else an ``unexpected`` that names it; with a
    note of the rank and host where it was raised."""
    name_origin(error)
    if type(error).__module__.partition(".")[0] == __name__.partition(".")[0]:
        try:
            copy = pickle.loads(pickle.dumps(error))
            if type(copy) is type(error) and str(copy) == str(error):
                return copy
        except Exception:
            pass
    stranger = unexpected(f"{type(error).__name__}: {error}")
    for note in getattr(error, "__notes__", ()):
        stranger.add_note(note)
    return stranger
