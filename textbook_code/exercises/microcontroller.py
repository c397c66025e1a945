"""Exercises of the page on microcontrollers.

Book: microcontroller
"""

from collections.abc import Callable
from random import Random
from typing import Any

from textbook_code.compression.integer import multiply_by_quantized_multiplier
from textbook_code.deploy.planner import Buffer, lower_bound
from textbook_code.deploy.planner import plan as first_fit
from textbook_code.exercises.framework import Exercise
from textbook_code.exercises.judge import number_problem, slips_of

Life = tuple[int, int, int]  # size, first, last


def _check_count(answer: Callable[[int], Any]) -> str | None:
    for rows in (1, 2, 4, 8):
        expected = (2 * (3 + 3 * rows) + 5) / (8 * rows)
        got, what = answer(rows), f"{rows} rows"
        if problem := number_problem(got, expected, what):
            slips = {
                (2 * (3 + 3 * rows) + 5) / (4 * rows): "a dual product is two multiply-accumulates, not one",
                (2 * (3 + 2 * rows) + 5) / (8 * rows): "each row has a load besides its two dual products",
                (2 * (3 + 4 * rows) + 5) / (8 * rows): "one double load brings both pairs of a row",
                (3 + 3 * rows + 5) / (4 * rows): "a turn does two groups; its five are shared by both",
                2 * (3 + 3 * rows) + 5: "that is one turn; divide by its multiply-accumulates",
                2 * (3 + 3 * rows) / (8 * rows): "the loop's own five instructions are missing",
            }
            for wrong, said in slips.items():
                if number_problem(got, wrong, what) is None:
                    return f"{what}: {said}."
            return problem
    return None


def _once(x: int, multiplier: int, shift: int) -> int:
    return (x * multiplier + (1 << (30 - shift))) >> (31 - shift)


def _toward_zero(x: int, multiplier: int, shift: int) -> int:
    product = abs(x * multiplier) >> (31 - shift)
    return product if x * multiplier >= 0 else -product


def _check_rescale(answer: Callable[..., Any]) -> str | None:
    draw = Random(7)
    cases = [(draw.randint(-(2**20), 2**20), draw.randint(2**30, 2**31 - 1), -draw.randint(0, 12)) for _ in
             range(3000)]  # fmt: skip
    cases += [(x, 1 << 30, -draw.randint(1, 6)) for x in range(-200, 200)]  # a half at every step
    wrong, slips = 0, {"one rounding at the end": _once, "the remainder cut off": _toward_zero}
    agree = dict.fromkeys(slips, 0)
    first = ""
    for x, multiplier, shift in cases:
        expected = int(multiply_by_quantized_multiplier(x, multiplier, shift))
        got = answer(x, multiplier, shift)
        if isinstance(got, bool) or not isinstance(got, int):
            return f"expected an int, got {type(got).__name__}: floats have 53 bits, these products up to 62."
        wrong += got != expected
        if got != expected and not first:
            first = f"x = {x:,}, multiplier = {multiplier:,}, shift = {shift}: {got:,}, not {expected:,}"
        for said, function in slips.items():
            agree[said] += got == function(x, multiplier, shift)
    if not wrong:
        return None
    said = next((f" It behaves like {said}." for said, n in agree.items() if n == len(cases)), "")
    return f"{wrong} of {len(cases):,} results are wrong, the first at {first}.{said}"


def _byte(word: int, place: int) -> int:
    value = word >> 8 * place & 0xFF
    return value - 256 if value > 127 else value


def _half(word: int, place: int) -> int:
    value = word >> 16 * place & 0xFFFF
    return value - 65536 if value > 32767 else value


