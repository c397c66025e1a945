"""Windows: the forms whose cost grows with T · W equal attention with a mask, in values and gradients.

The masks are held against their formulas by loops; everything else is held against the masks.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import local_attention
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from parity import Parity, loud_, parity_row
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from textbook_code.layers import local_attention as module
from textbook_code.layers.attention import Attention, attention, fused_attention
from textbook_code.layers.cache import KVCache, RollingCache
from textbook_code.layers.local_attention import LocalAttention, block_local_attention, windowed_attention
from textbook_code.layers.masks import (
    block_local_mask,
    causal_mask,
    key_mask,
    sliding_window_mask,
    symmetric_window_mask,
)
from textbook_code.layers.positions import RotaryPositions

seeds = st.integers(0, 2**31 - 1)
heads = st.sampled_from([(1, 1), (2, 2), (3, 1), (6, 2), (6, 3)])  # query heads, key/value heads


def randn(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def qkv(B: int, H: int, K: int, T: int, *, S: int | None = None, seed: int = 0) -> tuple[Tensor, ...]:
    S = T if S is None else S
    q, k, v = randn(B, H, T, 5, seed=seed), randn(B, K, S, 5, seed=seed + 1), randn(B, K, S, 7, seed=seed + 2)
    return q.requires_grad_(), k.requires_grad_(), v.requires_grad_()


def random_tokens(B: int, S: int, *, seed: int) -> Tensor:
    """About three quarters of the tokens real; the first row may be padding alone at either end."""
    mask = torch.rand(B, S, generator=torch.Generator().manual_seed(seed)) < 0.75
    mask[0, : seed % (S + 1)] = False
    return mask


def assert_same(got: Tensor, want: Tensor, inputs: tuple[Tensor, ...], *, seed: int = 3) -> None:
    """Equal in values, and in the gradients of a random weighted sum, to fp64's rounding."""
    torch.testing.assert_close(got, want, atol=1e-12, rtol=1e-12)
    weights = randn(*want.shape, seed=seed)
    gradients = [torch.autograd.grad((out * weights).sum(), inputs) for out in (got, want)]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, atol=1e-11, rtol=1e-11)


# ------------------------------------------------------------------------------------------------
# The masks, against their formulas


@given(T=st.integers(1, 9), more=st.integers(0, 5), window=st.integers(1, 16), dilation=st.integers(1, 4))
def test_sliding_window_mask_is_its_formula(T, more, window, dilation):
    mask = sliding_window_mask(T, T + more, window=window, dilation=dilation)
    assert mask.shape == (T, T + more)
    for i in range(T):
        seen = {i + more - dilation * step for step in range(window)}
        assert {j for j in range(T + more) if mask[i, j]} == {j for j in seen if j >= 0}


@given(T=st.integers(1, 12), window=st.integers(1, 14), dilation=st.integers(1, 4))
def test_symmetric_window_mask_is_its_formula(T, window, dilation):
    mask = symmetric_window_mask(T, window=window, dilation=dilation)
    for i in range(T):
        seen = {i + dilation * step for step in range(-window + 1, window)}
        assert {j for j in range(T) if mask[i, j]} == seen & set(range(T))
    sliding = sliding_window_mask(T, window=window, dilation=dilation)
    assert torch.equal(mask & causal_mask(T), sliding)
    assert torch.equal(mask, sliding | sliding.T)


