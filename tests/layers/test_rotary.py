"""RoPE's layouts, parts, axes and scalings: against transformers, and what each of them keeps."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from parity import Parity, ParityError, loud_, parity_row
from torch import Tensor, nn
from transformers.models.gpt_neox.modeling_gpt_neox import GPTNeoXRotaryEmbedding
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb
from transformers.models.qwen2_vl import modeling_qwen2_vl as qwen
from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLTextConfig, Qwen2VLVisionConfig
from transformers.models.roformer.modeling_roformer import RoFormerSinusoidalPositionalEmbedding

from textbook_code.layers import attention as attention_module
from textbook_code.layers.attention import Attention
from textbook_code.layers.positions import (
    AxialRotaryPositions,
    LinearScaling,
    Llama3Scaling,
    MultimodalRotaryPositions,
    NTKScaling,
    RotaryPositions,
    YarnScaling,
    grid_positions,
    halves_from_neighbours,
    neighbours_from_halves,
    rotate,
    rotate_neighbours,
    scaling,
)
from textbook_code.models.text.llama import LlamaForCausalLM


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ------------------------------------------------------------------------------------------------
# A part of the head: GPT-NeoX

B, T, D, H = 2, 37, 48, 3
DH = D // H
NEOX = transformers.GPTNeoXConfig(
    vocab_size=31,
    hidden_size=D,
    num_attention_heads=H,
    num_hidden_layers=1,
    intermediate_size=20,
    max_position_embeddings=64,
    rope_parameters={"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.25},
    attn_implementation="sdpa",  # eager takes the softmax in float32
)
LATER = torch.ones(T, T, dtype=torch.bool).triu(1)


def load_neox(theirs: nn.Module) -> Attention:
    ours = Attention(D, H).double()
    rows = {  # in each head the rows of q, k and v stand together
        leaf: getattr(theirs.query_key_value, leaf).detach().unflatten(0, (H, 3, DH)).unbind(1)
        for leaf in ("weight", "bias")
    }
    state = {
        f"{n}_proj.{leaf}": part[i].flatten(0, 1) for leaf, part in rows.items() for i, n in enumerate("qkv")
    }
    ours.load_state_dict(state | {f"out_proj.{leaf}": p for leaf, p in theirs.dense.named_parameters()})
    return ours


def neox_turns(x: Tensor) -> tuple[Tensor, Tensor]:
    """Their cosines and sines in float64, checked against those that they compute."""
    width = DH // 4
    angle = torch.arange(T)[:, None] * 500.0 ** (-torch.arange(0, width, 2, dtype=x.dtype) / width)
    cos, sin = (torch.cat([wave, wave], -1)[None] for wave in (angle.cos(), angle.sin()))
    theirs = GPTNeoXRotaryEmbedding(NEOX)(x.float(), torch.arange(T)[None])
    torch.testing.assert_close((cos.float(), sin.float()), theirs, atol=1e-5, rtol=0)
    return cos, sin


def check_neox(parity: Parity, rotary: RotaryPositions | None = None) -> None:
    reference = loud_(transformers.GPTNeoXForCausalLM(NEOX)).double().gpt_neox.layers[0].attention
    rotary = rotary or RotaryPositions(DH, theta=500.0, fraction=0.25)
    x = randn(B, T, D)
    mask = torch.zeros(T, T, dtype=x.dtype).masked_fill(LATER, -math.inf)[None, None]
    turns = neox_turns(x)
    parity.check(
        load_neox,
        reference,
        ours=lambda m: {"out": m(x, causal=True, rotary=rotary(torch.arange(T)))},
        theirs=lambda r: {"out": r(x, attention_mask=mask, position_embeddings=turns)[0]},
        zero_gradient=[],
    )


@parity_row("positions", "partial rotary", "transformers.GPTNeoXForCausalLM", page="rope-partial")
def test_partial_rotary(parity):
    check_neox(parity)


# ------------------------------------------------------------------------------------------------
# Neighbours: RoFormer

ROFORMER = transformers.RoFormerConfig(
    vocab_size=31, hidden_size=D, num_attention_heads=H, num_hidden_layers=1, intermediate_size=20
)


class Half(nn.Module):
    """The reference's attention without the residual connection and the norm behind it."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.attention, self.dense = attention.self, attention.output.dense

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.dense(self.attention(*args, **kwargs)[0])


