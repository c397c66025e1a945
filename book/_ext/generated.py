"""What the generated parts of the book share.

A generated part is a directive that returns Markdown (``Generated.markdown``) made from files of the
repository or of the build (``Generated.reads``). Markdown, not nodes: the same text serves the HTML, the PDF
and the notebooks that readers download. A page is read again when one of its inputs has changed, appeared or
gone.

This extension also sets up all the others of its kind, so that ``_config.yml`` needs only one line.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from docutils import nodes
from docutils.statemachine import StringList
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.errors import ExtensionError
from sphinx.transforms.post_transforms import SphinxPostTransform
from sphinx.util.docutils import SphinxDirective, SphinxRole
from sphinx.writers.html5 import HTML5Translator
from sphinx.writers.latex import LaTeXTranslator

PARTS = (
    "api",
    "benchmark_table",
    "bibliography",
    "codeindex",
    "execution",
    "ledger",
    "published",
    "recorded",
    "solutions",
    "sources_pages",
)
TABLE_CLASS = "generated"
STYLE = "generated.css"
SOURCES = (".json", ".md", ".py")


def read_json(path: Path) -> Any:
    """The content of a JSON file, or None where there is no such file.

    Raises:
        ExtensionError: the file is not JSON.
    """
    try:
        return json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ExtensionError(f"{path} is not JSON: {error}") from error


def build_file(root: Path, name: str) -> Path:
    """A file that an earlier step left in the build folder: ``_build``, or where TEXTBOOK_CODE_BUILD says."""
    return Path(os.environ.get("TEXTBOOK_CODE_BUILD") or root / "_build") / name


def scientific(value: float) -> str:
    """A number as Markdown mathematics with two figures: 3.2e-15 → $3.2 \\times 10^{-15}$.

    >>> scientific(1e-4)
    '$10^{-4}$'
    """
    if value == 0:
        return "$0$"
    mantissa, exponent = f"{value:.1e}".split("e")
    power = f"10^{{{int(exponent)}}}"
    if mantissa in ("1.0", "-1.0"):
        return f"${mantissa[:-2].replace('1', '')}{power}$"
    return f"${mantissa} \\times {power}$"


def table(
    head: Sequence[str], rows: Iterable[Sequence[str]], widths: Sequence[int], *, kind: str = ""
) -> str:
    """A table as a Markdown ``list-table``; each cell is one line or several lines of Markdown.

    Args:
        head: the columns' titles.
        rows: the cells, as many in a row as there are columns.
        widths: the columns' relative widths (the PDF breaks lines inside them).
        kind: one more class for the style sheet.
    """
    out = [
        "`````{list-table}",
        ":header-rows: 1",
        f":widths: {' '.join(map(str, widths))}",
        f":class: longtable {TABLE_CLASS} {kind}".rstrip(),
        "",
    ]
    for row in [head, *rows]:
        if len(row) != len(head):
            raise ValueError(f"row must have {len(head)} cells, got {len(row)}: {row!r}")
        for i, cell in enumerate(row):
            first, *rest = cell.splitlines() or [""]
            out.append(("* - " if i == 0 else "  - ") + first)
            out += [f"    {line}" if line else "" for line in rest]
    return "\n".join([*out, "`````"])


def fence(text: str, language: str = "python") -> str:
    """A code block whose fence is longer than any in ``text``."""
    ticks = "```"
    while ticks in text:
        ticks += "`"
    return f"{ticks}{language}\n{text.rstrip()}\n{ticks}"


# ---------------------------------------------------------------- directives and their inputs


class Generated(SphinxDirective):
    """A directive that stands for the Markdown its ``markdown`` method returns."""

    def markdown(self) -> str:
        raise NotImplementedError

    def reads(self) -> Iterable[Path]:
        """The files the text is made from; they need not exist."""
        return ()

    @property
    def root(self) -> Path:
        """The folder of the repository."""
        return Path(self.env.app.srcdir)

    def run(self) -> list[nodes.Node]:
        for path in self.reads():
            note_input(self.env, path)
        holder = nodes.Element()
        holder.document = self.state.document
        lines = StringList(self.markdown().splitlines(), source=f"<{self.name}>")
        page = self.state_machine.node  # sections go straight into it: put them behind what precedes them
        before = len(page)
        self.state.nested_parse(lines, self.content_offset, holder, match_titles=True)
        sections = page.children[before:]
        del page.children[before:]
        return holder.children + sections


def digest(path: Path) -> str | None:
    """The sha256 of a file, or of all sources below a folder; None where there is nothing."""
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix in SOURCES)
        return hashlib.sha256("".join(f"{f}{digest(f)}" for f in files).encode()).hexdigest()
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None


def _inputs(env: BuildEnvironment) -> dict[str, dict[str, str | None]]:
    if not hasattr(env, "generated_inputs"):
        env.generated_inputs = {}  # type: ignore[attr-defined]
    return env.generated_inputs  # type: ignore[attr-defined, no-any-return]


def note_input(env: BuildEnvironment, path: Path) -> None:
    """Read the current page again once ``path`` is no longer what it is now."""
    _inputs(env).setdefault(env.docname, {})[str(path)] = digest(path)


def _outdated(app: Sphinx, env: BuildEnvironment, added: set, changed: set, removed: set) -> list[str]:
    now: dict[str, str | None] = {}

    def current(path: str) -> str | None:
        if path not in now:
            now[path] = digest(Path(path))
        return now[path]

    return [doc for doc, files in _inputs(env).items() if any(current(p) != was for p, was in files.items())]


def _purge(app: Sphinx, env: BuildEnvironment, docname: str) -> None:
    _inputs(env).pop(docname, None)


def _merge(app: Sphinx, env: BuildEnvironment, docnames: Iterable[str], other: BuildEnvironment) -> None:
    _inputs(env).update({doc: files for doc, files in _inputs(other).items() if doc in docnames})


# ---------------------------------------------------------------- long strings, tables on a phone


class digest_node(nodes.inline):  # noqa: N801 (docutils names its nodes so)
    """A long string without spaces, such as a sha256, that may break anywhere."""


class DigestRole(SphinxRole):
    """``{digest}`` prints a long string that wraps: whole in both HTML and PDF."""

    def run(self) -> tuple[list[nodes.Node], list[nodes.system_message]]:
        return [digest_node(self.rawtext, self.text)], []


def _visit_digest_html(self: HTML5Translator, node: digest_node) -> None:
    self.body.append('<code class="digest">')


def _depart_digest_html(self: HTML5Translator, node: digest_node) -> None:
    self.body.append("</code>")


def _visit_digest_latex(self: LaTeXTranslator, node: digest_node) -> None:
    text = node.astext()
    pieces = (self.encode(text[i : i + 4]) for i in range(0, len(text), 4))
    self.body.append(r"{\ttfamily\small " + r"\allowbreak{}".join(pieces) + "}")
    raise nodes.SkipNode


def _visit_digest_text(self: Any, node: digest_node) -> None:
    pass


class LabelledCells(SphinxPostTransform):
    """Name each cell of a wide generated table by its column: on a phone a row is shown as a card."""

    default_priority = 900
    formats = ("html",)

    def run(self, **kwargs: Any) -> None:
        for tab in self.document.findall(nodes.table):
            heads = list(tab.findall(nodes.thead))
            if TABLE_CLASS not in tab["classes"] or not heads:
                continue
            titles = [entry.astext() for entry in heads[-1].findall(nodes.entry)]
            if len(titles) < 3:
                continue
            tab["classes"].append("cards")
            for row in next(tab.findall(nodes.tbody)).findall(nodes.row):
                for title, entry in zip(titles, row.findall(nodes.entry), strict=True):
                    if not entry.astext().strip():
                        entry["classes"].append("empty")
                        continue
                    label = nodes.inline("", title, classes=["cell-label"])
                    first = entry.children[0]
                    if isinstance(first, nodes.paragraph):
                        first.insert(0, label)
                    else:
                        entry.insert(0, nodes.paragraph("", "", label))


def setup(app: Sphinx) -> dict[str, Any]:
    for part in PARTS:
        app.setup_extension(part)
    app.add_role("digest", DigestRole())
    app.add_node(
        digest_node,
        html=(_visit_digest_html, _depart_digest_html),
        latex=(_visit_digest_latex, None),
        text=(_visit_digest_text, _visit_digest_text),
    )
    app.add_post_transform(LabelledCells)
    app.add_css_file(STYLE)
    app.connect("env-get-outdated", _outdated)
    app.connect("env-purge-doc", _purge)
    app.connect("env-merge-info", _merge)
    return {"version": "1", "env_version": 1, "parallel_read_safe": True, "parallel_write_safe": True}
