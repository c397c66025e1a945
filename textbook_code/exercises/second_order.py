"""Exercises of the page on curvature: Sophia, Muon, and what comes next.

Book: second-order
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from textbook_code.exercises.framework import Exercise
from textbook_code.exercises.judge import tensor_problem
from textbook_code.optim.muon import orthogonalize
from textbook_code.optim.sophia import SophiaH


def _check_hutchinson(answer: Callable[..., Any]) -> str | None:
    for size, draws in ((3, 1), (5, 4), (7, 50)):
        A = torch.randn(size, size, dtype=torch.float64)
        H, us = A + A.T, torch.randn(draws, size, dtype=torch.float64)
        products = us * (us @ H)  # H is symmetric
        what = f"H of {size} rows, {draws} draws"
        got = answer(lambda u, H=H: H @ u, us.clone())
        if problem := tensor_problem(got, products.mean(0), what, tol=1e-9):
            if isinstance(got, Tensor):
                slips = {
                    "that is the sum over the coordinates, which estimates the trace": products.sum(1).mean(),
                    "that is Hu: each coordinate is still to be multiplied by its own u": (us @ H).mean(0),
                    "Hu was divided by u, which does the same only where u is 1 or -1": (us @ H / us).mean(0),
                    "that is the sum over the draws and not their mean": products.sum(0),
                }
                for slip, value in slips.items():
                    if got.shape == value.shape and torch.allclose(got.double(), value):
                        return f"{what}: {slip}."
            return problem
    return None


def _check_newton_schulz(answer: Callable[..., Any]) -> str | None:
    for shape, steps in (((4, 9), 5), ((11, 3), 5), ((6, 6), 2)):
        G = torch.randn(shape, dtype=torch.float64)
        what = f"a matrix of shape {shape}, {steps} steps"
        got = answer(G.clone(), steps)
        if problem := tensor_problem(got, orthogonalize(G, steps=steps, dtype=None), what, tol=1e-6):
            if isinstance(got, Tensor) and got.shape == G.shape:
                if not got.abs().max() < 2:  # NaN too
                    return f"{what}: the largest singular value ran away; it has to begin at 1 or below."
                largest = orthogonalize(G, steps=steps + 1, dtype=None)
                if torch.allclose(got.double(), largest, atol=1e-6):
                    return f"{what}: that is one step too many."
            return problem
    return None


def _check_sampled_labels(answer: Callable[..., Any]) -> str | None:
    for B, D, V in ((6, 3, 4), (20, 2, 5)):
        X, W = torch.randn(B, D, dtype=torch.float64), torch.randn(V, D, dtype=torch.float64)
        generator = torch.Generator().manual_seed(3)
        got = [answer(X.clone(), W.clone(), generator) for _ in range(1500)]
        what = f"{B} inputs of width {D} and {V} classes"
        first = tensor_problem(got[0], torch.zeros(V, D, dtype=torch.float64), what, tol=1e9)
        if first:
            return first
        draws = torch.stack(got).double()
        if draws.std(0).max() < 1e-9:
            return f"{what}: every call gave the same numbers; labels are drawn anew from the model."
        p = (X @ W.T).softmax(-1)
        exact = torch.einsum("bv,bd->vd", p * (1 - p), X**2) / B
        error = (draws.mean(0) - exact).abs() / (draws.std(0) / len(draws) ** 0.5 + 1e-3 * exact)
        if error.max() > 6:
            ratio = (draws.mean() / exact.mean()).item()
            if 0.8 < ratio * B < 1.2:
                return f"{what}: the mean is 1/B of the diagonal of the Gauss-Newton matrix."
            if 0.8 < ratio / B < 1.2:
                return f"{what}: the mean is B times the diagonal of the Gauss-Newton matrix."
            return f"{what}: the mean of 1,500 estimates is {ratio:.3g} of the exact diagonal's."
    return None


def _check_sophia_bug(answer: Callable[..., Any]) -> str | None:
    settings = {"lr": 0.03, "betas": (0.9, 0.99), "gamma": 0.2, "eps": 1e-6, "weight_decay": 0.1}
    torch.manual_seed(1)
    start, m, g = torch.randn(3, 40, dtype=torch.float64)
    h = torch.cat([torch.rand(20) * 8, -torch.rand(10), torch.zeros(10)]).double()
    p = nn.Parameter(start.clone())
    optimizer = SophiaH([p], **settings)  # type: ignore[arg-type]
    p.grad = g.clone()
    optimizer.state[p].update(step=0, m=m.clone(), h=h.clone())
    optimizer.step()
    moment = optimizer.state[p]["m"]
    expected = p.detach()
    got = answer(start.clone(), g.clone(), m.clone(), h.clone(), 0.03, 0.9, 0.2, 1e-6, 0.1)
    if not (isinstance(got, tuple) and len(got) == 2):
        return "expected the new p and the new m, in this order."
    what = "40 coordinates, curvature of either sign"
    if problem := tensor_problem(got[1], moment, f"{what}, m", tol=1e-9):
        return problem
    if problem := tensor_problem(got[0], expected, f"{what}, p", tol=1e-9):
        if isinstance(got[0], Tensor) and got[0].shape == start.shape:
            step, right = got[0].double() - start * (1 - 0.03 * 0.1), expected - start * (1 - 0.03 * 0.1)
            away = ((step * right < 0) & (h < 0)).sum()
            if away:
                return f"{what}: {int(away)} of the 10 coordinates with h < 0 go uphill."
            if step.abs().max() > 0.03 * (1 + 1e-6):
                return f"{what}: some coordinate moves further than the learning rate."
        return problem
    return None


def _check_shampoo(answer: Callable[..., Any]) -> str | None:
    for shape, steps in (((3, 5), 1), ((4, 3), 3), ((6, 6), 5)):
        W, grads = torch.randn(shape, dtype=torch.float64), torch.randn(steps, *shape, dtype=torch.float64)
        what = f"a matrix of shape {shape}, {steps} gradients"
        got = answer(W.clone(), list(grads), 0.1, 0.5)
        if problem := tensor_problem(got, _shampoo(W, grads), what, tol=1e-6):
            if isinstance(got, Tensor) and got.shape == W.shape:
                slips = {
                    "the roots are square roots; with two preconditioners each takes a fourth root": 0.5,
                    "the powers are positive: it multiplies by what it should divide by": -0.25,
                }
                for slip, power in slips.items():
                    if torch.allclose(got.double(), _shampoo(W, grads, power=power), atol=1e-6):
                        return f"{what}: {slip}."
                if torch.allclose(got.double(), _shampoo(W, grads, keep=False), atol=1e-6):
                    return f"{what}: the preconditioners forget; they add up over the steps."
            return problem
    return None


def _shampoo(W: Tensor, grads: Tensor, *, power: float = 0.25, keep: bool = True) -> Tensor:
    def root(S: Tensor) -> Tensor:
        values, vectors = torch.linalg.eigh(S)
        return (vectors * values**-power) @ vectors.T

    left, right = (0.5 * torch.eye(n, dtype=W.dtype) for n in W.shape)
    for G in grads:
        if not keep:
            left, right = (0.5 * torch.eye(n, dtype=W.dtype) for n in W.shape)
        left, right = left + G @ G.T, right + G.T @ G
        W = W - 0.1 * root(left) @ G @ root(right)
    return W


_NEWTON_SCHULZ = """
import torch

