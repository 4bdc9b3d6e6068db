"""Every command, key, file, link, option and name in the documentation exists, and the files that sources name."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path

import pytest

from nemo_tropd.config import schema_keys
from nemo_tropd.config_teacher import TEACHER_KEYS
from nemo_tropd.evaluation.settings import Benchmark, Evaluation
from tests.e2e.tiny_run import ROOT

TOP = ("nemo_tropd", "examples", "conf", "docker", "tests")
KEYS = set(schema_keys())
EVALUATION_KEYS = {f.name for kind in (Evaluation, Benchmark) for f in fields(kind)}
TARGETS = set(re.findall(r"^([a-z-]+):(?!=)", (ROOT / "Makefile").read_text(), re.MULTILINE))


def pages() -> list[Path]:
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.md"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    names = listed.stdout.split() if listed.returncode == 0 else [str(p) for p in ROOT.glob("[!.]*/**/*.md")]
    return sorted({ROOT / name for name in names if (ROOT / name).is_file()} | {ROOT / "README.md"})


def code(text: str) -> Iterator[str]:
    """Inline code, and the commands of indented blocks, one at a time, continuation lines joined, comments gone."""
    yield from re.findall(r"`([^`\n]+)`", text)
    joined = re.sub(r"\\\n\s*", " ", text)
    for line in joined.splitlines():
        if line.startswith("    "):
            yield re.split(r"\s#\s", line.strip())[0]


def make_targets(page: Path, text: str) -> Iterator[str]:
    for piece in code(text):
        for target in re.findall(r"\bmake ([a-z][a-z-]*)", piece):
            if target not in TARGETS:
                yield f"make {target}: not a target of the Makefile"


def config_keys(page: Path, text: str) -> Iterator[str]:
    roots = "|".join(sorted({key.split(".")[0] for key in KEYS if "." in key}))
    for piece in code(text):
        for key in re.findall(rf"(?<![\w./-])\+?((?:{roots})(?:\.(?:\w+|\*))+)", piece):
            known = key in KEYS or re.sub(r"\.\w+$", ".*", key) in KEYS
            known |= re.sub(r"^model\.teachers\.\w+\.", "", key) in TEACHER_KEYS
            if key.endswith(".*"):
                known = key.removesuffix(".*") in KEYS
            if not known:
                yield f"{key}: not a key of nemo_tropd/config.py"
        if "--config-name" in piece:
            known_here = EVALUATION_KEYS if "examples/evaluate.py" in piece else KEYS
            for key in re.findall(r"\s\+?([a-z_]+)=", piece):
                if key not in known_here:
                    yield f"{key}: not a key of nemo_tropd/config.py"


def config_names(page: Path, text: str) -> Iterator[str]:
    for name in re.findall(r"--config-name[ =]([\w.-]+)", text):
        if name not in ("RECIPE", "NAME") and not list((ROOT / "conf").glob(f"**/{name}.yaml")):
            yield f"--config-name {name}: no such file in conf/"


def files(page: Path, text: str) -> Iterator[str]:
    """Paths from the root of the repository, or of a file in the page's own folder, wherever they stand in code."""
    for piece in code(text):
        for path in re.findall(rf"(?<![\w/.-])(?:/opt/nemo_tropd/)?((?:{'|'.join(TOP)})/[\w./*-]*)", piece):
            found = path.rstrip(".,:")
            if not (list(ROOT.glob(found)) if "*" in found else (ROOT / found).exists()):
                yield f"{found}: no such file"
        # A bare name is a file of the page's own folder; the page at the root also names files of a run.
        name = piece.strip()
        is_file = re.fullmatch(r"[\w.-]+\.(py|yaml|sh|sbatch|txt|in|md)", name)
        if page.parent != ROOT and is_file and not (page.parent / name).exists():
            yield f"{name}: no such file"


