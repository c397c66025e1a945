"""Exercises of the page from pixels to a person.

Book: pixels-to-person
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from textbook_code.deploy.images import fit
from textbook_code.exercises.framework import Exercise
from textbook_code.exercises.judge import slips_of


def _rng() -> np.random.Generator:
    return np.random.default_rng(20)


def _whole(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


# ---------------------------------------------------------------- overlaps


def _overlaps(n: int, side: int) -> np.ndarray:
    i, k = np.arange(side)[:, None], np.arange(n)[None]
    return np.maximum(np.minimum(n * (i + 1), side * (k + 1)) - np.maximum(n * i, side * k), 0)


def _check_overlaps(answer: Callable[..., Any]) -> str | None:
    for n, side in ((64, 32), (48, 32), (5, 3), (3, 5), (32, 32), (1, 4), (45, 32)):
        got, want = np.asarray(answer(n, side)), _overlaps(n, side)
        what = f"{n} source pixels, {side} output pixels"
        if got.shape != want.shape:
            return f"{what}: expected the shape {want.shape}, got {got.shape}."
        if not np.issubdtype(got.dtype, np.integer):
            return f"{what}: expected integers, got {got.dtype}; nothing has to be divided here."
        if (got < 0).any():
            return f"{what}: an overlap is never negative."
        if (got.sum(1) != n).any():
            return f"{what}: the weights of output pixel {int((got.sum(1) != n).argmax())} do not sum to {n}."
        if not np.array_equal(got, want):
            row, column = np.argwhere(got != want)[0]
            return f"{what}: the overlap of output {row} with source {column} is not {got[row, column]}."
    return None


_OVERLAPS = """
    import numpy as np

    def overlaps(n, side):
        i = np.arange(side)[:, None]
        k = np.arange(n)[None]
        first = np.maximum(n * i, side * k)
        last = np.minimum(n * (i + 1), side * (k + 1))
        return np.maximum(last - first, 0)
"""

# ---------------------------------------------------------------- agreement


def _check_agreement(answer: Callable[..., Any]) -> str | None:
    rng = _rng()
    cases = [
        (np.array([100, -100, 3], np.int8), np.array([-100, 100, 3], np.int8), 0),
        (np.array([5, 6, 7], np.int8), np.array([6, 5, 7], np.int8), 5),
        (np.array([-9, -8], np.int8), np.array([-9, -10], np.int8), -9),
    ]
    for _ in range(5):
        a = rng.integers(-128, 128, 40).astype(np.int8)
        b = np.clip(a.astype(int) + rng.integers(-3, 4, 40), -128, 127).astype(np.int8)
        cases.append((a, b, int(rng.integers(-40, 40))))
    for a, b, zero in cases:
        got = answer(a.copy(), b.copy(), zero)
        if not isinstance(got, tuple | list) or len(got) != 3:
            return "expected three numbers: equal verdicts, equal bits, largest difference."
        if not all(_whole(value) for value in got):
            return f"expected three whole numbers, got {got!r}."
        wide = np.abs(a.astype(int) - b.astype(int))
        want = (int(((a > zero) == (b > zero)).sum()), int((wide == 0).sum()), int(wide.max()))
        for name, mine, right in zip(("equal verdicts", "equal bits", "largest difference"), got, want,
                                     strict=True):  # fmt: skip
            if mine != right:
                more = ""
                if name == "largest difference" and wide.max() > 127:
                    more = " Differences of bytes wrap around."
                if name == "equal verdicts" and mine == int(((a >= zero) == (b >= zero)).sum()):
                    more = " A logit at the zero point is no person."
                return f"{name}: {int(mine)} is not right for {a[:3]} … and {b[:3]} …, zero {zero}.{more}"
    return None


_AGREEMENT = """
    import numpy as np

    def agreement(a, b, zero):
        verdicts = (a > zero) == (b > zero)
        apart = np.abs(a.astype(np.int32) - b.astype(np.int32))
        return int(verdicts.sum()), int((apart == 0).sum()), int(apart.max())
