"""The appendix: experiments, execution, sources, solutions and benchmarks, also where there is nothing."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path

import benchmark_table
import codeindex
import execution
import generated
import pytest
import recorded
import solutions
import sources_pages

ROOT = Path(__file__).resolve().parents[2]
APPENDIX = ROOT / "book" / "appendix"


def plain(html: str) -> str:
    """What a reader sees."""
    return " ".join(re.sub(r"<[^>]+>", "", html).split())


# ---------------------------------------------------------------- what they share


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "$0$"), (1e-4, "$10^{-4}$"), (3.25e-15, r"$3.2 \times 10^{-15}$"), (1, "$10^{0}$")],
)
def test_scientific(value: float, text: str) -> None:
    assert generated.scientific(value) == text


def test_table_refuses_a_ragged_row() -> None:
    with pytest.raises(ValueError, match="must have 2 cells, got 1"):
        generated.table(("a", "b"), [("x",)], (1, 1))


def test_cells_are_named_for_the_phone(tiny_book) -> None:
    table = generated.table(("Name", "Value", "Unit"), [("`a`", "", "s"), ("b", "1\n\n2", "s")], (1, 1, 1))
    tiny_book.write({"index.md": f"# T\n\n{table}\n"})
    html = tiny_book.build().text("index.html")
    assert html.count('<span class="cell-label">Value</span>') == 1  # an empty cell needs no name
    assert html.count('<span class="cell-label">Name</span>') == 2


def test_digest_is_whole_and_breakable(tiny_book) -> None:
    text = "0123456789abcdef" * 4
    tiny_book.write({"index.md": f"# T\n\n{{digest}}`{text}`\n"})
    assert f'<code class="digest">{text}</code>' in tiny_book.build().text("index.html")
    tex = next(tiny_book.build("latex").out.glob("*.tex")).read_text("utf-8")
    assert tex.count(r"\allowbreak{}") == 15


def test_fence_is_longer_than_what_it_holds() -> None:
    assert generated.fence("```\ncode\n```").startswith("````python\n")


def test_broken_json_is_an_error(tiny_book) -> None:
    tiny_book.write({"index.md": "# T\n\n```{execution-table}\n```\n", "_build/execution.json": "{"})
    with pytest.raises(Exception, match="is not JSON"):
        tiny_book.build()


# ---------------------------------------------------------------- execution table


def test_execution_table(tiny_book) -> None:
    page = "# T\n\n```{toctree}\nbook/a\n```\n\n```{execution-table}\n```\n"
    tiny_book.write({"index.md": page, "book/a.md": "# The title of A\n"})
    assert "No page was executed" in tiny_book.build().text("index.html")
    state = {
        "book/a": {
            "cpu_seconds": 75.2,
            "wall_seconds": 80,
            "status": "executed",
            "cells": 7,
            "when": "2025-01-02",
        },
        "book/b": {
            "cpu_seconds": 4.25,
            "wall_seconds": 5,
            "status": "cached",
            "cells": 5,
            "when": "2025-01-02",
        },
    }
    tiny_book.write({"_build/execution.json": json.dumps(state)})
    built = tiny_book.build()
    assert built.warnings == []
    html = built.text("index.html")
    assert "The title of A" in html
    assert "book/b" in html
    assert "1 min 15 s" in html
    total = html[html.index("Total") :]
    assert re.findall(r"<p>.*?</span>(.*?)</p>", total)[:3] == ["12", "1 min 19 s", "1 min 25 s"]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(None, "–"), (0.04, "0.0 s"), (59.94, "59.9 s"), (60, "1 min 0 s"), (125.6, "2 min 6 s")],
)
def test_duration(seconds: float | None, text: str) -> None:
    assert execution.duration(seconds) == text


# ---------------------------------------------------------------- recorded experiments

RECORD = {
    "command": "python -m textbook_code.recorded run tiny",
    "date": "2025-01-02T03:04:05",
    "machine": "A processor, 1 thread",
    "source_sha256": "ab" * 32,
    "cpu_seconds": 75.0,
    "versions": {"torch": "2.14.1"},
}


def test_recorded_box(tiny_book) -> None:
    page = "# T\n\n````{recorded} tiny\nIt falls to **nothing**.\n````\n\n```{recorded-table}\n```\n"
    tiny_book.write({"index.md": page, "experiments/tiny.json": json.dumps(RECORD)})
    built = tiny_book.build()
    assert built.warnings == []
    html = built.text("index.html")
    text = plain(html)
    for expected in (
        "Recorded, not run now",
        "A processor, 1 thread",
        "1 min 15 s of processor time",
        "2025-01-02",
        RECORD["command"],
        "make experiment NAME=tiny",
        RECORD["source_sha256"],
    ):
        assert expected in text
    assert "<strong>nothing</strong>" in html
    assert 'id="experiment-tiny"' in html
    assert "03:04" not in html


def test_recorded_refuses_what_is_not_there(tiny_book) -> None:
    tiny_book.write(
        {"index.md": "# T\n\n```{recorded} other\n```\n", "experiments/tiny.json": json.dumps(RECORD)}
    )
    assert any("'other' has been recorded; there are: tiny" in line for line in tiny_book.build().warnings)


@pytest.mark.parametrize("field", recorded.FIELDS)
def test_recorded_refuses_an_incomplete_record(tmp_path: Path, field: str) -> None:
    (tmp_path / "experiments").mkdir()
    (tmp_path / "experiments/tiny.json").write_text(json.dumps({**RECORD, field: ""}))
    with pytest.raises(recorded.RecordedError, match=f"'{field}' is missing"):
        recorded.load(tmp_path, "tiny")


def test_no_experiment_is_said(tiny_book) -> None:
    tiny_book.write({"index.md": "# T\n\n```{recorded-table}\n```\n"})
    assert "No experiment has been recorded yet" in tiny_book.build().text("index.html")


# ---------------------------------------------------------------- benchmarks

ROW = {"what": "BERT, forward", "peer": "transformers", "ratio": 1.1, "low": 1.05, "high": 1.15}
RESULTS = {
    "command": "make bench",
    "date": "2025-01-02",
    "machine": "A processor",
    "versions": {"torch": "2.14.1"},
    "rows": [
        {**ROW, "ours_seconds": 0.0123456, "peer_seconds": 0.0136, "memory_ratio": 0.98},
        {**ROW, "peer": "torch.nn", "ratio": 2.0, "high": 2.1},
        {**ROW, "what": "BERT, training step", "ratio": 0.99, "low": 0.98, "high": 1.0},
    ],
    "other": [{"what": "import textbook_code", "value": "12 ms"}],
}


def test_benchmarks(tiny_book) -> None:
    tiny_book.write({"index.md": "# T\n\n```{benchmarks}\n```\n"})
    assert "No benchmark has been recorded yet" in tiny_book.build().text("index.html")
    tiny_book.write({"benchmarks/results.json": json.dumps(RESULTS)})
    built = tiny_book.build()
    assert built.warnings == []
    text = plain(built.text("index.html"))
    for expected in (
        "1.05 to 1.15",
        "12.3 ms",
        "mean of the ratios is 1.04",
        "A processor",
        "12 ms",
        "torch 2.14.1",
    ):
        assert expected in text


@pytest.mark.parametrize(
    ("results", "message"),
    [
        ({**RESULTS, "machine": ""}, "machine is missing"),
        ({**RESULTS, "rows": [{**ROW, "high": 1.0}]}, "outside its interval"),
        ({**RESULTS, "rows": [{"what": "BERT"}]}, "peer is missing"),
    ],
)
def test_benchmarks_refuse(results: dict, message: str) -> None:
    with pytest.raises(benchmark_table.BenchmarkError, match=message):
        benchmark_table.markdown(results)


# ---------------------------------------------------------------- sources


def test_source_page_says_everything(tiny_book) -> None:
    from textbook_code.data.sources import SOURCES

    source = SOURCES["minilm"]
    pages = {
        "index.md": "# T\n\n```{toctree}\nbook/a\nbook/b\nbook/minilm\n```\n\n```{sources-table}\n```\n",
        "book/a.md": '# Uses it\n\n```{code-cell} python3\nfetch("minilm")\n```\n',
        "book/b.md": '# Talks of it\n\nThe "minilm" source.\n',
        "book/minilm.md": "(data-minilm)=\n# Page\n\n```{source} minilm\n```\n",
    }
    tiny_book.write(pages)
    html = tiny_book.build().text("book/minilm.html")
    text = plain(html)
    for route in source.routes:
        assert route.spec in text
        assert route.sha256 in text
    for member in source.members:
        assert member.local in text
        assert member.sha256 in text
    used = text.split("Used by:")[1].split("Before you trust")[0]
    assert "Uses it" in used
    assert "Talks of it" not in used
    order = ["Licence:", "Before you trust a number", "Ways to it", "Each file is checked"]
    body = html[html.index("<h1>") :]
    assert sorted(order, key=body.index) == order
    assert text.count("textbook-code fetch minilm") == 1


def test_source_refuses_an_unknown_name(tiny_book) -> None:
    tiny_book.write({"index.md": "# T\n\n```{source} imagenet\n```\n"})
    assert any("no source 'imagenet'; there are" in line for line in tiny_book.build().warnings)


@pytest.mark.parametrize(
    ("count", "text"),
    [(612, "612 bytes"), (1234, "1.2 kB"), (5_057_198, "5.1 MB"), (2_500_000_000, "2.5 GB")],
)
def test_size(count: int, text: str) -> None:
    assert sources_pages.size(count) == text


def test_every_source_has_its_page() -> None:
    from textbook_code.data.sources import SOURCES

    pages = {page.stem: page.read_text("utf-8") for page in (ROOT / sources_pages.FOLDER).glob("*.md")}
    assert pages.keys() == SOURCES.keys()
    for name, source in SOURCES.items():
        assert f"(data-{name})=\n# {source.title}\n" in pages[name]
        assert f"```{{source}} {name}\n" in pages[name]


# ---------------------------------------------------------------- exercises


def test_card_and_solution(tiny_book) -> None:
    from textbook_code.exercises import find

    exercise = find("attention/causal-mask")
    toctree = "```{toctree}\nbook/page\nbook/solutions\n```"
    pages = {
        "index.md": f"# T\n\n{toctree}\n\n{{exercise}}`attention/causal-mask`\n",
        "book/page.md": "# Page\n\n```{exercise-card} attention/causal-mask\n```\n",
        "book/solutions.md": "# Solutions\n\n```{solutions}\n```\n",
    }
    tiny_book.write(pages)
    built = tiny_book.build()
    page, appendix = built.text("book/page.html"), built.text("book/solutions.html")
    assert f"★ {exercise.title}" in page
    assert exercise.check_line in plain(page).replace("&quot;", '"')
    assert 'href="solutions.html#solution-attention-causal-mask"' in page
    assert page.count("<details") == 1  # the hint is folded
    assert 'href="page.html#exercise-attention-causal-mask"' in appendix
    assert "<details" in appendix
    assert 'href="book/page.html#exercise-attention-causal-mask"' in built.text("index.html")
    tex = next(tiny_book.build("latex").out.glob("*.tex")).read_text("utf-8")
    assert "The solution" in tex


def test_card_refuses_an_unknown_exercise(tiny_book) -> None:
    tiny_book.write(
        {"index.md": "# T\n\n```{exercise-card} attention/scal\n```\n\n{exercise}`attention/scal`\n"}
    )
    lines = [line for line in tiny_book.build().warnings if "attention/scal" in line]
    assert len(lines) == 2
    assert all("expected one of attention/scale" in line for line in lines)


def test_every_exercise_is_on_a_page_and_every_card_exists() -> None:
    from textbook_code.exercises import exercises

    cards = solutions.stated(ROOT / "book")
    names = [exercise.name for exercise in exercises()]
    assert len(names) == len(set(names))
    assert sorted(cards) == sorted(names)
    for name, page in cards.items():
        assert page.stem == name.partition("/")[0]


# ---------------------------------------------------------------- pages written by hand


def test_setup_names_every_extra() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    page = (APPENDIX / "setup.md").read_text("utf-8")
    assert set(re.findall(r"^\* - `(\w+)`$", page, re.MULTILINE)) == set(project["optional-dependencies"])


def test_glossary_is_long_enough_and_defines_each_term_once() -> None:
    page = (APPENDIX / "glossary.md").read_text("utf-8")
    body = page[page.index(":sorted:") :]
    terms = re.findall(r"^(\S.*)\n  \S", body, re.MULTILINE)
    assert len(terms) > 60
    assert len(terms) == len(set(terms))
    known = {term.replace("\\", "").lower() for term in terms}
    for target in re.findall(r"\{term\}`(?:[^`<]*<)?([^`>]+)>?`", page):
        assert target.lower() in known, target


def test_promised_labels_are_there() -> None:
    known = codeindex.book_labels(ROOT / "book")
    promised = """
        notation glossary setup parity-ledger code-index api solutions bibliography execution-table
        data-and-licences benchmarks recorded-experiments exercises-how
    """
    for label in promised.split():
        assert known.get(label, Path()).parent == APPENDIX, label


def test_glossary_links_survive(tiny_book) -> None:
    """A page may link a term whose name holds brackets."""
    page = "# T\n\n```{glossary}\n\\[CLS\\]\n  A token.\n```\n\nSee {term}`[CLS]`.\n"
    tiny_book.write({"index.md": page})
    built = tiny_book.build()
    assert built.warnings == []
    assert 'href="#term-CLS"' in built.text("index.html")
