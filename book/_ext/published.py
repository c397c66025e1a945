"""``{published}`` prints a figure that a paper reports, with its citation, from ``book/published.yml``.

{published}`bert-glue` prints the figure and, in brackets, *published* and the citation;
{published}`!bert-glue` prints the figure alone, for a sentence that has cited the paper already.
``{published-table}`` lists all entries with the source that was read and the place in it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from docutils import nodes
from generated import Generated, note_input, table
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxRole

FIGURES = Path("book/published.yml")
FIELDS = ("figure", "what", "source", "place", "cite", "tag")


class PublishedError(ValueError):
    """``published.yml`` is not what it should be, or has no such key."""


def load(path: Path) -> dict[str, dict[str, str]]:
    """The entries of ``published.yml`` by key, checked.

    Raises:
        PublishedError: a field is missing, unknown, empty or no string, or the tag is not "published".
    """
    entries = yaml.safe_load(path.read_text("utf-8"))
    for key, entry in entries.items():
        if not isinstance(entry, dict) or set(entry) != set(FIELDS):
            raise PublishedError(f"{path}: {key}: expected the fields {', '.join(FIELDS)}, got {entry!r}")
        for field, value in entry.items():
            if not isinstance(value, str) or not value.strip():
                raise PublishedError(f"{path}: {key}: {field} must be a quoted string, got {value!r}")
        if entry["tag"] != "published":
            raise PublishedError(f"{path}: {key}: tag must be 'published', got {entry['tag']!r}")
    return entries


def find(entries: dict[str, dict[str, str]], key: str) -> dict[str, str]:
    """One entry.

    Raises:
        PublishedError: there is none with this key.
    """
    if key not in entries:
        raise PublishedError(f"published: no entry {key!r}; there are {', '.join(sorted(entries))}")
    return entries[key]


class Published(SphinxRole):
    """The role ``{published}``."""

    def run(self) -> tuple[list[nodes.Node], list[nodes.system_message]]:
        path = Path(self.env.app.srcdir) / FIGURES
        note_input(self.env, path)
        key = self.text.removeprefix("!")
        try:
            entry = find(load(path), key)
        except (OSError, PublishedError) as error:
            message = self.inliner.reporter.error(str(error), line=self.lineno)
            return [self.inliner.problematic(self.rawtext, self.rawtext, message)], [message]
        figure = nodes.inline("", entry["figure"], classes=["published"])
        if self.text.startswith("!"):
            return [figure], []
        cite = self.env.get_domain("cite").role("t")
        assert cite is not None
        source = cite("cite:t", f":cite:t:`{entry['cite']}`", entry["cite"], self.lineno, self.inliner)
        tag = nodes.emphasis("", "published")
        return [figure, nodes.Text(" ("), tag, nodes.Text(", "), *source[0], nodes.Text(")")], source[1]


def markdown(entries: dict[str, dict[str, str]]) -> str:
    rows = [
        (
            entry["what"],
            entry["figure"],
            f"{{cite:t}}`{entry['cite']}`",
            f"{entry['place']}. {entry['source']}",
        )
        for entry in entries.values()
    ]
    return table(("What", "Figure", "Paper", "Where it was read"), rows, (28, 12, 22, 38), kind="published")


class PublishedTable(Generated):
    """``{published-table}``"""

    def reads(self) -> list[Path]:
        return [self.root / FIGURES]

    def markdown(self) -> str:
        return markdown(load(self.root / FIGURES))


def setup(app: Sphinx) -> dict[str, Any]:
    app.setup_extension("sphinxcontrib.bibtex")
    app.add_role("published", Published())
    app.add_directive("published-table", PublishedTable)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
