"""LaTeX fit for a printed book.

Sphinx writes a manual; this makes a book of it. The tree is arranged into front matter, parts and chapters
as the table of contents has them; every number (chapter, figure, table, listing, equation, theorem) is the
HTML's own number, written out, so the two can never differ; admonitions and theorems become coloured boxes;
notebook cells get an input and an output style; the pages on which each document begins and ends are
written beside the PDF, for ``page_pdfs`` to cut it. How it all looks is the business of
``_latex/preamble.inc``.
"""

from __future__ import annotations

import platform
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.builders.latex import LaTeXBuilder
from sphinx.config import Config
from sphinx.locale import admonitionlabels
from sphinx.transforms.post_transforms import SphinxPostTransform
from sphinx.writers.latex import LaTeXTranslator

LOOK = Path(__file__).resolve().parents[1] / "_latex"
FILES = ("preamble.inc", "titlepage.inc")
TOGETHER = 16  # lines
HIDDEN = {
    "tag_hide-cell",
    "tag_remove-cell",
    "tag_hide-input",
    "tag_hide-output",
    "hero-buttons",
    "html-only",
}
_ENGINE = {
    "papersize": "a4paper",
    "pointsize": "11pt",
    "classoptions": ",twoside,openright",
    "babel": r"\usepackage[british]{babel}",
    "fontpkg": "",
    "fontenc": r"\usepackage{fontspec}",
    "fncychap": "",
    "figure_align": "htbp",
    "geometry": (
        r"\usepackage[a4paper,inner=27mm,outer=24mm,top=28mm,bottom=28mm,headheight=15pt,footskip=12mm]{geometry}"
    ),
    "sphinxsetup": (
        "VerbatimColor={HTML}{F6F8FA}, VerbatimBorderColor={HTML}{D7DCE1}, verbatimwithframe=false,"
        " verbatimsep=4pt, TitleColor={HTML}{1F4E79}, InnerLinkColor={HTML}{1F4E79},"
        " OuterLinkColor={HTML}{00696D}, verbatimforcewraps=true, verbatimmaxunderfull=1,"
        " TableRowColorHeader={HTML}{EAF0F6}, TableRowColorOdd={gray}{1}, TableRowColorEven={HTML}{F6F8FA}"
    ),
    "preamble": r"\input{preamble.inc}",
    "maketitle": r"\input{titlepage.inc}",
    "tableofcontents": r"\bookcontents",
    "printindex": r"\bookindex",
}


def _configure(app: Sphinx, config: Config) -> None:
    config.latex_engine = "lualatex"
    config.latex_theme = "manual"
    config.latex_toplevel_sectioning = "chapter"
    config.latex_use_xindy = False  # makeindex comes with every LaTeX
    config.latex_show_urls = "no"
    config.latex_show_pagerefs = False
    config.latex_domain_indices = False
    config.latex_table_style = ["booktabs", "colorrows"]
    config.latex_additional_files = [str(LOOK / name) for name in FILES]
    config.latex_elements = {**_ENGINE, **config.latex_elements}


def _facts(app: Sphinx, builder: LaTeXBuilder) -> str:
    """What the title page says of this book, as LaTeX commands."""
    from sphinx.util.texescape import escape

    config = app.config
    facts = {
        "booksubtitle": config.booklatex_subtitle,
        "bookversion": config.version or _version(),
        "booklicence": config.booklatex_licence,
        "bookyear": str(config.copyright).split(",")[0],
        "bookurl": getattr(config, "book_url", ""),
        "bookengines": _engines(),
    }
    lines = [rf"\newcommand*{{\{name}}}{{{escape(text, 'lualatex')}}}" for name, text in facts.items()]
    title = escape(config.project, "lualatex").replace(", ", r",\\ ", 1)
    return "\n".join([*lines, rf"\newcommand*{{\booktitlelines}}{{{title}}}"])


