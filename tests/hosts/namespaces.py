"""Hosts on one machine: network namespaces with their own addresses, joined by veth pairs to a bridge of their own."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

SUBNET = "10.213.97"


class NoNamespaces(RuntimeError):
    """This machine does not let us make network namespaces."""


@dataclass
class Host:
    """One namespace: commands run in it see its interface and its loopback alone."""

    name: str
    address: str
    port_of_bridge: str
    processes: list[subprocess.Popen[str]] = field(default_factory=list)

    def start(self, command: Sequence[str], log: Path, env: dict[str, str], cwd: Path) -> subprocess.Popen[str]:
        """Start ``command`` in the namespace, its output to ``log``."""
        with log.open("a") as out:
            process = subprocess.Popen(
                ["ip", "netns", "exec", self.name, *command],
                stdout=out,
                stderr=subprocess.STDOUT,
                text=True,
                env=env,
                cwd=cwd,
                start_new_session=True,
            )
        self.processes.append(process)
        return process

    def pids(self, containing: str) -> list[int]:
        """Processes started on this host, children of children too, with ``containing`` in their command line."""
        found = []
        for process in self.processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                for p in psutil.Process(process.pid).children(recursive=True):
                    with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
                        if containing in " ".join(p.cmdline()):
                            found.append(p.pid)
        return found

    def cut(self) -> None:
        """Drop the link: packets vanish, and nobody is told."""
        _ip("link", "set", self.port_of_bridge, "down")

    def mend(self) -> None:
        """The link is back."""
        _ip("link", "set", self.port_of_bridge, "up")

    def end(self) -> None:
        """Kill what still runs here."""
        listed = subprocess.run(["ip", "netns", "pids", self.name], capture_output=True, text=True, check=False)
        for pid in map(int, listed.stdout.split()):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            process.wait()


def _ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise NoNamespaces(f"ip {' '.join(words)}: {done.stderr.strip()}")


@contextlib.contextmanager
def hosts(count: int) -> Iterator[list[Host]]:
    """``count`` hosts that reach each other by address.

    Raises:
        NoNamespaces: with the command that was refused.
    """
    tag = f"t{os.getpid() % 100000}"
    bridge = f"{tag}br"
    made: list[Host] = []
    try:
        try:
            _ip("link", "add", bridge, "type", "bridge")
            _ip("link", "set", bridge, "up")
            for i in range(count):
                host = Host(f"{tag}h{i}", f"{SUBNET}.{i + 1}", f"{tag}v{i}")
                _ip("netns", "add", host.name)
                made.append(host)
                _ip("link", "add", host.port_of_bridge, "type", "veth", "peer", "name", "eth0", "netns", host.name)
                _ip("link", "set", host.port_of_bridge, "master", bridge, "up")
                _ip("-n", host.name, "address", "add", f"{host.address}/24", "dev", "eth0")
                _ip("-n", host.name, "link", "set", "eth0", "up")
                _ip("-n", host.name, "link", "set", "lo", "up")
        except FileNotFoundError as error:
            raise NoNamespaces("iproute2's command ip is not installed") from error
        yield made
    finally:
        for host in made:
            host.end()
            subprocess.run(["ip", "netns", "del", host.name], capture_output=True, check=False)
            subprocess.run(["ip", "link", "del", host.port_of_bridge], capture_output=True, check=False)
        subprocess.run(["ip", "link", "del", bridge], capture_output=True, check=False)
