"""PaLM: a decoder whose blocks attend and feed forward side by side.

In this file: the config and its published sizes, the block, the decoder, its head, the z-loss, and the
table that maps the weights of the public implementation to ours. PaLM's own weights were never
published.

B batch, T new tokens, S positions in all, D d_model, H heads, Dh head_dim, F d_ff, V vocabulary.
Paper: Chowdhery et al. (2022), sections 2 and 5. Reference: palm_pytorch.PaLM; and, as a second one,
transformers.CohereForCausalLM with one key/value head, which computes the same function.

Book: palm-block
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from textbook_code.layers.attention import Attention
from textbook_code.layers.cache import KVCache
from textbook_code.layers.checks import expect_sizes
from textbook_code.layers.decoding import decoder_inputs, last_hidden
from textbook_code.layers.embeddings import TokenEmbedding
from textbook_code.layers.feed_forward import GatedFeedForward
from textbook_code.layers.norms import LayerNorm
from textbook_code.layers.positions import RotaryPositions
from textbook_code.pretrained import Pretrained
from textbook_code.weights import Packed, Rule


@dataclass(frozen=True)
class PalmConfig:
    """The sizes of a PaLM; the defaults are PaLM 8B.

    All heads share one key/value head. `scaled_logits`: whether the logits are divided by √d_model,
    as the paper does because its shared token table starts at N(0, 1).

    Raises:
        ValueError: a size is not positive.

    Book: palm-block
    """

    vocab_size: int = 256_000
    d_model: int = 4096
    num_layers: int = 32
    num_heads: int = 16
    head_dim: int = 256
    d_ff: int = 16_384
    max_seq_len: int = 2048
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-5
    scaled_logits: bool = True

    def __post_init__(self) -> None:
        expect_sizes(self)

    @classmethod
    def _sized(cls, num_layers: int, num_heads: int, d_model: int, /, **other: Any) -> Self:
        sizes = {"num_layers": num_layers, "num_heads": num_heads, "d_model": d_model, "d_ff": 4 * d_model}
        return cls(**{**sizes, **other})

    @classmethod
    def palm_8b(cls, **other: Any) -> Self:
        """32 layers of width 4096."""
        return cls._sized(32, 16, 4096, **other)

    @classmethod
    def palm_62b(cls, **other: Any) -> Self:
        """64 layers of width 8192."""
        return cls._sized(64, 32, 8192, **other)

    @classmethod
    def palm_540b(cls, **other: Any) -> Self:
        """118 layers of width 18432."""
        return cls._sized(118, 48, 18_432, **other)

    def num_parameters(self) -> int:
        r"""How many numbers the model holds; the shared token table counts once.

        $$V D + L\,(2 D H D_h + 2 D D_h + 3 D F + D) + D$$

        Book: palm-block
        """
        D = self.d_model
        block = 2 * D * (self.num_heads + 1) * self.head_dim + 3 * D * self.d_ff + D
        return self.vocab_size * D + self.num_layers * block + D

    def flops(self, T: int) -> int:
        r"""Operations of one forward pass over T tokens, 2 for each multiply-add of a matrix product.

        $$L\,(2T\,(2 D H D_h + 2 D D_h + 3 D F) + 4 T^2 H D_h) + 2 T D V,$$

        attention counted as the full T × T square, logits at all positions.

        Raises:
            ValueError: T is not positive.

        Book: palm-block
        """
        if T < 1:
            raise ValueError(f"T: expected at least 1, got {T}")
        D, H, Dh = self.d_model, self.num_heads, self.head_dim
        matrices = 2 * D * (H + 1) * Dh + 3 * D * self.d_ff
        return self.num_layers * (2 * T * matrices + 4 * T * T * H * Dh) + 2 * T * D * self.vocab_size


class Block(nn.Module):
    r"""One parallel block: both halves read the same normalised vector, and there is one norm.

    $$u = \mathrm{LN}(x), \qquad y = x + \mathrm{Attn}(u) + \mathrm{FFN}(u)$$

    Book: palm-block
    """

    def __init__(self, config: PalmConfig) -> None:
        super().__init__()
        self.norm = LayerNorm(config.d_model, norm_eps=config.norm_eps, bias=False)
        self.attn = Attention(
            config.d_model, config.num_heads, num_kv_heads=1, head_dim=config.head_dim, bias=False
        )
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
        u = self.norm(x)
        attended = self.attn(u, causal=True, attn_mask=attn_mask, rotary=rotary, cache=cache)
        return x + attended + self.ffn(u)


class Palm(nn.Module):
    r"""The decoder: the token table, `num_layers` parallel blocks, a norm. No bias anywhere.

    $$x = E_{\mathrm{token}}, \qquad \text{then each block in turn,} \qquad h = \mathrm{LN}(x).$$

    Book: palm-block
    """

    def __init__(self, config: PalmConfig) -> None:
        super().__init__()
        self.config = config
        self.token_embed = TokenEmbedding(config.vocab_size, config.d_model)
        self.rotary = RotaryPositions(config.head_dim, theta=config.rope_theta)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.final_norm = LayerNorm(config.d_model, norm_eps=config.norm_eps, bias=False)
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

        Book: palm-block
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

        Args:
            batch_size: B.
            max_seq_len: most positions to be stored; the whole context when left out.

        Book: attention-cache
        """
        length = self.config.max_seq_len if max_seq_len is None else max_seq_len
        weight = self.token_embed.weight
        return [
            KVCache(batch_size, 1, length, self.config.head_dim, dtype=weight.dtype, device=weight.device)
            for _ in self.blocks
        ]


