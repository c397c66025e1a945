"""Readers of other people's pictures: a folder of two folders, CIFAR-100, Visual Wake Words.

Book: person-data
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from textbook_code.data.people.pictures import EDGE, SIDE, Pictures
from textbook_code.extras import require

_ENDINGS = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif"}
_PEOPLE = ("baby", "boy", "girl", "man", "woman")
_PEOPLE_CODES = (2, 11, 35, 46, 98)  # the same, where a table has numbers without names
_LEAST = 0.005  # of the picture that a person must fill in Visual Wake Words


def from_folder(folder: str | Path, person: str = "person", other: str = "other") -> Pictures:
    """Read pictures from a folder that holds one folder of people and one of anything else.

    Each picture is turned as its EXIF data say, cut to its middle square and scaled down. Of an animated one
    the first frame is taken. Each is a group of its own.

    Args:
        folder: the folder of the two.
        person, other: the names of the two.

    Raises:
        FileNotFoundError: one of the folders is missing.
        ValueError: one of them holds no picture, or a file is no picture that Pillow can read.

    Book: person-data
    """
    pixels, labels, groups = [], [], []
    for name, label in ((person, True), (other, False)):
        inside = Path(folder) / name
        if not inside.is_dir():
            raise FileNotFoundError(
                f"folder: expected the folders {person} and {other}, and {inside} is none"
            )
        paths = sorted(path for path in inside.iterdir() if path.suffix.lower() in _ENDINGS)
        if not paths:
            raise ValueError(f"folder: {inside} holds no picture ({', '.join(sorted(_ENDINGS))})")
        for path in paths:
            pixels.append(_square(_opened(path), whole=False))
            labels.append(label)
            groups.append(f"{name}/{path.name}")
    return _assemble(pixels, labels, groups, "folder")


def cifar100_people(path_or_name: str | Path = "uoft-cs/cifar100", split: str = "test") -> Pictures:
    """CIFAR-100 with the five classes of its superclass *people* (baby, boy, girl, man, woman) as persons.

    The picture is the middle 32 × 32, untouched; its margin is its own edge, mirrored. Validation is every
    tenth picture of the training split. There are 95 other classes, so that one picture in twenty is a
    person: balanced accuracy is the measure.

    Args:
        path_or_name: a folder of Parquet files, one for each split, or a name on the hub.
        split: "train", "validation" or "test".

    Raises:
        ValueError: there is no such split, or a column is missing.
        ImportError: `datasets` is not installed.

    Book: person-data
    """
    table = _table(path_or_name, split)
    image = _column(table, ("img", "image"), path_or_name)
    label = _column(table, ("fine_label",), path_or_name)
    names = getattr(table.features[label], "names", None)
    wanted = [names.index(name) for name in _PEOPLE] if names else list(_PEOPLE_CODES)
    rows = _places(len(table), split)
    pixels = [_square(table[i][image], whole=True) for i in rows]
    codes = [table[i][label] for i in rows]
    return _assemble(pixels, [code in wanted for code in codes], [f"{split}-{i}" for i in rows], "cifar100")


def visual_wake_words(
    path_or_name: str | Path, split: str = "test", *, person: int | str = "person", limit: int | None = None
) -> Pictures:
    """Visual Wake Words: photographs of COCO, with a person if one fills at least 0.5 % of the picture.

    The table has a column "image" and either the ready-made "label", or "objects" as COCO's detection sets
    have them on the hub: for each picture the lists "bbox" (left, top, width, height in pixels) and
    "category".

    Args:
        path_or_name: a folder of Parquet files, one for each split, or a name on the hub.
        split: "train", "validation" or "test".
        person: the category of a person, by name or by number.
        limit: take only the first so many.

    Raises:
        ValueError: there is no such split, a column is missing, or "objects" has no names for its numbers
            and `person` is a name.
        ImportError: `datasets` is not installed.

    Book: person-data
    """
    table = _table(path_or_name, split)
    image = _column(table, ("image", "img"), path_or_name)
    column = _column(table, ("label", "objects"), path_or_name)
    code = person if column == "label" or isinstance(person, int) else _code(table, person)
    pixels, labels, groups = [], [], []
    for i in _places(len(table), split)[:limit]:
        row = table[i]
        picture = row[image].convert("RGB")
        pixels.append(_square(picture, whole=False))
        labels.append(bool(row[column]) if column == "label" else _fills(row[column], code, picture.size))
        groups.append(f"{split}-{i}")
    return _assemble(pixels, labels, groups, "visual-wake-words")


def _fills(objects: dict[str, Any], code: int | str, size: tuple[int, int]) -> bool:
    """Whether one person's box is large enough."""
    least = _LEAST * size[0] * size[1]
    return any(
        category == code and box[2] * box[3] >= least
        for box, category in zip(objects["bbox"], objects["category"], strict=True)
    )


