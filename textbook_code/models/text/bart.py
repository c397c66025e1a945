"""BART: an encoder that reads a damaged text and a decoder that writes the whole one.

In this file: the config and its published sizes, the two stacks, the model with its heads, and the
table that maps published weights to ours. The blocks are the first Transformer's.

B batch, S source length, T target length, D d_model, F d_ff, H heads, V vocabulary, C classes.
Paper: Lewis et al. (2020). Reference: transformers.BartForConditionalGeneration and its relatives.

Book: encoder-decoder-family
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from textbook_code.layers.cache import KVCache
from textbook_code.layers.checks import expect_shape
from textbook_code.layers.decoding import expect_room, last_hidden, real_key_mask, shift_right
from textbook_code.layers.embeddings import TokenEmbedding
from textbook_code.layers.norms import LayerNorm
from textbook_code.layers.positions import LearnedPositions
from textbook_code.models.text.transformer import DecoderBlock, EncoderBlock, LayerCache
from textbook_code.pretrained import Pretrained
from textbook_code.weights import Rule, WeightError

OFFSET = 2
"""Rows of the position table before the first position: text starts at row 2."""


@dataclass(frozen=True)
class BartConfig:
    """The sizes of a BART; the defaults are BART-base.

    Both stacks have the same width, heads and feed-forward width. ε of the norms is 1e-5 in every
    published BART, and no field of a published config names it.

    Raises:
        ValueError: a size is not positive, or a special token lies outside the vocabulary.

    Book: bart-model
    """

    activation: ClassVar[str] = "gelu"
    norm_eps: ClassVar[float] = 1e-5

    vocab_size: int = 50265
    d_model: int = 768
    num_encoder_layers: int = 6
    num_decoder_layers: int = 6
    num_heads: int = 12
    d_ff: int = 3072
    max_seq_len: int = 1024
    dropout: float = 0.1
    attn_dropout: float = 0.1
    ffn_dropout: float = 0.1
    head_dropout: float = 0.0
    bos_id: int = 0
    pad_id: int = 1
    eos_id: int = 2
    decoder_start_id: int = 2

    def __post_init__(self) -> None:
        for name in ("vocab_size", "d_model", "num_encoder_layers", "num_decoder_layers"):
            _expect_positive(name, getattr(self, name))
        for name in ("num_heads", "d_ff", "max_seq_len"):
            _expect_positive(name, getattr(self, name))
        for name in ("bos_id", "pad_id", "eos_id", "decoder_start_id"):
            if not 0 <= getattr(self, name) < self.vocab_size:
                raise ValueError(
                    f"{name}: expected a token from 0 to {self.vocab_size - 1}, got {getattr(self, name)}"
                )

    @classmethod
    def bart_base(cls, **other: Any) -> Self:
        """6 + 6 layers of width 768."""
        return cls(**other)

    @classmethod
    def bart_large(cls, **other: Any) -> Self:
        """12 + 12 layers of width 1024."""
        sizes = {"d_model": 1024, "num_encoder_layers": 12, "num_decoder_layers": 12}
        return cls(**{**sizes, "num_heads": 16, "d_ff": 4096, **other})

    def num_parameters(self) -> int:
        r"""Parameters of the model with its tied output layer.

        $$VD + 2(P + 4)D + L_e(4D^2 + 2DF + F + 9D) + L_d(8D^2 + 2DF + F + 15D)$$

        with P positions; the table of P + 2 rows and the norm of the embeddings exist twice.

        Book: bart-model
        """
        V, D, F, P = self.vocab_size, self.d_model, self.d_ff, self.max_seq_len
        encoder_block = 4 * D**2 + 2 * D * F + F + 9 * D
        decoder_block = 8 * D**2 + 2 * D * F + F + 15 * D
        blocks = self.num_encoder_layers * encoder_block + self.num_decoder_layers * decoder_block
        return V * D + 2 * (P + OFFSET + 2) * D + blocks

    def flops(self, S: int, T: int) -> int:
        r"""Floating-point operations of one forward pass over S source and T target tokens.

        $$L_e(8SD^2 + 4S^2D + 4SDF) + L_d(12TD^2 + 4SD^2 + 4T^2D + 4TSD + 4TDF) + 2TDV$$

        Two for each multiply-add of the matrix products, with attention counted dense.

        Raises:
            ValueError: a length is not positive.

        Book: bart-model
        """
        _expect_positive("S", S)
        _expect_positive("T", T)
        V, D, F = self.vocab_size, self.d_model, self.d_ff
        encoder_block = 8 * S * D**2 + 4 * S**2 * D + 4 * S * D * F
        decoder_block = 12 * T * D**2 + 4 * S * D**2 + 4 * T**2 * D + 4 * T * S * D + 4 * T * D * F
        blocks = self.num_encoder_layers * encoder_block + self.num_decoder_layers * decoder_block
        return blocks + 2 * T * D * V


class Stack(nn.Module):
    """What both halves have: a position table with two spare rows, a norm, and their blocks.

    Book: bart-model
    """

    def __init__(self, config: BartConfig, blocks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.pos_embed = LearnedPositions(config.max_seq_len + OFFSET, config.d_model)
        self.embed_norm = LayerNorm(config.d_model)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(blocks)

    def embed(self, words: Tensor, *, start: int = 0) -> Tensor:
        """Add positions to the words' vectors (B, T, D), the first of them position `start`; normalise."""
        return self.dropout(self.embed_norm(words + self.pos_embed(words.size(1), start=start + OFFSET)))


