"""``{source} NAME`` says all there is to know of a source of data or weights; ``{sources-table}`` lists them.

Everything printed comes from ``textbook_code.data.sources``, which ``textbook-code fetch`` obeys as well.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from codeindex import package_folder
from generated import Generated, table
from sphinx.application import Sphinx

if TYPE_CHECKING:
    from textbook_code.data.sources import Route, Source

FOLDER = Path("book/appendix/data")  # one page for each source, named after it
REGISTRIES = {"pypi": "PyPI", "npm": "npm", "apt": "Debian"}
_LONG = re.compile(r"(?<![\w`/])([\w.-]+/[\w.-]{12,}\w)")
_CELL = re.compile(r"^(`{3,})\{(?:code-cell|exercise-card)\}[^\n]*\n(.*?)^\1", re.MULTILINE | re.DOTALL)


def size(count: int) -> str:
    """Bytes as a reader says them.

    >>> size(612), size(5_057_198)
    ('612 bytes', '5.1 MB')
    """
    if count < 1000:
        return f"{count} bytes"
    for unit, power in (("GB", 9), ("MB", 6)):
        if count >= 10**power:
            return f"{count / 10**power:.1f} {unit}"
    return f"{count / 1000:.1f} kB"


def users(name: str, book: Path) -> list[Path]:
    """The pages below ``book`` whose code cells name the source."""
    word = re.compile(rf"""(["']){re.escape(name)}\1""")
    return [
        page
        for page in sorted(book.rglob("*.md"))
        if any(word.search(body) for _, body in _CELL.findall(page.read_text("utf-8")))
    ]


def _route(route: Route) -> list[str]:
    lines = [
        f"- **{REGISTRIES[route.registry]}:** `{route.spec}`",
        f"  - archive {{digest}}`{route.archive}`, {size(route.size)}",
        f"  - sha256 {{digest}}`{route.sha256}`",
    ]
    return lines + ([f"  - taken from {{digest}}`{route.root}` inside it"] if route.root else [])


def markdown(source: Source, used_by: Iterable[str] = ()) -> str:
    """The page of one source, below its title."""
    pages = ", ".join(f"{{doc}}`/{doc}`" for doc in used_by)
    files = [
        (
            f"`{member.path}`" if member.many else f"`{member.local}`",
            f"{member.count:,}",
            size(member.size),
            f"{{digest}}`{member.sha256}`",
        )
        for member in source.members
    ]
    share = "The book may ship parts of it." if source.redistributable else "The book ships no part of it."
    out = [
        source.what,
        "",
        f"Fetch it with `textbook-code fetch {source.name}`, or in Python:",
        "",
        "```python",
        "from textbook_code.data.sources import fetch",
        "",
        f'folder = fetch("{source.name}")',
        "```",
        "",
        f"- **Licence:** {_sentence(source.licence)} {_sentence(source.terms)} {share}",
        f"- **Origin:** {_sentence(source.origin)}",
        f"- **To cite:** {_sentence(source.citation)}",
        f"- **Used by:** {pages or 'no page yet'}",
        "",
        *(["## Before you trust a number made with it", ""] if source.caveats else []),
        *(f"- {_sentence(caveat)}" for caveat in source.caveats),
        "",
        "## Ways to it",
        "",
        *(line for route in source.routes for line in _route(route)),
        "",
        "## Files",
        "",
        "Each file is checked against its sha256 when it is unpacked. For a set of files the hash is that of "
        "their manifest: what `sha256sum` prints for all of them, sorted by path.",
        "",
        table(("File", "Number", "Size", "sha256"), files, (30, 11, 14, 45), kind="files"),
        *_made_of(source),
    ]
    return "\n".join(out)


def _made_of(source: Source) -> list[str]:
    """What a conversion adds, where there is one."""
    conversion = source.conversion
    if conversion is None:
        return []
    names = [f"`{name}`" for name in conversion.files]
    listed = " and ".join([", ".join(names[:-1]), names[-1]] if names[1:] else names)
    library = f" It needs the library `{conversion.needs[0]}`." if conversion.needs else ""
    return [
        "",
        "## Made of them",
        "",
        f"The first `fetch` converts these files, once, to {listed}, {size(conversion.size)} in all: "
        f"the same values under the published names.{library}",
    ]


def _sentence(text: str) -> str:
    """Ends with a full stop; long names such as ``maker/some-model`` may break anywhere."""
    text = _LONG.sub(r"{digest}`\1`", text.strip())
    return text if text.endswith((".", "!", "?")) else f"{text}."


def overview(sources: Iterable[Source], *, link: bool = True) -> str:
    """All sources as one table."""
    rows = [
        (
            f"{{ref}}`{source.name} <data-{source.name}>`" if link else f"`{source.name}`",
            source.title,
            size(source.size),
            source.licence,
        )
        for source in sources
    ]
    return table(("Source", "What", "Unpacked", "Licence"), rows, (16, 40, 12, 32), kind="sources")


def _all() -> dict[str, Source]:
    from textbook_code.data.sources import SOURCES

    return SOURCES


class SourceDirective(Generated):
    """``{source} NAME``"""

    required_arguments = 1

    def reads(self) -> list[Path]:
        return [package_folder() / "data", self.root / "book"]

    def markdown(self) -> str:
        name, sources = self.arguments[0], _all()
        if name not in sources:
            raise self.error(f"source: no source {name!r}; there are {', '.join(sorted(sources))}")
        pages = [
            str(page.relative_to(self.root).with_suffix(""))
            for page in users(name, self.root / "book")
            if str(page.relative_to(self.root).with_suffix("")) in self.env.found_docs
        ]
        return markdown(sources[name], pages)


class SourcesTable(Generated):
    """``{sources-table}``"""

    def reads(self) -> list[Path]:
        return [package_folder() / "data"]

    def markdown(self) -> str:
        return overview(_all().values())


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_directive("source", SourceDirective)
    app.add_directive("sources-table", SourcesTable)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
