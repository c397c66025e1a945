"""Pedestrians cut from a surveillance video: how the pictures that the package carries were made.

    python -m textbook_code.data.people pedestrians vtest.avi FOLDER

Every fifth frame is searched by OpenCV's detector of upright people, which knows nothing of our split, and a
find counts if the place has also changed against the median of all frames. Negatives are the **same squares
at times when nothing moves there**, so that the ground gives nothing away. Training, validation and test
differ in place and in time; what lies across a border is dropped and counted.

Needs OpenCV below 5 (`opencv-python-headless<5`), whose later versions lack the detector.
Paper: Dalal and Triggs (2005), for the detector.

Book: person-data
"""

from __future__ import annotations

import json
import random
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from textbook_code.data.people.pictures import EDGE, SIDE
from textbook_code.extras import require
from textbook_code.weights import moved_into_place

_EVERY = 5  # frames
_ENLARGED = 1.5  # since the detector's window is 128 pixels high and the far people are not
_SCORE = 0.6
_CHANGED = 25  # grey levels
_MOVING = 0.2  # of a find's box
_STILL = 0.01  # of a negative's square
_VIEW = 0.9  # of a box's height that the 32 pixels show
_ALIKE = 8.0  # mean grey levels below which two crops of a track are one
_BORDER = 470  # column that no square touches
_TIMES = {"train": (0, 500), "validation": (540, 10_000), "test": (540, 10_000)}
_RIGHT = {"train": True, "validation": True, "test": False}  # of the border
_ACROSS = 30  # crops in a row of the sheet


@dataclass(frozen=True)
class Find:
    """A person in a frame.

    Attributes:
        frame: its number, from 0.
        x, y, width, height: the detector's box in pixels.
        score: the detector's.
        track: number of the walk that it belongs to.

    Book: person-data
    """

    frame: int
    x: int
    y: int
    width: int
    height: int
    score: float
    track: int = -1

    @property
    def centre(self) -> tuple[float, float]:
        """Column and row."""
        return self.x + self.width / 2, self.y + self.height / 2

    @property
    def side(self) -> float:
        """Pixels of the frame that the stored 36 show."""
        return self.height * _VIEW * EDGE / SIDE

    @property
    def square(self) -> tuple[float, float, float, float]:
        """Left, top, right and bottom of what is stored."""
        (x, y), half = self.centre, self.side / 2
        return x - half, y - half, x + half, y + half


def make(video: str | Path, folder: str | Path) -> dict[str, Any]:
    """Make ``pedestrians.png``, ``pedestrians.json`` and ``ground.jpg`` of ``vtest.avi`` in about a minute.

    The last is the median of the frames at half their size: the scene without people.

    Returns:
        What is written as JSON: the crops in the order of the sheet, each with frame, box, label, group and
        split, and the counts of what was lost.

    Raises:
        FileNotFoundError: there is no such video.
        ValueError: OpenCV cannot read it.
        ImportError: OpenCV is not installed, or it is version 5 or later.

    Book: person-data
    """
    cv2 = require("cv2", extra="test")
    if not hasattr(cv2, "HOGDescriptor"):
        raise ImportError(
            f'OpenCV {cv2.__version__} has no HOGDescriptor: pip install "opencv-python-headless<5"'
        )
    frames = _frames(cv2, Path(video))
    numbers = sorted(frames)
    ground = np.median(np.stack([frames[k] for k in numbers]), 0).astype(np.uint8)
    changed = {k: np.abs(_grey(cv2, frames[k]) - _grey(cv2, ground)) > _CHANGED for k in numbers}
    finds = [find for k in numbers for find in _detect(cv2, frames[k], k) if _moves(find, changed[k])]
    finds = _tracked(finds)
    kept, lost = _split(finds, ground.shape[1], ground.shape[0])
    crops: list[np.ndarray] = []
    rows: list[dict[str, Any]] = []
    last: dict[int, list[np.ndarray]] = {}
    for find, split in kept:
        crop = _cut(cv2, frames[find.frame], find)
        seen = last.setdefault(find.track, [])
        if any(np.abs(crop.astype(int) - old.astype(int)).mean() < _ALIKE for old in seen):
            lost["as near-duplicates"] += 1
            continue
        quiet = _quiet_times(find, split, numbers, changed)
        if not quiet:
            lost["because their place is never still"] += 1
            continue
        seen.append(crop)
        still = random.Random(f"{find.frame} {find.x} {find.y}").choice(quiet)
        for frame, person, pixels in (
            (find.frame, True, crop),
            (still, False, _cut(cv2, frames[still], find)),
        ):
            crops.append(pixels)
            box = [find.x, find.y, find.width, find.height]
            group = f"walk-{find.track:03}"
            rows.append({"frame": frame, "box": box, "person": person, "group": group, "split": split})
    about = {
        "video": "vtest.avi of OpenCV 4.6, as Debian's package opencv-doc has it",
        "licence": "Apache-2.0 AND BSD-3-Clause; copyright OpenCV's contributors",
        "opencv": cv2.__version__,
        "sheet": "pedestrians.png",
        "found": len(finds),
        "lost": dict(lost),
        "crops": rows,
    }
    _write(cv2, Path(folder), about, crops, ground)
    return about


