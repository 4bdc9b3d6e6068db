"""Engines that share one queue: who is given what and when, and members that do not keep to it."""

from __future__ import annotations

import random
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest

from nemo_tropd.batch import Rollout
from nemo_tropd.rollout.engine import Abandoned, EngineDied, EngineError, RequestError, RolloutRequest
from nemo_tropd.rollout.placement import Engines
from nemo_tropd.rollout.vllm import wire as w
from nemo_tropd.rollout.vllm.dealing import Lengths, Queue, held_by_one
from nemo_tropd.rollout.vllm.server import EngineServer
from nemo_tropd.rollout.vllm.settings import EngineSettings
from nemo_tropd.training.objective import build_objective
from nemo_tropd.training.resume import check_resumable, first_state
from tests.doubles import ReplayEngine
from tests.e2e.compose import compose_config
from tests.e2e.tiny_run import TinyRun
from tests.tiny_models import make_tiny
from tests.unit.test_parts_of_answers import Engine

VOCABULARY = 131
OTHERS = "it answered other requests than its own"


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> EngineSettings:
    """Of engines that run two sequences: each is given three at a time."""
    folder = make_tiny(tmp_path_factory.mktemp("queue") / "model", vocab=VOCABULARY)
    return EngineSettings(folder, "float32", 64, max_num_seqs=2)


