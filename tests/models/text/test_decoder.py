"""The bench decoder: it computes its equation, sees nothing later, and is drawn as it says."""

import functools

import pytest
import torch
from torch import Tensor, nn

from textbook_code.layers.attention import Attention
from textbook_code.layers.feed_forward import FeedForward
from textbook_code.layers.norms import LayerNorm
from textbook_code.layers.positions import LearnedPositions
from textbook_code.layers.residual import PLACES, Residual
from textbook_code.models.text.decoder import Block, Decoder

V, D, H, T = 31, 16, 2, 13
make_norm = functools.partial(LayerNorm, D)


class Causal(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Attention(D, H)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x, causal=True)


def decoder(place: str = "pre", layers: int = 3) -> Decoder:
    torch.manual_seed(0)
    blocks = [
        Block(
            Residual(Causal(), make_norm, place=place),
            Residual(FeedForward(D, 2 * D), make_norm, place=place),
        )
        for _ in range(layers)
    ]
    return Decoder(V, D, blocks, pos_embed=LearnedPositions(T, D), final_norm=make_norm())


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
def test_nothing_later_is_seen(place: str) -> None:
    model = decoder(place).eval()
    tokens = torch.randint(V, (2, T))
    changed = tokens.clone()
    changed[:, 7:] = (changed[:, 7:] + 1) % V
    before, after = model(tokens), model(changed)
    assert before.shape == (2, T, V)
    assert torch.equal(before[:, :7], after[:, :7])
    assert not torch.allclose(before[:, 7:], after[:, 7:])


def test_it_is_drawn_as_it_says() -> None:
    model = decoder(layers=8)
    writes = torch.cat([b.attn.branch.inner.out_proj.weight.flatten() for b in model.blocks])
    reads = torch.cat([b.attn.branch.inner.q_proj.weight.flatten() for b in model.blocks])
    assert reads.std().item() == pytest.approx(0.02, rel=0.05)
    assert writes.std().item() == pytest.approx(0.02 / 4, rel=0.05)
    assert model.token_embed.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert all((p == 0).all() for name, p in model.named_parameters() if name.endswith("bias"))


def test_a_position_beyond_the_table_is_refused() -> None:
    with pytest.raises(ValueError, match="T: expected 1 to 13"):
        decoder()(torch.zeros(1, T + 1, dtype=torch.long))
