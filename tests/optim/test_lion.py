"""Lion: the steps of two published implementations, the order of its two lines, and its invariances."""

from __future__ import annotations

import lion_pytorch
import pytest
import pytorch_optimizer
import torch
from hypothesis import given
from hypothesis import strategies as st
from optimizer_problems import planted, trajectory
from parity import Parity, ParityError, parity_row

from textbook_code.optim.lion import Lion

SETTINGS = {"lr": 0.003, "betas": (0.8, 0.95), "weight_decay": 0.7}


def check(parity: Parity, reference: type, **more: object) -> None:
    want = trajectory(lambda p: reference(p, **SETTINGS, **more))
    for foreach in (False, True):
        parity.record(trajectory(lambda p, f=foreach: Lion(p, **SETTINGS, **more, foreach=f)), want)


@parity_row("lion", "step", "lion_pytorch.Lion", page="optim-lion", tolerance=1e-12, backward=False)
def test_hundred_steps(parity: Parity) -> None:
    check(parity, lion_pytorch.Lion)


@parity_row("lion", "maximize", "pytorch_optimizer.Lion", page="optim-lion", tolerance=1e-12, backward=False)
def test_hundred_steps_upwards(parity: Parity) -> None:
    check(parity, pytorch_optimizer.Lion, maximize=True)
    check(parity, pytorch_optimizer.Lion)


@pytest.mark.parametrize(
    ("method", "old", "new"),
    [
        (
            "_move",
            "p.sub_(lr * (beta1 * m + (1 - beta1) * g).sign())",
            "m.mul_(beta1).add_((1 - beta1) * g); p.sub_(lr * m.sign())",  # m moves before the sign is taken
        ),
        ("_move", "beta1 * m + (1 - beta1) * g", "m + (1 - beta1) * g"),
        ("_move", "m.mul_(beta2).add_((1 - beta2) * g)", "m.mul_(beta1).add_((1 - beta1) * g)"),
        ("_move", "1 - lr * group", "1 - group"),
        ("_move", ".sign()", ".sign() * 1.001"),
        ("_move_all", "direction = torch._foreach_lerp(m", "direction = torch._foreach_lerp_(m"),
        ("_move_all", "torch._foreach_lerp(m, grads, 1 - beta1)", "torch._foreach_lerp(m, grads, 1 - beta2)"),
        ("_move_all", "1 - lr * group", "1 - group"),
    ],
)
def test_planted_bugs_are_caught(method: str, old: str, new: str) -> None:
    row = parity_row("x", "x", "lion_pytorch.Lion", page="x", tolerance=1e-12, backward=False).args[0]
    if "_foreach_lerp_(m" in new:  # what lerp in place gives back is nothing
        new = "torch._foreach_lerp_(m, grads, 1 - beta1); direction = torch._foreach_mul(m, 1.0)"
        old = "direction = torch._foreach_lerp(m, grads, 1 - beta1)"
    with planted(Lion, method, old, new), pytest.raises(ParityError) as caught:
        check(Parity(row), lion_pytorch.Lion)
    assert caught.value.error > 1e-6


@given(power=st.integers(-40, 40))
def test_the_scale_of_the_gradients_does_not_matter(power: int) -> None:
    def make(p: list[torch.nn.Parameter]) -> Lion:
        return Lion(p, lr=0.01)

    one = trajectory(make, steps=5, keep=(5,))
    other = trajectory(make, steps=5, keep=(5,), scale=2.0**power)
    assert torch.equal(one["after 5 steps"], other["after 5 steps"])


def test_every_coordinate_moves_by_the_learning_rate() -> None:
    w = torch.zeros(1000, requires_grad=True)
    optimizer = Lion([w], lr=0.25)
    for step in range(5):
        before = w.detach().clone()
        w.grad = torch.randn(1000, generator=torch.Generator().manual_seed(step)) ** 5
        optimizer.step()
        assert (w.detach() - before).abs().eq(0.25).all()


def test_it_keeps_one_tensor() -> None:
    w = torch.zeros(10, requires_grad=True)
    optimizer = Lion([w])
    w.grad = torch.ones(10)
    optimizer.step()
    assert set(optimizer.state[w]) == {"m"}
