"""Whole words, next tokens, spans: what is to be predicted, checked against the definitions written out."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from textbook_code.training.objectives import (
    IGNORE,
    causal_lm_loss,
    causal_lm_targets,
    fill_spans,
    mask_tokens,
    span_corruption,
    span_counts,
    token_loss,
)

V = 97


def near(count: int, of: int, share: float) -> bool:
    """Within five standard deviations of a binomial count."""
    return abs(count - of * share) < 5 * math.sqrt(of * share * (1 - share))


# ------------------------------------------------------------------ whole words


@given(seed=st.integers(0, 2**31 - 1), far=st.booleans())
def test_a_word_is_chosen_whole_or_not_at_all(seed: int, far: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    B, T = 4, 41
    new = torch.rand(B, T, generator=generator) < 0.5
    words = new.long().cumsum(1) * (1_000_003 if far else 1)
    tokens = torch.randint(10, V, (B, T), generator=generator)
    special = torch.zeros(B, T, dtype=torch.bool)
    special[:, [0, -1]] = True
    words[special] = -1
    inputs, targets = mask_tokens(
        tokens, mask_id=3, vocab_size=V, special_mask=special, prob=0.4, words=words, generator=generator
    )
    chosen = targets != IGNORE
    assert not bool((chosen & special).any())
    assert torch.equal(inputs[~chosen], tokens[~chosen])
    for row in range(B):
        for word in words[row].unique().tolist():
            of_word = chosen[row][(words[row] == word) & ~special[row]]
            assert bool(of_word.all()) or not bool(of_word.any())


def test_words_of_different_rows_are_drawn_apart_and_with_the_right_share() -> None:
    B, W = 500, 40
    words = torch.arange(W).repeat_interleave(3).expand(B, -1)
    tokens = torch.full((B, 3 * W), 50)
    inputs, targets = mask_tokens(
        tokens,
        mask_id=3,
        vocab_size=V,
        special_mask=torch.zeros_like(tokens, dtype=torch.bool),
        words=words,
        generator=torch.Generator().manual_seed(0),
    )
    chosen = (targets != IGNORE).view(B, W, 3)[:, :, 0]
    assert near(int(chosen.sum()), chosen.numel(), 0.15)
    both = (chosen[1:] & chosen[:-1]).sum()  # the same word of two rows
    assert near(int(both), chosen[1:].numel(), 0.15**2)
    assert near(int((inputs == 3).sum()), int((targets != IGNORE).sum()), 0.8)
    fates = (inputs == 3).view(B, W, 3)[chosen]  # each token of a word has its own
    assert near(int(fates.all(1).sum()), len(fates), 0.8**3)


def test_every_token_a_word_of_its_own_is_ordinary_masking_in_law() -> None:
    tokens = torch.full((400, 50), 50)
    _, targets = mask_tokens(
        tokens,
        mask_id=3,
        vocab_size=V,
        special_mask=torch.zeros_like(tokens, dtype=torch.bool),
        prob=0.3,
        words=torch.arange(50).expand(400, -1),
        generator=torch.Generator().manual_seed(1),
    )
    chosen = targets != IGNORE
    assert near(int(chosen.sum()), chosen.numel(), 0.3)
    assert near(int((chosen[:, 1:] & chosen[:, :-1]).sum()), chosen[:, 1:].numel(), 0.09)


@pytest.mark.parametrize(
    ("words", "error", "message"),
    [
        (torch.zeros(2, 5), TypeError, r"words: expected a tensor of integer ids.*got torch.float32"),
        (torch.zeros(2, 4).long(), ValueError, r"words: expected shape .* T = 5, got \(2, 4\)"),
        (torch.full((2, 5), -1), ValueError, "words: expected 0 or more for every ordinary token"),
    ],
)
def test_bad_words(words, error, message: str) -> None:
    tokens, special = torch.full((2, 5), 9), torch.zeros(2, 5, dtype=torch.bool)
    with pytest.raises(error, match=message):
        mask_tokens(tokens, mask_id=3, vocab_size=V, special_mask=special, words=words)


# ------------------------------------------------------------------ the next token


def test_targets_are_the_next_tokens() -> None:
    tokens = torch.tensor([[5, 6, 7, 8, 9], [1, 2, 3, 0, 0], [0, 0, 4, 5, 6]])
    assert causal_lm_targets(tokens).tolist() == [
        [6, 7, 8, 9, IGNORE],
        [2, 3, 0, 0, IGNORE],
        [0, 4, 5, 6, IGNORE],
    ]
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [0, 0, 1, 1, 1]]).bool()  # right and left padding
    assert causal_lm_targets(tokens, token_mask=mask).tolist() == [
        [6, 7, 8, 9, IGNORE],
        [2, 3, IGNORE, IGNORE, IGNORE],
        [IGNORE, IGNORE, 5, 6, IGNORE],
    ]
    documents = torch.tensor([[0, 0, 1, 1, 1], [2, 3, 3, 4, 4], [5, 5, 5, 5, 5]])
    assert causal_lm_targets(tokens, document_ids=documents).tolist() == [
        [6, IGNORE, 8, 9, IGNORE],
        [IGNORE, 3, IGNORE, 0, IGNORE],
        [0, 4, 5, 6, IGNORE],
    ]
    assert tokens[0, 0] == 5, "the batch is left as it was"
    assert causal_lm_targets(tokens.int()).dtype == torch.int32


@given(seed=st.integers(0, 10_000), epsilon=st.floats(0, 0.9))
def test_the_loss_is_its_formula(seed: int, epsilon: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(3, 7, 11, dtype=torch.double, generator=generator)
    tokens = torch.randint(11, (3, 7), generator=generator)
    p = logits.softmax(-1)
    expected = [
        -(1 - epsilon) * p[b, t, tokens[b, t + 1]].log() - epsilon / 11 * p[b, t].log().sum()
        for b in range(3)
        for t in range(6)
    ]
    loss = causal_lm_loss(logits, tokens, label_smoothing=epsilon)
    torch.testing.assert_close(loss, torch.stack(expected).mean())
    torch_says = F.cross_entropy(
        logits[:, :-1].reshape(-1, 11), tokens[:, 1:].reshape(-1), label_smoothing=epsilon
    )
    torch.testing.assert_close(loss, torch_says)


def test_nothing_but_the_positions_with_a_target_counts() -> None:
    logits = torch.randn(2, 6, V, generator=torch.Generator().manual_seed(0)).requires_grad_()
    targets = torch.full((2, 6), IGNORE)
    targets[0, 2], targets[1, 5] = 4, 7
    token_loss(logits, targets, label_smoothing=0.1).backward()
    touched = logits.grad.abs().sum(-1) > 0
    assert touched.nonzero().tolist() == [[0, 2], [1, 5]]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x, y: token_loss(x[0], y), ValueError, r"logits: expected shape \(B, T, V\)"),
        (lambda x, y: token_loss(x, y[:, 1:]), ValueError, r"targets: expected .* T = 5, got \(2, 4\)"),
        (lambda x, y: token_loss(x, y.float()), TypeError, r"targets: .*got torch.float32"),
        (
            lambda x, y: token_loss(x, y, label_smoothing=1.0),
            ValueError,
            r"label_smoothing: expected a share in \[0, 1\), got 1.0",
        ),
        (
            lambda x, y: token_loss(x, torch.full_like(y, IGNORE)),
            ValueError,
            "targets: expected at least one position to predict, all are -100",
        ),
        (
            lambda x, y: causal_lm_loss(x[:, :1], y[:, :1]),
            ValueError,
            "targets: expected at least one position",
        ),
        (
            lambda x, y: causal_lm_targets(y, token_mask=torch.ones(2, 5)),
            TypeError,
            "token_mask: expected a bool tensor",
        ),
        (
            lambda x, y: causal_lm_targets(y, document_ids=torch.ones(2, 4).long()),
            ValueError,
            r"document_ids: expected .* T = 5, got \(2, 4\)",
        ),
    ],
)
def test_bad_input_of_the_loss(call, error, message: str) -> None:
    with pytest.raises(error, match=message):
        call(torch.randn(2, 5, V), torch.ones(2, 5, dtype=torch.long))


# ------------------------------------------------------------------ spans

SENTINELS = list(range(999, 899, -1))  # they count down, as T5's do


@given(
    T=st.integers(2, 120),
    rate=st.floats(0.02, 0.9),
    mean_span=st.floats(1, 9),
    eos=st.sampled_from([None, 1]),
    seed=st.integers(0, 2**31 - 1),
)
def test_inputs_and_targets_restore_the_text_and_have_the_lengths_promised(T, rate, mean_span, eos, seed):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(2, 800, (3, T), generator=generator)
    inputs, targets = span_corruption(
        tokens, sentinels=SENTINELS, rate=rate, mean_span=mean_span, eos_id=eos, generator=generator
    )
    cut, spans = span_counts(T, rate=rate, mean_span=mean_span)
    end = eos is not None
    assert inputs.shape == (3, T - cut + spans + end)
    assert targets.shape == (3, cut + spans + 1 + end)
    for row, (before, after) in enumerate(zip(inputs.tolist(), targets.tolist(), strict=True)):
        restored = fill_spans(inputs[row], targets[row], sentinels=SENTINELS, eos_id=eos)
        assert restored == tokens[row].tolist()
        # the sentinels in their order: each once in the inputs, and one more in the targets
        assert [token for token in before if token >= 900] == SENTINELS[:spans]
        assert [token for token in after if token >= 900] == SENTINELS[: spans + 1]
        assert before[0] < 900 <= after[0]
        inside = after[: len(after) - end]
        assert inside[-1] >= 900 and all(a < 900 or b < 900 for a, b in itertools.pairwise(inside))
    assert inputs.dtype == targets.dtype == tokens.dtype


def test_the_papers_example() -> None:
    text = "Thank you for inviting me to your party last week"
    words = {word: i for i, word in enumerate(text.split(), start=10)}
    spelled = {i: word for word, i in words.items()}
    words |= {"<X>": 99, "<Y>": 98, "<Z>": 97}
    inputs = [words[w] for w in ["Thank", "you", "<X>", "me", "to", "your", "party", "<Y>", "week"]]
    targets = [words[w] for w in ["<X>", "for", "inviting", "<Y>", "last", "<Z>"]]
    restored = fill_spans(torch.tensor(inputs), torch.tensor(targets), sentinels=[99, 98, 97])
    assert " ".join(spelled[i] for i in restored) == text


def test_counts_are_the_published_ones() -> None:
    """512 tokens at 15 % and a mean of 3: 77 tokens in 26 spans; targets with an end token are 105 long."""
    assert span_counts(512) == (77, 26)
    tokens = torch.randint(2, 800, (2, 512))
    inputs, targets = span_corruption(tokens, sentinels=SENTINELS, eos_id=1)
    assert inputs.shape == (2, 512 - 77 + 26 + 1)
    assert targets.shape == (2, 77 + 26 + 1 + 1)
    assert span_counts(2) == (1, 1)
    assert span_counts(10, rate=0.99, mean_span=1) == (9, 1), "as many spans as there is room between"


def test_lengths_are_uniform_among_those_with_the_right_sum() -> None:
    """20 tokens, 6 cut in 2 spans: the first span has 1 … 5 tokens, each as often."""
    tokens = torch.arange(2, 22).expand(3000, -1)
    generator = torch.Generator().manual_seed(0)
    _, targets = span_corruption(tokens, sentinels=SENTINELS, rate=0.3, generator=generator)
    first = (targets == SENTINELS[1]).nonzero()[:, 1] - 1
    counts = torch.bincount(first, minlength=7)
    assert counts[0] == counts[6] == 0
    assert all(near(int(count), 3000, 1 / 5) for count in counts[1:6])
    again = span_corruption(
        tokens, sentinels=SENTINELS, rate=0.3, generator=torch.Generator().manual_seed(0)
    )[1]
    assert torch.equal(targets, again)


def test_filling_forgives_what_a_model_may_write() -> None:
    inputs = torch.tensor([5, 99, 6, 98, 7, 1, 8])
    assert fill_spans(
        inputs, torch.tensor([3, 99, 11, 97, 13, 1, 98, 12]), sentinels=[99, 98, 97], eos_id=1
    ) == [
        5,
        11,
        6,
        7,
    ]


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"tokens": torch.ones(5).long()}, ValueError, r"tokens: expected shape \(B, T\), got \(5,\)"),
        ({"tokens": torch.ones(2, 5)}, TypeError, "tokens: expected a tensor of integer ids"),
        ({"tokens": torch.ones(2, 1).long()}, ValueError, "tokens: expected at least 2 tokens .*got 1"),
        ({"rate": 0.0}, ValueError, r"rate: expected a share in \(0, 1\), got 0.0"),
        ({"rate": 1.0}, ValueError, r"rate: expected a share in \(0, 1\), got 1.0"),
        ({"mean_span": 0.5}, ValueError, "mean_span: expected at least 1 token, got 0.5"),
        ({"sentinels": [99]}, ValueError, "sentinels: expected at least 3 for 2 spans, got 1"),
        ({"sentinels": [99, 98, 99]}, ValueError, "sentinels: expected ids that differ"),
        ({"sentinels": [99, 98, 1]}, ValueError, "tokens: expected text without a sentinel's id"),
    ],
)
def test_bad_input_of_span_corruption(changes, error, message: str) -> None:
    good = {"tokens": torch.ones(2, 40).long(), "sentinels": [99, 98, 97, 96]}
    args = {**good, **changes}
    with pytest.raises(error, match=message):
        span_corruption(args.pop("tokens"), **args)
