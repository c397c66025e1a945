"""Exercises of the page on attention.

Book: attention
"""

import math
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from textbook_code.exercises.framework import Exercise
from textbook_code.exercises.judge import (
    as_number,
    number_problem,
    tensor_problem,
    vector_problem,
)
from textbook_code.layers.attention import attention


def _check_by_hand(answer: Any) -> str | None:
    if not isinstance(answer, list | tuple) or len(answer) != 3:
        return "expected the triple (weights, output, weights_without_2)."
    weights, output, hidden = answer
    for divisor, said in ((1, "not divided at all"), (4, "divided by d instead of its root")):
        raw = [2 ** (2 * i / divisor) for i in range(3)]  # q·kᵢ = 2i·ln 2
        if vector_problem(weights, [x / sum(raw) for x in raw], "") is None:
            return f"weights: these come from scores {said}."
    if vector_problem(hidden, [1 / 7, 0, 4 / 7], "") is None:
        return "weights_without_2: these no longer sum to one."
    return (
        vector_problem(weights, [1 / 7, 2 / 7, 4 / 7], "weights")
        or vector_problem(output, [5, 6], "output")
        or vector_problem(hidden, [1 / 5, 0, 4 / 5], "weights_without_2")
    )


def _check_scale(answer: Callable[..., Any]) -> str | None:
    for head_dim, q_std, k_std in ((1, 1.0, 1.0), (64, 1.0, 1.0), (64, 0.5, 1.0), (80, 3.0, 0.25)):
        scale = as_number(answer(head_dim, q_std, k_std))
        case = f"head_dim={head_dim}, q_std={q_std:g}, k_std={k_std:g}"
        if scale is None:
            return f"with {case}: expected a number."
        variance = scale**2 * head_dim * q_std**2 * k_std**2
        if not math.isclose(variance, 1, rel_tol=1e-4):
            return f"with {case}: the scores have variance {variance:.4g}, not 1."
        if scale < 0:
            return f"with {case}: a negative scale turns the order of the keys round."
    return None


def _check_causal_mask(answer: Callable[..., Any]) -> str | None:
    for T, S in ((5, 5), (3, 7), (1, 9), (1, 1)):
        mask = answer(T, S)
        expected = torch.tensor([[j <= i + S - T for j in range(S)] for i in range(T)])
        if isinstance(mask, Tensor) and mask.dtype == torch.bool and mask.shape == (T, S):
            if mask.equal(~expected):
                return f"T={T}, S={S}: True and False have changed places; True means *may attend*."
            if T < S and mask.equal(torch.ones(T, S, dtype=torch.bool).tril()):
                return f"T={T}, S={S}: the newest query sees only {T} of the {S} keys written so far."
        if problem := tensor_problem(mask, expected, f"T={T}, S={S}"):
            return problem
    return None


