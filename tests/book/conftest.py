"""What the tests of the book's own extensions share: their import path, and a book small enough to test."""

from __future__ import annotations

import io
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

ROOT = Path(__file__).resolve().parents[2]
for folder in (ROOT / "book" / "_ext", ROOT / "book" / "_tools", ROOT / "tests" / "book"):
    sys.path.insert(0, str(folder))

_CONF = """
extensions = ["myst_parser", "sphinx_design", "sphinxcontrib.bibtex", {extensions}]
source_suffix = {{".rst": "restructuredtext"}}  # Sphinx's own default is one dict for all books of a process
myst_enable_extensions = ["amsmath", "colon_fence", "deflist", "dollarmath"]
bibtex_bibfiles = ["references.bib"]
bibtex_reference_style = "author_year"
nitpicky = True
html_theme = "basic"
html_static_path = [{static!r}]
exclude_patterns = ["_build"]
"""
_BIB = """
@inproceedings{devlin2019bert, author = {Devlin, Jacob and Chang, Ming-Wei}, title = {{BERT}}, year = {2019},
  booktitle = {NAACL}, eprint = {1810.04805}, archivePrefix = {arXiv},
  url = {https://arxiv.org/abs/1810.04805}}
"""


@dataclass
class Built:
    """A tiny book after its build."""

    out: Path
    warnings: list[str]

    def text(self, name: str) -> str:
        return (self.out / name).read_text("utf-8")


@dataclass
class TinyBook:
    """A book in a temporary folder; ``write`` adds files, ``build`` runs Sphinx on them."""

    root: Path
    extensions: tuple[str, ...] = ("generated",)
    conf: str = ""  # more settings

    def write(self, files: dict[str, str]) -> None:
        for name, text in files.items():
            path = self.root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")

    def build(self, builder: str = "html") -> Built:
        from sphinx.application import Sphinx
        from sphinx.util.docutils import docutils_namespace, patch_docutils

        conf = _CONF.format(
            extensions=", ".join(map(repr, self.extensions)), static=str(ROOT / "book" / "_static")
        )
        self.write({"conf.py": conf + self.conf, "references.bib": _BIB})
        out = self.root / "_build" / builder
        warnings = io.StringIO()
        with patch_docutils(str(self.root)), docutils_namespace():
            doctrees = self.root / "_build" / "doctrees"
            app = Sphinx(
                str(self.root),
                str(self.root),
                str(out),
                str(doctrees),
                builder,
                status=None,
                warning=warnings,
            )
            app.build()
        lines = [re.sub(r"\x1b\[[0-9;]*m", "", line) for line in warnings.getvalue().splitlines()]
        return Built(out, [line for line in lines if line.strip()])


@pytest.fixture
def tiny_book(tmp_path: Path) -> TinyBook:
    return TinyBook(tmp_path)


@pytest.fixture(scope="session")
def make_book() -> type[TinyBook]:
    """For a book that several tests share: ``make_book(folder, extensions)``."""
    return TinyBook


_SWITCHES = ("--no-sandbox", "--disable-gpu", "--use-fake-device-for-media-stream")  # a camera for all
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


@pytest.fixture(scope="session")
def browser_path() -> str:
    """The machine's browser: the one that CHROMIUM names, else the first on the path."""
    found = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, BROWSERS)), None)
    if not found:
        pytest.fail(
            f"no browser: install Chromium or name one in CHROMIUM (looked for {', '.join(BROWSERS)})"
        )
    return found


@pytest.fixture(scope="module")
def chromium(browser_path: str) -> Iterator[Browser]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=browser_path, args=list(_SWITCHES))
        yield browser
        browser.close()


@pytest.fixture
def opened(chromium: Browser) -> Callable[..., AbstractContextManager[Page]]:
    """``opened(file, ready)``: a page opened as a file, once there is what the selector `ready` finds.

    Any error in it fails the test, and so does a request for what is no file. More arguments are the browser
    context's.
    """

    @contextmanager
    def open_page(file: Path, ready: str, **settings: Any) -> Iterator[Page]:
        problems: list[str] = []
        with chromium.new_context(**settings) as context:
            tab = context.new_page()
            tab.on("pageerror", lambda error: problems.append(str(error)))
            tab.on("request", lambda request: request.url.startswith("file:") or problems.append(request.url))
            tab.goto(file.as_uri())
            tab.wait_for_selector(ready)
            yield tab
        assert not problems

    return open_page
