"""Docstrings become clean reStructuredText, and every module of the package is in the reference."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import api
import codeindex
import pytest

ROOT = Path(__file__).resolve().parents[2]


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


def test_a_letter_begins_no_list() -> None:
    assert ":param b: \\B." in rst("Args:\n    b: B.\n")
    assert ":param b: B and more." in rst("Args:\n    b: B and more.\n")


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


def test_rooms_are_chosen_by_name() -> None:
    names = ["pkg", "pkg.a", "pkg.a.one", "pkg.a.two", "pkg.ab", "pkg.b"]
    names = [name.replace("pkg", codeindex.PACKAGE) for name in names]
    for rooms, expected in (
        ([], names),
        (["a"], names[1:4]),
        (["b", "."], [names[5], names[0]]),
        (["a."], names[1:2]),
    ):
        assert api.chosen(names, rooms) == expected
    with pytest.raises(ValueError, match=r"there is no textbook_code\.c$"):
        api.chosen(names, ["b", "c"])


def test_an_unknown_room_is_an_error(tiny_book, package) -> None:
    package(SOURCE.replace(" -> NOTHING", ""))
    tiny_book.write({"index.md": PAGE.replace("{api}", "{api} thinks")})
    assert any("there is no tiny_package.thinks" in line for line in tiny_book.build().warnings)


def test_every_module_has_one_section() -> None:
    modules = codeindex.modules(codeindex.package_folder())
    names = [name for name, path in modules if path.read_text("utf-8").strip()]
    pages = [page.read_text("utf-8") for page in (ROOT / "book/appendix/api").glob("*.md")]
    rooms = [re.search(r"^```\{api\} (.+)$", page, re.MULTILINE)[1].split() for page in pages]
    shown = [name for page in rooms for name in api.chosen(names, page)]
    assert sorted(shown) == sorted(names)
    text = api.markdown(names)
    for name in names:
        assert f".. automodule:: {name}\n" in text
    assert "textbook_code.layers.attention" in names
