"""Sophia: published steps, golden numbers, and estimators that estimate what they say."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import pytorch_optimizer
import torch
from hypothesis import given
from hypothesis import strategies as st
from optimizer_problems import planted, trajectory
from parity import Parity, ParityError, parity_row
from torch import Tensor, nn

from textbook_code.optim.sophia import SophiaG, SophiaH, hutchinson_diagonal, sample_labels

GOLDEN = Path(__file__).parents[1] / "golden" / "sophiag.npz"

# ------------------------------------------------------------------------------------------------
# Sophia-H: the same estimates are given to both, every third step, some of them negative


def estimates(model: nn.Module, step: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1000 + step)
    return [torch.randn(p.shape, generator=generator, dtype=p.dtype) + 0.3 for p in model.parameters()]


def theirs() -> dict[str, Tensor]:
    """pytorch_optimizer clips m / h at ±p: its rate is ours over p, its decay ours times p."""
    p, lr = 0.2, 0.004
    due: dict[str, list[Tensor] | None] = {}

    def make(params: list[nn.Parameter]) -> torch.optim.Optimizer:
        optimizer = pytorch_optimizer.SophiaH(
            params, lr=lr / p, betas=(0.8, 0.9), weight_decay=0.6 * p, p=p, eps=0.05 / p, update_period=10**9
        )
        optimizer.param_groups[0]["step"] = 1  # its own estimate falls due at 0
        step = optimizer.step
        optimizer.step = lambda: step(hessian=due["now"])
        return optimizer

    def before(_: object, model: nn.Module, step: int) -> None:
        due["now"] = estimates(model, step) if step % 3 == 1 else None

    return trajectory(make, before_step=before)


def ours(*, foreach: bool) -> dict[str, Tensor]:
    def make(params: list[nn.Parameter]) -> SophiaH:
        return SophiaH(
            params, 0.004, (0.8, 0.9), 0.2, 0.05, weight_decay=0.6, update_every=3, foreach=foreach
        )

    def before(optimizer: SophiaH, model: nn.Module, step: int) -> None:
        assert optimizer.hessian_due == (step % 3 == 1)
        if optimizer.hessian_due:
            optimizer.update_hessian(estimates(model, step))

    return trajectory(make, before_step=before)


def check_sophia_h(parity: Parity) -> None:
    want = theirs()
    for foreach in (False, True):
        parity.record(ours(foreach=foreach), want)


@parity_row(
    "sophia-h", "step", "pytorch_optimizer.SophiaH", page="second-order", tolerance=1e-12, backward=False
)
def test_hundred_steps_of_sophia_h(parity: Parity) -> None:
    check_sophia_h(parity)


@pytest.mark.parametrize(
    ("method", "old", "new"),
    [
        ("_move", '(group["gamma"] * h).clamp(min=group["eps"])', '(group["gamma"] * h)'),  # no max
        ("_move", '(group["gamma"] * h)', "h"),
        ("_move", ".clamp(-1, 1)", ""),
        ("_move", ".clamp(-1, 1)", ".clamp(max=1)"),
        ("_move", "1 - lr * group", "1 - group"),
        ("_move", "(m / ", "(g / "),
        ("_move_all", 'torch._foreach_clamp_min_(scale, group["eps"])', "pass"),
        ("_move_all", "torch._foreach_clamp_min_(ratio, -1.0)", "pass"),
        ("_move_all", "torch._foreach_clamp_max_(ratio, 1.0)", "pass"),
        ("_average", '1 - group["betas"][1]', '1 - group["betas"][0]'),
    ],
)
def test_planted_bugs_of_sophia_h_are_caught(method: str, old: str, new: str) -> None:
    row = parity_row("x", "x", "torch.nn", page="x", tolerance=1e-12, backward=False).args[0]
    owner = SophiaH if method != "_average" else SophiaH.__mro__[1]
    with planted(owner, method, old, new), pytest.raises(ParityError) as caught:
        check_sophia_h(Parity(row))
    assert caught.value.error > 1e-4


def test_a_flat_or_negative_curvature_makes_the_step_a_sign() -> None:
    w = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    optimizer = SophiaH([w], lr=0.5, betas=(0.0, 0.0), gamma=1.0, weight_decay=0.0)
    optimizer.update_hessian([torch.tensor([4.0, 0.0, -4.0], dtype=torch.float64)])
    w.grad = torch.tensor([1.0, 1e-3, 1e-3], dtype=torch.float64)
    optimizer.step()
    assert w.tolist() == pytest.approx([-0.125, -0.5, -0.5])


# ------------------------------------------------------------------------------------------------
# Sophia-G: the authors' numbers


def golden() -> tuple[dict, dict[str, np.ndarray]]:
    with np.load(GOLDEN) as file:
        return json.loads(str(file["meta"])), {key: file[key] for key in file.files if key != "meta"}


def check_sophia_g(parity: Parity, *, foreach: bool) -> None:
    meta, numbers = golden()
    config = meta["config"]
    params = {
        name: nn.Parameter(torch.tensor(numbers[f"in.{name}0"])) for name in ("theta", "W")
    }  # θ of the quadratic, W of the regression
    optimizer = SophiaG(
        params.values(),
        config["lr"],
        tuple(config["betas"]),
        config["rho"],
        config["weight_decay"],
        batch_tokens=config["bs"],
        foreach=foreach,
    )
    updates = 0
    for i in range(config["steps"]):
        for name, p in params.items():
            p.grad = torch.tensor(numbers[f"out.{name}_grad"][i])
        optimizer.step()
        if i in meta["hessian_updates_after_step_index"]:
            for name, p in params.items():
                p.grad = torch.tensor(numbers[f"out.{name}_hgrad"][updates])
            optimizer.update_hessian()
            updates += 1
        for name, p in params.items():
            got = {name: p, f"{name}_m": optimizer.state[p]["m"], f"{name}_h": optimizer.state[p]["h"]}
            parity.record(
                {key: x.detach().clone() for key, x in got.items()},
                {key: torch.tensor(numbers[f"out.{key}"][i]) for key in got},
            )
    assert updates == 3


@parity_row(
    "sophia-g", "golden", "Liuhong99/Sophia.SophiaG", page="second-order", tolerance=1e-12, backward=False
)
def test_the_authors_numbers(parity: Parity) -> None:
    for foreach in (False, True):
        check_sophia_g(parity, foreach=foreach)


@pytest.mark.parametrize(
    ("foreach", "method", "old", "new"),
    [
        (False, "_move", ' * group["batch_tokens"]', ""),
        (False, "_move", ".clamp(max=1)", ""),
        (False, "_move", "m.abs() / ", "g.abs() / "),
        (False, "_move", "1 - lr * group", "1 - group"),
        (False, "_move", 'group["rho"] * ', ""),
        (True, "_move_all", ' * group["batch_tokens"]', ""),
        (True, "_move_all", "torch._foreach_clamp_min_(ratio, -1.0)", "pass"),
        (True, "update_hessian", "p.grad.detach().square()", "p.grad.detach().abs()"),
        (True, "update_hessian", ".square()", '.square() * group["batch_tokens"]'),
    ],
)
def test_planted_bugs_of_sophia_g_are_caught(foreach: bool, method: str, old: str, new: str) -> None:
    row = parity_row("x", "x", "torch.nn", page="x", tolerance=1e-12, backward=False).args[0]
    with planted(SophiaG, method, old, new), pytest.raises(ParityError):
        check_sophia_g(Parity(row), foreach=foreach)


# ------------------------------------------------------------------------------------------------
# The estimators


def quadratic(size: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    A = torch.randn(size, size, generator=generator, dtype=torch.float64)
    return A + A.T, torch.randn(size, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("distribution", ["rademacher", "gaussian"])
def test_hutchinson_is_right_on_the_average(distribution: str) -> None:
    A, start = quadratic()
    x = start.clone().requires_grad_()
    generator, samples = torch.Generator().manual_seed(0), 20_000
    (got,) = hutchinson_diagonal(0.5 * x @ A @ x, [x], generator, samples=samples, distribution=distribution)
    # Var(uᵢ Σⱼ Aᵢⱼ uⱼ): the off-diagonal squares, and with Gaussians also E u⁴ − 1 = 2 of the diagonal's
    off = (A**2).sum(1) - A.diagonal() ** 2
    variance = off + (2 * A.diagonal() ** 2 if distribution == "gaussian" else 0)
    error = (got - A.diagonal()).abs() / (variance / samples).sqrt()
    assert error.max() < 4  # standard errors
    # the bound tells it from near misses: the row sums, the magnitude, half
    for wrong in (A.sum(1), A.diagonal().abs(), A.diagonal() / 2):
        assert ((wrong - A.diagonal()).abs() / (variance / samples).sqrt()).max() > 12


def test_hutchinson_is_exact_where_the_hessian_is_diagonal() -> None:
    x = torch.randn(7, dtype=torch.float64, requires_grad=True)
    y = torch.randn(3, dtype=torch.float64, requires_grad=True)
    unused = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    loss = (x**4).sum() + 2 * y.sum()
    loss_graph = hutchinson_diagonal(loss, [x, y, unused], torch.Generator().manual_seed(0))
    torch.testing.assert_close(loss_graph[0], 12 * x.detach() ** 2)
    assert loss_graph[1].eq(0).all() and loss_graph[2].eq(0).all()
    loss.backward()  # the graph is still there
    assert x.grad is not None


def test_hutchinson_takes_from_the_generator_alone() -> None:
    A, start = quadratic()
    x = start.clone().requires_grad_()
    state = torch.get_rng_state()
    one, other = (
        hutchinson_diagonal(0.5 * x @ A @ x, [x], torch.Generator().manual_seed(3))[0] for _ in range(2)
    )
    assert torch.equal(one, other)
    assert torch.get_rng_state().equal(state)


def regression() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    X = torch.randn(8, 4, generator=generator, dtype=torch.float64)
    return X, torch.randn(3, 4, generator=generator, dtype=torch.float64)


def gauss_newton(X: Tensor, W: Tensor) -> Tensor:
    """The diagonal of the Hessian of the mean cross-entropy, by formula: mean of p (1 − p) x²."""
    p = (X @ W.T).softmax(-1)
    return ((p * (1 - p)).T @ X**2) / len(X)


def test_gauss_newton_bartlett_is_right_on_the_average() -> None:
    X, W = regression()
    exact, B, draws = gauss_newton(X, W), len(X), 4000
    hessian = torch.autograd.functional.hessian(
        lambda w: nn.functional.cross_entropy(X @ w.T, torch.zeros(B, dtype=torch.long)), W
    )
    torch.testing.assert_close(hessian.flatten(0, 1).flatten(1).diagonal(), exact.flatten())

    def estimate(labels_of) -> tuple[Tensor, Tensor]:
        squares = []
        for _ in range(draws):
            w = W.clone().requires_grad_()
            nn.functional.cross_entropy(X @ w.T, labels_of(X @ W.T)).backward()
            assert w.grad is not None
            squares.append(B * w.grad**2)
        all_ = torch.stack(squares)
        return all_.mean(0), all_.std(0) / draws**0.5

    generator = torch.Generator().manual_seed(0)
    mean, error = estimate(lambda z: sample_labels(z, generator))
    assert ((mean - exact).abs() / error).max() < 4
    # labels that are not the model's: the likeliest, uniform ones, those of a model too sure of itself
    for wrong in (
        lambda z: z.argmax(-1),
        lambda z: torch.randint(3, z.shape[:1], generator=generator),
        lambda z: sample_labels(3 * z, generator),
    ):
        mean, error = estimate(wrong)
        assert ((mean - exact).abs() / error.clamp(min=1e-9)).max() > 8


@given(st.integers(0, 50))
def test_labels_follow_the_prediction(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, 5, generator=generator)
    drawn = sample_labels(logits.expand(3000, 2, 5), generator)
    assert drawn.shape == (3000, 2) and drawn.dtype == torch.int64
    shares = nn.functional.one_hot(drawn, 5).double().mean(0)
    assert (shares - logits.softmax(-1)).abs().max() < 5 * 0.5 / 3000**0.5
    assert sample_labels(logits[0], generator).shape == ()


@pytest.mark.parametrize(
    ("run", "error", "message"),
    [
        (
            lambda w, o: hutchinson_diagonal(w * 1, [w], torch.Generator()),
            ValueError,
            r"loss: expected a scalar, got shape \(3,\)",
        ),
        (
            lambda w, o: hutchinson_diagonal(w.sum(), [w], torch.Generator(), samples=0),
            ValueError,
            "samples: expected at least 1, got 0",
        ),
        (
            lambda w, o: hutchinson_diagonal(w.sum(), [w], torch.Generator(), distribution="uniform"),
            ValueError,
            "distribution: expected 'rademacher' or 'gaussian', got 'uniform'",
        ),
        (
            lambda w, o: sample_labels(torch.tensor(1.0), torch.Generator()),
            ValueError,
            r"logits: expected shape \(…, V\), got \(\)",
        ),
        (
            lambda w, o: o.update_hessian([]),
            ValueError,
            "estimates: expected 1 tensors, one a parameter, got 0",
        ),
        (
            lambda w, o: o.update_hessian([torch.ones(2)]),
            ValueError,
            r"estimates: expected shape \(3,\) for parameter 0 of group 0, of shape \(3,\), got \(2,\)",
        ),
        (
            lambda w, o: o.update_hessian([torch.tensor([1.0, float("nan"), 1.0])]),
            FloatingPointError,
            "estimates: expected finite numbers for parameter 0",
        ),
        (
            lambda w, o: SophiaG([w], batch_tokens=1).update_hessian(),
            ValueError,
            "update_hessian: expected gradients of the loss with drawn labels, got none",
        ),
        (
            lambda w, o: SophiaG([w], batch_tokens=0),
            ValueError,
            "batch_tokens: expected a whole number of at least 1, got 0",
        ),
        (
            lambda w, o: SophiaG([w], batch_tokens=8, rho=-1),
            ValueError,
            "rho: expected a number of at least 0, got -1",
        ),
    ],
)
def test_bad_input(run, error: type[Exception], message: str) -> None:
    w = torch.ones(3, requires_grad=True)
    with pytest.raises(error, match=message):
        run(w, SophiaH([w]))