def _check_dual(answer: Callable[..., Any]) -> str | None:
    draw = Random(3)
    for turn in range(300):
        word = draw.getrandbits(32) if turn else 0x01FF_0203
        xs = [draw.randint(-255, 255) for _ in range(4)] if turn else [1, -2, 3, -4]
        pair = [(xs[i] & 0xFFFF) | (xs[i + 2] & 0xFFFF) << 16 for i in (0, 1)]
        start = draw.randint(-(2**20), 2**20)
        expected = start + sum(_byte(word, i) * x for i, x in enumerate(xs))
        got = answer(word, *pair, start)
        what = f"word 0x{word:08x}, pairs 0x{pair[0]:08x} and 0x{pair[1]:08x}"
        if problem := number_problem(got, expected, what, rel=0):
            unsigned = start + sum((word >> 8 * i & 0xFF) * x for i, x in enumerate(xs))
            halves = start + sum(_byte(word, i) * (x & 0xFFFF) for i, x in enumerate(xs))
            crossed = start + sum(_byte(word, j) * xs[i] for i, j in ((0, 0), (2, 1), (1, 2), (3, 3)))
            slips = {
                unsigned: "the bytes of the word are signed: 0xff is −1",
                halves: "the halves of a pair are signed: 0xffff is −1",
                crossed: "the first pair belongs to bytes 0 and 2, the second to bytes 1 and 3",
                expected - start: "the sum that is handed in is to be added to",
            }
            for wrong, said in slips.items():
                if wrong != expected and number_problem(got, wrong, what, rel=0) is None:
                    return f"{what}: {said}."
            return problem
    return None


def _lives(draw: Random, n: int) -> list[Life]:
    """No two of one size, so that there is one order from large to small."""
    lives = []
    for size in draw.sample(range(4, 260, 4), n):
        first = draw.randint(0, 12)
        lives.append((size, first, first + draw.randint(0, 5)))
    return lives


def _clashes(lives: list[Life], offsets: list[int]) -> set[tuple[int, int]]:
    found = set()
    for j, (size_j, first_j, last_j) in enumerate(lives):
        for i, (size_i, first_i, last_i) in enumerate(lives[:j]):
            together = first_i <= last_j and first_j <= last_i
            if together and offsets[i] < offsets[j] + size_j and offsets[j] < offsets[i] + size_i:
                found.add((i, j))
    return found


def _check_plan(answer: Callable[..., Any]) -> str | None:
    draw = Random(11)
    cases = [[(8, 0, 1), (4, 1, 2), (8, 2, 3)], [(16, 0, 0)], *(_lives(draw, 3 + i % 12) for i in range(60))]
    for lives in cases:
        got = answer(list(lives))
        what = f"{len(lives)} buffers"
        if not isinstance(got, list) or len(got) != len(lives):
            return f"{what}: expected a list of {len(lives)} offsets, got {type(got).__name__}."
        if any(isinstance(o, bool) or not isinstance(o, int) or o < 0 for o in got):
            return f"{what}: an offset is a whole number of bytes, from 0."
        if clash := sorted(_clashes(lives, got)):
            i, j = clash[0]
            where = f"{lives[i]} at {got[i]} and {lives[j]} at {got[j]}"
            return f"{what}: {where} share bytes, and a step needs both."
        size = max(o + life[0] for o, life in zip(got, lives, strict=True))
        buffers = [Buffer(i, *life) for i, life in enumerate(lives)]
        best = first_fit(buffers).size
        if size > best:
            bound = lower_bound(buffers)
            needs = f"first fit needs {best}, and {bound} must be"
            return f"{what}: nothing clashes, but the arena has {size} bytes; {needs}."
    return None


def _check_clashes(answer: Callable[..., Any]) -> str | None:
    draw = Random(5)
    cases: list[tuple[list[Life], list[int]]] = [
        ([(8, 0, 2), (8, 2, 4)], [0, 0]),
        ([(16, 0, 2), (4, 1, 3)], [0, 8]),
        ([(4, 0, 2), (16, 1, 3)], [8, 0]),
        ([(8, 0, 2), (8, 1, 3)], [0, 8]),
        ([(8, 0, 1), (8, 2, 3)], [0, 0]),
    ]
    for i in range(80):
        lives = _lives(draw, 2 + i % 7)
        cases.append((lives, [4 * draw.randint(0, 60) for _ in lives]))
    for lives, offsets in cases:
        got = answer(list(lives), list(offsets))
        try:
            pairs = {tuple(sorted(pair)) for pair in got}
        except TypeError:
            return f"expected a list of pairs of numbers, got {got!r}."
        expected = _clashes(lives, offsets)
        for extra in sorted(pairs - expected):
            return f"{lives} at {offsets}: {extra} is named, and those two do not clash."
        for i, j in sorted(expected - pairs):
            touching = lives[i][2] == lives[j][1] or lives[j][2] == lives[i][1]
            why = "the last step of one is the first of the other" if touching else "they share bytes"
            return f"{lives} at {offsets}: ({i}, {j}) is missed: {why}."
    return None


