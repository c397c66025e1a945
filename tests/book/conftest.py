"""What the tests of the book's own extensions share: their import path, and a book small enough to test."""

from __future__ import annotations

import io
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
for folder in ("_ext", "_tools"):
    sys.path.insert(0, str(ROOT / "book" / folder))

_CONF = """
extensions = ["myst_parser", "sphinx_design", "sphinxcontrib.bibtex", {extensions}]
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
  booktitle = {NAACL}}
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
        self.write({"conf.py": conf, "references.bib": _BIB})
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
