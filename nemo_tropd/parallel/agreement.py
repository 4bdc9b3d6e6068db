"""Work of some ranks whose outcome all must share: what one raises, expected or not, is raised on every rank."""

import math
import pickle
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
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
_LOOK_S = 0.02
ALONE_AFTER_S = 3.0  # what ranks that fail alike may lie apart; others in a collective would wait for its timeout
Patience = Callable[[BaseException], float]  # how many seconds a rank that raised it waits for the others


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
        device = self._device()
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

    def any_rank(self, flag: bool) -> bool:
        """True if ``flag`` is True on any rank. All ranks call it."""
        return bool(self.any_rank_within(flag, math.inf))

    def any_rank_within(self, flag: bool, seconds: float) -> bool | None:
        """As ``any_rank``, which other ranks may call at the same place; None if they have not all called it in so many
        ``seconds``. This rank can then share no collective with them any more."""
        if not self._several():
            return bool(flag)
        votes = torch.tensor([int(flag)], device=self._device())
        voting = dist.all_reduce(votes, op=dist.ReduceOp.MAX, group=self._group(), async_op=True)
        assert voting is not None
        until = time.monotonic() + seconds
        while seconds < math.inf and not voting.is_completed():
            if time.monotonic() > until:
                return None
            time.sleep(_LOOK_S)
        voting.wait()
        return bool(votes.item())

    def _device(self) -> str:
        return "cuda" if dist.get_backend(self._group()) == "nccl" else "cpu"

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
    wait = partial(parts.wait if parts is not None else worker.join, look_s)
    wait()
    while not message or (parts is not None and parts.waiting and not cause):
        if may_stop and STOP.overdue:
            ranks.broadcast_bytes(_Kind.ERROR, pickle.dumps(stopped := Stopped("asked to stop")))
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
    if not cause:
        ranks.broadcast_bytes(*message[0])
        return result[0]
    try:
        ranks.broadcast_bytes(*message[0])
    except Exception as lost:
        raise _unheard(cause[0], unexpected) from lost
    raise portable(cause[0], unexpected) from cause[0]


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


def endless(error: BaseException) -> float:
    """The patience of work without collectives: the others come, however long theirs takes."""
    return math.inf


def on_every_rank(
    ranks: World,
    work: Callable[[], T],
    *,
    unexpected: type[Exception] = RankError,
    patience: Patience = endless,
) -> T:
    """Collective: every rank does ``work`` and returns its own result; if any failed, all raise the exception of the
    lowest of those ranks. Exceptions travel as in :func:`on_rank_zero`.

    If the work has collectives, others may wait there for a rank that failed. After the ``patience`` it has with its
    exception it raises that alone, as an ``unexpected``, which nobody may handle: the roll call then ends all ranks. So
    patience is endless with exceptions that the run survives, and those ranks must leave the work together."""
    try:
        result = work()
    except BaseException as error:
        raise _agreed(ranks, error, unexpected, patience(error)) from error
    if ranks.any_rank(False):
        raise _first(ranks.gather_objects(None))
    return result


def _agreed(ranks: World, error: BaseException, unexpected: type[Exception], patience_s: float) -> BaseException:
    """What this rank raises for its own ``error``."""
    try:
        if ranks.any_rank_within(True, patience_s) is None:
            return _unheard(error, unexpected)
        return _first(ranks.gather_objects(portable(error, unexpected)))
    except Exception as lost:
        if isinstance(error, Stopped):  # which is not why they do not answer
            raise
        # Not the other way round: the roll call shows this text beside which ranks it misses.
        raise _unheard(error, unexpected) from lost


def _first(errors: Sequence[BaseException | None]) -> BaseException:
    return next(error for error in errors if error is not None)


def on_stream(
    ranks: World,
    stream: Iterator[S],
    consume: Callable[[Iterator[S]], T],
    *,
    unexpected: type[Exception] = RankError,
) -> T:
    """Collective: rank 0 does ``consume(stream)``; every rank returns its result, or raises what any rank raised.
    Whatever happens, every rank exhausts its own ``stream``, whose items are made by collectives; one whose stream
    itself raises leaves the others in them."""
    own = _Stream(stream)

    def work() -> T | None:
        try:
            return consume(own) if ranks.is_leader else None
        finally:
            for _ in own:
                pass

    def patience(error: BaseException) -> float:
        return ALONE_AFTER_S if own.torn else math.inf

    return cast(T, ranks.gather_objects(on_every_rank(ranks, work, unexpected=unexpected, patience=patience))[0])


class _Stream(Iterator[S]):
    """Knows whether the stream itself has raised."""

    def __init__(self, stream: Iterator[S]) -> None:
        self._stream, self.torn = stream, False

    def __next__(self) -> S:
        try:
            return next(self._stream)
        except StopIteration:
            raise
        except BaseException:
            self.torn = True
            raise


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
    return _stranger(f"{type(error).__name__}: {error}", error, unexpected)


def _unheard(error: BaseException, unexpected: type[Exception]) -> Exception:
    """``error`` as an ``unexpected`` whatever it is: nobody may go on after what the other ranks have not heard of."""
    name_origin(error)
    return _stranger(str(error) if type(error) is unexpected else f"{type(error).__name__}: {error}", error, unexpected)


def _stranger(text: str, error: BaseException, unexpected: type[Exception]) -> Exception:
    stranger = unexpected(text)
    for note in getattr(error, "__notes__", ()):
        stranger.add_note(note)
    return stranger
