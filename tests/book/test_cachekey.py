"""What a page's outputs depend on: enough that none is ever old, and no more, so that little runs again."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import cachekey
import execute
import pytest
from cachekey import Inputs

ROOT = Path(__file__).resolve().parents[2]

HOUSE = {
    "__init__.py": "",
    "layers/__init__.py": "",
    "layers/norms.py": "class Norm: ...\n",
    "layers/positions.py": "import math\n",
    "models/__init__.py": "",
    "models/bert.py": "from ..layers.norms import Norm\n",
    "models/late.py": "def build():\n    from house.layers import norms\n    return norms\n",
    "models/dynamic.py": (
        "from importlib import import_module\n"
        "def page(name):\n"
        '    import_module("house.layers.positions")\n'
        '    import_module(".bert", __package__)\n'
        '    return import_module(f"house.rooms.{name}")\n'
    ),
    "rooms/__init__.py": "",
    "rooms/kitchen.py": "from house.layers.norms import Norm\n",
    "deploy/__init__.py": "",
    "deploy/onnx.py": "from ..models import bert\n",
}


@pytest.fixture
def inputs(tmp_path: Path) -> Inputs:
    for name, text in HOUSE.items():
        _write(tmp_path / "house" / name, text)
    _write(tmp_path / "experiments" / "masking.json", "{}")
    _write(tmp_path / "house" / "checkpoints" / "tiny-bert" / "model.safetensors", "weights")
    _write(tmp_path / "constraints.txt", "torch==2.14.1\n")
    return Inputs(
        package=tmp_path / "house",
        experiments=tmp_path / "experiments",
        checkpoints=tmp_path / "house" / "checkpoints",
        constraints=tmp_path / "constraints.txt",
        sources={"minilm": "abc", "shakespeare": "def"},
    )


@pytest.fixture
def parts(tmp_path: Path, inputs: Inputs) -> Callable[..., dict[str, str]]:
    def of(*cells: str, text: str = "", given: Inputs = inputs) -> dict[str, str]:
        return cachekey.parts(tmp_path / "page.md", text, cells, "hash of cells", given)

    return of


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, "utf-8")


@pytest.mark.parametrize(
    ("cell", "code"),
    [
        ("import house", {"__init__"}),
        ("import house.layers.norms as n", {"__init__", "layers/__init__", "layers/norms"}),
        ("from house.layers import norms", {"__init__", "layers/__init__", "layers/norms"}),
        ("from house.layers.norms import Norm", {"__init__", "layers/__init__", "layers/norms"}),
        ("from house.layers import NORMS", {"__init__", "layers/__init__"}),
        (
            "def f():\n    from house.models.bert import Bert",
            {"__init__", "models/__init__", "models/bert", "layers/__init__", "layers/norms"},
        ),
        (
            "from house.models import late",
            {"__init__", "models/__init__", "models/late", "layers/__init__", "layers/norms"},
        ),
        (
            "import house.models.dynamic",
            {"__init__", "models/__init__", "models/dynamic", "models/bert", "layers/__init__"}
            | {"layers/norms", "layers/positions", "rooms/__init__", "rooms/kitchen"},
        ),
        ("%matplotlib inline\n!ls\nimport house", {"__init__"}),
        ("%%time\nimport house", {"__init__"}),
        ("import houses, numpy", set()),
        ("this is not Python", set()),
    ],
)
def test_imports_are_followed(parts: Callable[..., dict[str, str]], cell: str, code: set[str]) -> None:
    found = {name for name in parts(cell) if name.startswith("code:")}
    assert found == {f"code:{name}.py" for name in code}


@pytest.mark.parametrize(
    ("touched", "rerun"),
    [
        ("layers/norms.py", {"direct", "through", "late", "dynamic"}),
        ("layers/positions.py", {"dynamic"}),
        ("rooms/kitchen.py", {"dynamic"}),
        ("models/bert.py", {"through", "dynamic"}),
        ("models/__init__.py", {"through", "late", "dynamic"}),
        ("deploy/onnx.py", set()),
        ("deploy/__init__.py", set()),
        ("__init__.py", {"direct", "through", "late", "dynamic"}),
    ],
)
def test_touching_a_module_reruns_its_users_alone(
    parts: Callable[..., dict[str, str]], inputs: Inputs, touched: str, rerun: set[str]
) -> None:
    cells = {
        "direct": "from house.layers.norms import Norm",
        "through": "import house.models.bert",
        "late": "import house.models.late",
        "dynamic": "import house.models.dynamic",
        "none": "print(1)",
    }
    before = {page: cachekey.key(parts(cell)) for page, cell in cells.items()}
    with (inputs.package / touched).open("a") as file:
        file.write("# touched\n")
    after = {page: cachekey.key(parts(cell)) for page, cell in cells.items()}
    assert {page for page in cells if before[page] != after[page]} == rerun


def test_a_new_import_in_a_module_is_followed_at_once(
    parts: Callable[..., dict[str, str]], inputs: Inputs
) -> None:
    assert "code:layers/positions.py" not in parts("import house.layers.norms")
    _write(inputs.package / "layers" / "norms.py", "from . import positions\n")
    assert "code:layers/positions.py" in parts("import house.layers.norms")


def test_data_experiments_and_checkpoints_count_where_they_are_named(
    parts: Callable[..., dict[str, str]], tmp_path: Path, inputs: Inputs
) -> None:
    _write(tmp_path / "table.csv", "1,2")
    text = "```{recorded} masking\n:weights: tiny-bert\n```\n"
    cell = "fetch('minilm')\nopen('table.csv')"
    found = parts(cell, text=text)
    named = {name for name in found if name.split(":")[0] in ("data", "experiment", "checkpoint", "file")}
    assert named == {
        "data:minilm", "experiment:masking", "checkpoint:tiny-bert/model.safetensors", "file:table.csv",
    }  # fmt: skip
    assert not {name for name in parts("x = minilm  # 'minilm'") if name.startswith("data:")}

    def changed(**new: object) -> list[str]:
        return cachekey.changes(found, parts(cell, text=text, given=replace(inputs, **new)))

    assert changed() == []
    assert changed(sources={"minilm": "other", "shakespeare": "def"}) == ["data:minilm"]
    assert changed(sources={"minilm": "abc", "shakespeare": "other"}) == []
    for path, part in {
        tmp_path / "experiments" / "masking.json": "experiment:masking",
        inputs.checkpoints / "tiny-bert" / "model.safetensors": "checkpoint:tiny-bert/model.safetensors",
        tmp_path / "table.csv": "file:table.csv",
        inputs.constraints: "constraints",
    }.items():
        before = path.read_text()
        path.write_text(before + " ")
        assert changed() == [part]
        path.unlink()
        assert part in changed()
        _write(path, before)
    assert changed() == []


def test_prose_is_no_part_of_the_key(parts: Callable[..., dict[str, str]]) -> None:
    assert parts("1 + 1", text="Some words.") == parts("1 + 1", text="Other words about minilm.")


def test_the_pages_of_this_book(tmp_path: Path) -> None:
    """The commands and `deploy` rerun the pages that use them, and no other; the norms rerun both."""
    here = execute.Book(ROOT, tmp_path / "build")
    package = tmp_path / here.inputs.package.name
    shutil.copytree(here.inputs.package, package, ignore=shutil.ignore_patterns("__pycache__"))

    def keys() -> dict[str, str]:
        book = execute.Book(ROOT, tmp_path / "build", replace(here.inputs, package=package))
        return {page.name.rpartition("/")[2]: page.key for page in book.pages}

    def reruns(*names: str) -> set[str]:
        before = keys()
        for name in names:
            (package / name).parent.mkdir(exist_ok=True)
            with (package / name).open("a") as file:
                file.write("\n# touched\n")
        after = keys()
        return {page for page in after if before[page] != after[page]}

    assert {"attention", "encoder-only"} <= keys().keys()
    assert reruns("cli.py", "exercises/attention.py") == {"pixels-to-person"}  # which runs the commands
    embedded = {"export-int8", "microcontroller", "pixels-to-person"}
    assert reruns("deploy/tflite.py") == embedded
    assert reruns("deploy/c_codegen/kernels/fast.c") == embedded  # no Python, but what the code compiles
    assert {"attention", "encoder-only"} <= reruns("layers/norms.py")
    assert "encoder-only" in reruns("training/objectives.py")
