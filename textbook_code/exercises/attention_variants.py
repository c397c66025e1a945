"""Exercises of the page that compares the variants of attention.

Book: attention-variants
"""

import math
from collections.abc import Callable
from typing import Any

import torch

from textbook_code.exercises.framework import Exercise
from textbook_code.exercises.judge import number_problem, tensor_problem
from textbook_code.layers.attention import attention
from textbook_code.layers.masks import causal_mask, sliding_window_mask
from textbook_code.layers.sparse_attention import fixed_mask, strided_mask


def _check_fitted_exponent(answer: Callable[..., Any]) -> str | None:
    lengths = [500, 1000, 2000, 4000, 7000]
    for power in (1.0, 1.5, 2.0):
        seconds = [3e-7 * T**power for T in lengths]
        what = f"times that grow as T to the {power:g}, in the unit of seconds"
        if problem := number_problem(answer(list(lengths), list(seconds)), power, what, rel=1e-6):
            return problem
    noisy = [x * factor for x, factor in zip(seconds, (1.1, 0.9, 1.05, 0.97, 1.2), strict=True)]
    x = torch.tensor(lengths, dtype=torch.float64).log()
    y = torch.tensor(noisy, dtype=torch.float64).log()
    expected = float(((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum())
    got = answer(list(lengths), list(noisy))
    ends = math.log(noisy[-1] / noisy[0]) / math.log(lengths[-1] / lengths[0])
    what = "noisy times"
    if number_problem(got, ends, what, rel=1e-6) is None:
        return f"{what}: that is the slope between the two ends; all points should have a say."
    return number_problem(got, expected, what, rel=1e-6)


def _check_crossover(answer: Callable[..., Any]) -> str | None:
    for window in (32, 256, 1000):
        for overhead in (1.0, 1.5, 3.0):
            expected = math.ceil(2 * overhead * window)
            got = answer(window, overhead)
            what = f"a window of {window} whose pairs cost {overhead:g} times as much"
            if problem := number_problem(got, expected, what, rel=1e-9):
                if number_problem(got, math.ceil(overhead * window), what, rel=1e-9) is None:
                    return f"{what}: a causal layer meets half of the square, not all of it."
                return problem
    return None


def _check_layers_needed(answer: Callable[..., Any]) -> str | None:
    T = 96
    masks = {
        "a window of 7": sliding_window_mask(T, window=7),
        "a window of 2": sliding_window_mask(T, window=2),
        "strides of 8": strided_mask(T, stride=8),
        "fixed blocks of 8": fixed_mask(T, stride=8, summary=1),
        "full attention": causal_mask(T),
    }
    for name, mask in masks.items():
        for distance in (1, 30, 95):
            what = f"{name}, from the last of {T} positions to the one {distance} before it"
            expected, heard = 0, _heard(mask, 0)
            while not heard[T - 1, T - 1 - distance]:
                expected += 1
                heard = _heard(mask, expected)
            got = answer(mask.clone(), distance)
            if problem := number_problem(got, expected, what, rel=1e-9):
                direct = (mask[T - 1].nonzero()[0] - (T - 1)).abs().item()
                if number_problem(got, math.ceil(distance / direct), what, rel=1e-9) is None:
                    return f"{what}: that counts the longest step only; a path must end at the position."
                return problem
    return None


def _heard(mask: torch.Tensor, layers: int) -> torch.Tensor:
    """Who has heard of whom after so many layers, by powers of the mask."""
    T = mask.size(0)
    step = (mask | torch.eye(T, dtype=torch.bool)).double()
    return torch.linalg.matrix_power(step, layers) > 0 if layers else torch.eye(T, dtype=torch.bool)


def _check_sinks(answer: Callable[..., Any]) -> str | None:
    for B, H, T, Dh, window, sinks in ((2, 3, 11, 5, 4, 2), (1, 2, 20, 8, 3, 1), (1, 1, 6, 4, 9, 3)):
        q, k, v = torch.randn(3, B, H, T, Dh, dtype=torch.float64)
        mask = sliding_window_mask(T, window=window)
        mask[:, :sinks] = True
        mask &= causal_mask(T)
        expected = attention(q, k, v, mask)[0]
        what = f"{T} positions, a window of {window} and {sinks} sinks"
        got = answer(q.clone(), k.clone(), v.clone(), window, sinks)
        if problem := tensor_problem(got, expected, what, tol=1e-8):
            early = sliding_window_mask(T, window=window)
            early[:, :sinks] = True
            slips = {
                "the first positions look at sinks that come later": attention(q, k, v, early)[0],
                "the window has one position too many": attention(
                    q, k, v, mask | sliding_window_mask(T, window=window + 1)
                )[0],
                "that is the window alone": attention(q, k, v, sliding_window_mask(T, window=window))[0],
            }
            for slip, other in slips.items():
                if tensor_problem(got, other, what, tol=1e-8) is None:
                    return f"{what}: {slip}."
            return problem
    return None


def _check_hybrid_bytes(answer: Callable[..., Any]) -> str | None:
    for layers, every, window, K, Dh, b in (
        (24, 6, 1024, 4, 256, 2),
        (30, 2, 128, 8, 64, 2),
        (7, 3, 10, 1, 5, 4),
    ):
        for T in (1, window - 1, window, 10 * window):
            full = layers // every
            expected = 2 * K * Dh * b * (full * T + (layers - full) * min(T, window))
            what = (
                f"{layers} layers, every {every}th with full attention, a window of {window}, {K} key heads "
                f"of {Dh}, {T} positions, {b} bytes a number"
            )
            got = answer(layers, every, window, K, Dh, T, b)
            if problem := number_problem(got, expected, what, rel=1e-9):
                slips = {
                    "keys are counted, and not values": expected / 2,
                    "a window holds no more positions than there are": 2
                    * K * Dh * b * (full * T + (layers - full) * window),
                    "the two kinds of layers are exchanged": 2
                    * K * Dh * b * ((layers - full) * T + full * min(T, window)),
                }  # fmt: skip
                for slip, value in slips.items():
                    if value != expected and number_problem(got, value, "", rel=1e-9) is None:
                        return f"{what}: {slip}."
                return problem
    return None


_FIT = """
import math

def exponent(lengths, seconds):
    x = [math.log(T) for T in lengths]
    y = [math.log(s) for s in seconds]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    above = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y))
    return above / sum((a - mean_x) ** 2 for a in x)
"""

_CROSSOVER = """
import math

def crossover(window, overhead):
    return math.ceil(2 * overhead * window)
"""

_LAYERS = """
import torch

def layers_needed(mask, distance):
    T = mask.size(0)
    known = torch.eye(T, dtype=torch.bool)
    layers = 0
    while not known[T - 1, T - 1 - distance]:
        known = (mask.float() @ known.float() > 0) | known
        layers += 1
    return layers
"""

_SINKS = """
import torch

def sink_attention(q, k, v, window, sinks):
    T = q.size(2)
    i, j = torch.arange(T)[:, None], torch.arange(T)
    seen = ((i - j < window) | (j < sinks)) & (j <= i)
    scores = q @ k.transpose(-2, -1) / q.size(-1) ** 0.5
    return scores.masked_fill(~seen, float("-inf")).softmax(-1) @ v
"""

_HYBRID = """
def hybrid_bytes(layers, every, window, num_kv_heads, head_dim, tokens, bytes_each):
    full = layers // every
    positions = full * tokens + (layers - full) * min(tokens, window)
    return 2 * num_kv_heads * head_dim * bytes_each * positions
"""

EXERCISES = (
    Exercise(
        name="attention-variants/exponent",
        title="The exponent of a cost",
        stars=1,
        statement=r"""
            Fit $t = c\,T^a$ to measured times: return $a$, the slope of the least-squares line through the
            points $(\ln T, \ln t)$. Predict what it is for full attention between 512 and 4,096 positions
            before you use it on the times of this page.
        """,
        answer="exponent",
        starter="""
            import math

            def exponent(lengths, seconds):
                raise NotImplementedError
        """,
        solution=_FIT,
        wrong=(
            _FIT.replace("math.log(s) for s", "s for s"),
            """
            import math

            def exponent(lengths, seconds):
                return math.log(seconds[-1] / seconds[0]) / math.log(lengths[-1] / lengths[0])
            """,
            _FIT.replace("[math.log(T) for T in lengths]", "lengths"),
        ),
        check=_check_fitted_exponent,
        hint="A power law is a straight line in logarithms of both axes.",
    ),
    Exercise(
        name="attention-variants/crossover",
        title="From which length on?",
        stars=1,
        statement=r"""
            A causal layer meets about $T^2 / 2$ pairs. A window of $W$ meets about $T\,W$, and in blocks each
            of them costs `overhead` times as much. Return the length, rounded up, from which on the window is
            no dearer.
        """,
        answer="crossover",
        starter="""
            def crossover(window, overhead):
                raise NotImplementedError
        """,
        solution=_CROSSOVER,
        wrong=(
            _CROSSOVER.replace("2 * overhead * window", "overhead * window"),
            _CROSSOVER.replace("2 * overhead * window", "2 * window / overhead"),
        ),
        check=_check_crossover,
        hint="Set the two costs equal, and divide by T.",
    ),
    Exercise(
        name="attention-variants/layers-needed",
        title="How many layers until it is heard?",
        stars=2,
        statement="""
            All layers have the same causal mask `(T, T)`, in which True means may attend. Return the least
            number of layers after which the last position's output can depend on the input that stands
            `distance` places before it. The residual connection keeps what was known.
        """,
        answer="layers_needed",
        starter="""
            import torch

            def layers_needed(mask, distance):
                raise NotImplementedError
        """,
        solution=_LAYERS,
        wrong=(
            """
            def layers_needed(mask, distance):
                T = mask.size(0)
                longest = T - 1 - mask[T - 1].nonzero()[0].item()
                return -(-distance // longest)
            """,
            _LAYERS.replace("return layers", "return layers + 1"),
            _LAYERS.replace("mask.float() @ known.float()", "mask.T.float() @ known.float()").replace(
                "while not known[T - 1, T - 1 - distance]:", "for _ in range(3):"
            ),
        ),
        check=_check_layers_needed,
        hint="Before the first layer a position knows itself. A layer adds what those know whom it sees.",
    ),
    Exercise(
        name="attention-variants/sinks",
        title="A window with sinks",
        stars=2,
        statement=r"""
            Write causal attention in which a query sees its own position, the `window` − 1 before it, and the
            first `sinks` positions of the text. `q`, `k` and `v` are `(B, H, T, Dh)`; scores are divided by
            $\sqrt{D_h}$.
        """,
        answer="sink_attention",
        starter="""
            import torch

            def sink_attention(q, k, v, window, sinks):
                raise NotImplementedError
        """,
        solution=_SINKS,
        wrong=(
            _SINKS.replace(
                "((i - j < window) | (j < sinks)) & (j <= i)", "(i - j < window) & (j <= i) | (j < sinks)"
            ),
            _SINKS.replace("i - j < window", "i - j <= window"),
            _SINKS.replace(" | (j < sinks)", ""),
        ),
        check=_check_sinks,
        hint="A position early in the text may not look at a sink that comes after it.",
    ),
    Exercise(
        name="attention-variants/hybrid-bytes",
        title="The next variant: layers of two kinds",
        stars=3,
        statement="""
            Many recent decoders alternate: every `every`-th layer attends to all earlier positions, and the
            others to a window of `window` with a rolling cache. Return the bytes of all keys and values that
            such a model holds after `tokens` positions. Predict how much of them the few full layers hold,
            for 24 layers, every sixth full, a window of 1,024, and 32,768 tokens.
        """,
        answer="hybrid_bytes",
        starter="""
            def hybrid_bytes(layers, every, window, num_kv_heads, head_dim, tokens, bytes_each):
                raise NotImplementedError
        """,
        solution=_HYBRID,
        wrong=(
            _HYBRID.replace("min(tokens, window)", "window"),
            _HYBRID.replace("2 * num_kv_heads", "num_kv_heads"),
            _HYBRID.replace(
                "full * tokens + (layers - full) * min(tokens, window)",
                "(layers - full) * tokens + full * min(tokens, window)",
            ),
        ),
        check=_check_hybrid_bytes,
        hint="A rolling cache never holds more than its window, and before that no more than there are.",
    ),
)
