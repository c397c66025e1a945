"""What a model is trained to predict.

B batch, T length, V vocabulary.

Book: bert-mlm
"""

import torch
from torch import Tensor

from textbook_code.layers.checks import expect_bool, expect_ids, expect_shape

IGNORE = -100  # the target that torch's cross-entropy leaves out


def mask_tokens(
    tokens: Tensor,
    *,
    mask_id: int,
    vocab_size: int,
    special_mask: Tensor,
    prob: float = 0.15,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Prepare a batch for masked language modelling.

    Each ordinary token is chosen with probability `prob`. Of the chosen, 80 % become the mask
    token, 10 % a random token, and 10 % stay as they are; all chosen are to be predicted.
    Paper: Devlin et al. (2019), section 3.1 and appendix A.1.

    Args:
        tokens: (B, T) integer ids; left as it is.
        mask_id: the id of [MASK].
        vocab_size: V; random tokens are drawn from 0 … V − 1.
        special_mask: (B, T) bool, True where a token is never chosen ([CLS], [SEP], padding).
        prob: share of tokens to choose.
        generator: source of randomness.

    Returns:
        The corrupted tokens (B, T), and the targets (B, T): the original id where a token was
        chosen, −100 elsewhere.

    Raises:
        TypeError: the tokens are not integers, or `special_mask` is not boolean.
        ValueError: shapes differ, `mask_id` is outside the vocabulary, or `prob` is not between 0 and 1.

    Book: bert-mlm
    """
    expect_shape("tokens", tokens, "B T")
    expect_ids("tokens", tokens)
    expect_bool("special_mask", special_mask)
    expect_shape("special_mask", special_mask, "B T", B=tokens.size(0), T=tokens.size(1))
    if not 0 <= mask_id < vocab_size:
        raise ValueError(
            f"mask_id: expected an id from 0 to {vocab_size - 1} (vocab_size - 1), got {mask_id}"
        )
    if not 0 < prob <= 1:
        raise ValueError(f"prob: expected a share in (0, 1], got {prob}")

    def draw() -> Tensor:
        return torch.rand(tokens.shape, generator=generator, device=tokens.device)

    chosen = (draw() < prob) & ~special_mask
    fate = draw()
    random = torch.randint(vocab_size, tokens.shape, generator=generator, device=tokens.device)
    inputs = torch.where(chosen & (fate < 0.8), mask_id, tokens)
    inputs = torch.where(chosen & (fate >= 0.9), random.to(tokens.dtype), inputs)
    return inputs, torch.where(chosen, tokens, IGNORE)
