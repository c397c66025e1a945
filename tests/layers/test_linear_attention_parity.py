"""Linear attention and Performer features against public implementations: outputs and gradients.

The numbers of idiap/fast-transformers, whose package needs a compiler, are kept in `tests/golden`.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from linear_references import THEIR_EPS, from_public, public, public_layer, randn, run_ours
from parity import Parity, parity_row
from torch import Tensor

from textbook_code.layers.linear_attention import (
    FeatureMap,
    LinearAttention,
    LinearState,
    dense_linear_attention,
    elu_plus_one,
    linear_attention,
    orthogonal_gaussian,
    positive_features,
    prefix_sum_attention,
    relu_features,
)

GOLDEN = Path(__file__).parents[1] / "golden" / "linear_attention.npz"


def rows(m: int, d: int) -> Tensor:
    return orthogonal_gaussian(m, d, generator=torch.Generator().manual_seed(5)).double()


def compare_gradients(parity: Parity, ours: Tensor, theirs: Tensor, inputs: dict[str, Tensor]) -> None:
    w = randn(*theirs.shape, seed=9)
    got, want = (
        dict(zip(inputs, torch.autograd.grad((out * w).sum(), list(inputs.values())), strict=True))
        for out in (ours, theirs)
    )
    parity.record(got, want, gradients=True)


# ------------------------------------------------------------------------------------------------
# fast-transformers, from stored numbers


def golden() -> dict[str, Tensor]:
    with np.load(GOLDEN) as file:
        stored = {name: file[name] for name in file.files}
    meta = json.loads(str(stored.pop("meta")))
    assert meta["repository"] == "idiap/fast-transformers" and meta["config"]["eps"] == 1e-6
    out = {name: torch.from_numpy(x) for name, x in stored.items()}
    lengths = torch.tensor(meta["config"]["key_lengths"])
    out["token_mask"] = torch.arange(meta["config"]["S"])[None] < lengths[:, None]
    return out


def heads_first(x: Tensor) -> Tensor:
    return x.transpose(1, 2)  # theirs are (N, length, heads, dim)


@pytest.mark.parametrize("form", ["sums", "dense"])
def test_full_with_padding_gives_the_numbers_of_fast_transformers(form):
    g = golden()
    q, k = (elu_plus_one(heads_first(g[f"in.{name}"])) for name in "qk")
    args = q, k, heads_first(g["in.v"]), g["token_mask"]
    out = linear_attention(*args, eps=1e-6) if form == "sums" else dense_linear_attention(*args, eps=1e-6)[0]
    want = heads_first(g["out.output"])
    assert float((out - want).abs().max()) < 1e-10 * float(want.abs().max())
    for slip in (
        linear_attention(*args[:3], eps=1e-6),  # padding read
        linear_attention(*args),  # no eps
        linear_attention(q / 5**0.5, *args[1:], eps=1e-6),  # with eps a scale is seen
    ):
        assert float((slip - want).abs().max()) > 1e-8


@pytest.mark.parametrize("form", ["chunks", "prefix sums", "dense", "steps"])
def test_causal_gives_the_numbers_and_the_state_of_fast_transformers(form):
    g = golden()
    q, k = elu_plus_one(heads_first(g["in.q"])), elu_plus_one(heads_first(g["in.causal_k"]))
    v = heads_first(g["in.causal_v"])
    state = LinearState(2, 3, 5, 4, dtype=torch.float64)
    if form == "chunks":
        out = linear_attention(q, k, v, causal=True, chunk_size=3, eps=1e-6, state=state)
    elif form == "steps":
        steps = [[x[:, :, t : t + 1] for x in (q, k, v)] for t in range(7)]
        out = torch.cat([linear_attention(*s, causal=True, eps=1e-6, state=state) for s in steps], 2)
    elif form == "dense":
        out = dense_linear_attention(q, k, v, causal=True, eps=1e-6)[0]
    else:
        out = prefix_sum_attention(q, k, v, eps=1e-6)
    want = heads_first(g["out.causal_output"])
    assert float((out - want).abs().max()) < 1e-10 * float(want.abs().max())
    if state.length:
        torch.testing.assert_close(state.S, g["out.state_S"], atol=1e-10, rtol=1e-10)
        torch.testing.assert_close(state.z, g["out.state_Z"], atol=1e-10, rtol=1e-10)


# ------------------------------------------------------------------------------------------------
# performer_pytorch: attention from given features


def given_features(T: int, S: int) -> dict[str, Tensor]:
    q, k = elu_plus_one(randn(2, 3, T, 5, seed=1)), elu_plus_one(randn(2, 3, S, 5, seed=2))
    inputs = {"phi_q": q, "phi_k": k, "v": randn(2, 3, S, 7, seed=3)}
    return {name: x.requires_grad_() for name, x in inputs.items()}


@parity_row(
    "linear-attention",
    "full",
    "performer_pytorch.performer_pytorch.linear_attention",
    page="linear-attention-proof",
)
def test_full(parity):
    inputs = given_features(11, 13)
    ours, theirs = (f(*inputs.values()) for f in (linear_attention, public.linear_attention))
    parity.record({"out": ours}, {"out": theirs})
    compare_gradients(parity, ours, theirs, inputs)


def causal_like_theirs(phi_q: Tensor, phi_k: Tensor, v: Tensor, *, chunk_size: int = 4) -> Tensor:
    """Their eps is added to every entry of z, once: a sum that does not begin with zero."""
    state = LinearState(*phi_k.shape[:2], phi_k.size(3), v.size(3), dtype=v.dtype)
    state.z = state.z + THEIR_EPS
    return linear_attention(phi_q, phi_k, v, causal=True, chunk_size=chunk_size, state=state)


@parity_row(
    "linear-attention",
    "causal",
    "performer_pytorch.performer_pytorch.causal_linear_attention_noncuda",
    page="linear-attention-proof",
)
def test_causal(parity):
    inputs = given_features(19, 19)
    for pieces in (1, 3):
        theirs = public.causal_linear_attention_noncuda(*inputs.values(), chunk_size=pieces)
        for C in (1, 4, 64):
            ours = causal_like_theirs(*inputs.values(), chunk_size=C)
            parity.record({"out": ours}, {"out": theirs})
            w = randn(*theirs.shape, seed=9)
            grads = [
                torch.autograd.grad((x * w).sum(), list(inputs.values()), retain_graph=True)
                for x in (ours, theirs)
            ]
            parity.record(*(dict(zip(inputs, g, strict=True)) for g in grads), gradients=True)
    without = linear_attention(*inputs.values(), causal=True)
    assert float((without - theirs).detach().abs().max()) > 1e-9, "the comparison would not notice their eps"


# ------------------------------------------------------------------------------------------------
# performer_pytorch: features


@parity_row(
    "performer",
    "positive-features",
    "performer_pytorch.performer_pytorch.softmax_kernel",
    page="linear-attention-proof",
)
def test_positive_features(parity):
    x, W = (1.5 * randn(2, 3, 11, 7, seed=1)).requires_grad_(), rows(17, 7)
    for is_query in (True, False):
        ours = positive_features(x, W, is_query=is_query)
        theirs = public.softmax_kernel(x, projection_matrix=W, is_query=is_query)
        parity.record({"features": ours}, {"features": theirs})
        compare_gradients(parity, ours, theirs, {"x": x})


@parity_row(
    "performer",
    "relu-features",
    "performer_pytorch.performer_pytorch.generalized_kernel",
    page="linear-attention-proof",
)
def test_relu_features(parity):
    x, W = randn(2, 3, 11, 7, seed=1).requires_grad_(), rows(17, 7)
    ours, theirs = relu_features(x, W), public.generalized_kernel(x, projection_matrix=W)
    parity.record({"features": ours}, {"features": theirs})
    compare_gradients(parity, ours, theirs, {"x": x})


@parity_row(
    "performer",
    "orthogonal-rows",
    "performer_pytorch.performer_pytorch.gaussian_orthogonal_random_matrix",
    page="linear-attention-proof",
    dtype="float32",
    tolerance=1e-6,
    backward=False,
)
def test_orthogonal_rows(parity):
    """The same draws give the same rows, but for signs, which theirs takes as they come."""
    for m, d in ((17, 5), (4, 7), (14, 7)):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            theirs = public.gaussian_orthogonal_random_matrix(m, d)
        ours = orthogonal_gaussian(m, d, generator=torch.Generator().manual_seed(3))
        signs = (ours * theirs).sum(1, keepdim=True).sign()
        assert {-1.0, 1.0} == set(signs.flatten().tolist())
        parity.record({"rows": ours}, {"rows": signs * theirs})


# ------------------------------------------------------------------------------------------------
# performer_pytorch: FastAttention, and the layer around it


@pytest.mark.parametrize("kind", ["positive", "relu"])
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_layer_of_either_kind(kind, causal):
    reference = public_layer(kind=kind, causal=causal)
    x = randn(2, 13, 18, seed=1)
    torch.testing.assert_close(
        run_ours(from_public(reference), x)["out"], reference(x), atol=1e-10, rtol=1e-10
    )


@parity_row("performer", "layer", "performer_pytorch.SelfAttention", page="linear-attention-proof")
def test_layer(parity):
    x = randn(2, 13, 18, seed=1)
    parity.check(
        from_public,
        public_layer(kind="positive", causal=False),
        ours=lambda m: run_ours(m, x),
        theirs=lambda r: {"out": r(x)},
    )


@parity_row("performer", "causal-layer", "performer_pytorch.SelfAttention", page="linear-attention-proof")
def test_causal_layer(parity):
    x = randn(2, 13, 18, seed=1)
    parity.check(
        from_public,
        public_layer(kind="positive", causal=True),
        ours=lambda m: run_ours(m, x),
        theirs=lambda r: {"out": r(x)},
    )


# ------------------------------------------------------------------------------------------------
# Where we differ from the public implementation on purpose


def test_their_causal_layer_reads_the_future_and_ours_does_not():
    """A later key that is large moves the shift of all keys, and the eps of earlier ones weighs more."""
    reference = public_layer(kind="positive", causal=True)
    x = randn(1, 13, 18, seed=1)
    changed = x.clone()
    changed[:, -1] *= 6
    moved = (reference(x) - reference(changed)).detach()[:, :-1].abs().max()
    assert float(moved) > 1e-2
    ours = from_public(reference)
    ours.feature_map.stabilise_keys = False
    assert torch.equal(ours(x)[:, :-1], ours(changed)[:, :-1])


def test_their_mask_leaves_padding_in_the_normaliser_and_ours_does_not():
    reference = public_layer(kind="relu", causal=False)
    x, mask = randn(1, 13, 18, seed=1), torch.arange(13)[None] < 8
    alone = reference(x[:, :8])
    assert float((reference(x, mask=mask)[:, :8] - alone).detach().abs().max()) > 1e-2
    torch.testing.assert_close(from_public(reference)(x, token_mask=mask)[:, :8], alone)


def test_a_plain_map_is_wrapped():
    assert isinstance(LinearAttention(6, 2).feature_map, FeatureMap)
