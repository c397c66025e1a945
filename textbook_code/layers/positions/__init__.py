"""Where a token stands. Attention by itself cannot tell one order from another.

There are three places at which a position can enter, and three signatures (`kinds`):

    added to the input   embed(T, start=0) → (T, D)        LearnedPositions, SinusoidalPositions
    added to the scores  bias(T, S) → (H, T, S)            RelativeBias (T5), ALiBi
    turning q and k      rotary(positions) → (cos, sin)    RotaryPositions, AxialRotaryPositions,
                                                           MultimodalRotaryPositions

`Attention` takes the last two as `score_bias=` and `rotary=`, the first is the model's business. Terms that
need the content too (Shaw, DeBERTa) are functions of q, k and tables here, and attention layers of their own
in `layers/relative_attention.py`. No positions at all is a way too: a causal decoder is not blind without.

Book: positions-kinds
"""

from .absolute import LearnedPositions, SinusoidalPositions, token_positions
from .content import (
    disentangled_index,
    disentangled_scores,
    relative_scores,
    relative_values,
    skew,
    unskew,
)
from .kinds import AddsToInput, BiasesScores, Rotates
from .relative import ALiBi, RelativeBias, alibi_slopes, offsets
from .rotary import (
    AxialRotaryPositions,
    MultimodalRotaryPositions,
    RotaryPositions,
    grid_positions,
    halves_from_neighbours,
    neighbours_from_halves,
    rotate,
    rotate_neighbours,
)
from .scaling import LinearScaling, Llama3Scaling, NTKScaling, Scaling, YarnScaling

__all__ = [
    "ALiBi",
    "AddsToInput",
    "AxialRotaryPositions",
    "BiasesScores",
    "LearnedPositions",
    "LinearScaling",
    "Llama3Scaling",
    "MultimodalRotaryPositions",
    "NTKScaling",
    "RelativeBias",
    "RotaryPositions",
    "Rotates",
    "Scaling",
    "SinusoidalPositions",
    "YarnScaling",
    "alibi_slopes",
    "disentangled_index",
    "disentangled_scores",
    "grid_positions",
    "halves_from_neighbours",
    "neighbours_from_halves",
    "offsets",
    "relative_scores",
    "relative_values",
    "rotate",
    "rotate_neighbours",
    "skew",
    "token_positions",
    "unskew",
]
