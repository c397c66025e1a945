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
    T: int,
    S: int | None = None,
    *,
    window: int,
    dilation: int = 1,
    device: torch.device | str | None = None,
) -> Tensor:
    r"""Let each query see `window` positions: its own, and those before it at steps of `dilation`.

    Aligned as `causal_mask`: with $p = i + (S - T)$ the position of query i and $d$ the dilation, it
    sees key j when

    $$p - d \cdot \mathtt{window} < j \le p \quad\text{and}\quad d \text{ divides } p - j.$$

    A window of S or more is the causal mask.

    Paper: Child et al. (2019), the locally banded pattern that GPT-3 uses in every second layer;
    Beltagy et al. (2020), section 3.1, for the dilation.

    Args:
        T: number of queries.
        S: number of keys; T when left out.
        window: how many positions a query sees at most.
        dilation: d; 1 leaves no gaps.
        device: where the mask is made.

    Returns:
        A bool tensor (T, S).

    Raises:
        ValueError: there are fewer keys than queries, the window is empty, or the dilation is not
            positive.

    Book: attention-masks
    """
    _expect_window(window, dilation)
    mask = causal_mask(T, S, device=device)
    before = _steps_before(*mask.shape, device=device)
    return mask & (before < dilation * window) & (before % dilation == 0)


def symmetric_window_mask(
    T: int, *, window: int, dilation: int = 1, device: torch.device | str | None = None
) -> Tensor:
    r"""Let each position see itself and `window` − 1 positions on either side, at steps of `dilation`.

    With $d$ the dilation, i sees j when

    $$|i - j| < d \cdot \mathtt{window} \quad\text{and}\quad d \text{ divides } i - j.$$

    What lies in it and in the causal mask is the sliding window of the same size. Longformer counts both
    sides: its w is 2 (window − 1).

    Paper: Beltagy et al. (2020), section 3.1.

    Args:
        T: number of positions.
        window: how many positions one side has, the own one included.
        dilation: d; 1 leaves no gaps.
        device: where the mask is made.

    Returns:
        A bool tensor (T, T).

    Raises:
        ValueError: there are no positions, the window is empty, or the dilation is not positive.

    Book: local-attention-symmetric
    """
    _expect_window(window, dilation)
    _expect_positions(T)
    apart = _steps_before(T, T, device=device).abs()
    return (apart < dilation * window) & (apart % dilation == 0)


def block_local_mask(
    T: int,
    *,
    block: int,
    look_back: int = 0,
    look_ahead: int = 0,
    causal: bool = True,
    device: torch.device | str | None = None,
) -> Tensor:
    r"""Cut the positions into blocks, and let each see its own block and some blocks beside it.

    With $b = \lfloor \cdot / \mathtt{block} \rfloor$ the number of a position's block, i sees j when

    $$b(i) - \mathtt{look\_back} \le b(j) \le b(i) + \mathtt{look\_ahead},$$

    and, where `causal`, $j \le i$. The last block may be shorter.

    Reference: local_attention.LocalAttention, which looks one block back unless told otherwise.

    Args:
        T: number of positions.
        block: positions in a block; with T or more, all are in one.
        look_back: how many earlier blocks are seen.
        look_ahead: how many later blocks are seen; 0 where `causal`.
        causal: no position sees a later one.
        device: where the mask is made.

    Returns:
        A bool tensor (T, T).

    Raises:
        ValueError: there are no positions, the block is empty, a count of blocks is negative, or a
            causal mask is to look ahead.

    Book: local-attention-blocks
    """
    _expect_positions(T)
    expect_blocks(block, look_back, look_ahead, causal)
    number = torch.arange(T, device=device) // block
    back = number[:, None] - number  # how many blocks before the query's the key lies
    mask = (-look_ahead <= back) & (back <= look_back)
    return mask & causal_mask(T, device=device) if causal else mask


def expect_blocks(block: int, look_back: int, look_ahead: int, causal: bool) -> None:
    """Raise unless the sizes of a block-local pattern make sense.

    Raises:
        ValueError: as in `block_local_mask`.

    Book: local-attention-blocks
    """
    if block < 1:
        raise ValueError(f"block: expected at least 1, got {block}")
    for name, count in (("look_back", look_back), ("look_ahead", look_ahead)):
        if count < 0:
            raise ValueError(f"{name}: expected 0 or more blocks, got {count}")
    if causal and look_ahead:
        raise ValueError(f"look_ahead: expected 0 where no later position may be seen, got {look_ahead}")


def _expect_window(window: int, dilation: int) -> None:
    if window < 1:
        raise ValueError(f"window: expected at least 1, got {window}")
    if dilation < 1:
        raise ValueError(f"dilation: expected at least 1, got {dilation}")


def _expect_positions(T: int) -> None:
    if T < 1:
        raise ValueError(f"T: expected at least 1, got {T}")


def _steps_before(T: int, S: int, *, device: torch.device | str | None = None) -> Tensor:
    """How far before query i, one of the last T of S positions, key j lies: (T, S) integers."""
    return torch.arange(S - T, S, device=device)[:, None] - torch.arange(S, device=device)


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
