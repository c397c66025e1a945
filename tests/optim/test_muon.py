"""Muon: torch's steps, and a polynomial that does to singular values what it says."""

from __future__ import annotations

import pytest
import torch
from optimizer_problems import planted, trajectory
from parity import Parity, ParityError, parity_row

from textbook_code.optim import muon as module
from textbook_code.optim.muon import NEWTON_SCHULZ, Muon, orthogonalize


def check(parity: Parity) -> None:
    for match_rms, nesterov in ((False, True), (True, True), (False, False)):
        adjust = "match_rms_adamw" if match_rms else "original"
        want = trajectory(
            lambda p, a=adjust, n=nesterov: torch.optim.Muon(
                p, lr=0.01, weight_decay=0.4, momentum=0.8, nesterov=n, ns_steps=3, eps=1e-3, adjust_lr_fn=a
            ),
            dtype=torch.float32,
            matrices_only=True,
            steps=30,
            keep=(1, 2, 10, 30),
        )
        for foreach in (False, True):
            got = trajectory(
                lambda p, r=match_rms, n=nesterov, f=foreach: Muon(
                    p, 0.01, 0.8, 0.4, nesterov=n, ns_steps=3, eps=1e-3, match_rms=r, foreach=f
                ),
                dtype=torch.float32,
                matrices_only=True,
                steps=30,
                keep=(1, 2, 10, 30),
            )
            parity.record(got, want)


@parity_row(
    "muon", "step", "torch.optim.Muon", page="second-order", dtype="float32", tolerance=1e-6, backward=False
)
def test_thirty_steps(parity: Parity) -> None:
    check(parity)


@pytest.mark.parametrize(
    ("method", "old", "new"),
    [
        ("_move", "m.lerp_(g, 1 - mu)", "m.mul_(mu).add_(g); m.div_(1)"),
        ("_move", "g.lerp(m, mu)", "m"),
        ("_move_all", "torch._foreach_lerp(grads, m, mu)", "m"),
        ("_turn", "max(1.0, M / N)", "(M / N)"),
        ("_turn", "0.2 *", "0.3 *"),
        ("_turn", '1 - group["lr"] * group', "1 - group"),
        ("_turn", "-group", "group"),
    ],
)
def test_planted_bugs_are_caught(method: str, old: str, new: str) -> None:
    row = parity_row("x", "x", "torch.optim.Muon", page="x", tolerance=1e-6, backward=False).args[0]
    with planted(Muon, method, old, new), pytest.raises(ParityError) as caught:
        check(Parity(row))
    assert caught.value.error > 1e-5


@pytest.mark.parametrize("coefficients", [(3.4445, -4.7750, 2.03), (3.4, -4.7750, 2.0315), (1.5, -0.5, 0.0)])
def test_wrong_coefficients_are_caught(
    coefficients: tuple[float, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "NEWTON_SCHULZ", coefficients)
    row = parity_row("x", "x", "torch.optim.Muon", page="x", tolerance=1e-6, backward=False).args[0]
    with pytest.raises(ParityError):
        check(Parity(row))


@pytest.mark.parametrize("shape", [(5, 11), (11, 5), (7, 7), (1, 3)])
@pytest.mark.parametrize("steps", [1, 5])
def test_singular_values_go_through_the_polynomial(shape: tuple[int, int], steps: int) -> None:
    G = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    U, s, Vt = torch.linalg.svd(G, full_matrices=False)
    s = s / s.square().sum().sqrt()
    a, b, c = NEWTON_SCHULZ
    for _ in range(steps):
        s = a * s + b * s**3 + c * s**5
    got = orthogonalize(G, steps=steps, dtype=None)
    torch.testing.assert_close(got, U @ torch.diag(s) @ Vt, rtol=1e-9, atol=1e-9)


def test_five_steps_bring_the_singular_values_near_one() -> None:
    G = torch.randn(40, 60, generator=torch.Generator().manual_seed(0))
    s = torch.linalg.svdvals(orthogonalize(G, dtype=None))
    assert 0.6 < s.min() < s.max() < 1.25
    assert orthogonalize(G).dtype == torch.bfloat16
    torch.testing.assert_close(orthogonalize(1e6 * G, dtype=None), orthogonalize(G, dtype=None))


def test_only_matrices() -> None:
    bias = torch.zeros(3, requires_grad=True)
    with pytest.raises(ValueError, match=r"fc1.bias: expected a matrix \(M, N\), got shape \(3,\)"):
        Muon([("fc1.bias", bias)])
    with pytest.raises(ValueError, match=r"matrix: expected shape \(M, N\), got \(3,\)"):
        orthogonalize(bias)
    with pytest.raises(ValueError, match="steps: expected at least 1, got 0"):
        orthogonalize(torch.ones(2, 2), steps=0)
    with pytest.raises(ValueError, match="momentum: expected a number from 0 to below 1, got 1"):
        Muon([torch.ones(2, 2, requires_grad=True)], momentum=1.0)
