"""The Longformer: a window to both sides, and a few global tokens that see everyone and are seen by all.

The window is computed in sliding chunks of h = w/2 queries against 3h keys, with the global keys beside it
in the same softmax: T (3w/2 + G) scores. The rows of the global tokens have projections of their own.

B batch, H heads, T length, Dh head_dim, D d_model, w window, h = w/2, d dilation, G global tokens,
n = T/h chunks.
Paper: Beltagy et al. (2020), section 3.
Reference: transformers.LongformerForMaskedLM.

Book: sparse-longformer
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..attention import fused_attention, split_heads
from ..checks import expect_bool, expect_shape
from ..masks import key_mask, symmetric_window_mask
from ._shared import _SelfAttention, expect_positive, expect_qkv, in_blocks, joint_weights


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
    expect_qkv(q, k, v)
    _expect_even(window)
    expect_positive("dilation", dilation)
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
        sets.append((in_blocks(scores, window // 2), seen[:, None, None, None]))
    weights = joint_weights(*sets, dropout=dropout)
    out = weights[0] @ _three_chunks(in_blocks(near_v, window // 2))
    if global_tokens is not None:
        out = out + weights[1] @ all_v[:, :, None]
    out = out.flatten(2, 3)[:, :, : q.size(2)].unflatten(1, (H, dilation))  # (B, H, d, T/d, Dv)
    return out.transpose(2, 3).flatten(2, 3)[:, :, :T]


def _deal(x: Tensor, dilation: int) -> Tensor:
    """Every d-th position to the same text: (B, H, T, …) → (B, H d, T/d, …), filled up with zeros."""
    return in_blocks(x, dilation).transpose(2, 3).flatten(1, 2)


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
    q, k = in_blocks(q, h), in_blocks(k, h)
    apart = torch.arange(3 * h, device=q.device) - h - torch.arange(h, device=q.device)[:, None]
    real = q.new_ones(1, 1, T).bool() if key_mask is None else key_mask
    real = _three_chunks(in_blocks(real, h)[..., None])[..., 0]  # (B, H, n, 3h)
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
            expect_positive("dilation", d)
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
            split_heads(self.q_global_proj(asking), self.num_heads),
            split_heads(self.k_global_proj(x), self.num_heads),
            split_heads(self.v_global_proj(x), self.num_heads),
            None if token_mask is None else key_mask(token_mask),
            dropout=self._dropout_now,
        )  # (B, H, G, Dh)
        text, place = found.exists.nonzero(as_tuple=True)
        target = (text, found.places[text, place])
        return out.transpose(1, 2).index_put(target, rows.transpose(1, 2)[text, place]).transpose(1, 2)

    def extra_repr(self) -> str:
        dilation = self.dilation[0] if len(set(self.dilation)) == 1 else self.dilation
        return f"num_heads={self.num_heads}, window={self.window}, dilation={dilation}"
