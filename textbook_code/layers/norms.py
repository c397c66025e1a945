r"""Normalisation: keep vectors at a steady size, so that a deep stack can be trained.

    LayerNorm, RMSNorm, GemmaRMSNorm    statistics of each token by itself, over its D numbers
    GroupNorm                           of each example by itself, over a group of channels and all places
    BatchNorm                           of each channel by itself, over the batch and all places
    QKNorm                              of queries and keys, before their product

D d_model, C channels, B batch, T length, H query heads, K key heads, Dh head_dim. Statistics are taken in
float32 at least, whatever the input's dtype; where the result is cast back, each class says.

Book: normalisation
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .checks import expect_divides


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

    Raises:
        ValueError: D is below 1, or ε below 0.

    Book: bert-norm
    """

    def __init__(self, d_model: int, *, norm_eps: float = 1e-5, bias: bool = True) -> None:
        super().__init__()
        _expect_sizes(norm_eps, d_model=d_model)
        self.norm_eps = norm_eps
        self.weight = nn.Parameter(torch.ones(d_model))
        self.bias = nn.Parameter(torch.zeros(d_model)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """Normalise (…, D) along its last axis; ValueError when its width is another."""
        _expect_width(x, self.weight)
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

    Raises:
        ValueError: D is below 1, or ε below 0.

    Book: bert-norm
    """

    def __init__(self, d_model: int, *, norm_eps: float = 1e-6) -> None:
        super().__init__()
        _expect_sizes(norm_eps, d_model=d_model)
        self.norm_eps = norm_eps
        self.weight = nn.Parameter(torch.ones(d_model))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise (…, D) along its last axis; ValueError when its width is another."""
        _expect_width(x, self.weight)
        return self.weight * _over_rms(x, self.norm_eps).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.weight.numel()}, norm_eps={self.norm_eps}"


class GemmaRMSNorm(nn.Module):
    r"""RMSNorm whose scale is 1 + w, applied in float32 before the result is cast back, as in Gemma.

    $$y = (1 + w) \odot \frac{x}{\sqrt{\frac1D \sum_i x_i^2 + \varepsilon}}$$

    `weight` is w and starts at 0, so that weight decay pulls the scale towards 1 and not towards 0; and a
    half-precision w keeps small differences from 1 that a half-precision γ would round away.
    Paper: Gemma Team (2024). Reference: transformers' GemmaRMSNorm.

    Args:
        d_model: D.
        norm_eps: ε.

    Raises:
        ValueError: D is below 1, or ε below 0.

    Book: norm-rms
    """

    def __init__(self, d_model: int, *, norm_eps: float = 1e-6) -> None:
        super().__init__()
        _expect_sizes(norm_eps, d_model=d_model)
        self.norm_eps = norm_eps
        self.weight = nn.Parameter(torch.zeros(d_model))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise (…, D) along its last axis; ValueError when its width is another."""
        _expect_width(x, self.weight)
        wide = _over_rms(x, self.norm_eps)
        return (wide * (1 + self.weight.to(wide.dtype))).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.weight.numel()}, norm_eps={self.norm_eps}"


class GroupNorm(nn.Module):
    r"""Normalise each example's channels in G groups, each over its C/G channels and all places.

    $$y_{bcp} = \gamma_c\, \frac{x_{bcp} - \mu_{bg}}{\sqrt{\sigma^2_{bg} + \varepsilon}} + \beta_c,
      \qquad g = \lfloor c\, G / C \rfloor$$

    with mean μ and variance σ² over the C/G channels of group g and all places p. With G = C it is instance
    normalisation; with G = 1 it is LayerNorm over channels and places together. No example sees another.
    Paper: Wu and He (2018). Reference: torch.nn.GroupNorm.

    Args:
        num_groups: G, which divides C.
        num_channels: C.
        norm_eps: ε.

    Raises:
        ValueError: G does not divide C, C is below 1, or ε below 0.

    Book: norm-axes
    """

    def __init__(self, num_groups: int, num_channels: int, *, norm_eps: float = 1e-5) -> None:
        super().__init__()
        _expect_sizes(norm_eps, num_channels=num_channels)
        expect_divides("num_groups", num_groups, "num_channels", num_channels)
        self.num_groups, self.norm_eps = num_groups, norm_eps
        self.weight = nn.Parameter(torch.ones(num_channels))
        self.bias = nn.Parameter(torch.zeros(num_channels))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise (B, C, …); ValueError when it has other channels."""
        _expect_channels(x, self.weight)
        wide = _widen(x)
        groups = wide.reshape(x.size(0), self.num_groups, -1)  # (B, G, C/G · places)
        variance, mean = torch.var_mean(groups, -1, correction=0, keepdim=True)
        y = ((groups - mean) * (variance + self.norm_eps).rsqrt()).reshape(x.shape)
        return _scale_channels(y, self.weight, self.bias).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.num_groups}, {self.weight.numel()}, norm_eps={self.norm_eps}"


