"""T5: an encoder that reads the source in both directions, a decoder that writes the target.

In this file: the configs and their published sizes, the two blocks, the two stacks, the model with its
heads, and the tables that map published weights to ours.

    x = E[token]                                          no positions are added
    y = x + Attn(RMS(x) | bias of distance)               scores are not divided by √Dh
    z = y + Attn(RMS(y), context)                         in the decoder only
    out = z + FFN(RMS(z))

B batch, S source length, T target length, D d_model, I num_heads · head_dim, F d_ff, H heads, V vocabulary.
Paper: Raffel et al. (2020), section 2; version 1.1 after Shazeer (2020).
Reference: transformers.T5ForConditionalGeneration and its relatives.

Book: encoder-decoder
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from torch import Tensor, nn

from textbook_code.layers.attention import Attention
from textbook_code.layers.cache import KVCache
from textbook_code.layers.checks import expect_shape
from textbook_code.layers.decoding import last_hidden, real_key_mask, shift_right
from textbook_code.layers.embeddings import TokenEmbedding
from textbook_code.layers.feed_forward import FeedForward, GatedFeedForward
from textbook_code.layers.norms import RMSNorm
from textbook_code.layers.positions import RelativeBias
from textbook_code.pretrained import Pretrained
from textbook_code.weights import Rule, WeightError

LayerCache = tuple[KVCache, KVCache]
"""Of one decoder block: its own keys and values, and those of the source."""

_SIZES = ("vocab_size", "d_model", "num_layers", "num_heads", "head_dim", "d_ff", "num_buckets")
_IDS = ("pad_id", "eos_id", "decoder_start_id")


@dataclass(frozen=True)
class T5Sizes:
    """The sizes of a model of T5's family; `T5Config` and `Mt5Config` add the published ones.

    Args:
        vocab_size: V.
        d_model: D.
        num_layers: blocks of the encoder.
        num_heads: H.
        head_dim: Dh; H · Dh need not equal D.
        d_ff: F.
        num_decoder_layers: blocks of the decoder; as many as the encoder's when left out.
        gated: two matrices with tanh-GELU in front of the third (version 1.1), or one with ReLU.
        tied: the output layer is the token table, and its input is scaled by 1/√D (version 1.0).
        num_buckets: rows of each stack's table of relative biases.
        max_distance: from here on, all distances share the last bucket.
        norm_eps: ε of every norm.
        dropout: of embeddings, attention weights, sublayers and the middle of the feed-forward.
        pad_id: token that fills up a batch.
        eos_id: token that ends a text.
        decoder_start_id: first input of the decoder; T5 takes the padding for it.

    Raises:
        ValueError: a size is not positive, or a special token lies outside the vocabulary.

    Book: t5-model
    """

    vocab_size: int = 32128
    d_model: int = 512
    num_layers: int = 6
    num_heads: int = 8
    head_dim: int = 64
    d_ff: int = 2048
    num_decoder_layers: int | None = None
    gated: bool = False
    tied: bool = True
    num_buckets: int = 32
    max_distance: int = 128
    norm_eps: float = 1e-6
    dropout: float = 0.1
    pad_id: int = 0
    eos_id: int = 1
    decoder_start_id: int = 0

    def __post_init__(self) -> None:
        for name in _SIZES:
            _expect_positive(name, getattr(self, name))
        _expect_positive("num_decoder_layers", self.decoder_layers)
        for name in _IDS:
            if not 0 <= getattr(self, name) < self.vocab_size:
                raise ValueError(
                    f"{name}: expected a token from 0 to {self.vocab_size - 1}, got {getattr(self, name)}"
                )

    @property
    def decoder_layers(self) -> int:
        """Blocks of the decoder."""
        return self.num_layers if self.num_decoder_layers is None else self.num_decoder_layers

    @property
    def d_inner(self) -> int:
        """I, the width of all heads together."""
        return self.num_heads * self.head_dim

    def num_parameters(self) -> int:
        r"""Parameters of the model with its output layer, a tied one counted once.

        $$(1 + u)VD + L_e(4DI + kDF + 2D) + L_d(8DI + kDF + 3D) + 2(D + bH)$$

        with u = 1 where the output layer is untied, k = 3 matrices in a gated feed-forward layer and 2
        in a plain one, b buckets.

        Book: t5-count
        """
        D, I, F = self.d_model, self.d_inner, self.d_ff
        tables = (1 if self.tied else 2) * self.vocab_size * D + 2 * self.num_buckets * self.num_heads
        ffn = (3 if self.gated else 2) * D * F
        encoder = self.num_layers * (4 * D * I + ffn + 2 * D) + D
        decoder = self.decoder_layers * (8 * D * I + ffn + 3 * D) + D
        return tables + encoder + decoder

    def flops(self, S: int, T: int) -> int:
        r"""Floating-point operations of one forward pass over S source and T target tokens.

        $$L_e(8SDI + 4S^2I + 2kSDF) + L_d\big(12TDI + 4SDI + 4T^2I + 4TSI + 2kTDF\big) + 2TDV$$

        Two for each multiply-add of the matrix products, with attention counted dense.

        Raises:
            ValueError: a length is not positive.

        Book: t5-count
        """
        _expect_positive("S", S)
        _expect_positive("T", T)
        D, I, F = self.d_model, self.d_inner, self.d_ff
        k = 3 if self.gated else 2
        encoder = 8 * S * D * I + 4 * S * S * I + 2 * k * S * D * F
        decoder = 12 * T * D * I + 4 * S * D * I + 4 * T * T * I + 4 * T * S * I + 2 * k * T * D * F
        return self.num_layers * encoder + self.decoder_layers * decoder + 2 * T * D * self.vocab_size


@dataclass(frozen=True)
class T5Config(T5Sizes):
    """T5's published sizes; the defaults are those of T5-small, version 1.0.

    Version 1.0 has ReLU and a tied output layer, version 1.1 gated GELU and an untied one.

    Raises:
        ValueError: a size is not positive, or a special token lies outside the vocabulary.

    Book: t5-count
    """

    @classmethod
    def t5_small(cls, **other: Any) -> Self:
        """6 + 6 layers of width 512."""
        return cls(**other)

    @classmethod
    def t5_base(cls, **other: Any) -> Self:
        """12 + 12 layers of width 768."""
        return cls(**{"d_model": 768, "num_layers": 12, "num_heads": 12, "d_ff": 3072, **other})

    @classmethod
    def t5_large(cls, **other: Any) -> Self:
        """24 + 24 layers of width 1024."""
        return cls(**{"d_model": 1024, "num_layers": 24, "num_heads": 16, "d_ff": 4096, **other})

    @classmethod
    def t5_3b(cls, **other: Any) -> Self:
        """T5-large with 32 heads of 128 and a feed-forward width of 16384."""
        return cls.t5_large(**{"num_heads": 32, "head_dim": 128, "d_ff": 16384, **other})

    @classmethod
    def t5_11b(cls, **other: Any) -> Self:
        """T5-large with 128 heads of 128 and a feed-forward width of 65536."""
        return cls.t5_large(**{"num_heads": 128, "head_dim": 128, "d_ff": 65536, **other})

    @classmethod
    def _v1_1(cls, d_model: int, num_layers: int, num_heads: int, d_ff: int, other: dict[str, Any]) -> Self:
        sizes = {"d_model": d_model, "num_layers": num_layers, "num_heads": num_heads, "d_ff": d_ff}
        return cls(**{**sizes, "gated": True, "tied": False, **other})

    @classmethod
    def t5_v1_1_small(cls, **other: Any) -> Self:
        """8 + 8 layers of width 512, whose 6 heads of 64 are narrower than that."""
        return cls._v1_1(512, 8, 6, 1024, other)

    @classmethod
    def t5_v1_1_base(cls, **other: Any) -> Self:
        """12 + 12 layers of width 768."""
        return cls._v1_1(768, 12, 12, 2048, other)

    @classmethod
    def t5_v1_1_large(cls, **other: Any) -> Self:
        """24 + 24 layers of width 1024."""
        return cls._v1_1(1024, 24, 16, 2816, other)

    @classmethod
    def t5_v1_1_xl(cls, **other: Any) -> Self:
        """24 + 24 layers of width 2048."""
        return cls._v1_1(2048, 24, 32, 5120, other)

    @classmethod
    def t5_v1_1_xxl(cls, **other: Any) -> Self:
        """24 + 24 layers of width 4096."""
        return cls._v1_1(4096, 24, 64, 10240, other)


def _attention(config: T5Sizes) -> Attention:
    """No biases, and scores that are not divided by √Dh."""
    return Attention(
        config.d_model,
        config.num_heads,
        head_dim=config.head_dim,
        bias=False,
        dropout=config.dropout,
        scale=1.0,
    )


def _feed_forward(config: T5Sizes) -> FeedForward | GatedFeedForward:
    sizes, p = (config.d_model, config.d_ff), config.dropout
    if config.gated:
        return GatedFeedForward(*sizes, activation="gelu_tanh", dropout=p)
    return FeedForward(*sizes, activation="relu", bias=False, dropout=p)


class EncoderBlock(nn.Module):
    r"""One pre-norm block that sees the whole source.

    $$y = x + \mathrm{Attn}(\mathrm{RMS}(x); B), \qquad z = y + \mathrm{FFN}(\mathrm{RMS}(y))$$

    The bias B of the distances comes from the stack: it is the same in every block.

    Book: t5-model
    """

    def __init__(self, config: T5Sizes) -> None:
        super().__init__()
        self.attn_norm = RMSNorm(config.d_model, norm_eps=config.norm_eps)
        self.attn = _attention(config)
        self.ffn_norm = RMSNorm(config.d_model, norm_eps=config.norm_eps)
        self.ffn = _feed_forward(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, *, score_bias: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        """Map (B, S, D) to (B, S, D)."""
        attended = self.attn(self.attn_norm(x), score_bias=score_bias, attn_mask=attn_mask)
        x = x + self.dropout(attended)
        return x + self.dropout(self.ffn(self.ffn_norm(x)))


class DecoderBlock(nn.Module):
    r"""One pre-norm block that sees the target up to its own position, and the whole source c.

    $$y = x + \mathrm{Attn}_{\le t}(\mathrm{RMS}(x); B), \quad
      z = y + \mathrm{Attn}(\mathrm{RMS}(y), c), \quad w = z + \mathrm{FFN}(\mathrm{RMS}(z))$$

    The attention to the source has no bias of distances.

    Book: t5-model
    """

    def __init__(self, config: T5Sizes) -> None:
        super().__init__()
        self.attn_norm = RMSNorm(config.d_model, norm_eps=config.norm_eps)
        self.attn = _attention(config)
        self.cross_norm = RMSNorm(config.d_model, norm_eps=config.norm_eps)
        self.cross_attn = _attention(config)
        self.ffn_norm = RMSNorm(config.d_model, norm_eps=config.norm_eps)
        self.ffn = _feed_forward(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        x: Tensor,
        context: Tensor,
        *,
        score_bias: Tensor,
        attn_mask: Tensor | None = None,
        cross_mask: Tensor | None = None,
        cache: LayerCache | None = None,
        need_weights: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Map (B, T, D), beside context (B, S, D), to (B, T, D); and the cross weights (B, H, T, S)."""
        own, source = cache if cache is not None else (None, None)
        attended = self.attn(
            self.attn_norm(x), causal=True, score_bias=score_bias, attn_mask=attn_mask, cache=own
        )
        x = x + self.dropout(attended)
        how = {"attn_mask": cross_mask, "cache": source, "need_weights": need_weights}
        crossed = self.cross_attn(self.cross_norm(x), context, **how)
        crossed, weights = crossed if need_weights else (crossed, None)
        x = x + self.dropout(crossed)
        return x + self.dropout(self.ffn(self.ffn_norm(x))), weights


