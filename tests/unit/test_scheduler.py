"""Scheduler variables become torchrun's arguments: Slurm's, PyTorchJob's, torchrun's customary ones, none."""

from __future__ import annotations

import random
import shutil
import socket
import subprocess
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from nemo_tropd.config import RENDEZVOUS_PORT, ConfigError, TropdConfig, host_and_port
from nemo_tropd.launch import command
from nemo_tropd.launch.command import Launch, local_address, plan_launch
from nemo_tropd.launch.scheduler import first_host, read_allocation
from nemo_tropd.parallel.addresses import for_others
from nemo_tropd.rollout.meeting import meeting_point
from nemo_tropd.rollout.placement import Engines
from nemo_tropd.rollout.secret import VARIABLE
from tests.e2e.compose import compose_config
from tests.e2e.tiny_run import ROOT, TinyRun, environment

pytestmark = pytest.mark.random

SLURM = {
    "SLURM_JOB_ID": "4711",
    "SLURM_JOB_NUM_NODES": "2",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NODELIST": "127.0.0.[1-2]",  # names that resolve anywhere
    "SLURM_STEP_TASKS_PER_NODE": "1(x2)",
    "SLURM_GPUS_ON_NODE": "8",
    "SLURM_PROCID": "1",
}
PYTORCHJOB = {
    "PET_NNODES": "2",
    "PET_NPROC_PER_NODE": "8",
    "PET_NODE_RANK": "1",
    "PET_MASTER_ADDR": "127.0.0.1",
    "PET_MASTER_PORT": "23456",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "23456",
    "RANK": "1",
    "WORLD_SIZE": "16",
}
CUSTOMARY = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1234", "NNODES": "2", "NODE_RANK": "0", "NPROC_PER_NODE": "8"}


def config(nodes: int = 2, devices: int = 8, rendezvous: str | None = None) -> TropdConfig:
    cfg = TropdConfig()
    cfg.trainer.num_nodes, cfg.trainer.devices, cfg.trainer.rendezvous = nodes, devices, rendezvous
    return cfg


def plan(env: dict[str, str], cfg: TropdConfig) -> Launch:
    return plan_launch(cfg, read_allocation(env), Path("train.py"), ["name=x"], env)


def endpoint(launch: Launch) -> str:
    (found,) = (a.split("=", 1)[1] for a in launch.arguments if a.startswith("--rdzv-endpoint="))
    return found


@pytest.mark.parametrize(
    ("env", "meets"),
    [
        (SLURM, "127.0.0.1:14711"),
        (PYTORCHJOB, "127.0.0.1:23456"),
        (
            {k: v for k, v in PYTORCHJOB.items() if not k.startswith("PET_")} | {"NPROC_PER_NODE": "8"},
            "127.0.0.1:23456",
        ),
        (CUSTOMARY, "127.0.0.1:1234"),
    ],
    ids=["slurm", "pytorchjob", "pytorchjob before PET", "torchrun"],
)
def test_schedulers_become_arguments(env: dict[str, str], meets: str) -> None:
    launch = plan(env, config())
    assert {"--nnodes=2", "--nproc-per-node=8", "--max-restarts=3", "--local-addr=127.0.0.1"} <= set(launch.arguments)
    assert endpoint(launch) == meets
    assert launch.arguments[-2:] == ["train.py", "name=x"]
    assert launch.environment["GLOO_SOCKET_IFNAME"] == launch.environment["NCCL_SOCKET_IFNAME"] == "lo"
    # torchrun reads PET_*, and workers would take the pod's RANK for theirs.
    assert not {k for k in env if k.startswith("PET_") or k in ("RANK", "WORLD_SIZE")} - set(launch.drop)


def test_no_scheduler_is_one_node() -> None:
    launch = plan({}, config(nodes=1, devices=3))
    assert endpoint(launch) == "localhost:0" and "--nproc-per-node=3" in launch.arguments


def test_a_key_wins_over_the_scheduler() -> None:
    assert endpoint(plan(SLURM, config(rendezvous="127.0.0.1:999"))) == "127.0.0.1:999"


def test_the_users_interface_is_kept() -> None:
    assert "NCCL_SOCKET_IFNAME" not in plan({**SLURM, "NCCL_SOCKET_IFNAME": "ib0"}, config()).environment


