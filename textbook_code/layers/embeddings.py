"""From token ids to vectors, and back to scores over the vocabulary; and from an image to vectors.

V vocab_size, D d_model, C channels, H and W height and width, N patches.

Book: bert-embeddings
"""

import torch.nn.functional as F
from torch import Tensor, nn

from .checks import expect_divides, expect_dtype, expect_ids, expect_shape


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


class PatchEmbedding(nn.Module):
    r"""Cut an image into square patches and map each to a vector: a convolution whose stride is its size.

    $$x_n = W\, \mathrm{vec}(\mathrm{patch}_n) + b, \qquad n = 0, \ldots, N - 1, \quad
      N = (\mathtt{image\_size} / \mathtt{patch\_size})^2$$

    with the patches taken row by row. Paper: Dosovitskiy et al. (2021), section 3.1.

    Args:
        image_size: height and width of the image, in pixels.
        patch_size: height and width of a patch; it divides `image_size`.
        d_model: D.
        in_channels: C, 3 for colour.

    Raises:
        ValueError: the patches do not tile the image.

    Book: tiny-vit-patches
    """

    def __init__(self, image_size: int, patch_size: int, d_model: int, *, in_channels: int = 3) -> None:
        super().__init__()
        expect_divides("patch_size", patch_size, "image_size", image_size)
        self.image_size, self.in_channels = image_size, in_channels
        self.num_patches = (image_size // patch_size) ** 2
        self.proj = nn.Conv2d(in_channels, d_model, patch_size, stride=patch_size)

    def forward(self, images: Tensor) -> Tensor:
        """Map (B, C, image_size, image_size) to (B, N, D).

        Raises:
            ValueError: other channels, or another size.
            TypeError: no tensor, or another dtype than the weights'.

        Book: tiny-vit-patches
        """
        expect_shape("images", images, "B C H W", C=self.in_channels, H=self.image_size, W=self.image_size)
        expect_dtype("images", images, self.proj.weight.dtype)
        return self.proj(images).flatten(2).transpose(1, 2)
