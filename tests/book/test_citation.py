"""How a page is cited: the box, BibTeX, the tags and JSON-LD, with and without an address; CITATION.cff."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path
from types import SimpleNamespace

import address
import jsonschema
import pytest
import yaml
from citation import Book, Page
from sphinx.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
CFF = """
cff-version: 1.2.0
message: Cite it.
title: "A Book <of> Tests"
authors: [{name: The example authors}]
version: 0.3.0
date-released: 2026-02-01
"""
INDEX = """
# Book

```{toctree}
:numbered:
book/01-part/page
```

```{toctree}
book/appendix/a
```
"""
PAGES = {
    "CITATION.cff": CFF,
    "index.md": INDEX,
    "book/01-part/page.md": "(page)=\n# A page with <signs> & more\n\nIts first words.\n",
    "book/appendix/a.md": "# An appendix\n",
}


def tags(page: str) -> dict[str, str]:
    return dict(re.findall(r'<meta name="(citation_\w+)" content="([^"]*)"', page))


def linked_data(page: str) -> dict:
    found = re.search(r'<script type="application/ld\+json">(.*?)</script>', page, re.DOTALL)
    assert found
    return json.loads(found[1])


@pytest.fixture(scope="module")
def built(make_book, tmp_path_factory):
    """The same book without an address, and with one."""
    out = {}
    for name, conf in {
        "without": "",
        "with": 'book_url = "https://example.org/book"\npage_pdfs = True\nlanguage = "en-GB"\n',
    }.items():
        book = make_book(tmp_path_factory.mktemp(name), ("citation",), conf=conf)
        book.write(PAGES)
        out[name] = book.build()
        assert out[name].warnings == []
    return out


def test_without_an_address_nothing_names_one(built) -> None:
    page = built["without"].text("book/01-part/page.html")
    assert "example.org" not in page
    assert 'rel="canonical"' not in page
    assert "og:url" not in page
    assert "url" not in linked_data(page)
    assert set(tags(page)) == {
        "citation_title", "citation_author", "citation_publication_date", "citation_inbook_title",
        "citation_language",
    }  # fmt: skip
    assert not (built["without"].out / "sitemap.xml").exists()


def test_with_an_address_everything_has_it(built) -> None:
    page = built["with"].text("book/01-part/page.html")
    address = "https://example.org/book/book/01-part/page.html"
    assert tags(page)["citation_public_url"] == tags(page)["citation_fulltext_html_url"] == address
    assert tags(page)["citation_pdf_url"] == "https://example.org/book/_pdf/book/01-part/page.pdf"
    assert linked_data(page)["url"] == address
    assert f'<link rel="canonical" href="{address}"' in page
    assert f'<meta property="og:url" content="{address}">' in page
    assert '<meta property="og:description" content="Its first words.">' in page
    assert re.search(rf"url\W.*= .*{address}", re.sub(r"<[^>]+>", "", page))
    places = re.findall(r"<loc>(.*?)</loc>", built["with"].text("sitemap.xml"))
    assert places == [
        f"https://example.org/book/{name}.html" for name in ("book/01-part/page", "book/appendix/a", "index")
    ]


def test_the_box_and_the_data_say_the_same(built) -> None:
    page = built["without"].text("book/01-part/page.html")
    data = linked_data(page)
    assert data["author"] == [{"@type": "Organization", "name": "The example authors"}]
    assert data["name"] == "A page with <signs> & more"
    assert data["position"] == "1"
    assert data["isPartOf"]["version"] == "0.3.0"
    assert tags(page)["citation_title"] == "A page with &lt;signs&gt; &amp; more"
    assert (
        "The example authors (2026). “A page with &lt;signs&gt; &amp; more”. In: A Book &lt;of&gt; Tests, "
        in page
    )
    assert "chapter 1, version 0.3.0." in page
    assert "<h2>How to cite this page</h2>" in page  # no number of its own


def test_a_script_cannot_be_closed_from_inside(built) -> None:
    found = re.search(r"ld\+json\">(.*?)</script>", built["without"].text("book/01-part/page.html"))
    assert found
    assert "<" not in found[1]


@pytest.mark.parametrize("name", ["index.html", "book/appendix/a.html"])
def test_other_pages_are_not_cited_alone(built, name: str) -> None:
    page = built["with"].text(name)
    assert "citation_title" not in page
    assert "How to cite this page" not in page


def test_bibtex_keeps_the_group_whole_and_closes_its_braces() -> None:
    book = Book("The Book", ("The example authors",), "1.0", "2026")
    page = Page(book, "Attention", "3", "example2026-attention", url="", pdf="")
    entry = page.bibtex
    assert entry.startswith("@incollection{example2026-attention,\n")
    assert "author    = {{The example authors}}" in entry
    assert "title     = {{Attention}}" in entry
    assert "url" not in entry
    assert entry.count("{") == entry.count("}")


def test_two_maps_do_not_share_a_key(make_book, tmp_path: Path) -> None:
    """Each part's map is called ``index``: the folder tells them apart."""
    book = make_book(tmp_path, ("citation",))
    book.write(
        {
            "CITATION.cff": CFF,
            "index.md": "# Book\n\n```{toctree}\nbook/01-text/index\nbook/02-images/index\n```\n",
            "book/01-text/index.md": "# Text\n",
            "book/02-images/index.md": "# Images\n",
        }
    )
    built = book.build()
    keys = [
        re.sub(r"<[^>]+>", "", built.text(f"book/{part}/index.html")).split("@incollection{")[1].split(",")[0]
        for part in ("01-text", "02-images")
    ]
    assert keys == ["example2026-text", "example2026-images"]


