"""The linter for numbers typed by hand: what it must find, what it must leave alone, and the whole book."""

from __future__ import annotations

from pathlib import Path

import lint_numbers
import pytest
from lint_numbers import Allowed, Linter

ROOT = Path(__file__).resolve().parents[2]


def findings(tmp_path: Path, text: str, allowed: list[Allowed] | None = None) -> list[tuple[int, str]]:
    page = tmp_path / "page.md"
    page.write_text(text, encoding="utf-8")
    return [(f.line, f.text) for f in Linter(allowed or [], tmp_path).page(page)]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("The loss falls to 1.37 here.", "1.37"),
        ("It reaches 93 % of them.", "93 %"),
        ("It reaches 93% of them.", "93%"),
        ("It reaches 80.5 per cent.", "80.5 per cent"),
        ("About forty per cent are padding.", "forty per cent"),
        ("About thirty-five percent are padding.", "thirty-five percent"),
        ("It gains 2 percentage points.", "2 percentage points"),
        ("A step takes 12 ms.", "12 ms"),
        ("A step takes 12\u00a0µs.", "12 µs"),
        ("It runs in 40s.", "40s"),
        ("It runs in two seconds.", "two seconds"),
        ("It runs for 3 hours.", "3 hours"),
        ("The file has 91 MB.", "91 MB"),
        ("The matrix has 1,048,576 bytes.", "1,048,576 bytes"),
        ("It needs 512 KiB.", "512 KiB"),
        ("This is 3× as fast.", "3×"),
        ("This is 2.5 × as fast.", "2.5 ×"),
        ("This is 4 times faster.", "4 times faster"),
        ("This is three times as fast.", "three times as"),
        ("A 10-fold gain.", "10-fold"),
        ("It makes 25 tokens/s.", "25 tokens/s"),
        ("It makes 25 tokens per second.", "25 tokens per second"),
        ("The machine gives 40 GFLOP/s.", "40 GFLOP/s"),
        ("It has 110M parameters.", "110M"),
        ("It has 22 million parameters.", "22 million"),
        ("An error of 3e-6 remains.", "3e-6"),
        ("An error of 3 × 10⁻⁶ remains.", "3 × 10⁻⁶"),
        ("# A heading at 0.5 accuracy", "0.5"),
        ("- a list item of 0.5", "0.5"),
        ("| a | b |\n|---|---|\n| x | 0.5 |", "0.5"),
        ("[a link with 0.5](https://example.org/1.5)", "0.5"),
        ("![a curve that falls to 0.5](curve.svg)", "0.5"),
        ("```{note}\nInside a note 0.5 is found.\n```", "0.5"),
        ("````{admonition} A title of 0.5\nText.\n````", "0.5"),
        (":::{tip}\nInside 0.5 too.\n:::", "0.5"),
        ("```{figure} a.svg\n:alt: it falls to 0.5\n\nA caption.\n```", "0.5"),
        ("```{figure} a.svg\n:alt: it falls\n\nA caption of 0.5.\n```", "0.5"),
        ("```{list-table}\n* - cell\n  - 0.5\n```", "0.5"),
        (
            "```{code-cell} python3\n---\nmystnb:\n  figure:\n    caption: It falls to 0.5.\n---\nx = 1\n```",
            "0.5",
        ),
        ("Bold **0.5** counts.", "0.5"),
        ("Term\n: is 0.5 wide.", "0.5"),
    ],
)
def test_finds(tmp_path: Path, text: str, found: str) -> None:
    assert [what for _, what in findings(tmp_path, text)] == [found]


