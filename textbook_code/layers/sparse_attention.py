"""Sparse attention: each query reads a few keys, and no more than those are ever scored.

    strided   (Sparse Transformer)  the last l positions, and every l-th before them
    fixed     (Sparse Transformer)  the own block of l, and the last c of each earlier block
    window    (Longformer)          w/2 positions on either side, and a few global tokens
    blocks    (BigBird)             blocks: three neighbours, the first, the last, r random ones

Each pattern stands here twice. A boolean **mask** (True = may attend) says what the pattern is, serves
`attention` at the full cost of T², and is the graph that `reachable` walks along. A function of the same
numbers scores the pairs of the pattern alone, T (l + T/l) or T (w + G) of them, in one softmax in which no
pair is counted twice.

B batch, T length, H heads, Dh head_dim, l stride, n = T/l blocks, w window, h = w/2, G global tokens,
b block_size, N = T/b blocks, r random blocks.
Papers: Child et al. (2019), section 4; Beltagy et al. (2020), section 3; Zaheer et al. (2020), section 2.
References: transformers.LongformerForMaskedLM, transformers.BigBirdForMaskedLM.

Book: sparse-attention
"""

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import fused_attention
from .checks import expect_bool, expect_divides, expect_dtype, expect_shape
from .masks import block_local_mask, causal_mask, key_mask, sliding_window_mask, symmetric_window_mask

PARTS = ("merged", "first", "second")

# ------------------------------------------------------------------------------------------------
# Masks as graphs


def reachable(mask: Tensor, *more: Tensor, steps: int | None = None) -> Tensor:
    r"""Which positions a query hears of after some layers: the graph of the masks, walked along.

    Layer by layer, with the residual connection that keeps what was known,

    $$R_0 = I, \qquad R_n = M_n R_{n-1} \lor R_{n-1},$$

    where $M_n$ is the mask of the n-th layer from below and the product is that of booleans.

    Args:
        mask: (…, T, T) bool, the first layer's.
        *more: those of the layers above it.
        steps: how many layers there are, the given masks in turn; as many as masks when left out.

    Returns:
        bool (…, T, T); True in row i and column j where output i can depend on input j.

    Raises:
        TypeError: a mask is not boolean.
        ValueError: a mask is not square, or `steps` is negative.

    Book: sparse-graphs
    """
    masks = (mask, *more)
    for m in masks:
        expect_bool("mask", m)
        if m.dim() < 2 or m.size(-1) != m.size(-2):
            raise ValueError(f"mask: expected shape (…, T, T), got {tuple(m.shape)}")
    steps = len(masks) if steps is None else steps
    if steps < 0:
        raise ValueError(f"steps: expected at least 0 layers, got {steps}")
    known = torch.eye(mask.size(-1), dtype=torch.bool, device=mask.device)
    for step in range(steps):
        heard = masks[step % len(masks)].float() @ known.float() > 0
        known = heard | known
    return known


def reach(mask: Tensor, *more: Tensor, steps: int | None = None) -> Tensor:
    """How many positions each query hears of after some layers, (…, T); arguments as in `reachable`.

    Book: sparse-graphs
    """
    return reachable(mask, *more, steps=steps).sum(-1)


def diameter(mask: Tensor, *, causal: bool = False) -> int:
    """How many layers it takes until every query has heard of every position it may know.

    Args:
        mask: (T, T) bool, the mask of every layer.
        causal: whether a query is to hear of no more than its own and the earlier positions.

    Raises:
        TypeError: the mask is not boolean.
        ValueError: it is not square, or some position is never heard of.

    Book: sparse-graphs
    """
    expect_bool("mask", mask)
    expect_shape("mask", mask, "T T")
    T = mask.size(0)
    wanted = causal_mask(T, device=mask.device) if causal else mask.new_ones(T, T)
    known, steps = reachable(mask, steps=0), 0
    while not bool((known | ~wanted).all()):
        steps += 1
        wider = (mask.float() @ known.float() > 0) | known
        if torch.equal(wider, known):
            raise ValueError("mask: some position is never heard of, however many layers there are")
        known = wider
    return steps


