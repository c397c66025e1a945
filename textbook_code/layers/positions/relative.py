"""Positions that are added to the scores: by the distance of query and key, and by nothing else.

    score_ij = q_i · k_j / √Dh + b_h(j - i)

B batch, T queries, S keys, H heads.

Book: t5-relative-bias, positions-kinds
"""

import math

import torch
from torch import Tensor, nn


def offsets(T: int, S: int, *, device: torch.device | str | None = None) -> Tensor:
    """j − i of each query i and key j, (T, S) int64; the T queries are the last of the S positions.

    Raises:
        ValueError: there are fewer keys than queries.

    Book: positions-kinds
    """
    if not 0 < T <= S:
        raise ValueError(f"T, S: expected 1 <= T <= S (the queries are the last T of S), got T={T}, S={S}")
    return torch.arange(S, device=device) - torch.arange(S - T, S, device=device)[:, None]


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
        offset = offsets(T, S, device=self.weight.device)
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


def alibi_slopes(num_heads: int) -> Tensor:
    r"""ALiBi's slopes m, (H,) float64, one for each head.

    $$m_h = 2^{-8h/H}, \qquad h = 1, \ldots, H,$$

    where H is a power of two. Otherwise the slopes of the largest power n below H come first, and then
    every other one of those of 2n, beginning with its first, until there are H.
    Paper: Press et al. (2022), section 3 and the code it names.

    Raises:
        ValueError: there is no head.

    Book: alibi
    """
    if num_heads < 1:
        raise ValueError(f"num_heads: expected at least 1, got {num_heads}")
    n = 1 << num_heads.bit_length() - 1  # the largest power of two that is not above H
    exponents = [8 * h / n for h in range(1, n + 1)] + [4 * h / n for h in range(1, 2 * n, 2)]
    return 2.0 ** -torch.tensor(exponents[:num_heads], dtype=torch.float64)


class ALiBi(nn.Module):
    r"""A penalty that grows with the distance, at a rate of its own for each head; nothing is learned.

    $$b_h(j - i) = -m_h\, |i - j|$$

    Behind a causal mask that is $-m_h (i - j)$, the paper's; keys on both sides are treated alike. It is
    added behind the scaling, and no other positions are used.
    Paper: Press et al. (2022). Reference: transformers, BloomModel, MptModel; both add $+m_h j$, which
    differs by a number that is the same for all keys of a query, and so not behind the softmax.

    Args:
        num_heads: H.

    Raises:
        ValueError: there is no head.

    Book: alibi
    """

    slopes: Tensor

    def __init__(self, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        slopes = alibi_slopes(num_heads).to(torch.get_default_dtype())
        self.register_buffer("slopes", slopes, persistent=False)  # says dtype and device

    def forward(self, T: int, S: int) -> Tensor:
        """The bias (H, T, S) of T queries, the last of S positions.

        The product is taken in float32 at least, and rounded once.

        Raises:
            ValueError: there are fewer keys than queries.

        Book: alibi
        """
        wide = torch.promote_types(self.slopes.dtype, torch.float32)
        slopes = alibi_slopes(self.num_heads).to(self.slopes.device, wide)  # not those that were rounded
        distance = offsets(T, S, device=self.slopes.device).abs()
        return (-slopes[:, None, None] * distance).to(self.slopes.dtype)

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}"
