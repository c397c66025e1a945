"""Numbers below a thousand, written out in eight languages: a small parallel corpus that is made, not read.

Book: mt5-numbers
"""

from collections.abc import Callable

LANGUAGES: dict[str, str] = {
    "en": "English",
    "de": "German",
    "nl": "Dutch",
    "fr": "French",
    "es": "Spanish",
    "it": "Italian",
    "pt": "Portuguese",
    "fi": "Finnish",
}
"""Code and name of each language."""


def _table(words: str) -> list[str]:
    return words.split()


_EN = _table(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
    "seventeen eighteen nineteen"
)
_EN_TENS = _table("- - twenty thirty forty fifty sixty seventy eighty ninety")
_DE = _table(
    "null eins zwei drei vier fünf sechs sieben acht neun zehn elf zwölf dreizehn vierzehn fünfzehn sechzehn "
    "siebzehn achtzehn neunzehn"
)
_DE_TENS = _table("- - zwanzig dreißig vierzig fünfzig sechzig siebzig achtzig neunzig")
_NL = _table(
    "nul één twee drie vier vijf zes zeven acht negen tien elf twaalf dertien veertien vijftien zestien "
    "zeventien achttien negentien"
)
_NL_TENS = _table("- - twintig dertig veertig vijftig zestig zeventig tachtig negentig")
_FR = _table(
    "zéro un deux trois quatre cinq six sept huit neuf dix onze douze treize quatorze quinze seize dix-sept "
    "dix-huit dix-neuf"
)
_FR_TENS = _table("- - vingt trente quarante cinquante soixante soixante quatre-vingt quatre-vingt")
_ES = _table(
    "cero uno dos tres cuatro cinco seis siete ocho nueve diez once doce trece catorce quince dieciséis "
    "diecisiete dieciocho diecinueve veinte veintiuno veintidós veintitrés veinticuatro veinticinco "
    "veintiséis veintisiete veintiocho veintinueve"
)
_ES_TENS = _table("- - - treinta cuarenta cincuenta sesenta setenta ochenta noventa")
_ES_HUNDREDS = _table(
    "- ciento doscientos trescientos cuatrocientos quinientos seiscientos setecientos ochocientos novecientos"
)
_IT = _table(
    "zero uno due tre quattro cinque sei sette otto nove dieci undici dodici tredici quattordici quindici "
    "sedici diciassette diciotto diciannove"
)
_IT_TENS = _table("- - venti trenta quaranta cinquanta sessanta settanta ottanta novanta")
_PT = _table(
    "zero um dois três quatro cinco seis sete oito nove dez onze doze treze catorze quinze dezasseis "
    "dezassete dezoito dezanove"
)
_PT_TENS = _table("- - vinte trinta quarenta cinquenta sessenta setenta oitenta noventa")
_PT_HUNDREDS = _table(
    "- cento duzentos trezentos quatrocentos quinhentos seiscentos setecentos oitocentos novecentos"
)
_FI = _table("nolla yksi kaksi kolme neljä viisi kuusi seitsemän kahdeksan yhdeksän kymmenen")


