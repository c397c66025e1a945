"""The Transformer as it was first published: an encoder that reads, a decoder that writes.

In this file: the config and its two published sizes, the encoder's and the decoder's block, the
model, its output layer, and the table that maps published weights to ours.

B batch, S source length, T target length, D d_model, F d_ff, V vocabulary.
Paper: Vaswani et al. (2017); Press and Wolf (2017) for the tied tables.
Reference: transformers.MarianMTModel; torch.nn.Transformer for the stacks.

Book: encoder-decoder-original
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from textbook_code.layers.attention import Attention
from textbook_code.layers.cache import KVCache
from textbook_code.layers.checks import expect_shape, expect_sizes
from textbook_code.layers.decoding import expect_room, last_hidden, real_key_mask, shift_right
from textbook_code.layers.embeddings import TokenEmbedding
from textbook_code.layers.feed_forward import FeedForward
from textbook_code.layers.norms import LayerNorm
from textbook_code.layers.positions import SinusoidalPositions
from textbook_code.pretrained import Pretrained
from textbook_code.weights import Rule, WeightError

LayerCache = tuple[KVCache, KVCache]
"""Of one decoder block: its own keys and values, and those of the source."""


@dataclass(frozen=True)
class TransformerConfig:
    """The sizes of a Transformer; the defaults are the paper's base model, English to German.

    `halves` puts all sines before all cosines in the position table, as the Marian translators do,
    instead of interleaving them as the paper writes it: the same numbers in another order of channels.

    Raises:
        ValueError: a size is not positive.

    Book: encoder-decoder-original
    """

    vocab_size: int = 37000
    d_model: int = 512
    num_layers: int = 6
    num_decoder_layers: int = 6
    num_heads: int = 8
    d_ff: int = 2048
    max_seq_len: int = 1024
    activation: str = "relu"
    halves: bool = False
    norm_eps: float = 1e-5
    dropout: float = 0.1
    attn_dropout: float = 0.0
    ffn_dropout: float = 0.0
    pad_id: int = 0
    eos_id: int = 1
    decoder_start_id: int = 0

    def __post_init__(self) -> None:
        expect_sizes(self)

    @classmethod
    def base(cls, **other: Any) -> Self:
        """6 + 6 layers of width 512."""
        return cls(**other)

    @classmethod
    def big(cls, **other: Any) -> Self:
        """6 + 6 layers of width 1024; dropout 0.3, as for English to German."""
        return cls(**{"d_model": 1024, "num_heads": 16, "d_ff": 4096, "dropout": 0.3, **other})

    def num_parameters(self) -> int:
        r"""Parameters, the one table serving source, target and output.

        $$VD + L_e(4D^2 + 2DF + F + 9D) + L_d(8D^2 + 2DF + F + 15D)$$

        Book: encoder-decoder-original
        """
        D, F = self.d_model, self.d_ff
        encoder_block = 4 * D**2 + 2 * D * F + F + 9 * D
        decoder_block = 8 * D**2 + 2 * D * F + F + 15 * D
        return self.vocab_size * D + self.num_layers * encoder_block + self.num_decoder_layers * decoder_block

    def flops(self, S: int, T: int) -> int:
        r"""Floating-point operations of one forward pass over S source and T target tokens.

        $$L_e(8SD^2 + 4S^2D + 4SDF) + L_d(12TD^2 + 4SD^2 + 4T^2D + 4TSD + 4TDF) + 2TDV$$

        Two for each multiply-add of the matrix products, with attention counted dense.

        Book: encoder-decoder-original
        """
        D, F = self.d_model, self.d_ff
        encoder_block = 8 * S * D**2 + 4 * S**2 * D + 4 * S * D * F
        decoder_block = 12 * T * D**2 + 4 * S * D**2 + 4 * T**2 * D + 4 * T * S * D + 4 * T * D * F
        blocks = self.num_layers * encoder_block + self.num_decoder_layers * decoder_block
        return blocks + 2 * T * D * self.vocab_size


class EncoderBlock(nn.Module):
    r"""One post-norm block of the encoder.

    $$y = \mathrm{LN}(x + \mathrm{Attn}(x)), \qquad z = \mathrm{LN}(y + \mathrm{FFN}(y))$$

    Args:
        config: a `TransformerConfig`, or another that names the same sizes, as BART's does.

    Book: encoder-decoder-original
    """

    def __init__(self, config: Any) -> None:
        super().__init__()
        D, eps = config.d_model, config.norm_eps
        self.attn = Attention(D, config.num_heads, dropout=config.attn_dropout)
        self.attn_norm = LayerNorm(D, norm_eps=eps)
        self.ffn = FeedForward(D, config.d_ff, activation=config.activation, dropout=config.ffn_dropout)
        self.ffn_norm = LayerNorm(D, norm_eps=eps)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, *, attn_mask: Tensor | None = None) -> Tensor:
        """Map (B, S, D) to (B, S, D)."""
        x = self.attn_norm(x + self.dropout(self.attn(x, attn_mask=attn_mask)))
        return self.ffn_norm(x + self.dropout(self.ffn(x)))


class DecoderBlock(nn.Module):
    r"""One post-norm block of the decoder, which also attends to the source c.

    $$u = \mathrm{LN}(x + \mathrm{Attn}(x)), \qquad v = \mathrm{LN}(u + \mathrm{Attn}(u, c)), \qquad
      z = \mathrm{LN}(v + \mathrm{FFN}(v))$$

    Args:
        config: a `TransformerConfig`, or another that names the same sizes, as BART's does.

    Book: encoder-decoder-original
    """

    def __init__(self, config: Any) -> None:
        super().__init__()
        D, eps = config.d_model, config.norm_eps
        self.attn = Attention(D, config.num_heads, dropout=config.attn_dropout)
        self.attn_norm = LayerNorm(D, norm_eps=eps)
        self.cross_attn = Attention(D, config.num_heads, dropout=config.attn_dropout)
        self.cross_norm = LayerNorm(D, norm_eps=eps)
        self.ffn = FeedForward(D, config.d_ff, activation=config.activation, dropout=config.ffn_dropout)
        self.ffn_norm = LayerNorm(D, norm_eps=eps)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        x: Tensor,
        context: Tensor,
        *,
        attn_mask: Tensor | None = None,
        cross_mask: Tensor | None = None,
        cache: LayerCache | None = None,
    ) -> Tensor:
        """Map (B, T, D), beside a source (B, S, D), to (B, T, D)."""
        own, cross = cache if cache is not None else (None, None)
        x = self.attn_norm(x + self.dropout(self.attn(x, attn_mask=attn_mask, causal=True, cache=own)))
        attended = self.cross_attn(x, context, attn_mask=cross_mask, cache=cross)
        x = self.cross_norm(x + self.dropout(attended))
        return self.ffn_norm(x + self.dropout(self.ffn(x)))


def _stack(theirs: str, ours: str) -> tuple[Rule, ...]:
    """Names of one half; the encoder has no `encoder_attn`, so those rules find nothing in it."""
    layer, block = theirs + "layers.{i}.", ours + ".{i}."
    projections = ("q_proj", "k_proj", "v_proj", "out_proj")
    return (
        (theirs + "embed_positions.weight", None),  # the formula's numbers
        *((layer + f"self_attn.{name}.{{p}}", block + f"attn.{name}.{{p}}") for name in projections),
        (layer + "self_attn_layer_norm.{p}", block + "attn_norm.{p}"),
        *((layer + f"encoder_attn.{name}.{{p}}", block + f"cross_attn.{name}.{{p}}") for name in projections),
        (layer + "encoder_attn_layer_norm.{p}", block + "cross_norm.{p}"),
        (layer + "fc1.{p}", block + "ffn.fc1.{p}"),
        (layer + "fc2.{p}", block + "ffn.fc2.{p}"),
        (layer + "final_layer_norm.{p}", block + "ffn_norm.{p}"),
    )


_TIED = {
    "model.encoder.embed_tokens.weight": "model.shared.weight",
    "model.decoder.embed_tokens.weight": "model.shared.weight",
    "lm_head.weight": "model.shared.weight",
}


class TransformerForConditionalGeneration(Pretrained, nn.Module):
    r"""The whole model: one table of tokens, two stacks, and the table again as output layer.

    $$c = \mathrm{Encoder}\big(\sqrt D\, E_{w_s} + p_s\big), \qquad
      \mathrm{logits}_t = E\, \mathrm{Decoder}\big(\sqrt D\, E_{y_t} + p_t,\, c\big) + b$$

    with the waves p of `SinusoidalPositions`. The bias b is no part of the paper; Marian's models
    have it, fixed at 0.

    Args:
        config: the sizes.

    Book: encoder-decoder-original
    """

    config_class = TransformerConfig
    hf_architecture = "MarianMTModel"
    hf_config: ClassVar[dict[str, str]] = {
        "vocab_size": "vocab_size",
        "d_model": "d_model",
        "num_layers": "encoder_layers",
        "num_decoder_layers": "decoder_layers",
        "num_heads": "encoder_attention_heads",
        "d_ff": "encoder_ffn_dim",
        "max_seq_len": "max_position_embeddings",
        "dropout": "dropout",
        "attn_dropout": "attention_dropout",
        "ffn_dropout": "activation_dropout",
        "pad_id": "pad_token_id",
        "eos_id": "eos_token_id",
        "decoder_start_id": "decoder_start_token_id",
    }
    hf_assumes: ClassVar[dict[str, Any]] = {
        "model_type": "marian",
        "scale_embedding": True,
        "share_encoder_decoder_embeddings": True,
        "is_encoder_decoder": True,
        "tie_word_embeddings": True,
    }
    hf_weights = (
        ("model.shared.weight", "token_embed.weight"),
        *_stack("model.encoder.", "encoder"),
        *_stack("model.decoder.", "decoder"),
        ("final_logits_bias", "logits_bias"),
    )
    hf_tied = _TIED
    logits_bias: Tensor

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.token_embed = TokenEmbedding(config.vocab_size, config.d_model)
        self.pos_embed = SinusoidalPositions(config.max_seq_len, config.d_model, halves=config.halves)
        self.dropout = nn.Dropout(config.dropout)
        self.encoder = nn.ModuleList(EncoderBlock(config) for _ in range(config.num_layers))
        self.decoder = nn.ModuleList(DecoderBlock(config) for _ in range(config.num_decoder_layers))
        self.register_buffer("logits_bias", torch.zeros(1, config.vocab_size))
        initialise(self)

    @classmethod
    def config_from_hf(cls, theirs: Any) -> TransformerConfig:
        """As in `Pretrained`; both stacks must have the same heads and feed-forward width.

        Raises:
            WeightError: it describes another architecture, lacks a field, or the stacks differ.

        Book: encoder-decoder-original
        """
        for size in ("attention_heads", "ffn_dim"):
            encoder, decoder = (theirs.get(f"{half}_{size}") for half in ("encoder", "decoder"))
            if encoder != decoder:
                raise WeightError(
                    f"config: {cls.__name__} needs decoder_{size} = encoder_{size} = {encoder}, got {decoder}"
                )
        config: TransformerConfig = super().config_from_hf(theirs)
        activation = theirs.get("activation_function", "gelu")  # the reference's own default
        names = {"relu": "relu", "gelu": "gelu", "swish": "silu", "silu": "silu"}
        if activation not in names:
            raise WeightError(f"config: expected activation_function in {sorted(names)}, got {activation!r}")
        return replace(config, activation=names[activation], halves=True)

    def config_to_hf(self) -> dict[str, Any]:
        """Our config under the published names.

        Raises:
            WeightError: the position table is interleaved, which the published format cannot say.

        Book: encoder-decoder-original
        """
        if not self.config.halves:
            raise WeightError(
                "config: expected halves=True, the only order of channels that Marian's format has"
            )
        theirs = super().config_to_hf()
        same = {f"decoder_{size}": theirs[f"encoder_{size}"] for size in ("attention_heads", "ffn_dim")}
        return {**theirs, **same, "activation_function": self.config.activation}

    def embed(self, tokens: Tensor, *, start: int = 0, name: str = "tokens") -> Tensor:
        r"""Token vectors times √D, plus the waves of positions `start` …; (B, T) → (B, T, D).

        The factor brings the vectors, drawn from N(0, 1/D), to the size of the waves.

        Book: encoder-decoder-original
        """
        expect_room(name, tokens, max_seq_len=self.config.max_seq_len, past=start)
        x = self.token_embed(tokens, name=name) * math.sqrt(self.config.d_model)
        return self.dropout(x + self.pos_embed(tokens.size(1), start=start))

    def encode(self, tokens: Tensor, *, token_mask: Tensor | None = None) -> Tensor:
        """Read the source: ids (B, S) and their mask (B, S) to (B, S, D).

        Raises:
            TypeError: ids that are not integers, a mask that is not boolean.
            ValueError: an id outside the table, a text longer than the position table, shapes that
                do not fit, or a row of the mask without a real token.

        Book: encoder-decoder-original
        """
        x = self.embed(tokens)
        attn_mask = real_key_mask("token_mask", token_mask, *tokens.shape)
        for block in self.encoder:
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
        num_logits: int | None = None,
    ) -> Tensor:
        """Logits of the token that follows each target.

        Args:
            target: (B, T) integer ids, shifted right: the first is `decoder_start_id`.
            context: (B, S, D), from `encode`.
            context_mask: (B, S) bool, the source's `token_mask`.
            target_mask: bool, True = real token, over the cached positions and the new ones.
            cache: from `make_cache`; the new positions are appended to it.
            num_logits: score the last positions only, so many of them.

        Returns:
            (B, T, V), or (B, num_logits, V).

        Raises:
            TypeError: ids that are not integers, a mask that is not boolean.
            ValueError: an id outside the table, a target longer than the position table, shapes
                that do not fit, or a row of a mask without a real token.

        Book: encoder-decoder-original
        """
        if cache is not None and len(cache) != len(self.decoder):
            raise ValueError(f"cache: expected {len(self.decoder)} pairs, one a layer, got {len(cache)}")
        past = cache[0][0].length if cache is not None else 0
        x = self.embed(target, start=past, name="target")  # (B, T, D)
        B, T = target.shape
        expect_shape("context", context, "B S D", B=B, D=self.config.d_model)
        attn_mask = real_key_mask("target_mask", target_mask, B, past + T)
        cross_mask = real_key_mask("context_mask", context_mask, B, context.size(1))
        for i, block in enumerate(self.decoder):
            layer = cache[i] if cache is not None else None
            x = block(x, context, attn_mask=attn_mask, cross_mask=cross_mask, cache=layer)
        return self.token_embed.attend(last_hidden(x, num_logits)) + self.logits_bias

    def forward(
        self,
        tokens: Tensor,
        target: Tensor,
        *,
        token_mask: Tensor | None = None,
        target_mask: Tensor | None = None,
    ) -> Tensor:
        """Logits (B, T, V) for a source (B, S) and a target (B, T), shifted right."""
        context = self.encode(tokens, token_mask=token_mask)
        return self.decode(target, context, context_mask=token_mask, target_mask=target_mask)

    def make_cache(self, batch_size: int, max_seq_len: int, source_len: int) -> list[LayerCache]:
        """Empty caches for each decoder layer, for up to `max_seq_len` targets and `source_len` keys.

        Raises:
            ValueError: a size is not positive, or beyond the position table.

        Book: encoder-decoder-original
        """
        for name, size in (("max_seq_len", max_seq_len), ("source_len", source_len)):
            if not 0 < size <= self.config.max_seq_len:
                raise ValueError(f"{name}: expected 1 to {self.config.max_seq_len}, got {size}")
        table, heads = self.token_embed.weight, self.config.num_heads

        def empty(length: int) -> KVCache:
            head_dim = self.config.d_model // heads
            return KVCache(batch_size, heads, length, head_dim, dtype=table.dtype, device=table.device)

        return [(empty(max_seq_len), empty(source_len)) for _ in self.decoder]

    def shift_right(self, labels: Tensor) -> Tensor:
        """The decoder's input for labels (B, T): `decoder_start_id`, then all labels but the last.

        Book: encoder-decoder-original
        """
        return shift_right(labels, start_id=self.config.decoder_start_id, pad_id=self.config.pad_id)


def initialise(model: nn.Module) -> None:
    r"""Draw matrices uniformly within $\pm\sqrt{6 / (\text{in} + \text{out})}$, the table from
    $N(0, 1/D)$; biases 0, norms 1. In place.

    The paper names no initialisation; this is that of its published code (Glorot and Bengio's).

    Book: encoder-decoder-original
    """
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
        if isinstance(module, TokenEmbedding):
            nn.init.normal_(module.weight, std=module.embedding_dim**-0.5)
