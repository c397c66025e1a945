"""The Sparse Transformer: two sets of about √T keys, which together reach everything in two steps.

    strided   the last l positions, and every l-th before them
    fixed     the own block of l, and the last c of each earlier block

Both are causal. The cheap forms make T (2l + T/l) and T (l + c T/l) scores, and count each pair once.

B batch, H heads, T length, Dh head_dim, D d_model, l stride, n = T/l blocks, c summary.
Paper: Child et al. (2019), section 4.
Reference: none; the forms are compared with their masks, and the masks with the paper's sets.

Book: sparse-transformer
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..attention import fused_attention
from ..masks import block_local_mask, causal_mask, sliding_window_mask
from ._shared import _SelfAttention, expect_positive, expect_qkv, in_blocks, joint_weights

PARTS = ("merged", "first", "second")


def strided_mask(
    T: int, *, stride: int, part: str = "merged", device: torch.device | str | None = None
) -> Tensor:
    r"""The strided pattern: the last l positions, and every l-th one before.

    $$A^{(1)}_i = \{j : i - l < j \le i\}, \qquad A^{(2)}_i = \{j \le i : (i - j) \bmod l = 0\}.$$

    The paper's first set has one position more, i − l, which is in the second set too: the two merged
    are the same.

    Paper: Child et al. (2019), section 4.3.

    Args:
        T: length.
        stride: l; where it is T or more, the pattern is full causal attention.
        part: "first" or "second" for one of the sets, "merged" for both.
        device: where the mask is made.

    Returns:
        bool (T, T).

    Raises:
        ValueError: the stride is not positive, or the part unknown.

    Book: sparse-transformer
    """
    expect_positive("stride", stride)
    _expect_part(part)
    i = torch.arange(T, device=device)
    column = ((i[:, None] - i) % stride == 0) & causal_mask(T, device=device)
    if part == "second":
        return column
    local = sliding_window_mask(T, window=stride, device=device)
    return local if part == "first" else local | column


def fixed_mask(
    T: int, *, stride: int, summary: int = 1, part: str = "merged", device: torch.device | str | None = None
) -> Tensor:
    r"""The fixed pattern: the own block of l positions, and the last c of every block.

    $$A^{(1)}_i = \{j \le i : \lfloor j/l \rfloor = \lfloor i/l \rfloor\}, \qquad
      A^{(2)}_i = \{j \le i : j \bmod l \ge l - c\}.$$

    Paper: Child et al. (2019), section 4.3.

    Args:
        T: length.
        stride: l.
        summary: c, how many positions at the end of a block all later ones see.
        part: "first" or "second" for one of the sets, "merged" for both.
        device: where the mask is made.

    Returns:
        bool (T, T).

    Raises:
        ValueError: the stride is not positive, the summary not between 1 and the stride, or the part
            unknown.

    Book: sparse-transformer
    """
    _expect_summary(stride, summary)
    _expect_part(part)
    own = block_local_mask(T, block=stride, device=device)
    ends = (torch.arange(T, device=device) % stride >= stride - summary) & causal_mask(T, device=device)
    return {"first": own, "second": ends, "merged": own | ends}[part]


def _expect_part(part: str) -> None:
    if part not in PARTS:
        raise ValueError(f"part: expected one of {', '.join(PARTS)}, got {part!r}")


def _expect_summary(stride: int, summary: int) -> None:
    expect_positive("stride", stride)
    if type(summary) is not int or not 1 <= summary <= stride:
        raise ValueError(f"summary: expected 1 to {stride} positions (the stride), got {summary!r}")


def strided_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    stride: int,
    part: str = "merged",
    dropout: float = 0.0,
    scale: float | None = None,
) -> Tensor:
    r"""Attention along the strided pattern, at a cost of T (2l + T/l) scores instead of T².

    The text is cut into n = T/l rows of l. A query's last l positions lie in its own row and the one
    above; every l-th position before it lies in its own column, so that the second set is attention
    within the l columns of the (n, l) table. The diagonal belongs to both sets and is scored in the first.

    Args:
        q, k, v: (B, H, T, Dh); any T, a last row is filled up.
        stride: l.
        part: as in `strided_mask`.
        dropout: probability with which a weight is dropped.
        scale: factor on q kᵀ; 1/√Dh when left out.

    Returns:
        (B, H, T, Dv), as `attention` with `strided_mask`.

    Raises:
        TypeError: the dtypes differ.
        ValueError: shapes do not fit, or as `strided_mask`.

    Book: sparse-transformer
    """
    expect_qkv(q, k, v)
    expect_positive("stride", stride)
    _expect_part(part)
    T, scale = q.size(2), q.size(-1) ** -0.5 if scale is None else scale
    q, k, v = (in_blocks(x, stride) for x in (q * scale, k, v))  # (B, H, n, l, Dh)
    n = q.size(2)
    at = torch.arange(n * stride, device=q.device).view(n, stride)
    sets, values = [], []
    if part != "second":
        near = at[:, :, None] - (at[:, None, :1] - stride) - torch.arange(2 * stride, device=q.device)
        inside = (near >= 0) & (near < stride) & (near <= at[:, :, None])  # the first row has none above
        sets.append((q @ _with_previous(k).transpose(-2, -1), inside))  # (B, H, n, l, 2l)
        values.append(lambda w: w @ _with_previous(v))
    if part != "first":
        columns = q.transpose(2, 3) @ k.transpose(2, 3).transpose(-2, -1)  # (B, H, l, n, n)
        earlier = q.new_ones(n, n).tril(-1 if part == "merged" else 0).bool()[:, None]
        sets.append((columns.transpose(2, 3), earlier))  # (B, H, n, l, n)
        values.append(lambda w: (w.transpose(2, 3) @ v.transpose(2, 3)).transpose(2, 3))
    weights = joint_weights(*sets, dropout=dropout)
    out = sum(read(w) for read, w in zip(values, weights, strict=True))
    assert isinstance(out, Tensor)
    return out.flatten(2, 3)[:, :, :T]


def _with_previous(x: Tensor) -> Tensor:
    """Each block behind the one before it, zeros before the first: (B, H, n, l, Dh) → (B, H, n, 2l, Dh)."""
    return torch.cat([F.pad(x, (0, 0, 0, 0, 1, 0))[:, :, :-1], x], -2)


def fixed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    stride: int,
    summary: int = 1,
    part: str = "merged",
    dropout: float = 0.0,
    scale: float | None = None,
) -> Tensor:
    r"""Attention along the fixed pattern, at a cost of T (l + c T/l) scores instead of T².

    A query is scored with its own block, and with the c last keys of all blocks together, of which
    those of earlier blocks count. (Its own block's are in the first set.)

    Args:
        q, k, v: (B, H, T, Dh); any T, a last block is filled up.
        stride: l.
        summary: c.
        part: as in `fixed_mask`.
        dropout: probability with which a weight is dropped.
        scale: factor on q kᵀ; 1/√Dh when left out.

    Returns:
        (B, H, T, Dv), as `attention` with `fixed_mask`.

    Raises:
        TypeError: the dtypes differ.
        ValueError: shapes do not fit, or as `fixed_mask`.

    Book: sparse-transformer
    """
    expect_qkv(q, k, v)
    _expect_summary(stride, summary)
    _expect_part(part)
    T, scale = q.size(2), q.size(-1) ** -0.5 if scale is None else scale
    q, k, v = (in_blocks(x, stride) for x in (q * scale, k, v))  # (B, H, n, l, Dh)
    at = torch.arange(q.size(2) * stride, device=q.device).view(-1, stride)  # (n, l)
    sets, values = [], []
    if part != "second":
        sets.append((q @ k.transpose(-2, -1), causal_mask(stride, device=q.device)))  # (B, H, n, l, l)
        values.append(v)
    if part != "first":
        ends_k, ends_v = (x[:, :, :, -summary:].flatten(2, 3)[:, :, None] for x in (k, v))
        ends = at[:, -summary:].flatten()  # (n c,)
        limit = at[:, :1, None] if part == "merged" else at[:, :, None] + 1
        sets.append((q @ ends_k.transpose(-2, -1), ends < limit))  # (B, H, n, l, n c)
        values.append(ends_v)
    weights = joint_weights(*sets, dropout=dropout)
    out = sum(w @ value for w, value in zip(weights, values, strict=True))
    assert isinstance(out, Tensor)
    return out.flatten(2, 3)[:, :, :T]


class SparseAttention(_SelfAttention):
    r"""Causal self-attention along the strided or the fixed pattern of the Sparse Transformer.

    The paper's three ways to put the two sets into a network: `merged` into one set for all heads; some
    heads with the first set and the others with the second, `heads`; or one set a layer in turn, for which
    the layers are given `first` and `second` alternately.

    Args:
        d_model: D.
        num_heads: H.
        stride: l; √T makes the cost smallest.
        pattern: "strided" or "fixed".
        summary: c of the fixed pattern.
        use: "merged", "heads", "first" or "second".
        bias: whether the four projections have biases.
        dropout: probability with which a weight is dropped in training.
        dense: compute with the mask, at the full cost; the same numbers.

    Raises:
        ValueError: the pattern or its use is unknown, a size is not positive or does not divide.

    Book: sparse-transformer
    """

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        *,
        stride: int,
        pattern: str = "strided",
        summary: int = 1,
        use: str = "merged",
        bias: bool = True,
        dropout: float = 0.0,
        dense: bool = False,
    ) -> None:
        super().__init__(d_model, num_heads, bias=bias, dropout=dropout)
        if pattern not in ("strided", "fixed"):
            raise ValueError(f"pattern: expected 'strided' or 'fixed', got {pattern!r}")
        if use not in (*PARTS, "heads"):
            raise ValueError(f"use: expected one of {', '.join(PARTS)}, heads, got {use!r}")
        if use == "heads" and num_heads < 2:
            raise ValueError(f"num_heads: expected at least 2 to share two sets among, got {num_heads}")
        _expect_summary(stride, summary)
        self.pattern, self.stride, self.summary, self.use, self.dense = pattern, stride, summary, use, dense

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, T, D) to (B, T, D); no position sees a later one.

        Raises:
            TypeError: the dtype is another than the weights'.
            ValueError: the shape does not fit.

        Book: sparse-transformer
        """
        q, k, v = self._project(x)
        if self.use != "heads":
            return self._merge(self._attend(q, k, v, self.use))
        half = self.num_heads // 2
        groups = ((slice(None, half), "first"), (slice(half, None), "second"))
        return self._merge(
            torch.cat([self._attend(q[:, g], k[:, g], v[:, g], part) for g, part in groups], 1)
        )

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, part: str) -> Tensor:
        if self.dense:
            mask = self._mask(q.size(2), part, q.device)
            return fused_attention(q, k, v, mask, dropout=self._dropout_now)
        if self.pattern == "strided":
            return strided_attention(q, k, v, stride=self.stride, part=part, dropout=self._dropout_now)
        return fixed_attention(
            q, k, v, stride=self.stride, summary=self.summary, part=part, dropout=self._dropout_now
        )

    def _mask(self, T: int, part: str, device: torch.device) -> Tensor:
        if self.pattern == "strided":
            return strided_mask(T, stride=self.stride, part=part, device=device)
        return fixed_mask(T, stride=self.stride, summary=self.summary, part=part, device=device)

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, pattern={self.pattern!r}, stride={self.stride}, use={self.use!r}"
