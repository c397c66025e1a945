"""Attention against torch's own, and the properties that any attention must have.

Sizes are different primes, so that a swapped axis cannot pass.
"""

from __future__ import annotations

import math
from functools import reduce
from itertools import pairwise
from operator import and_

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from parity import Parity, loud_, parity_row
from torch import Tensor, nn

from textbook_code.layers.attention import Attention, attention, fused_attention
from textbook_code.layers.cache import KVCache
from textbook_code.layers.masks import causal_mask, key_mask

primes = st.permutations([2, 3, 5, 7, 11])
seeds = st.integers(0, 2**31 - 1)


def randn(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def random_mask(*shape: int, seed: int) -> Tensor:
    """About half of the pairs allowed, and one whole row of the first batch forbidden."""
    mask = torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) < 0.5
    mask[0, ..., 0, :] = False
    return mask


def qkv(B: int, H: int, K: int, T: int, S: int, Dh: int, *, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (
        randn(B, H, T, Dh, seed=seed),
        randn(B, K, S, Dh, seed=seed + 1),
        randn(B, K, S, Dh, seed=seed + 2),
    )
    return q.requires_grad_(), k.requires_grad_(), v.requires_grad_()


def written_out(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, **kwargs: float) -> Tensor:
    return attention(q, k, v, mask, **kwargs)[0]


both_paths = pytest.mark.parametrize("path", [written_out, fused_attention], ids=["written-out", "fused"])
both_modules = pytest.mark.parametrize("need_weights", [True, False], ids=["written-out", "fused"])


def make(
    d_model: int, num_heads: int, *, seed: int = 0, dtype: torch.dtype = torch.float64, **kw: int
) -> Attention:
    """An Attention with loud weights."""
    return loud_(Attention(d_model, num_heads, **kw), seed=seed).to(dtype).eval()  # type: ignore[return-value]


def run(attn: Attention, x: Tensor, *args: Tensor, need_weights: bool, **kw: object) -> Tensor:
    out = attn(x, *args, need_weights=need_weights, **kw)
    return out[0] if need_weights else out


# ------------------------------------------------------------------------------------------------
# The function, against loops and against torch


def by_loops(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """The definition, one number at a time, sharing nothing with the package or torch's kernel."""
    B, H, T, _ = q.shape
    S, group = k.size(2), H // k.size(1)
    if mask is not None:
        mask = mask.expand(B, H, T, S)
    out = torch.zeros(B, H, T, v.size(3), dtype=q.dtype)
    for b in range(B):
        for h in range(H):
            for t in range(T):
                seen = [s for s in range(S) if mask is None or mask[b, h, t, s]]
                scores = [
                    scale
                    * sum(float(x) * float(y) for x, y in zip(q[b, h, t], k[b, h // group, s], strict=True))
                    for s in seen
                ]
                total = sum(math.exp(score) for score in scores)
                for s, score in zip(seen, scores, strict=True):
                    out[b, h, t] += math.exp(score) / total * v[b, h // group, s]
    return out


@both_paths
@pytest.mark.parametrize("kv_heads", [6, 3, 2, 1])
@pytest.mark.parametrize("scale", [None, 0.7])
def test_is_the_definition(path, kv_heads, scale):
    q, k, v = (x.detach() for x in qkv(2, 6, kv_heads, 3, 5, 7))
    mask = random_mask(2, 1, 3, 5, seed=3)
    for m in (None, mask, mask.expand(2, 6, 3, 5), causal_mask(3, 5)):
        expected = by_loops(q, k, v, m, 7**-0.5 if scale is None else scale)
        torch.testing.assert_close(path(q, k, v, m, scale=scale), expected, atol=1e-12, rtol=1e-12)


@given(sizes=primes, group=st.sampled_from([1, 2, 3]), masked=st.booleans(), seed=seeds)
def test_written_out_equals_fused_in_values_and_gradients(sizes, group, masked, seed):
    B, K, T, S, Dh = sizes
    q, k, v = qkv(B, K * group, K, T, S, Dh, seed=seed)
    mask = random_mask(B, 1, T, S, seed=seed) if masked else None
    w = randn(B, K * group, T, Dh, seed=seed + 5)
    got = [written_out(q, k, v, mask), fused_attention(q, k, v, mask)]
    torch.testing.assert_close(*got, atol=1e-12, rtol=1e-12)
    grads = [torch.autograd.grad((out * w).sum(), (q, k, v)) for out in got]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, atol=1e-11, rtol=1e-11)


@parity_row(
    "attention",
    "scaled-dot-product",
    "torch.nn.functional.scaled_dot_product_attention",
    page="attention-scaled",
)
def test_scaled_dot_product(parity):
    for seed, (H, K) in enumerate([(3, 3), (6, 2), (5, 1)]):
        q, k, v = qkv(2, H, K, 11, 13, 7, seed=seed)
        for mask in (None, causal_mask(11, 13), random_mask(2, 1, 11, 13, seed=seed)):
            theirs = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=H != K)
            for ours in (written_out(q, k, v, mask), fused_attention(q, k, v, mask)):
                parity.record({"out": ours}, {"out": theirs})
                w = randn(*theirs.shape, seed=seed + 5)
                grads = [
                    torch.autograd.grad((x * w).sum(), (q, k, v), retain_graph=True) for x in (ours, theirs)
                ]
                parity.record(*(dict(zip("qkv", g, strict=True)) for g in grads), gradients=True)


def test_weights_are_a_distribution_over_what_may_be_seen():
    q, k, v = qkv(2, 3, 3, 5, 7, 11)
    mask = random_mask(2, 1, 5, 7, seed=1)
    out, weights = attention(q, k, v, mask)
    assert weights.shape == (2, 3, 5, 7)
    assert bool((weights[~mask.expand_as(weights)] == 0).all())
    sums = weights.sum(-1)
    sees = mask.any(-1).expand_as(sums)
    torch.testing.assert_close(sums, sees.to(sums.dtype))
    assert bool((~sees).any())
    torch.testing.assert_close(out, weights @ v)


@both_paths
def test_a_value_may_have_another_width(path):
    q, k, v = randn(2, 3, 5, 7, seed=0), randn(2, 3, 11, 7, seed=1), randn(2, 3, 11, 13, seed=2)
    torch.testing.assert_close(path(q, k, v), by_loops(q, k, v, None, 7**-0.5))


@both_paths
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_row_that_sees_nothing_is_zero_and_its_gradients_are_finite(path, dtype):
    q, k, v = (x.detach().to(dtype).requires_grad_() for x in qkv(2, 3, 3, 5, 7, 11))
    mask = torch.ones(2, 1, 5, 7, dtype=torch.bool)
    mask[0, :, 2] = False
    mask[1] = False  # a whole text of padding
    out = path(q, k, v, mask)
    assert bool((out[0, :, 2] == 0).all()) and bool((out[1] == 0).all())
    assert bool((out[0, :, [0, 1, 3, 4]] != 0).all())
    grads = torch.autograd.grad(out.float().square().sum() + out.float().sum(), (q, k, v))
    assert all(bool(g.isfinite().all()) for g in grads)
    assert all(bool((g[1] == 0).all()) for g in grads)
    assert bool((grads[0][0, :, 2] == 0).all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_softmax_of_half_precision_is_taken_in_float32(dtype):
    q, k, v = (x.detach().to(dtype) for x in qkv(2, 3, 3, 5, 101, 7))
    scores = q @ k.transpose(-2, -1) * 7**-0.5
    _, weights = attention(q, k, v)
    assert weights.dtype == dtype
    wide = scores.float().softmax(-1)
    assert torch.equal(weights, wide.to(dtype))
    narrow = (scores.exp() / scores.exp().sum(-1, keepdim=True)).float()  # what half precision would give
    assert float((narrow - wide).abs().max()) > 2 * float((weights.float() - wide).abs().max())


def test_dropout_acts_on_the_weights_and_keeps_their_mean():
    q, k = torch.zeros(1, 1, 1, 2), torch.zeros(1, 1, 1000, 2)
    v = torch.ones(1, 1, 1000, 2)
    torch.manual_seed(0)
    for path in (written_out, fused_attention):
        out = torch.stack([path(q, k, v, dropout=0.25) for _ in range(20)])
        assert out.std() > 0
        assert abs(float(out.mean()) - 1) < 0.02
    _, weights = attention(q, k, v, dropout=0.25)
    torch.testing.assert_close(weights, torch.full_like(weights, 1e-3))  # before dropout


# ------------------------------------------------------------------------------------------------
# Masks


@given(T=st.integers(1, 13), more=st.integers(0, 13))
def test_causal_mask_is_aligned_at_the_bottom_right(T, more):
    from torch.nn.attention.bias import causal_lower_right

    S = T + more
    mask = causal_mask(T, S)
    assert mask.dtype == torch.bool and mask.shape == (T, S)
    assert all(bool(mask[i, j]) == (j <= i + S - T) for i in range(T) for j in range(S))
    assert bool(mask[-1].all())  # the newest query sees everything
    v = torch.eye(S, dtype=torch.float64)[None, None]
    zeros = torch.zeros(1, 1, S, S, dtype=torch.float64)
    weights = F.scaled_dot_product_attention(zeros[:, :, :T], zeros, v, attn_mask=causal_lower_right(T, S))
    torch.testing.assert_close(attention(zeros[:, :, :T], zeros, v, mask)[0], weights)


def test_key_mask_broadcasts_over_heads_and_queries():
    token_mask = torch.tensor([[True, True, False], [True, False, False]])
    mask = key_mask(token_mask)
    assert mask.shape == (2, 1, 1, 3)
    assert torch.equal(mask.expand(2, 5, 7, 3)[1, 4, 6], token_mask[1])
    combined = causal_mask(3) & mask
    assert combined.shape == (2, 1, 3, 3)
    assert combined[0, 0].tolist() == [[True, False, False], [True, True, False], [True, True, False]]


# ------------------------------------------------------------------------------------------------
# The module, against torch.nn.MultiheadAttention


def from_torch(reference: nn.MultiheadAttention) -> Attention:
    """Ours with the weights of torch's, whose q, k and v are stacked unless their widths differ."""
    d_model, kdim = reference.embed_dim, reference.kdim
    ours = Attention(d_model, reference.num_heads, d_context=kdim).to(reference.out_proj.weight.dtype)
    if reference.in_proj_weight is not None:
        weights = reference.in_proj_weight.chunk(3)
    else:
        weights = (reference.q_proj_weight, reference.k_proj_weight, reference.v_proj_weight)
    biases = reference.in_proj_bias.chunk(3)
    projections = (ours.q_proj, ours.k_proj, ours.v_proj, ours.out_proj)
    weights, biases = (*weights, reference.out_proj.weight), (*biases, reference.out_proj.bias)
    with torch.no_grad():
        for linear, weight, bias in zip(projections, weights, biases, strict=True):
            linear.weight.copy_(weight)
            linear.bias.copy_(bias)
    return ours


def parity_with_torch(
    parity: Parity,
    reference: nn.MultiheadAttention,
    x: Tensor,
    context: Tensor | None,
    masks: list[tuple[Tensor | None, Tensor | None]],
) -> None:
    """Compare under each (attn_mask, token_mask), by both of our paths; torch's True means forbidden."""
    reference = loud_(reference.double())
    source = x if context is None else context
    for attn_mask, token_mask in masks:
        parts = [
            m for m in (attn_mask, None if token_mask is None else key_mask(token_mask)) if m is not None
        ]
        mask = reduce(and_, parts) if parts else None
        forbidden = None if attn_mask is None else ~attn_mask
        padding = None if token_mask is None else ~token_mask
        for names in (("out", "weights"), ("out",)):

            def ours(m: Attention, mask=mask, names=names) -> dict[str, Tensor]:
                out = m(x, context, attn_mask=mask, need_weights="weights" in names)
                return dict(zip(names, out if "weights" in names else (out,), strict=True))

            def theirs(r: nn.MultiheadAttention, forbidden=forbidden, padding=padding, names=names):
                both = r(
                    x,
                    source,
                    source,
                    attn_mask=forbidden,
                    key_padding_mask=padding,
                    need_weights="weights" in names,
                    average_attn_weights=False,
                )
                return dict(zip(names, both, strict=False))

            parity.check(from_torch, reference, ours=ours, theirs=theirs, zero_gradient=[r"k_proj\.bias"])


def token_masks(B: int, S: int) -> Tensor:
    return torch.arange(S)[None, :] < torch.tensor([S, S - 3, 2, 1][:B])[:, None]


@parity_row("attention", "multi-head", "torch.nn.MultiheadAttention", page="attention-multi-head")
def test_multi_head(parity):
    B, T, D, H = 3, 11, 35, 5
    masks = [
        (None, None),
        (causal_mask(T), None),
        (None, token_masks(B, T)),
        (causal_mask(T), token_masks(B, T)),
    ]
    reference = nn.MultiheadAttention(D, H, batch_first=True)
    parity_with_torch(parity, reference, randn(B, T, D, seed=1), None, masks)


@parity_row("attention", "cross", "torch.nn.MultiheadAttention", page="attention-cross")
def test_cross_attention(parity):
    B, T, S, D, H = 3, 7, 11, 35, 5
    reference = nn.MultiheadAttention(D, H, kdim=13, vdim=13, batch_first=True)
    masks = [(None, None), (None, token_masks(B, S))]
    parity_with_torch(parity, reference, randn(B, T, D, seed=1), randn(B, S, 13, seed=2), masks)


@both_modules
@pytest.mark.parametrize("kv_heads", [1, 2, 3, 6])
def test_shared_heads_are_multi_head_attention_with_repeated_projections(kv_heads, need_weights):
    """Grouped-query attention, and multi-query at kv_heads = 1: written as full multi-head attention."""
    shared = make(13, 6, num_kv_heads=kv_heads, head_dim=5)
    full = make(13, 6, head_dim=5, seed=9)
    assert shared.group_size == 6 // kv_heads
    with torch.no_grad():
        for name in ("q_proj", "out_proj"):
            getattr(full, name).load_state_dict(getattr(shared, name).state_dict())
        for name in ("k_proj", "v_proj"):
            ours, theirs = getattr(shared, name), getattr(full, name)
            assert ours.out_features == kv_heads * 5
            heads = torch.arange(6) // (6 // kv_heads)  # the head that each query head reads
            theirs.weight.copy_(ours.weight.view(kv_heads, 5, 13)[heads].flatten(0, 1))
            theirs.bias.copy_(ours.bias.view(kv_heads, 5)[heads].flatten())
    x = randn(2, 7, 13, seed=1)
    got = run(shared, x, need_weights=need_weights, attn_mask=causal_mask(7))
    torch.testing.assert_close(got, run(full, x, need_weights=need_weights, attn_mask=causal_mask(7)))


def test_with_all_heads_grouped_query_attention_is_multi_head_attention():
    grouped, plain = make(15, 3, num_kv_heads=3, seed=4), make(15, 3, seed=4)
    assert grouped.state_dict().keys() == plain.state_dict().keys()
    x = randn(2, 7, 15, seed=1)
    assert torch.equal(grouped(x), plain(x))


def test_the_number_of_parameters_does_not_depend_on_the_number_of_heads():
    counts = {sum(p.numel() for p in Attention(30, heads).parameters()) for heads in (1, 2, 3, 5, 6)}
    assert counts == {4 * (30 * 30 + 30)}


# ------------------------------------------------------------------------------------------------
# Properties


@given(sizes=primes, seed=seeds)
def test_permuting_the_tokens_permutes_the_output(sizes, seed):
    B, T, H, Dh, D = sizes
    attn = make(D, H, head_dim=Dh, seed=seed % 1000)
    x = randn(B, T, D, seed=seed)
    order = torch.randperm(T, generator=torch.Generator().manual_seed(seed))
    for need_weights in (True, False):
        before, after = (run(attn, y, need_weights=need_weights) for y in (x, x[:, order]))
        torch.testing.assert_close(after, before[:, order], atol=1e-11, rtol=1e-11)
    if not torch.equal(order, torch.arange(T)):
        assert not torch.allclose(before, after)  # the input does matter


@given(sizes=primes, seed=seeds, data=st.data())
def test_with_a_causal_mask_the_future_leaves_the_past_bit_equal(sizes, seed, data):
    B, T, H, Dh, D = sizes
    t = data.draw(st.integers(0, T - 1), label="first changed position")
    attn = make(D, H, head_dim=Dh, seed=seed % 1000, dtype=torch.float32)
    x = randn(B, T, D, seed=seed, dtype=torch.float32)
    changed = x.clone()
    changed[:, t:] = randn(B, T - t, D, seed=seed + 1, dtype=torch.float32)
    for need_weights in (True, False):
        before, after = (
            run(attn, y, need_weights=need_weights, attn_mask=causal_mask(T)) for y in (x, changed)
        )
        assert torch.equal(before[:, :t], after[:, :t])
        assert not torch.equal(before[:, t], after[:, t])


@both_modules
def test_causality_and_padding_at_length(need_weights):
    """Long enough for torch's kernel to work in blocks."""
    T, t, padding = 263, 131, 61
    attn = make(35, 5, dtype=torch.float32)
    x = randn(2, T + padding, 35, seed=1, dtype=torch.float32)
    before = run(attn, x[:, :T], need_weights=need_weights, attn_mask=causal_mask(T))
    changed = torch.cat([x[:, :t], -x[:, t:T]], dim=1)
    after = run(attn, changed, need_weights=need_weights, attn_mask=causal_mask(T))
    assert torch.equal(before[:, :t], after[:, :t]) and not torch.equal(before[:, t:], after[:, t:])
    mask = causal_mask(T + padding) & key_mask((torch.arange(T + padding) < T).expand(2, -1))
    padded = run(attn, x, need_weights=need_weights, attn_mask=mask)
    torch.testing.assert_close(padded[:, :T], before, atol=1e-5, rtol=1e-5)


@given(sizes=primes, padding=st.integers(1, 9), seed=seeds)
def test_padding_changes_nothing_whatever_it_holds(sizes, padding, seed):
    B, T, H, Dh, D = sizes
    attn = make(D, H, head_dim=Dh, seed=seed % 1000)
    x = randn(B, T, D, seed=seed)
    padded = torch.cat([x, 1e3 * randn(B, padding, D, seed=seed + 1)], dim=1)
    mask = key_mask((torch.arange(T + padding) < T).expand(B, -1))
    for need_weights in (True, False):
        alone = run(attn, x, need_weights=need_weights)
        torch.testing.assert_close(
            run(attn, padded, need_weights=need_weights, attn_mask=mask)[:, :T], alone, atol=1e-11, rtol=1e-11
        )
        assert not torch.allclose(run(attn, padded, need_weights=need_weights)[:, :T], alone)


@given(
    sizes=st.permutations([2, 3, 5, 7]),
    kv_heads=st.sampled_from([1, 2, 3, 6]),
    cuts=st.sets(st.integers(1, 12)),
    need_weights=st.booleans(),
    seed=seeds,
)
def test_a_cache_changes_nothing_however_the_text_is_cut(sizes, kv_heads, cuts, need_weights, seed):
    B, _, Dh, D = sizes
    T = 13
    attn = make(D, 6, num_kv_heads=kv_heads, head_dim=Dh, seed=seed % 1000)
    x = randn(B, T, D, seed=seed)
    whole = run(attn, x, need_weights=need_weights, attn_mask=causal_mask(T))
    cache = KVCache(B, kv_heads, T, Dh, dtype=x.dtype)
    parts = []
    with torch.no_grad():
        for start, end in pairwise([0, *sorted(cuts), T]):
            mask = causal_mask(end - start, end)
            parts.append(run(attn, x[:, start:end], need_weights=need_weights, attn_mask=mask, cache=cache))
            assert cache.length == end
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, atol=1e-11, rtol=1e-11)


@both_modules
@pytest.mark.parametrize("prefill", [0, 4], ids=["token by token", "prefill and decode"])
def test_decoding_with_a_cache(prefill, need_weights):
    """The plain cases of the property above; a single new token needs no mask at all."""
    attn, x = make(13, 3, head_dim=5), randn(2, 11, 13, seed=1)
    cache = KVCache(2, 3, 17, 5, dtype=x.dtype)
    parts = []
    with torch.no_grad():
        if prefill:
            parts.append(
                run(
                    attn,
                    x[:, :prefill],
                    need_weights=need_weights,
                    attn_mask=causal_mask(prefill),
                    cache=cache,
                )
            )
        for t in range(prefill, 11):
            parts.append(run(attn, x[:, t : t + 1], need_weights=need_weights, cache=cache))
    whole = run(attn, x, need_weights=need_weights, attn_mask=causal_mask(11))
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, atol=1e-12, rtol=1e-12)


def test_a_text_of_padding_leaves_only_the_output_bias():
    attn, x = make(13, 3, head_dim=5), randn(2, 7, 13, seed=1).requires_grad_()
    mask = key_mask(torch.tensor([[True] * 7, [False] * 7]))
    for need_weights in (True, False):
        out = run(attn, x, need_weights=need_weights, attn_mask=mask)
        torch.testing.assert_close(out[1], attn.out_proj.bias.expand(7, 13))
        (grad,) = torch.autograd.grad(out.square().sum(), x)
        assert bool(grad.isfinite().all()) and bool((grad[1] == 0).all())


def test_dropout_is_for_training_only():
    attn = Attention(15, 3, dropout=0.5)
    x = torch.randn(2, 7, 15)
    attn.eval()
    assert torch.equal(attn(x), attn(x))
    attn.train()
    torch.manual_seed(0)
    assert not torch.equal(attn(x), attn(x))
    assert not torch.equal(attn(x, need_weights=True)[0], attn(x, need_weights=True)[0])


# ------------------------------------------------------------------------------------------------
# Bad input: the message names the argument, what came and what was expected


@both_paths
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"q": torch.zeros(2, 5, 7)}, ValueError, r"q: expected shape \(B, H, T, Dh\), got \(2, 5, 7\)"),
        ({"k": torch.zeros(2, 3, 11, 6)}, ValueError, r"k: expected .* Dh = 7, got \(2, 3, 11, 6\)"),
        ({"k": torch.zeros(5, 3, 11, 7)}, ValueError, r"k: expected .* B = 2.*, got \(5, 3, 11, 7\)"),
        ({"v": torch.zeros(2, 3, 10, 7)}, ValueError, r"v: expected .* S = 11, got \(2, 3, 10, 7\)"),
        (
            {"k": torch.zeros(2, 2, 11, 7), "v": torch.zeros(2, 2, 11, 7)},
            ValueError,
            r"k: number of heads: expected a positive divisor of q's number of heads = 3, got 2",
        ),
        (
            {"k": torch.zeros(2, 3, 11, 7).double()},
            TypeError,
            r"k: expected torch.float32, .*got torch.float64",
        ),
        (
            {"v": torch.zeros(2, 3, 11, 7).bfloat16()},
            TypeError,
            r"v: expected torch.float32, .*got torch.bfloat16",
        ),
        ({"q": torch.zeros(2, 3, 5, 7).long()}, TypeError, r"q: expected a floating.* got torch.int64"),
        ({"q": [[0.0]]}, TypeError, r"q: expected a tensor, got list"),
        (
            {"attn_mask": torch.zeros(5, 11)},
            TypeError,
            r"attn_mask: expected a bool tensor.* got torch.float32",
        ),
        ({"attn_mask": [[True]]}, TypeError, r"attn_mask: expected a bool tensor.* got list"),
        (
            {"attn_mask": torch.ones(11, 5, dtype=torch.bool)},
            ValueError,
            r"attn_mask: expected .* broadcasts to \(B, H, T, S\) = \(2, 3, 5, 11\), got \(11, 5\)",
        ),
        ({"attn_mask": torch.ones(11, dtype=torch.bool)}, ValueError, r"attn_mask: expected .* got \(11,\)"),
        (
            {"attn_mask": torch.ones(1, 2, 3, 5, 11, dtype=torch.bool)},
            ValueError,
            r"attn_mask: expected .* got \(1, 2, 3, 5, 11\)",
        ),
    ],
)
def test_bad_input_to_the_function(path, change, error, message):
    good = {"q": torch.zeros(2, 3, 5, 7), "k": torch.zeros(2, 3, 11, 7), "v": torch.zeros(2, 3, 11, 7)}
    path(*good.values())
    args = {**good, **change}
    with pytest.raises(error, match=message):
        path(args["q"], args["k"], args["v"], args.get("attn_mask"))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"num_heads": 4}, r"num_heads: expected a positive divisor of d_model = 15, got 4"),
        ({"num_heads": 0}, r"num_heads: expected a positive .*got 0"),
        (
            {"num_heads": 3, "num_kv_heads": 2},
            r"num_kv_heads: expected a positive divisor of num_heads = 3, got 2",
        ),
        (
            {"num_heads": 3, "num_kv_heads": 0},
            r"num_kv_heads: expected a positive divisor of num_heads = 3, got 0",
        ),
        ({"num_heads": 3, "head_dim": 0}, r"head_dim: expected .*got 0"),
    ],
)
def test_head_counts_that_do_not_divide(kwargs, message):
    with pytest.raises(ValueError, match=message):
        Attention(15, **kwargs)


