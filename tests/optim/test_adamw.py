"""AdamW: torch's steps to the last digits, by hand, scale-free, and what a wrong one does."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from optimizer_problems import planted, trajectory
from parity import Parity, ParityError, parity_row

from textbook_code.optim.adamw import AdamW

SETTINGS = {"lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-2, "weight_decay": 0.3}


def check(parity: Parity, **more: object) -> None:
    want = trajectory(lambda p: torch.optim.AdamW(p, **SETTINGS, **more, foreach=False))
    for foreach in (False, True):
        parity.record(trajectory(lambda p, f=foreach: AdamW(p, **SETTINGS, **more, foreach=f)), want)


@parity_row("adamw", "step", "torch.optim.AdamW", page="optim-adam", tolerance=1e-12, backward=False)
def test_hundred_steps(parity: Parity) -> None:
    check(parity)


@parity_row("adamw", "amsgrad", "torch.optim.AdamW", page="optim-adam", tolerance=1e-12, backward=False)
def test_hundred_steps_of_amsgrad(parity: Parity) -> None:
    check(parity, amsgrad=True)


@parity_row("adamw", "maximize", "torch.optim.AdamW", page="optim-adam", tolerance=1e-12, backward=False)
def test_hundred_steps_upwards(parity: Parity) -> None:
    check(parity, maximize=True)


LOOP = [
    ("p.mul_(1 - lr * group", "g = g + 0 * p; p.mul_(1 - group"),  # decay without the learning rate
    ('p.mul_(1 - lr * group["weight_decay"])', 'g = g + group["weight_decay"] * p'),  # coupled: L2
    ("m_hat = m / (1 - beta1**t)", "m_hat = m"),
    ("v_hat = v / (1 - beta2**t)", "v_hat = v"),
    ("v_hat.sqrt() + eps", "(v_hat + eps).sqrt()"),
    ("(v_hat.sqrt() + eps)", "((v.sqrt() + eps) / (1 - beta2**t) ** 0.5)"),  # ε before the correction
    ("(1 - beta2) * g.square()", "(1 - beta2) * g.abs()"),
    ("m.mul_(beta1)", "m.mul_(beta2)"),
    ("torch.maximum(", "torch.minimum("),
]
FOREACH = [
    ("1 - lr * group", "1 - group"),
    ("(1 - beta2**t) ** 0.5", "1.0"),
    ("1 - beta1**t, (", "1.0, ("),
    ("c2 * eps", "eps"),
    ("torch._foreach_add_(root, c2 * eps)", "root = torch._foreach_sqrt(torch._foreach_add(v, eps))"),
    ("torch._foreach_lerp_(m, grads, 1 - beta1)", "torch._foreach_lerp_(m, grads, 1 - beta2)"),
    ("torch._foreach_maximum_", "torch._foreach_minimum_"),
]


@pytest.mark.parametrize(
    ("method", "old", "new"),
    [("_move", *bug) for bug in LOOP] + [("_move_all", *bug) for bug in FOREACH],
)
def test_planted_bugs_are_caught(method: str, old: str, new: str) -> None:
    row = parity_row("x", "x", "torch.optim.AdamW", page="x", tolerance=1e-12, backward=False).args[0]
    with planted(AdamW, method, old, new), pytest.raises(ParityError) as caught:
        check(Parity(row), amsgrad="imum" in old)
    assert caught.value.error > 1e-4


def test_the_first_steps_by_hand() -> None:
    w = torch.tensor([1.0, -2.0], dtype=torch.float64, requires_grad=True)
    optimizer = AdamW([w], lr=0.1, betas=(0.5, 0.75), eps=0.0, weight_decay=0.5)
    w.grad = torch.tensor([4.0, -0.5], dtype=torch.float64)
    optimizer.step()
    # m / (1 - 0.5) = g and v / (1 - 0.75) = g²: the first step is a sign
    assert w.tolist() == pytest.approx([0.95 * 1 - 0.1, 0.95 * -2 + 0.1])
    before = w.tolist()
    w.grad = torch.tensor([0.0, 1.0], dtype=torch.float64)
    optimizer.step()
    m = [(0.25 * 4) / 0.75, (0.25 * -0.5 + 0.5 * 1) / 0.75]
    v = [(0.75 * 0.25 * 16) / (1 - 0.75**2), (0.75 * 0.25 * 0.25 + 0.25) / (1 - 0.75**2)]
    assert w.tolist() == pytest.approx(
        [0.95 * b - 0.1 * mi / vi**0.5 for b, mi, vi in zip(before, m, v, strict=True)]
    )


@given(power=st.integers(-40, 40))
def test_the_scale_of_the_gradients_does_not_matter(power: int) -> None:
    def make(p: list[torch.nn.Parameter]) -> AdamW:
        return AdamW(p, lr=0.01, eps=0.0)

    one = trajectory(make, steps=5, keep=(5,))
    other = trajectory(make, steps=5, keep=(5,), scale=2.0**power)
    assert torch.equal(one["after 5 steps"], other["after 5 steps"]), "a power of two rounds nothing"


@given(beta1=st.floats(0, 0.99), beta2=st.floats(0, 0.999), seed=st.integers(0, 1000))
def test_no_step_is_longer_than_its_bound(beta1: float, beta2: float, seed: int) -> None:
    """|m̂| / √v̂ is at most 1 for β₁ ≤ √β₂ at steady state; the paper's bound covers the rest."""
    w = torch.zeros(20, dtype=torch.float64, requires_grad=True)
    optimizer = AdamW([w], lr=1.0, betas=(beta1, beta2), eps=0.0, weight_decay=0.0)
    generator = torch.Generator().manual_seed(seed)
    for t in range(1, 30):
        before = w.detach().clone()
        w.grad = torch.randn(20, generator=generator, dtype=torch.float64) ** 3
        optimizer.step()
        # Cauchy and Schwarz: (Σ aᵢ gᵢ)² ≤ (Σ aᵢ² / bᵢ) (Σ bᵢ gᵢ²), a and b the two filters' weights
        a = torch.tensor([(1 - beta1) * beta1 ** (t - i) / (1 - beta1**t) for i in range(1, t + 1)]).double()
        b = torch.tensor([(1 - beta2) * beta2 ** (t - i) / (1 - beta2**t) for i in range(1, t + 1)]).double()
        seen = b > 0
        if (a[~seen] > 0).any():
            return
        bound = (a[seen] ** 2 / b[seen]).sum().sqrt()
        assert (w.detach() - before).abs().max() <= bound * (1 + 1e-6)
