"""The four sources of pictures with and without people, each with its own way to be split.

Book: person-data
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import zipfile
from collections.abc import Callable
from functools import lru_cache
from importlib.resources import files
from typing import Any

import numpy as np
import torch
from torch import Tensor

from textbook_code.data import store
from textbook_code.data.people.pictures import EDGE, SIDE, Pictures
from textbook_code.data.sources import SOURCES as REGISTRY
from textbook_code.data.sources import fetch
from textbook_code.extras import require
from textbook_code.weights import moved_into_place

SOURCES = ("emoji", "pedestrians", "faces", "photographs")
"""What `load` knows, the large clean set first."""

SPLITS = ("train", "validation", "test")

_FONTS = ("google", "twitter")
_RULE = 2  # raised when the same files would give other emoji pictures
_PEOPLE = {
    "family",
    "person",
    "person-activity",
    "person-fantasy",
    "person-gesture",
    "person-resting",
    "person-role",
    "person-sport",
}
_PARTS = {  # of bodies, or too schematic to say
    "body-parts",
    "emotion",
    "hand-fingers-closed",
    "hand-fingers-open",
    "hand-fingers-partial",
    "hand-prop",
    "hand-single-finger",
    "hands",
    "person-symbol",
}
_FIGURES = {  # things with a human figure on them
    "baby_symbol",
    "black_joker",
    "card_index",
    "children_crossing",
    "customs",
    "do_not_litter",
    "dolls",
    "elevator",
    "frame_with_picture",
    "identification_card",
    "mens",
    "moyai",
    "name_badge",
    "nesting_dolls",
    "no_pedestrians",
    "passport_control",
    "performing_arts",
    "potable_water",
    "put_litter_in_its_place",
    "restroom",
    "statue_of_liberty",
    "wc",
    "wheelchair",
    "womens",  # codespell:ignore womens
    "x-ray",
}
_ALIKE = {"alphanum", "arrow", "av-symbol", "currency", "geometric", "keycap", "math", "religion", "zodiac"}
_PERSON_SIGNS = {"1F466", "1F467", "1F468", "1F469", "1F474", "1F475", "1F476", "1F9D1", "1F9D2", "1F9D3"}
_COUPLE = re.compile("couple|kiss|heart|holding")
_TURNS = {"200D", "FE0F", "2640", "2642", "27A1"}  # joiner, emoji form, woman, man, facing right

# (file, left, top, side, person): squares of the photographs that are only examined
_SQUARES: tuple[tuple[str, int, int, int, bool], ...] = (
    ("astronaut.png", 0, 0, 512, True),
    ("astronaut.png", 30, 0, 400, True),
    ("astronaut.png", 80, 0, 290, True),
    ("astronaut.png", 130, 0, 190, True),
    ("astronaut.png", 155, 0, 140, True),
    ("astronaut.png", 40, 90, 380, True),
    ("camera.png", 0, 0, 512, True),
    ("camera.png", 40, 30, 360, True),
    ("camera.png", 0, 60, 450, True),
    ("camera.png", 110, 40, 220, True),
    ("camera.png", 140, 40, 150, True),
    ("camera.png", 20, 90, 400, True),
)
_EMPTY = (  # photographs without a person, cut by a grid
    ("chelsea.png", 300, 150),
    ("chelsea.png", 150, 150),
    ("coffee.png", 400, 200),
    ("coffee.png", 200, 200),
    ("rocket.jpg", 427, 213),
    ("rocket.jpg", 213, 213),
)
_GROUNDS = ("brick.png", "grass.png", "gravel.png", "motorcycle_left.png")


def load(source: str, split: str) -> Pictures:
    """Read one split of one source.

    ``"emoji"`` are pictograms of two fonts, split by concept; ``"pedestrians"`` crops of a surveillance
    video, split by place and time, which the package carries; ``"faces"`` grey crops of press photographs;
    ``"photographs"`` squares of five photographs, which have only a test split. The first call fetches what
    is not in the cache.

    Raises:
        ValueError: there is no such source or split.
        SourceError: the source cannot be fetched; see `fetch`.

    Book: person-data
    """
    if source not in SOURCES:
        raise ValueError(f"source: expected one of {', '.join(SOURCES)}, got {source!r}")
    if split not in SPLITS:
        raise ValueError(f"split: expected one of {', '.join(SPLITS)}, got {split!r}")
    if source == "photographs" and split != "test":
        raise ValueError(f"split: the photographs are too few to train on; expected 'test', got {split!r}")
    everything, splits = _READERS[source]()
    return everything[[i for i, where in enumerate(splits) if where == split]]


@lru_cache(maxsize=1)
def backgrounds() -> Tensor:
    """Person-free pieces of photographs, for `augment` to show emoji on: (m, 3, 48, 48) uint8.

    They are cut from photographs of which no part is in any test.

    Book: person-augment
    """
    folder = fetch("scikit-image")
    pieces = []
    for name in _GROUNDS:
        image = _open(folder / name)
        for side in (48, 96, 192):
            for top in range(0, image.height - side + 1, 96):
                for left in range(0, image.width - side + 1, 96):
                    piece = image.crop((left, top, left + side, top + side)).resize((48, 48), 3)
                    pieces.append(np.asarray(piece))
    return torch.from_numpy(np.stack(pieces)).permute(0, 3, 1, 2).contiguous()


def pedestrian_scene() -> tuple[Tensor, list[dict[str, Any]]]:
    """What the pedestrians were cut from: the place without people, and what is known of each crop.

    Returns:
        (3, 288, 384) uint8, the median of the video's frames at half their size; and for each crop, in the
        order of `load` within a split, its "frame", its "box" (left, top, width, height in pixels of the
        whole frame), "person", "group" and "split".

    Book: person-data
    """
    folder = files("textbook_code.data") / "pedestrians"
    ground = np.asarray(_open(io.BytesIO((folder / "ground.jpg").read_bytes())))
    crops = json.loads((folder / "pedestrians.json").read_text("utf-8"))["crops"]
    return torch.from_numpy(ground.copy()).permute(2, 0, 1).contiguous(), crops


def part_of(name: str, train: int = 70, validation: int = 10) -> str:
    """The split that a group belongs to, by its name alone: a checksum decides among 100 places.

    Book: person-data
    """
    place = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") % 100
    return "train" if place < train else "validation" if place < train + validation else "test"


def concept(entry: dict[str, Any]) -> str:
    """What an emoji shows, whoever does it: its name for the split.

    Woman, man and person, left and right, and all skin tones of one role are one concept; so are all
    couples, and signs that differ only by what is written on one coloured square.

    Args:
        entry: a row of ``emoji.json``.

    Book: person-data
    """
    subcategory, name = entry["subcategory"], entry["short_name"]
    if subcategory == "family":
        return "couple"
    if subcategory in _ALIKE or (subcategory == "time" and name.startswith("clock")):
        return subcategory
    signs = [sign for sign in entry["unified"].split("-") if sign not in _TURNS]
    if subcategory not in _PEOPLE:
        return entry["unified"]
    if subcategory == "person":  # whatever the hair: some of these are drawn alike
        return subcategory
    return next((sign for sign in signs if sign not in _PERSON_SIGNS), signs[0])


def is_person(entry: dict[str, Any]) -> bool | None:
    """Whether an emoji shows a person; None where that can be argued about, and for flags and components.

    Left out are smileys, parts of a body, silhouettes (which one font makes of families) and things with a
    human figure on them, such as dolls, statues and the signs on doors.

    Args:
        entry: a row of ``emoji.json``.

    Book: person-data
    """
    subcategory = entry["subcategory"]
    if (
        entry["category"] in ("Component", "Flags")
        or subcategory in _PARTS
        or subcategory.startswith("face-")
    ):
        return None
    if entry["short_name"] in _FIGURES or (
        subcategory == "family" and not _COUPLE.search(entry["short_name"])
    ):
        return None
    return subcategory in _PEOPLE


def _open(path: Any, mode: str = "RGB") -> Any:
    return require("PIL.Image", extra="deploy").open(path).convert(mode)


def _opaque(rgb: np.ndarray) -> np.ndarray:
    """(36, 36, 3) to (36, 36, 4)."""
    return np.dstack([rgb, np.full(rgb.shape[:2], 255, np.uint8)])


def _pictures(pixels: list[np.ndarray], labels: list[bool], groups: list[str], source: str) -> Pictures:
    stacked = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).contiguous()
    return Pictures(stacked, torch.tensor(labels), groups, source)


@lru_cache(maxsize=1)
def _emoji() -> tuple[Pictures, list[str]]:
    """Seven thousand files take long to open, so the 36 × 36 pictures are kept beside the sources."""
    origins = [REGISTRY[f"emoji-{font}"] for font in _FONTS]
    named = hashlib.sha256(" ".join([str(_RULE), *(o.fingerprint for o in origins)]).encode()).hexdigest()
    kept = store.cache_root() / f"emoji-pictures-{named[:12]}.npz"
    try:
        with np.load(kept, allow_pickle=False) as found:
            pixels, labels, groups = found["pixels"], found["labels"], found["groups"].tolist()
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        pixels, labels, groups = _draw_emoji()
        kept.parent.mkdir(parents=True, exist_ok=True)
        with moved_into_place(kept) as partial, partial.open("wb") as file:
            np.savez_compressed(file, pixels=pixels, labels=labels, groups=np.array(groups))
    pictures = Pictures(
        torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(), torch.from_numpy(labels), groups, "emoji"
    )
    return pictures, [part_of(group) for group in groups]


def _draw_emoji() -> tuple[np.ndarray, np.ndarray, list[str]]:
    Image = require("PIL.Image", extra="deploy")
    pixels, labels, groups = [], [], []
    for font in _FONTS:
        folder = fetch(f"emoji-{font}")
        entries = json.loads((folder / "emoji.json").read_text("utf-8"))
        for entry in sorted(entries, key=lambda entry: entry["unified"]):
            person = is_person(entry)
            if person is None:
                continue
            tones = entry.get("skin_variations", {})
            for drawn in (entry, *(tones[tone] for tone in sorted(tones))):
                path = folder / "pictures" / "img" / font / "64" / drawn["image"]
                if not drawn[f"has_img_{font}"] or not path.is_file():
                    continue
                small = _open(path, "RGBA").resize((SIDE, SIDE), Image.Resampling.LANCZOS)
                canvas = Image.new("RGBA", (EDGE, EDGE))
                canvas.paste(small, ((EDGE - SIDE) // 2, (EDGE - SIDE) // 2))
                pixels.append(np.asarray(canvas))
                labels.append(person)
                groups.append(concept(entry))
    return np.stack(pixels), np.array(labels), groups


@lru_cache(maxsize=1)
def _faces() -> tuple[Pictures, list[str]]:
    """The first hundred are faces; of each hundred 60 train, 10 validate and 30 test."""
    Image = require("PIL.Image", extra="deploy")
    crops = np.load(fetch("scikit-image") / "lfw_subset.npy", allow_pickle=False)
    pixels, labels, groups, splits = [], [], [], []
    for i, crop in enumerate(crops):
        grey = np.clip(np.round(np.float64(crop) * 255), 0, 255).astype(np.uint8)
        large = np.asarray(Image.fromarray(grey).resize((EDGE, EDGE), Image.Resampling.BICUBIC))
        pixels.append(_opaque(np.repeat(large[:, :, None], 3, 2)))
        labels.append(i < 100)
        groups.append(f"{'face' if i < 100 else 'ground'}-{i % 100:03}")
        splits.append("train" if i % 100 < 60 else "validation" if i % 100 < 70 else "test")
    return _pictures(pixels, labels, groups, "faces"), splits


@lru_cache(maxsize=1)
def _photographs() -> tuple[Pictures, list[str]]:
    folder = fetch("scikit-image")
    squares = list(_SQUARES)
    for name, side, step in _EMPTY:
        width, height = _open(folder / name).size
        for top in range(0, height - side + 1, step):
            squares += [(name, left, top, side, False) for left in range(0, width - side + 1, step)]
    Image = require("PIL.Image", extra="deploy")
    pixels = []
    for name, left, top, side, _ in squares:
        cut = _open(folder / name).crop((left, top, left + side, top + side))
        pixels.append(_opaque(np.asarray(cut.resize((EDGE, EDGE), Image.Resampling.LANCZOS))))
    groups = [name.split(".")[0] for name, *_ in squares]
    return _pictures(pixels, [square[-1] for square in squares], groups, "photographs"), ["test"] * len(
        pixels
    )


@lru_cache(maxsize=1)
def _pedestrians() -> tuple[Pictures, list[str]]:
    folder = files("textbook_code.data") / "pedestrians"
    rows = json.loads((folder / "pedestrians.json").read_text("utf-8"))
    sheet = np.asarray(_open(io.BytesIO((folder / rows["sheet"]).read_bytes())))
    across = sheet.shape[1] // EDGE
    pixels, labels, groups, splits = [], [], [], []
    for i, row in enumerate(rows["crops"]):
        y, x = i // across * EDGE, i % across * EDGE
        pixels.append(_opaque(sheet[y : y + EDGE, x : x + EDGE]))
        labels.append(row["person"])
        groups.append(row["group"])
        splits.append(row["split"])
    return _pictures(pixels, labels, groups, "pedestrians"), splits


_READERS: dict[str, Callable[[], tuple[Pictures, list[str]]]] = {
    "emoji": _emoji,
    "pedestrians": _pedestrians,
    "faces": _faces,
    "photographs": _photographs,
}