def _english(n: int) -> str:
    if n < 20:
        return _EN[n]
    if n < 100:
        return _EN_TENS[n // 10] + (f"-{_EN[n % 10]}" if n % 10 else "")
    return f"{_EN[n // 100]} hundred" + (f" and {_english(n % 100)}" if n % 100 else "")


def _german(n: int) -> str:
    def before(digit: int) -> str:  # `ein` loses its s in front of another word
        return "ein" if digit == 1 else _DE[digit]

    if n < 20:
        return _DE[n]
    if n < 100:
        return (f"{before(n % 10)}und" if n % 10 else "") + _DE_TENS[n // 10]
    return f"{before(n // 100)}hundert" + (_german(n % 100) if n % 100 else "")


def _dutch(n: int) -> str:
    if n < 20:
        return _NL[n]
    if n < 100:
        one = "een" if n % 10 == 1 else _NL[n % 10]
        joint = "ën" if one.endswith("e") else "en"  # a trema parts two e's
        return (one + joint if n % 10 else "") + _NL_TENS[n // 10]
    hundreds = "honderd" if n < 200 else f"{_NL[n // 100]}honderd"
    return hundreds + (_dutch(n % 100) if n % 100 else "")


def _french(n: int) -> str:
    if n < 20:
        return _FR[n]
    if n < 100:
        tens = n // 10
        rest = n - 10 * tens if tens not in (7, 9) else n - 10 * (tens - 1)  # soixante-dix, quatre-vingt-dix
        if tens == 8 and rest == 0:
            return "quatre-vingts"
        if rest in (1, 11) and tens < 8:
            return f"{_FR_TENS[tens]} et {_FR[rest]}"
        return _FR_TENS[tens] + (f"-{_FR[rest]}" if rest else "")
    hundreds, rest = divmod(n, 100)
    cent = "cent" if hundreds == 1 else f"{_FR[hundreds]} cent"
    return f"{cent} {_french(rest)}" if rest else cent + ("s" if hundreds > 1 else "")


def _spanish(n: int) -> str:
    if n < 30:
        return _ES[n]
    if n < 100:
        return _ES_TENS[n // 10] + (f" y {_ES[n % 10]}" if n % 10 else "")
    if n == 100:
        return "cien"
    return _ES_HUNDREDS[n // 100] + (f" {_spanish(n % 100)}" if n % 100 else "")


def _italian(n: int) -> str:
    if n < 20:
        return _IT[n]
    if n < 100:
        tens, one = _IT_TENS[n // 10], n % 10
        if one in (1, 8):
            tens = tens[:-1]  # its last vowel gives way: ventuno, ventotto
        return tens + ("" if one == 0 else "tré" if one == 3 else _IT[one])
    hundreds, rest = "cento" if n < 200 else f"{_IT[n // 100]}cento", n % 100
    if rest == 8 or rest // 10 == 8:
        hundreds = hundreds[:-1]  # centotto, centottanta
    return hundreds + ("" if rest == 0 else "tré" if rest == 3 else _italian(rest))


def _portuguese(n: int) -> str:
    if n < 20:
        return _PT[n]
    if n < 100:
        return _PT_TENS[n // 10] + (f" e {_PT[n % 10]}" if n % 10 else "")
    if n == 100:
        return "cem"
    return _PT_HUNDREDS[n // 100] + (f" e {_portuguese(n % 100)}" if n % 100 else "")


def _finnish(n: int) -> str:
    if n <= 10:
        return _FI[n]
    if n < 20:
        return f"{_FI[n - 10]}toista"
    if n < 100:
        return f"{_FI[n // 10]}kymmentä" + (_FI[n % 10] if n % 10 else "")
    hundreds = "sata" if n < 200 else f"{_FI[n // 100]}sataa"
    return hundreds + (_finnish(n % 100) if n % 100 else "")


_WORDS: dict[str, Callable[[int], str]] = {
    "en": _english,
    "de": _german,
    "nl": _dutch,
    "fr": _french,
    "es": _spanish,
    "it": _italian,
    "pt": _portuguese,
    "fi": _finnish,
}


def in_words(n: int, language: str) -> str:
    """The number n in words, in small letters.

    English has the *and* of Britain; Portuguese is that of Portugal, and French that of France.

    Args:
        n: 0 to 999.
        language: a key of `LANGUAGES`.

    Raises:
        TypeError: n is not an integer.
        ValueError: n is outside the range, or the language is unknown.

    Book: mt5-numbers
    """
    if type(n) is not int:
        raise TypeError(f"n: expected an int, got {type(n).__name__}")
    if not 0 <= n <= 999:
        raise ValueError(f"n: expected 0 to 999, got {n}")
    if language not in _WORDS:
        raise ValueError(f"language: expected one of {', '.join(_WORDS)}, got {language!r}")
    return _WORDS[language](n)
