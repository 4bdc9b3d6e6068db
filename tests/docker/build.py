"""Builds the images where no registry can be reached, and uses them as their users do.

    python -m tests.docker.build                   the CPU image, then the GPU image
    python -m tests.docker.build cpu               one of them
    python -m tests.docker.build --storage DIR     keep bases, layers and images there, for the next time

Needs root, Debian's packages buildah, mmdebstrap and iproute2, about 20 GB of disk for the CPU image and 55 GB for the
GPU image. ``bases.py`` makes what takes the public bases' places, and lists what is changed in docker/Dockerfile: all
but the steps that need CUDA's compilers is built. Where PIP_FIND_LINKS names a folder of wheels, torch's CPU build
comes from there, as in the Makefile. Exit code 1 if a build or a check fails.
"""

from __future__ import annotations

import argparse
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.docker.bases import EDITS, gpu_dockerfile, make_base
from tests.docker.buildah import Buildah, missing_tools
from tests.docker.checks import CHECKS, CheckError

ROOT = Path(__file__).resolve().parents[2]
IMAGES = {"cpu": "nemo_tropd:cpu", "gpu": "nemo_tropd"}


def build(tools: Buildah, role: str) -> None:
    """The image of ``role``; CalledProcessError if a step fails, whose output is printed."""
    make_base(tools, role)
    if role == "cpu":
        wheels = {"TORCH_BACKEND": ""} if tools.wheels else {}
        tools.build(IMAGES[role], ROOT / "docker" / "Dockerfile.cpu", ROOT, wheels)
        return
    print("changed in docker/Dockerfile:", *(f"  {why}" for *_, why in EDITS), sep="\n", flush=True)
    file = tools.storage / "Dockerfile"
    file.write_text(gpu_dockerfile((ROOT / "docker" / "Dockerfile").read_text()))
    tools.build(IMAGES[role], file, ROOT, {"REVISION": "test"}, each_step=False)


def main(argv: list[str] | None = None) -> int:
    """Build and check; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.docker.build", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("images", nargs="*", metavar="cpu|gpu", help="default: both")
    parser.add_argument("--storage", type=Path, help="a folder to keep layers in; default: a temporary one")
    parser.add_argument("--only", default="", metavar="TEXT", help="only checks with TEXT in their name")
    options = parser.parse_args(argv)
    if unknown := set(options.images) - set(IMAGES):
        parser.error(f"images are {', '.join(IMAGES)}, not {', '.join(sorted(unknown))}")
    if reason := missing_tools():
        print(reason, file=sys.stderr)
        return 2
    storage = options.storage or Path(tempfile.mkdtemp(prefix="nemo_tropd-images."))
    storage.mkdir(parents=True, exist_ok=True)
    tools = Buildah(storage.resolve())
    failed = 0
    try:
        for role in options.images or IMAGES:
            build(tools, role)
            for line in tools.layers(IMAGES[role]):
                print(line, flush=True)
            failed += run_checks(tools, role, options.only)
    except subprocess.CalledProcessError as error:
        print(f"exit code {error.returncode}: {shlex.join(map(str, error.cmd))}\n{error.stderr or ''}", file=sys.stderr)
        return 1
    finally:
        tools.close()
        if options.storage is None:
            shutil.rmtree(storage, ignore_errors=True)
    print(f"{failed} check(s) failed" if failed else "all checks passed")
    return 1 if failed else 0


def run_checks(tools: Buildah, role: str, only: str) -> int:
    """Each check of ``role`` in a new container; how many failed."""
    failed = 0
    for name, check in CHECKS[role]:
        if only not in name:
            continue
        start, said = time.monotonic(), "ok"
        try:
            check(tools, IMAGES[role])
        except (CheckError, subprocess.TimeoutExpired) as error:
            failed, said = failed + 1, f"FAILED\n{error}"
        print(f"{role}: {name} ({time.monotonic() - start:.0f} s): {said}", flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(main())
