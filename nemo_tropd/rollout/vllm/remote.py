"""The trainer's side of the wire: one engine made of one or more servers, for a child process and for engine hosts.

Requests are dealt out over the members in turn. Weights go to all of them at once, a bucket at a time: every member
says when it has a bucket, so one that is gone or silent is known by its name, and nobody waits longer than a timeout.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NoReturn, Protocol

import msgspec
from torch import Tensor

from nemo_tropd.batch import Rollout
from nemo_tropd.rollout.engine import (
    DTYPES,
    EngineDied,
    EngineError,
    RefreshStats,
    RequestError,
    RolloutRequest,
    WeightStreamError,
    check_requests,
)
from nemo_tropd.rollout.vllm.settings import EngineSettings
from nemo_tropd.rollout.vllm.wire import (
    Bucket,
    Disconnected,
    Done,
    Failed,
    Finish,
    Generate,
    Generated,
    Message,
    Open,
    Reply,
    Update,
    Wire,
    encode,
)
from nemo_tropd.rollout.weights.stream import buckets, checked_stream

_KINDS: dict[str, type[EngineError]] = {
    kind.__name__: kind for kind in (EngineError, EngineDied, RequestError, WeightStreamError)
}
# A member that dies takes others' broadcasts with it; whose connection ends within so long is the one to name.
GRACE_S = 1.0
_POLL_S = 0.1


@dataclass(frozen=True)
class Member:
    """A connected server: ``str()`` of it is how errors name it."""

    index: int
    name: str
    wire: Wire

    def __str__(self) -> str:
        return self.name


class WeightSender(Protocol):
    """How a bucket of weights gets to the members: ``shared_memory.SharedMemory`` or ``broadcast.Broadcast``."""

    def send(
        self, tensors: Mapping[str, Tensor], tell: Callable[[Bucket], None], confirm: Callable[[], None]
    ) -> None: ...

    def close(self) -> None: ...


class RemoteEngine:
    """A ``RolloutEngine`` of members, whose subclasses say where members come from (``start``), how one that failed is
    reported (``_died``, ``_refused``) and how weights travel. Where one fails, all are let go."""

    def __init__(
        self, settings: EngineSettings, *, threads: int, bucket_mib: int, timeout_s: float, answer_timeout_s: float
    ) -> None:
        """``timeout_s``: for a bucket of weights; ``answer_timeout_s``: for the rollouts of one call."""
        if min(threads, bucket_mib) < 1:
            raise EngineError("threads and bucket_mib must be at least 1")
        self.settings = settings
        self._shapes, self._optional = settings.shapes
        self._threads, self._bucket_bytes = threads, bucket_mib << 20
        self._timeout_s, self._answer_timeout_s = timeout_s, answer_timeout_s
        self._members: list[Member] = []  # by index, all of them, or none
        self._weights: WeightSender | None = None

    def generate(self, requests: Sequence[RolloutRequest]) -> list[Rollout]:
        """See ``RolloutEngine.generate``: request I is served by member I modulo their number."""
        requests = list(requests)
        check_requests(requests, max_model_len=self.settings.max_model_len, vocab_size=self.settings.vocab_size)
        if not requests:
            return []
        self._check_running()
        count = len(self._members)
        busy = self._members[: len(requests)]
        for member in busy:
            self._send(member, Generate(requests[member.index :: count]))
        rollouts: list[Rollout | None] = [None] * len(requests)
        for member, answer in zip(busy, self._answers(busy, self._answer_timeout_s), strict=True):
            share = requests[member.index :: count]
            own = answer.rollouts if isinstance(answer, Generated) else []
            if [(r.sequence_id, r.prompt_index) for r in own] != [(r.sequence_id, r.prompt_index) for r in share]:
                self._died([member], "it answered other requests than its own")
            rollouts[member.index :: count] = own
        return [r for r in rollouts if r is not None]

    def update_weights(self, stream: Iterable[tuple[str, Tensor]], version: int) -> RefreshStats:
        """See ``RolloutEngine.update_weights``. Tensors are cast to the engine's dtype before they are sent."""
        if not self.settings.refreshable:
            raise EngineError("this engine was made with refreshable=False: its weights stay as they are")
        self._check_running()
        assert self._weights is not None
        began, count, total, dtype = time.monotonic(), 0, 0, DTYPES[self.settings.dtype]
        try:
            self._send_all(Update(version))
            checked = checked_stream(stream, self._shapes, self._optional)
            for tensors, size in buckets(checked, bucket_bytes=self._bucket_bytes, dtype=dtype):
                self._send_bucket(tensors)
                count += 1
                total += size
            self._send_all(Finish())
            self._answers(self._members, self._answer_timeout_s)
        except BaseException:
            self._let_go()  # some layers are new and some are old
            raise
        self._updated()
        return RefreshStats(seconds=time.monotonic() - began, bytes=total, buckets=count)

    def sleep(self) -> bool:
        """See ``RolloutEngine.sleep``: members keep their memory and their weights."""
        return False

    def _send_bucket(self, tensors: Mapping[str, Tensor]) -> None:
        assert self._weights is not None
        try:
            self._weights.send(tensors, self._send_all, self._confirm)
        except RuntimeError as error:
            if isinstance(error, EngineError):
                raise
            self._died(self._lost(GRACE_S), f"the broadcast of weights failed: {error}", error)

    def _confirm(self) -> None:
        self._answers(self._members, self._timeout_s)

    def _open(self, timeout_s: float) -> None:
        """Start the members' engines."""
        self._send_all(Open(msgspec.Raw(encode(self.settings)), self._threads, self._answer_timeout_s))
        self._answers(self._members, timeout_s)

    def _updated(self) -> None:
        """Called once new weights are in."""

    def _let_go(self) -> None:
        """Cut all connections without a word: an engine host waits for rank 0 to listen again."""
        for member in self._members:
            member.wire.close()
        if self._weights is not None:
            self._weights.close()
        self._members, self._weights = [], None

    def _check_running(self) -> None:
        if not self._members:
            raise EngineDied("the engine is not running")

    def _send_all(self, message: Message) -> None:
        for member in self._members:
            self._send(member, message)

    def _send(self, member: Member, message: Message) -> None:
        try:
            member.wire.send(message)
        except Disconnected as error:
            self._died([member], str(error), error)

    def _answers(self, members: Sequence[Member], timeout_s: float) -> list[Reply]:
        """One answer of each, within ``timeout_s`` for all of them. Raises EngineDied, or what a member raised."""
        deadline = time.monotonic() + timeout_s
        answers: list[Reply] = []
        for at, member in enumerate(members):
            try:
                while not member.wire.wait_readable(_POLL_S):
                    if lost := self._lost():
                        self._died(lost, "the connection was closed")
                    if time.monotonic() > deadline:
                        raise TimeoutError
                answer = member.wire.receive(Done | Generated | Failed, timeout_s=max(0.1, deadline - time.monotonic()))
            except Disconnected as error:
                self._died(self._lost() or [member], str(error), error)
            except TimeoutError as error:
                silent = [m for m in members[at:] if m is member or not m.wire.wait_readable(0)]
                self._died(silent, f"no answer within {timeout_s:g} s", error)
            if isinstance(answer, Failed):
                self._failed(member, answer)
            answers.append(answer)
        return answers

    def _failed(self, member: Member, answer: Failed) -> NoReturn:
        """Another member's end may be what this one suffered from: then that one is to be named."""
        lost = self._lost(GRACE_S) if len(self._members) > 1 else []
        if lost and member not in lost:
            self._died(lost, f"the connection ended; {member} then said: {answer.error}")
        self._refused(member, _KINDS.get(answer.kind, EngineError)(f"{member}: {answer.error}"))

    def _lost(self, grace_s: float = 0.0) -> list[Member]:
        """Members whose connection has ended, or ends within ``grace_s``."""
        until = time.monotonic() + grace_s
        while True:
            lost = [member for member in self._members if member.wire.lost()]
            if lost or time.monotonic() >= until:
                return lost
            time.sleep(0.02)

    def _died(self, members: Sequence[Member], reason: str, cause: BaseException | None = None) -> NoReturn:
        """Let all go and raise the EngineDied that names ``members`` (none: unknown which)."""
        raise NotImplementedError

    def _refused(self, member: Member, error: EngineError) -> NoReturn:
        """Let all go and raise what ``member`` could not do."""
        self._let_go()
        raise error
