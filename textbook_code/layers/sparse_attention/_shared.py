"""What the cheap forms share: checks, the cut into blocks, one softmax over several sets, the projections.

B batch, H heads, T length, Dh head_dim, D d_model, n blocks.

Book: sparse-attention
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..attention import merge_heads, split_heads
from ..checks import expect_divides, expect_dtype, expect_shape


def expect_qkv(q: Tensor, k: Tensor, v: Tensor) -> None:
    expect_shape("q", q, "B H T Dh")
    B, H, T, Dh = q.shape
    expect_shape("k", k, "B H T Dh", B=B, H=H, T=T, Dh=Dh)
    expect_shape("v", v, "B H T Dv", B=B, H=H, T=T)
    if not q.is_floating_point():
        raise TypeError(f"q: expected a floating-point tensor, got {q.dtype}")
    expect_dtype("k", k, q.dtype)
    expect_dtype("v", v, q.dtype)


def expect_positive(name: str, value: int) -> None:
    if type(value) is not int or value < 1:
        raise ValueError(f"{name}: expected a positive integer, got {value!r}")


def in_blocks(x: Tensor, size: int, axis: int = 2) -> Tensor:
    """Fill an axis of length T up with zeros, and cut it: (…, T, …) → (…, n, size, …)."""
    rest = -x.size(axis) % size
    if rest:
        shape = list(x.shape)
        shape[axis] = rest
        x = torch.cat([x, x.new_zeros(shape)], axis)
    return x.unflatten(axis, (-1, size))


def joint_weights(*parts: tuple[Tensor, Tensor], dropout: float = 0.0) -> tuple[Tensor, ...]:
    """One softmax over several sets of scores of the same queries, each given with the mask of its pairs.

    A query that sees nothing in any set gets zeros, as in `attention`.
    """
    scores = torch.cat([s.masked_fill(~seen, torch.finfo(s.dtype).min) for s, seen in parts], -1)
    weights = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(scores.dtype)
    each = weights.split([s.size(-1) for s, _ in parts], -1)
    return tuple(
        F.dropout(w.masked_fill(~seen, 0), dropout) for w, (_, seen) in zip(each, parts, strict=True)
    )


class _SelfAttention(nn.Module):
    """Projections of a self-attention whose middle a subclass writes."""

    def __init__(self, d_model: int, num_heads: int, *, bias: bool, dropout: float) -> None:
        super().__init__()
        expect_divides("num_heads", num_heads, "d_model", d_model)
        self.d_model, self.num_heads, self.head_dim = d_model, num_heads, d_model // num_heads
        self.dropout = dropout
        self.q_proj = nn.Linear(d_model, d_model, bias=bias)
        self.k_proj = nn.Linear(d_model, d_model, bias=bias)
        self.v_proj = nn.Linear(d_model, d_model, bias=bias)
        self.out_proj = nn.Linear(d_model, d_model, bias=bias)

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        expect_shape("x", x, "B T D", D=self.d_model)
        expect_dtype("x", x, self.q_proj.weight.dtype)
        H = self.num_heads
        return (
            split_heads(self.q_proj(x), H),
            split_heads(self.k_proj(x), H),
            split_heads(self.v_proj(x), H),
        )  # (B, H, T, Dh) each

    def _merge(self, out: Tensor) -> Tensor:
        return self.out_proj(merge_heads(out))  # (B, T, D)

    @property
    def _dropout_now(self) -> float:
        return self.dropout if self.training else 0.0
