"""The key/value cache: storage only, one for each attention layer.

B batch, K key/value heads, S positions stored, Dh head_dim.

Book: attention-cache
"""

import torch
from torch import Tensor

from .checks import expect_dtype, expect_ids, expect_shape


class KVCache:
    """Keys and values of the positions seen so far, in memory taken once.

    It holds 2 · B · K · max_seq_len · Dh numbers. The layer that appends to it does all the
    arithmetic; the cache knows nothing of masks or positions.

    Args:
        batch_size: B.
        num_kv_heads: K.
        max_seq_len: most positions that it can hold.
        head_dim: Dh.
        dtype: of the stored numbers; torch's default when left out.
        device: where they are stored.

    Book: attention-cache
    """

    def __init__(
        self,
        batch_size: int,
        num_kv_heads: int,
        max_seq_len: int,
        head_dim: int,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        shape = (batch_size, num_kv_heads, max_seq_len, head_dim)
        self.k = torch.zeros(shape, dtype=dtype, device=device)
        self.v = torch.zeros(shape, dtype=dtype, device=device)
        self.length = 0

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store the next positions and return all that are stored.

        Args:
            k: (B, K, T, Dh) keys of T new positions.
            v: their values, of the same shape.

        Returns:
            Views (B, K, S, Dh) of all keys and all values, S = old length + T.

        Raises:
            TypeError: a dtype differs from the cache's.
            ValueError: a shape differs from the cache's, or the cache is full.

        Book: attention-cache
        """
        B, K, max_seq_len, Dh = self.k.shape
        expect_shape("k", k, "B K T Dh", B=B, K=K, Dh=Dh)
        expect_shape("v", v, "B K T Dh", B=B, K=K, T=k.size(2), Dh=Dh)
        expect_dtype("k", k, self.k.dtype)
        expect_dtype("v", v, self.v.dtype)
        start, end = self.length, self.length + k.size(2)
        if end > max_seq_len:
            raise ValueError(
                f"k: expected at most {max_seq_len - start} more positions "
                f"(max_seq_len={max_seq_len}, {start} stored), got {k.size(2)}"
            )
        self.k[:, :, start:end] = k
        self.v[:, :, start:end] = v
        self.length = end
        return self.stored

    @property
    def stored(self) -> tuple[Tensor, Tensor]:
        """Views (B, K, S, Dh) of all keys and all values stored so far.

        Book: attention-cache
        """
        return self.k[:, :, : self.length], self.v[:, :, : self.length]

    def reorder(self, rows: Tensor) -> None:
        """Keep the given rows of the batch, in this order; a row may be kept more than once.

        Beam search continues the best hypotheses, and their pasts move with them.

        Args:
            rows: (B′,) integer ids of rows.

        Raises:
            TypeError: the ids are not integers.
            ValueError: they are not of shape (B′,).

        Book: attention-cache
        """
        expect_ids("rows", rows)
        expect_shape("rows", rows, "B")
        self.k, self.v = self.k.index_select(0, rows), self.v.index_select(0, rows)
