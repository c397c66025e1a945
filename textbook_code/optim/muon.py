"""Muon: a matrix moves as one thing, by the nearest matrix whose directions all count alike.

Reference: torch.optim.Muon, after Jordan et al. (2024).

Book: second-order
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from .base import Optimizer, State, Tensors

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
"""a, b and c of the polynomial, chosen for its slope at 0; its singular values end near 1, not at it."""


def orthogonalize(
    matrix: Tensor, *, steps: int = 5, eps: float = 1e-7, dtype: torch.dtype | None = torch.bfloat16
) -> Tensor:
    r"""Bring all singular values of a matrix near 1, by products of matrices alone.

    $$X_0 = \frac{G}{\max(\lVert G \rVert_F, \varepsilon)}, \qquad
      X_{i+1} = a X_i + \big(b\, X_i X_i^\top + c\, (X_i X_i^\top)^2\big) X_i$$

    With $G = U \Sigma V^\top$ each step is the polynomial $a s + b s^3 + c s^5$ in every singular value s,
    and leaves U and V alone. Reference: `_zeropower_via_newtonschulz` of torch.optim.Muon.

    Args:
        matrix: (M, N).
        steps: how often the polynomial is applied.
        eps: ε.
        dtype: computed in it; None keeps the matrix's own.

    Returns:
        (M, N) in that dtype.

    Raises:
        ValueError: the tensor has not two axes, or `steps` is below 1.

    Book: second-order
    """
    if matrix.dim() != 2:
        raise ValueError(f"matrix: expected shape (M, N), got {tuple(matrix.shape)}")
    if steps < 1:
        raise ValueError(f"steps: expected at least 1, got {steps}")
    a, b, c = NEWTON_SCHULZ
    tall = matrix.size(0) > matrix.size(1)
    x = matrix.to(dtype or matrix.dtype)
    x = x.T if tall else x  # the smaller product of the two
    x = x / x.norm().clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x


class Muon(Optimizer):
    r"""Momentum, orthogonalised, for matrices only.

    $$\begin{aligned}
    m &\leftarrow \mu\, m + (1 - \mu)\, G, \qquad
    \tilde m = (1 - \mu)\, G + \mu\, m \ \text{ (Nesterov)} \\
    \Theta &\leftarrow (1 - \eta\lambda)\, \Theta \\
    \Theta &\leftarrow \Theta - \eta\, s\, \mathrm{orthogonalize}(\tilde m), \qquad
      s = \sqrt{\max(1, M / N)} \ \text{ or }\ 0.2 \sqrt{\max(M, N)}
    \end{aligned}$$

    The first s is its author's, the second gives a step of about Adam's size. Tables, norms and biases are to
    be moved by another optimizer. It keeps m, four bytes a parameter in float32.
    Reference: torch.optim.Muon.

    Args:
        params: matrices (M, N), named or not, or groups of them.
        lr: η.
        momentum: μ.
        weight_decay: λ.
        nesterov: whether the newest gradient counts once more.
        ns_steps: steps of `orthogonalize`.
        eps: of `orthogonalize`.
        match_rms: take the second s.
        ns_dtype: the dtype of `orthogonalize`; None keeps the gradient's.
        foreach: average in lists; the products of matrices are done one by one either way.
        check_finite: refuse gradients with NaN or infinity.

    Raises:
        TypeError, ValueError: as `Optimizer`, or a parameter is no matrix.

    Book: second-order
    """

    ns_dtype: torch.dtype | None = torch.bfloat16

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        momentum: float = 0.95,
        weight_decay: float = 0.1,
        *,
        nesterov: bool = True,
        ns_steps: int = 5,
        eps: float = 1e-7,
        match_rms: bool = False,
        ns_dtype: torch.dtype | None = torch.bfloat16,
        foreach: bool = True,
        check_finite: bool = True,
    ) -> None:
        settings = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "ns_steps": ns_steps,
            "eps": eps,
            "match_rms": match_rms,
        }
        self.ns_dtype = ns_dtype
        super().__init__(params, settings, foreach=foreach, check_finite=check_finite)

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"ns_dtype": self.ns_dtype}

    def _check_parameter(self, name: str, p: Tensor) -> None:
        super()._check_parameter(name, p)
        if p.dim() != 2:
            raise ValueError(
                f"{name}: expected a matrix (M, N), got shape {tuple(p.shape)}; "
                "another optimizer moves the others"
            )

    def _start(self, p: Tensor) -> State:
        return {"m": torch.zeros_like(p)}

    def _move(self, p: Tensor, g: Tensor, state: State, group: dict[str, Any]) -> None:
        mu, m = group["momentum"], state["m"]
        m.lerp_(g, 1 - mu)
        self._turn(p, g.lerp(m, mu) if group["nesterov"] else m, group)

    def _move_all(
        self, params: list[Tensor], grads: Tensors, states: list[State], group: dict[str, Any]
    ) -> None:
        mu, m = group["momentum"], [s["m"] for s in states]
        torch._foreach_lerp_(m, grads, 1 - mu)
        for p, direction in zip(
            params, torch._foreach_lerp(grads, m, mu) if group["nesterov"] else m, strict=True
        ):
            self._turn(p, direction, group)

    def _turn(self, p: Tensor, direction: Tensor, group: dict[str, Any]) -> None:
        """Decay, and the step in a direction, orthogonalised and scaled."""
        M, N = p.shape
        scale = 0.2 * max(M, N) ** 0.5 if group["match_rms"] else max(1.0, M / N) ** 0.5
        step = orthogonalize(direction, steps=group["ns_steps"], eps=group["eps"], dtype=self.ns_dtype)
        p.mul_(1 - group["lr"] * group["weight_decay"])
        p.add_(step, alpha=-group["lr"] * scale)
