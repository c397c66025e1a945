"""``{api} NAMES``: the reference of these modules and of all in them, made by autodoc from the docstrings.

Names are those below the package, ``layers`` or ``models.text``; without any, all of the package is meant.

Docstrings are written for people who read code, in Markdown; autodoc wants reStructuredText, so they are
translated on the way: `code`, $mathematics$, displayed formulas and indented blocks. The line
``Book: <label>`` becomes a link to the section that teaches the object. Names of other projects are printed
without a link, since the book is built without a network; an unknown name of our own is still an error.
"""

from __future__ import annotations

import ast
import builtins
import re
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from codeindex import PACKAGE, labels, modules, package_folder
from docutils import nodes
from generated import Generated
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment

EXTERNAL = frozenset(sys.stdlib_module_names) | frozenset(dir(builtins)) | {
    "huggingface_hub", "matplotlib", "np", "numpy", "rich", "safetensors", "tokenizers", "torch", "typer",
}  # fmt: skip
_FIELDS = {
    "Args": "param",
    "Attributes": "ivar",
    "Raises": "raises",
    "Returns": "returns",
    "Yields": "yields",
}
_INLINE = re.compile(r"(``.+?``|:[\w:]+:`[^`]+`|`[^`]+`|\$[^$\s](?:[^$]*[^$\s])?\$)", re.DOTALL)
_ITEM = re.compile(r"([\w.*]+(?:, [\w.*]+)*):\s+(.*)")


# ---------------------------------------------------------------- docstrings: Markdown → reStructuredText


def _inline(text: str) -> str:
    def one(match: re.Match[str]) -> str:
        part = match[0]
        if part.startswith(("``", ":")):
            return part
        if part.startswith("$"):
            return f":math:`{part[1:-1]}`"
        return f"`{part}`"

    return _INLINE.sub(one, text)


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())


def _fields(lines: list[str]) -> Iterator[str]:
    """Sections such as ``Args:`` as fields; the other lines as they are."""
    i = 0
    while i < len(lines):
        kind = _FIELDS.get(lines[i].removesuffix(":")) if lines[i].endswith(":") else None
        if kind is None or i + 1 == len(lines) or not _indent(lines[i + 1]):
            yield lines[i]
            i += 1
            continue
        base, i = _indent(lines[i + 1]), i + 1
        start = i
        yield ""
        while i < len(lines) and (_indent(lines[i]) or not lines[i].strip()):
            text = lines[i][base:]
            if kind in ("returns", "yields"):
                yield f":{kind}: {text}" if i == start else f"    {text}".rstrip()
            elif _indent(lines[i]) == base and (item := _ITEM.match(text)):
                yield from _item(kind, item[1], item[2])
            else:
                yield f"    {text}".rstrip()
            i += 1
        yield ""


def _item(kind: str, names: str, text: str) -> Iterator[str]:
    """``q, k: …`` as one field for each name; ``B.`` is a letter, and does not begin a list."""
    text = re.sub(r"^(\w\.)(?= |$)", r"\\\1", text)
    for name in names.replace("*", r"\*").split(", "):
        yield f":{kind} {name}: {text}"


def to_rst(lines: list[str]) -> list[str]:
    """A Markdown docstring as reStructuredText, line by line.

    Raises:
        ValueError: a displayed formula is not closed.
    """
    out: list[str] = []
    text = list(_fields(lines))
    in_field, i = False, 0
    while i < len(text):
        line, bare = text[i], text[i].strip()
        i += 1
        if bare and not _indent(line):
            in_field = line.startswith(":")
        if bare.startswith("$$"):
            formula = [bare[2:]]
            while not formula[-1].rstrip(" ,.;").endswith("$$"):
                if i == len(text):
                    raise ValueError(f"docstring: a formula opened by $$ is never closed: {bare!r}")
                formula.append(text[i].strip())
                i += 1
            formula[-1] = formula[-1].replace("$$", "")
            indent = " " * _indent(line)
            out += ["", f"{indent}.. math::", ""]
            out += [f"{indent}   {part}" for part in formula if part.strip()]
            out.append("")
        elif bare and _indent(line) >= 4 and not in_field and not (out and out[-1].strip()):
            out += [".. code-block:: none", "", line]  # a drawn formula or an example: keep its lines
            while i < len(text) and (_indent(text[i]) or not text[i].strip()):
                out.append(text[i])
                i += 1
            out.append("")
        elif labels(line):
            out.append(f"Taught in {', '.join(f':ref:`{label}`' for label in labels(line))}.")
        else:
            out.append(line)
    return _inline("\n".join(out)).split("\n")


