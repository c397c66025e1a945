"""The parts that every page of the book has: its head, its boxes to predict in, its quiz.

``{page-head}`` (options ``promise``, ``minutes``, ``runs-on``): the promise in one line, then how long the
page takes, what it runs on, and links to its notebook and its PDF.

``{predict}``: a box *Predict, then run*, for the question that stands before the cell which answers it.

``{quiz}``: one question, as the argument or as the first paragraphs, and its options. An option's first
line is what may be chosen, the rest explains it::

    ```{quiz} What does dividing by √d keep constant?
    - [x] The variance of the scores.
      Each score is a sum of d products; its variance grows with d.
    - [ ] Their mean.
      The mean is zero with or without the factor.
    ```

On a screen each option is folded over its explanation (``details``, so that the keyboard opens it); on
paper the answers stand after the last of the questions that follow one another.
"""

from __future__ import annotations

import os
import re
from typing import Any, ClassVar

from citation import pdf_link
from docutils import nodes
from docutils.parsers.rst import directives
from notebooks import has_notebook
from sphinx.application import Sphinx
from sphinx.errors import ExtensionError
from sphinx.transforms.post_transforms import SphinxPostTransform
from sphinx.util.docutils import SphinxDirective
from sphinx.util.osutil import relative_uri
from sphinx.writers.html5 import HTML5Translator

NOTEBOOK = "_notebooks/{docname}.ipynb"
PDF_SWITCH = "TEXTBOOK_CODE_PDF"  # set to 1 by the build that also makes the PDF
_MARK = re.compile(r"^\[([ xX])\]\s*")


class page_links(nodes.Element):  # noqa: N801 - node classes are lower case in docutils
    """Replaced by the links to a page's downloads, where the builder has them."""


class quiz(nodes.Element):  # noqa: N801
    """A question: its text, then a ``quiz_option`` for each option."""


class quiz_option(nodes.Element):  # noqa: N801
    """``letter``, ``right``; the option's text, then its explanation."""


class PageHead(SphinxDirective):
    """``{page-head}``"""

    has_content = False
    option_spec: ClassVar[dict[str, Any]] = {
        "promise": directives.unchanged_required,
        "minutes": directives.positive_int,
        "runs-on": directives.unchanged_required,
    }

    def run(self) -> list[nodes.Node]:
        missing = [name for name in ("promise", "minutes", "runs-on") if name not in self.options]
        if missing:
            raise self.error(
                f"page-head: expected the options promise, minutes and runs-on; missing: {missing}"
            )
        promise, problems = self.parse_inline(self.options["promise"], lineno=self.lineno)
        runs_on, more = self.parse_inline(self.options["runs-on"], lineno=self.lineno)
        facts = nodes.bullet_list(
            "",
            _fact("Reading time", [nodes.Text(f"{self.options['minutes']} minutes")]),
            _fact("Runs on", runs_on),
            page_links(docname=self.env.docname),
            classes=["page-facts"],
        )
        head = nodes.container("", nodes.paragraph("", "", *promise, classes=["promise"]), facts)
        head["classes"] = ["page-head"]
        return [head, *problems, *more]


def _fact(name: str, value: list[nodes.Node]) -> nodes.list_item:
    label = nodes.inline("", name + ":", classes=["fact-name"])
    return nodes.list_item("", nodes.paragraph("", "", label, nodes.Text(" "), *value))


class Predict(SphinxDirective):
    """``{predict}``"""

    has_content = True
    optional_arguments = 1
    final_argument_whitespace = True

    def run(self) -> list[nodes.Node]:
        self.assert_has_content()
        title, problems = self.parse_inline(
            self.arguments[0] if self.arguments else "Predict, then run", lineno=self.lineno
        )
        box = nodes.admonition("", nodes.title("", "", *title), classes=["predict"])
        box += self.parse_content_to_nodes(allow_section_headings=False)
        return [box, *problems]


class Quiz(SphinxDirective):
    """``{quiz}``"""

    has_content = True
    optional_arguments = 1
    final_argument_whitespace = True
    option_spec: ClassVar[dict[str, Any]] = {"name": directives.unchanged}

    def run(self) -> list[nodes.Node]:
        self.assert_has_content()
        parts = self.parse_content_to_nodes(allow_section_headings=False)
        problems: list[nodes.Node] = []
        if self.arguments:
            asked, more = self.parse_inline(self.arguments[0], lineno=self.lineno)
            parts.insert(0, nodes.paragraph("", "", *asked))
            problems += more
        if len(parts) < 2 or not isinstance(parts[-1], nodes.bullet_list):
            raise self.error("quiz: expected a question, then a list of options")
        options = [self._option(item, letter) for item, letter in zip(parts[-1], "ABCDEFGH", strict=False)]
        if len(options) != len(parts[-1]):
            raise self.error(f"quiz: expected at most 8 options, got {len(parts[-1])}")
        if len(options) < 2 or not any(option["right"] for option in options):
            raise self.error("quiz: expected two options or more, of which at least one is right: - [x]")
        node = quiz("", nodes.container("", *parts[:-1], classes=["quiz-question"]), *options)
        self.add_name(node)
        return [node, *problems]

    def _option(self, item: nodes.Node, letter: str) -> quiz_option:
        assert isinstance(item, nodes.list_item)
        first = item[0] if len(item) else None
        mark = _MARK.match(first.astext()) if isinstance(first, nodes.paragraph) else None
        if mark is None or not isinstance(first, nodes.paragraph) or not isinstance(first[0], nodes.Text):
            raise self.error(
                f"quiz: expected option {letter} to begin with [ ] or [x], got {item.astext()[:40]!r}"
            )
        first.replace(first[0], nodes.Text(_MARK.sub("", first[0])))
        text, rest = _first_line(first)
        why = nodes.container("", *rest, *item.children[1:], classes=["quiz-why"])
        if not len(why):
            raise self.error(f"quiz: expected option {letter} to be explained, in the lines below it")
        return quiz_option("", text, why, letter=letter, right=mark[1] in "xX")


