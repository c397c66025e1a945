"""A step of an optimizer beside its published counterpart, on eleven million parameters shaped as GPT's.

Both start with the same weights, gradients and settings; what is compared before anything is timed is where
three steps have brought the weights.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from textbook_code.optim.adamw import AdamW
from textbook_code.optim.lion import Lion
from textbook_code.optim.sophia import SophiaH

CALLED = {"adamw": "AdamW", "lion": "Lion", "sophia-h": "Sophia-H"}
PEERS = {
    "adamw": "torch.optim.AdamW(foreach=True)",
    "lion": "lion_pytorch.Lion",
    "sophia-h": "pytorch_optimizer.SophiaH",
}


def what(name: str) -> str:
    return f"{CALLED[name]}, a step, 11 million parameters"


def peers(name: str) -> dict[str, str]:
    return {"published": PEERS[name]}


def shapes(D: int = 320, layers: int = 8) -> list[tuple[int, ...]]:
    """Tables of tokens and positions, and in each block two norms and six matrices with their biases."""
    block: list[tuple[int, ...]] = [(D,)] * 4  # gains and shifts
    block += [(D, D), (D,)] * 4 + [(4 * D, D), (4 * D,), (D, 4 * D), (D,)]
    return [(4096, D), (256, D), *block * layers, (D,), (D,)]


def build(name: str, who: str, ours: str) -> tuple[Callable[[], Any], Tensor]:
    """The step to time, and the weights after three of them."""
    params = [nn.Parameter(0.02 * torch.randn(shape)) for shape in shapes()]
    for p in params:
        p.grad = 1e-3 * torch.randn_like(p)
    curvature = [torch.rand_like(p) for p in params] if name == "sophia-h" else []
    optimizer = _ours(name, params) if who == ours else _published(name, params)
    if isinstance(optimizer, SophiaH):
        optimizer.update_hessian(curvature)
        optimizer.step()
    elif curvature:
        optimizer.step(hessian=curvature)
    else:
        optimizer.step()
    for _ in range(2):
        optimizer.step()
    return optimizer.step, torch.cat([p.detach().flatten() for p in params])


def _ours(name: str, params: list[nn.Parameter]) -> Any:
    if name == "adamw":
        return AdamW(params, 1e-3, (0.9, 0.95), weight_decay=0.1)
    if name == "lion":
        return Lion(params, 1e-4, weight_decay=1.0)
    return SophiaH(params, 1e-3, (0.96, 0.99), 0.01, weight_decay=0.1)


def _published(name: str, params: list[nn.Parameter]) -> Any:
    if name == "adamw":
        return torch.optim.AdamW(params, 1e-3, (0.9, 0.95), weight_decay=0.1, foreach=True)
    if name == "lion":
        import lion_pytorch

        return lion_pytorch.Lion(params, 1e-4, weight_decay=1.0)
    import pytorch_optimizer

    optimizer = pytorch_optimizer.SophiaH(  # it clips m / h at ±p: see textbook_code.optim.sophia
        params, 1e-3 / 0.01, (0.96, 0.99), weight_decay=0.1 * 0.01, p=0.01, eps=1e-10, update_period=10**9
    )
    optimizer.param_groups[0]["step"] = 1  # no estimate of its own
    return optimizer
