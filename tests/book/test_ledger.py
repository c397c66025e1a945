"""The ledger: its rows are checked, filtered and shown, and the comparison finds every kind of difference."""

from __future__ import annotations

import json
from pathlib import Path

import ledger
import pytest

ROOT = Path(__file__).resolve().parents[2]


def row(name: str = "bert-encoder", **changes: object) -> dict:
    base = {
        "id": name,
        "model": "BERT",
        "head": "encoder",
        "reference": "transformers.BertModel",
        "reference_version": "5.23.0",
        "dtype": "float64",
        "tolerance_forward": 1e-10,
        "tolerance_backward": 1e-9,
        "weights": "random",
        "test": "tests/models/text/test_bert.py::test_encoder",
        "page": "encoder-only",
    }
    return {**base, **changes}


def write(path: Path, rows: list) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{k: v for k, v in row().items() if k != "dtype"}], r"missing fields \['dtype'\]"),
        ([row(colour="red")], r"unknown fields \['colour'\]"),
        ([row(weights="none")], "weights must be one of"),
        ([row(tolerance_forward=0)], "tolerance_forward must be > 0"),
        ([row(), row()], "occurs twice"),
        ({"rows": []}, "expected a list"),
    ],
)
def test_load_refuses_bad_rows(tmp_path: Path, rows: list, message: str) -> None:
    with pytest.raises(ledger.LedgerError, match=message):
        ledger.load(write(tmp_path / "ledger.json", rows))


@pytest.mark.parametrize(
    ("measured", "problem"),
    [
        ({}, "no test measured it"),
        (None, "no test measured it"),
        ({"a": {"forward_error": 2e-10, "backward_error": 0.0}}, "forward error 2e-10 exceeds"),
        ({"a": {"forward_error": float("nan"), "backward_error": 0.0}}, "forward error nan exceeds"),
        ({"a": {"forward_error": 0.0, "backward_error": 1e-8}}, "backward error 1e-08 exceeds"),
        ({"a": {"forward_error": 0.0, "backward_error": None}}, "none was measured"),
        (
            {"a": {"forward_error": 0.0, "backward_error": 0.0}, "b": {"forward_error": 0.0}},
            "b: measured, but not in the ledger",
        ),
    ],
)
def test_compare_finds_each_difference(measured: dict | None, problem: str) -> None:
    problems = ledger.compare([row("a")], measured)
    assert len(problems) == 1
    assert problem in problems[0]


def test_compare_accepts_what_agrees() -> None:
    rows = [row("a"), row("b", tolerance_backward=None)]
    measured = {
        "a": {"forward_error": 1e-10, "backward_error": 0.0},
        "b": {"forward_error": 0.0, "backward_error": None},
    }
    assert ledger.compare(rows, measured) == []


def test_compare_refuses_an_error_without_a_promise() -> None:
    measured = {"b": {"forward_error": 0.0, "backward_error": 0.0}}
    assert "promises none" in ledger.compare([row("b", tolerance_backward=None)], measured)[0]


def test_command_reports_and_exits(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    assert ledger.main() == 2
    write(tmp_path / ledger.COMMITTED, [row("a")])
    good = {"a": {"forward_error": 0.0, "backward_error": 0.0, "tolerance": 1e-10}}
    (tmp_path / "_build").mkdir()
    (tmp_path / "_build" / ledger.MEASURED).write_text(json.dumps(good))
    assert ledger.main() == 0
    (tmp_path / "_build" / ledger.MEASURED).write_text("{}")
    assert ledger.main() == 1
    assert "no test measured it" in capsys.readouterr().err


PAGE = "(encoder-only)=\n# BERT\n\n```{ledger}\n```\n"


def test_page_says_when_nothing_was_measured(tiny_book) -> None:
    tiny_book.write({"index.md": PAGE, str(ledger.COMMITTED): json.dumps([row()])})
    built = tiny_book.build()
    assert built.warnings == []
    assert ledger.NOT_MEASURED in built.text("index.html")


def test_page_follows_the_measurements(tiny_book) -> None:
    tiny_book.write({"index.md": PAGE, str(ledger.COMMITTED): json.dumps([row()])})
    tiny_book.build()
    measured = {"bert-encoder": {"forward_error": 3.25e-15, "backward_error": 2e-9}}
    tiny_book.write({f"_build/{ledger.MEASURED}": json.dumps(measured)})
    html = tiny_book.build().text("index.html")  # nothing but the measurement has changed
    assert r"3.2 \times 10^{-15}" in html
    assert html.count("above its tolerance") == 1
    assert ledger.NOT_MEASURED not in html


def test_filter_keeps_the_models_named(tiny_book) -> None:
    rows = [row(), row("gpt", model="GPT", head="language model")]
    page = PAGE.replace("{ledger}\n", "{ledger}\n:models: bert\n")
    tiny_book.write({"index.md": page, str(ledger.COMMITTED): json.dumps(rows)})
    html = tiny_book.build().text("index.html")
    assert "encoder" in html
    assert "language model" not in html


def test_filter_refuses_an_unknown_model(tiny_book) -> None:
    page = PAGE.replace("{ledger}\n", "{ledger}\n:models: bart\n")
    tiny_book.write({"index.md": page, str(ledger.COMMITTED): json.dumps([row()])})
    assert any("no row of 'bart'; it has bert" in line for line in tiny_book.build().warnings)


def test_latex_table_breaks_its_lines(tiny_book) -> None:
    tiny_book.write({"index.md": PAGE, str(ledger.COMMITTED): json.dumps([row()])})
    built = tiny_book.build("latex")
    tex = next(built.out.glob("*.tex")).read_text("utf-8")
    assert r"\begin{longtable}" in tex
    assert r"\X{27}{100}" in tex


@pytest.mark.skipif(not (ROOT / ledger.COMMITTED).exists(), reason="no ledger is committed")
def test_committed_rows_name_tests_and_pages_that_exist() -> None:
    import codeindex

    known = codeindex.book_labels(ROOT / "book")
    for item in ledger.load(ROOT / ledger.COMMITTED):
        file, _, function = item["test"].partition("::")
        assert function, f"{item['id']}: test must be file::function, got {item['test']!r}"
        source = (ROOT / file).read_text("utf-8")
        assert f"def {function.split('::')[-1].split('[')[0]}(" in source, item["test"]
        assert item["page"] in known, f"{item['id']}: no page defines the label {item['page']!r}"