def _code(table: Any, person: str) -> int:
    feature: Any = table.features["objects"]
    while not isinstance(feature, dict) and hasattr(feature, "feature"):
        feature = feature.feature
    feature = feature["category"] if isinstance(feature, dict) else feature
    names = getattr(getattr(feature, "feature", feature), "names", None)
    if names is None or person not in names:
        raise ValueError(
            f"person: the column objects.category has no name {person!r}; give the category's number"
        )
    return int(names.index(person))


def _table(path_or_name: str | Path, split: str) -> Any:
    """The split of a data set; validation comes out of the training split where there is none."""
    if split not in ("train", "validation", "test"):
        raise ValueError(f"split: expected train, validation or test, got {split!r}")
    datasets = require("datasets", extra="train")
    wanted = "train" if split == "validation" else split
    folder = Path(path_or_name)
    if not folder.is_dir():
        return datasets.load_dataset(str(path_or_name), split=wanted)
    files = sorted(map(str, folder.rglob(f"{wanted}*.parquet")))
    if not files:
        raise ValueError(f"path_or_name: {folder} holds no {wanted}*.parquet")
    return datasets.Dataset.from_parquet(files)


def _places(n: int, split: str) -> list[int]:
    return [i for i in range(n) if split == "test" or (i % 10 == 9) == (split == "validation")]


def _column(table: Any, names: tuple[str, ...], path_or_name: str | Path) -> str:
    for name in names:
        if name in table.column_names:
            return name
    raise ValueError(
        f"{path_or_name}: expected a column {' or '.join(names)}, found {', '.join(table.column_names)}"
    )


def _opened(path: Path) -> Any:
    Image, ImageOps = require("PIL.Image", extra="deploy"), require("PIL.ImageOps", extra="deploy")
    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"{path} is no picture that can be read: {error}") from error


def _square(image: Any, *, whole: bool) -> np.ndarray:
    """(36, 36, 3): the middle square, scaled to fill it, or as a `whole` 32 × 32 with a mirrored margin."""
    Image = require("PIL.Image", extra="deploy")
    image = image.convert("RGB")
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    edge = SIDE if whole else EDGE
    image = image.crop((left, top, left + side, top + side))
    pixels = np.asarray(
        image if image.size == (edge, edge) else image.resize((edge, edge), Image.Resampling.LANCZOS)
    )
    margin = (EDGE - edge) // 2
    return np.pad(pixels, ((margin, margin), (margin, margin), (0, 0)), mode="symmetric")


def _assemble(pixels: list[np.ndarray], labels: list[bool], groups: list[str], source: str) -> Pictures:
    if not pixels:
        raise ValueError(f"{source}: expected at least one picture, got none")
    rgb = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2)
    opaque = torch.full((len(pixels), 1, EDGE, EDGE), 255, dtype=torch.uint8)
    return Pictures(torch.cat([rgb, opaque], 1), torch.tensor(labels), groups, source)
