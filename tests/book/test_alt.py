"""Every picture says what it shows, and every figure has a caption: in the sources, and in the built HTML."""

from __future__ import annotations

import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path, PurePosixPath

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
BUILT = ROOT / "_build" / "html"
PAGES = sorted((ROOT / "book").rglob("*.md"))

_BLOCK = re.compile(r"^(`{3,}|:{3,})\{([\w:-]+)\}([^\n]*)\n(.*?)^\1[ \t]*$", re.MULTILINE | re.DOTALL)
_IMAGE = re.compile(r"!\[([^\]]*)\]\(([^)\s]+)")
_FILE = re.compile(r"\.(?:svg|png|jpe?g|gif|webp|pdf)$", re.IGNORECASE)
_VOID = {"area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "source", "track", "wbr"}


def poor(alt: str | None, source: str = "") -> str | None:
    """What is wrong with an alternative text; None when nothing is."""
    if alt is None or not alt.strip():
        return "has no alternative text"
    name = PurePosixPath(source).name
    if _FILE.search(alt) or (name and alt.strip() in (name, PurePosixPath(name).stem, source)):
        return f"has a file name for its alternative text: {alt!r}"
    if len(alt.split()) < 3:
        return f"has an alternative text of fewer than three words: {alt!r}"
    return None


# ---------------------------------------------------------------- sources


def options(body: str) -> tuple[dict, str]:
    """The options of a directive, in either notation, and the rest of its body."""
    if body.startswith("---"):
        head, _, rest = body[3:].partition("\n---")
        return yaml.safe_load(head) or {}, rest
    found = {}
    lines = body.splitlines()
    while lines and (option := re.match(r":([\w-]+):\s*(.*)", lines[0])):
        found[option[1]] = option[2]
        lines.pop(0)
    return found, "\n".join(lines)


def source_problems(text: str) -> Iterator[str]:
    """What is wrong with the pictures of a page's source."""

    def line(at: int) -> int:
        return text.count("\n", 0, at) + 1

    for block in _BLOCK.finditer(text):
        kind, argument, (given, rest) = block[2], block[3].strip(), options(block[4])
        where = f"line {line(block.start())}: {{{kind}}} {argument}".rstrip()
        if kind in ("image", "figure", "glue:figure") and (problem := poor(given.get("alt"), argument)):
            yield f"{where} {problem}"
        if kind in ("figure", "glue:figure") and not rest.strip():
            yield f"{where} has no caption"
        if kind == "code-cell" and (settings := given.get("mystnb") or {}):
            image, figure = settings.get("image"), settings.get("figure")
            if figure is not None and not (figure.get("caption") or "").strip():
                yield f"{where} draws a figure that has no caption"
            if (image or figure) is not None and (problem := poor((image or {}).get("alt"))):
                yield f"{where} draws a figure that {problem}"
    prose = _BLOCK.sub(lambda block: "\n" * block[0].count("\n"), text)
    for image in _IMAGE.finditer(prose):
        if problem := poor(image[1], image[2]):
            yield f"line {line(image.start())}: the image {image[2]} {problem}"


GOOD = "a curve that falls to a plateau"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("![](curve.svg)", "has no alternative text"),
        ("![curve.svg](img/curve.svg)", "has a file name"),
        ("![curve](img/curve.svg)", "has a file name"),
        ("![a curve](img/loss.svg)", "fewer than three words"),
        ("```{image} a.svg\n:width: 50%\n```", "has no alternative text"),
        ("```{figure} a.svg\n:alt:\n\nCaption.\n```", "has no alternative text"),
        (f"```{{figure}} a.svg\n:alt: {GOOD}\n```", "has no caption"),
        (f":::{{figure}} a.svg\n:alt: {GOOD}\n:::", "has no caption"),
        (f"```{{glue:figure}} loss\n:alt: {GOOD}\n```", "has no caption"),
        (
            "```{code-cell} python3\n---\nmystnb:\n  figure:\n    caption: Loss.\n---\n```",
            "has no alternative",
        ),
        (
            f"```{{code-cell}}\n---\nmystnb:\n  image:\n    alt: {GOOD}\n  figure:\n    name: f\n---\n```",
            "has no caption",
        ),
    ],
)
def test_source_check_finds(text: str, problem: str) -> None:
    found = list(source_problems(f"First line.\n\n{text}\n"))
    assert len(found) == 1
    assert problem in found[0]
    assert found[0].startswith("line 3: ")


