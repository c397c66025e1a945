"""The built pages, as readers meet them: nothing leaves the machine, nothing fails, all can read them."""

from __future__ import annotations

import json
import os
import re
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urljoin

import nbformat
import pytest
from built_pages import PATIENCE, Report, Source, broken, served, sources, survey

if TYPE_CHECKING:
    from playwright.sync_api import Browser

ROOT = Path(__file__).resolve().parents[2]
HTML = Path(os.environ.get("TEXTBOOK_CODE_BUILD") or ROOT / "_build") / "html"
MEGABYTE = 1_000_000
SHARED = 5 * MEGABYTE  # read once and kept by the browser
PICTURES = re.compile(r"\.(svg|png|jpe?g|gif|webp|ico)(\?|$)")

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def pages() -> dict[str, Source]:
    if not (HTML / "book" / "index.html").is_file():
        pytest.fail(f"{HTML}: no pages; run `make html` first")
    return sources(HTML)


@pytest.fixture(scope="module")
def reports(pages: dict[str, Source], browser_path: str) -> dict[str, Report]:
    return survey(browser_path, HTML, (name for name, page in pages.items() if not page.leads_on))


def found(reports: dict[str, Report], what: str) -> list[str]:
    return [f"{name}: {each}" for name, report in reports.items() for each in getattr(report, what)]


# ---------------------------------------------------------------- as a browser shows them


def test_no_request_leaves_the_machine(reports: dict[str, Report]) -> None:
    assert not found(reports, "external")


def test_nothing_fails(reports: dict[str, Report]) -> None:
    """No error in the console or of a script, no file that is missing; served, and opened as a file."""
    assert not found(reports, "errors")
    assert not found(reports, "failed")


def test_axe_finds_nothing(reports: dict[str, Report]) -> None:
    """In both themes, on a phone and on a desk."""
    assert not found(reports, "violations")


def test_no_page_is_wider_than_its_screen(reports: dict[str, Report]) -> None:
    assert not found(reports, "too_wide")


def test_pages_are_light(reports: dict[str, Report]) -> None:
    """A page is at most a megabyte, without its pictures and what pages share: theme, MathJax, search."""
    shared = re.compile(r"^(_static/(?!explorer/|attention-|person-)|searchindex\.js$)")
    for name, report in reports.items():
        own = {file: size for file, size in report.bytes.items() if not shared.match(file)}
        assert own[name] == (HTML / name).stat().st_size
        weight = sum(size for file, size in own.items() if not PICTURES.search(file))
        assert weight <= MEGABYTE, f"{name}: {weight} bytes: {own}"
        assert sum(size for file, size in report.bytes.items() if file not in own) <= SHARED


def test_the_survey_sees_what_is_wrong(tmp_path: Path, browser_path: str) -> None:
    """A page on which all is wrong: each of the checks above finds its fault."""
    (tmp_path / "bad.html").write_text(
        """<!DOCTYPE html><html lang="en"><head><title>Bad</title></head><body><main><h1>Bad</h1>
        <p style="color:#bbb;background:#fff">too pale</p><img src="https://example.org/x.png" alt="x">
        <script src="missing.js"></script><script>console.error("said"); throw new Error("thrown")</script>
        <div style="width:2000px">wide</div><input></main></body></html>"""
    )
    report = survey(browser_path, tmp_path, ["bad.html"])["bad.html"]
    assert report.external == ["https://example.org/x.png"] * 2  # served, and as a file
    assert any("said" in error for error in report.errors)
    assert any("thrown" in error for error in report.errors)
    assert any(failure.startswith("404 ") and "missing.js" in failure for failure in report.failed)
    assert [wide.split(":")[0] for wide in report.too_wide] == ["at 360 px", "at 768 px", "at 1300 px"]
    for where in ("light, 360 px", "light, 1300 px", "dark, 360 px", "dark, 1300 px"):
        assert any(v.startswith(f"{where}: color-contrast") for v in report.violations)
    for where in ("360 px", "1300 px"):
        assert any(v.startswith(f"{where}: label") for v in report.violations)
    assert report.bytes["bad.html"] == (tmp_path / "bad.html").stat().st_size