@given(
    T=st.integers(1, 12),
    block=st.integers(1, 14),
    back=st.integers(0, 3),
    ahead=st.integers(0, 3),
    causal=st.booleans(),
)
def test_block_local_mask_is_its_formula(T, block, back, ahead, causal):
    ahead = 0 if causal else ahead
    mask = block_local_mask(T, block=block, look_back=back, look_ahead=ahead, causal=causal)
    for i in range(T):
        first, behind = (i // block - back) * block, (i // block + 1 + ahead) * block
        seen = set(range(max(0, first), min(T, i + 1 if causal else behind)))
        assert {j for j in range(T) if mask[i, j]} == seen


def test_a_window_as_long_as_the_text_is_no_window():
    for window in (7, 8, 100):
        assert torch.equal(sliding_window_mask(7, window=window), causal_mask(7))
        assert symmetric_window_mask(7, window=window).all()
        assert torch.equal(block_local_mask(7, block=window), causal_mask(7))
    assert not torch.equal(sliding_window_mask(7, window=6), causal_mask(7))
    assert torch.equal(sliding_window_mask(7, window=1), torch.eye(7, dtype=torch.bool))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: sliding_window_mask(5, window=0), r"window: expected at least 1, got 0"),
        (lambda: sliding_window_mask(5, window=2, dilation=0), r"dilation: expected at least 1, got 0"),
        (lambda: sliding_window_mask(5, 4, window=2), r"T, S: expected 1 <= T <= S .*got T=5, S=4"),
        (lambda: symmetric_window_mask(5, window=-1), r"window: expected at least 1, got -1"),
        (lambda: symmetric_window_mask(5, window=2, dilation=-3), r"dilation: expected .*got -3"),
        (lambda: symmetric_window_mask(0, window=2), r"T: expected at least 1, got 0"),
        (lambda: block_local_mask(0, block=2), r"T: expected at least 1, got 0"),
        (lambda: block_local_mask(5, block=0), r"block: expected at least 1, got 0"),
        (lambda: block_local_mask(5, block=2, look_back=-1), r"look_back: expected 0 or more blocks, got -1"),
        (
            lambda: block_local_mask(5, block=2, look_ahead=-1, causal=False),
            r"look_ahead: expected 0 or more blocks, got -1",
        ),
        (lambda: block_local_mask(5, block=2, look_ahead=1), r"look_ahead: expected 0 where .*got 1"),
    ],
)
def test_impossible_masks(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# ------------------------------------------------------------------------------------------------
# The chunked forms equal the masks


def dense(
    q: Tensor, k: Tensor, v: Tensor, tokens: Tensor | None, *, window: int, causal: bool, dilation: int
) -> Tensor:
    """The definition: attention, written out, with the whole T × S mask."""
    if causal:
        mask = sliding_window_mask(q.size(2), k.size(2), window=window, dilation=dilation)
    else:
        mask = symmetric_window_mask(q.size(2), window=window, dilation=dilation)
    return attention(q, k, v, mask if tokens is None else mask & key_mask(tokens))[0]


@given(
    B=st.integers(1, 3),
    hk=heads,
    T=st.integers(1, 40),
    past=st.integers(0, 20),
    window=st.integers(1, 50),
    dilation=st.integers(1, 4),
    block=st.integers(1, 12),
    causal=st.booleans(),
    padded=st.booleans(),
    seed=seeds,
)
def test_windowed_attention_is_attention_with_the_mask(
    B, hk, T, past, window, dilation, block, causal, padded, seed
):
    S = T + past if causal else T
    inputs = qkv(B, *hk, T, S=S, seed=seed)
    tokens = random_tokens(B, S, seed=seed) if padded else None
    pattern: dict[str, Any] = {"window": window, "causal": causal, "dilation": dilation}
    assert_same(
        windowed_attention(*inputs, tokens, block=block, **pattern), dense(*inputs, tokens, **pattern), inputs
    )


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    ("T", "window"), [(64, 64), (65, 64), (127, 1), (128, 128), (191, 2), (257, 130), (300, 65), (331, 300)]
)
def test_with_blocks_of_its_own_choice(T, window, causal):
    """Around the multiples of the block, where an index can be off by one."""
    inputs = qkv(2, 2, 1, T, seed=T)
    tokens = random_tokens(2, T, seed=window)
    for mask in (None, tokens):
        for dilation in (1, 3):
            pattern: dict[str, Any] = {"window": window, "causal": causal, "dilation": dilation}
            assert_same(windowed_attention(*inputs, mask, **pattern), dense(*inputs, mask, **pattern), inputs)


@given(
    B=st.integers(1, 3),
    hk=heads,
    T=st.integers(1, 40),
    block=st.integers(1, 50),
    back=st.integers(0, 3),
    ahead=st.integers(0, 3),
    causal=st.booleans(),
    padded=st.booleans(),
    seed=seeds,
)
def test_block_local_attention_is_attention_with_the_mask(B, hk, T, block, back, ahead, causal, padded, seed):
    inputs = qkv(B, *hk, T, seed=seed)
    tokens = random_tokens(B, T, seed=seed) if padded else None
    pattern: dict[str, Any] = {
        "block": block, "look_back": back, "look_ahead": 0 if causal else ahead, "causal": causal
    }  # fmt: skip
    mask = block_local_mask(T, **pattern)
    mask = mask if tokens is None else mask & key_mask(tokens)
    assert_same(block_local_attention(*inputs, tokens, **pattern), attention(*inputs, mask)[0], inputs)


@given(T=st.integers(1, 80), seed=seeds, causal=st.booleans())
def test_a_window_as_long_as_the_text_is_full_attention(T, seed, causal):
    inputs = qkv(2, 4, 2, T, seed=seed)
    for window in (T, T + 1, 1000):
        full = fused_attention(*inputs, causal=causal)
        assert_same(windowed_attention(*inputs, window=window, causal=causal, block=7), full, inputs)