@pytest.mark.parametrize(
    "text",
    [
        "There are 12 heads in 6 layers of width 384.",
        "A sentence of 30,522 pieces, an 8 × 128 batch, one in 1998.",
        "The scale is $1/\\sqrt{d} = 0.125$.",
        "$$\nx = 0.5\n$$",
        "\\begin{align}\nx &= 0.5\n\\end{align}",
        "Set `dropout=0.1` and wait `2.5 s`.",
        "```python\nx = 0.5\n```",
        "```{code-cell} python3\nprint(0.5)\n```",
        "```{code-cell} python3\n---\ntags: [hide-input]\n---\nprint(0.5)\n```",
        "It takes {glue:text}`seconds:.1f` and reaches {glue}`accuracy`.",
        "BERT reaches {published}`bert-glue`, or {cite:p}`devlin2019bert`.",
        "See {eq}`eq-1.5` and {numref}`figure 2.5 <fig>`.",
        "As in section 3.2 and Table 2.1 of the paper, §5.4, arXiv:1810.04805.",
        "```{page-head}\n:promise: all of attention\n:minutes: 45\n```",
        "```{math}\n:label: eq\nx = 0.5\n```",
        "```{literalinclude} a.py\n:lines: 1-5\n:emphasize-lines: 2\n```",
        "Version 1.2.3 is not a decimal.",
        "(a-label)=\n# Title",
        "<!-- 0.5 -->",
        "---\nkernelspec:\n  version: 0.5\n---\n# Title",
        "The first of 16 bits, and 4 more.",
        "[text](https://example.org/0.5)",
        "Four times we tried; it was the second time.",
    ],
)
def test_leaves_alone(tmp_path: Path, text: str) -> None:
    assert findings(tmp_path, text) == []


def test_names_the_line(tmp_path: Path) -> None:
    text = "# Title\n\nFirst line,\nthen `0.5` and 0.5,\nthen 7 %.\n\n"
    text += "````{note}\n```{tip}\nDeep: 9 ms.\n```\n````\n"
    assert findings(tmp_path, text) == [(4, "0.5"), (5, "7 %"), (9, "9 ms")]


def test_finding_reads_well(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("It took 9 ms.")
    assert str(Linter([], tmp_path).page(page)[0]) == (
        f"{page}:1: '9 ms' is a number with a unit typed by hand: glue it, cite it or allow it"
    )


def test_allow_list_allows_its_words_only(tmp_path: Path) -> None:
    entry = Allowed("page.md", "Python 3.11", "a version")
    linter = Linter([entry], tmp_path)
    page = tmp_path / "page.md"
    page.write_text("It needs Python\n3.11 and 3.11 of something else.")
    assert [(f.line, f.text) for f in linter.page(page)] == [(2, "3.11")]
    assert entry.used
    assert linter.unused() == []


def test_allow_list_is_for_its_page(tmp_path: Path) -> None:
    entry = Allowed("appendix/*.md", "Python 3.11", "a version")
    linter = Linter([entry], tmp_path)
    page = tmp_path / "page.md"
    page.write_text("Python 3.11")
    assert len(linter.page(page)) == 1
    assert "allows nothing" in linter.unused()[0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- {page: a.md, text: 'Python 3.11'}", "expected page, text and reason"),
        ("- {page: a.md, text: 'Python 3.11', reason: ''}", "reason must be a quoted string"),
        ("- {page: a.md, text: 3.11, reason: why}", "text must be a quoted string"),
        ("- {page: a.md, text: 'Python', reason: why}", "there is no number"),
    ],
)
def test_allow_list_is_checked(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "allowed.yml"
    path.write_text(text)
    with pytest.raises(lint_numbers.AllowListError, match=message):
        lint_numbers.load_allowed(path)


def test_command_exits_with_the_findings(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    page = tmp_path / "book" / "page.md"
    page.parent.mkdir()
    page.write_text("It took 9 ms.")
    assert lint_numbers.main([]) == 1
    assert "book/page.md:1: '9 ms'" in capsys.readouterr().out
    page.write_text("It took a while.")
    assert lint_numbers.main([]) == 0
    (tmp_path / lint_numbers.ALLOWED).write_text("- {page: page.md, text: '9 ms', reason: why}")
    assert lint_numbers.main([]) == 1
    assert "allows nothing" in capsys.readouterr().out
    (tmp_path / lint_numbers.ALLOWED).write_text("- {page: page.md}")
    assert lint_numbers.main([]) == 2
    (tmp_path / lint_numbers.ALLOWED).write_text("")
    assert lint_numbers.main(["book/other.md"]) == 2
    assert "no such page" in capsys.readouterr().err


def test_the_book_is_clean(monkeypatch) -> None:
    monkeypatch.chdir(ROOT)
    linter = Linter(lint_numbers.load_allowed(lint_numbers.ALLOWED))
    pages = sorted(lint_numbers.BOOK.rglob("*.md"))
    assert pages
    found = [str(finding) for page in pages for finding in linter.page(page)]
    assert found + linter.unused() == []
