"""Sophia: divide by the curvature, and clip where the curvature cannot be trusted.

Two estimates of the Hessian's diagonal, and the optimizer that goes with each.

Paper: Liu et al. (2024), algorithms 1 to 3. References: pytorch_optimizer.SophiaH;
github.com/Liuhong99/Sophia for SophiaG.

Book: second-order
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from .base import Optimizer, State, Tensors, _name


def hutchinson_diagonal(
    loss: Tensor,
    params: Iterable[Tensor],
    generator: torch.Generator,
    *,
    samples: int = 1,
    distribution: str = "rademacher",
) -> list[Tensor]:
    r"""Estimate the diagonal of the loss's Hessian H, for every parameter.

    $$\hat h = u \odot H u, \qquad \mathbb E\, u u^\top = I
      \quad\Longrightarrow\quad \mathbb E\,\hat h = \mathrm{diag}(H)$$

    One product $Hu$ costs about two more backward passes. Attention must be differentiable twice: on a
    processor, inside `torch.nn.attention.sdpa_kernel(SDPBackend.MATH)`.
    Paper: Hutchinson (1989); Liu et al. (2024), algorithm 1.

    Args:
        loss: a scalar whose graph is still there, and stays.
        params: what it is differentiated by.
        generator: draws u.
        samples: the number of u to average over.
        distribution: "rademacher" (signs, the least variance) or "gaussian" (the paper's).

    Returns:
        One tensor for each parameter, of its shape.

    Raises:
        ValueError: the loss is no scalar, `samples` is below 1, or the distribution is unknown.

    Book: second-order
    """
    params = list(params)
    if loss.numel() != 1:
        raise ValueError(f"loss: expected a scalar, got shape {tuple(loss.shape)}")
    if samples < 1:
        raise ValueError(f"samples: expected at least 1, got {samples}")
    if distribution not in ("rademacher", "gaussian"):
        raise ValueError(f"distribution: expected 'rademacher' or 'gaussian', got {distribution!r}")
    grads = torch.autograd.grad(loss, params, create_graph=True, materialize_grads=True)
    curved = [g for g in grads if g.requires_grad]  # the others are constant, and their Hessian is 0
    total = [torch.zeros_like(p) for p in params]
    for _ in range(samples if curved else 0):
        us = [_draw(p, generator, distribution) for p in params]
        Hu = torch.autograd.grad(
            curved,
            params,
            [u for u, g in zip(us, grads, strict=True) if g.requires_grad],
            retain_graph=True,
            materialize_grads=True,
        )
        for h, u, product in zip(total, us, Hu, strict=True):
            h.addcmul_(u, product, value=1 / samples)
    return total


def sample_labels(logits: Tensor, generator: torch.Generator) -> Tensor:
    r"""Draw a label from the model's own prediction, for the Gauss-Newton-Bartlett estimate.

    With $y \sim \mathrm{softmax}(z)$ and the mean loss of B such labels, whose gradient is $\hat g$,

    $$\mathbb E\,\big[B\, \hat g \odot \hat g\big] = \mathrm{diag}(J^\top S J / B),$$

    the diagonal of the Gauss-Newton matrix; with the labels of the data it is not.
    Paper: Liu et al. (2024), algorithm 2.

    Args:
        logits: (…, V); no gradient is taken through the draw.
        generator: draws.

    Returns:
        (…) int64 labels.

    Raises:
        ValueError: there are no logits to draw from.

    Book: second-order
    """
    if logits.dim() < 1 or logits.numel() == 0:
        raise ValueError(f"logits: expected shape (…, V), got {tuple(logits.shape)}")
    probabilities = (
        logits.detach().flatten(0, -2).softmax(-1) if logits.dim() > 1 else logits.detach().softmax(-1)
    )
    return torch.multinomial(probabilities, 1, generator=generator).view(logits.shape[:-1])


class _Sophia(Optimizer):
    """What both share: m and h, the decay, and when h is due."""

    def _start(self, p: Tensor) -> State:
        return {"step": 0, "m": torch.zeros_like(p), "h": torch.zeros_like(p)}

    @property
    def hessian_due(self) -> bool:
        """Whether `update_hessian` is to be called before the coming step: at the first, and every k-th.

        Book: second-order
        """
        done = max((state.get("step", 0) for state in self.state.values()), default=0)
        return done % self.param_groups[0]["update_every"] == 0

    @torch.no_grad()
    def _average(self, estimates: Sequence[Tensor | None], group: dict[str, Any]) -> None:
        """h ← β₂ h + (1 − β₂) ĥ for the parameters of a group, where there is an estimate."""
        pairs = [(p, h) for p, h in zip(group["params"], estimates, strict=True) if h is not None]
        if pairs:
            torch._foreach_lerp_(
                [self._kept(p)["h"] for p, _ in pairs], [h for _, h in pairs], 1 - group["betas"][1]
            )


class SophiaH(_Sophia):
    r"""Sophia with Hutchinson's estimate.

    $$\begin{aligned}
    m &\leftarrow \beta_1 m + (1 - \beta_1)\, g, \qquad
    h \leftarrow \beta_2 h + (1 - \beta_2)\, \hat h \ \text{ every } k \text{ steps} \\
    \theta &\leftarrow (1 - \eta\lambda)\,\theta \\
    \theta &\leftarrow \theta - \eta\, \mathrm{clip}\Big(\frac{m}{\max(\gamma h, \varepsilon)},\, 1\Big)
    \end{aligned}$$

    Where h is negative or tiny, the step is Lion's: η in the direction of m. Nothing is bias-corrected.

        if optimizer.hessian_due:
            optimizer.update_hessian(hutchinson_diagonal(loss, parameters, generator))
        optimizer.step()

    Paper: Liu et al. (2024). Reference: pytorch_optimizer.SophiaH, which clips m / h at ±p instead, so that
    its learning rate is η / p with p = γ.

    Args:
        params: parameters, named or not, or groups of them (see `decay_groups`).
        lr: η.
        betas: β₁ of the gradient and β₂ of the curvature.
        gamma: γ; a larger one clips less.
        eps: ε.
        weight_decay: λ.
        update_every: k.
        maximize: step up instead of down; h is then to be that of the negative.
        foreach: move parameters in lists; where False one by one, as the equation is written.
        check_finite: refuse gradients and estimates with NaN or infinity.

    Raises:
        TypeError, ValueError: as `Optimizer`.

    Book: second-order
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.96, 0.99),
        gamma: float = 0.01,
        eps: float = 1e-12,
        weight_decay: float = 0.1,
        *,
        update_every: int = 10,
        maximize: bool = False,
        foreach: bool = True,
        check_finite: bool = True,
    ) -> None:
        settings = {
            "lr": lr,
            "betas": betas,
            "gamma": gamma,
            "eps": eps,
            "weight_decay": weight_decay,
            "update_every": update_every,
            "maximize": maximize,
        }
        super().__init__(params, settings, foreach=foreach, check_finite=check_finite)

    def update_hessian(self, estimates: Iterable[Tensor]) -> None:
        """Take in an estimate of the diagonal, one tensor for each parameter, in the groups' order.

        Raises:
            ValueError: there are more or fewer estimates than parameters, or a shape differs.
            FloatingPointError: an estimate holds NaN or infinity. Nothing was changed.

        Book: second-order
        """
        given = list(estimates)
        members = [
            (_name(group, number, i), p)
            for number, group in enumerate(self.param_groups)
            for i, p in enumerate(group["params"])
        ]
        if len(given) != len(members):
            raise ValueError(f"estimates: expected {len(members)} tensors, one a parameter, got {len(given)}")
        for (name, p), h in zip(members, given, strict=True):
            if h.shape != p.shape:
                raise ValueError(
                    f"estimates: expected shape {tuple(p.shape)} for {name}, got {tuple(h.shape)}"
                )
            if self.check_finite and not h.isfinite().all():
                raise FloatingPointError(
                    f"estimates: expected finite numbers for {name}; nothing was changed"
                )
        for group in self.param_groups:
            size = len(group["params"])
            self._average(given[:size], group)
            given = given[size:]

    def _move(self, p: Tensor, g: Tensor, state: State, group: dict[str, Any]) -> None:
        lr, m, h = group["lr"], state["m"], state["h"]
        state["step"] += 1
        m.lerp_(g, 1 - group["betas"][0])
        p.mul_(1 - lr * group["weight_decay"])
        p.sub_(lr * (m / (group["gamma"] * h).clamp(min=group["eps"])).clamp(-1, 1))

    def _move_all(
        self, params: list[Tensor], grads: Tensors, states: list[State], group: dict[str, Any]
    ) -> None:
        lr, m = group["lr"], [s["m"] for s in states]
        for state in states:
            state["step"] += 1
        torch._foreach_lerp_(m, grads, 1 - group["betas"][0])
        if group["weight_decay"]:
            torch._foreach_mul_(params, 1 - lr * group["weight_decay"])
        scale = torch._foreach_mul([s["h"] for s in states], group["gamma"])
        torch._foreach_clamp_min_(scale, group["eps"])
        ratio = torch._foreach_div(m, scale)
        torch._foreach_clamp_min_(ratio, -1.0)
        torch._foreach_clamp_max_(ratio, 1.0)
        torch._foreach_add_(params, ratio, alpha=-lr)