def test_the_scale_is_passed_on():
    inputs = qkv(2, 2, 1, 50)
    want = attention(*inputs, sliding_window_mask(50, window=9), scale=0.7)[0]
    assert_same(windowed_attention(*inputs, window=9, block=8, scale=0.7), want, inputs)
    want = attention(*inputs, block_local_mask(50, block=9), scale=0.7)[0]
    assert_same(block_local_attention(*inputs, block=9, scale=0.7), want, inputs)


@pytest.mark.parametrize("path", ["blocks", "one block"])
def test_dropout_drops(path):
    q, k, v = qkv(1, 2, 2, 40)
    torch.manual_seed(0)
    out = windowed_attention(q, k, v, window=5, block=8 if path == "blocks" else 64, dropout=0.5)
    assert not torch.allclose(out, windowed_attention(q, k, v, window=5))
    assert not torch.allclose(
        block_local_attention(q, k, v, block=8, dropout=0.5), block_local_attention(q, k, v, block=8)
    )


def scores_computed(work: Any) -> int:
    """Multiplications of q kᵀ and of the weights with v, as torch counts them."""
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops() // 2


@pytest.mark.parametrize(("T", "window"), [(2048, 128), (4096, 128), (4096, 256), (1000, 130)])
def test_the_work_grows_with_the_length_times_the_window(T, window):
    """Counted by torch on tensors without numbers; equation and docstring say 3/2 · T · W."""
    H, Dh = 2, 8
    q, k, v = (torch.zeros(1, H, T, Dh, device="meta") for _ in range(3))
    block = max(64, window // 2)
    whole_blocks = -(-T // block) * block
    keys = (1 + -(-(window - 1) // block)) * block
    assert keys <= 1.5 * window + block
    counted = scores_computed(lambda: windowed_attention(q, k, v, window=window))
    assert counted == 2 * whole_blocks * keys * H * Dh
    assert scores_computed(lambda: fused_attention(q, k, v)) == 2 * T * T * H * Dh


def test_no_key_is_copied_for_a_block_or_a_head(monkeypatch):
    """With one text the spans are views, also where heads share their keys."""
    seen: list[Tensor] = []
    right = module.fused_attention
    monkeypatch.setattr(
        module, "fused_attention", lambda q, k, v, *a, **kw: seen.extend((k, v)) or right(q, k, v, *a, **kw)
    )
    q, k, v = (randn(1, heads, 1024, 8, seed=heads) for heads in (4, 2, 2))
    windowed_attention(q, k, v, window=256)
    for x in seen:
        assert x.shape == (8, 2, 384, 8)
        assert x.untyped_storage().nbytes() == 8 * 2 * (1024 + 256) * 8, "the numbers and the padding"


# ------------------------------------------------------------------------------------------------
# Against the published module


def theirs(q: Tensor, k: Tensor, v: Tensor, tokens: Tensor | None, block: int, **how: Any) -> Tensor:
    """The package; it always gets a mask, see the test below."""
    attend = local_attention.LocalAttention(block, autopad=True, use_rotary_pos_emb=False, **how).double()
    return attend(q, k, v, mask=torch.ones_like(q[:, 0, :, 0]).bool() if tokens is None else tokens)


def real_rows(x: Tensor, tokens: Tensor | None) -> Tensor:
    return x if tokens is None else x.transpose(1, 2)[tokens]


def right_padded(B: int, T: int) -> Tensor:
    return torch.arange(T)[None, :] < torch.tensor([T, T - 3, 2 * T // 3][:B])[:, None]


def against_the_package(parity: Parity, ours: Any, reference: Any) -> None:
    for T in (12, 29, 31):
        for tokens in (None, right_padded(3, T)):
            inputs = qkv(3, 2, 2, T, seed=T)
            got, want = (real_rows(f(*inputs, tokens), tokens) for f in (ours, reference))
            weights = randn(*want.shape, seed=9)
            gradients = [torch.autograd.grad((out * weights).sum(), inputs) for out in (got, want)]
            parity.record({"out": got}, {"out": want})
            parity.record(*(dict(zip("qkv", g, strict=True)) for g in gradients), gradients=True)


@parity_row(
    "local attention",
    "block-local",
    "local_attention.LocalAttention",
    page="local-attention-blocks",
)
def test_block_local_attention_is_the_package(parity):
    for back, ahead, causal in ((1, 0, True), (0, 0, True), (2, 0, True), (1, 1, False), (0, 0, False)):
        against_the_package(
            parity,
            lambda *a, b=back, f=ahead, c=causal: block_local_attention(
                *a, block=4, look_back=b, look_ahead=f, causal=c
            ),
            lambda *a, b=back, f=ahead, c=causal: theirs(*a, 4, look_backward=b, look_forward=f, causal=c),
        )


@parity_row(
    "local attention",
    "exact window",
    "local_attention.LocalAttention",
    page="local-attention-window",
)
def test_windowed_attention_is_the_package(parity):
    """Its exact window of w reaches w positions back: ours counts the query's own position too."""
    for causal in (True, False):
        against_the_package(
            parity,
            lambda *a, c=causal: windowed_attention(*a, window=5, causal=c, block=3),
            lambda *a, c=causal: theirs(*a, 4, causal=c, exact_windowsize=True),
        )


def test_the_package_lets_the_last_block_see_its_filling():
    """Why it gets a mask above: without one, `autopad` adds keys of zeros that have their share."""
    q, k, v = (x.detach() for x in qkv(1, 1, 1, 10))
    attend = local_attention.LocalAttention(4, causal=False, autopad=True, use_rotary_pos_emb=False).double()
    want = attention(q, k, v, block_local_mask(10, block=4, look_back=1, look_ahead=1, causal=False))[0]
    leaky, masked = attend(q, k, v), attend(q, k, v, mask=torch.ones(1, 10, dtype=torch.bool))
    torch.testing.assert_close(masked, want)
    assert (leaky - want)[:, :, 4:].abs().min() > 0
    torch.testing.assert_close(leaky[:, :, :4], want[:, :, :4])


# ------------------------------------------------------------------------------------------------
# The rolling cache


@pytest.mark.parametrize("window", [1, 2, 5, 8])
def test_the_ring_holds_the_last_positions_each_in_its_slot(window):
    cache, k = RollingCache(2, 3, window, 5), randn(2, 3, 23, 5, seed=1, dtype=torch.float32)
    for t in range(23):
        keys, values = cache.append(k[:, :, t : t + 1], -k[:, :, t : t + 1])
        assert cache.length == t + 1
        held = list(range(max(0, t + 1 - window), t + 1))
        assert sorted(cache.positions.tolist()) == held
        assert cache.positions.tolist()[t % window] == t, "position p lies in slot p mod W"
        assert torch.equal(keys, k[:, :, cache.positions]) and torch.equal(values, -keys)
        assert keys.untyped_storage().data_ptr() == cache.k.untyped_storage().data_ptr(), "views, not copies"


@given(window=st.integers(1, 9), cuts=st.sets(st.integers(1, 16)))
def test_pieces_come_back_with_what_their_queries_see(window, cuts):
    cache, k = RollingCache(1, 1, window, 1), torch.arange(17.0).view(1, 1, 17, 1)
    for start, end in pairwise([0, *sorted(cuts), 17]):
        keys, values = cache.append(k[:, :, start:end], k[:, :, start:end])
        seen = list(range(max(0, start - window + 1), end))
        assert torch.equal(keys, values)
        if end - start == 1:
            assert sorted(keys.flatten().tolist()) == seen
        else:
            assert keys.flatten().tolist() == seen
        assert sorted(cache.stored[0].flatten().tolist()) == list(range(max(0, end - window), end))


def test_memory_is_constant():
    cache, one = RollingCache(2, 3, 4, 5), torch.zeros(2, 3, 1, 5)
    before = cache.k.untyped_storage().data_ptr(), cache.v.untyped_storage().data_ptr()
    for _ in range(100):
        cache.append(one, one)
        assert cache.k.shape == cache.v.shape == (2, 3, 4, 5)
    cache.append(*(torch.zeros(2, 3, 50, 5),) * 2)
    assert (cache.k.untyped_storage().data_ptr(), cache.v.untyped_storage().data_ptr()) == before
    assert cache.k.untyped_storage().nbytes() == 2 * 3 * 4 * 5 * 4 and cache.length == 150


def test_rows_of_the_ring_are_reordered():
    cache, k = RollingCache(3, 1, 2, 1), torch.arange(3.0).view(3, 1, 1, 1)
    for step in range(3):
        cache.append(k + 10 * step, k)
    cache.reorder(torch.tensor([2, 2, 0]))
    assert cache.k[:, 0, :, 0].tolist() == [[22, 12], [22, 12], [20, 10]]
    assert cache.length == 3


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda c, x: RollingCache(1, 1, 0, 1), ValueError, r"window: expected at least 1, got 0"),
        (
            lambda c, x: c.append(x[:1], x),
            ValueError,
            r"k: expected .* B = 2, K = 3, Dh = 5, got \(1, 3, 1, 5\)",
        ),
        (lambda c, x: c.append(x, x[:, :, :0]), ValueError, r"v: expected .* T = 1.*, got \(2, 3, 0, 5\)"),
        (lambda c, x: c.append(x[..., :4], x), ValueError, r"k: expected .* Dh = 5, got \(2, 3, 1, 4\)"),
        (lambda c, x: c.append(x.double(), x), TypeError, r"k: expected torch.float32, got torch.float64"),
        (lambda c, x: c.append(x, x.double()), TypeError, r"v: expected torch.float32, got torch.float64"),
    ],
)
def test_bad_input_to_the_ring(call, error, message):
    with pytest.raises(error, match=message):
        call(RollingCache(2, 3, 4, 5), torch.zeros(2, 3, 1, 5))


# ------------------------------------------------------------------------------------------------
# The module


def make(window: int, *, seed: int = 0, dilation: int = 1, num_kv_heads: int = 2) -> LocalAttention:
    made = LocalAttention(13, 6, window=window, dilation=dilation, num_kv_heads=num_kv_heads, head_dim=4)
    return loud_(made, seed=seed).double().eval()  # type: ignore[return-value]


def full(local: LocalAttention) -> Attention:
    """Attention with the same weights, loaded as they are."""
    made = Attention(13, 6, num_kv_heads=local.num_kv_heads, head_dim=4).double().eval()
    made.load_state_dict(local.state_dict())
    return made


ROTARY = RotaryPositions(4)


@given(
    T=st.integers(1, 80),
    window=st.integers(1, 90),
    dilation=st.integers(1, 3),
    kv_heads=st.sampled_from([1, 2, 3, 6]),
    causal=st.booleans(),
    padded=st.booleans(),
    turned=st.booleans(),
    seed=seeds,
)
def test_the_module_is_attention_with_the_mask(T, window, dilation, kv_heads, causal, padded, turned, seed):
    local = make(window, seed=seed % 1000, dilation=dilation, num_kv_heads=kv_heads)
    reference, x = full(local), randn(2, T, 13, seed=seed).requires_grad_()
    rotary = ROTARY(torch.arange(T), torch.float64) if turned else None
    keys = key_mask(random_tokens(2, T, seed=seed)) if padded else None
    make_mask = sliding_window_mask if causal else symmetric_window_mask
    mask = make_mask(T, window=window, dilation=dilation)
    got = local(x, attn_mask=keys, causal=causal, rotary=rotary)
    want = reference(x, attn_mask=mask if keys is None else mask & keys, rotary=rotary)
    torch.testing.assert_close(got, want, atol=1e-10, rtol=1e-10)
    weights = randn(*got.shape, seed=4)
    (got * weights).sum().backward()
    into_x, x.grad = x.grad, None
    (want * weights).sum().backward()
    torch.testing.assert_close(into_x, x.grad, atol=1e-9, rtol=1e-9)
    for ours, theirs in zip(local.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-9, rtol=1e-9)


def test_it_has_the_parameters_of_attention_drawn_alike():
    torch.manual_seed(0)
    ours = LocalAttention(30, 6, window=4, num_kv_heads=2).state_dict()
    torch.manual_seed(0)
    theirs = Attention(30, 6, num_kv_heads=2).state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@given(
    window=st.integers(1, 16),
    cuts=st.sets(st.integers(1, 20)),
    rolling=st.booleans(),
    padded=st.booleans(),
    seed=seeds,
)
def test_a_cache_changes_nothing_however_the_text_is_cut(window, cuts, rolling, padded, seed):
    """Token by token, prompt and steps, piece by piece; RoPE's turned keys in the ring; ragged padding."""
    T, local = 21, make(window, seed=seed % 1000)
    x, rotary = randn(2, T, 13, seed=seed), ROTARY(torch.arange(T), torch.float64)
    tokens = random_tokens(2, T, seed=seed) if padded else torch.ones(2, T, dtype=torch.bool)
    whole = local(x, attn_mask=key_mask(tokens), rotary=rotary)
    size = {"dtype": torch.float64}
    cache = RollingCache(2, 2, window, 4, **size) if rolling else KVCache(2, 2, T, 4, **size)
    parts = []
    with torch.no_grad():
        for start, end in pairwise([0, *sorted(cuts), T]):
            turned = tuple(turn[start:end] for turn in rotary)
            keys = key_mask(tokens[:, :end]) if padded else None
            parts.append(local(x[:, start:end], attn_mask=keys, rotary=turned, cache=cache))
            assert cache.length == end
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, atol=1e-11, rtol=1e-11)


@pytest.mark.parametrize("prefill", [0, 3, 4, 5, 17])
def test_decoding_with_the_ring(prefill):
    """The plain cases of the property above, and plain `Attention` behind the same ring."""
    local, T, W = make(4), 23, 4
    x, rotary = randn(2, T, 13, seed=1), ROTARY(torch.arange(T), torch.float64)
    for attn in (local, full(local)):
        cache, parts = RollingCache(2, 2, W, 4, dtype=torch.float64), []
        with torch.no_grad():
            if prefill:
                turned = tuple(turn[:prefill] for turn in rotary)
                window = {} if attn is local else {"attn_mask": sliding_window_mask(prefill, window=W)}
                parts.append(attn(x[:, :prefill], rotary=turned, cache=cache, **window))
            for t in range(prefill, T):
                turned = tuple(turn[t : t + 1] for turn in rotary)
                parts.append(attn(x[:, t : t + 1], causal=True, rotary=turned, cache=cache))
        torch.testing.assert_close(torch.cat(parts, 1), local(x, rotary=rotary), atol=1e-12, rtol=1e-12)


def test_what_lies_outside_the_window_leaves_the_output_bit_equal():
    T, W = 200, 70
    local = loud_(LocalAttention(13, 1, window=W)).eval()
    x = randn(1, T, 13, seed=1, dtype=torch.float32)
    before = local(x)
    for t in (0, 50, 131):
        changed = x.clone()
        changed[:, t] += 1
        moved = (local(changed) != before).any(-1)[0]
        assert moved.nonzero().flatten().tolist() == list(range(t, min(t + W, T)))


def test_padding_changes_nothing_whatever_it_holds():
    local, x = make(70), randn(2, 150, 13, seed=1)
    alone = local(x[:, 20:130])
    tokens = torch.zeros(2, 150, dtype=torch.bool)
    tokens[:, 20:130] = True
    for noise in (0.0, 1e3):
        padded = x.clone()
        padded[~tokens] = noise
        out = local(padded, attn_mask=key_mask(tokens))
        torch.testing.assert_close(out[:, 20:130], alone, atol=1e-11, rtol=1e-11)
        assert out.isfinite().all()


def test_a_text_of_padding_leaves_only_the_output_bias():
    for T in (7, 200):
        local, x = make(5), randn(2, T, 13, seed=1).requires_grad_()
        tokens = torch.ones(2, T, dtype=torch.bool)
        tokens[1] = False
        out = local(x, attn_mask=key_mask(tokens))
        torch.testing.assert_close(out[1], local.out_proj.bias.expand(T, 13))
        (grad,) = torch.autograd.grad(out.square().sum(), x)
        assert bool(grad.isfinite().all()) and bool((grad[1] == 0).all())


def test_dropout_is_for_training_only():
    local, x = LocalAttention(12, 3, window=4, dropout=0.5), torch.randn(2, 7, 12)
    assert torch.equal(local.eval()(x), local(x))
    local.train()
    torch.manual_seed(0)
    assert not torch.equal(local(x), local(x))


def test_half_precision():
    local, x = LocalAttention(12, 3, window=40), torch.randn(2, 200, 12)
    want = local(x)
    with torch.autocast("cpu", torch.bfloat16):
        got = local(x)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), want, atol=0.03, rtol=0.03)