@pytest.mark.parametrize(
    ("env", "cfg", "words"),
    [
        ({}, config(), ["trainer.rendezvous", "2 nodes"]),
        ({}, config(rendezvous="127.0.0.1:70000"), ["trainer.rendezvous", "1 to 65535"]),
        ({}, config(rendezvous="no-such-host.invalid:1"), ["trainer.rendezvous", "unreachable"]),
        (SLURM, config(nodes=4), ["trainer.num_nodes = 4", "Slurm allocated 2"]),
        ({**SLURM, "SLURM_GPUS_ON_NODE": "4"}, config(), ["trainer.devices = 8", "4 GPU(s)"]),
        (
            {**SLURM, "SLURM_STEP_TASKS_PER_NODE": "8(x2)"},
            config(),
            ["SLURM_STEP_TASKS_PER_NODE", "--ntasks-per-node=1"],
        ),
        ({k: v for k, v in SLURM.items() if "STEP" not in k}, config(), ["SLURM_STEP_NUM_NODES", "srun"]),
        (PYTORCHJOB, config(devices=4), ["trainer.devices = 4", "PyTorchJob allocated 8"]),
        ({**PYTORCHJOB, "PET_NNODES": "1:4"}, config(), ["PET_NNODES = '1:4'", "fixed"]),
        ({**CUSTOMARY, "NNODES": "two"}, config(), ["NNODES = 'two'", "an integer"]),
    ],
)
def test_disagreement_is_named(env: dict[str, str], cfg: TropdConfig, words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        plan(env, cfg)
    assert all(word in str(caught.value) for word in words), caught.value


def test_first_host_of_slurm_lists() -> None:
    for text, first in (
        ("dgx[007-009,12],login", "dgx007"),
        ("a", "a"),
        ("b-1,b-2", "b-1"),
        ("rack[3,7]-n", "rack3-n"),
        ("10.0.0.[5-9]", "10.0.0.5"),
    ):
        assert first_host(text) == first
    if shutil.which("scontrol"):
        low = random.randrange(100)
        names = f"n[{low:03d}-{low + 5:03d},{low + 50}]x"
        told = subprocess.run(["scontrol", "show", "hostnames", names], capture_output=True, text=True, check=False)
        if told.returncode == 0:
            assert first_host(names) == told.stdout.split()[0]
    with pytest.raises(ConfigError, match=r"trainer\.rendezvous"):
        first_host("[1-2")


def test_endpoints() -> None:
    key = "trainer.rendezvous"
    assert host_and_port(key, "node1", RENDEZVOUS_PORT) == ("node1", 29400)
    assert host_and_port(key, "[::1]:5", RENDEZVOUS_PORT) == ("::1", 5)
    for bad in ("", ":1", "a:b", "a:0", "a b:1", "a..b:1", f"{'a' * 64}:1", "a\u200b:1"):
        with pytest.raises(ConfigError, match=r"trainer\.rendezvous"):
            host_and_port(key, bad, RENDEZVOUS_PORT)
    assert local_address("127.0.0.1", 1) == ("127.0.0.1", "lo")


def machine(monkeypatch: pytest.MonkeyPatch, names: dict[str, list[str]], interfaces: dict[str, list[str]]) -> None:
    """A machine whose names and interfaces are these; interfaces named down* are not up."""

    def resolve(host: str, *rest: object, **more: object) -> list[tuple[object, ...]]:
        if host not in names:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 0)) for address in names[host]]

    of = {"lo": ["127.0.0.1"], **interfaces}
    family = {True: socket.AF_INET6, False: socket.AF_INET}
    addresses = {name: [SimpleNamespace(family=family[":" in a], address=a) for a in own] for name, own in of.items()}
    states = {name: SimpleNamespace(isup=not name.startswith("down")) for name in of}
    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    monkeypatch.setattr(psutil, "net_if_addrs", lambda: addresses)
    monkeypatch.setattr(psutil, "net_if_stats", lambda: states)


DEBIAN = {"node1": ["127.0.1.1"], "six": ["::1"], "both": ["127.0.1.1", "10.0.0.7", "10.0.0.8"], "other": ["10.0.0.9"]}
ONE = {"eth0": ["10.0.0.5", "fd00::5", "fe80::5%eth0"], "down0": ["172.17.0.1"], "usb0": ["169.254.3.4"]}


@pytest.mark.parametrize(
    ("host", "meant"),
    [
        ("node1", "10.0.0.5"),
        ("six", "10.0.0.5"),
        ("both", "10.0.0.7"),
        ("other", "other"),
        ("localhost", "localhost"),
        ("ip6-localhost", "ip6-localhost"),
        ("localhost.localdomain", "localhost.localdomain"),
        ("127.0.1.1", "127.0.1.1"),
        ("::1", "::1"),
        ("10.1.1.1", "10.1.1.1"),
    ],
)
def test_a_name_that_leads_to_the_loopback_is_this_machines_address(
    monkeypatch: pytest.MonkeyPatch, host: str, meant: str
) -> None:
    """Debian gives a machine's own name the address 127.0.1.1, at which no other machine finds it."""
    machine(monkeypatch, DEBIAN, ONE)
    assert for_others(host) == meant
    shown = f"[{host}]:29600" if ":" in host else f"{host}:29600"
    assert meeting_point("key", shown) == (meant, 29600)


