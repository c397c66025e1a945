"""The bridges between package and pages, made from the ``Book: <label>`` lines of public docstrings.

``{code-index}`` lists every public module, class and function of the package with the section that teaches
it; ``{page-code}`` lists, on a page, the objects taught on it. The sources are parsed, never imported.
"""

from __future__ import annotations

import ast
import importlib.util
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from generated import Generated, table

PACKAGE = "textbook_code"
_BOOK_LINE = re.compile(r"^\s*Book:\s*(.+?)\s*$", re.MULTILINE)
_LABEL = re.compile(r"^\(([a-z0-9][a-z0-9-]*)\)=\s*$", re.MULTILINE)
_FENCE = re.compile(r"^(`{3,}|~{3,})[^\n]*\n.*?^\1[`~]*[ \t]*$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Entry:
    """One public module, class or function."""

    module: str
    name: str  # "" for the module itself
    kind: str  # "module", "class" or "function"
    labels: tuple[str, ...]
    summary: str
    path: Path
    line: int

    @property
    def qualified(self) -> str:
        return f"{self.module}.{self.name}" if self.name else self.module


def package_folder() -> Path:
    """Where the package lies, without importing it."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f"{PACKAGE} is not installed")
    return Path(next(iter(spec.submodule_search_locations)))


def modules(folder: Path) -> Iterator[tuple[str, Path]]:
    """The public modules below ``folder``: (dotted name, file), packages before what is in them."""
    for path in sorted(folder.rglob("*.py"), key=lambda p: (p.parent, p.name != "__init__.py", p.name)):
        parts = path.relative_to(folder).with_suffix("").parts
        if parts[-1] == "__init__":
            parts = parts[:-1]
        if not any(part.startswith("_") for part in parts):
            yield ".".join((folder.name, *parts)), path


def labels(docstring: str) -> tuple[str, ...]:
    """The labels that a docstring's ``Book:`` line names; several are separated by commas.

    >>> labels("What it is.\\n\\nBook: attention-masks, bert-mlm")
    ('attention-masks', 'bert-mlm')
    """
    found = _BOOK_LINE.search(docstring or "")
    if not found:
        return ()
    return tuple(name.strip(" `.") for name in found[1].split(",") if name.strip(" `."))


def entries(folder: Path) -> list[Entry]:
    """Every public module that holds code, and every public class and function defined at its top level."""
    out = []
    for module, path in modules(folder):
        tree = ast.parse(path.read_text("utf-8"))
        public = [
            node
            for node in tree.body
            if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
            and not node.name.startswith("_")
        ]
        doc = ast.get_docstring(tree) or ""
        if public or labels(doc):
            out.append(_entry(module, "", "module", doc, path, 1))
        for node in public:
            kind = "class" if isinstance(node, ast.ClassDef) else "function"
            out.append(_entry(module, node.name, kind, ast.get_docstring(node) or "", path, node.lineno))
    return out


def _entry(module: str, name: str, kind: str, doc: str, path: Path, line: int) -> Entry:
    first = " ".join(doc.split("\n\n")[0].split())
    return Entry(module, name, kind, labels(doc), first, path, line)


def page_labels(source: str) -> list[str]:
    """The labels a Markdown page defines with ``(label)=``, in order; those inside code blocks are none."""
    return _LABEL.findall(_FENCE.sub("", source))


def book_labels(book: Path) -> dict[str, Path]:
    """Each label defined in the pages below ``book``, and the page that defines it."""
    found: dict[str, Path] = {}
    for page in sorted(book.rglob("*.md")):
        for label in page_labels(page.read_text("utf-8")):
            found.setdefault(label, page)
    return found


def problems(items: list[Entry], known: set[str]) -> list[str]:
    """What breaks the bridge: classes and functions without a label, and labels that no page defines."""
    out = []
    for item in items:
        where = f"{item.path}:{item.line}: {item.qualified}"
        if not item.labels and item.kind != "module":
            out.append(f"{where}: its docstring has no line 'Book: <label>'")
        out += [f"{where}: no page defines the label {x!r}" for x in item.labels if x not in known]
    return out


# ---------------------------------------------------------------- Markdown


def _link(label: str, known: set[str]) -> str:
    return f"{{ref}}`{label}`" if label in known else f"`{label}`"


def _object(item: Entry, shown: str = "") -> str:
    role = {"module": "mod", "class": "class", "function": "func"}[item.kind]
    if not shown:
        return f"{{py:{role}}}`~{item.qualified}`"
    return f"{{py:{role}}}`{shown}{'()' if item.kind == 'function' else ''} <{item.qualified}>`"


def index_markdown(items: list[Entry], known: set[str]) -> str:
    """A table for each room of the package (layers, models, …): object → section."""
    rooms: dict[str, list[tuple[str, str]]] = {}
    for item in items:
        path = item.qualified.removeprefix(PACKAGE).lstrip(".")
        room, _, rest = path.partition(".")
        if not (room and (package_folder() / room).is_dir()):
            room, rest = "", path
        taught = " · ".join(_link(label, known) for label in item.labels) or "–"
        rooms.setdefault(room, []).append((_object(item, rest or room or PACKAGE), taught))
    out = []
    for room, rows in rooms.items():
        out += [f"## `{room or PACKAGE}`", "", table(("Object", "Taught in"), rows, (54, 46)), ""]
    return "\n".join(out)


def page_markdown(items: list[Entry], here: list[str]) -> str:
    """A box with the objects that the labels of one page teach."""
    mine = [item for item in items if item.kind != "module" and set(item.labels) & set(here)]
    if not mine:
        return ""
    lines = [f"- {_object(item)}: {_sentence(item.summary)}" for item in mine]
    return "\n".join(["```{admonition} Code of this page", ":class: page-code", "", *lines, "```"])


def _sentence(text: str) -> str:
    """The first sentence of a docstring, as Markdown."""
    text = text.replace("``", "`")
    first = re.split(r"(?<=[a-z`)\]])\. (?=[A-Z`])", text)[0].rstrip(".:;")
    return first + "."


def setup(app: Any) -> dict[str, Any]:
    class CodeIndex(Generated):
        """``{code-index}``"""

        def reads(self) -> list[Path]:
            return [package_folder(), self.root / "book"]

        def markdown(self) -> str:
            return index_markdown(entries(package_folder()), set(book_labels(self.root / "book")))

    class PageCode(Generated):
        """``{page-code}``"""

        def reads(self) -> list[Path]:
            return [package_folder()]

        def markdown(self) -> str:
            source = Path(self.env.doc2path(self.env.docname)).read_text("utf-8")
            return page_markdown(entries(package_folder()), page_labels(source))

    app.add_directive("code-index", CodeIndex)
    app.add_directive("page-code", PageCode)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
