"""Strangers and wrong hosts at the trainer's door, and strangers at a host's: each is named, the run is unharmed."""

from __future__ import annotations

import os
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from multiprocessing import AuthenticationError
from multiprocessing.connection import Connection, answer_challenge, deliver_challenge
from pathlib import Path

import msgspec
import pytest

from nemo_tropd.rollout.engine import EngineError
from nemo_tropd.rollout.engine_host import serve
from nemo_tropd.rollout.vllm import hosts as door
from nemo_tropd.rollout.vllm.hosts import DedicatedEngines
from nemo_tropd.rollout.vllm.settings import EngineSettings, model_fingerprint
from nemo_tropd.rollout.vllm.wire import PROTOCOL, Disconnected, Done, Hello, Wire, encode
from tests.dist.test_dedicated import SECRET, VOCABULARY, requests, weights, written
from tests.doubles import Hosted, ReplayEngine
from tests.ports import free_port
from tests.tiny_models import make_tiny

SMALL = {"hidden": 64, "head_dim": 32, "vocab": VOCABULARY}


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> EngineSettings:
    model = make_tiny(tmp_path_factory.mktemp("model") / "model", **SMALL)
    return EngineSettings(model, dtype="float32", max_model_len=64)


def connect(port: int) -> socket.socket:
    deadline = time.monotonic() + 60
    while True:
        with suppress(ConnectionRefusedError):
            return socket.create_connection(("127.0.0.1", port))
        assert time.monotonic() < deadline
        time.sleep(0.05)


def until_closed(connected: socket.socket) -> None:
    with suppress(OSError):
        while connected.recv(4096):
            pass


def proven(connected: socket.socket) -> Connection:
    """A peer that has the secret, and has read the greeting."""
    connection = Connection(connected.dup().detach())
    answer_challenge(connection, SECRET)
    deliver_challenge(connection, SECRET)
    connection.recv_bytes()
    return connection


def hello(settings: EngineSettings, **changes: object) -> bytes:
    fields = {
        "protocol": PROTOCOL,
        "index": 0,
        "device": "cpu",
        "host": "here",
        "process": 1,
        "model": model_fingerprint(settings.model_dir),
    }
    return encode({"type": "Hello", **fields, **changes})


def nothing(connected: socket.socket, settings: EngineSettings) -> None:
    until_closed(connected)


def drip(connected: socket.socket, settings: EngineSettings) -> None:
    with suppress(OSError):
        connected.sendall(struct.pack("!i", 250))  # twelve seconds of drops, and no more than a proof may have
        while True:
            connected.sendall(b"x")
            time.sleep(0.05)


def drip_after_proof(connected: socket.socket, settings: EngineSettings) -> None:
    proven(connected)
    drip(connected, settings)


def http(connected: socket.socket, settings: EngineSettings) -> None:
    connected.sendall(b"GET / HTTP/1.1\r\n\r\n")
    until_closed(connected)


def wrong_secret(connected: socket.socket, settings: EngineSettings) -> None:
    connection = Connection(connected.dup().detach())
    with pytest.raises(AuthenticationError):
        answer_challenge(connection, b"another secret of theirs")
    until_closed(connected)


def no_hello(connected: socket.socket, settings: EngineSettings) -> None:
    proven(connected)
    until_closed(connected)


def says(data: Callable[[EngineSettings], bytes]) -> Callable[[socket.socket, EngineSettings], None]:
    def peer(connected: socket.socket, settings: EngineSettings) -> None:
        proven(connected).send_bytes(data(settings))
        until_closed(connected)

    return peer


def too_long(connected: socket.socket, settings: EngineSettings) -> None:
    connection = proven(connected)
    with suppress(OSError):
        connection.send_bytes(bytes(1 << 22))
    until_closed(connected)


