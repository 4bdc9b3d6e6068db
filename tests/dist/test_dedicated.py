"""Engines on hosts of their own: real host processes on the loopback, gloo, and a double in place of vLLM."""

from __future__ import annotations

import os
import random
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from nemo_tropd.batch import Rollout
from nemo_tropd.config import ConfigError
from nemo_tropd.parallel import signals
from nemo_tropd.parallel.agreement import World
from nemo_tropd.rollout import engine_host
from nemo_tropd.rollout.vllm.hosts import DedicatedEngines
from nemo_tropd.rollout.engine import (
    Abandoned,
    EngineDied,
    EngineError,
    Finished,
    Further,
    RefreshStats,
    RequestError,
    RolloutRequest,
    Wanted,
    WeightStreamError,
)
from nemo_tropd.rollout.engine_host import serve
from nemo_tropd.rollout.vllm.settings import EngineSettings
from nemo_tropd.rollout.collective import RankZeroRollouts
from tests.dist.run_distributed import process_context
from tests.doubles import Hosted, ReplayEngine
from tests.ports import free_port
from tests.tiny_models import make_tiny

pytestmark = pytest.mark.random

VOCABULARY = 131
SECRET = b"the secret of these tests"


class HostDouble(ReplayEngine):
    """Writes what it was given under ``folder``; while a file named hang lies there it hangs in ``generate``, and with
    one named full it does not start."""

    def __init__(self, folder: Path, settings: EngineSettings) -> None:
        super().__init__(settings.vocab_size)
        self.folder, self.settings = folder, settings

    def start(self) -> None:
        if (self.folder / "full").exists():
            raise EngineError("no room for the model")
        with (self.folder / "starts").open("a") as file:
            file.write(f"{self.settings.seed} {self.settings.model_dir}\n")

    def generate(
        self,
        requests: Sequence[RolloutRequest],
        finished: Finished | None = None,
        further: Further | None = None,
        wanted: Wanted | None = None,
    ) -> list[Rollout]:
        (self.folder / "generating").write_text(str(len(requests)))
        *others, last = super().generate(requests)
        if finished is not None:
            for r in others:
                finished(r)
        while (self.folder / "hang").exists():  # in one step
            time.sleep(0.05)
        if wanted is not None and not wanted():
            raise Abandoned("nobody waits")
        if finished is not None:
            finished(last)
        rollouts = [*others, last]
        while further is not None and (more := further(True)) is not None:
            rollouts += super().generate(more, finished)
        return rollouts

    def update_weights(self, stream: Iterable[tuple[str, Tensor]], version: int) -> RefreshStats:
        # Kept, not copied: what a bucket holds must stay as it is.
        held = dict(stream)
        save_file({name: tensor.clone() for name, tensor in held.items()}, self.folder / f"v{version}.safetensors")
        return super().update_weights(iter(held.items()), version)


def host_process(port: int, index: int, folder: str, wait_s: float) -> None:
    """The life of an engine host, with a double engine."""
    serve(
        ("127.0.0.1", port),
        index,
        lambda settings, threads, answer_timeout_s: HostDouble(Path(folder), settings),
        secret=SECRET,
        wait_s=wait_s,
    )


def host_command(port: int, index: int, folder: str, wait_s: float) -> None:
    """``host_process`` as a user starts it: with its handling of signals."""
    signals.FINISH_S = 3.0
    os.environ["NEMO_TROPD_SECRET"] = SECRET.decode()
    vars(engine_host)["own_engine"] = lambda settings, *_: HostDouble(Path(folder), settings)
    sys.argv = ["engine_host", "--join", f"127.0.0.1:{port}", "--index", str(index), "--wait-s", str(wait_s)]
    engine_host.main()