class Stack(nn.Module):
    """What both halves have: one table of relative biases for all their blocks, and a norm at the end.

    Book: t5-model
    """

    def __init__(self, config: T5Sizes, blocks: Sequence[nn.Module], *, bidirectional: bool) -> None:
        super().__init__()
        self.relative_bias = RelativeBias(
            config.num_heads,
            num_buckets=config.num_buckets,
            max_distance=config.max_distance,
            bidirectional=bidirectional,
        )
        self.blocks = nn.ModuleList(blocks)
        self.final_norm = RMSNorm(config.d_model, norm_eps=config.norm_eps)
        self.dropout = nn.Dropout(config.dropout)


def _encoder_stack(config: T5Sizes) -> Stack:
    return Stack(config, [EncoderBlock(config) for _ in range(config.num_layers)], bidirectional=True)


def _encode(stack: Stack, token_embed: TokenEmbedding, tokens: Tensor, token_mask: Tensor | None) -> Tensor:
    """Source tokens (B, S) through the encoder: (B, S, D)."""
    expect_shape("tokens", tokens, "B S")
    B, S = tokens.shape
    _expect_positive("tokens: number of positions", S)
    attn_mask = real_key_mask("token_mask", token_mask, B, S)
    score_bias = stack.relative_bias(S, S)  # (H, S, S)
    x = stack.dropout(token_embed(tokens))  # (B, S, D)
    for block in stack.blocks:
        x = block(x, score_bias=score_bias, attn_mask=attn_mask)
    return stack.dropout(stack.final_norm(x))


