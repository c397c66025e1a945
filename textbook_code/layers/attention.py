"""Attention: scaled dot-product, many heads, shared keys and values, another source.

    q = x W_q,  k = c W_k,  v = c W_v                c = x (self) or another sequence (cross)
    out = softmax(q kᵀ / √Dh + bias + mask) v W_o    for each head, side by side

B batch, T queries, S keys, H query heads, K key/value heads, Dh head_dim.
Paper: Vaswani et al. (2017), section 3.2; Shazeer (2019) for K = 1; Ainslie et al. (2023)
for 1 < K < H. Reference: torch.nn.MultiheadAttention, F.scaled_dot_product_attention.

Book: attention
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .cache import KVCache
from .checks import expect_bool, expect_divides, expect_dtype, expect_shape
from .masks import causal_mask
from .norms import QKNorm
from .positions import rotate


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    *,
    causal: bool = False,
    score_bias: Tensor | None = None,
    dropout: float = 0.0,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Scaled dot-product attention, written out; it also returns the weights.

    $$\mathrm{attention}(Q, K, V) = \mathrm{softmax}\!\left(\frac{Q K^\top}{\sqrt{d_k}} + B\right) V,$$

    where a pair that the mask forbids gets weight 0. A query that may attend to nothing gets
    a row of zeros, and so does its output. The softmax is taken in float32 at least.

    Args:
        q: (B, H, T, Dh).
        k: (B, K, S, Dh); K divides H, and query head h reads key head h // (H/K).
        v: (B, K, S, Dv).
        attn_mask: bool, two to four axes, broadcastable to (B, H, T, S); True = may attend.
        causal: the queries are the last T of S positions, and none sees a later one; this adds to
            `attn_mask`.
        score_bias: B, floating, two to four axes, broadcastable to (B, H, T, S).
        dropout: probability with which a weight is dropped.
        scale: factor on q kᵀ; 1/√Dh when left out.

    Returns:
        The output (B, H, T, Dv) and the weights (B, H, T, S) before dropout.

    Raises:
        TypeError: the mask is not boolean, or the dtypes differ.
        ValueError: shapes do not fit.

    Book: attention-scaled
    """
    _check(q, k, v, attn_mask, score_bias)
    k, v = _shared(k, q.size(1)), _shared(v, q.size(1))
    attn_mask = _with_causal(attn_mask, causal, q, k)
    scale = q.size(-1) ** -0.5 if scale is None else scale
    scores = q @ k.transpose(-2, -1) * scale  # (B, H, T, S)
    if score_bias is not None:
        scores = scores + score_bias
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, torch.finfo(scores.dtype).min)
    weights = scores.softmax(-1, dtype=torch.promote_types(q.dtype, torch.float32)).to(q.dtype)
    if attn_mask is not None:
        weights = weights.masked_fill(~attn_mask, 0)  # a row with nothing to see: zeros, not 1/S
    return F.dropout(weights, dropout) @ v, weights


def fused_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    *,
    causal: bool = False,
    score_bias: Tensor | None = None,
    dropout: float = 0.0,
    scale: float | None = None,
) -> Tensor:
    """The same function as `attention`, by torch's kernel, which never stores the weights.

    Takes the arguments of `attention` and returns its first result, (B, H, T, Dv).

    Raises:
        TypeError: the mask is not boolean, or the dtypes differ.
        ValueError: shapes do not fit.

    Book: attention-cost
    """
    _check(q, k, v, attn_mask, score_bias)
    (H, T), (K, S) = q.shape[1:3], k.shape[1:3]
    if T == 1 and K < H and score_bias is None and _same_for_all_heads(attn_mask):
        # one step behind a cache: a group's queries stand as the queries of its key head; no key is copied
        grouped = q.reshape(q.size(0), K, H // K, q.size(3))
        return fused_attention(grouped, k, v, attn_mask, dropout=dropout, scale=scale).view(*q.shape[:3], -1)
    k, v = _shared(k, H), _shared(v, H)
    # the kernel's own causal mask skips what it hides, but lies at the top left: right only where T = S
    by_kernel = causal and T == S and attn_mask is None and score_bias is None
    mask = None if by_kernel else _with_causal(attn_mask, causal, q, k)
    if score_bias is not None:
        mask = score_bias if mask is None else score_bias.masked_fill(~mask, -torch.inf)
    if mask is not None and mask.dim() == 3:
        mask = mask[None]  # given three axes, torch falls back to its slow path
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, dropout_p=dropout, scale=scale, is_causal=by_kernel
    )


