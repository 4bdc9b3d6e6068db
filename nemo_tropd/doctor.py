"""What this machine and environment have for a role, what is wrong, and how to mend it.

    python -m nemo_tropd.doctor [--role cpu|gpu] [--brief] [--port N] [--runs DIR]

Exit code 0: nothing is wrong (notices aside), 1: something is. Loads no framework and touches no GPU's memory, so that
it can run beside a training run, as the containers' health check does. Without ``--role``: NEMO_TROPD_ROLE, else gpu
where a driver answers, else cpu.
"""

from __future__ import annotations

import argparse
import importlib.metadata as metadata
import importlib.util
import os
import platform
import re
import resource
import shutil
import socket
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from packaging.requirements import Requirement
from rich.console import Console
from rich.markup import escape
from rich.table import Table

GIB = 2**30
OK, NOTICE, WRONG = "ok", "notice", "wrong"
_COLOURS = {OK: "[green]ok[/]", NOTICE: "[yellow]notice[/]", WRONG: "[red]wrong[/]"}
# Compute capability from which tensor cores take FP8: 8.9 has it, and Transformer Engine's recipes start with 9.0.
_FP8_CAPABILITY = (9, 0)
_LEAST = {  # GiB
    "cpu": {"memory": 10.0, "shared": 0.06, "disk": 10.0},
    "gpu": {"memory": 64.0, "shared": 8.0, "disk": 100.0},
}
PIN_FILE = "docker/requirements-gpu.in"


@dataclass(frozen=True)
class Finding:
    """One line of the table."""

    what: str
    found: str
    state: str = OK
    remedy: str = ""


def main(argv: list[str] | None = None) -> int:
    """Print the table; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--role", choices=("cpu", "gpu"), default=os.environ.get("NEMO_TROPD_ROLE"))
    parser.add_argument("--brief", action="store_true", help="print what is wrong alone")
    parser.add_argument("--port", type=int, default=29400, help="the port of trainer.rendezvous")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="where runs are written")
    options = parser.parse_args(argv)
    role = options.role or ("gpu" if read_gpus().devices else "cpu")
    findings = list(examine(role, options.port, options.runs))
    wrong = [f for f in findings if f.state == WRONG]
    shown = wrong if options.brief else findings
    console = Console(width=max(shutil.get_terminal_size((140, 40)).columns, 110))
    if shown:
        table = Table("", "found", "", "how to mend it", title=f"nemo_tropd, role {role}", title_justify="left")
        for f in shown:
            table.add_row(escape(f.what), escape(f.found), _COLOURS[f.state], escape(f.remedy))
        console.print(table)
    console.print(f"{len(wrong)} thing(s) wrong for the role {role}" if wrong else f"nothing wrong for the role {role}")
    return 1 if wrong else 0


def examine(role: str, port: int, runs: Path) -> Iterator[Finding]:
    """Every finding for ``role``."""
    if installed("nemo_tropd") is None:
        yield Finding("nemo_tropd", "not installed", WRONG, "make setup, or pip install --no-deps --editable .")
        return
    yield _python()
    yield from packages(role)
    gpus = read_gpus()
    if role == "gpu":
        yield from gpu_findings(gpus)
        yield from source_builds()
    yield nemo_apex(wanted=role == "gpu")
    yield from machine(role, runs)
    yield free_port(port)
    yield own_name()


def _python() -> Finding:
    version = platform.python_version()
    wanted = metadata.metadata("nemo_tropd")["Requires-Python"] or ""
    fits = Requirement(f"python{wanted}").specifier.contains(version)
    return Finding("Python", version, OK if fits else WRONG, "" if fits else f"use Python {wanted}")


# ------------------------------------------------------------------------------------------------------- packages


def packages(role: str) -> Iterator[Finding]:
    """The package's requirements, its own and those of the extra ``role``; the extra's pins are advice."""
    pinned = {r.name: r for r in _requirements(role)}
    for name, wanted in ({r.name: r for r in _requirements(None)} | pinned).items():
        version = installed(name)
        remedy = f"pip install 'nemo_tropd[{role}]'" if name in pinned else f"pip install '{wanted}'"
        if role == "gpu":
            remedy += f", or use the image of docker/Dockerfile; the pins are in {PIN_FILE}"
        if version is None:
            yield Finding(name, "missing", WRONG, remedy)
        elif wanted.specifier.contains(version, prereleases=True):
            yield Finding(name, version)
        else:
            exact = all(s.operator == "==" for s in wanted.specifier)
            text = f"tested with {wanted.specifier}" if exact else f"needs {wanted.specifier}: {remedy}"
            yield Finding(name, version, NOTICE if exact else WRONG, text)


def _requirements(extra: str | None) -> list[Requirement]:
    every = [Requirement(text) for text in metadata.requires("nemo_tropd") or []]
    if extra is None:
        return [r for r in every if r.marker is None]
    return [r for r in every if r.marker and "extra" in str(r.marker) and r.marker.evaluate({"extra": extra})]


def installed(name: str) -> str | None:
    """The version of a distribution, or None."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def source_builds() -> Iterator[Finding]:
    """What the GPU image builds itself."""
    version, module = installed("transformer-engine-torch"), _has_module("transformer_engine_torch")
    if version and module:
        yield Finding("Transformer Engine's torch extension", version)
    else:
        yield Finding(
            "Transformer Engine's torch extension",
            "missing",
            WRONG,
            "pip install --no-build-isolation transformer-engine-torch with the version of transformer-engine, beside "
            "a CUDA torch; or the image",
        )


