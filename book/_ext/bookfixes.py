"""Mends for faults in the extensions and the theme that the book uses; each function says which."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.transforms import SphinxTransform


class ProofBodies(SphinxTransform):
    """sphinx-proof wraps bodies in a ``section`` without a title, all with one id.

    sphinx-codeautolink takes a title for every section and falls over; the page's table of contents and its
    ids break too. A container is what was meant. A proof's first word gets its own element, to be styled.
    """

    default_priority = 600

    def apply(self, **kwargs: Any) -> None:
        for body in list(self.document.findall(nodes.section)):
            if "proof-content" in body["ids"]:
                box = nodes.container("", *body.children, classes=[*body["classes"], "proof-content"])
                body.parent.replace(body, box)
        for proof in self.document.findall(nodes.admonition):
            if proof["ids"] == ["proof"]:
                proof["ids"] = []
                first = next(iter(proof.findall(nodes.Text)), None)
                if first is not None and first.startswith("Proof. "):
                    word = nodes.emphasis("", "Proof.", classes=["proof-word"])
                    first.parent.replace(first, [word, nodes.Text(" " + first[7:])])


def _leave_excerpts_alone() -> None:
    """sphinx-codeautolink reads a page's code as one program; an excerpt of a file is no part of it."""
    from sphinx_codeautolink.extension.block import CodeBlockAnalyser

    visit = CodeBlockAnalyser.visit_literal_block
    if getattr(visit, "passes_over_excerpts", False):
        return

    def visit_literal_block(self: CodeBlockAnalyser, node: nodes.literal_block) -> None:
        if "source" not in node:  # set by literalinclude
            visit(self, node)

    visit_literal_block.passes_over_excerpts = True  # type: ignore[attr-defined]
    CodeBlockAnalyser.visit_literal_block = visit_literal_block


class CodeLinks:
    """sphinx-codeautolink links only the pages that were read in this very run, and by this builder.

    A page that another builder has read, or that is written anew without being read, loses the links in its
    code. So the code of every page is analysed before writing, and the pages to link are those written.
    """

    def __init__(self) -> None:
        self.written: set[str] = set()

    def _linker(self, app: Sphinx) -> Any:
        for listener in app.events.listeners.get("build-finished", ()):
            owner = getattr(listener.handler, "__self__", None)
            if type(owner).__name__ == "SphinxCodeAutoLink" and not owner.do_nothing:
                return owner
        return None

    def analyse(self, app: Sphinx, env: BuildEnvironment) -> None:
        linker = self._linker(app)
        if linker is not None:
            for docname in env.found_docs - set(linker.cache.transforms):
                linker.parse_blocks(app, env.get_doctree(docname))

    def note(self, app: Sphinx, page: str, template: str, context: dict[str, Any], doctree: Any) -> None:
        if doctree is not None:
            self.written.add(page)

    def choose(self, app: Sphinx, exception: Exception | None) -> None:
        linker = self._linker(app)
        if linker is not None:
            linker.outdated_docs = {str(Path(page)) for page in self.written}


def _whole_html_handlers(app: Sphinx) -> None:
    """sphinx-proof registers some nodes for ``singlehtml`` alone, which hides the ``html`` ones there."""
    handlers = app.registry.translation_handlers
    handlers["singlehtml"] = {**handlers.get("html", {}), **handlers.get("singlehtml", {})}


def _without_thebe(app: Sphinx, config: Any) -> None:
    """Jupyter Book always loads sphinx-thebe, which has a reader's browser fetch code from the network."""
    for listeners in list(app.events.listeners.values()):
        for listener in list(listeners):
            if getattr(listener.handler, "__module__", "").split(".")[0] == "sphinx_thebe":
                app.disconnect(listener.id)
    registry = app.registry
    registry.css_files[:] = [css for css in registry.css_files if "thebe" not in css[0]]


def _scripts_once(app: Sphinx, page: str, template: str, context: dict[str, Any], doctree: Any) -> None:
    """A script that is set up twice declares its constants twice, an error in the console: keep one."""
    seen: set[str] = set()
    kept = []
    for script in context.get("script_files", []):
        body = (getattr(script, "attributes", None) or {}).get("body") or ""
        if not body or body not in seen:
            kept.append(script)
        seen.add(body)
    context["script_files"] = kept


_MENDS = (
    # Sphinx gives captions of the contents the role of a heading without its level
    (re.compile(r'role="heading">'), 'role="heading" aria-level="2">'),
    # the theme's folding part of the contents says nothing to who cannot see its arrow
    (
        re.compile(r'<summary>(?=<span class="toctree-toggle")'),
        '<summary aria-label="Pages below this one">',
    ),
    # the theme leaves the book's name outside every landmark
    (
        re.compile(r'<div class="sidebar-primary-item">(?=\s*<a class="navbar-brand)'),
        '<div class="sidebar-primary-item" role="region" aria-label="This book">',
    ),
)
_REDIRECT = """<!DOCTYPE html>
<html lang="{lang}">
<head><meta charset="utf-8"><title>{title}</title><meta http-equiv="refresh" content="0; url={url}">
<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="canonical" href="{url}"></head>
<body><p><a href="{url}">{title}</a></p></body>
</html>
"""


def _mend_pages(app: Sphinx, exception: Exception | None) -> None:
    """Faults in finished pages, and a proper page at the root (Jupyter Book writes a bare ``meta`` tag)."""
    if exception is not None or app.builder.name != "html":
        return
    for page in Path(app.outdir).rglob("*.html"):
        text = page.read_text("utf-8")
        new = text
        for pattern, replacement in _MENDS:
            new = pattern.sub(replacement, new)
        if new != text:
            part = page.with_suffix(".part")
            part.write_text(new, "utf-8")
            part.replace(page)
    root = app.builder.get_target_uri(app.config.root_doc)
    index = Path(app.outdir) / "index.html"
    if root != "index.html":
        part = index.with_suffix(".part")
        part.write_text(
            _REDIRECT.format(lang=app.config.language, title=app.config.project, url=root), "utf-8"
        )
        part.replace(index)


def setup(app: Sphinx) -> dict[str, Any]:
    _leave_excerpts_alone()
    links = CodeLinks()
    app.connect("env-updated", links.analyse, priority=100)  # before the linker's own, at 500
    app.connect("html-page-context", links.note)
    app.connect("build-finished", links.choose, priority=100)
    app.add_transform(ProofBodies)
    app.connect("builder-inited", _whole_html_handlers)
    app.connect("config-inited", _without_thebe, priority=1)
    app.connect("html-page-context", _scripts_once, priority=990)
    app.connect("build-finished", _mend_pages, priority=900)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
