"""BERT: a stack of post-norm encoder blocks that reads a text in both directions.

In this file: the config and its published sizes, the block, the encoder, its heads, and the
table that maps published weights to ours.

B batch, T length, D d_model, H heads, V vocabulary, C classes.
Paper: Devlin et al. (2019). Reference: transformers.BertForPreTraining and its relatives.

Book: encoder-only
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from textbook_code.layers.attention import Attention
from textbook_code.layers.checks import expect_bool, expect_shape, expect_sizes
from textbook_code.layers.embeddings import TokenEmbedding
from textbook_code.layers.feed_forward import FeedForward
from textbook_code.layers.masks import key_mask
from textbook_code.layers.norms import LayerNorm
from textbook_code.layers.positions import LearnedPositions
from textbook_code.pretrained import Pretrained
from textbook_code.weights import Rule


@dataclass(frozen=True)
class EncoderConfig:
    """The sizes that BERT and the models built of its blocks share; the defaults are BERT-base's.

    Raises:
        ValueError: a size is not positive.

    Book: encoder-only
    """

    vocab_size: int = 30522
    d_model: int = 768
    num_layers: int = 12
    num_heads: int = 12
    d_ff: int = 3072
    max_seq_len: int = 512
    norm_eps: float = 1e-12
    dropout: float = 0.1
    attn_dropout: float = 0.1

    def __post_init__(self) -> None:
        expect_sizes(self)

    @classmethod
    def _sized(cls, num_layers: int, d_model: int, num_heads: int, **other: Any) -> Self:
        sizes = {"num_layers": num_layers, "d_model": d_model, "num_heads": num_heads, "d_ff": 4 * d_model}
        return cls(**{**sizes, **other})

    @property
    def num_positions(self) -> int:
        """Rows of the position table."""
        return self.max_seq_len

    @property
    def table_rows(self) -> int:
        """Rows of all embedding tables together: V + P (and the segments, where there are any)."""
        return self.vocab_size + self.num_positions

    def num_parameters(self) -> int:
        r"""Numbers to train, with the masked-language head and without a pooler.

        $$(R + 2)\,D + L\,(4D^2 + 2DF + 9D + F) + (D^2 + 3D + V),$$

        with R rows in all tables; the output table is the input table and counted once.

        Book: bert-block
        """
        D, F, V = self.d_model, self.d_ff, self.vocab_size
        block = 4 * D * D + 2 * D * F + 9 * D + F
        return (self.table_rows + 2) * D + self.num_layers * block + D * D + 3 * D + V

    def flops(self, T: int) -> int:
        r"""Operations of the matrix products in one forward pass of one text of T tokens, all T logits.

        $$T\,\big( L\,(8D^2 + 4DF + 4TD) + 2D^2 + 2DV \big);$$

        a multiply-add counts 2.

        Raises:
            ValueError: T is not between 1 and the longest sequence.

        Book: bert-block
        """
        if not 0 < T <= self.max_seq_len:
            raise ValueError(f"T: expected 1 to {self.max_seq_len} tokens (max_seq_len), got {T}")
        D, F, V = self.d_model, self.d_ff, self.vocab_size
        return T * (self.num_layers * (8 * D * D + 4 * D * F + 4 * T * D) + 2 * D * D + 2 * D * V)


@dataclass(frozen=True)
class SegmentedConfig(EncoderConfig):
    """The sizes of an encoder that is also told to which text of a pair a token belongs.

    Book: bert-embeddings
    """

    num_segments: int = 2

    @property
    def table_rows(self) -> int:
        """Rows of the tables of tokens, positions and segments together."""
        return super().table_rows + self.num_segments


@dataclass(frozen=True)
class BertConfig(SegmentedConfig):
    """The sizes of a BERT; the defaults are BERT-base, uncased.

    The smaller sizes are those of Turc et al. (2019), and MiniLM's of Wang et al. (2020).

    Raises:
        ValueError: a size is not positive.

    Book: encoder-only
    """

    @classmethod
    def bert_tiny(cls, **other: Any) -> Self:
        """2 layers of width 128."""
        return cls._sized(2, 128, 2, **other)

    @classmethod
    def bert_mini(cls, **other: Any) -> Self:
        """4 layers of width 256."""
        return cls._sized(4, 256, 4, **other)

    @classmethod
    def bert_small(cls, **other: Any) -> Self:
        """4 layers of width 512."""
        return cls._sized(4, 512, 8, **other)

    @classmethod
    def bert_medium(cls, **other: Any) -> Self:
        """8 layers of width 512."""
        return cls._sized(8, 512, 8, **other)

    @classmethod
    def bert_base(cls, **other: Any) -> Self:
        """12 layers of width 768."""
        return cls._sized(12, 768, 12, **other)

    @classmethod
    def bert_large(cls, **other: Any) -> Self:
        """24 layers of width 1024."""
        return cls._sized(24, 1024, 16, **other)

    @classmethod
    def minilm_l6(cls, **other: Any) -> Self:
        """6 layers of width 384 with 12 heads: the sentence encoder all-MiniLM-L6."""
        return cls._sized(6, 384, 12, **other)

    @classmethod
    def multilingual_e5_small(cls, **other: Any) -> Self:
        """12 layers of width 384 with the vocabulary of XLM-R: Wang et al. (2024)."""
        return cls._sized(12, 384, 12, **{"vocab_size": 250037, **other})


class Block(nn.Module):
    r"""One post-norm encoder block: add, then normalise, after each of its two halves.

    $$y = \mathrm{LN}(x + \mathrm{Attn}(x)), \qquad z = \mathrm{LN}(y + \mathrm{FFN}(y))$$

    Book: bert-block
    """

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.attn = Attention(config.d_model, config.num_heads, dropout=config.attn_dropout)
        self.attn_norm = LayerNorm(config.d_model, norm_eps=config.norm_eps)
        self.ffn = FeedForward(config.d_model, config.d_ff, activation="gelu")
        self.ffn_norm = LayerNorm(config.d_model, norm_eps=config.norm_eps)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self, x: Tensor, *, attn_mask: Tensor | None = None, need_weights: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Map (B, T, D) to (B, T, D), and the weights (B, H, T, T) where they are wanted."""
        if need_weights:
            attended, weights = self.attn(x, attn_mask=attn_mask, need_weights=True)
        else:
            attended, weights = self.attn(x, attn_mask=attn_mask), None
        x = self.attn_norm(x + self.dropout(attended))
        return self.ffn_norm(x + self.dropout(self.ffn(x))), weights


