"""Which files of a package a piece of code needs, read from its imports without running it.

    needed_files(source, package=Path("textbook_code"))

follows `import a.b`, `from a.b import c`, relative imports and `import_module("a.b")`, at the top of a file
or inside a function, from file to file. A name computed behind a literal start, as in
`import_module(f"a.b.{name}")`, stands for every module below `a.b`; a name computed altogether is not seen.

Book: execution-table
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

_DYNAMIC = {"import_module", "__import__"}


def needed_files(source: str, *, package: Path) -> frozenset[Path]:
    """The files of `package` that running `source` may import, transitively.

    Args:
        source: Python code outside the package; relative imports in it are not followed.
        package: the package's folder, which bears its name.

    Raises:
        SyntaxError: the source, or a file of the package that it needs, is not Python.

    Book: execution-table
    """
    package = package.resolve()
    found: set[Path] = set()
    waiting = list(_imported(ast.parse(source), package, here=()))
    while waiting:
        path = waiting.pop()
        if path not in found:
            found.add(path)
            waiting.extend(_imported_by(path, path.stat().st_mtime_ns, package))
    return frozenset(found)


@cache
def _imported_by(path: Path, mtime: int, package: Path) -> tuple[Path, ...]:
    """What one file imports itself; `mtime` is part of the question, so that a changed file is read again."""
    here = path.relative_to(package.parent).parent.parts
    return tuple(set(_imported(ast.parse(path.read_text("utf-8"), str(path)), package, here)))


def _imported(tree: ast.AST, package: Path, here: tuple[str, ...]) -> Iterator[Path]:
    """Files named by the imports of a tree whose own package is `here`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield from _files(alias.name.split("."), package)
        elif isinstance(node, ast.ImportFrom):
            base = [*_above(here, node.level), *(node.module.split(".") if node.module else [])]
            for alias in node.names:  # a name is a submodule, or lives in the package's __init__
                yield from _files([*base, alias.name], package)
        elif isinstance(node, ast.Call) and node.args and _called(node.func) in _DYNAMIC:
            start, whole = _literal_start(node.args[0])
            dots = len(start) - len(start.lstrip("."))
            parts = [*_above(here, dots), *filter(None, start.split("."))]
            if whole:
                yield from _files(parts, package)
            elif start.endswith("."):
                yield from _files(parts, package)
                if parts[:1] == [package.name]:
                    yield from sorted(package.parent.joinpath(*parts).rglob("*.py"))


def _files(parts: list[str], package: Path) -> Iterator[Path]:
    """The module's file and the `__init__` of every package above it, as far as they exist."""
    if parts[:1] != [package.name]:
        return
    for depth in range(1, len(parts) + 1):
        stem = package.parent.joinpath(*parts[:depth])
        if (stem / "__init__.py").is_file():
            yield stem / "__init__.py"
        elif (module := stem.parent / f"{stem.name}.py").is_file():
            yield module
            return  # what follows is a name inside the module


def _above(here: tuple[str, ...], level: int) -> tuple[str, ...]:
    """The package that `level` leading dots stand for; none where the import is absolute."""
    return here[: len(here) - level + 1] if level else ()


def _called(function: ast.expr) -> str:
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")


def _literal_start(name: ast.expr) -> tuple[str, bool]:
    """The literal text a name starts with, and whether that is all of it."""
    if isinstance(name, ast.Constant) and isinstance(name.value, str):
        return name.value, True
    if isinstance(name, ast.JoinedStr) and name.values:
        return _literal_start(name.values[0])[0], False
    if isinstance(name, ast.BinOp) and isinstance(name.op, ast.Add):
        return _literal_start(name.left)[0], False
    return "", False
