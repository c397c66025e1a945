"""Executes the pages before Sphinx reads them, and has a page read again when its outputs are new.

So `jupyter-book build .` alone gives the same book as `make book`: pages run side by side, each in the
process that execute.py gives it, and only those whose cells or inputs changed. A page that fails ends the
build. Sphinx itself never runs a cell.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import myst_nb.core.execute.cache as myst_cache
from sphinx.application import Sphinx
from sphinx.config import Config
from sphinx.environment import BuildEnvironment
from sphinx.errors import ExtensionError, SphinxError
from sphinx.util import logging

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "_tools"))

from execute import Book, PagesFailedError

logger = logging.getLogger(__name__)


class PageError(SphinxError):
    """Pages failed; the message is their tracebacks."""

    category = "The book was not built, because a page failed"


def place_cache(app: Sphinx, config: Config) -> None:
    """One cache, beside the builders' output, whoever starts the build and wherever."""
    config.nb_execution_cache_path = str(Path(app.outdir).parent / ".jupyter_cache")


def execute_pages(app: Sphinx) -> None:
    """Bring the cache up to date, where the builder will look for it."""
    book = Book(Path(app.srcdir), Path(app.outdir).parent)
    app.pagecache_keys = {page.name: page.key for page in book.pages}  # type: ignore[attr-defined]
    try:
        book.execute(say=lambda text: logger.info("pages: %s", text))
    except PagesFailedError as failed:
        raise PageError(str(failed)) from None


def outdated(
    app: Sphinx, env: BuildEnvironment, added: set[str], changed: set[str], removed: set[str]
) -> list[str]:
    """The pages whose key is not the one they were last read with."""
    keys, read = app.pagecache_keys, getattr(env, "pagecache_keys", {})  # type: ignore[attr-defined]
    env.pagecache_keys = keys  # type: ignore[attr-defined]
    return [page for page, key in keys.items() if page in env.found_docs and read.get(page) != key]


def note_reading(app: Sphinx, env: BuildEnvironment, docnames: list[str]) -> None:
    app.pagecache_reads = bool(docnames)  # type: ignore[attr-defined]


def write_again(app: Sphinx, env: BuildEnvironment) -> list[str]:
    """All pages, once any page was read, now or by another builder since this one last wrote.

    Sphinx writes the pages that it has read in this very run, or whose source is new: a page with new outputs
    that the LaTeX builder has read would stay old in the HTML, and so would numbers that refer to it.
    """
    known, written = Path(app.doctreedir, "environment.pickle"), Path(app.outdir, "searchindex.js")
    by_another = known.exists() and (not written.exists() or known.stat().st_mtime > written.stat().st_mtime)
    return sorted(env.found_docs) if app.pagecache_reads or by_another else []  # type: ignore[attr-defined]


def refuse(notebook: Any, *args: Any, **kwargs: Any) -> None:
    """Stands where myst-nb would run a notebook itself, one after the other and with no key."""
    raise ExtensionError("a page with code is not in the notebook cache: is it missing from _toc.yml?")


def setup(app: Sphinx) -> dict[str, Any]:
    myst_cache.single_nb_execution = refuse
    app.connect("config-inited", place_cache)
    app.connect("builder-inited", execute_pages)
    app.connect("env-get-outdated", outdated)
    app.connect("env-before-read-docs", note_reading)
    app.connect("env-updated", write_again)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
