"""Sparse attention: each query reads a few keys, and little more than those is ever scored.

Four patterns, with the class that is a layer of each, and masks read as graphs (`graphs`):

    strided   the last l positions, and every l-th before them         SparseAttention      (`strided`)
    fixed     the own block of l, the last c of each earlier block     SparseAttention      (`strided`)
    window    w/2 positions on either side, and a few global tokens    LongformerAttention  (`longformer`)
    blocks    three neighbours, the first, the last, r random ones     BigBirdAttention     (`bigbird`)

Each pattern stands here twice. A boolean **mask** (True = may attend) says what the pattern is, serves
`attention` at the full cost of T², and is the graph that `reachable` walks along. A function of the same
numbers (`strided_attention`, …) scores the few blocks that hold the pattern's pairs, T (2l + T/l) scores or
T (3w/2 + G), and takes one softmax in which no pair is counted twice.

Book: sparse-attention
"""

from .bigbird import BigBirdAttention, bigbird_attention, bigbird_mask, random_blocks
from .graphs import diameter, reach, reachable
from .longformer import (
    GlobalTokens,
    LongformerAttention,
    add_global,
    find_global,
    to_band,
    window_attention,
    window_mask,
    window_scores,
)
from .strided import (
    PARTS,
    SparseAttention,
    fixed_attention,
    fixed_mask,
    strided_attention,
    strided_mask,
)

__all__ = [
    "PARTS",
    "BigBirdAttention",
    "GlobalTokens",
    "LongformerAttention",
    "SparseAttention",
    "add_global",
    "bigbird_attention",
    "bigbird_mask",
    "diameter",
    "find_global",
    "fixed_attention",
    "fixed_mask",
    "random_blocks",
    "reach",
    "reachable",
    "strided_attention",
    "strided_mask",
    "to_band",
    "window_attention",
    "window_mask",
    "window_scores",
]