def load_roformer(theirs: Half, reorder: Any = halves_from_neighbours) -> Attention:
    names = {"q_proj": theirs.attention.query, "k_proj": theirs.attention.key}
    names |= {"v_proj": theirs.attention.value, "out_proj": theirs.dense}
    state = {f"{name}.{leaf}": p.detach() for name, m in names.items() for leaf, p in m.named_parameters()}
    for name in ("q_proj", "k_proj"):
        for leaf in ("weight", "bias"):
            state[f"{name}.{leaf}"] = reorder(state[f"{name}.{leaf}"], H)
    ours = Attention(D, H).double()
    ours.load_state_dict(state)
    return ours


def check_roformer(parity: Parity, **changes: Any) -> None:
    model = loud_(transformers.RoFormerForMaskedLM(ROFORMER)).double()
    x, rotary = randn(B, T, D), RotaryPositions(DH)
    angle = torch.arange(T)[:, None] * rotary.frequencies()
    waves = torch.cat([angle.sin(), angle.cos()], -1)
    table = RoFormerSinusoidalPositionalEmbedding(64, DH)
    table.weight = nn.Parameter(table.create_weight(), requires_grad=False)
    torch.testing.assert_close(waves.float(), table(torch.Size([1, T])), atol=1e-6, rtol=0)
    parity.check(
        lambda r: load_roformer(r, **changes),
        Half(model.roformer.encoder.layer[0].attention),
        ours=lambda m: {"out": m(x, rotary=rotary(torch.arange(T)))},
        theirs=lambda r: {"out": r(x, sinusoidal_pos=waves[None, None])},
    )


@parity_row("positions", "rotary of neighbours", "transformers.RoFormerForMaskedLM", page="rope-layouts")
def test_rotary_of_neighbours(parity):
    check_roformer(parity)
    with pytest.raises(ParityError):  # the rows as they are, turned in halves
        check_roformer(Parity(parity.row), reorder=lambda rows, heads: rows)


@given(
    st.integers(1, 4), st.integers(1, 8), st.integers(0, 5), st.integers(1, 9), st.sampled_from([10.0, 1e4])
)
@settings(deadline=None)
def test_the_permutation_between_layouts_is_exact(heads, planes, rest, length, theta):
    """Rows reordered, then halves turned, is neighbours turned, then channels reordered: to the last bit."""
    head_dim, width, d_model = 2 * planes + 2 * rest, 2 * planes, 5
    old, x = randn(heads * head_dim, d_model), randn(2, length, d_model, seed=1)
    new = halves_from_neighbours(old, heads, width=width)
    assert torch.equal(neighbours_from_halves(new, heads, width=width), old)
    turns = RotaryPositions(head_dim, theta=theta, fraction=width / head_dim)(torch.arange(length) + 3)

    def split(rows: Tensor) -> Tensor:  # one product a row, so that both orders round alike
        return (x[..., None, :] * rows).sum(-1).unflatten(-1, (heads, head_dim)).transpose(1, 2)

    theirs = rotate_neighbours(split(old), *turns)
    channels = halves_from_neighbours(torch.arange(head_dim), 1, width=width)
    assert torch.equal(rotate(split(new), *turns), theirs[..., channels])


# ------------------------------------------------------------------------------------------------
# Axes: Qwen2-VL


@parity_row(
    "positions",
    "M-RoPE",
    "transformers.Qwen2VLTextModel",
    page="m-rope",
    dtype="float32",
    tolerance=1e-5,
    backward=False,
)
def test_m_rope(parity):
    check_m_rope(parity, (3, 2, 2))
    for wrong in ((2, 3, 2), (2, 2, 3)):
        with pytest.raises(ParityError):
            check_m_rope(Parity(parity.row), wrong)


def check_m_rope(parity: Parity, sections: tuple[int, ...]) -> None:
    config = Qwen2VLTextConfig(
        hidden_size=42,
        num_attention_heads=3,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0, "mrope_section": [3, 2, 2]},
    )
    positions = torch.randint(60, (3, 2, 19), generator=torch.Generator().manual_seed(2))
    q, k = randn(2, 3, 19, 14).float(), randn(2, 1, 19, 14, seed=1).float()
    cos, sin = qwen.Qwen2VLRotaryEmbedding(config)(q, positions)
    want = qwen.apply_rotary_pos_emb(q, k, cos, sin)
    turns = MultimodalRotaryPositions(14, sections, theta=500.0)(positions)
    parity.record({"q": rotate(q, *turns), "k": rotate(k, *turns)}, dict(zip("qk", want, strict=True)))


