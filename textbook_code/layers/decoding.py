"""What a decoder must know of its input before the first block: where the tokens stand, what is padding.

B batch, T new tokens, S positions in all (cached and new).

Book: attention-cache
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .cache import KVCache
from .checks import expect_bool, expect_shape
from .masks import key_mask
from .positions import token_positions


def decoder_inputs(
    tokens: Tensor,
    *,
    max_seq_len: int,
    num_layers: int,
    token_mask: Tensor | None = None,
    cache: Sequence[KVCache] | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Check the new tokens of a decoder, and say where they stand and which keys they may see.

    Args:
        tokens: (B, T) integer ids, which follow those in the cache.
        max_seq_len: most positions, cached and new.
        num_layers: how many caches there must be.
        token_mask: (B, S) bool over the cached positions and the new ones, True = real token; all are
            real when left out. Padding may stand on the left, on the right, or anywhere.
        cache: one for each layer.

    Returns:
        The positions of the new tokens, (T,), or (B, T) where there is a mask; and the mask of the
        keys (B, 1, 1, S), or None. Each row counts its real tokens from 0.

    Raises:
        TypeError: the mask is not boolean.
        ValueError: no token or too many, a row without a real token, caches of another number, or
            shapes that do not fit.

    Book: attention-cache
    """
    expect_shape("tokens", tokens, "B T")
    B, T = tokens.shape
    if cache is not None and len(cache) != num_layers:
        raise ValueError(f"cache: expected one for each of {num_layers} layers, got {len(cache)}")
    start = cache[0].length if cache else 0
    if not 0 < T <= max_seq_len - start:
        limit = f"max_seq_len={max_seq_len}" + (f", {start} of them cached" if start else "")
        raise ValueError(f"tokens: expected 1 to {max_seq_len - start} positions ({limit}), got {T}")
    if token_mask is None:
        return torch.arange(start, start + T, device=tokens.device), None
    expect_bool("token_mask", token_mask)
    expect_shape("token_mask", token_mask, "B S", B=B, S=start + T)
    if not bool((has_tokens := token_mask.any(1)).all()):
        empty = (~has_tokens).nonzero().flatten().tolist()
        raise ValueError(f"token_mask: expected a real token in each row, got none in row {empty[0]}")
    return token_positions(token_mask)[:, start:], key_mask(token_mask)


def last_hidden(hidden: Tensor, num_logits: int | None) -> Tensor:
    """Keep the last `num_logits` positions of (B, T, D), or all: what the output layer is to score.

    Raises:
        ValueError: there are not so many positions.

    Book: attention-cache
    """
    if num_logits is None:
        return hidden
    if not 0 < num_logits <= hidden.size(1):
        raise ValueError(f"num_logits: expected 1 to {hidden.size(1)} (the new tokens), got {num_logits}")
    return hidden[:, -num_logits:]