def _stack(theirs: str, ours: str) -> tuple[Rule, ...]:
    """Names of one half; the encoder has no `encoder_attn`, so those rules find nothing in it."""
    layer, block = theirs + "layers.{i}.", ours + "blocks.{i}."
    projections = ("q_proj", "k_proj", "v_proj", "out_proj")
    return (
        (theirs + "embed_positions.weight", ours + "pos_embed.weight"),
        (theirs + "layernorm_embedding.{p}", ours + "embed_norm.{p}"),
        *((layer + f"self_attn.{name}.{{p}}", block + f"attn.{name}.{{p}}") for name in projections),
        (layer + "self_attn_layer_norm.{p}", block + "attn_norm.{p}"),
        *((layer + f"encoder_attn.{name}.{{p}}", block + f"cross_attn.{name}.{{p}}") for name in projections),
        (layer + "encoder_attn_layer_norm.{p}", block + "cross_norm.{p}"),
        (layer + "fc1.{p}", block + "ffn.fc1.{p}"),
        (layer + "fc2.{p}", block + "ffn.fc2.{p}"),
        (layer + "final_layer_norm.{p}", block + "ffn_norm.{p}"),
    )


def _body(theirs: str, ours: str) -> tuple[Rule, ...]:
    return (
        (theirs + "shared.weight", ours + "token_embed.weight"),
        *_stack(theirs + "encoder.", ours + "encoder."),
        *_stack(theirs + "decoder.", ours + "decoder."),
    )


def _tied(theirs: str) -> dict[str, str]:
    """The reference gives each stack a name of its own for the one table."""
    return {
        f"{theirs}{half}.embed_tokens.weight": f"{theirs}shared.weight" for half in ("encoder", "decoder")
    }


_TIED = {**_tied(""), **_tied("model."), "lm_head.weight": "model.shared.weight"}


class _BartPretrained(Pretrained):
    config_class = BartConfig
    hf_config: ClassVar[dict[str, str]] = {
        "vocab_size": "vocab_size",
        "d_model": "d_model",
        "num_encoder_layers": "encoder_layers",
        "num_decoder_layers": "decoder_layers",
        "num_heads": "encoder_attention_heads",
        "d_ff": "encoder_ffn_dim",
        "max_seq_len": "max_position_embeddings",
        "dropout": "dropout",
        "attn_dropout": "attention_dropout",
        "ffn_dropout": "activation_dropout",
        "head_dropout": "classifier_dropout",
        "bos_id": "bos_token_id",
        "pad_id": "pad_token_id",
        "eos_id": "eos_token_id",
        "decoder_start_id": "decoder_start_token_id",
    }
    hf_assumes: ClassVar[dict[str, Any]] = {
        "model_type": "bart",
        "activation_function": "gelu",
        "scale_embedding": False,
        "normalize_before": False,
        "normalize_embedding": True,
        "static_position_embeddings": False,
        "is_encoder_decoder": True,
        "tie_word_embeddings": True,
    }

    @classmethod
    def config_from_hf(cls, theirs: Mapping[str, Any]) -> BartConfig:
        """As in `Pretrained`; both stacks must have the same heads and feed-forward width.

        Raises:
            WeightError: it describes another architecture, lacks a field, or the stacks differ.

        Book: bart-model
        """
        for size in ("attention_heads", "ffn_dim"):
            encoder, decoder = (theirs.get(f"{half}_{size}") for half in ("encoder", "decoder"))
            if encoder != decoder:
                raise WeightError(
                    f"config: {cls.__name__} needs decoder_{size} = encoder_{size} = {encoder}, got {decoder}"
                )
        config: BartConfig = super().config_from_hf(theirs)
        return config

    def config_to_hf(self) -> dict[str, Any]:
        config = super().config_to_hf()
        both = {f"decoder_{size}": config[f"encoder_{size}"] for size in ("attention_heads", "ffn_dim")}
        return {**config, **both}


