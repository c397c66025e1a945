"""Where the norm stands: a branch that is added to what it read, four ways.

    pre        x + f(N(x))              GPT-2, LLaMA: the stream itself is never normalised
    post       N(x + f(x))              the first Transformer, BERT, GPT-1
    sandwich   x + N'(f(N(x)))          before and behind the branch
    deep       N(α x + f(x))            DeepNorm: a louder stream

The models of this package write their blocks out, so that the whole forward pass is in view; this module
is for comparing the places with everything else the same.
Papers: Xiong et al. (2020) for pre and post, Ding et al. (2021) for the sandwich, Wang et al. (2022) for
DeepNorm.

Book: norm-placement
"""

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

PLACES = ("pre", "post", "sandwich", "deep")


class Residual(nn.Module):
    r"""A branch f around which the stream runs, and one or two norms at the `place` that is asked for.

    $$\text{pre: } x + f(N(x)) \qquad \text{post: } N(x + f(x)) \qquad
      \text{sandwich: } x + N'(f(N(x))) \qquad \text{deep: } N(\alpha x + f(x))$$

    Args:
        branch: f, a module (B, T, D) → (B, T, D).
        norm: makes a norm, called once or twice.
        place: "pre", "post", "sandwich" or "deep".
        alpha: α, by which "deep" multiplies the stream; 1 with the other places.
        dropout: probability with which a number of the branch's output is dropped in training.

    Raises:
        ValueError: the place is unknown, or α is given where it has no meaning.

    Book: norm-placement
    """

    def __init__(
        self,
        branch: nn.Module,
        norm: Callable[[], nn.Module],
        *,
        place: str = "pre",
        alpha: float = 1.0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if place not in PLACES:
            raise ValueError(f"place: expected one of {', '.join(PLACES)}, got {place!r}")
        if alpha != 1.0 and place != "deep":
            raise ValueError(f"alpha: expected 1 where the norm's place is {place!r}, got {alpha}")
        self.place, self.alpha, self.dropout = place, alpha, dropout
        self.branch, self.norm = branch, norm()
        self.out_norm = norm() if place == "sandwich" else None

    def forward(self, x: Tensor, **arguments: Any) -> Tensor:
        """Add the branch to (B, T, D); further arguments go to the branch."""
        before = self.place in ("pre", "sandwich")
        y = self.branch(self.norm(x) if before else x, **arguments)
        if self.out_norm is not None:
            y = self.out_norm(y)
        y = F.dropout(y, self.dropout, self.training)
        return x + y if before else self.norm(self.alpha * x + y)

    def extra_repr(self) -> str:
        return f"place={self.place!r}" + (f", alpha={self.alpha:g}" if self.place == "deep" else "")
