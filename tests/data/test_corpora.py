"""The readers of the declaration and of the dictionary, on the real files and on bad input."""

from __future__ import annotations

from pathlib import Path

import pytest

from textbook_code.data.corpora import cmudict_words, udhr_articles, udhr_languages
from textbook_code.data.sources import fetch


@pytest.fixture(scope="module")
def declarations() -> Path:
    return fetch("udhr")


@pytest.fixture(scope="module")
def dictionary() -> Path:
    return fetch("cmudict")


def test_articles_are_text_without_headings(declarations: Path) -> None:
    articles = udhr_articles(declarations, "eng")
    assert len(articles) == 30
    assert articles[0].startswith("All human beings are born free and equal in dignity and rights. They")
    assert "Article" not in articles[0] and "<" not in "".join(articles)
    assert articles[28].count("\n") == 2  # three numbered paragraphs
    assert udhr_articles(declarations, "fra")[2].startswith("Tout individu a droit à la vie")


def test_every_listed_language_has_thirty_articles_with_text(declarations: Path) -> None:
    languages = udhr_languages(declarations)
    assert len(languages) == 521
    by_code = {language.code: language for language in languages}
    assert by_code["eng"] == ("eng", "en", "ltr", "English")
    assert by_code["arb"].direction == "rtl" and by_code["deu_1996"].tag == "de-1996"
    assert "ojb" not in by_code  # 23 articles
    for language in languages:
        assert all(article.strip() for article in udhr_articles(declarations, language.code))


def test_bad_codes_and_folders_are_named(declarations: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"code='klingon' is no version"):
        udhr_articles(declarations, "klingon")
    with pytest.raises(ValueError, match=r"code='ojb' has 23 articles, expected 1 to 30"):
        udhr_articles(declarations, "ojb")
    for reader in (lambda: udhr_articles(tmp_path, "eng"), lambda: udhr_languages(tmp_path)):
        with pytest.raises(FileNotFoundError, match=r"holds no declaration/\*\.html"):
            reader()


def test_words_and_their_sounds(dictionary: Path) -> None:
    words = cmudict_words(dictionary)
    assert words["walk"] == (("W", "AO1", "K"), ("W", "AA1", "K"))
    assert words["aalto"] == (("AA1", "L", "T", "OW2"),)  # its comment is gone
    assert all(word.isascii() and word.isalpha() and word.islower() for word in words)
    assert not {"'em", "a.", "3d"} & words.keys()
    phones = {phone for said in words.values() for heard in said for phone in heard}
    assert len(phones) == 69 and all(phone.isalnum() for phone in phones)


def test_without_stress_alike_pronunciations_are_one(dictionary: Path) -> None:
    stressed, plain = cmudict_words(dictionary), cmudict_words(dictionary, stress=False)
    assert plain.keys() == stressed.keys()
    assert len({phone for said in plain.values() for heard in said for phone in heard}) == 39
    assert all(len(set(said)) == len(said) for said in plain.values())
    assert sum(map(len, plain.values())) < sum(map(len, stressed.values()))


def test_the_splits_are_fixed_and_share_no_word(dictionary: Path) -> None:
    parts = {split: cmudict_words(dictionary, split) for split in ("train", "valid", "test")}
    words = cmudict_words(dictionary)
    assert {split: len(part) for split, part in parts.items()} == {
        "train": 105567, "valid": 5886, "test": 6040,
    }  # fmt: skip
    assert sum(map(len, parts.values())) == len(words)
    assert parts["train"] | parts["valid"] | parts["test"] == words


def test_bad_splits_and_folders_are_named(dictionary: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"split='dev', expected one of train, valid, test, or None"):
        cmudict_words(dictionary, "dev")
    with pytest.raises(FileNotFoundError, match=r"holds no cmudict\.dict"):
        cmudict_words(tmp_path)
