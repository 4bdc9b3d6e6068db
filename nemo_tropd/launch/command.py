"""Builds this node's torchrun command from a configuration and the scheduler's allocation."""

import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from nemo_tropd.config import RENDEZVOUS_PORT, ConfigError, TropdConfig, host_and_port
from nemo_tropd.launch.scheduler import CONSUMED, Allocation
from nemo_tropd.parallel.addresses import addresses_of, is_loopback, own_addresses
from nemo_tropd.rollout.meeting import meeting_point

# A node whose launcher misses this many keep-alives counts as gone from the rendezvous.
_KEEP_ALIVE_ATTEMPTS = 3
_GRACE_S = 15  # on top of the time torchrun may wait for the other nodes


@dataclass(frozen=True)
class Launch:
    """What to run on this node."""

    arguments: list[str]  # torchrun's
    environment: dict[str, str]  # variables to set
    drop: tuple[str, ...]  # variables to remove
    restarts: int
    patience_s: float  # how long torchrun may have no live rank
    stop_timeout_s: float  # how long ranks may take to end after a signal
    summary: str


def plan_launch(
    cfg: TropdConfig, allocation: Allocation, script: Path, arguments: Sequence[str], env: Mapping[str, str]
) -> Launch:
    """Torchrun's arguments and environment for ``script arguments`` on this node. ConfigError if configuration and
    scheduler disagree, or a multi-node run has no rendezvous endpoint."""
    nodes, ranks = cfg.trainer.num_nodes, cfg.trainer.devices
    _agree("trainer.num_nodes", nodes, allocation.nodes, allocation.scheduler, "node(s)")
    if allocation.scheduler == "Slurm":
        if allocation.processes is not None and allocation.processes < ranks:
            what = f"Slurm gave this node {allocation.processes} GPU(s)"
            raise ConfigError("trainer.devices", ranks, f"{what}: change sbatch --gpus-per-node, or lower the key")
    else:
        _agree("trainer.devices", ranks, allocation.processes, allocation.scheduler, "process(es) per node")
    common = [
        f"--nnodes={nodes}",
        f"--nproc-per-node={ranks}",
        "--rdzv-backend=c10d",
        f"--max-restarts={cfg.trainer.max_restarts}",
    ]
    if nodes == 1 and cfg.trainer.rendezvous is None:
        rendezvous, environment = ["--rdzv-endpoint=localhost:0", "--local-addr=127.0.0.1"], {}
        where = "on this node"
    else:
        endpoint = cfg.trainer.rendezvous or allocation.rendezvous
        if endpoint is None:
            why = f"a run on {nodes} nodes needs a rendezvous endpoint: host:port on one of them"
            raise ConfigError("trainer.rendezvous", None, why)
        meets = meeting_point if nodes > 1 else host_and_port
        host, port = meets("trainer.rendezvous", endpoint, RENDEZVOUS_PORT)
        local, interface = local_address(host, port)
        rendezvous = [
            f"--rdzv-endpoint={host}:{port}",
            f"--rdzv-id={allocation.run_id or cfg.name}",
            f"--rdzv-conf={_rendezvous_conf(cfg, is_host=_is_host(host))}",
            f"--local-addr={local}",
        ]
        # Otherwise gloo and NCCL resolve the host name themselves, and on many machines get the loopback.
        wanted = {"GLOO_SOCKET_IFNAME": interface, "NCCL_SOCKET_IFNAME": interface}
        environment = {k: v for k, v in wanted.items() if k not in env}
        where = f"rendezvous at {host}:{port}, this node is {local} on {interface}"
    # A launcher that returns after its node died can only join if every attempt has a store of its own.
    environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    return Launch(
        arguments=[*common, *rendezvous, str(script), *arguments],
        environment=environment,
        drop=tuple(k for k in env if k in CONSUMED or k.startswith("PET_")),
        restarts=cfg.trainer.max_restarts,
        patience_s=_join_timeout_s(cfg) + _GRACE_S,
        stop_timeout_s=cfg.trainer.stop_timeout_s,
        summary=f"{allocation.scheduler}: {nodes} node(s) x {ranks} rank(s), {where}",
    )


def _agree(key: str, ours: int, theirs: int | None, scheduler: str, what: str) -> None:
    if theirs is not None and ours != theirs:
        raise ConfigError(key, ours, f"{scheduler} allocated {theirs} {what}: change the key, or the allocation")


def _join_timeout_s(cfg: TropdConfig) -> int:
    return max(60, cfg.trainer.distributed_timeout_s)


def _rendezvous_conf(cfg: TropdConfig, *, is_host: bool | None) -> str:
    """Timeouts of the rendezvous, derived from a collective's, so that one key decides when a node is given up."""
    patience = cfg.trainer.distributed_timeout_s
    interval = max(1, min(5, patience // (2 * _KEEP_ALIVE_ATTEMPTS)))
    settings = {
        "is_host": None if is_host is None else str(is_host).lower(),
        "join_timeout": _join_timeout_s(cfg),
        "read_timeout": max(10, min(60, patience // 4)),
        "keep_alive_interval": interval,
        "keep_alive_max_attempt": _KEEP_ALIVE_ATTEMPTS,
    }
    return ",".join(f"{key}={value}" for key, value in settings.items() if value is not None)


def local_address(host: str, port: int) -> tuple[str, str]:
    """The address and interface of this machine that routes to ``host``; sends nothing. ConfigError if the name cannot
    be resolved, or there is no route to it."""
    try:
        family, kind, protocol, _, target = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(target)
            address = str(probe.getsockname()[0])
    except OSError as error:
        raise ConfigError("trainer.rendezvous", f"{host}:{port}", f"unreachable from this node: {error}") from error
    for interface, addresses in psutil.net_if_addrs().items():
        if any(a.address.partition("%")[0] == address for a in addresses):
            return address, interface
    raise ConfigError("trainer.rendezvous", f"{host}:{port}", f"no interface of this node has the address {address}")


def _is_host(host: str) -> bool | None:
    """Whether this machine hosts the rendezvous store, judged by its addresses. None on the loopback, where several
    nodes may share one machine: torchrun then lets the first to arrive host it."""
    found = addresses_of(host)
    if any(is_loopback(a) for a in found):
        return None
    return bool(found & own_addresses())
