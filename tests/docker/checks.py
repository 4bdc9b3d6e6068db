"""What a user does with the images, each in a container of its own without a network."""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from tests.docker.buildah import Buildah

USER, ANY_UID = 10001, 54321
STARTS_IN = {"nemo_tropd:cpu": "/opt/nemo_tropd", "nemo_tropd": "/workspace"}
TRAIN = ("torchrun", "--nproc_per_node=1", "examples/train_tropd.py", "--config-name")
Check = Callable[[Buildah, str], None]


class CheckError(Exception):
    """What a container did instead."""


def expect(done: subprocess.CompletedProcess[str], code: int, *texts: str) -> str:
    """The output, if the exit code and ``texts`` are as wanted. Raises CheckError."""
    flat = re.sub(r"\s+", " ", done.stdout)
    missing = [text for text in texts if text not in flat]
    if done.returncode != code or missing:
        raise CheckError(f"exit code {done.returncode} (not {code}?), without {missing}:\n{done.stdout[-4000:]}")
    return flat


@contextmanager
def volume(uid: int) -> Iterator[Path]:
    """An empty folder on this machine which belongs to ``uid``, as a mounted volume does."""
    with tempfile.TemporaryDirectory() as folder:
        inner = Path(folder) / "volume"  # 0755: only its owner can write to it
        Path(folder).chmod(0o755)
        inner.mkdir()
        os.chown(inner, uid, uid)
        yield inner


def two_steps(run: Path) -> None:
    """CheckError unless the run took two."""
    steps = (run / "metrics.jsonl").read_text().count('"kind": "train"')
    if steps != 2:
        raise CheckError(f"{steps} steps in {run / 'metrics.jsonl'}, not 2")


def doctor_passes(tools: Buildah, image: str) -> None:
    """The default command, and the health check's."""
    with tools.container(image) as container:
        expect(container.run(*container.settings["Cmd"]), 0, "no problems found")
        health = container.settings["Healthcheck"]["Test"]
        expect(container.run(*health[1:], uid=ANY_UID), 0, "no problems found")


def demo_trains(tools: Buildah, image: str) -> None:
    """``demo`` for two steps, with a volume for its runs, which keeps the checkpoints of teacher and student, too."""
    with tools.container(image) as container, volume(USER) as runs:
        keys = ("trainer.tropd.max_steps=2", "trainer.tropd.val_check_interval=0", "model.data.held_out=4")
        mounts = {runs: f"{STARTS_IN[image]}/runs"}
        expect(container.run("demo", *keys, volumes=mounts, timeout_s=2400), 0, "student ", "report ")
        two_steps(runs / "smollm2_cpu")
        if not list((runs / ".home/.cache/nemo_tropd").glob("smollm2-*/model.safetensors")):
            raise CheckError(f"no checkpoints on the volume: {sorted(runs.rglob('*'))[:50]}")


def mission_trains(
    tools: Buildah, image: str, uid: int, *, mounted: bool, entrypoint: bool = True, tmp: Path | None = None
) -> None:
    """torchrun and the example from where a container starts: tiny models, the engine included, two steps.

    ``mounted``: with a volume for its runs. ``tmp`` is a folder of this machine that is the container's /tmp.
    """
    from tests.e2e.tiny_run import TinyRun  # imports torch

    with tools.container(image) as container, volume(uid) as runs, tempfile.TemporaryDirectory() as data:
        TinyRun.make(Path(data))
        subprocess.run(["chmod", "-R", "a+rX", data], check=True)
        place = f"{STARTS_IN[image]}/runs"
        keys = TinyRun.at(Path("/data")).overrides(Path("runs/tiny"), **{"trainer.tropd.max_steps": 2})
        keys = [k for k in keys if not k.startswith("model.teacher.cache_dir=")]  # the default: under HOME
        volumes = {Path(data): "/data:ro"} | ({runs: place} if mounted else {}) | ({tmp: "/tmp"} if tmp else {})
        done = container.run(*TRAIN, "base", *keys, uid=uid, volumes=volumes, entrypoint=entrypoint, timeout_s=2400)
        said = expect(done, 0, "report ")
        if complaint := re.search(
            r"[^.]{0,200}(Permission denied|Read-only file system|PermissionError).{0,200}", said
        ):
            raise CheckError(f"it trained, but says: {complaint[0]}")
        with container.files() as root:
            written = runs if mounted else root / place.lstrip("/")
            two_steps(written / "tiny")
            if not list((written / ".home/.cache").rglob("*")):
                raise CheckError(f"no caches beside the run: {sorted(written.iterdir())}")


