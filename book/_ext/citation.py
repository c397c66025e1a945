"""How to cite: a box on every page of the book's parts, and the same facts for machines.

The book's facts come from ``CITATION.cff``, a page's title and number from Sphinx. Each cited page carries
a box with a sentence and a BibTeX entry, Highwire tags (read by reference managers) and JSON-LD
(schema.org). The authors are a group, so BibTeX gets them in double braces and JSON-LD as an organisation.
Addresses appear only where the book has one (``book_url``); the link to the page's own PDF only where one
is made (``page_pdfs``).
"""

from __future__ import annotations

import html
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from address import page_address
from docutils import nodes
from sphinx.application import Sphinx
from sphinx.errors import ConfigError
from sphinx.util.osutil import relative_uri

PDF_FOLDER = "_pdf"


@dataclass(frozen=True)
class Book:
    """What ``CITATION.cff`` says of the book."""

    title: str
    authors: tuple[str, ...]
    version: str
    year: str

    @classmethod
    def read(cls, path: Path) -> Book:
        """The preferred citation of a CFF file, or the file's own facts where it has none.

        Raises:
            ConfigError: the file is missing, or a field that a citation needs is.
        """
        try:
            top = yaml.safe_load(path.read_text("utf-8"))
            entry = {**top, **top.get("preferred-citation", {})}
            people = tuple(author["name"] for author in entry["authors"])
            year = str(entry["year"] if "year" in entry else entry["date-released"])[:4]
            return cls(entry["title"], people, str(entry["version"]), year)
        except FileNotFoundError:
            raise ConfigError(f"citation_file: expected a CFF file, found none at {path}") from None
        except (KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"citation_file: {path} lacks what a citation needs: {error}") from error


@dataclass(frozen=True)
class Page:
    """What is known of one page that can be cited."""

    book: Book
    title: str
    number: str
    key: str
    url: str
    pdf: str  # public address of its PDF

    @property
    def sentence(self) -> str:
        """The reference as one would write it at the end of an article."""
        place = self.book.title + (f", chapter {self.number}" if self.number else "")
        authors = ", ".join(self.book.authors)
        return f"{authors} ({self.book.year}). “{self.title}”. In: {place}, version {self.book.version}."

    @property
    def bibtex(self) -> str:
        """An ``@incollection`` entry; the group's name in double braces, so that it is not taken apart."""
        rows = {
            "author": " and ".join(f"{{{name}}}" for name in self.book.authors),
            "title": f"{{{self.title}}}",
            "booktitle": f"{{{self.book.title}}}",
            "chapter": self.number,
            "year": self.book.year,
            "note": f"Version {self.book.version}",
            "url": self.url,
        }
        body = ",\n".join(f"  {name:<9} = {{{value}}}" for name, value in rows.items() if value)
        return f"@incollection{{{self.key},\n{body}\n}}"

    def highwire(self, language: str) -> list[tuple[str, str]]:
        """``<meta name="citation_…">``, as (name, content)."""
        tags = [("citation_title", self.title)]
        tags += [("citation_author", name) for name in self.book.authors]
        tags += [
            ("citation_publication_date", self.book.year),
            ("citation_inbook_title", self.book.title),
            ("citation_language", language),
            ("citation_public_url", self.url),
            ("citation_fulltext_html_url", self.url),
            ("citation_pdf_url", self.pdf),
        ]
        return [(name, value) for name, value in tags if value]

    def json_ld(self, language: str) -> dict[str, Any]:
        """A schema.org ``Chapter``, part of a ``Book``."""
        data: dict[str, Any] = {
            "@context": "https://schema.org",
            "@type": "Chapter",
            "name": self.title,
            "position": self.number,
            "url": self.url,
            "inLanguage": language,
            "datePublished": self.book.year,
            "license": "https://creativecommons.org/licenses/by/4.0/",
            "author": [{"@type": "Organization", "name": name} for name in self.book.authors],
            "isPartOf": {"@type": "Book", "name": self.book.title, "version": self.book.version},
        }
        return {name: value for name, value in data.items() if value}


def _cited(app: Sphinx, docname: str) -> bool:
    chosen = app.config.citation_pages
    return docname in app.env.found_docs and re.fullmatch(chosen, docname) is not None


def pdf_path(docname: str) -> str:
    """Where a page's own PDF lies in the HTML's folder."""
    return f"{PDF_FOLDER}/{docname}.pdf"


def page_of(app: Sphinx, docname: str) -> Page | None:
    """The facts of a page, or None where it is not one to be cited alone."""
    if not _cited(app, docname):
        return None
    book = Book.read(Path(app.confdir) / app.config.citation_file)
    number = ".".join(map(str, app.env.toc_secnumbers.get(docname, {}).get("") or ()))
    slug = re.sub(r"[^a-z0-9]+", "-", docname.rsplit("/", 1)[-1].lower()).strip("-")
    if slug == "index":  # a part's map is named after its folder
        slug = re.sub(r"^[0-9]+-", "", docname.split("/")[-2].lower())
    first = re.sub(r"[^a-z]+", "", re.sub(r"^the ", "", book.authors[0].lower()).split(" ")[0])
    has_pdf = app.config.book_url and app.config.page_pdfs
    return Page(
        book=book,
        title=app.env.titles[docname].astext(),
        number=number,
        key=f"{first}{book.year}-{slug}",
        url=page_address(app, docname),
        pdf=app.config.book_url + pdf_path(docname) if has_pdf else "",
    )


def pdf_link(app: Sphinx, docname: str) -> str:
    """The address of a page's PDF as seen from that page, or '' where none is made."""
    if not app.config.page_pdfs or app.builder.format != "html":
        return ""
    return relative_uri(app.builder.get_target_uri(docname), pdf_path(docname))


def _add_box(app: Sphinx, doctree: nodes.document, docname: str) -> None:
    page = page_of(app, docname) if app.builder.format == "html" else None
    top = next(iter(doctree.findall(nodes.section)), None)
    if page is None or top is None:
        return
    text = nodes.paragraph("", page.sentence + " ", classes=["citation-sentence"])
    if page.url:
        text += nodes.reference("", page.url, refuri=page.url)
    code = nodes.literal_block(page.bibtex, page.bibtex, language="bibtex", classes=["citation-bibtex"])
    head = nodes.raw("", "<h2>How to cite this page</h2>", format="html")  # a section's would be numbered
    top += nodes.container("", head, text, code, classes=["cite"], ids=["cite-this-page"])


def _add_tags(
    app: Sphinx, docname: str, template: str, context: dict[str, Any], doctree: nodes.document | None
) -> None:
    page = page_of(app, docname) if doctree is not None else None
    if page is None:
        return
    language = app.config.language
    tags = "".join(f'\n<meta name="{n}" content="{html.escape(v)}">' for n, v in page.highwire(language))
    data = json.dumps(page.json_ld(language), ensure_ascii=False).replace("<", "\\u003c")
    tags += f'\n<script type="application/ld+json">{data}</script>\n'
    context["metatags"] = context.get("metatags", "") + tags


def setup(app: Sphinx) -> dict[str, Any]:
    app.setup_extension("address")
    app.add_config_value("citation_file", "CITATION.cff", "html", [str])
    app.add_config_value("citation_pages", r"book/\d\d-.*", "html", [str])
    app.add_config_value("page_pdfs", False, "html", [bool])
    app.connect("doctree-resolved", _add_box)
    app.connect("html-page-context", _add_tags, priority=900)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