def test_a_name_that_leads_to_the_loopback_of_a_machine_with_several_addresses_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    machine(monkeypatch, DEBIAN, {**ONE, "ib0": ["10.9.0.5"]})
    for key, call in (
        ("trainer.rendezvous", lambda: plan({}, config(rendezvous="node1:29400"))),
        ("trainer.rendezvous", lambda: plan({**SLURM, "SLURM_STEP_NODELIST": "node[1-2]"}, config())),
        ("--join", lambda: meeting_point("--join", "node1:29600")),
    ):
        with pytest.raises(
            ConfigError, match=rf"^{key} = 'node1:.*resolves to 127.0.1.1 here.*10.0.0.5, 10.9.0.5\), or"
        ):
            call()
    assert for_others("both") == "10.0.0.7" and for_others("other") == "other"
    machine(monkeypatch, DEBIAN, {})
    assert for_others("node1") == "node1"  # without a network all are on this machine


def test_engine_hosts_are_awaited_where_they_can_come(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(VARIABLE, "0123456789abcdef")
    keys = {
        "placement": "dedicated",
        "dedicated.address": "node1:29600",
        "dedicated.engines": 1,
        "dedicated.timeout_s": 99,
    }
    given = {f"model.rollout.{key}": value for key, value in keys.items()}
    cfg = compose_config(TinyRun.make(tmp_path).overrides(tmp_path / "run", **given))
    machine(monkeypatch, DEBIAN, ONE)
    assert vars(Engines(131).student(cfg))["address"] == ("10.0.0.5", 29600)
    machine(monkeypatch, DEBIAN, {**ONE, "ib0": ["10.9.0.5"]})
    with pytest.raises(ConfigError, match=r"^model\.rollout\.dedicated\.address = 'node1:29600': node1 resolves to"):
        Engines(131).student(cfg)


def test_one_node_may_meet_itself_on_the_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    assert endpoint(plan({}, config(nodes=1, rendezvous="localhost:29400"))) == "localhost:29400"
    monkeypatch.setattr(command, "meeting_point", None)
    monkeypatch.setattr(command, "local_address", lambda host, port: ("127.0.0.1", "lo"))
    monkeypatch.setattr(command, "addresses_of", lambda host: {"127.0.1.1"})
    assert endpoint(plan({}, config(nodes=1, rendezvous="node1:29400"))) == "node1:29400"


def entrypoint(*words: str, **env: str) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in environment().items() if not k.startswith(("SLURM_", "PET_"))}
    return subprocess.run(
        [str(ROOT / "docker" / "entrypoint.sh"), *words],
        capture_output=True,
        text=True,
        timeout=120,
        env={**clean, "NEMO_TROPD_PYTHON": str(ROOT / ".venv" / "bin" / "python"), **env},
        check=False,
    )


@pytest.mark.parametrize(
    ("env", "nodes", "words"),
    [
        ({}, 1, ["--nnodes=1", "--rdzv-endpoint=localhost:0"]),
        ({**SLURM, "SLURM_GPUS_ON_NODE": "2"}, 2, ["--nnodes=2", "--rdzv-id=slurm-4711", "join_timeout=200"]),
        ({**CUSTOMARY, "NPROC_PER_NODE": "2"}, 2, ["--nnodes=2", "--rdzv-endpoint=127.0.0.1:1234"]),
    ],
    ids=["none", "slurm", "torchrun"],
)
def test_entrypoint_makes_the_command(env: dict[str, str], nodes: int, words: list[str], tmp_path: Path) -> None:
    overrides = TinyRun.at(tmp_path).overrides(tmp_path / "run", tensor=2, data=nodes)
    keys = [f"trainer.num_nodes={nodes}", "trainer.devices=2", "trainer.max_restarts=5"]
    done = entrypoint("train", "--print", *overrides, *keys, **env)
    assert done.returncode == 0, done.stderr
    assert all(word in done.stdout for word in [*words, "--max-restarts=5", "--nproc-per-node=2"]), done.stdout


def test_entrypoint_runs_other_commands_and_refuses_unknown_keys() -> None:
    assert entrypoint("echo", "plain words").stdout == "plain words\n"
    refused = entrypoint("train", "--print", "trainer.nodes=2")
    assert refused.returncode == 2 and "trainer.nodes = '2'" in refused.stderr


def test_a_worker_of_torchrun_runs_the_script_itself(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text("import sys; print('rank', sys.argv[1:])")
    done = entrypoint("train", "--script", str(script), "a=b", TORCHELASTIC_RUN_ID="1", LOCAL_RANK="0")
    assert done.stdout == "rank ['a=b']\n", done.stderr