class BatchNorm(nn.Module):
    r"""Normalise each channel over the batch and all places; in evaluation, by running averages.

    $$y_{bcp} = \gamma_c\, \frac{x_{bcp} - \mu_c}{\sqrt{\sigma^2_c + \varepsilon}} + \beta_c$$

    In training μ and σ² are those of the batch, so each example's output depends on its neighbours, and the
    averages move: r ← (1 − m) r + m s, with s the batch's mean and its *unbiased* variance. In evaluation the
    averages take their place. The other norms of this module need neither; this one stands here as contrast.
    Paper: Ioffe and Szegedy (2015). Reference: torch.nn.BatchNorm1d.

    Args:
        num_channels: C.
        norm_eps: ε.
        momentum: m, the weight of the new batch.

    Raises:
        ValueError: C is below 1, ε below 0, or m not between 0 and 1.

    Book: norm-axes
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, num_channels: int, *, norm_eps: float = 1e-5, momentum: float = 0.1) -> None:
        super().__init__()
        _expect_sizes(norm_eps, num_channels=num_channels)
        if not 0 <= momentum <= 1:
            raise ValueError(f"momentum: expected a number from 0 to 1, got {momentum}")
        self.norm_eps, self.momentum = norm_eps, momentum
        self.weight = nn.Parameter(torch.ones(num_channels))
        self.bias = nn.Parameter(torch.zeros(num_channels))
        self.register_buffer("running_mean", torch.zeros(num_channels))
        self.register_buffer("running_var", torch.ones(num_channels))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise (B, C, …); in training this also moves the running averages.

        Raises:
            ValueError: other channels; in training, one value for each channel, whose variance is 0.
        """
        _expect_channels(x, self.weight)
        wide = _widen(x)
        if self.training:
            mean, variance = self._batch_statistics(wide)
        else:
            mean, variance = self.running_mean.to(wide.dtype), self.running_var.to(wide.dtype)
        y = _scale_channels(wide, (variance + self.norm_eps).rsqrt(), -mean, shift_first=True)
        return _scale_channels(y, self.weight, self.bias).to(x.dtype)

    def _batch_statistics(self, x: Tensor) -> tuple[Tensor, Tensor]:
        count = x.numel() // x.size(1)
        if count < 2:
            raise ValueError(
                f"x: expected more than one value for each channel in training, got shape {tuple(x.shape)}"
            )
        axes = [axis for axis in range(x.dim()) if axis != 1]
        variance, mean = torch.var_mean(x, axes, correction=0)  # (C,) each
        with torch.no_grad():
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
            unbiased = variance * count / (count - 1)
            self.running_var.lerp_(unbiased.to(self.running_var.dtype), self.momentum)
        return mean, variance

    def extra_repr(self) -> str:
        return f"{self.weight.numel()}, norm_eps={self.norm_eps}, momentum={self.momentum}"


