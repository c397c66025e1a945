"""Linear attention in its five forms, the features of Performers, and the layer.

Sizes are different primes, so that a swapped axis cannot pass.
"""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from linear_references import problems_of_rows, randn, random_tokens, rows_of_many_draws
from parity import loud_
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from textbook_code.layers.attention import Attention, split_heads
from textbook_code.layers.linear_attention import (
    FeatureMap,
    LinearAttention,
    LinearState,
    RandomFeatures,
    dense_linear_attention,
    elu_plus_one,
    linear_attention,
    orthogonal_gaussian,
    positive_features,
    prefix_sum_attention,
    relu_features,
    trigonometric_features,
)
from textbook_code.layers.positions import RotaryPositions

TIGHT = {"atol": 1e-10, "rtol": 1e-10}
seeds = st.integers(0, 2**31 - 1)


def features(
    B: int, H: int, K: int, T: int, S: int, M: int, Dv: int, *, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    phi_q, phi_k = elu_plus_one(randn(B, H, T, M, seed=seed)), elu_plus_one(randn(B, K, S, M, seed=seed + 1))
    v = randn(B, K, S, Dv, seed=seed + 2)
    return phi_q.requires_grad_(), phi_k.requires_grad_(), v.requires_grad_()


# ------------------------------------------------------------------------------------------------
# The forms


def by_loops(
    phi_q: Tensor, phi_k: Tensor, v: Tensor, token_mask: Tensor | None, *, causal: bool, eps: float = 0.0
) -> Tensor:
    """The definition, one number at a time."""
    phi_q, phi_k, v = phi_q.detach(), phi_k.detach(), v.detach()
    (B, H, T, _), (K, S) = phi_q.shape, phi_k.shape[1:3]
    out = torch.zeros(B, H, T, v.size(3), dtype=v.dtype)
    for b in range(B):
        for h in range(H):
            for t in range(T):
                seen = [
                    s for s in range(S) if (token_mask is None or token_mask[b, s]) and (not causal or s <= t)
                ]
                pairs = [
                    math.fsum(
                        float(x) * float(y)
                        for x, y in zip(phi_q[b, h, t], phi_k[b, h * K // H, s], strict=True)
                    )
                    for s in seen
                ]
                total = sum(pairs) + eps
                for s, pair in zip(seen, pairs, strict=True):
                    out[b, h, t] += pair / total * v[b, h * K // H, s]
    return out


@pytest.mark.parametrize("kv_heads", [6, 2, 1])
@pytest.mark.parametrize("causal", [False, True])
def test_is_the_definition(kv_heads, causal):
    S = 5 if causal else 7
    phi_q, phi_k, v = (x.detach() for x in features(3, 6, kv_heads, 5, S, 11, 2))
    for mask in (None, random_tokens(3, S, seed=3)):
        for eps in (0.0, 0.1):
            want = by_loops(phi_q, phi_k, v, mask, causal=causal, eps=eps)
            got = linear_attention(phi_q, phi_k, v, mask, causal=causal, chunk_size=2, eps=eps)
            torch.testing.assert_close(got, want, atol=1e-12, rtol=1e-12)


@given(
    sizes=st.permutations([2, 3, 5, 7, 11]),
    group=st.sampled_from([1, 2, 3]),
    chunk_size=st.integers(1, 13),
    masked=st.booleans(),
    seed=seeds,
)
def test_every_causal_form_gives_the_same_numbers_and_gradients(sizes, group, chunk_size, masked, seed):
    B, K, T, M, Dv = sizes
    phi_q, phi_k, v = features(B, K * group, K, T, T, M, Dv, seed=seed)
    mask = random_tokens(B, T, seed=seed) if masked else None
    dense, weights = dense_linear_attention(phi_q, phi_k, v, mask, causal=True)
    assert weights.shape == (B, K * group, T, T)
    state = LinearState(B, K, M, Dv, dtype=torch.float64)
    steps = [
        linear_attention(
            phi_q[:, :, t : t + 1],
            phi_k[:, :, t : t + 1],
            v[:, :, t : t + 1],
            None if mask is None else mask[:, t : t + 1],
            causal=True,
            state=state,
        )
        for t in range(T)
    ]
    outs = {
        "chunks": linear_attention(phi_q, phi_k, v, mask, causal=True, chunk_size=chunk_size),
        "prefix sums": prefix_sum_attention(phi_q, phi_k, v, mask),
        "steps": torch.cat(steps, 2),
    }
    w = randn(*dense.shape, seed=seed + 5)
    want = torch.autograd.grad((dense * w).sum(), (phi_q, phi_k, v))
    for name, out in outs.items():
        torch.testing.assert_close(out, dense, **TIGHT, msg=lambda m, name=name: f"{name}: {m}")
        for got, wanted in zip(torch.autograd.grad((out * w).sum(), (phi_q, phi_k, v)), want, strict=True):
            torch.testing.assert_close(got, wanted, **TIGHT, msg=lambda m, name=name: f"{name}: {m}")
    assert state.length == T


@given(
    sizes=st.permutations([2, 3, 5, 7, 11]), group=st.sampled_from([1, 2]), masked=st.booleans(), seed=seeds
)
def test_full_attention_equals_its_dense_form(sizes, group, masked, seed):
    B, K, T, S, M = sizes
    phi_q, phi_k, v = features(B, K * group, K, T, S, M, 13, seed=seed)
    mask = random_tokens(B, S, seed=seed) if masked else None
    dense, weights = dense_linear_attention(phi_q, phi_k, v, mask)
    out = linear_attention(phi_q, phi_k, v, mask)
    torch.testing.assert_close(out, dense, **TIGHT)
    sums = weights.sum(-1)
    sees = torch.ones_like(sums) if mask is None else mask.any(-1)[:, None, None].expand_as(sums).to(sums)
    torch.testing.assert_close(sums, sees)
    w = randn(*dense.shape, seed=seed + 5)
    grads = [torch.autograd.grad((x * w).sum(), (phi_q, phi_k, v)) for x in (out, dense)]
    for got, wanted in zip(*grads, strict=True):
        torch.testing.assert_close(got, wanted, **TIGHT)


@given(T=st.integers(2, 23), cut=st.integers(1, 22), chunk_size=st.integers(1, 9), seed=seeds)
def test_prefill_and_decode_equal_the_whole(T, cut, chunk_size, seed):
    cut = min(cut, T - 1)
    phi_q, phi_k, v = (x.detach() for x in features(2, 6, 3, T, T, 5, 7, seed=seed))
    mask = random_tokens(2, T, seed=seed)
    whole = linear_attention(phi_q, phi_k, v, mask, causal=True, chunk_size=4)
    state = LinearState(2, 3, 5, 7, dtype=torch.float64)
    parts = []
    for a, b in [(0, cut)] + [(t, t + 1) for t in range(cut, T)]:
        part = (x[:, :, a:b] for x in (phi_q, phi_k, v))
        parts.append(linear_attention(*part, mask[:, a:b], causal=True, chunk_size=chunk_size, state=state))
    torch.testing.assert_close(torch.cat(parts, 2), whole, **TIGHT)
    real = phi_k * mask[:, None, :, None]
    torch.testing.assert_close(state.S, real.mT @ v, **TIGHT)
    torch.testing.assert_close(state.z, real.sum(2), **TIGHT)


@pytest.mark.parametrize("T", [32, 33, 70])
def test_more_chunks_than_are_computed_side_by_side(T):
    phi_q, phi_k, v = features(2, 4, 2, T, T, 3, 5)
    mask = random_tokens(2, T, seed=1)
    outs = [
        linear_attention(phi_q, phi_k, v, mask, causal=True, chunk_size=2),
        dense_linear_attention(phi_q, phi_k, v, mask, causal=True)[0],
    ]
    torch.testing.assert_close(*outs, **TIGHT)
    w = randn(*outs[0].shape, seed=5)
    grads = [torch.autograd.grad((out * w).sum(), (phi_q, phi_k, v)) for out in outs]
    for got, want in zip(*grads, strict=True):
        torch.testing.assert_close(got, want, **TIGHT)


def test_gradcheck_of_chunks_a_step_and_the_state():
    """Also through the state: into the sums that a chunk begins with, and out of those it ends with."""
    B, H, K, T, M, Dv = 1, 4, 2, 7, 3, 2
    phi_q, phi_k, v = features(B, H, K, T, T, M, Dv)
    S, z = randn(B, K, M, Dv, seed=5).requires_grad_(), randn(B, K, M, seed=6).exp().requires_grad_()

    for length in (T, 1):

        def whole(q, k, v, S, z, length=length):
            state = LinearState(B, K, M, Dv)
            state.S, state.z = S, z
            cut = (x[:, :, :length] for x in (q, k, v))
            out = linear_attention(*cut, causal=True, chunk_size=3, state=state)
            return out, state.S, state.z

        assert torch.autograd.gradcheck(whole, (phi_q, phi_k, v, S, z))


def saved_bytes(run, *inputs: Tensor) -> int:
    """Bytes of the distinct tensors that a forward pass keeps for its backward pass, beside its inputs."""
    kept = {}

    def pack(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with saved_tensors_hooks(pack, lambda x: x):
        out = run()
    for x in inputs:
        kept.pop(x.untyped_storage().data_ptr(), None)
    assert out.requires_grad
    return sum(kept.values())


def test_the_backward_pass_keeps_no_states():
    d, C = 32, 32
    kept = {}
    for T in (256, 512):
        phi_q, phi_k, v = (x.detach().requires_grad_() for x in features(1, 1, 1, T, T, d, d))
        kept[T] = {
            "chunks": saved_bytes(
                lambda a=(phi_q, phi_k, v): linear_attention(*a, causal=True, chunk_size=C), phi_q, phi_k, v
            ),
            "prefix": saved_bytes(lambda a=(phi_q, phi_k, v): prefix_sum_attention(*a), phi_q, phi_k, v),
            "dense": saved_bytes(
                lambda a=(phi_q, phi_k, v): dense_linear_attention(*a, causal=True)[0], phi_q, phi_k, v
            ),
        }
    for T, bytes_of in kept.items():
        assert bytes_of["chunks"] <= 8 * (
            4 * T * (d + 2) + 2 * d * (d + 1)
        )  # a few arrays of (T, d), one state
        assert bytes_of["prefix"] >= 8 * T * d * d
        assert bytes_of["dense"] >= 8 * T * T
    assert kept[512]["chunks"] < 2.1 * kept[256]["chunks"]
    assert kept[512]["prefix"] > 8 * kept[512]["chunks"]


def test_causality_is_exact_and_the_future_has_no_gradient():
    phi_q, phi_k, v = features(2, 6, 3, 13, 13, 5, 7)
    other_k, other_v = phi_k.detach().clone(), v.detach().clone()
    other_k[:, :, 8:], other_v[:, :, 8:] = 100.0, -3.0
    for C in (3, 4, 64):
        a = linear_attention(phi_q, phi_k, v, causal=True, chunk_size=C)
        b = linear_attention(phi_q, other_k, other_v, causal=True, chunk_size=C)
        assert torch.equal(a[:, :, :8], b[:, :, :8])
        assert bool((a[:, :, 8:] != b[:, :, 8:]).any())
        for grad in torch.autograd.grad(a[:, :, :8].square().sum(), (phi_k, v)):
            assert bool((grad[:, :, 8:] == 0).all())


@pytest.mark.parametrize("causal", [False, True])
def test_padding_may_hold_anything_and_a_query_that_sees_nothing_gets_zeros(causal):
    phi_q, phi_k, v = features(3, 2, 2, 7, 7, 5, 11)
    mask = random_tokens(3, 7, seed=1)
    mask[1, 0] = False
    out = linear_attention(phi_q, phi_k, v, mask, causal=causal, chunk_size=3)
    loud_k = phi_k.detach().masked_fill(~mask[:, None, :, None], 1e6)
    loud_v = v.detach().masked_fill(~mask[:, None, :, None], -1e6)
    assert torch.equal(out, linear_attention(phi_q, loud_k, loud_v, mask, causal=causal, chunk_size=3))
    assert bool((out[2] == 0).all()), "a text of padding"
    if causal:
        assert bool((out[1, :, 0] == 0).all()), "padding in front"
    grads = torch.autograd.grad(out.square().sum(), (phi_q, phi_k, v))
    assert all(bool(g.isfinite().all()) for g in grads)
    assert bool((grads[1][~mask[:, None, :, None].expand_as(grads[1])] == 0).all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_summed_in_float32(dtype):
    phi_q, phi_k, v = (x.detach().to(dtype) for x in features(1, 1, 1, 1500, 1500, 7, 5))
    out = linear_attention(phi_q, phi_k, v, causal=True)
    assert out.dtype == dtype
    wide = linear_attention(phi_q.float(), phi_k.float(), v.float(), causal=True)
    assert torch.equal(out, wide.to(dtype))
    narrow = phi_k.cumsum(2).float()[0, 0, -1]  # what a sum of halves would be
    assert float((narrow - phi_k.float().sum(2)[0, 0]).abs().max()) > 0.25


def test_under_autocast_the_sums_stay_in_float32():
    ours = LinearAttention(24, 6, causal=True, chunk_size=8)
    x = randn(2, 40, 24, seed=1, dtype=torch.float32)
    state = ours.make_state(2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = ours(x, state=state)
        phi = elu_plus_one(split_heads(ours.k_proj(x), ours.num_kv_heads))
    out.float().square().sum().backward()
    assert out.dtype == torch.bfloat16 and state.S.dtype == torch.float32
    torch.testing.assert_close(state.z, phi.float().sum(2))
    assert all(bool(p.grad.isfinite().all()) for p in ours.parameters())


def test_the_weights_have_no_more_rank_than_features():
    phi_q, phi_k, v = (x.detach() for x in features(1, 1, 1, 29, 29, 5, 3))
    weights = dense_linear_attention(phi_q, phi_k, v)[1]
    assert int(torch.linalg.matrix_rank(weights[0, 0])) == 5
    softmax = (phi_q.detach() @ phi_k.mT).softmax(-1)
    assert int(torch.linalg.matrix_rank(softmax[0, 0])) > 20


# ------------------------------------------------------------------------------------------------
# Features


def test_elu_plus_one():
    x = torch.tensor([-2.0, -0.5, 0.0, 0.5, 3.0], dtype=torch.float64)
    want = torch.tensor([math.exp(-2), math.exp(-0.5), 1, 1.5, 4], dtype=torch.float64)
    torch.testing.assert_close(elu_plus_one(x), want)


@given(m=st.integers(1, 23), d=st.integers(1, 7), seed=seeds)
def test_rows_are_at_right_angles_in_blocks_and_of_random_length(m, d, seed):
    rows = orthogonal_gaussian(m, d, generator=torch.Generator().manual_seed(seed))
    assert rows.shape == (m, d)
    lengths = rows.norm(dim=1)
    assert len(set(lengths.tolist())) == m
    for start in range(0, m, d):
        unit = rows[start : start + d] / lengths[start : start + d, None]
        torch.testing.assert_close(unit @ unit.T, torch.eye(len(unit)), atol=1e-5, rtol=0)


def test_each_row_is_gaussian():
    rows = rows_of_many_draws(lambda d, g: orthogonal_gaussian(d, d, generator=g))
    assert problems_of_rows(rows) == []


def test_a_row_is_not_gaussian_with_the_signs_of_lapack_or_one_length_for_all():
    def signs_as_they_come(d: int, g: torch.Generator) -> Tensor:
        q = torch.linalg.qr(torch.randn(d, d, generator=g)).Q
        return q.T * torch.randn(d, d, generator=g).norm(dim=1, keepdim=True)

    def lengths_not_drawn(d: int, g: torch.Generator) -> Tensor:
        return d**0.5 * torch.nn.functional.normalize(orthogonal_gaussian(d, d, generator=g), dim=-1)

    assert {"mean", "feature"} <= set(problems_of_rows(rows_of_many_draws(signs_as_they_come)))
    assert "lengths" in problems_of_rows(rows_of_many_draws(lengths_not_drawn))


@pytest.mark.parametrize("orthogonal", [True, False])
@pytest.mark.parametrize("kind", ["positive", "trigonometric"])
def test_the_kernel_is_estimated_without_bias(kind, orthogonal):
    """The mean over many draws is exp(q·k/√d), to within five standard errors; a missing scale is not."""
    q, k = (0.6 * randn(1, 1, 3, 8, seed=s, dtype=torch.float32) for s in (1, 2))  # loud ones have long tails
    generator = torch.Generator().manual_seed(0)
    draws = []
    for _ in range(2000):
        W = (
            orthogonal_gaussian(8, 8, generator=generator)
            if orthogonal
            else torch.randn(8, 8, generator=generator)
        )
        if kind == "positive":
            phi_q, phi_k = (
                positive_features(x, W, is_query=x is q, stabilise=False, eps=0.0) for x in (q, k)
            )
        else:
            phi_q, phi_k = trigonometric_features(q, W), trigonometric_features(k, W)
        draws.append((phi_q @ phi_k.mT)[0, 0])
    estimates = torch.stack(draws)
    error = estimates.std(0) / len(draws) ** 0.5
    mean = estimates.mean(0)
    assert bool(((mean - (q @ k.mT / 8**0.5).exp()[0, 0]).abs() < 5 * error).all())
    assert bool(((mean - (q @ k.mT).exp()[0, 0]).abs() > 5 * error).any())


def test_orthogonal_rows_have_the_smaller_variance():
    """By about a seventh where ‖q̂ + k̂‖ = 1, in sixteen dimensions; for larger vectors the gain vanishes."""
    x = torch.nn.functional.normalize(randn(1, 1, 1, 16, seed=1, dtype=torch.float32), dim=-1)
    generator = torch.Generator().manual_seed(0)
    spread = {}
    for orthogonal in (True, False):
        draw = orthogonal_gaussian if orthogonal else torch.randn
        estimates = []
        for _ in range(6000):
            phi = positive_features(
                x, draw(16, 16, generator=generator), is_query=True, stabilise=False, eps=0.0
            )
            estimates.append((phi @ phi.mT).item())
        spread[orthogonal] = torch.tensor(estimates).var().item()
    assert spread[True] < 0.93 * spread[False]


def test_without_eps_the_shifts_cancel_and_with_it_padding_has_no_part():
    W = orthogonal_gaussian(11, 7, generator=torch.Generator().manual_seed(0)).double()
    q, k, v = randn(3, 2, 5, 7, seed=1), randn(3, 2, 13, 7, seed=2), randn(3, 2, 13, 3, seed=3)
    outs = [
        linear_attention(
            positive_features(q, W, is_query=True, stabilise=s, eps=0.0),
            positive_features(k, W, is_query=False, stabilise=s, eps=0.0),
            v,
        )
        for s in (True, False)
    ]
    torch.testing.assert_close(*outs)
    mask = random_tokens(3, 13, seed=4)
    loud = k.masked_fill(~mask[:, None, :, None], 30.0)
    phi = [positive_features(x, W, is_query=False, token_mask=mask) for x in (k, loud)]
    assert bool(phi[0].isfinite().all()), "also of a text of padding"
    torch.testing.assert_close(*phi, atol=0, rtol=0)
    assert not torch.allclose(positive_features(loud, W, is_query=False)[:, :, :1], phi[0][:, :, :1])


def test_large_queries_and_keys_do_not_overflow():
    W = orthogonal_gaussian(64, 64, generator=torch.Generator().manual_seed(0))
    x = 40 * randn(1, 2, 17, 64, seed=1, dtype=torch.float32)
    for features_of in (
        positive_features(x, W, is_query=True),
        positive_features(x, W, is_query=False),
        positive_features(
            W[None, None] * 64**0.25, W, is_query=False, stabilise=False
        ),  # the largest there is
    ):
        assert bool(features_of.isfinite().all())


@pytest.mark.parametrize("kind", ["positive", "relu", "trigonometric"])
def test_a_map_of_random_features_is_its_function(kind):
    phi = RandomFeatures(7, 11, kind=kind, generator=torch.Generator().manual_seed(3))
    x = randn(2, 3, 5, 7, seed=1, dtype=torch.float32)
    W = phi.projection
    if kind == "positive":
        want = positive_features(x, W, is_query=True), positive_features(x, W, is_query=False)
    elif kind == "relu":
        want = (relu_features(x, W),) * 2
    else:
        want = (trigonometric_features(x, W),) * 2
    assert torch.equal(phi.queries(x), want[0]) and torch.equal(phi.keys(x), want[1])
    assert phi.looks_ahead == (kind == "positive")
    assert "projection" in phi.state_dict()


def test_redrawing_changes_the_rows_in_place_and_repeats_with_a_generator():
    phi = RandomFeatures(5, 8)
    before, place = phi.projection.clone(), phi.projection.data_ptr()
    phi.redraw(generator=torch.Generator().manual_seed(1))
    first = phi.projection.clone()
    assert phi.projection.data_ptr() == place and not bool((first == before).any())
    phi.redraw(generator=torch.Generator().manual_seed(1))
    assert torch.equal(phi.projection, first)
    independent = RandomFeatures(5, 8, orthogonal=False).projection
    assert float((independent[0] @ independent[1]).abs()) > 1e-4


# ------------------------------------------------------------------------------------------------
# The layer


def layer(*, seed: int = 0, **settings: object) -> LinearAttention:
    return loud_(LinearAttention(24, 6, **settings), seed=seed).double().eval()  # type: ignore[arg-type,return-value]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kv_heads", [6, 2, 1])
def test_the_layer_takes_attentions_weights_and_is_written_out(causal, kv_heads):
    attn = loud_(Attention(24, 6, num_kv_heads=kv_heads)).double()
    ours = LinearAttention.from_attention(attn, causal=causal, chunk_size=3, eps=0.0)
    ours.load_state_dict(attn.state_dict())  # the same names, no more and no fewer
    x, mask = randn(3, 7, 24, seed=1), random_tokens(3, 7, seed=2)
    rotary = RotaryPositions(4)(torch.arange(7), torch.float64)
    for turn in (None, rotary):
        out = ours(x, token_mask=mask, rotary=turn)

        def heads(proj, x=x):
            return proj(x).view(3, 7, -1, 4).transpose(1, 2)

        from textbook_code.layers.positions import rotate

        q, k, v = heads(attn.q_proj), heads(attn.k_proj), heads(attn.v_proj)
        if turn is not None:
            q, k = rotate(q, *turn), rotate(k, *turn)
        mixed = by_loops(elu_plus_one(q), elu_plus_one(k), v, mask, causal=causal)
        torch.testing.assert_close(out, attn.out_proj(mixed.transpose(1, 2).flatten(2)))


def test_from_attention_copies_and_keeps_dtype_and_missing_biases():
    attn = Attention(24, 6, num_kv_heads=2, head_dim=5, bias=False).double()
    ours = LinearAttention.from_attention(attn, feature_map=RandomFeatures(5, 9))
    assert ours.q_proj.bias is None and ours.head_dim == 5 and ours.num_kv_heads == 2
    assert torch.equal(ours.k_proj.weight, attn.k_proj.weight)
    assert ours.k_proj.weight.data_ptr() != attn.k_proj.weight.data_ptr()
    assert {p.dtype for p in ours.parameters()} == {torch.float64}
    with pytest.raises(ValueError, match="attn: expected self-attention, got d_context=7"):
        LinearAttention.from_attention(Attention(24, 6, d_context=7))


def causal_maps() -> list[object]:
    return [elu_plus_one, RandomFeatures(4, 9, stabilise_keys=False), RandomFeatures(4, 9, kind="relu")]


@pytest.mark.parametrize("which", [0, 1, 2], ids=["elu", "positive", "relu"])
def test_the_layer_step_by_step_and_after_a_prompt(which):
    ours = layer(num_kv_heads=2, causal=True, chunk_size=4, feature_map=causal_maps()[which])
    x = randn(2, 11, 24, seed=1)
    whole = ours(x)
    for cuts in ([0, *range(1, 12)], [0, 7, 8, 9, 10, 11], [0, 3, 11]):
        state = ours.make_state(2)
        parts = [ours(x[:, a:b], state=state) for a, b in pairwise(cuts)]
        torch.testing.assert_close(torch.cat(parts, 1), whole, **TIGHT)
        assert state.length == 11
    size = state.nbytes
    ours(x, state=state)
    assert state.nbytes == size == 8 * 2 * 2 * state.z.size(2) * (4 + 1)


@pytest.mark.parametrize("which", [0, 1, 2], ids=["elu", "positive", "relu"])
def test_the_layer_is_causal_to_the_bit(which):
    ours = layer(causal=True, chunk_size=4, feature_map=causal_maps()[which])
    x = randn(2, 11, 24, seed=1)
    changed = x.clone()
    changed[:, 6:] *= 50
    assert torch.equal(ours(x)[:, :6], ours(changed)[:, :6])


def test_a_ragged_batch_is_each_text_alone():
    for causal in (False, True):
        maps = [elu_plus_one, RandomFeatures(4, 9, stabilise_keys=not causal)]
        for feature_map in maps:
            ours = layer(causal=causal, chunk_size=4, feature_map=feature_map)
            x, lengths = randn(3, 11, 24, seed=1), (11, 7, 2)
            mask = torch.arange(11)[None] < torch.tensor(lengths)[:, None]
            out = ours(x, token_mask=mask)
            for row, n in enumerate(lengths):
                torch.testing.assert_close(out[row : row + 1, :n], ours(x[row : row + 1, :n]), **TIGHT)


def test_without_causality_order_does_not_matter():
    ours, x = layer(), randn(2, 7, 24, seed=1)
    order = torch.tensor([3, 1, 6, 0, 5, 2, 4])
    torch.testing.assert_close(ours(x)[:, order], ours(x[:, order]))


def test_states_follow_the_hypotheses_that_are_kept():
    ours, x = layer(causal=True), randn(3, 5, 24, seed=1)
    state = ours.make_state(3)
    ours(x[:, :4], state=state)
    state.reorder(torch.tensor([2, 0, 2]))
    out = ours(x[torch.tensor([2, 0, 2]), 4:], state=state)
    torch.testing.assert_close(out, ours(x)[torch.tensor([2, 0, 2]), 4:])


def test_a_layer_learns_through_chunks_and_states():
    """Gradients of all parameters, through a carried state, are those of the whole."""
    ours, x = layer(causal=True, chunk_size=3, num_kv_heads=2), randn(2, 10, 24, seed=1)
    grads = []
    for cuts in ([0, 10], [0, 4, 5, 10]):
        state = ours.make_state(2)
        out = torch.cat([ours(x[:, a:b], state=state) for a, b in pairwise(cuts)], 1)
        grads.append(torch.autograd.grad(out.square().sum(), list(ours.parameters())))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, **TIGHT)


# ------------------------------------------------------------------------------------------------
# What is refused


def test_wrong_arguments_are_named():
    q, k, v = (x.detach() for x in features(2, 6, 3, 7, 7, 5, 11))
    good = torch.ones(2, 7, dtype=torch.bool)
    refused = [
        (lambda: linear_attention(q[0], k, v), ValueError, r"phi_q: expected shape \(B, H, T, M\)"),
        (lambda: linear_attention(q, k[..., :4], v), ValueError, "phi_k: expected shape .* M = 5"),
        (lambda: linear_attention(q, k, v[:, :, :6]), ValueError, "v: expected shape .* S = 7"),
        (lambda: linear_attention(q[:, :5], k, v), ValueError, "phi_k: number of heads: expected a positive"),
        (lambda: linear_attention(q, k.float(), v), TypeError, "phi_k: expected torch.float64"),
        (lambda: linear_attention(q.long(), k.long(), v), TypeError, "phi_q: expected a floating-point"),
        (lambda: linear_attention(q, k, v.long()), TypeError, "v: expected a floating-point"),
        (
            lambda: linear_attention(q, k[:, :, :0], v[:, :, :0]),
            ValueError,
            "phi_k: expected at least one key",
        ),
        (lambda: linear_attention(q[:, :, :6], k, v, causal=True), ValueError, "causal: .*T=6, S=7"),
        (lambda: linear_attention(q, k, v, causal=True, chunk_size=0), ValueError, "chunk_size: .*got 0"),
        (lambda: linear_attention(q, k, v, good.float()), TypeError, "token_mask: expected a bool"),
        (lambda: linear_attention(q, k, v, good[:, :6]), ValueError, "token_mask: expected shape .* S = 7"),
        (lambda: linear_attention(q, k, v, good[:, None, None]), ValueError, "token_mask: expected shape"),
        (
            lambda: linear_attention(q, k, v, state=LinearState(2, 3, 5, 11)),
            ValueError,
            "state: expected None",
        ),
        (
            lambda: linear_attention(q, k, v, causal=True, state=LinearState(2, 3, 4, 11)),
            ValueError,
            r"state.S: expected shape \(B, K, M, Dv\) with .* M = 5",
        ),
        (lambda: LinearState(2, 3, 0, 11), ValueError, "num_features: expected at least 1, got 0"),
        (lambda: LinearState(1, 1, 1, 1).reorder(torch.ones(1)), TypeError, "rows: expected a tensor of int"),
        (lambda: orthogonal_gaussian(0, 4), ValueError, "num_rows: expected at least 1, got 0"),
        (lambda: RandomFeatures(4, 0), ValueError, "num_features: expected at least 1, got 0"),
        (lambda: RandomFeatures(0, 4), ValueError, "head_dim: expected at least 1, got 0"),
        (lambda: RandomFeatures(4, 4, kind="cosine"), ValueError, "kind: expected one of positive, relu"),
        (lambda: relu_features(q, torch.ones(3, 4)), ValueError, "projection: expected shape .* Dh = 5"),
        (lambda: relu_features(q.long(), torch.ones(3, 5)), TypeError, "x: expected a floating-point"),
        (
            lambda: positive_features(k, torch.ones(3, 5), is_query=False, token_mask=good.int()),
            TypeError,
            "token_mask: expected a bool",
        ),
        (lambda: LinearAttention(24, 5), ValueError, "num_heads: expected a positive divisor"),
        (lambda: LinearAttention(24, 6, num_kv_heads=4), ValueError, "num_kv_heads"),
        (lambda: LinearAttention(24, 6, head_dim=0), ValueError, "head_dim: expected a positive width"),
        (lambda: LinearAttention(24, 6, chunk_size=0), ValueError, "chunk_size: expected at least 1, got 0"),
        (
            lambda: LinearAttention(24, 6, causal=True, feature_map=RandomFeatures(4, 8)),
            ValueError,
            "feature_map: its keys are shifted",
        ),
        (lambda: LinearAttention(24, 6)(torch.ones(2, 7, 23)), ValueError, "x: expected shape .* D = 24"),
        (
            lambda: LinearAttention(24, 6)(torch.ones(2, 7, 24).double()),
            TypeError,
            "x: expected torch.float32",
        ),
        (
            lambda: LinearAttention(24, 6)(torch.ones(2, 7, 24), token_mask=good[:, None]),
            ValueError,
            "token_mask: expected shape",
        ),
        (
            lambda: LinearAttention(24, 6)(torch.ones(2, 7, 24), state=LinearState(2, 6, 4, 4)),
            ValueError,
            "state: expected None without causal",
        ),
    ]
    for call, error, message in refused:
        with pytest.raises(error, match=message):
            call()


def test_features_that_may_be_negative_are_the_callers_business():
    """Nothing is refused: with φ(x) = x weights are negative and sum to one only in sum."""
    ours = layer(feature_map=lambda x: x, eps=0.0)
    x = randn(1, 7, 24, seed=1)
    assert bool(ours(x).isfinite().all())
    assert not isinstance(ours.feature_map, RandomFeatures) and isinstance(ours.feature_map, FeatureMap)
    q, k = randn(1, 1, 7, 4, seed=1), randn(1, 1, 7, 4, seed=2)
    assert bool((dense_linear_attention(q, k, k)[1] < 0).any())
