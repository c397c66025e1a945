"""Where the norm stands, against torch's own layer; DeepNorm's constants and start."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from parity import compare, loud_, parity_row
from torch import Tensor, nn

from textbook_code.layers import residual as residual_module
from textbook_code.layers.attention import Attention
from textbook_code.layers.feed_forward import FeedForward, GatedFeedForward
from textbook_code.layers.norms import LayerNorm
from textbook_code.layers.residual import (
    PLACES,
    DeepNorm,
    Residual,
    deepnorm,
    deepnorm_encoder_decoder,
    deepnorm_init_,
)

D, H, F, EPS = 15, 3, 22, 1e-2


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ------------------------------------------------------------------------------------------------
# Pre and post against torch.nn.TransformerEncoderLayer


def their_layer(norm_first: bool) -> nn.Module:
    layer = nn.TransformerEncoderLayer(
        D, H, F, dropout=0.0, activation="gelu", layer_norm_eps=EPS, batch_first=True, norm_first=norm_first
    )
    return loud_(layer).double()


def load_layer(reference: nn.Module) -> nn.Module:
    norm, place = functools.partial(LayerNorm, D, norm_eps=EPS), "pre" if reference.norm_first else "post"
    ours = nn.Sequential(
        Residual(Attention(D, H), norm, place=place), Residual(FeedForward(D, F), norm, place=place)
    ).double()
    theirs = reference.state_dict()
    state = {}
    for kind in ("weight", "bias"):
        packed = theirs.pop(f"self_attn.in_proj_{kind}").chunk(3)
        for name, x in zip(("q_proj", "k_proj", "v_proj"), packed, strict=True):
            state[f"0.branch.{name}.{kind}"] = x
        for old, new in {
            "self_attn.out_proj": "0.branch.out_proj",
            "norm1": "0.norm",
            "linear1": "1.branch.fc1",
            "linear2": "1.branch.fc2",
            "norm2": "1.norm",
        }.items():
            state[f"{new}.{kind}"] = theirs.pop(f"{old}.{kind}")
    assert not theirs
    ours.load_state_dict(state)
    return ours


def run(layer: nn.Module) -> dict[str, Tensor]:
    return {"out": layer(randn(2, 7, D).requires_grad_())}  # torch's layer is fused where nothing needs it


NO_GRADIENT = [r".*k_proj\.bias"]


@parity_row("norms", "pre-norm layer", "torch.nn.TransformerEncoderLayer", page="norm-placement")
def test_pre_norm(parity):
    parity.check(load_layer, their_layer(True), ours=run, theirs=run, zero_gradient=NO_GRADIENT)


@parity_row("norms", "post-norm layer", "torch.nn.TransformerEncoderLayer", page="norm-placement")
def test_post_norm(parity):
    parity.check(load_layer, their_layer(False), ours=run, theirs=run, zero_gradient=NO_GRADIENT)


@pytest.mark.parametrize(
    ("norm_first", "place"), [(True, "post"), (False, "pre"), (True, None), (False, None)]
)
def test_a_norm_in_another_place_is_caught(norm_first, place):
    @contextmanager
    def mutate(model: nn.Module) -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            for half in model:
                if place:
                    patch.setattr(half, "place", place)
                else:  # the residual taken after the norm; the norm on the branch alone
                    patch.setattr(half, "forward", lambda x, r=half: wrong(r, x))
            yield

    def wrong(r: Residual, x: Tensor) -> Tensor:
        return (u := r.norm(x)) + r.branch(u) if r.place == "pre" else x + r.norm(r.branch(x))

    with pytest.raises(AssertionError, match="tensors differ"):
        compare(
            load_layer,
            their_layer(norm_first),
            ours=run,
            theirs=run,
            zero_gradient=NO_GRADIENT,
            mutate=mutate,
        )


@pytest.mark.parametrize("place", PLACES)
def test_a_branch_of_zeros_leaves_the_stream_or_its_norm(place):
    branch, norm = nn.Linear(D, D, bias=False).double(), functools.partial(LayerNorm, D)
    nn.init.zeros_(branch.weight)
    block = Residual(branch, norm, place=place, alpha=3.0 if place == "deep" else 1.0).double()
    x = randn(2, 7, D)
    if place in ("pre", "sandwich"):
        assert torch.equal(block(x), x)
    else:
        torch.testing.assert_close(block(x), block.norm(x), atol=1e-4, rtol=1e-4)


def test_dropout_falls_on_the_branch_alone():
    torch.manual_seed(0)
    block = Residual(nn.Identity(), functools.partial(LayerNorm, D), dropout=0.5).double()
    x = randn(4, 50, D)
    added = block(x) - x
    assert 0.4 < (added == 0).double().mean() < 0.6
    assert torch.equal(block.eval()(x) - x != 0, torch.ones_like(x).bool())


# ------------------------------------------------------------------------------------------------
# DeepNorm


@pytest.mark.parametrize("layers", [1, 2, 6, 18, 100, 1000])
def test_constants_of_one_stack_are_the_papers(layers):
    alpha, beta = deepnorm(layers)
    assert alpha == pytest.approx(math.sqrt(math.sqrt(2 * layers)), rel=1e-14)
    assert beta == pytest.approx(1 / math.sqrt(math.sqrt(8 * layers)), rel=1e-14)
    assert alpha * beta == pytest.approx(1 / math.sqrt(2))  # for any depth: what a branch adds to the stream


def test_two_layers_have_the_alpha_of_the_published_code():
    assert deepnorm(2).alpha == pytest.approx(1.4142, abs=5e-5)


@pytest.mark.parametrize(("N", "M"), [(1, 1), (6, 6), (18, 6), (100, 100)])
def test_constants_of_an_encoder_and_its_decoder_are_the_papers(N, M):
    encoder, decoder = deepnorm_encoder_decoder(N, M)
    root = math.exp((4 * math.log(N) + math.log(M)) / 16)
    assert encoder == pytest.approx((0.81 * root, 0.87 / root), rel=1e-12)
    assert decoder == pytest.approx(((3 * M) ** 0.25, 1 / (12 * M) ** 0.25), rel=1e-12)
    assert isinstance(encoder, DeepNorm) and isinstance(decoder, DeepNorm)


WIDE = 96


def drawn(beta: float) -> nn.ModuleDict:
    torch.manual_seed(0)
    parts = nn.ModuleDict(
        {
            "attn": Attention(WIDE, 4),
            "ffn": FeedForward(WIDE, 4 * WIDE),
            "gated": GatedFeedForward(WIDE, 2 * WIDE, bias=True),
            "table": nn.Embedding(7, WIDE),
            "norm": LayerNorm(WIDE),
        }
    )
    for p in parts.parameters():
        nn.init.constant_(p, 5.0)
    assert deepnorm_init_(parts, beta) is parts
    return parts


def gains(parts: nn.Module) -> dict[str, float]:
    """Of each matrix, its deviation over that of Glorot's normal distribution."""
    return {
        name.removesuffix(".weight"): p.std().item() / math.sqrt(2 / sum(p.shape))
        for name, p in parts.named_parameters()
        if p.dim() == 2 and "table" not in name
    }


