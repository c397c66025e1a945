"""Local attention: each query sees a window of positions, and the work grows with T · W instead of T².

    windowed:     i sees j when i − W < j ≤ i            (or |i − j| < W, both sides)
    dilated:      the same at every d-th position only
    block-local:  i sees the block that it stands in, and some blocks beside it

Each has a mask in `masks`, with which `attention` computes it in T² steps: that is the definition. The
functions here compute the same numbers and never look at most of the square: the queries are cut into blocks,
and the keys of a block and of its neighbours are all that the block needs.

B batch, T queries, S keys, H query heads, K key/value heads, Dh head_dim, W window, N blocks, C positions
in a block.
Papers: Child et al. (2019); Beltagy et al. (2020); Jiang et al. (2023).
References: transformers.MistralForCausalLM, local_attention.LocalAttention.

Book: local-attention
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import Attention, fused_attention, merge_heads, split_heads
from .cache import KVCache, RollingCache
from .checks import expect_bool, expect_divides, expect_dtype, expect_shape
from .masks import block_local_mask, expect_blocks, key_mask, sliding_window_mask, symmetric_window_mask
from .positions import rotate

_LEAST_BLOCK = 64  # smaller products would not be faster


def windowed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    token_mask: Tensor | None = None,
    *,
    window: int,
    causal: bool = True,
    dilation: int = 1,
    block: int | None = None,
    dropout: float = 0.0,
    scale: float | None = None,
) -> Tensor:
    r"""Attention of each query to a window of positions, in time and memory that grow with T · W.

    It gives what `fused_attention` gives with `sliding_window_mask`, or, where not `causal`, with
    `symmetric_window_mask`. In blocks of C positions a query meets C + W − 1 keys, rounded up to whole
    blocks: with C = W / 2 that is 3/2 W, so that the scores cost

    $$\tfrac32\, T\, W\, H D_h \quad\text{multiplications in place of}\quad T^2\, H D_h .$$

    A window as long as the text, or longer, is full attention.

    Args:
        q: (B, H, T, Dh).
        k: (B, K, S, Dh); K divides H. Where `causal`, the queries are the last T of S positions, as behind
            a cache; else S = T.
        v: (B, K, S, Dv).
        token_mask: (B, S) bool, True = real token; all are real when left out. A query that sees no real
            token gives zeros.
        window: W, how many positions a query sees: its own and the W − 1 before it, and as many behind it
            where not `causal`.
        causal: no query sees a later position.
        dilation: d; the query sees every d-th position only, and as many of them.
        block: C; left out, half the window, but at least 64.
        dropout: probability with which a weight is dropped.
        scale: factor on q kᵀ; 1/√Dh when left out.

    Returns:
        The output (B, H, T, Dv).

    Raises:
        TypeError: the mask is not boolean, or the dtypes differ.
        ValueError: shapes do not fit, or window, dilation or block is not positive.

    Book: local-attention-window
    """
    _check(q, k, v, token_mask, causal=causal)
    for name, size in (("window", window), ("dilation", dilation), ("block", 1 if block is None else block)):
        if size < 1:
            raise ValueError(f"{name}: expected at least 1, got {size}")
    if dilation > 1:
        return _interleaved(
            q,
            k,
            v,
            token_mask,
            dilation,
            window=window,
            causal=causal,
            block=block,
            dropout=dropout,
            scale=scale,
        )
    T = q.size(2)
    if causal:  # what no query sees
        seen = T + window - 1
        k, v = k[:, :, -seen:], v[:, :, -seen:]
        token_mask = None if token_mask is None else token_mask[:, -seen:]
    S = k.size(2)
    block = max(_LEAST_BLOCK, window // 2) if block is None else block
    back = -(-(window - 1) // block)  # blocks that hold the W − 1 positions before a block
    ahead = 0 if causal else back
    if (back + 1 + ahead) * block >= S:  # the keys of one block are all there are
        mask = None if token_mask is None else key_mask(token_mask)
        if window < S:
            near = _window_mask(T, S, window, causal, q.device)
            mask = near if mask is None else mask & near
        return fused_attention(q, k, v, mask, causal=causal, dropout=dropout, scale=scale)
    span = (back + 1 + ahead) * block
    pattern = _window_mask(span, span, window, causal, q.device)[back * block : (back + 1) * block]
    return _by_blocks(q, k, v, token_mask, pattern, back, dropout=dropout, scale=scale)


def block_local_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    token_mask: Tensor | None = None,
    *,
    block: int,
    look_back: int = 0,
    look_ahead: int = 0,
    causal: bool = True,
    dropout: float = 0.0,
    scale: float | None = None,
) -> Tensor:
    """Attention within blocks of C positions, and from each block to some blocks beside it.

    It gives what `fused_attention` gives with `block_local_mask`, and costs T · C · (1 + look_back +
    look_ahead) scores. Which positions a query sees depends on where its block begins.

    Args:
        q: (B, H, T, Dh).
        k: (B, K, T, Dh); K divides H.
        v: (B, K, T, Dv).
        token_mask: (B, T) bool, True = real token; all are real when left out. A query that sees no real
            token gives zeros.
        block: C; the last block may be shorter, and with T or more there is only one.
        look_back: how many earlier blocks are seen; `local_attention`'s default is 1.
        look_ahead: how many later blocks are seen; 0 where `causal`.
        causal: no query sees a later position.
        dropout: probability with which a weight is dropped.
        scale: factor on q kᵀ; 1/√Dh when left out.

    Returns:
        The output (B, H, T, Dv).

    Raises:
        TypeError: the mask is not boolean, or the dtypes differ.
        ValueError: shapes do not fit, the block is empty, or the counts of blocks make no sense.

    Book: local-attention-blocks
    """
    _check(q, k, v, token_mask, causal=False)
    expect_blocks(block, look_back, look_ahead, causal)
    block = min(block, q.size(2))
    last = -(-q.size(2) // block) - 1  # there are no more blocks than these to look at
    look_back, look_ahead = min(look_back, last), min(look_ahead, last)
    mask = block_local_mask(
        (look_back + 1 + look_ahead) * block,
        block=block,
        look_back=look_back,
        look_ahead=look_ahead,
        causal=causal,
        device=q.device,
    )
    pattern = mask[look_back * block : (look_back + 1) * block]
    return _by_blocks(q, k, v, token_mask, pattern, look_back, dropout=dropout, scale=scale)


def _by_blocks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    token_mask: Tensor | None,
    pattern: Tensor,
    back: int,
    *,
    dropout: float,
    scale: float | None,
) -> Tensor:
    """Attention of C queries at a time to a span of keys that begins before them.

    All blocks are texts of one batch, with the same `pattern` (C, span) of who
    sees whom; what stands before the first key and behind the last is no token.
    The queries of a group stand side by side as those of its key head, so that no
    key is copied for a head. A span begins `back` blocks before its own.
    """
    (B, H, T, _), (K, S), (C, span) = q.shape, k.shape[1:3], pattern.shape
    N, G = -(-T // C), H // K
    left = back * C - (S - T)  # places before the first key
    right = (N - 1) * C + span - left - S
    if token_mask is None:
        token_mask = torch.ones(1, S, dtype=torch.bool, device=q.device)
    real = F.pad(token_mask, (left, right)).unfold(1, span, C)  # (B, N, span)
    mask = (pattern & real[:, :, None]).expand(B, N, C, span).flatten(0, 1)
    blocks = F.pad(q, (0, 0, 0, N * C - T)).view(B, K, G, N, C, -1)
    out = fused_attention(
        blocks.permute(0, 3, 1, 2, 4, 5).reshape(B * N, K, G * C, -1),
        _spans(k, left, right, span, C),
        _spans(v, left, right, span, C),
        mask.repeat(1, G, 1)[:, None],  # (B·N, 1, G·C, span)
        dropout=dropout,
        scale=scale,
    )
    out = out.view(B, N, K, G, C, -1).permute(0, 2, 3, 1, 4, 5)
    return out.reshape(B, H, N * C, -1)[:, :, :T]


def _spans(x: Tensor, left: int, right: int, span: int, step: int) -> Tensor:
    """Overlapping pieces of `span` positions, a `step` apart: (B, K, S, Dh) → (B·N, K, span, Dh).

    With one text they are views of the same memory.
    """
    pieces = F.pad(x, (0, 0, left, right)).unfold(2, span, step)  # (B, K, N, Dh, span)
    return pieces.permute(0, 2, 1, 4, 3).flatten(0, 1)


def _interleaved(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    token_mask: Tensor | None,
    dilation: int,
    **how: Any,
) -> Tensor:
    """A dilated window is a plain one in d sequences of every d-th position.

    Positions are counted from the last one, with which queries and keys end.
    """
    (B, _, T, _), S = q.shape, k.size(2)
    if token_mask is None:
        token_mask = torch.ones(B, S, dtype=torch.bool, device=q.device)
    before = -S % dilation  # places that fill up the first round
    q = _deal(F.pad(q, (0, 0, -T % dilation, 0)), dilation)
    k, v = (_deal(F.pad(x, (0, 0, before, 0)), dilation) for x in (k, v))
    real = F.pad(token_mask, (before, 0))[:, None, :, None]
    real = _deal(real, dilation)[:, 0, :, 0]  # (B·d, S/d)
    out = windowed_attention(q, k, v, real, **how)  # (B·d, H, T/d, Dv)
    out = out.unflatten(0, (B, dilation)).permute(0, 2, 3, 1, 4)
    return out.flatten(2, 3)[:, :, -T:]


def _deal(x: Tensor, dilation: int) -> Tensor:
    """Position by position to d sequences in turn: (B, H, d·M, Dh) → (B·d, H, M, Dh)."""
    return x.unflatten(2, (-1, dilation)).permute(0, 3, 1, 2, 4).flatten(0, 1)


def _window_mask(T: int, S: int, window: int, causal: bool, device: torch.device) -> Tensor:
    if causal:
        return sliding_window_mask(T, S, window=window, device=device)
    return symmetric_window_mask(T, window=window, device=device)


def _check(q: Tensor, k: Tensor, v: Tensor, token_mask: Tensor | None, *, causal: bool) -> None:
    """What `fused_attention` cannot see, for it is given blocks; the rest it names itself."""
    expect_shape("q", q, "B H T Dh")
    expect_shape("k", k, "B K S Dh", B=q.size(0), Dh=q.size(3))
    expect_shape("v", v, "B K S Dv", B=q.size(0), K=k.size(1), S=k.size(2))
    expect_divides("k: number of heads", k.size(1), "q's number of heads", q.size(1))
    if token_mask is not None:
        expect_bool("token_mask", token_mask)
        expect_shape("token_mask", token_mask, "B S", B=q.size(0), S=k.size(2))
    T, S = q.size(2), k.size(2)
    if not 0 < T <= S or (T < S and not causal):
        expected = "at least as many keys as queries" if causal else "as many keys as queries"
        raise ValueError(f"k: expected {expected}, at least one, got T={T}, S={S}")


class LocalAttention(nn.Module):
    r"""`Attention` whose queries see a window of positions, in time that grows with T · W.

    $$Y = [\mathrm{head}_1; \ldots; \mathrm{head}_H]\, W^O, \qquad
      \mathrm{head}_h = \mathrm{windowed\_attention}(X W^Q_h,\; X W^K_{g(h)},\; X W^V_{g(h)})$$

    It has the parameters of `Attention` under the same names, so that the weights of one load into the
    other.

    Args:
        d_model: width of `x` and of the output.
        num_heads: query heads H.
        window: W, see `windowed_attention`.
        dilation: d, see `windowed_attention`.
        num_kv_heads: key/value heads K; H when left out.
        head_dim: width of a head; d_model / num_heads when left out.
        bias: whether the four projections have biases.
        dropout: probability with which a weight is dropped in training.
        scale: factor on q kᵀ; 1/√Dh when left out.

    Raises:
        ValueError: the head counts do not divide, or window or dilation is not positive.

    Paper: Jiang et al. (2023), section 2. Reference: transformers.MistralForCausalLM.

    Book: local-attention-window
    """

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        *,
        window: int,
        dilation: int = 1,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        bias: bool = True,
        dropout: float = 0.0,
        scale: float | None = None,
    ) -> None:
        super().__init__()
        for name, size in (("window", window), ("dilation", dilation)):
            if size < 1:
                raise ValueError(f"{name}: expected at least 1, got {size}")
        full = Attention(d_model, num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim, bias=bias)
        self.d_model, self.num_heads = d_model, num_heads
        self.num_kv_heads, self.head_dim = full.num_kv_heads, full.head_dim
        self.window, self.dilation = window, dilation
        self.dropout, self.scale = dropout, scale
        self.q_proj, self.k_proj, self.v_proj = full.q_proj, full.k_proj, full.v_proj
        self.out_proj = full.out_proj

    def forward(
        self,
        x: Tensor,
        *,
        attn_mask: Tensor | None = None,
        causal: bool = True,
        rotary: tuple[Tensor, Tensor] | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """Attend from each position of `x` to its window.

        Args:
            x: (B, T, D).
            attn_mask: bool (B, 1, 1, S), the mask of the keys that `key_mask` gives, over all positions,
                cached and new; True = real token. The window itself is not part of it.
            causal: no position sees a later one.
            rotary: cosines and sines of the new positions, by which q and k are turned.
            cache: keys and values of earlier positions, a `RollingCache` of this window or a `KVCache`;
                the new ones are appended to it.

        Returns:
            The output (B, T, D).

        Raises:
            TypeError: the mask is not boolean, or the dtypes differ.
            ValueError: shapes do not fit; the cache rolls over another window; or there is a cache where
                the window is dilated or sees later positions.

        Book: local-attention-window
        """
        expect_shape("x", x, "B T D", D=self.d_model)
        expect_dtype("x", x, self.q_proj.weight.dtype)
        q = split_heads(self.q_proj(x), self.num_heads)  # (B, H, T, Dh)
        k = split_heads(self.k_proj(x), self.num_kv_heads)  # (B, K, T, Dh)
        v = split_heads(self.v_proj(x), self.num_kv_heads)
        if rotary is not None:
            q, k = rotate(q, *rotary), rotate(k, *rotary)
        token_mask = self._token_mask(attn_mask, x, cache)
        if cache is not None:
            self._expect_cache(cache, causal)
            k, v = cache.append(k, v)
            if token_mask is not None:
                token_mask = _of_the_keys(token_mask, cache, k.size(2))
        out = windowed_attention(
            q,
            k,
            v,
            token_mask,
            window=self.window,
            causal=causal,
            dilation=self.dilation,
            dropout=self.dropout if self.training else 0.0,
            scale=self.scale,
        )
        return self.out_proj(merge_heads(out))  # (B, T, D)

    def _token_mask(self, attn_mask: Tensor | None, x: Tensor, cache: KVCache | None) -> Tensor | None:
        """(B, 1, 1, S) → (B, S), S all positions so far."""
        if attn_mask is None:
            return None
        expect_bool("attn_mask", attn_mask)
        S = x.size(1) + (0 if cache is None else cache.length)
        if attn_mask.shape != (x.size(0), 1, 1, S):
            raise ValueError(
                f"attn_mask: expected a mask of the keys alone, (B, 1, 1, S) = {(x.size(0), 1, 1, S)}, "
                f"got {tuple(attn_mask.shape)}"
            )
        return attn_mask[:, 0, 0]

    def _expect_cache(self, cache: KVCache, causal: bool) -> None:
        if not causal or self.dilation > 1:
            raise ValueError(
                "cache: expected None where the window is dilated or sees later positions, "
                f"got a {type(cache).__name__} with causal={causal}, dilation={self.dilation}"
            )
        if isinstance(cache, RollingCache) and cache.window != self.window:
            raise ValueError(f"cache: expected one of the window {self.window}, got {cache.window}")

    def extra_repr(self) -> str:
        dilated = f", dilation={self.dilation}" if self.dilation > 1 else ""
        return (
            f"num_heads={self.num_heads}, num_kv_heads={self.num_kv_heads}, head_dim={self.head_dim}, "
            f"window={self.window}{dilated}"
        )


def _of_the_keys(token_mask: Tensor, cache: KVCache, S: int) -> Tensor:
    """Of all positions, those whose keys the cache gave back, in its order."""
    if isinstance(cache, RollingCache) and cache.window >= S:  # one step, or a ring not yet closed
        return token_mask[:, cache.positions]
    return token_mask[:, -S:]
