"""Exercises of the page on AdamW and Lion.

Book: optimization
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from textbook_code.exercises.framework import Exercise
from textbook_code.exercises.judge import number_problem, tensor_problem
from textbook_code.models.text.gpt import GptConfig
from textbook_code.models.text.llama import LlamaConfig
from textbook_code.optim.adamw import AdamW
from textbook_code.optim.lion import Lion


def _steps_problem(got: Any, expected: Tensor, keeps: list[Tensor], what: str) -> str | None:
    """A step's answer is the new weights with what is kept of them."""
    if not isinstance(got, tuple) or len(got) != 1 + len(keeps):
        return f"{what}: expected {1 + len(keeps)} tensors, the weights first, got {type(got).__name__}."
    return tensor_problem(got[0], expected, f"{what}, the weights", tol=1e-9)


def _check_lion_step(answer: Callable[..., Any]) -> str | None:
    lr, betas, decay = 0.1, (0.7, 0.95), 0.5
    w = nn.Parameter(torch.randn(40, dtype=torch.float64))
    optimizer = Lion([w], lr, betas, decay)
    theirs, m = w.detach().clone(), torch.zeros_like(w).detach()
    for step in range(1, 9):
        g = torch.randn(40, dtype=torch.float64)
        w.grad = g.clone()
        before = theirs
        optimizer.step()
        got = answer(theirs.clone(), g.clone(), m.clone(), lr, betas, decay)
        expected, kept = w.detach(), optimizer.state[w]["m"]
        if problem := _steps_problem(got, expected, [kept], f"step {step}"):
            if isinstance(got, tuple) and len(got) == 2 and isinstance(got[0], Tensor):
                moved = (betas[1] * m + (1 - betas[1]) * g).sign()
                if torch.allclose(got[0], (1 - lr * decay) * before - lr * moved):
                    return f"step {step}: the sign is that of the average with β₂; the step has β₁."
                short = (got[0] - (1 - lr * decay) * before).abs()
                if not torch.allclose(short, torch.full_like(short, lr)):
                    return f"step {step}: not every coordinate moves by lr, beside the decay by lr · decay."
            return problem
        if problem := tensor_problem(got[1], kept, f"step {step}, the average m", tol=1e-9):
            return problem
        theirs, m = got
    return None


def _check_bias_correction(answer: Callable[..., Any]) -> str | None:
    for beta in (0.9, 0.999, 0.0):
        for size in (1, 2, 7, 50):
            gradients = torch.randn(size, dtype=torch.float64) + 3
            m = torch.zeros((), dtype=torch.float64)
            for g in gradients:
                m = beta * m + (1 - beta) * g
            what = f"beta={beta}, the mean of {size} gradients"
            expected = m / (1 - beta**size)
            got = answer(gradients.clone(), beta)
            if problem := number_problem(got, expected.item(), what, rel=1e-9):
                if size > 1 and beta == 0.9 and number_problem(got, (m / (1 - beta)).item(), "") is None:
                    return f"{what}: it divides by 1 − β for every length; the sum of the weights is 1 − βᵗ."
                if number_problem(got, m.item(), "") is None:
                    return f"{what}: the average is not corrected; a mean of numbers near 3 lies near 3."
                return problem
    return None


def _check_training_bytes(answer: Callable[..., Any]) -> str | None:
    counts = {
        "LLaMA 7B": LlamaConfig.llama1_7b().num_parameters(),
        "the largest LLaMA 3.1": LlamaConfig.llama31_405b().num_parameters(),
        "GPT-2": GptConfig.gpt2_small().num_parameters(),
    }
    for name, parameters in counts.items():
        for states in (3, 2, 1, 0):
            for mixed in (True, False):
                expected = parameters * ((2 + 2 + 4 if mixed else 4 + 4) + 4 * states)
                kind = "mixed precision" if mixed else "float32 alone"
                what = f"{name}, {states} averages, {kind}"
                got = answer(parameters, states, mixed)
                if problem := number_problem(got, float(expected), what, rel=1e-9):
                    slips = {
                        "the gradient is missing": expected - parameters * (2 if mixed else 4),
                        "the averages are in float32, four bytes each": expected - 2 * states * parameters,
                        "beside the half-precision weight there is one in float32": expected - 4 * parameters,
                    }
                    for slip, value in slips.items():
                        if value != expected and number_problem(got, float(value), "", rel=1e-9) is None:
                            return f"{what}: {slip}."
                    return problem
    return None