def _check(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None, score_bias: Tensor | None) -> None:
    expect_shape("q", q, "B H T Dh")
    expect_shape("k", k, "B K S Dh", B=q.size(0), Dh=q.size(3))
    expect_shape("v", v, "B K S Dv", B=q.size(0), K=k.size(1), S=k.size(2))
    expect_divides("k: number of heads", k.size(1), "q's number of heads", q.size(1))
    if not q.is_floating_point():
        raise TypeError(f"q: expected a floating-point tensor, got {q.dtype}")
    expect_dtype("k", k, q.dtype)
    expect_dtype("v", v, q.dtype)
    if attn_mask is not None:
        expect_bool("attn_mask", attn_mask)
    if score_bias is not None:
        expect_dtype("score_bias", score_bias, q.dtype)
    for name, x in (("attn_mask", attn_mask), ("score_bias", score_bias)):
        if x is None:
            continue
        scores = (q.size(0), q.size(1), q.size(2), k.size(2))
        axes = zip(reversed(x.shape), reversed(scores), strict=False)
        if not 2 <= x.dim() <= 4 or any(have not in (1, want) for have, want in axes):
            raise ValueError(
                f"{name}: expected 2 to 4 axes whose shape broadcasts to (B, H, T, S) = {scores}, "
                f"got {tuple(x.shape)}"
            )


def _same_for_all_heads(attn_mask: Tensor | None) -> bool:
    return attn_mask is None or attn_mask.dim() < 3 or attn_mask.size(-3) == 1


def _shared(x: Tensor, num_heads: int) -> Tensor:
    """Give each query head the key or value head that it reads: (B, K, S, Dh) → (B, H, S, Dh)."""
    group_size = num_heads // x.size(1)
    return x if group_size == 1 else x.repeat_interleave(group_size, dim=1)


