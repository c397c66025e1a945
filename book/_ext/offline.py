"""MathJax from an installed package instead of somebody's server.

The package ``django-static-mathjax`` is MathJax's own release in a wheel. The one script that the pages
load and its fonts are copied into the HTML; nothing of it is committed.
"""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx
from sphinx.errors import ExtensionError

SCRIPT = Path("tex-mml-chtml.js")
PARTS = (SCRIPT, Path("output/chtml/fonts/woff-v2"))
FOLDER = "mathjax"


def mathjax_source() -> Path:
    """The folder ``es5`` of the installed MathJax."""
    spec = importlib.util.find_spec("mathjax")
    for place in (spec.submodule_search_locations or []) if spec else []:
        folder = Path(place) / "static" / "mathjax" / "es5"
        if (folder / SCRIPT).is_file():
            return folder
    raise ExtensionError(
        'MathJax is missing: pip install "textbook_code[book]" brings it (django-static-mathjax)'
    )


def _copy(app: Sphinx, exception: Exception | None) -> None:
    if exception is not None or app.builder.format != "html":
        return
    source, target = mathjax_source(), Path(app.outdir) / "_static" / FOLDER
    for part in PARTS:
        into = target / part
        if into.exists():
            continue
        into.parent.mkdir(parents=True, exist_ok=True)
        half = into.with_name(into.name + ".part")
        if (source / part).is_dir():
            shutil.rmtree(half, ignore_errors=True)
            shutil.copytree(source / part, half)
        else:
            shutil.copyfile(source / part, half)
        half.replace(into)


def _local(app: Sphinx) -> None:
    if app.builder.format == "html":
        mathjax_source()  # fail before the work, not after it
        app.config.mathjax_path = f"{FOLDER}/{SCRIPT}"


def setup(app: Sphinx) -> dict[str, Any]:
    app.connect("builder-inited", _local)
    app.connect("build-finished", _copy)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
