"""Do all runtimes say the same? The person model on all test pictures, in every runtime that the book has.

Each arm is a runtime. It is given the pictures of all four sources in the deterministic form in which every
runtime is examined, and its logits are kept: whole numbers from the integer runtimes, floats from the others.
The emulated microcontrollers are slow, so they are given a part, evenly spread over all; how many is in the
config. What is compared is made of the logits afterwards. A step is a batch, and its loss the mean
cross-entropy of the verdicts in it, so that a repetition sees a single bit that changed.

The arms of emulated processors need QEMU and the compiler for Arm; without them the experiment ends with the
name of what is missing. Nothing was tuned here.

Book: deploy-runtimes
"""

from collections.abc import Mapping
from dataclasses import asdict
from functools import cache
from typing import Any

import numpy as np

from textbook_code.data import people
from textbook_code.deploy import runtimes
from textbook_code.deploy.runtimes import Model, Outcome, Table

ABOUT = (
    "The checkpoint person-vit on every test picture of four sources, in PyTorch, ONNX Runtime, LiteRT, "
    "TensorFlow Lite Micro, NumPy, C on this machine, C on three microcontrollers and a 64-bit Arm under "
    "emulation, and WebAssembly: decisions, bits, sizes, memory and instructions, compared with the C."
)
CONFIG = {
    "seeds": [0],
    "model": "person-vit",
    "sources": ["emoji", "pedestrians", "faces", "photographs"],
    "steps": {"all": 30, "cortex-m7": 10, "cortex-m4": 5, "cortex-m3": 5},
    "pictures": {"cortex-m7": 300, "cortex-m4": 100, "cortex-m3": 60},
}
DATA = ["emoji-google", "emoji-twitter", "scikit-image"]
TOLERANCE = {"loss": 1e-5, "results": 0.02}
REPLAY = ["c", "litert"]


def arms(config: dict) -> list[str]:
    return ["pictures", *runtimes.RUNTIMES]


@cache
def _examined(sources: tuple[str, ...]) -> tuple[np.ndarray, np.ndarray, np.ndarray, dict[str, int]]:
    """Pictures (n, 32, 32, 3), labels (n,), the source of each, and how many groups each source has."""
    parts = {source: people.load(source, "test") for source in sources}
    images = np.concatenate([people.examination(part).numpy() for part in parts.values()])
    labels = np.concatenate([part.labels.numpy() for part in parts.values()])
    names = np.repeat(list(parts), [len(part) for part in parts.values()])
    return images, labels, names, {name: len(set(part.groups)) for name, part in parts.items()}


@cache
def _model(source: str) -> Model:
    return Model(source)


def run(config: dict, arm: str, *, steps: int | None = None, log) -> dict:
    """The logits of one runtime with what it costs; for "pictures", what they are."""
    images, labels, names, groups = _examined(tuple(config["sources"]))
    model = _model(config["model"])
    scale, zero_point = model.step
    at = np.arange(len(images))
    if (few := config["pictures"].get(arm)) is not None:
        at = np.arange(few) * len(images) // few
    batches = np.array_split(at, config["steps"].get(arm, config["steps"]["all"]))
    if arm == "pictures":
        for batch in batches[:steps]:
            log(images[batch].mean() / 255, of=len(batches))
        sizes = {name: int((names == name).sum()) for name in groups}
        return {
            "sizes": sizes, "groups": groups, "labels": labels.astype(int).tolist(),
            "scale": scale, "zero_point": zero_point,
        }  # fmt: skip
    running = runtimes.find(arm).open(model)
    logits = []
    for batch in batches[:steps]:
        logits.append(np.asarray(running.logits(images[batch])))
        z = Outcome(logits[-1], batch).steps(scale, zero_point) * scale
        log(np.logaddexp(0, np.where(labels[batch], -z, z)).mean(), of=len(batches))
    if steps is not None:
        return {}
    whole = np.concatenate(logits)
    said = whole.tolist() if np.issubdtype(whole.dtype, np.integer) else [round(z, 5) for z in whole.tolist()]
    return {
        "logits": said, "size": running.size, "memory": running.memory, "instructions": running.instructions
    }  # fmt: skip


def table(config: dict, runs: Mapping[str, Any]) -> Table:
    """The recorded logits as the table that `compare` gives."""
    about = runs["pictures"]
    labels = np.array(about["labels"], bool)
    outcomes: dict[str, Outcome | str] = {}
    for name in runtimes.RUNTIMES:
        kept = runs[name]
        said = kept["logits"]
        integers = runtimes.find(name).numbers == "int8"
        at = np.arange(len(said)) * len(labels) // len(said)
        outcomes[name] = Outcome(
            np.array(said, np.int8 if integers else np.float64), at,
            kept["size"], kept["memory"], kept["instructions"],
        )  # fmt: skip
    return runtimes.tabulate(
        outcomes,
        scale=about["scale"],
        zero_point=about["zero_point"],
        labels=labels,
        sources=np.repeat(list(about["sizes"]), list(about["sizes"].values())).tolist(),
    )


def summarise(config: dict, runs: dict) -> dict:
    """A row for each runtime; how many pictures there are; and what int8 costs, in points of accuracy."""
    made = table(config, runs)
    rows = {row.runtime: asdict(row) for row in made.rows}
    for row in rows.values():
        row["accuracy"] = {name: round(value, 5) for name, value in row["accuracy"].items()}
        row["lsb"] = round(row["lsb"], 3)
        del row["runtime"], row["missing"]
    about = runs["pictures"]
    labels = np.array(about["labels"], bool)
    ends = np.cumsum(list(about["sizes"].values()))
    people_in = {
        name: int(labels[end - about["sizes"][name] : end].sum())
        for name, end in zip(about["sizes"], ends, strict=True)
    }
    floats, integers = rows["torch"]["accuracy"], rows["c"]["accuracy"]
    return {
        "rows": rows,
        "pictures": len(labels),
        "sources": {
            name: {"pictures": size, "people": people_in[name], "groups": about["groups"][name]}
            for name, size in about["sizes"].items()
        },
        "drop_points": {name: round(100 * (floats[name] - integers[name]), 3) for name in integers},
    }
