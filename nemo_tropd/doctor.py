"""Checks whether this machine and environment can play a role, and says how to fix what is wrong.

    python -m nemo_tropd.doctor [--role cpu|gpu] [--brief] [--port N] [--runs DIR]

Exit code 0: no problems (notices do not count), 1: at least one. Imports no framework and allocates no GPU memory, so
that it can run next to a training run, as the containers' health check does. Without ``--role``: NEMO_TROPD_ROLE, else
gpu if a driver responds, else cpu.
"""

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
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
from packaging.requirements import Requirement
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from nemo_tropd.parallel.addresses import UnreachableName, addresses_of, for_others, is_loopback

GIB = 2**30
OK, NOTICE, WRONG = "ok", "notice", "wrong"
_COLOURS = {OK: "[green]ok[/]", NOTICE: "[yellow]notice[/]", WRONG: "[red]wrong[/]"}
# First compute capability with FP8 tensor cores that Transformer Engine's recipes support (8.9 has them, without).
_FP8_CAPABILITY = (9, 0)
_MINIMUM = {  # GiB
    "cpu": {"memory": 10.0, "shared": 0.06, "disk": 10.0},
    "gpu": {"memory": 64.0, "shared": 8.0, "disk": 100.0},
}
PIN_FILE = "docker/requirements-gpu.in"


@dataclass(frozen=True)
class Finding:
    """One row of the table."""

    what: str
    found: str
    state: str = OK
    remedy: str = ""


def _verdict(what: str, found: str, good: bool, remedy: str, otherwise: str = WRONG) -> Finding:
    """A row that has a remedy, and the state ``otherwise``, only if it is not ``good``."""
    return Finding(what, found) if good else Finding(what, found, otherwise, remedy)


def main(argv: list[str] | None = None) -> int:
    """Print the table; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--role", choices=("cpu", "gpu"), default=os.environ.get("NEMO_TROPD_ROLE") or None)
    parser.add_argument("--brief", action="store_true", help="print only what is wrong")
    parser.add_argument("--port", type=_port, default=29400, help="the port of trainer.rendezvous")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="the directory runs are written to")
    options = parser.parse_args(argv)
    if options.role not in (None, *_MINIMUM):
        parser.error(f"NEMO_TROPD_ROLE = {options.role!r}: choose one of {', '.join(_MINIMUM)}, or unset it")
    role = options.role or ("gpu" if read_gpus().devices else "cpu")
    findings = list(examine(role, options.port, options.runs))
    wrong = [f for f in findings if f.state == WRONG]
    console = Console(width=max(shutil.get_terminal_size((140, 40)).columns, 110))
    if shown := wrong if options.brief else findings:
        table = Table("", "found", "", "fix", title=f"nemo_tropd, role {role}", title_justify="left")
        for f in shown:
            table.add_row(escape(f.what), escape(f.found), _COLOURS[f.state], escape(f.remedy))
        console.print(table)
    console.print(f"role {role}: {len(wrong)} problem(s)" if wrong else f"role {role}: no problems found")
    return 1 if wrong else 0


def _port(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 65535:
        raise argparse.ArgumentTypeError(f"{text!r}: give a number from 1 to 65535")
    return int(text)


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
    return _verdict("Python", version, fits, f"use Python {wanted}")


def packages(role: str) -> Iterator[Finding]:
    """The package's requirements and those of the extra ``role``, whose pins are only a notice."""
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
    """Transformer Engine's part that is built from source."""
    version = installed("transformer-engine-torch") if _has_module("transformer_engine_torch") else None
    remedy = (
        "pip install --no-build-isolation transformer-engine-torch in the version of transformer-engine, with a CUDA "
        "build of torch installed; or use the image"
    )
    yield _verdict("Transformer Engine's torch extension", version or "missing", version is not None, remedy)


