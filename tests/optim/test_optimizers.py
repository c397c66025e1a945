"""What all optimizers share: two ways that agree, groups, closures, resuming to the bit, and clear errors."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from optimizer_problems import batch_loss, network, trajectory
from torch import nn

from textbook_code.optim import base
from textbook_code.optim.adamw import AdamW
from textbook_code.optim.base import Optimizer
from textbook_code.optim.groups import decay_groups
from textbook_code.optim.lion import Lion
from textbook_code.optim.muon import Muon
from textbook_code.optim.schedules import warmup_cosine
from textbook_code.optim.sophia import SophiaG, SophiaH
from textbook_code.training.checkpoint import CheckpointError
from textbook_code.training.loop import train

KINDS: dict[str, Callable[..., Optimizer]] = {
    "adamw": AdamW,
    "amsgrad": partial(AdamW, amsgrad=True),
    "lion": Lion,
    "sophia-h": SophiaH,
    "sophia-g": partial(SophiaG, batch_tokens=13),
    "muon": partial(Muon, ns_dtype=None),
}
ALL = pytest.mark.parametrize("kind", KINDS)


def params_of(kind: str, model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, p) for name, p in model.named_parameters() if kind != "muon" or p.dim() == 2]


def estimate(optimizer: Optimizer, step: int) -> None:
    """Feed Sophia something, where it asks for it."""
    if isinstance(optimizer, SophiaG) and optimizer.hessian_due:
        optimizer.update_hessian()
    elif isinstance(optimizer, SophiaH) and optimizer.hessian_due:
        params = [p for group in optimizer.param_groups for p in group["params"]]
        draws = [torch.Generator().manual_seed(step + 100 * p.numel()) for p in params]  # whatever the order
        optimizer.update_hessian(
            [torch.randn(p.shape, generator=g).to(p) for p, g in zip(params, draws, strict=True)]
        )


def run(optimizer: Optimizer, model: nn.Module, first: int, last: int) -> list[torch.Tensor]:
    for step in range(first, last + 1):
        optimizer.zero_grad()
        batch_loss(model, step).backward()
        estimate(optimizer, step)
        optimizer.step()
    return [p.detach().clone() for p in model.parameters()]


# ------------------------------------------------------------------------------------------------
# Two ways


@ALL
@given(
    lr=st.floats(1e-4, 0.1),
    beta=st.floats(0, 0.99),
    decay=st.floats(0, 1),
    at_once=st.integers(1, 200),
    maximize=st.booleans(),
)
def test_lists_and_single_parameters_agree(
    kind: str, lr: float, beta: float, decay: float, at_once: int, maximize: bool
) -> None:
    more: dict[str, Any] = {"momentum": beta} if kind == "muon" else {"betas": (beta, 0.95)}
    more |= {} if kind == "muon" else {"maximize": maximize}
    more |= {"lr": lr, "weight_decay": decay}
    kept = base._AT_ONCE
    try:
        base._AT_ONCE = at_once
        one, other = (
            trajectory(
                lambda p, f=foreach: KINDS[kind](p, **more, foreach=f),
                steps=8,
                keep=(8,),
                matrices_only=kind == "muon",
                before_step=lambda o, _, step: estimate(o, step),
            )["after 8 steps"]
            for foreach in (False, True)
        )
    finally:
        base._AT_ONCE = kept
    torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


@ALL
@given(order=st.permutations(range(6)), cut=st.integers(1, 5))
def test_the_order_of_groups_does_not_matter(kind: str, order: list[int], cut: int) -> None:
    results = []
    for permuted in (False, True):
        model = network()
        params = params_of(kind, model)
        chosen = [params[i] for i in order if i < len(params)] if permuted else params
        groups = [{"params": part} for part in (chosen[:cut], chosen[cut:]) if part]
        optimizer = KINDS[kind](groups if permuted else params)
        results.append(run(optimizer, model, 1, 4))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@ALL
def test_a_parameter_without_a_gradient_stays_and_joins_later(kind: str) -> None:
    model = network()
    late = model[0].weight
    optimizer = KINDS[kind](params_of(kind, model), lr=0.01)
    before = late.detach().clone()
    late.requires_grad_(False)
    run(optimizer, model, 1, 3)
    assert torch.equal(late, before)
    assert late not in optimizer.state or optimizer.state[late].get("step", 0) == 0
    late.requires_grad_(True)
    run(optimizer, model, 4, 5)
    assert not torch.equal(late, before)
    if kind == "adamw":
        assert optimizer.state[late]["step"] == 2, "its bias is corrected by its own count"
        assert optimizer.state[model[3].weight]["step"] == 5


@ALL
def test_groups_have_their_own_settings(kind: str) -> None:
    model = network()
    params = params_of(kind, model)
    optimizer = KINDS[kind]([{"params": params[:1], "lr": 0.0}], lr=0.5)
    optimizer.add_param_group({"params": params[1:], "weight_decay": 0.0})
    before = [p.detach().clone() for _, p in params]
    run(optimizer, model, 1, 1)
    assert torch.equal(before[0], params[0][1])
    assert all(not torch.equal(b, p) for b, (_, p) in zip(before[1:], params[1:], strict=True))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "muon"])
@pytest.mark.parametrize("foreach", [False, True])
def test_up_is_down_the_negative(kind: str, foreach: bool) -> None:
    down, up = (
        trajectory(
            lambda p, m=maximize: KINDS[kind](p, lr=0.01, weight_decay=0.1, maximize=m, foreach=foreach),
            steps=6,
            keep=(6,),
            scale=1.0 if maximize else -1.0,
            before_step=lambda o, _, step: estimate(o, step),
        )["after 6 steps"]
        for maximize in (False, True)
    )
    assert torch.equal(down, up)


@ALL
def test_a_closure_gives_its_loss_back(kind: str) -> None:
    model, other = network(), network()
    optimizer = KINDS[kind](params_of(kind, model), lr=0.01)

    def closure() -> float:
        optimizer.zero_grad()
        loss = batch_loss(model, 1)
        loss.backward()
        return loss.item()

    assert optimizer.step(closure) == batch_loss(other, 1).item()
    plain = KINDS[kind](params_of(kind, other), lr=0.01)
    batch_loss(other, 1).backward()
    plain.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_decay_reaches_the_first_group_only() -> None:
    model = network()
    optimizer = AdamW(decay_groups(model, 0.5), lr=0.1)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer.step()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), before[name] * (0.95 if p.dim() == 2 else 1.0))


# ------------------------------------------------------------------------------------------------
# Going on


@ALL
@pytest.mark.parametrize("foreach", [False, True])
def test_a_state_goes_on_to_the_bit(kind: str, foreach: bool) -> None:
    model = network(torch.float32)
    whole = run(KINDS[kind](params_of(kind, model), lr=0.01, foreach=foreach), model, 1, 12)

    model = network(torch.float32)
    optimizer = KINDS[kind](params_of(kind, model), lr=0.01, foreach=foreach)
    run(optimizer, model, 1, 6)
    weights, state = copy.deepcopy(model.state_dict()), pickle.loads(pickle.dumps(optimizer.state_dict()))

    model = network(torch.float32)
    model.load_state_dict(weights)
    optimizer = KINDS[kind](params_of(kind, model), lr=0.5, foreach=foreach)  # the rate comes back too
    optimizer.load_state_dict(state)
    parts = run(optimizer, model, 7, 12)
    assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))


@ALL
def test_a_run_goes_on_through_the_training_loop_s_checkpoint(kind: str, tmp_path: Path) -> None:
    def start() -> tuple[nn.Module, Optimizer]:
        model = network(torch.float32)
        for p in model.parameters() if kind == "muon" else ():
            p.requires_grad_(p.dim() == 2)
        groups = decay_groups(model, 0.1)
        optimizer = KINDS[kind](groups, lr=0.01)
        inner = optimizer.step
        if kind.startswith("sophia"):  # the loop calls step alone

            def step(closure: Any = None) -> Any:
                estimate(optimizer, 1)
                return inner(closure)

            optimizer.step = step
        return model, optimizer

    def go(steps: int, folder: Path) -> nn.Module:
        model, optimizer = start()
        train(
            model,
            batch_loss,
            lambda number, _: number,
            steps=steps,
            optimizer=optimizer,
            schedule=warmup_cosine(3, 14),
            folder=folder,
            checkpoint_every=7,
            count_tokens=lambda _: 13,
            progress=False,
        )
        return model

    whole = go(14, tmp_path / "whole")
    go(7, tmp_path / "parts")
    parts = go(14, tmp_path / "parts")
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), parts.parameters(), strict=True))

    model, _ = start()
    with pytest.raises(CheckpointError, match="optimizer"):
        other: Optimizer = Lion(model.parameters()) if kind != "lion" else AdamW(model.parameters())
        train(
            model,
            batch_loss,
            lambda number, _: number,
            steps=15,
            optimizer=other,
            folder=tmp_path / "parts",
            progress=False,
        )


@ALL
def test_a_copy_keeps_how_it_steps(kind: str) -> None:
    model = network()
    optimizer = KINDS[kind](params_of(kind, model), foreach=False, check_finite=False)
    other = copy.deepcopy(optimizer)
    assert (other.foreach, other.check_finite) == (False, False)
    if isinstance(optimizer, Muon):
        assert other.ns_dtype is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@ALL
def test_half_precision_keeps_its_dtype(kind: str, dtype: torch.dtype) -> None:
    w = nn.Parameter(torch.ones(3, 4, dtype=dtype))
    more = {"eps": 1e-4} if kind in ("adamw", "amsgrad") else {}
    optimizer = KINDS[kind]([w], lr=0.1, **more)
    for foreach in (False, True):
        optimizer.foreach = foreach
        w.grad = torch.full_like(w, 0.01)
        optimizer.step()
    assert w.isfinite().all()
    kept = [value for value in optimizer.state[w].values() if isinstance(value, torch.Tensor)]
    assert {w.dtype, *(value.dtype for value in kept)} == {dtype}


# ------------------------------------------------------------------------------------------------
# What is refused


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf")])
@ALL
def test_a_gradient_that_is_not_finite_moves_nothing(kind: str, poison: float, named: bool) -> None:
    model = network()
    params = params_of(kind, model)
    optimizer = KINDS[kind](params if named else [p for _, p in params], lr=0.01)
    run(optimizer, model, 1, 1)
    optimizer.zero_grad()
    batch_loss(model, 2).backward()
    assert params[-1][1].grad is not None
    params[-1][1].grad.view(-1)[1] = poison
    before = [p.detach().clone() for p in model.parameters()]
    kept = copy.deepcopy(optimizer.state_dict()["state"])
    name, shape = params[-1][0], tuple(params[-1][1].shape)
    place = (
        name
        if named
        else rf"parameter {len(params) - 1} of group 0, of shape \({', '.join(map(str, shape))},?\)"
    )
    with pytest.raises(
        FloatingPointError, match=rf"got NaN or infinity in {place} \(1 of \d+ numbers\); nothing"
    ):
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    for number, state in optimizer.state_dict()["state"].items():
        for key, value in state.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(kept[number][key]))
    optimizer.check_finite = False
    optimizer.step()
    assert not all(p.isfinite().all() for _, p in params) or kind in ("lion", "muon", "sophia-h", "sophia-g")


def test_a_sum_that_overflows_is_no_error() -> None:
    w = torch.zeros(4, requires_grad=True)
    w.grad = torch.full((4,), 3e38)  # finite, and their sum is not
    optimizer = Lion([w], lr=1.0)
    optimizer.step()
    assert w.eq(-1).all()


def test_a_sum_of_two_infinities_is_an_error() -> None:
    w = torch.zeros(2, requires_grad=True)
    w.grad = torch.tensor([float("inf"), float("-inf")])
    with pytest.raises(FloatingPointError, match=r"of shape \(2,\) \(2 of 2 numbers\)"):
        AdamW([w]).step()


@ALL
def test_sparse_gradients_are_refused(kind: str) -> None:
    table = nn.Embedding(5, 3, sparse=True)
    optimizer = KINDS[kind](table.named_parameters())
    table(torch.tensor([1])).sum().backward()
    before = table.weight.detach().clone()
    with pytest.raises(TypeError, match=r"weight: expected a dense gradient, got torch.sparse_coo"):
        optimizer.step()
    assert torch.equal(before, table.weight)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": -1e-3}, "lr: expected a number of at least 0, got -0.001"),
        ({"lr": float("nan")}, "lr: expected a number of at least 0, got nan"),
        ({"weight_decay": -0.1}, "weight_decay: expected a number of at least 0, got -0.1"),
        ({"betas": (-0.1, 0.9)}, r"betas: expected two numbers from 0 to below 1, got \(-0.1, 0.9\)"),
        ({"betas": (0.9, 1.0)}, r"betas: expected two numbers from 0 to below 1, got \(0.9, 1.0\)"),
        ({"betas": (0.9,)}, r"betas: expected two numbers from 0 to below 1, got \(0.9,\)"),
        ({"eps": -1e-8}, "eps: expected a number of at least 0, got -1e-08"),
    ],
)
@ALL
def test_settings_out_of_range(kind: str, settings: dict[str, Any], message: str) -> None:
    if ("betas" in settings and kind == "muon") or (
        "eps" in settings and kind not in ("adamw", "amsgrad", "sophia-h", "muon")
    ):
        return
    w = torch.ones(2, 2, requires_grad=True)
    with pytest.raises(ValueError, match=message):
        KINDS[kind]([w], **settings)
    optimizer = KINDS[kind]([w])
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": [torch.ones(2, 2, requires_grad=True)], **settings})
    assert len(optimizer.param_groups) == 1, "the group is not kept"


@ALL
def test_parameters_that_are_none(kind: str) -> None:
    with pytest.raises(ValueError, match="params: expected at least one parameter, got none"):
        KINDS[kind]([])
    with pytest.raises(TypeError, match="params: expected parameters in a list, got a lone tensor"):
        KINDS[kind](torch.ones(2, 2, requires_grad=True))
    with pytest.raises(
        TypeError, match=r"parameter 0 of group 0.*expected real numbers, got torch.complex64"
    ):
        KINDS[kind]([torch.ones(2, 2, dtype=torch.complex64, requires_grad=True)])


@ALL
def test_the_state_of_another_optimizer(kind: str) -> None:
    model = network()
    params = params_of(kind, model)
    optimizer = KINDS[kind](params)
    name = type(optimizer).__name__
    foreign = Lion(params) if name != "Lion" else AdamW(params)
    with pytest.raises(
        ValueError, match=f"expected the state of {name}, got that of {type(foreign).__name__}"
    ):
        optimizer.load_state_dict(foreign.state_dict())
    published = torch.optim.AdamW([p for _, p in params])
    batch_loss(model, 1).backward()
    published.step()
    with pytest.raises(ValueError, match="one without a name that keeps exp_avg, exp_avg_sq, step"):
        optimizer.load_state_dict(published.state_dict())


def test_a_state_of_other_shapes() -> None:
    one, other = torch.ones(3, requires_grad=True), torch.ones(4, requires_grad=True)
    optimizer = Lion([one])
    one.grad = torch.ones(3)
    optimizer.step()
    with pytest.raises(ValueError, match=r"expected m of w to have shape \(4,\), got \(3,\)"):
        Lion([("w", other)]).load_state_dict(optimizer.state_dict())