"""

# ---------------------------------------------------------------- threshold


def _threshold(q: np.ndarray, labels: np.ndarray, most: int) -> int:
    others = np.sort(q[~labels].astype(int))[::-1]
    return -128 if len(others) <= most else int(others[most])


def _check_threshold(answer: Callable[..., Any]) -> str | None:
    rng = _rng()
    cases = [
        (np.array([10, 20, 30, 40], np.int8), np.array([0, 1, 0, 1], bool), 0),
        (np.array([10, 20, 30, 40], np.int8), np.array([0, 1, 0, 1], bool), 1),
        (np.array([10, 20, 30, 40], np.int8), np.array([0, 1, 0, 1], bool), 2),
        (np.array([7, 7, 7, 7, 9], np.int8), np.array([0, 0, 0, 0, 1], bool), 2),
    ]
    for most in (0, 3, 11):
        labels = rng.random(60) < 0.5
        q = np.clip(rng.normal(np.where(labels, 20, -20), 25), -128, 127).astype(np.int8)
        cases.append((q, labels, most))
    for q, labels, most in cases:
        got, want = answer(q.copy(), labels.copy(), most), _threshold(q, labels, most)
        if not _whole(got):
            return f"expected a whole number, got {got!r}: the comparison is one of bytes."
        alarms, best = int((q[~labels] > got).sum()), int((q[~labels] > want).sum())
        what = f"logits {q[:5].tolist()}{' …' if len(q) > 5 else ''}, at most {most} false alarms"
        if alarms > most:
            return f"{what}: q > {got} gives {alarms} false alarms."
        if got < -128:
            return f"{what}: {got} is no int8."
        if got > want:
            found, all_ = int((q[labels] > got).sum()), int((q[labels] > want).sum())
            more = f", where q > {want} finds {all_} people instead of {found}" if all_ > found else ""
            return f"{what}: q > {got} is stricter than it need be ({best} would be allowed{more})."
        if got < want:
            return f"{what}: {got} is not the lowest threshold that is an int8 with so few alarms."
    return None


_THRESHOLD = """
    import numpy as np

    def threshold(q, labels, most):
        others = np.sort(q[~labels].astype(int))[::-1]  # the loudest first
        if len(others) <= most:
            return -128
        return int(others[most])
"""

# ---------------------------------------------------------------- find the bug


def _prepared(frame: np.ndarray) -> np.ndarray:
    return (fit(np.ascontiguousarray(frame[..., ::-1])) ^ np.uint8(0x80)).view(np.int8)


def _check_prepare(answer: Callable[..., Any]) -> str | None:
    rng = _rng()
    for h, w in ((64, 96), (128, 64), (64, 64), (96, 160)):
        frame = rng.integers(0, 256, (h, w, 3), np.uint8)
        got, want = np.asarray(answer(frame.copy())), _prepared(frame)
        what = f"a frame of {h} × {w}"
        if got.shape != want.shape:
            return f"{what}: expected the shape {want.shape}, got {got.shape}."
        if got.dtype != np.int8:
            return f"{what}: expected int8, got {got.dtype}."
        if np.array_equal(got, want):
            continue
        apart = np.abs(got.astype(int) - want.astype(int))
        if np.array_equal(got, want[..., ::-1]):
            return f"{what}: blue stands where red should be."
        if h != w and _is_of_another_square(frame, got):
            return f"{what}: the square is not the middle one."
        if apart.max() == 1:
            return f"{what}: {int((apart > 0).sum())} bytes are one off: the mean is not rounded half up."
        if apart.max() > 200:
            return f"{what}: some bytes are {int(apart.max())} apart: is 128 taken away, or cast away?"
        return f"{what}: {int((apart > 0).sum())} of 3,072 bytes differ."
    return None


def _is_of_another_square(frame: np.ndarray, got: np.ndarray) -> bool:
    n = min(frame.shape[:2])
    corner = frame[:n, :n]
    return bool(np.abs(got.astype(int) - _prepared(corner).astype(int)).max() <= 1)


_BUGGY_PREPARE = """
    import numpy as np

    def prepare(frame):
        n = min(frame.shape[:2])  # a multiple of 32
        square = frame[:n, :n, ::-1]
        k = n // 32
        blocks = square.reshape(32, k, 32, k, 3)
        mean = blocks.mean((1, 3)).astype(np.uint8)
        return mean.astype(np.int8)
