"""AdamW: a step as long in every coordinate, whatever the size of its gradients, and decay apart from it.

Papers: Kingma and Ba (2015), algorithm 1; Loshchilov and Hutter (2019), algorithm 2.
Reference: torch.optim.AdamW.

Book: optim-adam
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from .base import Optimizer, State, Tensors


class AdamW(Optimizer):
    r"""Adam with decoupled decay.

    $$\begin{aligned}
    \theta &\leftarrow (1 - \eta\lambda)\,\theta \\
    m &\leftarrow \beta_1 m + (1 - \beta_1)\, g, \qquad
    v \leftarrow \beta_2 v + (1 - \beta_2)\, g^2 \\
    \theta &\leftarrow \theta - \eta\, \frac{m / (1 - \beta_1^t)}{\sqrt{v / (1 - \beta_2^t)} + \varepsilon}
    \end{aligned}$$

    All operations are by coordinate. It keeps m and v, eight bytes a parameter in float32.
    Papers: Kingma and Ba (2015); Loshchilov and Hutter (2019), where the schedule alone, not η, multiplies
    the decay; Reddi et al. (2018) for `amsgrad`. Reference: torch.optim.AdamW.

    Args:
        params: parameters, named or not, or groups of them (see `decay_groups`).
        lr: η.
        betas: β₁ and β₂.
        eps: ε, beside the root.
        weight_decay: λ.
        amsgrad: divide by the largest v so far.
        maximize: step up instead of down.
        foreach: move parameters in lists; where False one by one, as the equation is written.
        check_finite: refuse gradients with NaN or infinity.

    Raises:
        TypeError, ValueError: as `Optimizer`.

    Book: optim-adam
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        amsgrad: bool = False,
        maximize: bool = False,
        foreach: bool = True,
        check_finite: bool = True,
    ) -> None:
        settings = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "maximize": maximize,
        }
        super().__init__(params, settings, foreach=foreach, check_finite=check_finite)

    def _start(self, p: Tensor) -> State:
        return {"step": 0, "m": torch.zeros_like(p), "v": torch.zeros_like(p)}

    def _move(self, p: Tensor, g: Tensor, state: State, group: dict[str, Any]) -> None:
        lr, eps, (beta1, beta2) = group["lr"], group["eps"], group["betas"]
        state["step"] += 1
        t, m, v = state["step"], state["m"], state["v"]

        p.mul_(1 - lr * group["weight_decay"])
        m.mul_(beta1).add_((1 - beta1) * g)
        v.mul_(beta2).add_((1 - beta2) * g.square())
        if group["amsgrad"]:
            largest = state.get("v_max", torch.zeros_like(v))
            v = state["v_max"] = torch.maximum(largest, v)
        m_hat = m / (1 - beta1**t)
        v_hat = v / (1 - beta2**t)
        p.sub_(lr * m_hat / (v_hat.sqrt() + eps))

    def _move_all(
        self, params: list[Tensor], grads: Tensors, states: list[State], group: dict[str, Any]
    ) -> None:
        lr, eps, (beta1, beta2) = group["lr"], group["eps"], group["betas"]
        for state in states:
            state["step"] += 1
        t, m, v = states[0]["step"], [s["m"] for s in states], [s["v"] for s in states]

        if group["weight_decay"]:
            torch._foreach_mul_(params, 1 - lr * group["weight_decay"])
        torch._foreach_lerp_(m, grads, 1 - beta1)
        torch._foreach_mul_(v, beta2)
        torch._foreach_addcmul_(v, grads, grads, 1 - beta2)
        if group["amsgrad"]:
            for state in states:
                state.setdefault("v_max", state["v"].clone())
            largest = [s["v_max"] for s in states]
            torch._foreach_maximum_(largest, v)
            v = largest
        # with c₁ = 1 − β₁ᵗ and c₂ = √(1 − β₂ᵗ) the step is (η c₂ / c₁) m / (√v + c₂ ε),
        # so that both corrections are numbers and need no pass over the memory
        c1, c2 = 1 - beta1**t, (1 - beta2**t) ** 0.5
        root = torch._foreach_sqrt(v)
        torch._foreach_add_(root, c2 * eps)
        torch._foreach_addcdiv_(params, m, root, -lr * c2 / c1)
