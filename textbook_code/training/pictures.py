"""Training a network of one logit on pictures of several sources, and asking it for its logits.

B batch, n pictures.

Book: tiny-model
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from textbook_code.data.people import Pictures, augment, examination, model_input
from textbook_code.training.binary_metrics import balanced_accuracy_interval, calibration_error, roc_area

Batch = tuple[Tensor, Tensor]
"""Images (B, 3, 32, 32) as the model reads them, and labels (B,), 1.0 for a person."""


def balanced_batches(
    shares: Mapping[str, float],
    pictures: Mapping[str, Pictures],
    *,
    batch_size: int,
    backgrounds: Tensor | None = None,
    strength: float = 1.0,
) -> Callable[[int, torch.Generator], Batch]:
    """Batches in which each source has its share and, within it, both answers are equally often right.

    Without that a network would do well by answering what the largest source answers most.

    Args:
        shares: of each source in a batch; they are scaled to a sum of 1.
        pictures: of each source, to draw from with replacement.
        batch_size: B.
        backgrounds, strength: as `augment` takes them.

    Returns:
        A function of the batch's number, which is not used, and a generator, as `training.loop.train` wants.

    Raises:
        ValueError: there is no share, one is not positive, a source has no pictures or only one of the two
            answers, or the batch has fewer than two places.

    Book: person-augment
    """
    if not shares or min(shares.values()) <= 0:
        raise ValueError(f"shares: expected one or more sources with a positive share, got {dict(shares)!r}")
    if batch_size < 2:
        raise ValueError(f"batch_size: expected at least 2, got {batch_size}")
    parts: list[tuple[float, Pictures, tuple[Tensor, Tensor]]] = []
    for name, share in shares.items():
        if name not in pictures:
            raise ValueError(f"pictures: expected those of {name!r}, got {', '.join(pictures) or 'none'}")
        labels = pictures[name].labels
        both = ((~labels).nonzero().squeeze(1), labels.nonzero().squeeze(1))
        if not all(len(places) for places in both):
            raise ValueError(f"pictures: expected people and others in {name!r}, got one of the two only")
        parts.append((share / sum(shares.values()), pictures[name], both))

    def batch_at(number: int, generator: torch.Generator) -> Batch:
        images, labels = [], []
        left, share_left = batch_size, 1.0
        for share, source, both in parts:
            count = round(left * share / share_left)
            left, share_left = left - count, share_left - share
            answer = torch.rand(count, generator=generator) < 0.5
            draw = torch.rand(count, generator=generator)
            places = torch.empty(count, dtype=torch.long)
            for which, known in enumerate(both):
                here = answer == bool(which)
                places[here] = known[(draw[here] * len(known)).long().clamp(max=len(known) - 1)]
            chosen = source[places]
            images.append(augment(chosen, generator, backgrounds=backgrounds, strength=strength))
            labels.append(chosen.labels.float())
        return torch.cat(images), torch.cat(labels)

    return batch_at


def one_logit_loss(model: nn.Module, batch: Batch) -> Tensor:
    r"""Binary cross-entropy of a network's logits z with the labels y, in nats, averaged.

    $$\mathcal L = -\frac1B \sum_b y_b \log \sigma(z_b) + (1 - y_b) \log (1 - \sigma(z_b))$$

    Book: tiny-model
    """
    images, labels = batch
    return F.binary_cross_entropy_with_logits(model(images), labels)


@torch.no_grad()
def examined_logits(model: nn.Module, pictures: Pictures, *, batch_size: int = 128) -> Tensor:
    """The logits (n,) that a model gives the examination pictures; above 0 it says person.

    The model is evaluated, and left in the mode that it was in.

    Raises:
        ValueError: there are no pictures.

    Book: person-metrics
    """
    if not len(pictures):
        raise ValueError("pictures: expected at least one, got none")
    training = model.training
    model.eval()
    images = model_input(examination(pictures))
    logits = torch.cat([model(part) for part in images.split(batch_size)])
    model.train(training)
    return logits


def examined(model: nn.Module, pictures: Pictures) -> dict[str, Any]:
    """How well a model judges one source, as numbers that a record keeps.

    Returns:
        Counts of `pictures` and `groups`; `balanced_accuracy` with the `interval` that counts groups;
        `sensitivity`, `specificity`, `roc_area`, `calibration_error` and `loss`, the binary cross-entropy in
        nats.

    Raises:
        ValueError: there are no pictures, or only people, or none.

    Book: person-metrics
    """
    logits, labels = examined_logits(model, pictures), pictures.labels
    value, low, high = balanced_accuracy_interval(logits, labels, pictures.groups)
    yes = logits > 0
    numbers = {
        "balanced_accuracy": value,
        "sensitivity": yes[labels].float().mean().item(),
        "specificity": (~yes[~labels]).float().mean().item(),
        "roc_area": roc_area(logits, labels),
        "calibration_error": calibration_error(logits, labels),
        "loss": F.binary_cross_entropy_with_logits(logits, labels.float()).item(),
    }
    return {
        "pictures": len(pictures),
        "groups": len(set(pictures.groups)),
        "interval": [round(low, 4), round(high, 4)],
        **{name: round(number, 4) for name, number in numbers.items()},
    }
