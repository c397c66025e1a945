"""Picture files as bytes: the rule of resizing against a plain reference, and every odd kind of file."""

from __future__ import annotations

import struct
import zlib
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from textbook_code.deploy import images
from textbook_code.deploy.images import PictureError, fit, load, read

Image = pytest.importorskip("PIL.Image")


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def save(array: np.ndarray, path: Path, **options: object) -> Path:
    Image.fromarray(array).save(path, **options)
    return path


# ---------------------------------------------------------------- fit


def slowly(pixels: np.ndarray, side: int) -> np.ndarray:
    """The mean of what each output pixel covers, in fractions, half rounded up."""
    h, w = pixels.shape[:2]
    n = min(h, w)
    top, left = (h - n) // 2, (w - n) // 2
    out = np.empty((side, side, 3), np.uint8)
    share = [
        [max(Fraction(0), min(Fraction((i + 1) * n, side), k + 1) - max(Fraction(i * n, side), k))
         for k in range(n)]
        for i in range(side)
    ]  # fmt: skip
    for i in range(side):
        for j in range(side):
            for c in range(3):
                total = sum(
                    (share[i][k] * share[j][m] * int(pixels[top + k, left + m, c])
                    for k in range(n) if share[i][k] for m in range(n) if share[j][m]),
                    Fraction(0),
                )  # fmt: skip
                out[i, j, c] = int(total * Fraction(side * side, n * n) + Fraction(1, 2))
    return out


@settings(max_examples=40, deadline=None)
@given(h=st.integers(1, 23), w=st.integers(1, 23), side=st.integers(1, 9), seed=st.integers(0, 99))
def test_fit_is_the_mean_of_what_a_pixel_covers(h: int, w: int, side: int, seed: int) -> None:
    pixels = noise(h, w, seed)
    if (h, w) == (side, side):
        assert np.array_equal(fit(pixels, side), pixels)
    else:
        assert np.array_equal(fit(pixels, side), slowly(pixels, side))


@settings(max_examples=30, deadline=None)
@given(h=st.integers(1, 200), w=st.integers(1, 200), value=st.integers(0, 255))
def test_one_colour_stays_that_colour(h: int, w: int, value: int) -> None:
    assert (fit(np.full((h, w, 3), value, np.uint8)) == value).all()


def test_fit_turns_with_the_picture() -> None:
    """Where the square lies exactly in the middle, nothing distinguishes a side."""
    pixels = noise(51, 75)
    for turn in range(4):
        assert np.array_equal(np.rot90(fit(pixels), turn), fit(np.rot90(pixels, turn)))
    assert np.array_equal(fit(pixels)[:, ::-1], fit(pixels[:, ::-1]))


def test_an_odd_pixel_is_cut_on_the_right_and_below() -> None:
    pixels = noise(32, 35)
    assert np.array_equal(fit(pixels), pixels[:, 1:33])
    pixels = noise(33, 32)
    assert np.array_equal(fit(pixels), pixels[:32])


def test_half_is_rounded_up() -> None:
    pixels = np.zeros((64, 64, 3), np.uint8)
    pixels[::2, ::2] = 2  # the mean of four is 1/2
    assert (fit(pixels) == 1).all()


def test_the_right_size_is_a_copy() -> None:
    pixels = noise(32, 32)
    out = fit(pixels)
    out[:] = 0
    assert pixels.any()


def test_a_large_picture_does_not_overflow() -> None:
    assert (fit(np.full((3000, 2999, 3), 255, np.uint8)) == 255).all()


def test_fit_refuses_what_is_no_picture() -> None:
    with pytest.raises(TypeError, match="pixels: expected dtype uint8, got float64"):
        fit(np.zeros((32, 32, 3)))
    for shape in ((32, 32), (32, 32, 4), (0, 5, 3), (2, 32, 32, 3)):
        with pytest.raises(ValueError, match=r"pixels: expected shape \(height, width, 3\), got"):
            fit(np.zeros(shape, np.uint8))


# ---------------------------------------------------------------- read


@pytest.mark.parametrize("kind", ["png", "bmp", "tiff", "ppm", "webp"])
def test_lossless_files_give_their_pixels(kind: str, tmp_path: Path) -> None:
    pixels = noise(32, 32)
    options = {"lossless": True} if kind == "webp" else {}
    path = save(pixels, tmp_path / f"x.{kind}", **options)
    assert np.array_equal(load(path), pixels)
    assert np.array_equal(read(save(noise(20, 30), path, **options)), noise(20, 30))


@pytest.mark.parametrize("kind", ["jpeg", "avif"])
def test_lossy_files_come_near(kind: str, tmp_path: Path) -> None:
    smooth = np.broadcast_to(np.arange(32)[:, None, None] * np.array([8, 4, 2]), (32, 32, 3)).astype(np.uint8)
    path = save(smooth, tmp_path / f"x.{kind}", quality=95)
    assert np.abs(load(path).astype(int) - smooth).mean() < 6


