"""Python sources read as syntax trees: where a name is defined, and what it may be called with. Imports nothing."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Definition:
    """A class, function, variable or module of a library, and the module it stands in."""

    module: str
    name: str
    node: ast.AST | None  # None: a module, or a name whose source is outside the library


@dataclass(frozen=True)
class Signature:
    """What a callable takes by keyword, and how many positional arguments."""

    keywords: frozenset[str]
    positional: int
    any_keyword: bool
    any_positional: bool


class Library:
    """The sources of several packages, side by side."""

    def __init__(self, *roots: Path) -> None:
        self.roots = roots
        self.tree = cache(self._tree)
        self.resolve = cache(self._resolve)

    def file(self, module: str) -> Path | None:
        """The file of a module, if it is there."""
        for root in self.roots:
            base = root.joinpath(*module.split("."))
            for path in (base / "__init__.py", base.with_suffix(".py")):
                if path.is_file():
                    return path
        return None

    def is_package(self, module: str) -> bool:
        """Whether a module, or a namespace of modules, stands under this name."""
        return self.file(module) is not None or any(root.joinpath(*module.split(".")).is_dir() for root in self.roots)

    def _tree(self, module: str) -> ast.Module | None:
        path = self.file(module)
        return None if path is None else ast.parse(path.read_text(encoding="utf-8"))

    def _resolve(self, module: str, name: str) -> Definition | None:
        """Where ``module.name`` is defined, through re-exports; None where the module has no such name."""
        tree = self.tree(module)
        stars: list[str] = []
        for statement in statements(tree.body) if tree else ():
            if isinstance(statement, ast.ClassDef | Function) and statement.name == name:
                return Definition(module, name, statement)
            if name in assigned(statement):
                return Definition(module, name, statement)
            if isinstance(statement, ast.Import):
                for alias in statement.names:
                    if (alias.asname or alias.name.split(".")[0]) == name:
                        return Definition(alias.name, name, None)
            if isinstance(statement, ast.ImportFrom):
                source = self._absolute(module, statement)
                for alias in statement.names:
                    if alias.name == "*":
                        stars.append(source)
                    elif (alias.asname or alias.name) == name:
                        if (source, alias.name) == (module, name):  # from . import a_submodule
                            continue
                        return self.resolve(source, alias.name) or Definition(source, alias.name, None)
        lazy = self._lazy(module, name)
        if lazy is not None:
            return self.resolve(*lazy)
        for source in stars:
            if source.split(".")[0] == module.split(".")[0] and (found := self.resolve(source, name)):
                return found
        return Definition(f"{module}.{name}", name, None) if self.is_package(f"{module}.{name}") else None

    def _lazy(self, module: str, name: str) -> tuple[str, str] | None:
        """vLLM's table of names that a module's __getattr__ imports: {"LLM": ".entrypoints.llm:LLM"}."""
        found = next((s for s in statements(self._body(module)) if "MODULE_ATTRS" in assigned(s)), None)
        value = getattr(found, "value", None)
        if not isinstance(value, ast.Dict):
            return None
        table = {
            getattr(k, "value", None): getattr(v, "value", "") for k, v in zip(value.keys, value.values, strict=True)
        }
        if name not in table:
            return None
        source, _, attribute = table[name].partition(":")
        return module + source, attribute

    def _body(self, module: str) -> list[ast.stmt]:
        tree = self.tree(module)
        return tree.body if tree else []

    def _absolute(self, module: str, statement: ast.ImportFrom) -> str:
        if not statement.level:
            return statement.module or ""
        parts = module.split(".")
        path = self.file(module)
        if path is not None and path.name != "__init__.py":
            parts = parts[:-1]
        parts = parts[: len(parts) - (statement.level - 1)]
        return ".".join([*parts, statement.module] if statement.module else parts)

    # ------------------------------------------------------------------------------------------------ classes

    def family(self, definition: Definition) -> Iterator[tuple[str, ast.ClassDef]]:
        """(module, class) of a class and of those of its bases whose sources are here."""
        if isinstance(definition.node, ast.ClassDef):
            yield definition.module, definition.node
            for base in definition.node.bases:
                found = self._base(definition.module, base)
                if found is not None and found.node is not definition.node:
                    yield from self.family(found)

    def _base(self, module: str, base: ast.expr) -> Definition | None:
        if isinstance(base, ast.Subscript):
            base = base.value
        if isinstance(base, ast.Name):
            return self.resolve(module, base.id)
        if isinstance(base, ast.Attribute):
            owner = self._base(module, base.value)
            return self.resolve(owner.module, base.attr) if owner is not None and owner.node is None else None
        return None

    def member(self, definition: Definition, name: str) -> Definition | None:
        """A method, class attribute, or attribute that a method assigns to self."""
        for module, node in self.family(definition):
            for statement in statements(node.body):
                if isinstance(statement, ast.ClassDef | Function) and statement.name == name:
                    return Definition(module, name, statement)
                if name in assigned(statement):
                    return Definition(module, name, statement)
        for module, node in self.family(definition):
            for inner in ast.walk(node):
                if isinstance(inner, ast.Attribute) and isinstance(inner.ctx, ast.Store) and inner.attr == name:
                    return Definition(module, name, inner)
        return None

    def fields(self, definition: Definition) -> frozenset[str]:
        """Annotated fields of a dataclass-like class and of its bases."""
        return frozenset(
            statement.target.id
            for _, node in self.family(definition)
            for statement in node.body
            if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name)
        )

    # ------------------------------------------------------------------------------------------------ calls

    def signature(self, definition: Definition) -> Signature | None:
        """What a function or a class may be called with; None where its source does not say."""
        if isinstance(definition.node, Function):
            return self._of_function(definition, definition.node)
        for _, node in self.family(definition):
            init = next((s for s in node.body if isinstance(s, Function) and s.name == "__init__"), None)
            if init is not None:
                return _signature(init, bound=True)
            marks = " ".join(ast.unparse(d) for d in node.decorator_list) + " ".join(map(ast.unparse, node.bases))
            if any(mark in marks for mark in ("dataclass", "config", "NamedTuple", "TypedDict", "Struct")):
                fields = self.fields(definition)
                return Signature(fields, len(fields), False, False)
        return None

    def _of_function(self, definition: Definition, node: Function) -> Signature:
        found = _signature(node, bound=False)
        if found.keywords or not (found.any_keyword and found.any_positional):
            return found
        for call in ast.walk(node):  # one that only hands on what it is given
            if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and _hands_on(call):
                target = self.resolve(definition.module, call.func.id)
                if target is not None and (inner := self.signature(target)) is not None:
                    return inner
        return found


def _hands_on(call: ast.Call) -> bool:
    return any(isinstance(a, ast.Starred) for a in call.args) and any(k.arg is None for k in call.keywords)


def _signature(node: Function, *, bound: bool) -> Signature:
    a = node.args
    positional = [*a.posonlyargs, *a.args]
    if bound or (positional and positional[0].arg in ("self", "cls")):
        positional = positional[1:]
    names = frozenset(x.arg for x in (*positional, *a.kwonlyargs) if x not in a.posonlyargs)
    return Signature(names, len(positional), a.kwarg is not None, a.vararg is not None)


def statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """The statements of a body, those under if, try and with among them."""
    for statement in body:
        yield statement
        for part in ("body", "orelse", "finalbody"):
            if isinstance(statement, ast.If | ast.Try | ast.With):
                yield from statements(getattr(statement, part, []))
        for handler in getattr(statement, "handlers", []):
            yield from statements(handler.body)


def assigned(statement: ast.stmt) -> set[str]:
    """Names an assignment gives a value."""
    targets: list[ast.expr] = []
    if isinstance(statement, ast.Assign):
        targets = statement.targets
    elif isinstance(statement, ast.AnnAssign | ast.AugAssign):
        targets = [statement.target]
    return {n.id for t in targets for n in ast.walk(t) if isinstance(n, ast.Name)}
