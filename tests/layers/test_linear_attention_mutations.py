"""Each of these bugs, planted in linear attention or its features, must make a comparison fail."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from linear_references import (
    from_public,
    problems_of_rows,
    public_layer,
    randn,
    random_tokens,
    rows_of_many_draws,
    run_ours,
)
from torch import Tensor

from textbook_code.layers import linear_attention as module
from textbook_code.layers.linear_attention import (
    LinearAttention,
    LinearState,
    dense_linear_attention,
    elu_plus_one,
    linear_attention,
    orthogonal_gaussian,
)

Plant = Callable[[pytest.MonkeyPatch], None]
states, inside, ready, normalised = module._states, module._inside, module._ready, module._normalised


def replaced(name: str, wrong: Callable[..., object]) -> Plant:
    return lambda patch: patch.setattr(module, name, wrong)


def behind(k: Tensor, values: Tensor, start: Tensor) -> Tensor:
    """States moved by one chunk: each chunk reads its own sum as well."""
    s = states(k, values, start)
    return torch.cat([s[:, :, 1:], s[:, :, -1:]], 2)


def not_carried(k: Tensor, values: Tensor, start: Tensor) -> Tensor:
    return torch.cat([start[:, :, None], k.mT @ values], 2)


def read_before_written(a: Tensor, b: Tensor) -> Tensor:
    """The state is brought up to date after the query has read it: no query sees its own key."""
    own = torch.eye(b.size(-2), dtype=torch.bool).repeat(a.size(-2) // b.size(-2), 1)
    return inside(a, b).masked_fill(own, 0)


FORMS: dict[str, Plant] = {
    "normaliser forgotten": replaced("_normalised", lambda out, eps: out[..., :-1]),
    "mean over the length for the normaliser": replaced(
        "_normalised", lambda out, eps: out[..., :-1] / out.size(-2)
    ),
    "eps dropped": replaced("_normalised", lambda out, eps: normalised(out, 0.0)),
    "padding read": replaced("_ready", lambda q, k, v, mask: ready(q, k, v, None)),
    "padding's values hidden, its keys counted": replaced(
        "_ready",
        lambda q, k, v, mask: ready(
            q, k, v if mask is None else v.masked_fill(~mask[:, None, :, None], 0), None
        ),
    ),
    "groups tiled": replaced(
        "_ready",
        lambda q, k, v, mask: ready(
            q.unflatten(1, (-1, k.size(1))).transpose(1, 2).flatten(1, 2), k, v, mask
        ),
    ),
    "state not carried": replaced("_states", not_carried),
    "state of the chunk itself": replaced("_states", behind),
    "state read before it is written": replaced("_inside", read_before_written),
    "no order inside a chunk": replaced("_inside", lambda a, b: a @ b.mT),
    "the given state ignored": replaced(
        "_start", lambda state, k, v: k.new_zeros(*k.shape[:2], k.size(3), v.size(3) + 1)
    ),
}


def worst_difference() -> float:
    """Of chunks, prefill and steps from the dense form, with groups, padding and eps."""
    q, k = elu_plus_one(randn(3, 4, 11, 5, seed=1)), elu_plus_one(randn(3, 2, 11, 5, seed=2))
    v, mask = randn(3, 2, 11, 7, seed=3), random_tokens(3, 11, seed=4)
    with pytest.MonkeyPatch.context() as clean:  # the reference is computed without the bug
        for name, right in (("_ready", ready), ("_normalised", normalised)):
            clean.setattr(module, name, right)
        want = dense_linear_attention(q, k, v, mask, causal=True, eps=1e-3)[0]
        full = dense_linear_attention(q, k, v, mask, eps=1e-3)[0]
    settings = {"causal": True, "chunk_size": 4, "eps": 1e-3}
    outs = [linear_attention(q, k, v, mask, **settings)]
    state = LinearState(3, 2, 5, 7, dtype=torch.float64)
    cuts = [(0, 6), (6, 7), (7, 11)]
    parts = [
        linear_attention(*(x[:, :, a:b] for x in (q, k, v)), mask[:, a:b], **settings, state=state)
        for a, b in cuts
    ]
    outs.append(torch.cat(parts, 2))
    differences = [(out - want).abs().max() for out in outs]
    differences.append((linear_attention(q, k, v, mask, eps=1e-3) - full).abs().max())
    return float(torch.stack(differences).max())


def test_without_a_bug_the_forms_agree():
    assert worst_difference() < 1e-10


@pytest.mark.parametrize("name", FORMS)
def test_a_bug_in_the_form_is_seen(name, monkeypatch):
    FORMS[name](monkeypatch)
    assert worst_difference() > 1e-5


# ------------------------------------------------------------------------------------------------
# The backward pass, which has no twin in autograd: gradients alone must tell


def backward_without(term: str) -> Callable[..., tuple[Tensor, ...]]:
    """The backward pass of the chunks with one of its terms left out."""

    def backward(ctx: object, d_out: Tensor, d_end: Tensor) -> tuple[Tensor, ...]:
        q, k, values, start = ctx.saved_tensors  # type: ignore[attr-defined]
        products, weights = inside(d_out, values), inside(q, k)
        before = states(k, values, start)[:, :, :-1]
        gifts = q.mT @ d_out
        asked = torch.cat([gifts, d_end[:, :, None]], 2).flip(2).cumsum(2).flip(2)
        later = asked[:, :, 1:]
        terms = {
            "state into q": d_out @ before.mT,
            "chunk into q": products @ k,
            "later chunks into k": values @ later.mT,
            "chunk into k": products.mT @ q,
            "later chunks into v": k @ later,
            "chunk into v": weights.mT @ d_out,
        }
        if term in terms:
            terms[term] = torch.zeros_like(terms[term])
        t = list(terms.values())
        return t[0] + t[1], t[2] + t[3], t[4] + t[5], asked[:, :, 0]

    return backward


@pytest.mark.parametrize(
    "term",
    [
        "nothing",
        "state into q",
        "chunk into q",
        "later chunks into k",
        "chunk into k",
        "later chunks into v",
        "chunk into v",
    ],
)
def test_a_term_missing_from_the_backward_pass_is_seen(term, monkeypatch):
    monkeypatch.setattr(module._ChunkedProduct, "backward", staticmethod(backward_without(term)))
    q, k, v = (randn(1, 1, 9, 3, seed=s).exp().requires_grad_() for s in (1, 2, 3))
    w = randn(1, 1, 9, 3, seed=4)
    got, want = (
        torch.autograd.grad((out * w).sum(), (q, k, v))
        for out in (
            linear_attention(q, k, v, causal=True, chunk_size=2),
            dense_linear_attention(q, k, v, causal=True)[0],
        )
    )
    worst = max(float((a - b).abs().max()) for a, b in zip(got, want, strict=True))
    assert worst < 1e-10 if term == "nothing" else worst > 1e-3


# ------------------------------------------------------------------------------------------------
# Features, against the public layer


positive, projected = module.positive_features, module._projected


def features_replaced(wrong: Callable[..., Tensor]) -> Plant:
    return lambda patch: patch.setattr(module, "positive_features", wrong)


def exponent(x: Tensor, W: Tensor, *, half: float = 0.5, scale: float = -0.25) -> tuple[Tensor, Tensor]:
    x = x * x.size(-1) ** scale
    return x @ W.T, half * x.square().sum(-1, keepdim=True)


def hand_made(**slip: float) -> Callable[..., Tensor]:
    def features(x: Tensor, W: Tensor, *, is_query: bool, eps: float = 1e-4, **_: object) -> Tensor:
        products, size = exponent(x, W, **slip)
        shift = products.detach().amax((-1,) if is_query else (-2, -1), keepdim=True)
        return ((products - size - shift).exp() + eps) * W.size(0) ** -0.5

    return features


FEATURES: dict[str, Plant] = {
    "x not scaled": features_replaced(hand_made(scale=0.0)),
    "x scaled as a score is": features_replaced(hand_made(scale=-0.5)),
    "the square not halved": features_replaced(hand_made(half=1.0)),
    "the square forgotten": features_replaced(hand_made(half=0.0)),
    "keys shifted each by its own largest": features_replaced(
        lambda x, W, *, is_query, **more: positive(x, W, is_query=True, eps=1e-4)
    ),
    "eps dropped": features_replaced(
        lambda x, W, *, is_query, **more: positive(x, W, is_query=is_query, eps=0.0)
    ),
    "no shift": features_replaced(
        lambda x, W, *, is_query, **more: positive(x, W, is_query=is_query, stabilise=False, eps=1e-4)
    ),
}


def difference_from_the_public_layer() -> float:
    reference = public_layer(kind="positive", causal=False)
    x = randn(2, 13, 18, seed=1)
    return float((run_ours(from_public(reference), x)["out"] - reference(x)).detach().abs().max())


def test_written_out_without_a_slip_the_features_agree(monkeypatch):
    assert difference_from_the_public_layer() < 1e-10
    monkeypatch.setattr(module, "positive_features", hand_made())
    assert difference_from_the_public_layer() < 1e-10


@pytest.mark.parametrize("name", FEATURES)
def test_a_bug_in_the_features_is_seen(name, monkeypatch):
    FEATURES[name](monkeypatch)
    assert difference_from_the_public_layer() > 1e-4


# ------------------------------------------------------------------------------------------------
# Rows


def one_length_for_a_block(d: int, g: torch.Generator) -> Tensor:
    rows = torch.nn.functional.normalize(orthogonal_gaussian(d, d, generator=g), dim=-1)
    return rows * torch.randn(1, d, generator=g).norm()


def lengths_of_the_factor(d: int, g: torch.Generator) -> Tensor:
    return torch.nn.functional.normalize(orthogonal_gaussian(d, d, generator=g), dim=-1)


def test_lengths_that_are_not_drawn_anew_are_seen():
    assert "second moment" in problems_of_rows(rows_of_many_draws(lengths_of_the_factor))
    # one length for all rows of a block leaves each row Gaussian, but not the rows of a block together
    rows = rows_of_many_draws(one_length_for_a_block, count=4000)
    right = rows_of_many_draws(lambda d, g: orthogonal_gaussian(d, d, generator=g), count=4000)
    spread = [r.norm(dim=-1).std(dim=1).max().item() for r in (rows, right)]
    assert spread[0] < 1e-5 < spread[1]


def test_a_layer_that_scales_its_scores_is_not_this_one():
    """φ = elu + 1 is applied to q and k as they are: with 1/√Dh it is another function."""
    layer = LinearAttention(12, 3, eps=0.0).double()
    x = randn(1, 7, 12, seed=1)
    with torch.no_grad():
        right = layer(x)
        layer.q_proj.weight.mul_(0.5)
        layer.q_proj.bias.mul_(0.5)
        assert float((layer(x) - right).abs().max()) > 1e-4
