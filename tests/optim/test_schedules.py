"""Schedules: their formulas, written out a second time, and their ends."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from textbook_code.optim.schedules import inverse_sqrt, warmup_cosine, warmup_linear, warmup_stable_decay

KINDS = {
    "linear": warmup_linear,
    "cosine": warmup_cosine,
    "stable": lambda w, n, **kw: warmup_stable_decay(w, n, decay=(n - w + 1) // 2, **kw),
}


def test_linear_by_hand() -> None:
    factor = warmup_linear(4, 10)
    assert [factor(s) for s in range(12)] == pytest.approx(
        [1 / 4, 2 / 4, 3 / 4, 1, 6 / 6, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6, 0, 0]
    )
    assert warmup_linear(0, 4, floor=0.2)(2) == pytest.approx(0.2 + 0.8 * 0.5)


def test_cosine_by_hand() -> None:
    factor = warmup_cosine(2, 10, floor=0.1)
    assert factor(0) == 0.5
    assert factor(2) == factor(1) == 1.0
    assert factor(6) == pytest.approx(0.55)  # half of the way
    assert factor(8) == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(0.75 * math.pi)))
    assert factor(10) == factor(1000) == pytest.approx(0.1)


@given(w=st.integers(1, 500), d=st.integers(1, 4096), s=st.integers(0, 100_000))
def test_inverse_sqrt_is_the_papers_formula(w: int, d: int, s: int) -> None:
    t = s + 1
    assert inverse_sqrt(w, d_model=d)(s) == pytest.approx(d**-0.5 * min(t**-0.5, t * w**-1.5), rel=1e-12)
    assert inverse_sqrt(w)(s) == pytest.approx(min(t / w, math.sqrt(w / t)))
    assert inverse_sqrt(w)(s) <= inverse_sqrt(w)(w - 1) == 1.0


def test_stable_by_hand() -> None:
    factor = warmup_stable_decay(2, 12, decay=4, floor=0.5)
    assert [factor(s) for s in range(14)] == pytest.approx(
        [0.5, 1, 1, 1, 1, 1, 1, 1, 1, 0.875, 0.75, 0.625, 0.5, 0.5]
    )


@pytest.mark.parametrize("kind", KINDS)
@given(w=st.integers(0, 60), rest=st.integers(1, 200), floor=st.floats(0, 1))
def test_up_then_down_and_never_outside(kind: str, w: int, rest: int, floor: float) -> None:
    factor = KINDS[kind](w, w + rest, floor=floor)
    values = [factor(s) for s in range(w + rest + 3)]
    assert all(a < b for a, b in itertools.pairwise(values[:w]))
    assert values[w] == pytest.approx(1.0)
    assert all(a >= b - 1e-12 for a, b in itertools.pairwise(values[w:]))
    assert values[-1] == pytest.approx(floor)
    assert all(0 <= value <= 1 + 1e-12 for value in values)


def test_the_learning_rates_that_lambda_lr_makes() -> None:
    weight = torch.nn.Parameter(torch.zeros(()))
    optimizer = torch.optim.SGD([weight], lr=0.3)
    schedule, seen = torch.optim.lr_scheduler.LambdaLR(optimizer, warmup_linear(2, 6)), []
    for _ in range(6):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert seen == pytest.approx([0.15, 0.3, 0.3, 0.225, 0.15, 0.075])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: warmup_linear(-1, 5), "warmup: expected 0 or more steps, got -1"),
        (lambda: warmup_linear(5, 5), "total: expected more steps than warmup = 5, got 5"),
        (lambda: warmup_cosine(1, 5, floor=1.5), r"floor: expected a factor in \[0, 1\], got 1.5"),
        (lambda: inverse_sqrt(0), "warmup: expected at least 1, got 0"),
        (lambda: inverse_sqrt(4, d_model=0), "d_model: expected at least 1, got 0"),
        (lambda: warmup_stable_decay(2, 9, decay=8), r"decay: expected 1 to 7 steps .*got 8"),
        (lambda: warmup_stable_decay(2, 9, decay=0), r"decay: expected 1 to 7 steps .*got 0"),
    ],
)
def test_bad_input(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