@parity_row(
    "positions",
    "rotary on a grid",
    "transformers.Qwen2VLModel",
    page="rope-2d",
    dtype="float32",
    tolerance=1e-5,
    backward=False,
)
def test_rotary_on_a_grid(parity):
    config = Qwen2VLVisionConfig(
        embed_dim=48, num_heads=3, rope_parameters={"rope_type": "axial", "rope_theta": 500.0}
    )
    positions = grid_positions(5, 7)  # (2, 35)
    assert positions[:, 8].tolist() == [1, 1] and positions.shape == (2, 35)
    q, k = randn(1, 3, 35, 16).float(), randn(1, 3, 35, 16, seed=1).float()
    cos, sin = qwen.Qwen2VLVisionRotaryEmbedding(config)(q, positions.T)
    want = qwen.apply_rotary_pos_emb_vision(q[0].transpose(0, 1), k[0].transpose(0, 1), cos, sin)
    turns = AxialRotaryPositions(16, theta=500.0)(positions)
    got = (rotate(x, *turns)[0].transpose(0, 1) for x in (q, k))
    parity.record(dict(zip("qk", got, strict=True)), dict(zip("qk", want, strict=True)))
    swapped = AxialRotaryPositions(16, theta=500.0)(positions.flip(0))
    assert not torch.allclose(rotate(q, *swapped)[0].transpose(0, 1), want[0], atol=1e-2)


def test_words_that_have_one_number_on_all_axes_are_turned_as_ever():
    x, t = randn(2, 3, 11, 16), torch.arange(11) + 2
    plain, m_rope = RotaryPositions(16), MultimodalRotaryPositions(16, (2, 3, 3))
    assert torch.equal(rotate(x, *plain(t)), rotate(x, *m_rope(t.expand(3, -1))))
    rows = torch.stack([t, t + 4])
    assert torch.equal(rotate(x, *plain(rows)), rotate(x, *m_rope(rows.expand(3, -1, -1))))


# ------------------------------------------------------------------------------------------------
# What is kept: the distance

ROTARIES: dict[str, Any] = {
    "whole": RotaryPositions(12, theta=300.0),
    "a part": RotaryPositions(24, theta=300.0, fraction=0.25),
    "PI": RotaryPositions(12, theta=300.0, scaling=LinearScaling(3.0)),
    "NTK": RotaryPositions(12, theta=300.0, scaling=NTKScaling(3.0)),
    "llama3": RotaryPositions(12, theta=300.0, scaling=Llama3Scaling(3.0, 1.0, 4.0, 64)),
    "YaRN": RotaryPositions(12, theta=300.0, scaling=YarnScaling(3.0, original=200)),
    "grid": AxialRotaryPositions(12, theta=300.0),
    "M-RoPE": MultimodalRotaryPositions(12, (1, 3, 2), theta=300.0),
}
AXES = {"grid": 2, "M-RoPE": 3}


@pytest.mark.parametrize("turn", [rotate, rotate_neighbours])
@pytest.mark.parametrize("name", ROTARIES)
@given(st.data())
@settings(deadline=None)
def test_scores_depend_on_the_distance_only(name, turn, data):
    rotary, axes = ROTARIES[name], AXES.get(name, 1)
    places = st.lists(st.integers(0, 2000), min_size=axes, max_size=axes)
    i, j, shift = (torch.tensor(data.draw(places)) for _ in range(3))
    q, k = randn(1, 1, 1, rotary.head_dim), randn(1, 1, 1, rotary.head_dim, seed=1)

    def score(i: Tensor, j: Tensor) -> Tensor:
        at = (lambda p: p) if axes == 1 else (lambda p: p[:, None])
        return (turn(q, *rotary(at(i))) * turn(k, *rotary(at(j)))).sum()

    torch.testing.assert_close(score(i + shift, j + shift), score(i, j), atol=1e-9, rtol=0)
    if (i != j).any() and max((i - j).abs()) < 40:
        assert abs(score(i, j) - score(i, i)) > 1e-9


