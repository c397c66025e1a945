"""What the demonstration of a person or not is made of: the module, its sample pictures, and the still.

Pictures are picked by their place in the test set, never by what the network says of them, so that its errors
are among them as often as elsewhere.
"""

from __future__ import annotations

import base64
import json
import shutil
import tempfile
import unicodedata
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from textwrap import wrap
from typing import Any

import numpy as np

from textbook_code.data import people
from textbook_code.deploy import wasm

PICKED = {"emoji": 4, "pedestrians": 2}  # of each label; both sources may be shipped
NAMES = {"pedestrians": ("the place of pedestrian {}, empty", "pedestrian {}")}
LICENCES = "pedestrians/README.md"  # which their licences ask to go with the pictures
CREDITS = (
    "Pictograms, shrunk to 32 × 32: Noto Emoji, © Google, Apache 2.0, and Twemoji, © Twitter, Inc. and other "
    "contributors, CC BY 4.0. Photographs: crops of vtest.avi, a sample of OpenCV, © its contributors, "
    "Apache 2.0 and BSD 3-Clause."
)


@dataclass(frozen=True)
class Sample:
    """A picture of a test set, under the name that the reader sees."""

    name: str
    person: bool
    rgb: np.ndarray  # uint8 (32, 32, 3)


def spread(of: Sequence[Any], count: int) -> list[Any]:
    """`count` of many, evenly spaced, neither the first nor the last.

    >>> spread(range(100), 4)
    [12, 37, 62, 87]
    """
    return [of[(2 * i + 1) * len(of) // (2 * count)] for i in range(count)]


def samples() -> list[Sample]:
    """People and others of the test sets in turn: one picture each of concepts, people and places."""
    found = []
    for source, count in PICKED.items():
        pictures = people.load(source, "test")
        rgb = people.examination(pictures).numpy()
        groups: dict[tuple[bool, str], list[int]] = {}
        for i, (group, label) in enumerate(zip(pictures.groups, pictures.labels.tolist(), strict=True)):
            groups.setdefault((label, group), []).append(i)
        for k in range(count):
            for person in (True, False):
                members = [indices for (label, _), indices in groups.items() if label is person]
                indices = spread(members, count)[k]
                i = indices[k * len(indices) // count]  # another font or skin each time
                found.append(Sample(_spoken(source, pictures.groups[i], person, k + 1), person, rgb[i]))
    return found


def _spoken(source: str, group: str, person: bool, number: int) -> str:
    """A picture's name for the reader: a concept is named by its sign, an astronaut by a rocket.

    >>> _spoken("emoji", "1F680", True, 1), _spoken("emoji", "1F34E", False, 1)
    ('person (rocket)', 'red apple')
    >>> _spoken("emoji", "couple", True, 1), _spoken("pedestrians", "walk-066", True, 2)
    ('person (couple)', 'pedestrian 2')
    """
    if source in NAMES:
        return NAMES[source][person].format(number)
    with suppress(ValueError):  # several signs in one concept, such as "couple", have a name already
        group = unicodedata.name(chr(int(group.split("-")[0], 16))).lower()
    return f"person ({group})" if person else group


def script(module: bytes, pictures: Sequence[Sample]) -> str:
    """`personData` as JavaScript: everything that the page needs, as text."""
    payload = {
        "wasm": base64.b64encode(module).decode(),
        "samples": [
            {"name": each.name, "person": each.person, "rgb": base64.b64encode(each.rgb.tobytes()).decode()}
            for each in pictures
        ],
        "credits": CREDITS,
    }
    return f'"use strict";\nconst personData = {json.dumps(payload, ensure_ascii=True)};\n'


def write(model: Path, target: Path) -> None:
    """Write ``data/`` for the page, ``person.wasm``, ``still.svg`` and ``still.pdf``: all or nothing."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as name:
        work = Path(name) / "new"
        (work / "data").mkdir(parents=True)
        built = wasm.build(model, work / "person.wasm")
        pictures = samples()
        (work / "data" / "person-data.js").write_text(script(built.read_bytes(), pictures), "ascii")
        notice = (files("textbook_code.data") / LICENCES).read_text("utf-8")
        (work / "data" / "licence-of-pedestrians.md").write_text(notice, "utf-8")
        still(wasm.Module(built), [*pictures[:2], *pictures[-2:]], (work / "still.svg", work / "still.pdf"))
        if target.exists():
            shutil.rmtree(target)
        work.replace(target)


def still(module: wasm.Module, pictures: Sequence[Sample], paths: Sequence[Path]) -> None:
    """Draw pictures as they are read, and below them lit where the last block looks, with the verdict."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt
    from matplotlib.patches import Rectangle

    from textbook_code.figures import use_style

    images = np.stack([each.rgb for each in pictures])
    logits = module.logits(images).astype(int) - module.zero_point
    side, grid = images.shape[1], round(module.num_patches**0.5)
    maps = module.attention(images).reshape(-1, grid, grid)
    with plt.rc_context():
        use_style()
        fig, rows = plt.subplots(2, len(pictures), figsize=(6.4, 3.9), layout="constrained")
        for column, (each, steps, seen) in enumerate(zip(pictures, logits, maps, strict=True)):
            top, below = rows[0][column], rows[1][column]
            light = np.kron(np.sqrt(seen / seen.max()), np.ones((side // grid, side // grid)))[..., None]
            dark = np.array([8, 16, 32]) * 0.88
            _show(top, each.rgb)
            _show(below, (each.rgb * (0.12 + 0.88 * light) + dark * (1 - light)).astype(np.uint8))
            row, patch = divmod(int(seen.argmax()), grid)
            corner = (patch * side / grid - 0.5, row * side / grid - 0.5)
            for edge, width in (("black", 3), ("white", 1.2)):
                below.add_patch(Rectangle(corner, side / grid, side / grid, fill=False, ec=edge, lw=width))
            top.set_title("\n".join(wrap(each.name, 20)), fontweight="normal", fontsize=9)
            says = "a person" if steps > 0 else "no person"
            below.set_xlabel(f"{says}\n{steps:+d} steps: {steps * module.scale:+.2f}".replace("-", "−"))
        for path in paths:
            fig.savefig(path, metadata={"CreationDate" if path.suffix == ".pdf" else "Date": None})
        plt.close(fig)


def _show(ax: Any, rgb: np.ndarray) -> None:
    ax.imshow(rgb, interpolation="none")
    ax.set(xticks=[], yticks=[])
    ax.grid(visible=False)
