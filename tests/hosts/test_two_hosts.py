"""docker/launch.sh across two hosts, which are network namespaces of this machine: TP 2 on each, DP 2 between them."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.e2e.tiny_run import ROOT, TinyRun, environment
from tests.hosts.conftest import Reference
from tests.hosts.launching import SAVE_EVERY, STEPS, figures, has_step, launch_command, until
from tests.hosts.namespaces import Host, NoNamespaces, hosts

pytestmark = pytest.mark.timeout(600)
PORT = 29400


@dataclass
class Pair:
    """Two hosts, the tiny models, and the figures of the same run on one host."""

    hosts: list[Host]
    tiny: TinyRun
    root: Path
    expected: list[tuple[float, ...]]

    def start(self, run_dir: Path, env: dict[str, str] | None = None, **keys: object) -> list[subprocess.Popen[str]]:
        """Launch on both; output goes to RUN.host0.log and RUN.host1.log."""
        keys = {
            "trainer.num_nodes": 2,
            "trainer.devices": 2,
            "trainer.rendezvous": f"{self.hosts[0].address}:{PORT}",
            **keys,
        }
        command = launch_command(self.tiny, run_dir, **keys)
        return [
            host.start(command, self.log(run_dir, i), environment(**(env or {})), ROOT)
            for i, host in enumerate(self.hosts)
        ]

    def log(self, run_dir: Path, host: int) -> Path:
        """The output of one host."""
        return run_dir.with_suffix(f".host{host}.log")

    def finish(self, processes: list[subprocess.Popen[str]], run_dir: Path, within_s: float = 400) -> None:
        """Wait for a good end on both."""
        deadline = time.monotonic() + within_s
        while any(p.poll() is None for p in processes) and time.monotonic() < deadline:
            time.sleep(0.5)
        codes = [p.poll() for p in processes]
        assert codes == [0, 0], "\n".join(self.log(run_dir, i).read_text()[-4000:] for i in (0, 1))


@pytest.fixture(scope="module")
def both_hosts() -> Iterator[list[Host]]:
    """Both hosts up, before anything costly is run."""
    try:
        with hosts(2) as both:
            yield both
    except NoNamespaces as refused:
        pytest.skip(f"no network namespaces here: {refused}")


@pytest.fixture
def pair(both_hosts: list[Host], reference: Reference) -> Pair:
    """The hosts and the reference."""
    return Pair(both_hosts, reference.tiny, reference.root, reference.expected)


def test_a_host_whose_name_leads_to_the_loopback_meets_the_others_at_its_address(
    both_hosts: list[Host], tmp_path: Path
) -> None:
    """As Debian's /etc/hosts has it, which only this host's processes see here."""
    names, log = tmp_path / "hosts", tmp_path / "log"
    names.write_text("127.0.0.1 localhost\n127.0.1.1 nodeone.lan nodeone\n")
    keys = "--config-name smollm2_cpu trainer.num_nodes=2 trainer.devices=1 trainer.rendezvous=nodeone:29400"
    shown = f"mount --bind {names} /etc/hosts && exec docker/launch.sh --print {keys}"
    with log.open("w"):
        process = both_hosts[0].start(["unshare", "-m", "bash", "-c", shown], log, environment(), ROOT)
    assert process.wait(120) == 0, log.read_text()
    told = log.read_text()
    for word in ("rdzv-endpoint={}:29400", "is_host=true", "local-addr={}", "\nGLOO_SOCKET_IFNAME=eth0"):
        assert word.format(both_hosts[0].address) in told, told


def test_two_hosts_take_the_steps_of_one_to_the_bit_though_one_of_them_is_killed(pair: Pair) -> None:
    """torchrun and all ranks of the second host die at once, as when it runs out of memory, and come back."""
    run_dir = pair.root / "killed"
    processes = pair.start(run_dir, env={"REPLAY_SECONDS": "2"}, **{"trainer.max_restarts": 2})
    until(has_step(run_dir, SAVE_EVERY), "the first checkpoint")
    before = figures(run_dir)
    victims = pair.hosts[1].pids("nemo_tropd.launch.agent") + pair.hosts[1].pids("replay_train.py")
    assert len(victims) >= 3, victims
    for pid in set(victims):
        os.kill(pid, signal.SIGKILL)
    pair.finish(processes, run_dir)
    assert len(pair.expected) == STEPS and len(set(pair.expected)) == STEPS
    assert len(before) >= SAVE_EVERY and before == pair.expected[: len(before)]  # two hosts, undisturbed
    assert figures(run_dir) == pair.expected
    first, second = (pair.log(run_dir, i).read_text() for i in (0, 1))
    assert "torchrun was killed by SIGKILL; restarting it" in second
    assert "resuming from" in first and f"(step {SAVE_EVERY})" in first
    assert "PeerLost: rank 0" in first and "ranks 2, 3 on " in first
    for host, text in zip(pair.hosts, (first, second), strict=True):
        assert f"this node is {host.address} on eth0" in text


def test_a_cut_link_is_named_by_both_ends_in_time_and_nothing_is_lost(pair: Pair) -> None:
    run_dir = pair.root / "cut"
    timeout_s = 40
    keys = {"trainer.max_restarts": 0, "trainer.distributed_timeout_s": timeout_s}
    processes = pair.start(run_dir, env={"REPLAY_SECONDS": "3"}, **keys)
    until(has_step(run_dir, SAVE_EVERY), "the first checkpoint")
    pair.hosts[1].cut()

    def said(host: int, ranks: str) -> bool:
        text = pair.log(run_dir, host).read_text()
        address = pair.hosts[1 - host].address
        lines = [line for line in text.splitlines() if line.startswith("PeerLost: rank")]
        return any(f"ranks {ranks} on " in line and f"({address}) did not respond" in line for line in lines)

    # Each end names the other's ranks by itself, in words that no launcher and no library has, and in a time that is
    # ours alone: gloo would wait for half an hour. How many seconds a busy machine adds to timeout_s is luck.
    until(lambda: said(0, "2, 3") and said(1, "0, 1"), "both ends name the other's ranks", 3 * timeout_s)
    until(lambda: all(p.poll() is not None for p in processes), "both launchers end", 200)
    assert all(p.returncode not in (0, None) for p in processes)
    assert has_step(run_dir, SAVE_EVERY)() and not has_step(run_dir, STEPS)()
    pair.hosts[1].mend()
    pair.finish(pair.start(run_dir), run_dir)
    log = pair.log(run_dir, 0).read_text()
    assert "resuming from" in log and f"(step {SAVE_EVERY})" in log
    assert figures(run_dir) == pair.expected
