"""Masks as graphs: who has heard of whom after some layers.

    reachable   R_n = M_n R_{n-1} or R_{n-1}, a table: output i can depend on input j
    reach       how many positions each query has heard of
    diameter    how many layers until every query has heard of all

T length; M a boolean mask (True = may attend), read as arrows from each query to its keys.
Papers: Child et al. (2019), section 4.2; Zaheer et al. (2020), section 2.

Book: sparse-graphs
"""

import torch
from torch import Tensor

from ..checks import expect_bool, expect_shape
from ..masks import causal_mask


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
