"""How much memory a computation takes: what torch hands out, counted, not what the system happens to show.

Book: variants-memory
"""

from collections.abc import Callable
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
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        kept = work()  # noqa: F841 (so that it is not released before the end)
    held = peak = 0
    events = profile.profiler.kineto_results.events()
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak
