"""Debian in the place of the public base images, and what that changes in docker/Dockerfile."""

from __future__ import annotations

import subprocess
import time

from tests.docker.buildah import Buildah

PYTHON = "ca-certificates,netbase,tzdata,python3,python3-venv,python3-dev"
# role -> Debian's release, and the images it stands for. Debian has no Python 3.12: 3.11 is too old for the GPU pins.
RELEASES = {
    "cpu": ("bookworm", ("python:3.11-slim-bookworm",)),
    "gpu": ("trixie", ("nvidia/cuda:13.0.2-cudnn-devel-ubuntu24.04", "nvidia/cuda:13.0.2-base-ubuntu24.04")),
}
_PATH = "ENV PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_CPU = f"""FROM scratch
ADD base.tar /
{_PATH}
RUN ln -s /usr/bin/python3 /usr/local/bin/python
"""
# Packages named as Ubuntu's Python 3.12, which bring Debian's 3.13, from a folder that apt installs from.
_GPU = f"""FROM scratch
ADD base.tar /
{_PATH} NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
RUN cd /srv && for name in python3.12 python3.12-dev python3.12-venv; do \\
      mkdir -p $name/DEBIAN && printf '%s\\n' "Package: $name" "Version: 3.12" "Architecture: all" "Maintainer: none" \\
        "Depends: $(echo $name | sed 's/3.12\\(-.*\\)/3.13\\1, python3.12/; s/^python3.12$/python3.13/')" \\
        "Description: stands for Ubuntu's" > $name/DEBIAN/control; done \\
    && mkdir -p python3.12/usr/bin && ln -s python3.13 python3.12/usr/bin/python3.12 \\
    && for name in python3.12*; do dpkg-deb --build $name && cat $name/DEBIAN/control \\
      && printf '%s\\n' "Filename: ./$name.deb" "Size: $(stat -c %s $name.deb)" \\
           "SHA256: $(sha256sum $name.deb | cut -d ' ' -f 1)" "" || exit 1; done > list \\
    && grep -v ^dpkg-deb: list > Packages \\
    && echo "deb [trusted=yes] file:/srv ./" > /etc/apt/sources.list.d/stand-in.list
"""
# The first word of a line in docker/Dockerfile up to the next instruction, what takes its place, and why.
EDITS = (
    ("RUN packages=", "", "not run: apex and Transformer Engine's torch extension, which CUDA's compilers build"),
    (
        "RUN uv pip install --no-deps --no-build-isolation ./package",
        "RUN sed -i 's/^requires-python.*/requires-python = \">=3.11\"/' package/pyproject.toml \\\n"
        "    && uv pip install --no-deps --no-build-isolation ./package\n",
        "the package's requires-python, since the base has Python 3.13 in the place of 3.12",
    ),
)


def gpu_dockerfile(text: str) -> str:
    """docker/Dockerfile with ``EDITS``. ValueError unless each finds its one instruction."""
    for begins, becomes, _ in EDITS:
        lines = text.splitlines(keepends=True)
        found = [i for i, line in enumerate(lines) if line.startswith(begins)]
        if len(found) != 1:
            raise ValueError(f"docker/Dockerfile has {len(found)} lines that begin with {begins!r}: adapt EDITS")
        end = found[0]
        while lines[end].endswith("\\\n"):
            end += 1
        text = "".join([*lines[: found[0]], becomes, *lines[end + 1 :]])
    return text


def make_base(tools: Buildah, role: str) -> None:
    """The images that the Dockerfile of ``role`` starts from, unless the storage has them."""
    release, names = RELEASES[role]
    if all(tools.has(name) for name in names):
        return
    start = time.monotonic()
    folder = tools.storage / "base"
    folder.mkdir(exist_ok=True)
    archive = folder / "base.tar"
    include = PYTHON if role == "cpu" else "ca-certificates"
    # As in the public images: no translations, and dpkg does not wait for the disk.
    options = ['--aptopt=Acquire::Languages "none"', "--dpkgopt=force-unsafe-io", f"--include={include}"]
    command = ["nice", "-n", "19", "mmdebstrap", "--quiet", "--variant=minbase", *options, release, str(archive)]
    subprocess.run(command, check=True)
    (folder / "Dockerfile").write_text(_CPU if role == "cpu" else _GPU)
    tools.build(names[0], folder / "Dockerfile", folder)
    for name in names[1:]:
        tools.ask("tag", names[0], name)
    archive.unlink()
    print(f"{release} in the place of {' and '.join(names)}: {time.monotonic() - start:.0f} s", flush=True)
