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
    "gelu_tanh": partial(F.gelu, approximate="tanh"),  # GPT-1 and GPT-2
}


class FeedForward(nn.Module):
    r"""Two linear maps with a nonlinearity between them.

    $$\mathrm{FFN}(x) = \phi(x W_1 + b_1)\, W_2 + b_2$$

    Paper: Vaswani et al. (2017), section 3.3, with ReLU; Hendrycks and Gimpel (2016) for GELU.

    Args:
        d_model: D.
        d_ff: F, usually 4 D.
        activation: φ, one of the keys of `ACTIVATIONS`.
        bias: whether b₁ and b₂ exist.

    Raises:
        ValueError: the activation is unknown.

    Book: bert-feed-forward
    """

    def __init__(self, d_model: int, d_ff: int, *, activation: str = "gelu", bias: bool = True) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation: expected one of {sorted(ACTIVATIONS)}, got {activation!r}")
        self.activation = activation
        self.fc1 = nn.Linear(d_model, d_ff, bias=bias)
        self.fc2 = nn.Linear(d_ff, d_model, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map (…, D) to (…, D)."""
        return self.fc2(ACTIVATIONS[self.activation](self.fc1(x)))