def initialise(model: nn.Module) -> None:
    """Draw matrices from N(0, 1/fan_in) and the token table from N(0, 1); norms are 1. In place.

    Paper: Chowdhery et al. (2022), section 5.

    Book: palm-block
    """
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=1.0)


def z_loss(logits: Tensor, *, weight: float = 1e-4) -> Tensor:
    r"""Pull the softmax's normaliser towards 1, so that logits do not drift away together.

    $$\mathtt{weight} \cdot \operatorname{mean} \log^2 Z, \qquad Z = \sum_v e^{\mathrm{logit}_v}$$

    The cross-entropy ignores a shift common to all logits of a position; this term does not. It is
    added to the cross-entropy.
    Paper: Chowdhery et al. (2022), section 5.

    Args:
        logits: (…, V).
        weight: the factor; 1e-4 in the paper.

    Returns:
        A scalar, computed in float32 at least.

    Raises:
        ValueError: there are no logits, or the weight is negative.

    Book: palm-z-loss
    """
    if logits.dim() < 1 or logits.numel() == 0:
        raise ValueError(f"logits: expected shape (…, V), got {tuple(logits.shape)}")
    if weight < 0:
        raise ValueError(f"weight: expected 0 or more, got {weight}")
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return weight * wide.logsumexp(-1).square().mean()


def _palm_pytorch(num_layers: int) -> tuple[Rule | Packed, ...]:
    """Names in the public implementation, an nn.Sequential: the table, the blocks, the norm, the head.

    Its layers are numbered from the table on, so the last norm's number depends on the depth.
    """
    rules: list[Rule | Packed] = [("0.weight", "palm.token_embed.weight")]
    for i in range(num_layers):
        theirs, ours = f"{i + 1}.fn.", f"palm.blocks.{i}."
        fused = ("attn.q_proj", "attn.k_proj", "attn.v_proj", "ffn.up_proj", "ffn.gate_proj")
        rules += [
            (theirs + "norm.gamma", ours + "norm.weight"),
            # one matrix for all that read the same vector; the second half of the last part is bent
            Packed(theirs + "fused_attn_ff_proj.weight", tuple(f"{ours}{part}.weight" for part in fused)),
            (theirs + "attn_out.weight", ours + "attn.out_proj.weight"),
            (theirs + "ff_out.1.weight", ours + "ffn.down_proj.weight"),
        ]
    return (
        *rules,
        (f"{num_layers + 1}.gamma", "palm.final_norm.weight"),
        ("{i}.beta", None),  # zeros, and frequencies: stored, not learned
        ("{i}.fn.norm.beta", None),
        ("{i}.fn.rotary_emb.inv_freq", None),
    )


class PalmForCausalLM(Pretrained, nn.Module):
    r"""PaLM as a language model, scored against the token table.

    $$\mathrm{logits} = h E^\top / \sqrt D$$

    Weights are saved under the names of palm_pytorch, the public implementation, and the config under
    ours: there is no published file to agree with.

    Book: palm-block
    """

    config_class = PalmConfig
    hf_architecture = "PaLM"
    hf_config: ClassVar[dict[str, str]] = {name: name for name in PalmConfig.__dataclass_fields__}
    hf_assumes: ClassVar[dict[str, Any]] = {"model_type": "palm"}

    def __init__(self, config: PalmConfig) -> None:
        super().__init__()
        self.config = config
        self.palm = Palm(config)
        self.hf_weights = _palm_pytorch(config.num_layers)
        self.hf_tied = {f"{config.num_layers + 2}.weight": "0.weight"}

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
            tokens, token_mask, cache: as in `Palm`.
            num_logits: score the last so many positions only; all when left out.

        Returns:
            Logits (B, T, V), or (B, num_logits, V).

        Raises:
            TypeError, ValueError: as in `Palm`; or more logits than new positions are asked for.

        Book: palm-block
        """
        hidden = last_hidden(self.palm(tokens, token_mask=token_mask, cache=cache), num_logits)
        if self.config.scaled_logits:
            hidden = hidden / math.sqrt(self.config.d_model)  # D numbers a position, not V
        return self.palm.token_embed.attend(hidden)

    def make_cache(self, batch_size: int, max_seq_len: int | None = None) -> list[KVCache]:
        """As `Palm.make_cache`.

        Book: attention-cache
        """
        return self.palm.make_cache(batch_size, max_seq_len)

    @classmethod
    def from_hf(cls, hf_model: Any) -> Self:
        """Build from a `palm_pytorch.PaLM`, which has no config: its sizes are read from its layers.

        It does not scale its logits, so neither does the result.

        Raises:
            WeightError: a tensor does not fit.

        Book: palm-block
        """
        table, first = hf_model[0], hf_model[1].fn
        config = cls.config_class(
            vocab_size=table.num_embeddings,
            d_model=table.embedding_dim,
            num_layers=len(hf_model) - 3,
            num_heads=first.heads,
            head_dim=first.fused_dims[1],
            d_ff=first.fused_dims[3] // 2,
            scaled_logits=False,
        )
        return cls(config).load_hf_state_dict(hf_model.state_dict()).eval()
