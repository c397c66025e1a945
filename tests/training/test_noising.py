"""BART's noise: what each function keeps, what it loses, and how often."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from textbook_code.training.noising import (
    bart_noise,
    document_rotation,
    sentence_permutation,
    text_infilling,
    token_deletion,
    token_masking,
)

MASK, STOP, QUESTION = 1, 2, 3
documents = st.lists(st.integers(2, 500), max_size=60).map(lambda ids: torch.tensor(ids, dtype=torch.long))
seeds = st.integers(0, 2**31 - 1)
rates = st.floats(0, 1)


def source(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def near(count: float, of: int, share: float) -> bool:
    return abs(count - of * share) < 5 * math.sqrt(of * share * (1 - share))


def is_subsequence(part: list[int], whole: list[int]) -> bool:
    rest = iter(whole)
    return all(token in rest for token in part)


@given(tokens=documents, rate=rates, seed=seeds)
def test_masking_changes_tokens_to_the_mask_and_nothing_else(tokens, rate, seed):
    noised = token_masking(tokens, mask_id=MASK, rate=rate, generator=source(seed))
    assert noised.shape == tokens.shape and noised.dtype == tokens.dtype
    assert bool(((noised == tokens) | (noised == MASK)).all())
    assert torch.equal(token_masking(tokens, mask_id=MASK, rate=0.0), tokens)
    assert bool((token_masking(tokens, mask_id=MASK, rate=1.0) == MASK).all())


@given(tokens=documents, rate=rates, seed=seeds)
def test_deletion_leaves_a_subsequence(tokens, rate, seed):
    noised = token_deletion(tokens, rate=rate, generator=source(seed))
    assert is_subsequence(noised.tolist(), tokens.tolist())
    assert torch.equal(token_deletion(tokens, rate=0.0), tokens)
    assert len(token_deletion(tokens, rate=1.0)) == 0


def unmasked(tokens, rate, generator):
    return int((token_masking(tokens, mask_id=MASK, rate=rate, generator=generator) != MASK).sum())


def undeleted(tokens, rate, generator):
    return len(token_deletion(tokens, rate=rate, generator=generator))


@pytest.mark.parametrize("left", [unmasked, undeleted])
def test_the_share_is_the_rate(left):
    tokens = torch.full((20_000,), 7)
    assert near(left(tokens, 0.3, source(0)), 20_000, 0.7)
    assert near(left(tokens, 0.05, source(0)), 20_000, 0.95)


@given(tokens=documents, rate=rates, mean=st.floats(0.3, 8), seed=seeds)
def test_infilling_loses_exactly_the_share_and_keeps_the_order(tokens, rate, mean, seed):
    noised = text_infilling(tokens, mask_id=MASK, rate=rate, mean_span=mean, generator=source(seed)).tolist()
    kept = [token for token in noised if token != MASK]
    assert len(kept) == len(tokens) - round(rate * len(tokens))
    assert is_subsequence(kept, tokens.tolist())
    # between two kept tokens that were not neighbours there is a mask
    whole, gaps, masks = tokens.tolist(), 0, noised.count(MASK)
    if len(set(whole)) == len(whole):  # so that each kept token's place is known
        places = [-1, *(whole.index(token) for token in kept), len(whole)]
        cuts = [i for i, token in enumerate([MASK - 2, *noised, MASK - 2]) if token != MASK]
        for i, (a, b) in enumerate(itertools.pairwise(places)):
            missing, between = b - a - 1, cuts[i + 1] - cuts[i] - 1
            gaps += between
            assert between > 0 or missing == 0
        assert gaps == masks


def test_infilled_spans_have_poisson_lengths_with_empty_ones_among_them():
    """Of a long document with distinct tokens, spans that stand alone show their lengths."""
    tokens = torch.arange(10, 200_010)
    noised = text_infilling(tokens, mask_id=MASK, rate=0.1, mean_span=3.0, generator=source(0))
    alone, lengths = (noised == MASK).nonzero().flatten(), Counter()
    for i in alone.tolist():
        if 0 < i < len(noised) - 1 and MASK not in (noised[i - 1], noised[i + 1]):
            lengths[int(noised[i + 1] - noised[i - 1]) - 1] += 1
    total = sum(lengths.values())
    assert total > 5000
    for length in range(9):
        expected = math.exp(-3) * 3**length / math.factorial(length)
        assert near(lengths[length], total, expected), length
    assert lengths[0] > 0


def test_masks_come_anywhere_also_at_the_ends():
    tokens = torch.arange(10, 20)
    seen = [text_infilling(tokens, mask_id=MASK, generator=source(seed)) for seed in range(400)]
    assert any(x[0] == MASK for x in seen) and any(x[-1] == MASK for x in seen)
    places = torch.cat([(x == MASK).nonzero().flatten().double() / (len(x) - 1) for x in seen if len(x) > 1])
    assert abs(places.mean() - 0.5) < 5 * places.std() / math.sqrt(len(places))


@given(tokens=documents, seed=seeds)
def test_permutation_moves_whole_sentences(tokens, seed):
    noised = sentence_permutation(tokens, end_ids=[STOP, QUESTION], generator=source(seed))

    def sentences(ids: list[int]) -> list[tuple[int, ...]]:
        found, current = [], []
        for token in ids:
            current.append(token)
            if token in (STOP, QUESTION):
                found.append(tuple(current))
                current = []
        return [*found, tuple(current)] if current else found

    whole = sentences(tokens.tolist())
    if whole and whole[-1][-1] in (STOP, QUESTION):  # otherwise the open end may stand before another one
        assert Counter(sentences(noised.tolist())) == Counter(whole)
    assert Counter(noised.tolist()) == Counter(tokens.tolist())


def test_all_orders_of_sentences_are_as_frequent():
    tokens = torch.tensor([10, STOP, 11, 12, QUESTION, 13, STOP])
    seen = Counter(
        tuple(sentence_permutation(tokens, end_ids=[STOP, QUESTION], generator=source(s)).tolist())
        for s in range(1200)
    )
    assert len(seen) == 6
    assert all(near(count, 1200, 1 / 6) for count in seen.values())


@given(tokens=documents, seed=seeds)
def test_rotation_is_a_rotation(tokens, seed):
    noised = document_rotation(tokens, generator=source(seed)).tolist()
    whole = tokens.tolist()
    assert noised in [whole[i:] + whole[:i] for i in range(max(len(whole), 1))]


def test_every_token_may_become_the_first():
    starts = Counter(int(document_rotation(torch.arange(7), generator=source(s))[0]) for s in range(1400))
    assert sorted(starts) == list(range(7))
    assert all(near(count, 1400, 1 / 7) for count in starts.values())


def test_the_mixture_permutes_then_infills():
    tokens = torch.tensor([10, 11, STOP, 12, 13, 14, STOP, 15, 16, QUESTION])
    orders = {(10, 12, 15), (10, 15, 12), (12, 10, 15), (12, 15, 10), (15, 10, 12), (15, 12, 10)}
    seen = set()
    for seed in range(300):
        noised = bart_noise(tokens, mask_id=MASK, end_ids=[STOP, QUESTION], generator=source(seed)).tolist()
        kept = [token for token in noised if token != MASK]
        assert len(kept) == 7
        assert not Counter(kept) - Counter(tokens.tolist())
        seen.add(tuple(token for token in kept if token in (10, 12, 15)))
    assert orders <= seen
    same = [bart_noise(tokens, mask_id=MASK, end_ids=[STOP], generator=source(4)) for _ in range(2)]
    assert torch.equal(*same)
    plain = bart_noise(tokens, mask_id=MASK, end_ids=[99], rate=0.0)  # one sentence, nothing masked
    assert torch.equal(plain, tokens)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x: token_masking(x[None], mask_id=1), ValueError, r"tokens: expected shape \(T\), got"),
        (lambda x: token_deletion(x.float()), TypeError, r"tokens: .*got torch.float32"),
        (lambda x: token_deletion(x, rate=1.5), ValueError, r"rate: expected a share in \[0, 1\], got 1.5"),
        (lambda x: token_masking(x, mask_id=1, rate=-0.1), ValueError, r"rate: .*got -0.1"),
        (lambda x: text_infilling(x, mask_id=1, rate=30), ValueError, r"rate: .*got 30"),
        (lambda x: text_infilling(x, mask_id=1, mean_span=0), ValueError, "mean_span: expected a positive"),
        (lambda x: sentence_permutation(x, end_ids=[]), ValueError, "end_ids: expected the ids .*got none"),
        (lambda x: document_rotation([1, 2]), TypeError, "tokens: expected a tensor, got list"),
    ],
)  # fmt: skip
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call(torch.arange(5))
