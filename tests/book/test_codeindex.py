"""The bridge between package and pages holds on both sides."""

from __future__ import annotations

from pathlib import Path

import codeindex
import pytest

ROOT = Path(__file__).resolve().parents[2]

SOURCE = '''"""A module.

Book: things
"""


def use(x):
    """Use it. Then rest.

    Book: things-use, things
    """


def _hidden():
    """No line needed."""


class Bare:
    """Says nothing.

    def method(self): ...
    """
'''


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "package"
    (folder / "_private").mkdir(parents=True)
    for name, text in {
        "__init__.py": "",
        "things.py": SOURCE,
        "_secret.py": "def f(): pass",
        "_private/__init__.py": "def g(): pass",
    }.items():
        (folder / name).write_text(text)
    return folder


def test_entries_are_the_public_objects(folder: Path) -> None:
    found = [(item.qualified, item.kind, item.labels) for item in codeindex.entries(folder)]
    assert found == [
        ("package.things", "module", ("things",)),
        ("package.things.use", "function", ("things-use", "things")),
        ("package.things.Bare", "class", ()),
    ]


def test_problems_name_what_is_missing_and_where(folder: Path) -> None:
    problems = codeindex.problems(codeindex.entries(folder), {"things"})
    assert problems == [
        f"{folder / 'things.py'}:7: package.things.use: no page defines the label 'things-use'",
        f"{folder / 'things.py'}:18: package.things.Bare: its docstring has no line 'Book: <label>'",
    ]
    fixed = (folder / "things.py").read_text().replace("Says nothing.", "Says.\n\n    Book: things")
    (folder / "things.py").write_text(fixed)
    assert codeindex.problems(codeindex.entries(folder), {"things", "things-use"}) == []


def test_labels_inside_code_blocks_are_none() -> None:
    page = "(a)=\n# A\n\n````md\n(b)=\n```\n(c)=\n```\n````\n\n(d-e)=\n## D\n"
    assert codeindex.page_labels(page) == ["a", "d-e"]


def test_page_code_is_the_reverse(folder: Path) -> None:
    box = codeindex.page_markdown(codeindex.entries(folder), ["things-use"])
    assert "{py:func}`~package.things.use`: Use it." in box
    assert "Bare" not in box
    assert codeindex.page_markdown(codeindex.entries(folder), ["other"]) == ""


def test_index_links_both_ways(tiny_book) -> None:
    toctree = "```{toctree}\nbook/index\nbook/api\n```"
    automodule = ".. automodule:: textbook_code.layers.attention\n   :members:"
    tiny_book.write(
        {
            "index.md": f"(attention)=\n# Index\n\n{toctree}\n\n```{{code-index}}\n```\n",
            "book/index.md": "(attention-scaled)=\n# Scaled\n\n```{page-code}\n```\n",
            "book/api.md": f"# API\n\n```{{eval-rst}}\n{automodule}\n```\n",
        }
    )
    built = tiny_book.build()
    index = built.text("index.html")
    assert 'href="book/api.html#textbook_code.layers.attention.attention"' in index
    assert 'href="book/index.html#attention-scaled"' in index
    box = built.text("book/index.html")
    assert "Code of this page" in box
    assert 'href="api.html#textbook_code.layers.attention.attention"' in box


def test_every_public_object_names_a_section_of_the_book() -> None:
    items = codeindex.entries(codeindex.package_folder())
    assert len(items) > 20
    assert codeindex.problems(items, set(codeindex.book_labels(ROOT / "book"))) == []


def test_labels_are_defined_once() -> None:
    seen: dict[str, Path] = {}
    for page in sorted((ROOT / "book").rglob("*.md")):
        for label in codeindex.page_labels(page.read_text("utf-8")):
            assert label not in seen, f"{label!r} is defined in {seen[label]} and in {page}"
            seen[label] = page
    assert "notation" in seen