# ------------------------------------------------------------------------------------------------
# What the cheap forms share


def _check(q: Tensor, k: Tensor, v: Tensor) -> None:
    expect_shape("q", q, "B H T Dh")
    B, H, T, Dh = q.shape
    expect_shape("k", k, "B H T Dh", B=B, H=H, T=T, Dh=Dh)
    expect_shape("v", v, "B H T Dv", B=B, H=H, T=T)
    if not q.is_floating_point():
        raise TypeError(f"q: expected a floating-point tensor, got {q.dtype}")
    expect_dtype("k", k, q.dtype)
    expect_dtype("v", v, q.dtype)


def _expect_positive(name: str, value: int) -> None:
    if type(value) is not int or value < 1:
        raise ValueError(f"{name}: expected a positive integer, got {value!r}")


def _expect_part(part: str) -> None:
    if part not in PARTS:
        raise ValueError(f"part: expected one of {', '.join(PARTS)}, got {part!r}")


def _in_blocks(x: Tensor, size: int, axis: int = 2) -> Tensor:
    """Fill an axis of length T up with zeros, and cut it: (…, T, …) → (…, n, size, …)."""
    rest = -x.size(axis) % size
    if rest:
        shape = list(x.shape)
        shape[axis] = rest
        x = torch.cat([x, x.new_zeros(shape)], axis)
    return x.unflatten(axis, (-1, size))


def _joint_weights(*parts: tuple[Tensor, Tensor], dropout: float = 0.0) -> tuple[Tensor, ...]:
    """One softmax over several sets of scores of the same queries, each given with the mask of its pairs.

    A query that sees nothing in any set gets zeros, as in `attention`.
    """
    scores = torch.cat([s.masked_fill(~seen, torch.finfo(s.dtype).min) for s, seen in parts], -1)
    weights = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(scores.dtype)
    each = weights.split([s.size(-1) for s, _ in parts], -1)
    return tuple(
        F.dropout(w.masked_fill(~seen, 0), dropout) for w, (_, seen) in zip(each, parts, strict=True)
    )


# ------------------------------------------------------------------------------------------------
# Sparse Transformer


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
    _expect_positive("stride", stride)
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


def _expect_summary(stride: int, summary: int) -> None:
    _expect_positive("stride", stride)
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
    _check(q, k, v)
    _expect_positive("stride", stride)
    _expect_part(part)
    T, scale = q.size(2), q.size(-1) ** -0.5 if scale is None else scale
    q, k, v = (_in_blocks(x, stride) for x in (q * scale, k, v))  # (B, H, n, l, Dh)
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
    weights = _joint_weights(*sets, dropout=dropout)
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
    _check(q, k, v)
    _expect_summary(stride, summary)
    _expect_part(part)
    T, scale = q.size(2), q.size(-1) ** -0.5 if scale is None else scale
    q, k, v = (_in_blocks(x, stride) for x in (q * scale, k, v))  # (B, H, n, l, Dh)
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
    weights = _joint_weights(*sets, dropout=dropout)
    out = sum(w @ value for w, value in zip(weights, values, strict=True))
    assert isinstance(out, Tensor)
    return out.flatten(2, 3)[:, :, :T]


# ------------------------------------------------------------------------------------------------
# Longformer