class UnitNorm(nn.Module):
    r"""Divide by the Euclidean length; with a `scale`, multiply by one learned number.

    $$y = g\, \frac{x}{\max(\lVert x \rVert, \varepsilon)}$$

    Henry et al. normalise queries and keys so, and put g in the place of 1/√Dh; it starts at
    log₂(L² − L), with L the length of a long sequence of the training data.
    Paper: Henry, Dachapally, Pawar and Chen (2020). Reference: torch.nn.functional.normalize.

    Args:
        scale: the start of g; no g when left out.
        norm_eps: ε.

    Raises:
        ValueError: ε is below 0.

    Book: qk-norm
    """

    def __init__(self, *, scale: float | None = None, norm_eps: float = 1e-12) -> None:
        super().__init__()
        _expect_sizes(norm_eps)
        self.norm_eps = norm_eps
        self.scale = None if scale is None else nn.Parameter(torch.tensor(float(scale)))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise (…, Dh) along its last axis."""
        wide = _widen(x)
        y = (wide / wide.norm(dim=-1, keepdim=True).clamp(min=self.norm_eps)).to(x.dtype)
        return y if self.scale is None else self.scale * y

    def extra_repr(self) -> str:
        return f"norm_eps={self.norm_eps}"


class QKNorm(nn.Module):
    """A norm for the queries and one for the keys, before they are turned and multiplied.

    `Attention(…, qk_norm=…)` applies it. With widths H·Dh and K·Dh for queries and keys:

        QKNorm(RMSNorm(Dh), RMSNorm(Dh))                          each head by itself: Qwen3
        QKNorm(LayerNorm(Dh, bias=False), …)                      the same with LayerNorm: ViT-22B
        QKNorm(RMSNorm(H * Dh), RMSNorm(K * Dh), over="width")    all heads together: OLMo 2
        QKNorm(UnitNorm(scale=g), UnitNorm())                     lengths 1, attention's scale 1: Henry

    Papers: Henry et al. (2020), Dehghani et al. (2023). References: transformers' Qwen3Attention and
    Olmo2Attention.

    Args:
        q_norm: of the queries.
        k_norm: of the keys.
        over: "head", when the norms act on the last axis of (B, heads, T, Dh), or "width", when they act on
            that of (B, T, heads · Dh).

    Raises:
        ValueError: `over` is neither.

    Book: qk-norm
    """

    def __init__(self, q_norm: nn.Module, k_norm: nn.Module, *, over: str = "head") -> None:
        super().__init__()
        if over not in ("head", "width"):
            raise ValueError(f"over: expected 'head' or 'width', got {over!r}")
        self.q_norm, self.k_norm, self.over = q_norm, k_norm, over

    def forward(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Normalise queries (B, H, T, Dh) and keys (B, K, S, Dh)."""
        return self.queries(q), self.keys(k)

    def queries(self, q: Tensor) -> Tensor:
        """Normalise queries (B, H, T, Dh)."""
        return self._normalise(self.q_norm, q)

    def keys(self, k: Tensor) -> Tensor:
        """Normalise keys (B, K, S, Dh)."""
        return self._normalise(self.k_norm, k)

    def _normalise(self, norm: nn.Module, x: Tensor) -> Tensor:
        if self.over == "head":
            return norm(x)
        heads, Dh = x.size(1), x.size(3)
        together = x.transpose(1, 2).flatten(2)  # (B, T, heads · Dh)
        return norm(together).unflatten(-1, (heads, Dh)).transpose(1, 2)

    def extra_repr(self) -> str:
        return f"over={self.over!r}"


def layer_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, *, norm_eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    r"""The gradients of LayerNorm, written out.

    With $\hat x = (x - \mu) / \sqrt{\sigma^2 + \varepsilon}$, $g = \mathtt{grad} \odot \gamma$ and means
    over the last axis,

    $$\nabla_x = \frac{g - \overline{g} - \hat x\, \overline{g \odot \hat x}}{\sqrt{\sigma^2 + \varepsilon}},
      \qquad \nabla_\gamma = \sum \mathtt{grad} \odot \hat x, \quad \nabla_\beta = \sum \mathtt{grad}.$$

    Args:
        grad: (…, D), the gradient at the output.
        x: (…, D), the input.
        weight: (D,), γ.
        norm_eps: ε.

    Returns:
        The gradients of x (…, D), γ (D,) and β (D,), in their dtypes; computed in float32 at least.

    Raises:
        ValueError: widths or shapes differ.

    Book: norm-backward
    """
    _expect_gradient(grad, x, weight)
    wide, grad_wide = _widen(x), _widen(grad)
    variance, mean = torch.var_mean(wide, -1, correction=0, keepdim=True)
    inverse = (variance + norm_eps).rsqrt()  # (…, 1)
    normed = (wide - mean) * inverse
    g = grad_wide * weight.to(wide.dtype)
    grad_x = inverse * (g - g.mean(-1, keepdim=True) - normed * (g * normed).mean(-1, keepdim=True))
    leading = list(range(x.dim() - 1))
    grad_weight, grad_bias = grad_wide * normed, grad_wide
    if leading:
        grad_weight, grad_bias = grad_weight.sum(leading), grad_bias.sum(leading)
    return grad_x.to(x.dtype), grad_weight.to(weight.dtype), grad_bias.to(weight.dtype)


