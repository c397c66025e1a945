"""Longer contexts for RoPE: how its frequencies are slowed down.

Each class is called with the frequencies ω (Dh/2,), radians a position, fastest first, as a geometric
row of them (`RotaryPositions`, θ^{-2i/Dh}); it returns the slower ones, and its `gain` multiplies cosines
and sines, so that scores grow by its square.

    LinearScaling    ω / s                       position interpolation, Chen et al. (2023)
    NTKScaling       ω θ' for θ                  another base: the fastest stays, the slowest is ω / s
    Llama3Scaling    by turns made               slow ones ω / s, fast ones stay, Grattafiori et al. (2024)
    YarnScaling      by plane, and a gain        Peng et al. (2024)

Book: rope-scaling
"""

import math
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor


class Scaling(Protocol):
    """What `RotaryPositions` takes as `scaling`.

    Book: rope-scaling
    """

    @property
    def gain(self) -> float:
        """The factor on cosines and sines."""

    def __call__(self, frequencies: Tensor) -> Tensor:
        """Stretch the frequencies (Dh/2,), radians a position."""


def _expect_longer(factor: float) -> None:
    if not (math.isfinite(factor) and factor >= 1):
        raise ValueError(f"factor: expected a number of at least 1, got {factor}")


@dataclass(frozen=True)
class Llama3Scaling:
    r"""LLaMA 3.1's stretching of RoPE: slow waves are slowed further, fast ones stay.

    A frequency ω makes $n = \mathtt{original}\,\omega / 2\pi$ turns over the original context, and becomes

    $$\omega' = (1 - s)\,\frac{\omega}{\mathtt{factor}} + s\,\omega, \qquad
      s = \mathrm{clip}\!\left(\frac{n - \mathtt{low}}{\mathtt{high} - \mathtt{low}}, 0, 1\right).$$

    Paper: Grattafiori et al. (2024). Reference: transformers, rope_type "llama3".

    Raises:
        ValueError: `high` is not above `low`, or a number is not positive.

    Book: llama-rope
    """

    gain: ClassVar[float] = 1.0

    factor: float = 8.0
    low: float = 1.0
    high: float = 4.0
    original: int = 8192

    def __post_init__(self) -> None:
        if not (self.high > self.low > 0 and self.factor > 0 and self.original > 0):
            raise ValueError(f"scaling: expected positive numbers with high > low, got {self}")

    def __call__(self, frequencies: Tensor) -> Tensor:
        """Stretch the frequencies, radians a position."""
        turns = self.original * frequencies / (2 * math.pi)
        s = ((turns - self.low) / (self.high - self.low)).clamp(0, 1)
        return (1 - s) * frequencies / self.factor + s * frequencies


@dataclass(frozen=True)
class LinearScaling:
    r"""Position interpolation: all frequencies are slowed alike, $\omega' = \omega / s$.

    That is to count positions in steps of 1/s, so that `factor` times as many fit into the context
    trained on, and near tokens are told apart less sharply.
    Paper: Chen et al. (2023). Reference: transformers, rope_type "linear".

    Args:
        factor: s, at least 1.

    Raises:
        ValueError: the factor is below 1.

    Book: rope-scaling
    """

    gain: ClassVar[float] = 1.0

    factor: float

    def __post_init__(self) -> None:
        _expect_longer(self.factor)

    def __call__(self, frequencies: Tensor) -> Tensor:
        """Stretch the frequencies (Dh/2,), radians a position."""
        return frequencies / self.factor


