"""Positions that are added to the input: a learned vector for each place, or fixed waves.

    x_t = E[token_t] + p_t

B batch, T length, D d_model.

Book: bert-embeddings, positions-kinds
"""

import torch
from torch import Tensor, nn

from ..checks import expect_bool, expect_ids, expect_shape


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