@pytest.mark.parametrize(
    "text",
    [
        f"![{GOOD}](a.svg)",
        f"```{{figure}} a.svg\n:alt: {GOOD}\n:name: fig-a\n\nCaption.\n```",
        f"```{{code-cell}}\n---\nmystnb:\n  image: {{alt: {GOOD}}}\n  figure: {{caption: Loss.}}\n---\n```",
        "```{code-cell} python3\nx[0](y)  # ![](no image)\n```",
    ],
)
def test_source_check_accepts(text: str) -> None:
    assert list(source_problems(text)) == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT / "book").as_posix())
def test_sources(page: Path) -> None:
    assert list(source_problems(page.read_text("utf-8"))) == []


# ---------------------------------------------------------------- built pages


class Pictures(HTMLParser):
    """Gathers what is wrong with the pictures inside a page's article."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[dict[str, str]] = []
        self.problems: list[str] = []
        self.captions: list[bool] = []

    def _inside(self, tag: str, part: str = "") -> bool:
        return any(node["tag"] == tag and part in ["", *node.get("class", "").split()] for node in self.open)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        given = {key: value or "" for key, value in attributes}
        article = self._inside("article") or tag == "article"
        if tag == "figure":
            self.captions.append(False)
        if tag == "figcaption" and self.captions:
            self.captions[-1] = True
        if tag == "img" and article and given.get("role") != "presentation":
            source = given.get("src", "")
            if problem := poor(given.get("alt"), source):
                self.problems.append(f"<img src={source[:60]!r}> {problem}")
            if self._inside("div", "cell_output") and not self._inside("figure"):
                self.problems.append(
                    f"<img src={source[:60]!r}> is drawn by a cell and is no captioned figure"
                )
        if (
            tag == "svg"
            and given.get("role") == "img"
            and not (given.get("aria-label") or given.get("aria-labelledby"))
        ):
            self.problems.append("an <svg role='img'> has no label")
        if tag not in _VOID:
            self.open.append({"tag": tag, **given})

    def handle_endtag(self, tag: str) -> None:
        while self.open and self.open.pop()["tag"] != tag:
            pass
        if tag == "figure" and not self.captions.pop():
            self.problems.append("a <figure> has no <figcaption>")


def html_problems(text: str) -> list[str]:
    parser = Pictures()
    parser.feed(text)
    return parser.problems


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("<img src='a.svg'>", "has no alternative text"),
        ("<img src='a.svg' alt=''>", "has no alternative text"),
        ("<img src='_images/a.svg' alt='_images/a.svg'>", "has a file name"),
        (f"<figure><img src='a.svg' alt='{GOOD}'></figure>", "no <figcaption>"),
        (f"<div class='output cell_output'><img src='a' alt='{GOOD}'></div>", "no captioned figure"),
        ("<svg role='img'></svg>", "has no label"),
    ],
)
def test_html_check_finds(text: str, problem: str) -> None:
    found = html_problems(f"<article class='bd-article'><p>Text<br>text</p>{text}</article>")
    assert len(found) == 1
    assert problem in found[0]


def test_html_check_accepts() -> None:
    figure = f"<figure><img src='a.svg' alt='{GOOD}'/><figcaption>Loss.</figcaption></figure>"
    page = f"<img src='logo.svg' alt='Logo'><article><div class='cell_output'>{figure}</div></article>"
    assert html_problems(page) == []


@pytest.mark.browser  # not that it opens one: it needs the built pages too
def test_built_pages() -> None:
    assert BUILT.exists(), "the HTML is not built; `make html` builds it"
    pages = [page for page in sorted(BUILT.rglob("*.html")) if "_static" not in page.parts]
    assert pages
    found = [
        f"{page.relative_to(BUILT)}: {x}" for page in pages for x in html_problems(page.read_text("utf-8"))
    ]
    assert found == []
