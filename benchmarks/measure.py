"""How it is measured: processor time in turns, a ratio with its interval, memory at its peak."""

from __future__ import annotations

import json
import os
import random
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).resolve().parent.parent
_LEAST = 0.03  # seconds that one timing lasts at least

# glibc then gives freed blocks back to the system at once, so that a peak is one of live memory
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}


def interleaved(
    works: Mapping[str, Callable[[], Any]], rounds: int, show: Callable[[], None] = lambda: None
) -> dict[str, list[float]]:
    """Processor seconds of each work in each round; in a round every work has its turn, in random order."""
    order, draws, repeats = list(works), random.Random(0), 1
    for work in works.values():  # a first call pays for what later ones find ready
        work()
        started = time.process_time()
        work()
        repeats = max(repeats, int(_LEAST / max(time.process_time() - started, 1e-6)))
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(rounds):
        draws.shuffle(order)
        for name in order:
            started = time.process_time()
            for _ in range(repeats):
                works[name]()
            seconds[name].append((time.process_time() - started) / repeats)
        show()
    return seconds


def ratio(ours: Sequence[float], peer: Sequence[float]) -> tuple[float, float, float]:
    """Median over the rounds of peer ÷ ours, and the 95 % interval of that median by resampling rounds."""
    pairs = [theirs / mine for mine, theirs in zip(ours, peer, strict=True)]
    draws = random.Random(0)
    medians = sorted(statistics.median(draws.choices(pairs, k=len(pairs))) for _ in range(2000))
    return statistics.median(pairs), medians[49], medians[1949]


def peak_memory(arguments: Sequence[str]) -> int | None:
    """Bytes above the built model that a subject takes at its peak, measured in a process of its own.

    Linux alone lets a process forget its earlier peak; elsewhere None.
    """
    if not Path("/proc/self/clear_refs").exists():
        return None
    env = {**os.environ, "OMP_NUM_THREADS": "1", **GIVE_BACK}
    command = [sys.executable, "-m", "benchmarks", "--memory-of", *arguments]
    done = subprocess.run(command, cwd=_ROOT, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
    return int(json.loads(done.stdout.splitlines()[-1]))


def own_peak(work: Callable[[], Any]) -> int:
    """Bytes by which this process grows at its highest while `work` runs, after a first call."""
    work()
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    for _ in range(3):
        work()
    return _status("VmHWM") - before


def _status(field: str) -> int:
    found = re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found, field
    return int(found.group(1)) * 1024


def import_time(module: str, rounds: int = 15) -> float:
    """Seconds that `import module` takes in a fresh Python, by its own account; median of the rounds."""

    def once() -> float:
        command = [sys.executable, "-X", "importtime", "-c", f"import {module}"]
        account = subprocess.run(command, capture_output=True, text=True, check=True).stderr
        cumulative = re.findall(rf"\|\s*(\d+) \| {re.escape(module)}$", account, re.MULTILINE)
        return int(cumulative[-1]) / 1e6

    return statistics.median(once() for _ in range(rounds))


def page_weights(html: Path) -> tuple[dict[str, int], int]:
    """Bytes of each built page, pictures not among them, and of the styles and scripts that pages share."""
    pages, shared = {}, set()
    for page in sorted(html.rglob("*.html")):
        pages[page.relative_to(html).as_posix()] = page.stat().st_size
        links = re.findall(
            r'<(?:script|link)\b[^>]*\b(?:src|href)="([^"#?]+\.(?:js|css))', page.read_text("utf-8")
        )
        shared |= {(page.parent / link).resolve() for link in links if "://" not in link}
    return pages, sum(file.stat().st_size for file in shared if file.is_file())
