"""mT5: T5 version 1.1, read and written in 101 languages.

The computation is T5's, so the classes are configurations of T5's. New are the vocabulary, of which
both tables have a row for each piece, and how often each language is drawn.

V vocabulary, D d_model.
Paper: Xue et al. (2021). Reference: transformers.MT5ForConditionalGeneration and its relatives.

Book: mt5-model
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from .t5 import T5, T5Encoder, T5ForConditionalGeneration, T5Sizes


@dataclass(frozen=True)
class Mt5Config(T5Sizes):
    """mT5's published sizes; the defaults are those of mT5-small.

    Gated tanh-GELU, an output layer of its own without scaling, and 250 112 pieces.

    Raises:
        ValueError: a size is not positive, or a special token lies outside the vocabulary.

    Book: mt5-model
    """

    vocab_size: int = 250112
    d_model: int = 512
    num_layers: int = 8
    num_heads: int = 6
    d_ff: int = 1024
    gated: bool = True
    tied: bool = False

    @classmethod
    def mt5_small(cls, **other: Any) -> Self:
        """8 + 8 layers of width 512."""
        return cls(**other)

    @classmethod
    def mt5_base(cls, **other: Any) -> Self:
        """12 + 12 layers of width 768."""
        return cls(**{"d_model": 768, "num_layers": 12, "num_heads": 12, "d_ff": 2048, **other})

    @classmethod
    def mt5_large(cls, **other: Any) -> Self:
        """24 + 24 layers of width 1024."""
        return cls(**{"d_model": 1024, "num_layers": 24, "num_heads": 16, "d_ff": 2816, **other})

    @classmethod
    def mt5_xl(cls, **other: Any) -> Self:
        """24 + 24 layers of width 2048."""
        return cls(**{"d_model": 2048, "num_layers": 24, "num_heads": 32, "d_ff": 5120, **other})

    @classmethod
    def mt5_xxl(cls, **other: Any) -> Self:
        """24 + 24 layers of width 4096."""
        return cls(**{"d_model": 4096, "num_layers": 24, "num_heads": 64, "d_ff": 10240, **other})


class Mt5(T5):
    """Both stacks of an mT5, see `T5`.

    Book: mt5-model
    """

    config_class = Mt5Config
    hf_architecture = "MT5Model"
    hf_assumes: ClassVar[dict[str, Any]] = {"model_type": "mt5"}
    always_untied = True


class Mt5Encoder(T5Encoder):
    """The encoder of an mT5 alone, see `T5Encoder`.

    Book: mt5-model
    """

    config_class = Mt5Config
    hf_architecture = "MT5EncoderModel"
    hf_assumes: ClassVar[dict[str, Any]] = {"model_type": "mt5"}
    always_untied = True


class Mt5ForConditionalGeneration(T5ForConditionalGeneration):
    """mT5 that writes, see `T5ForConditionalGeneration`.

    Book: mt5-model
    """

    config_class = Mt5Config
    hf_architecture = "MT5ForConditionalGeneration"
    hf_assumes: ClassVar[dict[str, Any]] = {"model_type": "mt5"}
    always_untied = True


def language_probabilities(sizes: Tensor, *, alpha: float = 0.3) -> Tensor:
    r"""How often each language is drawn in training, given how much text of it there is.

    $$p(L) = \frac{|L|^{\alpha}}{\sum_{L'} |L'|^{\alpha}}$$

    α = 1 draws in proportion to the text, α = 0 all languages alike. mT5 takes 0.3.
    Paper: Xue et al. (2021), section 3.2.

    Args:
        sizes: (N,) how many examples, characters or tokens of each language there are.
        alpha: α, from 0 to 1.

    Returns:
        (N,) probabilities, in float64.

    Raises:
        ValueError: α outside 0 … 1, no language, or a size that is not positive.

    Book: mt5-sampling
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha: expected 0 to 1, got {alpha}")
    if sizes.dim() != 1 or sizes.numel() == 0 or not bool((sizes > 0).all()):
        raise ValueError(f"sizes: expected one positive number for each language, got {sizes.tolist()}")
    return (alpha * sizes.to(torch.float64).log()).softmax(0)
