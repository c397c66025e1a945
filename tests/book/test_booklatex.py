"""The printed book: the same numbers as on the screen, parts and chapters, boxes, vectors."""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path

import booklatex
import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = yaml.safe_load((ROOT / "_config.yml").read_text("utf-8"))["sphinx"]["config"]
PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)
PDF = b"%PDF-1.4\n1 0 obj<</Type/Catalog/Pages 2 0 R>>endobj\n"
SVG = '<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"><path d="M0 0h9v9z"/></svg>'
CONF = (
    """
extensions = ["myst_nb", "sphinx_design", "sphinx_proof", "sphinx_external_toc", "sphinx_multitoc_numbering",
              "bookfixes", "booklatex"]
external_toc_path = "_toc.yml"
source_suffix = {".md": "myst-nb", ".ipynb": "myst-nb"}  # the default is shared by all builds of a process
root_doc = "index"
project = "Pixels, and Logits"
author = "The authors"
copyright = "2026, them"
numfig = math_numfig = True
numfig_secnum_depth = 1
nb_execution_mode = "off"
prf_realtyp_to_countertyp = {"definition": "theorem"}
booklatex_subtitle = "With 100 % proof"
booklatex_front_title = "Before"
booklatex_web_only = ["web/"]
"""
    + f"nb_mime_priority_overrides = {SETTINGS['nb_mime_priority_overrides']!r}\n"
)
TOC = """
format: jb-book
root: index
parts:
  - caption: First part
    chapters: [{file: map}]
  - numbered: 3
    chapters: [{file: one}, {file: two}]
  - caption: Appendices
    chapters: [{file: appendix, sections: [{file: below}, {file: web/more}]}]
"""
CHAPTER = """
(NAME)=
# Chapter NAME

See {numref}`fig-NAME`, {numref}`tab-NAME`, {eq}`eq-NAME` and {prf:ref}`thm-NAME`.

```{figure} dot.png
:name: fig-NAME
:alt: a dot

A dot.
```

```{table} Some figures.
:name: tab-NAME

| a | b |
|---|---|
| 1 | 2 |
```

$$ x = y $$ (eq-NAME)

$$
a &= b \\\\
  &= c
$$

\\begin{align}
p &= q
\\end{align}

```{prf:definition} A thing
:label: def-NAME
It is so.
```

```{prf:theorem} Given
:label: thm-NAME
It holds.
```

```{prf:proof}
It follows.
```

```{admonition} My own words
:class: tip
:name: box-NAME
Inside.
```

:::{dropdown} A question
An answer.
:::

```{code-block} python
:caption: A listing
:name: code-NAME
x = 1
```
"""

MAP = """
# The map

{ref}`start`

```{figure} dot.png
:name: fig-map
:alt: a dot

A map.
```
"""


def notebook() -> str:
    image = {
        "output_type": "display_data",
        "metadata": {},
        "data": {
            "image/svg+xml": SVG,
            "application/pdf": base64.b64encode(PDF).decode(),
            "text/plain": "<Figure>",
        },
    }
    cells = [
        {"cell_type": "markdown", "id": "a", "metadata": {}, "source": "# Appendix\n\n| a |\n|---|\n| 1 |\n"},
        {"cell_type": "code", "id": "b", "metadata": {}, "execution_count": 1, "source": "draw()",
         "outputs": [image]},
        {"cell_type": "code", "id": "c", "metadata": {"tags": ["hide-input"]}, "execution_count": 2,
         "source": "hidden_input()",
         "outputs": [{"output_type": "stream", "name": "stdout", "text": "shown_output\n"}]},
        {"cell_type": "code", "id": "d", "metadata": {"tags": ["hide-cell"]}, "execution_count": 3,
         "source": "hidden_cell()", "outputs": []},
    ]  # fmt: skip
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    return json.dumps({"nbformat": 4, "nbformat_minor": 5, "metadata": kernel, "cells": cells})


@pytest.fixture(scope="module")
def book(make_book, tmp_path_factory):
    """HTML and LaTeX of one book."""
    tiny = make_book(tmp_path_factory.mktemp("book"), (), conf=CONF)
    tiny.write(
        {
            "_toc.yml": TOC,
            "index.md": "(start)=\n# Pixels, and Logits\n\nHello, {ref}`one`.\n\n## How to read\n\nSlowly.\n",
            "map.md": MAP,
            "one.md": CHAPTER.replace("NAME", "one"),
            "two.md": CHAPTER.replace("NAME", "two"),
            "appendix.ipynb": notebook(),
            "below.md": "# Below\n\nText; {ref}`the web <more>`.\n",
            "web/more.md": "(more)=\n# More on the web\n\nOnly there; {ref}`one`.\n",
        }
    )
    (tiny.root / "dot.png").write_bytes(PNG)
    out = {name: tiny.build(name) for name in ("latex", "html")}
    for built in out.values():
        assert built.warnings == []
    return out


@pytest.fixture(scope="module")
def tex(book) -> str:
    return next(book["latex"].out.glob("*.tex")).read_text("utf-8")


def plain(html: str) -> str:
    return " ".join(re.sub(r"<[^>]+>", "", html).split())


def test_the_order_of_a_book(tex: str) -> None:
    marks = [
        "\\input{titlepage.inc}", "\\bookcontents", "\\bookpage{index}", "\\chapter{Before}",
        "\\section{How to read}", "\\bookpageend{index}", "\\bookpart{First part}", "\\bookpage{map}",
        "\\chapter{The map}", "\\bookpage{one}", "\\chapter{Chapter one}", "\\bookpageend{one}",
        "\\bookpage{two}",
        "\\bookplainpart{Appendices}", "\\bookpage{appendix}", "\\chapter{Appendix}", "\\section{Below}",
        "\\bookpageend{appendix}", "\\bookindex",
    ]  # fmt: skip
    places = [tex.index(mark) for mark in marks]
    assert places == sorted(places)
    assert "\\bookpage{below}" not in tex  # it lies within another chapter's pages


