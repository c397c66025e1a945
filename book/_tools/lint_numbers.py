"""Find measurements typed by hand: decimals, percentages and numbers with units in the prose of the pages.

    python book/_tools/lint_numbers.py            # all pages
    python book/_tools/lint_numbers.py page.md …

What the book measures is computed in a cell and shown, or glued into the sentence; what a paper reports is
printed by {published}. So prose holds no such number, except inside mathematics, code and roles, as the place
of a citation ("section 3.2"), or by an entry of ``book/numbers-allowed.yml`` that says why:

    - page: appendix/setup.md        # below book/; may hold wildcards
      text: "Python 3.11"            # the words around the number, as a reader sees them
      reason: "a version, not a measurement"

An entry that allows nothing is reported too. Exit status 0: clean, 1: findings, 2: the allow-list is wrong.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from markdown_it import MarkdownIt
from markdown_it.renderer import RendererHTML
from markdown_it.token import Token
from myst_parser.config.main import MdParserConfig
from myst_parser.parsers.mdit import create_md_parser

BOOK = Path("book")
ALLOWED = Path("book/numbers-allowed.yml")
EXTENSIONS = {
    "amsmath", "attrs_block", "attrs_inline", "colon_fence", "deflist", "dollarmath", "fieldlist",
    "html_image", "smartquotes", "strikethrough", "substitution", "tasklist",
}  # fmt: skip
HIDDEN = "\ufffc"  # stands for code, mathematics and roles in the text that is searched

# Directives whose body is no prose; in any other it is read like the page itself.
NOT_PROSE = {
    "amsmath", "bibliography", "code", "code-block", "code-cell", "eval-rst", "glue", "image", "include",
    "literalinclude", "math", "mermaid", "page-head", "parsed-literal", "raw", "sourcecode",
    "tableofcontents", "toctree",
}  # fmt: skip
PROSE_OPTIONS = ("alt", "caption", "title")

_NUMBER = r"(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?"
_WORD = (
    r"(?:one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|fifteen|twenty|thirty|forty|fifty|sixty|"
    r"seventy|eighty|ninety|hundred|thousand|half)"
)
_UNITS = (
    r"(?:[nµμu]s|ms|s|sec|secs|seconds?|milliseconds?|microseconds?|nanoseconds?|min|mins|minutes?|h|hours?|days?|"
    r"[kKMGT]i?B|bytes?|kilobytes?|megabytes?|gigabytes?|tokens?/s|tokens? (?:per|a) second|it/s|"
    r"[kMGTP]?FLOP(?:s|S|/s)?|[kMGT]?MACs?|[km]?W|[km]?J|[kMG]?Hz|[kKMB]|million|billion|trillion|"
    r"times (?:faster|slower|as|more|less|better|smaller|larger|longer)|-?fold)"
)
_LONG_UNITS = (
    r"(?:(?:milli|micro|nano)?seconds?|minutes?|hours?|(?:kilo|mega|giga)?bytes?|"
    r"times (?:faster|slower|as|more|less|better|smaller|larger|longer))"
)
_PLACE = re.compile(
    r"(?:\b(?:[Ss]ections?|[Cc]hapters?|[Tt]ables?|[Ff]igures?|[Ee]quations?|[Aa]lgorithms?|[Aa]ppendix|arXiv:?)|§§?)"
    r"[\s\u00a0]*$"
)
_PATTERNS = (
    ("percentage", re.compile(rf"(?<![\w.]){_NUMBER}[\s\u00a0]?(?:%|per ?cent\b|percentage points?\b)")),
    ("percentage", re.compile(rf"\b{_WORD}(?:-{_WORD})? per ?cent\b", re.IGNORECASE)),
    ("number with a unit", re.compile(rf"(?<![\w.]){_NUMBER}[\s\u00a0]?{_UNITS}(?![\w/])")),
    ("number with a unit", re.compile(rf"\b{_WORD}(?:-{_WORD})? {_LONG_UNITS}\b", re.IGNORECASE)),
    ("ratio", re.compile(rf"(?<![\w.]){_NUMBER}[\s\u00a0]?×(?![\s\u00a0]?(?:[\d{HIDDEN}(]|[B-Zb-z]\b))")),
    (
        "power of ten",
        re.compile(rf"(?<![\w.]){_NUMBER}(?:e[-+−]?\d+|[\s\u00a0]?[×·][\s\u00a0]?10[⁻⁺⁰¹²³⁴-⁹]+)"),
    ),
    ("decimal", re.compile(r"(?<![\w.])\d[\d,]*\.\d+(?![\w]|\.\d)")),
)


class AllowListError(ValueError):
    """The allow-list is not what it should be."""


@dataclass(frozen=True)
class Finding:
    """One number that should not have been typed."""

    path: Path
    line: int
    text: str
    kind: str

    def __str__(self) -> str:
        what = f"{self.text!r} is a {self.kind} typed by hand"
        return f"{self.path}:{self.line}: {what}: glue it, cite it or allow it"


@dataclass
class Allowed:
    """One entry of the allow-list."""

    page: str
    text: str
    reason: str
    used: bool = False

    def spans(self, text: str) -> list[tuple[int, int]]:
        """Where in ``text`` the entry's words stand."""
        words = r"\s+".join(map(re.escape, self.text.split()))
        return [match.span() for match in re.finditer(words, text)]