def _layer(theirs: str, ours: str, *, gated: bool, decoder: bool) -> tuple[Rule, ...]:
    """Names of one half; the feed-forward layer stands after the attentions."""
    block, mine = theirs + "block.{i}.layer.", ours + "blocks.{i}."
    last = 2 if decoder else 1
    letters = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "out_proj"}
    dense = (
        {"wi_0": "gate_proj", "wi_1": "up_proj", "wo": "down_proj"} if gated else {"wi": "fc1", "wo": "fc2"}
    )
    table = "relative_attention_bias.weight"
    attn, cross_attn = "0.SelfAttention.", "1.EncDecAttention."
    cross: tuple[Rule, ...] = (
        *((block + f"{cross_attn}{q}.weight", mine + f"cross_attn.{p}.weight") for q, p in letters.items()),
        (block + "1.layer_norm.weight", mine + "cross_norm.weight"),
        (theirs + f"block.0.layer.1.EncDecAttention.{table}", None),  # in old files, and never read
    )
    return (
        (theirs + f"block.0.layer.0.SelfAttention.{table}", ours + "relative_bias.weight"),
        *((block + f"{attn}{q}.weight", mine + f"attn.{p}.weight") for q, p in letters.items()),
        (block + "0.layer_norm.weight", mine + "attn_norm.weight"),
        *(cross if decoder else ()),
        *((block + f"{last}.DenseReluDense.{q}.weight", mine + f"ffn.{p}.weight") for q, p in dense.items()),
        (block + f"{last}.layer_norm.weight", mine + "ffn_norm.weight"),
        (theirs + "final_layer_norm.weight", ours + "final_norm.weight"),
    )


