"""BigBird: blocks that see their neighbours, the first and the last block, and r random ones.

For each block in the middle the 5 + r blocks of keys it looks at are gathered and scored in one product:
T b (5 + r) scores, and 2b full rows.

B batch, H heads, T length, Dh head_dim, D d_model, b block_size, N = T/b blocks, r random blocks.
Paper: Zaheer et al. (2020), section 2 and appendix D.
Reference: transformers.BigBirdForMaskedLM.

Book: sparse-bigbird
"""

from functools import cache

import torch
from torch import Tensor

from ..attention import fused_attention
from ..checks import expect_bool, expect_shape
from ..masks import key_mask
from ._shared import _SelfAttention, expect_positive, expect_qkv, in_blocks, joint_weights


@cache
def random_blocks(num_blocks: int, *, num_random: int, num_heads: int, seed: int) -> Tensor:
    """For each block but the first and the last, r other blocks to look at, drawn once for all.

    None is a block that is looked at anyway: the first, the last, the own and its two neighbours.

    Args:
        num_blocks: N.
        num_random: r.
        num_heads: H; each head has its own.
        seed: of the draw; a layer has its own.

    Returns:
        (H, N − 2, r) int64, each row in rising order.

    Raises:
        ValueError: so many blocks are not left: a block in the middle has N − 5 to choose from.

    Book: sparse-bigbird
    """
    if num_random < 0 or num_random > max(num_blocks - 5, 0):
        raise ValueError(
            f"num_random: expected 0 to {max(num_blocks - 5, 0)} with {num_blocks} blocks, of which one in "
            f"the middle sees 5 anyway, got {num_random}"
        )
    generator = torch.Generator().manual_seed(seed)
    middle = torch.arange(1, num_blocks - 1)
    free = (middle[:, None] - middle).abs() > 1  # (N - 2, N - 2)
    lots = torch.rand(num_heads, *free.shape, generator=generator).masked_fill(~free, 2.0)
    return middle[lots.argsort(-1)[..., :num_random]].sort(-1).values


def bigbird_mask(T: int, blocks: Tensor, *, block_size: int) -> Tensor:
    """BigBird's pattern as a mask: whole blocks, seen or not.

    A block sees itself, its two neighbours, the first and the last block and its random ones; the first
    and the last see all.

    Paper: Zaheer et al. (2020), section 2 and appendix D.

    Args:
        T: length; the last block may be cut.
        blocks: (H, N − 2, r) from `random_blocks`.
        block_size: b.

    Returns:
        bool (H, T, T).

    Raises:
        ValueError: `blocks` does not fit N = ⌈T/b⌉, names a block that is looked at anyway, or one twice.

    Book: sparse-bigbird
    """
    N = _expect_blocks(T, blocks, block_size)
    n = torch.arange(N, device=blocks.device)
    seen = ((n[:, None] - n).abs() <= 1).repeat(blocks.size(0), 1, 1)  # (H, N, N)
    seen[:, :, [0, -1]] = seen[:, [0, -1]] = True
    seen[:, 1:-1].scatter_(-1, blocks, True)
    of = torch.arange(T, device=blocks.device) // block_size
    return seen[:, of][:, :, of]


