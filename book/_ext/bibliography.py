"""The list of references of an author-year book: sorted, without labels, one link for each work.

The style ``book`` drops the address where the arXiv number says the same. In the HTML an entry is a plain
paragraph that citations link to; docutils' own markup has roles that screen readers no longer know. The PDF's
list is set by ``sphinxthebibliography`` in ``_latex/preamble.inc``.
"""

from __future__ import annotations

from typing import Any

from docutils import nodes
from pybtex.plugin import register_plugin
from pybtex.style.formatting.alpha import Style as AlphaStyle
from sphinx.application import Sphinx
from sphinx.builders.latex.nodes import thebibliography
from sphinx.transforms.post_transforms import SphinxPostTransform

LABEL = "bibliography"  # of the page that holds the list


class BookStyle(AlphaStyle):
    """Sorted by author and year; the arXiv number or the DOI before any other address."""

    def format_web_refs(self, entry: Any) -> Any:
        from pybtex.style.template import optional, sentence

        if "eprint" in entry.fields:
            return sentence[optional[self.format_eprint(entry)]]
        if "doi" in entry.fields:
            return sentence[optional[self.format_doi(entry)]]
        return sentence[optional[self.format_url(entry)]]


class PlainEntries(SphinxPostTransform):
    """Each work as a plain paragraph that keeps its targets."""

    default_priority = 950
    formats = ("html",)

    def run(self, **kwargs: Any) -> None:
        for citation in list(self.document.findall(nodes.citation)):
            body = [child for child in citation.children if not isinstance(child, nodes.label)]
            citation.replace_self(nodes.container("", *body, ids=citation["ids"], classes=["bib-entry"]))


class InPlace(SphinxPostTransform):
    """In the PDF, the list on its own page: Sphinx has gathered it behind the last page."""

    default_priority = 760  # just after Sphinx's own transform
    formats = ("latex",)

    def run(self, **kwargs: Any) -> None:
        found = next(self.document.findall(thebibliography), None)
        page = next((s for s in self.document.findall(nodes.section) if LABEL in s["ids"]), None)
        if found is None or page is None:
            return
        found.parent.remove(found)
        after = next((i for i, child in enumerate(page) if isinstance(child, nodes.section)), len(page))
        while after and isinstance(page[after - 1], nodes.target):  # the label of that section
            after -= 1
        page.insert(after, found)


def setup(app: Sphinx) -> dict[str, Any]:
    register_plugin("pybtex.style.formatting", "book", BookStyle, force=True)
    app.setup_extension("sphinxcontrib.bibtex")
    app.add_post_transform(PlainEntries)
    app.add_post_transform(InPlace)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
