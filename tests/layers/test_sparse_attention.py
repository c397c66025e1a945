"""Sparse patterns: each cheap form against its mask, the masks against their definitions and as graphs.

Every mechanism has bugs planted in it at the end of the file, and each must be caught by the comparison that
stands for it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from parity import error_of, loud_
from torch import Tensor, nn

from textbook_code.layers.attention import Attention, attention
from textbook_code.layers.local_attention import windowed_attention
from textbook_code.layers.masks import causal_mask, key_mask, sliding_window_mask
from textbook_code.layers.sparse_attention import (
    PARTS,
    BigBirdAttention,
    LongformerAttention,
    SparseAttention,
    _shared,
    add_global,
    bigbird,
    bigbird_attention,
    bigbird_mask,
    diameter,
    find_global,
    fixed_attention,
    fixed_mask,
    longformer,
    random_blocks,
    reach,
    reachable,
    strided,
    strided_attention,
    strided_mask,
    to_band,
    window_attention,
    window_mask,
    window_scores,
)

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "longformer_chunks.npz"
seeds = st.integers(0, 2**31 - 1)
lengths = st.integers(1, 41)


def qkv(B: int, H: int, T: int, Dh: int = 5, *, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(B, H, T, Dh, generator=generator).double().requires_grad_() for _ in "qkv"]


def gap(cheap: Tensor, dense: Tensor, inputs: list[Tensor], real: Tensor | None = None) -> float:
    """The largest error of the outputs, of real tokens, and of the gradients of a random sum of them."""
    w = torch.randn(dense.shape, generator=torch.Generator().manual_seed(5)).double()
    if real is not None:
        w = w * real[:, None, :, None]
    grads = [torch.autograd.grad((out * w).sum(), inputs) for out in (cheap, dense)]
    shown = (x if real is None else x * real[:, None, :, None] for x in (cheap, dense))
    return max(error_of(*shown), *(error_of(a, b) for a, b in zip(*grads, strict=True)))


# ------------------------------------------------------------------------------------------------
# The masks are the sets that the papers define


def by_definition(T: int, sees: Callable[[int, int], bool]) -> Tensor:
    return torch.tensor([[sees(i, j) for j in range(T)] for i in range(T)])


@given(T=lengths, stride=st.integers(1, 12))
def test_the_strided_mask_is_the_papers_set(T, stride):
    first = by_definition(T, lambda i, j: max(0, i - stride) < j <= i or i == j)
    second = by_definition(T, lambda i, j: j <= i and (i - j) % stride == 0)
    papers_first = by_definition(T, lambda i, j: max(0, i - stride) <= j <= i)  # one position more
    inside = by_definition(T, lambda i, j: i - stride < j <= i)
    assert torch.equal(strided_mask(T, stride=stride, part="first"), inside)
    assert bool((first <= inside).all())
    assert torch.equal(strided_mask(T, stride=stride, part="second"), second)
    assert torch.equal(strided_mask(T, stride=stride), papers_first | second)


@given(T=lengths, stride=st.integers(1, 12), data=st.data())
def test_the_fixed_mask_is_the_papers_set(T, stride, data):
    c = data.draw(st.integers(1, stride))
    first = by_definition(T, lambda i, j: j <= i and j // stride == i // stride)
    second = by_definition(T, lambda i, j: j <= i and j % stride >= stride - c)
    assert torch.equal(fixed_mask(T, stride=stride, summary=c, part="first"), first)
    assert torch.equal(fixed_mask(T, stride=stride, summary=c, part="second"), second)
    assert torch.equal(fixed_mask(T, stride=stride, summary=c), first | second)


@given(T=lengths, half=st.integers(1, 12), dilation=st.integers(1, 4))
def test_the_window_mask_is_the_papers_set(T, half, dilation):
    allowed = range(-half * dilation, half * dilation + 1, dilation)
    want = by_definition(T, lambda i, j: j - i in allowed)
    assert torch.equal(window_mask(T, window=2 * half, dilation=dilation), want)


def test_bigbirds_mask_shows_the_blocks():
    blocks = torch.tensor([[[3, 4], [4, 5], [1, 5], [1, 2], [2, 3]]])
    b, T, N = 3, 20, 7  # the last block has two positions
    looks = {i: {0, i - 1, i, i + 1, N - 1, *blocks[0, i - 1].tolist()} for i in range(1, N - 1)}
    want = by_definition(T, lambda i, j: i // b in (0, N - 1) or j // b in looks[i // b])
    assert torch.equal(bigbird_mask(T, blocks, block_size=b)[0], want)


# ------------------------------------------------------------------------------------------------
# The cheap forms compute what the masks compute


@given(T=lengths, stride=st.integers(1, 12), part=st.sampled_from(PARTS), seed=seeds)
def test_strided_is_dense(T, stride, part, seed):
    inputs = qkv(2, 3, T, seed=seed)
    want = attention(*inputs, strided_mask(T, stride=stride, part=part))[0]
    assert gap(strided_attention(*inputs, stride=stride, part=part), want, inputs) < 1e-11


@given(T=lengths, stride=st.integers(1, 12), part=st.sampled_from(PARTS), seed=seeds, data=st.data())
def test_fixed_is_dense(T, stride, part, seed, data):
    c = data.draw(st.integers(1, stride))
    inputs = qkv(2, 3, T, seed=seed)
    want = attention(*inputs, fixed_mask(T, stride=stride, summary=c, part=part))[0]
    assert gap(fixed_attention(*inputs, stride=stride, summary=c, part=part), want, inputs) < 1e-11


def random_masks(T: int, seed: int) -> tuple[Tensor, Tensor]:
    """Real tokens with gaps, each text with at least one; global ones, also none, and some on padding."""
    generator = torch.Generator().manual_seed(seed)
    token_mask = torch.rand(3, T, generator=generator) < 0.8
    token_mask[:, 0] = True
    global_mask = torch.rand(3, T, generator=generator) < torch.tensor([[0.0], [0.1], [0.4]])
    return token_mask, global_mask


@given(
    T=lengths,
    half=st.integers(1, 12),
    dilation=st.sampled_from([1, 1, 2, 3, 5]),
    masked=st.booleans(),
    seed=seeds,
)
def test_windows_in_chunks_are_dense(T, half, dilation, masked, seed):
    inputs = qkv(3, 2, T, seed=seed)
    token_mask, global_mask = random_masks(T, seed)
    mask = window_mask(T, window=2 * half, dilation=dilation)[None, None] | key_mask(global_mask)
    if masked:
        mask = mask & key_mask(token_mask)
    cheap = window_attention(
        *inputs,
        window=2 * half,
        dilation=dilation,
        token_mask=token_mask if masked else None,
        global_tokens=find_global(global_mask),
    )
    assert gap(cheap, attention(*inputs, mask)[0], inputs, token_mask) < 1e-11


def test_without_global_tokens_it_is_the_windowed_attention_of_the_other_module():
    inputs = qkv(3, 2, 41)
    token_mask, _ = random_masks(41, 0)
    other = windowed_attention(*inputs, token_mask, window=5, causal=False)
    assert gap(window_attention(*inputs, window=8, token_mask=token_mask), other, inputs, token_mask) < 1e-11


@given(block_size=st.integers(1, 5), N=st.integers(5, 12), seed=seeds, data=st.data())
def test_bigbirds_blocks_are_dense(block_size, N, seed, data):
    T = data.draw(st.integers((N - 1) * block_size + 1, N * block_size))
    r = data.draw(st.integers(0, min(3, N - 5)))
    inputs = qkv(3, 2, T, seed=seed)
    token_mask, _ = random_masks(T, seed)
    blocks = random_blocks(N, num_random=r, num_heads=2, seed=seed)
    mask = bigbird_mask(T, blocks, block_size=block_size) & key_mask(token_mask)
    cheap = bigbird_attention(*inputs, blocks, block_size=block_size, token_mask=token_mask)
    assert gap(cheap, attention(*inputs, mask)[0], inputs, token_mask) < 1e-11


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_less_precision_they_are_dense_too(dtype):
    q, k, v = (x.detach().to(dtype) for x in qkv(2, 3, 37, 8))
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    blocks = random_blocks(10, num_random=2, num_heads=3, seed=0)
    for cheap, mask in (
        (strided_attention(q, k, v, stride=6), strided_mask(37, stride=6)),
        (fixed_attention(q, k, v, stride=6, summary=2), fixed_mask(37, stride=6, summary=2)),
        (window_attention(q, k, v, window=6), window_mask(37, window=6)),
        (bigbird_attention(q, k, v, blocks, block_size=4), bigbird_mask(37, blocks, block_size=4)),
    ):
        want = attention(q.float(), k.float(), v.float(), mask)[0]
        torch.testing.assert_close(cheap.float(), want, atol=tolerance, rtol=tolerance)


def test_values_of_another_width_and_a_scale():
    q, k, v = qkv(2, 3, 29)
    wide = torch.cat([v, v], -1)
    blocks = random_blocks(8, num_random=1, num_heads=3, seed=0)
    for cheap, mask in (
        (strided_attention(q, k, wide, stride=5, scale=0.7), strided_mask(29, stride=5)),
        (fixed_attention(q, k, wide, stride=5, scale=0.7), fixed_mask(29, stride=5)),
        (window_attention(q, k, wide, window=6, scale=0.7), window_mask(29, window=6)),
        (
            bigbird_attention(q, k, wide, blocks, block_size=4, scale=0.7),
            bigbird_mask(29, blocks, block_size=4),
        ),
    ):
        torch.testing.assert_close(cheap, attention(q, k, wide, mask, scale=0.7)[0])


def scores_made(cheap: Callable[[list[Tensor]], Tensor], T: int) -> int:
    """How many numbers the largest product of a forward pass has: none may have T² of them."""
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor):
                largest = max(largest, out.numel())
            return out

    with torch.no_grad(), Watch():
        cheap([x.detach().float() for x in qkv(1, 1, T, 2)])
    return largest


@pytest.mark.parametrize("T", [256, 1024])
def test_no_more_than_the_pattern_is_scored(T):
    l, w, b, r = int(T**0.5), 16, 4, 3
    blocks = random_blocks(T // b, num_random=r, num_heads=1, seed=0)
    first = find_global(torch.arange(T)[None] == 0)
    limits = {
        T * (2 * l + T // l): lambda x: strided_attention(*x, stride=l),
        T * (l + T // l): lambda x: fixed_attention(*x, stride=l),
        T * (3 * w // 2 + 1): lambda x: window_attention(*x, window=w, global_tokens=first),
        T * b * (5 + r): lambda x: bigbird_attention(*x, blocks, block_size=b),
    }
    for limit, cheap in limits.items():
        assert T * 8 < scores_made(cheap, T) <= limit < T * T


# ------------------------------------------------------------------------------------------------
# The published sliding chunks, as numbers


def test_the_band_is_that_of_the_published_sliding_chunks():
    data = np.load(GOLDEN)
    w = json.loads(str(data["meta"]))["config"]["w"]  # one side
    q, k, v = (torch.from_numpy(data[f"in.{x}"]).transpose(1, 2) for x in "qkv")  # (B, H, T, Dh)
    want = {x: torch.from_numpy(data[f"out.{x}"]).transpose(1, 2) for x in ("scores", "probs", "output")}
    scores, seen = window_scores(q, k, window=2 * w)
    chunks = scores.masked_fill(~seen, -torch.inf)
    band = to_band(chunks)
    assert torch.equal(band.isinf(), want["scores"].isinf())
    finite = ~band.isinf()
    assert error_of(band[finite], want["scores"][finite]) < 1e-12
    assert error_of(to_band(chunks.softmax(-1)), want["probs"]) < 1e-12
    got = window_attention(q, k, v, window=2 * w, scale=1.0)
    assert error_of(got, want["output"]) < 1e-12
    assert error_of(window_attention(q, k, v, window=2 * w - 2, scale=1.0), want["output"]) > 1e-2


# ------------------------------------------------------------------------------------------------
# Graphs


@given(T=lengths, stride=st.integers(1, 12), data=st.data())
def test_two_layers_see_all_that_is_earlier(T, stride, data):
    """The paper's condition: a path of two steps from any position to any earlier one."""
    c = data.draw(st.integers(1, stride))
    for masks in (
        [strided_mask(T, stride=stride, part=part) for part in ("first", "second")],
        [fixed_mask(T, stride=stride, summary=c, part=part) for part in ("first", "second")],
    ):
        product = masks[1].float() @ masks[0].float() > 0
        if masks is not None and stride > 1:
            assert torch.equal(reachable(*masks), causal_mask(T))
        assert torch.equal(product | masks[0] | masks[1], causal_mask(T))
    assert torch.equal(reachable(strided_mask(T, stride=stride), steps=2), causal_mask(T))
    assert torch.equal(reachable(fixed_mask(T, stride=stride, summary=c), steps=2), causal_mask(T))


