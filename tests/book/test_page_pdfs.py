"""The PDF of each page: which pages it takes, what it keeps, and what is refused."""

from __future__ import annotations

from pathlib import Path

import page_pdfs
import pytest
from page_pdfs import PagesError, read_pages
from pypdf import PdfReader, PdfWriter
from pypdf.annotations import Link
from pypdf.generic import Fit


def make_book(folder: Path, pages: int = 6) -> Path:
    writer = PdfWriter()
    for number in range(pages):
        writer.add_blank_page(100 + number, 200)
    writer.add_metadata({"/Author": "The authors", "/Title": "All of it"})
    part = writer.add_outline_item("Part", 1)
    first = writer.add_outline_item("1 First", 1, parent=part)
    writer.add_outline_item("1.1 Inside", 2, parent=first)
    writer.add_outline_item("2 Second", 4, parent=part)
    for target in (2, 4):  # one link within the first document, one out of it
        writer.add_annotation(1, Link(rect=(0, 0, 10, 10), target_page_index=target, fit=Fit.fit()))
    path = folder / "book.pdf"
    writer.write(path)
    (folder / "book.pages").write_text(
        "first 2 part/first\nlast 3 part/first\nfirst 5 part/second\nlast 6 part/second\n"
    )
    return path


def titles(items: list) -> list:
    return [titles(item) if isinstance(item, list) else item.title for item in items]


def test_each_document_gets_its_own_pages(tmp_path: Path) -> None:
    html = tmp_path / "html"
    made = page_pdfs.main(make_book(tmp_path), html)
    assert {path.relative_to(html).as_posix() for path in made} == {
        "_pdf/part/first.pdf", "_pdf/part/second.pdf", "_pdf/book.pdf",
    }  # fmt: skip
    first, second = PdfReader(made[0]), PdfReader(made[1])
    assert [page.mediabox.width for page in first.pages] == [101, 102]
    assert [page.mediabox.width for page in second.pages] == [104, 105]
    assert made[2].read_bytes() == (tmp_path / "book.pdf").read_bytes()


def test_a_cut_keeps_what_leads_to_its_own_pages(tmp_path: Path) -> None:
    made = page_pdfs.main(make_book(tmp_path), tmp_path / "html")
    first = PdfReader(made[0])
    assert titles(first.outline) == ["Part", ["1 First", ["1.1 Inside"]]]
    assert first.metadata.title == "Part"
    assert first.metadata.author == "The authors"
    links = [note.get_object() for note in first.pages[0].get("/Annots", [])]
    assert len(links) == 1
    assert links[0]["/Dest"][0].get_object() == first.pages[1].get_object()


def test_what_is_no_longer_there_goes(tmp_path: Path) -> None:
    book, html = make_book(tmp_path), tmp_path / "html"
    page_pdfs.main(book, html)
    (tmp_path / "book.pages").write_text("first 1 part/first\nlast 1 part/first\n")
    page_pdfs.main(book, html)
    assert sorted(path.name for path in (html / "_pdf").rglob("*")) == ["book.pdf", "first.pdf", "part"]
    assert len(PdfReader(html / "_pdf/part/first.pdf").pages) == 1


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("first 2 a\n", "a: expected pages within 1 to 6, got 2 to \\?"),
        ("first 3 a\nlast 2 a\n", "got 3 to 2"),
        ("first 1 a\nlast 7 a\n", "got 1 to 7"),
        ("from 1 a\n", "expected 'first N name' or 'last N name', got 'from 1 a'"),
        ("first one a\n", "got 'first one a'"),
    ],
)
def test_a_list_that_does_not_fit_is_refused(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "book.pages"
    path.write_text(text)
    with pytest.raises(PagesError, match=said):
        read_pages(path, 6)


def test_a_missing_list_is_named(tmp_path: Path) -> None:
    with pytest.raises(PagesError, match=r"book\.pages: not found"):
        read_pages(tmp_path / "book.pages", 6)