class Hosts:
    """Host processes of one test, and the leader's settings."""

    def __init__(self, root: Path, count: int = 2) -> None:
        self.port = free_port()
        self.root, self.count = root, count
        self.processes: dict[int, BaseProcess] = {}
        # Some MiB of weights, so that they take several buckets; tied, so that the head is not among them.
        model = make_tiny(root / "model", hidden=256, head_dim=64, vocab=VOCABULARY)
        self.settings = EngineSettings(model, dtype="bfloat16", max_model_len=64, seed=random.randrange(1 << 30))

    def folder(self, index: int) -> Path:
        folder = self.root / f"host{index}"
        folder.mkdir(exist_ok=True)
        return folder

    def start(self, *indices: int, wait_s: float = 60, life: Callable[..., None] = host_process) -> None:
        for index in indices:
            process = process_context().Process(target=life, args=(self.port, index, str(self.folder(index)), wait_s))
            process.start()
            self.processes[index] = process

    def kill(self, index: int, sign: int = signal.SIGKILL) -> None:
        pid = self.processes[index].pid
        assert pid is not None
        os.kill(pid, sign)

    def codes(self) -> list[int | None]:
        for process in self.processes.values():
            process.join(20)
        return [process.exitcode for _, process in sorted(self.processes.items())]

    def engines(self, **changes: Any) -> DedicatedEngines:
        more = {"timeout_s": 120.0, "answer_timeout_s": 40.0, "bucket_mib": 1, "secret": SECRET} | changes
        return DedicatedEngines(self.settings, address=("127.0.0.1", self.port), engines=self.count, **more)



