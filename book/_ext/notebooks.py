"""A notebook of each page with code, for readers: ``_notebooks/<page>.ipynb`` in the HTML.

It is made from the page as Sphinx has resolved it, so that references, citations, glued values, included code
and generated parts stand in it as the book prints them; the code cells come from the source. Nothing of it
needs the book: it is plain Markdown, and the cells run with the package and its ``notebook`` extra. Figures
that are files travel inside. A kind of content that has no translation here is an error, not a gap.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import nbformat
from docutils import nodes
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook
from solutions import IMPORT
from sphinx.application import Sphinx
from sphinx.errors import ExtensionError

FOLDER = "_notebooks"
MIMES = {".svg": "image/svg+xml", ".png": "image/png", ".jpg": "image/jpeg", ".gif": "image/gif"}
_CHECK = re.compile(r'^check\("', re.MULTILINE)

# What a page has on the screen only.
SKIPPED = {"comment", "index", "target", "raw", "substitution_definition", "meta", "pending", "page_links"}
# Boxes: a title, if any, then blocks.
BOXES = {"admonition", "topic", "sidebar", "block_quote", "exercise_node", "exercise_enumerable_node"}
BOXES |= {"note", "tip", "hint", "important", "warning", "caution", "attention", "danger", "error", "seealso"}


def has_notebook(app: Sphinx, docname: str) -> bool:
    """Whether a page has code cells, and so a notebook."""
    return "kernelspec" in app.env.metadata.get(docname, {})


# ---------------------------------------------------------------- Markdown


def escape(text: str) -> str:
    """Plain text as Markdown that prints it, wherever it stands in a line.

    >>> print(escape("a*b costs $3 <b> x_y _z"))
    a\\*b costs \\$3 \\<b> x_y \\_z
    """
    return re.sub(r"([\\`*$]|(?<!\w)_|_(?!\w)|<(?=[\w/!])|\](?=\())", r"\\\1", text)


def paragraph(text: str) -> str:
    """One line of Markdown that is a paragraph even where it begins like a list or a heading.

    >>> print(paragraph("1. of May"))
    1\\. of May
    """
    text = re.sub(r"^(\d+)([.)]\s)", r"\1\\\2", re.sub(r"\s*\n\s*", " ", text.strip()))
    return re.sub(r"^([#>+-]+\s)", r"\\\1", text)


def code(text: str) -> str:
    """Inline code, whatever ticks it holds."""
    ticks = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    pad = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{ticks}{pad}{text}{pad}{ticks}"


def fence(text: str, language: str) -> str:
    ticks = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{ticks}{language}\n{text.rstrip()}\n{ticks}"


def quote(text: str) -> str:
    return "\n".join(f"> {line}".rstrip() for line in text.splitlines())


def indent(text: str, by: int) -> str:
    first, *rest = text.splitlines() or [""]
    return "\n".join([first, *(" " * by + line if line else "" for line in rest)])


def details(title: str, text: str) -> str:
    return f"<details>\n<summary>{title}</summary>\n\n{text}\n\n</details>"


class Translator:
    """One page's doctree as cells.

    Args:
        app: Sphinx, for the numbers of figures and equations.
        docname: the page.
        sources: the source of every code cell by its place in the page, with its tags.
    """

    def __init__(self, app: Sphinx, docname: str, sources: dict[int, tuple[str, set[str]]]) -> None:
        self.app, self.docname = app, docname
        self.hidden = dict(sources)  # cells that are still to come
        self.sources = sources
        self.cells: list[nbformat.NotebookNode] = []
        self.text: list[str] = []
        self.attached: dict[str, dict[str, str]] = {}

    # ------------------------------------------------------------ cells

    def flush(self) -> None:
        if self.text:
            cell = new_markdown_cell("\n\n".join(self.text))
            if self.attached:
                cell["attachments"] = self.attached
            self.cells.append(cell)
        self.text, self.attached = [], {}

    def say(self, text: str) -> None:
        if text.strip():
            self.text.append(text)

    def run(self, source: str, tags: Iterable[str] = ()) -> None:
        self.flush()
        cell = new_code_cell(source)
        if {"hide-input", "hide-cell"} & set(tags):
            cell.metadata["jupyter"] = {"source_hidden": True}
        self.cells.append(cell)

    def run_until(self, index: int) -> None:
        """A cell of the page, after those before it that the page does not show."""
        for i in sorted(i for i in self.hidden if i <= index):
            self.run(*self.hidden.pop(i))

    def section(self, node: nodes.Element, depth: int) -> None:
        for child in node.children:
            kind = type(child).__name__
            if isinstance(child, nodes.title):
                self.flush()
                number = self._section_number(node)
                self.say(f"{'#' * depth} {number}{self.inline(child)}")
            elif isinstance(child, nodes.section):
                self.section(child, depth + 1)
            elif kind == "container" and child.get("nb_element") == "cell_code":
                self.run_until(child["cell_index"])
                for figure in child.findall(nodes.figure):
                    self.say(self.caption(figure))
            elif "exercise-card" in getattr(child, "attributes", {}).get("classes", []):
                self.exercise(child)
            else:
                self.say(self.block(child))

    def exercise(self, node: nodes.Element) -> None:
        """A card: the statement, a cell to fill in, a cell that checks it, the hint folded."""
        task = next(block for block in node.findall(nodes.literal_block) if IMPORT in block.astext())
        start, checks = _split_at(task.astext().replace(IMPORT, "", 1).strip(), _CHECK)
        body = (c for c in node.children if not (c is task or _is_title(c) or _is_link(c)))
        parts = [self.block(child) for child in body]
        hint = [part for part in parts if part.startswith("<details>")]
        title = next(child for child in node.children if _is_title(child))
        self.say(f"**{self.inline(title)}**")
        self.say("\n\n".join(part for part in parts if part and part not in hint))
        self.run(start)
        self.run(f"{IMPORT}\n\n{checks}")
        self.say("\n\n".join(hint))

    # ------------------------------------------------------------ blocks

    def block(self, node: nodes.Node) -> str:
        kind = type(node).__name__
        if kind in SKIPPED:
            return ""
        if kind in BOXES:
            return self.box(node)
        handler: Callable[[Any], str] | None = getattr(self, f"block_{kind.lower()}", None)
        if handler is None:
            raise ExtensionError(
                f"notebooks: no translation of {kind} in {self.docname}: {node.astext()[:60]!r}"
            )
        return handler(node)

    def blocks(self, children: Iterable[nodes.Node], between: str = "\n\n") -> str:
        return between.join(filter(None, map(self.block, children)))

    def box(self, node: nodes.Element) -> str:
        title = next((child for child in node.children if _is_title(child)), None)
        name = {"seealso": "See also"}.get(node.tagname, node.tagname.capitalize())
        untitled = {"block_quote", "topic", "admonition", "sidebar"}
        head = self.inline(title) if title else "" if node.tagname in untitled else name
        body = self.blocks(child for child in node.children if child is not title)
        return quote("\n\n".join(filter(None, [f"**{head}**" if head else "", body])))

    def block_paragraph(self, node: nodes.Element) -> str:
        return paragraph(self.inline(node))

    block_compact_paragraph = block_passthroughtextelement = block_paragraph

    def block_rubric(self, node: nodes.rubric) -> str:
        return f"**{self.inline(node)}**"

    def block_transition(self, node: nodes.transition) -> str:
        return "---"

    def block_literal_block(self, node: nodes.literal_block) -> str:
        language = node.get("language", "")
        return fence(node.astext(), "" if language in ("none", "default", "myst-ansi") else language)

    block_doctest_block = block_literal_block

    def block_math_block(self, node: nodes.math_block) -> str:
        source = node.astext().strip()
        if node.get("nowrap") or node.get("no-wrap"):
            return source
        config = self.app.config
        by_page = config.numfig and config.math_numfig
        number = self._number("displaymath", node) if by_page else node.get("number")
        tag = f"\n\\tag{{{number}}}" if number and node.get("label") else ""
        return f"$$\n{source}{tag}\n$$"

    def block_container(self, node: nodes.container) -> str:
        classes = node.get("classes", [])
        if "page-head" in classes:
            facts = (item for item in node.findall(nodes.list_item) if not _is_download(item))
            promise = self.inline(node.children[0])
            return "\n\n".join([f"*{promise}*", "\n".join(f"- {self.inline(item[0])}" for item in facts)])
        if node.get("nb_element") == "cell_code":  # inside a box or a list
            source = self.sources[node["cell_index"]][0]
            self.hidden.pop(node["cell_index"], None)
            return fence(source, "python")
        captions = [child for child in node.children if isinstance(child, nodes.caption)]
        body = self.blocks(child for child in node.children if child not in captions)
        head = [self._titled("code-block", node, self.inline(c)) for c in captions]
        return "\n\n".join(filter(None, [*head, body]))

    def block_figure(self, node: nodes.figure) -> str:
        shown = self.blocks(child for child in node.children if not isinstance(child, nodes.caption))
        return "\n\n".join(filter(None, [shown, self.caption(node)]))

    def block_legend(self, node: nodes.legend) -> str:
        return self.blocks(node.children)

    def caption(self, figure: nodes.figure) -> str:
        words = next((self.inline(c) for c in figure.children if isinstance(c, nodes.caption)), "")
        return self._titled("figure", figure, words)

    def _titled(self, kind: str, node: nodes.Element, words: str) -> str:
        number = self._number(kind, node)
        return f"**{self.app.config.numfig_format[kind] % number}.** {words}" if number else words

    def block_image(self, node: nodes.image) -> str:
        return self.inline_image(node)

    def block_reference(self, node: nodes.reference) -> str:  # around an image
        return self.inline_reference(node)

    def block_bullet_list(self, node: nodes.bullet_list) -> str:
        return self._items(node, lambda i: "- ")

    def block_enumerated_list(self, node: nodes.enumerated_list) -> str:
        start = int(node.get("start", 1))
        return self._items(node, lambda i: f"{start + i}. ")

    def _items(self, node: nodes.Element, mark: Callable[[int], str]) -> str:
        items = [
            f"{mark(i)}{indent(self.blocks(item.children), len(mark(i)))}" for i, item in enumerate(node)
        ]
        loose = any("\n\n" in item for item in items)
        return ("\n\n" if loose else "\n").join(items)

    def block_definition_list(self, node: nodes.definition_list) -> str:
        out = []
        for item in node.children:
            terms = [self.inline(c) for c in item.children if isinstance(c, nodes.term)]
            means = self.blocks(
                b for c in item.children if isinstance(c, nodes.definition) for b in c.children
            )
            out.append(f"- **{', '.join(terms)}**: {indent(means, 2)}")
        return "\n".join(out)

    def block_line_block(self, node: nodes.line_block) -> str:
        return "  \n".join(self.inline(line) for line in node.findall(nodes.line))

    def block_footnote(self, node: nodes.footnote) -> str:
        label = next(c.astext() for c in node.children if isinstance(c, nodes.label))
        body = self.blocks(c for c in node.children if not isinstance(c, nodes.label))
        return f"<sup>{label}</sup> {body}"

    def block_table(self, node: nodes.table) -> str:
        group = next(c for c in node.children if isinstance(c, nodes.tgroup))
        heads = [row for c in group.children if isinstance(c, nodes.thead) for row in c.children]
        rows = [row for c in group.children if isinstance(c, nodes.tbody) for row in c.children]
        columns = int(group["cols"])
        lines = [self._row(row) for row in (*(heads[:1] or [nodes.row()]), *heads[1:], *rows)]
        lines[0] = lines[0] if heads else "|" + "   |" * columns
        lines.insert(1, "|" + " --- |" * columns)
        title = next((self.inline(c) for c in node.children if isinstance(c, nodes.title)), "")
        above = self._titled("table", node, title)
        return "\n\n".join(filter(None, [above, "\n".join(lines)]))

    def _row(self, row: nodes.Element) -> str:
        cells = []
        for entry in row.children:
            parts = [re.sub(r"\s*\n\s*", " ", self.block(child)) for child in entry.children]
            cells.append("<br>".join(filter(None, parts)) + " |" * int(entry.get("morecols", 0)))
        return "| " + " | ".join(cells) + " |"

    # ------------------------------------------------------------ blocks of the book's own extensions

    def block_quiz(self, node: nodes.Element) -> str:
        question, *options = node.children
        asked = self.blocks(question.children)
        choices = [f"- **{o['letter']}.** {self.inline(o[0])}" for o in options]
        answers = [
            f"- **{o['letter']}.** *{'Right.' if o['right'] else 'Not this one.'}* "
            f"{indent(self.blocks(o[1].children), 2)}"
            for o in options
        ]
        return "\n\n".join([asked, "\n".join(choices), details("Answers", "\n".join(answers))])

    def block_dropdown_main(self, node: nodes.Element) -> str:
        title, *body = node.children
        return details(self.inline(title), self.blocks(body))

    # ------------------------------------------------------------ text inside a block

    def inline(self, node: nodes.Element) -> str:
        return "".join(map(self.span, node.children)).strip()

    def span(self, node: nodes.Node) -> str:
        kind = type(node).__name__
        if isinstance(node, nodes.Text):
            in_cell = node.parent is not None and _inside(node, nodes.entry)
            text = escape(node.astext())
            return text.replace("|", r"\|") if in_cell else text
        if kind in SKIPPED or "cell-label" in node.get("classes", []):
            return ""
        handler: Callable[[Any], str] | None = getattr(self, f"inline_{kind.lower()}", None)
        if handler is None:
            raise ExtensionError(
                f"notebooks: no translation of {kind} in {self.docname}: {node.astext()[:60]!r}"
            )
        return handler(node)

    def _spans(self, node: nodes.Element) -> str:
        return "".join(map(self.span, node.children))

    def inline_strong(self, node: nodes.Element) -> str:
        return _around(self._spans(node), "**")

    def inline_emphasis(self, node: nodes.Element) -> str:
        return _around(self._spans(node), "*")

    inline_inline = inline_container = inline_generated = inline_term = _spans
    inline_number_reference = inline_abbreviation = inline_download_reference = _spans
    inline_passthroughtextelement = inline_paragraph = _spans

    def inline_title_reference(self, node: nodes.Element) -> str:
        return _around(self._spans(node), "*")

    def inline_literal(self, node: nodes.literal) -> str:
        text = code(re.sub(r"\s*\n\s*", " ", node.astext()))
        return text.replace("|", r"\|") if _inside(node, nodes.entry) else text

    def inline_digest_node(self, node: nodes.Element) -> str:
        return code(node.astext())

    def inline_math(self, node: nodes.math) -> str:
        text = re.sub(r"\s*\n\s*", " ", node.astext().strip())
        if _inside(node, nodes.entry):
            text = text.replace(r"\|", r"\Vert ").replace("|", r"\vert ")
        return f"${text}$"

    def inline_superscript(self, node: nodes.Element) -> str:
        return f"<sup>{self._spans(node)}</sup>"

    def inline_subscript(self, node: nodes.Element) -> str:
        return f"<sub>{self._spans(node)}</sub>"

    def inline_footnote_reference(self, node: nodes.Element) -> str:
        return f"<sup>{node.astext()}</sup>"

    def inline_reference(self, node: nodes.reference) -> str:
        """A link where its target is on the web; the book's own pages are named only."""
        words, address = self._spans(node), node.get("refuri", "")
        if node.get("internal") and address and self.app.config.html_baseurl:
            from urllib.parse import urljoin

            here = urljoin(self.app.config.html_baseurl, self.app.builder.get_target_uri(self.docname))
            address = urljoin(here, address)
        return f"[{words}]({address})" if re.match(r"(https?|mailto):", address) else words

    def inline_image(self, node: nodes.image) -> str:
        candidates = node.get("candidates", {})
        chosen = next((candidates[m] for m in (*MIMES.values(), "*") if m in candidates), node["uri"])
        if re.match(r"https?:", chosen):
            return f"![{escape(node.get('alt', ''))}]({chosen})"
        path = Path(self.app.srcdir) / chosen
        if path.suffix not in MIMES:
            raise ExtensionError(f"notebooks: no translation of the image {chosen} in {self.docname}")
        data = base64.b64encode(path.read_bytes()).decode()
        self.attached[path.name] = {MIMES[path.suffix]: data}
        alt = re.sub(r"\s+", " ", node.get("alt", ""))
        return f"![{escape(alt)}](attachment:{path.name})"

    # ------------------------------------------------------------ numbers

    def _number(self, kind: str, node: nodes.Element) -> str:
        numbers = self.app.env.toc_fignumbers.get(self.docname, {}).get(kind, {})
        found = next((numbers[i] for i in node.get("ids", []) if i in numbers), ())
        return ".".join(map(str, found))

    def _section_number(self, node: nodes.Element) -> str:
        numbers = self.app.env.toc_secnumbers.get(self.docname, {})
        anchors = ["" if isinstance(node.parent, nodes.document) else None]
        anchors += [f"#{i}" for i in node.get("ids", [])]
        found = next((numbers[a] for a in anchors if a is not None and a in numbers), None)
        return ".".join(map(str, found)) + " " if found else ""


