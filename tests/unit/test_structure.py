"""Who may import whom, and which library is imported where."""

from __future__ import annotations

import ast
import functools
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[2] / "nemo_tropd"

# room -> rooms of ours it may import
ALLOWED = {
    "fields": set(),
    "config_data": {"fields"},
    "config_teacher": {"fields"},
    "config": {"config_data", "config_teacher", "fields"},
    "config_keys": {"config", "fields"},
    "config_checks": {"config", "config_keys", "config_teacher", "fields"},
    "command_line": {"config", "config_keys", "fields", "parallel"},  # signals, which imports nothing
    "planner": {"config", "config_keys", "convert", "parallel", "rollout"},
    "launch": {"command_line", "config", "config_checks", "imports", "parallel", "rollout"},
    "doctor": {"parallel"},  # addresses, which imports no framework
    "batch": set(),
    "files": set(),
    "imports": set(),
    "pinned": set(),
    "quiet": set(),
    "timeline": set(),
    "data": {"config", "config_data", "config_teacher"},
    "parallel": {"batch"},
    "objectives": {"batch", "fields"},
    "loss": {"batch", "parallel"},
    "convert": {"files", "parallel"},
    "rollout": {"batch", "config", "convert", "files", "imports", "parallel", "pinned", "timeline"},
    "report": {"files", "timeline"},
    "evaluation": {
        *("batch", "command_line", "config", "config_data", "convert", "data", "fields", "files", "parallel"),
        *("report", "rollout"),
    },
    "gpt": {"batch", "config", "parallel", "convert"},
    "teacher": {"batch", "config", "config_teacher", "parallel", "objectives", "loss", "convert", "gpt", "pinned"},
    "model": {
        *("batch", "config", "config_teacher", "parallel", "objectives", "loss", "convert", "gpt", "teacher"),
        *("rollout", "served"),
    },
    "served": {"batch", "config", "config_teacher", "files", "loss", "parallel", "rollout", "teacher"},
}
# library -> where alone it may be imported
ONE_PLACE = {
    "vllm": {"rollout"},
    "transformer_engine": {"gpt/specs.py", "teacher/fp8.py"},
    # vLLM's start sets hooks, which in_process.py takes back
    "triton": {"loss/kernels.py", "loss/kernels_exact.py", "loss/kernels_top_k.py", "rollout/vllm/in_process.py"},
    "transformers": {"data/tokenizer.py"},  # which makes sure of the ids
    "nemo": {"model/tropd_model.py", "training/run.py", "quiet.py"},
}
# what NeMo-RL, Megatron-Bridge or any trainer can use with torch alone
TORCH_ALONE = ("objectives", "loss", "parallel/vocab.py", "batch.py", "fields.py")


# limits: lines of a file, lines and parameters of a function
FILE_LINES, FUNCTION_LINES, PARAMETERS = 400, 60, 8