def nemo_apex(*, wanted: bool) -> Finding:
    """NVIDIA's apex has fused kernels (amp_C, multi_tensor_apply); PyPI's package of that name is another thing."""
    spec = importlib.util.find_spec("apex")
    if spec is None:
        state = WRONG if wanted else OK
        remedy = f"build NVIDIA's apex from its commit in {PIN_FILE} (never `pip install apex`), or use the image"
        return Finding("apex", "missing" if wanted else "none, none needed", state, remedy if wanted else "")
    folders = [Path(p) for p in spec.submodule_search_locations or []]
    if not any((folder / "multi_tensor_apply").is_dir() for folder in folders):
        return Finding(
            "apex", "PyPI's, an unrelated web toolkit", WRONG, "pip uninstall apex: it hides NVIDIA's, which is meant"
        )
    missing = [m for m in ("amp_C", "fused_weight_gradient_mlp_cuda") if not _has_module(m)]
    if missing:
        return Finding(
            "apex",
            f"NVIDIA's, without {', '.join(missing)}",
            WRONG if wanted else NOTICE,
            "build it with APEX_CPP_EXT=1 APEX_CUDA_EXT=1, as docker/Dockerfile does",
        )
    return Finding("apex", f"NVIDIA's {installed('apex') or ''}, with its kernels")


