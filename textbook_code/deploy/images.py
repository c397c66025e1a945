"""Picture files as the 32 × 32 × 3 bytes that every runtime reads.

In this file: `read` decodes a file that may be anything into rgb bytes, `fit` makes a square of 32 × 32 of
them in integers, and `load` does both. The demo in the book's page has the same rule in JavaScript, so that a
picture gives the same bytes there. Decoding is Pillow's; it needs the `deploy` extra.

Book: deploy-images
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from textbook_code.extras import require

SIDE = 32
FORMATS = ("PNG", "JPEG", "MPO", "GIF", "WEBP", "BMP", "TIFF", "PPM", "AVIF")
"""What is read. Formats that Pillow hands to another program, such as EPS, are not among them."""
MAX_PIXELS = 40_000_000
"""Larger pictures are refused before they are unpacked: a few kilobytes can claim to be gigabytes."""

_ORIENTATION = 0x0112  # the tag of EXIF
_SIXTEEN_BITS = {"I;16", "I;16L", "I;16B", "I;16N"}
_CONVERTIBLE = {"1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "LAB", "HSV"}


class PictureError(ValueError):
    """A file that is no picture we read: the message names the file and says why.

    Book: deploy-images
    """


def load(
    path: str | Path, *, background: Sequence[int] = (255, 255, 255), frame: int | None = None
) -> np.ndarray:
    """A picture file as the models read it: `fit(read(path))`.

    Returns:
        uint8, (32, 32, 3).

    Raises:
        PictureError: see `read`.

    Book: deploy-images
    """
    return fit(read(path, background=background, frame=frame))


def read(
    path: str | Path, *, background: Sequence[int] = (255, 255, 255), frame: int | None = None
) -> np.ndarray:
    """The pixels of a picture file, upright, opaque, in rgb.

    A camera's note on how it was held (EXIF) is obeyed. Transparent pixels are laid on the background. Grey
    of 16 bits is scaled to 8, and not cut off. An animation has no single picture, so it is refused
    unless a frame is asked for.

    Args:
        path: PNG, JPEG, GIF, WebP, BMP, TIFF, PPM or AVIF.
        background: the rgb that shows through where the picture is transparent.
        frame: which picture of an animation or of a file of several pages, from 0.

    Returns:
        uint8, (height, width, 3).

    Raises:
        PictureError: there is no such file, it is empty, no picture, damaged or cut short, animated, of
            more than `MAX_PIXELS`, or of a kind of pixel that has no plain meaning as rgb.
        ValueError: the background is not three bytes, or the frame is negative.

    Book: deploy-images
    """
    path = Path(path)
    if len(background) != 3 or not all(isinstance(c, int) and 0 <= c <= 255 for c in background):
        raise ValueError(f"background: expected three numbers of 0 to 255, got {background!r}")
    if frame is not None and frame < 0:
        raise ValueError(f"frame: expected a number from 0, got {frame}")
    if not path.is_file():
        kind = "a folder" if path.is_dir() else "nothing"
        raise PictureError(f"{path}: expected a picture file, found {kind} there")
    if path.stat().st_size == 0:
        raise PictureError(f"{path}: the file is empty, 0 bytes")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on odd metadata and on size, which is checked here
        return _decode(path, background, frame)


def _decode(path: Path, background: Sequence[int], frame: int | None) -> np.ndarray:
    Image = require("PIL.Image", extra="deploy")
    Image.init()
    try:
        picture = Image.open(path, formats=[name for name in FORMATS if name in Image.OPEN])
    except Image.DecompressionBombError as error:
        raise PictureError(f"{path}: expected at most {MAX_PIXELS:,} pixels ({error})") from error
    except Image.UnidentifiedImageError as error:
        raise PictureError(f"{path}: not a picture of a kind read here ({', '.join(FORMATS)})") from error
    except PermissionError as error:
        raise PictureError(f"{path}: cannot be read: {error.strerror}") from error
    except Exception as error:  # a decoder meets damage in many ways
        raise PictureError(f"{path}: damaged or cut short: {error}") from error
    with picture:
        try:
            _choose(picture, path, frame)
            width, height = picture.size
            if width * height > MAX_PIXELS:
                raise PictureError(f"{path}: {width:,} × {height:,} pixels, expected at most {MAX_PIXELS:,}")
            picture.load()
            pixels = _rgb(picture, path, np.array(background))
        except PictureError:
            raise
        except Exception as error:
            raise PictureError(f"{path}: damaged or cut short: {error}") from error
        return _upright(pixels, _held(picture))


def _choose(picture: Any, path: Path, frame: int | None) -> None:
    """Go to the frame asked for; a file of several needs one to be named."""
    # The further pictures of an MPO are previews or a second eye, and phones write them unasked.
    frames = 1 if picture.format == "MPO" else getattr(picture, "n_frames", 1)
    if frame is None and frames > 1:
        raise PictureError(f"{path}: holds {frames} pictures; say which one, from frame 0")
    if frame is not None and frame >= frames:
        raise PictureError(f"{path}: has no frame {frame}, only {frames} from 0")
    if frame and frames > 1:
        picture.seek(frame)


def _rgb(picture: Any, path: Path, background: np.ndarray) -> np.ndarray:
    """The decoded picture as rgb bytes, transparency laid on the background, half rounded up."""
    if picture.mode in _SIXTEEN_BITS:  # Pillow's own conversion would clip at 255
        deep = np.asarray(picture).astype(np.int64)
        grey = np.repeat(((2 * 255 * deep + 65_535) // (2 * 65_535))[..., None], 3, axis=2)
        hole = picture.info.get("transparency")
        return np.where((deep == hole)[..., None], background, grey).astype(np.uint8)
    if picture.mode not in _CONVERTIBLE:
        raise PictureError(f"{path}: pixels of mode {picture.mode!r} have no plain meaning as rgb")
    if not (picture.has_transparency_data or picture.mode in ("La", "RGBa")):
        return np.array(picture.convert("RGB"), dtype=np.uint8)
    rgba = np.asarray(picture.convert("RGBA")).astype(np.int64)
    alpha = rgba[..., 3:]
    return ((rgba[..., :3] * alpha + background * (255 - alpha) + 127) // 255).astype(np.uint8)


def _held(picture: Any) -> int:
    """How the camera was held, 1 for upright; what cannot be read counts as upright, as in browsers."""
    with contextlib.suppress(Exception):
        return int(picture.getexif().get(_ORIENTATION, 1))
    return 1


def _upright(pixels: np.ndarray, held: int) -> np.ndarray:
    """Undo one of EXIF's eight ways to hold a camera; an unknown one is left alone."""
    if held in (5, 6, 7, 8):
        pixels = pixels.transpose(1, 0, 2)
    if held in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if held in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(pixels)