def process_docstring(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    if name.split(".")[0] == PACKAGE:
        lines[:] = to_rst([line for line in lines if line != "\f"])  # where a command's help ends


# ---------------------------------------------------------------- names and types


def skip_fields(app: Sphinx, what: str, name: str, obj: Any, skip: bool, options: Any) -> bool | None:
    """The class's own docstring describes the fields of a named tuple."""
    return True if str(getattr(obj, "__doc__", "")).startswith("Alias for field number") else None


def plain_types(app: Sphinx, what: str, name: str, *rest: Any) -> None:
    """Show what ``Annotated`` annotates, without a command line's options, and no return of None."""
    for types in app.env.temp_data.get("annotations", {}).values():
        if types.get("return") in ("None", ":py:obj:`None`"):
            del types["return"]
        for key, text in types.items():
            types[key] = re.sub(r"(?:~?typing\.)?Annotated\[([^<]*), ~?<.*>\]", r"\1", text)


@cache
def imported(module: str) -> dict[str, str]:
    """The names a module of ours imports from elsewhere, each with the module it comes from."""
    path = dict(modules(package_folder())).get(module)
    tree = ast.parse(path.read_text("utf-8")) if path else ast.Module([], [])
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and not node.level:
            found.update({alias.asname or alias.name: node.module or "" for alias in node.names})
    return found


def unlinked(
    app: Sphinx, env: BuildEnvironment, node: pending_xref, content: nodes.TextElement
) -> nodes.TextElement | None:
    """Print the names of other projects as they are."""
    if node.get("refdomain") != "py":
        return None
    root = node.get("reftarget", "").split(".")[0]
    origin = imported(node.get("py:module") or "").get(root, root)
    return content if origin.split(".")[0] in EXTERNAL else None


def public_bases(app: Sphinx, name: str, obj: Any, options: Any, bases: list[Any]) -> None:
    """Show the public classes behind a private base."""
    found: list[Any] = []

    def add(base: Any) -> None:
        if getattr(base, "__name__", "").startswith("_"):
            for behind in base.__bases__:
                add(behind)
        elif base not in found:
            found.append(base)

    for base in bases:
        add(base)
    bases[:] = found


def chosen(names: list[str], rooms: list[str]) -> list[str]:
    """The modules that are, or are in, one of the rooms; all of them where no room is named.

    A name that ends in a dot stands for that module alone, and a dot for the package itself.

    Raises:
        ValueError: there is nothing of a room's name.
    """
    found: list[str] = []
    for room in rooms:
        full = f"{PACKAGE}.{room}".rstrip(".")
        mine = [name for name in names if name == full or (name.startswith(f"{full}.") and room[-1] != ".")]
        if not mine:
            raise ValueError(f"api: there is no {full}")
        found += mine
    return found if rooms else names


def markdown(names: list[str]) -> str:
    """A section for each module, with autodoc's directive in it."""
    out = []
    for name in names:
        out += [
            f"(api-{name.replace('.', '-').replace('_', '-')})=",
            f"## `{name.removeprefix(PACKAGE + '.')}`",
            "",
            "```{eval-rst}",
            f".. automodule:: {name}",
            "   :members:",
            "   :ignore-module-all:",
            "   :no-value:",
            "   :member-order: bysource",
            "   :show-inheritance:",
            "```",
            "",
        ]
    return "\n".join(out)


class Api(Generated):
    """``{api} NAMES``"""

    optional_arguments = 1
    final_argument_whitespace = True

    def reads(self) -> list[Path]:
        return [package_folder()]

    def markdown(self) -> str:
        rooms = self.arguments[0].split() if self.arguments else []
        names = [name for name, path in modules(package_folder()) if path.read_text("utf-8").strip()]
        try:
            return markdown(chosen(names, rooms))
        except ValueError as error:
            raise self.error(str(error)) from error


def setup(app: Sphinx) -> dict[str, Any]:
    app.setup_extension("sphinx.ext.autodoc")
    app.add_directive("api", Api)
    app.connect("autodoc-process-docstring", process_docstring)
    app.connect("autodoc-skip-member", skip_fields)
    app.connect("autodoc-process-bases", public_bases)
    app.connect("autodoc-process-signature", plain_types, priority=900)  # after autodoc has noted the types
    app.connect("missing-reference", unlinked, priority=900)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
