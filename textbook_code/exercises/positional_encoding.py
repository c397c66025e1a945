"""Exercises of the page on positional encoding.

Book: positional-encoding
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from textbook_code.exercises.framework import Exercise
from textbook_code.exercises.judge import tensor_problem, vector_problem
from textbook_code.layers.positions import (
    ALiBi,
    MultimodalRotaryPositions,
    RotaryPositions,
    alibi_slopes,
    offsets,
    relative_scores,
    rotate,
    rotate_neighbours,
)


def _check_slopes(answer: Callable[..., Any]) -> str | None:
    for heads in (8, 16, 12, 6, 1, 3, 20):
        expected = alibi_slopes(heads).tolist()
        what = f"{heads} heads"
        got = answer(heads)
        if problem := vector_problem(got, expected, what, tol=1e-9):
            plain = [2 ** (-8 * h / heads) for h in range(1, heads + 1)]
            if vector_problem(got, plain, what, tol=1e-9) is None:
                return f"{what}: that is the formula for powers of two, and {heads} is none."
            if vector_problem(got, sorted(expected, reverse=True), what, tol=1e-9) is None:
                return f"{what}: the numbers are right, and in another order than in the released weights."
            return problem
    return None


def _check_alibi_bug(answer: Callable[..., Any]) -> str | None:
    for heads, T, S in ((8, 6, 6), (4, 3, 9), (12, 1, 5)):
        expected = ALiBi(heads).double()(T, S)
        seen = offsets(T, S) <= 0
        what = f"{heads} heads, {T} queries, {S} keys"
        got = answer(heads, T, S)
        if not isinstance(got, Tensor) or got.shape != expected.shape:
            return tensor_problem(got, expected, what)
        got = got.double().masked_fill(~seen, 0)  # behind the causal mask all is one
        expected = expected.masked_fill(~seen, 0)
        if problem := tensor_problem(got, expected, what, tol=1e-6):
            if torch.allclose(got, -expected, atol=1e-6):
                return f"{what}: it rewards what is far."
            first = torch.arange(T)[:, None] - torch.arange(S)
            late = (-alibi_slopes(heads)[:, None, None] * first).masked_fill(~seen, 0)
            if torch.allclose(got, late, atol=1e-6):
                return f"{what}: the first query stands at 0; behind a cache it is the last {T} of {S}."
            return problem
    return None


def _check_neighbours(answer: Callable[..., Any]) -> str | None:
    for shape, theta in (((2, 3, 7, 8), 10_000.0), ((1, 1, 33, 10), 500.0), ((2, 1, 5, 2), 1e5)):
        x, positions = torch.randn(shape, dtype=torch.float64), torch.arange(shape[2]) + 4
        turns = RotaryPositions(shape[3], theta=theta)(positions)
        expected = rotate_neighbours(x, *turns)
        what = f"x of shape {shape} with theta={theta:g}, positions from 4 on"
        got = answer(x.clone(), positions.clone(), theta)
        if problem := tensor_problem(got, expected, what, tol=1e-6):
            if isinstance(got, Tensor) and got.shape == expected.shape:
                if torch.allclose(got.to(x), rotate(x, *turns), atol=1e-6):
                    return f"{what}: it pairs i and i + Dh/2; here 2i goes with 2i + 1."
                order = torch.cat([torch.arange(0, shape[3], 2), torch.arange(1, shape[3], 2)])
                if torch.allclose(got.to(x), expected[..., order], atol=1e-6):
                    return f"{what}: turned right, and the channels are left in another order."
                back = rotate_neighbours(x, turns[0], -turns[1])
                if torch.allclose(got.to(x), back, atol=1e-6):
                    return f"{what}: it turns the other way; the minus stands with the even channels."
            return problem
    return None


def _check_skew(answer: Callable[..., Any]) -> str | None:
    for B, H, T, Dh, clip in ((2, 3, 9, 4, 2), (1, 2, 7, 5, 6), (1, 1, 5, 4, 11), (2, 1, 1, 4, 3)):
        q, table = torch.randn(B, H, T, Dh), torch.randn(2 * clip + 1, Dh)
        expected = relative_scores(q, table, T)
        what = f"{T} queries, distances -{clip} to {clip}"
        got = answer(q.clone(), table.clone())
        if problem := tensor_problem(got, expected, what, tol=1e-4):
            if isinstance(got, Tensor) and got.shape == expected.shape:
                if torch.allclose(got, relative_scores(q, table.flip(0), T), atol=1e-4):
                    return f"{what}: the sign of the distance is turned round; it is key minus query."
                if clip + 1 < T and torch.allclose(got[..., 0, : clip + 1], expected[..., 0, : clip + 1]):
                    return f"{what}: right within the clip; what is farther takes the outermost vector."
            return problem
    counted = _Counted()
    with counted:
        answer(torch.randn(1, 1, 64, 8), torch.randn(5, 8))
    if counted.largest >= 64 * 64 * 8:
        return (
            f"64 queries of width 8: a tensor of {counted.largest:,} numbers was made; "
            "the vectors are not to be laid out for all pairs."
        )
    return None


class _Counted(torch.overrides.TorchFunctionMode):
    """The size of the largest tensor that was made while it is on."""

    largest = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            self.largest = max(self.largest, out.numel())
        return out


def _check_m_rope(answer: Callable[..., Any]) -> str | None:
    for sections, theta in (((16, 24, 24), 1e6), ((2, 3, 3), 1e4), ((3, 1, 4), 500.0)):
        head_dim, T = 2 * sum(sections), 11
        x, positions = torch.randn(2, 3, T, head_dim, dtype=torch.float64), torch.randint(50, (3, T))
        expected = rotate(x, *MultimodalRotaryPositions(head_dim, sections, theta=theta)(positions))
        what = f"sections {sections} with theta={theta:g}"
        got = answer(x.clone(), positions.clone(), sections, theta)
        if problem := tensor_problem(got, expected, what, tol=1e-6):
            if not (isinstance(got, Tensor) and got.shape == expected.shape):
                return problem
            for slip, value in _m_rope_slips(x, positions, sections, theta).items():
                if torch.allclose(got.to(x), value, atol=1e-6):
                    return f"{what}: {slip}."
            return problem
    return None


def _m_rope_slips(x: Tensor, positions: Tensor, sections: tuple[int, ...], theta: float) -> dict[str, Tensor]:
    omega = RotaryPositions(x.size(-1), theta=theta).frequencies()
    own = torch.cat([theta ** (-torch.arange(n, dtype=x.dtype) / n) for n in sections])
    axis = torch.arange(3).repeat_interleave(torch.tensor(sections))
    angles = {
        "all planes count the first axis": positions[0][:, None] * omega,
        "each section starts with the fastest hand again; here there is one row of speeds": positions[axis].T
        * own,
        "the axes come in another order": positions.flip(0)[axis].T * omega,
    }
    return {
        slip: rotate(x, *(torch.cat([wave, wave], -1) for wave in (angle.cos(), angle.sin())))
        for slip, angle in angles.items()
    }


_SLOPES = """
import math