# ------------------------------------------------------------------------------------------------
# Bad input: the message names the argument, what came and what was expected


@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"window": 0}, ValueError, r"window: expected at least 1, got 0"),
        ({"dilation": 0}, ValueError, r"dilation: expected at least 1, got 0"),
        ({"block": 0}, ValueError, r"block: expected at least 1, got 0"),
        ({"q": torch.zeros(2, 5, 7)}, ValueError, r"q: expected shape \(B, H, T, Dh\), got \(2, 5, 7\)"),
        ({"k": torch.zeros(2, 3, 90, 6)}, ValueError, r"k: expected .* Dh = 7, got \(2, 3, 90, 6\)"),
        ({"v": torch.zeros(2, 3, 89, 7)}, ValueError, r"v: expected .* S = 90, got \(2, 3, 89, 7\)"),
        (
            {"k": torch.zeros(2, 2, 90, 7), "v": torch.zeros(2, 2, 90, 7)},
            ValueError,
            r"k: number of heads: expected a positive divisor of q's number of heads = 3, got 2",
        ),
        (
            {"k": torch.zeros(2, 3, 90, 7).double()},
            TypeError,
            r"k: expected torch.float32, got torch.float64",
        ),
        (
            {"k": torch.zeros(2, 3, 80, 7), "v": torch.zeros(2, 3, 80, 7)},
            ValueError,
            r"k: expected at least as many keys as queries, at least one, got T=90, S=80",
        ),
        (
            {"k": torch.zeros(2, 3, 95, 7), "v": torch.zeros(2, 3, 95, 7), "causal": False},
            ValueError,
            r"k: expected as many keys as queries, at least one, got T=90, S=95",
        ),
        (
            {"token_mask": torch.ones(2, 90)},
            TypeError,
            r"token_mask: expected a bool tensor.* got torch.float32",
        ),
        (
            {"token_mask": torch.ones(2, 89, dtype=torch.bool)},
            ValueError,
            r"token_mask: expected .* B = 2, S = 90, got \(2, 89\)",
        ),
    ],
)
def test_bad_input_to_the_window(dilation, change, error, message):
    good: dict[str, Any] = {name: torch.zeros(2, 3, 90, 7) for name in "qkv"}
    good |= {"window": 5, "block": 8, "dilation": dilation}
    windowed_attention(**good)
    with pytest.raises(error, match=message):
        windowed_attention(**{**good, **change})


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"block": 0}, ValueError, r"block: expected at least 1, got 0"),
        ({"look_back": -1}, ValueError, r"look_back: expected 0 or more blocks, got -1"),
        ({"look_ahead": 1}, ValueError, r"look_ahead: expected 0 where no later position .*got 1"),
        ({"q": torch.zeros(2, 3, 4, 7)}, ValueError, r"k: expected as many keys as queries.*T=4, S=9"),
        ({"v": torch.zeros(2, 1, 9, 7)}, ValueError, r"v: expected .* K = 3.*, got \(2, 1, 9, 7\)"),
        (
            {"token_mask": torch.ones(2, 9).long()},
            TypeError,
            r"token_mask: expected a bool .*got torch.int64",
        ),
        (
            {"token_mask": torch.ones(1, 9, dtype=torch.bool)},
            ValueError,
            r"token_mask: expected .* B = 2, S = 9, got \(1, 9\)",
        ),
    ],
)
def test_bad_input_to_the_blocks(change, error, message):
    good: dict[str, Any] = {**{name: torch.zeros(2, 3, 9, 7) for name in "qkv"}, "block": 4}
    block_local_attention(**good)
    with pytest.raises(error, match=message):
        block_local_attention(**{**good, **change})


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"window": 0}, r"window: expected at least 1, got 0"),
        ({"window": 3, "dilation": 0}, r"dilation: expected at least 1, got 0"),
        ({"window": 3, "num_heads": 4}, r"num_heads: expected a positive divisor of d_model = 15, got 4"),
        ({"window": 3, "num_kv_heads": 2}, r"num_kv_heads: expected a positive divisor .*got 2"),
    ],
)
def test_impossible_sizes_of_the_module(sizes, message):
    with pytest.raises(ValueError, match=message):
        LocalAttention(15, **{"num_heads": 3, **sizes})


