"""The head of a page, the boxes to predict in, the quiz: on screen, on paper, and when written wrongly."""

from __future__ import annotations

import re

import pytest

PAGE = """
# A page

```{page-head}
:promise: Build *one* thing.
:minutes: 12
:runs-on: CPU
```

First words.

```{predict}
How many of $x$?
```

## Quiz

```{quiz} Which letter has a *tail*?
- [ ] The letter o.
  It is closed all around.
- [x] The letter q, as in `q`.
  It goes below the line.
```

```{quiz}
And which one is *round*?

It may be more than one.

- [x] The letter o.

  A circle, nearly.
- [ ] The letter l.

  A line.
```

After it.
"""


@pytest.fixture(scope="module")
def built(make_book, tmp_path_factory):
    out = {}
    for builder in ("html", "latex"):
        book = make_book(
            tmp_path_factory.mktemp(builder),
            ("pageparts", "booklatex"),
            conf="page_pdfs = True\nproject = 'P'\n",
        )
        book.write(
            {"CITATION.cff": CFF, "index.md": "# Book\n\n```{toctree}\n:caption: Part\npart/page\n```\n"}
        )
        book.write({"part/page.md": PAGE})
        out[builder] = book.build(builder)
        assert out[builder].warnings == []
    return out


CFF = "title: T\nauthors: [{name: A}]\nversion: 1\nyear: 2026\n"


def test_the_head_holds_promise_facts_and_downloads(built) -> None:
    page = built["html"].text("part/page.html")
    head = page[page.index("page-head") : page.index("First words")]
    assert re.search(r'<p class="promise">Build <em>one</em> thing\.</p>', head)
    assert "12 minutes" in head
    assert "CPU" in head
    assert 'href="../_pdf/part/page.pdf"' in head


def test_an_option_folds_over_its_explanation(built) -> None:
    page = built["html"].text("part/page.html")
    options = re.findall(
        r'<details class="quiz-option (\w+)">\s*<summary>(.*?)</summary>(.*?)</details>', page, re.S
    )
    assert [kind for kind, _, _ in options] == ["wrong", "right", "right", "wrong"]
    text = re.sub(r"<[^>]+>", "", options[1][1])
    assert text == "BThe letter q, as in q."  # no mark is left, the explanation is not in the summary
    assert "It goes below the line." in options[1][2]
    assert "Right." in options[1][2]
    assert "Not this one." in options[0][2]
    assert "[x]" not in page
    assert "[ ]" not in page


def test_questions_may_be_an_argument_or_paragraphs(built) -> None:
    page = built["html"].text("part/page.html")
    first, second = re.findall(r"quiz-question[^>]*>(.*?)</div>", page, re.S)
    assert "<em>tail</em>" in first
    assert "<em>round</em>" in second
    assert "more than one" in second


def test_paper_gives_the_answers_after_the_last_question(built) -> None:
    tex = next(built["latex"].out.glob("*.tex")).read_text("utf-8")
    at = [
        tex.index(text)
        for text in ("Question 1}", "tail", "Question 2}", "round", "{Answers}", "below the line")
    ]
    assert at == sorted(at)
    assert tex.count("{Answers}") == 1
    assert tex.index("A circle, nearly") < tex.index("After it.")
    assert "\\begin{bookbox}{predict}{Predict, then run}" in tex
    assert "_pdf" not in tex


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("```{quiz}\nOnly a question.\n```", "expected a question, then a list of options"),
        ("```{quiz} Q?\n- [x] One.\n  Why.\n```", "two options or more"),
        ("```{quiz} Q?\n- [ ] One.\n  Why.\n- [ ] Two.\n  Why.\n```", "at least one is right"),
        (
            "```{quiz} Q?\n- [x] One.\n  Why.\n- Two.\n  Why.\n```",
            r"option B to begin with \[ \] or \[x\], got 'Two",
        ),
        ("```{quiz} Q?\n- [x] One.\n  Why.\n- [ ] Two.\n```", "option B to be explained"),
        ("```{page-head}\n:minutes: 3\n```", r"missing: \['promise', 'runs-on'\]"),
        ("```{page-head}\n:promise: P\n:minutes: soon\n:runs-on: CPU\n```", "minutes"),
    ],
)
def test_what_is_written_wrongly_is_named(make_book, tmp_path, text: str, said: str) -> None:
    book = make_book(tmp_path, ("pageparts",))
    book.write({"CITATION.cff": CFF, "index.md": f"# Book\n\n{text}\n"})
    assert re.search(said, " ".join(book.build().warnings))
