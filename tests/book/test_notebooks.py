"""The notebooks that readers download: plain Markdown, the page's own cells, and they run elsewhere."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nbformat
import pytest
from docutils import nodes
from docutils.core import publish_doctree
from myst_parser.docutils_ import Parser
from notebooks import Translator
from sphinx.errors import ExtensionError

ROOT = Path(__file__).resolve().parents[2]
BUILT = Path(os.environ.get("TEXTBOOK_CODE_BUILD") or ROOT / "_build") / "html" / "_notebooks"

# Traces of the book's own syntax, in Markdown that is not code.
MYST = {
    "role": re.compile(r"\{[a-z][\w:-]*\}`"),
    "directive": re.compile(r"^\s*(`{3,}|~{3,}|:{3,})\{", re.MULTILINE),
    "colon fence": re.compile(r"^\s*:{3,}", re.MULTILINE),
    "label": re.compile(r"^\([\w-]+\)=", re.MULTILINE),
    "option": re.compile(r"^:[a-z-]+:", re.MULTILINE),
    "comment": re.compile(r"^%", re.MULTILINE),
    "equation label": re.compile(r"^\$\$ *\(", re.MULTILINE),
    "unresolved reference": re.compile(r"\]\((?!https?:|mailto:|attachment:)"),
    "markup of the screen": re.compile(r"<(svg|div|span|script)\b"),
}


def traces(markdown: str) -> list[str]:
    """The names of what is left of the book's syntax."""
    prose = re.sub(r"^( *>? *)(`{3,})(?!\{).*?^\1\2", "", markdown, flags=re.MULTILINE | re.DOTALL)
    prose = re.sub(r"(`+)(?!`).+?(?<!`)\1(?!`)", "`code`", prose)
    return [name for name, pattern in MYST.items() if pattern.search(prose)]


def read(text: str) -> nodes.document:
    """What Markdown means."""
    syntax = ["dollarmath", "amsmath", "colon_fence", "deflist"]
    settings = {"myst_enable_extensions": syntax, "report_level": 5}
    return publish_doctree(text, parser=Parser(), settings_overrides=settings)


def translate(text: str) -> str:
    """A piece of MyST as the notebook prints it."""
    settings = {
        "myst_enable_extensions": ["dollarmath", "amsmath", "colon_fence", "deflist"],
        "report_level": 5,
    }
    tree = publish_doctree(text, parser=Parser(), settings_overrides=settings)
    env = SimpleNamespace(toc_fignumbers={}, toc_secnumbers={})
    app: Any = SimpleNamespace(
        env=env, config=SimpleNamespace(html_baseurl="", numfig=False), srcdir=str(ROOT)
    )
    translator = Translator(app, "page", {})
    return translator.blocks(tree.children)


# ---------------------------------------------------------------- the translation


@pytest.mark.parametrize(
    "text",
    [
        "A *word*, **another** and `code | pipe`.",
        "Inline $a_i | b$ and\n\n$$\n\\frac{1}{2}\n$$",
        "- one\n- two\n\n  with a second paragraph\n- three",
        "1. one\n2. two\n   - nested\n   - list",
        "```\nprint('*not emphasis*')\n```",
        "> A quotation.",
        "[A link](https://example.org/a_b)",
    ],
)
def test_plain_markdown_means_the_same(text: str) -> None:
    """What needs no translation: reading the translation gives the tree that reading the text gave."""
    assert read(translate(text)).pformat() == read(text).pformat()


@pytest.mark.parametrize(
    "text",
    [
        "2. of May",
        "1) no",
        "# no heading",
        "- no item",
        "+ no item",
        "> no quotation",
        "5 * 3 * 2 = $30 and $40",
        "snake_case and _edges_",
        "a `tick",
        "<b>no tag</b>",
        "[x](y)",
        "back\\slash",
    ],
)
def test_text_is_printed_as_it_stands(text: str) -> None:
    tree = nodes.paragraph("", text)
    env = SimpleNamespace(toc_fignumbers={}, toc_secnumbers={})
    app: Any = SimpleNamespace(env=env, config=SimpleNamespace(html_baseurl="", numfig=False))
    markdown = Translator(app, "page", {}).block(tree)
    meant = read(markdown)
    assert [type(child) for child in meant.children] == [nodes.paragraph]
    assert [type(child) for child in meant[0].children] == [nodes.Text]
    assert meant.astext() == text


def test_boxes_become_quotations() -> None:
    text = ":::{admonition} A *title*\n:class: objectives\n1. first $x$\n\n```\ncode()\n```\n:::"
    assert translate(text) == ("> **A *title***\n>\n> 1. first $x$\n>\n> ```\n> code()\n> ```")
    assert translate("```{warning}\nLook out.\n```") == "> **Warning**\n>\n> Look out."


def test_tables_become_rows() -> None:
    head = "* - a\n  - $\\|x\\| | y$\n"
    text = f"```{{list-table}} A title\n:header-rows: 1\n\n{head}* - `b | c`\n  - d\n\n    e\n```"
    assert translate(text) == (
        "A title\n\n| a | $\\Vert x\\Vert  \\vert  y$ |\n| --- | --- |\n| `b \\| c` | d<br>e |"
    )


def test_definitions_and_images() -> None:
    assert translate("Term\n: Its meaning.") == "- **Term**: Its meaning."
    assert translate("![an alt](https://example.org/x.png)") == "![an alt](https://example.org/x.png)"


def test_what_cannot_be_translated_is_an_error() -> None:
    with pytest.raises(ExtensionError, match="no translation of system_message in page"):
        translate("```{nothing-of-this-name}\n```")


