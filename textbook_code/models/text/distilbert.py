"""DistilBERT: half of BERT's layers, initialised from BERT and trained to answer like it.

In this file: the config, the block, the encoder, its heads, how a student is made from its teacher,
and the table that maps published weights to ours. The losses are in `training.distillation`.

B batch, T length, D d_model, V vocabulary, C classes.
Paper: Sanh et al. (2019). Reference: transformers.DistilBertForMaskedLM and its relatives.

Book: encoder-family
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from textbook_code.layers.attention import Attention
from textbook_code.layers.embeddings import TokenEmbedding
from textbook_code.layers.feed_forward import FeedForward
from textbook_code.layers.norms import LayerNorm
from textbook_code.layers.positions import LearnedPositions
from textbook_code.models.text.bert import (
    Bert,
    BertForMaskedLM,
    EncoderClassifier,
    EncoderConfig,
    MaskedLMHead,
    check_texts,
    expect_classes,
    initialise,
    norm_rules,
)
from textbook_code.pretrained import Pretrained
from textbook_code.weights import Rule, WeightError

_EPS = 1e-12  # the published code has it as a constant, and its config no field for it


@dataclass(frozen=True)
class DistilBertConfig(EncoderConfig):
    """The sizes of a DistilBERT; the defaults are DistilBERT-base, uncased.

    Raises:
        ValueError: a size is not positive.

    Book: distilbert-student
    """

    num_layers: int = 6
    classifier_dropout: float = 0.2

    @classmethod
    def distilbert_base(cls, **other: Any) -> Self:
        """6 layers of width 768: every second one of BERT-base."""
        return cls._sized(6, 768, 12, **other)


class _DistilBertPretrained(Pretrained):
    config_class = DistilBertConfig
    hf_config: ClassVar[dict[str, str]] = {
        "vocab_size": "vocab_size",
        "d_model": "dim",
        "num_layers": "n_layers",
        "num_heads": "n_heads",
        "d_ff": "hidden_dim",
        "max_seq_len": "max_position_embeddings",
        "dropout": "dropout",
        "attn_dropout": "attention_dropout",
        "classifier_dropout": "seq_classif_dropout",
    }
    hf_assumes: ClassVar[dict[str, Any]] = {
        "model_type": "distilbert",
        "activation": "gelu",
        "sinusoidal_pos_embds": False,
    }

    @classmethod
    def config_from_hf(cls, theirs: Mapping[str, Any]) -> DistilBertConfig:
        """As in `Pretrained`; a dropout that is not named is the published one."""
        ours = DistilBertConfig()
        named = {key: getattr(ours, field) for field, key in cls.hf_config.items() if "dropout" in field}
        config: DistilBertConfig = super().config_from_hf({**named, **theirs})
        return config

    def config_to_hf(self) -> dict[str, Any]:
        if self.config.norm_eps != _EPS:
            raise WeightError(
                f"config: the published format of DistilBERT knows norm_eps = {_EPS} only, "
                f"this model has {self.config.norm_eps}"
            )
        return super().config_to_hf()


def _encoder_rules(theirs: str = "", ours: str = "") -> tuple[Rule, ...]:
    """Their names and ours, each under a prefix where the encoder is part of a larger model."""
    layer, block = theirs + "transformer.layer.{i}.", ours + "blocks.{i}."
    return (
        (theirs + "embeddings.word_embeddings.weight", ours + "token_embed.weight"),
        (theirs + "embeddings.position_embeddings.weight", ours + "pos_embed.weight"),
        (theirs + "embeddings.position_ids", None),  # 0, 1, 2, …: stored by old versions
        *norm_rules(theirs + "embeddings.LayerNorm", ours + "embed_norm"),
        (layer + "attention.q_lin.{p}", block + "attn.q_proj.{p}"),
        (layer + "attention.k_lin.{p}", block + "attn.k_proj.{p}"),
        (layer + "attention.v_lin.{p}", block + "attn.v_proj.{p}"),
        (layer + "attention.out_lin.{p}", block + "attn.out_proj.{p}"),
        *norm_rules(layer + "sa_layer_norm", block + "attn_norm"),
        (layer + "ffn.lin1.{p}", block + "ffn.fc1.{p}"),
        (layer + "ffn.lin2.{p}", block + "ffn.fc2.{p}"),
        *norm_rules(layer + "output_layer_norm", block + "ffn_norm"),
    )


_UNDER_HEAD = _encoder_rules("distilbert.", "distilbert.")
_MLM_HEAD: tuple[Rule, ...] = (
    ("vocab_transform.{p}", "mlm_head.dense.{p}"),
    *norm_rules("vocab_layer_norm", "mlm_head.norm"),
    ("vocab_projector.bias", "mlm_head.bias"),
)
_MLM_TIED = {"vocab_projector.weight": "distilbert.embeddings.word_embeddings.weight"}


class DistilBlock(nn.Module):
    r"""BERT's post-norm block, without its dropout on what the attention adds.

    $$y = \mathrm{LN}(x + \mathrm{Attn}(x)), \qquad z = \mathrm{LN}(y + \mathrm{FFN}(y))$$

    The parts and their names are those of `bert.Block`, so that the weights of one fit the other.

    Book: distilbert-student
    """

    def __init__(self, config: DistilBertConfig) -> None:
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
        x = self.attn_norm(x + attended)
        return self.ffn_norm(x + self.dropout(self.ffn(x))), weights


def teacher_layers(num_teacher: int, num_student: int) -> tuple[int, ...]:
    r"""Which of the teacher's layers the student starts from: evenly spaced, both ends among them.

    $$\ell_i = \mathrm{round}\left( i\, \frac{L - 1}{l - 1} \right), \qquad i = 0, \ldots, l - 1.$$

    For 12 and 6 these are 0, 2, 4, 7, 9 and 11, the published choice: one layer out of two. A student of
    one layer starts from layer 0.

    Raises:
        ValueError: the student is not between 1 layer and as many as the teacher.

    Book: distilbert-student
    """
    if not 1 <= num_student <= num_teacher:
        raise ValueError(f"num_student: expected 1 to {num_teacher} layers, got {num_student}")
    step = (num_teacher - 1) / max(num_student - 1, 1)
    return tuple(int(i * step + 0.5) for i in range(num_student))


def _student_config(teacher: EncoderConfig, num_layers: int) -> DistilBertConfig:
    shared = {field.name: getattr(teacher, field.name) for field in fields(EncoderConfig)}
    return DistilBertConfig(**{**shared, "num_layers": num_layers})


def _copy(part: nn.Module, into: nn.Module) -> None:
    into.load_state_dict(part.state_dict())


class DistilBert(_DistilBertPretrained, nn.Module):
    r"""The encoder: two tables, a norm, and the blocks; no segments and no pooler.

    $$x = \mathrm{LN}(E_{\mathrm{token}} + E_{\mathrm{position}}), \qquad \text{then each block in turn.}$$

    Book: distilbert-student
    """

    hf_architecture = "DistilBertModel"
    hf_weights = (
        *_encoder_rules(),
        # a pre-training checkpoint: the encoder stands under `distilbert.`, and its head is not wanted
        *_encoder_rules("distilbert.", ""),
        *((theirs, None) for theirs, _ in _MLM_HEAD),
        *((theirs, None) for theirs in _MLM_TIED),
    )

    def __init__(self, config: DistilBertConfig) -> None:
        super().__init__()
        self.config = config
        self.token_embed = TokenEmbedding(config.vocab_size, config.d_model)
        self.pos_embed = LearnedPositions(config.num_positions, config.d_model)
        self.embed_norm = LayerNorm(config.d_model, norm_eps=config.norm_eps)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(DistilBlock(config) for _ in range(config.num_layers))
        initialise(self)

    @classmethod
    def from_teacher(cls, teacher: Bert, *, layers: Sequence[int] | None = None) -> Self:
        """A student that starts with copies of the teacher's tables and of some of its layers.

        The teacher's segments and pooler are left behind, as published.

        Args:
            teacher: the encoder to learn from.
            layers: which of its blocks are copied, in this order; `teacher_layers` for half as many
                when left out.

        Raises:
            ValueError: a layer that the teacher does not have.

        Book: distilbert-student
        """
        num_teacher = len(teacher.blocks)
        if layers is None:
            layers = teacher_layers(num_teacher, max(1, num_teacher // 2))
        unknown = [layer for layer in layers if not 0 <= layer < num_teacher]
        if unknown or not layers:
            raise ValueError(f"layers: expected layers from 0 to {num_teacher - 1}, got {list(layers)}")
        student = cls(_student_config(teacher.config, len(layers))).to(teacher.token_embed.weight)
        for name in ("token_embed", "pos_embed", "embed_norm"):
            _copy(getattr(teacher, name), getattr(student, name))
        for block, layer in zip(student.blocks, layers, strict=True):
            _copy(teacher.blocks[layer], block)
        return student

    def forward(
        self, tokens: Tensor, *, token_mask: Tensor | None = None, need_weights: bool = False
    ) -> Tensor | tuple[Tensor, list[Tensor]]:
        """Encode a batch of texts.

        Args:
            tokens: (B, T) integer ids.
            token_mask: (B, T) bool, True = real token; all are real when left out.
            need_weights: also return each layer's attention weights.

        Returns:
            Hidden states (B, T, D); with `need_weights` also a list of (B, H, T, T).

        Raises:
            TypeError: ids that are not integers, a mask that is not boolean.
            ValueError: an id outside its table, a text longer than the position table, or
                shapes that do not fit.

        Book: distilbert-student
        """
        attn_mask = check_texts(tokens, token_mask, self.config.max_seq_len)
        x = self.token_embed(tokens) + self.pos_embed(tokens.size(1))
        x = self.dropout(self.embed_norm(x))  # (B, T, D)
        collected = []
        for block in self.blocks:
            x, weights = block(x, attn_mask=attn_mask, need_weights=need_weights)
            collected.append(weights)
        return (x, collected) if need_weights else x


class DistilBertForMaskedLM(_DistilBertPretrained, nn.Module):
    """DistilBERT that fills in masked tokens, as its teacher does.

    Book: distilbert-loss
    """

    hf_architecture = "DistilBertForMaskedLM"
    hf_weights = (*_UNDER_HEAD, *_MLM_HEAD)
    hf_tied = _MLM_TIED

    def __init__(self, config: DistilBertConfig) -> None:
        super().__init__()
        self.config = config
        self.distilbert = DistilBert(config)
        self.mlm_head = MaskedLMHead(config)
        initialise(self.mlm_head)

    @classmethod
    def from_teacher(cls, teacher: BertForMaskedLM, *, layers: Sequence[int] | None = None) -> Self:
        """As `DistilBert.from_teacher`, with a copy of the teacher's head.

        Raises:
            ValueError: a layer that the teacher does not have.

        Book: distilbert-student
        """
        body = DistilBert.from_teacher(teacher.bert, layers=layers)
        student = cls(body.config).to(body.token_embed.weight)
        student.distilbert = body
        _copy(teacher.mlm_head, student.mlm_head)
        return student

    def forward(self, tokens: Tensor, *, token_mask: Tensor | None = None) -> Tensor:
        """Logits (B, T, V) of the token that belongs at each position; arguments as in `DistilBert`."""
        return self.mlm_head(self.distilbert(tokens, token_mask=token_mask), self.distilbert.token_embed)


class DistilBertForSequenceClassification(EncoderClassifier, _DistilBertPretrained, nn.Module):
    r"""One class for each text, read from the first token.

    $$\mathrm{logits} = W_C\, \mathrm{ReLU}(W h_{[\mathrm{CLS}]} + b) + b_C$$

    Book: distilbert-student
    """

    body, encoder_class = "distilbert", DistilBert
    hf_architecture = "DistilBertForSequenceClassification"
    hf_weights = (
        *_UNDER_HEAD,
        ("pre_classifier.{p}", "dense.{p}"),
        ("classifier.{p}", "classifier.{p}"),
    )

    def __init__(self, config: DistilBertConfig, num_classes: int = 2) -> None:
        super().__init__()
        expect_classes(num_classes)
        self.config = config
        self.distilbert = DistilBert(config)
        self.dense = nn.Linear(config.d_model, config.d_model)
        self.dropout = nn.Dropout(config.classifier_dropout)
        self.classifier = nn.Linear(config.d_model, num_classes)
        initialise(self.dense)
        initialise(self.classifier)

    def forward(self, tokens: Tensor, *, token_mask: Tensor | None = None) -> Tensor:
        """Logits (B, C); arguments as in `DistilBert`."""
        first = self.distilbert(tokens, token_mask=token_mask)[:, 0]  # (B, D)
        return self.classifier(self.dropout(torch.relu(self.dense(first))))


class DistilBertForTokenClassification(EncoderClassifier, _DistilBertPretrained, nn.Module):
    """One class for each token.

    Book: distilbert-tagger
    """

    body, encoder_class = "distilbert", DistilBert
    hf_architecture = "DistilBertForTokenClassification"
    hf_weights = (*_UNDER_HEAD, ("classifier.{p}", "classifier.{p}"))

    def __init__(self, config: DistilBertConfig, num_classes: int = 2) -> None:
        super().__init__()
        expect_classes(num_classes)
        self.config = config
        self.distilbert = DistilBert(config)
        self.dropout = nn.Dropout(config.dropout)
        self.classifier = nn.Linear(config.d_model, num_classes)
        initialise(self.classifier)

    def forward(self, tokens: Tensor, *, token_mask: Tensor | None = None) -> Tensor:
        """Logits (B, T, C); arguments as in `DistilBert`."""
        return self.classifier(self.dropout(self.distilbert(tokens, token_mask=token_mask)))
