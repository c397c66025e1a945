"""Exercises of the page on tokenization.

Book: tokenization
"""

import math
import random
from collections.abc import Callable, Iterable
from itertools import pairwise
from typing import Any

from textbook_code.data.bpe import BYTES, merge, train
from textbook_code.exercises.framework import Exercise

_VERSE = (
    "the rose that all are praising is not the rose for me; too many eyes are gazing upon the costly tree, "
    "but there is a rose in yonder glen that shuns the gaze of other men, for me its blossom raising"
)


def _difference(got: Any, expected: Iterable[Any], case: str) -> str | None:
    """One sentence about the first place where a list is not as expected."""
    wanted = list(expected)
    if not isinstance(got, list | tuple):
        return f"{case}: expected a list, got {type(got).__name__}."
    if list(got) == wanted:
        return None
    for place, (mine, right) in enumerate(zip(got, wanted, strict=False)):
        if mine != right:
            return f"{case}: entry {place} is {mine!r}, not {right!r}."
    return f"{case}: {len(got)} entries, expected {len(wanted)}."


def _check_bytes(answer: Callable[..., Any]) -> str | None:
    for text in ("a b", "Zoë", "½ €", "今日\n", "".join(map(chr, range(256)))):
        expected = "".join(BYTES[byte] for byte in text.encode())
        got = answer(text)
        if not isinstance(got, str):
            return f"for {text[:9]!r}: expected a str, got {type(got).__name__}."
        if len(got) != len(expected):
            return f"for {text[:9]!r}: {len(got)} symbols, expected {len(expected)}, one for each byte."
        for byte, mine, right in zip(text.encode(), got, expected, strict=True):
            if mine != right:
                return f"byte {byte} became {mine!r}, not {right!r}."
    return None


def _check_merge_order(answer: Callable[..., Any]) -> str | None:
    learned = train(_VERSE, 60)
    cases = [
        ("hugs", [("u", "g"), ("h", "ug")]),
        ("unhug", [("u", "n"), ("h", "u"), ("u", "g"), ("hu", "g"), ("un", "hug")]),
        ("aaaa", [("a", "a"), ("aa", "aa")]),
        ("banana", [("a", "n"), ("an", "an"), ("b", "anan"), ("an", "a")]),
        ("abc", [("b", "c"), ("a", "b"), ("ab", "c")]),
        *((word, learned) for word in ("there", "gazing", "rosemary", "another", "x")),
    ]
    for word, merges in cases:
        symbols = list(word)
        rank = {pair: place for place, pair in enumerate(merges)}
        while pairs := set(pairwise(symbols)) & rank.keys():
            symbols = merge(symbols, min(pairs, key=rank.__getitem__))
        got = answer(word, list(merges))
        if problem := _difference(got, symbols, f"for {word!r} with {len(merges)} merges"):
            return problem
    return None


def _wordpiece(word: str, vocabulary: set[str]) -> list[str]:
    pieces, start = [], 0
    while start < len(word):
        for end in range(len(word), start, -1):
            piece = ("##" if start else "") + word[start:end]
            if piece in vocabulary:
                break
        else:
            return ["[UNK]"]
        pieces.append(piece)
        start = end
    return pieces


def _check_wordpiece(answer: Callable[..., Any]) -> str | None:
    small = {"un", "unable", "##able", "##aff", "##a", "##b", "##le", "a", "##ffable", "able", "##s"}
    letters = {"##" + c for c in "abcde"} | set("abcde") | {"ab", "abc", "##cd", "##cde", "##dea", "##ea"}
    words = ["unaffable", "unable", "able", "ables", "una", "unx", "x", "unaxle", "a", "ab"]
    cases = [(word, small) for word in words]
    draw = random.Random(0)
    cases += [("".join(draw.choices("abcde", k=draw.randint(1, 9))), letters) for _ in range(60)]
    for word, vocabulary in cases:
        got = answer(word, set(vocabulary))
        if problem := _difference(got, _wordpiece(word, vocabulary), f"for {word!r}"):
            return problem
    return None


def _best(word: str, scores: dict[str, float]) -> float:
    best = [0.0] + [-math.inf] * len(word)
    for end in range(1, len(word) + 1):
        best[end] = max(best[start] + scores.get(word[start:end], -math.inf) for start in range(end))
    return best[-1]


def _check_unigram(answer: Callable[..., Any]) -> str | None:
    cases: list[tuple[str, dict[str, float]]] = [
        ("ab", {"a": -1.0, "b": -1.0, "ab": -3.0}),
        ("ab", {"a": -1.0, "b": -1.0, "ab": -1.5}),
        ("abcd", {"abc": -2.0, "d": -9.0, "ab": -2.5, "cd": -2.5, "a": -4.0, "b": -4.0, "c": -4.0}),
    ]
    draw = random.Random(1)
    letters = {letter: -6 - draw.random() for letter in "abc"}
    longer = {"".join(draw.choices("abc", k=draw.randint(2, 4))): -5 - 6 * draw.random() for _ in range(25)}
    for length in (*range(1, 9), 12, 16, 60):
        cases.append(("".join(draw.choices("abc", k=length)), letters | longer))
    for word, scores in cases:
        got = answer(word, dict(scores))
        case = f"for {word[:16]!r}"
        if not isinstance(got, list | tuple) or "".join(got) != word:
            return f"{case}: {got!r} does not join to the word."
        if strange := [piece for piece in got if piece not in scores]:
            return f"{case}: {strange[0]!r} is not in the vocabulary."
        total, best = sum(scores[piece] for piece in got), _best(word, scores)
        if total < best - 1e-9:
            return f"{case}: your pieces score {total:.2f}, and the best split scores {best:.2f}."
    return None