PEERS: dict[str, tuple[Callable[[socket.socket, EngineSettings], None], str]] = {
    "says nothing": (nothing, "no complete message within"),
    "drips": (drip, "no complete message within"),
    "drips after its proof": (drip_after_proof, "no complete message within"),
    "speaks http": (http, "the connection broke"),
    "wrong secret": (wrong_secret, "it does not have the same secret"),
    "no hello": (no_hello, "no complete message within"),
    "wrong types": (says(lambda s: hello(s, process="x")), "malformed message"),
    "infinity": (says(lambda s: hello(s, process=float("inf"))), "malformed message"),
    "60,000 brackets": (says(lambda s: b"\x82\xa4type\xa5Hello\xa1x" + b"\x91" * 60_000), "malformed message"),
    "not a map": (says(lambda s: b"\x91" * 60_000), "malformed message"),
    "bad text": (says(lambda s: hello(s, host="abcd").replace(b"abcd", b"\xff\xfe\xfd\xfc")), "malformed message"),
    "over the limit": (too_long, "the connection broke"),
    "another protocol": (says(lambda s: hello(s, protocol=PROTOCOL + 1)), f"this host version {PROTOCOL + 1}"),
    "another model": (says(lambda s: hello(s, model="0" * 64)), "has another model than the trainer's at"),
    "no model": (says(lambda s: hello(s, model="")), "has no checkpoint at"),
    "another device": (says(lambda s: hello(s, device="cuda")), "computes on cpu and this host on 'cuda'"),
    "index past the end": (says(lambda s: hello(s, index=1)), "--index 1: model.rollout.dedicated.engines is 1"),
    "index below 0": (says(lambda s: hello(s, index=-1)), "--index -1: model.rollout.dedicated.engines is 1"),
}


# Only these take as long as they are let: the others must be named for what they say, however busy the machine is.
SILENT = [name for name, (_, reason) in PEERS.items() if reason == "no complete message within"]
TALKING = [name for name in PEERS if name not in SILENT]


def honest_host(port: int, settings: EngineSettings, index: int = 0) -> threading.Thread:
    host = threading.Thread(
        target=serve,
        args=(("127.0.0.1", port), index, lambda *_: Hosted(ReplayEngine(VOCABULARY))),
        kwargs={"secret": SECRET, "wait_s": 30},
        daemon=True,
    )
    host.start()
    return host


@pytest.mark.parametrize(("peers", "greeting_timeout_s"), [(SILENT, 5.0), (TALKING, 100.0)], ids=["silent", "talking"])
def test_bad_peers_are_named_and_the_run_goes_its_way(
    settings: EngineSettings,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    peers: list[str],
    greeting_timeout_s: float,
) -> None:
    monkeypatch.setattr(door, "_GREETING_TIMEOUT_S", greeting_timeout_s)
    port, said, finished = free_port(), {}, set()
    engines = DedicatedEngines(settings, address=("127.0.0.1", port), engines=1, secret=SECRET, timeout_s=250)
    started = threading.Thread(target=engines.start, daemon=True)
    started.start()

    def visit(name: str) -> None:
        connected = connect(port)
        said[name] = f"127.0.0.1:{connected.getsockname()[1]}"
        with connected:
            PEERS[name][0](connected, settings)
            finished.add(name)

    visits = [threading.Thread(target=visit, args=(name,), daemon=True) for name in peers]
    for thread in visits:  # all at once: a silent one must not keep the next waiting
        thread.start()
    for thread in visits:
        thread.join(120)  # one that drips would never end by itself
        assert not thread.is_alive()
    assert finished == set(peers)
    host = honest_host(port, settings)
    started.join(60)
    assert not started.is_alive()
    engines.update_weights(iter(weights(settings).items()), 1)
    wanted = requests(3)
    assert engines.generate(wanted) == written(wanted, 1)
    engines.close(run_over=True)
    host.join(60)
    assert not host.is_alive()
    out = capfd.readouterr().out
    for name in peers:
        lines = [line for line in out.splitlines() if line.startswith(f"refused a connection from {said[name]}: ")]
        assert len(lines) == 1 and PEERS[name][1] in lines[0], (name, lines)


