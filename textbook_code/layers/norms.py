"""Normalisation: keep each token's vector at a steady size.

D d_model; both modules act on the last axis, each token by itself.

Book: bert-norm
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LayerNorm(nn.Module):
    r"""Subtract the mean, divide by the standard deviation, scale and shift.

    $$y = \frac{x - \mu}{\sqrt{\sigma^2 + \varepsilon}} \odot \gamma + \beta, \qquad
      \mu = \frac1D \sum_i x_i, \quad \sigma^2 = \frac1D \sum_i (x_i - \mu)^2$$

    `weight` is γ, `bias` is β. The variance divides by D, not by D − 1.
    Paper: Ba, Kiros and Hinton (2016). Reference: torch.nn.LayerNorm.

    Args:
        d_model: D.
        norm_eps: ε. It differs between models (1e-12 in BERT, 1e-5 in GPT-2), and a wrong one
            changes every number a little.
        bias: whether there is a β.

    Book: bert-norm
    """

    def __init__(self, d_model: int, *, norm_eps: float = 1e-5, bias: bool = True) -> None:
        super().__init__()
        self.norm_eps = norm_eps
        self.weight = nn.Parameter(torch.ones(d_model))
        self.bias = nn.Parameter(torch.zeros(d_model)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """Normalise (…, D) along its last axis."""
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.norm_eps)

    def extra_repr(self) -> str:
        return f"{self.weight.numel()}, norm_eps={self.norm_eps}"


class RMSNorm(nn.Module):
    r"""Divide by the root mean square, scale; no mean, no shift.

    $$y = \gamma \odot \frac{x}{\sqrt{\frac1D \sum_i x_i^2 + \varepsilon}}$$

    The division is done in float32 at least and cast back before γ is applied, as LLaMA does.
    Paper: Zhang and Sennrich (2019). Reference: torch.nn.RMSNorm.

    Args:
        d_model: D.
        norm_eps: ε.

    Book: bert-norm
    """

    def __init__(self, d_model: int, *, norm_eps: float = 1e-6) -> None:
        super().__init__()
        self.norm_eps = norm_eps
        self.weight = nn.Parameter(torch.ones(d_model))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise (…, D) along its last axis."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return self.weight * (wide * (wide.square().mean(-1, keepdim=True) + self.norm_eps).rsqrt()).to(
            x.dtype
        )

    def extra_repr(self) -> str:
        return f"{self.weight.numel()}, norm_eps={self.norm_eps}"
