"""Remembers which inputs a step was last done with, so that the same step is not done twice."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any


def digest(root: Path, names: Iterable[str], *, extra: Iterable[str] = ()) -> str:
    """One hash over the names and contents of files, and of all files in folders, below `root`.

    A name that does not exist counts as missing; hidden files, caches and built files are passed over.
    """
    total = hashlib.sha256()
    for text in extra:
        total.update(f"{text}\0".encode())
    for name in names:
        for path in _files(root / name):
            total.update(f"{path.relative_to(root).as_posix()}\0".encode())
            total.update(hashlib.sha256(path.read_bytes()).digest() if path.is_file() else b"missing")
    return total.hexdigest()


def _files(path: Path) -> Iterator[Path]:
    if not path.is_dir():
        yield path
        return
    for child in sorted(path.iterdir()):
        if not child.name.startswith(".") and child.name != "__pycache__" and not child.is_symlink():
            yield from _files(child)


class Stamp:
    """The record of one step: the digest of its inputs, when it was done, and what it made."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> dict[str, Any]:
        try:
            return dict(json.loads(self.path.read_text("utf-8")))
        except (OSError, ValueError):
            return {}

    def holds(self, inputs: str) -> bool:
        """Whether the step was done with these inputs and what it made is still there."""
        kept = self.read()
        return kept.get("inputs") == inputs and all(Path(made).exists() for made in kept.get("made", []))

    def write(self, inputs: str, *, made: Iterable[Path] = (), **more: Any) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        when = datetime.now(UTC).isoformat(timespec="seconds")
        content = {"inputs": inputs, "when": when, "made": [str(path) for path in made], **more}
        part = self.path.with_name(f"{self.path.name}.{os.getpid()}.part")
        part.write_text(json.dumps(content, indent=1) + "\n", "utf-8")
        part.replace(self.path)

    def clear(self) -> None:
        self.path.unlink(missing_ok=True)