def slopes(num_heads):
    n = 2 ** int(math.log2(num_heads))
    first = [2 ** (-8 * h / n) for h in range(1, n + 1)]
    between = [2 ** (-4 * h / n) for h in range(1, 2 * n, 2)]
    return first + between[: num_heads - n]
"""

_ALIBI_BUG = """
import torch

def bias(num_heads, T, S):
    n = 1 << (num_heads.bit_length() - 1)
    slopes = [2 ** (-8 * h / n) for h in range(1, n + 1)]
    between = [2 ** (-4 * h / n) for h in range(1, 2 * n, 2)]
    slopes += between[: num_heads - n]
    queries, keys = torch.arange(T), torch.arange(S)
    distance = keys - queries[:, None]  # (T, S)
    return -torch.tensor(slopes)[:, None, None] * distance
"""

_ALIBI = _ALIBI_BUG.replace("torch.arange(T), torch", "torch.arange(S - T, S), torch").replace(
    "keys - queries[:, None]", "queries[:, None] - keys"
)

_NEIGHBOURS = """
import torch

def turn(x, positions, theta):
    Dh = x.shape[-1]
    omega = theta ** (-torch.arange(0, Dh, 2, dtype=torch.float64) / Dh)  # (Dh/2,)
    angle = positions[:, None] * omega  # (T, Dh/2)
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    even, odd = x[..., ::2], x[..., 1::2]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2)
"""

_SKEW = """
import torch
import torch.nn.functional as F

