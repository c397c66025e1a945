"""What a decoder must know of its input before the first block: where the tokens stand, what is padding.

B batch, T new tokens, S positions in all (cached and new).

Book: attention-cache
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .cache import KVCache
from .checks import expect_bool, expect_ids, expect_shape
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
    expect_room("tokens", tokens, max_seq_len=max_seq_len, past=start)
    if token_mask is None:
        return torch.arange(start, start + T, device=tokens.device), None
    keys = real_key_mask("token_mask", token_mask, B, start + T)
    return token_positions(token_mask)[:, start:], keys


def expect_room(name: str, tokens: Tensor, *, max_seq_len: int, past: int = 0) -> None:
    """Raise unless `tokens` is (B, T) with at least one position, and fits behind the `past` ones.

    Raises:
        ValueError: another shape, no position, or more than there is room for.

    Book: attention-cache
    """
    expect_shape(name, tokens, "B T")
    T, room = tokens.size(1), max_seq_len - past
    if not 0 < T <= room:
        behind = f", {past} of them cached" if past else ""
        raise ValueError(
            f"{name}: expected 1 to {room} positions (max_seq_len={max_seq_len}{behind}), got {T}"
        )


def real_key_mask(name: str, mask: Tensor | None, B: int, S: int) -> Tensor | None:
    """The mask of the keys (B, 1, 1, S) from one of real tokens, in which no row may be empty.

    Raises:
        TypeError: the mask is not boolean.
        ValueError: the mask is not of shape (B, S), or a row has no real token.

    Book: attention-masks
    """
    if mask is None:
        return None
    expect_bool(name, mask)
    expect_shape(name, mask, "B S", B=B, S=S)
    has_tokens = mask.any(1)
    if not bool(has_tokens.all()):
        empty = (~has_tokens).nonzero().flatten().tolist()
        raise ValueError(f"{name}: expected a real token in each row, got none in row {empty[0]}")
    return key_mask(mask)


def shift_right(labels: Tensor, *, start_id: int, pad_id: int) -> Tensor:
    """What a decoder reads that is to write `labels`: the start token, then all labels but the last.

    Args:
        labels: (B, T) integer ids; −100, which asks for nothing, becomes padding.
        start_id: the token that begins every target.
        pad_id: the token of padding.

    Returns:
        (B, T) ids.

    Raises:
        TypeError: the labels are not integers.
        ValueError: they are not of shape (B, T).

    Book: encoder-decoder
    """
    expect_ids("labels", labels)
    expect_shape("labels", labels, "B T")
    start = labels.new_full((labels.size(0), 1), start_id)
    shifted = torch.cat([start, labels[:, :-1]], dim=1)
    return shifted.masked_fill(shifted == -100, pad_id)


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
