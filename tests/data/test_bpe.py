"""The tokenizer written by hand against the library: every id on real text, every merge it learns."""

from __future__ import annotations

import json
import sys
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from textbook_code.data.bpe import BYTES, ByteBpe, merge, pieces, train
from textbook_code.data.corpora import udhr_articles, udhr_languages
from textbook_code.data.sources import fetch
from textbook_code.data.text import load_tokenizer, shakespeare_text

LIBRARY_WORDS = pre_tokenizers.ByteLevel(add_prefix_space=False)


def as_symbols(text: str) -> list[str]:
    return ["".join(BYTES[byte] for byte in word.encode()) for word in pieces(text)]


def library_words(text: str) -> list[str]:
    return [word for word, _ in LIBRARY_WORDS.pre_tokenize_str(text)]


@pytest.fixture(scope="module")
def gpt2() -> Path:
    return fetch("gpt2-bpe")


@pytest.fixture(scope="module")
def library(gpt2: Path) -> Tokenizer:
    return load_tokenizer(gpt2)


@pytest.fixture(scope="module")
def by_hand(gpt2: Path) -> ByteBpe:
    _, *lines = (gpt2 / "vocab.bpe").read_text(encoding="utf-8").strip().split("\n")
    merges = [(left, right) for left, right in (line.split(" ") for line in lines)]
    return ByteBpe(merges, json.loads((gpt2 / "encoder.json").read_text(encoding="utf-8")))


def test_the_byte_symbols_are_the_library_s_and_printable() -> None:
    assert sorted(BYTES) == list(range(256)) and len(set(BYTES.values())) == 256
    assert set(BYTES.values()) == set(pre_tokenizers.ByteLevel.alphabet())
    assert all(symbol.isprintable() and not symbol.isspace() for symbol in BYTES.values())
    assert BYTES[32] == "Ġ" and BYTES[10] == "Ċ" and BYTES[ord("a")] == "a"


def test_words_are_cut_as_the_library_cuts_them_whatever_the_character() -> None:
    """Every eleventh assigned character, as letter, number, mark or space, beside each of the others."""
    for code in range(0, sys.maxunicode + 1, 11):
        c = chr(code)
        if unicodedata.category(c) not in ("Cs", "Cn"):
            text = f"a{c}1{c} {c}{c}! {c}  {c}b"
            assert as_symbols(text) == library_words(text), hex(code)


@given(st.text(st.sampled_from("ab1 \n\t'sl,.é中½\u00a0\u2003\x1c"), max_size=30))
def test_words_are_cut_as_the_library_cuts_them_in_any_order(text: str) -> None:
    assert as_symbols(text) == library_words(text)
    assert "".join(pieces(text)) == text


def test_merging_goes_from_left_to_right_and_does_not_overlap() -> None:
    assert merge("aaa", ("a", "a")) == ["aa", "a"]
    assert merge("aaaa", ("a", "a")) == ["aa", "aa"]
    assert merge("abab", ("a", "b")) == ["ab", "ab"]
    assert merge("ba", ("a", "b")) == ["b", "a"]


def test_shakespeare_in_gpt2_s_vocabulary(by_hand: ByteBpe, library: Tokenizer) -> None:
    text = shakespeare_text(fetch("shakespeare"), "hamlet", "sonnets")
    ids = by_hand.encode(text)
    assert ids == library.encode(text).ids
    assert by_hand.decode(ids) == text


def test_the_declaration_in_gpt2_s_vocabulary(by_hand: ByteBpe, library: Tokenizer) -> None:
    """Every ninth version, which is 58 languages in a dozen scripts."""
    folder = fetch("udhr")
    scripts = set()
    for language in udhr_languages(folder)[::9]:
        text = "\n".join(udhr_articles(folder, language.code)[:6])
        ids = by_hand.encode(text)
        assert ids == library.encode(text).ids, language
        assert by_hand.decode(ids) == text
        scripts |= {unicodedata.name(char).split()[0] for char in text if char.isalpha()}
    assert len(scripts) >= 10


@pytest.mark.slow
def test_all_of_shakespeare_and_all_521_versions(by_hand: ByteBpe, library: Tokenizer) -> None:
    folder = fetch("udhr")
    texts = ["\n".join(udhr_articles(folder, language.code)) for language in udhr_languages(folder)]
    for text in [shakespeare_text(fetch("shakespeare")), *texts]:
        assert by_hand.encode(text) == library.encode(text).ids


@pytest.mark.parametrize("corpus", ["sonnets", "rus"])
def test_training_learns_the_library_s_merges(corpus: str) -> None:
    if corpus == "sonnets":
        text = shakespeare_text(fetch("shakespeare"), "sonnets")[:25_000]
    else:
        text = "\n".join(udhr_articles(fetch("udhr"), corpus))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = LIBRARY_WORDS
    trainer = trainers.BpeTrainer(
        vocab_size=256 + 200, initial_alphabet=LIBRARY_WORDS.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator([text], trainer)
    merges = train(text, 200)
    assert merges == [tuple(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]]
    ours = ByteBpe(merges)
    assert ours.id_of == tokenizer.get_vocab()
    other = "To be, or not to be: that is the question. Быть или не быть?"
    assert ours.encode(other) == tokenizer.encode(other).ids


def test_training_stops_where_nothing_is_left_to_merge() -> None:
    assert train("aa aa", 10) == [("a", "a"), ("Ġ", "aa")]
    assert train("", 10) == [] == train("abc", 0)


def test_two_merges_may_make_one_symbol() -> None:
    ours = ByteBpe([("a", "b"), ("b", "c"), ("ab", "c"), ("a", "bc")])
    assert len(ours.id_of) == 256 + 3  # abc once
    assert ours.decode(ours.encode("abc abc")) == "abc abc"


def test_half_a_character_decodes_to_a_mark(by_hand: ByteBpe) -> None:
    ids = by_hand.encode("🙂")
    assert len(ids) > 1 and by_hand.decode(ids) == "🙂"
    assert by_hand.decode(ids[:1]) == "\ufffd"


def test_special_tokens_are_text_by_hand(by_hand: ByteBpe, library: Tokenizer) -> None:
    assert library.encode("<|endoftext|>").ids == [50256]
    assert len(by_hand.encode("<|endoftext|>")) > 1
    assert by_hand.decode([50256]) == "<|endoftext|>"


def test_bad_input_is_named(by_hand: ByteBpe) -> None:
    with pytest.raises(TypeError, match="text is a bytes, expected a str"):
        by_hand.encode(b"abc")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="ids has 50257, which is not in the vocabulary of 50257"):
        by_hand.decode([50257])
    with pytest.raises(ValueError, match="num_merges=-1, expected 0 or more"):
        train("abc", -1)
    every = {symbol: i for i, symbol in enumerate(BYTES.values())}
    with pytest.raises(ValueError, match="vocabulary lacks 'ab'"):
        ByteBpe([("a", "b")], every)
    with pytest.raises(ValueError, match="gives one id to two symbols"):
        ByteBpe([("a", "b")], every | {"ab": 0})
    with pytest.raises(ValueError, match="vocabulary has '中', expected symbols made of the 256"):
        ByteBpe([], every | {"中": 256})
