"""Attention whose scores hold terms of content and distance: Shaw's, and DeBERTa's.

They are layers of their own, because a distance meets the queries and keys in them; what is only added to
the scores, or turns q and k, goes into `Attention` as `score_bias=` or `rotary=`.

B batch, T length, D d_model, H heads, Dh head_dim.

Papers: Shaw et al. (2018), He et al. (2021). References: transformers, Wav2Vec2BertSelfAttention (Shaw's
keys), DebertaV2's DisentangledSelfAttention.

Book: shaw-positions, deberta-positions
"""

import torch
from torch import Tensor, nn

from .attention import attention, fused_attention, merge_heads, split_heads
from .checks import expect_divides, expect_dtype, expect_shape
from .positions.content import (
    disentangled_index,
    disentangled_scores,
    relative_scores,
    relative_values,
)


class ShawAttention(nn.Module):
    r"""Self-attention with a learned key and a learned value for each clipped distance.

    $$s_{ij} = \frac{q_i \cdot (k_j + a^K_{c(j-i)})}{\sqrt{D_h}}, \qquad
      o_i = \sum_j w_{ij}\, (v_j + a^V_{c(j-i)}), \qquad c(n) = \max(-k, \min(k, n)),$$

    with $w$ the softmax of s over the keys that may be seen. All heads share the two tables.
    Paper: Shaw et al. (2018).

    Args:
        d_model: D.
        num_heads: H.
        clip: k, the longest distance told apart.
        head_dim: Dh; d_model / num_heads when left out.
        bias: whether the four projections have biases.
        values: whether there is a table of values beside that of keys.

    Raises:
        ValueError: the heads do not divide, or k is below 1.

    Book: shaw-positions
    """

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        *,
        clip: int,
        head_dim: int | None = None,
        bias: bool = True,
        values: bool = True,
    ) -> None:
        super().__init__()
        if clip < 1:
            raise ValueError(f"clip: expected a distance of at least 1, got {clip}")
        self.d_model, self.num_heads, self.clip = d_model, num_heads, clip
        self.head_dim = _head_dim(d_model, num_heads, head_dim)
        width = num_heads * self.head_dim
        self.q_proj = nn.Linear(d_model, width, bias=bias)
        self.k_proj = nn.Linear(d_model, width, bias=bias)
        self.v_proj = nn.Linear(d_model, width, bias=bias)
        self.out_proj = nn.Linear(width, d_model, bias=bias)
        self.key_table = nn.Parameter(torch.randn(2 * clip + 1, self.head_dim) * self.head_dim**-0.5)
        self.value_table = (
            nn.Parameter(torch.randn(2 * clip + 1, self.head_dim) * self.head_dim**-0.5) if values else None
        )

    def forward(self, x: Tensor, *, attn_mask: Tensor | None = None, causal: bool = False) -> Tensor:
        """Attend from `x` to itself.

        Args:
            x: (B, T, D).
            attn_mask: bool, broadcastable to (B, H, T, T); True = may attend.
            causal: no query sees a later position.

        Returns:
            (B, T, D).

        Raises:
            TypeError: the mask is not boolean, or the dtypes differ.
            ValueError: shapes do not fit.

        Book: shaw-positions
        """
        _expect_input(x, self.d_model, self.q_proj)
        q, k, v = (split_heads(p(x), self.num_heads) for p in (self.q_proj, self.k_proj, self.v_proj))
        bias = relative_scores(q, self.key_table, x.size(1)) * self.head_dim**-0.5
        if self.value_table is None:
            out = fused_attention(q, k, v, attn_mask, causal=causal, score_bias=bias)
        else:
            out, weights = attention(q, k, v, attn_mask, causal=causal, score_bias=bias)
            out = out + relative_values(weights, self.value_table)
        projected: Tensor = self.out_proj(merge_heads(out))
        return projected

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, head_dim={self.head_dim}, clip={self.clip}"