def _encoder(ours: str, gated: bool) -> tuple[Rule, ...]:
    return (
        ("shared.weight", ours + "token_embed.weight"),
        *_layer("encoder.", ours + "encoder.", gated=gated, decoder=False),
    )


def _body(ours: str, gated: bool) -> tuple[Rule, ...]:
    return (
        *_encoder(ours, gated),
        *_layer("decoder.", ours + "decoder.", gated=gated, decoder=True),
    )


_TABLE = "shared.weight"
_TIED = {f"{half}.embed_tokens.weight": _TABLE for half in ("encoder", "decoder")}
_HEAD = "lm_head.weight"


class _T5Pretrained(Pretrained):
    config_class: ClassVar[type[T5Sizes]] = T5Config
    always_untied: ClassVar[bool] = False  # whatever a config says
    hf_config: ClassVar[dict[str, str]] = {
        "vocab_size": "vocab_size",
        "d_model": "d_model",
        "num_layers": "num_layers",
        "num_heads": "num_heads",
        "head_dim": "d_kv",
        "d_ff": "d_ff",
        "num_buckets": "relative_attention_num_buckets",
        "norm_eps": "layer_norm_epsilon",
        "dropout": "dropout_rate",
        "pad_id": "pad_token_id",
        "eos_id": "eos_token_id",
    }
    hf_assumes: ClassVar[dict[str, Any]] = {"model_type": "t5"}
    hf_tied = _TIED

    @classmethod
    def config_from_hf(cls, theirs: Mapping[str, Any]) -> T5Sizes:
        """Translate a `config.json`; what the first released ones leave out has T5's first values.

        Raises:
            WeightError: it describes another architecture, or lacks a field.

        Book: t5-model
        """
        ours = super().config_from_hf(theirs)
        activation = theirs.get("feed_forward_proj", "relu")
        if activation not in _ACTIVATION.values():
            raise WeightError(
                f"config: {cls.__name__} needs feed_forward_proj to be one of "
                f"{sorted(_ACTIVATION.values())}, got {activation!r}"
            )
        found = {
            "num_decoder_layers": theirs.get("num_decoder_layers"),
            "gated": activation == _ACTIVATION[True],
            # the reference overwrites tie_word_embeddings by True, and keeps what it said elsewhere
            "tied": not cls.always_untied
            and bool(theirs.get("scale_decoder_outputs", theirs.get("tie_word_embeddings", True))),
            "max_distance": theirs.get("relative_attention_max_distance", 128),
            "decoder_start_id": theirs.get("decoder_start_token_id"),
        }
        if found["decoder_start_id"] is None:
            found["decoder_start_id"] = ours.pad_id
        config: T5Sizes = cls.config_class(**{**vars(ours), **found})
        return config

    def config_to_hf(self) -> dict[str, Any]:
        """Our config under the published names.

        Book: t5-model
        """
        config: T5Sizes = self.config
        return {
            **super().config_to_hf(),
            "num_decoder_layers": config.decoder_layers,
            "feed_forward_proj": _ACTIVATION[config.gated],
            "tie_word_embeddings": config.tied,
            "relative_attention_max_distance": config.max_distance,
            "decoder_start_token_id": config.decoder_start_id,
            "is_encoder_decoder": True,
        }