def _frames(cv2: Any, video: Path) -> dict[int, np.ndarray]:
    if not video.is_file():
        raise FileNotFoundError(f"video: {video} is not there")
    reader, frames, number = cv2.VideoCapture(str(video)), {}, 0
    while True:
        there, frame = reader.read()
        if not there:
            break
        if number % _EVERY == 0:
            frames[number] = frame
        number += 1
    if not frames:
        raise ValueError(f"video: OpenCV reads no frame of {video}")
    return frames


def _grey(cv2: Any, frame: np.ndarray) -> np.ndarray:
    return np.asarray(cv2.cvtColor(frame, cv2.COLOR_BGR2GRAY)).astype(int)


def _detect(cv2: Any, frame: np.ndarray, number: int) -> list[Find]:
    """The detector's finds, of two that overlap by half the better one."""
    detector = cv2.HOGDescriptor()
    detector.setSVMDetector(cv2.HOGDescriptor_getDefaultPeopleDetector())
    large = cv2.resize(frame, None, fx=_ENLARGED, fy=_ENLARGED)
    boxes, scores = detector.detectMultiScale(large, winStride=(8, 8), padding=(16, 16), scale=1.05)
    found = []
    for box, score in zip(boxes, np.ravel(scores), strict=True):
        x, y, width, height = (round(float(v) / _ENLARGED) for v in box)
        if score > _SCORE:
            found.append(Find(number, x, y, width, height, float(score)))
    best: list[Find] = []
    for find in sorted(found, key=lambda f: (-f.score, f.x, f.y)):
        if all(_overlap(find, other) < 0.5 for other in best):
            best.append(find)
    return sorted(best, key=lambda f: (f.x, f.y))


def _overlap(a: Find, b: Find) -> float:
    """Intersection over the smaller of two boxes."""
    across = min(a.x + a.width, b.x + b.width) - max(a.x, b.x)
    down = min(a.y + a.height, b.y + b.height) - max(a.y, b.y)
    return max(across, 0) * max(down, 0) / min(a.width * a.height, b.width * b.height)


def _moves(find: Find, changed: np.ndarray) -> bool:
    inside = changed[max(find.y, 0) : find.y + find.height, max(find.x, 0) : find.x + find.width]
    return inside.size > 0 and inside.mean() > _MOVING


