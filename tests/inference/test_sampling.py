"""Temperature, top-k and top-p: against transformers' warpers, against their definitions, against chance."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from textbook_code.inference.sampling import filtered_logits, next_tokens, top_k_filter, top_p_filter

LOGITS = torch.randn(6, 50, generator=torch.Generator().manual_seed(0)) * 3


@pytest.mark.parametrize("temperature", [0.3, 1.0, 1.7])
@pytest.mark.parametrize("top_k", [None, 1, 7, 50, 80])
@pytest.mark.parametrize("top_p", [None, 0.05, 0.5, 0.93, 1.0])
def test_equals_the_warpers_of_transformers(
    temperature: float, top_k: int | None, top_p: float | None
) -> None:
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    expected = LOGITS / 1
    warpers = [TemperatureLogitsWarper(temperature)] if temperature != 1 else []
    warpers += [TopKLogitsWarper(top_k)] if top_k is not None else []
    warpers += [TopPLogitsWarper(top_p)] if top_p is not None and top_p < 1 else []
    for warper in warpers:
        expected = warper(None, expected)
    got = filtered_logits(LOGITS, temperature, top_k, top_p)
    assert got.equal(expected)


def test_tokens_that_tie_with_the_kth_are_kept_as_in_transformers() -> None:
    from transformers import TopKLogitsWarper

    logits = torch.tensor([[1.0, 3.0, 2.0, 2.0, 2.0, 0.0]])
    got = top_k_filter(logits, 2)
    assert got.isfinite().tolist() == [[False, True, True, True, True, False]]
    assert got.equal(TopKLogitsWarper(2)(None, logits))


@given(
    logits=st.lists(st.floats(-20, 20, width=32), min_size=1, max_size=30),
    p=st.floats(0.01, 0.999),
)
def test_top_p_keeps_the_smallest_set_with_enough_probability(logits: list[float], p: float) -> None:
    row = torch.tensor([logits], dtype=torch.float64)
    kept = top_p_filter(row, p)[0].isfinite()
    q = row[0].softmax(-1)
    assert kept.any()
    assert q[kept].sum() >= p - 1e-12, "the set has the probability"
    assert q[kept].sum() - q[kept].min() < p + 1e-12, "without its least likely token it has not"
    if (~kept).any():
        assert q[kept].min() >= q[~kept].max(), "no token left out is likelier than one kept"


@given(
    logits=st.lists(st.floats(-20, 20, width=32), min_size=1, max_size=30),
    k=st.integers(1, 40),
)
def test_top_k_keeps_k_of_the_likeliest_and_their_ties(logits: list[float], k: int) -> None:
    row = torch.tensor([logits])
    kept = top_k_filter(row, k)[0].isfinite()
    assert kept.sum() >= min(k, len(logits))
    assert (row[0] > row[0][kept].min()).sum() < k, "no more than ties are beyond k"


@pytest.mark.parametrize("p", [1e-6, 0.3])
def test_the_likeliest_token_always_stays(p: float) -> None:
    kept = top_p_filter(torch.tensor([[5.0, 0.0, -3.0]]), p).isfinite()
    assert kept.tolist() == [[True, False, False]]


def chi_square(counts: torch.Tensor, p: torch.Tensor) -> float:
    """The probability of counts that lie this far from p or farther: Pearson's test, Q(df/2, χ²/2)."""
    expected = p * counts.sum()
    statistic = ((counts - expected) ** 2 / expected).sum()
    degrees = torch.tensor((len(p) - 1) / 2, dtype=torch.float64)
    return torch.special.gammaincc(degrees, statistic.double() / 2).item()


def test_the_chi_square_is_the_one_of_the_tables() -> None:
    # 3.841 with one degree of freedom, and 11.07 with five, are exceeded in one case of twenty
    counts, p = torch.tensor([50.0 + 3.8414588**0.5 * 5, 50.0 - 3.8414588**0.5 * 5]), torch.tensor([0.5, 0.5])
    assert chi_square(counts, p) == pytest.approx(0.05, abs=1e-5)
    shift = (11.0704977 * 60 / 2) ** 0.5
    counts = torch.tensor([60 + shift, 60 - shift, 60, 60, 60, 60], dtype=torch.float64)
    assert chi_square(counts, torch.full((6,), 1 / 6)) == pytest.approx(0.05, abs=1e-5)


@pytest.mark.parametrize(
    "how", [{"temperature": 1.0}, {"temperature": 0.7, "top_k": 6}, {"temperature": 1.5, "top_p": 0.8}]
)
def test_frequencies_follow_the_distribution(how: dict) -> None:
    draws, logits = 20_000, LOGITS[:1, :12] / 2
    p = filtered_logits(logits.double(), **how).softmax(-1)[0]
    got = next_tokens(logits.expand(draws, -1), generator=torch.Generator().manual_seed(1), **how).bincount(
        minlength=12
    )
    assert (got[p == 0] == 0).all(), "what is filtered out is never drawn"
    drawn = p > 0
    assert chi_square(got[drawn], p[drawn]) > 1e-3
    other = filtered_logits(logits.double(), **{**how, "temperature": 1.1 * how["temperature"]}).softmax(-1)[
        0
    ]
    assert chi_square(got[drawn], other[drawn] / other[drawn].sum()) < 1e-6, "another temperature is noticed"


def test_temperature_is_a_power_of_the_probabilities() -> None:
    p = LOGITS.double().softmax(-1)
    powered = p ** (1 / 0.6)
    torch.testing.assert_close(
        filtered_logits(LOGITS.double(), 0.6).softmax(-1), powered / powered.sum(-1, keepdim=True)
    )


def test_a_draw_repeats_with_its_generator_and_leaves_torchs_own_alone() -> None:
    before = torch.get_rng_state()
    one, two = (
        next_tokens(LOGITS, temperature=2.0, generator=torch.Generator().manual_seed(3)) for _ in "ab"
    )
    other = next_tokens(LOGITS, temperature=2.0, generator=torch.Generator().manual_seed(4))
    assert one.equal(two)
    assert not one.equal(other)
    assert torch.get_rng_state().equal(before)


def test_temperature_zero_takes_the_likeliest() -> None:
    assert next_tokens(LOGITS).equal(LOGITS.argmax(-1))


def test_half_precision_is_widened_before_it_is_filtered() -> None:
    assert filtered_logits(LOGITS.bfloat16(), 0.7, 5, 0.9).dtype == torch.float32
    assert filtered_logits(LOGITS.double(), 0.7).dtype == torch.float64


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: top_p_filter(LOGITS, 0.0), "top_p: expected more than 0 and at most 1, got 0.0"),
        (lambda: top_p_filter(LOGITS, 1.1), "top_p: expected more than 0 and at most 1, got 1.1"),
        (lambda: top_p_filter(LOGITS, math.nan), "top_p: expected more than 0 and at most 1, got nan"),
        (lambda: top_k_filter(LOGITS, 0), "top_k: expected an integer of at least 1, got 0"),
        (lambda: top_k_filter(LOGITS, 2.0), "top_k: expected an integer of at least 1, got 2.0"),  # type: ignore[arg-type]
        (lambda: filtered_logits(LOGITS, -1.0), "temperature: expected more than 0 to sample"),
        (lambda: filtered_logits(LOGITS, math.nan), "temperature: expected more than 0 to sample"),
        (lambda: top_k_filter(LOGITS[0], 1), r"logits: expected shape \(B, V\), got \(50,\)"),
        (lambda: next_tokens(LOGITS[0]), r"logits: expected shape \(B, V\)"),
    ],
)
def test_bad_arguments(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