@dataclass(frozen=True)
class NTKScaling:
    r"""NTK-aware scaling: a larger base, $\theta' = \theta\, s^{D_h / (D_h - 2)}$.

    In the frequencies this is

    $$\omega'_i = \omega_i\, s^{-i / (D_h/2 - 1)}, \qquad 0 \le i < D_h / 2,$$

    so the fastest hand keeps its speed and the slowest becomes s times slower; a single plane stays.
    Source: a post by its author (bloc97, 2023), given as equation in Peng et al. (2024), section 3.1.
    Reference: transformers, rope_type "dynamic".

    Args:
        factor: s, at least 1.

    Raises:
        ValueError: the factor is below 1.

    Book: rope-scaling
    """

    gain: ClassVar[float] = 1.0

    factor: float

    def __post_init__(self) -> None:
        _expect_longer(self.factor)

    def __call__(self, frequencies: Tensor) -> Tensor:
        """Stretch the frequencies (Dh/2,), radians a position."""
        i = torch.arange(len(frequencies), device=frequencies.device, dtype=frequencies.dtype)
        return frequencies * self.factor ** (-i / max(len(frequencies) - 1, 1))

    @classmethod
    def for_length(cls, length: int, *, original: int, factor: float = 1.0) -> "NTKScaling":
        """Dynamic NTK: the scaling for a text of `length` tokens, none up to the `original` context.

        $$s = \\mathtt{factor} \\cdot \\mathtt{length} / \\mathtt{original} - (\\mathtt{factor} - 1)$$

        Keys that were turned for a shorter text do not fit the ones turned for a longer: a cache has to
        hold them unturned, or all of them be turned anew.

        Raises:
            ValueError: a length is not positive, or the factor is below 1.

        Book: rope-scaling
        """
        if length < 1 or original < 1:
            raise ValueError(f"length, original: expected positive lengths, got {length} and {original}")
        _expect_longer(factor)
        return cls(max(1.0, factor * length / original - (factor - 1)))


@dataclass(frozen=True)
class YarnScaling:
    r"""YaRN: slow hands are slowed by s, fast ones stay, and the scores are sharpened a little.

    The plane that makes r turns over the original context $T_0$ is
    $i(r) = \frac{D_h}{2} \ln\!\big(\tfrac{T_0}{2\pi r}\big) / \ln\theta$, and with
    $a = \lfloor i(\mathtt{fast}) \rfloor$, $b = \lceil i(\mathtt{slow}) \rceil$,

    $$\omega'_i = (1 - g_i)\,\omega_i + g_i\,\frac{\omega_i}{s}, \qquad
      g_i = \mathrm{clip}\!\left(\frac{i - a}{b - a}, 0, 1\right).$$

    Cosines and sines are multiplied by $0.1 \ln s + 1$, so every score by its square. The ramp runs over
    the planes, as in the released code; `Llama3Scaling` runs one over the turns.
    Paper: Peng et al. (2024). Reference: transformers, rope_type "yarn".

    Args:
        factor: s, at least 1.
        original: T₀, the context trained on.
        fast: turns from which on a hand stays.
        slow: turns up to which a hand is slowed in full.

    Raises:
        ValueError: the factor is below 1, `fast` is not above `slow`, or a number is not positive.

    Book: rope-scaling
    """

    factor: float
    original: int
    fast: float = 32.0
    slow: float = 1.0

    def __post_init__(self) -> None:
        _expect_longer(self.factor)
        if not (self.fast > self.slow > 0 and self.original > 0):
            raise ValueError(f"scaling: expected positive numbers with fast > slow, got {self}")

    @property
    def gain(self) -> float:
        """0.1 ln s + 1, the factor on cosines and sines."""
        return 0.1 * math.log(self.factor) + 1

    def __call__(self, frequencies: Tensor) -> Tensor:
        """Stretch the frequencies (Dh/2,), radians a position."""
        planes = len(frequencies)
        if planes < 2:
            raise ValueError(f"frequencies: expected two planes or more, between which to ramp, got {planes}")
        first, last = (math.log(float(omega)) for omega in (frequencies[0], frequencies[-1]))
        if first <= last:
            raise ValueError("frequencies: expected them to fall from the first plane to the last")

        def plane(turns: float) -> float:  # where the row of frequencies makes so many turns
            omega = 2 * math.pi * turns / self.original
            return (first - math.log(omega)) / (first - last) * (planes - 1)

        a = max(math.floor(plane(self.fast)), 0)
        b = min(math.ceil(plane(self.slow)), 2 * planes - 1)  # beyond the last plane, as released
        i = torch.arange(planes, device=frequencies.device, dtype=frequencies.dtype)
        g = ((i - a) / (b - a if b > a else 1e-3)).clamp(0, 1)
        return (1 - g) * frequencies + g * frequencies / self.factor
