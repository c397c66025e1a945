"""``{attention-explorer}``: type a sentence, pick a layer and a head, see the weights.

In the HTML a script turns the figure into an instrument that runs MiniLM from static files; without scripts,
in the PDF and in notebooks it is a still of the same data. The content is the caption. Nothing of it is
committed: the files are made from the fetched model on the first build and kept under ``_build/explorer``.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path
from typing import Any

from docutils import nodes
from docutils.parsers.rst import directives
from generated import build_file, digest
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.util.docutils import SphinxDirective

CLASS = "attention-explorer"
SCRIPTS = ("attention-model.js", "attention-explorer.js")
STYLE = "attention-explorer.css"
ALT = (
    "All 72 heads of MiniLM as small heat maps, six layers by twelve heads, and one of them enlarged with "
    "its words: in layer 0, head 4, the row of bank is darkest at river."
)
CAPTION = (
    "The attention of all 72 heads of MiniLM to one sentence, and one head enlarged: in layer 0, head 4, "
    "*bank* looks at *river*. Rows look, columns are looked at; the shade goes with the square root of the "
    "weight. On screen this figure is an instrument: pick a layer, a head and a word with the mouse or the "
    "arrow keys, or type a sentence of your own, which MiniLM then reads inside your browser."
)


def key() -> str:
    """What the files depend on: the model, the code that reads it, and the code that writes them."""
    import textbook_code
    from textbook_code.data.sources import SOURCES

    package = Path(textbook_code.__file__).parent
    made_by = (
        Path(__file__).with_name("explorer_data.py"),
        package / "layers",
        package / "models" / "text" / "bert.py",
        package / "data" / "text.py",
        package / "figures.py",
    )
    parts = [SOURCES["minilm"].fingerprint, *(str(digest(path)) for path in made_by)]
    return hashlib.sha256("".join(parts).encode()).hexdigest()[:16]


def made(root: Path) -> Path:
    """The folder with the current files, which are made where they are missing."""
    folder = build_file(root, "explorer") / key()
    if not folder.exists():
        from explorer_data import write

        from textbook_code.data.sources import fetch
        from textbook_code.data.text import load_tokenizer

        model = fetch("minilm", progress=False)
        write(model, load_tokenizer(model), folder)
        for older in folder.parent.iterdir():
            if older != folder:
                shutil.rmtree(older, ignore_errors=True)
    return folder


class AttentionExplorer(SphinxDirective):
    """``{attention-explorer}`` with the caption as content."""

    has_content = True
    option_spec = {"name": directives.unchanged, "alt": directives.unchanged}  # noqa: RUF012

    def run(self) -> list[nodes.Node]:
        root = Path(self.env.app.srcdir)
        still = made(root) / "still.*"
        self.options.setdefault("name", "fig-attention-explorer")
        image = nodes.image(uri="/" + os.path.relpath(still, root), alt=self.options.get("alt", ALT))
        figure = nodes.figure("", image, classes=[CLASS])
        self.set_source_info(figure)
        self.set_source_info(image)
        text = "\n".join(self.content) or CAPTION
        inline, messages = self.state.inline_text(text, self.lineno)
        figure += nodes.caption(text, "", *inline)
        self.add_name(figure)
        _pages(self.env)[self.env.docname] = key()
        return [figure, *messages]


def _pages(env: BuildEnvironment) -> dict[str, str]:
    """The pages with an explorer, and the key of the still that each was read with."""
    if not hasattr(env, "explorer_pages"):
        env.explorer_pages = {}  # type: ignore[attr-defined]
    return env.explorer_pages  # type: ignore[attr-defined, no-any-return]


def _outdated(app: Sphinx, env: BuildEnvironment, added: set, changed: set, removed: set) -> list[str]:
    """The pages whose still is gone, or was made from older inputs."""
    folder = build_file(Path(app.srcdir), "explorer")
    return [page for page, was in _pages(env).items() if was != key() or not (folder / was).exists()]


def _purge(app: Sphinx, env: BuildEnvironment, docname: str) -> None:
    _pages(env).pop(docname, None)


def _merge(app: Sphinx, env: BuildEnvironment, docnames: list[str], other: BuildEnvironment) -> None:
    _pages(env).update({page: was for page, was in _pages(other).items() if page in docnames})


def _scripts(app: Sphinx, page: str, template: str, context: dict[str, Any], doctree: Any) -> None:
    if doctree is not None and page in _pages(app.env):
        app.add_css_file(STYLE)
        for script in SCRIPTS:
            app.add_js_file(script, loading_method="defer", **{"data-version": key()})


def _copy(app: Sphinx, exception: Exception | None) -> None:
    if exception is not None or app.builder.format != "html" or not _pages(app.env):
        return
    target = Path(app.outdir) / "_static" / "explorer"
    stamp = target / "version.txt"
    if stamp.is_file() and stamp.read_text("ascii") == key():
        return
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(made(Path(app.srcdir)) / "data", target)
    stamp.write_text(key(), "ascii")


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_directive("attention-explorer", AttentionExplorer)
    app.connect("env-get-outdated", _outdated)
    app.connect("env-purge-doc", _purge)
    app.connect("env-merge-info", _merge)
    app.connect("html-page-context", _scripts)
    app.connect("build-finished", _copy)
    return {"version": "1", "env_version": 2, "parallel_read_safe": True, "parallel_write_safe": True}
