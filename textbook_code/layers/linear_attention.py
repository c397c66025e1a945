r"""Linear attention: features of queries and keys instead of a softmax, so that the sum can be formed first.

    S = Σ φ(k) vᵀ,  z = Σ φ(k)              over the keys that a query may see
    out = φ(q) S / (φ(q) · z)               the weights φ(q)·φ(k) are never written down

Causal attention carries S and z from position to position, or from chunk to chunk; a model that writes keeps
nothing else. φ(x) = elu(x) + 1 defines a similarity of its own; random features estimate that of the softmax.

B batch, T queries, S keys, H query heads, K key/value heads, Dh head_dim, M features, Dv width of a value,
C chunk_size, N chunks, G query heads that share a key head.
Papers: Katharopoulos et al. (2020), sections 3.2 to 3.4; Choromanski et al. (2021), sections 2.3, 2.4.
References: idiap/fast-transformers; performer_pytorch.

Book: linear-attention
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import Attention, merge_heads, split_heads
from .checks import expect_bool, expect_divides, expect_dtype, expect_ids, expect_shape
from .masks import causal_mask
from .positions import rotate

KINDS = ("positive", "relu", "trigonometric")
AT_ONCE = 16  # chunks that are computed side by side


# ------------------------------------------------------------------------------------------------
# The state


class LinearState:
    """What a causal layer remembers: S and z, of one size whatever the length.

    It holds B · K · M · (Dv + 1) numbers. A layer replaces S and z by their successors; a copy made before
    is not touched.

    Args:
        batch_size: B.
        num_kv_heads: K.
        num_features: M.
        value_dim: Dv.
        dtype: of the stored numbers; torch's default when left out.
        device: where they are stored.

    Attributes:
        S: (B, K, M, Dv), the sum of φ(k) vᵀ.
        z: (B, K, M), the sum of φ(k).
        length: how many positions it has seen.

    Raises:
        ValueError: a size is not positive.

    Book: linear-attention-state
    """

    def __init__(
        self,
        batch_size: int,
        num_kv_heads: int,
        num_features: int,
        value_dim: int,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        sizes = {
            "batch_size": batch_size,
            "num_kv_heads": num_kv_heads,
            "num_features": num_features,
            "value_dim": value_dim,
        }
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"{name}: expected at least 1, got {size}")
        self.S = torch.zeros(batch_size, num_kv_heads, num_features, value_dim, dtype=dtype, device=device)
        self.z = torch.zeros(batch_size, num_kv_heads, num_features, dtype=dtype, device=device)
        self.length = 0

    @property
    def nbytes(self) -> int:
        """Bytes that S and z take, at any length."""
        return self.S.nbytes + self.z.nbytes

    def reorder(self, rows: Tensor) -> None:
        """Keep the given rows of the batch, in this order; a row may be kept more than once.

        Args:
            rows: (B′,) integer ids of rows.

        Raises:
            TypeError: the ids are not integers.
            ValueError: they are not of shape (B′,).

        Book: linear-attention-state
        """
        expect_ids("rows", rows)
        expect_shape("rows", rows, "B")
        self.S, self.z = self.S.index_select(0, rows), self.z.index_select(0, rows)


# ------------------------------------------------------------------------------------------------
# Attention from features


def linear_attention(
    phi_q: Tensor,
    phi_k: Tensor,
    v: Tensor,
    token_mask: Tensor | None = None,
    *,
    causal: bool = False,
    chunk_size: int = 64,
    eps: float = 0.0,
    state: LinearState | None = None,
) -> Tensor:
    r"""Attention whose weights are products of features, without the weights.

    $$\mathrm{out}_t = \frac{\phi(q_t)\, S_t}{\phi(q_t) \cdot z_t + \varepsilon}, \qquad
      S_t = \sum_s \phi(k_s)\, v_s^\top, \quad z_t = \sum_s \phi(k_s),$$

    over all real keys s, or, causally, over those with s ≤ t. Causal attention works in chunks: inside a
    chunk with the weights written down, across chunks by the state, T (C (M + Dv) + 2 M Dv) multiplications
    in all. The backward pass keeps the arguments and one state for every 16 chunks, and makes the others
    again. Sums are taken in float32 at least.

    Weights are as the features make them: features that may be negative can make negative weights and a
    normaliser near zero, and nothing here forbids it. A query whose normaliser is zero gets a row of zeros.

    Args:
        phi_q: (B, H, T, M), features of the queries.
        phi_k: (B, K, S, M), features of the keys; K divides H, query head h reads key head h // (H/K).
        v: (B, K, S, Dv).
        token_mask: (B, S) bool, True = real token; padding may stand anywhere and adds nothing to the sums.
        causal: no query sees a later key; T = S.
        chunk_size: C, at least 1; it decides the time and the memory, not the result.
        eps: added to the normaliser.
        state: sums over earlier positions, with `causal`; it is brought up to date.

    Returns:
        (B, H, T, Dv), in v's dtype.

    Raises:
        TypeError: the mask is not boolean, the features' dtypes differ, or a tensor is not floating.
        ValueError: shapes do not fit, the chunk is empty, or a state is given without `causal`.

    Book: linear-attention-chunks
    """
    _check(phi_q, phi_k, v, token_mask, causal, state)
    if chunk_size < 1:
        raise ValueError(f"chunk_size: expected at least 1, got {chunk_size}")
    kind = v.device.type
    if kind != "meta" and torch.is_autocast_enabled(kind):  # which would take the products in half precision
        with torch.autocast(kind, enabled=False):
            return linear_attention(
                phi_q, phi_k, v, token_mask, causal=causal, chunk_size=chunk_size, eps=eps, state=state
            )
    if not causal:
        q, k, values = _ready(phi_q, phi_k, v, token_mask)  # (B, K, G, T, M), (B, K, S, M), (B, K, S, Dv + 1)
        out = q.flatten(2, 3) @ (k.mT @ values)  # by S, and z as its last column: (B, K, G T, Dv + 1)
        return _normalised(out, eps).reshape(*phi_q.shape[:3], -1).to(v.dtype)
    sums, outs = _start(state, phi_k, v), []
    length = AT_ONCE * chunk_size  # what is computed side by side stays in the processor's cache
    masks: Sequence[Tensor | None] = [None] * -(-v.size(2) // length)
    if token_mask is not None:
        masks = token_mask.split(length, 1)
    parts = zip(*(x.split(length, 2) for x in (phi_q, phi_k, v)), strict=True)
    for (part_q, part_k, part_v), mask in zip(parts, masks, strict=True):
        q, k, values = _ready(part_q, part_k, part_v, mask)
        if k.size(2) == 1:  # one step of the recurrence
            sums = sums + k.mT @ values  # (B, K, M, Dv + 1)
            out = q @ sums[:, :, None]
        else:
            out, sums = _in_chunks(q, k, values, sums, chunk_size)
        outs.append(_normalised(out, eps).flatten(1, 2).to(v.dtype))
    if state is not None:
        state.S, state.z = sums[..., :-1], sums[..., -1]
        state.length += v.size(2)
    return torch.cat(outs, 2)


def dense_linear_attention(
    phi_q: Tensor,
    phi_k: Tensor,
    v: Tensor,
    token_mask: Tensor | None = None,
    *,
    causal: bool = False,
    eps: float = 0.0,
) -> tuple[Tensor, Tensor]:
    r"""The same function with its weights written down, as softmax attention has to; it also returns them.

    $$w_{ts} = \frac{\phi(q_t) \cdot \phi(k_s)}{\sum_{s'} \phi(q_t) \cdot \phi(k_{s'}) + \varepsilon}$$

    Takes the arguments of `linear_attention` that concern the result.

    Returns:
        The output (B, H, T, Dv) and the weights (B, H, T, S).

    Raises:
        TypeError: the mask is not boolean, the features' dtypes differ, or a tensor is not floating.
        ValueError: shapes do not fit.

    Book: linear-attention-associativity
    """
    _check(phi_q, phi_k, v, token_mask, causal, None)
    q, k, values = _ready(phi_q, phi_k, v, token_mask)
    weights = q @ k[:, :, None].mT  # (B, K, G, T, S)
    if causal:
        weights = weights * causal_mask(k.size(2), device=k.device)
    total = weights.sum(-1, keepdim=True) + eps
    weights = weights / total.masked_fill(total == 0, 1)
    out = weights @ values[:, :, None, :, :-1]
    return out.flatten(1, 2).to(v.dtype), weights.flatten(1, 2).to(v.dtype)


def prefix_sum_attention(
    phi_q: Tensor, phi_k: Tensor, v: Tensor, token_mask: Tensor | None = None, *, eps: float = 0.0
) -> Tensor:
    """Causal linear attention as its formula reads: S and z of every position, by a running sum.

    It stores B · K · T · M · (Dv + 1) numbers, and its gradient needs them; it is here to be compared with.
    Takes the arguments of `linear_attention` that concern the result, and returns the same.

    Raises:
        TypeError: the mask is not boolean, the features' dtypes differ, or a tensor is not floating.
        ValueError: shapes do not fit.

    Book: linear-attention-state
    """
    _check(phi_q, phi_k, v, token_mask, True, None)
    q, k, values = _ready(phi_q, phi_k, v, token_mask)
    sums = (k[..., :, None] * values[..., None, :]).cumsum(2)  # (B, K, T, M, Dv + 1)
    out = (q[..., None, :] @ sums[:, :, None]).squeeze(-2)  # (B, K, G, T, Dv + 1)
    return _normalised(out, eps).flatten(1, 2).to(v.dtype)


def _check(
    phi_q: Tensor,
    phi_k: Tensor,
    v: Tensor,
    token_mask: Tensor | None,
    causal: bool,
    state: LinearState | None,
) -> None:
    expect_shape("phi_q", phi_q, "B H T M")
    expect_shape("phi_k", phi_k, "B K S M", B=phi_q.size(0), M=phi_q.size(3))
    expect_shape("v", v, "B K S Dv", B=phi_q.size(0), K=phi_k.size(1), S=phi_k.size(2))
    expect_divides("phi_k: number of heads", phi_k.size(1), "phi_q's number of heads", phi_q.size(1))
    for name, x in (("phi_q", phi_q), ("v", v)):
        if not x.is_floating_point():
            raise TypeError(f"{name}: expected a floating-point tensor, got {x.dtype}")
    expect_dtype("phi_k", phi_k, phi_q.dtype)
    if phi_k.size(2) < 1:
        raise ValueError("phi_k: expected at least one key, got S=0")
    if causal and phi_q.size(2) != phi_k.size(2):
        raise ValueError(
            f"causal: expected as many queries as keys (earlier keys are in the state), "
            f"got T={phi_q.size(2)}, S={phi_k.size(2)}"
        )
    if token_mask is not None:
        _check_token_mask(token_mask, phi_k.size(0), phi_k.size(2))
    if state is not None:
        if not causal:
            raise ValueError("state: expected None without causal, where every query sees every key")
        B, K, M, Dv = *phi_k.shape[:2], phi_k.size(3), v.size(3)
        expect_shape("state.S", state.S, "B K M Dv", B=B, K=K, M=M, Dv=Dv)


def _check_token_mask(token_mask: Tensor, batch_size: int, length: int) -> None:
    expect_bool("token_mask", token_mask)
    expect_shape("token_mask", token_mask, "B S", B=batch_size, S=length)


def _ready(
    phi_q: Tensor, phi_k: Tensor, v: Tensor, token_mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries with their group as an axis, keys without padding, values with a one behind them.

    The one makes the normaliser: attention over ones is the sum of the weights, and the last column of
    Σ φ(k) [v, 1]ᵀ is z.
    """
    dtype = _dtype(phi_q, v)
    q = phi_q.to(dtype).unflatten(1, (phi_k.size(1), -1))  # (B, K, G, T, M)
    k = phi_k.to(dtype)
    if token_mask is not None:
        k = k.masked_fill(~token_mask[:, None, :, None], 0)
    return q, k, F.pad(v.to(dtype), (0, 1), value=1.0)


