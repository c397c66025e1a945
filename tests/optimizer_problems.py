"""A small problem on which two optimizers are run beside each other, and planted bugs in their source."""

from __future__ import annotations

import contextlib
import inspect
import sys
import textwrap
from collections.abc import Callable, Iterator
from typing import Any

import torch
from parity import loud_
from torch import Tensor, nn


def network(dtype: torch.dtype = torch.float64, *, bias: bool = True) -> nn.Module:
    """Matrices, gains and biases, all away from their start."""
    model = nn.Sequential(
        nn.Linear(7, 11, bias=bias), nn.LayerNorm(11), nn.Tanh(), nn.Linear(11, 5, bias=bias)
    )
    return loud_(model, seed=3).to(dtype)


def batch_loss(model: nn.Module, step: int) -> Tensor:
    """Each step has a batch of its own, so that gradients change sign and size."""
    generator = torch.Generator().manual_seed(step)
    weight = next(model.parameters())
    x = torch.randn(13, 7, generator=generator, dtype=torch.float64).to(weight)
    y = torch.randint(5, (13,), generator=generator)
    return nn.functional.cross_entropy(model(x), y)


def trajectory(
    make: Callable[[list[nn.Parameter]], Any],
    *,
    steps: int = 100,
    keep: tuple[int, ...] = (1, 2, 10, 100),
    dtype: torch.dtype = torch.float64,
    before_step: Callable[[Any, nn.Module, int], None] = lambda *_: None,
    bias: bool = True,
    scale: float = 1.0,
    matrices_only: bool = False,
) -> dict[str, Tensor]:
    """All weights after the steps in `keep`."""
    model = network(dtype, bias=bias)
    params = [p for p in model.parameters() if p.dim() == 2 or not matrices_only]
    optimizer, kept = make(params), {}
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        (scale * batch_loss(model, step)).backward()
        before_step(optimizer, model, step)
        optimizer.step()
        if step in keep:
            kept[f"after {step} steps"] = torch.cat([p.detach().flatten() for p in params]).clone()
    return kept


@contextlib.contextmanager
def planted(owner: type, method: str, old: str, new: str) -> Iterator[None]:
    """The class with `old` in the source of one of its methods replaced, which must be there once."""
    original = owner.__dict__[method]
    source = textwrap.dedent(inspect.getsource(original))
    assert source.count(old) == 1, f"{owner.__name__}.{method} holds {old!r} {source.count(old)} times"
    namespace = dict(vars(sys.modules[owner.__module__]))
    exec(source.replace(old, new), namespace)
    setattr(owner, method, namespace[method])
    try:
        yield
    finally:
        setattr(owner, method, original)