class SophiaG(_Sophia):
    r"""Sophia with the Gauss-Newton-Bartlett estimate, as its authors released it.

    With $\hat g$ the gradient of the mean loss of a batch of B tokens whose labels the model drew itself,

    $$\begin{aligned}
    m &\leftarrow \beta_1 m + (1 - \beta_1)\, g, \qquad
    h \leftarrow \beta_2 h + (1 - \beta_2)\, \hat g^2 \ \text{ every } k \text{ steps} \\
    \theta &\leftarrow (1 - \eta\lambda)\,\theta \\
    \theta &\leftarrow \theta - \eta\, \mathrm{sign}(m)\,
      \min\Big(\frac{|m|}{\rho B h + 10^{-15}},\, 1\Big)
    \end{aligned}$$

    The factor B of the estimate stands in the step. h cannot be negative; nothing is bias-corrected.

        if optimizer.hessian_due:
            logits = model(tokens)
            F.cross_entropy(logits, sample_labels(logits, generator)).backward()
            optimizer.update_hessian()
            optimizer.zero_grad()

    Paper: Liu et al. (2024). Reference: github.com/Liuhong99/Sophia.

    Args:
        params: parameters, named or not, or groups of them (see `decay_groups`).
        lr: η.
        betas: β₁ of the gradient and β₂ of the curvature.
        rho: ρ; a larger one clips less.
        weight_decay: λ.
        batch_tokens: B, the tokens over which the loss of the drawn labels is a mean.
        update_every: k.
        maximize: step up instead of down.
        foreach: move parameters in lists; where False one by one, as the equation is written.
        check_finite: refuse gradients with NaN or infinity.

    Raises:
        TypeError, ValueError: as `Optimizer`.

    Book: second-order
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.965, 0.99),
        rho: float = 0.04,
        weight_decay: float = 0.1,
        *,
        batch_tokens: int,
        update_every: int = 10,
        maximize: bool = False,
        foreach: bool = True,
        check_finite: bool = True,
    ) -> None:
        settings = {
            "lr": lr,
            "betas": betas,
            "rho": rho,
            "weight_decay": weight_decay,
            "batch_tokens": batch_tokens,
            "update_every": update_every,
            "maximize": maximize,
        }
        super().__init__(params, settings, foreach=foreach, check_finite=check_finite)

    def update_hessian(self) -> None:
        """Take in the gradients that stand in `.grad`, which must be those of drawn labels.

        Raises:
            TypeError: a gradient is sparse.
            ValueError: no parameter has a gradient.
            FloatingPointError: a gradient holds NaN or infinity. Nothing was changed.

        Book: second-order
        """
        self._check_gradients()
        if all(p.grad is None for group in self.param_groups for p in group["params"]):
            raise ValueError("update_hessian: expected gradients of the loss with drawn labels, got none")
        for group in self.param_groups:
            squares = [None if p.grad is None else p.grad.detach().square() for p in group["params"]]
            self._average(squares, group)

    def _move(self, p: Tensor, g: Tensor, state: State, group: dict[str, Any]) -> None:
        lr, m, h = group["lr"], state["m"], state["h"]
        state["step"] += 1
        m.lerp_(g, 1 - group["betas"][0])
        p.mul_(1 - lr * group["weight_decay"])
        ratio = m.abs() / (group["rho"] * group["batch_tokens"] * h + 1e-15)
        p.sub_(lr * m.sign() * ratio.clamp(max=1))

    def _move_all(
        self, params: list[Tensor], grads: Tensors, states: list[State], group: dict[str, Any]
    ) -> None:
        lr, m = group["lr"], [s["m"] for s in states]
        for state in states:
            state["step"] += 1
        torch._foreach_lerp_(m, grads, 1 - group["betas"][0])
        if group["weight_decay"]:
            torch._foreach_mul_(params, 1 - lr * group["weight_decay"])
        scale = torch._foreach_mul([s["h"] for s in states], group["rho"] * group["batch_tokens"])
        torch._foreach_add_(scale, 1e-15)
        # the scale is positive, so that sign(m) min(|m| / scale, 1) is m / scale, clipped on both sides
        ratio = torch._foreach_div(m, scale)
        torch._foreach_clamp_min_(ratio, -1.0)
        torch._foreach_clamp_max_(ratio, 1.0)
        torch._foreach_add_(params, ratio, alpha=-lr)


def _draw(p: Tensor, generator: torch.Generator, distribution: str) -> Tensor:
    if distribution == "gaussian":
        return torch.randn(p.shape, generator=generator, dtype=p.dtype, device=p.device)
    signs = torch.randint(2, p.shape, generator=generator, device=p.device)
    return (2 * signs - 1).to(p.dtype)