def _start(state: LinearState | None, phi_k: Tensor, v: Tensor) -> Tensor:
    """The sums to begin with, (B, K, M, Dv + 1)."""
    dtype = _dtype(phi_k, v)
    if state is None:
        return phi_k.new_zeros(*phi_k.shape[:2], phi_k.size(3), v.size(3) + 1, dtype=dtype)
    return torch.cat([state.S, state.z[..., None]], -1).to(dtype)


def _dtype(phi: Tensor, v: Tensor) -> torch.dtype:
    return torch.promote_types(torch.promote_types(phi.dtype, v.dtype), torch.float32)


def _normalised(out: Tensor, eps: float) -> Tensor:
    weight = out[..., -1:] + eps
    return out[..., :-1] / weight.masked_fill(weight == 0, 1)


def _in_chunks(q: Tensor, k: Tensor, values: Tensor, start: Tensor, chunk_size: int) -> tuple[Tensor, Tensor]:
    """Chunks side by side: (B, K, G, T, Dv + 1) and the last state (B, K, M, Dv + 1)."""
    G, T = q.shape[2:4]
    C = min(chunk_size, T)
    rest = -T % C  # keys of zeros, which add nothing
    q, k, values = (F.pad(x, (0, 0, 0, rest)) for x in (q, k, values))
    q = q.unflatten(3, (-1, C)).transpose(2, 3).flatten(3, 4)  # (B, K, N, G C, M)
    k, values = k.unflatten(2, (-1, C)), values.unflatten(2, (-1, C))  # (B, K, N, C, ·)
    out, end = _ChunkedProduct.apply(q, k, values, start)
    out = out.unflatten(3, (G, C)).transpose(2, 3).flatten(3, 4)  # (B, K, G, N C, Dv + 1)
    return out[:, :, :, :T], end