def test_a_part_leaves_the_rest_and_gives_the_whole_at_one():
    x, t = randn(2, 3, 9, 24), torch.arange(9)
    for turn in (rotate, rotate_neighbours):
        part = turn(x, *RotaryPositions(24, fraction=0.25)(t))
        assert torch.equal(part[..., 6:], x[..., 6:])
        assert torch.equal(part[..., :6], turn(x[..., :6], *RotaryPositions(6)(t)))
    assert torch.equal(rotate(x, *RotaryPositions(24, fraction=1.0)(t)), rotate(x, *RotaryPositions(24)(t)))


# ------------------------------------------------------------------------------------------------
# Longer contexts

SCALINGS: dict[str, tuple[Any, dict[str, Any]]] = {
    "linear": (LinearScaling(6.0), {"rope_type": "linear", "factor": 6.0}),
    "NTK": (NTKScaling(6.0), {"rope_type": "dynamic", "factor": 1.0}),  # at six times the context
    "dynamic": (NTKScaling.for_length(384, original=64, factor=2.5), {"rope_type": "dynamic", "factor": 2.5}),
    "yarn": (
        YarnScaling(6.0, original=64),
        {"rope_type": "yarn", "factor": 6.0, "original_max_position_embeddings": 64},
    ),
    "yarn, other turns": (
        YarnScaling(6.0, original=1000, fast=20.0, slow=2.0),
        {"rope_type": "yarn", "factor": 6.0, "beta_fast": 20, "beta_slow": 2}
        | {"original_max_position_embeddings": 1000},
    ),
}


def scaled_config(rope: dict[str, Any], **more: Any) -> transformers.LlamaConfig:
    return transformers.LlamaConfig(
        hidden_size=96,
        num_attention_heads=3,
        num_key_value_heads=1,
        max_position_embeddings=64 if rope["rope_type"] == "dynamic" else 384,
        rope_parameters={"rope_theta": 5000.0, **rope},
        **more,
    )


def record_scaling(parity: Parity, name: str, ours: Any = None) -> None:
    right, rope = SCALINGS[name]
    rotary = RotaryPositions(32, theta=5000.0, scaling=ours or right)
    theirs = LlamaRotaryEmbedding(scaled_config(rope))
    positions = torch.arange(384)[None]
    q, k = randn(1, 3, 384, 32).float(), randn(1, 1, 384, 32, seed=1).float()
    want = apply_rotary_pos_emb(q, k, *theirs(q, positions))  # it may change its frequencies by the length
    got = (rotate(x, *rotary(positions)) for x in (q, k))
    ratio = rotary.frequencies().float() / theirs.inv_freq  # slow ones too are to agree in all their digits
    parity.record(
        {**dict(zip("qk", got, strict=True)), "ratio": ratio},
        {**dict(zip("qk", want, strict=True)), "ratio": torch.ones(16)},
    )