def _is_title(node: nodes.Node) -> bool:
    return isinstance(node, nodes.title)


def _is_link(node: nodes.Node) -> bool:
    """Whether a paragraph is nothing but a link to another place of the book."""
    return isinstance(node, nodes.paragraph) and [type(c) for c in node.children] == [nodes.reference]


def _is_download(item: nodes.list_item) -> bool:
    return any("page-download" in r.get("classes", []) for r in item.findall(nodes.reference))


def _inside(node: nodes.Node, kind: type[nodes.Node]) -> bool:
    parent = node.parent
    while parent is not None and not isinstance(parent, kind):
        parent = parent.parent
    return parent is not None


def _around(text: str, mark: str) -> str:
    """Emphasis that starts and ends at a word, as Markdown wants it."""
    inner = text.strip()
    if not inner:
        return text
    before, after = text[: len(text) - len(text.lstrip())], text[len(text.rstrip()) :]
    return f"{before}{mark}{inner}{mark}{after}"


def _split_at(text: str, mark: re.Pattern[str]) -> tuple[str, str]:
    found = mark.search(text)
    if found is None:
        raise ExtensionError(f"notebooks: no line that checks the answer in {text[:60]!r}")
    return text[: found.start()].rstrip(), text[found.start() :].strip()


# ---------------------------------------------------------------- a page's notebook


