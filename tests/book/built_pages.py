"""What the tests of the built pages look at: each page as its source says it, and as a browser shows it."""

from __future__ import annotations

import asyncio
import functools
import sys
from collections.abc import AsyncIterator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urljoin, urlsplit

if TYPE_CHECKING:
    from playwright.async_api import BrowserContext, Page, Response

WIDTHS = (360, 768, 1300)
AT_ONCE = 3
PATIENCE = 120_000  # milliseconds, for a machine that does other things too
# Nothing but this machine has an address: what tries to leave it fails, and is seen.
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"]
LOCAL = ("file", "data", "blob", "about")

# ---------------------------------------------------------------- as its source says it


class Source(HTMLParser):
    """The ids, links, resources and pictures of one HTML file."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.resources: list[str] = []  # what the browser reads without being asked
        self.pictures: list[dict[str, str | None]] = []
        self.double: list[str] = []
        self.leads_on = False  # to another page, at once
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        name = given.get("id") or (given.get("name") if tag == "a" else None)
        if name:
            self.double += [name] * (name in self.ids)
            self.ids.add(name)
        if tag == "a" and given.get("href"):
            self.links.append(given["href"] or "")
        if tag == "meta" and (given.get("http-equiv") or "").lower() == "refresh":
            self.leads_on = True
            self.links.append((given.get("content") or "").partition("url=")[2].strip("'\""))
        if tag == "img":
            self.pictures.append(given)
        if tag in ("img", "script", "iframe", "source", "video", "audio", "embed") and given.get("src"):
            self.resources.append(given["src"] or "")
        if tag == "link" and given.get("href") and given.get("rel") != "canonical":
            self.resources.append(given["href"] or "")


def sources(root: Path) -> dict[str, Source]:
    """Every page below `root`, by its path."""
    found = (path.relative_to(root).as_posix() for path in sorted(root.rglob("*.html")))
    return {
        name: Source((root / name).read_text("utf-8")) for name in found if not name.startswith("_static/")
    }


def broken(root: Path, pages: dict[str, Source]) -> list[str]:
    """The links and resources that lead nowhere within `root`, as `page -> address`."""
    out = []
    for name, source in pages.items():
        for address in dict.fromkeys([*source.links, *source.resources]):
            parts = urlsplit(address)
            if parts.scheme or parts.netloc:
                continue
            target = unquote(urlsplit(urljoin(name, address)).path) if parts.path else name
            target = f"{target}index.html" if target.endswith("/") else target
            wanted = unquote(parts.fragment)
            if not (root / target).is_file() or (
                wanted and target in pages and wanted not in pages[target].ids
            ):
                out.append(f"{name} -> {address}")
    return out


# ---------------------------------------------------------------- as a browser shows it


@dataclass
class Report:
    """What happened while one page was open."""

    external: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    violations: list[str] = field(default_factory=list)
    too_wide: list[str] = field(default_factory=list)
    bytes: dict[str, int] = field(default_factory=dict)


class _Server(ThreadingHTTPServer):
    request_queue_size = 128  # a browser asks for many files at once

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that closes a page may leave in the middle of an answer."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


class _Quiet(SimpleHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        pass


@contextmanager
def served(root: Path) -> Iterator[str]:
    """The address under which `root` is served, on this machine only."""
    with _Server(("127.0.0.1", 0), functools.partial(_Quiet, directory=str(root))) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/"
        finally:
            server.shutdown()


def survey(executable: str, root: Path, names: Iterable[str]) -> dict[str, Report]:
    """Open every page, served and as a file, in both themes and at all widths."""
    with (
        served(root) as address,
        ThreadPoolExecutor(1) as pool,
    ):  # a thread: pytest's may have a loop of its own
        return pool.submit(asyncio.run, _survey(executable, root, address, list(names))).result()


async def _survey(executable: str, root: Path, address: str, names: list[str]) -> dict[str, Report]:
    from playwright.async_api import Error as PlaywrightError
    from playwright.async_api import async_playwright

    reports = {name: Report() for name in names}
    todo = iter(names)
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(
            executable_path=executable,
            # nothing but this machine has an address, so that what tries to leave it fails and is seen
            args=[
                "--no-sandbox",
                "--disable-gpu",
                "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
            ],
        )

        async def worker() -> None:
            context = await browser.new_context()
            context.set_default_timeout(PATIENCE)
            for name in todo:
                try:
                    await _visit(context, address + name, address, reports[name], looked_at=True)
                    await _visit(context, (root / name).as_uri(), address, reports[name], looked_at=False)
                except PlaywrightError as error:
                    reports[name].errors.append(f"the page could not be looked at: {error}")

        await asyncio.gather(*(worker() for _ in range(AT_ONCE)))
        await browser.close()
    return reports


@asynccontextmanager
async def _opened(context: BrowserContext, url: str, address: str, report: Report) -> AsyncIterator[Page]:
    page = await context.new_page()
    await page.set_viewport_size({"width": WIDTHS[-1], "height": 900})
    await page.emulate_media(color_scheme="light", reduced_motion="reduce")  # no colour on its way to another

    def asked(request: Any) -> None:
        if not request.url.startswith(address) and urlsplit(request.url).scheme not in LOCAL:
            report.external.append(request.url)

    def said(message: Any) -> None:
        if message.type == "error":
            report.errors.append(message.text)

    def answered(response: Response) -> None:
        if response.status >= 400:
            report.failed.append(f"{response.status} {response.url}")

    page.on("request", asked)
    page.on("console", said)
    page.on("response", answered)
    page.on("pageerror", lambda error: report.errors.append(str(error)))
    page.on("requestfailed", lambda request: report.failed.append(f"{request.failure} {request.url}"))
    try:
        await page.goto(url, wait_until="load")
        await page.evaluate(_SETTLED)
        yield page
    finally:
        await page.close()


# Mathematics is set, and the explorer stands, before anything is measured.
_SETTLED = """async () => {
  if (window.MathJax?.startup?.promise) await window.MathJax.startup.promise;
  const waiting = "figure.attention-explorer:not(.ae-on), figure.person-demo:not(.pn-on)";
  const figures = () => [...document.querySelectorAll(waiting)];
  for (let i = 0; figures().length && i < 100; i++) await new Promise((resolve) => setTimeout(resolve, 100));
  await document.fonts.ready;
}"""
_WIDE = """() => {
  const { clientWidth, scrollWidth } = document.documentElement;
  if (scrollWidth <= clientWidth) return null;
  const out = [...document.querySelectorAll("body *")]
    .filter((element) => element.getBoundingClientRect().right > clientWidth + 1);
  return `${scrollWidth} px: ${out.at(-1)?.outerHTML.slice(0, 120)}`;
}"""
_SIZES = """() => performance.getEntriesByType("resource").concat(performance.getEntriesByType("navigation"))
  .map((e) => [e.name, e.decodedBodySize])"""
# A long page is thousands of coloured words of code and pieces of formulas, and axe-core takes its time for
# each. Of code, the first of each kind in each kind of box stays; what MathJax draws, with its own text for
# screen readers, becomes a letter.
_THIN_OUT = """() => {
  const seen = new Set();
  for (const part of document.querySelectorAll(":is(pre, .sig) *")) {
    let kind = "";
    for (let each = part; each && !each.matches("article"); each = each.parentElement) {
      kind += `${each.tagName} ${each.className}/`;
    }
    if (seen.has(kind) && !part.childElementCount) part.replaceWith(part.textContent);
    seen.add(kind);
  }
  for (const formula of document.querySelectorAll("mjx-container")) formula.replaceWith("x");
}"""
# Where colours are concerned, elements of one kind (names and classes up to the root) look the same.
_AXE = """async (colours) => {
  const kinds = new Map();
  for (const element of colours ? document.querySelectorAll("body *") : []) {
    let kind = "";
    for (let each = element; each; each = each.parentElement) {
      const odd = each.tagName === "TR" && each.rowIndex % 2;
      kind += `${each.tagName} ${each.className} ${each.getAttribute("style")} ${odd}/`;
    }
    const isText = (child) => child.nodeType === Node.TEXT_NODE && child.data.trim();
    if ([...element.childNodes].some(isText) && !kinds.has(kind)) kinds.set(kind, element);
  }
  const options = { resultTypes: ["violations"], preload: false };
  const off = { enabled: false };
  const COLOURS = ["color-contrast", "link-in-text-block"];
  const { violations } = colours
    ? await axe.run({ include: [...kinds.values()] }, { ...options, runOnly: COLOURS })
    : await axe.run({ ...options, rules: { "color-contrast": off, "link-in-text-block": off } });
  return violations.map(
    ({ id, nodes: [{ html, failureSummary }, ...more] }) =>
      `${id} (${1 + more.length}): ${html.slice(0, 160)} ${failureSummary.slice(0, 300)}`
  );
}"""
# The theme makes what scrolls reachable by keyboard a third of a second after a change of size.
_DRAWN = "() => new Promise((done) => requestAnimationFrame(() => setTimeout(done, 400)))"


async def _visit(context: BrowserContext, url: str, address: str, report: Report, *, looked_at: bool) -> None:
    async with _opened(context, url, address, report) as page:
        if not looked_at:
            return
        report.bytes = {name.removeprefix(address): size for name, size in await page.evaluate(_SIZES)}
        for width in WIDTHS:
            await page.set_viewport_size({"width": width, "height": 900})
            await page.evaluate(_DRAWN)
            if wide := await page.evaluate(_WIDE):
                report.too_wide.append(f"at {width} px: {wide}")
        await page.evaluate(_THIN_OUT)
        await page.evaluate((files("axe_playwright_python") / "axe.min.js").read_text("utf-8"))
        for width in (WIDTHS[0], WIDTHS[-1]):
            await page.set_viewport_size({"width": width, "height": 900})
            await page.evaluate(_DRAWN)
            report.violations += [f"{width} px: {v}" for v in await page.evaluate(_AXE, False)]
            for theme in ("light", "dark"):
                await page.emulate_media(color_scheme=theme)
                await page.evaluate("theme => document.documentElement.dataset.theme = theme", theme)
                report.violations += [f"{theme}, {width} px: {v}" for v in await page.evaluate(_AXE, True)]
