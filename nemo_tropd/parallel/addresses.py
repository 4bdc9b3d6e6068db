"""Addresses of this machine and of host names; used by the launcher and by the roll call of ranks. Needs no torch."""

import os
import socket

import psutil

ORIGIN = "raised on "


def host_name() -> str:
    """Host name, and the address that the others use, since host names are not always unique."""
    interface = os.environ.get("NCCL_SOCKET_IFNAME") or os.environ.get("GLOO_SOCKET_IFNAME") or ""
    addresses = psutil.net_if_addrs().get(interface.removeprefix("="), [])
    address = next((a.address for a in addresses if a.family == socket.AF_INET), None)
    return f"{socket.gethostname()} ({address})" if address else socket.gethostname()


def name_origin(error: BaseException) -> str:
    """The rank and host where ``error`` was first raised, else this one, which is noted; "" in a world of one."""
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return ""
    for note in getattr(error, "__notes__", []):
        if note.startswith(ORIGIN):
            return str(note.removeprefix(ORIGIN))
    error.add_note(f"{ORIGIN}rank {os.environ.get('RANK', '0')} on {host_name()}")
    return name_origin(error)


def own_addresses() -> set[str]:
    """Every address of this machine's interfaces, without zone suffixes (``%eth0``)."""
    return {a.address.partition("%")[0] for addresses in psutil.net_if_addrs().values() for a in addresses}


def interface_of(address: str) -> str:
    """The name of this machine's interface with ``address``; "" if there is none."""
    found = psutil.net_if_addrs().items()
    return next((name for name, of in found if address in {a.address.partition("%")[0] for a in of}), "")


def addresses_of(host: str) -> set[str]:
    """The addresses that ``host``, a name or an address, resolves to. Raises OSError if it does not resolve."""
    return {str(info[4][0]) for info in socket.getaddrinfo(host, None)}
