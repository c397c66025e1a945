"""Exercises of the page on local attention.

Book: local-attention
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from textbook_code.exercises.framework import Exercise
from textbook_code.exercises.judge import number_problem, tensor_problem
from textbook_code.layers.attention import attention
from textbook_code.layers.masks import block_local_mask, causal_mask, sliding_window_mask


class _Largest(TorchDispatchMode):
    """Notes the largest tensor that is made."""

    numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else (out,):
            if isinstance(x, Tensor):
                self.numbers = max(self.numbers, x.numel())
        return out


def _check_reach(answer: Callable[..., Any]) -> str | None:
    for window, dilations in ((4, [1]), (4, [1, 1, 1]), (4096, [1] * 32), (3, [1, 2, 4, 8]), (1, [1, 5])):
        expected = 1 + (window - 1) * sum(dilations)
        got = answer(window, list(dilations))
        what = f"windows of {window} in layers with dilations {dilations if len(dilations) < 9 else '32 × 1'}"
        if problem := number_problem(got, expected, what, rel=1e-12):
            slips = {
                "a window of W reaches W − 1 positions back, for one of the W is the query's own": window
                * sum(dilations),
                "the position itself is one of those that count": expected - 1,
                "each layer has a dilation of its own": 1 + (window - 1) * len(dilations),
            }
            for slip, value in slips.items():
                if value != expected and number_problem(got, value, "", rel=1e-12) is None:
                    return f"{what}: {slip}."
            return problem
    return None


def _check_ring_slot(answer: Callable[..., Any]) -> str | None:
    for length, window in ((1, 4), (3, 4), (4, 4), (5, 4), (11, 4), (12, 5), (7, 1), (100, 7)):
        held = {p % window: p for p in range(length)}  # later positions overwrite earlier ones
        expected = torch.tensor([held[slot] for slot in range(min(length, window))])
        got = answer(length, window)
        what = f"{length} positions written into {window} slots"
        if isinstance(got, list | tuple):
            got = torch.tensor(got)
        if problem := tensor_problem(got, expected, what):
            if isinstance(got, Tensor) and got.shape == expected.shape and len(expected) > 1:
                if torch.equal(got, torch.arange(length - len(expected), length)):
                    return (
                        f"{what}: those are the right positions in the order of the text, not of the slots."
                    )
                if torch.equal(got, (expected + 1)) or torch.equal(got, (expected - 1)):
                    return f"{what}: one position off: the last one written is {length - 1}."
            return problem
    return None


def _check_mend_the_mask(answer: Callable[..., Any]) -> str | None:
    for T, S, window in ((6, 6, 3), (1, 9, 4), (3, 10, 4), (8, 8, 1), (5, 7, 20), (64, 100, 17)):
        expected = sliding_window_mask(T, S, window=window)
        got = answer(T, S, window)
        what = f"{T} queries, the last of {S} positions, window {window}"
        if problem := tensor_problem(got, expected, what):
            if isinstance(got, Tensor) and got.shape == expected.shape and got.dtype == torch.bool:
                if bool((got & ~causal_mask(T, S)).any()):
                    return f"{what}: a query sees a later position."
                if not bool(got.diagonal(S - T).all()):
                    return f"{what}: a query does not see itself; its own position is i + S − T."
                if int(got.sum(1).max()) > window:
                    return (
                        f"{what}: a query sees {int(got.sum(1).max())} positions, and {window} are allowed."
                    )
            return problem
    return None


def _check_chunked(answer: Callable[..., Any]) -> str | None:
    for T, window in ((24, 4), (24, 8), (23, 4), (29, 5), (3, 8), (16, 1)):
        q, k, v = torch.randn(3, 2, 3, T, 5, dtype=torch.float64)
        expected = attention(q, k, v, sliding_window_mask(T, window=window))[0]
        got = answer(q.clone(), k.clone(), v.clone(), window)
        what = f"{T} positions, window {window}"
        if problem := tensor_problem(got, expected, what, tol=1e-8):
            if isinstance(got, Tensor) and got.shape == expected.shape:
                own = attention(q, k, v, block_local_mask(T, block=window))[0]
                blocks = attention(q, k, v, block_local_mask(T, block=window, look_back=1))[0]
                if torch.allclose(got, own):
                    return f"{what}: each block sees itself alone; the one before it belongs to its windows."
                if torch.allclose(got, blocks):
                    return (
                        f"{what}: each query sees the whole block before its own; mask what is too far back."
                    )
                if torch.allclose(got[:, :, window:], expected[:, :, window:]):
                    return f"{what}: the first {window} queries see what stands before the text."
            return problem
    T, window = 2048, 16
    q, k, v = torch.randn(3, 1, 1, T, 4)
    with _Largest() as watch:
        answer(q, k, v, window)
    if watch.numbers > 8 * T * window:
        return f"{T} positions, window {window}: it makes a tensor of {watch.numbers:,} numbers, near T · T."
    return None


def _check_look_back(answer: Callable[..., Any]) -> str | None:
    for T, block, back in ((24, 4, 1), (24, 4, 0), (24, 8, 2), (23, 5, 1), (9, 4, 3), (3, 8, 1)):
        q, k, v = torch.randn(3, 2, 3, T, 5, dtype=torch.float64)
        tokens = torch.rand(2, T) < 0.7
        tokens[:, 0] = True
        mask = block_local_mask(T, block=block, look_back=back) & tokens[:, None, None]
        expected = attention(q, k, v, mask)[0]
        got = answer(q.clone(), k.clone(), v.clone(), tokens.clone(), block, back)
        what = f"{T} positions in blocks of {block}, looking {back} back"
        seen = mask.any(-1)[:, 0]  # a query that sees nothing may give anything
        if isinstance(got, Tensor) and got.shape == expected.shape:
            hidden = ~seen[:, None, :, None].expand_as(got)
            got, expected = got.masked_fill(hidden, 0), expected.masked_fill(hidden, 0)
        if problem := tensor_problem(got, expected, what, tol=1e-8):
            if isinstance(got, Tensor) and got.shape == expected.shape:
                slips = {
                    "padding is seen": block_local_mask(T, block=block, look_back=back),
                    "later positions of the block are seen": block_local_mask(
                        T, block=block, look_back=back, causal=False
                    )
                    & tokens[:, None, None],
                    "a block sees itself alone": block_local_mask(T, block=block) & tokens[:, None, None],
                    "that is a sliding window": sliding_window_mask(T, window=block * (back + 1))
                    & tokens[:, None, None],
                }
                for slip, wrong in slips.items():
                    value = attention(q, k, v, wrong)[0].masked_fill(hidden, 0)
                    if torch.allclose(got, value) and not torch.allclose(value, expected):
                        return f"{what}: {slip}."
            return problem
    T, block = 2048, 16
    q, k, v = torch.randn(3, 1, 1, T, 4)
    with _Largest() as watch:
        answer(q, k, v, torch.ones(1, T, dtype=torch.bool), block, 1)
    if watch.numbers > 8 * T * block:
        return (
            f"{T} positions, blocks of {block}: it makes a tensor of {watch.numbers:,} numbers, near T · T."
        )
    return None


_CHUNKED = """
import torch
import torch.nn.functional as F

