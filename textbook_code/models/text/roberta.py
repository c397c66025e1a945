"""RoBERTa: BERT's encoder, trained longer on more text without its second objective.

In this file: the config and its published sizes (XLM-R's too), the positions that differ from
BERT's, the heads, and the table that maps published weights to ours. The encoder is `Bert`.

B batch, T length, D d_model, V vocabulary, C classes.
Paper: Liu et al. (2019); Conneau et al. (2020) for XLM-R. Reference: transformers.RobertaForMaskedLM
and its relatives. The reference's config has BERT's defaults: published checkpoints have ε = 1e-5,
514 rows of positions and one segment.

Book: encoder-family
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from textbook_code.layers.positions import token_positions
from textbook_code.models.text.bert import (
    Bert,
    BertPretrained,
    EncoderClassifier,
    MaskedLMHead,
    SegmentedConfig,
    encoder_rules,
    expect_classes,
    initialise,
    norm_rules,
)
from textbook_code.weights import Rule


@dataclass(frozen=True)
class RobertaConfig(SegmentedConfig):
    """The sizes of a RoBERTa; the defaults are RoBERTa-base.

    `max_seq_len` counts tokens, 512. The position table has `pad_id + 1` rows more, 514: no token
    stands at position 0, and padding stands at `pad_id`.

    Raises:
        ValueError: a size is not positive, or the id of the padding lies outside the vocabulary.

    Book: roberta-positions
    """

    vocab_size: int = 50265
    norm_eps: float = 1e-5
    num_segments: int = 1
    pad_id: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.pad_id < self.vocab_size:
            raise ValueError(f"pad_id: expected an id from 0 to {self.vocab_size - 1}, got {self.pad_id}")
        super().__post_init__()

    @property
    def num_positions(self) -> int:
        """Rows of the position table."""
        return self.max_seq_len + self.pad_id + 1

    @classmethod
    def roberta_base(cls, **other: Any) -> Self:
        """12 layers of width 768."""
        return cls._sized(12, 768, 12, **other)

    @classmethod
    def roberta_large(cls, **other: Any) -> Self:
        """24 layers of width 1024."""
        return cls._sized(24, 1024, 16, **other)

    @classmethod
    def xlm_roberta_base(cls, **other: Any) -> Self:
        """RoBERTa-base with a vocabulary for a hundred languages."""
        return cls._sized(12, 768, 12, **{"vocab_size": 250002, **other})

    @classmethod
    def xlm_roberta_large(cls, **other: Any) -> Self:
        """RoBERTa-large with a vocabulary for a hundred languages."""
        return cls._sized(24, 1024, 16, **{"vocab_size": 250002, **other})


class RobertaPretrained(BertPretrained):
    """The published names of RoBERTa's sizes, and what its code takes for granted.

    Book: roberta-positions
    """

    config_class = RobertaConfig
    hf_config: ClassVar[dict[str, str]] = {**BertPretrained.hf_config, "pad_id": "pad_token_id"}
    hf_assumes: ClassVar[dict[str, Any]] = {**BertPretrained.hf_assumes, "model_type": "roberta"}

    @classmethod
    def config_from_hf(cls, theirs: Mapping[str, Any]) -> RobertaConfig:
        """As in `Pretrained`; their longest sequence counts the unused rows too. XLM-R is read as well."""
        if theirs.get("model_type") == "xlm-roberta":  # the same computation with another vocabulary
            theirs = {**theirs, "model_type": "roberta"}
        config: RobertaConfig = super().config_from_hf(theirs)
        return replace(config, max_seq_len=config.max_seq_len - config.pad_id - 1)

    def config_to_hf(self) -> dict[str, Any]:
        return {**super().config_to_hf(), "max_position_embeddings": self.config.num_positions}


_LM_HEAD: tuple[Rule, ...] = (
    ("lm_head.dense.{p}", "mlm_head.dense.{p}"),
    *norm_rules("lm_head.layer_norm", "mlm_head.norm"),
    ("lm_head.bias", "mlm_head.bias"),
)
_LM_TIED = {
    "lm_head.decoder.weight": "roberta.embeddings.word_embeddings.weight",
    "lm_head.decoder.bias": "lm_head.bias",
}
_UNDER_HEAD = encoder_rules("roberta.", "roberta.")
_NO_POOLER: Rule = ("roberta.pooler.dense.{p}", None)


class Roberta(RobertaPretrained, Bert):
    r"""BERT's encoder with RoBERTa's positions: the first real token stands at `pad_id + 1`.

    $$\mathrm{position}_t = \begin{cases}
      \mathrm{pad} + \sum_{s \le t} \mathrm{mask}_s & \text{where } \mathrm{mask}_t = 1, \\
      \mathrm{pad} & \text{where the token is padding.} \end{cases}$$

    The places of the real tokens are counted, so that padding on the left shifts nothing. Everything
    else, arguments included, is `Bert`; there is one segment.

    Book: roberta-positions
    """

    hf_architecture = "RobertaModel"
    hf_weights = (
        *encoder_rules(),
        ("pooler.dense.{p}", "pooler.{p}"),
        # a pre-training checkpoint: the encoder stands under `roberta.`, and its head is not wanted
        *encoder_rules("roberta.", ""),
        ("roberta.pooler.dense.{p}", "pooler.{p}"),
        *((theirs, None) for theirs, _ in _LM_HEAD),
        *((theirs, None) for theirs in _LM_TIED),
    )
    config: RobertaConfig

    def __init__(self, config: RobertaConfig, *, pooler: bool = True) -> None:
        super().__init__(config, pooler=pooler)

    def positions(self, T: int, token_mask: Tensor | None) -> Tensor:
        """The position vectors: (T, D) where all tokens are real, (B, T, D) with a mask.

        Book: roberta-positions
        """
        pad = self.config.pad_id
        if token_mask is None:
            return self.pos_embed(T, start=pad + 1)
        return self.pos_embed.at(torch.where(token_mask, token_positions(token_mask) + pad + 1, pad))


class RobertaForMaskedLM(RobertaPretrained, nn.Module):
    """RoBERTa that fills in masked tokens, its only objective.

    Book: roberta-masking
    """

    hf_architecture = "RobertaForMaskedLM"
    hf_weights = (*_UNDER_HEAD, *_LM_HEAD, _NO_POOLER)
    hf_tied = _LM_TIED

    def __init__(self, config: RobertaConfig) -> None:
        super().__init__()
        self.config = config
        self.roberta = Roberta(config, pooler=False)
        self.mlm_head = MaskedLMHead(config)
        initialise(self.mlm_head)

    def forward(self, tokens: Tensor, *, token_mask: Tensor | None = None) -> Tensor:
        """Logits (B, T, V) of the token that belongs at each position; arguments as in `Bert`."""
        return self.mlm_head(self.roberta(tokens, token_mask=token_mask), self.roberta.token_embed)


class RobertaForSequenceClassification(EncoderClassifier, RobertaPretrained, nn.Module):
    r"""One class for each text, read from the first token: $W_C \tanh(W h_{<s>} + b) + b_C$.

    The dense layer belongs to the head. The encoder's own pooler was never trained, for want of a
    second objective.

    Book: roberta-heads
    """

    body, encoder_class = "roberta", Roberta
    hf_architecture = "RobertaForSequenceClassification"
    hf_weights = (
        *_UNDER_HEAD,
        ("classifier.dense.{p}", "dense.{p}"),
        ("classifier.out_proj.{p}", "classifier.{p}"),
    )

    def __init__(self, config: RobertaConfig, num_classes: int = 2) -> None:
        super().__init__()
        expect_classes(num_classes)
        self.config = config
        self.roberta = Roberta(config, pooler=False)
        self.dropout = nn.Dropout(config.dropout)
        self.dense = nn.Linear(config.d_model, config.d_model)
        self.classifier = nn.Linear(config.d_model, num_classes)
        initialise(self.dense)
        initialise(self.classifier)

    def forward(self, tokens: Tensor, *, token_mask: Tensor | None = None) -> Tensor:
        """Logits (B, C); arguments as in `Bert`. With padding on the left, `<s>` is not first: pad right."""
        first = self.roberta(tokens, token_mask=token_mask)[:, 0]  # (B, D)
        return self.classifier(self.dropout(self.dense(self.dropout(first)).tanh()))


class RobertaForTokenClassification(EncoderClassifier, RobertaPretrained, nn.Module):
    """One class for each token.

    Book: roberta-heads
    """

    body, encoder_class = "roberta", Roberta
    hf_architecture = "RobertaForTokenClassification"
    hf_weights = (*_UNDER_HEAD, ("classifier.{p}", "classifier.{p}"))

    def __init__(self, config: RobertaConfig, num_classes: int = 2) -> None:
        super().__init__()
        expect_classes(num_classes)
        self.config = config
        self.roberta = Roberta(config, pooler=False)
        self.dropout = nn.Dropout(config.dropout)
        self.classifier = nn.Linear(config.d_model, num_classes)
        initialise(self.classifier)

    def forward(self, tokens: Tensor, *, token_mask: Tensor | None = None) -> Tensor:
        """Logits (B, T, C); arguments as in `Bert`."""
        return self.classifier(self.dropout(self.roberta(tokens, token_mask=token_mask)))
