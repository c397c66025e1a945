"""The feed-forward half of a block: each token's vector, widened, bent and narrowed again.

D d_model, F d_ff.

Book: bert-feed-forward
"""

from collections.abc import Callable
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,  # x Φ(x), by the error function: BERT, ViT
    "gelu_tanh": partial(F.gelu, approximate="tanh"),  # GPT-1, GPT-2, T5 v1.1
    "silu": F.silu,  # x σ(x): LLaMA, PaLM
    "hardswish": F.hardswish,  # x min(max(x + 3, 0), 6) / 6, of pieces of straight lines and parabolas
}


def _known(activation: str) -> str:
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation: expected one of {sorted(ACTIVATIONS)}, got {activation!r}")
    return activation


class FeedForward(nn.Module):
    r"""Two linear maps with a nonlinearity between them.

    $$\mathrm{FFN}(x) = \phi(x W_1 + b_1)\, W_2 + b_2$$

    Paper: Vaswani et al. (2017), section 3.3, with ReLU; Hendrycks and Gimpel (2016) for GELU.

    Args:
        d_model: D.
        d_ff: F, usually 4 D.
        activation: φ, one of the keys of `ACTIVATIONS`.
        bias: whether b₁ and b₂ exist.
        dropout: probability with which one of the F numbers in the middle is dropped in training.

    Raises:
        ValueError: the activation is unknown.

    Book: bert-feed-forward
    """

    def __init__(
        self, d_model: int, d_ff: int, *, activation: str = "gelu", bias: bool = True, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.activation, self.dropout = _known(activation), dropout
        self.fc1 = nn.Linear(d_model, d_ff, bias=bias)
        self.fc2 = nn.Linear(d_ff, d_model, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map (…, D) to (…, D)."""
        wide = ACTIVATIONS[self.activation](self.fc1(x))  # (…, F)
        return self.fc2(F.dropout(wide, self.dropout, self.training))


class GatedFeedForward(nn.Module):
    r"""A feed-forward layer in which one linear map decides how much of another one passes.

    $$\mathrm{FFN}(x) = \big(\phi(x W_{\mathrm{gate}}) \odot x W_{\mathrm{up}}\big)\, W_{\mathrm{down}}$$

    With SiLU for φ it is SwiGLU (LLaMA, PaLM), with GELU it is GEGLU (T5 v1.1). It has three
    matrices where `FeedForward` has two, so at equal size its F is two thirds as large.
    Paper: Shazeer (2020).

    Args:
        d_model: D.
        d_ff: F.
        activation: φ, one of the keys of `ACTIVATIONS`.
        bias: whether the three maps have biases.
        dropout: probability with which one of the F numbers in the middle is dropped in training.

    Raises:
        ValueError: the activation is unknown.

    Book: llama-swiglu
    """

    def __init__(
        self, d_model: int, d_ff: int, *, activation: str = "silu", bias: bool = False, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.activation, self.dropout = _known(activation), dropout
        self.gate_proj = nn.Linear(d_model, d_ff, bias=bias)
        self.up_proj = nn.Linear(d_model, d_ff, bias=bias)
        self.down_proj = nn.Linear(d_ff, d_model, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map (…, D) to (…, D)."""
        wide = ACTIVATIONS[self.activation](self.gate_proj(x)) * self.up_proj(x)  # (…, F)
        return self.down_proj(F.dropout(wide, self.dropout, self.training))