def encoder_rules(theirs: str = "", ours: str = "") -> tuple[Rule, ...]:
    """Their names and ours, each under a prefix where the encoder is part of a larger model.

    Book: bert-weights
    """
    layer, block = theirs + "encoder.layer.{i}.", ours + "blocks.{i}."
    return (
        (theirs + "embeddings.word_embeddings.weight", ours + "token_embed.weight"),
        (theirs + "embeddings.position_embeddings.weight", ours + "pos_embed.weight"),
        (theirs + "embeddings.token_type_embeddings.weight", ours + "segment_embed.weight"),
        (theirs + "embeddings.position_ids", None),  # 0, 1, 2, …: stored by old versions
        *norm_rules(theirs + "embeddings.LayerNorm", ours + "embed_norm"),
        (layer + "attention.self.query.{p}", block + "attn.q_proj.{p}"),
        (layer + "attention.self.key.{p}", block + "attn.k_proj.{p}"),
        (layer + "attention.self.value.{p}", block + "attn.v_proj.{p}"),
        (layer + "attention.output.dense.{p}", block + "attn.out_proj.{p}"),
        *norm_rules(layer + "attention.output.LayerNorm", block + "attn_norm"),
        (layer + "intermediate.dense.{p}", block + "ffn.fc1.{p}"),
        (layer + "output.dense.{p}", block + "ffn.fc2.{p}"),
        *norm_rules(layer + "output.LayerNorm", block + "ffn_norm"),
    )


def norm_rules(theirs: str, ours: str) -> tuple[Rule, ...]:
    """γ and β are `weight` and `bias`; the first released checkpoints call them by their Greek names.

    Book: bert-weights
    """
    return (
        (theirs + ".weight", ours + ".weight"),
        (theirs + ".bias", ours + ".bias"),
        (theirs + ".gamma", ours + ".weight"),
        (theirs + ".beta", ours + ".bias"),
    )


_POOLER: Rule = ("pooler.dense.{p}", "pooler.{p}")
_POOLER_UNDER_HEAD: Rule = ("bert.pooler.dense.{p}", "bert.pooler.{p}")
_NO_POOLER: Rule = ("bert.pooler.dense.{p}", None)
_NSP_HEAD: Rule = ("cls.seq_relationship.{p}", "nsp_head.{p}")
_NO_NSP_HEAD: Rule = ("cls.seq_relationship.{p}", None)
_CLASSIFIER: Rule = ("classifier.{p}", "classifier.{p}")
_MLM_HEAD: tuple[Rule, ...] = (
    ("cls.predictions.transform.dense.{p}", "mlm_head.dense.{p}"),
    *norm_rules("cls.predictions.transform.LayerNorm", "mlm_head.norm"),
    ("cls.predictions.bias", "mlm_head.bias"),
)
_MLM_TIED = {
    "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
    "cls.predictions.decoder.bias": "cls.predictions.bias",
}