class Bart(_BartPretrained, nn.Module):
    r"""The two stacks over one table of tokens.

    $$c = \mathrm{Encoder}\big(\mathrm{LN}(E_{w_s} + P^{\mathrm{enc}}_{s+2})\big), \qquad
      h = \mathrm{Decoder}\big(\mathrm{LN}(E_{y_t} + P^{\mathrm{dec}}_{t+2}),\, c\big)$$

    The token vectors are not multiplied by $\sqrt{D}$.

    Args:
        config: the sizes.

    Book: bart-model
    """

    hf_architecture = "BartModel"
    hf_weights = (*_body("", ""), *_body("model.", ""), ("final_logits_bias", None))
    hf_tied = _TIED

    def __init__(self, config: BartConfig) -> None:
        super().__init__()
        self.config = config
        self.token_embed = TokenEmbedding(config.vocab_size, config.d_model)
        self.encoder = Stack(config, [EncoderBlock(config) for _ in range(config.num_encoder_layers)])
        self.decoder = Stack(config, [DecoderBlock(config) for _ in range(config.num_decoder_layers)])
        initialise(self, pad_id=config.pad_id)

    def encode(self, tokens: Tensor, *, token_mask: Tensor | None = None) -> Tensor:
        """Read the source.

        Args:
            tokens: (B, S) integer ids.
            token_mask: (B, S) bool, True = real token; all are real when left out.

        Returns:
            (B, S, D), the context of the decoder.

        Raises:
            TypeError: ids that are not integers, a mask that is not boolean.
            ValueError: an id outside the table, a text longer than the position table, shapes that
                do not fit, or a row of the mask without a real token.

        Book: bart-model
        """
        expect_room("tokens", tokens, max_seq_len=self.config.max_seq_len)
        attn_mask = real_key_mask("token_mask", token_mask, *tokens.shape)
        x = self.encoder.embed(self.token_embed(tokens))  # (B, S, D)
        for block in self.encoder.blocks:
            x = block(x, attn_mask=attn_mask)
        return x

    def decode(
        self,
        target: Tensor,
        context: Tensor,
        *,
        context_mask: Tensor | None = None,
        target_mask: Tensor | None = None,
        cache: Sequence[LayerCache] | None = None,
    ) -> Tensor:
        """Read what is written so far, beside the source.

        Args:
            target: (B, T) integer ids, shifted right: the first is `decoder_start_id`.
            context: (B, S, D), from `encode`.
            context_mask: (B, S) bool, the source's `token_mask`.
            target_mask: bool, True = real token, over the cached positions and the new ones:
                (B, cached + T).
            cache: from `make_cache`; the new positions are appended to it.

        Returns:
            (B, T, D): position t has seen the targets up to t and the whole source.

        Raises:
            TypeError: ids that are not integers, a mask that is not boolean.
            ValueError: an id outside the table, a target longer than the position table, shapes
                that do not fit, or a row of a mask without a real token.

        Book: bart-model
        """
        past = cache[0][0].length if cache is not None else 0
        expect_room("target", target, max_seq_len=self.config.max_seq_len, past=past)
        B, T = target.shape
        expect_shape("context", context, "B S D", B=B, D=self.config.d_model)
        if cache is not None and len(cache) != len(self.decoder.blocks):
            raise ValueError(
                f"cache: expected {len(self.decoder.blocks)} pairs, one a layer, got {len(cache)}"
            )
        attn_mask = real_key_mask("target_mask", target_mask, B, past + T)
        cross_mask = real_key_mask("context_mask", context_mask, B, context.size(1))
        x = self.decoder.embed(self.token_embed(target, name="target"), start=past)  # (B, T, D)
        for i, block in enumerate(self.decoder.blocks):
            layer = cache[i] if cache is not None else None
            x = block(x, context, attn_mask=attn_mask, cross_mask=cross_mask, cache=layer)
        return x

    def forward(
        self,
        tokens: Tensor,
        target: Tensor,
        *,
        token_mask: Tensor | None = None,
        target_mask: Tensor | None = None,
    ) -> Tensor:
        """`encode` the source (B, S), then `decode` the target (B, T): (B, T, D)."""
        context = self.encode(tokens, token_mask=token_mask)
        return self.decode(target, context, context_mask=token_mask, target_mask=target_mask)

    def make_cache(self, batch_size: int, max_seq_len: int, source_len: int) -> list[LayerCache]:
        """Empty caches for each decoder layer, for up to `max_seq_len` targets and `source_len` keys.

        Raises:
            ValueError: a size is not positive, or beyond the position table.

        Book: bart-model
        """
        for name, size in (("max_seq_len", max_seq_len), ("source_len", source_len)):
            if not 0 < size <= self.config.max_seq_len:
                raise ValueError(f"{name}: expected 1 to {self.config.max_seq_len}, got {size}")
        _expect_positive("batch_size", batch_size)
        table = self.token_embed.weight

        def empty(length: int) -> KVCache:
            heads, head_dim = self.config.num_heads, self.config.d_model // self.config.num_heads
            return KVCache(batch_size, heads, length, head_dim, dtype=table.dtype, device=table.device)

        return [(empty(max_seq_len), empty(source_len)) for _ in self.decoder.blocks]

    def shift_right(self, labels: Tensor) -> Tensor:
        """The decoder's input for labels (B, T): `decoder_start_id`, then all labels but the last.

        Labels of −100, which ask for nothing, become padding.

        Book: bart-start
        """
        return shift_right(labels, start_id=self.config.decoder_start_id, pad_id=self.config.pad_id)


