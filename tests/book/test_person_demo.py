"""A person or not, in the page: the integers and the pixels are Python's, and everyone can use it."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import person_demo
import person_demo_data
import pytest
from built_pages import served
from PIL import Image

from textbook_code.data import people
from textbook_code.data.sources import SOURCES
from textbook_code.deploy import compilers, images, wasm

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

ROOT = Path(__file__).resolve().parents[2]
BOOK = Path(os.environ.get("TEXTBOOK_CODE_BUILD") or ROOT / "_build") / "html" / "book"
BOOK_PAGE = BOOK / "07-embedded-deployment" / "pixels-to-person.html"
PAGE = """# Page

```{person-demo}
```
"""
READY = "figure.person-demo.pn-on .pn-verdict strong"
ANSWERS = """pictures => {
  const net = personDemo.network(personDemo.bytesOf(personData.wasm));
  return net.then((net) => pictures.map((picture) => {
    const { q, attention } = net.run(personDemo.bytesOf(picture));
    return [q, Array.from(attention)];
  }));
}"""
SHOWN = """() => Array.from(
  document.querySelector(".pn-stage canvas").getContext("2d").getImageData(0, 0, 32, 32).data
)"""


def text(array: np.ndarray) -> str:
    return base64.b64encode(array.tobytes()).decode()


def encoded(pixels: np.ndarray, kind: str = "PNG", **settings: Any) -> bytes:
    Image.fromarray(pixels).save(out := io.BytesIO(), kind, **settings)
    return out.getvalue()


@pytest.fixture(scope="module")
def noise() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture(scope="module")
def built(make_book: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    book = make_book(tmp_path_factory.mktemp("book"), ("person_demo",))
    book.write({"index.md": PAGE + "\n```{toctree}\nother\n```\n", "other.md": "# Other\n"})
    made = book.build()
    assert not made.warnings
    return made.out


@pytest.fixture(scope="module")
def module() -> wasm.Module:
    return wasm.Module(person_demo.made(ROOT) / "person.wasm")


@pytest.fixture
def page(opened: Any, built: Path) -> Iterator[Page]:
    """The page, opened as a file; any error in it fails the test, and so does a request."""
    with opened(built / "index.html", READY) as tab:
        yield tab


def shown(page: Page) -> np.ndarray:
    rgba = np.array(page.evaluate(SHOWN), np.uint8).reshape(32, 32, 4)
    assert (rgba[..., 3] == 255).all()
    return rgba[..., :3]


def answer(page: Page) -> int:
    return int(page.get_attribute(".pn", "data-q") or "")


def give(page: Page, name: str, content: bytes) -> str:
    """Choose a file; what the page says of it, once it has read it."""
    page.set_input_files(".pn input[type=file]", {"name": name, "mimeType": "", "buffer": content})
    page.wait_for_function(
        "name => { const text = document.querySelector('.pn-status').textContent;"
        "return text.startsWith(name) && !text.startsWith('Reading'); }",
        arg=name,
    )
    return page.inner_text(".pn-status")


# ---------------------------------------------------------------- what is built


def test_only_the_page_with_a_demonstration_loads_it(built: Path) -> None:
    with_it, without = ((built / name).read_text("utf-8") for name in ("index.html", "other.html"))
    for name in ("person-demo.js", "person-demo.css", "person-data.js"):
        assert name in with_it and name not in without
    assert with_it.index("person-data.js") < with_it.index("person-demo.js")
    assert re.search(r'<img alt="Four test pictures[^"]*" src="_images/still\.svg"', with_it)


def test_data_are_those_of_the_sources(built: Path, module: wasm.Module) -> None:
    script = (built / "_static" / "person-demo" / "person-data.js").read_text("ascii")
    data = json.loads(script.partition("personData = ")[2].rstrip().rstrip(";"))
    content = base64.b64decode(data["wasm"])
    assert len(content) == module.size <= wasm.MAX_BYTES
    assert 8 <= len(data["samples"]) <= 12
    assert {sample["person"] for sample in data["samples"]} == {True, False}
    known = {
        examined.numpy().tobytes()
        for source in person_demo_data.PICKED
        for examined in people.examination(people.load(source, "test"))
    }
    for sample in data["samples"]:
        assert base64.b64decode(sample["rgb"]) in known, sample["name"]
    assert len({sample["rgb"] for sample in data["samples"]}) == len(data["samples"])


def test_only_what_may_be_shipped(built: Path) -> None:
    for source in person_demo_data.PICKED:
        used = [SOURCES[name] for name in SOURCES if name.startswith(source)]
        assert all(each.redistributable for each in used)
    assert "faces" not in person_demo_data.PICKED
    for who in ("Google", "Twitter", "CC BY 4.0", "OpenCV"):
        assert who in person_demo_data.CREDITS
    notice = (built / "_static" / "person-demo" / "licence-of-pedestrians.md").read_text("utf-8")
    assert "BSD 3-Clause" in notice and "vtest.avi" in notice


def test_pdf_shows_the_still(make_book: Any, tmp_path: Path, built: Path) -> None:
    book = make_book(tmp_path, ("person_demo",))
    book.write({"index.md": PAGE})
    made = book.build("latex")
    assert not [line for line in made.warnings if "person" in line]
    tex = next(made.out.glob("*.tex")).read_text("utf-8")
    assert re.search(r"includegraphics\{\{still\}\.pdf\}", tex) and "webcam" in tex
    assert (made.out / "still.pdf").is_file()


def test_another_model_makes_other_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    before = person_demo.key()
    assert person_demo.key() == before
    (other := tmp_path / "model.tflite").write_bytes(b"other")
    monkeypatch.setattr(person_demo, "model_file", lambda: other)
    assert person_demo.key() != before
    with pytest.raises(ValueError, match=r"model\.tflite"):
        person_demo.made(tmp_path)
    assert not list((tmp_path / "_build" / "person-demo").iterdir())


# ---------------------------------------------------------------- the same bits


@pytest.mark.browser
def test_fifty_pictures_bit_for_bit(page: Page, module: wasm.Module, noise: np.random.Generator) -> None:
    tests = people.examination(people.load("emoji", "test")).numpy()
    pictures = tests[:: len(tests) // 50 + 1]
    pictures = np.concatenate([pictures, noise.integers(0, 256, (50 - len(pictures), 32, 32, 3), np.uint8)])
    assert len(pictures) == 50
    answers = page.evaluate(ANSWERS, [text(picture) for picture in pictures])
    logits = [q for q, _ in answers]
    assert len(set(logits)) > 10
    assert logits == module.logits(pictures).tolist()
    assert logits == compilers.CNet(person_demo.model_file()).logits(pictures).tolist()
    assert [seen for _, seen in answers] == module.attention(pictures).tolist()


@pytest.mark.browser
def test_as_read_from_files(page: Page, module: wasm.Module, noise: np.random.Generator) -> None:
    """What is 32 × 32 is not touched; what is not is shrunk or enlarged as Python does it."""
    for height, width in ((32, 32), (7, 7), (31, 40), (33, 33), (64, 64), (100, 73), (200, 517)):
        pixels = noise.integers(0, 256, (height, width, 3), np.uint8)
        said = give(page, f"{width}x{height}.png", encoded(pixels))
        assert said.endswith("its middle square in 32 × 32 pixels.")
        expected = pixels if (height, width) == (32, 32) else images.fit(pixels)
        np.testing.assert_array_equal(shown(page), expected)
        assert answer(page) == module.logits(expected[None])[0]
        assert page.locator(".pn-sample input:checked").count() == 0


@pytest.mark.browser
def test_other_kinds_of_files(page: Page, noise: np.random.Generator, tmp_path: Path) -> None:
    """Opacity on white, one channel as three, a palette: as `textbook_code.deploy.images` reads them."""
    rgba = noise.integers(0, 256, (50, 60, 4), np.uint8)
    rgba[..., 3] = np.where(rgba[..., 3] < 128, 0, 255)
    grey = noise.integers(0, 256, (40, 40), np.uint8)
    for name, content in (
        ("clear.png", encoded(rgba)),
        ("grey.png", encoded(grey)),
        ("still.gif", encoded(grey, "GIF")),
        ("still.webp", encoded(rgba[..., :3], "WEBP", lossless=True)),
        ("still.bmp", encoded(rgba[..., :3], "BMP")),
    ):
        (file := tmp_path / name).write_bytes(content)
        give(page, name, content)
        np.testing.assert_array_equal(shown(page), images.load(file), name)


@pytest.mark.browser
def test_a_photograph_that_is_turned(page: Page) -> None:
    (exif := Image.Exif())[0x0112] = 6  # to be turned by a quarter
    flat = np.zeros((32, 64, 3), np.uint8)
    flat[:, :32] = 255
    give(page, "turned.jpg", encoded(flat, "JPEG", exif=exif.tobytes(), quality=95))
    seen = shown(page).astype(int)
    assert seen[:12].min() > 200 and seen[-12:].max() < 50  # left is now above


@pytest.mark.browser
def test_what_is_shown_is_what_was_computed(page: Page, module: wasm.Module) -> None:
    labels = page.locator(".pn-sample input")
    for i in range(labels.count()):
        labels.nth(i).check()
        pixels = shown(page)
        q = int(module.logits(pixels[None])[0])
        steps = q - module.zero_point
        assert answer(page) == q
        assert page.inner_text(".pn-verdict") == ("A person." if steps > 0 else "No person.")
        said = page.inner_text(".pn dl").replace("−", "-")
        assert f"{steps * module.scale:.2f}" in said and f"(zero is {module.zero_point})" in said
        assert f"{module.size:,} bytes" in said
        seen = module.attention(pixels[None])[0]
        grid = round(len(seen) ** 0.5)
        row, column = divmod(int(seen.argmax()), grid)
        assert f"row {row + 1}, column {column + 1}" in page.inner_text(".pn-looks")
        assert page.get_attribute("canvas[role=img]", "aria-label").endswith(page.inner_text(".pn-looks"))


# ---------------------------------------------------------------- what is no picture


def animated(kind: str, noise: np.random.Generator) -> bytes:
    frames = [Image.fromarray(noise.integers(0, 256, (32, 32, 3), np.uint8)) for _ in range(3)]
    frames[0].save(out := io.BytesIO(), kind, save_all=True, append_images=frames[1:])
    return out.getvalue()


@pytest.mark.browser
def test_bad_files_are_refused_by_name(page: Page, noise: np.random.Generator) -> None:
    pixels = noise.integers(0, 256, (60, 60, 3), np.uint8)
    png, jpeg, webp, gif = (encoded(pixels, kind) for kind in ("PNG", "JPEG", "WEBP", "GIF"))
    spoilt = bytearray(png)
    spoilt[len(png) // 2] ^= 1
    wide = bytearray(png)
    wide[16:24] = (70_000).to_bytes(4, "big") * 2
    wide[29:33] = zlib.crc32(bytes(wide[12:29])).to_bytes(4, "big")
    files = {
        "notes.txt": (b"To whom it may concern", "cannot read it as a picture"),
        "drawing.svg": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "cannot read it as a picture"),
        "empty.png": (b"", "it is empty"),
        "moving.gif": (animated("GIF", noise), "several frames"),
        "moving.png": (animated("PNG", noise), "several frames"),
        "moving.webp": (animated("WEBP", noise), "several frames"),
        "spoilt.png": (bytes(spoilt), "damaged or cut short"),
        "huge.png": (bytes(wide), "more than 40 million pixels"),
        "cut.png": (png[: len(png) // 2], "damaged or cut short"),
        "cut.jpg": (jpeg[: len(jpeg) // 2], "damaged or cut short"),
        "cut.webp": (webp[: len(webp) // 2], "damaged or cut short"),
        "cut.gif": (gif[: len(gif) // 2], "damaged or cut short"),
        "head.gif": (gif[:9], "damaged or cut short"),
        "head.jpg": (jpeg[:2], "picture"),
        "noise.png": (png[:8] + noise.bytes(500), "damaged or cut short"),
    }
    before, q = shown(page), answer(page)
    for name, (content, says) in files.items():
        said = give(page, name, content)
        assert says in said and said.endswith("The picture stays as it was."), said
        assert answer(page) == q
    np.testing.assert_array_equal(shown(page), before)
    assert give(page, "good.png", png).endswith("32 × 32 pixels.")


@pytest.mark.browser
def test_a_file_that_is_dropped(page: Page, module: wasm.Module, noise: np.random.Generator) -> None:
    pixels = noise.integers(0, 256, (32, 32, 3), np.uint8)
    drop = """([text, name]) => {
      const data = new DataTransfer();
      if (text) data.items.add(new File([personDemo.bytesOf(text)], name));
      const drop = new DragEvent("drop", { dataTransfer: data, bubbles: true, cancelable: true });
      document.querySelector(".pn").dispatchEvent(drop);
    }"""
    page.evaluate(drop, [base64.b64encode(encoded(pixels)).decode(), "dropped.png"])
    page.wait_for_function("document.querySelector('.pn-status').textContent.includes('middle square')")
    np.testing.assert_array_equal(shown(page), pixels)
    assert answer(page) == module.logits(pixels[None])[0]
    page.evaluate(drop, ["", ""])
    assert page.inner_text(".pn-status") == "That was no file."


# ---------------------------------------------------------------- for everyone


@pytest.mark.browser
def test_by_keyboard_alone(page: Page, module: wasm.Module) -> None:
    page.locator(".pn-sample input").first.focus()
    before = shown(page)
    page.keyboard.press("ArrowRight")
    assert page.inner_text(".pn-status").startswith("Sample: ")
    assert (shown(page) != before).any()
    stops = []
    for _ in range(6):
        page.keyboard.press("Tab")
        stops.append(page.evaluate("document.activeElement.tagName + (document.activeElement.type ?? '')"))
    assert stops == ["INPUTfile", "BUTTONbutton", "CANVAS", "SELECTselect-one", "INPUTrange", "BUTTONbutton"]
    page.get_by_label("Paint in").select_option("white")
    page.get_by_role("button", name="Fill").focus()
    page.keyboard.press("Enter")
    assert (shown(page) == 255).all()
    page.get_by_label("Paint in").select_option("red")
    page.get_by_label("Brush").focus()
    page.keyboard.press("Home")
    page.get_by_role("application").focus()
    for press in ("ArrowLeft", "ArrowUp", "Space", "ArrowDown", "Shift+ArrowDown", "Shift+ArrowDown"):
        page.keyboard.press(press)
    expected = np.full((32, 32, 3), 255, np.uint8)
    for row in (15, 16, 17, 18):
        expected[row, 15] = (0xCC, 0x22, 0x22)
    np.testing.assert_array_equal(shown(page), expected)
    assert answer(page) == module.logits(expected[None])[0]
    assert page.inner_text(".pn-status") == "Row 19, column 16."
    assert page.locator(".pn-cursor").is_visible()
    for _ in range(40):
        page.keyboard.press("ArrowRight")
    assert page.inner_text(".pn-status") == "Row 19, column 32."


@pytest.mark.browser
def test_painted_with_the_pointer(page: Page, module: wasm.Module) -> None:
    page.get_by_role("button", name="Fill").click()
    assert not shown(page).any()
    page.get_by_label("Paint in").select_option("white")
    page.get_by_label("Brush").fill("1")
    place = page.get_by_role("application").bounding_box()
    assert place
    pixel = place["width"] / 32
    at = [(place["x"] + (x + 0.5) * pixel, place["y"] + (y + 0.5) * pixel) for x, y in ((4, 6), (20, 6))]
    page.mouse.move(*at[0])
    page.mouse.down()
    page.mouse.move(*at[1])
    page.mouse.up()
    page.mouse.move(place["x"], place["y"])
    expected = np.zeros((32, 32, 3), np.uint8)
    expected[6, 4:21] = 255
    np.testing.assert_array_equal(shown(page), expected)
    assert answer(page) == module.logits(expected[None])[0]


@pytest.mark.browser
def test_webcam_only_after_a_click_and_until_stopped(opened: Any, built: Path) -> None:
    with opened(built / "index.html", READY, permissions=["camera"]) as page:
        page.evaluate(
            "() => { const ask = navigator.mediaDevices.getUserMedia.bind(navigator.mediaDevices);"
            "window.asked = []; navigator.mediaDevices.getUserMedia = async (what) => {"
            "window.asked.push(what); return (window.stream = await ask(what)); }; }"
        )
        before = shown(page)
        assert page.evaluate("asked.length") == 0
        page.get_by_role("button", name="Use the webcam").click()
        page.get_by_role("button", name="Stop the webcam").wait_for()
        assert page.evaluate("asked.length === 1 && asked[0].audio === false")
        page.wait_for_function(
            "before => " + SHOWN.replace("() => ", "").replace("Array.from", "String") + " !== before",
            arg=",".join(map(str, np.dstack([before, np.full((32, 32), 255)]).ravel().tolist())),
        )
        assert page.locator(".pn-sample input:checked").count() == 0
        page.get_by_role("button", name="Stop the webcam").click()
        assert page.evaluate("stream.getTracks().every((track) => track.readyState === 'ended')")
        assert page.inner_text(".pn-status") == "The webcam is off."
        page.get_by_role("button", name="Use the webcam").click()
        page.get_by_role("button", name="Stop the webcam").wait_for()
        page.locator(".pn-sample input").nth(1).check()  # another picture ends it too
        assert page.evaluate("stream.getTracks().every((track) => track.readyState === 'ended')")
        assert page.get_by_role("button", name="Use the webcam").is_visible()


@pytest.mark.browser
def test_webcam_that_is_refused_or_not_there(page: Page) -> None:
    for problem, says in (
        ("NotAllowedError", "The camera was not permitted."),
        ("NotFoundError", "There is no camera."),
        ("NotReadableError", "The camera cannot be used: busy"),
    ):
        page.evaluate(
            "name => { navigator.mediaDevices.getUserMedia = async () => "
            "{ throw new DOMException('busy', name); }; }",
            problem,
        )
        page.get_by_role("button", name="Use the webcam").click()
        page.wait_for_function("says => document.querySelector('.pn-status').textContent === says", arg=says)
    page.evaluate("Object.defineProperty(navigator, 'mediaDevices', { value: undefined })")
    page.get_by_role("button", name="Use the webcam").click()
    assert "no camera" in page.inner_text(".pn-status")


@pytest.mark.browser
def test_nothing_jumps(page: Page) -> None:
    """One height, whatever is shown."""
    page.add_style_tag(content="body { min-width: 0 }")
    for width in (390, 640, 700, 800):
        page.set_viewport_size({"width": width, "height": 900})
        heights = set()
        for i in range(page.locator(".pn-sample input").count()):
            page.locator(".pn-sample input").nth(i).check()
            heights.add(page.locator(".pn").bounding_box()["height"])  # type: ignore[index]
        give(page, "moving.gif", animated("GIF", np.random.default_rng(0)))
        heights.add(page.locator(".pn").bounding_box()["height"])  # type: ignore[index]
        assert len(heights) == 1, (width, heights)


@pytest.mark.browser
@pytest.mark.parametrize("width", [360, 390, 1300])
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_accessible_and_no_wider_than_the_screen(page: Page, width: int, theme: str) -> None:
    from axe_playwright_python.sync_playwright import Axe

    page.set_viewport_size({"width": width, "height": 800})
    page.add_style_tag(content="body { min-width: 0 }")  # as the book's theme has it
    background, ink, muted = (
        ("#ffffff", "#222832", "#48566b") if theme == "light" else ("#14181e", "#ced6dd", "#9ca4af")
    )
    page.add_style_tag(content=f"body {{ background: {background}; color: {ink} }}")
    page.evaluate(
        "([theme, ground, text, muted]) => { const root = document.documentElement;"
        "root.dataset.theme = theme;"
        "root.style.setProperty('--pst-color-background', ground);"
        "root.style.setProperty('--pst-color-text-base', text);"
        "root.style.setProperty('--pst-color-text-muted', muted); }",
        [theme, background, ink, muted],
    )
    give(page, "empty.png", b"")
    found = Axe().run(page, context=".pn").response["violations"]
    assert not [(v["id"], v["nodes"][0]["html"]) for v in found]
    edges = "selector => document.querySelector(selector).getBoundingClientRect().right"
    assert page.evaluate(edges, ".pn") <= page.evaluate(edges, "figure.person-demo")
    assert page.evaluate(
        "document.querySelector('.pn').scrollWidth <= document.querySelector('.pn').clientWidth"
    )


@pytest.mark.browser
def test_served_on_this_machine(chromium: Browser, built: Path, module: wasm.Module) -> None:
    """From a server too, everything is asked for once, at the start, and nothing when pictures are given."""
    with served(built) as address, chromium.new_context() as context:
        tab = context.new_page()
        asked: list[str] = []
        tab.on("request", lambda request: asked.append(request.url))
        tab.goto(f"{address}index.html")
        tab.wait_for_selector(READY)
        assert all(url.startswith(address) for url in asked)
        before = len(asked)
        tab.locator(".pn-sample input").nth(3).check()
        give(tab, "some.png", encoded(np.zeros((50, 50, 3), np.uint8)))
        assert answer(tab) == module.logits(np.zeros((1, 32, 32, 3), np.uint8))[0]
        assert len(asked) == before


@pytest.mark.browser
def test_without_scripts_the_still_stays(chromium: Browser, built: Path) -> None:
    with chromium.new_context(java_script_enabled=False) as context:
        tab = context.new_page()
        tab.goto((built / "index.html").as_uri())
        assert tab.locator("figure.person-demo > img").is_visible()
        assert tab.locator(".pn").count() == 0


@pytest.mark.browser
def test_a_browser_that_cannot_says_so(chromium: Browser, built: Path) -> None:
    with chromium.new_context() as context:
        context.add_init_script("WebAssembly.instantiate = async () => { throw new Error('no SIMD'); }")
        tab = context.new_page()
        tab.goto((built / "index.html").as_uri())
        tab.wait_for_selector(".pn-failed")
        assert "(no SIMD)" in tab.inner_text(".pn-failed")
        assert tab.locator("figure.person-demo > img").is_visible()


@pytest.mark.browser
def test_in_the_book(opened: Any, module: wasm.Module) -> None:
    """The same on the page of the whole build, with the book's theme around it."""
    if not BOOK_PAGE.is_file():
        pytest.skip(f"{BOOK_PAGE.name} is not built: run `make html` first")
    pictures = people.examination(people.load("emoji", "test")).numpy()[:50]
    with opened(BOOK_PAGE, READY) as page:
        answers = page.evaluate(ANSWERS, [text(picture) for picture in pictures])
        assert [q for q, _ in answers] == module.logits(pictures).tolist()
        for width in (390, 1300):
            page.set_viewport_size({"width": width, "height": 900})
            assert page.evaluate(
                "document.querySelector('.pn').scrollWidth <= document.querySelector('.pn').clientWidth"
            )