class BertPretrained(Pretrained):
    """The published names of BERT's sizes, and what its code takes for granted.

    Book: bert-weights
    """

    config_class: ClassVar[type[SegmentedConfig]] = BertConfig
    hf_config: ClassVar[dict[str, str]] = {
        "vocab_size": "vocab_size",
        "d_model": "hidden_size",
        "num_layers": "num_hidden_layers",
        "num_heads": "num_attention_heads",
        "d_ff": "intermediate_size",
        "max_seq_len": "max_position_embeddings",
        "num_segments": "type_vocab_size",
        "norm_eps": "layer_norm_eps",
        "dropout": "hidden_dropout_prob",
        "attn_dropout": "attention_probs_dropout_prob",
    }
    hf_assumes: ClassVar[dict[str, Any]] = {
        "model_type": "bert",
        "hidden_act": "gelu",
        "position_embedding_type": "absolute",
        "is_decoder": False,
    }


class Bert(BertPretrained, nn.Module):
    r"""The encoder: embeddings, a norm, and `num_layers` post-norm blocks.

    $$x = \mathrm{LN}(E_{\mathrm{token}} + E_{\mathrm{position}} + E_{\mathrm{segment}}), \qquad
      \text{then each block in turn.}$$

    Args:
        config: the sizes.
        pooler: whether the linear map of the [CLS] pooler exists.

    Book: encoder-only
    """

    hf_architecture = "BertModel"
    hf_weights = (
        *encoder_rules(),
        _POOLER,
        # a pre-training checkpoint: the encoder stands under `bert.`, and its heads are not wanted
        *encoder_rules("bert.", ""),
        ("bert.pooler.dense.{p}", "pooler.{p}"),
        *((theirs, None) for theirs, _ in _MLM_HEAD),
        *((theirs, None) for theirs in _MLM_TIED),
        _NO_NSP_HEAD,
    )

    def __init__(self, config: SegmentedConfig, *, pooler: bool = True) -> None:
        super().__init__()
        self.config = config
        self.token_embed = TokenEmbedding(config.vocab_size, config.d_model)
        self.pos_embed = LearnedPositions(config.num_positions, config.d_model)
        self.segment_embed = TokenEmbedding(config.num_segments, config.d_model)
        self.embed_norm = LayerNorm(config.d_model, norm_eps=config.norm_eps)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.pooler = nn.Linear(config.d_model, config.d_model) if pooler else None
        initialise(self)

    def forward(
        self,
        tokens: Tensor,
        *,
        token_mask: Tensor | None = None,
        segments: Tensor | None = None,
        need_weights: bool = False,
    ) -> Tensor | tuple[Tensor, list[Tensor]]:
        """Encode a batch of texts.

        Args:
            tokens: (B, T) integer ids.
            token_mask: (B, T) bool, True = real token; all are real when left out.
            segments: (B, T) integers, 0 for the first text of a pair and 1 for the second; all 0
                when left out.
            need_weights: also return each layer's attention weights.

        Returns:
            Hidden states (B, T, D); with `need_weights` also a list of (B, H, T, T).

        Raises:
            TypeError: ids that are not integers, a mask that is not boolean.
            ValueError: an id outside its table, a text longer than the position table, or
                shapes that do not fit.

        Book: encoder-only
        """
        attn_mask = check_texts(tokens, token_mask, self.config.max_seq_len)
        B, T = tokens.shape
        if segments is None:
            segments = torch.zeros_like(tokens)
        expect_shape("segments", segments, "B T", B=B, T=T)

        positions = self.positions(T, token_mask)
        x = self.token_embed(tokens) + positions + self.segment_embed(segments, name="segments")
        x = self.dropout(self.embed_norm(x))  # (B, T, D)
        collected = []
        for block in self.blocks:
            x, weights = block(x, attn_mask=attn_mask, need_weights=need_weights)
            collected.append(weights)
        return (x, collected) if need_weights else x

    def positions(self, T: int, token_mask: Tensor | None) -> Tensor:
        """The position vectors, (T, D): row t for the t-th place, whatever stands there.

        Book: bert-embeddings
        """
        return self.pos_embed(T)

    def pool(self, hidden: Tensor) -> Tensor:
        r"""Summarise a text by its first token: $\tanh(W h_{[\mathrm{CLS}]} + b)$, (B, T, D) → (B, D).

        Raises:
            ValueError: the model was built without a pooler, or the shape does not fit.

        Book: bert-heads
        """
        expect_shape("hidden", hidden, "B T D", D=self.config.d_model)
        if self.pooler is None:
            raise ValueError("pooler: this Bert was built with pooler=False")
        return self.pooler(hidden[:, 0]).tanh()


