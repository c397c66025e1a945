"""The arena: nothing that lives at the same time shares a byte."""

import random
from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from textbook_code.deploy.planner import ALIGNMENT, Buffer, lower_bound, plan


def overlaps(a: Buffer, b: Buffer, offsets: dict) -> bool:
    return offsets[a.name] < offsets[b.name] + b.size and offsets[b.name] < offsets[a.name] + a.size


@st.composite
def lifetimes(draw: st.DrawFn) -> list[Buffer]:
    rows = draw(st.lists(st.tuples(st.integers(1, 500), st.integers(0, 20), st.integers(0, 8)), max_size=25))
    return [Buffer(i, size, first, first + lasts) for i, (size, first, lasts) in enumerate(rows)]


@settings(max_examples=300, deadline=None)
@given(lifetimes())
def test_no_two_that_live_together_share_a_byte(buffers: list[Buffer]) -> None:
    done = plan(buffers)
    assert set(done.offsets) == {b.name for b in buffers}
    for a, b in combinations(buffers, 2):
        assert not (a.meets(b) and overlaps(a, b, dict(done.offsets)))
    assert all(offset >= 0 and offset % ALIGNMENT == 0 for offset in done.offsets.values())
    assert done.size >= done.bound == lower_bound(buffers)
    assert done.size == max((done.offsets[b.name] + -(-b.size // 4) * 4 for b in buffers), default=0)


@settings(max_examples=100, deadline=None)
@given(lifetimes(), st.integers(0, 2**32))
def test_the_order_of_the_list_does_not_matter(buffers: list[Buffer], seed: int) -> None:
    shuffled = random.Random(seed).sample(buffers, len(buffers))
    assert plan(shuffled).size == plan(buffers).size


@settings(max_examples=100, deadline=None)
@given(lifetimes())
def test_the_bound_counts_every_step(buffers: list[Buffer]) -> None:
    steps = range(40)
    live = [sum(-(-b.size // 4) * 4 for b in buffers if b.first <= t <= b.last) for t in steps]
    assert lower_bound(buffers) == max(live, default=0)


def test_one_after_the_other_shares_everything() -> None:
    done = plan([Buffer("a", 64, 0, 1), Buffer("b", 64, 2, 3)])
    assert done.offsets == {"a": 0, "b": 0} and done.size == done.bound == 64


def test_a_step_needs_what_it_reads_and_what_it_writes() -> None:
    done = plan([Buffer("a", 64, 0, 1), Buffer("b", 32, 1, 2)])
    assert done.offsets == {"a": 0, "b": 64} and done.size == done.bound == 96


def test_first_fit_does_not_always_reach_the_bound() -> None:
    """Found by search: three that meet two at a time can force a gap."""
    rng = random.Random(0)
    worse = 0
    for _ in range(400):
        buffers = [
            Buffer(i, 4 * rng.randint(1, 20), t := rng.randint(0, 9), t + rng.randint(0, 4)) for i in range(9)
        ]
        done = plan(buffers)
        worse += done.size > done.bound
    assert worse > 0


def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match=r"size: expected at least one byte for 'a', got 0"):
        Buffer("a", 0, 0, 0)
    with pytest.raises(ValueError, match=r"last: expected at least first = 3 for 'a', got 2"):
        Buffer("a", 1, 3, 2)
    with pytest.raises(ValueError, match=r"expected different names, got 'a' twice"):
        plan([Buffer("a", 1, 0, 0), Buffer("a", 2, 0, 0)])
    assert plan([]).size == 0