def test_the_content_decides_and_not_the_name(tmp_path: Path) -> None:
    path = save(noise(9, 9), tmp_path / "x.png")
    assert np.array_equal(read(path.rename(tmp_path / "x.jpg")), noise(9, 9))


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr"])
def test_opaque_modes_become_rgb(mode: str, tmp_path: Path) -> None:
    picture = Image.fromarray(noise(16, 16)).convert(mode)
    path = tmp_path / ("x.jpg" if mode == "YCbCr" else "x.tiff")
    picture.save(path)
    got, expected = read(path), np.asarray(picture.convert("RGB"))
    assert got.shape == (16, 16, 3)
    assert mode == "YCbCr" or np.array_equal(got, expected)


def test_grey_of_sixteen_bits_is_scaled_and_not_cut_off(tmp_path: Path) -> None:
    deep = np.array([[0, 128, 129, 255], [256, 32767, 32768, 65535]], np.uint16)
    expected = [[0, 0, 1, 1], [1, 127, 128, 255]]
    for kind in ("png", "tiff"):
        got = read(save(deep, tmp_path / f"x.{kind}"))
        assert got.shape == (2, 4, 3)
        assert (got == got[..., :1]).all() and got[..., 0].tolist() == expected


def test_transparency_is_laid_on_the_background(tmp_path: Path) -> None:
    rgba = np.zeros((1, 3, 4), np.uint8)
    rgba[0] = [[200, 100, 0, 255], [200, 100, 0, 0], [201, 100, 0, 128]]
    path = save(rgba, tmp_path / "x.png")
    assert read(path).tolist() == [[[200, 100, 0], [255, 255, 255], [228, 177, 127]]]
    green = read(path, background=(0, 255, 0))
    assert green.tolist() == [[[200, 100, 0], [0, 255, 0], [101, 177, 0]]]
    pair = np.array([[[10, 0], [10, 255]]], np.uint8)
    Image.fromarray(pair).save(path)  # LA
    assert read(path).tolist() == [[[255] * 3, [10] * 3]]


def test_a_transparent_colour_of_a_palette(tmp_path: Path) -> None:
    picture = Image.new("P", (2, 1))
    picture.putpalette([0, 0, 255, 255, 0, 0])
    picture.putdata([0, 1])
    picture.save(tmp_path / "x.gif", transparency=0)
    assert read(tmp_path / "x.gif").tolist() == [[[255, 255, 255], [255, 0, 0]]]
    picture.save(tmp_path / "x.png", transparency=bytes([128, 255]))
    assert read(tmp_path / "x.png").tolist() == [[[127, 127, 255], [255, 0, 0]]]
    Image.fromarray(np.array([[7, 300]], np.uint16)).save(tmp_path / "deep.png", transparency=7)
    assert read(tmp_path / "deep.png", background=(1, 2, 3))[0].tolist() == [[1, 2, 3], [1, 1, 1]]


@pytest.mark.parametrize("kind", ["jpeg", "png", "tiff", "webp"])
@pytest.mark.parametrize("held", range(1, 9))
def test_a_camera_held_any_way_gives_one_picture(held: int, kind: str, tmp_path: Path) -> None:
    """Each file is the same scene; the reference is Pillow's own transposition."""
    from PIL import ImageOps

    blocks = np.zeros((16, 24, 3), np.uint8)
    blocks[:8, :8], blocks[8:, :8], blocks[:8, 16:] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    exif = Image.Exif()
    exif[0x0112] = held
    path = tmp_path / f"x.{kind}"
    options = {"lossless": True} if kind == "webp" else {"quality": 95} if kind == "jpeg" else {}
    Image.fromarray(blocks).save(path, exif=exif, **options)
    with Image.open(path) as picture:
        expected = np.asarray(ImageOps.exif_transpose(picture).convert("RGB"))
    got = read(path)
    assert np.array_equal(got, expected)
    assert got.shape == ((24, 16, 3) if held > 4 else (16, 24, 3))
    corners = {1: (0, 0), 2: (0, -1), 3: (-1, -1), 4: (-1, 0), 5: (0, 0), 6: (0, -1), 7: (-1, -1), 8: (-1, 0)}
    red = got[corners[held]]
    assert red[0] > 200 and red[1] < 60 and red[2] < 60