def _first_line(paragraph: nodes.paragraph) -> tuple[nodes.paragraph, list[nodes.paragraph]]:
    """A paragraph's first line, and what follows it as a paragraph of its own, if anything does."""
    for i, child in enumerate(paragraph.children):
        if isinstance(child, nodes.Text) and "\n" in child:
            before, after = child.split("\n", 1)
            text = nodes.paragraph("", "", *paragraph.children[:i], nodes.Text(before))
            return text, [nodes.paragraph("", "", nodes.Text(after), *paragraph.children[i + 1 :])]
    return paragraph, []


class PageLinks(SphinxPostTransform):
    """The notebook's and the PDF's address depend on the builder: filled in when pages are written."""

    default_priority = 100

    def run(self, **kwargs: Any) -> None:
        for node in list(self.document.findall(page_links)):
            docname = node["docname"]
            links = []
            if self.app.builder.format == "html":
                here = self.app.builder.get_target_uri(docname)
                notebook = NOTEBOOK.format(docname=docname)
                if "notebooks" in self.app.extensions and has_notebook(self.app, docname):
                    links.append(("Download the notebook", relative_uri(here, notebook)))
                pdf = pdf_link(self.app, docname)
                if pdf:
                    links.append(("This page as PDF", pdf))
            node.replace_self([_link(*link) for link in links])


def _link(text: str, uri: str) -> nodes.list_item:
    reference = nodes.reference("", text, refuri=uri, internal=True, classes=["page-download"])
    return nodes.list_item("", nodes.paragraph("", "", reference))


def _visit_quiz_html(self: HTML5Translator, node: quiz) -> None:
    self.body.append(self.starttag(node, "div", CLASS="quiz"))


def _depart_quiz_html(self: HTML5Translator, node: quiz) -> None:
    self.body.append("</div>\n")


def _visit_option_html(self: HTML5Translator, node: quiz_option) -> None:
    verdict = "right" if node["right"] else "wrong"
    self.body.append(f'<details class="quiz-option {verdict}">\n<summary><span class="quiz-letter">')
    self.body.append(f'{node["letter"]}</span><span class="quiz-text">')
    for child in node[0].children:
        child.walkabout(self)
    said = "Right." if node["right"] else "Not this one."
    self.body.append(f'</span></summary>\n<p class="quiz-verdict">{said}</p>\n')
    node[1].walkabout(self)
    self.body.append("</details>\n")
    raise nodes.SkipNode


def _is_last(node: quiz) -> bool:
    following = node.next_node(
        descend=False, siblings=True, condition=lambda n: not isinstance(n, nodes.target)
    )
    return not isinstance(following, quiz)


def _run_of(node: quiz) -> list[quiz]:
    """The questions that stand together, up to this one."""
    found = [node]
    for before in reversed(node.parent.children[: node.parent.index(node)]):
        if isinstance(before, nodes.target):
            continue
        if not isinstance(before, quiz):
            break
        found.insert(0, before)
    return found


def _visit_quiz_latex(self: Any, node: quiz) -> None:
    number = len(_run_of(node))
    labels = self.own_labels(node)
    self.open_box("quiz", f"Question {number}", labels)
    node[0].walkabout(self)
    self.body.append("\n\\begin{bookoptions}\n")
    for option in node[1:]:
        self.body.append(f"\\item[{option['letter']}] ")
        for child in option[0].children:
            child.walkabout(self)
        self.body.append("\n")
    self.body.append("\\end{bookoptions}\n")
    self.close_box()
    if _is_last(node):
        self.open_box("answers", "Answers")
        for question, asked in enumerate(_run_of(node), 1):
            self.body.append(f"\\par\\textbf{{Question {question}.}}\n\\begin{{bookoptions}}\n")
            for option in asked[1:]:
                verdict = "Right." if option["right"] else "Not this one."
                self.body.append(f"\\item[{option['letter']}] \\textit{{{verdict}}} ")
                option[1].walkabout(self)
                self.body.append("\n")
            self.body.append("\\end{bookoptions}\n")
        self.close_box()
    raise nodes.SkipNode


def _visit_quiz_text(self: Any, node: quiz) -> None:
    pass


def _unknown(self: Any, node: nodes.Element) -> None:
    raise ExtensionError(f"{type(node).__name__}: left in the tree; pageparts replaces it before writing")


def _page_pdfs(app: Sphinx, config: Any) -> None:
    if os.environ.get(PDF_SWITCH) == "1":
        config.page_pdfs = True


def setup(app: Sphinx) -> dict[str, Any]:
    app.setup_extension("citation")
    app.add_node(page_links, html=(_unknown, None), latex=(_unknown, None))
    app.add_node(
        quiz,
        html=(_visit_quiz_html, _depart_quiz_html),
        latex=(_visit_quiz_latex, None),
        text=(_visit_quiz_text, _visit_quiz_text),
    )
    app.add_node(quiz_option, html=(_visit_option_html, None), text=(_visit_quiz_text, _visit_quiz_text))
    app.add_directive("page-head", PageHead)
    app.add_directive("predict", Predict)
    app.add_directive("quiz", Quiz)
    app.add_post_transform(PageLinks)
    app.connect("config-inited", _page_pdfs)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
