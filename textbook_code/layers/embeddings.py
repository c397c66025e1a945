"""From token ids to vectors, and back to scores over the vocabulary.

V vocab_size, D d_model.

Book: bert-embeddings
"""

import torch.nn.functional as F
from torch import Tensor, nn

from .checks import expect_ids


class TokenEmbedding(nn.Embedding):
    r"""A table with one row for each token; its transpose can serve as the output layer.

    $$x_t = E[\mathrm{token}_t], \qquad \mathrm{logits} = h\, E^\top.$$

    Tying the two: Press and Wolf (2017).

    Args:
        vocab_size: V, rows of the table.
        d_model: D, their width.

    Book: bert-embeddings
    """

    def __init__(self, vocab_size: int, d_model: int) -> None:
        super().__init__(vocab_size, d_model)

    def forward(self, tokens: Tensor, *, name: str = "tokens") -> Tensor:
        """Look up (B, T) integer ids; returns (B, T, D). Errors call them by `name`.

        Raises:
            TypeError: the ids are not integers.
            ValueError: an id lies outside the table.

        Book: bert-embeddings
        """
        expect_ids(name, tokens)
        try:
            return super().forward(tokens)
        except IndexError as error:
            raise ValueError(
                f"{name}: expected ids from 0 to {self.num_embeddings - 1}, "
                f"got {int(tokens.min())} to {int(tokens.max())}"
            ) from error

    def attend(self, x: Tensor) -> Tensor:
        """Score (…, D) against every row of the table; returns (…, V)."""
        return F.linear(x, self.weight)