@pytest.mark.parametrize(
    ("args", "kwargs", "error", "message"),
    [
        ((torch.zeros(7, 15),), {}, ValueError, r"x: expected shape \(B, T, D\) with D = 15, got \(7, 15\)"),
        ((torch.zeros(2, 7, 14),), {}, ValueError, r"x: expected .* D = 15, got \(2, 7, 14\)"),
        ((torch.zeros(2, 7, 15).long(),), {}, TypeError, r"x: expected torch.float32.*, got torch.int64"),
        ((torch.zeros(2, 7, 15).double(),), {}, TypeError, r"x: expected torch.float32.*, got torch.float64"),
        (
            (torch.zeros(2, 7, 15), torch.zeros(2, 5, 15)),
            {},
            ValueError,
            r"context: .*d_context = 13, got \(2, 5, 15\)",
        ),
        (
            (torch.zeros(2, 7, 15), torch.zeros(3, 5, 13)),
            {},
            ValueError,
            r"context: .*B = 2.*, got \(3, 5, 13\)",
        ),
        (
            (torch.zeros(2, 7, 15), torch.zeros(2, 5, 13).double()),
            {},
            TypeError,
            r"context: expected torch.float32.*, got torch.float64",
        ),
        (
            (torch.zeros(2, 7, 15), torch.zeros(2, 5, 13)),
            {"attn_mask": torch.zeros(7, 5)},
            TypeError,
            r"attn_mask: expected a bool tensor.* got torch.float32",
        ),
        (
            (torch.zeros(2, 7, 15), torch.zeros(2, 5, 13)),
            {"attn_mask": torch.ones(2, 7, 5, dtype=torch.bool)},
            ValueError,
            r"attn_mask: expected .* = \(2, 3, 7, 5\), got \(2, 7, 5\)",
        ),
    ],
)
def test_bad_input_to_the_module(args, kwargs, error, message):
    attn = Attention(15, 3, d_context=13)
    with pytest.raises(error, match=message):
        attn(*args, **kwargs)


def test_mixed_precision_is_not_bad_input():
    attn, x = Attention(15, 3), torch.randn(2, 7, 15)
    with torch.autocast("cpu", torch.bfloat16):
        for y in (x, x.bfloat16()):
            assert attn(y).dtype == torch.bfloat16


@pytest.mark.parametrize(("T", "S"), [(5, 4), (0, 3), (-1, 3), (0, None)])
def test_causal_mask_of_impossible_lengths(T, S):
    with pytest.raises(ValueError, match=rf"T, S: expected 1 <= T <= S .*got T={T}"):
        causal_mask(T, S)


def test_key_mask_of_the_wrong_kind():
    with pytest.raises(TypeError, match=r"token_mask: expected a bool tensor.*got torch.int64"):
        key_mask(torch.ones(2, 3, dtype=torch.long))
    with pytest.raises(ValueError, match=r"token_mask: expected shape \(B, S\), got \(3,\)"):
        key_mask(torch.ones(3, dtype=torch.bool))
