"""Where a token stands: vectors added to the token embeddings.

T length, D d_model. Attention by itself cannot tell one order from another.

Book: bert-embeddings
"""

import torch
from torch import Tensor, nn


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


class SinusoidalPositions(nn.Module):
    r"""Fixed waves of geometrically growing length.

    $$p_{t,2i} = \sin\!\big(t / 10000^{2i/D}\big), \qquad p_{t,2i+1} = \cos\!\big(t / 10000^{2i/D}\big)$$

    Paper: Vaswani et al. (2017), section 3.5.

    Args:
        max_seq_len: how many positions are tabulated.
        d_model: D, even.

    Raises:
        ValueError: d_model is odd.

    Book: bert-embeddings
    """

    weight: Tensor

    def __init__(self, max_seq_len: int, d_model: int) -> None:
        super().__init__()
        if d_model % 2:
            raise ValueError(f"d_model: expected an even width (sine and cosine in pairs), got {d_model}")
        t = torch.arange(max_seq_len, dtype=torch.float64)[:, None]
        angle = t / 10000 ** (torch.arange(0, d_model, 2, dtype=torch.float64) / d_model)  # (T, D/2)
        table = torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(1)  # (T, D)
        self.register_buffer("weight", table.to(torch.get_default_dtype()), persistent=False)

    def forward(self, T: int, *, start: int = 0) -> Tensor:
        """Vectors (T, D) of the positions start … start + T − 1.

        Raises:
            ValueError: a position lies outside the table.

        Book: bert-embeddings
        """
        return self.weight[_positions(T, start, self.weight.size(0))]
