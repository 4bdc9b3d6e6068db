"""Rollouts that come one by one over the wire, from members that do not keep to what they were asked."""

from __future__ import annotations

import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest

from nemo_tropd.batch import Rollout
from nemo_tropd.rollout.arrays import encode
from nemo_tropd.rollout.engine import EngineDied, RolloutRequest
from nemo_tropd.rollout.vllm import wire as w
from nemo_tropd.rollout.vllm.remote import RemoteEngine
from nemo_tropd.rollout.vllm.server import EngineServer
from nemo_tropd.rollout.vllm.settings import EngineSettings
from tests.doubles import Hosted, ReplayEngine
from tests.tiny_models import make_tiny

VOCABULARY = 131


class Engine(RemoteEngine):
    """Of members that are given."""

    def connect(self, wires: Sequence[w.Wire]) -> None:
        self._members, self._ready = list(wires), True

    def _describe(self, members: Sequence[w.Wire], reason: str) -> str:
        return f"{' and '.join(m.name for m in members)}: {reason}"


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> EngineSettings:
    return EngineSettings(make_tiny(tmp_path_factory.mktemp("parts") / "model", vocab=VOCABULARY), "float32", 64)


def requests(count: int) -> list[RolloutRequest]:
    return [RolloutRequest([1 + i], [], 17 * i, 10 + i, i, 5) for i in range(count)]


Member = Callable[[w.Wire, list[Rollout]], None]


def members(engine: Engine, *scripts: Member, in_parts: bool = True) -> list[threading.Thread]:
    """Peers that read what they are asked, and then do as their script says."""
    pairs = [socket.socketpair() for _ in scripts]
    engine.connect([w.Wire(ours, f"member {i}") for i, (ours, _) in enumerate(pairs)])

    def live(end: socket.socket, script: Member) -> None:
        wire = w.Wire(end)
        asked = wire.receive(w.Request)
        assert isinstance(asked, w.Generate) and asked.in_parts == in_parts
        try:
            script(wire, ReplayEngine(VOCABULARY).generate(asked.requests))
            wire.wait_readable(20)  # until the other side has had enough
        except w.Disconnected:
            pass
        finally:
            wire.close()

    threads = [
        threading.Thread(target=live, args=(end, s), daemon=True) for (_, end), s in zip(pairs, scripts, strict=True)
    ]
    for thread in threads:
        thread.start()
    return threads


def part(rollout: Rollout) -> w.Part:
    return w.Part(w.Packed([rollout]))


def good(wire: w.Wire, rollouts: list[Rollout]) -> None:
    for r in reversed(rollouts):
        wire.send(part(r))
    wire.send(w.Generated(w.Packed()))


def whole(wire: w.Wire, rollouts: list[Rollout]) -> None:
    wire.send(w.Generated(w.Packed(rollouts)))


def twice(wire: w.Wire, rollouts: list[Rollout]) -> None:
    wire.send(part(rollouts[0]))
    good(wire, rollouts)


def too_few(wire: w.Wire, rollouts: list[Rollout]) -> None:
    good(wire, rollouts[1:])


def of_another(wire: w.Wire, rollouts: list[Rollout]) -> None:
    stranger = ReplayEngine(VOCABULARY).generate(requests(99)[98:])
    good(wire, [*rollouts, *stranger])


def all_at_once(wire: w.Wire, rollouts: list[Rollout]) -> None:
    good(wire, rollouts[1:])
    wire.send(w.Generated(w.Packed(rollouts)))


def again_at_the_end(wire: w.Wire, rollouts: list[Rollout]) -> None:
    for r in rollouts:
        wire.send(part(r))
    wire.send(w.Generated(w.Packed(rollouts[:1])))


def silent(wire: w.Wire, rollouts: list[Rollout]) -> None:
    wire.send(part(rollouts[0]))


def slow(wire: w.Wire, rollouts: list[Rollout]) -> None:
    for r in rollouts:
        wire.send(part(r))
        time.sleep(0.05)  # always one within a look
    wire.send(w.Generated(w.Packed()))


