"""Docstrings become clean reStructuredText, and every module of the package is in the reference."""

from __future__ import annotations

import sys

import api
import codeindex
import pytest


def rst(text: str) -> str:
    return "\n".join(api.to_rst(text.split("\n")))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Of `T` tokens.", "Of ``T`` tokens."),
        ("Of ``T`` tokens.", "Of ``T`` tokens."),
        ("A :ref:`label` stays.", "A :ref:`label` stays."),
        (r"The scale $1/\sqrt{d}$ is small.", r"The scale :math:`1/\sqrt{d}` is small."),
        ("It costs $5 or 6$ in all.", "It costs :math:`5 or 6` in all."),
        ("Book: attention-masks", "Taught in :ref:`attention-masks`."),
        ("Book: bert-mlm, bert-heads", "Taught in :ref:`bert-mlm`, :ref:`bert-heads`."),
    ],
)
def test_inline(text: str, expected: str) -> None:
    assert rst(text) == expected


def test_displayed_formula() -> None:
    assert rst("So\n\n$$y = x,$$\n\nwhere").split() == ["So", "..", "math::", "y", "=", "x,", "where"]
    assert ".. math::\n\n   y = x\n   z\n" in rst("$$\ny = x\nz\n$$\nwhere")


def test_open_formula_is_refused() -> None:
    with pytest.raises(ValueError, match="never closed"):
        rst("$$ y = x")


def test_indented_block_keeps_its_lines() -> None:
    block = ".. code-block:: none\n\n    a = 1\n    b = 2\n\n"
    assert rst("Head.\n\n    a = 1\n    b = 2\n\nTail.") == f"Head.\n\n{block}\nTail."


def test_sections_become_fields() -> None:
    out = rst(
        "Head.\n\nArgs:\n    q, k: queries and\n        keys.\n    **rest: more.\n\n"
        "Returns:\n    The pair (B, T): both.\n\nRaises:\n    TypeError, ValueError: when `q` is bad.\n\n"
        "Tail."
    )
    for line in (
        ":param q: queries and",
        ":param k: queries and",
        "        keys.",
        r":param \*\*rest: more.",
        ":returns: The pair (B, T): both.",
        ":raises TypeError: when ``q`` is bad.",
        ":raises ValueError: when ``q`` is bad.",
        "Tail.",
    ):
        assert line in out.split("\n")
    assert "code-block" not in out


SOURCE = '''"""A module."""

from __future__ import annotations
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path


class _Base:
    """Hidden."""


class Thing(_Base, dict):
    """Hold `x`.

    Attributes:
        x: what is held.

    Book: things
    """

    def at(self, path: Path) -> NOTHING:
        """Go there."""
'''


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package of one module in place of ours; gives the function that writes the module."""
    folder = tmp_path / "tiny_package"
    folder.mkdir()
    (folder / "__init__.py").touch()
    for module in (api, codeindex):
        monkeypatch.setattr(module, "PACKAGE", "tiny_package")
        monkeypatch.setattr(module, "package_folder", lambda: folder)
    monkeypatch.syspath_prepend(tmp_path)
    api.imported.cache_clear()
    yield (folder / "things.py").write_text
    api.imported.cache_clear()
    for name in [name for name in sys.modules if name.startswith("tiny_package")]:
        del sys.modules[name]


PAGE = "(things)=\n# Things\n\n```{api}\n```\n"


def test_reference_is_clean_and_links_the_page(tiny_book, package) -> None:
    package(SOURCE.replace(" -> NOTHING", ""))
    tiny_book.write({"index.md": PAGE})
    built = tiny_book.build()
    assert built.warnings == []
    html = built.text("index.html")
    assert 'id="tiny_package.things.Thing"' in html
    assert "_Base" not in html
    assert "what is held" in html
    assert 'href="#things"' in html


def test_an_unknown_name_of_ours_is_an_error(tiny_book, package) -> None:
    package(SOURCE.replace("NOTHING", "Nothing"))
    tiny_book.write({"index.md": PAGE})
    assert any("reference target not found: Nothing" in line for line in tiny_book.build().warnings)


def test_every_module_has_a_section() -> None:
    names = [name for name, _ in codeindex.modules(codeindex.package_folder())]
    text = api.markdown(names)
    for name in names:
        assert f".. automodule:: {name}\n" in text
    assert "textbook_code.layers.attention" in names
