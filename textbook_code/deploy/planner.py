"""Where every intermediate result lies in one block of memory, the arena.

In this file: `Buffer`, what needs room and when; `plan`, which gives it an offset; `lower_bound`, below which
no plan can go. Two buffers may share bytes unless some step needs both.

Book: deploy-arena
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

ALIGNMENT = 4
"""Offsets are multiples of this many bytes, one machine word."""


@dataclass(frozen=True)
class Buffer:
    """A block of bytes that is needed from step `first` to step `last`, both included.

    Args:
        name: of any kind that hashes.
        size: bytes, at least one.
        first: the step that writes it.
        last: the last step that reads it.

    Raises:
        ValueError: no bytes, or its last step lies before its first.

    Book: deploy-arena
    """

    name: int | str
    size: int
    first: int
    last: int

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"size: expected at least one byte for {self.name!r}, got {self.size}")
        if self.last < self.first:
            raise ValueError(
                f"last: expected at least first = {self.first} for {self.name!r}, got {self.last}"
            )

    def meets(self, other: "Buffer") -> bool:
        """Whether some step needs both.

        Book: deploy-arena
        """
        return self.first <= other.last and other.first <= self.last


@dataclass(frozen=True)
class Plan:
    """Offsets of all buffers, and how good they are.

    Args:
        offsets: name → offset in bytes.
        size: bytes of the arena.
        bound: what `lower_bound` says; `size == bound` is a plan that none can beat.

    Book: deploy-arena
    """

    offsets: Mapping[int | str, int]
    size: int
    bound: int


def lower_bound(buffers: Iterable[Buffer]) -> int:
    r"""The most bytes that any one step needs,

    $$\max_t \sum_{b:\, \mathrm{first}_b \le t \le \mathrm{last}_b} \mathrm{size}_b,$$

    with each size rounded up to `ALIGNMENT`.

    Book: deploy-arena
    """
    buffers = list(buffers)
    # the sum grows only where a buffer begins
    return max((sum(_room(b) for b in buffers if b.first <= t.first <= b.last) for t in buffers), default=0)


def plan(buffers: Iterable[Buffer]) -> Plan:
    """First fit by decreasing size: the largest buffer first, each into the lowest gap that holds it.

    To place buffers in time without overlap is NP-hard; this rule is short, deterministic, and for the
    model of this book it reaches `lower_bound`; for others it may end a little above.

    Args:
        buffers: with different names.

    Raises:
        ValueError: two have the same name.

    Book: deploy-arena
    """
    buffers = list(buffers)
    offsets: dict[int | str, int] = {}
    placed: list[Buffer] = []
    for buffer in sorted(buffers, key=lambda b: (-b.size, b.first, str(b.name))):
        if buffer.name in offsets:
            raise ValueError(f"buffers: expected different names, got {buffer.name!r} twice")
        offset = 0
        for other in sorted((p for p in placed if p.meets(buffer)), key=lambda p: offsets[p.name]):
            if offset + _room(buffer) <= offsets[other.name]:
                break
            offset = max(offset, offsets[other.name] + _room(other))
        offsets[buffer.name] = offset
        placed.append(buffer)
    size = max((offsets[b.name] + _room(b) for b in buffers), default=0)
    return Plan(offsets, size, lower_bound(buffers))


def _room(buffer: Buffer) -> int:
    return -(-buffer.size // ALIGNMENT) * ALIGNMENT
