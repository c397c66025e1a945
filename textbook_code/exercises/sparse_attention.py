"""Exercises of the page on sparse attention.

Book: sparse-attention
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from textbook_code.exercises.framework import Exercise
from textbook_code.exercises.judge import number_problem, tensor_problem
from textbook_code.layers.attention import attention
from textbook_code.layers.sparse_attention import (
    add_global,
    bigbird_mask,
    diameter,
    fixed_mask,
    random_blocks,
    window_mask,
)


def _check_stride(answer: Callable[..., Any]) -> str | None:
    for T, own, far in ((10_000, 1, 1), (10_000, 2, 1), (8192, 1, 4), (4096, 3, 2), (97, 2, 5)):
        what = f"T={T}, {own} l near keys and {far} T/l far ones"
        got, expected = answer(T, own, far), math.sqrt(far * T / own)
        if problem := number_problem(got, expected, what):
            slips = {
                "that is right only where both sets weigh the same": math.sqrt(T),
                "the two weights are the wrong way round": math.sqrt(own * T / far),
                "that is the number of keys, not the stride": 2 * math.sqrt(own * far * T),
            }
            for slip, value in slips.items():
                if abs(value - expected) > 1e-6 and number_problem(got, value, "") is None:
                    return f"{what}: {slip}."
            return problem
    return None


def _check_fixed(answer: Callable[..., Any]) -> str | None:
    for T, stride, summary in ((12, 4, 1), (20, 5, 2), (17, 6, 3), (7, 9, 2), (9, 3, 3)):
        what = f"T={T}, stride={stride}, summary={summary}"
        got, expected = answer(T, stride, summary), fixed_mask(T, stride=stride, summary=summary)
        if problem := tensor_problem(got, expected, what):
            if isinstance(got, Tensor) and got.shape == expected.shape and got.dtype == torch.bool:
                if bool((got & ~torch.ones_like(got).tril()).any()):
                    return f"{what}: a query sees a later position."
                if summary > 1 and torch.equal(got, fixed_mask(T, stride=stride, summary=summary - 1)):
                    return f"{what}: one position of each block's end is missing; j mod l starts at 0."
                if torch.equal(got, fixed_mask(T, stride=stride, summary=summary, part="second")):
                    return f"{what}: the own block is missing."
            return problem
    return None


def _check_layers(answer: Callable[..., Any]) -> str | None:
    first = (torch.arange(40) == 5)[None]
    blocks = random_blocks(20, num_random=1, num_heads=1, seed=4)
    cases = {
        "full attention": torch.ones(9, 9).bool(),
        "a window of 4 on 33 positions": window_mask(33, window=4),
        "a window of 6 on 40 positions": window_mask(40, window=6),
        "a window of 4 and a global token": add_global(window_mask(40, window=4), first)[0, 0],
        "blocks": bigbird_mask(40, blocks, block_size=2)[0],
        "a ring whose positions do not see themselves": torch.eye(7).bool().roll(1, 0)
        | torch.eye(7).bool().roll(-1, 0),
    }
    for what, mask in cases.items():
        got, expected = answer(mask.clone()), diameter(mask)
        if problem := number_problem(got, expected, what):
            if number_problem(got, expected - 1, "") is None:
                return f"{what}: one layer too few; the first layer is a step as well."
            if "themselves" in what:
                return f"{what}: got {got}; the residual connection keeps what a position knew."
            return problem
    return None


def _check_merge(answer: Callable[..., Any]) -> str | None:
    for seed, size in enumerate((1.0, 1.0, 3000.0)):
        generator = torch.Generator().manual_seed(seed)
        q, k, v = (torch.randn(1, 2, n, 8, generator=generator).double() for n in (5, 12, 12))
        parts = []
        for keys in (slice(0, 3), slice(3, None)):
            scores = size * q @ k[:, :, keys].transpose(-2, -1) / 8**0.5
            parts += [scores.softmax(-1) @ v[:, :, keys], scores.logsumexp(-1)]
        expected = attention(q * size, k, v)[0]
        what = "two attentions, over 3 keys and over 9" + (", with large scores" if size > 1 else "")
        got = answer(*(x.clone() for x in parts))
        if problem := tensor_problem(got, expected, what):
            mean = (parts[0] + parts[2]) / 2
            if isinstance(got, Tensor) and got.shape == mean.shape and torch.allclose(got, mean):
                return f"{what}: that is the mean of the two; they are to share one denominator."
            return problem
    return None


def _check_dilated(answer: Callable[..., Any]) -> str | None:
    for T, pairs in (
        (12, [(4, 1)]),
        (12, [(12, 3)]),
        (24, [(4, 1), (8, 2), (24, 6)]),
        (16, [(8, 1), (16, 4)]),
    ):
        q, k, v = (torch.randn(T, 6, dtype=torch.float64) for _ in "qkv")
        expected = _dilated(q, k, v, pairs)
        what = f"T={T}, (w, r) in {pairs}"
        got = answer(q.clone(), k.clone(), v.clone(), list(pairs))
        if problem := tensor_problem(got, expected, what):
            averaged = _dilated(q, k, v, pairs, mean=True)
            if len(pairs) > 1 and tensor_problem(got, averaged, "") is None:
                return f"{what}: the outputs are averaged; weigh each by its softmax's denominator."
            return problem
    return None


def _dilated(
    q: Tensor, k: Tensor, v: Tensor, pairs: Sequence[tuple[int, int]], *, mean: bool = False
) -> Tensor:
    """Each pass as an attention with a mask; their outputs weighted by the denominators."""
    scores = q @ k.T / q.size(-1) ** 0.5
    at = torch.arange(len(q))
    total, weight = torch.zeros_like(v), torch.zeros(len(q), 1).to(v)
    for w, r in pairs:
        chosen = at % w % r == 0
        seen = (at[:, None] // w == at // w) & chosen[:, None] & chosen
        each = scores.exp() * seen
        denominator = each.sum(-1, keepdim=True)
        if mean:
            each, denominator = each / denominator.clamp(min=1e-30), chosen[:, None].to(v)
        total, weight = total + each @ v, weight + denominator
    return torch.where(weight > 0, total / weight.clamp(min=1e-30), torch.zeros_like(total))


_FIXED = """
import torch