def _version() -> str:
    try:
        return metadata.version("textbook_code")
    except metadata.PackageNotFoundError:
        return ""


def _engines() -> str:
    found = [f"Python {platform.python_version()}"]
    for name, package in (("PyTorch", "torch"), ("NumPy", "numpy")):
        try:
            found.append(f"{name} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            continue
    return ", ".join(found)


def _prepare(app: Sphinx) -> None:
    if isinstance(app.builder, LaTeXBuilder):
        elements = app.config.latex_elements
        elements["preamble"] = _facts(app, app.builder) + "\n" + _ENGINE["preamble"]
        app.builder.context["preamble"] = elements["preamble"]
        _register(app)


class Arrange(SphinxPostTransform):
    """Front matter first, then a ``\\part`` for each caption of the contents, then its chapters."""

    default_priority = 850
    formats = ("latex",)

    def run(self, **kwargs: Any) -> None:
        root = self.app.config.root_doc
        if self.document.get("docname", "") != root:
            return
        top = next(n for n in self.document.children if isinstance(n, nodes.section))
        captions = [n.get("caption") for n in self.env.get_doctree(root).findall(addnodes.toctree)]
        wrappers = list(_own_toctrees(top))
        parts: list[nodes.Node] = []
        for caption, wrapper in zip(captions, wrappers, strict=True):
            wrapper.parent.remove(wrapper)
            if caption:
                parts.append(
                    book_part(caption=caption, numbered=caption not in self.config.booklatex_plain_parts)
                )
            parts.append(wrapper)
        title = nodes.title("", self.config.booklatex_front_title)
        body = [n for n in top.children if not isinstance(n, nodes.title)]
        front = nodes.section("", title, *body, ids=top["ids"], names=[], docname=root)
        name = nodes.title("", self.config.project)
        top.children = []
        top["ids"] = []
        top.extend([name, book_page(docname=root), front, book_page_end(docname=root), *parts])


class WebOnly(SphinxPostTransform):
    """Leave out whole pages; a reference to them is printed without a link."""

    default_priority = 5  # before references are resolved
    formats = ("latex",)

    def run(self, **kwargs: Any) -> None:
        folders = tuple(self.config.booklatex_web_only)
        for page in list(self.document.findall(addnodes.start_of_file)):
            if page["docname"].startswith(folders):
                page.parent.remove(page)
        assert isinstance(self.app.builder, LaTeXBuilder)
        self.app.builder.docnames = {n for n in self.app.builder.docnames if not n.startswith(folders)}


class Trim(SphinxPostTransform):
    """Leave out what the HTML folds away or what only a screen can show."""

    default_priority = 840
    formats = ("latex",)

    def run(self, **kwargs: Any) -> None:
        for node in list(self.document.findall(nodes.Element)):
            classes = set(node.get("classes", ()))
            if not classes & HIDDEN or node.parent is None:
                continue
            if "tag_hide-input" in classes:
                _remove(node, "cell_input")
            elif "tag_hide-output" in classes:
                _remove(node, "cell_output")
            else:
                node.parent.remove(node)


def _remove(cell: nodes.Element, part: str) -> None:
    for node in list(cell.findall(nodes.container)):
        if part in node["classes"]:
            node.parent.remove(node)


def _own_toctrees(node: nodes.Element) -> Iterator[nodes.Element]:
    """The contents that a page itself holds, not those of the pages below it."""
    for child in node.children:
        if not isinstance(child, nodes.Element) or isinstance(child, addnodes.start_of_file):
            continue
        if "toctree-wrapper" in child.get("classes", ()):
            yield child
        else:
            yield from _own_toctrees(child)


class book_part(nodes.Element):  # noqa: N801 - node classes are lower case in docutils
    """A part of the book: ``caption``, ``numbered``."""


class book_page(nodes.Element):  # noqa: N801
    """Where the page ``docname`` begins."""


class book_page_end(nodes.Element):  # noqa: N801
    """Where the page ``docname`` ends."""


class BookTranslator(LaTeXTranslator):
    """Sphinx's LaTeX writer with the HTML's numbers and the book's boxes."""

    # ---- parts and pages

    def visit_book_part(self, node: nodes.Element) -> None:
        command = "bookpart" if node["numbered"] else "bookplainpart"
        self.body.append(f"\n\\{command}{{{self.encode(node['caption'])}}}\n")
        raise nodes.SkipNode

    def _mark(self, command: str, docname: str) -> None:
        self.body.append(f"\n\\{command}{{{docname}}}\n")

    def visit_book_page(self, node: nodes.Element) -> None:
        self._mark("bookpage", node["docname"])
        raise nodes.SkipNode

    def visit_book_page_end(self, node: nodes.Element) -> None:
        self._mark("bookpageend", node["docname"])
        raise nodes.SkipNode

    def _is_chapter(self) -> bool:
        return (
            self.sectionlevel == self.top_sectionlevel - 1
        )  # else its page lies inside another one's chapter

    def visit_start_of_file(self, node: nodes.Element) -> None:
        super().visit_start_of_file(node)
        docname = node["docname"]
        number = self.builder.env.toc_secnumbers.get(docname, {}).get("")
        if number and len(number) == 1:
            self.body.append(f"\n\\booknumbered{{{number[0] - 1}}}\n")
        elif not number:
            self.body.append("\n\\bookunnumbered\n")
        if self._is_chapter():
            self._mark("bookpage", docname)

    def depart_start_of_file(self, node: nodes.Element) -> None:
        if self._is_chapter():
            self._mark("bookpageend", node["docname"])
        super().depart_start_of_file(node)

    # ---- the HTML's numbers

    def _number(self, kind: str, node: nodes.Element) -> str:
        numbers = self.builder.env.toc_fignumbers.get(self.curfilestack[-1], {}).get(kind, {})
        found = next((numbers[i] for i in node.get("ids", ()) if i in numbers), ())
        return ".".join(map(str, found))

    def _announce(self, counter: str, number: str) -> None:
        if number:
            self.body.append(f"\n\\booknumber{{{counter}}}{{{number}}}")

    def visit_figure(self, node: nodes.Element) -> None:
        self._announce("figure", self._number("figure", node))
        super().visit_figure(node)

    def visit_table(self, node: nodes.Element) -> None:
        self._announce("table", self._number("table", node))
        super().visit_table(node)

    def visit_captioned_literal_block(self, node: nodes.Element) -> None:
        self._announce("literalblock", self._number("code-block", node))
        super().visit_captioned_literal_block(node)

    def visit_math_block(self, node: nodes.Element) -> None:
        number = self._number("displaymath", node)
        text = node.astext().strip()
        if "amsmath" in node["classes"] or node.get("nowrap"):
            for name in (
                "equation",
                "align",
                "gather",
                "multline",
                "eqnarray",
            ):  # MathJax numbers none of them
                text = text.replace(f"\\begin{{{name}}}", f"\\begin{{{name}*}}")
                text = text.replace(f"\\end{{{name}}}", f"\\end{{{name}*}}")
            self.body.append("\n" + text + "\n")
        else:
            text = "\n".join(line for line in text.splitlines() if line.strip())
            if "\\\\" in text and "\\begin{" not in text:
                text = f"\\begin{{split}}{text}\\end{{split}}"
            tag = f"\\tag{{{number}}}" if number else ""
            mark = (
                f"\\label{{equation:{node['docname']}:{node['label']}}}"
                if number and node.get("label")
                else ""
            )
            environment = "equation" if number else "equation*"
            anchor = self.hypertarget_to(node) if number else ""
            self.body.append(
                f"\n{anchor}\\begin{{{environment}}}{tag}{mark}\n{text}\n\\end{{{environment}}}\n"
            )
        raise nodes.SkipNode

    # ---- cells, cards, the head of a page

    def visit_container(self, node: nodes.Element) -> None:
        classes = node["classes"]
        if "page-head" in classes:
            self.body.append("\n\\begin{bookhead}\n")
        elif "sd-card" in classes:
            titles = [n for n in node.findall(nodes.container) if "sd-card-title" in n["classes"]]
            self.body.append(
                f"\n\\begin{{bookcard}}{{{self.encode(titles[0].astext()) if titles else ''}}}\n"
            )
        elif "sd-card-title" in classes:
            raise nodes.SkipNode
        elif "cell" in classes:
            lines = sum(block.astext().count("\n") + 2 for block in node.findall(nodes.literal_block))
            if lines <= TOGETHER:  # a short cell and what it prints share a page
                self.body.append(f"\n\\booktogether{{{lines}}}")
        if "cell_input" in classes:
            self.body.append("\n\\begin{bookinput}")
        elif "cell_output" in classes:
            self.body.append("\n\\begin{bookoutput}")
        elif "stderr" in classes or "traceback" in classes:
            self.body.append("\n\\begin{bookerror}")

    def depart_container(self, node: nodes.Element) -> None:
        classes = node["classes"]
        if "page-head" in classes:
            self.body.append("\n\\end{bookhead}\n")
        elif "sd-card" in classes:
            self.body.append("\n\\end{bookcard}\n")
        if "cell_input" in classes:
            self.body.append("\n\\end{bookinput}")
        elif "cell_output" in classes:
            self.body.append("\n\\end{bookoutput}")
        elif "stderr" in classes or "traceback" in classes:
            self.body.append("\n\\end{bookerror}")

    def visit_paragraph(self, node: nodes.Element) -> None:
        if "promise" in node["classes"]:
            self.body.append("\n\\bookpromise{")
        else:
            super().visit_paragraph(node)

    def depart_paragraph(self, node: nodes.Element) -> None:
        if "promise" in node["classes"]:
            self.body.append("}\n")
        else:
            super().depart_paragraph(node)

    def visit_bullet_list(self, node: nodes.Element) -> None:
        if "page-facts" in node["classes"]:
            self.body.append("\n\\begin{bookfacts}")
            for item in node.children:
                self.body.append(f"\\bookfact{{{self.encode(item.astext())}}}")
            self.body.append("\\end{bookfacts}\n")
            raise nodes.SkipNode
        super().visit_bullet_list(node)

    # ---- boxes

    def own_labels(self, node: nodes.Element) -> str:
        """Labels for a node's ids, but for those that a target before it has written already."""
        written: set[str] = set()
        before = node.parent.index(node) - 1
        while before >= 0 and isinstance(node.parent[before], nodes.target):
            target = node.parent[before]
            written |= {target.get("refid", ""), *target["ids"]}
            before -= 1
        ids = [i for i in node["ids"] if i not in written]
        return r"\phantomsection" + "".join(self.hypertarget(i, anchor=False) for i in ids) if ids else ""

    def _take_title(self, node: nodes.Element) -> str:
        title = next((n for n in node.children if isinstance(n, nodes.title)), None)
        if title is None:
            return ""
        node.remove(title)
        self.pushbody([])
        for child in title.children:
            child.walkabout(self)
        return "".join(self.popbody()).strip()

    def open_box(self, kind: str, head: str, labels: str = "") -> None:
        self.body.append(f"\n{labels}\\begin{{bookbox}}{{{kind}}}{{{head}}}\n")
        self.no_latex_floats += 1
        if self.table:
            self.table.has_problematic = True

    def close_box(self) -> None:
        self.body.append("\n\\end{bookbox}\n")
        self.no_latex_floats -= 1

    def visit_admonition(self, node: nodes.Element) -> None:
        if _is_proof(node):
            self.body.append("\n\\begin{bookproof}\n")
            return
        kinds = [c for c in node["classes"] if c in BOXES]
        self.open_box(kinds[0] if kinds else "note", self._take_title(node), self.own_labels(node))

    def depart_admonition(self, node: nodes.Element) -> None:
        if _is_proof(node):
            self.body.append("\n\\end{bookproof}\n")
        else:
            self.close_box()

    def _visit_named_admonition(self, node: nodes.Element) -> None:
        self.open_box(node.tagname, self.encode(admonitionlabels[node.tagname]))

    def _depart_named_admonition(self, node: nodes.Element) -> None:
        self.close_box()

    visit_attention = visit_caution = visit_danger = visit_error = visit_hint = _visit_named_admonition
    visit_important = visit_note = visit_tip = visit_warning = visit_seealso = _visit_named_admonition
    depart_attention = depart_caution = depart_danger = depart_error = depart_hint = _depart_named_admonition
    depart_important = depart_note = depart_tip = depart_warning = depart_seealso = _depart_named_admonition

    def visit_topic(self, node: nodes.Element) -> None:
        if "contents" in node["classes"]:
            raise nodes.SkipNode  # the margin of a screen has it, paper does not
        self.open_box("note", self._take_title(node))

    def depart_topic(self, node: nodes.Element) -> None:
        self.close_box()

    # ---- theorems (sphinx-proof)

    def visit_theorem_like(self, node: nodes.Element) -> None:
        kind, counter = node["realtype"], node.get("countertype", "")
        number = "" if type(node).__name__ == "unenumerable_node" else self._number(counter, node)
        name = self.encode(kind.title()) + (f" {number}" if number else "")
        given = self._take_title(node)
        if given:
            name += f"\\bookboxtitle{{{given.removeprefix('(').removesuffix(')')}}}"
        label = rf"\label{{{self.curfilestack[-1]}:{node['label']}}}"
        self.open_box("theorem" if kind not in BOXES else kind, name, r"\phantomsection" + label)

    def depart_theorem_like(self, node: nodes.Element) -> None:
        self.close_box()

    # ---- small matters

    def visit_transition(self, node: nodes.Element) -> None:
        self.body.append("\n\\booktransition\n")


def _is_proof(node: nodes.Element) -> bool:
    return "proof" in node["classes"] and type(node.parent).__name__ == "proof_node"


BOXES = frozenset(
    {
        "attention", "caution", "danger", "error", "hint", "important", "note", "tip", "warning",
        "seealso", "theorem", "lemma", "proposition", "corollary", "definition", "axiom", "conjecture",
        "property", "observation", "assumption", "remark", "example", "algorithm", "notation",
        "criterion", "predict", "quiz", "exercise", "exercise-card", "solution", "recorded", "page-code",
        "published", "cite", "pagehead", "answers",
    }
)  # fmt: skip


def _register(app: Sphinx) -> None:
    """sphinx-proof brings LaTeX visitors of its own, which win over the translator's: take them out."""
    handlers = app.registry.translation_handlers.setdefault("latex", {})
    try:
        from sphinx_proof.nodes import NODE_TYPES, unenumerable_node
    except ImportError:
        return
    for cls in {*NODE_TYPES.values(), unenumerable_node}:
        handlers[cls.__name__] = (BookTranslator.visit_theorem_like, BookTranslator.depart_theorem_like)


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_config_value("booklatex_subtitle", "", "", [str])
    app.add_config_value("booklatex_licence", "", "", [str])
    app.add_config_value("booklatex_front_title", "The learning path", "", [str])
    app.add_config_value("booklatex_web_only", [], "", [list])  # folders of pages
    app.add_config_value("booklatex_plain_parts", ["Appendices"], "", [list])
    app.add_node(book_part)
    app.add_node(book_page)
    app.add_node(book_page_end)
    app.connect("config-inited", _configure, priority=950)
    app.connect("builder-inited", _prepare, priority=950)
    app.add_post_transform(WebOnly)
    app.add_post_transform(Trim)
    app.add_post_transform(Arrange)
    app.set_translator("latex", BookTranslator, override=True)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
