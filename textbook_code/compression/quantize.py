"""Numbers as small integers: affine maps, the ranges they are chosen from, and training with the rounding in.

In this file: `Affine`, a scale and a zero point and what they map; the observers that watch a tensor and give
the range to cover; `fake_quantize`, rounding with a gradient; and `QuantisationAware`, a folded tiny vision
transformer that is computed with the rounding of every tensor that its int8 form will have.

A number x is held as the integer q = round(x / s) + z, with the scale s and the zero point z, and stands for
s (q − z). Papers: Jacob et al. (2018); Krishnamoorthi (2018). Reference: torch.ao.quantization's observers
and torch's fake_quantize functions.

Book: quantize-affine
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from textbook_code.layers.checks import expect_shape
from textbook_code.layers.feed_forward import ACTIVATIONS

SMALLEST_SCALE = torch.finfo(torch.float32).eps
"""Of a tensor that is zero everywhere, which no scale fits better than another."""


class _Rounded(torch.autograd.Function):
    """Round to the grid and back; the gradient passes where the number was inside the range."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, zero: Tensor, low: int, high: int) -> Tensor:
        q = (x * (1 / scale)).round_().add_(zero)
        ctx.save_for_backward((q >= low) & (q <= high))
        return q.clamp_(low, high).sub_(zero).mul_(scale)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        (inside,) = ctx.saved_tensors
        return grad_outputs[0] * inside, None, None, None, None