def window_mask(
    T: int, *, window: int, dilation: int = 1, device: torch.device | str | None = None
) -> Tensor:
    r"""A window to both sides: w/2 positions before, w/2 behind, and the own one.

    $$A_i = \{j : |i - j| \le d\,w/2, \; (i - j) \bmod d = 0\},$$

    with gaps of d − 1 positions where the dilation d is more than 1.

    Paper: Beltagy et al. (2020), section 3.1.

    Args:
        T: length.
        window: w, even; where it is 2T or more, the pattern is full attention.
        dilation: d.
        device: where the mask is made.

    Returns:
        bool (T, T).

    Raises:
        ValueError: the window is odd or not positive, or the dilation not positive.

    Book: sparse-longformer
    """
    _expect_even(window)
    return symmetric_window_mask(T, window=window // 2 + 1, dilation=dilation, device=device)


def _expect_even(window: int) -> None:
    if type(window) is not int or window < 2 or window % 2:
        raise ValueError(
            f"window: expected a positive even number, half of it for either side, got {window!r}"
        )


def add_global(mask: Tensor, global_mask: Tensor) -> Tensor:
    """Let global tokens see everyone, and everyone see them.

    Args:
        mask: bool (T, T), or (B, 1, T, T).
        global_mask: (B, T) bool, True = global token.

    Returns:
        bool (B, 1, T, T).

    Raises:
        TypeError: a mask is not boolean.
        ValueError: shapes do not fit.

    Book: sparse-longformer
    """
    expect_bool("mask", mask)
    expect_bool("global_mask", global_mask)
    expect_shape("global_mask", global_mask, "B T", T=mask.size(-1))
    g = global_mask[:, None]
    return mask | g[..., None, :] | g[..., :, None]


class GlobalTokens(NamedTuple):
    """Where the global tokens of each text stand.

    Attributes:
        places: (B, G) int64; G is the most that a text has, and a text with fewer is filled up.
        exists: (B, G) bool, False where it was filled up.

    Book: sparse-longformer
    """

    places: Tensor
    exists: Tensor


def find_global(global_mask: Tensor) -> GlobalTokens:
    """List the places of the global tokens, the first ones first.

    Args:
        global_mask: (B, T) bool, True = global token.

    Raises:
        TypeError: the mask is not boolean.
        ValueError: it is not of shape (B, T).

    Book: sparse-longformer
    """
    expect_bool("global_mask", global_mask)
    expect_shape("global_mask", global_mask, "B T")
    G = int(global_mask.sum(-1).max())
    places = (~global_mask).int().argsort(dim=-1, stable=True)[:, :G]
    return GlobalTokens(places, global_mask.gather(1, places))


def _at(x: Tensor, places: Tensor) -> Tensor:
    """The vectors at `places` (B, G) of (B, H, T, Dh): (B, H, G, Dh)."""
    B, H, _, Dh = x.shape
    return x.gather(2, places[:, None, :, None].expand(B, H, -1, Dh))


def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int,
    dilation: int = 1,
    token_mask: Tensor | None = None,
    global_tokens: GlobalTokens | None = None,
    dropout: float = 0.0,
    scale: float | None = None,
) -> Tensor:
    r"""Attention to a window and to global tokens, in sliding chunks: T (3w/2 + G) scores instead of T².

    The queries are cut into chunks of h = w/2. All that a chunk's queries see nearby lies in three
    chunks of keys: the one before, the own, the one behind. The keys of global tokens are taken out of
    the windows, and stand beside them in the same softmax, once. For a dilation d the positions are first
    dealt out into d texts, of every d-th position each, in which the windows have no gaps.

    The rows of the global tokens themselves are computed like all others here; `LongformerAttention`
    replaces them.

    Args:
        q, k, v: (B, H, T, Dh); any T, the last chunk is filled up and hidden.
        window: w, even.
        dilation: d, the same for all heads.
        token_mask: (B, T) bool, True = real token; no query sees padding.
        global_tokens: from `find_global`; none when left out.
        dropout: probability with which a weight is dropped.
        scale: factor on q kᵀ; 1/√Dh when left out.

    Returns:
        (B, H, T, Dv).

    Raises:
        TypeError: a mask is not boolean, or the dtypes differ.
        ValueError: shapes do not fit, the window is odd, or the dilation not positive.

    Book: sparse-longformer
    """
    _check(q, k, v)
    _expect_even(window)
    _expect_positive("dilation", dilation)
    B, H, T, Dh = q.shape
    token_mask = q.new_ones(B, T).bool() if token_mask is None else token_mask
    expect_bool("token_mask", token_mask)
    expect_shape("token_mask", token_mask, "B T", B=B, T=T)
    q = q * (Dh**-0.5 if scale is None else scale)
    local = token_mask
    if global_tokens is not None:  # a filled-up place names a token that is not global: it stays local
        taken = torch.zeros_like(token_mask).scatter_(1, global_tokens.places, global_tokens.exists)
        local = token_mask & ~taken
    dealt = (q, k, v, local[:, None, :, None].expand(B, H, T, 1))
    q, near_k, near_v, near = (_deal(x, dilation) for x in dealt)  # (B, H d, T/d, …)
    sets = [window_scores(q, near_k, window=window, key_mask=near[..., 0])]  # (B, H d, n, h, 3h)
    if global_tokens is not None:
        seen = global_tokens.exists & token_mask.gather(1, global_tokens.places)
        all_k, all_v = (_at(x, global_tokens.places).repeat_interleave(dilation, 1) for x in (k, v))
        scores = q @ all_k.transpose(-2, -1)  # (B, H d, T/d, G)
        sets.append((_in_blocks(scores, window // 2), seen[:, None, None, None]))
    weights = _joint_weights(*sets, dropout=dropout)
    out = weights[0] @ _three_chunks(_in_blocks(near_v, window // 2))
    if global_tokens is not None:
        out = out + weights[1] @ all_v[:, :, None]
    out = out.flatten(2, 3)[:, :, : q.size(2)].unflatten(1, (H, dilation))  # (B, H, d, T/d, Dv)
    return out.transpose(2, 3).flatten(2, 3)[:, :, :T]


def _deal(x: Tensor, dilation: int) -> Tensor:
    """Every d-th position to the same text: (B, H, T, …) → (B, H d, T/d, …), filled up with zeros."""
    return _in_blocks(x, dilation).transpose(2, 3).flatten(1, 2)


def window_scores(
    q: Tensor, k: Tensor, *, window: int, key_mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The scores of each chunk of h = w/2 queries with its three chunks of keys, and which of them count.

    Args:
        q, k: (B, H, T, Dh), already scaled.
        window: w, even.
        key_mask: (B, H, T) bool, True = may be seen.

    Returns:
        Scores (B, H, n, h, 3h), and a bool mask that broadcasts to them.

    Raises:
        ValueError: the window is odd.

    Book: sparse-longformer
    """
    _expect_even(window)
    h, T = window // 2, q.size(2)
    q, k = _in_blocks(q, h), _in_blocks(k, h)
    apart = torch.arange(3 * h, device=q.device) - h - torch.arange(h, device=q.device)[:, None]
    real = q.new_ones(1, 1, T).bool() if key_mask is None else key_mask
    real = _three_chunks(_in_blocks(real, h)[..., None])[..., 0]  # (B, H, n, 3h)
    return q @ _three_chunks(k).transpose(-2, -1), (apart.abs() <= h) & real[..., None, :]


def _three_chunks(x: Tensor) -> Tensor:
    """Each chunk between its neighbours, zeros beyond the ends: (B, H, n, h, Dh) → (B, H, n, 3h, Dh)."""
    wide = F.pad(x, (0, 0, 0, 0, 1, 1))
    return torch.cat([wide[:, :, :-2], x, wide[:, :, 2:]], -2)


def to_band(chunks: Tensor) -> Tensor:
    """Numbers (B, H, n, h, 3h) of the three chunks as a band (B, H, n h, w + 1): column c is key i + c − h.

    Book: sparse-longformer
    """
    h = chunks.size(-2)
    columns = torch.arange(h, device=chunks.device)[:, None] + torch.arange(2 * h + 1, device=chunks.device)
    return chunks.gather(-1, columns.expand(*chunks.shape[:3], h, 2 * h + 1)).flatten(2, 3)


class _SelfAttention(nn.Module):
    """Projections of a self-attention whose middle a subclass writes."""

    def __init__(self, d_model: int, num_heads: int, *, bias: bool, dropout: float) -> None:
        super().__init__()
        expect_divides("num_heads", num_heads, "d_model", d_model)
        self.d_model, self.num_heads, self.head_dim = d_model, num_heads, d_model // num_heads
        self.dropout = dropout
        self.q_proj = nn.Linear(d_model, d_model, bias=bias)
        self.k_proj = nn.Linear(d_model, d_model, bias=bias)
        self.v_proj = nn.Linear(d_model, d_model, bias=bias)
        self.out_proj = nn.Linear(d_model, d_model, bias=bias)

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        expect_shape("x", x, "B T D", D=self.d_model)
        expect_dtype("x", x, self.q_proj.weight.dtype)
        return self._split(self.q_proj(x)), self._split(self.k_proj(x)), self._split(self.v_proj(x))

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)  # (B, H, T, Dh)

    def _merge(self, out: Tensor) -> Tensor:
        return self.out_proj(out.transpose(1, 2).flatten(2))  # (B, T, D)

    @property
    def _dropout_now(self) -> float:
        return self.dropout if self.training else 0.0


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


class LongformerAttention(_SelfAttention):
    r"""Self-attention to a window and to global tokens, which have projections of their own.

    $$\mathrm{out}_i = \begin{cases}
      \mathrm{attention}(q_i,\; K_{W(i) \cup G},\; V_{W(i) \cup G}) & i \notin G, \\
      \mathrm{attention}(q^g_i,\; K^g,\; V^g) & i \in G,
      \end{cases}$$

    with W(i) the window around i and G the global tokens. What a global token asks, $q^g$, it asks of
    $k^g$ and $v^g$ of all tokens; that the others see it is an affair of the ordinary q, k and v.

    Args:
        d_model: D.
        num_heads: H.
        window: w, even.
        dilation: d, one number or one for each head.
        bias: whether the projections have biases.
        dropout: probability with which a weight is dropped in training.
        dense: compute with the masks, at the full cost; the same numbers.

    Raises:
        ValueError: the window is odd, a size is not positive or does not divide, or the dilations are
            not as many as the heads.

    Book: sparse-longformer
    """

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        *,
        window: int,
        dilation: int | Sequence[int] = 1,
        bias: bool = True,
        dropout: float = 0.0,
        dense: bool = False,
    ) -> None:
        super().__init__(d_model, num_heads, bias=bias, dropout=dropout)
        _expect_even(window)
        self.dilation = (dilation,) * num_heads if isinstance(dilation, int) else tuple(dilation)
        if len(self.dilation) != num_heads:
            raise ValueError(f"dilation: expected one for each of {num_heads} heads, got {self.dilation}")
        for d in self.dilation:
            _expect_positive("dilation", d)
        self.window, self.dense = window, dense
        self.q_global_proj = nn.Linear(d_model, d_model, bias=bias)
        self.k_global_proj = nn.Linear(d_model, d_model, bias=bias)
        self.v_global_proj = nn.Linear(d_model, d_model, bias=bias)

    @torch.no_grad()
    def start_global_from_local(self) -> None:
        """Set the global projections to the local ones, as when a trained encoder is made longer.

        Book: sparse-longformer
        """
        for name in "qkv":
            ours: nn.Linear = getattr(self, f"{name}_global_proj")
            ours.load_state_dict(getattr(self, f"{name}_proj").state_dict())

    def forward(
        self, x: Tensor, *, token_mask: Tensor | None = None, global_mask: Tensor | None = None
    ) -> Tensor:
        """Map (B, T, D) to (B, T, D).

        Args:
            x: (B, T, D), any T.
            token_mask: (B, T) bool, True = real token.
            global_mask: (B, T) bool, True = global token; padding is none, whatever it says.

        Raises:
            TypeError: a mask is not boolean, or the dtype is another than the weights'.
            ValueError: shapes do not fit.

        Book: sparse-longformer
        """
        q, k, v = self._project(x)
        B, T = x.shape[:2]
        if token_mask is not None:
            expect_bool("token_mask", token_mask)
            expect_shape("token_mask", token_mask, "B T", B=B, T=T)
        found = None
        if global_mask is not None:
            expect_bool("global_mask", global_mask)
            expect_shape("global_mask", global_mask, "B T", B=B, T=T)
            global_mask = global_mask if token_mask is None else global_mask & token_mask
            found = find_global(global_mask) if bool(global_mask.any()) else None
        if self.dense:
            out = self._dense(q, k, v, token_mask, global_mask)
        else:
            out = self._windows(q, k, v, token_mask, found)
        if found is not None:
            out = self._with_global_rows(out, x, found, token_mask)
        return self._merge(out)

    def _windows(
        self, q: Tensor, k: Tensor, v: Tensor, token_mask: Tensor | None, found: GlobalTokens | None
    ) -> Tensor:
        """The heads of each dilation together."""
        each: list[Tensor] = [q] * self.num_heads
        for d in sorted(set(self.dilation)):
            heads = [head for head, dilation in enumerate(self.dilation) if dilation == d]
            out = window_attention(
                q[:, heads],
                k[:, heads],
                v[:, heads],
                window=self.window,
                dilation=d,
                token_mask=token_mask,
                global_tokens=found,
                dropout=self._dropout_now,
            )
            if len(heads) == self.num_heads:
                return out
            for place, head in enumerate(heads):
                each[head] = out[:, place]
        return torch.stack(each, 1)

    def _dense(
        self, q: Tensor, k: Tensor, v: Tensor, token_mask: Tensor | None, global_mask: Tensor | None
    ) -> Tensor:
        T, device = q.size(2), q.device
        mask = torch.stack(
            [window_mask(T, window=self.window, dilation=d, device=device) for d in self.dilation]
        )
        if global_mask is not None:
            mask = mask | key_mask(global_mask)
        if token_mask is not None:
            mask = mask & key_mask(token_mask)
        return fused_attention(q, k, v, mask, dropout=self._dropout_now)

    def _with_global_rows(
        self, out: Tensor, x: Tensor, found: GlobalTokens, token_mask: Tensor | None
    ) -> Tensor:
        """Put what the global tokens gather, G full rows, in place of their rows."""
        asking = x.gather(1, found.places[..., None].expand(-1, -1, x.size(-1)))  # (B, G, D)
        rows = fused_attention(
            self._split(self.q_global_proj(asking)),
            self._split(self.k_global_proj(x)),
            self._split(self.v_global_proj(x)),
            None if token_mask is None else key_mask(token_mask),
            dropout=self._dropout_now,
        )  # (B, H, G, Dh)
        text, place = found.exists.nonzero(as_tuple=True)
        target = (text, found.places[text, place])
        return out.transpose(1, 2).index_put(target, rows.transpose(1, 2)[text, place]).transpose(1, 2)

    def extra_repr(self) -> str:
        dilation = self.dilation[0] if len(set(self.dilation)) == 1 else self.dilation
        return f"num_heads={self.num_heads}, window={self.window}, dilation={dilation}"


# ------------------------------------------------------------------------------------------------
# BigBird


@cache
def random_blocks(num_blocks: int, *, num_random: int, num_heads: int, seed: int) -> Tensor:
    """For each block but the first and the last, r other blocks to look at, drawn once for all.

    None is a block that is looked at anyway: the first, the last, the own and its two neighbours.

    Args:
        num_blocks: N.
        num_random: r.
        num_heads: H; each head has its own.
        seed: of the draw; a layer has its own.

    Returns:
        (H, N − 2, r) int64, each row in rising order.

    Raises:
        ValueError: so many blocks are not left: a block in the middle has N − 5 to choose from.

    Book: sparse-bigbird
    """
    if num_random < 0 or num_random > max(num_blocks - 5, 0):
        raise ValueError(
            f"num_random: expected 0 to {max(num_blocks - 5, 0)} with {num_blocks} blocks, of which one in "
            f"the middle sees 5 anyway, got {num_random}"
        )
    generator = torch.Generator().manual_seed(seed)
    middle = torch.arange(1, num_blocks - 1)
    free = (middle[:, None] - middle).abs() > 1  # (N - 2, N - 2)
    lots = torch.rand(num_heads, *free.shape, generator=generator).masked_fill(~free, 2.0)
    return middle[lots.argsort(-1)[..., :num_random]].sort(-1).values


def bigbird_mask(T: int, blocks: Tensor, *, block_size: int) -> Tensor:
    """BigBird's pattern as a mask: whole blocks, seen or not.

    A block sees itself, its two neighbours, the first and the last block and its random ones; the first
    and the last see all.

    Paper: Zaheer et al. (2020), section 2 and appendix D.

    Args:
        T: length; the last block may be cut.
        blocks: (H, N − 2, r) from `random_blocks`.
        block_size: b.

    Returns:
        bool (H, T, T).

    Raises:
        ValueError: `blocks` does not fit N = ⌈T/b⌉, names a block that is looked at anyway, or one twice.

    Book: sparse-bigbird
    """
    N = _expect_blocks(T, blocks, block_size)
    n = torch.arange(N, device=blocks.device)
    seen = ((n[:, None] - n).abs() <= 1).repeat(blocks.size(0), 1, 1)  # (H, N, N)
    seen[:, :, [0, -1]] = seen[:, [0, -1]] = True
    seen[:, 1:-1].scatter_(-1, blocks, True)
    of = torch.arange(T, device=blocks.device) // block_size
    return seen[:, of][:, :, of]


def _expect_blocks(T: int, blocks: Tensor, block_size: int) -> int:
    _expect_positive("block_size", block_size)
    N = -(-T // block_size)
    if N < 3:
        raise ValueError(f"block_size: expected at least 3 blocks in {T} positions, got {N} of {block_size}")
    expect_shape("blocks", blocks, "H N-2 r", **{"N-2": N - 2})
    own = torch.arange(1, N - 1, device=blocks.device)[:, None]
    twice = blocks.sort(-1).values.diff(dim=-1) == 0
    if blocks.numel() and (
        bool(((blocks < 1) | (blocks > N - 2) | ((blocks - own).abs() <= 1)).any()) or bool(twice.any())
    ):
        raise ValueError(
            f"blocks: expected {blocks.size(-1)} different blocks from 1 to {N - 2} in each row, neither the "
            "own one nor its neighbours; a block seen twice would count twice"
        )
    return N


def bigbird_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: Tensor,
    *,
    block_size: int,
    token_mask: Tensor | None = None,
    dropout: float = 0.0,
    scale: float | None = None,
) -> Tensor:
    r"""Attention along BigBird's pattern, block by block: T b (5 + r) scores instead of T², and 2b full rows.

    For each block in the middle the 5 + r blocks of keys it looks at are gathered; the second block's
    left neighbour is the first block, and the last but one's right neighbour is the last, and neither
    is counted twice.

    Args:
        q, k, v: (B, H, T, Dh); any T, the last block is filled up and hidden.
        blocks: (H, N − 2, r) from `random_blocks`.
        block_size: b.
        token_mask: (B, T) bool, True = real token; no query sees padding.
        dropout: probability with which a weight is dropped.
        scale: factor on q kᵀ; 1/√Dh when left out.

    Returns:
        (B, H, T, Dv), as `attention` with `bigbird_mask`.

    Raises:
        TypeError: the mask is not boolean, or the dtypes differ.
        ValueError: shapes do not fit, or as `bigbird_mask`.

    Book: sparse-bigbird
    """
    _check(q, k, v)
    B, H, T, Dh = q.shape
    N = _expect_blocks(T, blocks, block_size)
    expect_shape("blocks", blocks, "H N-2 r", H=H)
    token_mask = q.new_ones(B, T).bool() if token_mask is None else token_mask
    expect_bool("token_mask", token_mask)
    expect_shape("token_mask", token_mask, "B T", B=B, T=T)
    scale = Dh**-0.5 if scale is None else scale

    q, k, v = (_in_blocks(x, block_size) for x in (q, k, v))  # (B, H, N, b, Dh)
    real = _in_blocks(token_mask, block_size, axis=1)  # (B, N, b)
    middle = torch.arange(1, N - 1, device=q.device)[:, None]
    always = torch.cat([middle * 0, middle - 1, middle, middle + 1, middle * 0 + N - 1], -1)  # (N - 2, 5)
    once = torch.ones_like(always, dtype=torch.bool)
    once[0, 1] = once[-1, 3] = False  # the neighbour that is the first or the last block
    looked = torch.cat([always.expand(H, -1, -1), blocks], -1)  # (H, N - 2, 5 + r)
    once = torch.cat([once.expand(H, -1, -1), torch.ones_like(blocks, dtype=torch.bool)], -1)

    heads = torch.arange(H, device=q.device)[:, None, None]
    near_k, near_v = (x[:, heads, looked].flatten(3, 4) for x in (k, v))  # (B, H, N - 2, (5 + r) b, Dh)
    seen = (real[:, looked] & once[..., None]).flatten(3, 4)[..., None, :]  # (B, H, N - 2, 1, (5 + r) b)
    scores = q[:, :, 1:-1] @ near_k.transpose(-2, -1) * scale  # (B, H, N - 2, b, (5 + r) b)
    (weights,) = _joint_weights((scores, seen), dropout=dropout)
    inner = weights @ near_v

    ends = q[:, :, [0, -1]].flatten(2, 3)  # the queries of the first and the last block
    all_keys = real.flatten(1)[:, None, None]
    outer = fused_attention(
        ends, k.flatten(2, 3), v.flatten(2, 3), all_keys, dropout=dropout, scale=scale
    ).unflatten(2, (2, block_size))
    return torch.cat([outer[:, :, :1], inner, outer[:, :, 1:]], 2).flatten(2, 3)[:, :, :T]


class BigBirdAttention(_SelfAttention):
    r"""Self-attention to the first, the last, the near and some random blocks; to all in a short text.

    A text of no more than (5 + 2r) b positions is attended to in full, as in the published implementation.

    Args:
        d_model: D.
        num_heads: H.
        block_size: b.
        num_random: r.
        seed: of the random blocks; give each layer its own.
        bias: whether the four projections have biases.
        dropout: probability with which a weight is dropped in training.
        dense: compute with the mask, at the full cost; the same numbers.

    Raises:
        ValueError: a size is not positive or does not divide.

    Book: sparse-bigbird
    """

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        *,
        block_size: int = 64,
        num_random: int = 3,
        seed: int = 0,
        bias: bool = True,
        dropout: float = 0.0,
        dense: bool = False,
    ) -> None:
        super().__init__(d_model, num_heads, bias=bias, dropout=dropout)
        _expect_positive("block_size", block_size)
        if num_random < 0:
            raise ValueError(f"num_random: expected at least 0 blocks, got {num_random}")
        self.block_size, self.num_random, self.seed, self.dense = block_size, num_random, seed, dense

    def blocks(self, T: int) -> Tensor | None:
        """The random blocks for a text of T positions, (H, N − 2, r); None where it is short.

        Book: sparse-bigbird
        """
        short = (5 + 2 * self.num_random) * self.block_size
        if short >= T:
            return None
        N = -(-T // self.block_size)
        return random_blocks(N, num_random=self.num_random, num_heads=self.num_heads, seed=self.seed)

    def forward(self, x: Tensor, *, token_mask: Tensor | None = None, blocks: Tensor | None = None) -> Tensor:
        """Map (B, T, D) to (B, T, D).

        Args:
            x: (B, T, D), any T.
            token_mask: (B, T) bool, True = real token.
            blocks: (H, N − 2, r), in place of those that the seed gives.

        Raises:
            TypeError: the mask is not boolean, or the dtype is another than the weights'.
            ValueError: shapes do not fit.

        Book: sparse-bigbird
        """
        q, k, v = self._project(x)
        T = x.size(1)
        if token_mask is not None:
            expect_bool("token_mask", token_mask)
            expect_shape("token_mask", token_mask, "B T", B=x.size(0), T=T)
        if blocks is None:
            blocks = self.blocks(T)
        mask = None if token_mask is None else key_mask(token_mask)
        if blocks is not None:
            blocks = blocks.to(x.device)
            if not self.dense:
                return self._merge(
                    bigbird_attention(
                        q, k, v, blocks, block_size=self.block_size, token_mask=token_mask,
                        dropout=self._dropout_now,
                    )
                )  # fmt: skip
            pattern = bigbird_mask(T, blocks, block_size=self.block_size)
            mask = pattern if mask is None else pattern & mask
        return self._merge(fused_attention(q, k, v, mask, dropout=self._dropout_now))

    def extra_repr(self) -> str:
        return (
            f"num_heads={self.num_heads}, block_size={self.block_size}, num_random={self.num_random}, "
            f"seed={self.seed}"
        )
