"""Affine maps, observers, rounding with a gradient, quantisation-aware training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.ao.quantization import observer as reference

from textbook_code.compression import quantize
from textbook_code.compression.quantize import (
    Affine,
    MeanSquaredError,
    MinMax,
    MovingAverage,
    Percentile,
    QuantisationAware,
    fake_quantize,
    prepare,
)
from textbook_code.models.vision.tiny_vit import TinyViT, TinyViTConfig, fold


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(5)


# Affine maps.


def test_zero_is_exact_and_no_number_is_off_by_more_than_half_a_step() -> None:
    for low, high in ((-1.3, 2.7), (0.4, 9.0), (-8.0, -0.1), (0.0, 0.0), (-1e-9, 1e-9), (-500.0, 3.0)):
        affine = Affine.of_range(torch.tensor(low), torch.tensor(high))
        assert affine.dequantize(affine.quantize(torch.zeros(1))).item() == 0
        x = torch.empty(1000).uniform_(min(low, 0), max(high, 0))
        error = (affine.dequantize(affine.quantize(x)) - x).abs().max()
        assert error <= affine.scale * 1.01 / 2 + 1e-9 or error <= affine.scale  # the ends are rounded to z
        q = affine.quantize(torch.tensor([-1e9, 1e9]))
        assert q.tolist() == [-128, 127]


@pytest.mark.parametrize("bits", [2, 4, 8, 16])
def test_symmetric_and_narrow(bits: int) -> None:
    high = 2 ** (bits - 1) - 1
    affine = Affine.of_range(torch.tensor(-3.0), torch.tensor(2.0), symmetric=True, narrow=True, bits=bits)
    assert (affine.low, affine.high, affine.zero.item()) == (-high, high, 0)
    assert affine.quantize(torch.tensor([-3.0, 3.0, 0.0])).tolist() == [-high, high, 0]


def test_per_channel_weights_lose_less() -> None:
    weight = torch.randn(6, 20) * torch.tensor([0.01, 0.1, 1, 3, 10, 0.0])[:, None]
    one, each = (Affine.of_weight(weight, per_channel=p) for p in (False, True))
    assert each.scale.shape == (6,) and one.scale.shape == ()
    torch.testing.assert_close(each.scale[:5], weight.abs().amax(1)[:5] / 127)
    error = [(a.dequantize(a.quantize(weight)) - weight).square().mean(1) for a in (one, each)]
    assert (error[1][:4] < error[0][:4] / 5).all()
    assert error[1][5] == 0  # a channel of zeros


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Affine(torch.tensor(0.0), torch.tensor(0.0)), "scale: expected positive"),
        (lambda: Affine(torch.tensor(1.0), torch.tensor(0.5)), "zero: expected integers"),
        (lambda: Affine(torch.tensor(1.0), torch.tensor(300.0)), "zero: expected integers"),
        (lambda: Affine(torch.ones(3), torch.zeros(3)), "scale, zero: expected one of each"),
        (lambda: Affine(torch.ones(3), torch.zeros(2), axis=0), "scale, zero: expected one of each"),
        (lambda: Affine.of_range(torch.tensor(1.0), torch.tensor(0.0)), "minimum, maximum"),
        (lambda: Affine.of_range(torch.tensor(0.0), torch.tensor(float("inf"))), "minimum, maximum"),
        (lambda: Affine.of_range(torch.tensor(0.0), torch.tensor(1.0), bits=1), "bits: expected at least 2"),
        (lambda: MovingAverage(0.0), "constant: expected"),
        (lambda: Percentile(0.0), "percent: expected"),
        (lambda: MinMax().observe(torch.zeros(0)), "empty tensor"),
        (lambda: MinMax().observe(torch.tensor([1.0, float("nan")])), "got nan"),
    ],
)
def test_bad_arguments_are_named(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("observer", [MinMax, MovingAverage, Percentile, MeanSquaredError])
def test_an_observer_that_has_seen_nothing(observer: Callable[[], Any]) -> None:
    with pytest.raises(RuntimeError, match="nothing has been observed"):
        observer().affine()


# Against torch.

BATCHES = [(11, 7), (11, 3), (11, 5)]


def same(ours: Affine, theirs: Any) -> None:
    scale, zero = theirs.calculate_qparams()
    torch.testing.assert_close(ours.scale.flatten(), scale, rtol=1e-6, atol=0)
    assert torch.equal(ours.zero.flatten().int(), zero.int())


@pytest.mark.parametrize("shift", [-4.0, 0.3, 5.0])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("kind", ["min-max", "moving", "per channel"])
def test_observers_are_torchs(kind: str, symmetric: bool, shift: float) -> None:
    axis = 0 if kind == "per channel" else None
    scheme = getattr(
        torch, f"per_{'tensor' if axis is None else 'channel'}_{'symmetric' if symmetric else 'affine'}"
    )
    options = {
        "dtype": torch.qint8,
        "qscheme": scheme,
        "quant_min": -127 if symmetric else -128,
        "quant_max": 127,
    }
    ours, theirs = {
        "min-max": lambda: (MinMax(), reference.MinMaxObserver(**options)),
        "moving": lambda: (MovingAverage(0.2), reference.MovingAverageMinMaxObserver(0.2, **options)),
        "per channel": lambda: (MinMax(axis=0), reference.PerChannelMinMaxObserver(ch_axis=0, **options)),
    }[kind]()
    for shape in BATCHES:
        x = torch.randn(shape) + shift
        ours.observe(x)
        theirs(x)
    same(ours.affine(symmetric=symmetric, narrow=symmetric), theirs)


@pytest.mark.parametrize("per_channel", [False, True])
def test_fake_quantize_is_torchs(per_channel: bool) -> None:
    x = torch.randn(9, 40) * 3
    x.requires_grad_()
    y = x.detach().clone().requires_grad_()
    seed = torch.randn_like(x)
    if per_channel:
        scale, zero = torch.rand(9) * 0.03 + 0.002, torch.randint(-60, 60, (9,), dtype=torch.int32)
        theirs = torch.fake_quantize_per_channel_affine(y, scale, zero, 0, -128, 127)
        ours = Affine(scale, zero.float(), axis=0).fake(x)
    else:
        theirs = torch.fake_quantize_per_tensor_affine(y, 0.013, 17, -128, 127)
        ours = fake_quantize(x, torch.tensor(0.013), torch.tensor(17.0))
    (ours * seed).sum().backward()
    (theirs * seed).sum().backward()
    assert x.grad is not None and y.grad is not None
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    assert torch.equal(x.grad, y.grad)
    assert 0 < (x.grad == 0).sum() < x.numel()  # some were clipped, and not all


def test_fake_quantize_is_quantize_and_back() -> None:
    affine = Affine.of_range(torch.tensor([-1.0, -2.0]), torch.tensor([3.0, 0.5]), axis=1)
    x = torch.randn(30, 2)
    torch.testing.assert_close(affine.fake(x), affine.dequantize(affine.quantize(x)))


# Observers and their traps.


def test_the_moving_average_closes_the_range_of_a_scalar() -> None:
    logits = torch.randn(2000) * 3
    average, whole = MovingAverage(), MinMax()
    for logit in logits:
        average.observe(logit)
        whole.observe(logit)
    assert average.minimum == average.maximum
    clipped = (average.affine().fake(logits) - logits).abs().max()
    assert clipped > 20 * (whole.affine().fake(logits) - logits).abs().max()


def test_percentile_and_mean_squared_error_clip_an_outlier() -> None:
    x = torch.randn(20_000)
    x[7] = 60.0
    error = {}
    for observer in (MinMax(), Percentile(99.9), MeanSquaredError()):
        observer.observe(x[:10_000])
        observer.observe(x[10_000:])
        error[type(observer).__name__] = (observer.affine().fake(x) - x)[8:].square().mean().item()
    assert error["Percentile"] < error["MinMax"] / 20
    observer = MeanSquaredError(tries=200)
    observer.observe(x[8:])
    full = MinMax()
    full.observe(x[8:])
    assert (observer.affine().fake(x) - x)[8:].square().mean() <= (full.affine().fake(x) - x)[
        8:
    ].square().mean()
    exact = Percentile(100.0)
    exact.observe(x)
    assert exact.affine().scale == pytest.approx(((x.max() - x.min()) / 255).item())


# Quantisation-aware training.


def tiny(norm: str = "batch", activation: str = "relu", **sizes: int) -> TinyViT:
    made: dict[str, int] = {
        "image_size": 8,
        "d_model": 12,
        "num_layers": 2,
        "num_heads": 3,
        "d_ff": 20,
    } | sizes
    model = TinyViT(TinyViTConfig(norm=norm, activation=activation, **made))
    for _ in range(5):  # running statistics
        model(torch.randn(16, 3, model.config.image_size, model.config.image_size))
    return fold(model.eval())


@pytest.mark.parametrize("norm", ["batch", "layer"])
@pytest.mark.parametrize("activation", ["relu", "hardswish"])
def test_the_rounded_model_is_near_the_float_one(norm: str, activation: str) -> None:
    model, images = tiny(norm, activation), torch.rand(64, 3, 8, 8) * 2 - 1
    aware = prepare(model, images)
    with torch.no_grad():
        exact, rounded = model(images), aware(images)
    error = (rounded - exact).square().mean().sqrt() / exact.std()
    assert 0 < error < 0.15
    assert aware.ranges["input"].scale == 1 / 128
    steps = rounded / aware.ranges["logit"].scale
    torch.testing.assert_close(steps, steps.round(), atol=1e-3, rtol=0)
    assert ("blocks.0.ffn.wide" in aware.ranges) == (activation == "hardswish")
    assert ("final_norm" in aware.ranges) == (norm == "layer")


def test_every_range_is_used_and_every_weight_is_rounded() -> None:
    model, images = tiny(), torch.rand(16, 3, 8, 8) * 2 - 1
    aware = prepare(model, images)
    names = set(aware.ranges)
    assert len(names) == 1 + 3 + 2 * 10 + 2  # input; patches, positions, sum; blocks; mean, logit
    with torch.no_grad():
        right = aware(images)
        for name in names:
            old = aware.ranges[name]
            aware.ranges[name] = Affine(old.scale * 9, old.zero, old.low, old.high)
            assert not torch.equal(aware(images), right), name
            aware.ranges[name] = old
        for layer in (m for m in aware.modules() if isinstance(m, nn.Linear | nn.Conv2d)):
            weight = layer.weight.detach().clone()
            affine = Affine.of_weight(weight)
            layer.weight.copy_(affine.fake(weight))  # on the grid already: nothing changes
            torch.testing.assert_close(
                aware(images), right, atol=float(aware.ranges["logit"].scale) * 1.01, rtol=0
            )
            layer.weight.copy_(weight)


def test_training_lowers_the_loss_and_gives_a_folded_model() -> None:
    model = tiny()
    before = {name: p.clone() for name, p in model.state_dict().items()}
    images = torch.rand(64, 3, 8, 8) * 2 - 1
    labels = (images[:, 0].mean((1, 2)) > 0).float()
    aware = prepare(model, images).train()
    optimizer = torch.optim.Adam(aware.parameters(), 1e-2)
    losses = []
    for step in range(60):
        if step % 10 == 0:  # held, the range of an untrained logit would stop it from growing
            aware.calibrate(images)
        loss = nn.functional.binary_cross_entropy_with_logits(aware(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    done = aware.finished()
    assert isinstance(done, TinyViT) and not done.training and done.config == model.config
    assert all(
        p.grad is not None and p.grad.abs().sum() > 0
        for n, p in aware.named_parameters()
        if "k_proj.bias" not in n
    )
    assert all(torch.equal(before[name], p) for name, p in model.state_dict().items())  # untouched
    assert any(not torch.equal(before[name], p) for name, p in done.state_dict().items())
    aware.calibrate(images)
    with torch.no_grad():
        loss = nn.functional.binary_cross_entropy_with_logits(aware(images), labels)
        exact = nn.functional.binary_cross_entropy_with_logits(done(images), labels)
    assert abs(loss - exact) < 0.1


def test_calibration_looks_at_the_float_model(monkeypatch: pytest.MonkeyPatch) -> None:
    model, images = tiny(), torch.rand(8, 3, 8, 8) * 2 - 1
    seen: list[Tensor] = []

    class Spy(MinMax):
        def observe(self, x: Tensor) -> None:
            seen.append(x)
            super().observe(x)

    prepare(model, images, observer=Spy)
    with torch.no_grad():
        torch.testing.assert_close(seen[-1].flatten(), model(images), atol=1e-6, rtol=1e-5)


def test_what_cannot_be_prepared_is_named() -> None:
    model = TinyViT(TinyViTConfig(image_size=8, d_model=8, num_heads=2, num_layers=1))
    with pytest.raises(ValueError, match="model: expected what fold"):
        QuantisationAware(model)
    with pytest.raises(RuntimeError, match="the ranges are not chosen yet"):
        QuantisationAware(fold(model))(torch.zeros(1, 3, 8, 8))
    with pytest.raises(ValueError, match="calibration: expected pictures, got none"):
        prepare(fold(model), torch.zeros(0, 3, 8, 8))
    with pytest.raises(ValueError, match="calibration: expected shape"):
        prepare(fold(model), torch.zeros(4, 8, 8, 3))


@pytest.mark.parametrize(
    "mutation", ["no clip in the gradient", "zero point not whole", "range without zero"]
)
def test_planted_mistakes_are_seen(mutation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if mutation == "no clip in the gradient":
        monkeypatch.setattr(
            quantize, "fake_quantize",
            lambda x, scale, zero, low=-128, high=127:
                x + (((x / scale).round() + zero).clamp(low, high).sub(zero).mul(scale) - x).detach(),
        )  # fmt: skip
        check: Callable[[], None] = lambda: test_fake_quantize_is_torchs(True)  # noqa: E731
    elif mutation == "zero point not whole":
        monkeypatch.setattr(
            Affine, "__post_init__", lambda self: object.__setattr__(self, "zero", self.zero + 0.4)
        )
        check = test_zero_is_exact_and_no_number_is_off_by_more_than_half_a_step
    else:
        right = Affine.of_range.__func__  # type: ignore[attr-defined]

        def shifted(cls: Any, low: Tensor, high: Tensor, **options: Any) -> Affine:
            return (
                right(cls, low - low.clamp(min=0), high, **options)
                if low > 0
                else right(cls, low * 0.5, high, **options)
            )

        monkeypatch.setattr(Affine, "of_range", classmethod(shifted))
        check = test_zero_is_exact_and_no_number_is_off_by_more_than_half_a_step
    with pytest.raises(AssertionError):
        check()
