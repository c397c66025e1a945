"""What the outputs of a page depend on: its cells, and all that the code in them reads.

The parts of a page's key are hashes under readable names, so that a page that has to run again can say why:

    cells                              its code cells with their tags
    code:layers/norms.py               each file of the package that the cells import, transitively
    beside:deploy/wasm.c               each other file beside those or below, such as a kernel in C
    data:minilm                        each source of data or weights that they name
    experiment:NAME                    each recorded experiment that they name
    checkpoint:NAME/file               each file of a checkpoint that they name
    file:table.csv                     each file beside the page that they name
    constraints, python                the libraries and the interpreter

*Names* means: a string in a cell is its name, or (but for files) an argument or option of a directive is.
"""

from __future__ import annotations

import ast
import hashlib
import json
import platform
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from textbook_code.imports import needed_files

FORMAT = "1"  # raise it when pages are executed in another way, so that all of them run again

_DIRECTIVE = re.compile(r"^\s*(?:`{3,}|:{3,})\{[\w:-]+\}[ \t]*(.*)$", re.MULTILINE)
_OPTION = re.compile(r"^\s*:[\w-]+:[ \t]+(.*)$", re.MULTILINE)


@dataclass(frozen=True)
class Inputs:
    """What pages may depend on.

    Attributes:
        package: the folder of the package.
        experiments, checkpoints: folders of the records (`NAME.json`) and of the checkpoints (`NAME/`).
        constraints: the file that pins the libraries.
        sources: a fingerprint for each source of data or weights.
    """

    package: Path
    experiments: Path
    checkpoints: Path
    constraints: Path
    sources: Mapping[str, str] = field(default_factory=dict)


def inputs_of(root: Path) -> Inputs:
    """The inputs of the book at `root`, with the package as it is installed."""
    import textbook_code
    from textbook_code.data.sources import SOURCES

    package = Path(textbook_code.__file__).parent
    return Inputs(
        package=package,
        experiments=root / "experiments",
        checkpoints=package / "checkpoints",
        constraints=root / "constraints.txt",
        sources={name: source.fingerprint for name, source in SOURCES.items()},
    )


def parts(path: Path, text: str, cells: Iterable[str], cells_hash: str, inputs: Inputs) -> dict[str, str]:
    """The parts of the key of one page.

    Args:
        path: the page's file.
        text: its whole text.
        cells: the source of each code cell.
        cells_hash: one hash of all cells with their tags.
    """
    code = [plain for cell in cells if (plain := plain_python(cell))]
    strings = set(_literals(code))
    named = strings | set(_words(text))
    found = {"cells": cells_hash, "constraints": _hash(inputs.constraints), "python": _python()}
    package = inputs.package.resolve()
    needed = needed_files("\n".join(code), package=package)
    found |= {f"code:{file.relative_to(package).as_posix()}": _hash(file) for file in needed}
    found |= {
        f"beside:{file.relative_to(package).as_posix()}": _hash(file)
        for file in _beside_code(needed, package)
    }
    found |= {f"data:{name}": inputs.sources[name] for name in named & inputs.sources.keys()}
    found |= {f"experiment:{p.stem}": _hash(p) for p in _files(inputs.experiments, "*.json", named)}
    for folder in (p for p in sorted(inputs.checkpoints.glob("*/")) if p.name in named):
        found |= {f"checkpoint:{folder.name}/{p.name}": _hash(p) for p in sorted(folder.iterdir())}
    for name in strings:
        if (file := _beside(path, name)) is not None:
            found[f"file:{name}"] = _hash(file)
    return dict(sorted(found.items()))


def key(page_parts: Mapping[str, str]) -> str:
    """One hash of all parts."""
    return hashlib.sha256(json.dumps([FORMAT, page_parts], sort_keys=True).encode()).hexdigest()


def changes(old: Mapping[str, str], new: Mapping[str, str]) -> list[str]:
    """The names of the parts that differ."""
    return sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name))


def plain_python(cell: str) -> str:
    """A cell without IPython's own syntax; empty where what is left is not Python (it will fail to run)."""
    lines = ["" if line.startswith("%%") else line for line in cell.splitlines()]
    lines = [re.sub(r"^(\s*)[%!].*$", r"\1pass", line) for line in lines]
    plain = "\n".join(lines)
    try:
        ast.parse(plain)
    except SyntaxError:
        return ""
    return plain


def _literals(code: Iterable[str]) -> Iterator[str]:
    for cell in code:
        for node in ast.walk(ast.parse(cell)):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value


def _words(text: str) -> Iterator[str]:
    for found in (*_DIRECTIVE.findall(text), *_OPTION.findall(text)):
        yield from re.split(r"[\s,]+", found)


def _files(folder: Path, pattern: str, named: set[str]) -> list[Path]:
    """Files of a folder whose name, with or without its ending, is named."""
    return [p for p in sorted(folder.glob(pattern)) if p.is_file() and {p.name, p.stem} & named]


def _beside_code(needed: Iterable[Path], package: Path) -> set[Path]:
    """What is no Python in the folders of these files and below; but not in the package's own folder."""
    folders = {file.parent for file in needed} - {package, package / "checkpoints"}
    files = {file for folder in folders for file in folder.rglob("*") if file.is_file()}
    return {file for file in files if file.suffix not in (".py", ".pyc")}


def _beside(page: Path, name: str) -> Path | None:
    """The file below the page's folder that a string names, if it does."""
    if not name or len(name) > 200 or "\n" in name or "\0" in name:
        return None
    file = (page.parent / name).resolve()
    return file if file.is_file() and file.is_relative_to(page.parent.resolve()) and file != page else None


def _hash(path: Path) -> str:
    if not path.is_file():
        return "missing"
    return _hash_of(path, path.stat().st_mtime_ns, path.stat().st_size)


@cache
def _hash_of(path: Path, mtime: int, size: int) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _python() -> str:
    return f"{platform.python_implementation()} {platform.python_version()}"