@pytest.mark.parametrize(
    ("text", "named"),
    [(None, "found none"), ("title: T\n", "authors"), ("title: T\nauthors: [{name: A}]\n", "date-released")],
)
def test_a_poor_citation_file_is_named(tmp_path: Path, text: str | None, named: str) -> None:
    path = tmp_path / "CITATION.cff"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=named):
        Book.read(path)


def test_a_wrong_address_is_refused(make_book, tmp_path: Path) -> None:
    book = make_book(tmp_path, ("citation",), conf='book_url = "example.org/book"\n')
    book.write(PAGES)
    with pytest.raises(ConfigError, match="book_url: expected an address that starts with http"):
        book.build()


@pytest.mark.parametrize("repository", ["", "https://example.org/repository/"])
def test_repository_buttons_come_with_a_repository(repository: str) -> None:
    """Jupyter Book's default is the address of its own repository: never on our pages."""
    config = SimpleNamespace(
        book_url="",
        repository_url=repository,
        html_theme="sphinx_book_theme",
        html_theme_options={
            "repository_url": "https://github.com/executablebooks/jupyter-book",
            "toc_title": "T",
        },
    )
    address._configure(None, config)
    shown = bool(repository)
    assert config.html_theme_options == {
        "repository_url": repository.rstrip("/"), "use_repository_button": shown, "use_issues_button": shown,
        "toc_title": "T",
    }  # fmt: skip


# ---------------------------------------------------------------- the repository's own files


def errors(data: dict) -> list[str]:
    schema = json.loads((Path(__file__).parent / "cff-1.2.0.schema.json").read_text("utf-8"))
    jsonschema.Draft7Validator.check_schema(schema)
    return [error.json_path for error in jsonschema.Draft7Validator(schema).iter_errors(data)]


def test_citation_cff_is_valid() -> None:
    data = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    assert errors(data) == []
    assert errors({**data, "authors": []}) == ["$.authors"]  # the schema does bite
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    assert data["version"] == data["preferred-citation"]["version"] == project["version"]
    names = [author["name"] for author in data["authors"]]
    assert names == [author["name"] for author in project["authors"]]


def test_the_configuration_names_no_address() -> None:
    """Until there is one: a link to a place that does not exist is worse than none."""
    config = yaml.safe_load((ROOT / "_config.yml").read_text("utf-8"))
    settings = config["sphinx"]["config"]
    assert set(settings) >= {"book_url", "repository_url"}
    for name in ("book_url", "repository_url"):
        assert settings[name] == "" or settings[name].startswith("https://")


def test_licence_of_the_text_is_whole() -> None:
    text = (ROOT / "LICENSE-TEXT").read_text("utf-8")
    assert "SPDX-License-Identifier: CC-BY-4.0" in text
    assert "https://creativecommons.org/licenses/by/4.0/legalcode" in text
    for section in range(1, 9):
        assert re.search(rf"^Section {section} -- ", text, re.MULTILINE), section