class _Watch(TorchDispatchMode):
    """Follow the tensors made while it is on: the most numbers alive at once, and fused attention."""

    def __init__(self) -> None:
        super().__init__()
        self.peak, self.fused = 0, False
        self._made: list[weakref.ref[Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.fused |= "scaled_dot_product" in str(func)
        self._made += [
            weakref.ref(x) for x in (out if isinstance(out, list | tuple) else [out]) if isinstance(x, Tensor)
        ]
        alive = [x for ref in self._made if (x := ref()) is not None]
        self._made = [weakref.ref(x) for x in alive]
        sizes = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() // 4 for x in alive}
        self.peak = max(self.peak, sum(sizes.values()))
        return out


def _check_multi_head(answer: Callable[..., Any]) -> str | None:
    B, T, D = 2, 5, 12
    x, *weights = torch.randn(B, T, D), *(torch.randn(D, D) / D**0.5 for _ in range(4))
    stages = (
        (1, weights, "with a single head"),
        (3, [torch.zeros(D, D), *weights[1:]], "with 3 heads and all scores equal (w_q = 0)"),
        (3, weights, "with 3 heads, though right while all scores are equal"),
    )
    for num_heads, (w_q, w_k, w_v, w_o), what in stages:
        q, k, v = ((x @ w).view(B, T, num_heads, D // num_heads).transpose(1, 2) for w in (w_q, w_k, w_v))
        expected = attention(q, k, v)[0].transpose(1, 2).flatten(2) @ w_o
        with _Watch() as watch:
            got = answer(x.clone(), w_q.clone(), w_k.clone(), w_v.clone(), w_o.clone(), num_heads)
        if watch.fused:
            return "torch's own attention did the work: write it out."
        if problem := tensor_problem(got, expected, what, tol=1e-4):
            return problem
    return None


def _check_count(answer: Callable[..., Any]) -> str | None:
    for T, D, num_heads, num_kv_heads in (
        (128, 384, 12, 12),
        (7, 64, 8, 8),
        (512, 256, 8, 2),
        (33, 96, 6, 1),
    ):
        kv_width = num_kv_heads * D // num_heads
        expected = {
            "parameters": 2 * (D * D + D) + 2 * (D * kv_width + kv_width),
            "flops": 2 * T * (2 * D * D + 2 * D * kv_width) + 2 * 2 * T * T * D,
            "cache_bytes": 2 * T * kv_width * 2,
        }
        got = answer(T, D, num_heads, num_kv_heads)
        if not isinstance(got, dict) or set(got) != set(expected):
            return f"expected a dict with the keys {', '.join(expected)}."
        for key, number in expected.items():
            case = f"T={T}, d_model={D}, num_heads={num_heads}, num_kv_heads={num_kv_heads}"
            if problem := number_problem(got[key], number, f"{key} at {case}", rel=1e-9):
                return problem if num_kv_heads == num_heads else f"{problem} Without shared heads it is."
    return None


def _check_linear_memory(answer: Callable[..., Any]) -> str | None:
    B, H, T, S, Dh = 1, 2, 24, 40, 8
    q, k, v = torch.randn(B, H, T, Dh), torch.randn(B, H, S, Dh), torch.randn(B, H, S, Dh)
    stages = (
        (1.0, S, "with all keys in one block"),
        (1.0, 10, "with four blocks, though right with one"),
        (1.0, 16, "with a last block shorter than the others"),
        (60.0, 10, "with scores in the hundreds"),
    )
    with torch.no_grad():
        for size, block_size, what in stages:
            got = answer(size * q, k.clone(), v.clone(), block_size)
            if problem := tensor_problem(got, attention(size * q, k, v)[0], what, tol=1e-4):
                return problem
        T = S = 512
        q, k, v = (torch.randn(1, 1, n, Dh) for n in (T, S, S))
        with _Watch() as memory:
            answer(q, k, v, 32)
    if memory.fused:
        return "it is right, but torch's fused kernel did the work: write the loop over the blocks."
    if memory.peak >= T * S:
        return (
            f"it is right, but {memory.peak:,} numbers were alive at once for T = S = {T}: "
            f"the T × S matrix alone has {T * S:,}."
        )
    return None


EXERCISES = (
    Exercise(
        name="attention/by-hand",
        title="Three tokens, by hand",
        stars=1,
        statement=r"""
            A head of width $d_k = 4$ asks with the query $q = (2, 0, 2, 0)$. Three tokens offer the keys
            and values

            $$
            \begin{aligned}
            k_1 &= (0, 3, 0, {-1}), & k_2 &= (\ln 2, 0, 0, 5), & k_3 &= (\ln 2, 1, \ln 2, 0),\\
            v_1 &= (7, 0), & v_2 &= (0, 7), & v_3 &= (7, 7).
            \end{aligned}
            $$

            With pencil and paper, find the three attention weights and the output. Then suppose that token
            2 turns out to be padding and is masked: what are the weights now? Fractions such as `1 / 3` are
            welcome.
        """,
        answer="answer",
        starter="""
            weights = [None, None, None]  # of tokens 1, 2 and 3
            output = [None, None]
            weights_without_2 = [None, None, None]  # when token 2 is masked
            answer = (weights, output, weights_without_2)
        """,
        solution="""
            # q·k = 0, 2 ln 2, 4 ln 2; divided by √4 = 2 this is 0, ln 2, 2 ln 2; exp makes it 1, 2, 4.
            weights = [1 / 7, 2 / 7, 4 / 7]
            output = [(1 * 7 + 4 * 7) / 7, (2 * 7 + 4 * 7) / 7]
            weights_without_2 = [1 / 5, 0, 4 / 5]  # the softmax runs over the tokens that are left
            answer = (weights, output, weights_without_2)
        """,
        wrong=(
            "answer = ([1 / 21, 4 / 21, 16 / 21], [17 * 7 / 21, 20 * 7 / 21], [1 / 17, 0, 16 / 17])",
            "answer = ([1 / 7, 2 / 7, 4 / 7], [5, 6], [1 / 7, 0, 4 / 7])",
            "answer = ([1 / 3, 1 / 3, 1 / 3], [14 / 3, 14 / 3], [1 / 2, 0, 1 / 2])",
        ),
        check=_check_by_hand,
        hint="exp(n · ln 2) = 2ⁿ, so that every weight is a fraction; and a mask acts before the softmax.",
    ),
    Exercise(
        name="attention/causal-mask",
        title="A causal mask behind a cache",
        stars=1,
        statement=r"""
            While a model generates, the keys of earlier tokens wait in a cache, and only the newest tokens
            ask queries: the `T` queries are the last `T` of `S` positions, with $T \le S$. Write the
            boolean mask of shape `(T, S)` in which True means *may attend* and no query sees a later
            position than its own.
        """,
        answer="causal_mask",
        starter="""
            import torch

            def causal_mask(T, S):
                raise NotImplementedError
        """,
        solution="""
            import torch

            def causal_mask(T, S):
                queries = torch.arange(S - T, S)  # the positions at which the queries stand
                keys = torch.arange(S)
                return keys[None, :] <= queries[:, None]  # (T, S)
        """,
        wrong=(
            """
            import torch

            def causal_mask(T, S):
                return torch.ones(T, S, dtype=torch.bool).tril()
            """,
            """
            import torch

            def causal_mask(T, S):
                return torch.ones(T, S, dtype=torch.bool).triu(S - T + 1)
            """,
            """
            import torch

            def causal_mask(T, S):
                return torch.zeros(T, S).masked_fill(torch.ones(T, S).triu(S - T + 1) > 0, float("-inf"))
            """,
            """
            import torch

            def causal_mask(T, S):
                return torch.ones(T, S, dtype=torch.bool).tril(S - T - 1)
            """,
        ),
        check=_check_causal_mask,
        hint="At which position, from 0 to S − 1, does the first of the T queries stand?",
    ),
    Exercise(
        name="attention/scale",
        title="Scores of unit variance",
        stars=2,
        statement=r"""
            The factor $1/\sqrt{d_k}$ presumes that the entries of queries and keys have variance one.
            Suppose instead that they are independent with mean zero and standard deviations `q_std` and
            `k_std`. Write the factor by which $q \cdot k$ must be multiplied so that the scores have
            variance one.
        """,
        answer="score_scale",
        starter="""
            def score_scale(head_dim, q_std, k_std):
                raise NotImplementedError
        """,
        solution="""
            def score_scale(head_dim, q_std, k_std):
                # Each of the head_dim products has variance (q_std · k_std)², and variances of independent
                # terms add up: the standard deviation of q · k is q_std · k_std · √head_dim.
                return 1 / (q_std * k_std * head_dim**0.5)
        """,
        wrong=(
            """
            def score_scale(head_dim, q_std, k_std):
                return head_dim**-0.5
            """,
            """
            def score_scale(head_dim, q_std, k_std):
                return 1 / (q_std * k_std * head_dim)
            """,
            """
            def score_scale(head_dim, q_std, k_std):
                return 1 / (q_std**2 * k_std**2 * head_dim**0.5)
            """,
        ),
        check=_check_scale,
        hint="Find the variance of one product of independent numbers first, then that of their sum.",
    ),
    Exercise(
        name="attention/multi-head",
        title="Many heads from four matrices",
        stars=2,
        statement=r"""
            Write multi-head self-attention without biases or masks. The input `x` has the shape `(B, T,
            D)`; the matrices `w_q`, `w_k`, `w_v` and `w_o` are all `(D, D)` and act from the right, as in
            `x @ w_q`; head $h$ owns the $h$-th run of $D / H$ neighbouring columns of the first three. Use
            torch's operations, but none that contains attention.
        """,
        answer="multi_head",
        starter="""
            import torch

            def multi_head(x, w_q, w_k, w_v, w_o, num_heads):
                raise NotImplementedError
        """,
        solution="""
            import torch

            def multi_head(x, w_q, w_k, w_v, w_o, num_heads):
                B, T, D = x.shape

                def split(y):
                    return y.view(B, T, num_heads, D // num_heads).transpose(1, 2)  # (B, H, T, Dh)

                q, k, v = split(x @ w_q), split(x @ w_k), split(x @ w_v)
                scores = q @ k.transpose(-2, -1) / (D // num_heads) ** 0.5  # (B, H, T, T)
                heads = scores.softmax(-1) @ v  # (B, H, T, Dh)
                return heads.transpose(1, 2).reshape(B, T, D) @ w_o
        """,
        wrong=(
            """
            def multi_head(x, w_q, w_k, w_v, w_o, num_heads):
                B, T, D = x.shape
                q, k, v = ((x @ w).view(B, num_heads, T, D // num_heads) for w in (w_q, w_k, w_v))
                weights = (q @ k.transpose(-2, -1) / (D // num_heads) ** 0.5).softmax(-1)
                return (weights @ v).reshape(B, T, D) @ w_o
            """,
            """
            def multi_head(x, w_q, w_k, w_v, w_o, num_heads):
                B, T, D = x.shape
                q, k, v = ((x @ w).view(B, T, num_heads, -1).transpose(1, 2) for w in (w_q, w_k, w_v))
                weights = (q @ k.transpose(-2, -1) / D**0.5).softmax(-1)
                return (weights @ v).transpose(1, 2).reshape(B, T, D) @ w_o
            """,
            """
            def multi_head(x, w_q, w_k, w_v, w_o, num_heads):
                B, T, D = x.shape
                q, k, v = ((x @ w).view(B, T, num_heads, -1).transpose(1, 2) for w in (w_q, w_k, w_v))
                weights = (q @ k.transpose(-2, -1) / (D // num_heads) ** 0.5).softmax(-2)
                return (weights @ v).transpose(1, 2).reshape(B, T, D) @ w_o
            """,
        ),
        check=_check_multi_head,
        hint="Write down the shape after every operation; which two axes must change places, and when back?",
    ),
    Exercise(
        name="attention/count",
        title="What a layer costs",
        stars=2,
        statement=r"""
            Count one attention layer with `num_heads` query heads and `num_kv_heads` key/value heads of
            width `d_model / num_heads`, whose four projections have biases, for one sequence of `T` tokens.
            Return a dict with `parameters`; `flops`, those of the matrix products only (projections,
            scores, weighted sum; no mask, a multiplication and an addition count as two); and
            `cache_bytes`, the keys and values of all `T` tokens in 16 bits.
        """,
        answer="count",
        starter="""
            def count(T, d_model, num_heads, num_kv_heads):
                return {"parameters": None, "flops": None, "cache_bytes": None}
        """,
        solution="""
            def count(T, d_model, num_heads, num_kv_heads):
                head_dim = d_model // num_heads
                kv_width = num_kv_heads * head_dim
                matrices = 2 * d_model * d_model + 2 * d_model * kv_width  # q and out; k and v
                biases = 2 * d_model + 2 * kv_width
                products = T * matrices  # every token meets every entry of the matrices once
                products += 2 * num_heads * T * T * head_dim  # scores, and the weighted sum of the values
                return {
                    "parameters": matrices + biases,
                    "flops": 2 * products,
                    "cache_bytes": 2 * T * kv_width * 2,  # keys and values, two bytes each
                }
        """,
        wrong=(
            """
            def count(T, d_model, num_heads, num_kv_heads):
                return {
                    "parameters": 4 * (d_model**2 + d_model),
                    "flops": 8 * T * d_model**2 + 4 * T**2 * d_model,
                    "cache_bytes": 4 * T * d_model,
                }
            """,
            """
            def count(T, d_model, num_heads, num_kv_heads):
                kv_width = num_kv_heads * d_model // num_heads
                matrices = 2 * d_model**2 + 2 * d_model * kv_width
                return {
                    "parameters": matrices + 2 * d_model + 2 * kv_width,
                    "flops": T * matrices + 2 * T**2 * d_model,
                    "cache_bytes": 4 * T * kv_width,
                }
            """,
            """
            def count(T, d_model, num_heads, num_kv_heads):
                kv_width = num_kv_heads * d_model // num_heads
                matrices = 2 * d_model**2 + 2 * d_model * kv_width
                return {
                    "parameters": matrices,
                    "flops": 2 * T * matrices + 4 * T**2 * d_model,
                    "cache_bytes": 4 * T * kv_width,
                }
            """,
        ),
        check=_check_count,
        hint="Which of the four projections grow narrower when heads share keys and values? Do the scores?",
    ),
    Exercise(
        name="attention/linear-memory",
        title="Attention that never holds the matrix of weights",
        stars=3,
        statement=r"""
            Write attention for `q` of shape `(B, H, T, Dh)` and `k`, `v` of shape `(B, H, S, Dh)`, scaled
            by $1/\sqrt{d_k}$ and without a mask, so that memory grows with $T + S$ and not with $T \cdot
            S$: read the keys in blocks of `block_size` and keep, for each query, only what is needed to
            finish the softmax at the end. The last block may be shorter. Scores may be in the hundreds. The
            check watches how many numbers are alive at once.
        """,
        answer="streamed_attention",
        starter="""
            import torch

            def streamed_attention(q, k, v, block_size):
                raise NotImplementedError
        """,
        solution="""
            import torch

            def streamed_attention(q, k, v, block_size):
                q = q * q.size(-1) ** -0.5
                top = q.new_full((*q.shape[:-1], 1), float("-inf"))  # greatest score so far
                total = torch.zeros_like(top)  # Σ exp(score − top)
                out = torch.zeros_like(q[..., :1] * v[..., :1, :])  # Σ exp(score − top) · value
                for k_block, v_block in zip(k.split(block_size, dim=-2), v.split(block_size, dim=-2)):
                    scores = q @ k_block.transpose(-2, -1)  # (B, H, T, block)
                    new_top = torch.maximum(top, scores.amax(-1, keepdim=True))
                    shrink = (top - new_top).exp()  # brings the old sums to the new top
                    scores = (scores - new_top).exp()
                    total = total * shrink + scores.sum(-1, keepdim=True)
                    out = out * shrink + scores @ v_block
                    top = new_top
                return out / total
        """,
        wrong=(
            """
            def streamed_attention(q, k, v, block_size):
                return (q @ k.transpose(-2, -1) * q.size(-1) ** -0.5).softmax(-1) @ v
            """,
            """
            def streamed_attention(q, k, v, block_size):
                total, out = 0, 0
                for k_block, v_block in zip(k.split(block_size, dim=-2), v.split(block_size, dim=-2)):
                    weights = (q @ k_block.transpose(-2, -1) * q.size(-1) ** -0.5).exp()
                    total, out = total + weights.sum(-1, keepdim=True), out + weights @ v_block
                return out / total
            """,
            """
            def streamed_attention(q, k, v, block_size):
                out, blocks = 0, k.size(-2) / block_size
                for k_block, v_block in zip(k.split(block_size, dim=-2), v.split(block_size, dim=-2)):
                    weights = (q @ k_block.transpose(-2, -1) * q.size(-1) ** -0.5).softmax(-1)
                    out = out + weights @ v_block / blocks
                return out
            """,
            """
            import torch

            def streamed_attention(q, k, v, block_size):
                k_blocks, v_blocks = k.split(block_size, dim=-2), v.split(block_size, dim=-2)
                scores = [q @ block.transpose(-2, -1) * q.size(-1) ** -0.5 for block in k_blocks]
                top = torch.stack([block.amax(-1, keepdim=True) for block in scores]).amax(0)
                scores = [(block - top).exp() for block in scores]
                total = sum(block.sum(-1, keepdim=True) for block in scores)
                return sum(block @ values for block, values in zip(scores, v_blocks)) / total
            """,
        ),
        check=_check_linear_memory,
        hint="When a block brings a greater score than all before it, what becomes of the sums kept so far?",
    ),
)