def _code_cells(app: Sphinx, docname: str) -> dict[int, tuple[str, set[str]]]:
    """Every code cell of a page, shown or not, by its place."""
    executed = Path(app.env.mystnb_config.output_folder) / f"{docname}.ipynb"  # type: ignore[attr-defined]
    notebook = nbformat.read(executed, as_version=4)
    return {
        i: (cell.source, set(cell.metadata.get("tags", [])))
        for i, cell in enumerate(notebook.cells)
        if cell.cell_type == "code"
    }


def _references(app: Sphinx, docname: str) -> list[str]:
    """The works that a page cites, as the bibliography prints them, by name and year."""
    domain = app.env.get_domain("cite")
    cited = {t.key for ref in domain.citation_refs if ref.docname == docname for t in ref.targets}  # type: ignore[attr-defined]
    entries = {c.key: c.formatted_entry.text.render_as("text") for c in domain.citations}  # type: ignore[attr-defined]
    return sorted((entries[key] for key in cited if key in entries), key=str.casefold)


def notebook_of(app: Sphinx, doctree: nodes.document, docname: str) -> nbformat.NotebookNode:
    """The page as a notebook."""
    translator = Translator(app, docname, _code_cells(app, docname))
    top = next(node for node in doctree.children if isinstance(node, nodes.section))
    translator.section(top, 1)
    translator.run_until(10**9)
    if references := _references(app, docname):
        translator.flush()
        translator.say("## References")
        translator.say("\n".join(f"- {escape(reference)}" for reference in references))
    translator.flush()
    cells = translator.cells
    about = (
        f"> A page of *{app.config.project}*. The code runs where the package is installed with its extra "
        'for notebooks: `pip install "textbook_code[notebook]"`. The numbers in the text are from the book.'
    )
    heading, _, rest = cells[0].source.partition("\n\n")
    cells[0].source = "\n\n".join(filter(None, [heading, about, rest]))
    for i, cell in enumerate(cells):
        cell["id"] = hashlib.sha256(f"{docname} {i}".encode()).hexdigest()[:8]  # the same page, the same file
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    notebook = new_notebook(cells=cells, metadata={"kernelspec": kernel, "language_info": {"name": "python"}})
    nbformat.validate(notebook)
    return notebook


def _write(app: Sphinx, doctree: nodes.document, docname: str) -> None:
    if app.builder.format != "html" or not has_notebook(app, docname):
        return
    target = Path(app.outdir) / FOLDER / f"{docname}.ipynb"
    target.parent.mkdir(parents=True, exist_ok=True)
    half = target.with_name(target.name + ".part")
    half.write_text(nbformat.writes(notebook_of(app, doctree, docname)) + "\n", "utf-8")
    half.replace(target)


def setup(app: Sphinx) -> dict[str, Any]:
    app.connect("doctree-resolved", _write, priority=900)  # after what other extensions add
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
