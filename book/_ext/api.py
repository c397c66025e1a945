"""``{api}``: the reference of every public module, made by autodoc from the docstrings.

Docstrings are written for people who read code, in Markdown; autodoc wants reStructuredText, so they are
translated on the way: `code`, $mathematics$, displayed formulas and indented blocks. The line ``Book: <label>``
becomes a link to the section that teaches the object. Names of other projects are printed without a link,
since the book is built without a network; an unknown name of our own is still an error.
"""

from __future__ import annotations

import builtins
import re
import sys
from pathlib import Path
from typing import Any

from codeindex import PACKAGE, labels, modules, package_folder
from docutils import nodes
from generated import Generated
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment

EXTERNAL = frozenset(sys.stdlib_module_names) | frozenset(dir(builtins)) | {
    "huggingface_hub", "matplotlib", "np", "numpy", "optional", "rich", "safetensors", "tokenizers", "torch",
    "typer",
}  # fmt: skip
_INLINE = re.compile(r"(``.+?``|:[\w:]+:`[^`]+`|`[^`]+`|\$[^$\s](?:[^$]*[^$\s])?\$)", re.DOTALL)
_SECTION = re.compile(r"^[A-Z][A-Za-z ]*:$")


def _inline(text: str) -> str:
    def one(match: re.Match[str]) -> str:
        part = match[0]
        if part.startswith(("``", ":")):
            return part
        if part.startswith("$"):
            return f":math:`{part[1:-1]}`"
        return f"`{part}`"

    return _INLINE.sub(one, text)


def to_rst(lines: list[str]) -> list[str]:
    """A Markdown docstring as reStructuredText, line by line."""
    out: list[str] = []
    text = iter(enumerate(lines))
    in_section = False
    for i, line in text:
        if line and not line[0].isspace():
            in_section = bool(_SECTION.match(line)) and i + 1 < len(lines) and lines[i + 1][:1].isspace()
        bare = line.strip()
        if bare.startswith("$$"):
            formula = [bare[2:]]
            while not formula[-1].rstrip(" ,.;").endswith("$$"):
                try:
                    formula.append(next(text)[1].strip())
                except StopIteration:
                    raise ValueError(f"docstring: a formula opened by $$ is never closed: {bare!r}") from None
            tail = formula[-1].rstrip()
            formula[-1] = tail.replace("$$", "")
            indent = " " * (len(line) - len(line.lstrip()))
            out += ["", f"{indent}.. math::", ""]
            out += [f"{indent}   {part}" for part in formula if part.strip()]
            out.append("")
            continue
        block = line[:4].isspace() and bare and not in_section and (not out or not out[-1].strip())
        if block:  # a drawn formula or an example: keep its lines
            out += ["::", "", line]
            for _, more in text:
                if more and not more[0].isspace():
                    line = more
                    break
                out.append(more)
            else:
                break
            in_section = bool(_SECTION.match(line))
        if labels(line):
            links = ", ".join(f":ref:`{label}`" for label in labels(line))
            out.append(f"Taught in {links}.")
        else:
            out.append(line)
    return _inline("\n".join(out)).split("\n")


def process_docstring(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    if name.split(".")[0] == PACKAGE:
        lines[:] = to_rst(lines)


def unlinked(
    app: Sphinx, env: BuildEnvironment, node: pending_xref, content: nodes.TextElement
) -> nodes.TextElement | None:
    """Print the names of other projects as they are."""
    root = node.get("reftarget", "").split(".")[0]
    return content if node.get("refdomain") == "py" and root in EXTERNAL else None


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
            "   :member-order: bysource",
            "   :show-inheritance:",
            "```",
            "",
        ]
    return "\n".join(out)


class Api(Generated):
    """``{api}``"""

    def reads(self) -> list[Path]:
        return [package_folder()]

    def markdown(self) -> str:
        return markdown([name for name, path in modules(package_folder()) if path.read_text("utf-8").strip()])


def setup(app: Sphinx) -> dict[str, Any]:
    app.setup_extension("sphinx.ext.autodoc")
    app.setup_extension("sphinx.ext.napoleon")
    app.add_directive("api", Api)
    app.connect("autodoc-process-docstring", process_docstring, priority=100)  # before napoleon
    app.connect("missing-reference", unlinked, priority=900)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