def record_whole_model(parity: Parity, name: str) -> None:
    ours, rope = SCALINGS[name]
    more = {"vocab_size": 61, "intermediate_size": 40, "num_hidden_layers": 2}
    reference = loud_(transformers.LlamaForCausalLM(scaled_config(rope, **more))).eval()
    plain = transformers.LlamaForCausalLM(scaled_config({"rope_type": "default"}, **more))
    plain.load_state_dict(reference.state_dict())
    model = LlamaForCausalLM.from_hf(plain).eval()
    tokens = torch.randint(61, (1, 384), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        want = reference(tokens).logits
        assert (model(tokens) - want).abs().max() > 1, "the scaling does not show"
        model.llama.rotary.scaling = ours
        parity.record({"logits": model(tokens)}, {"logits": want})


@parity_row(
    "positions",
    "scaled rotary",
    "transformers.LlamaForCausalLM",
    page="rope-scaling",
    dtype="float32",
    backward=False,
)
def test_scalings(parity):
    for name in SCALINGS:
        record_scaling(parity, name)
        record_whole_model(parity, name)


class WithoutTemperature(YarnScaling):
    gain = 1.0  # type: ignore[assignment]


BUGS = {
    "YaRN's temperature missing": ("yarn", WithoutTemperature(6.0, original=64)),
    "YaRN's turns exchanged for LLaMA 3's": ("yarn", YarnScaling(6.0, original=64, fast=4.0)),
    "YaRN from the new length": ("yarn", YarnScaling(6.0, original=384)),
    "the ramp over turns": ("yarn, other turns", Llama3Scaling(6.0, 2.0, 20.0, 1000)),
    "PI for NTK": ("NTK", LinearScaling(6.0)),
    "NTK for PI": ("linear", NTKScaling(6.0)),
    "dynamic without its offset": ("dynamic", NTKScaling(15.0)),
}


@pytest.mark.parametrize("bug", BUGS)
def test_a_wrong_scaling_is_caught(bug):
    name, wrong = BUGS[bug]
    row = parity_row(
        "x", "y", "transformers.LlamaForCausalLM", page="z", dtype="float32", backward=False
    ).args[0]
    record_scaling(Parity(row), name)
    with pytest.raises(ParityError):
        record_scaling(Parity(row), name, wrong)


@given(st.floats(1, 50), st.sampled_from([8, 32, 128]), st.sampled_from([1e3, 1e4, 5e5]))
@settings(deadline=None)
def test_no_hand_is_made_faster_nor_slower_than_by_the_factor(factor, head_dim, theta):
    plain = RotaryPositions(head_dim, theta=theta).frequencies()
    slack = 1 + 1e-9
    for kind in (
        LinearScaling(factor),
        NTKScaling(factor),
        YarnScaling(factor, original=2048),
        Llama3Scaling(factor, original=2048),
    ):
        slower = kind(plain)
        assert (slower <= plain * slack).all() and (slower >= plain / factor / slack).all()
        assert (slower.diff() < 0).all()
    ntk = NTKScaling(factor)(plain)
    torch.testing.assert_close(ntk[0], plain[0])
    torch.testing.assert_close(ntk[-1], plain[-1] / factor)
    base = theta * factor ** (head_dim / (head_dim - 2))
    torch.testing.assert_close(ntk, RotaryPositions(head_dim, theta=base).frequencies())


def test_interpolated_positions_are_fractions_of_those_trained_on():
    x = randn(1, 2, 8, 12)
    slow = rotate(x, *RotaryPositions(12, scaling=LinearScaling(4.0))(4 * torch.arange(8)))
    torch.testing.assert_close(slow, rotate(x, *RotaryPositions(12)(torch.arange(8))))


def test_yarn_sharpens_every_score_by_the_square_of_its_gain():
    q, t = randn(1, 1, 9, 12), torch.arange(9)
    yarn = YarnScaling(8.0, original=64)
    turned = rotate(q, *RotaryPositions(12, scaling=yarn)(t))
    torch.testing.assert_close(turned.norm(dim=-1), q.norm(dim=-1) * (0.1 * math.log(8) + 1))


def test_dynamic_ntk_does_nothing_up_to_the_original_context():
    assert NTKScaling.for_length(64, original=64, factor=3.0) == NTKScaling(1.0)
    assert NTKScaling.for_length(7, original=64) == NTKScaling(1.0)
    assert NTKScaling.for_length(128, original=64).factor == pytest.approx(2.0)


# ------------------------------------------------------------------------------------------------
# Planted bugs

Bug = Any


def rotation_bugs() -> dict[str, Bug]:
    def neighbours_for_halves(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return rotate_neighbours(x, cos, sin)

    def whole_for_part(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return rotate(x, *RotaryPositions(DH, theta=500.0)(torch.arange(T)))

    def last_for_first(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return rotate(x.flip(-1), cos, sin).flip(-1)

    def far_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:  # (i, i + Dh/2) in place of (i, i + R/2)
        n = cos.size(-1) // 2
        order = torch.tensor([*range(n), *range(DH // 2, DH // 2 + n)])
        order = torch.cat([order, torch.tensor([i for i in range(DH) if i not in order])])
        return rotate(x[..., order], cos, sin)[..., order.argsort()]

    return {f.__name__: f for f in (neighbours_for_halves, whole_for_part, last_for_first, far_pairs)}


@pytest.mark.parametrize("bug", rotation_bugs())
def test_a_planted_bug_in_partial_rotary_is_caught(bug, monkeypatch):
    row = parity_row("x", "y", "transformers.GPTNeoXForCausalLM", page="z").args[0]
    monkeypatch.setattr(attention_module, "rotate", rotation_bugs()[bug])
    with pytest.raises(ParityError):
        check_neox(Parity(row))


def test_another_share_of_the_head_is_caught():
    row = parity_row("x", "y", "transformers.GPTNeoXForCausalLM", page="z").args[0]
    with pytest.raises(ParityError):
        check_neox(Parity(row), RotaryPositions(DH, theta=500.0, fraction=0.5))


# ------------------------------------------------------------------------------------------------
# Bad input


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AxialRotaryPositions(7), "head_dim: expected an even width"),
        (lambda: AxialRotaryPositions(18), "axes: expected a positive divisor of the number of planes"),
        (lambda: AxialRotaryPositions(16, axes=0), "axes: expected a positive divisor"),
        (
            lambda: AxialRotaryPositions(16)(torch.zeros(3, 4).long()),
            r"positions: .* with A = 2, got \(3, 4\)",
        ),
        (lambda: MultimodalRotaryPositions(9, (2, 2)), "head_dim: expected an even width"),
        (lambda: MultimodalRotaryPositions(14, (3, 2, 1)), r"sections: .* head_dim / 2 = 7, got \(3, 2, 1\)"),
        (lambda: MultimodalRotaryPositions(14, (8, 0, -1)), "sections: expected positive numbers"),
        (lambda: MultimodalRotaryPositions(14, ()), "sections: expected positive numbers"),
        (lambda: MultimodalRotaryPositions(14, (3, 4), theta=0), "theta: expected a positive number"),
        (lambda: MultimodalRotaryPositions(14, (3, 2, 2))(torch.arange(4)), "positions: expected shape"),
        (lambda: RotaryPositions(12, fraction=0.25), "fraction: expected an even number of the 12 channels"),
        (lambda: RotaryPositions(16, fraction=0.3), "fraction: .* which is 4.8"),
        (lambda: RotaryPositions(16, fraction=0.0), "fraction: expected an even number"),
        (lambda: RotaryPositions(16, fraction=1.5), "fraction: expected an even number"),
        (lambda: LinearScaling(0.5), "factor: expected a number of at least 1, got 0.5"),
        (lambda: NTKScaling(float("nan")), "factor: expected a number of at least 1, got nan"),
        (lambda: NTKScaling.for_length(0, original=8), "length, original: expected positive lengths"),
        (lambda: YarnScaling(0.0, original=8), "factor: expected a number of at least 1"),
        (
            lambda: YarnScaling(2.0, original=8, fast=1.0),
            "scaling: expected positive numbers with fast > slow",
        ),
        (lambda: YarnScaling(2.0, original=0), "scaling: expected positive numbers"),
        (lambda: YarnScaling(2.0, original=8)(torch.ones(1)), "frequencies: expected two planes or more"),
        (lambda: YarnScaling(2.0, original=8)(torch.ones(3)), "frequencies: expected them to fall"),
        (lambda: grid_positions(0, 3), "rows, columns: expected at least one of each, got 0 and 3"),
        (lambda: halves_from_neighbours(randn(10, 2), 3), "num_heads: expected a positive divisor"),
        (lambda: halves_from_neighbours(randn(10, 2), 2), "width: expected an even number of the 5 rows"),
        (lambda: neighbours_from_halves(randn(12, 2), 2, width=8), "width: expected an even number"),
        (
            lambda: rotate(randn(1, 1, 3, 8), *RotaryPositions(10)(torch.arange(3))),
            r"cos, sin: expected \(T, Dh\) = \(3, 8\)",
        ),
        (lambda: rotate(randn(1, 1, 3, 8), randn(3, 3), randn(3, 3)), "cos, sin: expected"),
        (lambda: rotate_neighbours(randn(1, 1, 3, 8), randn(4, 8), randn(4, 8)), "cos, sin: expected"),
    ],
)
def test_bad_input_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("rotary", [AxialRotaryPositions(8), MultimodalRotaryPositions(8, (2, 1, 1))])
def test_positions_that_are_no_integers_are_refused(rotary):
    with pytest.raises(TypeError, match="positions: expected a tensor of integer ids"):
        rotary(torch.zeros(3, 4))


def test_every_scaling_is_of_the_kind():
    plain = RotaryPositions(16).frequencies()
    kinds = [LinearScaling(2.0), NTKScaling(2.0), YarnScaling(2.0, original=64), Llama3Scaling()]
    for kind, other in itertools.combinations(kinds, 2):
        assert not torch.equal(kind(plain), other(plain))
    assert all(hasattr(scaling, type(kind).__name__) and kind.gain >= 1 for kind in kinds)
