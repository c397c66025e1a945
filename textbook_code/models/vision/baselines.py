"""What a tiny vision transformer is measured against: a weighing of pixels, and two convolutional networks.

All three read (B, C, image_size, image_size) as `TinyViT` does and give one logit for each image; each says
how many multiply-accumulate operations that takes.

B batch, C channels.

Book: person-baselines
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from textbook_code.layers.checks import expect_dtype, expect_shape


class Baseline(nn.Module):
    """A network of one logit that knows its sizes.

    Args:
        image_size: height and width of the images, in pixels.
        in_channels: C.

    Raises:
        ValueError: a size below 1.

    Book: person-baselines
    """

    def __init__(self, image_size: int, in_channels: int) -> None:
        super().__init__()
        _expect_positive(image_size=image_size, in_channels=in_channels)
        self.image_size, self.in_channels = image_size, in_channels
        self.body: nn.Module

    def forward(self, images: Tensor) -> Tensor:
        """Give each image one logit; above 0 it says yes.

        Args:
            images: (B, C, image_size, image_size), each value (rgb − 128) / 128.

        Returns:
            (B,) logits.

        Raises:
            TypeError: no tensor, or of another dtype than the weights'.
            ValueError: another shape.

        Book: person-baselines
        """
        expect_shape("images", images, "B C H W", C=self.in_channels, H=self.image_size, W=self.image_size)
        expect_dtype("images", images, next(self.parameters()).dtype)
        return self.body(images).squeeze(-1)

    @property
    def num_parameters(self) -> int:
        """How many numbers are trained.

        Book: person-baselines
        """
        return sum(p.numel() for p in self.parameters())

    @property
    def macs(self) -> int:
        r"""Multiply-accumulate operations for one image, in convolutions and matrices.

        A convolution of k × k with g groups takes $\frac{C}{g} k^2$ for each number that it gives, a matrix
        as many as it has columns. One image is run through to see the sizes; BatchNorm is not counted, since
        it folds into the convolution before it.

        Book: person-baselines
        """
        total = 0

        def count(module: nn.Module, inputs: Any, output: Tensor) -> None:
            nonlocal total
            weight = module.weight
            assert isinstance(weight, Tensor)
            total += output.numel() * weight[0].numel()  # one row, or one kernel, for each output number

        handles = [
            module.register_forward_hook(count)
            for module in self.modules()
            if isinstance(module, nn.Conv2d | nn.Linear)
        ]
        training = self.training
        try:
            weight = next(self.parameters())
            shape = (1, self.in_channels, self.image_size, self.image_size)
            with torch.no_grad():
                self.eval()(torch.zeros(shape, dtype=weight.dtype, device=weight.device))
        finally:
            self.train(training)
            for handle in handles:
                handle.remove()
        return total


class PixelRegression(Baseline):
    r"""Logistic regression on pixels: each has a weight of its own.

    $$z = \sum_i w_i x_i + b$$

    It can learn a colour and a place, and no shape that moves. It starts from 0.

    Args:
        image_size: height and width of the images, in pixels.
        in_channels: C.

    Book: person-baselines
    """

    def __init__(self, image_size: int = 32, in_channels: int = 3) -> None:
        super().__init__(image_size, in_channels)
        linear = nn.Linear(in_channels * image_size**2, 1)
        nn.init.zeros_(linear.weight)
        nn.init.zeros_(linear.bias)
        self.body = nn.Sequential(nn.Flatten(), linear)


class SmallCnn(Baseline):
    """A plain convolutional network: 3 × 3 convolutions, each with BatchNorm and ReLU, an average, one logit.

    The first keeps the size, the second and third halve it, the others keep it. With the widths of the
    default it takes as many multiply-accumulates as the default `TinyViT`, within one in a hundred.

    Args:
        image_size: height and width of the images, in pixels.
        in_channels: C.
        widths: output channels of each convolution.

    Raises:
        ValueError: there is no width, or one below 1.

    Book: person-baselines
    """

    def __init__(
        self, image_size: int = 32, in_channels: int = 3, *, widths: Sequence[int] = (24, 48, 96, 84)
    ) -> None:
        super().__init__(image_size, in_channels)
        if not widths or min(widths) < 1:
            raise ValueError(f"widths: expected one or more channel counts of at least 1, got {widths!r}")
        layers: list[nn.Module] = []
        before = in_channels
        for i, width in enumerate(widths):
            layers += _convolution(before, width, kernel=3, stride=2 if i in (1, 2) else 1)
            before = width
        self.body = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, 1))


_MOBILENET_BLOCKS: tuple[tuple[int, int], ...] = (  # output channels and stride of each pair
    *((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2)),
    *((512, 1),) * 5,
    *((1024, 2), (1024, 1)),
)


class MobileNetV1(Baseline):
    r"""MobileNet: a convolution of k × k in each channel by itself, then one of 1 × 1 across the channels.

    That takes $k^2 + C_\text{out}$ multiplications where a full convolution takes $k^2 C_\text{out}$ for each
    input number. Thirteen such pairs follow a full convolution, each convolution with BatchNorm and ReLU cut
    off at 6. The published network halves the size five times, for images of 224 pixels; of 32 it would
    leave one place, so that the first convolution keeps the size unless told otherwise.
    Paper: Howard et al. (2017). Reference: timm's mobilenetv1.

    Args:
        image_size: height and width of the images, in pixels.
        in_channels: C.
        width: α, by which all channel counts are multiplied; they are rounded to multiples of 8.
        stem_stride: by how much the first convolution shrinks the image; 2 in the paper.

    Raises:
        ValueError: the width is not positive, or the stride below 1.

    Book: person-baselines
    """

    def __init__(
        self, image_size: int = 32, in_channels: int = 3, *, width: float = 0.25, stem_stride: int = 1
    ) -> None:
        super().__init__(image_size, in_channels)
        if not width > 0:
            raise ValueError(f"width: expected a positive number, got {width}")
        _expect_positive(stem_stride=stem_stride)

        def narrow(channels: int) -> int:
            return max(8, round(channels * width / 8) * 8)

        before = narrow(32)
        layers = _convolution(in_channels, before, kernel=3, stride=stem_stride, activation=nn.ReLU6)
        for channels, stride in _MOBILENET_BLOCKS:
            after = narrow(channels)
            layers += _convolution(
                before, before, kernel=3, stride=stride, groups=before, activation=nn.ReLU6
            )
            layers += _convolution(before, after, kernel=1, activation=nn.ReLU6)
            before = after
        self.body = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, 1))


def _convolution(
    before: int,
    after: int,
    *,
    kernel: int,
    stride: int = 1,
    groups: int = 1,
    activation: type[nn.Module] = nn.ReLU,
) -> list[nn.Module]:
    """A convolution without a bias, which the BatchNorm behind it would take away again, and what follows."""
    convolution = nn.Conv2d(
        before, after, kernel, stride=stride, padding=kernel // 2, groups=groups, bias=False
    )
    return [convolution, nn.BatchNorm2d(after), activation()]


def _expect_positive(**sizes: int) -> None:
    for name, value in sizes.items():
        if value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")
