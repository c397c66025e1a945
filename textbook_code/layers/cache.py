"""The key/value cache: storage only, one for each attention layer; one that grows, one that rolls.

B batch, K key/value heads, S positions stored, Dh head_dim, W window.

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


class RollingCache(KVCache):
    r"""A ring of W slots for a layer that sees a window: memory does not grow with the text.

    It holds 2 · B · K · W · Dh numbers. Position p lies in slot p mod W, in the place of p − W, which no
    later query will see. Keys go in as the layer made them: with RoPE already turned, so that it does not
    matter which slot they lie in.

    Paper: Jiang et al. (2023), section 2, "rolling buffer cache".

    Args:
        batch_size: B.
        num_kv_heads: K.
        window: W, how many positions a query sees, its own included.
        head_dim: Dh.
        dtype: of the stored numbers; torch's default when left out.
        device: where they are stored.

    Raises:
        ValueError: the window is empty.

    Book: local-attention-cache
    """

    def __init__(
        self,
        batch_size: int,
        num_kv_heads: int,
        window: int,
        head_dim: int,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        if window < 1:
            raise ValueError(f"window: expected at least 1, got {window}")
        super().__init__(batch_size, num_kv_heads, window, head_dim, dtype=dtype, device=device)
        self.window = window

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store the next positions and return all that their queries may see.

        Args:
            k: (B, K, T, Dh) keys of T new positions; T may exceed W.
            v: their values, of the same shape.

        Returns:
            Keys and values (B, K, S, Dh). For one new position these are views of
            the slots in use, in the order of the slots (see `positions`). For more,
            copies in the order of the positions: up to W − 1 earlier ones, then
            the T new ones.

        Raises:
            TypeError: a dtype differs from the cache's.
            ValueError: a shape differs from the cache's.

        Book: local-attention-cache
        """
        B, K, W, Dh = self.k.shape
        expect_shape("k", k, "B K T Dh", B=B, K=K, Dh=Dh)
        expect_shape("v", v, "B K T Dh", B=B, K=K, T=k.size(2), Dh=Dh)
        expect_dtype("k", k, self.k.dtype)
        expect_dtype("v", v, self.v.dtype)
        start, end = self.length, self.length + k.size(2)
        seen = k, v
        if start and end - start != 1:
            first = max(0, start - W + 1)
            past = torch.arange(first, start, device=k.device) % W
            seen = (
                torch.cat([self.k[:, :, past], k], dim=2),
                torch.cat([self.v[:, :, past], v], dim=2),
            )
        new = torch.arange(max(start, end - W), end, device=k.device) % W
        self.k[:, :, new] = k[:, :, -new.numel() :].to(self.k.dtype)
        self.v[:, :, new] = v[:, :, -new.numel() :].to(self.v.dtype)
        self.length = end
        return self.stored if end - start == 1 else seen

    @property
    def stored(self) -> tuple[Tensor, Tensor]:
        """Views (B, K, S, Dh) of the slots in use, S = min(length, W), in the order of the slots.

        Book: local-attention-cache
        """
        used = min(self.length, self.window)
        return self.k[:, :, :used], self.v[:, :, :used]

    @property
    def positions(self) -> Tensor:
        r"""(S,) which position lies in each slot: the last one before `length` that is slot modulo W.

        $$p_s = (\mathtt{length} - 1) - \big((\mathtt{length} - 1 - s) \bmod W\big)$$

        Book: local-attention-cache
        """
        last = self.length - 1
        slots = torch.arange(min(self.length, self.window), device=self.k.device)
        return last - (last - slots) % self.window