def _expect_blocks(T: int, blocks: Tensor, block_size: int) -> int:
    expect_positive("block_size", block_size)
    N = -(-T // block_size)
    if N < 3:
        raise ValueError(f"block_size: expected at least 3 blocks in {T} positions, got {N} of {block_size}")
    expect_shape("blocks", blocks, "H N-2 r", **{"N-2": N - 2})
    own = torch.arange(1, N - 1, device=blocks.device)[:, None]
    twice = blocks.sort(-1).values.diff(dim=-1) == 0
    if blocks.numel() and (
        bool(((blocks < 1) | (blocks > N - 2) | ((blocks - own).abs() <= 1)).any()) or bool(twice.any())
    ):
        raise ValueError(
            f"blocks: expected {blocks.size(-1)} different blocks from 1 to {N - 2} in each row, neither the "
            "own one nor its neighbours; a block seen twice would count twice"
        )
    return N


def bigbird_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: Tensor,
    *,
    block_size: int,
    token_mask: Tensor | None = None,
    dropout: float = 0.0,
    scale: float | None = None,
) -> Tensor:
    r"""Attention along BigBird's pattern, block by block: T b (5 + r) scores instead of T², and 2b full rows.

    For each block in the middle the 5 + r blocks of keys it looks at are gathered; the second block's
    left neighbour is the first block, and the last but one's right neighbour is the last, and neither
    is counted twice.

    Args:
        q, k, v: (B, H, T, Dh); any T, the last block is filled up and hidden.
        blocks: (H, N − 2, r) from `random_blocks`.
        block_size: b.
        token_mask: (B, T) bool, True = real token; no query sees padding.
        dropout: probability with which a weight is dropped.
        scale: factor on q kᵀ; 1/√Dh when left out.

    Returns:
        (B, H, T, Dv), as `attention` with `bigbird_mask`.

    Raises:
        TypeError: the mask is not boolean, or the dtypes differ.
        ValueError: shapes do not fit, or as `bigbird_mask`.

    Book: sparse-bigbird
    """
    expect_qkv(q, k, v)
    B, H, T, Dh = q.shape
    N = _expect_blocks(T, blocks, block_size)
    expect_shape("blocks", blocks, "H N-2 r", H=H)
    token_mask = q.new_ones(B, T).bool() if token_mask is None else token_mask
    expect_bool("token_mask", token_mask)
    expect_shape("token_mask", token_mask, "B T", B=B, T=T)
    scale = Dh**-0.5 if scale is None else scale

    q, k, v = (in_blocks(x, block_size) for x in (q, k, v))  # (B, H, N, b, Dh)
    real = in_blocks(token_mask, block_size, axis=1)  # (B, N, b)
    middle = torch.arange(1, N - 1, device=q.device)[:, None]
    always = torch.cat([middle * 0, middle - 1, middle, middle + 1, middle * 0 + N - 1], -1)  # (N - 2, 5)
    once = torch.ones_like(always, dtype=torch.bool)
    once[0, 1] = once[-1, 3] = False  # the neighbour that is the first or the last block
    looked = torch.cat([always.expand(H, -1, -1), blocks], -1)  # (H, N - 2, 5 + r)
    once = torch.cat([once.expand(H, -1, -1), torch.ones_like(blocks, dtype=torch.bool)], -1)

    heads = torch.arange(H, device=q.device)[:, None, None]
    near_k, near_v = (x[:, heads, looked].flatten(3, 4) for x in (k, v))  # (B, H, N - 2, (5 + r) b, Dh)
    seen = (real[:, looked] & once[..., None]).flatten(3, 4)[..., None, :]  # (B, H, N - 2, 1, (5 + r) b)
    scores = q[:, :, 1:-1] @ near_k.transpose(-2, -1) * scale  # (B, H, N - 2, b, (5 + r) b)
    (weights,) = joint_weights((scores, seen), dropout=dropout)
    inner = weights @ near_v

    ends = q[:, :, [0, -1]].flatten(2, 3)  # the queries of the first and the last block
    all_keys = real.flatten(1)[:, None, None]
    outer = fused_attention(
        ends, k.flatten(2, 3), v.flatten(2, 3), all_keys, dropout=dropout, scale=scale
    ).unflatten(2, (2, block_size))
    return torch.cat([outer[:, :, :1], inner, outer[:, :, 1:]], 2).flatten(2, 3)[:, :, :T]


class BigBirdAttention(_SelfAttention):
    r"""Self-attention to the first, the last, the near and some random blocks; to all in a short text.

    A text of no more than (5 + 2r) b positions is attended to in full, as in the published implementation.

    Args:
        d_model: D.
        num_heads: H.
        block_size: b.
        num_random: r.
        seed: of the random blocks; give each layer its own.
        bias: whether the four projections have biases.
        dropout: probability with which a weight is dropped in training.
        dense: compute with the mask, at the full cost; the same numbers.

    Raises:
        ValueError: a size is not positive or does not divide.

    Book: sparse-bigbird
    """

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        *,
        block_size: int = 64,
        num_random: int = 3,
        seed: int = 0,
        bias: bool = True,
        dropout: float = 0.0,
        dense: bool = False,
    ) -> None:
        super().__init__(d_model, num_heads, bias=bias, dropout=dropout)
        expect_positive("block_size", block_size)
        if num_random < 0:
            raise ValueError(f"num_random: expected at least 0 blocks, got {num_random}")
        self.block_size, self.num_random, self.seed, self.dense = block_size, num_random, seed, dense

    def blocks(self, T: int) -> Tensor | None:
        """The random blocks for a text of T positions, (H, N − 2, r); None where it is short.

        Book: sparse-bigbird
        """
        short = (5 + 2 * self.num_random) * self.block_size
        if short >= T:
            return None
        N = -(-T // self.block_size)
        return random_blocks(N, num_random=self.num_random, num_heads=self.num_heads, seed=self.seed)

    def forward(self, x: Tensor, *, token_mask: Tensor | None = None, blocks: Tensor | None = None) -> Tensor:
        """Map (B, T, D) to (B, T, D).

        Args:
            x: (B, T, D), any T.
            token_mask: (B, T) bool, True = real token.
            blocks: (H, N − 2, r), in place of those that the seed gives.

        Raises:
            TypeError: the mask is not boolean, or the dtype is another than the weights'.
            ValueError: shapes do not fit.

        Book: sparse-bigbird
        """
        q, k, v = self._project(x)
        T = x.size(1)
        if token_mask is not None:
            expect_bool("token_mask", token_mask)
            expect_shape("token_mask", token_mask, "B T", B=x.size(0), T=T)
        if blocks is None:
            blocks = self.blocks(T)
        mask = None if token_mask is None else key_mask(token_mask)
        if blocks is not None:
            blocks = blocks.to(x.device)
            if not self.dense:
                return self._merge(
                    bigbird_attention(
                        q, k, v, blocks, block_size=self.block_size, token_mask=token_mask,
                        dropout=self._dropout_now,
                    )
                )  # fmt: skip
            pattern = bigbird_mask(T, blocks, block_size=self.block_size)
            mask = pattern if mask is None else pattern & mask
        return self._merge(fused_attention(q, k, v, mask, dropout=self._dropout_now))

    def extra_repr(self) -> str:
        return (
            f"num_heads={self.num_heads}, block_size={self.block_size}, num_random={self.num_random}, "
            f"seed={self.seed}"
        )
