"""The baselines: what they compute, how much it takes, and what they refuse."""

from __future__ import annotations

import pytest
import torch
from parity import loud_, parity_row
from sklearn.linear_model import LogisticRegression
from timm.models.efficientnet import _gen_mobilenet_v1
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from textbook_code.models.vision.baselines import Baseline, MobileNetV1, PixelRegression, SmallCnn
from textbook_code.models.vision.tiny_vit import TinyViTConfig

MODELS = {
    "pixels": PixelRegression,
    "cnn": SmallCnn,
    "mobilenet": MobileNetV1,
    "small cnn": lambda: SmallCnn(20, 2, widths=(3, 5)),
    "mobilenet of the paper": lambda: MobileNetV1(64, width=1.0, stem_stride=2),
}


@pytest.mark.parametrize("name", MODELS)
def test_macs_are_counted_as_torch_counts_them(name):
    model: Baseline = MODELS[name]()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(torch.zeros(1, model.in_channels, model.image_size, model.image_size))
    assert counter.get_total_flops() == 2 * model.macs
    assert model.num_parameters == sum(p.numel() for p in model.parameters())


def test_counting_leaves_the_model_as_it_was():
    model = SmallCnn().train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    assert model.macs == model.macs
    assert model.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not any(m._forward_hooks for m in model.modules())


def test_sizes():
    assert PixelRegression().macs == 3072
    assert PixelRegression().num_parameters == 3073
    assert SmallCnn().macs == pytest.approx(TinyViTConfig().macs, rel=0.01)
    by_hand = 27 * 24 * 1024 + 9 * 24 * 48 * 256 + 9 * 48 * 96 * 64 + 9 * 96 * 84 * 64 + 84
    assert SmallCnn().macs == by_hand
    full, separable = SmallCnn(widths=(8,)).macs, 9 * 8 * 1024 + 8 * 16 * 1024
    assert full == 27 * 8 * 1024 + 8
    first = MobileNetV1().body[3:9]  # the first pair: 8 channels, then 16
    assert (
        sum(m.weight[0].numel() * m.out_channels * 1024 for m in first if hasattr(m, "groups")) == separable
    )


@parity_row("mobilenet-v1", "one logit", "timm.models.efficientnet.EfficientNet", page="person-baselines")
def test_mobilenet_is_timms(parity):
    images = torch.randn(3, 3, 48, 48, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for width in (0.25, 0.5):
        theirs = loud_(_gen_mobilenet_v1("mobilenetv1_100", width, num_classes=1)).double().eval()
        ours = MobileNetV1(48, width=width, stem_stride=2).double().eval()
        state = list(theirs.state_dict().values())
        assert [v.shape for v in ours.state_dict().values()] == [v.shape for v in state], "the same order"
        ours.load_state_dict(dict(zip(ours.state_dict(), state, strict=True)))
        got, want = ours(images), theirs(images).squeeze(-1)
        assert float(want.std()) > 1e-3
        parity.record({"logits": got}, {"logits": want})
        for logits in (got, want):
            logits.square().sum().backward()
        gradients = {str(i): p.grad for i, p in enumerate(theirs.parameters())}
        parity.record({str(i): p.grad for i, p in enumerate(ours.parameters())}, gradients, gradients=True)


def test_pixel_regression_is_logistic_regression():
    """Trained to the end it weighs as scikit-learn's does."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(60, 2, 3, 3, dtype=torch.float64, generator=generator)
    labels = (
        images[:, 0, 1, 1] + 0.7 * torch.randn(60, dtype=torch.float64, generator=generator) > 0
    ).double()
    model = PixelRegression(3, 2).double()
    assert float(model(images).abs().max()) == 0, "it starts from 0"
    optimizer = torch.optim.LBFGS(
        model.parameters(), max_iter=500, tolerance_grad=1e-9, tolerance_change=1e-14
    )

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        weight = model.body[1].weight
        value = nn.functional.binary_cross_entropy_with_logits(model(images), labels, reduction="sum")
        value = value + weight.square().sum() / 2
        value.backward()
        return value

    optimizer.step(loss)
    theirs = LogisticRegression(tol=1e-10, max_iter=2000).fit(images.flatten(1).numpy(), labels.numpy())
    torch.testing.assert_close(
        model.body[1].weight.detach(), torch.from_numpy(theirs.coef_), atol=1e-4, rtol=1e-3
    )


@pytest.mark.parametrize("name", MODELS)
def test_images_are_judged_one_by_one(name):
    model = loud_(MODELS[name]()).double().eval()
    shape = (4, model.in_channels, model.image_size, model.image_size)
    images = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    logits = model(images)
    assert logits.shape == (4,)
    assert float(logits.std()) > 1e-3
    torch.testing.assert_close(logits[2:3], model(images[2:3]))


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match=r"images: expected shape \(B, C, H, W\) with C = 3, H = 32, W = 32"):
        SmallCnn()(torch.zeros(1, 3, 32, 31))
    with pytest.raises(TypeError, match=r"images: expected torch\.float32, got torch\.float64"):
        MobileNetV1()(torch.zeros(1, 3, 32, 32, dtype=torch.float64))
    with pytest.raises(
        ValueError, match=r"widths: expected one or more channel counts of at least 1, got \(\)"
    ):
        SmallCnn(widths=())
    with pytest.raises(ValueError, match="width: expected a positive number, got 0"):
        MobileNetV1(width=0)
    with pytest.raises(ValueError, match="stem_stride: expected at least 1, got 0"):
        MobileNetV1(stem_stride=0)
    with pytest.raises(ValueError, match="image_size: expected at least 1, got 0"):
        PixelRegression(0)