"""

_PREPARE = """
    import numpy as np

    def prepare(frame):
        h, w = frame.shape[:2]
        n = min(h, w)  # a multiple of 32
        top, left = (h - n) // 2, (w - n) // 2
        square = frame[top : top + n, left : left + n, ::-1].astype(int)
        k = n // 32
        total = square.reshape(32, k, 32, k, 3).sum((1, 3))
        mean = (2 * total + k * k) // (2 * k * k)  # half up
        return (mean - 128).astype(np.int8)
"""

# ---------------------------------------------------------------- steady


def _steady(steps: Sequence[int], on: int, off: int, hold: int) -> list[bool]:
    state, run, out = False, 0, []
    for step in steps:
        against = step < -off if state else step > on
        run = run + 1 if against else 0
        if run == hold:
            state, run = not state, 0
        out.append(state)
    return out


def _check_steady(answer: Callable[..., Any]) -> str | None:
    rng = _rng()
    cases: list[tuple[list[int], int, int, int]] = [
        ([5, 5, 5, 0, -5, -5, 5, -5, -5, -5], 3, 3, 1),
        ([5, 5, -1, 5, 5, 5, 5], 3, 3, 3),
        ([9, 9, 1, -1, 2, -2, -9, 9, -9, -9], 4, 4, 2),
        ([3, 3, 4, 4, -3, -3, -4, -4], 3, 3, 2),
    ]
    for _ in range(6):
        walk = np.cumsum(rng.integers(-6, 7, 60)).tolist()
        cases.append((walk, int(rng.integers(0, 8)), int(rng.integers(0, 8)), int(rng.integers(1, 4))))
    for steps, on, off, hold in cases:
        got, want = list(answer(list(steps), on, off, hold)), _steady(steps, on, off, hold)
        what = f"steps {steps[:10]}, on {on}, off {off}, hold {hold}"
        if len(got) != len(want):
            return f"{what}: expected {len(want)} verdicts, got {len(got)}."
        for t, (mine, right) in enumerate(zip(got, want, strict=True)):
            if bool(mine) != right:
                return f"{what}: at frame {t} the verdict is {right}, not {bool(mine)}."
    return None


_STEADY = """
    def steady(steps, on, off, hold):
        state, run, verdicts = False, 0, []
        for step in steps:
            against = step < -off if state else step > on
            run = run + 1 if against else 0
            if run == hold:
                state, run = not state, 0
            verdicts.append(state)
        return verdicts
