"""LLaMA: the decoder that most open models after it are variants of; Mistral, which sees a window.

In this file: the config and its published sizes, the block, the decoder, its two heads, and the table
that maps published weights to ours.

B batch, T new tokens, S positions in all, D d_model, H heads, K key/value heads, Dh head_dim,
F d_ff, V vocabulary, C classes.
Papers: Touvron et al. (2023a, 2023b); Grattafiori et al. (2024); Jiang et al. (2023) for Mistral.
Reference: transformers.LlamaForCausalLM, MistralForCausalLM and their relatives.

Book: modern-decoders
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from textbook_code.layers.attention import Attention
from textbook_code.layers.cache import KVCache, RollingCache
from textbook_code.layers.checks import expect_divides, expect_sizes
from textbook_code.layers.decoding import decoder_inputs, last_hidden
from textbook_code.layers.embeddings import TokenEmbedding
from textbook_code.layers.feed_forward import GatedFeedForward
from textbook_code.layers.local_attention import LocalAttention
from textbook_code.layers.norms import RMSNorm
from textbook_code.layers.positions import Llama3Scaling, RotaryPositions
from textbook_code.pretrained import Pretrained
from textbook_code.weights import Rule, WeightError


def swiglu_width(d_model: int, *, multiple_of: int = 256, multiplier: float = 1.0) -> int:
    r"""F of a gated feed-forward layer with the parameters of a plain one of width 4 D, rounded up.

    $$F = m \left\lceil \frac{\mathtt{multiplier} \cdot \frac23 \cdot 4 D}{m} \right\rceil,
      \qquad m = \mathtt{multiple\_of}$$

    with each product cut to an integer, as in the first release. Three D × F matrices hold as many
    numbers as two D × 4D ones when F = 8/3 D (Shazeer, 2020).

    Args:
        d_model: D.
        multiple_of: m, so that F fits the hardware's tiles.
        multiplier: how much wider than parameter-matched; LLaMA widens this layer by 1.3 where it
            shares keys and values among heads.

    Raises:
        ValueError: a number is not positive.

    Book: llama-swiglu
    """
    if d_model < 1 or multiple_of < 1 or multiplier <= 0:
        raise ValueError(
            "d_model, multiple_of, multiplier: expected positive numbers, "
            f"got {d_model}, {multiple_of}, {multiplier}"
        )
    width = int(multiplier * (2 * 4 * d_model // 3))
    return -(-width // multiple_of) * multiple_of


@dataclass(frozen=True)
class LlamaConfig:
    """The sizes of a LLaMA; the defaults are LLaMA 1, 7B.

    `head_dim` is d_model / num_heads when left out. `scaling` stretches RoPE for a longer context.
    `tied`: whether the output layer is the transpose of the token table. `sliding_window`: how many
    positions a query sees, its own included; all when left out.

    Raises:
        ValueError: a size is not positive, or the head counts do not divide.

    Book: llama-sizes
    """

    vocab_size: int = 32_000
    d_model: int = 4096
    num_layers: int = 32
    num_heads: int = 32
    num_kv_heads: int = 32
    head_dim: int = None  # type: ignore[assignment]  # filled in below
    d_ff: int = 11_008
    max_seq_len: int = 2048
    rope_theta: float = 10_000.0
    scaling: Llama3Scaling | None = None
    norm_eps: float = 1e-6
    tied: bool = False
    sliding_window: int | None = None

    def __post_init__(self) -> None:
        expect_sizes(self)
        if self.head_dim is None:
            expect_divides("num_heads", self.num_heads, "d_model", self.d_model)
            object.__setattr__(self, "head_dim", self.d_model // self.num_heads)
        expect_divides("num_kv_heads", self.num_kv_heads, "num_heads", self.num_heads)

    @classmethod
    def _sized(
        cls, num_layers: int, d_model: int, num_heads: int, num_kv_heads: int, d_ff: int, /, **other: Any
    ) -> Self:
        sizes = {
            "num_layers": num_layers,
            "d_model": d_model,
            "num_heads": num_heads,
            "num_kv_heads": num_kv_heads,
            "d_ff": d_ff,
        }
        return cls(**{**sizes, **other})

    # LLaMA 1: a context of 2048, ε = 1e-6 (1e-5 in the largest)

    @classmethod
    def llama1_7b(cls, **other: Any) -> Self:
        """32 layers of width 4096."""
        return cls._sized(32, 4096, 32, 32, swiglu_width(4096), **other)

    @classmethod
    def llama1_13b(cls, **other: Any) -> Self:
        """40 layers of width 5120."""
        return cls._sized(40, 5120, 40, 40, swiglu_width(5120), **other)

    @classmethod
    def llama1_30b(cls, **other: Any) -> Self:
        """60 layers of width 6656: the model that the paper calls 33B."""
        return cls._sized(60, 6656, 52, 52, swiglu_width(6656), **other)

    @classmethod
    def llama1_65b(cls, **other: Any) -> Self:
        """80 layers of width 8192."""
        return cls._sized(80, 8192, 64, 64, swiglu_width(8192), **{"norm_eps": 1e-5, **other})

    # LLaMA 2: a context of 4096; the largest shares keys and values

    @classmethod
    def llama2_7b(cls, **other: Any) -> Self:
        """LLaMA 1 7B with twice the context."""
        return cls.llama1_7b(**{"max_seq_len": 4096, "norm_eps": 1e-5, **other})

    @classmethod
    def llama2_13b(cls, **other: Any) -> Self:
        """LLaMA 1 13B with twice the context."""
        return cls.llama1_13b(**{"max_seq_len": 4096, "norm_eps": 1e-5, **other})

    @classmethod
    def llama2_70b(cls, **other: Any) -> Self:
        """80 layers of width 8192; 8 query heads share a key/value head."""
        d_ff = swiglu_width(8192, multiple_of=4096, multiplier=1.3)
        return cls._sized(80, 8192, 64, 8, d_ff, **{"max_seq_len": 4096, "norm_eps": 1e-5, **other})

    # LLaMA 3: a vocabulary of 128,256, θ = 500,000, 8 key/value heads in every size

    @classmethod
    def _llama3(cls, *sizes: int, **other: Any) -> Self:
        return cls._sized(
            *sizes,
            **{
                "vocab_size": 128_256,
                "max_seq_len": 8192,
                "rope_theta": 500_000.0,
                "norm_eps": 1e-5,
                **other,
            },
        )

    @classmethod
    def llama3_8b(cls, **other: Any) -> Self:
        """32 layers of width 4096."""
        return cls._llama3(32, 4096, 32, 8, swiglu_width(4096, multiple_of=1024, multiplier=1.3), **other)

    @classmethod
    def llama3_70b(cls, **other: Any) -> Self:
        """80 layers of width 8192."""
        return cls._llama3(80, 8192, 64, 8, swiglu_width(8192, multiple_of=4096, multiplier=1.3), **other)

    # LLaMA 3.1 and 3.2: a context of 131,072 by stretched RoPE

    @classmethod
    def llama31_8b(cls, **other: Any) -> Self:
        """LLaMA 3 8B, stretched eightfold."""
        return cls.llama3_8b(**{"max_seq_len": 131_072, "scaling": Llama3Scaling(), **other})

    @classmethod
    def llama31_70b(cls, **other: Any) -> Self:
        """LLaMA 3 70B, stretched eightfold."""
        return cls.llama3_70b(**{"max_seq_len": 131_072, "scaling": Llama3Scaling(), **other})

    @classmethod
    def llama31_405b(cls, **other: Any) -> Self:
        """126 layers of width 16384."""
        d_ff = swiglu_width(16_384, multiple_of=4096, multiplier=1.2)
        stretched = {"max_seq_len": 131_072, "scaling": Llama3Scaling(), **other}
        return cls._llama3(126, 16_384, 128, 8, d_ff, **stretched)

    @classmethod
    def llama32_1b(cls, **other: Any) -> Self:
        """16 layers of width 2048, tied."""
        tied = {"max_seq_len": 131_072, "scaling": Llama3Scaling(factor=32.0), "tied": True, **other}
        return cls._llama3(16, 2048, 32, 8, swiglu_width(2048, multiplier=1.5), **tied)

    @classmethod
    def llama32_3b(cls, **other: Any) -> Self:
        """28 layers of width 3072, tied."""
        tied = {"max_seq_len": 131_072, "scaling": Llama3Scaling(factor=32.0), "tied": True, **other}
        return cls._llama3(28, 3072, 24, 8, swiglu_width(3072), **tied)

    # SmolLM2: small models of another maker in the same shape, deep and thin, all tied

    @classmethod
    def _smollm2(cls, *sizes: int, **other: Any) -> Self:
        small = {"vocab_size": 49_152, "max_seq_len": 8192, "norm_eps": 1e-5, "tied": True}
        return cls._sized(*sizes, **{**small, **other})

    @classmethod
    def smollm2_135m(cls, **other: Any) -> Self:
        """30 layers of width 576."""
        return cls._smollm2(30, 576, 9, 3, swiglu_width(576), **{"rope_theta": 100_000.0, **other})

    @classmethod
    def smollm2_360m(cls, **other: Any) -> Self:
        """32 layers of width 960."""
        return cls._smollm2(32, 960, 15, 5, swiglu_width(960), **{"rope_theta": 100_000.0, **other})

    @classmethod
    def smollm2_1b7(cls, **other: Any) -> Self:
        """24 layers of width 2048."""
        d_ff = swiglu_width(2048, multiplier=1.5)
        return cls._smollm2(24, 2048, 32, 32, d_ff, **{"rope_theta": 130_000.0, **other})

    # Mistral: LLaMA 2's shape, keys shared, in every layer a window

    @classmethod
    def mistral_7b(cls, **other: Any) -> Self:
        """32 layers of width 4096 that see 4096 positions each (version 0.1).

        Book: local-attention-cache
        """
        windowed = {"max_seq_len": 32_768, "norm_eps": 1e-5, "sliding_window": 4096, **other}
        return cls._sized(32, 4096, 32, 8, 14_336, **windowed)

    def num_parameters(self) -> int:
        r"""How many numbers the language model holds; a tied output layer counts once.

        $$(2 - \mathtt{tied})\, V D + L\,(2 D H D_h + 2 D K D_h + 3 D F + 2 D) + D$$

        Book: llama-sizes
        """
        D, F, wide, narrow = self.d_model, self.d_ff, self.num_heads, self.num_kv_heads
        block = 2 * D * (wide + narrow) * self.head_dim + 3 * D * F + 2 * D
        return (2 - self.tied) * self.vocab_size * D + self.num_layers * block + D

    def flops(self, T: int) -> int:
        r"""Operations of one forward pass over T tokens, 2 for each multiply-add of a matrix product.

        $$L\,(2T\,(2 D H D_h + 2 D K D_h + 3 D F) + 4 T \min(T, W)\, H D_h) + 2 T D V,$$

        attention counted as the full T × T square, or T × W with a window W, logits at all positions.

        Raises:
            ValueError: T is not positive.

        Book: llama-sizes
        """
        if T < 1:
            raise ValueError(f"T: expected at least 1, got {T}")
        D, F, Dh = self.d_model, self.d_ff, self.head_dim
        matrices = 2 * D * (self.num_heads + self.num_kv_heads) * Dh + 3 * D * F
        seen = T if self.sliding_window is None else min(T, self.sliding_window)
        block = 2 * T * matrices + 4 * T * seen * self.num_heads * Dh
        return self.num_layers * block + 2 * T * D * self.vocab_size


class Block(nn.Module):
    r"""One pre-norm decoder block; the residual stream itself is never normalised.

    $$y = x + \mathrm{Attn}(\mathrm{RMS}(x)), \qquad z = y + \mathrm{FFN}(\mathrm{RMS}(y))$$

    Book: llama-block
    """

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.attn_norm = RMSNorm(config.d_model, norm_eps=config.norm_eps)
        heads: dict[str, Any] = {"num_kv_heads": config.num_kv_heads, "head_dim": config.head_dim}
        self.attn: Attention | LocalAttention
        if config.sliding_window is None:
            self.attn = Attention(config.d_model, config.num_heads, **heads, bias=False)
        else:
            self.attn = LocalAttention(
                config.d_model, config.num_heads, **heads, window=config.sliding_window, bias=False
            )
        self.ffn_norm = RMSNorm(config.d_model, norm_eps=config.norm_eps)
        self.ffn = GatedFeedForward(config.d_model, config.d_ff, activation="silu")

    def forward(
        self,
        x: Tensor,
        *,
        rotary: tuple[Tensor, Tensor],
        attn_mask: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """Map (B, T, D) to (B, T, D); `rotary` turns the queries and keys of these T positions."""
        x = x + self.attn(self.attn_norm(x), causal=True, attn_mask=attn_mask, rotary=rotary, cache=cache)
        return x + self.ffn(self.ffn_norm(x))


def _decoder(theirs: str = "", ours: str = "") -> tuple[Rule, ...]:
    """Their names and ours, each under a prefix where the decoder is part of a larger model."""
    layer, block = theirs + "layers.{i}.", ours + "blocks.{i}."
    return (
        (theirs + "embed_tokens.weight", ours + "token_embed.weight"),
        (layer + "input_layernorm.weight", block + "attn_norm.weight"),
        (layer + "self_attn.o_proj.weight", block + "attn.out_proj.weight"),
        (layer + "self_attn.{p}_proj.weight", block + "attn.{p}_proj.weight"),  # q, k, v
        (layer + "post_attention_layernorm.weight", block + "ffn_norm.weight"),
        (layer + "mlp.{p}_proj.weight", block + "ffn.{p}_proj.weight"),  # gate, up, down
        (layer + "self_attn.rotary_emb.inv_freq", None),  # the frequencies: stored by old versions
        (theirs + "norm.weight", ours + "final_norm.weight"),
    )


class _LlamaPretrained(Pretrained):
    config_class = LlamaConfig
    hf_config: ClassVar[dict[str, str]] = {
        "vocab_size": "vocab_size",
        "d_model": "hidden_size",
        "num_layers": "num_hidden_layers",
        "num_heads": "num_attention_heads",
        "num_kv_heads": "num_key_value_heads",
        "head_dim": "head_dim",
        "d_ff": "intermediate_size",
        "max_seq_len": "max_position_embeddings",
        "rope_theta": "rope_theta",
        "norm_eps": "rms_norm_eps",
        "tied": "tie_word_embeddings",
    }
    hf_assumes: ClassVar[dict[str, Any]] = {
        "model_type": "llama",
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
    }

    @classmethod
    def config_from_hf(cls, theirs: Mapping[str, Any]) -> LlamaConfig:
        """As in `Pretrained`; fields that older files lack have the values that were meant then.

        RoPE stands in `rope_parameters`, in older files in `rope_theta` and `rope_scaling`. A file of the
        type "mistral" describes the same decoder, with a `sliding_window`.

        Raises:
            WeightError: it describes another architecture, lacks a field, or stretches RoPE in a way
                that this code does not.

        Book: bert-weights
        """
        rope = theirs.get("rope_parameters") or theirs.get("rope_scaling") or {}
        filled = {"tie_word_embeddings": False, "rope_theta": 10_000.0, **theirs}
        filled["rope_theta"] = rope.get("rope_theta", filled["rope_theta"])
        if filled.get("num_key_value_heads") is None:
            filled["num_key_value_heads"] = filled.get("num_attention_heads")
        filled.setdefault("head_dim", None)
        window = None
        if filled.get("model_type") == "mistral":
            filled["model_type"], window = "llama", filled.get("sliding_window")
        return replace(super().config_from_hf(filled), scaling=_scaling(rope), sliding_window=window)

    def config_to_hf(self) -> dict[str, Any]:
        rope: dict[str, Any] = {"rope_type": "default"}
        if self.config.scaling is not None:
            rope = {"rope_type": "llama3"}
            rope |= {_LLAMA3[ours]: value for ours, value in asdict(self.config.scaling).items()}
        windowed: dict[str, Any] = {}
        if self.config.sliding_window is not None:  # published under another name
            windowed = {
                "model_type": "mistral",
                "architectures": [self.hf_architecture.replace("Llama", "Mistral")],
                "sliding_window": self.config.sliding_window,
            }
        return {
            **super().config_to_hf(),
            **windowed,
            "rope_parameters": {**rope, "rope_theta": self.config.rope_theta},
            "rope_scaling": None if self.config.scaling is None else rope,  # what older readers look for
        }


_LLAMA3 = {
    "factor": "factor",
    "low": "low_freq_factor",
    "high": "high_freq_factor",
    "original": "original_max_position_embeddings",
}


def _scaling(rope: Mapping[str, Any]) -> Llama3Scaling | None:
    """The stretching that a published config describes."""
    kind = rope.get("rope_type", rope.get("type", "default"))
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise WeightError("config: expected RoPE on whole heads (partial_rotary_factor = 1.0)")
    if kind == "default":
        return None
    if kind != "llama3":
        raise WeightError(f"config: rope_type is {kind!r}, expected 'default' or 'llama3'")
    missing = [theirs for theirs in _LLAMA3.values() if theirs not in rope]
    if missing:
        raise WeightError(f"config: rope_type 'llama3' needs the fields {missing}, which are missing")
    return Llama3Scaling(**{ours: rope[theirs] for ours, theirs in _LLAMA3.items()})


class Llama(_LlamaPretrained, nn.Module):
    r"""The decoder: the token table, `num_layers` pre-norm blocks, a norm.

    $$x = E_{\mathrm{token}}, \qquad \text{then each block in turn,} \qquad h = \mathrm{RMS}(x).$$

    No position is added to x: each block turns its queries and keys instead.

    Book: llama-block
    """

    hf_architecture = "LlamaModel"
    hf_weights = (
        *_decoder(),
        # a language model's checkpoint: the decoder stands under `model.`, and its head is not wanted
        *_decoder("model."),
        ("lm_head.weight", None),
    )

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.token_embed = TokenEmbedding(config.vocab_size, config.d_model)
        self.rotary = RotaryPositions(config.head_dim, theta=config.rope_theta, scaling=config.scaling)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.final_norm = RMSNorm(config.d_model, norm_eps=config.norm_eps)
        initialise(self)

    def forward(
        self,
        tokens: Tensor,
        *,
        token_mask: Tensor | None = None,
        cache: Sequence[KVCache] | None = None,
    ) -> Tensor:
        """Read a batch of texts from left to right.

        Args:
            tokens: (B, T) integer ids; with a cache, those that follow the cached ones.
            token_mask: (B, S) bool over the cached and the new positions, True = real token; all are
                real when left out. Prompts of different lengths are padded on the left.
            cache: one for each block, from `make_cache`; the new keys and values are appended.

        Returns:
            Hidden states (B, T, D); those of padding mean nothing.

        Raises:
            TypeError: ids that are not integers, a mask that is not boolean.
            ValueError: an id outside the table, a text longer than the context, a row of padding
                alone, or shapes that do not fit.

        Book: llama-block
        """
        positions, attn_mask = decoder_inputs(
            tokens,
            max_seq_len=self.config.max_seq_len,
            num_layers=self.config.num_layers,
            token_mask=token_mask,
            cache=cache,
        )
        x = self.token_embed(tokens)  # (B, T, D)
        rotary = self.rotary(positions, x.dtype)  # cos and sin, (T, Dh) or (B, 1, T, Dh)
        for i, block in enumerate(self.blocks):
            x = block(x, rotary=rotary, attn_mask=attn_mask, cache=None if cache is None else cache[i])
        return self.final_norm(x)

    def make_cache(self, batch_size: int, max_seq_len: int | None = None) -> list[KVCache]:
        """An empty cache for each block, in the dtype and on the device of the weights.

        With a sliding window it is a ring of that many positions, however long the text.

        Args:
            batch_size: B.
            max_seq_len: most positions to be stored; the whole context when left out.

        Book: attention-cache
        """
        config, weight = self.config, self.token_embed.weight
        where: dict[str, Any] = {"dtype": weight.dtype, "device": weight.device}
        kind: type[KVCache] = KVCache
        positions = config.max_seq_len if max_seq_len is None else max_seq_len
        if config.sliding_window is not None:
            kind, positions = RollingCache, config.sliding_window
        return [
            kind(batch_size, config.num_kv_heads, positions, config.head_dim, **where) for _ in self.blocks
        ]


def initialise(model: nn.Module) -> None:
    """Draw every matrix and table from N(0, 0.02²); norms are 1. In place.

    The papers do not say how they start; this is the reference implementation's way.

    Book: llama-block
    """
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)


class LlamaForCausalLM(_LlamaPretrained, nn.Module):
    """LLaMA as a language model: which token comes next?

    Book: llama-real
    """

    hf_architecture = "LlamaForCausalLM"
    hf_weights = (*_decoder("model.", "llama."), ("lm_head.weight", "lm_head.weight"))

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.llama = Llama(config)
        self.lm_head = None if config.tied else nn.Linear(config.d_model, config.vocab_size, bias=False)
        self.hf_tied = {"lm_head.weight": "model.embed_tokens.weight"} if config.tied else {}
        if self.lm_head is not None:
            initialise(self.lm_head)

    def forward(
        self,
        tokens: Tensor,
        *,
        token_mask: Tensor | None = None,
        cache: Sequence[KVCache] | None = None,
        num_logits: int | None = None,
    ) -> Tensor:
        """Score the token that follows each position.

        Args:
            tokens, token_mask, cache: as in `Llama`.
            num_logits: score the last so many positions only; all when left out.

        Returns:
            Logits (B, T, V), or (B, num_logits, V).

        Raises:
            TypeError, ValueError: as in `Llama`; or more logits than new positions are asked for.

        Book: llama-real
        """
        hidden = last_hidden(self.llama(tokens, token_mask=token_mask, cache=cache), num_logits)
        return self.llama.token_embed.attend(hidden) if self.lm_head is None else self.lm_head(hidden)

    def make_cache(self, batch_size: int, max_seq_len: int | None = None) -> list[KVCache]:
        """As `Llama.make_cache`.

        Book: attention-cache
        """
        return self.llama.make_cache(batch_size, max_seq_len)


class LlamaForSequenceClassification(_LlamaPretrained, nn.Module):
    """One class for each text, read from its last real token, the only one that has seen all.

    Book: llama-block
    """

    hf_architecture = "LlamaForSequenceClassification"
    hf_weights = (*_decoder("model.", "llama."), ("score.weight", "classifier.weight"))

    def __init__(self, config: LlamaConfig, num_classes: int = 2) -> None:
        super().__init__()
        if num_classes < 2:
            raise ValueError(f"num_classes: expected at least 2, got {num_classes}")
        self.config = config
        self.llama = Llama(config)
        self.classifier = nn.Linear(config.d_model, num_classes, bias=False)
        initialise(self.classifier)

    def forward(self, tokens: Tensor, *, token_mask: Tensor | None = None) -> Tensor:
        """Logits (B, C); arguments as in `Llama`."""
        hidden = self.llama(tokens, token_mask=token_mask)  # (B, T, D)
        rows = torch.arange(tokens.size(0), device=tokens.device)
        if token_mask is None:
            last = torch.full_like(rows, tokens.size(1) - 1)
        else:
            last = (token_mask * torch.arange(tokens.size(1), device=tokens.device)).argmax(1)
        return self.classifier(hidden[rows, last])

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