def newton_schulz(G, steps):
    a, b, c = 3.4445, -4.7750, 2.0315
    X = G / G.norm()
    for _ in range(steps):
        A = X @ X.T
        X = a * X + (b * A + c * A @ A) @ X
    return X
"""

_SAMPLED = """
import torch

def estimate(X, W, generator):
    B = len(X)
    p = (X @ W.T).softmax(-1)  # (B, V)
    y = torch.multinomial(p, 1, generator=generator)[:, 0]
    residual = p - torch.nn.functional.one_hot(y, len(W))
    gradient = residual.T @ X / B  # (V, D), of the mean loss
    return B * gradient**2
"""

_SOPHIA = """
import torch

def sophia_step(p, g, m, h, lr, beta1, gamma, eps, weight_decay):
    m = beta1 * m + (1 - beta1) * g
    p = p - lr * weight_decay * p
    ratio = m / (gamma * h).clamp(min=eps)
    return p - lr * ratio.clamp(-1, 1), m
"""

_SHAMPOO = """
import torch

def root(S):
    values, vectors = torch.linalg.eigh(S)
    return vectors @ torch.diag(values ** -0.25) @ vectors.T

def shampoo(W, grads, lr, eps):
    M, N = W.shape
    L = eps * torch.eye(M, dtype=W.dtype)
    R = eps * torch.eye(N, dtype=W.dtype)
    for G in grads:
        L = L + G @ G.T
        R = R + G.T @ G
        W = W - lr * root(L) @ G @ root(R)
    return W
