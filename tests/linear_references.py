"""What the tests of linear attention share: the public Performer layer, its weights in ours, rows, inputs."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from parity import loud_
from torch import Tensor, nn

from textbook_code.layers.linear_attention import LinearAttention, RandomFeatures

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import performer_pytorch.performer_pytorch as public

THEIR_EPS = 1e-6  # what causal_linear_attention_noncuda adds to the running sum of the keys' features


def randn(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def random_tokens(B: int, S: int, *, seed: int) -> Tensor:
    """Padding anywhere, also in front and in the middle; one text has none, one is all padding."""
    mask = torch.rand(B, S, generator=torch.Generator().manual_seed(seed)) < 0.6
    mask[0] = True
    mask[-1] = False
    return mask


def rows_of_many_draws(
    draw: Callable[[int, torch.Generator], Tensor], *, d: int = 5, count: int = 20_000
) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.stack([draw(d, generator) for _ in range(count)])  # (count, d, d)


def problems_of_rows(rows: Tensor) -> list[str]:
    """What tells rows from N(0, I): every mean, every second moment, the lengths, and a feature's mean."""
    count, d = rows.shape[0], rows.shape[-1]
    wrong = []
    if float(rows.mean(0).abs().max()) > 5 / count**0.5:
        wrong.append("mean")
    if float((rows.square().mean(0) - 1).abs().max()) > 5 * (2 / count) ** 0.5:
        wrong.append("second moment")
    squares = rows.square().sum(-1)  # χ² of d degrees: variance 2 d
    if abs(float(squares.var()) - 2 * d) > 0.1 * 2 * d:
        wrong.append("lengths")
    x = torch.tensor([1.5, 0, 0, 0, 0])
    estimate = (rows @ x - x @ x / 2).exp().mean(1)
    if abs(float(estimate.mean()) - 1) > 5 * float(estimate.std()) / count**0.5:
        wrong.append("feature")
    return wrong


class MeetTheirs(RandomFeatures):
    """Keys shifted by the largest of all keys in causal attention too, as theirs are."""

    looks_ahead = False

    def __init__(self, head_dim: int, num_features: int, **settings: object) -> None:
        super().__init__(head_dim, num_features, **settings)  # type: ignore[arg-type]
        self.looks_ahead = False


def from_public(reference: nn.Module) -> LinearAttention:
    fast = reference.fast_attention
    m, d = fast.projection_matrix.shape
    kind = "relu" if fast.generalized_attention else "positive"
    ours = LinearAttention(
        reference.to_q.in_features,
        reference.heads,
        head_dim=d,
        feature_map=MeetTheirs(d, m, kind=kind),
        causal=fast.causal,
        chunk_size=4,
        eps=0.0,
    ).to(reference.to_q.weight.dtype)
    with torch.no_grad():
        ours.feature_map.projection.copy_(fast.projection_matrix)
        for name, linear in (("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("out", "to_out")):
            projection = getattr(ours, f"{name}_proj")
            projection.load_state_dict(getattr(reference, linear).state_dict())
    return ours


def public_layer(*, kind: str, causal: bool) -> nn.Module:
    torch.manual_seed(0)
    layer = public.SelfAttention(
        18,
        heads=3,
        dim_head=7,
        nb_features=17,
        causal=causal,
        qkv_bias=True,
        generalized_attention=kind == "relu",
    )
    return loud_(layer).double()


def run_ours(layer: LinearAttention, x: Tensor) -> dict[str, Tensor]:
    if not layer.causal:
        return {"out": layer(x)}
    state = layer.make_state(x.size(0))
    state.z = state.z + THEIR_EPS
    return {"out": layer(x, state=state)}