def _check_stream(answer: Callable[..., Any]) -> str | None:
    text = "Zoë sagt: 今日は 🙂🙂 — ok"
    data = text.encode()
    draw = random.Random(2)
    cuts = [[data], [data[i : i + 1] for i in range(len(data))]]
    for _ in range(20):
        places = sorted(draw.sample(range(1, len(data)), 9))
        cuts.append([data[a:b] for a, b in zip([0, *places], [*places, len(data)], strict=True)])
    for chunks in cuts:
        shown, so_far = list(answer(iter(chunks))), b""
        if any(not isinstance(part, str) for part in shown):
            return "expected strings, one for each chunk that came in."
        if len(shown) != len(chunks):
            return f"{len(chunks)} chunks came in and {len(shown)} strings went out, expected one each."
        printed = ""
        for chunk, part in zip(chunks, shown, strict=True):
            so_far += chunk
            printed += part
            if "\ufffd" in part:
                return f"after {so_far[-4:]!r} the reader saw half a character, shown as \ufffd."
            whole = so_far.decode(errors="ignore")
            if printed != whole:
                return f"after {so_far[-4:]!r} the reader had seen {printed[-5:]!r}, expected {whole[-5:]!r}."
    return None


EXERCISES = (
    Exercise(
        name="tokenization/bytes",
        title="Any text in 256 symbols",
        stars=1,
        statement=r"""
            Write a text in GPT-2's symbols, one for each byte of its UTF-8: a byte from 33 to 126, 161 to
            172 or 174 to 255 stands for itself, as the character of that number; the other 68, from byte 0
            upwards, become the characters of the numbers 256, 257, and so on.
        """,
        answer="symbols",
        starter="""
            def symbols(text):
                raise NotImplementedError  # return a string, as long as text has bytes
        """,
        solution="""
            def symbols(text):
                own = {*range(33, 127), *range(161, 173), *range(174, 256)}
                others = [byte for byte in range(256) if byte not in own]
                table = {byte: chr(256 + place) for place, byte in enumerate(others)}
                return "".join(table.get(byte, chr(byte)) for byte in text.encode())
        """,
        wrong=(
            """
            def symbols(text):
                return "".join(chr(byte) if 32 < byte < 127 else chr(256 + byte) for byte in text.encode())
            """,
            """
            def symbols(text):
                own = {*range(33, 127), *range(161, 173), *range(174, 256)}
                others = [byte for byte in range(256) if byte not in own]
                table = {byte: chr(256 + place) for place, byte in enumerate(others)}
                return "".join(table.get(ord(char), char) for char in text)
            """,
        ),
        check=_check_bytes,
        hint="Count the bytes that have no character of their own, from 0 on; and encode before you look up.",
    ),
    Exercise(
        name="tokenization/merge-order",
        title="The oldest merge first",
        stars=2,
        statement=r"""
            Split a word into symbols with a list of merges, the first learned first: start from its
            characters; of all pairs of neighbours that are in the list, merge every occurrence of the
            *earliest* learned one, from left to right; repeat until no pair is in the list.
        """,
        answer="apply_merges",
        starter="""
            def apply_merges(word, merges):
                return list(word)
        """,
        solution="""
            def apply_merges(word, merges):
                symbols = list(word)
                rank = {pair: place for place, pair in enumerate(merges)}
                while True:
                    pairs = [pair for pair in zip(symbols, symbols[1:]) if pair in rank]
                    if not pairs:
                        return symbols
                    left, right = min(pairs, key=rank.get)
                    merged, place = [], 0
                    while place < len(symbols):
                        if symbols[place : place + 2] == [left, right]:
                            merged.append(left + right)
                            place += 2
                        else:
                            merged.append(symbols[place])
                            place += 1
                    symbols = merged
        """,
        wrong=(
            """
            def apply_merges(word, merges):
                known = {left + right for left, right in merges} | set(word)
                symbols, start = [], 0
                while start < len(word):
                    end = max(e for e in range(start + 1, len(word) + 1) if word[start:e] in known)
                    symbols.append(word[start:end])
                    start = end
                return symbols
            """,
            """
            def apply_merges(word, merges):
                symbols, place = list(word), 0
                while place + 1 < len(symbols):
                    if (symbols[place], symbols[place + 1]) in merges:
                        symbols[place : place + 2] = [symbols[place] + symbols[place + 1]]
                        place = 0
                    else:
                        place += 1
                return symbols
            """,
        ),
        check=_check_merge_order,
        hint="A merge that comes first in the word is not the one that was learned first.",
    ),
    Exercise(
        name="tokenization/wordpiece",
        title="The longest piece first",
        stars=2,
        statement=r"""
            Split a word as BERT does. From the left, take the longest piece that is in the vocabulary;
            every piece but the first is looked up, and written, with `##` before it. Where nothing fits,
            not even one character, the whole word becomes `["[UNK]"]`.
        """,
        answer="wordpiece",
        starter="""
            def wordpiece(word, vocabulary):
                raise NotImplementedError  # return a list of pieces
        """,
        solution="""
            def wordpiece(word, vocabulary):
                pieces, start = [], 0
                while start < len(word):
                    prefix = "##" if start else ""
                    ends = range(len(word), start, -1)
                    end = next((e for e in ends if prefix + word[start:e] in vocabulary), None)
                    if end is None:
                        return ["[UNK]"]
                    pieces.append(prefix + word[start:end])
                    start = end
                return pieces
        """,
        wrong=(
            """
            def wordpiece(word, vocabulary):
                pieces, start = [], 0
                while start < len(word):
                    ends = range(len(word), start, -1)
                    end = next((e for e in ends if word[start:e] in vocabulary), None)
                    if end is None:
                        return ["[UNK]"]
                    pieces.append(("##" if start else "") + word[start:end])
                    start = end
                return pieces
            """,
            """
            def wordpiece(word, vocabulary):
                pieces, start = [], 0
                while start < len(word):
                    prefix = "##" if start else ""
                    ends = range(len(word), start, -1)
                    end = next((e for e in ends if prefix + word[start:e] in vocabulary), None)
                    if end is None:
                        pieces.append("[UNK]")
                        start += 1
                        continue
                    pieces.append(prefix + word[start:end])
                    start = end
                return pieces
            """,
        ),
        check=_check_wordpiece,
        hint="The `##` belongs to the look-up too; and one character that does not fit spoils the word.",
    ),
    Exercise(
        name="tokenization/unigram",
        title="The likeliest split",
        stars=3,
        statement=r"""
            Split a word as a unigram tokenizer does: of all ways to cut it into pieces of `scores`, which
            maps a piece to the logarithm of its probability, return one whose sum is greatest. Words of 60
            letters have more cuts than you can try: go from left to right and keep, for each place, the
            best way to get there. Every single letter is a piece.
        """,
        answer="likeliest",
        starter="""
            def likeliest(word, scores):
                return list(word)
        """,
        solution="""
            def likeliest(word, scores):
                best = [(0.0, 0)]  # for each place: the greatest sum that leads there, and where from
                for end in range(1, len(word) + 1):
                    starts = [start for start in range(end) if word[start:end] in scores]
                    best.append(max((best[s][0] + scores[word[s:end]], s) for s in starts))
                pieces, end = [], len(word)
                while end:
                    start = best[end][1]
                    pieces.append(word[start:end])
                    end = start
                return pieces[::-1]
        """,
        wrong=(
            """
            def likeliest(word, scores):
                pieces, start = [], 0
                while start < len(word):
                    end = next(e for e in range(len(word), start, -1) if word[start:e] in scores)
                    pieces.append(word[start:end])
                    start = end
                return pieces
            """,
            """
            def likeliest(word, scores):
                pieces, start = [], 0
                while start < len(word):
                    ends = [e for e in range(start + 1, len(word) + 1) if word[start:e] in scores]
                    end = max(ends, key=lambda e: scores[word[start:e]])
                    pieces.append(word[start:end])
                    start = end
                return pieces
            """,
        ),
        check=_check_unigram,
        hint="The best way to a place ends in some piece; what is before that piece is a best way too.",
    ),
    Exercise(
        name="tokenization/stream",
        title="Never half a character",
        stars=2,
        statement=r"""
            A model writes tokens, and tokens are bytes: a character may end in the next one. Write a
            generator that takes chunks of bytes and gives, for each chunk, the text that can be shown now.
            Bytes of a character that is not complete wait for the next chunk; whatever is complete is shown
            at once. The bytes together are valid UTF-8.
        """,
        answer="show",
        starter="""
            def show(chunks):
                for chunk in chunks:
                    yield chunk.decode(errors="replace")
        """,
        solution="""
            def show(chunks):
                waiting = b""
                for chunk in chunks:
                    waiting += chunk
                    whole = waiting.decode(errors="ignore")  # what is cut off at the end is left out
                    waiting = waiting[len(whole.encode()) :]
                    yield whole
        """,
        wrong=(
            """
            def show(chunks):
                for chunk in chunks:
                    yield chunk.decode(errors="ignore")
            """,
            """
            def show(chunks):
                waiting = b""
                for chunk in chunks:
                    waiting += chunk
                    try:
                        yield waiting.decode()
                        waiting = b""
                    except UnicodeDecodeError:
                        yield ""
            """,
        ),
        check=_check_stream,
        hint="How many bytes at the end are not a character yet? Keep those and show the others.",
    ),
)
