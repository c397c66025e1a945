"""Where a token stands. Attention by itself cannot tell one order from another.

Three ways to tell it: vectors added to the token embeddings (`LearnedPositions`,
`SinusoidalPositions`), a rotation of queries and keys (`RotaryPositions`), a bias on the scores
(`RelativeBias`).

B batch, T queries, S keys, H heads, D d_model, Dh head_dim.

Book: bert-embeddings
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .checks import expect_bool, expect_ids, expect_shape


def token_positions(token_mask: Tensor) -> Tensor:
    """Count the real tokens of each row: 0, 1, 2, …, wherever the padding stands; padding gets 0
    before the first and the last count after it.

    Args:
        token_mask: (B, T) bool, True = real token.

    Returns:
        (B, T) int64.

    Raises:
        TypeError: the mask is not boolean.
        ValueError: the mask is not of shape (B, T).

    Book: gpt-model
    """
    expect_bool("token_mask", token_mask)
    expect_shape("token_mask", token_mask, "B T")
    return (token_mask.cumsum(-1) - 1).clamp(min=0)


def _positions(T: int, start: int, max_seq_len: int) -> slice:
    if not 0 <= start < max_seq_len:
        raise ValueError(f"start: expected 0 to {max_seq_len - 1} (max_seq_len={max_seq_len}), got {start}")
    if not 0 < T <= max_seq_len - start:
        raise ValueError(
            f"T: expected 1 to {max_seq_len - start} positions from start={start} "
            f"(max_seq_len={max_seq_len}), got {T}"
        )
    return slice(start, start + T)


class LearnedPositions(nn.Module):
    """One trained vector for each position, as in BERT and GPT-2.

    Args:
        max_seq_len: rows of the table; no position beyond it exists.
        d_model: D.

    Book: bert-embeddings
    """

    def __init__(self, max_seq_len: int, d_model: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(max_seq_len, d_model))

    def forward(self, T: int, *, start: int = 0) -> Tensor:
        """Vectors (T, D) of the positions start … start + T − 1.

        Raises:
            ValueError: a position lies outside the table.

        Book: bert-embeddings
        """
        return self.weight[_positions(T, start, self.weight.size(0))]

    def at(self, positions: Tensor) -> Tensor:
        """Vectors (…, D) of the given positions, integers of any shape.

        Raises:
            TypeError: the positions are not integers.
            ValueError: a position lies outside the table.

        Book: bert-embeddings
        """
        expect_ids("positions", positions)
        try:
            return nn.functional.embedding(positions, self.weight)
        except IndexError as error:
            raise ValueError(
                f"positions: expected 0 to {self.weight.size(0) - 1} (max_seq_len - 1), "
                f"got {int(positions.min())} to {int(positions.max())}"
            ) from error


class SinusoidalPositions(nn.Module):
    r"""Fixed waves of geometrically growing length.

    $$p_{t,2i} = \sin\!\big(t / 10000^{2i/D}\big), \qquad p_{t,2i+1} = \cos\!\big(t / 10000^{2i/D}\big)$$

    Paper: Vaswani et al. (2017), section 3.5.

    Args:
        max_seq_len: how many positions are tabulated.
        d_model: D, even.
        halves: all sines first, then all cosines, as in the paper's own code and in Marian's models:
            the same numbers in another order of channels.

    Raises:
        ValueError: d_model is odd.

    Book: bert-embeddings
    """

    weight: Tensor

    def __init__(self, max_seq_len: int, d_model: int, *, halves: bool = False) -> None:
        super().__init__()
        if d_model % 2:
            raise ValueError(f"d_model: expected an even width (sine and cosine in pairs), got {d_model}")
        t = torch.arange(max_seq_len, dtype=torch.float64)[:, None]
        angle = t / 10000 ** (torch.arange(0, d_model, 2, dtype=torch.float64) / d_model)  # (T, D/2)
        waves = torch.stack([angle.sin(), angle.cos()], dim=1 if halves else 2)
        table = waves.flatten(1)  # (T, D)
        self.register_buffer("weight", table.to(torch.get_default_dtype()), persistent=False)

    def forward(self, T: int, *, start: int = 0) -> Tensor:
        """Vectors (T, D) of the positions start … start + T − 1.

        Raises:
            ValueError: a position lies outside the table.

        Book: bert-embeddings
        """
        return self.weight[_positions(T, start, self.weight.size(0))]


@dataclass(frozen=True)
class Llama3Scaling:
    r"""LLaMA 3.1's stretching of RoPE: slow waves are slowed further, fast ones stay.

    A frequency ω makes $n = \mathtt{original}\,\omega / 2\pi$ turns over the original context, and becomes

    $$\omega' = (1 - s)\,\frac{\omega}{\mathtt{factor}} + s\,\omega, \qquad
      s = \mathrm{clip}\!\left(\frac{n - \mathtt{low}}{\mathtt{high} - \mathtt{low}}, 0, 1\right).$$

    Paper: Grattafiori et al. (2024). Reference: transformers, rope_type "llama3".

    Raises:
        ValueError: `high` is not above `low`, or a number is not positive.

    Book: llama-rope
    """

    factor: float = 8.0
    low: float = 1.0
    high: float = 4.0
    original: int = 8192

    def __post_init__(self) -> None:
        if not (self.high > self.low > 0 and self.factor > 0 and self.original > 0):
            raise ValueError(f"scaling: expected positive numbers with high > low, got {self}")

    def __call__(self, frequencies: Tensor) -> Tensor:
        """Stretch the frequencies, radians a position."""
        turns = self.original * frequencies / (2 * math.pi)
        s = ((turns - self.low) / (self.high - self.low)).clamp(0, 1)
        return (1 - s) * frequencies / self.factor + s * frequencies


class RotaryPositions(nn.Module):
    r"""RoPE: a query or key at position t is turned, pair by pair, by angles that grow with t.

    $$\begin{pmatrix} x'_i \\ x'_{i+D_h/2} \end{pmatrix} =
      \begin{pmatrix} \cos t\omega_i & -\sin t\omega_i \\ \sin t\omega_i & \cos t\omega_i \end{pmatrix}
      \begin{pmatrix} x_i \\ x_{i+D_h/2} \end{pmatrix},
      \qquad \omega_i = \theta^{-2i/D_h}, \quad 0 \le i < D_h/2$$

    so that the product of a turned query and a turned key depends on their distance alone. The
    pairs are (i, i + Dh/2), the layout of the published LLaMA weights in their usual format.
    Paper: Su et al. (2024). Reference: transformers, LlamaRotaryEmbedding.

    Args:
        head_dim: Dh, even.
        theta: θ.
        scaling: how the frequencies are stretched for longer contexts; not at all when left out.

    Raises:
        ValueError: `head_dim` is odd, or θ is not positive.

    Book: llama-rope
    """

    def __init__(
        self, head_dim: int, *, theta: float = 10_000.0, scaling: Llama3Scaling | None = None
    ) -> None:
        super().__init__()
        if head_dim < 2 or head_dim % 2:
            raise ValueError(f"head_dim: expected an even width (they turn in pairs), got {head_dim}")
        if theta <= 0:
            raise ValueError(f"theta: expected a positive number, got {theta}")
        self.head_dim, self.theta, self.scaling = head_dim, theta, scaling

    def frequencies(self, device: torch.device | str | None = None) -> Tensor:
        """ω, (Dh/2,), radians a position, in the widest float of the device.

        Book: llama-rope
        """
        on_mps = torch.device(device or "cpu").type == "mps"  # has no float64
        i = torch.arange(0, self.head_dim, 2, device=device, dtype=torch.float32 if on_mps else torch.float64)
        omega = self.theta ** (-i / self.head_dim)
        return omega if self.scaling is None else self.scaling(omega)

    def forward(self, positions: Tensor, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
        """Cosines and sines of the positions, each repeated for both halves of a head.

        They are not kept in a buffer, which `.to(torch.bfloat16)` would round.

        Args:
            positions: (T,) integers, or (B, T) where the rows differ.
            dtype: of the result; the widest float when left out (`rotate` rounds it).

        Returns:
            Two tensors, (T, Dh) or (B, 1, T, Dh).

        Raises:
            TypeError: the positions are not integers.
            ValueError: they have another number of axes.

        Book: llama-rope
        """
        expect_ids("positions", positions)
        if positions.dim() not in (1, 2):
            raise ValueError(f"positions: expected shape (T,) or (B, T), got {tuple(positions.shape)}")
        angle = positions[..., None] * self.frequencies(positions.device)  # (…, T, Dh/2)
        angle = torch.cat([angle, angle], dim=-1)
        cos, sin = angle.cos().to(dtype or angle.dtype), angle.sin().to(dtype or angle.dtype)
        return (cos, sin) if positions.dim() == 1 else (cos[:, None], sin[:, None])

    def extra_repr(self) -> str:
        return f"{self.head_dim}, theta={self.theta:g}, scaling={self.scaling}"


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (i, i + Dh/2) of queries or keys (B, H, T, Dh) by the angles of its position.

    `cos` and `sin` are those of `RotaryPositions`.

    Raises:
        ValueError: shapes do not fit.

    Book: llama-rope
    """
    if cos.shape != sin.shape or cos.shape[-2:] != x.shape[-2:]:
        raise ValueError(
            f"cos, sin: expected (T, Dh) = {tuple(x.shape[-2:])} at the end, "
            f"got {tuple(cos.shape)} and {tuple(sin.shape)}"
        )
    first, second = x.chunk(2, dim=-1)
    return x * cos.to(x.dtype) + torch.cat([-second, first], dim=-1) * sin.to(x.dtype)