@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--join", "127.0.0.1:1", "--index", "-1"], "'-1': give a number from 0 to engines - 1"),
        (["--join", "127.0.0.1:1", "--index", "0", "--wait-s", "nan"], "'nan': give a number of seconds"),
        (["--join", "127.0.0.1:1", "--index", "0", "--wait-s=-1"], "'-1': give a number of seconds"),
        (["--join", "127.0.0.1:1", "--index", "0", "--wait-s", "inf"], "'inf': give a number of seconds"),
    ],
)
def test_a_host_refuses_numbers_that_mean_nothing(
    capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        engine_host.parse(arguments)
    assert ended.value.code == 2 and words in capsys.readouterr().err


def test_a_host_joins_only_where_there_can_be_one() -> None:
    for bad in ("a..b:29600", "node1", "node1:99999"):
        with pytest.raises(ConfigError, match=r"^--join = .*must be host:port"):
            engine_host.parse(["--join", bad, "--index", "0"])
    given = engine_host.parse(["--join", "[::1]:29600", "--index", "3", "--wait-s", "0"])
    assert (given.join, given.index, given.wait_s) == (("::1", 29600), 3, 0.0)


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[Hosts]:
    hosts = Hosts(tmp_path)
    yield hosts
    for process in hosts.processes.values():
        with suppress(ProcessLookupError):
            process.kill()
        process.join(20)


def requests(count: int) -> list[RolloutRequest]:
    draw = random.Random(random.random())

    def ids(least: int) -> list[int]:
        return [draw.randrange(VOCABULARY) for _ in range(draw.randint(least, 9))]

    return [RolloutRequest(ids(1), ids(0), draw.getrandbits(63), 100 + i, 7 * i, 1 + i % 20) for i in range(count)]


def weights(settings: EngineSettings) -> dict[str, Tensor]:
    """Random tensors of the model without the tied head, in fp32."""
    return {n: torch.randn(s) for n, s in settings.shapes[0].items() if n != "lm_head.weight"}


def written(wanted: list[RolloutRequest], version: int) -> list[Rollout]:
    """What one engine that does it all would write."""
    engine = ReplayEngine(VOCABULARY)
    engine.version = version
    return engine.generate(wanted)


def wait_for(file: Path) -> None:
    deadline = time.monotonic() + 30
    while not file.exists():
        assert time.monotonic() < deadline, f"{file} never came"
        time.sleep(0.02)


def test_two_hosts_write_in_order_and_take_every_bit_of_the_weights(hosts: Hosts) -> None:
    hosts.start(0, 1)
    engines = hosts.engines()
    engines.start()
    with pytest.raises(EngineError, match="have not received weights yet"):
        engines.generate(requests(2))
    for version in (3, 4):
        sent = weights(hosts.settings)
        stats = engines.update_weights(iter(sent.items()), version)
        rounded = {name: tensor.to(torch.bfloat16) for name, tensor in sent.items()}
        assert stats.buckets > 2 and stats.bytes == sum(2 * t.numel() for t in rounded.values())
        for index in range(2):
            taken = load_file(hosts.folder(index) / f"v{version}.safetensors")
            assert taken.keys() == rounded.keys() and "lm_head.weight" not in taken
            for name, tensor in rounded.items():
                assert taken[name].dtype == torch.bfloat16
                assert torch.equal(taken[name].view(torch.int16), tensor.view(torch.int16)), name
        for count in (1, 2, 7):
            wanted = requests(count)
            assert engines.generate(wanted) == written(wanted, version)
    served = [(hosts.folder(i) / "generating").read_text() for i in range(2)]
    assert served == ["4", "3"]  # of seven
    assert engines.generate([]) == [] and engines.sleep() is False
    with pytest.raises(RequestError, match="over the engine's context of 64"):
        engines.generate([RolloutRequest([1] * 60, [], 1, 0, 0, 9)])
    engines.close(run_over=True)
    engines.close()
    assert hosts.codes() == [0, 0]
    for index in range(2):
        starts = (hosts.folder(index) / "starts").read_text().splitlines()
        assert starts == [f"{hosts.settings.seed} {hosts.settings.model_dir}"]


def test_finished_rollouts_come_before_the_others(hosts: Hosts) -> None:
    hosts.start(0, 1)
    engines = hosts.engines()
    engines.start()
    engines.update_weights(iter(weights(hosts.settings).items()), 1)
    wanted, told = requests(7), list[Rollout]()
    hangs = hosts.folder(0) / "hang"
    hangs.touch()

    def take(r: Rollout) -> None:
        told.append(r)
        if len(told) == 6:
            hangs.unlink()  # the last one, of host 0, is only then generated

    assert engines.generate(wanted, take) == written(wanted, 1)
    assert told[-1].sequence_id == 106 and sorted(told, key=lambda r: r.sequence_id) == written(wanted, 1)
    assert engines.generate(wanted) == written(wanted, 1) and len(told) == 7
    engines.close(run_over=True)
    assert hosts.codes() == [0, 0]


def test_hosts_that_share_a_queue(hosts: Hosts) -> None:
    """What one cannot do the other does, but for what it was given; one that dies has its requests done again."""
    hosts.settings = replace(hosts.settings, max_num_seqs=2)
    hosts.start(0, 1)
    sent, hangs, wanted, told = weights(hosts.settings), hosts.folder(0) / "hang", requests(40), list[Rollout]()
    supervisor = RankZeroRollouts(World(), partial(hosts.engines, queue=True), lambda: iter(sent.items()), VOCABULARY)
    assert supervisor.generate(wanted, 5) == written(wanted, 5)
    hangs.touch()

    def take(some: list[Rollout], done: bool) -> None:
        told.extend(some)
        if len(told) == 37:
            hangs.unlink()  # host 0 hangs in the third of what it had first, and was given two for those before

    assert supervisor.generate(wanted, 5, take) == written(wanted, 5) and supervisor.restarts == 0
    assert {int((hosts.folder(i) / "generating").read_text()) for i in range(2)} == {3}
    assert sorted(told, key=lambda r: r.sequence_id) == written(wanted, 5)
    (hosts.folder(1) / "hang").touch()
    (hosts.folder(1) / "generating").unlink()

    def kill() -> None:
        wait_for(hosts.folder(1) / "generating")
        hosts.kill(1)
        hosts.processes[1].join()
        (hosts.folder(1) / "hang").unlink()
        hosts.start(1)  # as a scheduler would

    threading.Thread(target=kill).start()
    assert supervisor.generate(wanted, 5) == written(wanted, 5) and supervisor.restarts == 1
    supervisor.close(run_over=True)
    assert hosts.codes() == [0, 0]
    assert [len((hosts.folder(i) / "starts").read_text().splitlines()) for i in range(2)] == [1, 2]


def test_a_host_killed_while_it_writes_is_named_and_can_be_started_again(hosts: Hosts) -> None:
    hosts.start(0, 1)
    engines = hosts.engines()
    engines.start()
    engines.update_weights(iter(weights(hosts.settings).items()), 1)
    (hosts.folder(1) / "hang").touch()
    (hosts.folder(1) / "generating").unlink(missing_ok=True)

    def kill() -> None:
        wait_for(hosts.folder(1) / "generating")
        hosts.kill(1)

    threading.Thread(target=kill).start()
    pid = hosts.processes[1].pid
    with pytest.raises(EngineDied, match=rf"^engine host 1 \(process {pid} on .*restart it with .*--index 1;"):
        engines.generate(requests(5))
    with pytest.raises(EngineDied, match="not running"):
        engines.generate(requests(5))
    with pytest.raises(EngineError, match=r"engine host\(s\) 1 of 2 did not join within 6 s.*--index I") as missing:
        hosts.engines(timeout_s=6.0).start()
    assert not isinstance(missing.value, EngineDied)  # nothing that can be fixed from here
    (hosts.folder(1) / "hang").unlink()
    hosts.start(1)
    again = hosts.engines()
    again.start()
    again.update_weights(iter(weights(hosts.settings).items()), 2)
    wanted = requests(5)
    assert again.generate(wanted) == written(wanted, 2)
    again.close(run_over=True)
    assert hosts.codes() == [0, 0]
    # The host that lived kept its engine.
    assert [len((hosts.folder(i) / "starts").read_text().splitlines()) for i in range(2)] == [1, 2]


def test_a_host_killed_in_the_stream_of_weights_is_waited_for_once(hosts: Hosts) -> None:
    hosts.start(0, 1)
    sent, kills = weights(hosts.settings), [1]

    def stream() -> Iterator[tuple[str, Tensor]]:
        for at, (name, tensor) in enumerate(sent.items()):
            if at == len(sent) - 2 and kills:  # some buckets have gone by then
                hosts.kill(kills.pop())
                hosts.processes[1].join()
                hosts.start(1)  # as a scheduler would
            yield name, tensor

    supervisor = RankZeroRollouts(World(), hosts.engines, stream, VOCABULARY)
    wanted = requests(6)
    assert supervisor.generate(wanted, 5) == written(wanted, 5)
    assert supervisor.restarts == 1
    taken = [load_file(hosts.folder(i) / "v5.safetensors") for i in range(2)]
    assert all(torch.equal(t[n], sent[n].to(torch.bfloat16)) for t in taken for n in sent)
    supervisor.close(run_over=True)
    assert hosts.codes() == [0, 0]


def test_an_engine_that_cannot_start_a_bad_stream_and_a_silent_host_are_each_named(hosts: Hosts) -> None:
    (hosts.folder(1) / "full").touch()
    hosts.start(0, 1, wait_s=3)
    with pytest.raises(EngineError, match=r"^engine host 1 \(process .*\): no room for the model$") as full:
        hosts.engines().start()
    assert not isinstance(full.value, EngineDied)
    (hosts.folder(1) / "full").unlink()
    engines = hosts.engines()
    engines.start()
    sent = weights(hosts.settings)
    first = next(iter(sent))
    with pytest.raises(WeightStreamError, match=f"has {first} twice"):
        engines.update_weights(iter([*sent.items(), (first, sent[first])]), 1)
    engines = hosts.engines(answer_timeout_s=2.0)
    engines.start()
    engines.update_weights(iter(sent.items()), 1)
    hosts.kill(0, signal.SIGSTOP)
    began = time.monotonic()
    with pytest.raises(EngineDied, match=r"^engine host 0 \(process .*: no answer within 2 s;"):
        engines.generate(requests(4))
    assert time.monotonic() - began < 20
    hosts.kill(0, signal.SIGCONT)
    # Nobody listens any more: the hosts end by themselves, and say so by their code.
    assert hosts.codes() == [1, 1]


def test_a_silent_host_is_named_in_the_stream_of_weights(hosts: Hosts) -> None:
    hosts.start(0, 1)
    engines = hosts.engines()
    engines.start()
    engines.timeout_s = 5.0  # from here on: to start two processes may take longer
    hosts.kill(1, signal.SIGSTOP)
    with pytest.raises(EngineDied, match=r"^engine host 1 \(process .*: no answer within 5 s;"):
        engines.update_weights(iter(weights(hosts.settings).items()), 1)
    hosts.kill(1)


def test_a_host_waits_for_a_trainer_that_failed_and_exits_when_the_run_is_over(hosts: Hosts) -> None:
    hosts.start(0, 1)
    first = hosts.engines()
    first.start()
    first.update_weights(iter(weights(hosts.settings).items()), 1)
    first.close()  # as after any error of the trainer
    again = hosts.engines()
    again.start()  # the same processes are there, with their engines
    assert [p.exitcode for p in hosts.processes.values()] == [None, None]
    again.update_weights(iter(weights(hosts.settings).items()), 2)
    wanted = requests(5)
    assert again.generate(wanted) == written(wanted, 2)
    again.close(run_over=True)
    assert hosts.codes() == [0, 0]
    assert [len((hosts.folder(i) / "starts").read_text().splitlines()) for i in range(2)] == [1, 1]


def test_an_address_that_is_not_ours_and_nobody_there(hosts: Hosts) -> None:
    with pytest.raises(EngineError, match=r"cannot listen for engine hosts at 192\.0\.2\.7:29600 .*dedicated\.address"):
        DedicatedEngines(hosts.settings, address=("192.0.2.7", 29600), engines=1, secret=SECRET).start()
    with pytest.raises(EngineError, match=r"secret listened at 127\.0\.0\.1:\d+ for 0\.1 s \(Connection refused\)"):
        serve(("127.0.0.1", hosts.port), 0, lambda *_: Hosted(ReplayEngine(VOCABULARY)), secret=SECRET, wait_s=0.1)


def test_a_host_asked_to_stop_stays_until_the_trainer_has_its_rollouts(hosts: Hosts) -> None:
    """Both are asked at once, as a scheduler does; the checkpoint then has what is generated. One whose trainer stays
    goes by itself."""
    hosts.start(0, 1, life=host_command)
    engines = hosts.engines()
    engines.start()
    engines.update_weights(iter(weights(hosts.settings).items()), 1)
    (hosts.folder(1) / "hang").touch()
    wanted = requests(5)

    def ask() -> None:
        wait_for(hosts.folder(1) / "generating")
        hosts.kill(0, signal.SIGTERM)
        hosts.kill(1, signal.SIGINT)
        time.sleep(1)
        (hosts.folder(1) / "hang").unlink()

    threading.Thread(target=ask).start()
    assert engines.generate(wanted) == written(wanted, 1)
    engines.close()
    assert hosts.codes() == [128 + signal.SIGTERM, 128 + signal.SIGINT]
    hosts.start(0, 1, life=host_command)
    engines = hosts.engines()
    engines.start()
    hosts.kill(1, signal.SIGTERM)
    hosts.processes[1].join(20)
    assert hosts.processes[1].exitcode == 128 + signal.SIGTERM and hosts.processes[0].exitcode is None
    with pytest.raises(EngineDied, match="engine host 1"):
        engines.update_weights(iter(weights(hosts.settings).items()), 1)


def test_engines_that_are_closed_while_hosts_are_awaited_wait_no_longer(hosts: Hosts) -> None:
    engines, raised = hosts.engines(), list[BaseException]()

    def start() -> None:
        try:
            engines.start()
        except EngineError as error:
            raised.append(error)

    waits = threading.Thread(target=start)
    waits.start()
    time.sleep(0.5)
    assert waits.is_alive()
    engines.close()
    waits.join(10)
    assert not waits.is_alive() and isinstance(raised[0], EngineDied)
