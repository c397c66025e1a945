"""What the build says: one line a step, with its time. Standard library only."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

STEPS: list[tuple[str, str, float]] = []  # step, outcome, seconds


class StepError(Exception):
    """A step failed; the message says what happened and what to do."""


def say(text: str, *, step: str = "") -> None:
    """Print a line at once, under the step's name."""
    for line in text.splitlines() or [""]:
        head = f"{step:>12} | " if step else ""
        print(f"{head}{line}".rstrip(), flush=True)


@contextmanager
def timed(step: str) -> Iterator[Callable[[str], None]]:
    """Time a step and keep it for the closing table; yields a `say` under the step's name."""
    start = time.perf_counter()
    outcome = "failed"
    try:
        yield lambda text: say(text, step=step)
        outcome = "done"
    finally:
        STEPS.append((step, outcome, time.perf_counter() - start))
        if outcome == "done":
            say(f"done in {duration(STEPS[-1][2])}", step=step)


def ask(question: str) -> bool:
    """Ask on a terminal; where there is none the answer is yes."""
    if not sys.stdin.isatty():
        return True
    return input(f"{question} [Y/n] ").strip().lower() in ("", "y", "yes")


def duration(seconds: float) -> str:
    """Seconds as one says them.

    >>> duration(0.25), duration(75)
    ('0.2 s', '1 min 15 s')
    """
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s"


def closing_table() -> str:
    """All steps so far with their times."""
    rows = [f"{step:>12} | {outcome:<8} {duration(seconds):>12}" for step, outcome, seconds in STEPS]
    total = sum(seconds for _, _, seconds in STEPS)
    return "\n".join([*rows, f"{'total':>12} | {'':<8} {duration(total):>12}"])
