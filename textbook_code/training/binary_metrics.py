"""How good is a yes or no? Measures of a classifier with two classes, and how far to trust them.

Logits above 0 say yes. What is measured on pictures that come in groups, such as many views of one person,
has an interval that counts the groups.

Book: person-metrics
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class Confusion(NamedTuple):
    """How often each answer was given to each label.

    Attributes:
        hits: yes, and there is one.
        misses: no, though there is one.
        false_alarms: yes, though there is none.
        rejections: no, and there is none.

    Book: person-metrics
    """

    hits: int
    misses: int
    false_alarms: int
    rejections: int

    @property
    def sensitivity(self) -> float:
        """Share of the persons that were seen."""
        return _share(self.hits, self.hits + self.misses)

    @property
    def specificity(self) -> float:
        """Share of the rest that was rejected."""
        return _share(self.rejections, self.rejections + self.false_alarms)

    @property
    def balanced_accuracy(self) -> float:
        """The mean of both, 1/2 for any answer that does not look at the picture."""
        return (self.sensitivity + self.specificity) / 2


class Interval(NamedTuple):
    """A measured value and between what it would lie, had other groups been met.

    Book: person-metrics
    """

    value: float
    low: float
    high: float


class Bin(NamedTuple):
    """Answers of about one certainty.

    Attributes:
        number: how many answers.
        stated: the mean probability of yes that they stated.
        found: the share that was a yes.

    Book: person-metrics
    """

    number: int
    stated: float
    found: float


def confusion(logits: Tensor, labels: Tensor, *, threshold: float = 0.0) -> Confusion:
    """Count the four cases; yes is a logit above `threshold`.

    Args:
        logits: (n,) of any dtype that can be compared; for the bytes of an integer model the threshold is its
            zero point.
        labels: (n,) bool.

    Raises:
        TypeError: the labels are not bool.
        ValueError: the shapes differ, or there is nothing.

    Book: person-metrics
    """
    _expect(logits, labels)
    yes = logits > threshold
    return Confusion(
        int((yes & labels).sum()),
        int((~yes & labels).sum()),
        int((yes & ~labels).sum()),
        int((~yes & ~labels).sum()),
    )


def balanced_accuracy(logits: Tensor, labels: Tensor, *, threshold: float = 0.0) -> float:
    r"""$\tfrac12 (\mathrm{sensitivity} + \mathrm{specificity})$, whatever the classes' shares.

    Raises:
        TypeError: the labels are not bool.
        ValueError: the shapes differ, or a class is missing.

    Book: person-metrics
    """
    _expect_both(logits, labels)
    return confusion(logits, labels, threshold=threshold).balanced_accuracy


def balanced_accuracy_interval(
    logits: Tensor,
    labels: Tensor,
    groups: Sequence[str],
    *,
    threshold: float = 0.0,
    level: float = 0.95,
    draws: int = 2000,
    seed: int = 0,
) -> Interval:
    """Balanced accuracy with a percentile interval of a bootstrap over groups.

    Each draw takes as many groups as there are, with replacement, and all pictures of each. Six skin tones of
    one concept then count as one thing that might have been another, and not as six. A draw without one of
    the classes is left out. An interval of a faultless result has no width, which only says that the
    bootstrap has no fault to draw.

    Args:
        groups: of each picture; see `Pictures`.
        level: share of the draws that the interval covers.
        draws: how many.
        seed: of the draws.

    Raises:
        TypeError: the labels are not bool.
        ValueError: the shapes or the number of groups differ, a class is missing, or the level or the number
            of draws makes no sense.

    Book: person-metrics
    """
    _expect_both(logits, labels)
    if len(groups) != len(labels):
        raise ValueError(f"groups: expected {len(labels)}, one for each label, got {len(groups)}")
    if not 0 < level < 1 or draws < 1:
        raise ValueError(f"expected a level between 0 and 1 and at least 1 draw, got {level} and {draws}")
    names = {name: i for i, name in enumerate(dict.fromkeys(groups))}
    place = np.array([names[name] for name in groups])
    yes, there = (logits > threshold).numpy(), labels.numpy()
    counts = np.zeros((len(names), 4))
    for column, case in enumerate((yes & there, ~yes & there, yes & ~there, ~yes & ~there)):
        np.add.at(counts[:, column], place, case)
    rng = np.random.default_rng(seed)
    drawn = rng.multinomial(len(names), np.full(len(names), 1 / len(names)), size=draws)
    hits, misses, alarms, rejections = (drawn @ counts).T
    whole = (hits + misses > 0) & (alarms + rejections > 0)
    values = (hits[whole] / (hits + misses)[whole] + rejections[whole] / (alarms + rejections)[whole]) / 2
    if not len(values):
        raise ValueError("groups: no draw had both classes; there are too few groups for an interval")
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    value = balanced_accuracy(logits, labels, threshold=threshold)
    return Interval(value, float(low), float(high))


def roc(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The receiver operating characteristic: what each threshold lets through.

    Returns:
        False alarms and hits as shares, and the threshold at and above which a yes is said, for each distinct
        logit from the highest on; the first point is (0, 0) with threshold ∞.

    Raises:
        TypeError: the labels are not bool.
        ValueError: the shapes differ, or a class is missing.

    Book: person-metrics
    """
    _expect_both(logits, labels)
    scores = logits.double()
    order = scores.argsort(descending=True, stable=True)
    scores, there = scores[order], labels[order]
    last = torch.cat([scores[1:] != scores[:-1], torch.tensor([True])])
    hits, alarms = there.cumsum(0)[last], (~there).cumsum(0)[last]
    start = torch.zeros(1, dtype=torch.float64)
    return (
        torch.cat([start, alarms / (~labels).sum().double()]),
        torch.cat([start, hits / labels.sum().double()]),
        torch.cat([torch.tensor([torch.inf], dtype=torch.float64), scores[last]]),
    )