def gone(wire: w.Wire, rollouts: list[Rollout]) -> None:
    wire.send(part(rollouts[0]))
    wire.close()


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        (twice, "member 1: it answered other requests than its own"),
        (too_few, "member 1: it answered other requests than its own"),
        (of_another, "member 1: it answered other requests than its own"),
        (all_at_once, "member 1: it answered other requests than its own"),
        (again_at_the_end, "member 1: it answered other requests than its own"),
        (silent, "member 1: no answer within 1 s"),
        (slow, "member 1: no complete answer within 1 s"),
        (gone, "member 1: the connection was closed"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_member_that_answers_otherwise_is_named(settings: EngineSettings, script: Member, reason: str) -> None:
    engine, told = Engine(settings, answer_timeout_s=1.0), list[Rollout]()
    threads = members(engine, good, script)
    began = time.monotonic()
    with pytest.raises(EngineDied) as died:
        engine.generate(requests(80), told.append)
    assert str(died.value) == reason and time.monotonic() - began < 10
    assert len({r.sequence_id for r in told}) == len(told) and all(r.sequence_id < 90 for r in told)
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()  # all are let go


def says(kind: str, rollouts: Callable[[list[Rollout]], object]) -> Member:
    """Sends a message whose rollouts are no rollouts."""

    def script(wire: w.Wire, own: list[Rollout]) -> None:
        wire._connection.send_bytes(w.encode({"type": kind, "rollouts": rollouts(own)}))

    return script


def longer_by(data: bytearray) -> bytes:
    """The first rollout says that its prompt has 2^40 tokens."""
    return bytes(data[:56]) + struct.pack("<q", 1 << 40) + bytes(data[64:])


@pytest.mark.parametrize("in_parts", [True, False])
@pytest.mark.parametrize(
    ("rollouts", "reason"),
    [
        (lambda own: [{"prompt_ids": [1]}], "rollouts are bytes, not list"),
        (lambda own: None, "rollouts are bytes, not NoneType"),
        (lambda own: b"", "0 bytes of rollouts, of which 24 are the header's"),
        (lambda own: bytes(encode(own))[:-1], "are not 40 rollouts with"),
        (lambda own: longer_by(encode(own)), "log-probabilities are not of these rollouts"),
    ],
    ids=["a list", "nothing", "no bytes", "cut", "too long"],
)
def test_a_member_whose_rollouts_are_none_is_named(
    settings: EngineSettings, rollouts: Callable[[list[Rollout]], object], reason: str, in_parts: bool
) -> None:
    engine, bad = Engine(settings, answer_timeout_s=30.0), says("Part" if in_parts else "Generated", rollouts)
    threads = members(engine, good if in_parts else whole, bad, in_parts=in_parts)
    with pytest.raises(EngineDied) as died:
        engine.generate(requests(80), *[lambda r: None] * in_parts)
    assert str(died.value).startswith("member 1: received a malformed message (") and reason in str(died.value)
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()


def test_a_part_that_nobody_asked_for(settings: EngineSettings) -> None:
    ours, theirs = socket.socketpair()
    engine = Engine(settings, answer_timeout_s=5.0)
    engine.connect([w.Wire(ours, "member 0")])
    w.Wire(theirs).send(part(ReplayEngine(VOCABULARY).generate(requests(1))[0]))
    with pytest.raises(EngineDied, match="it sent a part of an answer where none was asked for"):
        engine.generate(requests(1))


def test_what_takes_the_parts_may_fail(settings: EngineSettings) -> None:
    engine = Engine(settings, answer_timeout_s=5.0)
    members(engine, good)

    def take(r: Rollout) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        engine.generate(requests(3), take)


@pytest.fixture
def served(settings: EngineSettings) -> Iterator[tuple[w.Wire, Hosted, threading.Thread, list[bool]]]:
    """A server whose engine is a double, and the trainer's end of the wire."""
    ours, theirs = socket.socketpair()
    double, ended = Hosted(ReplayEngine(VOCABULARY)), list[bool]()
    server, wire = EngineServer(lambda *_: double, local=True), w.Wire(ours)
    thread = threading.Thread(target=lambda: ended.append(server.serve(w.Wire(theirs))), daemon=True)
    thread.start()
    import msgspec

    wire.send(w.Open(msgspec.Raw(w.encode(settings)), 1, 10.0))
    assert isinstance(wire.receive(w.Reply, timeout_s=20), w.Done)
    yield wire, double, thread, ended
    wire.close()


def test_a_server_sends_parts_and_then_the_end(served: Any) -> None:
    wire, double, _, _ = served
    wanted = requests(4)
    wire.send(w.Generate(wanted, in_parts=True))
    answers = [wire.receive(w.Answer, timeout_s=20) for _ in range(5)]
    assert [r for a in answers[:4] for r in a.rollouts] == double.generate(wanted)
    assert answers[4] == w.Generated(w.Packed())
    wire.send(w.Generate(wanted))
    assert wire.receive(w.Answer, timeout_s=20) == w.Generated(w.Packed(double.generate(wanted)))


def test_an_engine_outlives_a_trainer_that_leaves_between_two_parts(served: Any) -> None:
    """It ends its step and no more, so that it can be asked again."""
    wire, double, thread, ended = served
    seen, generate, step, all_sent = list[int](), double.engine.generate, 2, threading.Event()

    def watched(asked: Sequence[RolloutRequest], finished: Any = None) -> list[Rollout]:
        def tell(r: Rollout) -> None:
            if len(seen) == 1:
                all_sent.wait(20)
                wire.close()
                time.sleep(0.1)
            seen.append(r.sequence_id)
            finished(r)

        return generate(asked, tell)

    double.engine.generate = watched
    closed, double.close = list[bool](), lambda **_: closed.append(True)
    wanted = requests(4)
    wire.send(w.Generate(wanted[:step], in_parts=True, more=True))
    wire.send(w.More(wanted[step:], last=True))
    all_sent.set()
    thread.join(20)
    assert ended == [False] and seen == [10, 11] and not closed
