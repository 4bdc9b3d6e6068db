"""buildah without a daemon, a registry or namespaces of its own: builds images and runs commands in containers."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

CERTIFICATES = Path("/etc/ssl/certs/ca-certificates.crt")
GB = 1e9


def missing_tools() -> str | None:
    """Why images cannot be built here, or None."""
    if os.geteuid() != 0:
        return "building images without a daemon needs root"
    missing = [tool for tool in ("buildah", "mmdebstrap", "ip", "unshare") if shutil.which(tool) is None]
    return f"not installed: {', '.join(missing)} (Debian: buildah, mmdebstrap, iproute2)" if missing else None


@dataclass(frozen=True)
class Buildah:
    """One storage of layers, images and containers."""

    storage: Path

    @property
    def wheels(self) -> Path | None:
        """The folder of wheels that PIP_FIND_LINKS names, if any."""
        named = os.environ.get("PIP_FIND_LINKS")
        return Path(named) if named else None

    def command(self, *words: str | Path) -> list[str]:
        """A buildah command line on this storage."""
        place = ["--root", self.storage / "root", "--runroot", self.storage / "run", "--storage-driver", "overlay"]
        return ["nice", "-n", "19", "buildah", *map(str, [*place, *words])]

    def ask(self, *words: str | Path) -> str:
        """A short command's output. Raises CalledProcessError."""
        return subprocess.run(self.command(*words), capture_output=True, text=True, check=True, timeout=600).stdout

    def has(self, image: str) -> bool:
        """Whether ``image`` is in the storage."""
        words = self.command("inspect", "--type", "image", image)
        return subprocess.run(words, capture_output=True, check=False, timeout=60).returncode == 0

    def build(
        self,
        image: str,
        file: Path,
        context: Path,
        arguments: Mapping[str, str] | None = None,
        *,
        each_step: bool = True,
    ) -> None:
        """``docker build``; prints the steps and the seconds. Raises CalledProcessError. Without ``each_step`` no layer
        of a single step is kept, only the image: a failed build begins anew, and takes a third of the disk."""
        start = time.monotonic()
        # docker's own format: OCI's has neither SHELL nor HEALTHCHECK. What is mounted leaves empty files in the image.
        words = ["build", "--format", "docker", "--isolation", "chroot", "--pull-never", "--tag", image]
        words.append(f"--layers={str(each_step).lower()}")
        words += [f"--build-arg={name}={value}" for name, value in (arguments or {}).items()]
        with tempfile.TemporaryDirectory() as made:
            words += [f"--volume={source}:{target}:ro" for source, target in self._configuration(Path(made)).items()]
            subprocess.run(self.command(*words, "--file", file, context), check=True)
        print(f"{image}: built in {time.monotonic() - start:.0f} s", flush=True)

    def _configuration(self, folder: Path) -> dict[Path, str]:
        """This machine's certificates and wheels, for pip and uv in the build: files, and where they are mounted."""
        pip, uv = ["[global]"], ["system-certs = true"]
        mounts: dict[Path, str] = {}
        if CERTIFICATES.is_file():
            mounts[CERTIFICATES] = str(CERTIFICATES)
            pip.append(f"cert = {CERTIFICATES}")
        if self.wheels:
            mounts[self.wheels] = "/wheels"
            pip.append("find-links = /wheels")
            uv.append('find-links = ["/wheels"]')
        (folder / "pip.conf").write_text("\n".join(pip) + "\n")
        (folder / "uv.toml").write_text("\n".join(uv) + "\n")
        return mounts | {folder / "pip.conf": "/etc/pip.conf", folder / "uv.toml": "/etc/uv/uv.toml"}

    def layers(self, image: str) -> Iterator[str]:
        """What each layer holds, with its size; then all of them."""
        found = json.loads(self.ask("inspect", "--type", "image", image))
        by_diff = {}
        for record in json.loads((self.storage / "root/overlay-layers/layers.json").read_text()):
            by_diff[record.get("diff-digest")] = record.get("diff-size", 0)
        filled = [h["created_by"] for h in found["Docker"]["history"] if not h.get("empty_layer")]
        sizes = [by_diff.get(digest, 0) for digest in found["Docker"]["rootfs"]["diff_ids"]]
        for size, made in zip(sizes, filled, strict=True):
            yield f"  {size / GB:6.2f} GB  {' '.join(made.split())[:90]}"
        yield f"{image}: {len(sizes)} layers, {sum(sizes) / GB:.2f} GB"

    @contextmanager
    def container(self, image: str) -> Iterator[Container]:
        """A new container, removed at the end."""
        name = self.ask("from", "--pull-never", image).strip()
        try:
            yield Container(self, name, json.loads(self.ask("inspect", name))["Docker"]["config"])
        finally:
            self.ask("rm", name)

    def close(self) -> None:
        """Remove what an interrupted command left mounted."""
        self.ask("rm", "--all")


@dataclass(frozen=True)
class Container:
    """A container that runs one command after the other."""

    tools: Buildah
    name: str
    settings: dict[str, object]

    def run(
        self,
        *command: str,
        uid: int | None = None,
        volumes: Mapping[Path, str] | None = None,
        entrypoint: bool = True,
        timeout_s: float = 900,
    ) -> subprocess.CompletedProcess[str]:
        """``docker run``, without a network: as the image's user, or as ``uid``, which may have no name.

        ``entrypoint=False`` is what Kubernetes does for a pod's ``command``, and pyxis always.
        """
        # docker gives a container a name that it can resolve; buildah gives one that no file knows, and torchrun waits.
        words: list[str | Path] = ["run", "--isolation", "chroot", "--hostname", "localhost"]
        words += [f"--user={uid}:{uid}"] if uid is not None else []
        words += [f"--volume={source}:{target}" for source, target in (volumes or {}).items()]
        first: Sequence[str] = self.settings["Entrypoint"] if entrypoint else ()
        inside = self.tools.command(*words, self.name, "--", *first, *command)
        script = 'ip link set lo up && exec "$@"'
        process = subprocess.Popen(
            ["unshare", "--net", "sh", "-c", script, "run", *inside],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        )  # fmt: skip
        try:
            output, _ = process.communicate(timeout=timeout_s)
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
        return subprocess.CompletedProcess(command, process.returncode, output)

    @contextmanager
    def files(self) -> Iterator[Path]:
        """The container's root directory."""
        yield Path(self.tools.ask("mount", self.name).strip())
        self.tools.ask("umount", self.name)