def pattern(T, stride, summary):
    i, j = torch.arange(T)[:, None], torch.arange(T)
    own = i // stride == j // stride
    ends = j % stride >= stride - summary
    return (own | ends) & (j <= i)
"""

_LAYERS = """
import torch

def layers(mask):
    known = torch.eye(len(mask), dtype=torch.bool)
    steps = 0
    while not known.all():
        known = (mask.float() @ known.float() > 0) | known
        steps += 1
    return steps
"""

_MERGE = """
import torch

def merge(out_1, lse_1, out_2, lse_2):
    weights = torch.stack([lse_1, lse_2], -1).softmax(-1)  # (B, H, T, 2)
    return out_1 * weights[..., :1] + out_2 * weights[..., 1:]
"""

_DILATED = """
import torch

def dilated(q, k, v, pairs):
    total = torch.zeros_like(v)
    weight = torch.zeros(len(q), 1, dtype=v.dtype)
    for w, r in pairs:
        for start in range(0, len(q), w):
            rows = torch.arange(start, start + w, r)
            each = (q[rows] @ k[rows].T / q.size(-1) ** 0.5).exp()
            total[rows] += each @ v[rows]
            weight[rows] += each.sum(-1, keepdim=True)
    return total / weight.clamp(min=1e-30)
"""

EXERCISES = (
    Exercise(
        name="sparse-attention/stride",
        title="The cheapest stride",
        stars=1,
        statement=r"""
            The cheap form of the strided pattern scores $2l$ keys near a query, its own row and the one
            above, and $T/l$ in its column. In general let there be $a\,l$ near keys and $c\,T/l$ far ones.
            Predict whether the best stride is then above or below $\sqrt T$ for $a = 2$, $c = 1$, and write
            it as a function, not rounded.
        """,
        answer="best_stride",
        starter="""
            def best_stride(T, a, c):
                raise NotImplementedError
        """,
        solution="""
            def best_stride(T, a, c):
                return (c * T / a) ** 0.5
        """,
        wrong=(
            """
            def best_stride(T, a, c):
                return T ** 0.5
            """,
            """
            def best_stride(T, a, c):
                return (a * T / c) ** 0.5
            """,
            """
            def best_stride(T, a, c):
                return 2 * (a * c * T) ** 0.5
            """,
        ),
        check=_check_stride,
        hint="Where is the derivative of a l + c T / l zero?",
    ),
    Exercise(
        name="sparse-attention/fixed",
        title="The fixed pattern",
        stars=1,
        statement=r"""
            Write the fixed pattern, both sets merged, as a boolean mask of shape `(T, T)`: the own block of
            `stride` positions, and the last `summary` of every block, nothing later than the query.
        """,
        answer="pattern",
        starter="""
            import torch

            def pattern(T, stride, summary):
                raise NotImplementedError
        """,
        solution=_FIXED,
        wrong=tuple(
            _FIXED.replace(right, slip)
            for right, slip in (
                (" & (j <= i)", ""),
                (">= stride - summary", "> stride - summary"),
                ("(own | ends)", "ends"),
                ("(own | ends)", "(own & ends)"),
            )
        ),
        check=_check_fixed,
        hint="Two conditions on i and j, joined; the third forbids the future.",
    ),
    Exercise(
        name="sparse-attention/layers",
        title="How many layers until all have met",
        stars=2,
        statement=r"""
            Write how many layers with the same `mask`, a boolean `(T, T)`, it takes until every position has
            heard of every other. Each layer has a residual connection. Predict the result for a window of 4
            on 33 positions, and for full attention.
        """,
        answer="layers",
        starter="""
            import torch

            def layers(mask):
                raise NotImplementedError
        """,
        solution=_LAYERS,
        wrong=(
            *(
                _LAYERS.replace(right, slip)
                for right, slip in (
                    ("known = torch.eye(len(mask), dtype=torch.bool)", "known = mask"),
                    (" | known", ""),
                    ("steps = 0", "steps = 1"),
                )
            ),
            """
            def layers(mask):
                return 2
            """,
        ),
        check=_check_layers,
        hint="Begin with what each knows before any layer: itself.",
    ),
    Exercise(
        name="sparse-attention/merge",
        title="Two attentions, one softmax",
        stars=2,
        statement=r"""
            The keys of a query lie in two lists that share none. Each list has been attended to by itself:
            `out`, `(B, H, T, Dh)`, is its attention's output, and `lse`, `(B, H, T)`, the logarithm of its
            softmax's denominator, $\log \sum_j e^{s_j}$. Merge the two into the attention over both lists.
            Scores may be so large that $e^s$ overflows.
        """,
        answer="merge",
        starter="""
            import torch

            def merge(out_1, lse_1, out_2, lse_2):
                raise NotImplementedError
        """,
        solution=_MERGE,
        wrong=(
            """
            def merge(out_1, lse_1, out_2, lse_2):
                return (out_1 + out_2) / 2
            """,
            """
            def merge(out_1, lse_1, out_2, lse_2):
                a, b = lse_1.exp()[..., None], lse_2.exp()[..., None]
                return (a * out_1 + b * out_2) / (a + b)
            """,
            """
            def merge(out_1, lse_1, out_2, lse_2):
                a, b = lse_1[..., None], lse_2[..., None]
                return (a * out_1 + b * out_2) / (a + b)
            """,
        ),
        check=_check_merge,
        hint="Each output is a numerator over its own denominator. What is a softmax of two logarithms?",
    ),
    Exercise(
        name="sparse-attention/dilated",
        title="The next pattern, from its paper",
        stars=3,
        statement=r"""
            LongNet's dilated attention (section 2.2 of its paper) makes several passes. The pass $(w, r)$
            cuts the text into segments of $w$ and takes every $r$-th position of each, from its first;
            these attend to each other, within their segment, with scores $q \cdot k / \sqrt{D_h}$. A
            position's output is the sum of its outputs in the passes, weighted by $\alpha_p = s_p /
            \sum_{p'} s_{p'}$, where $s_p$ is the denominator of its softmax in pass $p$, no maximum taken
            out. (By these formulas a pair that two passes share counts in both.) What $s_p$ is where a pass
            did not take the position, the paper does not say; we leave such passes out of both sums, and a
            position that no pass took gets zeros. Write it for one head that is not causal, `q`, `k` and
            `v` of shape `(T, Dh)`; every $w$ divides $T$, every $r$ divides its $w$.
        """,
        answer="dilated",
        starter="""
            import torch

            def dilated(q, k, v, pairs):
                raise NotImplementedError
        """,
        solution=_DILATED,
        wrong=tuple(
            _DILATED.replace(right, slip)
            for right, slip in (
                ("torch.arange(start, start + w, r)", "torch.arange(start, start + w)"),
                (
                    "total[rows] += each @ v[rows]\n            weight[rows] += each.sum(-1, keepdim=True)",
                    "total[rows] += each.softmax(-1) @ v[rows]\n            weight[rows] += 1",
                ),
                (" / q.size(-1) ** 0.5", ""),
                ("range(0, len(q), w)", "range(0, w, w)"),
            )
        ),
        check=_check_dilated,
        hint="A numerator and a denominator for each position, to which every pass adds.",
    ),
)
