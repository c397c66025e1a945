"""The machinery behind the book's exercises: what one is, how an answer is judged, how one is found.

Every page of exercises is a module beside this one, named after its page (`encoder_only.py` holds
`encoder-only/…`) and giving a list `EXERCISES`. Pages are imported when first asked for, so that
`import textbook_code.exercises` costs nothing.

Book: exercises-how
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import pkgutil
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_SEED = 20_170_612
_NOT_PAGES = {"framework", "judge"}


@dataclass(frozen=True)
class Exercise:
    """One exercise: what is asked, where to start, how an answer is judged, and how it is solved.

    `starter`, `solution` and each of `wrong` are Python sources which define an object called `answer`
    (a value or a function); that object goes to `check`, which returns None when it is right and one
    sentence about what is wrong otherwise.

    Book: exercises-how
    """

    name: str
    title: str
    stars: int
    statement: str
    answer: str
    starter: str
    solution: str
    wrong: tuple[str, ...]
    check: Callable[[Any], str | None]
    hint: str

    def __post_init__(self) -> None:
        page, _, rest = self.name.partition("/")
        if not page or not rest:
            raise ValueError(f"name: got {self.name!r}, expected 'page/exercise'")
        if self.stars not in (1, 2, 3):
            raise ValueError(f"stars: got {self.stars!r}, expected 1, 2 or 3")
        for field in ("statement", "starter", "solution", "hint"):  # written indented, read flush left
            object.__setattr__(self, field, inspect.cleandoc(getattr(self, field)))
        object.__setattr__(self, "wrong", tuple(inspect.cleandoc(source) for source in self.wrong))

    @property
    def page(self) -> str:
        """The page that asks it: the part of the name before the slash."""
        return self.name.partition("/")[0]

    @property
    def check_line(self) -> str:
        """The line a reader runs, as the page prints it."""
        return f'check("{self.name}", {self.answer})'


@dataclass(frozen=True, repr=False)
class Verdict:
    """What `check` says: true when the answer is right, else what is wrong and one hint.

    Book: exercises-how
    """

    name: str
    right: bool
    message: str
    hint: str = ""

    def __bool__(self) -> bool:
        return self.right

    def __str__(self) -> str:
        text = f"{'✓' if self.right else '✗'} {self.name}: {self.message}"
        return f"{text}\n  Hint: {self.hint}" if self.hint else text

    __repr__ = __str__  # so that a notebook cell ending in check(…) shows the sentence


def check(name: str, answer: Any) -> Verdict:
    """Judge `answer` to the exercise called `name`, for example `check("attention/scale", score_scale)`.

    An answer that raises is a wrong answer: the verdict carries its error. Random inputs are drawn from
    a fixed seed, and the caller's random state is left as it was.

    Raises: KeyError when there is no such exercise; the error lists the close names.

    Book: exercises-how
    """
    exercise = find(name)
    import torch

    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(_SEED)
            problem = exercise.check(answer)
    except NotImplementedError:
        return Verdict(name, False, "nothing is written yet: the starter still raises.", exercise.hint)
    except Exception as error:
        return Verdict(name, False, _describe(answer, error), exercise.hint)
    if problem is None:
        return Verdict(name, True, "right.")
    return Verdict(name, False, problem, exercise.hint)


def find(name: str) -> Exercise:
    """The exercise called `name`; KeyError, with the close names, when there is none.

    Book: exercises-how
    """
    if not isinstance(name, str):
        raise TypeError(f"name: got {type(name).__name__}, expected a str such as 'attention/scale'")
    page = name.partition("/")[0].replace("-", "_")
    for exercise in _load(page) if page in _pages() else ():
        if exercise.name == name:
            return exercise
    known = [exercise.name for exercise in exercises()]
    tails = {known_name.partition("/")[2]: known_name for known_name in known}
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    close += [tails[tail] for tail in difflib.get_close_matches(name.rpartition("/")[2], tails, n=2)]
    raise KeyError(f"name: got {name!r}, expected one of {', '.join(dict.fromkeys(close or known))}")


def exercises(page: str | None = None) -> Iterator[Exercise]:
    """Every exercise, page by page, or those of one page ('encoder-only').

    Book: exercises-how
    """
    wanted = page.replace("-", "_") if page is not None else None
    if wanted is not None and wanted not in _pages():
        names = ", ".join(module.replace("_", "-") for module in _pages())
        raise KeyError(f"page: got {page!r}, expected one of {names}")
    for module in _pages():
        if wanted in (None, module):
            yield from _load(module)


def evaluate(exercise: Exercise, source: str) -> Any:
    """Run `source` in a namespace of its own and return the object the exercise asks for.

    Raises: NameError when the source does not define it; whatever the source itself raises.

    Book: exercises-how
    """
    namespace: dict[str, Any] = {"__name__": exercise.name}
    exec(compile(source, f"<{exercise.name}>", "exec"), namespace)
    if exercise.answer not in namespace:
        raise NameError(f"source: it defines no {exercise.answer!r}, which {exercise.name} asks for")
    return namespace[exercise.answer]


def _pages() -> list[str]:
    """The page modules beside this one, by name."""
    folder = str(Path(__file__).parent)
    return sorted(module.name for module in pkgutil.iter_modules([folder]) if module.name not in _NOT_PAGES)


def _load(module: str) -> tuple[Exercise, ...]:
    return tuple(importlib.import_module(f"textbook_code.exercises.{module}").EXERCISES)


def _describe(answer: Any, error: Exception) -> str:
    """The error in one line, laid to the answer's own line or to what the answer gave back."""
    text = str(error).strip().splitlines()
    said = f"{type(error).__name__}{': ' + text[0] if text else ''}"
    source = getattr(getattr(answer, "__code__", None), "co_filename", None)
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == source]
    if lines:
        return f"the answer raised {said} (its line {lines[-1]})."
    return f"the answer could not be judged, {said}."
