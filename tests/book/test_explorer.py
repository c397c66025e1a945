"""The attention explorer: what the browser computes is what the model computes, and everyone can use it."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import explorer_data
import pytest
import torch

from textbook_code.data.text import load_tokenizer

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

PAGE = """# Page

```{attention-explorer}
```
"""
OWN = (
    "The engineer asked the nurse whether she could repair the broken heart monitor.",
    "Ünïcödé, naïve café: 東京 costs €5!",
    "Paris is the [MASK] of France",
    "x",
    " ".join(["word"] * 30),
)
AWKWARD = (
    "",
    "   ",
    "don't stop-me_now (please)…",
    "ÀÉÎÕÜ àéîõü ﬁ ß ẞ İstanbul ΣΊΣΥΦΟΣ",
    "a\tb\nc\rd\x00e\x07f\x0bg\x1ch\u00a0i\u200bj\u200dk\u2028l\ufeffm\ufffdn\u3000o",
    "中文字符 and 한국어 and ひらがな カタカナ 々",
    "e\u0301 vs \u00e9; a\u0308\u0328; \u1e9b\u0323",
    "$1,234.56 + 7^2 = <tag> `code` ~ | \\ / @home #tag 50% & more",
    "«quoted» “curly” ‘single’ — dash – dash ¿qué? ¡sí! ‽ ※ §",
    "🙂👩‍🚀 flags 🇩🇪 ™ ® © ° ½ ² ① Ⅷ",
    "[MASK][SEP] [mask] [UNK]x[PAD] [CLS",
    "antidisestablishmentarianism pneumonoultramicroscopicsilicovolcanoconiosis",
    "a" * 100,
    "a" * 101,
    "हिन्दी العربية עברית ไทย தமிழ் Ελληνικά Русский",
)


def random_texts(count: int) -> list[str]:
    """Strings of assigned characters of the first plane that Unicode has had for long."""
    chance = random.Random(0)
    blocks = [
        (0x20, 0x17F),
        (0x370, 0x3FF),
        (0x400, 0x4FF),
        (0x2000, 0x206F),
        (0x3040, 0x30FF),
        (0x4E00, 0x9FFF),
    ]
    return [
        "".join(chr(chance.randint(*chance.choice(blocks))) for _ in range(chance.randint(1, 30)))
        for _ in range(count)
    ]


# ---------------------------------------------------------------- eight bits


def test_quantised_weights_are_within_half_a_step() -> None:
    weight = torch.randn(7, 3 * explorer_data.GROUP, generator=torch.Generator().manual_seed(0))
    weight[3, : explorer_data.GROUP] = 0
    values, scale = explorer_data.quantise(weight)
    assert values.dtype == torch.int8
    error = (weight.view_as(values) - scale * values).abs()
    assert (error <= scale * 0.5001).all()
    assert values[3, 0].eq(0).all()
    used = values.abs().amax(-1)
    used[3, 0] = 127
    assert used.eq(127).all()


# ---------------------------------------------------------------- in the browser


@pytest.fixture(scope="module")
def minilm() -> Path:
    from textbook_code.data.sources import fetch

    return fetch("minilm", progress=False)


@pytest.fixture(scope="module")
def built(make_book: Any, tmp_path_factory: pytest.TempPathFactory, minilm: Path) -> Path:
    book = make_book(tmp_path_factory.mktemp("book"), ("explorer",))
    book.write({"index.md": PAGE})
    made = book.build()
    assert not made.warnings
    return made.out


@pytest.fixture
def page(opened: Any, built: Path) -> Iterator[Page]:
    with opened(built / "index.html", ".ae-map tbody td") as tab:
        yield tab


@contextmanager
def missing(path: Path) -> Iterator[None]:
    """A data file that cannot be read for a while."""
    away = path.rename(path.with_suffix(".away"))
    try:
        yield
    finally:
        away.rename(path)


def wait_for_status(page: Page, says: str) -> None:
    page.wait_for_function(
        "says => document.querySelector('.ae-status').textContent.includes(says)", arg=says, timeout=60_000
    )


@pytest.mark.browser
def test_tokens_are_those_of_the_library(page: Page, minilm: Path) -> None:
    tokenizer = load_tokenizer(minilm)
    vocabulary = [word for word in tokenizer.get_vocab() if not word.startswith("##")]
    texts = [*OWN, *AWKWARD, *random_texts(500), *explorer_data.EXAMPLES]
    texts += [" ".join(vocabulary[i : i + 200]) for i in range(0, len(vocabulary), 200)]
    ours = page.evaluate("texts => Promise.all(texts.map((text) => attentionModel.encode(text)))", texts)
    for text, ids in zip(texts, ours, strict=True):
        assert ids == tokenizer.encode(text).ids, text


@pytest.mark.browser
def test_weights_are_those_of_the_rounded_model(page: Page, minilm: Path) -> None:
    tokenizer = load_tokenizer(minilm)
    with torch.no_grad():
        model = explorer_data.rounded(minilm)
        for text in OWN:
            _, weights = explorer_data.read(model, tokenizer, text)
            ours = page.evaluate(
                "async (text) => (await attentionModel.attend(await attentionModel.encode(text)))"
                ".map((map) => Array.from(map))",
                text,
            )
            torch.testing.assert_close(
                torch.tensor(ours).view_as(weights),
                weights,
                atol=2e-5,
                rtol=0,
                msg=lambda m, t=text: f"{t}: {m}",
            )


@pytest.mark.browser
def test_rounding_error_is_measured_and_said(page: Page, minilm: Path) -> None:
    tokenizer = load_tokenizer(minilm)
    with torch.no_grad():
        exact, rounded = explorer_data.Bert.from_pretrained(minilm), explorer_data.rounded(minilm)
        apart = torch.cat(
            [
                (
                    explorer_data.read(exact, tokenizer, text)[1]
                    - explorer_data.read(rounded, tokenizer, text)[1]
                ).flatten()
                for text in explorer_data.EXAMPLES
            ]
        ).abs()
    said = re.findall(r"0\.\d+", page.inner_text(".ae-note"))
    assert said == [f"{apart.mean():.4f}", f"{apart.max():.3f}"]
    assert apart.max() < 0.05


@pytest.mark.browser
def test_listed_sentences_show_the_exact_weights(page: Page, minilm: Path) -> None:
    tokenizer = load_tokenizer(minilm)
    number = len(explorer_data.EXAMPLES) - 1
    text = explorer_data.EXAMPLES[number]
    page.get_by_label("Sentence", exact=True).select_option(text)
    page.get_by_label("Layer", exact=True).select_option("2")
    page.get_by_label("Head", exact=True).select_option("7")
    with torch.no_grad():
        model = explorer_data.Bert.from_pretrained(minilm)
        words, weights = explorer_data.read(model, tokenizer, text)
    page.wait_for_function("n => document.querySelectorAll('.ae-map tbody tr').length === n", arg=len(words))
    page.get_by_role("radio", name="splits").click()
    row = weights[2, 7, words.index("splits")]
    best, second = row.topk(2).indices.tolist()
    expected = (
        f"Layer 2, head 7: “splits” looks most at “{words[best]}”, {row[best]:.2f}, "
        f"then at “{words[second]}”, {row[second]:.2f}."
    )
    assert page.inner_text(".ae-summary") == expected
    labels = page.eval_on_selector_all(".ae-map tbody td", "cells => cells.map((c) => c.ariaLabel)")
    shown = [f"{w:.2f}" if w >= 0.005 else "less than 0.01" for w in weights[2, 7].flatten().tolist()]
    pairs = [f"{a} to {b}: " for a in words for b in words]
    assert labels == [pair + value for pair, value in zip(pairs, shown, strict=True)]


@pytest.mark.browser
def test_own_sentence_by_keyboard_alone(page: Page) -> None:
    page.get_by_label("Your own").focus()
    page.keyboard.type("The keys to the cabinet are lost")
    page.keyboard.press("Enter")
    page.wait_for_function(
        "document.querySelector('.ae-status').textContent.includes('read in')", timeout=60_000
    )
    assert page.inner_text(".ae-words").split() == [
        "[CLS]",
        "the",
        "keys",
        "to",
        "the",
        "cabinet",
        "are",
        "lost",
        "[SEP]",
    ]
    assert page.get_by_label("Sentence", exact=True).input_value() == ""
    words = ["[CLS]", "the", "keys", "to", "the", "cabinet", "are", "lost", "[SEP]"]
    assert page.inner_text(".ae-words").split() == words
    page.locator(".ae-words [tabindex='0']").focus()
    page.keyboard.press("Home")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    assert "“keys” looks most at" in page.inner_text(".ae-summary")
    page.keyboard.press("Tab")  # one stop for all cells
    focused = "document.activeElement.ariaLabel"
    assert page.evaluate(focused).startswith("keys to ")
    page.keyboard.press("End")
    page.keyboard.press("ArrowDown")
    assert page.evaluate(focused).startswith("to to [SEP]: ")
    assert "“to” looks most at" in page.inner_text(".ae-summary")
    page.keyboard.press("ArrowLeft")
    assert page.evaluate(focused).startswith(f"to to {words[-2]}: ")
    page.keyboard.press("Tab")  # one stop for all heads
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowRight")
    assert page.evaluate(focused) == "Layer 1, head 5"
    assert page.get_by_label("Layer", exact=True).input_value() == "1"
    assert page.get_by_label("Head", exact=True).input_value() == "5"
    assert page.inner_text(".ae-summary").startswith("Layer 1, head 5:")


@pytest.mark.browser
def test_finds_the_head_that_copies_the_word_before(page: Page, minilm: Path) -> None:
    tokenizer = load_tokenizer(minilm)
    with torch.no_grad():
        model = explorer_data.Bert.from_pretrained(minilm)
        _, weights = explorer_data.read(model, tokenizer, explorer_data.EXAMPLES[0])
    score = weights.diagonal(offset=-1, dim1=-2, dim2=-1).mean(-1)
    layer, head = divmod(score.argmax().item(), score.shape[1])
    page.get_by_label("Find the head that looks most at").select_option("the word before")
    expected = f"Layer {layer}, head {head} gives the word before {score.max():.2f} of its weight on average."
    assert page.inner_text(".ae-status") == expected


@pytest.mark.browser
@pytest.mark.parametrize(
    ("text", "says"),
    [("  ", "Type a sentence first"), ("word " * 31, "33 word pieces; there is room for 32")],
)
def test_text_that_cannot_be_read(page: Page, text: str, says: str) -> None:
    before = page.inner_text(".ae-words")
    page.get_by_label("Your own").fill(text)
    page.get_by_label("Your own").press("Enter")
    page.wait_for_function(
        "says => document.querySelector('.ae-status').textContent.includes(says)", arg=says
    )
    assert page.inner_text(".ae-words") == before
    assert page.get_by_role("button", name="Read it").is_enabled()


@pytest.mark.browser
def test_unknown_words_are_named(page: Page) -> None:
    page.get_by_label("Your own").fill("the 🙂 bank")
    page.get_by_label("Your own").press("Enter")
    page.wait_for_function(
        "document.querySelector('.ae-status').textContent.includes('read in')", timeout=60_000
    )
    assert "[UNK] stands for" in page.inner_text(".ae-status")


@pytest.mark.browser
def test_a_missing_file_is_said_and_may_come_later(page: Page, built: Path) -> None:
    with missing(built / "_static" / "explorer" / "layer-3-look.js"):
        page.get_by_label("Your own").fill("the river bank")
        page.get_by_label("Your own").press("Enter")
        wait_for_status(page, "layer-3-look.js could not be read. The listed sentences still work.")
    page.get_by_role("button", name="Read it").click()
    wait_for_status(page, "read in")


@pytest.mark.browser
@pytest.mark.parametrize("scripts", [True, False])
def test_without_scripts_or_data_the_still_stays(chromium: Browser, built: Path, scripts: bool) -> None:
    with (
        missing(built / "_static" / "explorer" / "manifest.js"),
        chromium.new_context(java_script_enabled=scripts) as context,
    ):
        tab = context.new_page()
        tab.goto((built / "index.html").as_uri())
        tab.wait_for_timeout(300)
        still = tab.get_by_role("img", name="All 72 heads")
        assert still.is_visible()
        assert still.bounding_box()["width"] > 300
        assert not tab.locator(".ae").count()


@pytest.mark.browser
@pytest.mark.parametrize("width", [360, 1300])
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_accessible_and_no_wider_than_the_screen(page: Page, width: int, theme: str) -> None:
    from axe_playwright_python.sync_playwright import Axe

    page.set_viewport_size({"width": width, "height": 800})
    page.add_style_tag(content="body { min-width: 0 } figure { margin: 0 }")  # as the book's theme has it
    background, text = ("#ffffff", "#222832") if theme == "light" else ("#14181e", "#ced6dd")
    page.add_style_tag(content=f"body {{ background: {background}; color: {text} }}")
    page.evaluate(
        "([theme, ground, text]) => { const root = document.documentElement; root.dataset.theme = theme;"
        "root.style.setProperty('--pst-color-background', ground);"
        "root.style.setProperty('--pst-color-text-base', text);"
        "root.style.setProperty('--pst-color-text-muted', text); }",
        [theme, background, text],
    )
    found = Axe().run(page, context=".ae").response["violations"]
    assert not [(v["id"], v["nodes"][0]["html"]) for v in found]
    edges = "(s) => document.querySelector(s).getBoundingClientRect().right"
    assert page.evaluate(edges, ".ae") <= page.evaluate(edges, "figure")
    assert page.evaluate(
        "document.querySelector('.ae').scrollWidth <= document.querySelector('.ae').clientWidth"
    )


@pytest.mark.browser
def test_colours_survive_grey(page: Page) -> None:
    """Lightness runs one way along the ramp, in both themes."""
    for theme in ("light", "dark"):
        page.evaluate("theme => document.documentElement.dataset.theme = theme", theme)
        style = "getComputedStyle(document.querySelector('.ae'))"
        hexes = [page.evaluate(f"{style}.getPropertyValue('--ae-{n}')") for n in ("low", "middle", "high")]
        luminance = []
        for value in hexes:
            rgb = [int(value.strip()[i : i + 2], 16) / 255 for i in (1, 3, 5)]
            linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in rgb]
            luminance.append(0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2])
        assert luminance == sorted(luminance, reverse=theme == "light")
        brighter, darker = max(luminance), min(luminance)
        assert (brighter + 0.05) / (darker + 0.05) > 10


def test_pdf_has_the_still(make_book: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import explorer

    folder = tmp_path / "_build" / "explorer" / explorer.key()
    folder.mkdir(parents=True)
    for kind in ("svg", "pdf"):
        (folder / f"still.{kind}").write_text("<svg xmlns='http://www.w3.org/2000/svg'/>")
    book = make_book(tmp_path, ("explorer",))
    book.write({"index.md": "# Page\n\n```{attention-explorer}\n:alt: what it shows\nA *caption*.\n```\n"})
    made = book.build("latex")
    assert not made.warnings
    tex = next(made.out.glob("*.tex")).read_text("utf-8")
    assert re.search(r"\\includegraphics\{*still\}*\.pdf", tex) or r"{{still}.pdf}" in tex
    assert r"A \sphinxstyleemphasis{caption}." in tex


def test_page_is_read_again_when_the_model_or_the_code_changes(
    make_book: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The scripts and the still carry the key of what they were made from; what is older goes."""
    import explorer

    def write(model: Path, tokenizer: Any, folder: Path) -> None:
        (folder / "data").mkdir(parents=True)
        for name in ("data/manifest.js", "still.svg"):
            (folder / name).write_text(f"<svg xmlns='http://www.w3.org/2000/svg'/><!-- {folder.name} -->")

    monkeypatch.setattr(explorer_data, "write", write)
    monkeypatch.setattr("textbook_code.data.sources.fetch", lambda name, progress: tmp_path)
    monkeypatch.setattr("textbook_code.data.text.load_tokenizer", lambda folder: None)
    book = make_book(tmp_path, ("explorer",))
    book.write({"index.md": PAGE, "other.md": "---\norphan: true\n---\n# Other\n"})
    for now in ("one", "one", "two"):
        monkeypatch.setattr(explorer, "key", lambda now=now: now)
        made = book.build()
        assert not made.warnings
        text = made.text("index.html")
        assert f'data-version="{now}"' in text
        assert "attention-explorer" not in made.text("other.html")
        assert now in made.text("_static/explorer/manifest.js")
        assert now in made.text("_images/still.svg")
        assert [path.name for path in (tmp_path / "_build" / "explorer").iterdir()] == [now]