def check_texts(tokens: Tensor, token_mask: Tensor | None, max_seq_len: int) -> Tensor | None:
    """Check a batch of texts (B, T) and its mask; returns who may be attended to, (B, 1, 1, T), or None.

    Raises:
        TypeError: a mask that is not boolean.
        ValueError: a text that is empty or too long, or shapes that do not fit.

    Book: bert-embeddings
    """
    expect_shape("tokens", tokens, "B T")
    B, T = tokens.shape
    if not 0 < T <= max_seq_len:
        raise ValueError(f"tokens: expected 1 to {max_seq_len} positions (max_seq_len), got {T}")
    if token_mask is None:
        return None
    expect_bool("token_mask", token_mask)
    expect_shape("token_mask", token_mask, "B T", B=B, T=T)
    return key_mask(token_mask)


def initialise(model: nn.Module) -> None:
    """Draw every matrix and table from N(0, 0.02²); biases 0, norms 1. In place.

    Paper: Devlin et al. (2019) follow GPT-1 here.

    Book: bert-block
    """
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Embedding | LearnedPositions):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)


def mean_pool(hidden: Tensor, token_mask: Tensor) -> Tensor:
    """Average the hidden states of the real tokens, as sentence encoders do.

    Args:
        hidden: (B, T, D).
        token_mask: (B, T) bool, True = real token.

    Returns:
        (B, D); a text without a single real token gives zeros.

    Raises:
        TypeError: the mask is not boolean.
        ValueError: shapes do not fit.

    Book: bert-real
    """
    expect_shape("hidden", hidden, "B T D")
    expect_bool("token_mask", token_mask)
    expect_shape("token_mask", token_mask, "B T", B=hidden.size(0), T=hidden.size(1))
    real = token_mask.unsqueeze(-1).to(hidden.dtype)  # (B, T, 1)
    return (hidden * real).sum(1) / real.sum(1).clamp(min=1)


class MaskedLMHead(nn.Module):
    """Score every word of the vocabulary at each position: dense, GELU, norm, tied table, bias.

    Book: bert-heads
    """

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.d_model, config.d_model)
        self.norm = LayerNorm(config.d_model, norm_eps=config.norm_eps)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def forward(self, hidden: Tensor, token_embed: TokenEmbedding) -> Tensor:
        """(…, D) → logits (…, V), scored against the input table."""
        return token_embed.attend(self.norm(F.gelu(self.dense(hidden)))) + self.bias


class BertForMaskedLM(BertPretrained, nn.Module):
    """BERT that fills in masked tokens.

    Book: bert-mlm
    """

    hf_architecture = "BertForMaskedLM"
    hf_weights = (*encoder_rules("bert.", "bert."), *_MLM_HEAD, _NO_POOLER, _NO_NSP_HEAD)
    hf_tied = _MLM_TIED

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.config = config
        self.bert = Bert(config, pooler=False)
        self.mlm_head = MaskedLMHead(config)
        initialise(self.mlm_head)

    def forward(
        self, tokens: Tensor, *, token_mask: Tensor | None = None, segments: Tensor | None = None
    ) -> Tensor:
        """Logits (B, T, V) of the token that belongs at each position; arguments as in `Bert`."""
        hidden = self.bert(tokens, token_mask=token_mask, segments=segments)
        return self.mlm_head(hidden, self.bert.token_embed)


