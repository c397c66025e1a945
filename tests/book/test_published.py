"""Figures from papers: entries are complete, every tag on a page resolves, the role prints the citation."""

from __future__ import annotations

import re
from pathlib import Path

import published
import pytest

ROOT = Path(__file__).resolve().parents[2]
ENTRY = """
bert-glue:
  figure: "80.5 %"
  what: "BERT, GLUE score"
  source: "The abstract."
  place: "Last sentence"
  cite: devlin2019bert
  tag: published
"""


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (('  place: "Last sentence"\n', ""), "expected the fields"),
        (("published", "measured"), "tag must be 'published'"),
        (('"80.5 %"', "80.5"), "figure must be a quoted string, got 80.5"),
        (('"The abstract."', '""'), "source must be a quoted string"),
    ],
)
def test_load_refuses_bad_entries(tmp_path: Path, change: tuple[str, str], message: str) -> None:
    path = tmp_path / "published.yml"
    path.write_text(ENTRY.replace(*change))
    with pytest.raises(published.PublishedError, match=message):
        published.load(path)


def test_role_prints_figure_and_citation(tiny_book) -> None:
    page = (
        "# Page\n\nBERT reaches {published}`bert-glue`; again {published}`!bert-glue`.\n\n"
        "```{published-table}\n```\n\n```{bibliography}\n```\n"
    )
    tiny_book.write({"index.md": page, "book/published.yml": ENTRY})
    built = tiny_book.build()
    assert built.warnings == []
    html = built.text("index.html")
    sentence = re.sub(r"<[^>]+>", "", html[html.index("BERT reaches") : html.index("<table")]).split("\n")[0]
    assert sentence == "BERT reaches 80.5 % (published, Devlin and Chang [2019]); again 80.5 %."
    assert "Last sentence. The abstract." in html


def test_bibliography_has_plain_entries_that_are_linked(tiny_book) -> None:
    page = "# Page\n\n{cite:p}`devlin2019bert`.\n\n```{bibliography}\n:style: book\n```\n"
    tiny_book.write({"index.md": page, "book/published.yml": ENTRY})
    built = tiny_book.build()
    assert built.warnings == []
    html = built.text("index.html")
    target = re.search(r'<a class="reference internal" href="#([^"]+)"[^>]*>', html)
    assert target
    entry = html[html.index('class="bib-entry') :]
    assert f'id="{target[1]}"' in html
    assert entry.count("arxiv.org/abs/1810.04805") == 1  # not once as URL and once as number
    assert "doc-biblioentry" not in html


def test_bibliography_is_printed_on_its_page(tiny_book) -> None:
    page = "(bibliography)=\n# List\n\n{cite:p}`devlin2019bert`.\n\n```{bibliography}\n```\n\n## Behind it\n"
    tiny_book.write({"index.md": page, "book/published.yml": ENTRY})
    tex = next(tiny_book.build("latex").out.glob("*.tex")).read_text("utf-8")
    assert tex.index(r"\bibitem") < tex.index("Behind it")


def test_role_refuses_an_unknown_key(tiny_book) -> None:
    page = "# Page\n\n{published}`bert-squad`\n\n```{bibliography}\n```\n"
    tiny_book.write({"index.md": page, "book/published.yml": ENTRY})
    assert any("no entry 'bert-squad'; there are bert-glue" in line for line in tiny_book.build().warnings)


def test_page_follows_a_corrected_figure(tiny_book) -> None:
    page = "# Page\n\n{published}`bert-glue`\n\n```{bibliography}\n```\n"
    tiny_book.write({"index.md": page, "book/published.yml": ENTRY})
    tiny_book.build()
    tiny_book.write({"book/published.yml": ENTRY.replace("80.5", "80.4")})
    assert "80.4 %" in tiny_book.build().text("index.html")


_ROLE = re.compile(r"\{published\}`(!?)([^`]+)`")


def test_every_tag_resolves() -> None:
    entries = published.load(ROOT / published.FIGURES)
    keys = set(
        re.findall(r"^@\w+\{([^,\s]+),", (ROOT / "book/references.bib").read_text("utf-8"), re.MULTILINE)
    )
    for key, entry in entries.items():
        assert entry["cite"] in keys, f"{key}: references.bib has no {entry['cite']!r}"
    for page in sorted((ROOT / "book").rglob("*.md")):
        text = page.read_text("utf-8")
        for bare, key in _ROLE.findall(text):
            entry = published.find(entries, key)
            if bare:
                cited = re.search(rf"\{{cite[^}}]*\}}`[^`]*{re.escape(entry['cite'])}", text)
                tagged = any(
                    published.find(entries, k)["cite"] == entry["cite"]
                    for b, k in _ROLE.findall(text)
                    if not b
                )
                assert cited or tagged, (
                    f"{page}: {key} is printed without its citation, which the page never gives"
                )
