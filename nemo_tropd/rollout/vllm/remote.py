"""The trainer's side of the wire: one engine made of one or more servers, for a child process and for engine hosts.

Requests are dealt out over the members in turn, or from one queue (dealing.py). Weights go to all of them at once, a
bucket at a time: every member says when it has a bucket, so one that is gone or silent is known by its name, and nobody
waits longer than a timeout.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field, replace
from typing import ClassVar, NoReturn

import msgspec
from torch import Tensor

from nemo_tropd.batch import Rollout
from nemo_tropd.rollout import engine as api
from nemo_tropd.rollout.vllm import wire as w
from nemo_tropd.rollout.vllm.dealing import Lengths, Queue, held_by_one
from nemo_tropd.rollout.vllm.settings import EngineSettings
from nemo_tropd.rollout.weights.senders import SharedMemory, WeightGroup
from nemo_tropd.rollout.weights.stream import buckets, checked_stream

_KINDS = {kind.__name__: kind for kind in (api.EngineDied, api.RequestError, api.WeightStreamError)}
# A member that dies takes others' broadcasts with it; whose connection ends within so long is the one to name.
GRACE_S = 1.0
_POLL_S = 0.1
_OTHERS = "it answered other requests than its own"


def _always() -> bool:
    return True


@dataclass(eq=False, repr=False)
class RemoteEngine:
    """A ``RolloutEngine`` of members, whose subclasses say where members come from (``start``), how weights travel and
    how a failure is described (``_describe``). Where one member fails, all are let go."""

    settings: EngineSettings
    _: KW_ONLY
    threads: int = 1  # OpenMP threads of an engine on CPU
    bucket_mib: int = 256  # size of a bucket of weights
    start_timeout_s: float = 1800.0  # for the engines to load the model: 145 GB from a shared disk
    timeout_s: float = 300.0  # for a bucket of weights
    answer_timeout_s: float = 3600.0  # for all rollouts of one call: members that need longer are dead
    queue: bool = False  # several members share one queue instead of having fixed shares
    _members: list[w.Wire] = field(default_factory=list, init=False)  # by index, all of them, or none
    _weights: SharedMemory | WeightGroup | None = field(default=None, init=False)
    _errors_are_deaths: ClassVar[bool] = False  # whether a new engine may succeed after one says that it failed
    _ready: bool = field(default=False, init=False)  # whether the members have weights to generate with
    _lengths: Lengths = field(default_factory=Lengths, init=False)

    def generate(
        self,
        requests: Sequence[api.RolloutRequest],
        finished: api.Finished | None = None,
        further: api.Further | None = None,
        wanted: api.Wanted | None = None,
    ) -> list[Rollout]:
        """Request I is served by member I modulo their number; of several with ``queue`` by whoever has room for it."""
        requests = list(requests)
        api.check_requests(requests, max_model_len=self.settings.max_model_len, vocab_size=self.settings.vocab_size)
        if not requests:
            return []
        self._check_running()
        wanted = wanted or _always
        if not self._ready:
            raise api.EngineError("the engines have not received weights yet: call update_weights() before generate()")
        if further is not None or (self.queue and len(self._members) > 1):
            return self._from_queue(requests, finished, further, wanted)
        return self._fixed_shares(requests, finished, wanted)

    def _fixed_shares(
        self, requests: Sequence[api.RolloutRequest], finished: api.Finished | None, wanted: api.Wanted
    ) -> list[Rollout]:
        count = len(self._members)
        busy = self._members[: len(requests)]
        for i, member in enumerate(busy):
            self._send(member, w.Generate(list(requests[i::count]), in_parts=finished is not None))
        parts: list[dict[tuple[int, int], Rollout]] = [{} for _ in busy]
        asked = [[(r.sequence_id, r.prompt_index) for r in requests[i::count]] for i in range(len(busy))]

        def take(i: int, r: Rollout) -> None:
            key = r.sequence_id, r.prompt_index
            if key in parts[i] or key not in asked[i]:
                self._died([busy[i]], _OTHERS)
            parts[i][key] = r
            if finished is not None:
                finished(r)

        def look() -> bool:
            if not (waited_for := wanted()):
                for member in busy:
                    self._send(member, w.Abandon())
            return waited_for

        rollouts: list[Rollout | None] = [None] * len(requests)
        for i, answer in enumerate(self._answers(busy, self.answer_timeout_s, take if finished else None, look)):
            own = list(answer.rollouts) if isinstance(answer, w.Generated) else []
            if finished is not None and len(parts[i]) == len(asked[i]) and not own:
                own = [parts[i][key] for key in asked[i]]
            if [(r.sequence_id, r.prompt_index) for r in own] != asked[i]:
                self._died([busy[i]], _OTHERS)
            rollouts[i::count] = own
        return [r for r in rollouts if r is not None]

    def _from_queue(
        self,
        requests: Sequence[api.RolloutRequest],
        finished: api.Finished | None,
        further: api.Further | None,
        wanted: api.Wanted,
    ) -> list[Rollout]:
        """Members are given more as they finish; on the wire a request's number is its place in the queue."""
        busy = self._members[: len(requests)]
        queue = Queue(requests, len(busy), held_by_one(self.settings.max_num_seqs), self._lengths)
        queue.closed = further is None
        found: dict[int, Rollout] = {}

        def given(places: Sequence[int]) -> list[api.RolloutRequest]:
            return [replace(queue.requests[place], sequence_id=place) for place in places]

        def take(i: int, r: Rollout) -> None:
            place = r.sequence_id
            if not queue.finished(i, place, len(r.response_ids)):
                self._died([busy[i]], _OTHERS)
            found[place] = replace(r, sequence_id=queue.requests[place].sequence_id)
            if finished is not None:
                finished(found[place])

        def look() -> bool:
            """Hand on what members have room for."""
            if not wanted():
                for outbox in outboxes:
                    outbox.put(w.Abandon())
                return False
            if further is not None and not queue.closed:
                some = further(False)
                queue.closed = some is None
                queue.add(some or ())
            for i, places, last in queue.deal():
                outboxes[i].put(w.More(given(places), last))
            for member, outbox in zip(busy, outboxes, strict=True):
                if outbox.error is not None:
                    self._died([member], str(outbox.error), outbox.error)
            return True

        for i, places, last in queue.deal():
            self._send(busy[i], w.Generate(given(places), in_parts=True, more=not last))
        outboxes = [w.Outbox(member) for member in busy]
        try:
            answers = self._answers(busy, self.answer_timeout_s, take, look)
        finally:
            for outbox in outboxes:
                outbox.close()
        for i, answer in enumerate(answers):
            if answer != w.Generated(w.Packed()) or not queue.done(i):
                self._died([busy[i]], _OTHERS)
        return [found[place] for place in range(len(queue.requests))]

    def update_weights(self, stream: Iterable[tuple[str, Tensor]], version: int) -> api.RefreshStats:
        """Tensors are cast to the engine's dtype before they are sent."""
        if not self.settings.refreshable:
            raise api.EngineError("this engine was made with refreshable=False: its weights stay as they are")
        self._check_running()
        began, sizes = time.monotonic(), []
        try:
            self._send_all(w.Update(version))
            checked = checked_stream(stream, *self.settings.shapes)
            dtype = api.DTYPES[self.settings.dtype]
            for tensors, size in buckets(checked, bucket_bytes=self.bucket_mib << 20, dtype=dtype):
                self._send_bucket(tensors)
                sizes.append(size)
            self._send_all(w.Finish())
            self._answers(self._members, self.answer_timeout_s)
        except BaseException:
            self._let_go()  # some layers are new and some are old
            raise
        self._ready = True
        return api.RefreshStats(seconds=time.monotonic() - began, bytes=sum(sizes), buckets=len(sizes))

    def sleep(self) -> bool:
        return False  # members keep their memory and their weights

    @property
    def members(self) -> Sequence[w.Wire]:
        """While the engine runs."""
        return self._members

    def _send_bucket(self, tensors: Mapping[str, Tensor]) -> None:
        assert self._weights is not None
        try:
            self._weights.send(tensors, self._send_all, lambda: self._answers(self._members, self.timeout_s))
        except api.EngineError:
            raise
        except RuntimeError as error:
            self._died(self._lost(GRACE_S), f"the broadcast of weights failed: {error}", error)

    def _open(self) -> None:
        """Start the members' engines."""
        self._send_all(w.Open(msgspec.Raw(w.encode(self.settings)), self.threads, self.answer_timeout_s))
        self._answers(self._members, self.start_timeout_s)

    def _let_go(self) -> None:
        """Cut all connections without a word: an engine host waits for rank 0 to listen again."""
        for member in self._members:
            member.close()
        if self._weights is not None:
            self._weights.close()
        self._members, self._weights, self._ready = [], None, False

    def _check_running(self) -> None:
        if not self._members:
            raise api.EngineDied("the engine is not running")

    def _send_all(self, message: w.Message) -> None:
        for member in self._members:
            self._send(member, message)

    def _send(self, member: w.Wire, message: w.Message) -> None:
        try:
            member.send(message)
        except w.Disconnected as error:
            self._died([member], str(error), error)

    def _answers(
        self,
        members: Sequence[w.Wire],
        timeout_s: float,
        take: Callable[[int, Rollout], None] | None = None,
        look: Callable[[], bool] = _always,
    ) -> list[w.Reply]:
        """One answer of each, within ``timeout_s`` for all of them; ``take`` is given the parts of answers, with their
        member's place, as they come; ``look`` is called after each, and is False once the members have been told to
        abandon what they do: their answers are then waited for and passed over. Raises EngineDied, Abandoned, or what a
        member raised."""
        deadline, wanted = time.monotonic() + timeout_s, True
        answers: dict[int, w.Reply] = {}
        while waiting := [m for i, m in enumerate(members) if i not in answers]:
            wanted = wanted and look()
            ready = w.readable(waiting, _POLL_S)
            if not ready and (lost := self._lost()):
                self._died(lost, "the connection was closed")
            if not ready and time.monotonic() > deadline:
                self._died(waiting, f"no answer within {timeout_s:g} s")
            for member in ready:
                match self._answer(member, deadline, timeout_s):
                    case w.Failed() as failure:
                        self._failed(member, failure)
                    case w.Part() as part:
                        if take is None:
                            self._died([member], "it sent a part of an answer where none was asked for")
                        if time.monotonic() > deadline:
                            self._died(waiting, f"no complete answer within {timeout_s:g} s")
                        for rollout in part.rollouts if wanted else ():
                            take(members.index(member), rollout)
                        wanted = wanted and look()
                    case answer:
                        answers[members.index(member)] = answer
        if not wanted:
            raise api.Abandoned("nobody waits for these rollouts any more")
        return [answers[i] for i in range(len(members))]

    def _answer(self, member: w.Wire, deadline: float, timeout_s: float) -> w.Answer:
        try:
            answer: w.Answer = member.receive(w.Answer, timeout_s=max(0.1, deadline - time.monotonic()))
            return answer
        except w.Disconnected as error:
            self._died(self._lost() or [member], str(error), error)
        except TimeoutError as error:
            self._died([member], f"no answer within {timeout_s:g} s", error)

    def _failed(self, member: w.Wire, answer: w.Failed) -> NoReturn:
        """Another member's end may be what this one suffered from: then that one is to be named."""
        lost = self._lost(GRACE_S) if len(self._members) > 1 else []
        if lost and member not in lost:
            self._died(lost, f"the connection ended; {member.name} then said: {answer.error}")
        error = _KINDS.get(answer.kind, api.EngineError)(f"{member.name}: {answer.error}")
        if self._errors_are_deaths:
            self._died([member], str(error), error)
        self._let_go()
        raise error

    def _lost(self, grace_s: float = 0.0) -> list[w.Wire]:
        """Members whose connection has ended, or ends within ``grace_s``."""
        until = time.monotonic() + grace_s
        while not (lost := [m for m in self._members if m.lost()]) and time.monotonic() < until:
            time.sleep(0.02)
        return lost

    def _died(self, members: Sequence[w.Wire], reason: str, cause: BaseException | None = None) -> NoReturn:
        """Let all go and raise the EngineDied that names ``members`` (none: unknown which)."""
        text = self._describe(members, reason)
        self._let_go()
        raise api.EngineDied(text) from cause

    def _describe(self, members: Sequence[w.Wire], reason: str) -> str:
        raise NotImplementedError