# ---------------------------------------------------------------- as their source says it


def test_links_and_anchors_lead_somewhere(pages: dict[str, Source]) -> None:
    assert not broken(HTML, pages)


def test_no_resource_has_an_address_elsewhere(pages: dict[str, Source]) -> None:
    """Also those that no browser of today would ask for."""
    elsewhere = re.compile(r"^(https?:)?//")
    assert not [f"{name}: {r}" for name, page in pages.items() for r in page.resources if elsewhere.match(r)]


def test_ids_are_unique(pages: dict[str, Source]) -> None:
    assert not {name: page.double for name, page in pages.items() if page.double}


def test_pictures_say_what_they_show(pages: dict[str, Source]) -> None:
    """Each has an alternative text; it is empty only where the picture is the logo beside its name."""
    for name, page in pages.items():
        for picture in page.pictures:
            classes = picture.get("class") or ""
            assert picture.get("alt") is not None, f"{name}: {picture}"
            assert picture["alt"] or "logo" in classes, f"{name}: {picture}"
            assert not re.search(r"\.(svg|png|jpe?g)$", picture["alt"] or ""), f"{name}: {picture}"


def test_the_checker_sees_what_is_broken(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "index.html").write_text(
        '<p id="here"><a href="#here">a</a><a href="#gone">b</a><a href="sub/page.html#there">c</a>'
        '<a href="sub/page.html#gone">d</a><a href="missing.html">e</a><img src="missing.svg"></p>'
    )
    (tmp_path / "sub" / "page.html").write_text(
        '<p id="there"><a href="../index.html">a</a><a href="x">b</a></p>'
    )
    assert broken(tmp_path, sources(tmp_path)) == [
        "index.html -> #gone",
        "index.html -> sub/page.html#gone",
        "index.html -> missing.html",
        "index.html -> missing.svg",
        "sub/page.html -> x",
    ]


# ---------------------------------------------------------------- what readers do


@pytest.mark.parametrize(("word", "where"), [("softmax", "attention"), ("pretraining", "encoder-only")])
@pytest.mark.parametrize("opened", ["served", "as a file"])
def test_search_finds_a_word(chromium: Browser, word: str, where: str, opened: str) -> None:
    with served(HTML) as address, chromium.new_context() as context:
        context.set_default_timeout(PATIENCE)
        tab = context.new_page()
        base = address if opened == "served" else f"{HTML.as_uri()}/"
        tab.goto(f"{base}search.html?q={word}")
        tab.wait_for_function("document.querySelector('.search-summary')?.innerText.includes('finished')")
        results = tab.eval_on_selector_all("#search-results li a", "links => links.map((a) => a.href)")
        assert any(f"/01-text-transformers/{where}.html" in result for result in results), results
        text = (HTML / results[0].split("?")[0].split("#")[0].removeprefix(base)).read_text("utf-8")
        assert word.removesuffix("ing") in text.lower()  # the search goes by stems


def test_search_finds_no_word_that_is_nowhere(chromium: Browser) -> None:
    with served(HTML) as address, chromium.new_context() as context:
        context.set_default_timeout(PATIENCE)
        tab = context.new_page()
        tab.goto(f"{address}search.html?q=xyzzyplugh")
        tab.wait_for_function(
            "document.querySelector('#search-results')?.innerText.includes('did not match')"
        )
        assert not tab.locator("#search-results li").count()


def test_notebooks_download(pages: dict[str, Source]) -> None:
    links = {(name, link) for name, page in pages.items() for link in page.links if link.endswith(".ipynb")}
    assert {Path(name).stem for name, _ in links} >= {"attention", "encoder-only"}
    with served(HTML) as address:
        for name, link in links:
            with urllib.request.urlopen(urljoin(address + name, link)) as answer:
                assert answer.status == 200
                notebook: Any = nbformat.from_dict(json.loads(answer.read()))
            nbformat.validate(notebook)
            assert any(cell.cell_type == "code" for cell in notebook.cells)
