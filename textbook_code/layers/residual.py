"""Where the norm stands: a branch that is added to what it read, four ways.

    pre        x + f(N(x))              GPT-2, LLaMA: the stream itself is never normalised
    post       N(x + f(x))              the first Transformer, BERT, GPT-1
    sandwich   x + N'(f(N(x)))          before and behind the branch
    deep       N(α x + f(x))            DeepNorm: a louder stream

The models of this package write their blocks out, so that the whole forward pass is in view; this module
is for comparing the places with everything else the same. DeepNorm's two constants and its start are here
too.
Papers: Xiong et al. (2020) for pre and post, Ding et al. (2021) for the sandwich, Wang et al. (2022) for
DeepNorm.

Book: norm-placement
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

PLACES = ("pre", "post", "sandwich", "deep")
_GAIN_ONE = ("q_proj", "k_proj")
_GAIN_BETA = ("v_proj", "out_proj", "fc1", "fc2", "gate_proj", "up_proj", "down_proj")


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


class DeepNorm(NamedTuple):
    """DeepNorm's two constants for one stack of layers.

    Attributes:
        alpha: α, by which `Residual(place="deep")` multiplies the stream.
        beta: β, the gain with which `deepnorm_init_` draws some of the matrices.

    Book: norm-deep
    """

    alpha: float
    beta: float


def deepnorm(num_layers: int) -> DeepNorm:
    r"""The constants of an encoder or of a decoder that stands alone, of N layers.

    $$\alpha = (2N)^{1/4}, \qquad \beta = (8N)^{-1/4}$$

    Paper: Wang et al. (2022), figure 2. Reference: microsoft/torchscale.

    Args:
        num_layers: N, each of attention and a feed-forward network.

    Raises:
        ValueError: N is below 1.

    Book: norm-deep
    """
    _expect_layers(num_layers=num_layers)
    return DeepNorm((2 * num_layers) ** 0.25, (8 * num_layers) ** -0.25)


def deepnorm_encoder_decoder(encoder_layers: int, decoder_layers: int) -> tuple[DeepNorm, DeepNorm]:
    r"""The constants of an encoder of N layers and of the decoder of M layers that reads it.

    $$\alpha_e = 0.81\, (N^4 M)^{1/16}, \quad \beta_e = 0.87\, (N^4 M)^{-1/16}, \qquad
      \alpha_d = (3M)^{1/4}, \quad \beta_d = (12M)^{-1/4}$$

    Paper: Wang et al. (2022), figure 2. Reference: microsoft/torchscale.

    Args:
        encoder_layers: N.
        decoder_layers: M, each with cross-attention between its two other branches.

    Returns:
        The encoder's constants and the decoder's.

    Raises:
        ValueError: N or M is below 1.

    Book: norm-deep
    """
    _expect_layers(encoder_layers=encoder_layers, decoder_layers=decoder_layers)
    both = encoder_layers**4 * decoder_layers
    return (
        DeepNorm(0.81 * both**0.0625, 0.87 * both**-0.0625),
        DeepNorm((3 * decoder_layers) ** 0.25, (12 * decoder_layers) ** -0.25),
    )


def deepnorm_init_(module: nn.Module, beta: float) -> nn.Module:
    r"""Draw the matrices of attention and feed-forward networks as DeepNorm asks; returns the module.

    A matrix of m × n numbers is drawn from N(0, 2 g² / (m + n)), Glorot's normal distribution with gain g: β
    for the feed-forward matrices, the value projection and the output projection, which decide how much a
    branch adds; 1 for the query and key projections, which only decide where it looks. Their biases become 0.
    Nothing else is touched.
    Paper: Wang et al. (2022), figure 2.

    Args:
        module: any module; its matrices are known by the names that the package gives them.
        beta: β.

    Raises:
        ValueError: β is not positive, or the module has no such matrix.

    Book: norm-deep
    """
    if not beta > 0:
        raise ValueError(f"beta: expected a positive gain, got {beta}")
    found = False
    for name, inner in module.named_modules():
        role = name.rpartition(".")[2]
        if isinstance(inner, nn.Linear) and role in _GAIN_BETA + _GAIN_ONE:
            gain = beta if role in _GAIN_BETA else 1.0
            nn.init.xavier_normal_(inner.weight, gain=gain)
            if inner.bias is not None:
                nn.init.zeros_(inner.bias)
            found = True
    if not found:
        names = ", ".join(_GAIN_ONE + _GAIN_BETA)
        raise ValueError(f"module: expected linear layers called {names}; {type(module).__name__} has none")
    return module


def _expect_layers(**counts: int) -> None:
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"{name}: expected at least 1, got {count}")
