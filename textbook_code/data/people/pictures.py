"""Pictures with their labels, and the two ways from them to a model: augmented, and as an examination.

Book: person-data
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

SIDE = 32
"""Pixels along an edge of what a model sees."""

EDGE = 36
"""Pixels along an edge of what is stored: two more on every side, for shifts."""

_MARGIN = (EDGE - SIDE) // 2


@dataclass(frozen=True)
class Pictures:
    """Pictures of one source with their labels.

    Attributes:
        pixels: (n, 4, 36, 36) uint8, red, green, blue and opacity; the middle 32 × 32 is the picture. The
            opacity is 255 wherever the picture has a background of its own.
        labels: (n,) bool, True where there is a person.
        groups: what each picture shows, such as a concept or a person; pictures of one group resemble each
            other, and no group is in two splits.
        source: the name of the source.

    Raises:
        TypeError: a tensor of another dtype.
        ValueError: another shape, or numbers of pictures, labels and groups that differ.

    Book: person-data
    """

    pixels: Tensor
    labels: Tensor
    groups: list[str]
    source: str

    def __post_init__(self) -> None:
        for name, x, dtype in (("pixels", self.pixels, torch.uint8), ("labels", self.labels, torch.bool)):
            if not isinstance(x, Tensor) or x.dtype != dtype:
                got = x.dtype if isinstance(x, Tensor) else type(x).__name__
                raise TypeError(f"{name}: expected a tensor of {dtype}, got {got}")
        if self.pixels.dim() != 4 or self.pixels.shape[1:] != (4, EDGE, EDGE):
            raise ValueError(f"pixels: expected shape (n, 4, {EDGE}, {EDGE}), got {tuple(self.pixels.shape)}")
        n = len(self.pixels)
        if self.labels.shape != (n,) or len(self.groups) != n:
            raise ValueError(
                f"expected a label and a group for each of {n} pictures, got labels of shape "
                f"{tuple(self.labels.shape)} and {len(self.groups)} groups"
            )

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: Tensor | slice | Sequence[int]) -> Pictures:
        """The pictures at these places, given as a slice, as integers or as a mask."""
        if isinstance(index, slice):
            places = torch.arange(len(self))[index]
        else:
            places = torch.as_tensor(index)
            if places.dtype == torch.bool:
                if places.shape != (len(self),):
                    raise ValueError(f"index: expected {len(self)} booleans, got {tuple(places.shape)}")
                places = places.nonzero().squeeze(1)
            places = places.long()
        groups = [self.groups[i] for i in places.tolist()]
        return Pictures(self.pixels[places], self.labels[places], groups, self.source)


def combine(*parts: Pictures) -> Pictures:
    """Put pictures of several sources after one another; the source is their names with a plus sign between.

    It is for training on several; what is measured is measured on each source by itself.

    Raises:
        ValueError: there is nothing to combine.

    Book: person-transfer
    """
    if not parts:
        raise ValueError("parts: expected at least one, got none")
    return Pictures(
        torch.cat([part.pixels for part in parts]),
        torch.cat([part.labels for part in parts]),
        [f"{part.source}/{group}" if len(parts) > 1 else group for part in parts for group in part.groups],
        "+".join(part.source for part in parts),
    )


def model_input(images: Tensor) -> Tensor:
    r"""Bytes as the model reads them, $(\mathrm{rgb} - 128) / 128$.

    Args:
        images: (n, 32, 32, 3) uint8, as `examination` gives them.

    Returns:
        (n, 3, 32, 32) float32 between −1 and 127/128.

    Raises:
        TypeError: not uint8.
        ValueError: another shape.

    Book: person-data
    """
    if not isinstance(images, Tensor) or images.dtype != torch.uint8:
        got = images.dtype if isinstance(images, Tensor) else type(images).__name__
        raise TypeError(f"images: expected a tensor of {torch.uint8}, got {got}")
    if images.dim() != 4 or images.size(-1) != 3:
        raise ValueError(f"images: expected shape (n, height, width, 3), got {tuple(images.shape)}")
    return (images.permute(0, 3, 1, 2).float() - 128) / 128


def examination(pictures: Pictures) -> Tensor:
    r"""The fixed pictures that every model and every runtime is examined on.

    The middle of each picture; where it is transparent, one plain colour shows through, which is drawn from a
    checksum of the picture's own bytes. So the same picture gets the same ground in any company. With opacity
    $a$ each channel is $\lfloor (a\,p + (255 - a)\,g + 127) / 255 \rfloor$, in integers, so that no machine
    rounds differently.

    Returns:
        (n, 32, 32, 3) uint8.

    Book: person-data
    """
    grounds = torch.tensor(
        [list(zlib.crc32(p.numpy().tobytes()).to_bytes(4, "big")[:3]) for p in pictures.pixels],
        dtype=torch.int32,
    ).view(-1, 3, 1, 1)
    middle = pictures.pixels[:, :, _MARGIN : _MARGIN + SIDE, _MARGIN : _MARGIN + SIDE].int()
    rgb, opacity = middle[:, :3], middle[:, 3:]
    seen = (rgb * opacity + grounds * (255 - opacity) + 127) // 255
    return seen.to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def augment(
    pictures: Pictures,
    generator: torch.Generator,
    *,
    backgrounds: Tensor | None = None,
    strength: float = 1.0,
) -> Tensor:
    r"""Show each picture as it might have been taken: moved, turned, in another light, on another ground.

    Each is shifted by up to 3 pixels, scaled by 0.8 to 1.2, turned by up to 12°, mirrored half the time; what
    is transparent gets a plain colour, a smooth field of colours or, where `backgrounds` are given, a piece
    of one of them; then brightness, contrast and the weights of the three colours change, one picture in
    eight becomes grey, and noise is added. The label survives all of it.

    Args:
        pictures: what to show.
        generator: every draw comes from it.
        backgrounds: (m, 3, h, w) uint8 with h, w ≥ 32, without a person.
        strength: 1 for the ranges above, 0 for none of it but the ground.

    Returns:
        (n, 3, 32, 32) float32, $(\mathrm{rgb} - 128) / 128$ within [−1, 127/128].

    Raises:
        ValueError: the strength is negative, or the backgrounds are no such tensor.

    Book: person-augment
    """
    if not strength >= 0:
        raise ValueError(f"strength: expected at least 0, got {strength}")
    n = len(pictures)

    def draw(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(n, *shape, generator=generator)

    seen = _moved(pictures.pixels, draw, strength)
    rgb, opacity = seen[:, :3], seen[:, 3:]
    x = rgb + (1 - opacity) * _grounds(n, generator, backgrounds)
    grey = x.mean(1, keepdim=True)
    x = torch.where(draw(0, 1, 1, 1, 1) < 0.125 * min(strength, 1), grey, x)
    contrast = 1 + strength * draw(-0.4, 0.4, 1, 1, 1)
    mean = x.mean((1, 2, 3), keepdim=True)
    x = (x - mean) * contrast + mean + strength * draw(-0.2, 0.2, 1, 1, 1)
    x = x * (1 + strength * draw(-0.12, 0.12, 3, 1, 1))
    noise = torch.randn(n, 3, SIDE, SIDE, generator=generator)
    x = x + strength * draw(0, 0.04, 1, 1, 1) * noise
    return (x * 255 / 128 - 1).clamp(-1, 127 / 128)


def _moved(pixels: Tensor, draw: object, strength: float) -> Tensor:
    """(n, 4, 32, 32) in [0, 1], colours times opacity, each seen through an affine map of its own."""
    n = len(pixels)
    assert callable(draw)
    angle = strength * draw(-0.21, 0.21)
    scale = 1 / (1 + strength * draw(-0.2, 0.2))  # of the window, so that above 1 the picture shrinks
    mirrored = torch.where(draw(0, 1) < 0.5 * min(strength, 1), -1.0, 1.0)
    shift = strength * draw(-3.0, 3.0, 2)  # pixels
    # from a place in the window, −1 to 1, to a place in what is stored
    size = scale * SIDE / EDGE
    theta = torch.zeros(n, 2, 3)
    theta[:, 0, 0] = size * angle.cos() * mirrored
    theta[:, 0, 1] = -size * angle.sin()
    theta[:, 1, 0] = size * angle.sin() * mirrored
    theta[:, 1, 1] = size * angle.cos()
    theta[:, :, 2] = shift * 2 / EDGE
    grid = F.affine_grid(theta, [n, 4, SIDE, SIDE], align_corners=False)
    x = pixels.float() / 255
    x = torch.cat([x[:, :3] * x[:, 3:], x[:, 3:]], 1)
    opaque = pixels[:, 3].flatten(1).amin(1) == 255
    out = F.grid_sample(x, grid, padding_mode="zeros", align_corners=False)
    if opaque.any():  # a photograph goes on beyond its edge, an emoji does not
        out[opaque] = F.grid_sample(x[opaque], grid[opaque], padding_mode="reflection", align_corners=False)
    return out


def _grounds(n: int, generator: torch.Generator, backgrounds: Tensor | None) -> Tensor:
    """(n, 3, 32, 32) in [0, 1]: a third plain, a third smooth, a third cut from `backgrounds`."""
    kind = torch.rand(n, generator=generator)
    plain = torch.rand(n, 3, 1, 1, generator=generator).expand(n, 3, SIDE, SIDE)
    few = torch.rand(n, 3, 3, 3, generator=generator)
    smooth = F.interpolate(few, size=(SIDE, SIDE), mode="bilinear", align_corners=True)
    if backgrounds is None:
        return torch.where(kind.view(-1, 1, 1, 1) < 0.5, plain, smooth)
    if backgrounds.dtype != torch.uint8 or backgrounds.dim() != 4 or backgrounds.size(1) != 3:
        raise ValueError(
            f"backgrounds: expected uint8 (m, 3, h, w), got {backgrounds.dtype} {tuple(backgrounds.shape)}"
        )
    height, width = backgrounds.shape[2:]
    if min(height, width) < SIDE or not len(backgrounds):
        raise ValueError(f"backgrounds: expected m ≥ 1 and h, w ≥ {SIDE}, got {tuple(backgrounds.shape)}")
    which = torch.randint(len(backgrounds), (n,), generator=generator)
    top = torch.randint(height - SIDE + 1, (n,), generator=generator)
    left = torch.randint(width - SIDE + 1, (n,), generator=generator)
    across = torch.arange(SIDE)
    pieces = backgrounds[
        which[:, None, None], :, (top[:, None] + across)[:, :, None], (left[:, None] + across)[:, None]
    ]
    cut = pieces.permute(0, 3, 1, 2).float() / 255
    kind = kind.view(-1, 1, 1, 1)
    return torch.where(kind < 1 / 3, plain, torch.where(kind < 2 / 3, smooth, cut))