def rms_norm_backward(grad: Tensor, x: Tensor, weight: Tensor, *, norm_eps: float) -> tuple[Tensor, Tensor]:
    r"""The gradients of RMSNorm, written out.

    With $\hat x = x / \sqrt{\overline{x^2} + \varepsilon}$, $g = \mathtt{grad} \odot \gamma$ and means over
    the last axis,

    $$\nabla_x = \frac{g - \hat x\, \overline{g \odot \hat x}}{\sqrt{\overline{x^2} + \varepsilon}},
      \qquad \nabla_\gamma = \sum \mathtt{grad} \odot \hat x.$$

    Args:
        grad: (…, D), the gradient at the output.
        x: (…, D), the input.
        weight: (D,), γ.
        norm_eps: ε.

    Returns:
        The gradients of x (…, D) and γ (D,), in their dtypes; computed in float32 at least.

    Raises:
        ValueError: widths or shapes differ.

    Book: norm-backward
    """
    _expect_gradient(grad, x, weight)
    wide, grad_wide = _widen(x), _widen(grad)
    inverse = (wide.square().mean(-1, keepdim=True) + norm_eps).rsqrt()  # (…, 1)
    normed = wide * inverse
    g = grad_wide * weight.to(wide.dtype)
    grad_x = inverse * (g - normed * (g * normed).mean(-1, keepdim=True))
    grad_weight = grad_wide * normed
    if x.dim() > 1:
        grad_weight = grad_weight.flatten(0, -2).sum(0)
    return grad_x.to(x.dtype), grad_weight.to(weight.dtype)


def _widen(x: Tensor) -> Tensor:
    """In float32 at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _over_rms(x: Tensor, norm_eps: float) -> Tensor:
    """x over its root mean square, in float32 at least."""
    wide = _widen(x)
    return wide * (wide.square().mean(-1, keepdim=True) + norm_eps).rsqrt()


def _scale_channels(x: Tensor, scale: Tensor, shift: Tensor, *, shift_first: bool = False) -> Tensor:
    """Scale and shift (B, C, …) by channel, in the dtype of x."""
    shape = (1, -1, *[1] * (x.dim() - 2))
    scale, shift = scale.to(x.dtype).view(shape), shift.to(x.dtype).view(shape)
    return (x + shift) * scale if shift_first else x * scale + shift


def _expect_sizes(norm_eps: float, **sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name}: expected at least 1, got {size}")
    if not norm_eps >= 0:
        raise ValueError(f"norm_eps: expected a number that is not negative, got {norm_eps}")


def _expect_width(x: Tensor, weight: Tensor) -> None:
    if x.dim() < 1 or x.shape[-1] != weight.shape[0]:
        raise ValueError(f"x: expected shape (…, D) with D = {weight.shape[0]}, got {tuple(x.shape)}")


def _expect_channels(x: Tensor, weight: Tensor) -> None:
    if x.dim() < 2 or x.shape[1] != weight.shape[0]:
        raise ValueError(f"x: expected shape (B, C, …) with C = {weight.shape[0]}, got {tuple(x.shape)}")


def _expect_gradient(grad: Tensor, x: Tensor, weight: Tensor) -> None:
    _expect_width(x, weight)
    if grad.shape != x.shape:
        raise ValueError(f"grad: expected shape {tuple(x.shape)}, as x has, got {tuple(grad.shape)}")
