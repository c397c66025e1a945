"""GPT: a stack of decoder blocks that reads a text from left to right and predicts what comes next.

In this file: the config with the published sizes of GPT-1, GPT-2 and GPT-3, the two kinds of block, the
decoder, its heads, the fine-tuning loss, and the tables that map published weights to ours. What differs
between the three stands in the config:

    GPT-1   post-norm blocks, no final norm, 512 positions, 40,478 tokens
    GPT-2   pre-norm blocks, a final norm, 1,024 positions, 50,257 tokens, smaller residual projections
    GPT-3   as GPT-2, 2,048 positions, and every second layer sees a band only

B batch, T new tokens, S positions in all, D d_model, H heads, Dh head_dim, A = H Dh, F d_ff, P positions,
L layers, V vocabulary, C classes.
Papers: Radford et al. (2018), Radford et al. (2019), Brown et al. (2020).
Reference: transformers.OpenAIGPTLMHeadModel, GPT2LMHeadModel and their relatives; GPTNeoForCausalLM for
the band.

Book: decoder-only
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from textbook_code.layers.attention import Attention
from textbook_code.layers.cache import KVCache
from textbook_code.layers.checks import expect_divides, expect_ids, expect_shape, expect_sizes
from textbook_code.layers.decoding import decoder_inputs, last_hidden
from textbook_code.layers.embeddings import TokenEmbedding
from textbook_code.layers.feed_forward import FeedForward
from textbook_code.layers.masks import document_mask, sliding_window_mask
from textbook_code.layers.norms import LayerNorm
from textbook_code.layers.positions import LearnedPositions
from textbook_code.pretrained import Pretrained
from textbook_code.weights import Packed, Rule, WeightError, invert, rename


@dataclass(frozen=True)
class GptConfig:
    """The sizes of a GPT, and what the three generations differ in; the defaults are GPT-2's smallest.

    Args:
        head_dim: Dh; D / H when left out. The table of GPT-3 gives it by itself.
        pre_norm: whether the norms stand before the two halves of a block, with one more after the
            last block (GPT-2), or after each residual sum (GPT-1).
        window: how many positions a token sees in every second layer (GPT-3); all when left out.

    Raises:
        ValueError: a size is not positive, or the heads do not divide the width.

    Book: gpt-model
    """

    vocab_size: int = 50257
    d_model: int = 768
    num_layers: int = 12
    num_heads: int = 12
    d_ff: int = 3072
    max_seq_len: int = 1024
    head_dim: int | None = None
    pre_norm: bool = True
    window: int | None = None
    norm_eps: float = 1e-5
    dropout: float = 0.1
    embed_dropout: float = 0.1
    attn_dropout: float = 0.1

    def __post_init__(self) -> None:
        expect_sizes(self)
        if self.head_dim is None:
            expect_divides("num_heads", self.num_heads, "d_model", self.d_model)

    @classmethod
    def _sized(cls, num_layers: int, d_model: int, num_heads: int, /, **other: Any) -> Self:
        own = {"num_layers": num_layers, "d_model": d_model, "num_heads": num_heads, "d_ff": 4 * d_model}
        return cls(**own | other)

    @classmethod
    def gpt1(cls, **other: Any) -> Self:
        """GPT-1: 12 post-norm layers of width 768, 117 million parameters."""
        return cls._sized(12, 768, 12, **{"vocab_size": 40478, "max_seq_len": 512, "pre_norm": False} | other)

    @classmethod
    def gpt2_small(cls, **other: Any) -> Self:
        """12 layers of width 768."""
        return cls._sized(12, 768, 12, **other)

    @classmethod
    def gpt2_medium(cls, **other: Any) -> Self:
        """24 layers of width 1024."""
        return cls._sized(24, 1024, 16, **other)

    @classmethod
    def gpt2_large(cls, **other: Any) -> Self:
        """36 layers of width 1280."""
        return cls._sized(36, 1280, 20, **other)

    @classmethod
    def gpt2_xl(cls, **other: Any) -> Self:
        """48 layers of width 1600: the model that the paper calls GPT-2."""
        return cls._sized(48, 1600, 25, **other)

    @classmethod
    def _gpt3(cls, num_layers: int, d_model: int, num_heads: int, head_dim: int, /, **other: Any) -> Self:
        # the paper names the band, not its width; 256 is that of GPT-Neo, which follows it
        own = {"max_seq_len": 2048, "head_dim": head_dim, "window": 256}
        return cls._sized(num_layers, d_model, num_heads, **own | other)

    @classmethod
    def gpt3_small(cls, **other: Any) -> Self:
        """125 million parameters: 12 layers of width 768."""
        return cls._gpt3(12, 768, 12, 64, **other)

    @classmethod
    def gpt3_medium(cls, **other: Any) -> Self:
        """350 million: 24 layers of width 1024."""
        return cls._gpt3(24, 1024, 16, 64, **other)

    @classmethod
    def gpt3_large(cls, **other: Any) -> Self:
        """760 million: 24 layers of width 1536."""
        return cls._gpt3(24, 1536, 16, 96, **other)

    @classmethod
    def gpt3_xl(cls, **other: Any) -> Self:
        """1.3 billion, says its name; with the 24 heads of 128 of the paper's table it has more."""
        return cls._gpt3(24, 2048, 24, 128, **other)

    @classmethod
    def gpt3_2_7b(cls, **other: Any) -> Self:
        """2.7 billion: 32 layers of width 2560."""
        return cls._gpt3(32, 2560, 32, 80, **other)

    @classmethod
    def gpt3_6_7b(cls, **other: Any) -> Self:
        """6.7 billion: 32 layers of width 4096."""
        return cls._gpt3(32, 4096, 32, 128, **other)

    @classmethod
    def gpt3_13b(cls, **other: Any) -> Self:
        """13 billion: 40 layers of width 5140, which 40 heads of 128 do not fill."""
        return cls._gpt3(40, 5140, 40, 128, **other)

    @classmethod
    def gpt3_175b(cls, **other: Any) -> Self:
        """175 billion: 96 layers of width 12288, the model that the paper calls GPT-3."""
        return cls._gpt3(96, 12288, 96, 128, **other)

    @property
    def attn_width(self) -> int:
        """A, the width of all heads side by side."""
        return self.num_heads * (self.head_dim or self.d_model // self.num_heads)

    def num_parameters(self) -> int:
        r"""Numbers to train, the language head being the token table itself.

        $$(V + P)\,D + L\,(4DA + 3A + 2DF + F + 6D) + 2D,$$

        the last term for the final norm, which GPT-1 has not.

        Book: gpt-sizes
        """
        D, A, d_ff = self.d_model, self.attn_width, self.d_ff
        block = 4 * D * A + 3 * A + 2 * D * d_ff + d_ff + 6 * D
        return (self.vocab_size + self.max_seq_len) * D + self.num_layers * block + 2 * D * self.pre_norm

    def flops(self, T: int) -> int:
        r"""Operations of the matrix products in one forward pass of one text of T tokens, all T logits.

        $$T\,\big( L\,(8DA + 4DF + 4TA) + 2DV \big);$$

        a multiply-add counts 2, and attention is counted in full, also where a mask hides half of it.

        Raises:
            ValueError: T is not between 1 and the longest sequence.

        Book: gpt-sizes
        """
        if not 0 < T <= self.max_seq_len:
            raise ValueError(f"T: expected 1 to {self.max_seq_len} tokens (max_seq_len), got {T}")
        D, A = self.d_model, self.attn_width
        return T * (self.num_layers * (8 * D * A + 4 * D * self.d_ff + 4 * T * A) + 2 * D * self.vocab_size)


class _Halves(nn.Module):
    """The parts of a block, which are the same in all three generations; the blocks connect them."""

    def __init__(self, config: GptConfig) -> None:
        super().__init__()
        self.attn = Attention(
            config.d_model, config.num_heads, head_dim=config.head_dim, dropout=config.attn_dropout
        )
        self.attn_norm = LayerNorm(config.d_model, norm_eps=config.norm_eps)
        self.ffn = FeedForward(config.d_model, config.d_ff, activation="gelu_tanh")
        self.ffn_norm = LayerNorm(config.d_model, norm_eps=config.norm_eps)
        self.dropout = nn.Dropout(config.dropout)

    def attend(
        self, x: Tensor, *, attn_mask: Tensor | None, cache: KVCache | None, need_weights: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Causal self-attention (B, T, D), and its weights (B, H, T, S) where they are wanted."""
        out = self.attn(x, attn_mask=attn_mask, causal=True, cache=cache, need_weights=need_weights)
        attended, weights = out if need_weights else (out, None)
        return self.dropout(attended), weights


class PostNormBlock(_Halves):
    r"""GPT-1's block: add, then normalise. The residual stream itself is normalised, twice a block.

    $$y = \mathrm{LN}(x + \mathrm{Attn}(x)), \qquad z = \mathrm{LN}(y + \mathrm{FFN}(y))$$

    Book: gpt-model
    """

    def forward(
        self,
        x: Tensor,
        *,
        attn_mask: Tensor | None = None,
        cache: KVCache | None = None,
        need_weights: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Map (B, T, D) to (B, T, D), and the weights (B, H, T, S) where they are wanted."""
        attended, weights = self.attend(x, attn_mask=attn_mask, cache=cache, need_weights=need_weights)
        x = self.attn_norm(x + attended)
        return self.ffn_norm(x + self.dropout(self.ffn(x))), weights


class PreNormBlock(_Halves):
    r"""GPT-2's block: each half reads a normalised copy and adds to the stream, which nothing touches.

    $$y = x + \mathrm{Attn}(\mathrm{LN}(x)), \qquad z = y + \mathrm{FFN}(\mathrm{LN}(y))$$

    Book: gpt-pre-norm
    """

    def forward(
        self,
        x: Tensor,
        *,
        attn_mask: Tensor | None = None,
        cache: KVCache | None = None,
        need_weights: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Map (B, T, D) to (B, T, D), and the weights (B, H, T, S) where they are wanted."""
        attended, weights = self.attend(
            self.attn_norm(x), attn_mask=attn_mask, cache=cache, need_weights=need_weights
        )
        x = x + attended
        return x + self.dropout(self.ffn(self.ffn_norm(x))), weights


# ------------------------------------------------------------------------------------------------
# Published weights. GPT-1 and GPT-2 differ in the names of their tables; both store every matrix as
# (in, out), and the three projections of attention side by side.


def _decoder(theirs: str, ours: str) -> tuple[Rule | Packed, ...]:
    """Their names and ours, each under a prefix where the decoder is part of a larger model."""
    layer, block = theirs + "h.{i}.", ours + "blocks.{i}."
    qkv = (block + "attn.q_proj.{p}", block + "attn.k_proj.{p}", block + "attn.v_proj.{p}")
    return (
        (layer + "attn.bias", None),  # the causal mask: stored by old versions
        (layer + "attn.masked_bias", None),
        (layer + "ln_1.{p}", block + "attn_norm.{p}"),
        Packed(layer + "attn.c_attn.{p}", qkv, transposed=True),
        Packed(layer + "attn.c_proj.{p}", (block + "attn.out_proj.{p}",), transposed=True),
        (layer + "ln_2.{p}", block + "ffn_norm.{p}"),
        Packed(layer + "mlp.c_fc.{p}", (block + "ffn.fc1.{p}",), transposed=True),
        Packed(layer + "mlp.c_proj.{p}", (block + "ffn.fc2.{p}",), transposed=True),
        (theirs + "ln_f.{p}", ours + "final_norm.{p}"),
    )


@dataclass(frozen=True)
class _Published:
    """How one published implementation writes a GPT down."""

    name: str  # what its class names start with
    tables: tuple[str, str]  # its token table, its position table
    config: Mapping[str, str]  # our field → its key
    assumes: Mapping[str, Any]  # its key → the one value that this code implements

    def rules(self, theirs: str, ours: str) -> tuple[Rule | Packed, ...]:
        tokens, positions = self.tables
        return (
            (f"{theirs}{tokens}.weight", f"{ours}token_embed.weight"),
            (f"{theirs}{positions}.weight", f"{ours}pos_embed.weight"),
            *_decoder(theirs, ours),
        )


_KEYS = {
    "vocab_size": "vocab_size",
    "d_model": "n_embd",
    "num_layers": "n_layer",
    "num_heads": "n_head",
    "max_seq_len": "n_positions",
    "norm_eps": "layer_norm_epsilon",
    "dropout": "resid_pdrop",
    "embed_dropout": "embd_pdrop",
    "attn_dropout": "attn_pdrop",
}
_PLAIN_ATTENTION = {
    "activation_function": "gelu_new",
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "reorder_and_upcast_attn": False,
    "add_cross_attention": False,
    "tie_word_embeddings": True,
}
_PUBLISHED = {
    "openai-gpt": _Published(
        "OpenAIGPT",
        ("tokens_embed", "positions_embed"),
        _KEYS,
        {"afn": "gelu", "tie_word_embeddings": True},  # that library's "gelu" is the tanh form here
    ),
    "gpt2": _Published("GPT2", ("wte", "wpe"), {**_KEYS, "d_ff": "n_inner"}, _PLAIN_ATTENTION),
    # a band, or heads that do not fill the width: written as GPT-2, under a name that no GPT-2 reader takes
    "textbook-gpt": _Published(
        "TextbookGPT",
        ("wte", "wpe"),
        {**_KEYS, "d_ff": "n_inner", "head_dim": "head_dim", "pre_norm": "pre_norm", "window": "window"},
        _PLAIN_ATTENTION,
    ),
}


def _family(config: GptConfig) -> str:
    """The published implementation that can hold such a model."""
    if config.window is None and config.attn_width == config.d_model:
        if config.pre_norm:
            return "gpt2"
        if config.d_ff == 4 * config.d_model:
            return "openai-gpt"
    return "textbook-gpt"


class _GptPretrained(Pretrained):
    config_class = GptConfig
    hf_head: ClassVar[str]  # what their class names end with
    hf_extra: ClassVar[tuple[Rule, ...]] = ()
    ours: ClassVar[str] = "gpt."

    @classmethod
    def config_from_hf(cls, theirs: Mapping[str, Any]) -> GptConfig:
        """As in `Pretrained`; `model_type` says which of the implementations wrote it."""
        if (family := theirs.get("model_type")) not in _PUBLISHED:
            raise WeightError(
                f"config: {cls.__name__} needs model_type to be one of {sorted(_PUBLISHED)}, got {family!r}"
            )
        published = _PUBLISHED[family]
        for key, value in published.assumes.items():
            if theirs.get(key, value) != value:
                raise WeightError(f"config: {cls.__name__} needs {key} = {value!r}, got {theirs[key]!r}")
        missing = [key for key in published.config.values() if key not in theirs and key != "n_inner"]
        if missing:
            raise WeightError(f"config: {cls.__name__} needs the fields {missing}, which are missing")
        fields = {ours: theirs.get(key) for ours, key in published.config.items()}
        fields["d_ff"] = fields.get("d_ff") or 4 * theirs["n_embd"]
        return GptConfig(**{"pre_norm": family != "openai-gpt"} | fields)

    def config_to_hf(self) -> dict[str, Any]:
        """Our config under the published names."""
        family = _family(self.config)
        published = _PUBLISHED[family]
        named = {key: getattr(self.config, field) for field, key in published.config.items()}
        architecture = published.name + self.hf_head
        return {"architectures": [architecture], "model_type": family, **published.assumes, **named}

    def load_hf_state_dict(self, state_dict: Mapping[str, Tensor]) -> Self:
        """As in `Pretrained`; the decoder may stand under `transformer.` or by itself."""
        published = _PUBLISHED[_family(self.config)]
        rules = (*published.rules("transformer.", self.ours), *published.rules("", self.ours), *self.hf_extra)
        prefix = "transformer." if any(key.startswith("transformer.") for key in state_dict) else ""
        tied = {"lm_head.weight": f"{prefix}{published.tables[0]}.weight"}
        renamed = rename(state_dict, rules, expected=self.state_dict(), tied=tied)
        self.to(next(iter(renamed.values())).dtype).load_state_dict(renamed)
        return self

    def to_hf_state_dict(self) -> dict[str, Tensor]:
        """Our tensors under the published names."""
        prefix = "transformer." if self.ours else ""
        rules = _PUBLISHED[_family(self.config)].rules(prefix, self.ours)
        return invert(self.state_dict(), (*rules, *self.hf_extra))


class Gpt(_GptPretrained, nn.Module):
    r"""The decoder: token and position vectors, then `num_layers` blocks, each of which looks back only.

    $$x = E_{\mathrm{token}} + E_{\mathrm{position}}, \qquad \text{then each block in turn, and in
      GPT-2 and GPT-3 a last norm.}$$

    Book: gpt-model
    """

    hf_architecture = "OpenAIGPTModel or GPT2Model"
    hf_head = "Model"
    ours = ""

    def __init__(self, config: GptConfig) -> None:
        super().__init__()
        self.config = config
        self.token_embed = TokenEmbedding(config.vocab_size, config.d_model)
        self.pos_embed = LearnedPositions(config.max_seq_len, config.d_model)
        self.dropout = nn.Dropout(config.embed_dropout)
        block = PreNormBlock if config.pre_norm else PostNormBlock
        self.blocks = nn.ModuleList(block(config) for _ in range(config.num_layers))
        self.final_norm = LayerNorm(config.d_model, norm_eps=config.norm_eps) if config.pre_norm else None
        initialise(self)

    def forward(
        self,
        tokens: Tensor,
        *,
        token_mask: Tensor | None = None,
        cache: Sequence[KVCache] | None = None,
        document_ids: Tensor | None = None,
        need_weights: bool = False,
    ) -> Tensor | tuple[Tensor, list[Tensor]]:
        """Read a batch of texts from left to right.

        Args:
            tokens: (B, T) integer ids; with a cache, those that follow the cached ones.
            token_mask: (B, S) bool over the cached and the new positions, True = real token; all are
                real when left out. Prompts of different lengths are padded on the left.
            cache: one for each block, from `make_cache`; the new keys and values are appended.
            document_ids: (B, T) integers, equal within a document, where a row holds several, one
                after the other: no token sees another document, and positions start again in each.
            need_weights: also return each layer's attention weights.

        Returns:
            Hidden states (B, T, D), of which those of padding mean nothing; with `need_weights` also a
            list of (B, H, T, S).

        Raises:
            TypeError: ids that are not integers, a mask that is not boolean.
            ValueError: an id outside its table, a text longer than the position table, a row of padding
                alone, documents together with a cache or a token mask, or shapes that do not fit.

        Book: gpt-model
        """
        positions, attn_mask = decoder_inputs(
            tokens,
            max_seq_len=self.config.max_seq_len,
            num_layers=self.config.num_layers,
            token_mask=token_mask,
            cache=cache,
        )
        if document_ids is not None:
            if token_mask is not None or cache is not None:
                raise ValueError("document_ids: expected no token_mask and no cache beside it")
            expect_shape("document_ids", document_ids, "B T", B=tokens.size(0), T=tokens.size(1))
            positions, attn_mask = document_positions(document_ids), document_mask(document_ids)
        banded = self._band(tokens, attn_mask, cache)
        x = self.dropout(self.token_embed(tokens) + self.pos_embed.at(positions))  # (B, T, D)
        collected = []
        for i, block in enumerate(self.blocks):
            x, weights = block(
                x,
                attn_mask=attn_mask if i % 2 == 0 else banded,
                cache=None if cache is None else cache[i],
                need_weights=need_weights,
            )
            collected.append(weights)
        if self.final_norm is not None:
            x = self.final_norm(x)
        return (x, collected) if need_weights else x

    def _band(
        self, tokens: Tensor, attn_mask: Tensor | None, cache: Sequence[KVCache] | None
    ) -> Tensor | None:
        """The mask of every second layer: GPT-3's band, elsewhere the mask of all layers."""
        if self.config.window is None:
            return attn_mask
        T = tokens.size(1)
        S = T + (cache[0].length if cache else 0)
        band = sliding_window_mask(T, S, window=self.config.window, device=tokens.device)
        return band if attn_mask is None else attn_mask & band

    def make_cache(self, batch_size: int, max_seq_len: int | None = None) -> list[KVCache]:
        """An empty cache for each block, in the dtype and on the device of the weights.

        Args:
            batch_size: B.
            max_seq_len: most positions to be stored; the whole context when left out.

        Book: attention-cache
        """
        config, weight = self.config, self.token_embed.weight
        return [
            KVCache(
                batch_size,
                config.num_heads,
                config.max_seq_len if max_seq_len is None else max_seq_len,
                config.attn_width // config.num_heads,
                dtype=weight.dtype,
                device=weight.device,
            )
            for _ in self.blocks
        ]


def document_positions(document_ids: Tensor) -> Tensor:
    """Count each document of a packed row from 0.

    Args:
        document_ids: (B, T) integers; a new document starts where the id changes.

    Returns:
        (B, T) int64.

    Raises:
        TypeError: the ids are not integers.
        ValueError: they are not of shape (B, T).

    Book: gpt-packing
    """
    expect_ids("document_ids", document_ids)
    expect_shape("document_ids", document_ids, "B T")
    at = torch.arange(document_ids.size(1), device=document_ids.device).expand_as(document_ids)
    starts = torch.ones_like(document_ids, dtype=torch.bool)
    starts[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    return at - at.masked_fill(~starts, 0).cummax(1).values


def initialise(model: nn.Module) -> None:
    r"""Draw every matrix and table from N(0, 0.02²); biases 0, norms 1. In place.

    In a pre-norm decoder of L layers the 2L maps that write to the residual stream start smaller,

    $$\sigma_{\mathrm{residual}} = 0.02 / \sqrt{2L},$$

    so that what they write together does not grow with depth; the position table starts at 0.01, as in the
    released code. Papers: Radford et al. (2018, 2019).

    Book: gpt-init
    """
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Embedding | LearnedPositions):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
    if isinstance(model, Gpt) and model.config.pre_norm:
        nn.init.normal_(model.pos_embed.weight, std=0.01)
        for block in model.modules():
            if isinstance(block, _Halves):
                for residual in (block.attn.out_proj, block.ffn.fc2):
                    nn.init.normal_(residual.weight, std=0.02 / (2 * model.config.num_layers) ** 0.5)


class GptForCausalLM(_GptPretrained, nn.Module):
    """GPT as a language model: which token comes next? Scored against the input table.

    Book: gpt-objective
    """

    hf_architecture = "OpenAIGPTLMHeadModel or GPT2LMHeadModel"
    hf_head = "LMHeadModel"

    def __init__(self, config: GptConfig) -> None:
        super().__init__()
        self.config = config
        self.gpt = Gpt(config)

    def forward(
        self,
        tokens: Tensor,
        *,
        token_mask: Tensor | None = None,
        cache: Sequence[KVCache] | None = None,
        document_ids: Tensor | None = None,
        num_logits: int | None = None,
    ) -> Tensor:
        """Score the token that follows each position.

        Args:
            tokens, token_mask, cache, document_ids: as in `Gpt`.
            num_logits: score the last so many positions only; all when left out.

        Returns:
            Logits (B, T, V), or (B, num_logits, V).

        Raises:
            TypeError, ValueError: as in `Gpt`; or more logits than new positions are asked for.

        Book: gpt-objective
        """
        hidden = self.gpt(tokens, token_mask=token_mask, cache=cache, document_ids=document_ids)
        return self.gpt.token_embed.attend(last_hidden(hidden, num_logits))

    def make_cache(self, batch_size: int, max_seq_len: int | None = None) -> list[KVCache]:
        """As `Gpt.make_cache`.

        Book: attention-cache
        """
        return self.gpt.make_cache(batch_size, max_seq_len)


class GptForSequenceClassification(_GptPretrained, nn.Module):
    """One class for each text, read from its last real token, the only one that has seen all of it.

    With `num_classes=1` it scores one candidate of several: GPT-1 reads each answer to a question behind
    the question and compares the scores.

    Book: gpt-finetune
    """

    hf_architecture = "OpenAIGPTForSequenceClassification or GPT2ForSequenceClassification"
    hf_head = "ForSequenceClassification"
    hf_extra = (
        ("score.weight", "classifier.weight"),
        # the head that scores candidates; its bias is common to all of them, and softmax does not see it
        ("multiple_choice_head.summary.weight", "classifier.weight"),
        ("multiple_choice_head.summary.bias", None),
    )

    def __init__(self, config: GptConfig, num_classes: int = 2) -> None:
        super().__init__()
        if num_classes < 1:
            raise ValueError(f"num_classes: expected at least 1, got {num_classes}")
        self.config = config
        self.gpt = Gpt(config)
        self.dropout = nn.Dropout(config.dropout)
        self.classifier = nn.Linear(config.d_model, num_classes, bias=False)
        initialise(self.classifier)

    def forward(self, tokens: Tensor, *, token_mask: Tensor | None = None) -> Tensor:
        """Logits (B, C); arguments as in `Gpt`."""
        return self.classify(self.gpt(tokens, token_mask=token_mask), token_mask)

    def classify(self, hidden: Tensor, token_mask: Tensor | None = None) -> Tensor:
        """Hidden states (B, T, D) → logits (B, C), from each row's last real token."""
        B, T, _ = hidden.shape
        last = torch.full((B,), T - 1, device=hidden.device)
        if token_mask is not None:
            last = last - token_mask.flip(1).int().argmax(1)  # the first maximum: the last True
        return self.classifier(self.dropout(hidden[torch.arange(B, device=hidden.device), last]))

    @classmethod
    def from_decoder(cls, gpt: Gpt, num_classes: int) -> Self:
        """Put a new, untrained head on a trained decoder, which is shared, not copied.

        Book: gpt-finetune
        """
        model = cls(replace(gpt.config, num_layers=1), num_classes)  # its own decoder is not wanted
        model.config, model.gpt = gpt.config, gpt
        model.classifier.to(gpt.token_embed.weight)  # its dtype and device
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


def finetuning_loss(
    model: GptForSequenceClassification,
    tokens: Tensor,
    labels: Tensor,
    *,
    token_mask: Tensor | None = None,
    lm_weight: float = 0.5,
) -> Tensor:
    r"""GPT-1's loss of supervised fine-tuning: the task's, and the language model's as a helper.

    $$L = -\log p(y \mid x_1 \ldots x_T)
      \; - \; \lambda\, \frac{1}{T-1} \sum_{t=2}^{T} \log p(x_t \mid x_1 \ldots x_{t-1}),$$

    averaged over the texts, and the second term over all their tokens.
    Paper: Radford et al. (2018), section 3.2.

    Args:
        model: the classifier, whose token table also serves as the language head.
        tokens: (B, T) integer ids.
        labels: (B,) integer classes.
        token_mask: (B, T) bool, True = real token; what follows or precedes padding does not count.
        lm_weight: λ.

    Returns:
        A scalar.

    Raises:
        TypeError, ValueError: as in `Gpt`; labels that are not (B,) integers, or a negative weight.

    Book: gpt-finetune
    """
    expect_ids("labels", labels)
    expect_shape("labels", labels, "B", B=tokens.size(0))
    if lm_weight < 0:
        raise ValueError(f"lm_weight: expected 0 or more, got {lm_weight}")
    hidden = model.gpt(tokens, token_mask=token_mask)  # (B, T, D)
    task = F.cross_entropy(model.classify(hidden, token_mask), labels)
    if lm_weight == 0:
        return task
    logits, following = model.gpt.token_embed.attend(hidden[:, :-1]), tokens[:, 1:]
    if token_mask is None:
        return task + lm_weight * F.cross_entropy(logits.flatten(0, 1), following.flatten())
    counts = token_mask[:, :-1] & token_mask[:, 1:]
    return task + lm_weight * F.cross_entropy(logits[counts], following[counts])
