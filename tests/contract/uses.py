"""What our own source uses of other packages, gathered from its syntax trees, so that a new use is checked unasked."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "nemo_tropd"
# A path of ours is relative to the package, or to the repository if it starts with "examples/".
SOURCES = {"": PACKAGE, "examples/": ROOT / "examples"}
LIBRARIES = ("megatron", "vllm", "transformer_engine")
# Replaces what megatron-core hard-codes for CUDA where there is none, so nothing of it runs on a GPU.
CPU_ONLY = ("parallel/cpu.py",)


@dataclass(frozen=True)
class Use:
    """One use of ``module.name`` (name empty: the module itself), or of its ``member``; keywords only where called."""

    where: str
    module: str
    name: str
    member: str = ""
    keywords: tuple[str, ...] = ()
    positional: int = 0
    called: bool = False
    overrides: tuple[str, ...] | None = None  # our method's parameters, where a class of ours overrides ``member``

    def __str__(self) -> str:
        return f"{self.where}: {'.'.join(x for x in (self.module, self.name, self.member) if x)}"


def gather(sources: Mapping[str, Path] = SOURCES, skip: tuple[str, ...] = CPU_ONLY) -> list[Use]:
    """Every import of the libraries, every attribute of an imported module or class, every call and override of one."""
    uses: list[Use] = []
    for prefix, folder in sources.items():
        for file in sorted(folder.rglob("*.py")):
            path = prefix + file.relative_to(folder).as_posix()
            if path not in skip:
                uses += uses_of(ast.parse(file.read_text(encoding="utf-8")), path)
    return uses


def parsed(path: str) -> ast.Module:
    """The syntax tree of a file of ours."""
    file = ROOT / path if path.startswith("examples/") else PACKAGE / path
    return ast.parse(file.read_text(encoding="utf-8"))


def uses_of(tree: ast.Module, path: str) -> Iterator[Use]:
    """The uses of one file."""
    names = _bindings(tree)
    for node in ast.walk(tree):
        where = f"{path}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.Import | ast.ImportFrom):
            for module, name in _imported(node).values():
                yield Use(where, module, name)
        elif isinstance(node, ast.Attribute) and (target := _target(node, names)):
            yield Use(where, *target)
        elif isinstance(node, ast.Call):
            function, arguments = node.func, node.args
            partial = isinstance(function, ast.Name) and function.id == "partial" and bool(arguments)
            if partial:
                function, arguments = arguments[0], arguments[1:]
            if target := _target(function, names):
                keywords = tuple(k.arg for k in node.keywords if k.arg is not None)
                count = sum(not isinstance(a, ast.Starred) for a in arguments)
                yield Use(where, *target, keywords=keywords, positional=count, called=True)
        elif isinstance(node, ast.ClassDef):
            for base in node.bases:
                if target := _target(base, names):
                    for method in node.body:
                        if isinstance(method, ast.FunctionDef):
                            taken = tuple(a.arg for a in (*method.args.args[1:], *method.args.kwonlyargs))
                            taken += ("*",) if method.args.kwarg else ()
                            yield Use(f"{path}:{method.lineno}", target[0], target[1], method.name, overrides=taken)


def string_keys(path: str, name: str) -> set[str]:
    """Identifiers used as keys of a dictionary in a function, or in the value of a variable, of a file of ours."""
    for node in ast.walk(parsed(path)):
        mine = isinstance(node, ast.FunctionDef) and node.name == name
        targets = (
            node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        )
        mine = mine or any(isinstance(t, ast.Name) and t.id == name for t in targets)
        if mine:
            keys = [k for d in ast.walk(node) if isinstance(d, ast.Dict) for k in d.keys]
            keys += [s.slice for s in ast.walk(node) if isinstance(s, ast.Subscript) and isinstance(s.ctx, ast.Store)]
            found = {k.value for k in keys if isinstance(k, ast.Constant) and isinstance(k.value, str)}
            return {key for key in found if key.isidentifier()}
    raise LookupError(f"{path} has no {name}")


def method_calls(path: str, receivers: tuple[str, ...]) -> Iterator[tuple[str, str, tuple[str, ...]]]:
    """(place, method, keywords) of calls on a variable, an attribute or a call's result that bears one of the names."""
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            owner = node.func.value.func if isinstance(node.func.value, ast.Call) else node.func.value
            if getattr(owner, "id", getattr(owner, "attr", "")) in receivers:
                yield f"{path}:{node.lineno}", node.func.attr, tuple(k.arg for k in node.keywords if k.arg)


def _imported(node: ast.Import | ast.ImportFrom) -> dict[str, tuple[str, str]]:
    """Name in our file -> (module, name there or empty)."""
    if isinstance(node, ast.Import):
        return {
            alias.asname or alias.name: (alias.name, "")
            for alias in node.names
            if alias.name.split(".")[0] in LIBRARIES
        }
    if node.level or (node.module or "").split(".")[0] not in LIBRARIES:
        return {}
    return {alias.asname or alias.name: (node.module or "", alias.name) for alias in node.names}


def _bindings(tree: ast.Module) -> dict[str, tuple[str, str]]:
    found: dict[str, tuple[str, str]] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            found.update(_imported(node))
    return found


def _target(node: ast.expr, names: dict[str, tuple[str, str]]) -> tuple[str, str, str] | None:
    """(module, name, member) of ``name`` or ``name.member``."""
    if isinstance(node, ast.Name) and node.id in names:
        return (*names[node.id], "")
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in names:
        module, name = names[node.value.id]
        return (module, name, node.attr) if name else (module, node.attr, "")
    return None