MASK = torch.ones(2, 1, 1, 7, dtype=torch.bool)


@pytest.mark.parametrize(
    ("x", "how", "error", "message"),
    [
        (torch.zeros(7, 15), {}, ValueError, r"x: expected shape \(B, T, D\) with D = 15, got \(7, 15\)"),
        (torch.zeros(2, 7, 15).double(), {}, TypeError, r"x: expected torch.float32, got torch.float64"),
        (None, {"attn_mask": MASK.float()}, TypeError, r"attn_mask: expected a bool .*got torch.float32"),
        (
            None,
            {"attn_mask": causal_mask(7)},
            ValueError,
            r"attn_mask: expected a mask of the keys alone, \(B, 1, 1, S\) = \(2, 1, 1, 7\), got \(7, 7\)",
        ),
        (None, {"attn_mask": MASK[:1]}, ValueError, r"attn_mask: expected .* got \(1, 1, 1, 7\)"),
        (
            None,
            {"cache": RollingCache(2, 3, 5, 5)},
            ValueError,
            r"cache: expected one of the window 4, got 5",
        ),
        (
            None,
            {"cache": RollingCache(2, 3, 4, 5), "causal": False},
            ValueError,
            r"cache: expected None where the window is dilated or sees later positions",
        ),
    ],
)
def test_bad_input_to_the_module(x, how, error, message):
    local = LocalAttention(15, 3, window=4)
    with pytest.raises(error, match=message):
        local(torch.zeros(2, 7, 15) if x is None else x, **how)