EXPECTED = {
    "attn.q_proj": 1, "attn.k_proj": 1, "attn.v_proj": 0.3, "attn.out_proj": 0.3, "ffn.fc1": 0.3,
    "ffn.fc2": 0.3, "gated.gate_proj": 0.3, "gated.up_proj": 0.3, "gated.down_proj": 0.3,
}  # fmt: skip


def test_beta_falls_on_what_a_branch_adds_only():
    parts = drawn(0.3)
    assert gains(parts) == pytest.approx(EXPECTED, rel=0.05)
    biases = {name: p for name, p in parts.named_parameters() if name.endswith("bias") and "norm" not in name}
    assert len(biases) == 9 and not any(p.any() for p in biases.values())
    untouched = (parts["table"].weight, parts["norm"].weight, parts["norm"].bias)
    assert all((p == 5).all() for p in untouched)


@pytest.mark.parametrize("kept", [("q_proj", "k_proj"), ("v_proj",), ("out_proj",), ("fc1", "gate_proj")])
def test_a_gain_on_the_wrong_matrices_is_seen(kept, monkeypatch):
    """β on queries and keys, or none where it belongs."""
    one, beta = residual_module._GAIN_ONE, residual_module._GAIN_BETA
    moved = "q_proj" in kept
    monkeypatch.setattr(residual_module, "_GAIN_ONE", () if moved else one + kept)
    monkeypatch.setattr(
        residual_module, "_GAIN_BETA", beta + one if moved else tuple(n for n in beta if n not in kept)
    )
    assert gains(drawn(0.3)) != pytest.approx(EXPECTED, rel=0.05)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: deepnorm(0), r"^num_layers: expected at least 1, got 0$"),
        (lambda: deepnorm_encoder_decoder(0, 3), r"^encoder_layers: expected at least 1, got 0$"),
        (lambda: deepnorm_encoder_decoder(3, -1), r"^decoder_layers: expected at least 1, got -1$"),
        (lambda: deepnorm_init_(FeedForward(4, 8), 0.0), r"^beta: expected a positive gain, got 0.0$"),
        (
            lambda: deepnorm_init_(nn.Linear(4, 4), 0.5),
            r"^module: expected linear layers called q_proj, .*; Linear has none$",
        ),
    ],
)
def test_what_deepnorm_refuses(call, message):
    with pytest.raises(ValueError, match=message):
        call()