_COUNT = """
    def per_mac(rows):
        load, widen, loop = 1, 2, 5
        each_row = 1 + 2
        group = load + widen + rows * each_row
        return (2 * group + loop) / (8 * rows)
"""

_RESCALE = """
    def rescale(x, multiplier, shift):
        high = (x * multiplier + (1 << 30)) >> 31
        right = -shift
        rest = high & ((1 << right) - 1)
        half = ((1 << right) - 1) >> 1
        return (high >> right) + (rest > half + (high < 0))
"""

_DUAL = """
    def signed(value, bits):
        value &= (1 << bits) - 1
        return value - (1 << bits) if value >> (bits - 1) else value

    def dot4(word, first, second, total):
        even = signed(word, 8), signed(word >> 16, 8)
        odd = signed(word >> 8, 8), signed(word >> 24, 8)
        for pair, two in ((even, first), (odd, second)):
            total += pair[0] * signed(two, 16) + pair[1] * signed(two >> 16, 16)
        return total
"""

_PLAN = """
    def plan(buffers):
        offsets = [0] * len(buffers)
        placed = []
        for i in sorted(range(len(buffers)), key=lambda i: (-buffers[i][0], buffers[i][1], str(i))):
            size, first, last = buffers[i]
            meets = [j for j in placed if first <= buffers[j][2] and buffers[j][1] <= last]
            offset = 0
            for j in sorted(meets, key=lambda j: offsets[j]):
                if offset + size <= offsets[j]:
                    break
                offset = max(offset, offsets[j] + buffers[j][0])
            offsets[i] = offset
            placed.append(i)
        return offsets
"""

_CLASHES = """
    def clashes(buffers, offsets):
        found = []
        for i, (size_i, first_i, last_i) in enumerate(buffers):
            for j, (size_j, first_j, last_j) in enumerate(buffers[:i]):
                together = first_i <= last_j and first_j <= last_i
                shared = offsets[i] < offsets[j] + size_j and offsets[j] < offsets[i] + size_i
                if together and shared:
                    found.append((j, i))
        return found
"""