_ACTIVATION = {False: "relu", True: "gated-gelu"}


class T5Encoder(_T5Pretrained, nn.Module):
    """The encoder alone, for what reads and does not write: sentence vectors, conditions of images.

    It also loads from a whole T5, whose decoder it leaves out.

    Args:
        config: the sizes; those of the decoder are not used.

    Book: t5-model
    """

    hf_architecture = "T5EncoderModel"

    def __init__(self, config: T5Sizes) -> None:
        super().__init__()
        self.config = config
        self.__dict__["hf_weights"] = (
            *_encoder("", config.gated),
            *((theirs, None) for theirs, _ in _layer("decoder.", "", gated=config.gated, decoder=True)),
            ("decoder.embed_tokens.weight", None),
            (_HEAD, None),
        )
        self.token_embed = TokenEmbedding(config.vocab_size, config.d_model)
        self.encoder = _encoder_stack(config)
        initialise(self)

    def forward(self, tokens: Tensor, *, token_mask: Tensor | None = None) -> Tensor:
        """Read a batch of texts.

        Args:
            tokens: (B, S) integer ids.
            token_mask: (B, S) bool, True = real token; all are real when left out.

        Returns:
            (B, S, D).

        Raises:
            TypeError: ids that are not integers, a mask that is not boolean.
            ValueError: an id outside the table, no token, shapes that do not fit, or a row of the
                mask without a real token.

        Book: t5-model
        """
        return _encode(self.encoder, self.token_embed, tokens, token_mask)


