"""The three places at which a position enters a transformer, as the signatures that other code relies on.

A module of one kind can be exchanged for another of its kind without a word elsewhere.

Book: positions-kinds
"""

from typing import Protocol

import torch
from torch import Tensor


class AddsToInput(Protocol):
    """Vectors that are added to the token embeddings.

    Book: positions-kinds
    """

    def __call__(self, T: int, *, start: int = 0) -> Tensor:
        """Vectors (T, D) of the positions start … start + T − 1."""


class BiasesScores(Protocol):
    """Numbers that are added to the scaled scores, `score_bias=` of an attention layer.

    Book: positions-kinds
    """

    def __call__(self, T: int, S: int) -> Tensor:
        """The bias (H, T, S) of T queries, the last of S positions."""


class Rotates(Protocol):
    """Angles by which queries and keys are turned, `rotary=` of an attention layer.

    Book: positions-kinds
    """

    def __call__(self, positions: Tensor, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
        """Cosines and sines (T, R) of positions (T,), or (B, 1, T, R) of (B, T)."""
