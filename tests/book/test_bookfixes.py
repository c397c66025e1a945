"""The mends of what the book's tools do wrong, and MathJax from its package: on the book's own theme."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import bookfixes
import offline
import pytest
from sphinx.errors import ExtensionError

CONF = """
extensions = ["myst_nb", "sphinx_togglebutton", "sphinx_design", "sphinx_thebe", "sphinx_external_toc",
              "sphinx.ext.intersphinx", "sphinx_book_theme", "sphinx_proof", "sphinx_codeautolink", "offline",
              "bookfixes"]
external_toc_path = "_toc.yml"
source_suffix = {".md": "myst-nb", ".ipynb": "myst-nb"}  # the default is shared by all builds of a process
root_doc = "book/index"
html_theme = "sphinx_book_theme"
html_context = {"default_mode": "auto"}
project = "Test book"
language = "en-GB"
myst_enable_extensions = ["dollarmath"]
nb_execution_mode = "off"
codeautolink_concat_default = True
numfig = True
"""
FILES = {
    "_toc.yml": """
format: jb-book
root: book/index
parts:
  - caption: A part
    chapters: [{file: book/page, sections: [{file: book/below}]}]
""",
    "book/index.md": "# Test book\n\nHello.\n",
    "book/below.md": "# Below\n\nText.\n",
    "book/page.md": """
# Page

```{eval-rst}
.. py:function:: package.make()

   Makes it.
```

$x$

```python
import package

package.make()
```

```{literalinclude} excerpt.py
:language: python
```

```python
package.make()
```

````{prf:theorem}
:label: thm-a
It holds.

```python
package.make()
```
````

```{prf:proof}
It *follows*.
```

```{prf:theorem}
:label: thm-b
It too.
```

```{prf:proof}
Likewise.
```

## After
""",
    "book/excerpt.py": "    return 1\nelse:\n",  # a piece of a function: no program
}


class Ids(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.ids += [value for name, value in attrs if name == "id" and value]


@pytest.fixture(scope="module")
def built(make_book, tmp_path_factory):
    """Read by another builder first, as a whole build does."""
    book = make_book(tmp_path_factory.mktemp("book"), (), conf=CONF)
    book.write(FILES)
    assert book.build("dummy").warnings == []
    out = book.build("html")
    assert out.warnings == []
    return book, out


def test_bodies_of_theorems_are_no_sections(built) -> None:
    page = built[1].text("book/page.html")
    assert page.count("proof-content") == 2
    assert not re.search(r"<section[^>]*proof-content", page)
    ids = Ids(page).ids
    assert len(ids) > 10
    assert sorted(set(ids)) == sorted(ids)


def test_a_proof_begins_with_its_word(built) -> None:
    page = built[1].text("book/page.html")
    assert page.count('<em class="proof-word">Proof.</em>') == 2
    assert 'class="proof-word">Proof.</em> It <em>follows</em>' in page


def test_links_in_code_survive_another_builder(built) -> None:
    code = re.findall(r'<a class="sphinx-codeautolink-a" href="([^"]*)"', built[1].text("book/page.html"))
    assert (
        code.count("../book/page.html#package.make") == 3
    )  # two blocks and the theorem's; none in the excerpt


def test_links_in_code_survive_a_change_elsewhere(built) -> None:
    book, out = built
    before = out.text("book/page.html")
    book.write({"book/below.md": "# Below\n\nOther text.\n"})
    again = book.build("html")
    assert again.warnings == []
    assert "Other text." in again.text("book/below.html")
    links = again.text("book/page.html").count("sphinx-codeautolink-a")
    assert links == before.count("sphinx-codeautolink-a") > 0


def test_no_script_from_elsewhere(built) -> None:
    for page in built[1].out.rglob("*.html"):
        if "_static" in page.parts:
            continue
        text = page.read_text("utf-8")
        assert "thebe" not in text.lower(), page
        assert not re.search(r'<(?:script|link|img|iframe)[^>]+(?:src|href)="(?:https?:)?//', text), page


def test_mathjax_comes_from_its_package(built) -> None:
    page, out = built[1].text("book/page.html"), built[1].out
    source = re.search(r'<script[^>]+src="(\.\./_static/mathjax/[^"?]+)', page)
    assert source
    script = (out / "book" / source[1]).resolve()
    assert script.read_bytes() == (offline.mathjax_source() / offline.SCRIPT).read_bytes()
    fonts = list(script.parent.glob("output/chtml/fonts/woff-v2/*.woff"))
    assert len(fonts) > 20


def test_a_missing_mathjax_says_what_brings_it(monkeypatch) -> None:
    monkeypatch.setattr(offline.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ExtensionError, match=r'pip install "textbook_code\[book\]"'):
        offline.mathjax_source()


def test_the_root_is_a_whole_page(built) -> None:
    page = built[1].text("index.html")
    assert page.startswith('<!DOCTYPE html>\n<html lang="en-GB">')
    assert 'content="0; url=book/index.html"' in page
    assert "<title>Test book</title>" in page


def test_what_only_the_ear_misses(built) -> None:
    page = built[1].text("book/page.html")
    captions = re.findall(r'<p[^>]*role="heading"[^>]*>', page)
    assert captions
    assert all('aria-level="2"' in caption for caption in captions)
    folds = re.findall(r'<summary[^>]*>(?=<span class="toctree-toggle")', page)
    assert folds
    assert all("aria-label=" in fold for fold in folds)
    assert re.search(r'role="region" aria-label="This book">\s*<a class="navbar-brand', page)


def test_mends_are_made_once() -> None:
    text = '<p role="heading"><summary><span class="toctree-toggle">'
    text += '<div class="sidebar-primary-item">\n<a class="navbar-brand'
    for pattern, replacement in bookfixes._MENDS:
        once = pattern.sub(replacement, text)
        assert once != text
        assert pattern.sub(replacement, once) == once