class T5(_T5Pretrained, nn.Module):
    r"""Both stacks over one table of tokens.

    $$c = \mathrm{RMS}\big(\mathrm{Encoder}(E_{w})\big), \qquad
      h = \mathrm{RMS}\big(\mathrm{Decoder}(E_{y}, c)\big)$$

    Nothing is added to the token vectors: where a token stands enters through the scores alone, and so
    no text is too long for the tables.

    Args:
        config: the sizes.

    Book: t5-model
    """

    hf_architecture = "T5Model"

    def __init__(self, config: T5Sizes) -> None:
        super().__init__()
        self.config = config
        self.__dict__["hf_weights"] = (*_body("", config.gated), (_HEAD, None))
        self.token_embed = TokenEmbedding(config.vocab_size, config.d_model)
        self.encoder = _encoder_stack(config)
        blocks = [DecoderBlock(config) for _ in range(config.decoder_layers)]
        self.decoder = Stack(config, blocks, bidirectional=False)
        initialise(self)

    def encode(self, tokens: Tensor, *, token_mask: Tensor | None = None) -> Tensor:
        """Read the source.

        Args:
            tokens: (B, S) integer ids.
            token_mask: (B, S) bool, True = real token; all are real when left out. Padding may stand
                on either side: only distances count.

        Returns:
            (B, S, D), the context of the decoder.

        Raises:
            TypeError: ids that are not integers, a mask that is not boolean.
            ValueError: an id outside the table, no token, shapes that do not fit, or a row of the
                mask without a real token.

        Book: t5-model
        """
        return _encode(self.encoder, self.token_embed, tokens, token_mask)

    def decode(
        self,
        target: Tensor,
        context: Tensor,
        *,
        context_mask: Tensor | None = None,
        target_mask: Tensor | None = None,
        cache: Sequence[LayerCache] | None = None,
        need_weights: bool = False,
    ) -> Tensor | tuple[Tensor, list[Tensor]]:
        """Read what is written so far, beside the source.

        Args:
            target: (B, T) integer ids, shifted right: the first is `decoder_start_id`.
            context: (B, S, D), from `encode`.
            context_mask: (B, S) bool, the source's `token_mask`.
            target_mask: bool, True = real token, over the cached positions and the new ones:
                (B, cached + T).
            cache: from `make_cache`; the new positions are appended to it.
            need_weights: also return how each block attends to the source.

        Returns:
            (B, T, D): position t has seen the targets up to t and the whole source. With
            `need_weights` also a list of (B, H, T, S), one for each block.

        Raises:
            TypeError: ids that are not integers, a mask that is not boolean.
            ValueError: an id outside the table, no token, shapes that do not fit, caches of another
                number, or a row of a mask without a real token.

        Book: t5-model
        """
        expect_shape("target", target, "B T")
        B, T = target.shape
        _expect_positive("target: number of positions", T)
        expect_shape("context", context, "B S D", B=B, D=self.config.d_model)
        if cache is not None and len(cache) != len(self.decoder.blocks):
            raise ValueError(
                f"cache: expected {len(self.decoder.blocks)} pairs, one a block, got {len(cache)}"
            )
        past = cache[0][0].length if cache is not None else 0
        attn_mask = real_key_mask("target_mask", target_mask, B, past + T)
        cross_mask = real_key_mask("context_mask", context_mask, B, context.size(1))

        score_bias = self.decoder.relative_bias(T, past + T)  # (H, T, past + T)
        x = self.decoder.dropout(self.token_embed(target, name="target"))  # (B, T, D)
        collected = []
        for i, block in enumerate(self.decoder.blocks):
            x, weights = block(
                x,
                context,
                score_bias=score_bias,
                attn_mask=attn_mask,
                cross_mask=cross_mask,
                cache=None if cache is None else cache[i],
                need_weights=need_weights,
            )
            collected.append(weights)
        x = self.decoder.dropout(self.decoder.final_norm(x))
        return (x, collected) if need_weights else x

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
        hidden = self.decode(target, context, context_mask=token_mask, target_mask=target_mask)
        assert isinstance(hidden, Tensor)
        return hidden

    def make_cache(self, batch_size: int, max_seq_len: int, source_len: int) -> list[LayerCache]:
        """Empty caches for each decoder block, for `max_seq_len` targets and `source_len` keys.

        Raises:
            ValueError: a size is not positive.

        Book: attention-cache
        """
        for name, size in (
            ("batch_size", batch_size),
            ("max_seq_len", max_seq_len),
            ("source_len", source_len),
        ):
            _expect_positive(name, size)
        table = self.token_embed.weight
        heads, width = self.config.num_heads, self.config.head_dim

        def empty(length: int) -> KVCache:
            return KVCache(batch_size, heads, length, width, dtype=table.dtype, device=table.device)

        return [(empty(max_seq_len), empty(source_len)) for _ in self.decoder.blocks]

    def shift_right(self, labels: Tensor) -> Tensor:
        """The decoder's input for labels (B, T): `decoder_start_id`, then all labels but the last.

        Labels of −100, which ask for nothing, become padding.

        Raises:
            TypeError: the labels are not integers.
            ValueError: they are not of shape (B, T).

        Book: t5-text-to-text
        """
        config = self.config
        return shift_right(labels, start_id=config.decoder_start_id, pad_id=config.pad_id)