def test_the_order_of_the_layers_matters_for_the_fixed_pattern():
    """The block must be read before its end is: the other way round two layers are not enough."""
    first, second = (fixed_mask(24, stride=6, part=part) for part in ("first", "second"))
    assert torch.equal(reachable(first, second), causal_mask(24))
    assert not torch.equal(reachable(second, first), causal_mask(24))
    first, second = (strided_mask(24, stride=6, part=part) for part in ("first", "second"))
    assert torch.equal(reachable(second, first), causal_mask(24))


@given(T=st.integers(2, 60), half=st.integers(1, 6), steps=st.integers(0, 5))
def test_windows_reach_as_far_as_their_layers_add_up(T, half, steps):
    mask = window_mask(T, window=2 * half)
    want = window_mask(T, window=2 * half * steps) if steps else torch.eye(T).bool()
    assert torch.equal(reachable(mask, steps=steps), want)
    assert torch.equal(reach(mask, steps=steps), want.sum(-1))
    assert diameter(mask) == -(-(T - 1) // half)
    causal = sliding_window_mask(T, window=half + 1)
    assert diameter(causal, causal=True) == -(-(T - 1) // half)


def test_one_global_token_brings_all_within_two_steps():
    mask = window_mask(100, window=4)
    assert diameter(mask) == 50
    with_global = add_global(mask, torch.arange(100)[None] == 7)[0, 0]
    assert diameter(with_global) == 2
    blocks = random_blocks(20, num_random=2, num_heads=1, seed=0)
    assert diameter(bigbird_mask(100, blocks, block_size=5)[0]) == 2  # its first block is global
    with pytest.raises(ValueError, match="mask: some position is never heard of"):
        diameter(torch.eye(3).bool())


def test_what_an_output_depends_on_is_what_the_graph_says():
    """Two layers of each module: the gradient is zero exactly where the graph has no path."""
    T, D = 30, 8
    blocks = random_blocks(10, num_random=1, num_heads=2, seed=3)
    first = (torch.arange(T) == 4)[None]
    cases: list[tuple[nn.Module, dict[str, Tensor], Tensor]] = [
        (SparseAttention(D, 2, stride=5), {}, strided_mask(T, stride=5)),
        (SparseAttention(D, 2, stride=5, pattern="fixed"), {}, fixed_mask(T, stride=5)),
        (
            LongformerAttention(D, 2, window=4),
            {"global_mask": first},
            add_global(window_mask(T, window=4), first)[0, 0],
        ),
        (LongformerAttention(D, 2, window=4), {}, window_mask(T, window=4)),
        (
            BigBirdAttention(D, 2, block_size=3),
            {"blocks": blocks},
            bigbird_mask(T, blocks, block_size=3).any(0),
        ),
    ]
    for layer, kwargs, mask in cases:
        loud_(layer).double()
        x = torch.randn(1, T, D, generator=torch.Generator().manual_seed(1)).double()
        jacobian = torch.autograd.functional.jacobian(
            lambda x, layer=layer, kw=kwargs: x + layer(x + layer(x, **kw), **kw), x
        )
        depends = jacobian[0, :, :, 0].abs().amax((1, 3)) > 0
        assert torch.equal(depends, reachable(mask, steps=2)), layer


# ------------------------------------------------------------------------------------------------
# The modules


def pair(kind: type[nn.Module], *args: int, **kw: object) -> tuple[nn.Module, nn.Module]:
    """A cheap and a dense module of the same loud weights."""
    cheap = loud_(kind(*args, **kw)).double().eval()  # type: ignore[arg-type]
    dense = kind(*args, **kw, dense=True).double().eval()  # type: ignore[arg-type]
    dense.load_state_dict(cheap.state_dict())
    return cheap, dense


def module_gap(
    cheap: nn.Module, dense: nn.Module, x: Tensor, real: Tensor | None = None, **kw: object
) -> float:
    """The largest error of outputs and of all gradients."""
    shown = [m(x, **kw) * (1 if real is None else real[..., None]) for m in (cheap, dense)]
    w = torch.randn(x.shape, generator=torch.Generator().manual_seed(5)).double()
    grads = []
    for m, out in zip((cheap, dense), shown, strict=True):
        used = [p for p in m.parameters() if p.requires_grad]
        grads.append(torch.autograd.grad((out * w).sum(), [x, *used], allow_unused=True))
    errors = [error_of(*shown)]
    for a, b in zip(*grads, strict=True):
        assert (a is None) == (b is None)
        errors += [] if a is None else [error_of(a, b)]
    return max(errors)


def inputs(B: int = 3, T: int = 31, D: int = 12) -> Tensor:
    x = torch.randn(B, T, D, generator=torch.Generator().manual_seed(2)).double()
    return x.requires_grad_()


@pytest.mark.parametrize("pattern", ["strided", "fixed"])
@pytest.mark.parametrize("use", [*PARTS, "heads"])
def test_the_sparse_transformers_module(pattern, use):
    cheap, dense = pair(SparseAttention, 12, 3, stride=5, pattern=pattern, summary=2, use=use)
    assert module_gap(cheap, dense, inputs()) < 1e-11


def test_heads_are_shared_out_among_the_two_sets():
    """With `heads` half of the heads have the first set, the others the second."""
    layer = loud_(SparseAttention(12, 4, stride=5, use="heads")).double()
    plain = loud_(Attention(12, 4)).double()
    plain.load_state_dict(layer.state_dict())
    sets = [strided_mask(31, stride=5, part=part) for part in ("first", "first", "second", "second")]
    x = inputs()
    torch.testing.assert_close(layer(x), plain(x, attn_mask=torch.stack(sets)))


@pytest.mark.parametrize("pattern", ["strided", "fixed"])
def test_nothing_later_is_seen(pattern):
    layer = loud_(SparseAttention(12, 3, stride=5, pattern=pattern)).double()
    x = inputs().detach()
    changed = x.clone()
    changed[:, 17:] = 9.0
    assert torch.equal(layer(x)[:, :17], layer(changed)[:, :17])
    assert not torch.equal(layer(x)[:, 17:], layer(changed)[:, 17:])


@given(T=lengths, half=st.integers(1, 8), seed=seeds)
def test_longformers_module(T, half, seed):
    cheap, dense = pair(LongformerAttention, 12, 3, window=2 * half)
    token_mask, global_mask = random_masks(T, seed)
    x = inputs(T=T)
    for masks in ({}, {"token_mask": token_mask}, {"token_mask": token_mask, "global_mask": global_mask}):
        real = token_mask if masks else None
        assert module_gap(cheap, dense, x, real, **masks) < 1e-11


def with_global_projections(layer: LongformerAttention) -> Attention:
    """An ordinary attention that has the global projections."""
    other = Attention(12, 3).double()
    for name in "qkv":
        getattr(other, f"{name}_proj").load_state_dict(getattr(layer, f"{name}_global_proj").state_dict())
    other.out_proj.load_state_dict(layer.out_proj.state_dict())
    return other


def test_longformers_global_rows_are_full_attention_with_their_own_projections():
    layer = loud_(LongformerAttention(12, 3, window=4)).double()
    other = with_global_projections(layer)
    token_mask, global_mask = random_masks(31, 4)
    x = inputs()
    rows = global_mask & token_mask
    assert int(rows.sum()) > 3
    got = layer(x, token_mask=token_mask, global_mask=global_mask)
    torch.testing.assert_close(got[rows], other(x, attn_mask=key_mask(token_mask))[rows])
    untouched = layer(x, token_mask=token_mask)
    assert not torch.allclose(
        got[token_mask & ~rows], untouched[token_mask & ~rows]
    )  # they see the global ones


def test_all_global_is_full_attention():
    layer = loud_(LongformerAttention(12, 3, window=2)).double()
    layer.start_global_from_local()
    plain = Attention(12, 3).double()
    plain.load_state_dict({name: p for name, p in layer.state_dict().items() if "global" not in name})
    x = inputs()
    torch.testing.assert_close(layer(x, global_mask=torch.ones(3, 31).bool()), plain(x))
    wide = LongformerAttention(12, 3, window=62).double()  # as does a window of everything
    wide.load_state_dict(layer.state_dict())
    torch.testing.assert_close(wide(x), plain(x))


def test_dilation_by_the_head():
    layer = loud_(LongformerAttention(12, 3, window=4, dilation=(1, 2, 5))).double()
    plain = Attention(12, 3).double()
    plain.load_state_dict({name: p for name, p in layer.state_dict().items() if "global" not in name})
    masks = torch.stack([window_mask(31, window=4, dilation=d) for d in (1, 2, 5)])
    x = inputs()
    torch.testing.assert_close(layer(x), plain(x, attn_mask=masks))
    token_mask, global_mask = random_masks(31, 4)
    for dilation in ((1, 2, 5), (2, 1, 2), 3):
        cheap, dense = pair(LongformerAttention, 12, 3, window=4, dilation=dilation)
        both = {"token_mask": token_mask, "global_mask": global_mask}
        assert module_gap(cheap, dense, x, token_mask, **both) < 1e-11


def test_longformer_does_not_mind_padding():
    layer = loud_(LongformerAttention(12, 3, window=6)).double()
    x = inputs().detach()
    token_mask = torch.arange(31) < torch.tensor([[31], [17], [4]])
    global_mask = (torch.arange(31) == 0).expand(3, -1)
    noise = torch.where(token_mask[..., None], x, 1e3)
    got = layer(noise, token_mask=token_mask, global_mask=global_mask)
    for row, n in enumerate((31, 17, 4)):
        alone = layer(x[row : row + 1, :n], global_mask=global_mask[row : row + 1, :n])
        torch.testing.assert_close(got[row, :n], alone[0])
    on_padding = layer(noise, token_mask=token_mask, global_mask=global_mask | ~token_mask)
    torch.testing.assert_close(on_padding[token_mask], got[token_mask])  # padding is never global


@pytest.mark.parametrize("T", [37, 40])
def test_bigbirds_module(T):
    cheap, dense = pair(BigBirdAttention, 12, 3, block_size=3, num_random=2, seed=5)
    token_mask, _ = random_masks(T, 3)
    assert cheap.blocks(T) is not None
    x = inputs(T=T)
    assert module_gap(cheap, dense, x) < 1e-11
    assert module_gap(cheap, dense, x, token_mask, token_mask=token_mask) < 1e-11
    given_blocks = random_blocks(-(-T // 3), num_random=1, num_heads=3, seed=8)
    assert module_gap(cheap, dense, x, blocks=given_blocks) < 1e-11
    assert not torch.allclose(cheap(x, blocks=given_blocks), cheap(x))


def test_a_short_text_is_attended_to_in_full():
    layer = loud_(BigBirdAttention(12, 3, block_size=3, num_random=2)).double()
    plain = Attention(12, 3).double()
    plain.load_state_dict(layer.state_dict())
    at_most = (5 + 2 * 2) * 3
    x = inputs(T=at_most)
    assert layer.blocks(at_most) is None and layer.blocks(at_most + 1) is not None
    mask = torch.rand(3, at_most, generator=torch.Generator().manual_seed(1)) < 0.7
    torch.testing.assert_close(layer(x), plain(x))
    torch.testing.assert_close(layer(x, token_mask=mask), plain(x, attn_mask=key_mask(mask)))
    x = inputs(T=at_most + 1)
    assert not torch.allclose(layer(x), plain(x))


def test_random_blocks_are_random_fixed_and_none_that_is_seen_anyway():
    N, r = 40, 3
    blocks = random_blocks(N, num_random=r, num_heads=4, seed=1)
    assert blocks.shape == (4, N - 2, r)
    assert torch.equal(blocks, random_blocks.__wrapped__(N, num_random=r, num_heads=4, seed=1))
    assert not torch.equal(blocks, random_blocks(N, num_random=r, num_heads=4, seed=2))
    assert not torch.equal(blocks[0], blocks[1])
    own = torch.arange(1, N - 1)[:, None]
    assert int(blocks.min()) == 1 and int(blocks.max()) == N - 2
    assert bool(((blocks - own).abs() > 1).all()) and bool((blocks.diff(dim=-1) > 0).all())
    counts = torch.zeros(N)
    for seed in range(200):
        drawn = random_blocks(12, num_random=2, num_heads=2, seed=seed)
        counts += torch.bincount(drawn[:, 4].flatten(), minlength=N)  # of block 5: 1, 2, 3, 7, 8, 9, 10
    seen = counts[counts > 0]
    assert counts.nonzero().flatten().tolist() == [1, 2, 3, 7, 8, 9, 10]
    assert float(seen.max() / seen.min()) < 1.5  # none is preferred
    all_free = random_blocks(9, num_random=4, num_heads=1, seed=0)
    assert all_free[0, 3].tolist() == [1, 2, 6, 7]  # as many as there are


def test_dropout_is_for_training_only():
    x = inputs().detach()
    for layer in (
        SparseAttention(12, 3, stride=5, dropout=0.5),
        SparseAttention(12, 3, stride=5, pattern="fixed", dropout=0.5),
        LongformerAttention(12, 3, window=4, dropout=0.5),
        BigBirdAttention(12, 3, block_size=3, num_random=1, dropout=0.5),
    ):
        layer.double().eval()
        assert torch.equal(layer(x), layer(x))
        layer.train()
        assert not torch.equal(layer(x), layer(x))


# ------------------------------------------------------------------------------------------------
# What is refused


GOOD = dict(zip("qkv", (x.detach() for x in qkv(2, 3, 30)), strict=True))
BLOCKS = random_blocks(10, num_random=2, num_heads=3, seed=0)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: strided_mask(9, stride=0), ValueError, "stride: expected a positive integer, got 0"),
        (lambda: strided_attention(**GOOD, stride=-1), ValueError, "stride: expected a positive integer"),
        (
            lambda: strided_attention(**GOOD, stride=2.0),
            ValueError,
            "stride: expected a positive integer, got 2.0",
        ),
        (
            lambda: strided_attention(**GOOD, stride=3, part="third"),
            ValueError,
            "part: expected one of merged",
        ),
        (
            lambda: fixed_mask(9, stride=3, summary=4),
            ValueError,
            r"summary: expected 1 to 3 positions .*got 4",
        ),
        (
            lambda: fixed_attention(**GOOD, stride=3, summary=0),
            ValueError,
            "summary: expected 1 to 3 .*got 0",
        ),
        (
            lambda: strided_attention(**{**GOOD, "k": GOOD["k"][:, :, 1:]}, stride=3),
            ValueError,
            "k: expected shape",
        ),
        (
            lambda: strided_attention(**{**GOOD, "v": GOOD["v"].float()}, stride=3),
            TypeError,
            "v: expected torch.float64",
        ),
        (lambda: window_mask(9, window=3), ValueError, "window: expected a positive even number.*got 3"),
        (
            lambda: window_mask(9, window=4, dilation=0),
            ValueError,
            "dilation: expected at least 1, got 0",
        ),
        (lambda: window_attention(**GOOD, window=5), ValueError, "window: expected a positive even number"),
        (lambda: window_attention(**GOOD, window=0), ValueError, "window: expected a positive even number"),
        (
            lambda: window_attention(**GOOD, window=4, token_mask=torch.ones(2, 30)),
            TypeError,
            "token_mask: expected a bool tensor",
        ),
        (
            lambda: window_attention(**GOOD, window=4, token_mask=torch.ones(2, 29).bool()),
            ValueError,
            "token_mask: expected shape",
        ),
        (lambda: find_global(torch.ones(2, 9)), TypeError, "global_mask: expected a bool tensor.*float32"),
        (lambda: find_global(torch.ones(9).bool()), ValueError, "global_mask: expected shape"),
        (lambda: add_global(window_mask(9, window=2), torch.ones(1, 8).bool()), ValueError, "global_mask"),
        (lambda: LongformerAttention(12, 3, window=7), ValueError, "window: expected a positive even number"),
        (lambda: LongformerAttention(12, 5, window=8), ValueError, "num_heads: expected a positive divisor"),
        (
            lambda: LongformerAttention(12, 3, window=8, dilation=(1, 2)),
            ValueError,
            "dilation: expected one for each of 3",
        ),
        (
            lambda: LongformerAttention(12, 3, window=8).double()(
                inputs(), global_mask=torch.zeros(3, 31).long()
            ),
            TypeError,
            "global_mask: expected a bool tensor in which True means yes, got torch.int64",
        ),
        (
            lambda: LongformerAttention(12, 3, window=8).double()(
                inputs(), global_mask=torch.zeros(31).bool()
            ),
            ValueError,
            "global_mask: expected shape",
        ),
        (lambda: LongformerAttention(12, 3, window=8)(inputs()), TypeError, "x: expected torch.float32"),
        (
            lambda: SparseAttention(12, 3, stride=4, pattern="stripes"),
            ValueError,
            "pattern: expected 'strided'",
        ),
        (
            lambda: SparseAttention(12, 3, stride=4, use="all"),
            ValueError,
            "use: expected one of merged, first, second, heads",
        ),
        (lambda: SparseAttention(12, 1, stride=4, use="heads"), ValueError, "num_heads: expected at least 2"),
        (
            lambda: random_blocks(8, num_random=4, num_heads=1, seed=0),
            ValueError,
            "num_random: expected 0 to 3 with 8 blocks.*got 4",
        ),
        (
            lambda: random_blocks(4, num_random=1, num_heads=1, seed=0),
            ValueError,
            "num_random: expected 0 to 0",
        ),
        (
            lambda: bigbird_attention(**GOOD, blocks=BLOCKS, block_size=20),
            ValueError,
            "block_size: expected at least 3 blocks in 30 positions, got 2 of 20",
        ),
        (
            lambda: bigbird_attention(**GOOD, blocks=BLOCKS, block_size=4),
            ValueError,
            "blocks: expected shape",
        ),
        (
            lambda: bigbird_attention(**GOOD, blocks=BLOCKS[:2], block_size=3),
            ValueError,
            "blocks: expected shape .*H = 3",
        ),
        (
            lambda: bigbird_attention(**GOOD, blocks=torch.zeros_like(BLOCKS), block_size=3),
            ValueError,
            "a block seen twice would count twice",
        ),
        (
            lambda: bigbird_mask(30, BLOCKS[..., [0, 0]], block_size=3),
            ValueError,
            "blocks: expected 2 different blocks",
        ),
        (
            lambda: BigBirdAttention(12, 3, block_size=0),
            ValueError,
            "block_size: expected a positive integer",
        ),
        (lambda: BigBirdAttention(12, 3, num_random=-1), ValueError, "num_random: expected at least 0"),
        (lambda: reachable(torch.ones(3, 3)), TypeError, "mask: expected a bool tensor"),
        (lambda: reachable(torch.ones(3, 4).bool()), ValueError, "mask: expected shape"),
        (lambda: reachable(torch.eye(3).bool(), steps=-1), ValueError, "steps: expected at least 0"),
    ],
)
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


# ------------------------------------------------------------------------------------------------
# Planted bugs: what stands above must see each of them


def strided_gap() -> float:
    x = qkv(2, 3, 31)
    return gap(strided_attention(*x, stride=5), attention(*x, strided_mask(31, stride=5))[0], x)


def fixed_gap() -> float:
    x = qkv(2, 3, 31)
    mask = fixed_mask(31, stride=5, summary=2)
    return gap(fixed_attention(*x, stride=5, summary=2), attention(*x, mask)[0], x)


def longformer_gap() -> float:
    cheap, dense = pair(LongformerAttention, 12, 3, window=4, dilation=(1, 2, 1))
    token_mask, global_mask = random_masks(31, 4)
    return module_gap(cheap, dense, inputs(), token_mask, token_mask=token_mask, global_mask=global_mask)


def longformer_against_its_parts() -> float:
    """The rows of global tokens, by an ordinary attention that has the global projections."""
    layer = loud_(LongformerAttention(12, 3, window=4)).double().eval()
    other = with_global_projections(layer)
    token_mask, global_mask = random_masks(31, 4)
    rows = token_mask & global_mask
    got = layer(inputs(), token_mask=token_mask, global_mask=global_mask)
    return error_of(got[rows], other(inputs(), attn_mask=key_mask(token_mask))[rows])


def bigbird_gap() -> float:
    cheap, dense = pair(BigBirdAttention, 12, 3, block_size=3, num_random=2, seed=5)
    token_mask, _ = random_masks(31, 3)
    return module_gap(cheap, dense, inputs(), token_mask, token_mask=token_mask)


MUTATIONS: dict[str, tuple[Callable[[], float], str, str]] = {
    "strided: the diagonal counted twice": (strided_gap, '.tril(-1 if part == "merged" else 0)', ".tril(0)"),
    "strided: the window one too wide, which the column has too": (
        strided_gap,
        "(near < stride)",
        "(near <= stride)",
    ),
    "strided: the window one too narrow": (strided_gap, "(near < stride)", "(near < stride - 1)"),
    "strided: above the first row zeros are seen": (strided_gap, " & (near <= at[:, :, None])", ""),
    "strided: columns read as rows": (
        strided_gap,
        "@ v.transpose(2, 3)).transpose(2, 3)",
        "@ v.transpose(2, 3)).transpose(2, 3).flip(3)",
    ),
    "two softmaxes instead of one": (
        strided_gap,
        "weights.split([s.size(-1) for s, _ in parts], -1)",
        "[s.masked_fill(~seen, -1e9).softmax(-1) / 2 for s, seen in parts]",
    ),
    "fixed: c off by one": (fixed_gap, "x[:, :, :, -summary:]", "x[:, :, :, -summary - 1 : -1]"),
    "fixed: one position of the summary too few": (
        fixed_gap,
        "sets.append((q @ ends_k.transpose(-2, -1), ends < limit))",
        "sets.append((q @ ends_k.transpose(-2, -1), (ends < limit) & ((ends + 1) % stride > 0)))",
    ),
    "fixed: the own block's summary counted twice": (
        fixed_gap,
        'limit = at[:, :1, None] if part == "merged" else at[:, :, None] + 1',
        "limit = at[:, :, None] + 1",
    ),
    "fixed: a look into the own block's future": (
        fixed_gap,
        "causal_mask(stride, device=q.device)))",
        "causal_mask(stride, device=q.device).T))",
    ),
    "window: one position too few": (longformer_gap, "(apart.abs() <= h)", "(apart.abs() < h)"),
    "window: padding leaks": (
        longformer_gap,
        "real = _three_chunks(in_blocks(real, h",
        "real = _three_chunks(in_blocks(real | True, h",
    ),
    "window: what fills the last chunk leaks": (
        longformer_gap,
        "x.new_zeros(shape)",
        "x.new_ones(shape)",
    ),
    "dilation: positions dealt out in runs": (
        longformer_gap,
        "in_blocks(x, dilation).transpose(2, 3)",
        "in_blocks(x, -(-x.size(2) // dilation))",
    ),
    "dilation: the heads in another order": (
        longformer_gap,
        "each[head] = out",
        "each[heads[-1 - place]] = out",
    ),
    "global: the column forgotten": (
        longformer_gap,
        "sets.append((in_blocks(scores, window // 2), seen[:, None, None, None]))",
        "sets.append((in_blocks(scores, window // 2), seen[:, None, None, None] & False))",
    ),
    "global: a near global token counted twice": (
        longformer_gap,
        "local = token_mask & ~taken",
        "local = token_mask",
    ),
    "global: the filled-up places count": (
        longformer_gap,
        "seen = global_tokens.exists & ",
        "seen = (global_tokens.exists | True) & ",
    ),
    "global: rows see padding": (
        longformer_against_its_parts,
        "None if token_mask is None else key_mask(token_mask),\n            dropout",
        "None,\n            dropout",
    ),
    "global: the local query is used": (
        longformer_against_its_parts,
        "split_heads(self.q_global_proj(asking), self.num_heads)",
        "split_heads(self.q_proj(asking), self.num_heads)",
    ),
    "global: the local keys are used": (
        longformer_against_its_parts,
        "split_heads(self.k_global_proj(x), self.num_heads)",
        "split_heads(self.k_proj(x), self.num_heads)",
    ),
    "global: the local values are used": (
        longformer_against_its_parts,
        "split_heads(self.v_global_proj(x), self.num_heads)",
        "split_heads(self.v_proj(x), self.num_heads)",
    ),
    "global: rows not replaced": (
        longformer_against_its_parts,
        "if found is not None:\n            out = self",
        "if False:\n            out = self",
    ),
    "blocks: the first block counted twice": (
        bigbird_gap,
        "once[0, 1] = once[-1, 3] = False",
        "once[-1, 3] = False",
    ),
    "blocks: the last block counted twice": (
        bigbird_gap,
        "once[0, 1] = once[-1, 3] = False",
        "once[0, 1] = False",
    ),
    "blocks: the last block forgotten": (
        bigbird_gap,
        "middle + 1, middle * 0 + N - 1]",
        "middle + 1, middle * 0 + N - 2]",
    ),
    "blocks: padding leaks": (
        bigbird_gap,
        "seen = (real[:, looked] & once[..., None])",
        "seen = ((real[:, looked] | True) & once[..., None])",
    ),
    "blocks: all heads look where the first does": (
        bigbird_gap,
        "x[:, heads, looked]",
        "x[:, heads, looked[:1].expand_as(looked)]",
    ),
    "blocks: the first and the last rows swapped": (
        bigbird_gap,
        "[outer[:, :, :1], inner, outer[:, :, 1:]]",
        "[outer[:, :, 1:], inner, outer[:, :, :1]]",
    ),
    "blocks: full rows see padding": (
        bigbird_gap,
        "v.flatten(2, 3), all_keys, dropout",
        "v.flatten(2, 3), all_keys | True, dropout",
    ),
}
CHECKS = [strided_gap, fixed_gap, longformer_gap, longformer_against_its_parts, bigbird_gap]


@pytest.mark.parametrize("check", CHECKS)
def test_without_a_bug_all_pass(check):
    """So that a verdict below is due to the bug."""
    assert check() < 1e-11


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_planted_bug_is_caught(name, monkeypatch):
    check, right, wrong = MUTATIONS[name]
    sources = {m: Path(m.__file__).read_text("utf-8") for m in (_shared, bigbird, longformer, strided)}
    count = sum(source.count(right) for source in sources.values())
    assert count == 1, f"{count} places to plant {name!r}"
    (module,) = (m for m, source in sources.items() if right in source)
    space: dict[str, object] = {"__name__": module.__name__, "__package__": module.__package__}
    exec(compile(sources[module].replace(right, wrong), module.__file__, "exec"), space)
    if module is _shared:  # the others hold its functions by name
        for user in (bigbird, longformer, strided):
            for shared in ("in_blocks", "joint_weights"):
                monkeypatch.setattr(user, shared, space[shared])
    for public in ("strided_attention", "fixed_attention", "LongformerAttention", "BigBirdAttention"):
        if public in space:
            monkeypatch.setitem(globals(), public, space[public])
    error = check()
    assert error > 1e-3, f"{name!r} passes with an error of {error:.3g}"