@functools.cache
def imports() -> dict[Path, set[str]]:
    """Every module each file imports, lazily or not, type checking aside."""
    found: dict[Path, set[str]] = defaultdict(set)
    for file in sorted(PACKAGE.rglob("*.py")):
        tree = ast.parse(file.read_text())
        skipped = {
            id(child)
            for node in ast.walk(tree)
            if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
            for child in ast.walk(node)
        }
        for node in ast.walk(tree):
            if id(node) in skipped:
                continue
            if isinstance(node, ast.Import):
                found[file].update(alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                found[file].update(_modules(file, node))
    return found


def _modules(file: Path, node: ast.ImportFrom) -> set[str]:
    """What ``from X import names`` in ``file`` imports: the names if they are modules of ours, else X."""
    base = node.module or ""
    if node.level:
        folder = file.parents[node.level - 1].relative_to(PACKAGE.parent)
        base = ".".join([*folder.parts, *([node.module] if node.module else [])])
    modules = {f"{base}.{alias.name}" for alias in node.names if _file_of(f"{base}.{alias.name}") is not None}
    return modules if len(modules) == len(node.names) else modules | {base}


def _file_of(module: str) -> Path | None:
    """The file of one of our modules."""
    path = PACKAGE.parent.joinpath(*module.split("."))
    candidates = (path.with_suffix(".py"), path / "__init__.py")
    return next((f for f in candidates if module.split(".")[0] == PACKAGE.name and f.is_file()), None)


def circle(arrows: Mapping[str, set[str]]) -> list[str]:
    """The first circle that following ``arrows`` finds, or nothing."""
    done: set[str] = set()

    def follow(name: str, path: list[str]) -> list[str]:
        if name in path:
            return [*path[path.index(name) :], name]
        if name not in done:
            for other in sorted(arrows.get(name, ())):
                if found := follow(other, [*path, name]):
                    return found
            done.add(name)
        return []

    return next((found for name in sorted(arrows) if (found := follow(name, []))), [])


def room(file: Path) -> str:
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def test_rooms_import_only_what_they_may() -> None:
    wrong = []
    for file, modules in imports().items():
        for module in modules:
            parts = module.split(".")
            if parts[0] != "nemo_tropd" or len(parts) < 2:
                continue
            ours, theirs = room(file), parts[1]
            if ours != theirs and ours in ALLOWED and theirs not in ALLOWED[ours]:
                wrong.append(f"{file.relative_to(PACKAGE)} imports {module}")
    assert not wrong, "\n".join(wrong)


def test_the_package_imports_neither_examples_nor_tests() -> None:
    wrong = [
        f"{file.relative_to(PACKAGE)} imports {module}"
        for file, modules in imports().items()
        for module in modules
        if module.split(".")[0] in ("examples", "benchmarks", "tests")
    ]
    assert not wrong, "\n".join(wrong)


def test_nobody_imports_training_but_examples() -> None:
    wrong = [
        str(file.relative_to(PACKAGE))
        for file, modules in imports().items()
        if room(file) != "training" and any(m.startswith("nemo_tropd.training") for m in modules)
    ]
    assert not wrong, wrong


def test_heavy_libraries_are_imported_in_one_place() -> None:
    wrong = []
    for file, modules in imports().items():
        path = file.relative_to(PACKAGE).as_posix()
        for library, places in ONE_PLACE.items():
            used = any(m == library or m.startswith(library + ".") for m in modules)
            if used and not any(path == place or path.startswith(place + "/") for place in places):
                wrong.append(f"{path} imports {library}")
    assert not wrong, "\n".join(wrong)


def test_the_loss_needs_torch_alone() -> None:
    allowed = {"torch", "numpy", "nemo_tropd", "__future__"}
    standard = set(__import__("sys").stdlib_module_names)
    wrong = []
    for file, modules in imports().items():
        path = file.relative_to(PACKAGE).as_posix()
        if any(path == place or path.startswith(place + "/") for place in TORCH_ALONE):
            # Where there is a GPU, torch brings Triton along.
            own = allowed | ({"triton"} if path in ONE_PLACE["triton"] else set())
            wrong += [f"{path} imports {m}" for m in modules if m.split(".")[0] not in own | standard]
    assert not wrong, "\n".join(wrong)


def test_no_circles_between_files_or_rooms() -> None:
    files: dict[str, set[str]] = defaultdict(set)
    rooms: dict[str, set[str]] = defaultdict(set)
    for file, modules in imports().items():
        for other in filter(None, map(_file_of, modules)):
            files[str(file.relative_to(PACKAGE))].add(str(other.relative_to(PACKAGE)))
            if room(file) != room(other):
                rooms[room(file)].add(room(other))
    assert not circle(files), " -> ".join(circle(files))
    assert not circle(rooms), " -> ".join(circle(rooms))


def test_circles_are_found() -> None:
    assert circle({"a": {"b"}, "b": {"c", "d"}, "c": {"d"}}) == []
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"d", "b"}}) == ["b", "c", "b"]
    assert circle({"a": {"a"}}) == ["a", "a"]


def test_functions_are_short_and_take_few_parameters() -> None:
    """Triton's kernels, which take pointers and sizes one by one, are excepted."""
    wrong = []
    for file in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            if any("jit" in ast.dump(decorator) for decorator in node.decorator_list):
                continue
            a, lines = node.args, (node.end_lineno or node.lineno) - node.lineno + 1
            named = [arg.arg for arg in (*a.posonlyargs, *a.args, *a.kwonlyargs, a.vararg, a.kwarg) if arg is not None]
            count = len(named) - (named[:1] in (["self"], ["cls"]))
            if lines > FUNCTION_LINES or count > PARAMETERS:
                wrong.append(f"{file.relative_to(PACKAGE)}: {node.name} has {count} parameters and {lines} lines")
    assert not wrong, "\n".join(wrong)


def test_files_are_small() -> None:
    lines = {file: len(file.read_text().splitlines()) for file in PACKAGE.rglob("*.py")}
    long = [f"{file.relative_to(PACKAGE)}: {count}" for file, count in lines.items() if count > FILE_LINES]
    assert not long, "\n".join(long)