def test_nonsense_in_exif_is_ignored(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 77
    path = tmp_path / "x.png"
    Image.fromarray(noise(5, 7)).save(path, exif=exif)
    assert np.array_equal(read(path), noise(5, 7))
    Image.fromarray(noise(5, 7)).save(path, exif=b"Exif\0\0not exif at all")
    assert np.array_equal(read(path), noise(5, 7))


# ---------------------------------------------------------------- files that are refused, or need a word more


@pytest.mark.parametrize("kind", ["gif", "png", "webp", "tiff"])
def test_an_animation_needs_a_frame(kind: str, tmp_path: Path) -> None:
    frames = [Image.fromarray(np.full((8, 8, 3), v, np.uint8)) for v in (0, 100, 255)]
    path = tmp_path / f"x.{kind}"
    options = {"lossless": True} if kind == "webp" else {}
    frames[0].save(path, save_all=True, append_images=frames[1:], **options)
    with pytest.raises(PictureError, match=r"x\.\w+: holds 3 pictures; say which one, from frame 0"):
        read(path)
    for frame, value in enumerate((0, 100, 255)):
        assert (read(path, frame=frame) == value).all()
    with pytest.raises(PictureError, match="has no frame 3, only 3 from 0"):
        read(path, frame=3)


def test_the_second_picture_of_a_phone_is_passed_over(tmp_path: Path) -> None:
    first, second = (Image.fromarray(np.full((8, 8, 3), v, np.uint8)) for v in (9, 200))
    path = tmp_path / "x.jpg"
    first.save(path, format="MPO", save_all=True, append_images=[second])
    assert abs(int(read(path).mean()) - 9) < 3


def test_frame_zero_of_a_still_is_the_still(tmp_path: Path) -> None:
    path = save(noise(4, 4), tmp_path / "x.png")
    assert np.array_equal(read(path, frame=0), noise(4, 4))
    with pytest.raises(PictureError, match="has no frame 1, only 1 from 0"):
        read(path, frame=1)


@pytest.mark.parametrize("kind", ["png", "jpeg", "gif", "bmp", "webp", "avif"])
def test_a_file_cut_short_is_refused_by_name(kind: str, tmp_path: Path) -> None:
    path = save(noise(64, 64), tmp_path / f"cut.{kind}")
    whole = path.read_bytes()
    for share in (0.02, 0.3, 0.6, 0.9):
        path.write_bytes(whole[: int(share * len(whole))])
        with pytest.raises(PictureError, match=r"cut\.\w+: (damaged|not a picture)"):
            read(path)


def test_files_that_are_no_picture(tmp_path: Path) -> None:
    path = tmp_path / "x.png"
    with pytest.raises(PictureError, match=r"x\.png: expected a picture file, found nothing there"):
        read(path)
    with pytest.raises(PictureError, match="found a folder there"):
        read(tmp_path)
    path.write_bytes(b"")
    with pytest.raises(PictureError, match=r"x\.png: the file is empty, 0 bytes"):
        read(path)
    for content in (
        b"no picture at all, a text",
        b"\0" * 100,
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
    ):
        path.write_bytes(content)
        with pytest.raises(PictureError, match=r"x\.png: not a picture of a kind read here \(PNG, JPEG"):
            read(path)


@settings(max_examples=60, deadline=None)
@given(at=st.integers(8, 400), value=st.integers(0, 255))
def test_a_damaged_byte_gives_a_picture_or_a_named_error(
    at: int, value: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("damaged") / "x.png"
    content = bytearray(save(noise(12, 12), path).read_bytes())
    content[at % len(content)] = value
    path.write_bytes(content)
    try:
        assert read(path).dtype == np.uint8
    except PictureError as error:
        assert "x.png" in str(error)


def test_a_bomb_is_not_unpacked(tmp_path: Path) -> None:
    """A header that claims 60,000 × 60,000 pixels in a file of a hundred bytes."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        body = kind + content
        return struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))

    for side, said in ((60_000, "at most 40,000,000 pixels"), (8000, "64,000,000|8,000 × 8,000 pixels")):
        header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
        content = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header)
        content += chunk(b"IDAT", zlib.compress(b"\0" * 99)) + chunk(b"IEND", b"")
        path = tmp_path / "bomb.png"
        path.write_bytes(content)
        with pytest.raises(PictureError, match=said):
            read(path)


def test_numbers_that_are_no_colours_are_refused(tmp_path: Path) -> None:
    for dtype in (np.float32, np.int32):
        path = save(np.ones((4, 4), dtype), tmp_path / "x.tiff")
        with pytest.raises(
            PictureError, match=r"x\.tiff: pixels of mode '[FI]' have no plain meaning as rgb"
        ):
            read(path)


def test_bad_arguments(tmp_path: Path) -> None:
    path = save(noise(4, 4), tmp_path / "x.png")
    for background in ((1, 2), (1, 2, 256), (0.5, 0, 0)):
        with pytest.raises(ValueError, match="background: expected three numbers of 0 to 255"):
            read(path, background=background)
    with pytest.raises(ValueError, match="frame: expected a number from 0, got -1"):
        read(path, frame=-1)


def test_pillow_is_asked_for_by_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(module: str, *, extra: str) -> None:
        raise ImportError(f'{module} is missing: pip install "textbook_code[{extra}]"')

    path = save(noise(4, 4), tmp_path / "x.png")
    monkeypatch.setattr(images, "require", missing)
    with pytest.raises(ImportError, match=r"textbook_code\[deploy\]"):
        read(path)
