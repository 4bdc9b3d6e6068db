"""Work of some ranks whose outcome all must share: what one raises, expected or not, is raised on every rank."""

import pickle
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Generic, TypeVar, cast

import torch.distributed as dist

from nemo_tropd.parallel.addresses import name_origin
from nemo_tropd.parallel.signals import STOP, Stopped

S = TypeVar("S")
T = TypeVar("T")
_HEARTBEAT_S = 2.0  # below any timeout of a collective
_POLL_S = 0.25


class RankError(RuntimeError):
    """Another rank's unexpected exception: its class and text."""


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

    def __init__(self, take: Callable[[list[S], bool], None]) -> None:
        self.take, self._waiting, self._news = take, deque[S](), threading.Event()

    def put(self, part: S) -> None:
        """In the thread of the work; picklable."""
        self._waiting.append(part)
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

    def drained(self) -> list[S]:
        """Those that are there."""
        return [self._waiting.popleft() for _ in range(len(self._waiting))]


def on_rank_zero(
    ranks: World,
    work: Callable[[], T],
    *,
    unexpected: type[Exception] = RankError,
    heartbeat_s: float = _HEARTBEAT_S,
    may_stop: bool = False,
    parts: Parts[Any] | None = None,
) -> T:
    """Collective: rank 0 does ``work``; every rank returns its (picklable) result or raises its exception. Rank 0
    reports every ``heartbeat_s`` seconds that it still works, which may take longer than the process group's timeout.
    An exception whose class is not of this package arrives as an ``unexpected`` that names it. With ``may_stop`` every
    rank raises Stopped if the work, then abandoned, is not done ``FINISH_S`` after a request. What the work has put in
    ``parts`` every rank takes while rank 0 goes on, all of it before the result."""
    if not ranks.is_leader:
        return cast(T, _heard(ranks, parts))
    result: list[T] = []
    cause: list[BaseException] = []
    message: list[tuple[str, bytes]] = []

    def attempt() -> None:
        try:
            result.append(work())
            message.append(("result", pickle.dumps(result[0])))  # here, since what cannot be pickled is an error, too
        except BaseException as error:
            cause.append(error)
            message.append(("error", pickle.dumps(portable(error, unexpected))))
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
            ranks.broadcast_object(("error", pickle.dumps(stopped)))
            raise stopped
        if parts is not None and parts.waiting:
            some = parts.drained(), bool(message)
            ranks.broadcast_object(("parts", pickle.dumps(some)))
            parts.take(*some)
            reported = time.monotonic()
        if time.monotonic() - reported >= heartbeat_s:
            ranks.broadcast_object(("working", b""))
            reported = time.monotonic()
        if not message:
            wait()
    ranks.broadcast_object(message[0])
    if cause:
        raise portable(cause[0], unexpected) from cause[0]
    return result[0]


def _heard(ranks: World, parts: Parts[Any] | None) -> Any:
    """On the other ranks: what rank 0 says, until it is done."""
    while True:
        outcome, content = ranks.broadcast_object(("", b""))
        value: Any = pickle.loads(content) if content else None
        if outcome == "parts" and parts is not None:
            parts.take(*value)
        elif outcome == "error":
            raise value
        elif outcome == "result":
            return value


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
