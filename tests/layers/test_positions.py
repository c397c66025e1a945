"""Positions: rotary and relative ones against transformers, and what each is for."""

from __future__ import annotations

import math

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from parity import parity_row
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb
from transformers.models.t5.modeling_t5 import T5Attention

from textbook_code.layers.positions import (
    LearnedPositions,
    Llama3Scaling,
    RelativeBias,
    RotaryPositions,
    rotate,
    token_positions,
)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ------------------------------------------------------------------------------------------------
# Which position


def test_token_positions_count_real_tokens_wherever_the_padding_stands():
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [1, 1, 0, 0, 0]]).bool()
    expected = [[0, 0, 0, 1, 2], [0, 1, 2, 3, 4], [0, 1, 1, 1, 1]]
    assert token_positions(mask).tolist() == expected
    with pytest.raises(TypeError, match="token_mask: expected a bool tensor"):
        token_positions(mask.long())


def test_learned_positions_at_are_rows_of_the_table():
    table = LearnedPositions(7, 5)
    assert torch.equal(table.at(torch.arange(2, 6)), table(4, start=2))
    ids = torch.tensor([[3, 0], [6, 6]])
    assert torch.equal(table.at(ids), table.weight[ids])
    with pytest.raises(ValueError, match=r"positions: expected 0 to 6 \(max_seq_len - 1\), got 2 to 7"):
        table.at(torch.tensor([2, 7]))
    with pytest.raises(TypeError, match="positions: expected a tensor of integer ids"):
        table.at(torch.tensor([0.5]))


# ------------------------------------------------------------------------------------------------
# RoPE

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


@parity_row(
    "layers",
    "rotary positions",
    "transformers.LlamaConfig",
    page="llama-rope",
    dtype="float32",
    backward=False,
)
def test_rotary_positions(parity):
    q, k = randn(2, 4, 300, 14).float(), randn(2, 2, 300, 14, seed=1).float()
    positions = torch.stack([torch.arange(300), torch.arange(7, 307)])
    for scaling in (None, Llama3Scaling(8.0, 1.0, 4.0, 64)):
        config = transformers.LlamaConfig(
            hidden_size=56,
            num_attention_heads=4,
            max_position_embeddings=512,
            rope_parameters={"rope_theta": 500.0, **(LLAMA3 if scaling else {"rope_type": "default"})},
        )
        want_q, want_k = apply_rotary_pos_emb(q, k, *LlamaRotaryEmbedding(config)(q, positions))
        turn = RotaryPositions(14, theta=500.0, scaling=scaling)(positions)
        parity.record({"q": rotate(q, *turn), "k": rotate(k, *turn)}, {"q": want_q, "k": want_k})


def test_scores_of_turned_vectors_depend_on_the_distance_alone():
    rope, q, k = RotaryPositions(14, theta=500.0), randn(1, 1, 1, 14), randn(1, 1, 1, 14, seed=1)

    def score(m: int, n: int) -> float:
        turned = (rotate(x, *rope(torch.tensor([t]))) for x, t in ((q, m), (k, n)))
        a, b = turned
        return float((a * b).sum())

    for shift in (1, 40, 1000):
        assert score(17 + shift, 5 + shift) == pytest.approx(score(17, 5), abs=1e-9)
    assert abs(score(17, 5) - score(5, 17)) > 1e-3  # the sign of the distance counts
    assert abs(score(17, 5) - score(17, 6)) > 1e-3


def test_rotation_keeps_lengths_and_position_zero_does_nothing():
    rope, x = RotaryPositions(14), randn(2, 3, 5, 14)
    turned = rotate(x, *rope(torch.arange(5)))
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))
    assert torch.equal(turned[:, :, 0], x[:, :, 0])


def test_half_split_pairs_are_the_first_release_s_neighbours_after_a_permutation():
    """LLaMA's first code turns (2i, 2i + 1); the published format permutes the head so that halves serve."""
    Dh, x = 14, randn(2, 3, 11, 14)
    angle = torch.arange(11)[:, None] * RotaryPositions(Dh).frequencies()  # (T, Dh/2)
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)))
    interleaved = torch.view_as_real(pairs * torch.polar(torch.ones_like(angle), angle)).flatten(-2)
    to_halves = torch.cat([torch.arange(0, Dh, 2), torch.arange(1, Dh, 2)])
    ours = rotate(x[..., to_halves], *RotaryPositions(Dh)(torch.arange(11)))
    torch.testing.assert_close(ours, interleaved[..., to_halves])
    assert not torch.allclose(rotate(x, *RotaryPositions(Dh)(torch.arange(11))), interleaved)