def _with_causal(attn_mask: Tensor | None, causal: bool, q: Tensor, k: Tensor) -> Tensor | None:
    T, S = q.size(2), k.size(2)
    if not causal or T == 1 <= S:  # the last position sees all
        return attn_mask
    earlier = causal_mask(T, S, device=q.device)
    return earlier if attn_mask is None else attn_mask & earlier


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """Give each head its share of every vector: (B, T, H Dh) to (B, H, T, Dh).

    Book: attention-multi-head
    """
    return x.view(x.size(0), x.size(1), num_heads, x.size(2) // num_heads).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """Put the heads' vectors side by side again: (B, H, T, Dh) to (B, T, H Dh).

    Book: attention-multi-head
    """
    return x.transpose(1, 2).flatten(2)


class Attention(nn.Module):
    r"""Multi-head attention; with fewer key/value heads, multi-query or grouped-query attention.

    $$\mathrm{head}_h = \mathrm{attention}(X W^Q_h,\; C W^K_{g(h)},\; C W^V_{g(h)}), \qquad
      Y = [\mathrm{head}_1; \ldots; \mathrm{head}_H]\, W^O,$$

    with $C = X$ for self-attention, another sequence for cross-attention, and
    $g(h) = \lfloor h / \mathtt{group\_size} \rfloor$.

    Args:
        d_model: width of `x` and of the output.
        num_heads: query heads H.
        num_kv_heads: key/value heads K: H (multi-head, the default), 1 (multi-query), or a
            divisor of H in between (grouped-query).
        head_dim: width of a head; d_model / num_heads when left out.
        d_context: width of `context` in cross-attention; d_model when left out.
        bias: whether the four projections have biases.
        dropout: probability with which a weight is dropped in training.
        scale: factor on q kᵀ; 1/√Dh when left out.
        qk_norm: normalises queries and keys before they are turned.

    Raises:
        ValueError: the head counts do not divide.

    Book: attention-multi-head
    """

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        d_context: int | None = None,
        bias: bool = True,
        dropout: float = 0.0,
        scale: float | None = None,
        qk_norm: QKNorm | None = None,
    ) -> None:
        super().__init__()
        if head_dim is None:
            expect_divides("num_heads", num_heads, "d_model", d_model)
            head_dim = d_model // num_heads
        elif head_dim < 1:
            raise ValueError(f"head_dim: expected a positive width, got {head_dim}")
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        expect_divides("num_kv_heads", num_kv_heads, "num_heads", num_heads)
        d_context = d_model if d_context is None else d_context
        self.d_model, self.d_context = d_model, d_context
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, head_dim
        self.dropout, self.scale, self.qk_norm = dropout, scale, qk_norm
        self.q_proj = nn.Linear(d_model, num_heads * head_dim, bias=bias)
        self.k_proj = nn.Linear(d_context, num_kv_heads * head_dim, bias=bias)
        self.v_proj = nn.Linear(d_context, num_kv_heads * head_dim, bias=bias)
        self.out_proj = nn.Linear(num_heads * head_dim, d_model, bias=bias)

    @property
    def group_size(self) -> int:
        """How many query heads share one key/value head."""
        return self.num_heads // self.num_kv_heads

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        attn_mask: Tensor | None = None,
        causal: bool = False,
        rotary: tuple[Tensor, Tensor] | None = None,
        score_bias: Tensor | None = None,
        cache: KVCache | None = None,
        need_weights: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Attend from `x` to itself, or to `context`.

        Args:
            x: (B, T, D), the queries' side.
            context: (B, S, d_context), the keys' and values' side; `x` when left out.
            attn_mask: bool, broadcastable to (B, H, T, S); True = may attend.
            causal: no query sees a later position; the T queries are the last of the S keys.
            rotary: cosines and sines of the new positions, by which q and k are turned.
            score_bias: floating, broadcastable to (B, H, T, S), added to the scaled scores.
            cache: keys and values of earlier positions; the new ones are appended to it. With
                `context`, which does not grow, it is filled once and read from then on.
            need_weights: also return the weights, by the written-out path.

        Returns:
            The output (B, T, D); with `need_weights` also the weights (B, H, T, S).

        Raises:
            TypeError: the mask is not boolean, or the dtypes differ.
            ValueError: shapes do not fit, or `rotary` is given together with `context`.

        Book: attention-multi-head
        """
        expect_shape("x", x, "B T D", D=self.d_model)
        expect_dtype("x", x, self.q_proj.weight.dtype)
        if context is not None:
            expect_shape("context", context, "B S d_context", B=x.size(0), d_context=self.d_context)
            expect_dtype("context", context, self.k_proj.weight.dtype)
            if rotary is not None:
                raise ValueError("rotary: expected None with a context, whose positions are others than x's")
        q = split_heads(self.q_proj(x), self.num_heads)  # (B, H, T, Dh)
        q = q if self.qk_norm is None else self.qk_norm.queries(q)
        if context is not None and cache is not None and cache.length:
            k, v = cache.stored
        else:
            source = x if context is None else context
            k = split_heads(self.k_proj(source), self.num_kv_heads)  # (B, K, S, Dh)
            v = split_heads(self.v_proj(source), self.num_kv_heads)
            k = k if self.qk_norm is None else self.qk_norm.keys(k)
            if rotary is not None:
                q, k = rotate(q, *rotary), rotate(k, *rotary)
            if cache is not None:
                k, v = cache.append(k, v)
        dropout = self.dropout if self.training else 0.0
        if need_weights:
            out, weights = attention(
                q, k, v, attn_mask, causal=causal, score_bias=score_bias, dropout=dropout, scale=self.scale
            )
            return self.out_proj(merge_heads(out)), weights
        out = fused_attention(
            q, k, v, attn_mask, causal=causal, score_bias=score_bias, dropout=dropout, scale=self.scale
        )
        del q, k, v  # their memory serves the last projection
        return self.out_proj(merge_heads(out))

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, num_kv_heads={self.num_kv_heads}, head_dim={self.head_dim}"