def requests(count: int, tokens: int = 5) -> list[RolloutRequest]:
    return [RolloutRequest([1 + i % 90], [], 17 * i, 10 + i // 2, i, tokens) for i in range(count)]  # numbers repeat


# ---------------------------------------------------------------------------------------------- who is given what


def test_the_longest_expected_come_first_and_whoever_has_least_is_next() -> None:
    lengths, wanted = Lengths(), requests(7, tokens=40)
    for place, tokens in {0: 4, 1: 20, 2: 30, 3: 8, 4: 9}.items():
        lengths.add(wanted[place], tokens)
    lengths.add(wanted[4], 12)  # a mean of 10
    queue = Queue(wanted, 2, 2, lengths)
    queue.closed = True
    # Of 5 and 6 nothing is known: as long as they may be, in their order. Then 30, 20, 10, 8, 4.
    assert queue.deal() == [(0, [5, 2], False), (1, [6, 1], False)]
    assert [queue.deal(), queue.finished(1, 6, 40), queue.finished(1, 6, 40)] == [[], True, False]
    assert queue.deal() == [(1, [4], False)]
    assert queue.finished(0, 2, 30) and queue.deal() == [(0, [3], False)]
    assert not queue.finished(0, 4, 1)  # the other's
    assert queue.finished(1, 4, 9) and queue.deal() == [(0, [], True), (1, [0], True)]
    assert queue.deal() == [] and not queue.done(0)
    for member, place in ((0, 5), (0, 3), (1, 1), (1, 0)):
        assert queue.finished(member, place, 1)
    assert queue.done(0) and queue.done(1)


def test_where_nothing_is_known_the_order_is_that_of_the_list() -> None:
    queue = Queue(requests(9), 3, 2, Lengths())
    assert [places for _, places, _ in queue.deal()] == [[0, 3], [1, 4], [2, 5]]
    few = Queue(requests(2), 2, 2, Lengths())
    few.closed = True
    assert few.deal() == [(0, [0], True), (1, [1], True)]


def test_what_is_expected_of_a_request() -> None:
    lengths = Lengths()
    first = RolloutRequest([3, 4], [5] * 10, 1, 0, 7, 30)
    assert lengths.expected(first) == 30
    lengths.add(first, 10)  # twenty tokens, the teacher's prefix among them
    assert lengths.expected(first) == 10
    assert lengths.expected(RolloutRequest([3, 4], [], 2, 0, 7, 30)) == 20
    assert lengths.expected(RolloutRequest([3, 4], [], 2, 0, 7, 12)) == 12
    assert lengths.expected(RolloutRequest([3, 4], [5] * 25, 2, 0, 7, 12)) == 1
    assert lengths.expected(RolloutRequest([3, 5], [], 2, 0, 7, 30)) == 30  # a held-out prompt of the same index


@pytest.mark.random
def test_nobody_is_idle_while_requests_wait_and_each_is_given_once() -> None:
    for _ in range(20):
        members, held, count = random.randint(1, 5), random.randint(1, 4), random.randint(0, 40)
        queue = Queue(requests(count), members, held, Lengths())
        queue.closed = True
        has: list[list[int]] = [[] for _ in range(members)]
        given: list[int] = []
        last = [0] * members
        while True:
            for i, places, is_last in queue.deal():
                assert not last[i]
                has[i] += places
                given += places
                last[i] += is_last
            assert all(len(h) == held for h in has) or len(given) == count
            if not any(has):
                break
            i = random.choice([i for i in range(members) if has[i]])
            assert queue.finished(i, has[i].pop(random.randrange(len(has[i]))), 3)
        assert sorted(given) == list(range(count)) and last == [1] * members
        assert all(queue.done(i) for i in range(members))


def test_an_engine_has_its_sequences_and_some_that_wait() -> None:
    assert [held_by_one(n) for n in (1, 2, 64, 256)] == [2, 3, 69, 273]


# ------------------------------------------------------------------------------------------- members over the wire


class Member:
    """The other end of a wire, by hand."""

    def __init__(self, wire: w.Wire) -> None:
        self.wire, self.open, self.todo = wire, True, list[RolloutRequest]()
        self.asked = 0

    def take(self, message: Any) -> None:
        self.todo += message.requests
        self.asked += len(message.requests)
        self.open = message.more if isinstance(message, w.Generate) else not message.last

    def written(self) -> Rollout:
        return ReplayEngine(VOCABULARY).generate([self.todo.pop(0)])[0]

    def work(self, each: Callable[[Member], None] = lambda member: None) -> None:
        """As it should: tell of each, read what comes, and end."""
        while self.todo or self.open:
            while self.open and self.wire.wait_readable(0.0 if self.todo else 20.0):
                self.take(self.wire.receive(w.More, timeout_s=20))
            if self.todo:
                each(self)
                self.wire.send(w.Part(w.Packed([self.written()])))
        self.wire.send(w.Generated(w.Packed()))


Script = Callable[[Member], None]


def connected(engine: Engine, *scripts: Script) -> list[Member]:
    """Peers that read what they are asked first, and then do as their script says."""
    pairs = [socket.socketpair() for _ in scripts]
    engine.connect([w.Wire(ours, f"member {i}") for i, (ours, _) in enumerate(pairs)])
    found = [Member(w.Wire(theirs)) for _, theirs in pairs]

    def live(member: Member, script: Script) -> None:
        try:
            asked = member.wire.receive(w.Generate, timeout_s=20)
            member.take(asked)
            script(member)
            while member.wire.wait_readable(20):  # until the other side has had enough
                member.wire.receive(w.Request, timeout_s=20)
        except w.Disconnected:
            pass
        finally:
            member.wire.close()

    for member, script in zip(found, scripts, strict=True):
        threading.Thread(target=live, args=(member, script), daemon=True).start()
    return found


def good(member: Member) -> None:
    member.work()


def snail(member: Member) -> None:
    member.work(lambda member: time.sleep(0.05))


def test_who_is_faster_is_asked_more_and_the_answers_are_the_same(settings: EngineSettings) -> None:
    wanted = requests(60)
    alone = ReplayEngine(VOCABULARY).generate(wanted)
    engine, told = Engine(settings, queue=True), list[Rollout]()
    fast, slow = connected(engine, good, snail)
    assert engine.generate(wanted, told.append) == alone
    key = lambda r: (r.sequence_id, r.prompt_index)  # noqa: E731
    assert sorted(told, key=key) == sorted(alone, key=key)
    assert fast.asked + slow.asked == 60 and slow.asked < 20
    shares = Engine(settings)  # without the queue as before
    threads = connected(
        shares, lambda m: m.wire.send(w.Generated(w.Packed(ReplayEngine(VOCABULARY).generate(m.todo)))), good
    )
    assert not shares.queue and threads
    engine = Engine(settings, queue=True)
    (only,) = connected(engine, lambda m: m.wire.send(w.Generated(w.Packed(ReplayEngine(VOCABULARY).generate(m.todo)))))
    assert engine.generate(wanted) == alone and only.asked == 60 and not only.open  # one member: all at once


def test_fewer_requests_than_members(settings: EngineSettings) -> None:
    engine = Engine(settings, queue=True)
    first, second, idle = connected(engine, good, good, good)
    wanted = requests(2)
    assert engine.generate(wanted) == ReplayEngine(VOCABULARY).generate(wanted)
    assert (first.asked, second.asked, idle.asked) == (1, 1, 0) and engine.generate([]) == []


def test_what_was_seen_decides_what_comes_first(settings: EngineSettings) -> None:
    engine, wanted = Engine(settings, queue=True), requests(12, tokens=50)
    connected(engine, good, good)
    lengths = [len(r.response_ids) for r in engine.generate(wanted)]
    first: list[int] = []
    members = connected(engine, good, good)
    for member in members:

        def noted(message: Any, take: Callable[[Any], None] = member.take) -> None:
            first.extend(r.prompt_index for r in message.requests if isinstance(message, w.Generate))
            take(message)

        member.take = noted
    engine.generate(wanted)
    assert sorted(first) == sorted(sorted(range(12), key=lambda i: -lengths[i])[:6])


def twice(member: Member) -> None:
    again = member.todo[0]
    member.wire.send(w.Part(w.Packed([member.written()])))
    member.todo.insert(0, again)
    good(member)


def of_another(member: Member) -> None:
    stranger = ReplayEngine(VOCABULARY).generate([RolloutRequest([1], [], 5, 0, 0, 5)])[0]  # the first one's first
    member.wire.send(w.Part(w.Packed([stranger])))
    good(member)


def of_nobody(member: Member) -> None:
    member.wire.send(
        w.Part(w.Packed([ReplayEngine(VOCABULARY).generate([RolloutRequest([1], [], 5, 10**6, 0, 5)])[0]]))
    )
    good(member)


def too_early(member: Member) -> None:
    member.wire.send(w.Generated(w.Packed()))


def all_at_once(member: Member) -> None:
    every = list(member.todo)
    member.work()
    member.wire.send(w.Generated(w.Packed(ReplayEngine(VOCABULARY).generate(every))))


def again_at_the_end(member: Member) -> None:
    one = ReplayEngine(VOCABULARY).generate(member.todo[:1])
    send = member.wire.send
    member.wire.send = lambda message: send(w.Generated(w.Packed(one)) if isinstance(message, w.Generated) else message)
    good(member)


def silent(member: Member) -> None:
    member.wire.send(w.Part(w.Packed([member.written()])))


def slow(member: Member) -> None:
    member.work(lambda member: time.sleep(0.2))


def gone(member: Member) -> None:
    member.wire.send(w.Part(w.Packed([member.written()])))
    member.wire.close()


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        (twice, OTHERS),
        (of_another, OTHERS),
        (of_nobody, OTHERS),
        (too_early, OTHERS),
        (again_at_the_end, OTHERS),
        (silent, "no answer within 1 s"),
        (slow, "no complete answer within 1 s"),
        (gone, "the connection was closed"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_member_that_does_not_keep_to_it_is_named(settings: EngineSettings, script: Script, reason: str) -> None:
    told: list[Rollout] = []
    engine = Engine(settings, queue=True, answer_timeout_s=1.0 if script in (silent, slow) else 20.0)
    first, _ = connected(engine, slow if script is slow else good, script)
    began = time.monotonic()
    with pytest.raises(EngineDied) as died:
        engine.generate(requests(80), told.append)
    names = ("member 0 and member 1", "member 1", "member 0") if script is slow else ("member 1",)
    others = {gone: "the connection broke (Broken pipe)", slow: "no answer within 1 s"}  # noticed between parts
    reasons = [reason, others.get(script, reason)]
    assert str(died.value) in [f"{name}: {why}" for name in names for why in reasons]
    assert time.monotonic() - began < 15 and len({(r.sequence_id, r.prompt_index) for r in told}) == len(told)
    deadline = time.monotonic() + 10
    while not first.wire.lost():  # all are let go
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_member_that_takes_nothing_holds_up_nobody_else(
    settings: EngineSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It reads no requests, which are too long for the buffers of its socket, and so is named; meanwhile the other is
    served."""
    long = [RolloutRequest([1] * 60, [], i, i, i, 4) for i in range(4000)]
    engine, told = Engine(settings, queue=True, answer_timeout_s=30.0), list[float]()

    def deaf(member: Member) -> None:
        while member.todo:
            member.wire.send(w.Part(w.Packed([member.written()])))
        time.sleep(20)

    monkeypatch.setattr("nemo_tropd.rollout.vllm.remote.held_by_one", lambda n: 1500)
    connected(engine, good, deaf)
    wire = engine._members[1]
    send = wire.send
    wire.send = lambda message: send(message, 3.0)
    began = time.monotonic()
    with pytest.raises(EngineDied, match=r"^member 1: it took no message within 3 s"):
        engine.generate(long, lambda r: told.append(time.monotonic() - began))
    assert time.monotonic() - began < 20 and told[-1] > 2  # while the send to member 1 waited


def test_what_takes_the_rollouts_may_fail(settings: EngineSettings) -> None:
    engine = Engine(settings, queue=True)
    connected(engine, good, good)
    with pytest.raises(ZeroDivisionError):
        engine.generate(requests(9), lambda r: 1 / 0)
    before = [t.name for t in threading.enumerate()]
    deadline = time.monotonic() + 10
    engine._let_go()
    while "outbox" in [t.name for t in threading.enumerate()]:
        assert time.monotonic() < deadline, before
        time.sleep(0.01)


# --------------------------------------------------------------------------------------------------- the server


class Stepping(ReplayEngine):
    """Does one request a step, and asks for more between two; ``fails`` at that step."""

    def __init__(self, fails: int = -1) -> None:
        super().__init__(VOCABULARY)
        self.fails, self.steps, self.asked, self.closed = fails, threading.Semaphore(0), list[list[int]](), 0

    def generate(
        self, requests: Sequence[RolloutRequest], finished: Any = None, further: Any = None, wanted: Any = None
    ) -> list[Rollout]:
        todo, done, over = list(requests), list[Rollout](), further is None
        self.asked.append([r.sequence_id for r in requests])
        while todo or not over:
            if todo:
                assert self.steps.acquire(timeout=20)
                if len(done) == self.fails:
                    raise EngineError("no more")
                done += super().generate([todo.pop(0)])
                if finished is not None:
                    finished(done[-1])
            if wanted is not None and not wanted():
                raise Abandoned(f"{len(todo)} are left")
            if not over:
                some = further(not todo)
                over = some is None
                todo += some or []
                self.asked.append([r.sequence_id for r in some or []])
        return done

    def close(self, *, run_over: bool = False) -> None:
        self.closed += 1


Served = tuple[w.Wire, Stepping, threading.Thread, list[bool]]


@pytest.fixture
def serve(settings: EngineSettings) -> Iterator[Callable[[Stepping], Served]]:
    wires = []

    def start(double: Stepping) -> Served:
        ours, theirs = socket.socketpair()
        ended: list[bool] = []
        server, wire = EngineServer(lambda *_: double, local=True), w.Wire(ours)
        thread = threading.Thread(target=lambda: ended.append(server.serve(w.Wire(theirs))), daemon=True)
        thread.start()
        wires.append(wire)
        wire.send(w.Open(msgspec.Raw(w.encode(settings)), 1, 10.0))
        assert isinstance(wire.receive(w.Reply, timeout_s=20), w.Done)
        return wire, double, thread, ended

    yield start
    for wire in wires:
        wire.close()


def test_requests_come_in_between_two_steps(serve: Any) -> None:
    wire, double, _, _ = serve(Stepping())
    wanted = requests(6)
    wire.send(w.Generate(wanted[:2], in_parts=True, more=True))
    double.steps.release()
    parts = [wire.receive(w.Answer, timeout_s=20)]
    wire.send(w.More(wanted[2:4], last=False))
    time.sleep(0.2)
    double.steps.release(3)
    parts += [wire.receive(w.Answer, timeout_s=20) for _ in range(3)]
    assert not wire.wait_readable(0.2)  # nothing is left, but more may come
    wire.send(w.More([], last=False))
    wire.send(w.More(wanted[4:], last=True))
    double.steps.release(2)
    parts += [wire.receive(w.Answer, timeout_s=20) for _ in range(2)]
    assert [r for p in parts for r in p.rollouts] == ReplayEngine(VOCABULARY).generate(wanted)
    assert wire.receive(w.Answer, timeout_s=20) == w.Generated(w.Packed())
    # The second ones came after the first or the second step, which are the first ones'.
    assert double.asked[0] == [10, 10] and [11, 11] in double.asked[1:3] and double.asked[-1] == []
    wire.send(w.Generate(wanted[:1]))
    double.steps.release()
    assert len(wire.receive(w.Answer, timeout_s=20).rollouts) == 1


def test_requests_for_an_engine_that_has_failed_are_passed_over(serve: Any) -> None:
    wire, double, thread, ended = serve(Stepping(fails=1))
    wire.send(w.Generate(requests(3), in_parts=True, more=True))
    double.steps.release(2)
    assert isinstance(wire.receive(w.Answer, timeout_s=20), w.Part)
    assert wire.receive(w.Answer, timeout_s=20) == w.Failed("EngineError", "no more")
    wire.send(w.More(requests(1), last=True))
    wire.send(w.Generate(requests(1)))
    assert wire.receive(w.Answer, timeout_s=20) == w.Failed("EngineError", "the engine is not running")
    wire.send(w.Close())
    thread.join(20)
    assert ended == [True] and double.closed == 1


@pytest.mark.parametrize("idle", [False, True])
def test_an_engine_outlives_a_trainer_that_leaves_while_more_may_come(serve: Any, idle: bool) -> None:
    wire, double, thread, ended = serve(Stepping())
    wire.send(w.Generate(requests(2), in_parts=True, more=True))
    double.steps.release(2 if idle else 1)
    for _ in range(2 if idle else 1):
        assert isinstance(wire.receive(w.Answer, timeout_s=20), w.Part)
    wire.close()
    if not idle:
        double.steps.release()  # the next step is the last
    thread.join(20)
    assert ended == [False] and double.closed == 0


@pytest.mark.parametrize("in_parts", [False, True])
def test_an_engine_does_not_go_on_for_a_trainer_that_has_left(serve: Any, in_parts: bool) -> None:
    wire, double, thread, ended = serve(Stepping())
    wire.send(w.Generate(requests(9), in_parts=in_parts))
    double.steps.release(3)
    for _ in range(3 if in_parts else 0):
        assert isinstance(wire.receive(w.Answer, timeout_s=20), w.Part)
    wire.close()
    double.steps.release()
    thread.join(20)
    assert ended == [False] and double.closed == 0


def test_an_engine_that_is_told_that_nobody_waits_has_ended_its_call(serve: Any) -> None:
    """Told too late, it passes that over."""
    wire, double, _, _ = serve(Stepping())
    for more in (False, True):
        double.steps = threading.Semaphore(0)  # nine steps are needed, and two may be taken
        wire.send(w.Generate(requests(9), in_parts=True, more=more))
        double.steps.release()
        assert isinstance(wire.receive(w.Answer, timeout_s=20), w.Part)
        wire.send(w.Abandon())
        wire.wait_readable(0.2)
        double.steps.release()
        answers = [wire.receive(w.Answer, timeout_s=20)]
        while isinstance(answers[-1], w.Part):
            answers.append(wire.receive(w.Answer, timeout_s=20))
        assert answers[-1] == w.Generated(w.Packed()) and len(answers) <= 2
    double.steps = threading.Semaphore(0)
    wire.send(w.Abandon())
    wire.send(w.Generate(requests(2)))
    double.steps.release(2)
    assert len(wire.receive(w.Answer, timeout_s=20).rollouts) == 2


def test_an_engine_of_an_engine_passes_requests_on(settings: EngineSettings) -> None:
    """On a CPU the host's engine is a client itself, of a child process."""
    inner, outer = Engine(settings), Engine(settings, queue=True)
    connected(inner, good)
    ours, theirs = socket.socketpair()
    server = EngineServer(lambda *_: inner, True, inner)
    threading.Thread(target=server.serve, args=(w.Wire(theirs),), daemon=True).start()
    other, member = socket.socketpair()
    outer.connect([w.Wire(ours, "member 0"), w.Wire(other, "member 1")])
    second = Member(w.Wire(member))

    def live() -> None:
        second.take(second.wire.receive(w.Generate, timeout_s=20))
        snail(second)

    threading.Thread(target=live, daemon=True).start()
    wanted = requests(20)
    assert outer.generate(wanted) == ReplayEngine(VOCABULARY).generate(wanted) and second.asked < 17


def test_a_request_that_cannot_be_served_is_refused_before_any_is_dealt(settings: EngineSettings) -> None:
    engine = Engine(settings, queue=True)
    members = connected(engine, good, good)
    with pytest.raises(RequestError, match="context of 64"):
        engine.generate([*requests(9), RolloutRequest([1] * 60, [], 1, 0, 0, 9)])
    assert [m.asked for m in members] == [0, 0]
    assert len(engine.generate(requests(9))) == 9


def test_a_run_chooses_by_a_key_that_a_resumed_run_may_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEMO_TROPD_SECRET", "a secret of this test")
    tiny, made = TinyRun.make(tmp_path), []
    for queue in (None, True):
        keys: dict[str, object] = {} if queue is None else {"model.rollout.dedicated.queue": queue}
        keys |= {"model.rollout.placement": "dedicated", "model.rollout.dedicated.engines": 2}
        keys |= {"model.rollout.dedicated.timeout_s": 60}
        cfg = compose_config(tiny.overrides(tmp_path / "run", **keys, **{"model.rollout.dedicated.address": "a:1"}))
        made.append((Engines(VOCABULARY).student(cfg), first_state(cfg, build_objective(cfg), {}, "run")))
    assert [engine.queue for engine, _ in made] == [False, True]
    assert check_resumable(made[0][1], made[1][1]) == []