def links(page: Path, text: str) -> Iterator[str]:
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?://", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        if not file.exists():
            yield f"{target}: no such file"
        elif anchor:
            headings = re.findall(r"^#+ (.+)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            if anchor not in {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}:
                yield f"{target}: no such heading"


def modules(page: Path, text: str) -> Iterator[str]:
    """``python -m MODULE`` and dotted names; what follows the module must occur in it."""
    for piece in code(text):
        yield from missing_modules(piece)


def missing_modules(text: str) -> Iterator[str]:
    for name in re.findall(r"(?<![\w./-])((?:nemo_tropd|examples)(?:\.\w+)+)(?![\w/-])", text):
        parts = name.split(".")
        if parts[-1] in ("py", "md"):
            continue
        depth = next((n for n in range(len(parts), 0, -1) if _source(parts[:n])), 0)
        source, rest = _source(parts[:depth]), parts[depth:]
        if source is None or len(rest) > 1 or (rest and not re.search(rf"\b{rest[0]}\b", source.read_text())):
            yield f"{name}: no such module or name"


def _source(parts: list[str]) -> Path | None:
    base = ROOT.joinpath(*parts)
    return next((p for p in (base.with_suffix(".py"), base / "__init__.py") if p.is_file()), None)


def options(page: Path, text: str) -> Iterator[str]:
    """Options of our own commands occur in the file that is run, or in a sibling that it imports."""
    for piece in code(text):
        run = re.search(r"python3? (?:-m ([\w.]+)|([\w/]+\.py))(.*)", piece)
        if not run:
            continue
        source = _source(run[1].split(".")) if run[1] else ROOT / run[2]
        if source is None or not source.is_file() or ROOT not in source.parents:
            continue
        code_text = source.read_text()
        for sibling in re.findall(r"^from examples\.benchmarks\.(\w+) import", code_text, re.M):
            code_text += (ROOT / "examples" / "benchmarks" / f"{sibling}.py").read_text()
        for option in re.findall(r"(?<!\S)\[?(--[a-z-]+)", run[3]):
            if f'"{option}"' not in code_text and option != "--config-name":
                yield f"{option}: not an option of {source.relative_to(ROOT)}"


def environment(page: Path, text: str) -> Iterator[str]:
    for name in set(re.findall(r"\bNEMO_TROPD_[A-Z_]*[A-Z]", text)):
        read = subprocess.run(
            ["grep", "-rqsw", "--include=*.py", "--include=*.sh", "--include=*.sbatch", name, "nemo_tropd", "docker"],
            cwd=ROOT,
            check=False,
        )
        if read.returncode:
            yield f"{name}: read by nothing in nemo_tropd/ and docker/"


CHECKS: tuple[Callable[[Path, str], Iterator[str]], ...] = (
    make_targets,
    config_keys,
    config_names,
    files,
    links,
    modules,
    options,
    environment,
)


@pytest.mark.parametrize("page", pages(), ids=lambda p: p.relative_to(ROOT).as_posix())
def test_whatever_a_page_names_exists(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    wrong = [complaint for check in CHECKS for complaint in check(page, text)]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("run `make dmeo` now", "make dmeo"),
        ("`model.optim.lrate=1`", "model.optim.lrate"),
        ("`model.tutors.*`", "model.tutors.*"),
        ("    torchrun x.py --config-name base check_onyl=true", "check_onyl"),
        ("--config-name smollm2_gpu", "--config-name smollm2_gpu"),
        ("    python examples/evaluate.py --config-name aime24 model=a sample=3", "sample"),
        ("see `nemo_tropd/no_such/file.py`", "nemo_tropd/no_such/file.py"),
        ("    python examples/no_such.py", "examples/no_such.py"),
        ("`no_such_recipe.yaml`", "no_such_recipe.yaml"),
        ("[a](../docker/nothing.md)", "../docker/nothing.md"),
        ("[a](README.md#no-such-part)", "README.md#no-such-part"),
        ("`python -m nemo_tropd.physician`", "nemo_tropd.physician"),
        ("`nemo_tropd.parallel.vocab.no_such_name`", "nemo_tropd.parallel.vocab.no_such_name"),
        ("    python -m nemo_tropd.doctor --rool gpu", "--rool"),
        ("`NEMO_TROPD_NOTHING`", "NEMO_TROPD_NOTHING"),
    ],
)
def test_a_stale_name_is_found(text: str, complaint: str) -> None:
    page = ROOT / "conf" / "README.md"
    assert [c for check in CHECKS for c in check(page, text) if c.startswith(complaint)]


def sources() -> Iterator[Path]:
    for pattern in ("*.py", "*.yaml", "*.sh", "*.sbatch", "Dockerfile*", "*.in", "Makefile", "pyproject.toml"):
        for path in ROOT.glob(f"[!.]*/**/{pattern}"):
            if path.relative_to(ROOT).parts[0] in TOP and path != Path(__file__).resolve():
                yield path
    yield from (ROOT / "Makefile", ROOT / "pyproject.toml")


def stale(text: str) -> Iterator[str]:
    """Files of ours, modules of ours and make targets that a comment, docstring or message names and that are gone."""
    for path in re.findall(rf"(?<![\w/.$}}-])((?:{'|'.join(TOP)})/[\w./-]*\.(?:py|yaml|md|sh|sbatch|in|txt))\b", text):
        if not re.search("[A-Z]{3}", path.replace("README", "")) and not (ROOT / path).exists():
            yield f"{path}: no such file"
    for target in re.findall(r"`make ([a-z][a-z-]+)", text):
        if target not in TARGETS:
            yield f"make {target}: not a target of the Makefile"
    yield from missing_modules(text)


def test_sources_name_only_what_exists() -> None:
    every = set(sources())
    assert len(every) > 150
    wrong = [f"{p.relative_to(ROOT)}: {complaint}" for p in sorted(every) for complaint in stale(p.read_text())]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("text", ["see nemo_tropd/study/bench.py", "``make dmeo``", "nemo_tropd.study.bench has it"])
def test_a_stale_name_in_a_source_is_found(text: str) -> None:
    assert list(stale(text))


def test_every_recipe_and_objective_is_documented() -> None:
    from nemo_tropd.objectives import OBJECTIVES

    text = (ROOT / "conf" / "README.md").read_text(encoding="utf-8")
    named = [f"`{path.name}`" for path in (ROOT / "conf").glob("*.yaml")] + [f"`{name}`" for name in OBJECTIVES]
    assert not [name for name in named if name not in text]