@dataclass
class Linter:
    """Reads pages and gathers findings.

    Args:
        allowed: the entries of the allow-list; those that allowed something are marked as used.
        book: the folder that the entries' pages are relative to.
    """

    allowed: list[Allowed] = field(default_factory=list)
    book: Path = BOOK

    def page(self, path: Path) -> list[Finding]:
        """The findings of one page, in the order of its lines."""
        name = path.resolve().relative_to(self.book.resolve()).as_posix()
        entries = [entry for entry in self.allowed if fnmatch(name, entry.page)]
        found = []
        for text, source, line in prose(path.read_text("utf-8")):
            excused = [(span, entry) for entry in entries for span in entry.spans(text)]
            for kind, match in numbers(text):
                excuses = [e for (a, b), e in excused if a <= match.start() and match.end() <= b]
                for entry in excuses:
                    entry.used = True
                if not excuses:
                    at = line + _line_in(source, text, match)
                    found.append(Finding(path, at, " ".join(match[0].split()), kind))
        return sorted(found, key=lambda finding: finding.line)

    def unused(self) -> list[str]:
        """The entries that allowed nothing on the pages read."""
        return [
            f"{ALLOWED}: the entry {entry.text!r} for {entry.page} allows nothing: remove it"
            for entry in self.allowed
            if not entry.used
        ]


def numbers(text: str) -> Iterator[tuple[str, re.Match[str]]]:
    """The numbers in ``text`` that look measured, each once, as (kind, match)."""
    taken: list[tuple[int, int]] = []
    for kind, pattern in _PATTERNS:
        for match in pattern.finditer(text):
            inside = any(a <= match.start() < b or a < match.end() <= b for a, b in taken)
            if not inside and not _PLACE.search(text[: match.start()]):
                taken.append(match.span())
                yield kind, match


def _line_in(source: str, text: str, match: re.Match[str]) -> int:
    """How many lines below the start of ``source`` the match in the visible ``text`` stands."""
    pattern = re.compile(r"\s+".join(map(re.escape, match[0].split())))
    earlier = sum(1 for other in pattern.finditer(text) if other.start() < match.start())
    places = list(pattern.finditer(source))
    return source.count("\n", 0, places[min(earlier, len(places) - 1)].start()) if places else 0


# ---------------------------------------------------------------- the prose of a page


@cache
def _parser() -> MarkdownIt:
    return create_md_parser(MdParserConfig(enable_extensions=EXTENSIONS), RendererHTML)


