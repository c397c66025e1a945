"""Who may attend to whom: boolean masks, True = may attend.

A mask is any bool tensor that broadcasts to the scores' shape (B, H, T, S). Masks
combine with `&`.

Book: attention-masks
"""

import torch
from torch import Tensor

from .checks import expect_bool, expect_shape


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