def test_no_cache_for_a_dilated_window():
    local = LocalAttention(15, 3, window=4, dilation=2)
    with pytest.raises(ValueError, match=r"cache: expected None .*got a KVCache with .*dilation=2"):
        local(torch.zeros(2, 7, 15), cache=KVCache(2, 3, 9, 5))


def test_a_ring_refuses_a_plain_mask_once_it_has_closed():
    """`Attention` knows no slots: a mask of all positions does not fit them, and says so."""
    attn, cache = Attention(15, 3), RollingCache(2, 3, 4, 5)
    attn(torch.zeros(2, 6, 15), attn_mask=sliding_window_mask(6, window=4), cache=cache)
    with pytest.raises(ValueError, match=r"attn_mask: expected .* = \(2, 3, 1, 4\), got \(2, 1, 1, 7\)"):
        attn(torch.zeros(2, 1, 15), attn_mask=MASK, cache=cache)


# ------------------------------------------------------------------------------------------------
# Planted bugs: what these tests hold must not hold for a wrong window


WRONG_WINDOWS: dict[str, Any] = {
    "one position too many": lambda right: lambda *a, window, **kw: right(*a, window=window + 1, **kw),
    "one position too few": lambda right: lambda *a, window, **kw: right(*a, window=window - 1, **kw),
    "itself excluded": lambda right: (
        lambda T, S=None, **kw: right(T, S, **kw) & ~torch.eye(S or T, dtype=torch.bool)[(S or T) - T :]
    ),
    "it looks ahead": lambda right: lambda T, S=None, **kw: (m := right(T, S, **kw)) | (m.roll(1, 1)),
    "aligned at the top left": lambda right: lambda T, S=None, **kw: right(S or T, **kw)[:T],
}