def prose(source: str, line: int = 1) -> Iterator[tuple[str, str, int]]:
    """Each stretch of prose as (the text a reader sees, its Markdown, the line it starts on)."""
    start = line
    for token in _parser().parse(source):
        if token.map:
            start = line + token.map[0]
        if token.type == "inline":
            yield _visible(token), token.content, start
        elif token.type in ("fence", "colon_fence") and token.info.startswith("{"):
            yield from _directive(token, start)


def _visible(token: Token) -> str:
    out = []
    for child in token.children or []:
        if child.type in ("softbreak", "hardbreak"):
            out.append(" ")
        elif child.type == "text":
            out.append(child.content)
        elif child.type == "image":
            out.append(f" {child.content} ")
        elif child.content:
            out.append(HIDDEN)
    return "".join(out)


def _directive(token: Token, line: int) -> Iterator[tuple[str, str, int]]:
    name, _, title = token.info.partition("}")
    name = name[1:].strip().split(":")[0]
    body, options, skipped = _options(token.content)
    for key, value in options.items():
        at = next((i for i, text in enumerate(token.content.split("\n")) if key in text), 0)
        yield from prose(value, line + 1 + at)
    if name in NOT_PROSE:
        return
    if title.strip():
        yield from prose(title.strip(), line)
    yield from prose(body, line + 1 + skipped)


def _options(content: str) -> tuple[str, dict[str, str], int]:
    """(body, options that are prose, lines skipped) of a directive."""
    lines = content.split("\n")
    if lines[0].strip() == "---":
        end = next((i for i, text in enumerate(lines[1:], 1) if text.strip() == "---"), len(lines) - 1)
        try:
            data = yaml.safe_load("\n".join(lines[1:end]))
        except yaml.YAMLError:
            data = None
        return "\n".join(lines[end + 1 :]), dict(_prose_options(data)), end + 1
    end, found = 0, {}
    while end < len(lines) and (option := re.match(r":([\w-]+):\s*(.*)", lines[end])):
        if option[1] in PROSE_OPTIONS:
            found[option[1]] = option[2]
        end += 1
    return "\n".join(lines[end:]), found, end


def _prose_options(data: Any) -> Iterator[tuple[str, str]]:
    """The alternative texts and captions, at any depth, such as mystnb → figure → caption."""
    if isinstance(data, dict):
        for key, value in data.items():
            if key in PROSE_OPTIONS and isinstance(value, str):
                yield str(key), value
            else:
                yield from _prose_options(value)


# ---------------------------------------------------------------- command


def load_allowed(path: Path) -> list[Allowed]:
    """The allow-list.

    Raises:
        AllowListError: an entry has not exactly page, text and reason, or one of them is empty.
    """
    out = []
    for i, entry in enumerate(yaml.safe_load(path.read_text("utf-8")) or [], 1):
        if not isinstance(entry, dict) or set(entry) != {"page", "text", "reason"}:
            raise AllowListError(f"{path}: entry {i}: expected page, text and reason, got {entry!r}")
        for key, value in entry.items():
            if not isinstance(value, str) or not value.strip():
                raise AllowListError(f"{path}: entry {i}: {key} must be a quoted string, got {value!r}")
        if not any(numbers(entry["text"])):
            raise AllowListError(f"{path}: entry {i}: there is no number in {entry['text']!r} to allow")
        out.append(Allowed(**entry))
    return out


def main(arguments: Sequence[str]) -> int:
    try:
        linter = Linter(load_allowed(ALLOWED) if ALLOWED.exists() else [])
    except (AllowListError, yaml.YAMLError) as error:
        print(error, file=sys.stderr)
        return 2
    pages = [Path(name) for name in arguments] or sorted(BOOK.rglob("*.md"))
    if missing := [page for page in pages if not page.is_file()]:
        print(f"no such page: {', '.join(map(str, missing))}", file=sys.stderr)
        return 2
    found = [str(finding) for page in pages for finding in linter.page(page)]
    if not arguments:
        found += linter.unused()
    print("\n".join(found) if found else f"lint_numbers: {len(pages)} pages, no number typed by hand")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