def nemo_apex(*, wanted: bool) -> Finding:
    """NVIDIA's apex has fused kernels (amp_C, multi_tensor_apply); PyPI's package of that name is unrelated."""
    spec = importlib.util.find_spec("apex")
    if spec is None:
        remedy = f"build NVIDIA's apex from its commit in {PIN_FILE} (never `pip install apex`), or use the image"
        return _verdict("apex", "missing" if wanted else "not installed, not needed", not wanted, remedy)
    if not any((Path(folder) / "multi_tensor_apply").is_dir() for folder in spec.submodule_search_locations or []):
        remedy = "pip uninstall apex: it shadows NVIDIA's apex, which is required"
        return Finding("apex", "PyPI's, an unrelated web toolkit", WRONG, remedy)
    missing = [m for m in ("amp_C", "fused_weight_gradient_mlp_cuda") if not _has_module(m)]
    kernels = f", built without {', '.join(missing)}" if missing else f" {installed('apex') or ''}, with its kernels"
    remedy = "rebuild it with APEX_CPP_EXT=1 APEX_CUDA_EXT=1, as docker/Dockerfile does"
    return _verdict("apex", "NVIDIA's" + kernels, not missing, remedy, WRONG if wanted else NOTICE)


def _has_module(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


@dataclass(frozen=True)
class Gpu:
    """One device, as reported by the driver."""

    name: str
    capability: tuple[int, int]
    memory: int  # bytes


@dataclass(frozen=True)
class Gpus:
    """What the driver reports; ``problem`` says why if it reports nothing."""

    devices: list[Gpu]
    driver: str = ""
    cuda: int = 0  # the highest version the driver supports: 13000 is 13.0
    problem: str = ""


def read_gpus() -> Gpus:
    """Query the driver through NVML, which creates no CUDA context."""
    try:
        import pynvml as nvml
    except ImportError:
        return Gpus([], problem="nvidia-ml-py is not installed")
    try:
        nvml.nvmlInit()
    except Exception as error:
        return Gpus([], problem=f"no driver responds ({error})")
    try:
        devices = []
        for i in range(nvml.nvmlDeviceGetCount()):
            handle = nvml.nvmlDeviceGetHandleByIndex(i)
            memory = nvml.nvmlDeviceGetMemoryInfo(handle)
            capability = tuple(nvml.nvmlDeviceGetCudaComputeCapability(handle))
            devices.append(Gpu(_text(nvml.nvmlDeviceGetName(handle)), capability, int(memory.total)))
        driver = _text(nvml.nvmlSystemGetDriverVersion())
        return Gpus(devices, driver, int(nvml.nvmlSystemGetCudaDriverVersion_v2()))
    finally:
        nvml.nvmlShutdown()


def _text(given: str | bytes) -> str:
    return given if isinstance(given, str) else given.decode()  # older versions of nvidia-ml-py give bytes


def gpu_findings(gpus: Gpus) -> Iterator[Finding]:
    """Devices, FP8 support, NCCL, and whether the driver supports torch's CUDA version."""
    if not gpus.devices:
        remedy = "install the driver and check it with nvidia-smi; start the container with --gpus all"
        yield Finding("GPU", f"none: {gpus.problem or 'the driver reports no devices'}", WRONG, remedy)
        yield Finding("FP8", "no GPU", WRONG, "needs a GPU of the Hopper generation or later")
    else:
        names = ", ".join(sorted({f"{g.name}, {g.memory / GIB:.0f} GiB" for g in gpus.devices}))
        yield Finding("GPU", f"{len(gpus.devices)} x {names}; driver {gpus.driver}")
        fast = all(g.capability >= _FP8_CAPABILITY for g in gpus.devices)
        found = ", ".join(sorted({"{}.{}".format(*g.capability) for g in gpus.devices}))
        yield _verdict("FP8", f"compute capability {found}", fast, "below 9.0: run the teacher in bf16", NOTICE)
    yield _torch_cuda(gpus)
    yield _nccl()


def _torch_cuda(gpus: Gpus) -> Finding:
    """The CUDA version torch was built for, read from its version file, since importing torch takes seconds."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return Finding("torch's CUDA", "torch is not installed", WRONG, "install torch, see its row above")
    file = Path(spec.origin).with_name("version.py")
    found = re.search(r"^cuda(?:: [^=]+)? = '([\d.]+)'", file.read_text() if file.is_file() else "", re.MULTILINE)
    if not found:
        remedy = "install a CUDA build of torch: uv's --torch-backend, or the image"
        return Finding("torch's CUDA", "a CPU build", WRONG, remedy)
    version = found.group(1)
    major = int(version.split(".")[0])
    if gpus.cuda and gpus.cuda // 1000 < major:
        version += f"; the driver supports {gpus.cuda // 1000}.{gpus.cuda % 1000 // 10}"
        return Finding("torch's CUDA", version, WRONG, f"the driver is too old for CUDA {major}: update it")
    return Finding("torch's CUDA", version)


def _nccl() -> Finding:
    names = [f"{installed(d)} ({d})" for d in ("nvidia-nccl-cu13", "nvidia-nccl-cu12") if installed(d)]
    remedy = "install a CUDA build of torch, which brings it (nvidia-nccl-cu13)"
    return _verdict("NCCL", ", ".join(names) or "missing", bool(names), remedy)


def machine(role: str, runs: Path) -> Iterator[Finding]:
    """Memory, shared memory, disk space and limits."""
    minimum = _MINIMUM[role]
    # Totals, not free memory: the health check runs next to a healthy run that uses it.
    remedy = "use a machine, or a container limit, with more"
    yield _enough("memory", psutil.virtual_memory().total, minimum["memory"], "in total", remedy)
    shared = Path("/dev/shm")
    if shared.is_dir():
        remedy = "use docker run --ipc host, or --shm-size (compose: shm_size; Kubernetes: emptyDir, medium: Memory)"
        yield _enough("shared memory", shutil.disk_usage(shared).total, minimum["shared"], "in /dev/shm", remedy)
    folder = runs.absolute()
    while not folder.exists():
        folder = folder.parent
    if os.access(folder, os.W_OK):
        free, remedy = shutil.disk_usage(folder).free, "set exp_manager.exp_dir to a larger volume"
        yield _enough("disk for runs", free, minimum["disk"], f"free in {folder}", remedy, NOTICE)
    else:
        remedy = "mount a writable volume, or set exp_manager.exp_dir"
        yield Finding("disk for runs", f"{folder} is not writable", WRONG, remedy)
    if role == "gpu":
        locked = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
        unlimited = locked == resource.RLIM_INFINITY
        found = "unlimited" if unlimited else f"{locked // 1024} KiB"
        remedy = "InfiniBand registers pinned memory: start the container with --ulimit memlock=-1"
        yield _verdict("locked memory", found, unlimited, remedy, NOTICE)


def _enough(what: str, size: float, minimum: float, where: str, remedy: str, otherwise: str = WRONG) -> Finding:
    """``size`` in bytes, ``minimum`` in GiB."""
    have = size / GIB
    return _verdict(what, f"{have:.1f} GiB {where}", have >= minimum, f"needs {minimum:g} GiB: {remedy}", otherwise)


def free_port(port: int) -> Finding:
    """Whether this machine can host the rendezvous on ``port``."""
    try:
        with socket.socket() as probe:
            probe.bind(("", port))
    except OSError as error:
        remedy = "in use, possibly by a running job; otherwise choose another port in trainer.rendezvous"
        return Finding("rendezvous port", f"{port}: {error.strerror}", NOTICE, remedy)
    return Finding("rendezvous port", f"{port} is free")


def own_name() -> Finding:
    """Whether other nodes can reach this one by its name: it must not resolve to the loopback, unless this machine has
    one address, which the launcher then takes."""
    name = socket.gethostname()
    try:
        found, meant = sorted(addresses_of(name)), for_others(name)
    except OSError:
        remedy = "for multi-node runs, give an address in trainer.rendezvous"
        return Finding("host name", f"{name} does not resolve", NOTICE, remedy)
    except UnreachableName as error:
        return Finding("host name", f"{name} resolves to the loopback", NOTICE, f"for multi-node runs: {error}")
    text = f"{name} resolves to {', '.join(found)}"
    if meant == name and all(is_loopback(a) for a in found):
        return Finding("host name", text, NOTICE, "for multi-node runs, connect this machine to a network")
    return Finding("host name", text if meant == name else f"{text}; {meant} is taken instead")


if __name__ == "__main__":
    sys.exit(main())
