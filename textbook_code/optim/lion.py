"""Lion: every coordinate moves by the learning rate, and only the direction is learned.

Paper: Chen et al. (2023), algorithm 2. Reference: lion_pytorch.Lion.

Book: optim-lion
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from .base import Optimizer, State, Tensors


class Lion(Optimizer):
    r"""The sign of an average of gradients, in which the newest counts more than it does later.

    $$\begin{aligned}
    \theta &\leftarrow (1 - \eta\lambda)\,\theta \\
    \theta &\leftarrow \theta - \eta\, \mathrm{sign}\big(\beta_1 m + (1 - \beta_1)\, g\big) \\
    m &\leftarrow \beta_2 m + (1 - \beta_2)\, g
    \end{aligned}$$

    It keeps m, four bytes a parameter in float32. Its η is to be smaller than Adam's, by a factor of three to
    ten, and its λ as much larger, so that ηλ stays. Paper: Chen et al. (2023). Reference: lion_pytorch.Lion.

    Args:
        params: parameters, named or not, or groups of them (see `decay_groups`).
        lr: η.
        betas: β₁ of the step and β₂ of the average.
        weight_decay: λ.
        maximize: step up instead of down.
        foreach: move parameters in lists; where False one by one, as the equation is written.
        check_finite: refuse gradients with NaN or infinity.

    Raises:
        TypeError, ValueError: as `Optimizer`.

    Book: optim-lion
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        foreach: bool = True,
        check_finite: bool = True,
    ) -> None:
        settings = {"lr": lr, "betas": betas, "weight_decay": weight_decay, "maximize": maximize}
        super().__init__(params, settings, foreach=foreach, check_finite=check_finite)

    def _start(self, p: Tensor) -> State:
        return {"m": torch.zeros_like(p)}

    def _move(self, p: Tensor, g: Tensor, state: State, group: dict[str, Any]) -> None:
        lr, (beta1, beta2), m = group["lr"], group["betas"], state["m"]
        p.mul_(1 - lr * group["weight_decay"])
        p.sub_(lr * (beta1 * m + (1 - beta1) * g).sign())
        m.mul_(beta2).add_((1 - beta2) * g)

    def _move_all(
        self, params: list[Tensor], grads: Tensors, states: list[State], group: dict[str, Any]
    ) -> None:
        lr, (beta1, beta2), m = group["lr"], group["betas"], [s["m"] for s in states]
        if group["weight_decay"]:
            torch._foreach_mul_(params, 1 - lr * group["weight_decay"])
        direction = torch._foreach_lerp(m, grads, 1 - beta1)
        torch._foreach_sign_(direction)
        torch._foreach_add_(params, direction, alpha=-lr)
        torch._foreach_lerp_(m, grads, 1 - beta2)
