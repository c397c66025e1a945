"""Cut the book's PDF into one for each page of the book, and put all of them into the HTML.

    python book/_tools/page_pdfs.py _build/latex/NAME.pdf _build/html

LaTeX writes beside the PDF on which of its pages each document begins and ends (``NAME.pages``, see
booklatex.py). Each document goes to ``_pdf/<docname>.pdf`` of the HTML's folder, the whole book to
``_pdf/NAME.pdf``. A cut keeps the bookmarks and links that lead to its own pages.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from pypdf import PdfReader, PdfWriter

FOLDER = "_pdf"


class PagesError(Exception):
    """The list of pages is missing or does not fit the PDF; the message says how."""


def read_pages(path: Path, count: int) -> dict[str, range]:
    """Document -> its pages, counted from 0, from the lines ``first N name`` and ``last N name``.

    Raises:
        PagesError: no such file, a line of another form, a document without both ends, or pages that the
        PDF of
            ``count`` pages does not have.
    """
    try:
        lines = path.read_text("utf-8").splitlines()
    except FileNotFoundError:
        raise PagesError(f"{path}: not found; was the PDF made from the book's LaTeX?") from None
    ends: dict[str, dict[str, int]] = {}
    for line in lines:
        which, _, rest = line.partition(" ")
        number, _, name = rest.partition(" ")
        if which not in ("first", "last") or not number.isdigit() or not name:
            raise PagesError(f"{path}: expected 'first N name' or 'last N name', got {line!r}")
        ends.setdefault(name.strip(), {})[which] = int(number)
    pages = {}
    for name, both in ends.items():
        first, last = both.get("first", 0), both.get("last", 0)
        if not 1 <= first <= last <= count:
            raise PagesError(
                f"{path}: {name}: expected pages within 1 to {count}, got {first or '?'} to {last or '?'}"
            )
        pages[name] = range(first - 1, last)
    return pages


def cut(reader: PdfReader, pages: range, into: Path, title: str) -> None:
    """Write some pages of a PDF to a file of their own."""
    writer = PdfWriter()
    writer.append(reader, pages=(pages.start, pages.stop))
    author = reader.metadata.author if reader.metadata else None
    writer.add_metadata({"/Title": title, **({"/Author": author} if author else {})})
    writer.compress_identical_objects(remove_unreferenced=True)
    _move(lambda part: writer.write(part), into)


def _move(write, into: Path) -> None:  # type: ignore[no-untyped-def]
    into.parent.mkdir(parents=True, exist_ok=True)
    part = into.with_name(into.name + ".part")
    write(part)
    part.replace(into)


def title_of(reader: PdfReader, pages: range, otherwise: str) -> str:
    """The first bookmark on a document's first page."""

    def walk(items: list) -> str | None:  # type: ignore[type-arg]
        for item in items:
            if isinstance(item, list):
                found = walk(item)
            else:
                found = item.title if reader.get_destination_page_number(item) == pages.start else None
            if found:
                return found
        return None

    return walk(reader.outline) or otherwise


def main(book: Path, html: Path) -> list[Path]:
    """Cut ``book`` into ``html``; gives the files written.

    Raises:
        PagesError: the list of pages is missing or does not fit.
    """
    reader = PdfReader(book)
    pages = read_pages(book.with_suffix(".pages"), len(reader.pages))
    made = []
    for name, own in pages.items():
        path = html / FOLDER / f"{name}.pdf"
        cut(reader, own, path, title_of(reader, own, name))
        made.append(path)
    whole = html / FOLDER / book.name
    _move(lambda part: shutil.copyfile(book, part), whole)
    for old in (html / FOLDER).rglob("*.pdf"):
        if old not in (*made, whole):  # its document is gone
            old.unlink()
    return [*made, whole]


if __name__ == "__main__":
    try:
        made = main(Path(sys.argv[1]), Path(sys.argv[2]))
    except PagesError as error:
        sys.exit(str(error))
    print(f"{len(made)} PDFs in {Path(sys.argv[2]) / FOLDER}")