def test_the_same_host_twice(settings: EngineSettings, capfd: pytest.CaptureFixture[str]) -> None:
    port = free_port()
    engines = DedicatedEngines(settings, address=("127.0.0.1", port), engines=2, secret=SECRET, timeout_s=60)
    started = threading.Thread(target=engines.start, daemon=True)
    started.start()
    honest_host(port, settings)
    while "engine host 0 (process" not in (seen := capfd.readouterr().out):
        time.sleep(0.05)
    assert f"engine host 0 (process {os.getpid()} on " in seen
    with pytest.raises(EngineError, match=r"rank 0 refused this host: --index 0 is taken by engine host 0 \(process"):
        serve(("127.0.0.1", port), 0, lambda *_: Hosted(ReplayEngine(VOCABULARY)), secret=SECRET, wait_s=5)
    honest_host(port, settings, index=1)
    started.join(60)
    assert not started.is_alive() and "--index 0 is taken by engine host 0" in capfd.readouterr().out
    engines.close(run_over=True)


def test_a_host_with_another_model_is_told_and_exits(settings: EngineSettings, tmp_path: Path) -> None:
    """Host and trainer share no disk: the path is the same, the checkpoint is not."""
    port = free_port()
    engines = DedicatedEngines(settings, address=("127.0.0.1", port), engines=1, secret=SECRET, timeout_s=15)
    outcome: list[str] = []

    def start() -> None:
        try:
            engines.start()
        except EngineError as error:
            outcome.append(str(error))

    started = threading.Thread(target=start, daemon=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nemo_tropd.rollout.engine_host.model_fingerprint", lambda path: "f" * 64)
        started.start()
        with pytest.raises(EngineError, match=r"refused this host: --index 0 has another model than the trainer's at /"):
            serve(("127.0.0.1", port), 0, lambda *_: Hosted(ReplayEngine(VOCABULARY)), secret=SECRET, wait_s=5)
    started.join(60)
    assert "engine host(s) 0 of 1 did not join within 15 s (1 connection(s) were refused, see above)" in outcome[0]
    other = make_tiny(tmp_path / "other", **{**SMALL, "hidden": 128})
    copy = make_tiny(tmp_path / "copy", seed=5, **SMALL)
    assert model_fingerprint(other) != model_fingerprint(settings.model_dir) == model_fingerprint(copy)
    assert model_fingerprint(tmp_path / "nowhere") == ""


def stranger_listens(behave: Callable[[Connection], None]) -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def accept() -> None:
            with suppress(OSError):
                while True:
                    connection = Connection(listener.accept()[0].detach())
                    threading.Thread(target=behave, args=(connection,), daemon=True).start()

        threading.Thread(target=accept, daemon=True).start()
        yield listener.getsockname()[1]


HEARD: list[bytes] = []


def drips_at_hosts(connection: Connection) -> None:
    with suppress(OSError):
        os.write(connection.fileno(), struct.pack("!i", 100))
        while True:
            os.write(connection.fileno(), b"x")
            time.sleep(0.05)


def wants_a_hello(connection: Connection) -> None:
    connection.send_bytes(encode(Done()))
    with suppress(OSError, EOFError):
        HEARD.append(connection.recv_bytes())


def has_no_secret(connection: Connection) -> None:
    with suppress(Exception):
        deliver_challenge(connection, b"a guess at the secret")
        HEARD.append(connection.recv_bytes())


@pytest.mark.parametrize(
    ("behave", "reason"),
    [
        (drips_at_hosts, "no complete message within"),
        (wants_a_hello, "it sent something that is no proof of the secret"),
        (has_no_secret, "it does not have the same secret"),
    ],
)
def test_a_host_tells_a_stranger_that_listens_nothing(
    behave: Callable[[Connection], None], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit = 1.0 if behave is drips_at_hosts else 60.0  # the others are named for what they say, on a busy machine, too
    monkeypatch.setattr("nemo_tropd.rollout.engine_host._GREETING_TIMEOUT_S", limit)
    HEARD.clear()
    for port in stranger_listens(behave):
        with pytest.raises(EngineError, match=f"no trainer with this host's secret listened at .*{reason}"):
            serve(("127.0.0.1", port), 0, lambda *_: Hosted(ReplayEngine(VOCABULARY)), secret=SECRET, wait_s=1.5)
    assert HEARD == []


def test_a_host_that_is_connected_to_itself_leaves_the_port_to_the_trainer(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel may give a client the very port that it asks for, and connects it to itself if nobody listens."""
    port, connect, connected = free_port(), socket.create_connection, []

    def unlucky(address: tuple[str, int], timeout: float) -> socket.socket:
        connected.append(connect(address, timeout, source_address=address))
        assert connected[-1].getpeername() == connected[-1].getsockname() == address
        return connected[-1]

    monkeypatch.setattr(socket, "create_connection", unlucky)
    with pytest.raises(EngineError, match="no trainer with this host's secret listened at .*Connection refused"):
        serve(("127.0.0.1", port), 0, lambda *_: Hosted(ReplayEngine(VOCABULARY)), secret=SECRET, wait_s=0)
    assert [c.fileno() for c in connected] == [-1] * len(connected) and connected
    socket.create_server(("127.0.0.1", port)).close()


def pair() -> tuple[Wire, socket.socket]:
    ours, theirs = socket.socketpair()
    return Wire(ours), theirs


def test_a_drip_cannot_stretch_a_read_nor_a_send() -> None:
    wire, other = pair()
    stop = threading.Event()

    def drip() -> None:
        with suppress(OSError):
            other.sendall(struct.pack("!i", 1_000_000))  # at this rate a day
            while not stop.wait(0.05):
                other.sendall(b"x")

    threading.Thread(target=drip, daemon=True).start()
    with pytest.raises(TimeoutError, match="no complete message within 1 s"):
        wire.receive(Done, timeout_s=1)
    stop.set()
    wire, other = pair()

    def sip() -> None:
        with suppress(OSError):
            while other.recv(1):
                time.sleep(0.05)

    threading.Thread(target=sip, daemon=True).start()
    long = Hello(PROTOCOL, 0, "cpu", "x" * 10_000_000, 1, "")
    with pytest.raises(Disconnected, match="it took no message within 1 s"):
        wire.send(long, timeout_s=1)


def test_messages_travel_and_ends_are_noticed() -> None:
    wire, other = pair()
    peer = Wire(other)
    long = Hello(PROTOCOL, 0, "cpu", "\u00e9" * 3_000_000, 1, "")
    sender = threading.Thread(target=peer.send, args=(long,))
    sender.start()
    assert wire.receive(Hello, timeout_s=100) == long
    sender.join()
    with pytest.raises(Disconnected, match="malformed message"):
        peer.send(Done())
        wire.receive(Hello, timeout_s=100)
    assert not wire.lost()
    peer.close()
    assert wire.lost()
    with pytest.raises(Disconnected, match="connection was closed"):
        wire.receive(Hello)
    with pytest.raises(Disconnected):
        wire.send(Done())
    wire.close()
    wire.close()


def test_settings_survive_the_way(settings: EngineSettings) -> None:
    from nemo_tropd.rollout.engine import Sampling
    from nemo_tropd.rollout.vllm.wire import Open, Request, decode

    other = EngineSettings(
        settings.model_dir,
        dtype="float32",
        max_model_len=9,
        sampling=Sampling(0.3, 0.4, 5),
        eos_ids=(3, 4),
        weights_shapes={"a": (2, 3)},
        kv_cache_gib=None,
        true_vocab_size=77,
    )
    for sent in (settings, other):
        arrived = decode(encode(Open(msgspec.Raw(encode(sent)), 2, 3.0)), Request)
        assert decode(bytes(arrived.settings), EngineSettings) == sent