class DisentangledAttention(nn.Module):
    r"""DeBERTa's self-attention: content meets content, content a place, and a place content.

    $$s_{ij} = \frac{q_i \cdot k_j + q_i \cdot k^r_{n(i,j)} + k_j \cdot q^r_{n(i,j)}}{\sqrt{3 D_h}}, \qquad
      k^r = P W^{K,r}, \quad q^r = P W^{Q,r},$$

    with P a table of places, (2·span, D), that all layers of a model share, and n of `disentangled_index`.
    The fourth term that one might expect, place to place, is left out: between relative places it would say
    nothing about the text. The root holds 3, because three products of unit variance are summed.
    Paper: He et al. (2021), section 3.1. Reference: transformers, DebertaV2's DisentangledSelfAttention.

    Args:
        d_model: D.
        num_heads: H.
        span: places on either side.
        max_distance: the distance that reaches the last logarithmic bucket (DeBERTa-v2 and -v3); every place
            is one distance when left out (the first version).
        share_projections: use W^Q and W^K of the content for places too.

    Raises:
        ValueError: the heads do not divide, there is no place, or `max_distance` lies within the exact ones.

    Book: deberta-positions
    """

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        *,
        span: int,
        max_distance: int | None = None,
        share_projections: bool = False,
    ) -> None:
        super().__init__()
        disentangled_index(1, 1, span, max_distance=max_distance)  # raises where the two do not fit
        self.d_model, self.num_heads, self.span, self.max_distance = d_model, num_heads, span, max_distance
        self.head_dim = _head_dim(d_model, num_heads, None)
        self.q_proj = nn.Linear(d_model, d_model)
        self.k_proj = nn.Linear(d_model, d_model)
        self.v_proj = nn.Linear(d_model, d_model)
        self.out_proj = nn.Linear(d_model, d_model)
        self.place_q_proj = None if share_projections else nn.Linear(d_model, d_model)
        self.place_k_proj = None if share_projections else nn.Linear(d_model, d_model)

    def forward(
        self, x: Tensor, places: Tensor, *, attn_mask: Tensor | None = None, causal: bool = False
    ) -> Tensor:
        """Attend from `x` to itself.

        Args:
            x: (B, T, D).
            places: P, (2·span, D).
            attn_mask: bool, broadcastable to (B, H, T, T); True = may attend.
            causal: no query sees a later position.

        Returns:
            (B, T, D).

        Raises:
            TypeError: the mask is not boolean, or the dtypes differ.
            ValueError: shapes do not fit.

        Book: deberta-positions
        """
        _expect_input(x, self.d_model, self.q_proj)
        expect_shape("places", places, "places D", places=2 * self.span, D=self.d_model)
        expect_dtype("places", places, self.q_proj.weight.dtype)
        T, H, scale = x.size(1), self.num_heads, (3 * self.head_dim) ** -0.5
        q, k, v = (split_heads(p(x), H) for p in (self.q_proj, self.k_proj, self.v_proj))
        place_q = split_heads((self.place_q_proj or self.q_proj)(places)[None], H)[0]  # (H, 2·span, Dh)
        place_k = split_heads((self.place_k_proj or self.k_proj)(places)[None], H)[0]
        index = disentangled_index(T, T, self.span, max_distance=self.max_distance, device=x.device)
        bias = disentangled_scores(q, k, place_q, place_k, index) * scale
        out = fused_attention(q, k, v, attn_mask, causal=causal, score_bias=bias, scale=scale)
        projected: Tensor = self.out_proj(merge_heads(out))
        return projected

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, span={self.span}, max_distance={self.max_distance}"


def _head_dim(d_model: int, num_heads: int, head_dim: int | None) -> int:
    if head_dim is None:
        expect_divides("num_heads", num_heads, "d_model", d_model)
        return d_model // num_heads
    if num_heads < 1 or head_dim < 1:
        raise ValueError(f"num_heads, head_dim: expected at least 1 each, got {num_heads} and {head_dim}")
    return head_dim


def _expect_input(x: Tensor, d_model: int, proj: nn.Linear) -> None:
    expect_shape("x", x, "B T D", D=d_model)
    expect_dtype("x", x, proj.weight.dtype)