def scores(q, table):
    T, clip = q.shape[-2], table.shape[0] // 2
    x = q @ table.T  # (B, H, T, 2 clip + 1): a score for each distance
    distances = torch.arange(1 - T, T).clamp(-clip, clip) + clip
    x = x[..., distances]  # (B, H, T, 2T - 1): the outermost ones repeated
    x = F.pad(x, (0, 1)).flatten(-2)[..., T - 1 : -1]  # rows one number longer, cut anew
    return x.unflatten(-1, (T, 2 * T - 1))[..., :T]
"""

_M_ROPE = """
import torch

def turn(x, positions, sections, theta):
    Dh = x.shape[-1]
    omega = theta ** (-torch.arange(0, Dh, 2, dtype=torch.float64) / Dh)  # (Dh/2,)
    axis = torch.arange(3).repeat_interleave(torch.tensor(sections))  # the axis of each plane
    angle = positions[axis].T * omega  # (T, Dh/2)
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    first, second = x[..., : Dh // 2], x[..., Dh // 2 :]
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1)
"""

EXERCISES = (
    Exercise(
        name="positional-encoding/slopes",
        title="Slopes for twelve heads",
        stars=1,
        statement=r"""
            Write ALiBi's slopes for any number of heads: $2^{-8h/n}$ for $h = 1, \ldots, n$, with n the
            largest power of two that is not above `num_heads`; then every other slope of the row for $2n$
            heads, beginning with its first, until there are enough. What are the twelve of twelve heads?
        """,
        answer="slopes",
        starter="""
            def slopes(num_heads):
                raise NotImplementedError
        """,
        solution=_SLOPES,
        wrong=(
            """
            def slopes(num_heads):
                return [2 ** (-8 * h / num_heads) for h in range(1, num_heads + 1)]
            """,
            _SLOPES.replace("range(1, 2 * n, 2)", "range(2, 2 * n, 2)"),
            _SLOPES.replace(
                "return first + between[: num_heads - n]",
                "return sorted(first + between[: num_heads - n], reverse=True)",
            ),
        ),
        check=_check_slopes,
        hint="For 12 heads n is 8: its eight slopes, then the 1st, 3rd, 5th and 7th of the row for 16.",
    ),
    Exercise(
        name="positional-encoding/alibi-bug",
        title="Find the bugs in this ALiBi",
        stars=1,
        statement=r"""
            The starter runs, and its slopes are right. A model trained with it prefers the words that are
            farthest away, and behind a cache, where the `T` queries are the last of the `S` keys, a pair has
            another number than without. Mend both in the function, which returns the bias `(H, T, S)`, with 0
            for each query's own key; what it holds at later keys does not matter.
        """,
        answer="bias",
        starter=_ALIBI_BUG,
        solution=_ALIBI,
        wrong=(
            _ALIBI_BUG.replace("keys - queries[:, None]", "queries[:, None] - keys"),
            _ALIBI_BUG.replace("torch.arange(T), torch", "torch.arange(S - T, S), torch"),
        ),
        check=_check_alibi_bug,
        hint="Compute the bias of 1 query and 5 keys by hand: which key is nearest, and what is its bias?",
    ),
    Exercise(
        name="positional-encoding/neighbours",
        title="The paper's own layout",
        stars=2,
        statement=r"""
            Write RoPE as its paper does: turn each pair $(2i, 2i + 1)$ of `x`, of shape `(B, H, T, Dh)`, by
            the angle $t\,\theta^{-2i/D_h}$, where $t$ is the entry of `positions`, `(T,)`, for that place.
            The channels stay where they are. The package's layers stay shut.
        """,
        answer="turn",
        starter="""
            import torch

            def turn(x, positions, theta):
                raise NotImplementedError
        """,
        solution=_NEIGHBOURS,
        wrong=(
            _NEIGHBOURS.replace("x[..., ::2], x[..., 1::2]", "x[..., : Dh // 2], x[..., Dh // 2 :]").replace(
                "torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2)",
                "torch.cat([even * cos - odd * sin, even * sin + odd * cos], dim=-1)",
            ),
            _NEIGHBOURS.replace("torch.stack", "torch.cat").replace("dim=-1).flatten(-2)", "dim=-1)"),
            _NEIGHBOURS.replace(
                "even * cos - odd * sin, even * sin + odd * cos",
                "even * cos + odd * sin, odd * cos - even * sin",
            ),
        ),
        check=_check_neighbours,
        hint="Even and odd channels are turned as the halves were, and then woven together again.",
    ),
    Exercise(
        name="positional-encoding/skew",
        title="A vector for each distance, and no more",
        stars=2,
        statement=r"""
            Write Shaw's second term: for `q`, of shape `(B, H, T, Dh)`, and a `table` of $2k + 1$ vectors for
            the distances $-k, \ldots, k$ of key minus query, return $q_i \cdot a_{\mathrm{clip}(j - i)}$ for
            all pairs, `(B, H, T, T)`, unscaled. No tensor with a vector for each pair may be made.
        """,
        answer="scores",
        starter="""
            import torch

            def scores(q, table):
                raise NotImplementedError
        """,
        solution=_SKEW,
        wrong=(
            """
            import torch

            def scores(q, table):
                T, clip = q.shape[-2], table.shape[0] // 2
                distance = torch.arange(T) - torch.arange(T)[:, None]
                vectors = table[distance.clamp(-clip, clip) + clip]  # (T, T, Dh)
                return (q[..., None, :] * vectors).sum(-1)
            """,
            _SKEW.replace("x = q @ table.T", "x = q @ table.flip(0).T"),
            """
            import torch

            def scores(q, table):
                T, clip = q.shape[-2], table.shape[0] // 2
                x = q @ table.T
                index = torch.arange(T) - torch.arange(T)[:, None] + clip
                there = (index >= 0) & (index <= 2 * clip)
                picked = x.gather(-1, index.clamp(0, 2 * clip).expand(*x.shape[:-1], T))
                return picked * there
            """,
        ),
        check=_check_skew,
        hint="Multiply first, by 2k + 1 vectors. Then a row of the result is a row of distances, shifted.",
    ),
    Exercise(
        name="positional-encoding/m-rope",
        title="Three axes, from the formula",
        stars=3,
        statement=r"""
            Write the rotation of Qwen2-VL. A token has a place on three axes, `positions`, `(3, T)`: time,
            row, column. The $D_h / 2$ planes are divided into `sections`; plane i, in the section of axis
            $a$, is turned by $t_a\, \theta^{-2i/D_h}$, with i counted through all sections. Pairs are halves,
            $(i, i + D_h/2)$; `x` is `(B, H, T, Dh)`. The package's layers stay shut.
        """,
        answer="turn",
        starter="""
            import torch

            def turn(x, positions, sections, theta):
                raise NotImplementedError
        """,
        solution=_M_ROPE,
        wrong=(
            _M_ROPE.replace("positions[axis].T * omega", "positions[0][:, None] * omega"),
            _M_ROPE.replace(
                "theta ** (-torch.arange(0, Dh, 2, dtype=torch.float64) / Dh)",
                "torch.cat([theta ** (-torch.arange(n, dtype=torch.float64) / n) for n in sections])",
            ),
            _M_ROPE.replace("positions[axis].T", "positions.flip(0)[axis].T"),
        ),
        check=_check_m_rope,
        hint="Which axis does each plane read? A list of Dh/2 numbers, of 0, 1 and 2, is all you need.",
    ),
)