class BertForPreTraining(BertPretrained, nn.Module):
    """BERT as it was pre-trained: masked tokens, and whether the second text follows the first.

    Book: bert-heads
    """

    hf_architecture = "BertForPreTraining"
    hf_weights = (*encoder_rules("bert.", "bert."), _POOLER_UNDER_HEAD, *_MLM_HEAD, _NSP_HEAD)
    hf_tied = _MLM_TIED

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.config = config
        self.bert = Bert(config)
        self.mlm_head = MaskedLMHead(config)
        self.nsp_head = nn.Linear(config.d_model, 2)
        initialise(self.mlm_head)
        initialise(self.nsp_head)

    def forward(
        self, tokens: Tensor, *, token_mask: Tensor | None = None, segments: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Logits (B, T, V) over the vocabulary, and (B, 2) for *follows*, *does not follow*."""
        hidden = self.bert(tokens, token_mask=token_mask, segments=segments)
        return self.mlm_head(hidden, self.bert.token_embed), self.nsp_head(self.bert.pool(hidden))


class EncoderClassifier(Pretrained):
    """What classifiers on an encoder share: the number of classes, and being put on a trained encoder.

    A subclass takes `(config, num_classes)`, keeps an encoder of the class `encoder_class` as the
    attribute that `body` names, and ends in `self.classifier`.

    Book: bert-heads
    """

    body: ClassVar[str]
    encoder_class: ClassVar[type[nn.Module]]
    classifier: nn.Linear

    @classmethod
    def from_encoder(cls, encoder: Any, num_classes: int) -> Self:
        """Put a new, untrained head on a trained encoder, whose parts are shared, not copied.

        Raises:
            TypeError: the encoder is not of the family that the head belongs to.
            ValueError: the head needs a pooler and the encoder has none.

        Book: bert-finetune
        """
        if type(encoder) is not cls.encoder_class:
            expected = f"expected a {cls.encoder_class.__name__} for {cls.__name__}"
            raise TypeError(f"{cls.body}: {expected}, got {type(encoder).__name__}")
        model = cls(encoder.config, num_classes)
        shell: nn.Module = getattr(model, cls.body)
        weight: Tensor = encoder.get_parameter("token_embed.weight")
        model.to(device=weight.device, dtype=weight.dtype)
        for name, _ in shell.named_children():
            if (part := getattr(encoder, name)) is None:
                raise ValueError(
                    f"{cls.body}: expected an encoder with a {name} for {cls.__name__}, got one without"
                )
            setattr(shell, name, part)
        return model

    @classmethod
    def from_hf_config(cls, theirs: Mapping[str, Any]) -> Self:
        """As in `Pretrained`, with as many classes as the published config names (2 if it names none)."""
        return cls(cls.config_from_hf(theirs), num_classes=len(theirs.get("id2label", (0, 1))))

    def config_to_hf(self) -> dict[str, Any]:
        labels = {str(i): f"LABEL_{i}" for i in range(self.classifier.out_features)}
        return {
            **super().config_to_hf(),
            "id2label": labels,
            "label2id": {v: int(k) for k, v in labels.items()},
        }


def expect_classes(num_classes: int) -> None:
    """Raise unless there are at least two classes to tell apart.

    Raises:
        ValueError: there are fewer.

    Book: bert-heads
    """
    if num_classes < 2:
        raise ValueError(f"num_classes: expected at least 2, got {num_classes}")


class _BertClassifier(EncoderClassifier, BertPretrained, nn.Module):
    """BERT with a dropout and one linear map to classes."""

    body, encoder_class = "bert", Bert
    pooler: ClassVar[bool]

    def __init__(self, config: BertConfig, num_classes: int = 2) -> None:
        super().__init__()
        expect_classes(num_classes)
        self.config = config
        self.bert = Bert(config, pooler=self.pooler)
        self.dropout = nn.Dropout(config.dropout)
        self.classifier = nn.Linear(config.d_model, num_classes)
        initialise(self.classifier)


class BertForSequenceClassification(_BertClassifier):
    """One class for each text, read from the [CLS] pooler.

    Book: bert-finetune
    """

    hf_architecture = "BertForSequenceClassification"
    hf_weights = (*encoder_rules("bert.", "bert."), _POOLER_UNDER_HEAD, _CLASSIFIER)
    pooler = True

    def forward(
        self, tokens: Tensor, *, token_mask: Tensor | None = None, segments: Tensor | None = None
    ) -> Tensor:
        """Logits (B, C); arguments as in `Bert`."""
        hidden = self.bert(tokens, token_mask=token_mask, segments=segments)
        return self.classifier(self.dropout(self.bert.pool(hidden)))


class BertForTokenClassification(_BertClassifier):
    """One class for each token.

    Book: bert-heads
    """

    hf_architecture = "BertForTokenClassification"
    hf_weights = (*encoder_rules("bert.", "bert."), _CLASSIFIER)
    pooler = False

    def forward(
        self, tokens: Tensor, *, token_mask: Tensor | None = None, segments: Tensor | None = None
    ) -> Tensor:
        """Logits (B, T, C); arguments as in `Bert`."""
        hidden = self.bert(tokens, token_mask=token_mask, segments=segments)
        return self.classifier(self.dropout(hidden))
