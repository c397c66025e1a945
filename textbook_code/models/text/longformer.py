"""Longformer: RoBERTa's encoder with windows and a few global tokens in place of full attention.

In this file: the config and its published sizes, the block, the encoder, its heads, the table that maps
published weights to ours, and the way a trained RoBERTa is made longer. Everything that is not attention is
`Roberta`.

B batch, T length, D d_model, V vocabulary, C classes.
Paper: Beltagy et al. (2020). Reference: transformers.LongformerForMaskedLM and its relatives.

Book: sparse-longformer
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from textbook_code.layers.checks import expect_bool, expect_shape
from textbook_code.layers.feed_forward import FeedForward
from textbook_code.layers.norms import LayerNorm
from textbook_code.layers.sparse_attention import LongformerAttention
from textbook_code.models.text.bert import (
    EncoderClassifier,
    MaskedLMHead,
    check_texts,
    encoder_rules,
    expect_classes,
    initialise,
    norm_rules,
)
from textbook_code.models.text.roberta import Roberta, RobertaConfig, RobertaPretrained
from textbook_code.weights import Rule


@dataclass(frozen=True)
class LongformerConfig(RobertaConfig):
    """The sizes of a Longformer; the defaults are Longformer-base's.

    `windows` has the window w of each layer, half of it to either side.

    Raises:
        ValueError: a size is not positive, or there are not as many windows as layers.

    Book: sparse-longformer
    """

    max_seq_len: int = 4096
    windows: tuple[int, ...] = (512,) * 12

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.windows) != self.num_layers:
            raise ValueError(
                f"windows: expected one for each of {self.num_layers} layers, got {self.windows}"
            )

    @classmethod
    def longformer_base(cls, **other: Any) -> Self:
        """12 layers of width 768, windows of 512."""
        return cls._sized(12, 768, 12, **other)

    @classmethod
    def longformer_large(cls, **other: Any) -> Self:
        """24 layers of width 1024, windows of 512."""
        return cls._sized(24, 1024, 16, **{"windows": (512,) * 24, **other})

    def num_parameters(self) -> int:
        """RoBERTa's, and three projections more in each layer: L (3 D² + 3 D).

        Book: sparse-longformer
        """
        return super().num_parameters() + self.num_layers * 3 * (self.d_model**2 + self.d_model)

    def flops(self, T: int, num_global: int = 1) -> int:
        r"""Operations of the matrix products in one forward pass of one text of T tokens, all T logits.

        As a BERT's, with 3w/2 + G keys a query in place of T, with the keys and values of the G global
        tokens' rows and with those rows; T is taken as a multiple of w/2.

        Raises:
            ValueError: T is not between 1 and the longest sequence.

        Book: sparse-longformer
        """
        D, G = self.d_model, num_global
        total = super().flops(T) - self.num_layers * 4 * T * T * D
        for w in self.windows:
            total += 4 * T * D * (3 * w // 2 + G)
            total += (4 * T * D * D + 2 * G * D * D + 4 * G * T * D) if G else 0
        return total


class Block(nn.Module):
    r"""BERT's block with the Longformer's attention.

    $$y = \mathrm{LN}(x + \mathrm{Attn}(x)), \qquad z = \mathrm{LN}(y + \mathrm{FFN}(y))$$

    Book: sparse-longformer
    """

    def __init__(self, config: LongformerConfig, window: int) -> None:
        super().__init__()
        self.attn = LongformerAttention(
            config.d_model, config.num_heads, window=window, dropout=config.attn_dropout
        )
        self.attn_norm = LayerNorm(config.d_model, norm_eps=config.norm_eps)
        self.ffn = FeedForward(config.d_model, config.d_ff, activation="gelu")
        self.ffn_norm = LayerNorm(config.d_model, norm_eps=config.norm_eps)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, *, token_mask: Tensor | None, global_mask: Tensor | None) -> Tensor:
        """Map (B, T, D) to (B, T, D)."""
        x = self.attn_norm(x + self.dropout(self.attn(x, token_mask=token_mask, global_mask=global_mask)))
        return self.ffn_norm(x + self.dropout(self.ffn(x)))


def longformer_rules(theirs: str = "", ours: str = "") -> tuple[Rule, ...]:
    """BERT's names, and those of the projections of the global tokens.

    Book: sparse-longformer
    """
    layer, block = theirs + "encoder.layer.{i}.attention.self.", ours + "blocks.{i}.attn."
    return (
        *encoder_rules(theirs, ours),
        (layer + "query_global.{p}", block + "q_global_proj.{p}"),
        (layer + "key_global.{p}", block + "k_global_proj.{p}"),
        (layer + "value_global.{p}", block + "v_global_proj.{p}"),
    )


class _LongformerPretrained(RobertaPretrained):
    config_class = LongformerConfig
    hf_config: ClassVar[dict[str, str]] = {**RobertaPretrained.hf_config, "windows": "attention_window"}
    hf_assumes: ClassVar[dict[str, Any]] = {
        "model_type": "longformer",
        "hidden_act": "gelu",
        "position_embedding_type": "absolute",
    }

    @classmethod
    def config_from_hf(cls, theirs: Mapping[str, Any]) -> LongformerConfig:
        """As RoBERTa's; one window may stand for all layers."""
        windows = theirs.get("attention_window")
        if windows is not None:
            each = [windows] * theirs["num_hidden_layers"] if isinstance(windows, int) else windows
            theirs = {**theirs, "attention_window": tuple(each)}
        config: LongformerConfig = super().config_from_hf(theirs)  # type: ignore[assignment]
        return config

    def config_to_hf(self) -> dict[str, Any]:
        return {**super().config_to_hf(), "attention_window": list(self.config.windows)}