def fit(pixels: np.ndarray, side: int = SIDE) -> np.ndarray:
    r"""The middle square of a picture, brought to side × side by the mean of what each pixel covers.

    With $n$ the shorter side, output pixel $i$ covers the $n$ units from $n i$ on where a source pixel is
    `side` units wide; $w_{ik}$ is the overlap with source pixel $k$, an integer, and

    $$\mathrm{out}_{ij} = \Big\lfloor \tfrac{1}{n^2} \sum_{kl} w_{ik} w_{jl} p_{kl} + \tfrac12 \Big\rfloor .$$

    A picture of the wanted size is returned as it is.

    Args:
        pixels: uint8, (height, width, 3).

    Returns:
        uint8, (side, side, 3).

    Raises:
        TypeError: not bytes.
        ValueError: another shape, or no pixel.

    Book: deploy-images
    """
    pixels = np.asarray(pixels)
    if pixels.dtype != np.uint8:
        raise TypeError(f"pixels: expected dtype uint8, got {pixels.dtype}")
    if pixels.ndim != 3 or pixels.shape[2] != 3 or 0 in pixels.shape:
        raise ValueError(f"pixels: expected shape (height, width, 3), got {pixels.shape}")
    if pixels.shape[:2] == (side, side):
        return pixels.copy()
    height, width = pixels.shape[:2]
    n = min(height, width)
    top, left = (height - n) // 2, (width - n) // 2
    square = pixels[top : top + n, left : left + n]
    rows = _cover(square, n, side)  # (side, n, 3), sums of n units
    both = _cover(rows.transpose(1, 0, 2), n, side).transpose(1, 0, 2)
    return ((2 * both + n * n) // (2 * n * n)).astype(np.uint8)


def _cover(lines: np.ndarray, n: int, side: int) -> np.ndarray:
    """Sum (n, a, b) lines into (side, a, b) by their overlap, exactly.

    The running sum up to unit u is that of the whole lines before it
    and the share of the line that has begun; its differences are wanted.
    """
    total = np.zeros((n + 1, *lines.shape[1:]), np.int64)
    np.cumsum(lines, axis=0, dtype=np.int64, out=total[1:])
    whole, units = np.divmod(n * np.arange(side + 1), side)
    begun = lines[np.minimum(whole, n - 1)].astype(np.int64)
    upto = side * total[whole] + units[:, None, None] * begun
    return np.diff(upto, axis=0)