@dataclass(frozen=True, eq=False)  # tensors do not compare as a whole
class Affine:
    r"""The map between numbers and integers of a few bits.

    $$q = \mathrm{clamp}\big(\lfloor x / s \rceil + z,\; q_{\min},\; q_{\max}\big), \qquad
      \hat x = s\, (q - z)$$

    Since z is an integer, 0 has an integer of its own: padding, ReLU and skipped terms are exact.

    Args:
        scale: s, a single number, or one for each index along `axis`.
        zero: z, as many, holding integers.
        low, high: the smallest and the largest integer.
        axis: of the channels; None where one map serves the whole tensor.

    Raises:
        ValueError: a scale is not positive, or a zero point is no integer between low and high.

    Book: quantize-affine
    """

    scale: Tensor
    zero: Tensor
    low: int = -128
    high: int = 127
    axis: int | None = None

    def __post_init__(self) -> None:
        if self.scale.shape != self.zero.shape or (self.axis is None) != (self.scale.dim() == 0):
            raise ValueError(
                f"scale, zero: expected one of each, or as many with an axis, got {tuple(self.scale.shape)} "
                f"and {tuple(self.zero.shape)} with axis {self.axis}"
            )
        if not bool((self.scale > 0).all()) or not bool(self.scale.isfinite().all()):
            raise ValueError(f"scale: expected positive numbers, got {self.scale.min().item()}")
        whole = self.zero == self.zero.round()
        if not bool((whole & (self.zero >= self.low) & (self.zero <= self.high)).all()):
            raise ValueError(f"zero: expected integers from {self.low} to {self.high}, got {self.zero}")

    @classmethod
    def of_range(
        cls,
        minimum: Tensor,
        maximum: Tensor,
        *,
        symmetric: bool = False,
        narrow: bool = False,
        bits: int = 8,
        axis: int | None = None,
    ) -> "Affine":
        r"""The map whose integers cover a range, which is widened to have 0 in it.

        $$s = \frac{\max(x_{\max}, 0) - \min(x_{\min}, 0)}{q_{\max} - q_{\min}}, \qquad
          z = q_{\min} - \lfloor \min(x_{\min}, 0) / s \rceil$$

        and if symmetric, $s = \max(|x_{\min}|, |x_{\max}|) / q_{\max}$ with $z = 0$.

        Args:
            minimum, maximum: single numbers, or one for each channel.
            symmetric: zero point 0, as weights have it.
            narrow: leave out the integer −2^(bits−1), so that the integers are symmetric too.

        Raises:
            ValueError: a minimum above its maximum, one that is not finite, or fewer than 2 bits.

        Book: quantize-affine
        """
        if bits < 2:
            raise ValueError(f"bits: expected at least 2, got {bits}")
        if not bool((minimum <= maximum).all() & minimum.isfinite().all() & maximum.isfinite().all()):
            raise ValueError(f"minimum, maximum: expected finite ranges, got {minimum} to {maximum}")
        high = 2 ** (bits - 1) - 1
        low = -high if narrow else -high - 1
        below, above = minimum.clamp(max=0), maximum.clamp(min=0)
        if symmetric:
            scale = (torch.maximum(-below, above) / high).clamp(min=SMALLEST_SCALE)
            return cls(scale, torch.zeros_like(scale), low, high, axis)
        scale = ((above - below) / (high - low)).clamp(min=SMALLEST_SCALE)
        return cls(scale, (low - (below / scale).round()).clamp(low, high), low, high, axis)

    @classmethod
    def of_weight(cls, weight: Tensor, *, per_channel: bool = True) -> "Affine":
        """The map of a weight as int8 kernels want it: symmetric, narrow, a scale for each output.

        Book: quantize-per-channel
        """
        observer = MinMax(axis=0 if per_channel else None)
        observer.observe(weight.detach())
        return observer.affine(symmetric=True, narrow=True)

    def _along(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and zero point in a shape that broadcasts with `x`."""
        if self.axis is None:
            return self.scale, self.zero
        shape = [1] * x.dim()
        shape[self.axis] = -1
        return self.scale.view(shape), self.zero.view(shape)

    def quantize(self, x: Tensor) -> Tensor:
        """The integers, as int32 (int8 does not hold those of more bits).

        Ties are rounded to even, as torch and NumPy do.

        Book: quantize-affine
        """
        scale, zero = self._along(x)
        return ((x / scale).round() + zero).clamp(self.low, self.high).to(torch.int32)

    def dequantize(self, q: Tensor) -> Tensor:
        """What the integers stand for.

        Book: quantize-affine
        """
        scale, zero = self._along(q)
        return scale * (q - zero)

    def fake(self, x: Tensor) -> Tensor:
        """`fake_quantize` with this map.

        Book: quantize-qat
        """
        scale, zero = self._along(x)
        return fake_quantize(x, scale, zero, low=self.low, high=self.high)


def fake_quantize(x: Tensor, scale: Tensor, zero: Tensor, *, low: int = -128, high: int = 127) -> Tensor:
    r"""Quantise and dequantise, so that a float computation feels the rounding.

    $$\hat x = s\, \big( \mathrm{clamp}(\lfloor x / s \rceil + z) - z \big), \qquad
      \frac{\partial \hat x}{\partial x} := \begin{cases} 1 & q_{\min} \le \lfloor x/s \rceil + z \le q_{\max}
      \\ 0 & \text{otherwise} \end{cases}$$

    The true derivative of rounding is zero wherever it exists. The straight-through estimator takes that of
    the identity instead, and zero where the number was clipped. Paper: Bengio et al. (2013).

    Args:
        x: any shape.
        scale, zero: broadcastable to x; they have no gradient.

    Book: quantize-qat
    """
    out: Tensor = _Rounded.apply(x, scale, zero, low, high)
    return out


# Observers.


class Observer(Protocol):
    """Watches a tensor from call to call and says which range to cover.

    Book: quantize-observers
    """

    def observe(self, x: Tensor) -> None:
        """See the tensor once more."""

    def affine(self, *, symmetric: bool = False, narrow: bool = False) -> Affine:
        """The map that covers the range.

        Raises: RuntimeError when nothing was observed.
        """


class MinMax:
    """The smallest and the largest number ever seen: nothing seen is clipped.

    Args:
        axis: observe each index along it on its own.

    Book: quantize-observers
    """

    def __init__(self, axis: int | None = None) -> None:
        self.axis = axis
        self.minimum: Tensor | None = None
        self.maximum: Tensor | None = None

    def observe(self, x: Tensor) -> None:
        """Widen the range to the tensor's.

        Raises: ValueError when the tensor is empty or has a nan.
        """
        now = _extent(x, self.axis)
        if self.minimum is not None and self.maximum is not None:
            now = self._together((self.minimum, self.maximum), now)
        self.minimum, self.maximum = now

    def _together(self, old: tuple[Tensor, Tensor], new: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return torch.minimum(old[0], new[0]), torch.maximum(old[1], new[1])

    def affine(self, *, symmetric: bool = False, narrow: bool = False) -> Affine:
        """See `Observer.affine`."""
        if self.minimum is None or self.maximum is None:
            raise RuntimeError("affine: nothing has been observed yet")
        return Affine.of_range(self.minimum, self.maximum, symmetric=symmetric, narrow=narrow, axis=self.axis)


class MovingAverage(MinMax):
    r"""A running mean of each call's minimum, and one of its maximum.

    $$m \leftarrow (1 - c)\, m + c \min x$$

    It forgets the ranges of early training. It is the wrong one for a tensor that has a single number a call,
    such as the logit of one picture: its minimum is its maximum, both averages go to the same mean, and the
    range between them closes.

    Args:
        constant: c.
        axis: as in `MinMax`.

    Raises:
        ValueError: the constant is not in (0, 1].

    Book: quantize-observers
    """

    def __init__(self, constant: float = 0.01, axis: int | None = None) -> None:
        super().__init__(axis)
        if not 0 < constant <= 1:
            raise ValueError(f"constant: expected a number in (0, 1], got {constant}")
        self.constant = constant

    def _together(self, old: tuple[Tensor, Tensor], new: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        low, high = (a + self.constant * (b - a) for a, b in zip(old, new, strict=True))
        return low, high


class _Keeping:
    """An observer that has to see all numbers together, and so keeps a sample of them."""

    def __init__(self, keep: int) -> None:
        self.keep = keep
        self._samples: list[Tensor] = []

    def observe(self, x: Tensor) -> None:
        """Keep evenly spaced numbers of the tensor, and its extremes."""
        low, high = _extent(x, None)
        flat = x.detach().flatten()
        step = -(-flat.numel() // self.keep)
        self._samples.append(torch.cat([flat[::step], low[None], high[None]]))

    @property
    def seen(self) -> Tensor:
        """What was kept."""
        if not self._samples:
            raise RuntimeError("affine: nothing has been observed yet")
        return torch.cat(self._samples)


class Percentile(_Keeping):
    """The range that holds a given share of the numbers: outliers are clipped, the rest gets finer steps.

    Args:
        percent: of the numbers that the range holds, half of the others being below it.
        keep: how many numbers of each call are kept.

    Raises:
        ValueError: the percentage is not in (0, 100].

    Book: quantize-observers
    """

    def __init__(self, percent: float = 99.9, *, keep: int = 100_000) -> None:
        super().__init__(keep)
        if not 0 < percent <= 100:
            raise ValueError(f"percent: expected a number in (0, 100], got {percent}")
        self.percent = percent

    def affine(self, *, symmetric: bool = False, narrow: bool = False) -> Affine:
        """See `Observer.affine`."""
        values, outside = self.seen.sort().values, (100 - self.percent) / 200
        last = len(values) - 1
        low, high = values[round(outside * last)], values[round((1 - outside) * last)]
        return Affine.of_range(low, high, symmetric=symmetric, narrow=narrow)


class MeanSquaredError(_Keeping):
    r"""The range that loses least: $\arg\min_{r} \sum (x - \hat x_r)^2$.

    A wide range rounds everything coarsely, a narrow one clips a few numbers badly. Tried are `tries`
    shares r of the full range, down to a quarter of it.

    Args:
        tries: how many ranges are tried.
        keep: how many numbers of each call are kept.

    Book: quantize-observers
    """

    def __init__(self, *, tries: int = 64, keep: int = 100_000) -> None:
        super().__init__(keep)
        self.tries = tries

    def affine(self, *, symmetric: bool = False, narrow: bool = False) -> Affine:
        """See `Observer.affine`."""
        values = self.seen
        best, least = None, float("inf")
        for share in torch.linspace(1, 0.25, self.tries).tolist():
            one = Affine.of_range(
                values.min() * share, values.max() * share, symmetric=symmetric, narrow=narrow
            )
            error = (one.dequantize(one.quantize(values)) - values).square().mean().item()
            if error < least:
                best, least = one, error
        assert best is not None  # seen has at least two numbers
        return best


def _extent(x: Tensor, axis: int | None) -> tuple[Tensor, Tensor]:
    if not x.numel():
        raise ValueError("x: expected numbers to observe, got an empty tensor")
    flat = x.detach().flatten() if axis is None else x.detach().movedim(axis, 0).flatten(1)
    low, high = flat.aminmax(dim=-1)
    if bool(low.isnan().any()):
        raise ValueError("x: expected numbers to observe, got nan")
    return low, high


# Training with the rounding in.


class QuantisationAware(nn.Module):
    r"""A folded tiny vision transformer with the rounding of its int8 form.

    Rounded are exactly the tensors that the int8 model stores: the input at 1/128; patches, positions and
    their sum; q, k, v; scores; attention weights at 1/256 with zero point −128; what the heads bring together
    and its projection; the hidden layer after its activation, and the second linear map; both residual sums;
    the mean; the logit; and every weight, symmetric, with a scale for each output, from −127 to 127.
    Biases are int32 at a thousandth of a step and stay as they are. Ranges are observed on pictures and then
    held; those of weights follow the weights.

    Args:
        model: a `TinyViT` that `fold` returned; it is copied.
        observer: makes what watches each tensor.

    Raises:
        ValueError: the model has BatchNorms or scaled scores left.

    Book: quantize-qat
    """

    def __init__(self, model: nn.Module, *, observer: Callable[[], Observer] = MinMax) -> None:
        super().__init__()
        config: Any = model.config
        if config.norm == "batch" or config.scale_scores:
            raise ValueError("model: expected what fold(model) returns, got a model that is not folded")
        self.model: Any = copy.deepcopy(model)
        self.observer = observer
        zero = torch.zeros((), dtype=next(model.parameters()).dtype)
        self.ranges: dict[str, Affine] = {"input": Affine(zero + 1 / 128, zero)}
        self._softmax = Affine(zero + 1 / 256, zero - 128)
        self._observers: dict[str, Observer] | None = None

    @torch.no_grad()
    def calibrate(self, images: Tensor, *, batch_size: int = 64) -> None:
        """Choose all ranges anew from the float model's tensors on these pictures.

        Ranges fit the weights that they were chosen with: a logit that wants to grow beyond its range has no
        gradient there. So call this again from time to time in a training.

        Args:
            images: (n, C, image_size, image_size), as the model reads them.

        Book: quantize-observers
        """
        config = self.model.config
        expect_shape("calibration", images, "n C H W", C=config.in_channels, H=config.image_size)
        if not len(images):
            raise ValueError("calibration: expected pictures, got none")
        self._observers = {}
        try:
            for batch in images.split(batch_size):
                self(batch)
            found = {name: observer.affine() for name, observer in self._observers.items()}
        finally:
            self._observers = None
        self.ranges = {"input": self.ranges["input"], **found}

    def _at(self, name: str, x: Tensor) -> Tensor:
        """Round a tensor, or only watch it while the ranges are chosen."""
        if self._observers is not None:
            if name != "input":
                self._observers.setdefault(name, self.observer()).observe(x)
            return x
        return self.ranges[name].fake(x)

    def _weight(self, layer: Any) -> Tensor:
        weight: Tensor = layer.weight
        return weight if self._observers is not None else Affine.of_weight(weight).fake(weight)

    def _linear(self, x: Tensor, layer: Any) -> Tensor:
        return F.linear(x, self._weight(layer), layer.bias)

    def _attention(self, name: str, attn: Any, x: Tensor) -> Tensor:
        def head(which: str) -> Tensor:
            layer = getattr(attn, f"{which}_proj")
            y = self._at(f"{name}.{which}", self._linear(x, layer))
            return y.unflatten(-1, (attn.num_heads, -1)).transpose(1, 2)  # (B, H, N, Dh)

        scores = self._at(f"{name}.scores", head("q") @ head("k").mT)  # (B, H, N, N)
        weights = scores.softmax(-1)
        weights = weights if self._observers is not None else self._softmax.fake(weights)
        heads = self._at(f"{name}.heads", weights @ head("v"))
        return self._at(f"{name}.out", self._linear(heads.transpose(1, 2).flatten(2), attn.out_proj))

    def _feed_forward(self, name: str, ffn: Any, x: Tensor) -> Tensor:
        wide = self._linear(x, ffn.fc1)
        if (
            ffn.activation != "relu"
        ):  # a ReLU is part of the clamp, another activation an operation of its own
            wide = self._at(f"{name}.wide", wide)
        hidden = self._at(f"{name}.hidden", ACTIVATIONS[ffn.activation](wide))
        return self._at(f"{name}.out", self._linear(hidden, ffn.fc2))

    def _norm(self, name: str, norm: nn.Module, x: Tensor) -> Tensor:
        """A LayerNorm's result is rounded; what its kernel rounds on the way is not imitated."""
        return x if isinstance(norm, nn.Identity) else self._at(name, norm(x))

    def forward(self, images: Tensor) -> Tensor:
        """As `TinyViT.forward`: (B, C, image_size, image_size) to (B,) logits.

        Raises:
            RuntimeError: no ranges have been chosen; see `calibrate`.

        Book: quantize-qat
        """
        if self._observers is None and "logit" not in self.ranges:
            raise RuntimeError("forward: the ranges are not chosen yet; call calibrate(images)")
        model, patches = self.model, self.model.patch_embed.proj
        x = self._at("input", images)
        x = F.conv2d(x, self._weight(patches), patches.bias, stride=patches.stride)
        x = self._at("patches", x).flatten(2).transpose(1, 2)  # (B, N, D)
        x = self._at("embedded", x + self._at("positions", model.pos_embed))
        for i, block in enumerate(model.blocks):
            name = f"blocks.{i}"
            attended = self._attention(
                f"{name}.attn", block.attn, self._norm(f"{name}.attn_norm", block.attn_norm, x)
            )
            x = self._at(f"{name}.attended", x + attended)
            ffn = self._feed_forward(
                f"{name}.ffn", block.ffn, self._norm(f"{name}.ffn_norm", block.ffn_norm, x)
            )
            x = self._at(name, x + ffn)
        pooled = self._at("pooled", self._norm("final_norm", model.final_norm, x).mean(1))
        return self._at("logit", self._linear(pooled, model.head)).squeeze(-1)

    def finished(self) -> Any:
        """The float model whose weights went through the training: a folded `TinyViT` in eval mode.

        Book: quantize-qat
        """
        return copy.deepcopy(self.model).eval()


def prepare(
    model: nn.Module, calibration: Tensor, *, observer: Callable[[], Observer] = MinMax
) -> QuantisationAware:
    """A folded tiny vision transformer, ready to be trained on with the rounding of int8.

    Args:
        model: a `TinyViT` that `fold` returned; it is not changed.
        calibration: (n, C, image_size, image_size) pictures, as the model reads them, for the ranges.
        observer: makes what chooses a range.

    Raises:
        ValueError: the model is not folded, or there are no pictures.

    Book: quantize-qat
    """
    aware = QuantisationAware(model, observer=observer)
    aware.calibrate(calibration)
    return aware