def _check_adamw_step(answer: Callable[..., Any]) -> str | None:
    lr, betas, eps, decay = 0.05, (0.8, 0.95), 0.1, 0.4
    w = nn.Parameter(torch.randn(30, dtype=torch.float64))
    optimizer = AdamW([w], lr, betas, eps, decay)
    theirs, m, v = w.detach().clone(), torch.zeros(30).double(), torch.zeros(30).double()
    for t in range(1, 12):
        g = torch.randn(30, dtype=torch.float64)
        w.grad = g.clone()
        before, old_m, old_v = theirs, m, v
        optimizer.step()
        state = optimizer.state[w]
        got = answer(theirs.clone(), g.clone(), m.clone(), v.clone(), t, lr, betas, eps, decay)
        if problem := _steps_problem(got, w.detach(), [state["m"], state["v"]], f"step {t}"):
            if isinstance(got, tuple) and len(got) == 3 and isinstance(got[0], Tensor):
                for slip, value in _adamw_slips(before, g, old_m, old_v, t, lr, betas, eps, decay).items():
                    if torch.allclose(got[0], value, atol=1e-9):
                        return f"step {t}: {slip}."
            return problem
        for name, kept, new in (("m", state["m"], got[1]), ("v", state["v"], got[2])):
            if problem := tensor_problem(new, kept, f"step {t}, the average {name}", tol=1e-9):
                return problem
        theirs, m, v = got
    return None


def _adamw_slips(
    w: Tensor,
    g: Tensor,
    m: Tensor,
    v: Tensor,
    t: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    decay: float,
) -> dict[str, Tensor]:
    """The usual mistakes, computed."""

    def adam(gradient: Tensor) -> tuple[Tensor, Tensor]:
        new_m = betas[0] * m + (1 - betas[0]) * gradient
        new_v = betas[1] * v + (1 - betas[1]) * gradient**2
        return new_m / (1 - betas[0] ** t), new_v / (1 - betas[1] ** t)

    m_hat, v_hat = adam(g)
    l2_m, l2_v = adam(g + decay * w)
    decayed = (1 - lr * decay) * w
    return {
        "the decay went into the gradient, where it is divided by the root too": w
        - lr * l2_m / (l2_v.sqrt() + eps),
        "ε stands inside the root": decayed - lr * m_hat / (v_hat + eps).sqrt(),
        "the second average is not corrected": decayed
        - lr * m_hat / ((v_hat * (1 - betas[1] ** t)).sqrt() + eps),
        "the decay is not multiplied by the learning rate": (1 - decay) * w
        - lr * m_hat / (v_hat.sqrt() + eps),
    }


def _check_factored_moment(answer: Callable[..., Any]) -> str | None:
    for shape in ((5, 7), (7, 5), (1, 6)):
        row, column = torch.rand(shape[0]).double(), torch.rand(shape[1]).double()
        for beta, eps in ((0.9, 1e-3), (0.0, 1e-30)):
            g = torch.randn(shape, dtype=torch.float64)
            what = f"a gradient of shape {shape}, beta={beta}, eps={eps:g}"
            square = g**2 + eps
            new_row = beta * row + (1 - beta) * square.sum(1)
            new_column = beta * column + (1 - beta) * square.sum(0)
            expected = new_row[:, None] * new_column / new_row.sum()
            got = answer(g.clone(), row.clone(), column.clone(), beta, eps)
            if not isinstance(got, tuple) or len(got) != 3:
                return f"{what}: expected the new row sums, the new column sums and the second moment."
            for name, mine, right in (
                ("row sums", got[0], new_row),
                ("column sums", got[1], new_column),
                ("second moment", got[2], expected),
            ):
                if problem := tensor_problem(mine, right, f"{what}, {name}", tol=1e-8):
                    if name == "second moment" and isinstance(mine, Tensor) and mine.shape == expected.shape:
                        if torch.allclose(mine, new_row[:, None] * new_column):
                            return f"{what}: the product is not divided; its sum is to be that of the rows."
                        if shape == (5, 7):
                            return f"{what}: a matrix r cᵀ must come back as itself, and does not."
                    return problem
    return None


