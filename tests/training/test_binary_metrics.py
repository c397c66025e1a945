"""Measures of a yes or no, against scikit-learn, by hand, and with faults planted."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn import metrics
from sklearn.calibration import calibration_curve
from torch import Tensor

from textbook_code.training.binary_metrics import (
    balanced_accuracy,
    balanced_accuracy_interval,
    calibration_error,
    confusion,
    reliability,
    roc,
    roc_area,
)


def case(seed: int, n: int = 200, ties: bool = True) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    labels = torch.rand(n, generator=g) < 0.3
    logits = 2 * torch.randn(n, generator=g) + labels.float()
    return (2 * logits).round() / 2 if ties else logits, labels


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("ties", [False, True])
def test_against_scikit_learn(seed: int, ties: bool) -> None:
    logits, labels = case(seed, ties=ties)
    c = confusion(logits, labels)
    wanted = metrics.confusion_matrix(labels, logits > 0)
    assert [[c.rejections, c.false_alarms], [c.misses, c.hits]] == wanted.tolist()
    assert math.isclose(
        balanced_accuracy(logits, labels), metrics.balanced_accuracy_score(labels, logits > 0)
    )
    assert math.isclose(roc_area(logits, labels), metrics.roc_auc_score(labels, logits))
    false_alarm_rate, hit_rate, thresholds = metrics.roc_curve(labels, logits, drop_intermediate=False)
    for got, want in zip(roc(logits, labels), (false_alarm_rate, hit_rate, thresholds), strict=True):
        np.testing.assert_allclose(got.numpy(), want, atol=1e-12)
    found, stated = calibration_curve(labels, logits.double().sigmoid(), n_bins=10)
    bins = reliability(logits, labels)
    np.testing.assert_allclose([b.found for b in bins], found, atol=1e-12)
    np.testing.assert_allclose([b.stated for b in bins], stated, atol=1e-12)
    assert sum(b.number for b in bins) == len(labels)


def test_the_threshold_is_no_yes_and_a_byte_model_brings_its_own() -> None:
    q = torch.tensor([-3, -3, 5, -4], dtype=torch.int8)
    labels = torch.tensor([True, False, True, False])
    assert confusion(q, labels, threshold=-3) == (1, 1, 0, 2)
    assert confusion(q, labels) == (1, 1, 0, 2)
    assert confusion(q, labels, threshold=-4) == (2, 0, 1, 1)


def test_an_answer_that_does_not_look_is_at_a_half_however_rare_a_person_is() -> None:
    labels = torch.zeros(1000, dtype=torch.bool)
    labels[:7] = True
    for answer in (-1.0, 1.0):
        logits = torch.full((1000,), answer)
        assert balanced_accuracy(logits, labels) == 0.5
        assert roc_area(logits, labels) == 0.5


def test_a_perfect_and_a_perfectly_wrong_order() -> None:
    labels = torch.arange(10) >= 4
    assert roc_area(torch.arange(10.0), labels) == 1
    assert roc_area(-torch.arange(10.0), labels) == 0


def test_the_interval_counts_groups_and_not_pictures() -> None:
    g = torch.Generator().manual_seed(0)
    labels = torch.arange(40) % 2 == 0
    right = torch.rand(40, generator=g) < 0.8
    logits = torch.where(right == labels, 1.0, -1.0)
    groups = [str(i) for i in range(40)]
    once = balanced_accuracy_interval(logits, labels, groups)
    copied = balanced_accuracy_interval(
        logits.repeat(10), labels.repeat(10), groups * 10
    )  # ten copies tell no more
    mistaken = balanced_accuracy_interval(logits.repeat(10), labels.repeat(10), [str(i) for i in range(400)])
    assert once == copied
    assert mistaken.high - mistaken.low < 0.5 * (once.high - once.low)
    assert once.low < once.value < once.high
    assert balanced_accuracy_interval(logits, labels, groups, seed=0) == once
    assert balanced_accuracy_interval(logits, labels, groups, seed=1) != once


def test_the_interval_is_that_of_a_bootstrap_written_as_a_loop() -> None:
    logits, labels = case(3, n=60)
    groups = [str(i // 3) for i in range(60)]
    got = balanced_accuracy_interval(logits, labels, groups, draws=4000)
    rng, values = np.random.default_rng(5), []
    for _ in range(4000):
        rows = np.concatenate([3 * k + np.arange(3) for k in rng.integers(0, 20, 20)])
        if 0 < labels[rows].sum() < len(rows):
            values.append(balanced_accuracy(logits[rows], labels[rows]))
    low, high = np.quantile(values, [0.025, 0.975])
    assert abs(got.low - low) < 0.02 and abs(got.high - high) < 0.02


def test_the_interval_covers_what_is_true_about_as_often_as_it_says() -> None:
    """A model that is right on 8 groups of 10: how often is 0.8 inside?"""
    rng, inside = np.random.default_rng(0), 0
    labels = torch.arange(240) // 4 % 2 == 0
    groups = [str(i // 4) for i in range(240)]
    for _ in range(200):
        right = torch.from_numpy(rng.random(60) < 0.8).repeat_interleave(4)
        logits = torch.where(right == labels, 1.0, -1.0)
        got = balanced_accuracy_interval(logits, labels, groups, draws=400)
        inside += got.low <= 0.8 <= got.high
    assert 0.88 <= inside / 200 <= 1


def test_calibration_of_one_that_tells_the_truth_and_of_a_boaster() -> None:
    g = torch.Generator().manual_seed(1)
    logits = 2 * torch.randn(50_000, generator=g)
    labels = torch.rand(50_000, generator=g) < logits.sigmoid()
    assert calibration_error(logits, labels) < 0.01
    assert calibration_error(4 * logits, labels) > 0.1
    hand = calibration_error(torch.zeros(4), torch.tensor([True, True, True, False]))
    assert math.isclose(hand, 0.25)


def test_bad_input() -> None:
    logits, labels = case(0)
    for f in (confusion, balanced_accuracy, roc, reliability):
        with pytest.raises(TypeError, match=r"labels: expected a tensor of torch\.bool, got torch\.int64"):
            f(logits, labels.long())
        with pytest.raises(ValueError, match=r"one shape \(n,\) .* got \(199,\) and \(200,\)"):
            f(logits[1:], labels)
        with pytest.raises(ValueError, match="n ≥ 1"):
            f(logits[:0], labels[:0])
    with pytest.raises(TypeError, match="logits: expected a tensor, got list"):
        confusion(logits.tolist(), labels)
    for f in (balanced_accuracy, roc):
        with pytest.raises(ValueError, match="expected both classes, got only True"):
            f(logits, torch.ones(200, dtype=torch.bool))
    with pytest.raises(ValueError, match="groups: expected 200, one for each label, got 1"):
        balanced_accuracy_interval(logits, labels, ["a"])
    for wrong in ({"level": 1.0}, {"level": 0.0}, {"draws": 0}):
        with pytest.raises(ValueError, match="level between 0 and 1"):
            balanced_accuracy_interval(logits, labels, ["a"] * 200, **wrong)
    with pytest.raises(ValueError, match="bins: expected at least 1, got 0"):
        reliability(logits, labels, bins=0)
