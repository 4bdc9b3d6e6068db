"""Addresses of this machine and of host names; used by the launcher and by the roll call of ranks. Needs no torch."""

from __future__ import annotations

import socket

import psutil


def own_addresses() -> set[str]:
    """Every address of this machine's interfaces, without zone suffixes (``%eth0``)."""
    return {a.address.partition("%")[0] for addresses in psutil.net_if_addrs().values() for a in addresses}


def addresses_of(host: str) -> set[str]:
    """The addresses that ``host``, a name or an address, resolves to. Raises OSError if it does not resolve."""
    return {str(info[4][0]) for info in socket.getaddrinfo(host, None)}