def _has_module(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


# ----------------------------------------------------------------------------------------------------------- GPUs


@dataclass(frozen=True)
class Gpu:
    """One device, as the driver describes it."""

    name: str
    capability: tuple[int, int]
    memory: int  # bytes
    used: int


@dataclass(frozen=True)
class Gpus:
    """What the driver says; ``problem`` where it says nothing."""

    devices: list[Gpu]
    driver: str = ""
    cuda: int = 0  # of the driver: 13000 is 13.0
    problem: str = ""


def read_gpus() -> Gpus:
    """Ask the driver through NVML, which makes no CUDA context."""
    try:
        import pynvml as nvml
    except ImportError:
        return Gpus([], problem="nvidia-ml-py is not installed")
    try:
        nvml.nvmlInit()
    except Exception as error:
        return Gpus([], problem=f"no driver answers ({error})")
    try:
        devices = []
        for i in range(nvml.nvmlDeviceGetCount()):
            handle = nvml.nvmlDeviceGetHandleByIndex(i)
            memory = nvml.nvmlDeviceGetMemoryInfo(handle)
            name: Any = nvml.nvmlDeviceGetName(handle)
            devices.append(
                Gpu(
                    name if isinstance(name, str) else name.decode(),
                    tuple(nvml.nvmlDeviceGetCudaComputeCapability(handle)),
                    int(memory.total),
                    int(memory.used),
                )
            )
        driver: Any = nvml.nvmlSystemGetDriverVersion()
        return Gpus(
            devices,
            driver if isinstance(driver, str) else driver.decode(),
            int(nvml.nvmlSystemGetCudaDriverVersion_v2()),
        )
    finally:
        nvml.nvmlShutdown()


def gpu_findings(gpus: Gpus) -> Iterator[Finding]:
    """Devices, FP8, the driver against torch's CUDA, NCCL."""
    if not gpus.devices:
        text = gpus.problem or "the driver sees none"
        yield Finding(
            "GPU", f"none: {text}", WRONG, "install the driver, and start the container with --gpus all (nvidia-smi)"
        )
        yield Finding("FP8", "no GPU", WRONG, "Hopper or later")
    else:
        names = ", ".join(sorted({f"{g.name}, {g.memory / GIB:.0f} GiB" for g in gpus.devices}))
        yield Finding("GPU", f"{len(gpus.devices)} x {names}; driver {gpus.driver}")
        slow = [g for g in gpus.devices if g.capability < _FP8_CAPABILITY]
        found = ", ".join(sorted({f"{a}.{b}" for g in gpus.devices for a, b in [g.capability]}))
        yield Finding(
            "FP8",
            f"compute capability {found}",
            NOTICE if slow else OK,
            "below 9.0: run the teacher in bf16" if slow else "",
        )
    yield _torch_cuda(gpus)
    yield _nccl()


def _torch_cuda(gpus: Gpus) -> Finding:
    """The CUDA torch was built for, read from its version file: importing torch takes seconds."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return Finding("torch's CUDA", "no torch", WRONG, "see torch above")
    file = Path(spec.origin).with_name("version.py")
    found = re.search(r"^cuda(?:: [^=]+)? = '([\d.]+)'", file.read_text() if file.is_file() else "", re.MULTILINE)
    if not found:
        return Finding(
            "torch's CUDA", "a CPU build", WRONG, "install a CUDA build of torch: uv's --torch-backend, or the image"
        )
    version = found.group(1)
    major = int(version.split(".")[0])
    if gpus.cuda and gpus.cuda // 1000 < major:
        return Finding(
            "torch's CUDA",
            f"{version}, the driver's {gpus.cuda // 1000}.{gpus.cuda % 1000 // 10}",
            WRONG,
            f"the driver is too old for CUDA {major}: update it",
        )
    return Finding("torch's CUDA", version)


def _nccl() -> Finding:
    names = [d for d in ("nvidia-nccl-cu13", "nvidia-nccl-cu12") if installed(d)]
    if names:
        return Finding("NCCL", ", ".join(f"{installed(n)} ({n})" for n in names))
    return Finding("NCCL", "missing", WRONG, "comes with a CUDA build of torch (nvidia-nccl-cu13)")


# -------------------------------------------------------------------------------------------------------- machine


def machine(role: str, runs: Path) -> Iterator[Finding]:
    """Memory, shared memory, disk, limits."""
    least = _LEAST[role]
    # Totals: a run that uses its memory is not ill, and the health check sees it at work.
    yield _enough(
        "memory", psutil.virtual_memory().total / GIB, least["memory"], "in all", "a machine or a limit with more"
    )
    shared = Path("/dev/shm")
    if shared.is_dir():
        yield _enough(
            "shared memory",
            shutil.disk_usage(shared).total / GIB,
            least["shared"],
            "in /dev/shm",
            "docker run --ipc host, or --shm-size (compose: shm_size; Kubernetes: an emptyDir of medium Memory)",
        )
    place = runs.absolute()
    while not place.exists():
        place = place.parent
    if os.access(place, os.W_OK):
        free = shutil.disk_usage(place).free / GIB
        yield _enough(
            "disk for runs", free, least["disk"], f"free in {place}", "a larger volume: exp_manager.exp_dir", NOTICE
        )
    else:
        yield Finding(
            "disk for runs", f"{place} cannot be written", WRONG, "mount a writable volume, or set exp_manager.exp_dir"
        )
    if role == "gpu":
        locked = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
        free_lock = locked == resource.RLIM_INFINITY
        yield Finding(
            "locked memory",
            "unlimited" if free_lock else f"{locked // 1024} KiB",
            OK if free_lock else NOTICE,
            "" if free_lock else "InfiniBand registers pinned memory: --ulimit memlock=-1",
        )


def _enough(what: str, have: float, least: float, where: str, remedy: str, state: str = WRONG) -> Finding:
    enough = have >= least
    return Finding(
        what,
        f"{have:.1f} GiB {where}",
        OK if enough else state,
        "" if enough else f"wants {least:g} GiB: {remedy}",
    )


def free_port(port: int, bind: Callable[[int], None] | None = None) -> Finding:
    """Whether the launchers could meet here."""
    try:
        (bind or _bind)(port)
    except OSError as error:
        return Finding(
            "rendezvous port",
            f"{port}: {error.strerror}",
            NOTICE,
            "a run may hold it; else choose another in trainer.rendezvous",
        )
    return Finding("rendezvous port", f"{port} is free")


def _bind(port: int) -> None:
    with socket.socket() as probe:
        probe.bind(("", port))


def own_name() -> Finding:
    """Other nodes are reached by name; a name that means the loopback is worth knowing."""
    name = socket.gethostname()
    try:
        addresses = sorted({str(info[4][0]) for info in socket.getaddrinfo(name, None)})
    except OSError:
        return Finding(
            "host name",
            f"{name} cannot be resolved",
            NOTICE,
            "give addresses in trainer.rendezvous where nodes are many",
        )
    if all(a.startswith("127.") or a == "::1" for a in addresses):
        return Finding(
            "host name",
            f"{name} is {', '.join(addresses)}",
            NOTICE,
            "for several nodes, give an address in trainer.rendezvous",
        )
    return Finding("host name", f"{name} is {', '.join(addresses)}")


if __name__ == "__main__":
    sys.exit(main())