def roc_area(logits: Tensor, labels: Tensor) -> float:
    """The share of pairs, one of each class, that are in the right order; a tie counts a half.

    It is the area under the curve of `roc`, and asks for no threshold.

    Raises:
        TypeError: the labels are not bool.
        ValueError: the shapes differ, or a class is missing.

    Book: person-metrics
    """
    alarms, hits, _ = roc(logits, labels)
    return float(torch.trapezoid(hits, alarms))


def reliability(logits: Tensor, labels: Tensor, *, bins: int = 10) -> list[Bin]:
    r"""Set what is stated, $\sigma(\mathrm{logit})$, beside what is found, in bins of equal width.

    Returns:
        The bins that are not empty, from 0 to 1.

    Raises:
        TypeError: the labels are not bool.
        ValueError: the shapes differ, or `bins` is not positive.

    Book: person-metrics
    """
    _expect(logits, labels)
    if bins < 1:
        raise ValueError(f"bins: expected at least 1, got {bins}")
    stated = logits.double().sigmoid()
    place = (stated * bins).long().clamp(max=bins - 1)
    out = []
    for i in place.unique().tolist():
        inside = place == i
        out.append(
            Bin(int(inside.sum()), stated[inside].mean().item(), labels[inside].double().mean().item())
        )
    return out


def calibration_error(logits: Tensor, labels: Tensor, *, bins: int = 10) -> float:
    r"""Expected calibration error, $\sum_b \frac{n_b}{n}\, |\mathrm{stated}_b - \mathrm{found}_b|$.

    Paper: Guo et al. (2017).

    Raises:
        TypeError: the labels are not bool.
        ValueError: the shapes differ, or `bins` is not positive.

    Book: person-metrics
    """
    return sum(b.number * abs(b.stated - b.found) for b in reliability(logits, labels, bins=bins)) / len(
        labels
    )


def _share(part: int, whole: int) -> float:
    return part / whole if whole else float("nan")


def _expect(logits: Tensor, labels: Tensor) -> None:
    if not isinstance(labels, Tensor) or labels.dtype != torch.bool:
        got = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
        raise TypeError(f"labels: expected a tensor of {torch.bool}, got {got}")
    if not isinstance(logits, Tensor):
        raise TypeError(f"logits: expected a tensor, got {type(logits).__name__}")
    if labels.dim() != 1 or logits.shape != labels.shape or not len(labels):
        raise ValueError(
            f"expected logits and labels of one shape (n,) with n ≥ 1, got {tuple(logits.shape)} and "
            f"{tuple(labels.shape)}"
        )


def _expect_both(logits: Tensor, labels: Tensor) -> None:
    _expect(logits, labels)
    if labels.all() or not labels.any():
        raise ValueError(f"labels: expected both classes, got only {bool(labels[0])}")