def windowed(q, k, v, window):
    B, H, T, Dh = q.shape
    N = -(-T // window)
    q = F.pad(q, (0, 0, 0, N * window - T)).unflatten(2, (N, window))  # (B, H, N, W, Dh)
    spans = [
        F.pad(x, (0, 0, window, N * window - T)).unfold(2, 2 * window, window).transpose(-1, -2)
        for x in (k, v)
    ]  # (B, H, N, 2 W, Dh): the block before, and the block itself
    before = torch.arange(window)[:, None] + window - torch.arange(2 * window)
    allowed = (before >= 0) & (before < window)  # (W, 2 W), the same for all blocks
    real = torch.arange(2 * window) >= window - window * torch.arange(N)[:, None]  # (N, 2 W)
    mask = allowed & real[:, None]
    scores = q @ spans[0].transpose(-1, -2) / Dh**0.5
    weights = scores.masked_fill(~mask, float("-inf")).softmax(-1)
    return (weights @ spans[1]).flatten(2, 3)[:, :, :T]
"""

_LOOK_BACK = """
import torch
import torch.nn.functional as F

def block_local(q, k, v, token_mask, block, look_back):
    B, H, T, Dh = q.shape
    N, span = -(-T // block), (look_back + 1) * block
    behind = N * block - T

    def spans(x):  # (B, …, T, D) → (B, …, N, span, D)
        return F.pad(x, (0, 0, look_back * block, behind)).unfold(-2, span, block).transpose(-1, -2)

    real = F.pad(token_mask, (look_back * block, behind)).unfold(1, span, block)  # (B, N, span)
    order = torch.arange(block)[:, None] + look_back * block >= torch.arange(span)  # (block, span)
    mask = (real[:, :, None] & order)[:, None]  # (B, 1, N, block, span)
    blocks = F.pad(q, (0, 0, 0, behind)).unflatten(2, (N, block))
    scores = blocks @ spans(k).transpose(-1, -2) / Dh**0.5
    weights = scores.masked_fill(~mask, torch.finfo(q.dtype).min).softmax(-1)
    return (weights @ spans(v)).flatten(2, 3)[:, :, :T]
"""

_MASK = """
import torch

def window_mask(T, S, window):
    i = torch.arange(S - T, S)[:, None]
    j = torch.arange(S)
    return (j <= i) & (j > i - window)
"""

EXERCISES = (
    Exercise(
        name="local-attention/reach",
        title="How far does a stack see?",
        stars=1,
        statement=r"""
            Write how many positions of the text a position of the last layer can depend on, itself
            included, far from the text's beginning. Every layer has the causal window $W$, the query's own
            position counted; `dilations` has one number a layer. Predict first: for 32 layers with
            $W = 4096$, is it a multiple of 4,096?
        """,
        answer="reach",
        starter="""
            def reach(window, dilations):
                raise NotImplementedError
        """,
        solution="""
            def reach(window, dilations):
                return 1 + (window - 1) * sum(dilations)
        """,
        wrong=(
            """
            def reach(window, dilations):
                return window * sum(dilations)
            """,
            """
            def reach(window, dilations):
                return (window - 1) * sum(dilations)
            """,
            """
            def reach(window, dilations):
                return 1 + (window - 1) * len(dilations)
            """,
        ),
        check=_check_reach,
        hint="From the last layer down: how many steps back does each layer allow, and how long is a step?",
    ),
    Exercise(
        name="local-attention/ring-slot",
        title="Who lies in which slot?",
        stars=1,
        statement=r"""
            A ring of `window` slots has been written `length` times, position $p$ into slot $p \bmod W$.
            Return the positions that lie in the slots in use, in the order of the slots, as a list or a
            tensor of integers.
        """,
        answer="positions",
        starter="""
            def positions(length, window):
                raise NotImplementedError
        """,
        solution="""
            def positions(length, window):
                last = length - 1
                slots = range(min(length, window))
                return [last - (last - slot) % window for slot in slots]
        """,
        wrong=(
            """
            def positions(length, window):
                return list(range(max(0, length - window), length))
            """,
            """
            def positions(length, window):
                return [length - (length - slot) % window for slot in range(min(length, window))]
            """,
            """
            def positions(length, window):
                last = length - 1
                return [last - (last - slot) % window for slot in range(window)]
            """,
        ),
        check=_check_ring_slot,
        hint="How many positions before the last one was slot s written? A remainder knows.",
    ),
    Exercise(
        name="local-attention/mend-the-mask",
        title="Find the bug in this mask",
        stars=2,
        statement=r"""
            Somebody wrote a mask for a causal window of `window` positions, the query's own among them. The
            `T` queries are the last of `S` positions. It is right for no size at all. Mend it; True means
            *may attend*.
        """,
        answer="window_mask",
        starter="""
            import torch

            def window_mask(T, S, window):
                i = torch.arange(T)[:, None]
                j = torch.arange(S)
                return (j < i) & (j >= i - window)
        """,
        solution=_MASK,
        wrong=(
            _MASK.replace("j > i - window", "j >= i - window"),
            _MASK.replace("j <= i", "j < i"),
            _MASK.replace("torch.arange(S - T, S)", "torch.arange(T)"),
            _MASK.replace("(j <= i) & ", ""),
        ),
        check=_check_mend_the_mask,
        hint="Three things are wrong: where the queries stand, what they think of themselves, and one end.",
    ),
    Exercise(
        name="local-attention/chunked",
        title="Compute the band alone",
        stars=2,
        statement=r"""
            Write causal attention with a window, so that no tensor of $T \times T$ numbers is made: cut the
            queries into blocks of `window`, and let each meet the keys of its block and of the one before.
            `q`, `k` and `v` are `(B, H, T, Dh)`, and `T` need not be a multiple of the window. A query sees
            itself and the `window` − 1 positions before it. The package's layers stay shut.
        """,
        answer="windowed",
        starter="""
            import torch
            import torch.nn.functional as F

            def windowed(q, k, v, window):
                raise NotImplementedError
        """,
        solution=_CHUNKED,
        wrong=(
            _CHUNKED.replace("(before >= 0) & (before < window)", "before >= 0"),
            _CHUNKED.replace("mask = allowed & real[:, None]", "mask = allowed.expand(N, -1, -1)"),
            _CHUNKED.replace("before < window", "before <= window"),
            """
            import torch

            def windowed(q, k, v, window):
                T = q.shape[2]
                before = torch.arange(T)[:, None] - torch.arange(T)
                mask = (before >= 0) & (before < window)
                scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
                return scores.masked_fill(~mask, float("-inf")).softmax(-1) @ v
            """,
        ),
        check=_check_chunked,
        hint="Pad, then `unfold`: two blocks long, a step of one block. What stands before the text?",
    ),
    Exercise(
        name="local-attention/look-back",
        title="Block-local attention, from its description",
        stars=3,
        statement=r"""
            Write the causal block-local attention of the `local-attention` package: the positions are cut
            into blocks, and a query sees those positions of its own block that are not later than itself,
            and all of the `look_back` blocks before it. `q`, `k` and `v` are `(B, H, T, Dh)`; `token_mask`,
            `(B, T)`, is False for padding, which nobody sees. `T` may be any length, and no tensor of
            $T \times T$ numbers may be made. What a query gives that sees no token does not matter. The
            package's layers stay shut; everything in `torch` is open.
        """,
        answer="block_local",
        starter="""
            import torch
            import torch.nn.functional as F

            def block_local(q, k, v, token_mask, block, look_back):
                raise NotImplementedError
        """,
        solution=_LOOK_BACK,
        wrong=(
            _LOOK_BACK.replace("(real[:, :, None] & order)", "order.expand(B, N, -1, -1)"),
            _LOOK_BACK.replace("(real[:, :, None] & order)", "real[:, :, None].expand(-1, -1, block, -1)"),
            _LOOK_BACK.replace("    B, H, T, Dh = q.shape", "    look_back = 0\n    B, H, T, Dh = q.shape"),
            _LOOK_BACK.replace(
                ">= torch.arange(span)",
                ">= torch.arange(span)\n    order &= torch.arange(block)[:, None] < torch.arange(span)",
            ),
        ),
        check=_check_look_back,
        hint="All blocks have the same order of who is later; who is real is cut from the mask as keys are.",
    ),
)
