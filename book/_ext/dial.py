"""``{position-dial}``: turn RoPE's clock hands and ALiBi's slopes.

In the HTML a script makes an instrument of an empty box, from static files and without a request; without
scripts, in the PDF and in notebooks there is nothing, so the page shows the same in a figure of its own.
"""

from __future__ import annotations

from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.util.docutils import SphinxDirective

BOX = '<div class="position-dial"></div>'
SCRIPT, STYLE = "position-dial.js", "position-dial.css"


class PositionDial(SphinxDirective):
    """``{position-dial}``, without content."""

    def run(self) -> list[nodes.Node]:
        _pages(self.env).add(self.env.docname)
        return [nodes.raw("", BOX, format="html")]


def _pages(env: BuildEnvironment) -> set[str]:
    """The pages with a dial."""
    if not hasattr(env, "dial_pages"):
        env.dial_pages = set()  # type: ignore[attr-defined]
    return env.dial_pages  # type: ignore[attr-defined, no-any-return]


def _purge(app: Sphinx, env: BuildEnvironment, docname: str) -> None:
    _pages(env).discard(docname)


def _merge(app: Sphinx, env: BuildEnvironment, docnames: list[str], other: BuildEnvironment) -> None:
    _pages(env).update(_pages(other) & set(docnames))


def _scripts(app: Sphinx, page: str, template: str, context: dict[str, Any], doctree: Any) -> None:
    if doctree is not None and page in _pages(app.env):
        app.add_css_file(STYLE)
        app.add_js_file(SCRIPT, loading_method="defer")


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_directive("position-dial", PositionDial)
    app.connect("env-purge-doc", _purge)
    app.connect("env-merge-info", _merge)
    app.connect("html-page-context", _scripts)
    return {"version": "1", "env_version": 1, "parallel_read_safe": True, "parallel_write_safe": True}
