"""The numbers in words are those of an independent library, all thousand in all eight languages.

The digests were taken from num2words 0.5.14, one number a line. In Italian it writes `centodicotto` for
`centodiciotto`, and leaves out the accent of a final `tré`; there the digest is that of its words after
these two corrections.
"""

from __future__ import annotations

import hashlib

import pytest

from textbook_code.data.numerals import LANGUAGES, in_words

DIGESTS = {
    "en": "44b8794eade041b524b24719f83ec2503eb59cc551963f7f17cc5b38e7d0ab61",
    "de": "c2e815a938d5c8e02e854e77b8a497323cb5b086db1dcc6a57d6b6de9593f36b",
    "nl": "99f610cba42cd028a0e8f474226063a552bfccb107cbab20e9f493aeb256caae",
    "fr": "622d432b1f9529279aa9f87d1ba23d0a66422c52fd5ed837484640851eaa77dc",
    "es": "c51e54f9a307443ff79927401d5e4e26119105cecf26b0ffd4d6e83081c37a8f",
    "it": "0b3ebcf53721f46ce1d1833212c7af164fc3a0af7658eea8b957423694c7cb2c",
    "pt": "891ad4e89a18c102ab189f798dc0e3b044cf77132f9dc1f9d114fc3c3d63ef3c",
    "fi": "3dcff7bdb7e9049882ac0244ba52fb7b07463c4851fc09ee862dae9f3ffe3e3a",
}


@pytest.mark.parametrize("language", LANGUAGES)
def test_all_thousand(language):
    words = [in_words(n, language) for n in range(1000)]
    assert len(set(words)) == 1000
    assert hashlib.sha256("\n".join(words).encode()).hexdigest() == DIGESTS[language]


@pytest.mark.parametrize(
    ("n", "language", "words"),
    [
        (21, "de", "einundzwanzig"),
        (971, "fr", "neuf cent soixante et onze"),
        (80, "fr", "quatre-vingts"),
        (122, "nl", "honderdtweeëntwintig"),
        (500, "es", "quinientos"),
        (123, "it", "centoventitré"),
        (108, "it", "centotto"),
        (345, "pt", "trezentos e quarenta e cinco"),
        (345, "fi", "kolmesataaneljäkymmentäviisi"),
    ],
)
def test_a_few_by_eye(n, language, words):
    assert in_words(n, language) == words


@pytest.mark.parametrize(
    ("n", "language", "error", "message"),
    [
        (1000, "en", ValueError, r"n: expected 0 to 999, got 1000"),
        (-1, "en", ValueError, r"n: expected 0 to 999, got -1"),
        (3.0, "en", TypeError, r"n: expected an int, got float"),
        (True, "en", TypeError, r"n: expected an int, got bool"),
        (3, "la", ValueError, r"language: expected one of en, de, .*, got 'la'"),
    ],
)
def test_bad_input(n, language, error, message):
    with pytest.raises(error, match=message):
        in_words(n, language)