"""

EXERCISES = (
    Exercise(
        name="second-order/hutchinson",
        title="A diagonal without the matrix",
        stars=1,
        statement=r"""
            You may multiply by a symmetric matrix, `times(u)` $= Hu$, and not look into it. Write the mean of
            Hutchinson's estimate over the rows of `us`, `(K, P)`, drawn with mean 0 and variance 1. By hand
            first: with $H = \begin{pmatrix} 3 & 1 \\ 1 & 2 \end{pmatrix}$, what do $u = (1, 1)$ and
            $u = (1, -1)$ give, and their mean?
        """,
        answer="diagonal",
        starter="""
            import torch

            def diagonal(times, us):
                raise NotImplementedError
        """,
        solution="""
            import torch

            def diagonal(times, us):
                return torch.stack([u * times(u) for u in us]).mean(0)
        """,
        wrong=(
            """
            import torch

            def diagonal(times, us):
                return torch.stack([times(u) for u in us]).mean(0)
            """,
            """
            import torch

            def diagonal(times, us):
                return torch.stack([times(u) / u for u in us]).mean(0)
            """,
            """
            import torch

            def diagonal(times, us):
                return torch.stack([u @ times(u) for u in us]).mean(0)
            """,
        ),
        check=_check_hutchinson,
        hint="Which products of u's coordinates have mean 1, and which 0? One of them must stand before H.",
    ),
    Exercise(
        name="second-order/newton-schulz",
        title="All directions alike",
        stars=2,
        statement=r"""
            Write Muon's iteration: begin with $X = G / \lVert G \rVert_F$ and apply
            $X \leftarrow aX + (bA + cA^2)X$ with $A = XX^\top$, `steps` times, with $a = 3.4445$,
            $b = -4.7750$, $c = 2.0315$. Predict what one step does to a singular value of 0.01.
        """,
        answer="newton_schulz",
        starter="""
            import torch

            def newton_schulz(G, steps):
                raise NotImplementedError
        """,
        solution=_NEWTON_SCHULZ,
        wrong=(
            _NEWTON_SCHULZ.replace("G / G.norm()", "G"),
            _NEWTON_SCHULZ.replace("c * A @ A", "c * A"),
            _NEWTON_SCHULZ.replace("range(steps)", "range(steps + 1)"),
        ),
        check=_check_newton_schulz,
        hint="A is square, of G's first size, and A times X has X's shape: nothing is to be turned back.",
    ),
    Exercise(
        name="second-order/sampled-labels",
        title="Curvature from drawn labels",
        stars=2,
        statement=r"""
            A softmax regression has logits $z_b = W x_b$, with `X` of shape `(B, D)` and `W` of `(V, D)`.
            Write one Gauss–Newton–Bartlett estimate of the diagonal for $W$, `(V, D)`: draw labels from the
            model with `generator`, take the gradient of the mean loss, square it, and mind the factor. The
            mean over many calls is compared with $\frac1B \sum_b p_{bv}(1 - p_{bv})\, x_{bd}^2$.
        """,
        answer="estimate",
        starter="""
            import torch

            def estimate(X, W, generator):
                raise NotImplementedError
        """,
        solution=_SAMPLED,
        wrong=(
            _SAMPLED.replace("return B * gradient**2", "return gradient**2"),
            _SAMPLED.replace("torch.multinomial(p, 1, generator=generator)[:, 0]", "p.argmax(-1)"),
            _SAMPLED.replace(
                "torch.multinomial(p, 1, generator=generator)[:, 0]",
                "torch.randint(len(W), (B,), generator=generator)",
            ),
        ),
        check=_check_sampled_labels,
        hint="One input has the gradient (p - onehot(y)) xᵀ. How large is the square of a mean of B of them?",
    ),
    Exercise(
        name="second-order/sophia-bug",
        title="One line of Sophia is wrong",
        stars=2,
        statement=r"""
            The starter is meant to be Sophia's step with Hutchinson's `h`. It raises no error, and yet it
            can climb. Find the line and mend it; the function returns the new `p` and the new `m`.
        """,
        answer="sophia_step",
        starter="""
            import torch

            def sophia_step(p, g, m, h, lr, beta1, gamma, eps, weight_decay):
                m = beta1 * m + (1 - beta1) * g
                p = p - lr * weight_decay * p
                ratio = m / (gamma * h + eps)
                return p - lr * ratio.clamp(-1, 1), m
        """,
        solution=_SOPHIA,
        wrong=(
            _SOPHIA.replace("(gamma * h).clamp(min=eps)", "(gamma * h.abs()).clamp(min=eps)"),
            _SOPHIA.replace("lr * ratio.clamp(-1, 1)", "(lr * ratio).clamp(-1, 1)"),
            _SOPHIA.replace("(gamma * h).clamp(min=eps)", "gamma * h.clamp(min=eps)"),
        ),
        check=_check_sophia_bug,
        hint="What is h where the loss curves downwards, and which way does the ratio then point?",
    ),
    Exercise(
        name="second-order/shampoo",
        title="The next one, from its formula",
        stars=3,
        statement=r"""
            Muon forgets which directions were steep before. Shampoo adds them up, a
            matrix for the rows and one for the columns: with $L = \varepsilon I$ and $R = \varepsilon I$ at
            the start, each gradient $G$ gives
            $L \leftarrow L + GG^\top$, $R \leftarrow R + G^\top G$ and
            $W \leftarrow W - \eta\, L^{-1/4}\, G\, R^{-1/4}$. Write it for a list of gradients. What is the
            first step as $\varepsilon \to 0$?
        """,
        answer="shampoo",
        starter="""
            import torch

            def shampoo(W, grads, lr, eps):
                raise NotImplementedError
        """,
        solution=_SHAMPOO,
        wrong=(
            _SHAMPOO.replace("-0.25", "-0.5"),
            _SHAMPOO.replace("L = L + G @ G.T", "L = eps * torch.eye(M, dtype=W.dtype) + G @ G.T").replace(
                "R = R + G.T @ G", "R = eps * torch.eye(N, dtype=W.dtype) + G.T @ G"
            ),
            _SHAMPOO.replace("-0.25", "0.25"),
        ),
        check=_check_shampoo,
        hint="A power of a symmetric matrix is the power of its eigenvalues: torch.linalg.eigh has both.",
    ),
)
