"""``{person-demo}``: give the int8 network a picture, and see what it says of it.

In the HTML a script turns the figure into an instrument that runs the network, compiled to WebAssembly, from
static files; without scripts, in the PDF and in notebooks it is a still of the same network's answers. The
content is the caption. Nothing of it is committed: the files are made from the int8 model on the first build
and kept under ``_build/person-demo``.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path
from typing import Any

from docutils import nodes
from docutils.parsers.rst import directives
from generated import build_file
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.errors import ExtensionError
from sphinx.util.docutils import SphinxDirective

CLASS = "person-demo"
CHECKPOINT, MODEL = "person-vit", "model_int8.tflite"
FOLDER, DATA = "person-demo", "person-data.js"
SCRIPT, STYLE = "person-demo.js", "person-demo.css"
ALT = (
    "Four test pictures of 32 by 32 pixels, and below each the same picture darkened except where the last "
    "block looks, with the verdict, a person or no person, and the logit in steps and in units."
)
CAPTION = (
    "What the int8 network says of four test pictures, and where its last block looks. On screen this figure "
    "is an instrument: the same network runs as WebAssembly in your browser, on the samples, on a picture "
    "of your own, on what you paint or on your webcam."
)


def model_file() -> Path:
    """The int8 model of the checkpoint."""
    from textbook_code.checkpoints import path

    file = path(CHECKPOINT) / MODEL
    if not file.is_file():
        raise ExtensionError(f"person-demo: there is no model at {file}")
    return file


def key() -> str:
    """What the files depend on: the model, the code that compiles and draws it, and the pictures' source."""
    import textbook_code
    from textbook_code.data.sources import SOURCES

    package = Path(textbook_code.__file__).parent
    made_by = [
        model_file(),
        Path(__file__).with_name("person_demo_data.py"),
        package / "deploy" / "wasm.py",
        package / "deploy" / "wasm.c",
        package / "deploy" / "graph.py",
        package / "deploy" / "planner.py",
        package / "figures.py",
        *sorted((package / "deploy" / "c_codegen").rglob("*.[pch]*")),
        *sorted((package / "data" / "people").rglob("*.py")),
        *sorted((package / "data").glob("pedestrians/*")),
    ]
    parts = [hashlib.sha256(path.read_bytes()).hexdigest() for path in made_by if path.is_file()]
    parts += [source.fingerprint for name, source in sorted(SOURCES.items()) if "emoji" in name]
    return hashlib.sha256("".join(parts).encode()).hexdigest()[:16]


def made(root: Path) -> Path:
    """The folder with the current files, which are made where they are missing."""
    folder = build_file(root, FOLDER) / key()
    if not folder.exists():
        from person_demo_data import write

        write(model_file(), folder)
        for older in folder.parent.iterdir():
            if older != folder:
                shutil.rmtree(older, ignore_errors=True)
    return folder


class PersonDemo(SphinxDirective):
    """``{person-demo}`` with the caption as content."""

    has_content = True
    option_spec = {"name": directives.unchanged, "alt": directives.unchanged}  # noqa: RUF012

    def run(self) -> list[nodes.Node]:
        root = Path(self.env.app.srcdir)
        still = made(root) / "still.*"
        self.options.setdefault("name", "fig-person-demo")
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
    """The pages with a demonstration, and the key of the files that each was read with."""
    if not hasattr(env, "person_demo_pages"):
        env.person_demo_pages = {}  # type: ignore[attr-defined]
    return env.person_demo_pages  # type: ignore[attr-defined, no-any-return]


def _outdated(app: Sphinx, env: BuildEnvironment, added: set, changed: set, removed: set) -> list[str]:
    """The pages whose files are gone, or were made from older inputs."""
    pages = _pages(env)
    if not pages:
        return []
    now, folder = key(), build_file(Path(app.srcdir), FOLDER)
    return [page for page, was in pages.items() if was != now or not (folder / was).exists()]


def _purge(app: Sphinx, env: BuildEnvironment, docname: str) -> None:
    _pages(env).pop(docname, None)


def _merge(app: Sphinx, env: BuildEnvironment, docnames: list[str], other: BuildEnvironment) -> None:
    _pages(env).update({page: was for page, was in _pages(other).items() if page in docnames})


def _scripts(app: Sphinx, page: str, template: str, context: dict[str, Any], doctree: Any) -> None:
    if doctree is not None and page in _pages(app.env):
        app.add_css_file(STYLE)
        version = {"data-version": _pages(app.env)[page]}
        app.add_js_file(f"{FOLDER}/{DATA}", priority=600, loading_method="defer", **version)
        app.add_js_file(SCRIPT, priority=601, loading_method="defer")


def _copy(app: Sphinx, exception: Exception | None) -> None:
    if exception is not None or app.builder.format != "html" or not _pages(app.env):
        return
    target = Path(app.outdir) / "_static" / FOLDER
    stamp = target / "version.txt"
    if stamp.is_file() and stamp.read_text("ascii") == key():
        return
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(made(Path(app.srcdir)) / "data", target)
    stamp.write_text(key(), "ascii")


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_directive("person-demo", PersonDemo)
    app.connect("env-get-outdated", _outdated)
    app.connect("env-purge-doc", _purge)
    app.connect("env-merge-info", _merge)
    app.connect("html-page-context", _scripts)
    app.connect("build-finished", _copy)
    return {"version": "1", "env_version": 1, "parallel_read_safe": True, "parallel_write_safe": True}
