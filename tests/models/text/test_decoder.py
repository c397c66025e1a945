"""The bench decoder: it computes its equation, sees nothing later, and is drawn as it says."""

import functools

import pytest
import torch
from torch import Tensor, nn

from textbook_code.layers.attention import Attention
from textbook_code.layers.feed_forward import FeedForward
from textbook_code.layers.norms import LayerNorm
from textbook_code.layers.positions import ALiBi, LearnedPositions, RelativeBias, RotaryPositions
from textbook_code.layers.residual import PLACES, Residual
from textbook_code.models.text.decoder import Block, CausalAttention, Decoder

V, D, H, T = 31, 16, 2, 13
KINDS = ("learned", "rotary", "bias", "alibi", "none")
make_norm = functools.partial(LayerNorm, D)


def decoder(place: str = "pre", layers: int = 3, kind: str = "learned") -> Decoder:
    torch.manual_seed(0)

    def branch() -> CausalAttention:
        rotary = RotaryPositions(D // H, fraction=0.5) if kind == "rotary" else None
        bias = {"bias": RelativeBias(H, bidirectional=False), "alibi": ALiBi(H)}.get(kind)
        return CausalAttention(Attention(D, H), rotary=rotary, score_bias=bias)

    blocks = [
        Block(
            Residual(branch(), make_norm, place=place),
            Residual(FeedForward(D, 2 * D), make_norm, place=place),
        )
        for _ in range(layers)
    ]
    pos_embed = LearnedPositions(T, D) if kind == "learned" else None
    return Decoder(V, D, blocks, pos_embed=pos_embed, final_norm=make_norm())


@pytest.mark.parametrize("place", PLACES)
def test_the_branch_stands_where_it_says(place: str) -> None:
    torch.manual_seed(1)
    branch, alpha = nn.Linear(D, D), 1.7 if place == "deep" else 1.0
    residual = Residual(branch, make_norm, place=place, alpha=alpha)
    for p in residual.parameters():
        nn.init.normal_(p)
    x, norm = torch.randn(2, T, D), residual.norm
    expected = {
        "pre": lambda: x + branch(norm(x)),
        "post": lambda: norm(x + branch(x)),
        "sandwich": lambda: x + residual.out_norm(branch(norm(x))),
        "deep": lambda: norm(1.7 * x + branch(x)),
    }[place]()
    torch.testing.assert_close(residual(x), expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"place": "middle"}, "place: expected one of pre, post, sandwich, deep, got 'middle'"),
        ({"place": "post", "alpha": 2.0}, "alpha: expected 1 where the norm's place is 'post', got 2"),
    ],
)
def test_a_wrong_place_is_named(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Residual(nn.Identity(), make_norm, **arguments)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_later_is_seen(place: str, kind: str) -> None:
    model = decoder(place, kind=kind).eval()
    tokens = torch.randint(V, (2, T))
    changed = tokens.clone()
    changed[:, 7:] = (changed[:, 7:] + 1) % V
    before, after = model(tokens), model(changed)
    assert before.shape == (2, T, V)
    assert torch.equal(before[:, :7], after[:, :7])
    assert not torch.allclose(before[:, 7:], after[:, 7:])


def test_it_is_drawn_as_it_says() -> None:
    model = decoder(layers=8)
    writes = torch.cat([b.attn.branch.attn.out_proj.weight.flatten() for b in model.blocks])
    reads = torch.cat([b.attn.branch.attn.q_proj.weight.flatten() for b in model.blocks])
    assert reads.std().item() == pytest.approx(0.02, rel=0.05)
    assert writes.std().item() == pytest.approx(0.02 / 4, rel=0.05)
    assert model.token_embed.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert all((p == 0).all() for name, p in model.named_parameters() if name.endswith("bias"))


def test_a_position_beyond_the_table_is_refused() -> None:
    with pytest.raises(ValueError, match="T: expected 1 to 13"):
        decoder()(torch.zeros(1, T + 1, dtype=torch.long))


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_tells_one_order_from_another(kind: str) -> None:
    """Also none at all: the causal mask gives each position another number of keys."""
    model = decoder(kind=kind).double().eval()
    model.reset_parameters(std=0.5)
    tokens = torch.arange(T)[None] % V
    exchanged = tokens.clone()
    exchanged[0, [2, 5]] = tokens[0, [5, 2]]
    before, after = model(tokens)[0, -1], model(exchanged)[0, -1]
    assert (before - after).abs().max() > 1e-3


@torch.no_grad()
def test_one_layer_without_positions_sees_a_bag_and_two_see_more() -> None:
    """Causal attention sums what came before in no order; what it wrote there depends on how much came."""
    tokens = torch.arange(T)[None]
    shuffled = torch.cat([tokens[:, [3, 0, 2, 1]], tokens[:, 4:]], 1)
    for layers, told_apart in ((1, False), (2, True)):
        model = decoder(layers=layers, kind="none").double().eval()
        model.reset_parameters(std=0.5)
        difference = (model(tokens) - model(shuffled))[0, 4:].abs().max()
        assert (difference > 1e-3) == told_apart, layers
        assert told_apart or difference < 1e-12


@torch.no_grad()
def test_without_positions_and_without_the_mask_an_order_cannot_be_seen() -> None:
    """The same blocks, looking both ways, are equivariant: a permuted text gives the permuted output."""
    model = decoder(kind="none").double().eval()
    model.reset_parameters(std=0.5)
    x, order = torch.randn(2, T, D).double(), torch.randperm(T)

    def both_ways(x: Tensor) -> Tensor:
        for block in model.blocks:
            x = x + block.attn.branch.attn(block.attn.norm(x))
            x = block.ffn(x)
        return x

    torch.testing.assert_close(both_ways(x[:, order]), both_ways(x)[:, order])
    causal = model.blocks[0]
    assert (causal(x[:, order]) - causal(x)[:, order]).abs().max() > 1e-2


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_what_depends_on_the_distance_does_not_mind_a_shift(kind: str) -> None:
    """One causal layer over a text, and over the same text behind others that the last queries do not see."""
    model = decoder(layers=1, kind=kind).double().eval()
    model.reset_parameters(std=0.5)
    branch = model.blocks[0].attn.branch
    text, shift = torch.randn(1, 5, D).double(), 6
    behind = torch.cat([torch.randn(1, shift, D).double(), text], 1)
    if model.pos_embed is not None:
        text, behind = text + model.pos_embed(5), behind + model.pos_embed(5 + shift)
    mask = torch.arange(5 + shift) >= shift
    turn = None if branch.rotary is None else branch.rotary(torch.arange(5 + shift))
    bias = None if branch.score_bias is None else branch.score_bias(5 + shift, 5 + shift)
    shifted = branch.attn(behind, attn_mask=mask[None, :], causal=True, rotary=turn, score_bias=bias)
    close = torch.allclose(shifted[:, shift:], branch(text), atol=1e-10)
    assert close == (kind != "learned")
