"""Readers of the text sources that come in many languages or in pairs.

    articles = udhr_articles(fetch("udhr"), "fra")  # 30 texts
    words = cmudict_words(fetch("cmudict"), "train")  # {"walk": (("W", "AO1", "K"),), ...}

Book: data-and-licences
"""

from __future__ import annotations

import hashlib
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import NamedTuple

_SPLITS = {"train": range(2, 20), "valid": range(1, 2), "test": range(1)}  # of 20 parts
_ENTRY = re.compile(r"(?P<word>[a-z]+)(?:\(\d+\))? (?P<phones>[A-Z0-9 ]+?)(?: #.*)?")


class Language(NamedTuple):
    """A version of the Universal Declaration.

    Attributes:
        code: the file's name, such as ``"eng"`` or ``"cmn_hans"``.
        tag: language and script as BCP 47 has them, such as ``"de-1996"``.
        direction: ``"ltr"``, ``"rtl"`` or ``"ttb"``.
        name: in English.

    Book: data-udhr
    """

    code: str
    tag: str
    direction: str
    name: str


class _Declaration(HTMLParser):
    """The articles of one file: the text of each, a line for every paragraph, headings left out."""

    def __init__(self) -> None:
        super().__init__()
        self.root: dict[str, str] = {}
        self.title = ""
        self.articles: list[tuple[int, list[str]]] = []
        self.inside = ""  # the element whose text is wanted: title, p, or none

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "html":
            self.root = {name: value or "" for name, value in attrs}
        elif tag == "article":
            self.articles.append((int(dict(attrs)["data-number"] or 0), []))
        elif tag in ("title", "p"):
            self.inside = tag
            if tag == "p" and self.articles:
                self.articles[-1][1].append("")

    def handle_endtag(self, tag: str) -> None:
        if tag == self.inside:
            self.inside = ""

    def handle_data(self, data: str) -> None:
        if self.inside == "title":
            self.title += data
        elif self.inside == "p" and self.articles:
            self.articles[-1][1][-1] += data

    @property
    def whole(self) -> bool:
        return [number for number, _ in self.articles] == list(range(1, 31))


def udhr_articles(folder: str | Path, code: str) -> list[str]:
    """The 30 articles in one language, without their headings, a line for each paragraph.

    Args:
        folder: from ``fetch("udhr")``.
        code: a ``Language.code``.

    Raises:
        FileNotFoundError: the folder holds no such files.
        ValueError: there is no version of that code, or it is not split into 30 articles.

    Book: data-udhr
    """
    files = _udhr(folder)
    if code not in files:
        raise ValueError(f"code={code!r} is no version of the declaration; udhr_languages lists them.")
    read = _read_declaration(files[code])
    if not read.whole:
        raise ValueError(f"code={code!r} has {len(read.articles)} articles, expected 1 to 30 in order.")
    return ["\n".join(" ".join(line.split()) for line in lines) for _, lines in read.articles]


def udhr_languages(folder: str | Path) -> list[Language]:
    """The versions that come in exactly 30 articles, by code.

    Raises:
        FileNotFoundError: the folder holds no such files.

    Book: data-udhr
    """
    found = []
    for code, path in _udhr(folder).items():
        read = _read_declaration(path)
        if read.whole:
            found.append(Language(code, read.root["lang"], read.root["dir"], read.title.strip()))
    return found


def _udhr(folder: str | Path) -> dict[str, Path]:
    paths = sorted(Path(folder).glob("declaration/*.html"))
    if not paths:
        raise FileNotFoundError(
            f"folder={str(folder)!r} holds no declaration/*.html; expected what fetch('udhr') returns."
        )
    return {path.stem: path for path in paths}


def _read_declaration(path: Path) -> _Declaration:
    reader = _Declaration()
    reader.feed(path.read_text(encoding="utf-8"))
    reader.close()
    return reader


Phones = tuple[str, ...]


def cmudict_words(
    folder: str | Path, split: str | None = None, *, stress: bool = True
) -> dict[str, tuple[Phones, ...]]:
    """English words and how they sound: word → one pronunciation or more, the usual one first.

    Only plain words are kept, of the letters a to z. A word is in one split for ever: the first four bytes
    of its sha256, modulo 20, are 0 for "test", 1 for "valid", and 2 to 19 for "train".

    Args:
        folder: from ``fetch("cmudict")``.
        split: "train", "valid" or "test"; all of them where it is None.
        stress: keep the figure that each vowel carries: 1 for the main stress, 2 for a second, 0 for none.

    Raises:
        FileNotFoundError: the folder holds no dictionary.
        ValueError: ``split`` is another word.

    Book: data-cmudict
    """
    if split is not None and split not in _SPLITS:
        raise ValueError(f"split={split!r}, expected one of {', '.join(_SPLITS)}, or None.")
    path = Path(folder) / "cmudict.dict"
    if not path.is_file():
        raise FileNotFoundError(
            f"folder={str(folder)!r} holds no cmudict.dict; expected what fetch('cmudict') returns."
        )
    found: dict[str, list[Phones]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        entry = _ENTRY.fullmatch(line.strip())
        if entry is None or (split is not None and _part(entry["word"]) not in _SPLITS[split]):
            continue
        phones = entry["phones"] if stress else re.sub(r"\d", "", entry["phones"])
        said = found.setdefault(entry["word"], [])
        if (heard := tuple(phones.split())) not in said:  # some differ in stress alone
            said.append(heard)
    return {word: tuple(said) for word, said in found.items()}


def _part(word: str) -> int:
    return int.from_bytes(hashlib.sha256(word.encode()).digest()[:4], "big") % 20