def test_traces_are_found() -> None:
    """The checks below can fail: each pattern finds what it looks for."""
    for name, text in {
        "role": "see {ref}`x`",
        "directive": "```{note}\n```",
        "colon fence": ":::note",
        "label": "(here)=",
        "option": ":name: x",
        "comment": "% hidden",
        "equation label": "$$ (eq-x)",
        "unresolved reference": "[a](b.md)",
        "markup of the screen": "<svg>",
    }.items():
        assert name in traces(text), name
    assert not traces("Text with `code`, `{p}`, $x$ and\n\n```python\nf'{a}`'\n```\n\n> [a](https://b)")


# ---------------------------------------------------------------- the whole way, on a page of our own

PAGE = """---
jupytext:
  text_representation: {extension: .md, format_name: myst}
kernelspec: {display_name: Python 3, language: python, name: python3}
---

(here)=
# A page

```{page-head}
:promise: A promise.
:minutes: 5
:runs-on: CPU
```

See {ref}`there`, {cite:p}`devlin2019bert` and equation {eq}`eq-one`.

$$
x = 1
$$ (eq-one)

```{code-cell} ipython3
:tags: [remove-cell]
hidden = 1
```

```{code-cell} ipython3
:tags: [hide-input]
hidden + 1
```

(there)=
## Another section

```{predict}
What will it be?
```

```{quiz} Which?
- [x] This one.
  Because.
- [ ] That one.
  Not so.
```

```{exercise-card} attention/by-hand
```

```{code-cell} ipython3
last = 3
```
"""


def test_a_page_as_a_notebook(make_book: Any, tmp_path: Path) -> None:
    from textbook_code.exercises import find

    book = make_book(tmp_path, ("myst_nb", "pageparts", "solutions", "notebooks"))
    book.write({"index.md": PAGE, "CITATION.cff": (ROOT / "CITATION.cff").read_text("utf-8")})
    book.write({"other.md": "---\norphan: true\n---\n# No code\n\n```{bibliography}\n```\n"})
    book.conf = "extensions.remove('myst_parser')\nnb_execution_mode = 'off'\n"
    made = book.build()
    folder = made.out / "_notebooks"
    assert [path.name for path in folder.rglob("*.ipynb")] == ["index.ipynb"]
    assert 'href="_notebooks/index.ipynb"' in made.text("index.html")
    notebook = nbformat.read(folder / "index.ipynb", as_version=4)
    nbformat.validate(notebook)
    exercise = find("attention/by-hand")
    code = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    assert code == [
        "hidden = 1",
        "hidden + 1",
        exercise.starter.strip(),
        f"from textbook_code.exercises import check\n\n{exercise.check_line}",
        "last = 3",
    ]
    shown = [cell.metadata.get("jupyter") for cell in notebook.cells if cell.cell_type == "code"]
    assert shown == [None, {"source_hidden": True}, None, None, None]
    text = "\n\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    assert not traces(text)
    assert text.startswith("# A page\n\n> A page of *")
    assert "*A promise.*\n\n- Reading time: 5 minutes\n- Runs on: CPU\n\n" in text
    assert "See Another section, [Devlin and Chang, 2019] and equation (1)." in text
    assert "$$\nx = 1\n\\tag{1}\n$$" in text
    assert "> **Predict, then run**\n>\n> What will it be?" in text
    assert "- **A.** This one.\n- **B.** That one." in text
    assert "- **A.** *Right.* Because." in text
    assert f"**★ {exercise.title}**" in text
    assert "<summary>A hint</summary>" in text
    assert re.search(r"## References\n\n- Jacob Devlin and Ming-Wei Chang\. .*2019", text)


# ---------------------------------------------------------------- the book's own notebooks; need `make book`


def built() -> list[Path]:
    return sorted(BUILT.rglob("*.ipynb"))


@pytest.mark.browser
def test_every_page_with_code_has_a_notebook_and_no_other() -> None:
    from execute import Book

    assert {path.relative_to(BUILT).with_suffix("").as_posix() for path in built()} == {
        page.name for page in Book(ROOT).pages
    }


@pytest.mark.browser
def test_notebooks_hold_their_pages_cells_and_no_trace_of_the_book() -> None:
    from execute import Book

    for page in Book(ROOT).pages:
        notebook = nbformat.read(BUILT / f"{page.name}.ipynb", as_version=4)
        nbformat.validate(notebook)
        code = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
        position = -1
        for cell in page.notebook.cells:
            if cell.cell_type == "code":
                assert cell.source in code[position + 1 :], f"{page.name}: {cell.source[:60]}"
                position = code.index(cell.source, position + 1)
        for cell in notebook.cells:
            if cell.cell_type == "markdown":
                assert not traces(cell.source), f"{page.name}: {cell.source[:300]}"
            if "myst" in str(cell.metadata):
                pytest.fail(f"{page.name}: {cell.metadata}")


@pytest.mark.browser
@pytest.mark.parametrize("name", ["attention", "encoder-only", "pixels-to-person"])
def test_notebook_runs_outside_the_repository(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the installed package alone: another folder, a kernel of its own, nothing of the book at hand."""
    from nbclient import NotebookClient

    path = next((path for path in built() if path.stem == name), None)
    assert path, f"{BUILT}: no notebook of {name}; run `make html` first"
    monkeypatch.chdir(tmp_path)
    for variable in ("PYTHONPATH", "TEXTBOOK_CODE_BUILD"):
        monkeypatch.delenv(variable, raising=False)
    for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.setenv(variable, "1")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}})
    client.execute()
    said = [
        str(output.get("data", {}).get("text/plain", output.get("text", "")))
        for cell in notebook.cells
        if cell.cell_type == "code" and 'check("' in cell.source
        for output in cell.outputs
    ]
    assert len(said) >= 4
    assert all(text.startswith("✗") for text in said), said  # the starters are no solutions, and no errors