_ADAMW = """
def adamw(w, g, m, v, t, lr, betas, eps, decay):
    beta1, beta2 = betas
    w = (1 - lr * decay) * w
    m = beta1 * m + (1 - beta1) * g
    v = beta2 * v + (1 - beta2) * g**2
    m_hat = m / (1 - beta1**t)
    v_hat = v / (1 - beta2**t)
    return w - lr * m_hat / (v_hat.sqrt() + eps), m, v
"""

_FACTORED = """
def factored(g, row, column, beta, eps):
    square = g**2 + eps
    row = beta * row + (1 - beta) * square.sum(1)  # (M,)
    column = beta * column + (1 - beta) * square.sum(0)  # (N,)
    return row, column, row[:, None] * column / row.sum()
"""

EXERCISES = (
    Exercise(
        name="optimization/lion-step",
        title="A step of Lion",
        stars=1,
        statement=r"""
            Write one step of Lion on a tensor `w` with gradient `g` and average `m`; give back the new `w`
            and the new `m`. `betas` are $\beta_1$ and $\beta_2$; the decay is multiplied by `lr`. How many
            different lengths can a coordinate's move have, the decay apart?
        """,
        answer="lion",
        starter="""
            def lion(w, g, m, lr, betas, decay):
                raise NotImplementedError
        """,
        solution="""
            def lion(w, g, m, lr, betas, decay):
                beta1, beta2 = betas
                direction = (beta1 * m + (1 - beta1) * g).sign()
                w = (1 - lr * decay) * w - lr * direction
                return w, beta2 * m + (1 - beta2) * g
        """,
        wrong=(
            """
            def lion(w, g, m, lr, betas, decay):
                beta1, beta2 = betas
                m = beta2 * m + (1 - beta2) * g
                return (1 - lr * decay) * w - lr * m.sign(), m
            """,
            """
            def lion(w, g, m, lr, betas, decay):
                beta1, beta2 = betas
                direction = beta1 * m + (1 - beta1) * g
                return (1 - lr * decay) * w - lr * direction, beta2 * m + (1 - beta2) * g
            """,
            """
            def lion(w, g, m, lr, betas, decay):
                beta1, beta2 = betas
                direction = (beta1 * m + (1 - beta1) * g).sign()
                return (1 - lr * decay) * w - lr * direction, beta1 * m + (1 - beta1) * g
            """,
        ),
        check=_check_lion_step,
        hint="Two averages of the same two tensors, with two betas: one is used and thrown away.",
    ),
    Exercise(
        name="optimization/bias-correction",
        title="A bias correction with a bug",
        stars=1,
        statement=r"""
            The starter averages gradients and corrects the bias of the start, it says. With $\beta = 0.9$ and
            gradients that are all 3, its answer leaves 3 at the second step. Find the mistake: `gradients` is
            a tensor `(t,)`, the newest last, and the answer is to be one number, their weighted mean
            $\hat m_t$.
        """,
        answer="average",
        starter="""
            def average(gradients, beta):
                m = 0.0
                for g in gradients:
                    m = beta * m + (1 - beta) * g
                    m = m / (1 - beta)  # the bias of the start
                return m
        """,
        solution="""
            def average(gradients, beta):
                m = 0.0
                for g in gradients:
                    m = beta * m + (1 - beta) * g
                return m / (1 - beta ** len(gradients))
        """,
        wrong=(
            """
            def average(gradients, beta):
                m = 0.0
                for g in gradients:
                    m = beta * m + (1 - beta) * g
                return m / (1 - beta)
            """,
            """
            def average(gradients, beta):
                m = 0.0
                for t, g in enumerate(gradients, start=1):
                    m = (beta * m + (1 - beta) * g) / (1 - beta**t)
                return m
            """,
            """
            def average(gradients, beta):
                m = 0.0
                for g in gradients:
                    m = beta * m + (1 - beta) * g
                return m
            """,
        ),
        check=_check_bias_correction,
        hint="What is kept must stay as it is; only what is used is divided. By which sum?",
    ),
    Exercise(
        name="optimization/training-bytes",
        title="The memory of a training run",
        stars=2,
        statement=r"""
            Write how many bytes a run keeps for its parameters: weights, gradients and the optimizer's
            `averages` (two for AdamW, one for Lion), which are float32. In `mixed` precision there are a
            16-bit weight, a 16-bit gradient and a float32 weight; otherwise one weight and one gradient, both
            float32. Does mixed precision save any of this memory?
        """,
        answer="training_bytes",
        starter="""
            def training_bytes(parameters, averages, mixed):
                raise NotImplementedError
        """,
        solution="""
            def training_bytes(parameters, averages, mixed):
                weights_and_gradient = 2 + 2 + 4 if mixed else 4 + 4
                return parameters * (weights_and_gradient + 4 * averages)
        """,
        wrong=(
            """
            def training_bytes(parameters, averages, mixed):
                return parameters * ((2 + 4 if mixed else 4) + 4 * averages)
            """,
            """
            def training_bytes(parameters, averages, mixed):
                return parameters * ((2 + 2 + 4 if mixed else 4 + 4) + 2 * averages)
            """,
            """
            def training_bytes(parameters, averages, mixed):
                return parameters * ((2 + 2 if mixed else 4 + 4) + 4 * averages)
            """,
        ),
        check=_check_training_bytes,
        hint="Which numbers does the optimizer move, and in which precision must a small step not be lost?",
    ),
    Exercise(
        name="optimization/adamw-step",
        title="A step of AdamW",
        stars=2,
        statement=r"""
            Write step `t`, counted from 1, of AdamW on a tensor `w` with gradient `g` and averages `m` and
            `v`; give back the new `w`, `m` and `v`. The decay is multiplied by `lr`. The package's optimizers
            stay shut.
        """,
        answer="adamw",
        starter="""
            def adamw(w, g, m, v, t, lr, betas, eps, decay):
                raise NotImplementedError
        """,
        solution=_ADAMW,
        wrong=tuple(
            _ADAMW.replace(right, slip)
            for right, slip in (
                ("w = (1 - lr * decay) * w", "g = g + decay * w"),
                ("(v_hat.sqrt() + eps)", "(v_hat + eps).sqrt()"),
                ("v_hat = v / (1 - beta2**t)", "v_hat = v"),
                ("(1 - lr * decay)", "(1 - decay)"),
                ("m_hat = m / (1 - beta1**t)", "m_hat = m / (1 - beta1)"),
            )
        ),
        check=_check_adamw_step,
        hint="Decay first, then two averages, then their corrections, then ε beside the root.",
    ),
    Exercise(
        name="optimization/factored-moment",
        title="The next optimizer: Adafactor's second moment",
        stars=3,
        statement=r"""
            For a matrix (M, N) Adam's $v$ has $MN$ numbers. Adafactor (Shazeer and Stern, 2018) keeps two
            vectors instead, averages of the row sums and of the column sums of $g^2 + \varepsilon$:
            $r \leftarrow \beta r + (1 - \beta)\,(g^2 + \varepsilon)\,\mathbf 1$ and
            $c \leftarrow \beta c + (1 - \beta)\,(g^2 + \varepsilon)^\top \mathbf 1$, and puts
            $\hat v = r\, c^\top / \sum_i r_i$ together from them. Write it: give back $r$, $c$ and $\hat v$.
            For which matrices $g^2$ is nothing lost?
        """,
        answer="factored",
        starter="""
            def factored(g, row, column, beta, eps):
                raise NotImplementedError
        """,
        solution=_FACTORED,
        wrong=tuple(
            _FACTORED.replace(right, slip)
            for right, slip in (
                (" / row.sum()", ""),
                ("row.sum()", "row.mean()"),
                ("(1 - beta) * square.sum(0)", "(1 - beta) * square.mean(0)"),
                ("g**2 + eps", "g**2"),
            )
        ),
        check=_check_factored_moment,
        hint="Add up a row of v̂: it must give r of that row. What are the sums of c, and of r?",
    ),
)