@pytest.mark.parametrize(
    ("name", "T"),
    # in a text of several blocks the pattern is cut from a square, which has one alignment only
    [(name, T) for name in WRONG_WINDOWS for T in (30, 200) if (name, T) != ("aligned at the top left", 200)],
)
def test_a_wrong_window_is_caught(name, T, monkeypatch):
    q, k, v = (x.detach() for x in qkv(2, 2, 1, T, S=T + 5))
    pattern: dict[str, Any] = {"window": 9, "causal": True, "dilation": 1}
    want = dense(q, k, v, None, **pattern)
    torch.testing.assert_close(windowed_attention(q, k, v, **pattern), want)
    monkeypatch.setattr(module, "sliding_window_mask", WRONG_WINDOWS[name](module.sliding_window_mask))
    with pytest.raises(AssertionError):
        torch.testing.assert_close(windowed_attention(q, k, v, **pattern), want, atol=1e-6, rtol=1e-6)


def leaking(value: bool) -> Any:
    """`F.pad` that fills a mask with True: what stands outside the text passes for a token."""
    right = torch.nn.functional.pad
    return lambda x, pad, **kw: right(x, pad, value=x.dtype == torch.bool and value, **kw)


def test_padding_of_the_first_block_that_leaks_is_caught(monkeypatch):
    q, k, v = (x.detach() for x in qkv(1, 1, 1, 30))
    want = dense(q, k, v, None, window=9, causal=True, dilation=1)
    monkeypatch.setattr(module.F, "pad", leaking(True))
    got = windowed_attention(q, k, v, window=9, block=4)
    assert (got - want).abs().max() > 1e-3
    torch.testing.assert_close(got[:, :, 9:], want[:, :, 9:])  # behind the first window nothing shows