def test_llama3_scaling_leaves_fast_waves_and_slows_slow_ones():
    plain = RotaryPositions(64, theta=500_000.0).frequencies()
    scaled = RotaryPositions(64, theta=500_000.0, scaling=Llama3Scaling()).frequencies()
    turns = 8192 * plain / (2 * math.pi)
    assert torch.equal(scaled[turns > 4], plain[turns > 4])
    torch.testing.assert_close(scaled[turns < 1], plain[turns < 1] / 8)
    between = (turns >= 1) & (turns <= 4)
    assert between.any()
    assert (scaled[between] <= plain[between]).all() and (scaled[between] >= plain[between] / 8).all()


def test_half_precision_does_not_reach_the_angles():
    rope = RotaryPositions(14)
    before = rope(torch.tensor([999]))
    after = rope.to(torch.bfloat16)(torch.tensor([999]))
    assert torch.equal(before[0], after[0]) and torch.equal(before[1], after[1])
    x = randn(1, 1, 1, 14).bfloat16()
    assert rotate(x, *after).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RotaryPositions(7), "head_dim: expected an even width"),
        (lambda: RotaryPositions(8, theta=0.0), "theta: expected a positive number"),
        (lambda: Llama3Scaling(high=1.0), "scaling: expected positive numbers with high > low"),
        (
            lambda: RotaryPositions(8)(torch.zeros(1, 1, 1).long()),
            r"positions: expected shape \(T,\) or \(B, T\)",
        ),
        (
            lambda: rotate(randn(1, 1, 3, 8), *RotaryPositions(8)(torch.arange(4))),
            r"cos, sin: expected \(T, Dh\) = \(3, 8\)",
        ),
        (lambda: RelativeBias(2, num_buckets=7), "num_buckets: expected two or more a direction"),
        (lambda: RelativeBias(2, max_distance=8), "max_distance: expected more than the 8 exact buckets"),
        (lambda: RelativeBias(2)(3, 2), "T, S: expected 1 <= T <= S"),
    ],
)
def test_bad_input_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_positions_that_are_no_integers_are_refused():
    with pytest.raises(TypeError, match="positions: expected a tensor of integer ids"):
        RotaryPositions(8)(torch.zeros(3))


# ------------------------------------------------------------------------------------------------
# T5's buckets


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize(("num_buckets", "max_distance"), [(32, 128), (12, 40)])
def test_buckets_equal_the_published_ones_at_every_distance(bidirectional, num_buckets, max_distance):
    bias = RelativeBias(1, num_buckets=num_buckets, max_distance=max_distance, bidirectional=bidirectional)
    T = 1500
    offset = torch.arange(T)[None, :] - torch.arange(T)[:, None]
    want = T5Attention._relative_position_bucket(
        offset, bidirectional=bidirectional, num_buckets=num_buckets, max_distance=max_distance
    )
    assert torch.equal(bias.buckets(T, T), want)
    assert torch.equal(bias.buckets(3, T), want[-3:])  # the last queries, behind a cache


@parity_row("layers", "relative bias", "transformers.T5Config", page="t5-relative-bias")
def test_relative_bias(parity):
    config = transformers.T5Config(
        d_model=35, d_kv=7, num_heads=5, relative_attention_num_buckets=12, relative_attention_max_distance=40
    )
    reference = T5Attention(config, has_relative_attention_bias=True).double()
    nn.init.normal_(reference.relative_attention_bias.weight)

    def load(theirs: nn.Module) -> RelativeBias:
        bias = RelativeBias(5, num_buckets=12, max_distance=40, bidirectional=True).double()
        bias.load_state_dict({"weight": theirs.weight})
        return bias

    def run_theirs(table: nn.Module) -> dict[str, Tensor]:
        buckets = T5Attention._relative_position_bucket(
            torch.arange(50)[None, :] - torch.arange(50)[:, None], True, 12, 40
        )
        return {"bias": table(buckets).permute(2, 0, 1)}

    table = reference.relative_attention_bias
    parity.check(load, table, ours=lambda m: {"bias": m(50, 50)}, theirs=run_theirs)


@given(st.integers(1, 60), st.integers(0, 60))
def test_one_way_buckets_grow_with_the_distance(T, past):
    buckets = RelativeBias(2, bidirectional=False).buckets(T, T + past)
    assert (buckets.diff(dim=1) <= 0).all()  # a later key is nearer
    assert int(buckets.max()) <= 31 and (buckets[:, -1] == 0).any()