def _states(k: Tensor, values: Tensor, start: Tensor) -> Tensor:
    """States before each chunk and behind the last: (…, N + 1, M, Dv + 1)."""
    return torch.cat([start[:, :, None], k.mT @ values], 2).cumsum(2)


def _inside(a: Tensor, b: Tensor) -> Tensor:
    """Products of the rows of one chunk, (…, G C, C), those with a later row set to zero."""
    C = b.size(-2)
    earlier = causal_mask(C, device=b.device).repeat(a.size(-2) // C, 1)
    return (a @ b.mT).mul_(earlier)


class _ChunkedProduct(torch.autograd.Function):
    """out_t = q_t (start + Σ_{s≤t} k_s values_sᵀ) and the last sum; the backward pass makes states anew."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, values: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
        states = _states(k, values, start)
        ctx.save_for_backward(q, k, values, start)
        out = q @ states[:, :, :-1]
        out += _inside(q, k) @ values
        return out, states[:, :, -1].clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_out: Tensor, d_end: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        q, k, values, start = ctx.saved_tensors
        products = _inside(d_out, values)  # (B, K, N, G C, C)
        d_q = d_out @ _states(k, values, start)[:, :, :-1].mT + products @ k
        gifts = q.mT @ d_out  # (B, K, N, M, Dv + 1): what each chunk asks of the state before it
        asked = torch.cat([gifts, d_end[:, :, None]], 2).flip(2).cumsum(2).flip(2)  # of all states from n on
        later = asked[:, :, 1:]
        d_k = values @ later.mT + products.mT @ q
        d_values = k @ later + _inside(q, k).mT @ d_out
        return d_q, d_k, d_values, asked[:, :, 0]


# ------------------------------------------------------------------------------------------------
# Features


def elu_plus_one(x: Tensor) -> Tensor:
    r"""Positive features, one for each entry: $\phi(x) = \mathrm{elu}(x) + 1$, that is $x + 1$ or $e^x$.

    Paper: Katharopoulos et al. (2020), equation 7.

    Args:
        x: (…, Dh).

    Returns:
        (…, Dh), all positive.

    Book: linear-attention-associativity
    """
    return F.elu(x) + 1


def orthogonal_gaussian(num_rows: int, width: int, *, generator: torch.Generator | None = None) -> Tensor:
    r"""Random rows, each distributed as N(0, I), that stand at right angles in blocks of `width`.

    A block is the orthogonal factor of a Gaussian matrix, and each row is given the length of another
    Gaussian row. The factor is made unique by a positive diagonal of R; without that its first row would
    always look the same way, and features made of it would be biased.

    Paper: Choromanski et al. (2021), section 2.4; Mezzadri (2007) for the signs.
    Reference: performer_pytorch.gaussian_orthogonal_random_matrix, with the same draws, up to those signs.

    Args:
        num_rows: m.
        width: d.
        generator: where the numbers come from; torch's global one when left out.

    Returns:
        (m, d).

    Raises:
        ValueError: a size is not positive.

    Book: linear-attention-orthogonal
    """
    for name, size in (("num_rows", num_rows), ("width", width)):
        if size < 1:
            raise ValueError(f"{name}: expected at least 1, got {size}")
    blocks = []
    for start in range(0, num_rows, width):
        q, r = torch.linalg.qr(torch.randn(width, width, generator=generator))
        q = q * r.diagonal().sign()
        blocks.append(q.T[: num_rows - start])
    lengths = torch.randn(num_rows, width, generator=generator).norm(dim=1, keepdim=True)
    return lengths * torch.cat(blocks)


def positive_features(
    x: Tensor,
    projection: Tensor,
    *,
    is_query: bool,
    token_mask: Tensor | None = None,
    stabilise: bool = True,
    eps: float = 1e-4,
) -> Tensor:
    r"""Random features whose products estimate the softmax's exponentials, and are never negative.

    $$\phi(x)_i = \frac{1}{\sqrt m} \Big( \exp\!\big( w_i \cdot \hat x - \tfrac12 \lVert \hat x \rVert^2 - c
      \big) + \varepsilon \Big), \qquad \hat x = x / d^{1/4}$$

    With c = 0 and ε = 0 the mean of φ(q)·φ(k) over Gaussian w is exp(q·k/√d), and each entry times √m has
    mean 1. The shift c is the largest w·x̂: for a query its own, which cancels in the attention; for keys that
    of all keys of a head, which cancels too, but for ε.

    Paper: Choromanski et al. (2021), equation 5. Reference: performer_pytorch.softmax_kernel.

    Args:
        x: (B, H, T, Dh), queries or keys.
        projection: (m, Dh), the rows w.
        is_query: whether the shift is each row's own, or that of all rows.
        token_mask: (B, T) bool, True = real token; padding has no part in the shift.
        stabilise: whether there is a shift. A causal layer's keys can have none: it would depend on later
            keys.
        eps: ε.

    Returns:
        (B, H, T, m), in float32 at least.

    Raises:
        TypeError: the mask is not boolean, or x not floating.
        ValueError: shapes do not fit.

    Book: linear-attention-features
    """
    x, products = _projected(x, projection)  # (B, H, T, Dh), (B, H, T, m)
    if token_mask is not None:
        _check_token_mask(token_mask, x.size(0), x.size(2))
        padding = ~token_mask[:, None, :, None]
        x, products = x.masked_fill(padding, 0), products.masked_fill(padding, 0)
    exponent = products - x.square().sum(-1, keepdim=True) / 2
    if stabilise and is_query:
        exponent = exponent - products.detach().amax(-1, keepdim=True)
    elif stabilise:
        seen = products.detach()
        if token_mask is not None:
            seen = seen.masked_fill(padding, -torch.inf)
        shift = seen.amax((-2, -1), keepdim=True)
        exponent = exponent - shift.masked_fill(shift.isinf(), 0)  # a text of padding has no largest
    return (exponent.exp() + eps) * projection.size(0) ** -0.5


def relu_features(x: Tensor, projection: Tensor, *, eps: float = 1e-3) -> Tensor:
    r"""Features of another kernel, bent instead of exponential.

    $$\phi(x)_i = \max(0, w_i \cdot \hat x) + \varepsilon, \qquad \hat x = x / d^{1/4}$$

    Their products estimate no softmax; a model is trained with them from the start.

    Paper: Choromanski et al. (2021), section 2.2 and appendix D.
    Reference: performer_pytorch.generalized_kernel.

    Args:
        x: (B, H, T, Dh).
        projection: (m, Dh).
        eps: ε, so that a query and a key without a common feature still meet.

    Returns:
        (B, H, T, m).

    Raises:
        TypeError: x is not floating.
        ValueError: shapes do not fit.

    Book: linear-attention-features
    """
    return F.relu(_projected(x, projection)[1]) + eps


def trigonometric_features(x: Tensor, projection: Tensor) -> Tensor:
    r"""The older random features for the same exponential: unbiased, and of either sign.

    $$\phi(x) = \frac{1}{\sqrt m}\, e^{\lVert \hat x \rVert^2 / 2}\,
      [\cos(W \hat x),\ \sin(W \hat x)], \qquad \hat x = x / d^{1/4}$$

    Where the softmax's weight is near zero their variance is largest, and their estimate may be negative.

    Paper: Choromanski et al. (2021), equation 4, after Rahimi and Recht (2007).

    Args:
        x: (B, H, T, Dh).
        projection: (m, Dh).

    Returns:
        (B, H, T, 2 m).

    Raises:
        TypeError: x is not floating.
        ValueError: shapes do not fit.

    Book: linear-attention-features
    """
    x, products = _projected(x, projection)
    size = (x.square().sum(-1, keepdim=True) / 2).exp() * projection.size(0) ** -0.5
    return size * torch.cat([products.cos(), products.sin()], -1)


def _projected(x: Tensor, projection: Tensor) -> tuple[Tensor, Tensor]:
    """x̂, in float32 at least, and its products with the rows of the projection."""
    expect_shape("x", x, "B H T Dh")
    expect_shape("projection", projection, "m Dh", Dh=x.size(3))
    if not x.is_floating_point():
        raise TypeError(f"x: expected a floating-point tensor, got {x.dtype}")
    x = x.to(torch.promote_types(x.dtype, torch.float32)) * x.size(-1) ** -0.25
    return x, x @ projection.to(x.dtype).T


class FeatureMap(nn.Module):
    """Features for a layer: one function for queries and keys. Subclasses may tell the two apart.

    Args:
        function: (…, Dh) → (…, M). Its values should not be negative; whoever gives one that makes negative
            values answers for the weights and for a normaliser near zero.

    Book: linear-attention-associativity
    """

    looks_ahead = False  # whether the features of a key depend on later keys

    def __init__(self, function: Callable[[Tensor], Tensor] = elu_plus_one) -> None:
        super().__init__()
        self.function = function

    def queries(self, q: Tensor) -> Tensor:
        """(B, H, T, Dh) → (B, H, T, M)."""
        return self.function(q)

    def keys(self, k: Tensor, token_mask: Tensor | None = None) -> Tensor:
        """(B, K, S, Dh) → (B, K, S, M); the mask (B, S) says which are real."""
        return self.function(k)


class RandomFeatures(FeatureMap):
    """The features of a Performer, with their random rows as a buffer that is saved with the layer.

    Args:
        head_dim: Dh.
        num_features: m, the random rows; M = m, or 2 m for trigonometric features.
        kind: "positive", "relu" or "trigonometric".
        orthogonal: rows at right angles in blocks of Dh, or all independent.
        stabilise_keys: for positive features, whether the keys' exponents are shifted by the largest of all
            keys. A causal layer takes only False: earlier outputs would depend on later keys, by way of eps.
            Without the shift, a feature times √m has mean 1 and is at most exp(‖w‖²/2), about
            exp(Dh/2).
        eps: added to each feature, for positive ones before the division by √m; 1e-4 for positive and 1e-3
            for relu features when left out. Trigonometric ones take none.
        generator: where the rows come from; torch's global one when left out.

    Raises:
        ValueError: the kind is unknown, or a size is not positive.

    Book: linear-attention-features
    """

    projection: Tensor

    def __init__(
        self,
        head_dim: int,
        num_features: int,
        *,
        kind: str = "positive",
        orthogonal: bool = True,
        stabilise_keys: bool = True,
        eps: float | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if kind not in KINDS:
            raise ValueError(f"kind: expected one of {', '.join(KINDS)}, got {kind!r}")
        for name, size in (("head_dim", head_dim), ("num_features", num_features)):
            if size < 1:
                raise ValueError(f"{name}: expected at least 1, got {size}")
        self.kind, self.orthogonal, self.stabilise_keys = kind, orthogonal, stabilise_keys
        self.eps = {"positive": 1e-4, "relu": 1e-3, "trigonometric": 0.0}[kind] if eps is None else eps
        self.looks_ahead = kind == "positive" and stabilise_keys
        self.register_buffer("projection", torch.empty(num_features, head_dim))
        self.redraw(generator=generator)

    @torch.no_grad()
    def redraw(self, *, generator: torch.Generator | None = None) -> None:
        """Draw the random rows anew, as a model in training does from time to time.

        Sums in a `LinearState` belong to the old rows: begin a new one.

        Book: linear-attention-orthogonal
        """
        m, d = self.projection.shape
        rows = (
            orthogonal_gaussian(m, d, generator=generator)
            if self.orthogonal
            else torch.randn(m, d, generator=generator)
        )
        self.projection.copy_(rows)

    def queries(self, q: Tensor) -> Tensor:
        """(B, H, T, Dh) → (B, H, T, M)."""
        if self.kind == "positive":
            return positive_features(q, self.projection, is_query=True, eps=self.eps)
        return self._other(q)

    def keys(self, k: Tensor, token_mask: Tensor | None = None) -> Tensor:
        """(B, K, S, Dh) → (B, K, S, M); the mask (B, S) says which are real."""
        if self.kind == "positive":
            return positive_features(
                k,
                self.projection,
                is_query=False,
                token_mask=token_mask,
                stabilise=self.stabilise_keys,
                eps=self.eps,
            )
        return self._other(k)

    def _other(self, x: Tensor) -> Tensor:
        if self.kind == "relu":
            return relu_features(x, self.projection, eps=self.eps)
        return trigonometric_features(x, self.projection)

    def extra_repr(self) -> str:
        m, d = self.projection.shape
        return f"head_dim={d}, num_features={m}, kind={self.kind!r}, orthogonal={self.orthogonal}"


# ------------------------------------------------------------------------------------------------
# The layer


class LinearAttention(nn.Module):
    r"""Multi-head self-attention in linear time; the projections are those of `Attention`.

    $$\mathrm{head}_h = \mathrm{linear\_attention}\big(\phi(X W^Q_h),\ \phi(X W^K_{g(h)}),\ X W^V_{g(h)}\big),
      \qquad Y = [\mathrm{head}_1; \ldots; \mathrm{head}_H]\, W^O$$

    No 1/√Dh is applied: φ = elu + 1 has none, and random features bring their own. There is no dropout of
    weights, since there are no weights, and no mask but causal order and padding.

    Args:
        d_model: width of `x` and of the output.
        num_heads: query heads H.
        num_kv_heads: key/value heads K, a divisor of H; H when left out.
        head_dim: width of a head; d_model / num_heads when left out.
        feature_map: a function (…, Dh) → (…, M), used for queries and keys, or a `FeatureMap`.
        causal: whether no position sees a later one.
        chunk_size: C of causal attention; it decides time and memory only.
        bias: whether the four projections have biases.
        eps: added to the normaliser.

    Raises:
        ValueError: the head counts do not divide, the chunk is empty, or a causal layer's features look
            ahead.

    Book: linear-attention-layer
    """

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        feature_map: Callable[[Tensor], Tensor] | FeatureMap = elu_plus_one,
        causal: bool = False,
        chunk_size: int = 64,
        bias: bool = True,
        eps: float = 1e-6,
    ) -> None:
        super().__init__()
        if head_dim is None:
            expect_divides("num_heads", num_heads, "d_model", d_model)
            head_dim = d_model // num_heads
        elif head_dim < 1:
            raise ValueError(f"head_dim: expected a positive width, got {head_dim}")
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        expect_divides("num_kv_heads", num_kv_heads, "num_heads", num_heads)
        if chunk_size < 1:
            raise ValueError(f"chunk_size: expected at least 1, got {chunk_size}")
        if not isinstance(feature_map, FeatureMap):
            feature_map = FeatureMap(feature_map)
        if causal and feature_map.looks_ahead:
            raise ValueError(
                "feature_map: its keys are shifted by the largest of all keys, of which a causal layer may "
                "not know the later ones; expected RandomFeatures(…, stabilise_keys=False)"
            )
        self.d_model, self.num_heads, self.num_kv_heads = d_model, num_heads, num_kv_heads
        self.head_dim, self.causal, self.chunk_size, self.eps = head_dim, causal, chunk_size, eps
        self.q_proj = nn.Linear(d_model, num_heads * head_dim, bias=bias)
        self.k_proj = nn.Linear(d_model, num_kv_heads * head_dim, bias=bias)
        self.v_proj = nn.Linear(d_model, num_kv_heads * head_dim, bias=bias)
        self.out_proj = nn.Linear(num_heads * head_dim, d_model, bias=bias)
        self.feature_map = feature_map

    @classmethod
    def from_attention(cls, attn: Attention, **settings: Any) -> LinearAttention:
        """A layer with a copy of softmax attention's weights; `settings` are feature_map, causal and so on.

        Raises:
            ValueError: the layer is one of cross-attention between different widths.

        Book: linear-attention-layer
        """
        if attn.d_context != attn.d_model:
            raise ValueError(
                f"attn: expected self-attention, got d_context={attn.d_context} beside d_model={attn.d_model}"
            )
        layer = cls(
            attn.d_model,
            attn.num_heads,
            num_kv_heads=attn.num_kv_heads,
            head_dim=attn.head_dim,
            bias=attn.q_proj.bias is not None,
            **settings,
        )
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            getattr(layer, name).load_state_dict(getattr(attn, name).state_dict())
        return layer.to(attn.q_proj.weight)

    def make_state(self, batch_size: int) -> LinearState:
        """An empty state for `batch_size` texts, on the layer's device, in float32 at least.

        Book: linear-attention-state
        """
        weight = self.v_proj.weight
        with torch.no_grad():
            M = self.feature_map.queries(weight.new_zeros(1, 1, 1, self.head_dim)).size(-1)
        dtype = torch.promote_types(weight.dtype, torch.float32)
        return LinearState(batch_size, self.num_kv_heads, M, self.head_dim, dtype=dtype, device=weight.device)

    def forward(
        self,
        x: Tensor,
        *,
        token_mask: Tensor | None = None,
        rotary: tuple[Tensor, Tensor] | None = None,
        state: LinearState | None = None,
    ) -> Tensor:
        """Attend from `x` to itself.

        Args:
            x: (B, T, D); with a state, the T new positions.
            token_mask: (B, T) bool, True = real token.
            rotary: cosines and sines of the positions, by which q and k are turned before φ.
            state: sums over earlier positions, for a causal layer; brought up to date.

        Returns:
            (B, T, D).

        Raises:
            TypeError: the mask is not boolean, or the dtype differs.
            ValueError: shapes do not fit, or a layer that is not causal is given a state.

        Book: linear-attention-layer
        """
        expect_shape("x", x, "B T D", D=self.d_model)
        expect_dtype("x", x, self.q_proj.weight.dtype)
        if token_mask is not None:
            _check_token_mask(token_mask, x.size(0), x.size(1))
        q = split_heads(self.q_proj(x), self.num_heads)  # (B, H, T, Dh)
        k = split_heads(self.k_proj(x), self.num_kv_heads)  # (B, K, T, Dh)
        v = split_heads(self.v_proj(x), self.num_kv_heads)
        if rotary is not None:
            q, k = rotate(q, *rotary), rotate(k, *rotary)
        out = linear_attention(
            self.feature_map.queries(q),
            self.feature_map.keys(k, token_mask),
            v,
            token_mask,
            causal=self.causal,
            chunk_size=self.chunk_size,
            eps=self.eps,
            state=state,
        )
        return self.out_proj(merge_heads(out))  # (B, T, D)

    def extra_repr(self) -> str:
        return (
            f"num_heads={self.num_heads}, num_kv_heads={self.num_kv_heads}, head_dim={self.head_dim}, "
            f"causal={self.causal}, chunk_size={self.chunk_size}"
        )
