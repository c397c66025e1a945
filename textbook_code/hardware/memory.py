"""How much memory a computation takes: what torch hands out, counted, not what the system happens to show.

Book: variants-memory
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import accumulate
from typing import Any

import torch


def peak_bytes(work: Callable[[], Any]) -> int:
    """Most bytes that torch has handed out on the CPU at once for `work`, beyond what was held before.

    Allocations and releases are read off torch's profiler, so that the figure is the same each time and on
    each machine. What a library takes without asking torch is not seen.

    Args:
        work: called once, without arguments; its result is held to the end.

    Returns:
        Bytes, at least 0.

    Book: variants-memory
    """
    watch = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True)
    with _quiet(), watch:
        kept = work()  # noqa: F841 (so that it is not released before the end)
    results: Any = watch.profiler
    events = [e for e in results.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda e: e.start_ns())
    return max(accumulate((e.nbytes() for e in events), initial=0))


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what the profiler writes to standard error by itself, below Python."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