def test_padding_of_the_last_block_that_leaks_is_caught(monkeypatch):
    q, k, v = (x.detach() for x in qkv(1, 1, 1, 30))
    want = dense(q, k, v, None, window=9, causal=False, dilation=1)
    blocks = attention(q, k, v, block_local_mask(30, block=4, causal=False))[0]
    torch.testing.assert_close(block_local_attention(q, k, v, block=4, causal=False), blocks)
    monkeypatch.setattr(module.F, "pad", leaking(True))
    got = windowed_attention(q, k, v, window=9, causal=False, block=4)
    assert (got - want)[:, :, 22:].abs().max() > 1e-3
    got = block_local_attention(q, k, v, block=4, causal=False)
    assert (got - blocks)[:, :, 28:].abs().max() > 1e-3
    torch.testing.assert_close(got[:, :, :28], blocks[:, :, :28])


def late(cache: RollingCache) -> None:
    """The next position goes one slot too far."""
    cache.length += 1


def short(cache: RollingCache) -> None:
    """The ring closes one position early."""
    cache.window -= 1


@pytest.mark.parametrize("plant", [late, short])
def test_a_ring_that_counts_wrongly_is_caught(plant):
    attn, x = full(make(4)), randn(1, 12, 13, seed=1)
    whole = attn(x, attn_mask=sliding_window_mask(12, window=4))
    for planted in (False, True):
        cache = RollingCache(1, 2, 4, 4, dtype=torch.float64)
        if planted:
            plant(cache)
        with torch.no_grad():
            steps = torch.cat([attn(x[:, t : t + 1], cache=cache) for t in range(12)], 1)
        assert bool(torch.allclose(steps, whole)) is not planted


def test_keys_stored_before_they_are_turned_are_caught(monkeypatch):
    """The ring mixes the slots: a key that does not carry its own position cannot be told where it stood."""
    local, T = make(4), 12
    x, rotary = randn(1, T, 13, seed=1), ROTARY(torch.arange(T), torch.float64)
    whole = local(x, rotary=rotary)
    right = module.rotate
    monkeypatch.setattr(module, "rotate", lambda y, *turn: y if y.size(1) == 2 else right(y, *turn))
    cache = RollingCache(1, 2, 4, 4, dtype=torch.float64)
    with torch.no_grad():
        steps = [
            local(x[:, t : t + 1], rotary=tuple(turn[t : t + 1] for turn in rotary), cache=cache)
            for t in range(T)
        ]
    assert not torch.allclose(torch.cat(steps, 1), whole)