_LM_HEAD: tuple[Rule, ...] = (
    ("lm_head.dense.{p}", "mlm_head.dense.{p}"),
    *norm_rules("lm_head.layer_norm", "mlm_head.norm"),
    ("lm_head.bias", "mlm_head.bias"),
)
_LM_TIED = {
    "lm_head.decoder.weight": "longformer.embeddings.word_embeddings.weight",
    "lm_head.decoder.bias": "lm_head.bias",
}
_UNDER_HEAD = longformer_rules("longformer.", "longformer.")


class Longformer(_LongformerPretrained, Roberta):
    r"""RoBERTa's embeddings and positions, and blocks that attend to windows and global tokens.

    The text may have any length up to `max_seq_len`: the attention fills its last chunk up by itself.

    Book: sparse-longformer
    """

    hf_architecture = "LongformerModel"
    hf_weights = (
        *longformer_rules(),
        ("pooler.dense.{p}", "pooler.{p}"),
        # a pre-training checkpoint: the encoder stands under `longformer.`, and its head is not wanted
        *longformer_rules("longformer.", ""),
        *((theirs, None) for theirs, _ in _LM_HEAD),
        *((theirs, None) for theirs in _LM_TIED),
    )
    config: LongformerConfig

    def __init__(self, config: LongformerConfig, *, pooler: bool = True) -> None:
        super().__init__(config, pooler=pooler)
        self.blocks = nn.ModuleList(Block(config, window) for window in config.windows)
        initialise(self.blocks)

    def forward(  # type: ignore[override]  # it has global tokens, and no weights to show
        self,
        tokens: Tensor,
        *,
        token_mask: Tensor | None = None,
        global_mask: Tensor | None = None,
        segments: Tensor | None = None,
    ) -> Tensor:
        """Encode a batch of texts.

        Args:
            tokens: (B, T) integer ids.
            token_mask: (B, T) bool, True = real token; all are real when left out.
            global_mask: (B, T) bool, True = sees all and is seen by all; none when left out.
            segments: (B, T) integers; all 0 when left out.

        Returns:
            Hidden states (B, T, D).

        Raises:
            TypeError: ids that are not integers, a mask that is not boolean.
            ValueError: an id outside its table, a text longer than the position table, or shapes that
                do not fit.

        Book: sparse-longformer
        """
        check_texts(tokens, token_mask, self.config.max_seq_len)
        B, T = tokens.shape
        if global_mask is not None:
            expect_bool("global_mask", global_mask)
            expect_shape("global_mask", global_mask, "B T", B=B, T=T)
        if segments is None:
            segments = torch.zeros_like(tokens)
        expect_shape("segments", segments, "B T", B=B, T=T)

        positions = self.positions(T, token_mask)
        x = self.token_embed(tokens) + positions + self.segment_embed(segments, name="segments")
        x = self.dropout(self.embed_norm(x))  # (B, T, D)
        for block in self.blocks:
            x = block(x, token_mask=token_mask, global_mask=global_mask)
        return x

    @classmethod
    @torch.no_grad()
    def from_roberta(cls, roberta: Roberta, *, max_seq_len: int, window: int) -> Self:
        """Make a trained RoBERTa longer, as the Longformer was begun: no weight is drawn.

        The rows of real positions are copied one after the other until `max_seq_len` is full, those of
        padding once; the global projections start as the local ones.

        Args:
            roberta: the trained encoder.
            max_seq_len: of the new one, as many tokens as RoBERTa's or more.
            window: w of each layer.

        Raises:
            ValueError: it would become shorter, or the window is odd.

        Book: sparse-longformer
        """
        old = roberta.config
        if max_seq_len < old.max_seq_len:
            raise ValueError(
                f"max_seq_len: expected at least {old.max_seq_len}, RoBERTa's, got {max_seq_len}"
            )
        sizes = {**vars(old), "max_seq_len": max_seq_len, "windows": (window,) * old.num_layers}
        model = cls(LongformerConfig(**sizes), pooler=roberta.pooler is not None)
        weights = dict(roberta.state_dict())
        table, skipped = weights["pos_embed.weight"], old.pad_id + 1
        copies = -(-max_seq_len // old.max_seq_len)
        rows = table[skipped:].repeat(copies, 1)[:max_seq_len]
        weights["pos_embed.weight"] = torch.cat([table[:skipped], rows])
        for i in range(old.num_layers):
            for x in "qkv":
                for p in ("weight", "bias"):
                    weights[f"blocks.{i}.attn.{x}_global_proj.{p}"] = weights[f"blocks.{i}.attn.{x}_proj.{p}"]
        model.to(table.dtype).load_state_dict(weights)
        return model.eval()


class LongformerForMaskedLM(_LongformerPretrained, nn.Module):
    """Longformer that fills in masked tokens.

    Book: sparse-longformer
    """

    hf_architecture = "LongformerForMaskedLM"
    hf_weights = (*_UNDER_HEAD, *_LM_HEAD)
    hf_tied = _LM_TIED

    def __init__(self, config: LongformerConfig) -> None:
        super().__init__()
        self.config = config
        self.longformer = Longformer(config, pooler=False)
        self.mlm_head = MaskedLMHead(config)
        initialise(self.mlm_head)

    def forward(
        self, tokens: Tensor, *, token_mask: Tensor | None = None, global_mask: Tensor | None = None
    ) -> Tensor:
        """Logits (B, T, V) of the token that belongs at each position; arguments as in `Longformer`."""
        hidden = self.longformer(tokens, token_mask=token_mask, global_mask=global_mask)
        return self.mlm_head(hidden, self.longformer.token_embed)


class LongformerForSequenceClassification(EncoderClassifier, _LongformerPretrained, nn.Module):
    r"""One class for each text, read from the first token, which is global: $W_C \tanh(W h_{<s>} + b) + b_C$.

    Book: sparse-longformer
    """

    body, encoder_class = "longformer", Longformer
    hf_architecture = "LongformerForSequenceClassification"
    hf_weights = (
        *_UNDER_HEAD,
        ("classifier.dense.{p}", "dense.{p}"),
        ("classifier.out_proj.{p}", "classifier.{p}"),
    )

    def __init__(self, config: LongformerConfig, num_classes: int = 2) -> None:
        super().__init__()
        expect_classes(num_classes)
        self.config = config
        self.longformer = Longformer(config, pooler=False)
        self.dropout = nn.Dropout(config.dropout)
        self.dense = nn.Linear(config.d_model, config.d_model)
        self.classifier = nn.Linear(config.d_model, num_classes)
        initialise(self.dense)
        initialise(self.classifier)

    def forward(
        self, tokens: Tensor, *, token_mask: Tensor | None = None, global_mask: Tensor | None = None
    ) -> Tensor:
        """Logits (B, C); the first token is global where no mask says otherwise."""
        if global_mask is None:
            global_mask = torch.zeros_like(tokens, dtype=torch.bool)
            global_mask[:, 0] = True
        first = self.longformer(tokens, token_mask=token_mask, global_mask=global_mask)[:, 0]  # (B, D)
        return self.classifier(self.dropout(self.dense(self.dropout(first)).tanh()))
