"""What decoders ask of the layers: causal without a mask, biases, rotation, caches, windows, documents."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from parity import loud_
from torch import Tensor

from textbook_code.layers.attention import Attention, attention, fused_attention
from textbook_code.layers.cache import KVCache
from textbook_code.layers.feed_forward import ACTIVATIONS, FeedForward, GatedFeedForward
from textbook_code.layers.masks import causal_mask, document_mask, key_mask, sliding_window_mask
from textbook_code.layers.positions import RotaryPositions


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


PATHS = [lambda *a, **kw: attention(*a, **kw)[0], fused_attention]
IDS = ["written out", "fused"]


@pytest.mark.parametrize("attend", PATHS, ids=IDS)
@pytest.mark.parametrize(("T", "S"), [(7, 7), (3, 7), (1, 7), (1, 1)])
@pytest.mark.parametrize("kv_heads", [6, 2])
@pytest.mark.parametrize("padded", [False, True])
def test_causal_is_the_causal_mask(attend, T, S, kv_heads, padded):
    q, k, v = randn(2, 6, T, 5), randn(2, kv_heads, S, 5, seed=1), randn(2, kv_heads, S, 3, seed=2)
    mask = key_mask(torch.arange(S) >= torch.tensor([[0], [S // 2]])) if padded else None
    by_mask = causal_mask(T, S) if mask is None else causal_mask(T, S) & mask
    torch.testing.assert_close(attend(q, k, v, mask, causal=True), attention(q, k, v, by_mask)[0])


@pytest.mark.parametrize("mask_heads", [None, 1, 6])
@given(group=st.sampled_from([1, 2, 3, 6]), S=st.integers(1, 9))
def test_one_step_of_grouped_heads_needs_no_copies(mask_heads, group, S):
    q, k, v = randn(2, 6, 1, 5), randn(2, 6 // group, S, 5, seed=1), randn(2, 6 // group, S, 4, seed=2)
    mask = None if mask_heads is None else randn(2, mask_heads, 1, S, seed=3) > -1
    torch.testing.assert_close(fused_attention(q, k, v, mask), attention(q, k, v, mask)[0])


@pytest.mark.parametrize("attend", PATHS, ids=IDS)
def test_a_score_bias_is_added_before_the_softmax(attend):
    q, k, v, bias = (
        randn(2, 3, 4, 5),
        randn(2, 3, 6, 5, seed=1),
        randn(2, 3, 6, 5, seed=2),
        randn(3, 4, 6, seed=3),
    )
    mask = causal_mask(4, 6)
    scores = (q @ k.mT / math.sqrt(5) + bias).masked_fill(~mask, -math.inf)
    want = scores.softmax(-1) @ v
    torch.testing.assert_close(attend(q, k, v, mask, score_bias=bias), want)
    torch.testing.assert_close(attend(q, k, v, causal=True, score_bias=bias), want)
    assert not torch.allclose(attend(q, k, v, mask), want)


@pytest.mark.parametrize("attend", PATHS, ids=IDS)
def test_a_score_bias_learns_and_a_row_that_sees_nothing_stays_zero(attend):
    q, k, v = randn(2, 3, 4, 5), randn(2, 3, 4, 5, seed=1), randn(2, 3, 4, 5, seed=2)
    bias = randn(3, 4, 4, seed=3).requires_grad_()
    mask = causal_mask(4).clone()
    mask[2] = False
    out = attend(q, k, v, mask, score_bias=bias)
    assert (out[:, :, 2] == 0).all()
    (out * randn(*out.shape, seed=4)).sum().backward()
    assert bias.grad is not None and bias.grad.isfinite().all()
    assert (bias.grad[:, ~mask] == 0).all() and (bias.grad[:, 1, :2] != 0).all()


def test_the_module_hands_on_scale_rotation_and_bias():
    attn = loud_(Attention(12, 3, num_kv_heads=1, scale=1.0)).double()
    x, bias, turn = randn(2, 5, 12), randn(3, 5, 5, seed=1), RotaryPositions(4)(torch.arange(5))
    fused = attn(x, causal=True, score_bias=bias, rotary=turn)
    written, weights = attn(x, causal=True, score_bias=bias, rotary=turn, need_weights=True)
    torch.testing.assert_close(fused, written)
    assert (weights.triu(1) == 0).all()
    for change in ({"score_bias": None}, {"rotary": None}, {"causal": False}):
        kwargs = {"causal": True, "score_bias": bias, "rotary": turn, **change}
        assert not torch.allclose(attn(x, **kwargs), fused)
    attn.scale = None
    assert not torch.allclose(attn(x, causal=True, score_bias=bias, rotary=turn), fused)


@pytest.mark.parametrize("kv_heads", [1, 3])
@pytest.mark.parametrize("cut", [0, 1, 4, 8])
def test_a_cache_keeps_turned_keys(kv_heads, cut):
    attn, x = loud_(Attention(12, 3, num_kv_heads=kv_heads)).double(), randn(2, 9, 12)
    rope = RotaryPositions(4)
    want = attn(x, causal=True, rotary=rope(torch.arange(9)))
    cache = KVCache(2, kv_heads, 9, 4, dtype=torch.float64)
    pieces = [x[:, :cut]] * (cut > 0) + [x[:, t : t + 1] for t in range(cut, 9)]
    got = []
    for piece in pieces:
        positions = torch.arange(cache.length, cache.length + piece.size(1))
        got.append(attn(piece, causal=True, rotary=rope(positions), cache=cache))
    torch.testing.assert_close(torch.cat(got, dim=1), want)


def test_a_cached_context_is_projected_once():
    attn, x, context = loud_(Attention(12, 3, d_context=7)).double(), randn(2, 5, 12), randn(2, 4, 7, seed=1)
    cache, want = KVCache(2, 3, 4, 4, dtype=torch.float64), attn(x, context)
    calls = []
    attn.k_proj.register_forward_hook(lambda *_: calls.append("k"))
    got = [attn(x[:, t : t + 1], context, cache=cache) for t in range(5)]
    torch.testing.assert_close(torch.cat(got, dim=1), want)
    assert calls == ["k"] and cache.length == 4


def test_reorder_moves_the_past_of_each_row():
    cache = KVCache(3, 2, 5, 4, dtype=torch.float64)
    k, v = randn(3, 2, 2, 4), randn(3, 2, 2, 4, seed=1)
    cache.append(k, v)
    rows = torch.tensor([2, 0, 0, 1])
    cache.reorder(rows)
    assert torch.equal(cache.stored[0], k[rows]) and torch.equal(cache.stored[1], v[rows])
    more = randn(4, 2, 3, 4, seed=2)
    cache.append(more, more)  # there is room as before, and two rows from one do not share memory
    assert torch.equal(cache.stored[0][1], torch.cat([k[0], more[1]], dim=1))
    with pytest.raises(TypeError, match="rows: expected a tensor of integer ids"):
        cache.reorder(torch.tensor([0.0]))
    with pytest.raises(ValueError, match="rows: expected shape"):
        cache.reorder(torch.zeros(1, 1).long())


@given(T=st.integers(1, 8), more=st.integers(0, 8), window=st.integers(1, 20))
def test_sliding_window_by_its_definition(T, more, window):
    S = T + more
    mask = sliding_window_mask(T, S, window=window)
    for i in range(T):
        position = i + more
        assert mask[i].nonzero().flatten().tolist() == list(
            range(max(0, position - window + 1), position + 1)
        )
    if window >= S:
        assert torch.equal(mask, causal_mask(T, S))


def test_document_mask_parts_documents():
    ids = torch.tensor([[0, 0, 1, 1, 1, 2], [5, 5, 5, 5, 5, 5]])
    mask = document_mask(ids)
    assert mask.shape == (2, 1, 6, 6)
    assert torch.equal(
        mask[0, 0], torch.block_diag(torch.ones(2, 2), torch.ones(3, 3), torch.ones(1, 1)).bool()
    )
    assert mask[1].all()
    attn, x = loud_(Attention(12, 3)).double(), randn(1, 5, 12)
    together = attn(x, causal=True, attn_mask=document_mask(torch.tensor([[0, 0, 1, 1, 1]])))
    apart = torch.cat([attn(x[:, :2], causal=True), attn(x[:, 2:], causal=True)], dim=1)
    torch.testing.assert_close(together, apart)


@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
def test_gated_feed_forward_is_its_formula(name):
    ffn, x = loud_(GatedFeedForward(6, 10, activation=name)).double(), randn(2, 3, 6)
    gate, up, down = ffn.gate_proj.weight, ffn.up_proj.weight, ffn.down_proj.weight
    torch.testing.assert_close(ffn(x), (ACTIVATIONS[name](x @ gate.T) * (x @ up.T)) @ down.T)
    assert len(list(ffn.parameters())) == 3


@pytest.mark.parametrize("kind", [FeedForward, GatedFeedForward])
def test_dropout_in_the_middle_is_for_training_only(kind):
    ffn, x = loud_(kind(6, 64, dropout=0.5)).double(), randn(1, 1, 6)
    kept = torch.stack([ffn(x) for _ in range(2000)])
    assert not torch.equal(kept[0], kept[1])
    ffn.eval()
    assert torch.equal(ffn(x), ffn(x))
    torch.testing.assert_close(kept.mean(0), ffn(x), atol=0.15, rtol=0.1)
    with pytest.raises(ValueError, match="activation: expected one of"):
        kind(6, 64, activation="swish")


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"score_bias": randn(3, 4, 5)}, ValueError, r"score_bias: expected 2 to 4 axes .* \(2, 3, 4, 4\)"),
        ({"score_bias": randn(3, 4, 4).float()}, TypeError, "score_bias: expected torch.float64"),
        ({"score_bias": randn(4)}, ValueError, "score_bias: expected 2 to 4 axes"),
    ],
)
@pytest.mark.parametrize("attend", PATHS, ids=IDS)
def test_a_bias_that_does_not_fit(attend, kwargs, error, message):
    q = randn(2, 3, 4, 5)
    with pytest.raises(error, match=message):
        attend(q, q, q, **kwargs)


def test_calls_that_make_no_sense():
    attn, x = Attention(12, 3).double(), randn(2, 5, 12)
    with pytest.raises(ValueError, match="rotary: expected None with a context"):
        attn(x, x, rotary=RotaryPositions(4)(torch.arange(5)))
    with pytest.raises(ValueError, match="window: expected at least 1, got 0"):
        sliding_window_mask(3, window=0)
    with pytest.raises(TypeError, match="document_ids: expected a tensor of integer ids"):
        document_mask(randn(2, 3))
    with pytest.raises(ValueError, match="document_ids: expected shape"):
        document_mask(torch.zeros(3).long())