def _tracked(finds: list[Find]) -> list[Find]:
    """Number the walks: a find goes on with the nearest one of up to three samples before, if near enough."""
    ends: dict[int, Find] = {}
    out, tracks = [], 0
    for frame in sorted({find.frame for find in finds}):
        here = [find for find in finds if find.frame == frame]
        pairs = sorted(
            (np.hypot(find.centre[0] - end.centre[0], find.centre[1] - end.centre[1]), i, track)
            for i, find in enumerate(here)
            for track, end in ends.items()
            if frame - end.frame <= 3 * _EVERY
        )
        chosen: dict[int, int] = {}
        for distance, i, track in pairs:
            reach = 0.3 * here[i].height * (frame - ends[track].frame) / _EVERY
            if distance <= reach and i not in chosen and track not in chosen.values():
                chosen[i] = track
        for i, find in enumerate(here):
            if i not in chosen:
                chosen[i], tracks = tracks, tracks + 1
            ends[chosen[i]] = replace(find, track=chosen[i])
            out.append(ends[chosen[i]])
    return out


def _split(finds: list[Find], width: int, height: int) -> tuple[list[tuple[Find, str]], Counter[str]]:
    """Give each find to the split whose place and time it lies in, or to none."""
    placed: list[tuple[Find, str]] = []
    lost: Counter[str] = Counter()
    for find in finds:
        left, top, right, bottom = find.square
        if left < 0 or top < 0 or right > width or bottom > height:
            lost["at the edge of the frame"] += 1
            continue
        where = [
            split
            for split, (first, last) in _TIMES.items()
            if first <= find.frame <= last and (left > _BORDER if _RIGHT[split] else right < _BORDER)
        ]
        if where:
            placed.append((find, where[0]))
        else:
            lost["to the borders in place and time"] += 1
    homes = {
        track: Counter(split for find, split in placed if find.track == track).most_common(1)[0][0]
        for track in {find.track for find, _ in placed}
    }
    kept = [(find, split) for find, split in placed if homes[find.track] == split]
    lost["because their walk is in another split"] += len(placed) - len(kept)
    return kept, lost


def _quiet_times(find: Find, split: str, numbers: list[int], changed: dict[int, np.ndarray]) -> list[int]:
    left, top, right, bottom = (round(v) for v in find.square)
    first, last = _TIMES[split]
    return [k for k in numbers if first <= k <= last and changed[k][top:bottom, left:right].mean() <= _STILL]


def _cut(cv2: Any, frame: np.ndarray, find: Find) -> np.ndarray:
    """(36, 36, 3) rgb: each pixel the mean of the square it covers."""
    left, top, right, bottom = (round(v) for v in find.square)
    square = np.ascontiguousarray(frame[top:bottom, left:right, ::-1])
    return np.asarray(cv2.resize(square, (EDGE, EDGE), interpolation=cv2.INTER_AREA))


def _write(
    cv2: Any, folder: Path, about: dict[str, Any], crops: list[np.ndarray], ground: np.ndarray
) -> None:
    sheet = np.zeros((-(-len(crops) // _ACROSS) * EDGE, _ACROSS * EDGE, 3), np.uint8)
    for i, crop in enumerate(crops):
        y, x = i // _ACROSS * EDGE, i % _ACROSS * EDGE
        sheet[y : y + EDGE, x : x + EDGE] = crop
    head = {key: value for key, value in about.items() if key != "crops"}
    lines = ",\n".join(json.dumps(row) for row in about["crops"])
    text = json.dumps(head, indent=1)[:-2] + ',\n "crops": [\n' + lines + "\n]}\n"
    half = cv2.resize(ground, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA)
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in (
        ("pedestrians.png", _encoded(cv2, ".png", sheet[:, :, ::-1], cv2.IMWRITE_PNG_COMPRESSION, 9)),
        ("ground.jpg", _encoded(cv2, ".jpg", half, cv2.IMWRITE_JPEG_QUALITY, 80)),
        ("pedestrians.json", text.encode()),
    ):
        with moved_into_place(folder / name) as partial:
            partial.write_bytes(content)


def _encoded(cv2: Any, ending: str, image: np.ndarray, setting: int, value: int) -> bytes:
    done, data = cv2.imencode(ending, image, [setting, value])
    assert done
    return bytes(data.tobytes())