class RelativeBias(nn.Module):
    r"""T5's positions: a learned number for each head and each bucket of distances, added to the score.

    With $n = |i - j|$, one direction and b buckets of it, the bucket of a distance is

    $$\beta(n) = \begin{cases} n & n < b/2 \\
      \min\!\Big(b - 1,\; \tfrac b2 + \Big\lfloor \tfrac b2\,
      \frac{\ln (2n/b)}{\ln (2\,\mathtt{max\_distance}/b)} \Big\rfloor\Big) & \text{else.} \end{cases}$$

    Looking both ways, each direction has half of the buckets; looking back only, a later key shares the
    bucket of distance 0, and the causal mask hides it.
    Paper: Raffel et al. (2020), section 2.1. Reference: transformers, T5Attention.

    Args:
        num_heads: H.
        num_buckets: how many, of both directions together.
        max_distance: from here on all distances share the last bucket.
        bidirectional: whether later keys have buckets of their own.

    Raises:
        ValueError: the buckets do not suffice, or `max_distance` lies within the exact ones.

    Book: t5-relative-bias
    """

    def __init__(
        self,
        num_heads: int,
        *,
        num_buckets: int = 32,
        max_distance: int = 128,
        bidirectional: bool = True,
    ) -> None:
        super().__init__()
        per_direction = num_buckets // 2 if bidirectional else num_buckets
        if per_direction < 2 or (bidirectional and num_buckets % 2):
            raise ValueError(f"num_buckets: expected two or more a direction, got {num_buckets}")
        if max_distance <= per_direction // 2:
            raise ValueError(
                f"max_distance: expected more than the {per_direction // 2} exact buckets, got {max_distance}"
            )
        self.num_buckets, self.max_distance, self.bidirectional = num_buckets, max_distance, bidirectional
        self.weight = nn.Parameter(torch.randn(num_buckets, num_heads))

    def buckets(self, T: int, S: int) -> Tensor:
        """The bucket of each pair, (T, S) int64; the T queries are the last of the S positions.

        Raises:
            ValueError: there are fewer keys than queries.

        Book: t5-relative-bias
        """
        if not 0 < T <= S:
            raise ValueError(
                f"T, S: expected 1 <= T <= S (the queries are the last T of S), got T={T}, S={S}"
            )
        device = self.weight.device
        offset = torch.arange(S, device=device) - torch.arange(S - T, S, device=device)[:, None]  # j - i
        b, later = self.num_buckets, torch.zeros_like(offset)
        if self.bidirectional:
            b //= 2
            later = (offset > 0) * b
            distance = offset.abs()
        else:
            distance = (-offset).clamp(min=0)
        exact = b // 2
        # float32, as published: a wider float would move some distances across a bucket's border
        far = (
            (distance.clamp(min=1).float() / exact).log() / math.log(self.max_distance / exact) * (b - exact)
        )
        return later + torch.where(distance < exact, distance, (exact + far.long()).clamp(max=b - 1))

    def forward(self, T: int, S: int) -> Tensor:
        """The bias (H, T, S) of T queries, the last of S positions.

        Raises:
            ValueError: there are fewer keys than queries.

        Book: t5-relative-bias
        """
        return self.weight[self.buckets(T, S)].permute(2, 0, 1)
