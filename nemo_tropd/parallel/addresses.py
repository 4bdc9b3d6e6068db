"""Addresses of this machine and of host names; used by the launcher and by the roll call of ranks. Needs no torch."""

import ipaddress
import os
import re
import socket

import psutil

ORIGIN = "raised on "
_LOOPBACK_NAMES = re.compile(r"(?i)(ip6-)?(localhost[46]?|loopback)(\.localdomain[46]?)?\.?")


class UnreachableName(ValueError):
    """A name that other machines cannot reach this one by: what it is here, and what to give instead."""


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


def is_loopback(address: str) -> bool:
    """Whether no other machine can reach ``address``."""
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback


def outside_addresses() -> list[str]:
    """The IPv4 addresses of this machine's interfaces that are up, without loopback and link-local ones."""
    up = {name for name, state in psutil.net_if_stats().items() if state.isup}
    found = [
        a.address for name, of in psutil.net_if_addrs().items() for a in of if a.family == socket.AF_INET and name in up
    ]
    return sorted({a for a in found if not is_loopback(a) and not ipaddress.ip_address(a).is_link_local})


def for_others(host: str) -> str:
    """``host``, but this machine's address if the name is its own and leads to the loopback here, as Debian's
    /etc/hosts has it (127.0.1.1): other machines could not reach what listens there. An address, localhost and every
    name on a machine without a network stay as they are. Raises UnreachableName if the machine has several addresses,
    OSError if ``host`` does not resolve."""
    if _is_address(host) or _LOOPBACK_NAMES.fullmatch(host):
        return host
    found = list(dict.fromkeys(_resolved(host)))
    outside = [a for a in found if not is_loopback(a)]
    if len(outside) == len(found):
        return host
    if outside:
        return outside[0]
    ours = outside_addresses()
    if len(ours) > 1:
        raise UnreachableName(
            f"{host} resolves to {found[0]} here, which no other machine can reach: give the address of this machine "
            f"that the others use (of {', '.join(ours)}), or correct /etc/hosts"
        )
    return ours[0] if ours else host


def addresses_of(host: str) -> set[str]:
    """The addresses that ``host``, a name or an address, resolves to. Raises OSError if it does not resolve."""
    return set(_resolved(host))


def _resolved(host: str) -> list[str]:
    try:
        return [str(info[4][0]) for info in socket.getaddrinfo(host, None)]
    except UnicodeError as error:  # of the encoding of international names
        raise socket.gaierror(socket.EAI_NONAME, f"{host!r} is not a host name") from error


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return False
    return True
