"""The dial of positions: it computes what the package computes, and everyone can use it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from textbook_code.layers.positions import (
    LinearScaling,
    Llama3Scaling,
    NTKScaling,
    RotaryPositions,
    YarnScaling,
    alibi_slopes,
)

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

PAGE = """# Page

```{position-dial}
```
"""


@pytest.fixture(scope="module")
def built(make_book: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    book = make_book(tmp_path_factory.mktemp("book"), ("dial",))
    book.write({"index.md": PAGE + "\n```{toctree}\nother\n```\n", "other.md": "# Other\n"})
    made = book.build()
    assert not made.warnings
    return made.out


@pytest.fixture
def page(opened: Any, built: Path) -> Iterator[Page]:
    with opened(built / "index.html", ".pd svg path") as tab:
        yield tab


def test_only_the_page_with_a_dial_loads_it(built: Path) -> None:
    with_dial, without = ((built / name).read_text("utf-8") for name in ("index.html", "other.html"))
    for name in ("position-dial.js", "position-dial.css"):
        assert name in with_dial and name not in without
    assert (built / "_static" / "position-dial.js").is_file()


@pytest.mark.browser
def test_frequencies_are_those_of_the_package(page: Page) -> None:
    for head_dim, theta, factor, original in itertools.product(
        (8, 64, 128), (500.0, 500_000.0), (1.0, 2.5, 16.0), (512, 8192)
    ):
        kinds = {
            "none": None,
            "linear": LinearScaling(factor),
            "NTK": NTKScaling(factor),
            "LLaMA 3": Llama3Scaling(factor, original=original),
            "YaRN": YarnScaling(factor, original=original),
        }
        assert page.evaluate("positionDial.scalings") == list(kinds)
        for name, scaling in kinds.items():
            settings = {
                "headDim": head_dim,
                "theta": theta,
                "scaling": name,
                "factor": factor,
                "original": original,
            }
            ours = torch.tensor(
                page.evaluate("s => positionDial.frequencies(s)", settings), dtype=torch.float64
            )
            omega = RotaryPositions(head_dim, theta=theta, scaling=scaling).frequencies()
            torch.testing.assert_close(ours, omega, rtol=1e-9, atol=0)
            gain = 1.0 if scaling is None else scaling.gain
            assert page.evaluate("s => positionDial.gain(s)", settings) == pytest.approx(gain)
            score = page.evaluate("s => positionDial.score(s, 37)", settings)
            assert score == pytest.approx(gain**2 * (37 * omega).cos().mean().item(), abs=1e-9)


@pytest.mark.browser
def test_slopes_are_those_of_the_package(page: Page) -> None:
    for heads in range(1, 41):
        ours = torch.tensor(page.evaluate("n => positionDial.slopes(n)", heads), dtype=torch.float64)
        torch.testing.assert_close(ours, alibi_slopes(heads), rtol=1e-12, atol=0)


@pytest.mark.browser
def test_by_keyboard_alone(page: Page) -> None:
    before = page.inner_text(".pd-says >> nth=0")
    page.get_by_label("Distance", exact=True).focus()
    for _ in range(40):
        page.keyboard.press("ArrowRight")
    after = page.inner_text(".pd-says >> nth=0")
    assert before != after and "hands have come round" in after
    page.keyboard.press("Home")
    assert page.inner_text(".pd-says >> nth=0").startswith(
        "At a distance of 0 tokens the score is 1.00; 0 of 32"
    )
    assert page.get_by_label("by", exact=True).is_disabled()
    assert page.locator(".pd-line").count() == 0 and page.locator(".pd-slowed").count() == 0
    page.get_by_label("Scaling", exact=True).focus()
    page.keyboard.press("ArrowDown")
    assert page.locator(".pd-line").count() == 1 and page.locator(".pd-slowed").count() == 16
    page.get_by_label("by", exact=True).focus()
    page.keyboard.press("End")
    slowest = round(16 * 2 * torch.pi / RotaryPositions(64).frequencies()[-1].item())
    said = page.inner_text(".pd-says >> nth=0")
    assert f"{slowest:,} tokens a turn" in said
    assert said.endswith("Scaling: linear, for 16 times the context.")
    page.get_by_label("Heads", exact=True).focus()
    for _ in range(4):
        page.keyboard.press("ArrowRight")
    assert page.locator(".pd-slope").count() == 12 and page.locator(".pd-between").count() == 4
    assert "4 of them, dashed, are taken from the row for 16 heads" in page.inner_text(".pd-says >> nth=1")


@pytest.mark.browser
@pytest.mark.parametrize("width", [360, 1300])
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_accessible_and_no_wider_than_the_screen(page: Page, width: int, theme: str) -> None:
    from axe_playwright_python.sync_playwright import Axe

    page.set_viewport_size({"width": width, "height": 800})
    page.add_style_tag(content="body { min-width: 0 }")  # as the book's theme has it
    background, text = ("#ffffff", "#222832") if theme == "light" else ("#14181e", "#ced6dd")
    page.add_style_tag(content=f"body {{ background: {background}; color: {text} }}")
    page.evaluate(
        "([theme, ground, text]) => { const root = document.documentElement; root.dataset.theme = theme;"
        "root.style.setProperty('--pst-color-background', ground);"
        "root.style.setProperty('--pst-color-text-base', text); }",
        [theme, background, text],
    )
    page.get_by_label("Scaling", exact=True).select_option("YaRN")
    found = Axe().run(page, context=".pd").response["violations"]
    assert not [(v["id"], v["nodes"][0]["html"]) for v in found]
    edges = "(s) => document.querySelector(s).getBoundingClientRect().right"
    assert page.evaluate(edges, ".pd") <= page.evaluate(edges, ".position-dial")
    assert page.evaluate(
        "document.querySelector('.pd').scrollWidth <= document.querySelector('.pd').clientWidth"
    )


@pytest.mark.browser
def test_without_scripts_nothing_stands_there(chromium: Browser, built: Path) -> None:
    with chromium.new_context(java_script_enabled=False) as context:
        tab = context.new_page()
        tab.goto((built / "index.html").as_uri())
        assert tab.locator(".position-dial").count() == 1
        assert tab.inner_text(".position-dial") == ""
