"""Write the intersphinx inventories of Python, NumPy and PyTorch by looking at what is installed.

The book is built without a network, so the lists of names that its code links to are committed:

    python book/_tools/inventories.py

writes ``book/_inv/{python,numpy,torch}.inv``. Only names that the projects document are listed, with the
address that their documentation gives to them.
"""

from __future__ import annotations

import importlib
import inspect
import platform
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

OUT = Path(__file__).resolve().parents[1] / "_inv"
Rows = dict[str, tuple[str, str]]  # name -> (role, address)

PYTHON_MODULES = (
    "abc", "argparse", "collections", "collections.abc", "contextlib", "copy", "csv", "dataclasses",
    "datetime", "enum", "functools", "hashlib", "heapq", "inspect", "io", "itertools", "json", "math",
    "operator", "os", "os.path", "pathlib", "random", "re", "shutil", "statistics", "string",
    "subprocess", "sys", "tempfile", "textwrap", "time", "timeit", "types", "typing", "unicodedata",
    "urllib.parse", "warnings", "zipfile",
)  # fmt: skip
STDTYPES = (
    "bool", "bytearray", "bytes", "complex", "dict", "float", "frozenset", "int", "list", "memoryview",
    "range", "set", "slice", "str", "tuple",
)  # fmt: skip
NUMPY_MODULES = ("numpy", "numpy.linalg", "numpy.fft", "numpy.testing")
TORCH_MODULES = (
    "torch", "torch.nn", "torch.nn.functional", "torch.nn.init", "torch.nn.utils", "torch.optim",
    "torch.optim.lr_scheduler", "torch.linalg", "torch.autograd", "torch.nn.attention",
)  # fmt: skip
TORCH_PAGES = {"torch.Tensor": "tensors.html"} | dict.fromkeys(
    ("torch.dtype", "torch.device", "torch.layout"), "tensor_attributes.html"
)


def _public(module_name: str) -> Iterator[tuple[str, object]]:
    module = importlib.import_module(module_name)
    for name in sorted(getattr(module, "__all__", None) or dir(module)):
        if not name.startswith("_"):
            yield name, getattr(module, name, None)


def _role(thing: object) -> str | None:
    if inspect.isclass(thing):
        return "exception" if issubclass(thing, BaseException) else "class"
    return "function" if callable(thing) else None


def _methods(owner: type, name: str, page: Callable[[str], str]) -> Iterator[tuple[str, tuple[str, str]]]:
    for method in dir(owner):
        if not method.startswith("_") and callable(inspect.getattr_static(owner, method, None)):
            full = f"{name}.{method}"
            yield full, ("method", page(full))


def python_rows() -> Rows:
    rows: Rows = {}
    for name, thing in _public("builtins"):
        role = _role(thing)
        if role == "exception":
            page = "exceptions"
        elif name in STDTYPES:
            page = "stdtypes"
        else:
            page = "functions"
        if role:
            rows[name] = (role, f"library/{page}.html#{name}")
    for name in ("str", "list", "dict", "set", "bytes", "int", "float"):
        rows.update(_methods(getattr(importlib.import_module("builtins"), name), name, lambda full: (
            f"library/stdtypes.html#{full}")))  # fmt: skip
    for name in ("None", "True", "False", "NotImplemented", "Ellipsis"):
        rows[name] = ("data", f"library/constants.html#{name}")
    for module in PYTHON_MODULES:
        rows[module] = ("module", f"library/{module}.html#module-{module}")
        for name, thing in _public(module):
            role, full = _role(thing), f"{module}.{name}"
            if role:
                rows[full] = (role, f"library/{module}.html#{full}")
                if module in ("pathlib", "collections") and role == "class":
                    rows.update(_methods(thing, full, lambda f, m=module: f"library/{m}.html#{f}"))  # type: ignore
    rows["typing.Any"] = ("data", "library/typing.html#typing.Any")
    return rows


def numpy_rows() -> Rows:
    def page(full: str) -> str:
        return f"reference/generated/{full}.html#{full}"

    rows: Rows = {"numpy": ("module", "reference/index.html#module-numpy")}
    for module in NUMPY_MODULES:
        for name, thing in _public(module):
            role, full = _role(thing), f"{module}.{name}"
            if role:
                rows[full] = (role, page(full))
    import numpy

    rows.update(_methods(numpy.ndarray, "numpy.ndarray", page))
    for name in ("default_rng", "Generator"):
        rows[f"numpy.random.{name}"] = (
            "class" if name == "Generator" else "function",
            f"reference/random/generator.html#numpy.random.{name}",
        )
    rows.update(
        _methods(
            numpy.random.Generator,
            "numpy.random.Generator",
            lambda full: f"reference/random/generated/{full}.html#{full}",
        )
    )
    return rows


def torch_rows() -> Rows:
    def page(full: str) -> str:
        return f"{TORCH_PAGES.get(full, f'generated/{full}.html')}#{full}"

    import torch

    rows: Rows = {
        "torch": ("module", "torch.html#module-torch"),
        "torch.nn": ("module", "nn.html#module-torch.nn"),
    }
    for module in TORCH_MODULES:
        for name, thing in _public(module):
            role, full = _role(thing), f"{module}.{name}"
            if role:
                rows[full] = (role, page(full))
    for name in dir(torch):
        if isinstance(getattr(torch, name), torch.dtype):
            rows[f"torch.{name}"] = ("attribute", "tensor_attributes.html#torch.dtype")
    rows["torch.dtype"] = ("class", page("torch.dtype"))
    rows["torch.optim.Optimizer"] = ("class", "optim.html#torch.optim.Optimizer")
    rows.update(_methods(torch.Tensor, "torch.Tensor", page))
    for name in ("Module", "Parameter"):
        place = (
            "generated/torch.nn.Module.html"
            if name == "Module"
            else "generated/torch.nn.parameter.Parameter.html"
        )
        rows.update(_methods(getattr(torch.nn, name), f"torch.nn.{name}", lambda f, p=place: f"{p}#{f}"))  # type: ignore
    return rows


def encode(project: str, version: str, rows: Rows) -> bytes:
    """An inventory in Sphinx's version 2: four lines of text, then one compressed line for each name."""
    head = f"# Sphinx inventory version 2\n# Project: {project}\n# Version: {version}\n"
    head += "# The remainder of this file is compressed using zlib.\n"
    lines = []
    for name, (role, address) in sorted(rows.items()):
        short = address.removesuffix(name) + "$" if address.endswith("#" + name) else address
        lines.append(f"{name} py:{role} 1 {short} -\n")
    return head.encode() + zlib.compress("".join(lines).encode(), 9)


def main() -> None:
    OUT.mkdir(exist_ok=True)
    from importlib.metadata import version

    for project, number, rows in (
        ("Python", platform.python_version(), python_rows()),
        ("NumPy", version("numpy"), numpy_rows()),
        ("PyTorch", version("torch"), torch_rows()),
    ):
        name = {"Python": "python", "NumPy": "numpy", "PyTorch": "torch"}[project]
        path = OUT / f"{name}.inv"
        part = path.with_suffix(".part")
        part.write_bytes(encode(project, number, rows))
        part.replace(path)
        print(f"{path.name}: {len(rows)} names, {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
