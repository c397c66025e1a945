"""Norms, positions, embeddings, the feed-forward half and the cache."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from parity import loud_, parity_row
from torch import Tensor, nn

from textbook_code.layers.cache import KVCache
from textbook_code.layers.checks import expect_shape
from textbook_code.layers.embeddings import TokenEmbedding
from textbook_code.layers.feed_forward import ACTIVATIONS, FeedForward
from textbook_code.layers.norms import LayerNorm, RMSNorm
from textbook_code.layers.positions import LearnedPositions, SinusoidalPositions


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ------------------------------------------------------------------------------------------------
# Norms


def load_norm(reference: nn.Module) -> nn.Module:
    kind = LayerNorm if isinstance(reference, nn.LayerNorm) else RMSNorm
    extra = {} if kind is RMSNorm else {"bias": reference.bias is not None}
    ours = kind(reference.weight.numel(), norm_eps=reference.eps, **extra).to(reference.weight.dtype)
    ours.load_state_dict(reference.state_dict())
    return ours


def run_norm(norm: nn.Module) -> dict[str, Tensor]:
    return {"small": norm(0.1 * randn(3, 5, 11)), "large": norm(7 + 50 * randn(2, 11, seed=1))}


@parity_row("layers", "layer norm", "torch.nn.LayerNorm", page="bert-norm")
def test_layer_norm(parity):
    for bias in (True, False):
        reference = loud_(nn.LayerNorm(11, eps=1e-2, bias=bias)).double()
        parity.check(load_norm, reference, ours=run_norm, theirs=run_norm)


@parity_row("layers", "RMS norm", "torch.nn.RMSNorm", page="bert-norm")
def test_rms_norm(parity):
    reference = loud_(nn.RMSNorm(11, eps=1e-2)).double()
    parity.check(load_norm, reference, ours=run_norm, theirs=run_norm)


@torch.no_grad()
def test_norms_are_their_formulas():
    x, eps = randn(3, 5, 11), 1e-2
    layer, rms = loud_(LayerNorm(11, norm_eps=eps)).double(), loud_(RMSNorm(11, norm_eps=eps)).double()
    for i in range(3):
        for j in range(5):
            row = x[i, j].tolist()
            mean = sum(row) / 11
            variance = sum((value - mean) ** 2 for value in row) / 11
            square = sum(value**2 for value in row) / 11
            for d, value in enumerate(row):
                expected = (value - mean) / math.sqrt(variance + eps) * layer.weight[d] + layer.bias[d]
                assert float(layer(x)[i, j, d]) == pytest.approx(float(expected), rel=1e-12)
                expected = value / math.sqrt(square + eps) * rms.weight[d]
                assert float(rms(x)[i, j, d]) == pytest.approx(float(expected), rel=1e-12)


@given(scale=st.floats(0.1, 1e3), shift=st.floats(-1e3, 1e3))
def test_layer_norm_ignores_scale_and_shift_and_rms_norm_scale(scale, shift):
    x = randn(3, 11)
    layer, rms = LayerNorm(11, norm_eps=0.0).double(), RMSNorm(11, norm_eps=0.0).double()
    torch.testing.assert_close(layer(scale * x + shift), layer(x), atol=1e-8, rtol=1e-8)
    torch.testing.assert_close(rms(scale * x), rms(x))
    if abs(shift) > 0.1:
        assert not torch.allclose(rms(x + shift), rms(x))


def test_rms_norm_divides_in_float32():
    x = (300 * randn(3, 101)).to(torch.float16)  # its squares overflow float16
    norm = loud_(RMSNorm(101)).half()
    assert norm(x).dtype == torch.float16
    wide = x.float() * (x.float().square().mean(-1, keepdim=True) + 1e-6).rsqrt()
    assert torch.equal(norm(x), norm.weight * wide.half())


# ------------------------------------------------------------------------------------------------
# Positions


def test_sinusoidal_positions_are_the_formula():
    table = SinusoidalPositions(13, 10)(13)
    for t in range(13):
        for i in range(5):
            angle = t / 10000 ** (2 * i / 10)
            assert float(table[t, 2 * i]) == pytest.approx(math.sin(angle), abs=1e-6)
            assert float(table[t, 2 * i + 1]) == pytest.approx(math.cos(angle), abs=1e-6)


def test_sinusoidal_positions_speak_of_distance():
    """The product of two positions depends on how far apart they are only."""
    table = SinusoidalPositions(50, 16).double().weight
    products = table @ table.T
    for distance in (0, 1, 7, 30):
        diagonal = products.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), atol=1e-5, rtol=1e-5)
    assert float(products[0, 0]) == pytest.approx(8) and float(products[0, 7]) < 7.9


def test_sinusoidal_positions_are_no_weights():
    positions = SinusoidalPositions(13, 10)
    assert not list(positions.parameters()) and not positions.state_dict()


@pytest.mark.parametrize("positions", [LearnedPositions(11, 6), SinusoidalPositions(11, 6)])
def test_positions_behind_a_cache_and_beyond_the_table(positions):
    whole = positions(11)
    assert whole.shape == (11, 6)
    assert torch.equal(positions(4, start=7), whole[7:])
    assert len({tuple(row.tolist()) for row in whole}) == 11
    for T, start, message in [
        (12, 0, r"T: expected 1 to 11 positions from start=0 \(max_seq_len=11\), got 12"),
        (5, 7, r"T: expected 1 to 4 positions from start=7 .*got 5"),
        (0, 0, r"T: expected 1 to 11 .*got 0"),
        (1, -1, r"start: expected 0 to 10 .*got -1"),
        (1, 11, r"start: expected 0 to 10 .*got 11"),
    ]:
        with pytest.raises(ValueError, match=message):
            positions(T, start=start)


def test_learned_positions_learn():
    positions = LearnedPositions(11, 6)
    positions(3, start=2).sum().backward()
    assert positions.weight.grad.sum(1).tolist() == [0, 0, 6, 6, 6, 0, 0, 0, 0, 0, 0]


def test_sinusoidal_positions_of_an_odd_width():
    with pytest.raises(ValueError, match=r"d_model: expected an even width .*got 7"):
        SinusoidalPositions(11, 7)


# ------------------------------------------------------------------------------------------------
# Embeddings and the feed-forward half


def test_token_embedding_looks_up_and_scores():
    embed = loud_(TokenEmbedding(11, 5)).double()
    tokens = torch.tensor([[3, 0, 10], [7, 7, 1]])
    assert torch.equal(embed(tokens), embed.weight[tokens])
    assert torch.equal(embed(tokens.int()), embed(tokens))
    x = randn(2, 3, 5)
    torch.testing.assert_close(embed.attend(x), torch.einsum("btd,vd->btv", x, embed.weight))


@pytest.mark.parametrize(
    ("tokens", "error", "message"),
    [
        (torch.zeros(2, 3), TypeError, r"tokens: expected a tensor of integer ids.*, got torch.float32"),
        (torch.zeros(2, 3).bool(), TypeError, r"tokens: expected a tensor of integer ids.*, got torch.bool"),
        ([[1, 2]], TypeError, r"tokens: expected a tensor.*, got list"),
        (torch.tensor([[0, 11]]), ValueError, r"tokens: expected ids from 0 to 10, got 0 to 11"),
        (torch.tensor([[-1, 3]]), ValueError, r"tokens: expected ids from 0 to 10, got -1 to 3"),
    ],
)
def test_ids_that_are_none(tokens, error, message):
    with pytest.raises(error, match=message):
        TokenEmbedding(11, 5)(tokens)


@pytest.mark.parametrize(
    ("name", "formula"),
    [
        ("relu", lambda x: x.clamp(min=0)),
        ("gelu", lambda x: x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))),
        ("gelu_tanh", lambda x: 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))),
    ],
)
def test_feed_forward_is_its_formula(name, formula):
    ffn, x = loud_(FeedForward(5, 13, activation=name)).double(), randn(2, 3, 5)
    inner = formula(x @ ffn.fc1.weight.T + ffn.fc1.bias)
    torch.testing.assert_close(ffn(x), inner @ ffn.fc2.weight.T + ffn.fc2.bias, atol=1e-12, rtol=1e-12)
    assert name in ACTIVATIONS


def test_feed_forward_treats_each_token_by_itself():
    ffn, x = loud_(FeedForward(5, 13)).double(), randn(2, 7, 5)
    torch.testing.assert_close(ffn(x)[:, [3]], ffn(x[:, [3]]))
    assert [name for name, _ in FeedForward(5, 13, bias=False).named_parameters()] == [
        "fc1.weight",
        "fc2.weight",
    ]


def test_an_unknown_activation():
    with pytest.raises(ValueError, match=r"activation: expected one of \['gelu', .*\], got 'gelo'"):
        FeedForward(5, 13, activation="gelo")


# ------------------------------------------------------------------------------------------------
# The cache


@given(pieces=st.lists(st.integers(1, 4), min_size=1, max_size=5))
def test_a_cache_returns_what_was_stored_in_order(pieces):
    cache = KVCache(2, 3, 20, 5, dtype=torch.float64)
    k, v = randn(2, 3, sum(pieces), 5), randn(2, 3, sum(pieces), 5, seed=1)
    start = 0
    for T in pieces:
        end = start + T
        got_k, got_v = cache.append(k[:, :, start:end], v[:, :, start:end])
        assert torch.equal(got_k, k[:, :, :end]) and torch.equal(got_v, v[:, :, :end])
        assert cache.length == end
        start = end


def test_a_cache_keeps_its_memory():
    cache = KVCache(2, 3, 7, 5)
    before = cache.k.data_ptr(), cache.v.data_ptr()
    assert cache.k.numel() + cache.v.numel() == 2 * 2 * 3 * 7 * 5
    for _ in range(7):
        k, v = cache.append(torch.ones(2, 3, 1, 5), torch.ones(2, 3, 1, 5))
    assert (cache.k.data_ptr(), cache.v.data_ptr()) == before == (k.data_ptr(), v.data_ptr())


@pytest.mark.parametrize(
    ("k", "v", "error", "message"),
    [
        (torch.zeros(2, 3, 8, 5), None, ValueError, r"k: expected at most 5 more positions .*got 8"),
        (torch.zeros(1, 3, 1, 5), None, ValueError, r"k: expected .* B = 2.*, got \(1, 3, 1, 5\)"),
        (torch.zeros(2, 1, 1, 5), None, ValueError, r"k: expected .* K = 3.*, got \(2, 1, 1, 5\)"),
        (torch.zeros(2, 3, 1, 4), None, ValueError, r"k: expected .* Dh = 5.*, got \(2, 3, 1, 4\)"),
        (torch.zeros(2, 3, 1, 5), torch.zeros(2, 3, 2, 5), ValueError, r"v: .* T = 1.*, got \(2, 3, 2, 5\)"),
        (torch.zeros(2, 3, 1, 5).double(), None, TypeError, r"k: expected torch.float32, got torch.float64"),
        (
            torch.zeros(2, 3, 1, 5),
            torch.zeros(2, 3, 1, 5).bfloat16(),
            TypeError,
            r"v: expected torch.float32, got torch.bfloat16",
        ),
    ],
)
def test_what_a_cache_does_not_take(k, v, error, message):
    cache = KVCache(2, 3, 7, 5)
    cache.append(torch.zeros(2, 3, 2, 5), torch.zeros(2, 3, 2, 5))
    with pytest.raises(error, match=message):
        cache.append(k, k if v is None else v)
    assert cache.length == 2


# ------------------------------------------------------------------------------------------------


def test_a_shape_is_told_in_letters_and_numbers():
    expect_shape("x", torch.zeros(2, 3, 5), "B T D", D=5)
    for x, message in [
        (torch.zeros(2, 3, 5), r"^x: expected shape \(B, T, D\) with B = 7, D = 5, got \(2, 3, 5\)$"),
        (torch.zeros(7, 5), r"^x: expected shape \(B, T, D\) with B = 7, D = 5, got \(7, 5\)$"),
    ]:
        with pytest.raises(ValueError, match=message):
            expect_shape("x", x, "B T D", B=7, D=5)
    with pytest.raises(TypeError, match="x: expected a tensor, got NoneType"):
        expect_shape("x", None, "B T D")
