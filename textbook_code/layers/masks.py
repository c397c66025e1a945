"""Who may attend to whom: boolean masks, True = may attend.

A mask is any bool tensor that broadcasts to the scores' shape (B, H, T, S). Masks
combine with `&`.

Book: attention-masks
"""

import torch
from torch import Tensor

from .checks import expect_bool, expect_ids, expect_shape


def causal_mask(T: int, S: int | None = None, *, device: torch.device | str | None = None) -> Tensor:
    r"""Let each query see its own position and all earlier ones.

    The T queries are taken to be the **last** T of S positions, so that the same function
    serves a full sequence (S = T) and a step behind a cache (S > T). Query i sees key j when

    $$j \le i + (S - T).$$

    Args:
        T: number of queries.
        S: number of keys; T when left out.
        device: where the mask is made.

    Returns:
        A bool tensor (T, S), aligned at the bottom right corner.

    Raises:
        ValueError: there are fewer keys than queries.

    Book: attention-masks
    """
    S = T if S is None else S
    if not 0 < T <= S:
        raise ValueError(
            f"T, S: expected 1 <= T <= S (the queries are the last T of S keys), got T={T}, S={S}"
        )
    return torch.ones(T, S, dtype=torch.bool, device=device).tril(diagonal=S - T)


def key_mask(token_mask: Tensor) -> Tensor:
    """Hide padding: no query may attend to a key that is not a real token.

    Args:
        token_mask: (B, S) bool, True = real token.

    Returns:
        A view (B, 1, 1, S) that broadcasts over heads and queries.

    Raises:
        TypeError: the mask is not boolean.
        ValueError: the mask is not of shape (B, S).

    Book: attention-masks
    """
    expect_bool("token_mask", token_mask)
    expect_shape("token_mask", token_mask, "B S")
    return token_mask[:, None, None, :]


def sliding_window_mask(
    T: int, S: int | None = None, *, window: int, device: torch.device | str | None = None
) -> Tensor:
    r"""Let each query see its own position and the `window` − 1 before it.

    Aligned as `causal_mask`: with $p = i + (S - T)$ the position of query i, it sees key j when

    $$p - \mathtt{window} < j \le p.$$

    Paper: Child et al. (2019), the locally banded pattern that GPT-3 uses in every second layer.

    Args:
        T: number of queries.
        S: number of keys; T when left out.
        window: how many positions a query sees at most.
        device: where the mask is made.

    Returns:
        A bool tensor (T, S).

    Raises:
        ValueError: there are fewer keys than queries, or the window is empty.

    Book: attention-masks
    """
    if window < 1:
        raise ValueError(f"window: expected at least 1, got {window}")
    mask = causal_mask(T, S, device=device)
    return mask & ~mask.tril(diagonal=mask.size(1) - T - window)


def document_mask(document_ids: Tensor) -> Tensor:
    """Keep documents that share a row apart: a query sees the keys of its own document only.

    Args:
        document_ids: (B, T) integers, equal within a document.

    Returns:
        A bool tensor (B, 1, T, T) that broadcasts over heads; combine it with `causal_mask`.

    Raises:
        TypeError: the ids are not integers.
        ValueError: they are not of shape (B, T).

    Book: attention-masks
    """
    expect_ids("document_ids", document_ids)
    expect_shape("document_ids", document_ids, "B T")
    return (document_ids[:, :, None] == document_ids[:, None, :])[:, None]
