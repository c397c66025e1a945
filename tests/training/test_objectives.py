"""Masking for the masked language model: who is chosen, what becomes of them, what is to be predicted."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from textbook_code.training.objectives import IGNORE, mask_tokens

MASK, V = 103, 997


def masked(B=64, T=512, prob=0.15, seed=0, special_mask=None, **kwargs):
    """Tokens 200 … V − 1 in an ordinary batch, so that none of them is the mask token."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(200, V, (B, T), generator=generator)
    if special_mask is None:
        special_mask = torch.zeros(B, T, dtype=torch.bool)
    inputs, targets = mask_tokens(
        tokens,
        mask_id=MASK,
        vocab_size=V,
        special_mask=special_mask,
        prob=prob,
        generator=generator,
        **kwargs,
    )
    return tokens, inputs, targets


def near(count: int, of: int, share: float) -> bool:
    """Within five standard deviations of a binomial count: fails by chance once in two million."""
    return abs(count - of * share) < 5 * math.sqrt(of * share * (1 - share))


@pytest.mark.parametrize("prob", [0.15, 0.4])
def test_the_shares_are_the_papers(prob):
    tokens, inputs, targets = masked(prob=prob)
    chosen = targets != IGNORE
    n = int(chosen.sum())
    assert near(n, tokens.numel(), prob)
    became_mask = chosen & (inputs == MASK)
    kept = chosen & (inputs == tokens)
    random = chosen & ~became_mask & ~kept
    assert near(int(became_mask.sum()), n, 0.8)
    assert near(int(random.sum()), n, 0.1)
    assert near(int(kept.sum()), n, 0.1)


def test_random_tokens_come_from_the_whole_vocabulary():
    tokens, inputs, targets = masked(B=256)
    random = inputs[(targets != IGNORE) & (inputs != MASK) & (inputs != tokens)]
    assert 0 <= int(random.min()) < 20 and V - 20 < int(random.max()) < V
    assert near(int((random < V // 2).sum()), len(random), (V // 2) / V)
    assert abs(float(random.double().mean()) - (V - 1) / 2) < 5 * V / math.sqrt(12 * len(random))


def test_chosen_positions_are_independent_of_one_another():
    _, _, targets = masked(B=256)
    chosen = (targets != IGNORE).double()
    both = int((chosen[:, 1:] * chosen[:, :-1]).sum())
    assert near(both, chosen[:, 1:].numel(), 0.15**2)
    per_position = chosen.mean(0)
    assert float((per_position - 0.15).abs().max()) < 6 * math.sqrt(0.15 * 0.85 / 256)


@given(seed=st.integers(0, 2**31 - 1), prob=st.floats(0.01, 1.0))
def test_targets_and_the_untouched(seed, prob):
    special = torch.rand(5, 37, generator=torch.Generator().manual_seed(seed)) < 0.3
    tokens, inputs, targets = masked(B=5, T=37, prob=prob, seed=seed, special_mask=special)
    chosen = targets != IGNORE
    assert not bool((chosen & special).any())  # [CLS], [SEP] and padding stay
    assert torch.equal(targets[chosen], tokens[chosen])
    assert torch.equal(inputs[~chosen], tokens[~chosen])
    assert inputs.dtype == tokens.dtype and targets.dtype == tokens.dtype
    if prob == 1.0:
        assert torch.equal(chosen, ~special)


def test_the_batch_is_left_as_it_was_and_the_generator_decides():
    tokens, *first = masked(seed=3)
    again, *second = masked(seed=3)
    _, *other = masked(seed=4)
    assert torch.equal(tokens, again)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not torch.equal(first[1], other[1])
    assert bool((tokens >= 200).all())  # no [MASK] was written into it


def test_the_loss_ignores_what_was_not_chosen():
    _, _, targets = masked(B=2, T=50)
    logits = torch.randn(2, 50, V)
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
    chosen = targets != IGNORE
    expected = -logits[chosen].log_softmax(-1).gather(1, targets[chosen][:, None]).mean()
    torch.testing.assert_close(loss, expected)


TOKENS, SPECIAL = torch.full((2, 7), 5), torch.zeros(2, 7, dtype=torch.bool)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"tokens": TOKENS[0]}, ValueError, r"tokens: expected shape \(B, T\), got \(7,\)"),
        (
            {"tokens": TOKENS.float()},
            TypeError,
            r"tokens: expected a tensor of integer ids.*got torch.float32",
        ),
        ({"tokens": [[1]]}, TypeError, r"tokens: expected a tensor, got list"),
        (
            {"special_mask": SPECIAL.long()},
            TypeError,
            r"special_mask: expected a bool tensor.*got torch.int64",
        ),
        ({"special_mask": SPECIAL[:1]}, ValueError, r"special_mask: expected .* B = 2.*, got \(1, 7\)"),
        ({"prob": 0.0}, ValueError, r"prob: expected a share in \(0, 1\], got 0.0"),
        ({"prob": 15}, ValueError, r"prob: expected a share in \(0, 1\], got 15"),
        ({"mask_id": 997}, ValueError, r"mask_id: expected an id from 0 to 996 .*got 997"),
        ({"mask_id": -1}, ValueError, r"mask_id: expected an id from 0 to 996 .*got -1"),
    ],
)
def test_bad_input(changes, error, message):
    good = {"tokens": TOKENS, "mask_id": MASK, "vocab_size": V, "special_mask": SPECIAL, "prob": 0.15}
    args = {**good, **changes}
    with pytest.raises(error, match=message):
        mask_tokens(args.pop("tokens"), **args)
