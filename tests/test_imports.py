"""The floors of the package: imports go down only, heavy libraries stay out until they are used."""

from __future__ import annotations

import ast
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import textbook_code
from textbook_code.extras import require

PACKAGE = Path(textbook_code.__file__).parent

FLOORS = {  # room -> floor
    "layers": 1, "optim": 1, "hardware": 1, "data": 1, "weights": 1, "pretrained": 1,
    "extras": 1, "imports": 1, "checkpoints": 1,
    "models.text": 2, "models.vision": 2, "connect": 2,
    "models.multimodal": 3,
    "training": 4, "compression": 4, "inference": 4, "figures": 4, "recorded": 4,
    "deploy": 5, "exercises": 5, "cli": 5, "doctor": 5,
}  # fmt: skip
BELOW = {1: {1}, 2: {1}, 3: {1, 2}, 4: {1}, 5: {1, 2, 3, 4, 5}}  # what a floor may use beside its own room
CORE = {"torch", "numpy"} | sys.stdlib_module_names  # what the first floor may import at its top
DEPENDENCIES = CORE | {
    "safetensors",
    "huggingface_hub",
    "tokenizers",
    "rich",
    "typer",
    "filelock",
    "packaging",
}
AT_TOP = {  # dependencies of the package itself that a file of the first floor is about
    "weights": {"safetensors"}, "pretrained": {"safetensors", "huggingface_hub"}, "data": {"tokenizers"},
}  # fmt: skip


def modules() -> list[Path]:
    return sorted(path for path in PACKAGE.rglob("*.py") if "_experiments" not in path.parts)


def dotted(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")


def room(module: str) -> str:
    """The room a module of the package is in; empty for the package itself and for packages of rooms."""
    return next((name for name in FLOORS if f"{module}.".startswith(f"{name}.")), "")


def imports(tree: ast.AST, path: Path) -> Iterator[tuple[str, bool]]:
    """Every module imported in a file, with whether that happens when the file itself is imported."""

    def walk(node: ast.AST, top: bool) -> Iterator[tuple[str, bool]]:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            return
        if isinstance(node, ast.Import):
            yield from ((alias.name, top) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = ["textbook_code", *path.relative_to(PACKAGE).parent.parts]
                base = ".".join([*above[: len(above) - node.level + 1], *([base] if base else [])])
            yield from ((f"{base}.{alias.name}", top) for alias in node.names)
        inner = top and not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            yield from walk(child, inner)

    return walk(tree, True)


def test_every_module_has_a_floor() -> None:
    unplaced = [m for m in map(dotted, modules()) if m not in ("", "__init__", "models") and not room(m)]
    assert unplaced == []


@pytest.mark.parametrize("path", modules(), ids=dotted)
def test_imports_go_down_only(path: Path) -> None:
    here = room(dotted(path))
    floor = FLOORS.get(here, 1)
    wrong = []
    for name, top in imports(ast.parse(path.read_text("utf-8")), path):
        if name.split(".")[0] == "textbook_code":
            there = room(name.removeprefix("textbook_code").removeprefix("."))
            if there not in ("", here) and FLOORS[there] not in BELOW[floor]:
                wrong.append(name)
        elif top and floor == 1 and name.split(".")[0] not in CORE | AT_TOP.get(here, set()):
            wrong.append(name)
        elif top and name.split(".")[0] not in DEPENDENCIES:
            wrong.append(f"{name} (optional: import it where it is used)")
    assert wrong == [], f"{here} is on floor {floor}"


def test_the_rooms_of_the_second_floor_do_not_see_each_other() -> None:
    second = {name for name, floor in FLOORS.items() if floor == 2}
    for path in modules():
        if (here := room(dotted(path))) in second:
            for name, _ in imports(ast.parse(path.read_text("utf-8")), path):
                assert room(name.removeprefix("textbook_code.")) not in second - {here}, path


IMPORT = """
import sys, time
start = time.process_time()
import textbook_code
print(time.process_time() - start)
print(*sorted({name.partition(".")[0] for name in sys.modules}))
"""


def test_importing_the_package_costs_little_and_loads_nothing_heavy() -> None:
    seconds = []
    for _ in range(5):
        done = subprocess.run([sys.executable, "-c", IMPORT], capture_output=True, text=True, check=True)
        cost, loaded = done.stdout.splitlines()
        seconds.append(float(cost))
        heavy = {
            "torch",
            "numpy",
            "tokenizers",
            "safetensors",
            "huggingface_hub",
            "rich",
            "typer",
            "matplotlib",
        }
        assert not heavy & set(loaded.split())
    assert statistics.median(seconds) < 0.05


def test_a_missing_extra_is_named_in_one_line() -> None:
    with pytest.raises(ImportError) as error:
        require("no_such_library.part", extra="vision")
    assert 'pip install "textbook_code[vision]"' in str(error.value)
    assert "no_such_library" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_broken_dependency_is_not_called_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_library.py").write_text("import what_it_needs\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="what_it_needs"):
        require("broken_library", extra="vision")


def test_a_dependency_that_is_there_is_returned() -> None:
    assert require("json.decoder", extra="vision").JSONDecodeError is __import__("json").JSONDecodeError
