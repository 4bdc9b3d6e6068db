"""Ports for servers of tests."""

from __future__ import annotations

import random
import socket
from pathlib import Path


def free_ports(count: int) -> list[int]:
    """Ports of 127.0.0.1 that nobody has now, from below those that the kernel gives to clients: neither another test's
    client nor one that already asks for the server can have them by then. Others in each process."""
    lowest = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    if lowest < 12_000:
        raise RuntimeError(f"ip_local_port_range begins at {lowest}: no ports are left for servers of tests")
    found: list[int] = []
    for port in random.SystemRandom().sample(range(10_000, lowest), 200):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            found.append(port)
        if len(found) == count:
            return found
    raise RuntimeError(f"found {len(found)} free ports, not {count}")


def free_port() -> int:
    """As :func:`free_ports`, one."""
    return free_ports(1)[0]