EXERCISES = (
    Exercise(
        name="microcontroller/count-loop",
        title="Count before you measure",
        stars=1,
        statement=r"""
            The innermost loop multiplies `rows` rows of 16-bit numbers with one row of bytes. Four columns
            take one load of weights, two instructions to widen them, and for each row a double load of two
            pairs and two dual products. A turn of the loop does two such groups and needs five instructions
            of its own. Write `per_mac(rows)`, the instructions for each multiply-accumulate. What does it
            tend to, and what keeps you from taking sixteen rows?
        """,
        answer="per_mac",
        starter="""
            def per_mac(rows):
                raise NotImplementedError
        """,
        solution=_COUNT,
        wrong=slips_of(
            _COUNT,
            ("(8 * rows)", "(4 * rows)"),
            ("1 + 2\n", "2\n"),
            ("1 + 2\n", "2 + 2\n"),
            (" + loop) / (8", ") / (8"),
            (" / (8 * rows)", ""),
            ("(2 * group + loop) / (8 * rows)", "(group + loop) / (4 * rows)"),
        ),
        check=_check_count,
        hint="Eight columns of each row: how many products of two bytes is that in a turn?",
    ),
    Exercise(
        name="microcontroller/rescale",
        title="Rounded twice",
        stars=2,
        statement=r"""
            Write {eq}`eq-mcu-high` and {eq}`eq-mcu-divide` with Python's integers, for a `shift` that is 0 or
            negative: first the product with `multiplier`, divided by $2^{31}$ and rounded to the nearest,
            ties up; then the division by $2^{-\mathrm{shift}}$, rounded to the nearest, ties away from zero.
        """,
        answer="rescale",
        starter="""
            def rescale(x, multiplier, shift):
                raise NotImplementedError
        """,
        solution=_RESCALE,
        wrong=(
            """
            def rescale(x, multiplier, shift):
                return (x * multiplier + (1 << (30 - shift))) >> (31 - shift)
            """,
            """
            def rescale(x, multiplier, shift):
                return round(x * multiplier / 2 ** (31 - shift))
            """,
            """
            def rescale(x, multiplier, shift):
                product = abs(x * multiplier) >> (31 - shift)
                return product if x >= 0 else -product
            """,
            *slips_of(_RESCALE, ("+ (high < 0)", ""), (" + (1 << 30)", "")),
        ),
        check=_check_rescale,
        hint="A right shift of a negative number rounds down. Which remainder is a tie, where does it go?",
    ),
    Exercise(
        name="microcontroller/dual",
        title="Two products in one word",
        stars=2,
        statement=r"""
            `word` holds four signed bytes $w_0 \dots w_3$, the first lowest. `first` and `second` are words
            of two signed 16-bit numbers, the first one in the lower half: $(x_0, x_2)$ and $(x_1, x_3)$.
            Write `dot4(word, first, second, total)`, which returns `total` $+ \sum_i w_i x_i$, as two
            `sxtb16` and two `smlad` would compute it.
        """,
        answer="dot4",
        starter="""
            def dot4(word, first, second, total):
                raise NotImplementedError
        """,
        solution=_DUAL,
        wrong=slips_of(
            _DUAL,
            ("signed(word, 8), signed(word >> 16, 8)", "word & 0xff, word >> 16 & 0xff"),
            ("signed(two, 16)", "(two & 0xffff)"),
            ("signed(word, 8), signed(word >> 16, 8)", "signed(word, 8), signed(word >> 8, 8)"),
            ("total += pair", "total = pair"),
        ),
        check=_check_dual,
        hint="A byte of 0xff and a half of 0xffff both stand for −1.",
    ),
    Exercise(
        name="microcontroller/clashes",
        title="Find the bugs",
        stars=2,
        statement=r"""
            This function is to name all pairs of buffers that a plan lets write over each other. A buffer is
            `(size, first, last)`, needed from step `first` to step `last`, both included; `offsets` says
            where each lies. It misses some. Mend it.
        """,
        answer="clashes",
        starter="""
            def clashes(buffers, offsets):
                found = []
                for i, (size_i, first_i, last_i) in enumerate(buffers):
                    for j, (size_j, first_j, last_j) in enumerate(buffers[:i]):
                        together = first_i < last_j and first_j < last_i
                        shared = offsets[i] <= offsets[j] < offsets[i] + size_i
                        if together and shared:
                            found.append((j, i))
                return found
        """,
        solution=_CLASHES,
        wrong=slips_of(
            _CLASHES,
            ("first_i <= last_j and first_j <= last_i", "first_i < last_j and first_j < last_i"),
            (
                "offsets[i] < offsets[j] + size_j and offsets[j] < offsets[i] + size_i",
                "offsets[i] <= offsets[j] < offsets[i] + size_i",
            ),
            ("offsets[i] < offsets[j] + size_j", "offsets[i] <= offsets[j] + size_j"),
            ("together and shared", "shared"),
        ),
        check=_check_clashes,
        hint="A step reads one buffer while it writes another. And of two intervals, which begins first?",
    ),
    Exercise(
        name="microcontroller/plan",
        title="Plan an arena",
        stars=3,
        statement=r"""
            Write the planner: `plan(buffers)` takes a list of `(size, first, last)` and returns the offset of
            each, in the same order. The largest buffer goes first, each into the lowest
            gap that holds it; buffers that no step needs together may share bytes.
        """,
        answer="plan",
        starter="""
            def plan(buffers):
                raise NotImplementedError
        """,
        solution=_PLAN,
        wrong=(
            """
            def plan(buffers):
                offsets, at = [], 0
                for size, first, last in buffers:
                    offsets.append(at)
                    at += size
                return offsets
            """,
            """
            def plan(buffers):
                return [0] * len(buffers)
            """,
            *slips_of(
                _PLAN,
                ("first <= buffers[j][2]", "first < buffers[j][2]"),
                ("offset = max(offset, offsets[j] + buffers[j][0])", "offset = offsets[j] + buffers[j][0]"),
                ("(-buffers[i][0], buffers[i][1], str(i))", "i"),
            ),
        ),
        check=_check_plan,
        hint="Only buffers that are placed already and live at the same time are in the way; walk upwards.",
    ),
)