def initialise(model: nn.Module, *, pad_id: int | None = None) -> None:
    """Draw every matrix and table from N(0, 0.02²); biases and the padding's row 0, norms 1. In place.

    Book: bart-model
    """
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Embedding | LearnedPositions):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
        if isinstance(module, TokenEmbedding) and pad_id is not None:
            with torch.no_grad():
                module.weight[pad_id].zero_()


class BartForConditionalGeneration(_BartPretrained, nn.Module):
    r"""BART that writes: each hidden state scored against the table of tokens.

    $$\mathrm{logits}_t = h_t E^\top + b$$

    Nothing stands between the decoder and the table. The bias $b$ is fixed: it is 0 in the released
    models, and there to forbid or favour a token without touching the table.

    Book: bart-model
    """

    hf_architecture = "BartForConditionalGeneration"
    hf_weights = (*_body("model.", "bart."), *_body("", "bart."), ("final_logits_bias", "logits_bias"))
    hf_tied = _TIED
    logits_bias: Tensor

    def __init__(self, config: BartConfig) -> None:
        super().__init__()
        self.config = config
        self.bart = Bart(config)
        self.register_buffer("logits_bias", torch.zeros(1, config.vocab_size))

    def load_hf_state_dict(self, state_dict: Mapping[str, Tensor]) -> Self:
        """As in `Pretrained`; a checkpoint of the body alone has no `final_logits_bias`, which is 0 then."""
        dtypes = [tensor.dtype for tensor in state_dict.values() if tensor.is_floating_point()]
        bias = torch.zeros(self.logits_bias.shape, dtype=dtypes[0] if dtypes else None)
        return super().load_hf_state_dict({"final_logits_bias": bias, **state_dict})

    def encode(self, tokens: Tensor, *, token_mask: Tensor | None = None) -> Tensor:
        """As `Bart.encode`."""
        return self.bart.encode(tokens, token_mask=token_mask)

    def decode(
        self,
        target: Tensor,
        context: Tensor,
        *,
        context_mask: Tensor | None = None,
        target_mask: Tensor | None = None,
        cache: Sequence[LayerCache] | None = None,
        num_logits: int | None = None,
    ) -> Tensor:
        """Logits (B, T, V) of the token that follows each target; arguments as in `Bart.decode`.

        Args:
            num_logits: score the last positions only, so many of them.

        Raises:
            ValueError: `num_logits` is not between 1 and T; else as `Bart.decode`.
        """
        hidden = self.bart.decode(
            target, context, context_mask=context_mask, target_mask=target_mask, cache=cache
        )
        return self.bart.token_embed.attend(last_hidden(hidden, num_logits)) + self.logits_bias

    def forward(
        self,
        tokens: Tensor,
        target: Tensor,
        *,
        token_mask: Tensor | None = None,
        target_mask: Tensor | None = None,
    ) -> Tensor:
        """Logits (B, T, V) for a source (B, S) and a target (B, T), shifted right; as in `Bart`."""
        context = self.encode(tokens, token_mask=token_mask)
        return self.decode(target, context, context_mask=token_mask, target_mask=target_mask)

    def make_cache(self, batch_size: int, max_seq_len: int, source_len: int) -> list[LayerCache]:
        """As `Bart.make_cache`."""
        return self.bart.make_cache(batch_size, max_seq_len, source_len)

    def shift_right(self, labels: Tensor) -> Tensor:
        """As `Bart.shift_right`."""
        return self.bart.shift_right(labels)