"""


EXERCISES = (
    Exercise(
        name="pixels-to-person/overlaps",
        title="How much of a pixel covers a pixel",
        stars=1,
        statement=r"""
            Write the weights $w_{ik}$ of the box filter: an edge of $n$ source pixels becomes one of `side`
            output pixels. Measured in units of which a source pixel has `side` and an output pixel $n$,
            $w_{ik}$ is the overlap of output pixel $i$ with source pixel $k$. Return them as an integer
            array of shape `(side, n)`.
        """,
        answer="overlaps",
        starter="""
            import numpy as np

            def overlaps(n, side):
                raise NotImplementedError
        """,
        solution=_OVERLAPS,
        wrong=(
            *slips_of(
                _OVERLAPS,
                ("np.maximum(last - first, 0)", "last - first"),
                ("n * (i + 1), side * (k + 1)", "side * (i + 1), n * (k + 1)"),
                ("np.maximum(last - first, 0)", "np.maximum(last - first, 0) / n"),
            ),
            """
            import numpy as np

            def overlaps(n, side):  # the nearest pixel
                weights = np.zeros((side, n), int)
                weights[np.arange(side), np.arange(side) * n // side] = n
                return weights
            """,
        ),
        check=_check_overlaps,
        hint="Two intervals overlap from the later beginning to the earlier end, if that is later.",
    ),
    Exercise(
        name="pixels-to-person/agreement",
        title="How far two runtimes agree",
        stars=1,
        statement=r"""
            Two runtimes gave int8 logits `a` and `b`, `(n,)`, for the same pictures; `zero` is the zero
            point of the output. Return three whole numbers: how many verdicts are equal, how many logits
            are equal, and the largest difference in steps.
        """,
        answer="agreement",
        starter="""
            import numpy as np

            def agreement(a, b, zero):
                raise NotImplementedError
        """,
        solution=_AGREEMENT,
        wrong=slips_of(
            _AGREEMENT,
            ("a.astype(np.int32) - b.astype(np.int32)", "a - b"),
            ("(a > zero) == (b > zero)", "(a >= zero) == (b >= zero)"),
            ("(a > zero) == (b > zero)", "(a > 0) == (b > 0)"),
            ("apart.max()", "apart.mean()"),
        ),
        check=_check_agreement,
        hint="What is the int8 difference of 100 and −100?",
    ),
    Exercise(
        name="pixels-to-person/threshold",
        title="Where a device says yes",
        stars=2,
        statement=r"""
            The verdict $q > q_0$ treats both errors alike. A doorbell may ring for nobody only so often.
            Given int8 logits `q`, `(n,)`, of a validation set and bool `labels`, True for a person, return
            the lowest whole number $t$ from $-128$ up such that $q > t$ rings for at most `most` pictures
            without a person.
        """,
        answer="threshold",
        starter="""
            import numpy as np

            def threshold(q, labels, most):
                raise NotImplementedError
        """,
        solution=_THRESHOLD,
        wrong=(
            *slips_of(
                _THRESHOLD,
                ("others[most]", "others[most - 1]"),
                ("others[most]", "others[most] + 1"),
                ("return -128", "return 127"),
                ("q[~labels]", "q"),
                (".astype(int))[::-1]", ".astype(int))"),
            ),
            """
            def threshold(q, labels, most):
                return 0
            """,
        ),
        check=_check_threshold,
        hint="Sort the logits of the pictures without a person. Which of them may still ring, and which not?",
    ),
    Exercise(
        name="pixels-to-person/find-the-bug",
        title="Find the bugs in front of the model",
        stars=2,
        statement=r"""
            A port prepares a frame of a camera, `(h, w, 3)` uint8 with **blue first**, whose shorter side
            is a multiple of 32, for the integer model: the middle square, the mean of each block rounded
            half up, red first, less 128, `(32, 32, 3)` int8. It runs, and the model's verdicts are poor.
            Mend it; there are three mistakes.
        """,
        answer="prepare",
        starter=_BUGGY_PREPARE,
        solution=_PREPARE,
        wrong=slips_of(
            _PREPARE,
            (", ::-1]", "]"),
            ("(mean - 128).astype(np.int8)", "mean.astype(np.uint8).astype(np.int8)"),
            ("(2 * total + k * k) // (2 * k * k)", "total // (k * k)"),
            ("(h - n) // 2, (w - n) // 2", "0, 0"),
        ),
        check=_check_prepare,
        hint="Take a frame of one colour, then one with a single bright corner, and follow the bytes.",
    ),
    Exercise(
        name="pixels-to-person/steady",
        title="A verdict that does not flicker",
        stars=3,
        statement=r"""
            A camera gives a logit a frame, in `steps` above (positive) or below (negative) the zero point.
            Near zero the verdict would flicker. Write the usual remedy, in integers: begin with *no
            person*; change to *person* when `hold` frames in a row were above `on`, and back when `hold`
            frames in a row were below `-off`; any other frame begins the count anew. Return the verdict of
            each frame, the changing frame already with the new one.
        """,
        answer="steady",
        starter="""
            def steady(steps, on, off, hold):
                raise NotImplementedError
        """,
        solution=_STEADY,
        wrong=slips_of(
            _STEADY,
            ("run + 1 if against else 0", "run + 1 if against else run"),
            ("step > on", "step >= on"),
            ("step < -off", "step < on"),
            ("run == hold", "run > hold"),
            ("state, run = not state, 0", "state = not state"),
            ("state, run, verdicts = False, 0, []", "state, run, verdicts = True, 0, []"),
        ),
        check=_check_steady,
        hint="Two variables are enough: the verdict, and how many frames in a row have spoken against it.",
    ),
)
