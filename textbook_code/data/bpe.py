"""Byte-level byte-pair encoding by hand: GPT-2's tokenizer, without a library.

A text is cut into words (``pieces``), a word is written in 256 symbols, one for each value of a byte
(``BYTES``), and neighbouring symbols are merged, pair by pair, in the order in which ``train`` learned the
pairs. It is slow and short; the library ``tokenizers`` does the same, and the tests hold the two to it.

Book: tokenization
"""

from __future__ import annotations

import re
import sys
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from itertools import groupby, pairwise


def byte_symbols() -> dict[int, str]:
    """One printable character for each byte: its own where Latin-1 has one, else the next from 256 on.

    The space, byte 32, becomes ``Ġ``, and the newline, byte 10, ``Ċ``.

    Book: bpe-bytes
    """
    own = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in own]
    return {byte: chr(byte) for byte in own} | {byte: chr(256 + i) for i, byte in enumerate(others)}


BYTES = byte_symbols()
_BYTE_OF = {symbol: byte for byte, symbol in BYTES.items()}


_SPACE = r"\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"  # Unicode's White_Space


@cache
def _pattern() -> re.Pattern[str]:
    """GPT-2's pattern. Python's `re` knows no ``\\p{L}``, so the letters and the numbers are listed."""
    runs: dict[str, list[str]] = {"L": [], "N": []}
    kinds = groupby(range(sys.maxunicode + 1), lambda code: unicodedata.category(chr(code))[0])
    for kind, codes in kinds:
        first, *_, last = [*codes] * 2
        if kind in runs:
            runs[kind].append(f"\\U{first:08x}-\\U{last:08x}")
    letter, number, space = "".join(runs["L"]), "".join(runs["N"]), _SPACE
    return re.compile(
        rf"'(?:s|t|re|ve|m|ll|d)| ?[{letter}]+| ?[{number}]+| ?[^{space}{letter}{number}]+"
        rf"|[{space}]+(?![^{space}])|[{space}]+"
    )


def pieces(text: str) -> list[str]:
    """Cut a text into words, as GPT-2 does; joined again they are the text.

    An English ending (``'s``, ``'ll``, …), or letters, or numbers, or other marks, each of the last three
    with one space before it; or white space, of which the last is left to the word that follows.

    Raises:
        TypeError: ``text`` is not a str.

    Book: bpe-words
    """
    if not isinstance(text, str):
        raise TypeError(f"text is a {type(text).__name__}, expected a str.")
    return _pattern().findall(text)


def merge(symbols: Sequence[str], pair: tuple[str, str]) -> list[str]:
    """Put every occurrence of the pair together, from left to right.

    Book: bpe-train
    """
    merged: list[str] = []
    for symbol in symbols:
        if merged and (merged[-1], symbol) == pair:
            merged[-1] = "".join(pair)
        else:
            merged.append(symbol)
    return merged


def train(text: str, num_merges: int) -> list[tuple[str, str]]:
    """Learn merges: again and again, the most frequent pair of neighbours becomes one symbol.

    Of two pairs that are equally frequent, the one of the older symbols wins, as in the library.

    Args:
        text: what to learn from.
        num_merges: how many; fewer are returned where the words have nothing left to merge.

    Raises:
        ValueError: ``num_merges`` is negative.

    Book: bpe-train
    """
    if num_merges < 0:
        raise ValueError(f"num_merges={num_merges}, expected 0 or more.")
    counts = Counter(pieces(text))
    words = {word: [BYTES[byte] for byte in word.encode()] for word in counts}
    age = {symbol: i for i, symbol in enumerate(sorted(BYTES.values()))}
    merges: list[tuple[str, str]] = []
    while len(merges) < num_merges:
        found: Counter[tuple[str, str]] = Counter()
        for word, symbols in words.items():
            for pair in pairwise(symbols):
                found[pair] += counts[word]
        if not found:
            break
        best = max(found, key=lambda pair: (found[pair], -age[pair[0]], -age[pair[1]]))
        merges.append(best)
        age.setdefault("".join(best), len(age))
        words = {word: merge(symbols, best) for word, symbols in words.items()}
    return merges


class ByteBpe:
    """A byte-level BPE tokenizer: text to ids and back, losing nothing.

    Args:
        merges: pairs of symbols, the first learned first.
        vocabulary: symbol → id. Without it, the 256 bytes come first, sorted by their symbols, and then
            what the merges make, in their order.

    Raises:
        ValueError: the vocabulary lacks a byte or a merged symbol, has one that no bytes make, or gives an id
            twice.

    Book: bpe-encode
    """

    def __init__(
        self, merges: Iterable[tuple[str, str]], vocabulary: Mapping[str, int] | None = None
    ) -> None:
        self.rank = {pair: rank for rank, pair in enumerate(merges)}
        made = ["".join(pair) for pair in self.rank]
        if vocabulary is None:
            symbols = dict.fromkeys([*sorted(BYTES.values()), *made])  # two merges may make one symbol
            vocabulary = {symbol: index for index, symbol in enumerate(symbols)}
        if lacking := [symbol for symbol in [*BYTES.values(), *made] if symbol not in vocabulary]:
            raise ValueError(f"vocabulary lacks {lacking[0]!r}, expected every byte and every merged symbol.")
        if odd := [symbol for symbol in vocabulary if not set(symbol) <= _BYTE_OF.keys()]:
            raise ValueError(f"vocabulary has {odd[0]!r}, expected symbols made of the 256 of BYTES.")
        self.id_of = dict(vocabulary)
        self.symbol_of = {index: symbol for symbol, index in vocabulary.items()}
        if len(self.symbol_of) != len(self.id_of):
            raise ValueError("vocabulary gives one id to two symbols, expected each id once.")
        self._seen: dict[str, list[int]] = {}  # words come again and again

    def encode(self, text: str) -> list[int]:
        """The ids of a text. Special tokens are text like any other here.

        Book: bpe-encode
        """
        return [index for word in pieces(text) for index in self._encode_word(word)]

    def _encode_word(self, word: str) -> list[int]:
        if word not in self._seen:
            symbols = [BYTES[byte] for byte in word.encode()]
            while pairs := set(pairwise(symbols)) & self.rank.keys():
                symbols = merge(symbols, min(pairs, key=self.rank.__getitem__))
            self._seen[word] = [self.id_of[symbol] for symbol in symbols]
        return self._seen[word]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of the ids; bytes that are no whole character become ``\\ufffd``.

        Raises:
            ValueError: an id is not in the vocabulary.

        Book: bpe-encode
        """
        symbols = []
        for index in ids:
            if index not in self.symbol_of:
                raise ValueError(f"ids has {index}, which is not in the vocabulary of {len(self.id_of)}.")
            symbols.append(self.symbol_of[index])
        return bytes(_BYTE_OF[char] for char in "".join(symbols)).decode(errors="replace")