def one_tmp_serves_two_uids(tools: Buildah, image: str) -> None:
    """Containers that share a machine's /tmp, past the entrypoint: the image gives all uids one user's name."""
    with tempfile.TemporaryDirectory() as folder:
        tmp = Path(folder)
        tmp.chmod(0o1777)
        for uid in (ANY_UID, USER):
            mission_trains(tools, image, uid, mounted=False, entrypoint=False, tmp=tmp)
            own = [path for path in tmp.glob("torchinductor_*") if path.lstat().st_uid == uid]
            within = [path for made in own for path in made.rglob("*")]
            others = [path for path in within if path.lstat().st_uid != uid]
            if others or not any(path.suffix == ".gch" for path in within):
                listing = "\n".join(f"{path.lstat().st_uid} {path}" for path in sorted(tmp.rglob("*"))[:50])
                raise CheckError(f"{uid} has no precompiled headers of its own:\n{listing}")
            for path in (*own, *within):  # what the next could write to, it must not use either
                path.chmod(0o777)


def gpu_doctor_names_what_is_missing(tools: Buildah, image: str) -> None:
    """No GPU, and the two packages that were not built: nothing else is wrong."""
    with tools.container(image) as container:
        said = container.run("doctor", "--brief")
        wrong = re.findall(r"^│ (\S.*?) +│", said.stdout, re.MULTILINE)
        allowed = {"GPU", "FP8", "apex", "Transformer Engine's torch extension", "memory", "shared memory"}
        if said.returncode != 1 or not set(wrong) <= allowed or not {"GPU", "apex"} <= set(wrong):
            raise CheckError(f"{wrong}\n{said.stdout}")


def gpu_check_asks_for_a_gpu(tools: Buildah, image: str) -> None:
    with tools.container(image) as container:
        expect(container.run("make", "gpu-check", uid=ANY_UID), 2, "gpu-check needs a CUDA device")


def libraries_import(tools: Buildah, image: str) -> None:
    """What needs no device to be imported, with all that it links to. Transformer Engine's torch extension needs CUDA's
    compiler and was not built: Megatron finds no Transformer Engine."""
    with tools.container(image) as container:
        hidden = "import sys; sys.modules['transformer_engine'] = None; "
        script = hidden + "import torch, vllm, megatron.core, transformers, triton, nemo; print(torch.version.cuda)"
        expect(container.run("python", "-c", script, uid=ANY_UID), 0, "13.")


def triton_compiles_its_launcher(tools: Buildah, image: str) -> None:
    """g++ and Python's headers are there, and the cache can be written by any uid."""
    script = (
        "from triton.runtime.build import compile_module_from_src as build; "
        'print(build(\'#include <Python.h>\\nstatic struct PyModuleDef d = {PyModuleDef_HEAD_INIT, "m"};'
        "PyMODINIT_FUNC PyInit_m(void) { return PyModule_Create(&d); }', 'm').__file__)"
    )
    with tools.container(image) as container, volume(ANY_UID) as runs:
        volumes = {runs: f"{STARTS_IN[image]}/runs"}
        expect(container.run("python", "-c", script, uid=ANY_UID, volumes=volumes), 0, "/workspace/runs/.home/.triton")


def recipe_resolves(tools: Buildah, image: str, uid: int, *, entrypoint: bool) -> None:
    """torchrun and a recipe from where a container starts; the recipe's prompts are there."""
    with tools.container(image) as container:
        done = container.run(*TRAIN, "smollm2_1gpu", "--cfg", "job", uid=uid, entrypoint=entrypoint)
        path = re.search(r"path: (examples/\S+)", expect(done, 0, "examples/prompts"))
        with container.files() as root:
            assert path and (root / "opt/nemo_tropd" / path[1]).is_file()


_UIDS = (("any uid", ANY_UID), ("root", 0), ("the image's user", USER))
CHECKS: dict[str, list[tuple[str, Check]]] = {
    "cpu": [
        ("the doctor passes", doctor_passes),
        *((f"torchrun as {who}, with a volume", partial(mission_trains, uid=uid, mounted=True)) for who, uid in _UIDS),
        ("the demo trains", demo_trains),
        ("torchrun past the entrypoint", partial(mission_trains, uid=ANY_UID, mounted=True, entrypoint=False)),
        *((f"torchrun as {who}, no volume", partial(mission_trains, uid=uid, mounted=False)) for who, uid in _UIDS),
        ("one /tmp serves two uids", one_tmp_serves_two_uids),
    ],
    "gpu": [
        ("the doctor names what is missing", gpu_doctor_names_what_is_missing),
        ("libraries can be imported", libraries_import),
        ("gpu-check asks for a GPU", gpu_check_asks_for_a_gpu),
        ("Triton compiles its launcher", triton_compiles_its_launcher),
        *(
            (f"torchrun as {who}, {how}", partial(recipe_resolves, uid=uid, entrypoint=entrypoint))
            for who, uid in _UIDS
            for how, entrypoint in (("docker", True), ("pyxis", False))
        ),
    ],
}