class T5ForConditionalGeneration(_T5Pretrained, nn.Module):
    r"""T5 that writes: each hidden state scored against the vocabulary.

    $$\mathrm{logits}_t = \frac{h_t E^\top}{\sqrt D} \quad\text{(tied, version 1.0)}, \qquad
      \mathrm{logits}_t = h_t W^\top \quad\text{(version 1.1)}$$

    Args:
        config: the sizes.

    Book: t5-head
    """

    hf_architecture = "T5ForConditionalGeneration"

    def __init__(self, config: T5Sizes) -> None:
        super().__init__()
        self.config = config
        self.t5 = T5(config)
        self.lm_head = None if config.tied else nn.Linear(config.d_model, config.vocab_size, bias=False)
        head: Rule = (_HEAD, "lm_head.weight")
        # the rules depend on the config, so each model has its own
        self.__dict__["hf_weights"] = (*_body("t5.", config.gated), *(() if config.tied else (head,)))
        self.__dict__["hf_tied"] = {**_TIED, **({_HEAD: _TABLE} if config.tied else {})}
        if self.lm_head is not None:
            nn.init.normal_(self.lm_head.weight, std=config.d_model**-0.5)

    def encode(self, tokens: Tensor, *, token_mask: Tensor | None = None) -> Tensor:
        """As `T5.encode`: (B, S) to (B, S, D).

        Book: t5-model
        """
        return self.t5.encode(tokens, token_mask=token_mask)

    def decode(
        self,
        target: Tensor,
        context: Tensor,
        *,
        context_mask: Tensor | None = None,
        target_mask: Tensor | None = None,
        cache: Sequence[LayerCache] | None = None,
        num_logits: int | None = None,
        need_weights: bool = False,
    ) -> Tensor | tuple[Tensor, list[Tensor]]:
        """Score the token that follows each target position.

        Args:
            target, context, context_mask, target_mask, cache, need_weights: as in `T5.decode`.
            num_logits: score the last so many positions only; all when left out.

        Returns:
            Logits (B, T, V), or (B, num_logits, V); with `need_weights` also a list of (B, H, T, S).

        Raises:
            TypeError, ValueError: as in `T5.decode`; or more logits than new positions are asked for.

        Book: t5-head
        """
        masks = {"context_mask": context_mask, "target_mask": target_mask}
        found = self.t5.decode(target, context, **masks, cache=cache, need_weights=need_weights)
        hidden, weights = found if isinstance(found, tuple) else (found, [])
        logits = self.score(last_hidden(hidden, num_logits))
        return (logits, weights) if need_weights else logits

    def score(self, hidden: Tensor) -> Tensor:
        """Hidden states (…, D) against the vocabulary: (…, V).

        Book: t5-head
        """
        if self.lm_head is not None:
            return self.lm_head(hidden)
        return self.t5.token_embed.attend(hidden * self.config.d_model**-0.5)

    def forward(
        self,
        tokens: Tensor,
        target: Tensor,
        *,
        token_mask: Tensor | None = None,
        target_mask: Tensor | None = None,
    ) -> Tensor:
        """Logits (B, T, V) for source (B, S) and target (B, T), already shifted right."""
        return self.score(self.t5(tokens, target, token_mask=token_mask, target_mask=target_mask))

    def make_cache(self, batch_size: int, max_seq_len: int, source_len: int) -> list[LayerCache]:
        """As `T5.make_cache`.

        Book: attention-cache
        """
        return self.t5.make_cache(batch_size, max_seq_len, source_len)

    def shift_right(self, labels: Tensor) -> Tensor:
        """As `T5.shift_right`.

        Book: t5-text-to-text
        """
        return self.t5.shift_right(labels)


def initialise(model: T5Encoder | T5) -> None:
    r"""Draw every matrix so that what it makes of vectors of size 1 has size 1 again. In place.

    $$E \sim \mathcal N(0, 1), \quad W^Q \sim \mathcal N\!\big(0, \tfrac{1}{D D_h}\big), \quad
      W^K, W^V, W_{\mathrm{in}} \sim \mathcal N\!\big(0, \tfrac1D\big), \quad
      W^O \sim \mathcal N\!\big(0, \tfrac1I\big), \quad
      W_{\mathrm{out}} \sim \mathcal N\!\big(0, \tfrac1F\big)$$

    The 1/Dh in the queries' variance stands for the 1/√Dh by which the scores are not divided.

    Book: t5-no-scale
    """
    D, Dh = model.config.d_model, model.config.head_dim
    for module in model.modules():
        if isinstance(module, TokenEmbedding):
            nn.init.normal_(module.weight)
        elif isinstance(module, RelativeBias):
            nn.init.normal_(module.weight, std=D**-0.5)
        elif isinstance(module, Attention):
            nn.init.normal_(module.q_proj.weight, std=(D * Dh) ** -0.5)
            for linear in (module.k_proj, module.v_proj, module.out_proj):
                nn.init.normal_(linear.weight, std=linear.in_features**-0.5)
        elif isinstance(module, FeedForward | GatedFeedForward):
            for child in module.children():
                assert isinstance(child, nn.Linear)
                nn.init.normal_(child.weight, std=child.in_features**-0.5)


def _expect_positive(name: str, size: int) -> None:
    if size < 1:
        raise ValueError(f"{name}: expected at least 1, got {size}")
