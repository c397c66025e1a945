"""Schedules of the learning rate: functions step → factor, the step counted from 0.

Each function here returns such a function, to be given to `training.loop.train` or to
`torch.optim.lr_scheduler.LambdaLR`; the learning rate of a step is the optimizer's own times the factor.

s step, w steps of warm-up, N steps in all, φ the floor.

Book: gpt-training
"""

import math
from collections.abc import Callable

Schedule = Callable[[int], float]
"""The factor of the learning rate at a step, counted from 0."""


def warmup_linear(warmup: int, total: int, *, floor: float = 0.0) -> Schedule:
    r"""Up in a straight line, then down in another: BERT's schedule.

    $$\lambda(s) = \begin{cases} (s + 1) / w & s < w \\
    \varphi + (1 - \varphi)\,(N - s) / (N - w) & w \le s < N \\ \varphi & s \ge N \end{cases}$$

    Paper: Devlin et al. (2019), appendix A.2.

    Args:
        warmup: w; without warm-up 0.
        total: N, more than w.
        floor: φ, the factor that is reached at N.

    Raises:
        ValueError: a count that is negative or too great, or a floor outside 0 … 1.

    Book: gpt-training
    """
    _check(warmup, total, floor)
    return lambda s: _warm(s, warmup) or floor + (1 - floor) * (1 - _progress(s, warmup, total))


def warmup_cosine(warmup: int, total: int, *, floor: float = 0.0) -> Schedule:
    r"""Up in a straight line, then down along half a cosine: the schedule of GPT-3 and LLaMA.

    $$\lambda(s) = \begin{cases} (s + 1) / w & s < w \\ \varphi + (1 - \varphi)\,
    \tfrac12 \Bigl(1 + \cos \pi \tfrac{s - w}{N - w}\Bigr) & w \le s < N \\ \varphi & s \ge N \end{cases}$$

    Both papers end at a tenth, φ = 0.1. Papers: Loshchilov and Hutter (2017), without the restarts; Brown et
    al. (2020), appendix B.

    Args:
        warmup: w; without warm-up 0.
        total: N, more than w.
        floor: φ, the factor that is reached at N.

    Raises:
        ValueError: a count that is negative or too great, or a floor outside 0 … 1.

    Book: gpt-training
    """
    _check(warmup, total, floor)

    def factor(s: int) -> float:
        done = _progress(s, warmup, total)
        return _warm(s, warmup) or floor + (1 - floor) * (1 + math.cos(math.pi * done)) / 2

    return factor


def inverse_sqrt(warmup: int, *, d_model: int | None = None) -> Schedule:
    r"""Up in a straight line, then down as 1/√s: the Transformer's and T5's schedule.

    With $t = s + 1$

    $$\lambda(s) = \min\bigl(t / w,\; \sqrt{w / t}\bigr), \qquad\text{and with } d:\quad
    d^{-1/2} \min\bigl(t^{-1/2},\; t\, w^{-3/2}\bigr) = \lambda(s) / \sqrt{d\,w}.$$

    The first has its peak, 1, at t = w. The second is the formula of the paper, a learning rate rather than a
    factor: give the optimizer the rate 1. Paper: Vaswani et al. (2017), section 5.3.

    Args:
        warmup: w, at least 1.
        d_model: d; without it the peak is 1.

    Raises:
        ValueError: `warmup` or `d_model` is below 1.

    Book: gpt-training
    """
    for name, value in (("warmup", warmup), ("d_model", 1 if d_model is None else d_model)):
        if value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")
    peak = 1.0 if d_model is None else (d_model * warmup) ** -0.5
    return lambda s: peak * min((s + 1) / warmup, math.sqrt(warmup / (s + 1)))


def warmup_stable_decay(warmup: int, total: int, *, decay: int, floor: float = 0.0) -> Schedule:
    r"""Up, level for most of the time, and down in a straight line over the last steps (WSD).

    With δ steps of decay

    $$\lambda(s) = \begin{cases} (s + 1) / w & s < w \\ 1 & w \le s < N - \delta \\
    \varphi + (1 - \varphi)\,(N - s) / \delta & N - \delta \le s < N \\ \varphi & s \ge N \end{cases}$$

    A run can be prolonged from any checkpoint of the level stretch, as N does not matter until the decay.
    Paper: Hu et al. (2024), MiniCPM, section 4, whose decay is exponential; this one is linear.

    Args:
        warmup: w; without warm-up 0.
        total: N, more than w.
        decay: δ, from 1 to N − w.
        floor: φ, the factor that is reached at N.

    Raises:
        ValueError: a count that is negative or too great, or a floor outside 0 … 1.

    Book: gpt-training
    """
    _check(warmup, total, floor)
    if not 1 <= decay <= total - warmup:
        raise ValueError(f"decay: expected 1 to {total - warmup} steps (total - warmup), got {decay}")
    return lambda s: _warm(s, warmup) or floor + (1 - floor) * (1 - _progress(s, total - decay, total))


def _warm(s: int, warmup: int) -> float:
    """The factor during warm-up, which is never 0; 0 after it."""
    return (s + 1) / warmup if s < warmup else 0.0


def _progress(s: int, start: int, end: int) -> float:
    """How much of the way from `start` to `end` is done: 0 … 1."""
    return min(max((s - start) / (end - start), 0.0), 1.0)


def _check(warmup: int, total: int, floor: float) -> None:
    if warmup < 0:
        raise ValueError(f"warmup: expected 0 or more steps, got {warmup}")
    if total <= warmup:
        raise ValueError(f"total: expected more steps than warmup = {warmup}, got {total}")
    if not 0 <= floor <= 1:
        raise ValueError(f"floor: expected a factor in [0, 1], got {floor}")