class BartForSequenceClassification(_BartPretrained, nn.Module):
    r"""One class for each text, read where the decoder has just seen the last `eos`.

    $$\mathrm{logits} = W_2 \tanh(W_1 h_{\mathrm{eos}} + b_1) + b_2$$

    The same text goes into both stacks; only the decoder's last position has seen all of it.

    Args:
        config: the sizes.
        num_classes: C.

    Raises:
        ValueError: fewer than two classes.

    Book: bart-model
    """

    hf_architecture = "BartForSequenceClassification"
    hf_weights = (
        *_body("model.", "bart."),
        ("classification_head.dense.{p}", "pooler.{p}"),
        ("classification_head.out_proj.{p}", "classifier.{p}"),
    )
    hf_tied = _tied("model.")

    def __init__(self, config: BartConfig, num_classes: int = 2) -> None:
        super().__init__()
        if num_classes < 2:
            raise ValueError(f"num_classes: expected at least 2, got {num_classes}")
        self.config = config
        self.bart = Bart(config)
        self.pooler = nn.Linear(config.d_model, config.d_model)
        self.classifier = nn.Linear(config.d_model, num_classes)
        self.dropout = nn.Dropout(config.head_dropout)
        initialise(self.pooler)
        initialise(self.classifier)

    @classmethod
    def from_hf_config(cls, theirs: Mapping[str, Any]) -> Self:
        """As in `Pretrained`, with as many classes as the published config names (2 if it names none)."""
        return cls(cls.config_from_hf(theirs), num_classes=len(theirs.get("id2label") or (0, 1)))

    def config_to_hf(self) -> dict[str, Any]:
        labels = {str(i): f"LABEL_{i}" for i in range(self.classifier.out_features)}
        inverse = {label: int(i) for i, label in labels.items()}
        return {**super().config_to_hf(), "id2label": labels, "label2id": inverse}

    def forward(self, tokens: Tensor, *, token_mask: Tensor | None = None) -> Tensor:
        """Logits (B, C) for texts (B, T), each of which ends in `eos_id`.

        Raises:
            ValueError: a text without `eos_id` among its real tokens; else as `Bart.encode`.

        Book: bart-model
        """
        hidden = self.bart(tokens, self.bart.shift_right(tokens), token_mask=token_mask)
        ends = tokens == self.config.eos_id  # (B, T)
        if token_mask is not None:
            ends = ends & token_mask
        without = (~ends.any(1)).nonzero().flatten().tolist()
        if without:
            eos = f"eos_id={self.config.eos_id}"
            raise ValueError(f"tokens: expected {eos} in each row, rows {without} have none")
        last = ends.size(1) - 1 - ends.flip(1).long().argmax(1)  # (B,), the last of them
        summary = hidden[torch.arange(len(last), device=last.device), last]  # (B, D)
        return self.classifier(self.dropout(self.pooler(self.dropout(summary)).tanh()))


def _expect_positive(name: str, size: int) -> None:
    if size < 1:
        raise ValueError(f"{name}: expected at least 1, got {size}")
