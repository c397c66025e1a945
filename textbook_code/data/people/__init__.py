"""Pictures with and without a person, 32 × 32: where they come from, how they are split, how augmented.

Four sources give one type, `Pictures`: emoji, pedestrians of a surveillance camera, faces, and a few
photographs. They are never pooled when something is measured, since they differ in everything but the
question. Each is split by what would otherwise leak: the concept of an emoji, the place, the time and the
person of a pedestrian.

    train = load("emoji", "train")
    images = augment(train, torch.Generator().manual_seed(0))  # (n, 3, 32, 32) in the model's range
    test = load("pedestrians", "test")
    examination(test)  # (n, 32, 32, 3) bytes: what every runtime is examined on

Book: person-data
"""

from textbook_code.data.people.pictures import (
    EDGE,
    SIDE,
    Pictures,
    augment,
    combine,
    examination,
    model_input,
)
from textbook_code.data.people.readers import cifar100_people, from_folder, visual_wake_words
from textbook_code.data.people.sources import SOURCES, SPLITS, backgrounds, load, pedestrian_scene

__all__ = [
    "EDGE",
    "SIDE",
    "SOURCES",
    "SPLITS",
    "Pictures",
    "augment",
    "backgrounds",
    "cifar100_people",
    "combine",
    "examination",
    "from_folder",
    "load",
    "model_input",
    "pedestrian_scene",
    "visual_wake_words",
]