def test_pages_for_the_web_alone_are_left_out(book, tex: str) -> None:
    assert "Only there" not in tex and "web/more" not in tex  # nor is there a link to it
    assert "{the web}" in tex and "hyperref[\\detokenize{web" not in tex
    assert "Only there" in (book["html"].out / "web/more.html").read_text("utf-8")


def test_chapters_carry_the_numbers_of_the_html(book, tex: str) -> None:
    assert re.findall(r"\\(booknumbered\{\d\}|bookunnumbered)\s+\\bookpage\{(\w+)\}", tex) == [
        ("bookunnumbered", "map"), ("booknumbered{0}", "one"), ("booknumbered{1}", "two"),
        ("bookunnumbered", "appendix"),
    ]  # fmt: skip
    for name, number in (("one", "1"), ("two", "2")):
        assert f"<h1>{number}. Chapter" in re.sub(r"</?span[^>]*>", "", book["html"].text(f"{name}.html"))


def test_every_other_number_is_the_htmls(book, tex: str) -> None:
    for name in ("one", "two"):
        page = plain(book["html"].text(f"{name}.html"))
        chapter = tex[tex.index(f"\\bookpage{{{name}}}") : tex.index(f"\\bookpageend{{{name}}}")]
        written = dict(re.findall(r"\\booknumber\{(\w+)\}\{([\d.]+)\}", chapter))
        equation = re.search(rf"\\tag\{{([\d.]+)\}}\\label\{{equation:{name}:eq-{name}\}}", chapter)
        theorem = re.search(r"\{theorem\}\{Theorem ([\d.]+)\\bookboxtitle\{Given\}\}", chapter)
        assert equation
        assert theorem
        assert (
            f"See Fig. {written['figure']}, Table {written['table']}, ({equation[1]}) "
            f"and Theorem {theorem[1]}." in page
        )
        assert theorem[1].endswith(".2")  # after the definition, which counts with it
        assert f"Listing {written['literalblock']}" in page
    figure = re.search(r"\\booknumber\{figure\}\{(\d)\}", tex[: tex.index("\\bookpage{one}")])
    assert figure
    assert f"Fig. {figure[1]} A map." in plain(book["html"].text("map.html"))


def test_only_labelled_equations_are_numbered(tex: str) -> None:
    assert "\\begin{align*}\np &= q\n\\end{align*}" in tex
    assert "\\begin{align}" not in tex
    assert "\\begin{equation*}\n\\begin{split}a &= b" in tex
    assert tex.count("\\tag{") == 2


def test_boxes(tex: str) -> None:
    assert "\\begin{bookbox}{tip}{My own words}" in tex
    assert re.search(r"\\begin\{bookbox\}\{definition\}\{Definition 1\.1\\bookboxtitle\{A thing\}\}", tex)
    assert re.search(r"\\begin\{bookproof\}\s+\\sphinxAtStartPar\s+\\sphinxstyleemphasis\{Proof\.", tex)
    assert tex.count("\\begin{bookbox}") == tex.count("\\end{bookbox}") == 6
    assert "sphinxadmonition" not in tex


def test_labels_are_written_once(tex: str) -> None:
    labels = re.findall(r"\\label\{(.*?)\}+", tex)
    assert len(labels) > 10
    assert sorted(set(labels)) == sorted(labels)
    for target in re.findall(r"\\hyperref\[\\detokenize\{(.*?)\}\]", tex):
        assert any(target in label for label in labels), target


def test_figures_are_vectors_in_both(book, tex: str) -> None:
    page = book["html"].text("appendix.html")
    assert re.search(r'<img[^>]+src="_images/\w+\.svg"', page)
    assert ".pdf" not in page
    drawn = re.findall(r"\\sphinxincludegraphics\{\{(\w+)\}\.(\w+)\}", tex)
    assert [kind for name, kind in drawn if name != "dot"] == ["pdf"]
    assert (book["latex"].out / ".".join(drawn[-1])).read_bytes() == PDF


def test_what_the_html_folds_is_left_out(tex: str) -> None:
    assert "hidden_input" not in tex
    assert "hidden_cell" not in tex
    assert "shown_output" in re.sub(r"\\sphinxhyphen\{\}|\\PYGZus\{\}", "_", tex.replace("\\_", "_"))
    assert tex.count("\\begin{bookinput}") == tex.count("\\end{bookinput}") == 1


def test_the_title_page_knows_the_book(tex: str) -> None:
    assert "\\newcommand*{\\booksubtitle}{With 100 \\% proof}" in tex
    assert "\\newcommand*{\\booktitlelines}{Pixels,\\\\ and Logits}" in tex
    assert "\\newcommand*{\\bookyear}{2026}" in tex
    assert "\\newcommand*{\\bookurl}{}" in tex


def test_latex_gets_its_own_files_and_one_document(book) -> None:
    """Every ``.tex`` there would be made into a PDF, so that what is only read is named ``.inc``."""
    assert len(list(book["latex"].out.glob("*.tex"))) == 1
    for name in booklatex.FILES:
        assert (book["latex"].out / name).read_bytes() == (booklatex.LOOK / name).read_bytes()
    tex = "".join((booklatex.LOOK / name).read_text("utf-8") for name in booklatex.FILES)
    for kind in booklatex.BOXES:
        assert re.search(rf"\\bookboxcolour\{{[^}}]*\b{kind}\b", tex), f"no colour for the box {kind!r}"
