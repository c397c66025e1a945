"""A decoder put together from given parts: the bench on which attention, positions and norms are compared.

    x = E[tokens] (+ positions);   x = block(x) for each block;   logits = norm(x) Eᵀ

It is no published model. A published one has a file of its own, in which every choice is written out; here
the choices come in as modules, so that two decoders can differ in one part and in nothing else.

B batch, T length, D d_model, V vocab_size.

Book: part-advanced-bench
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from textbook_code.layers.attention import Attention
from textbook_code.layers.embeddings import TokenEmbedding
from textbook_code.layers.positions import BiasesScores, Rotates
from textbook_code.layers.residual import Residual


class CausalAttention(nn.Module):
    """The bench's attention branch: it looks at no later position, and is told places in the way given.

    Args:
        attn: the attention itself.
        rotary: turns queries and keys, as `RotaryPositions`; they are not turned when left out.
        score_bias: is added to the scores, as `RelativeBias` or `ALiBi`; nothing is when left out.

    Book: part-advanced-bench
    """

    def __init__(
        self, attn: Attention, *, rotary: Rotates | None = None, score_bias: BiasesScores | None = None
    ) -> None:
        super().__init__()
        self.attn, self.rotary, self.score_bias = attn, rotary, score_bias

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, T, D) to (B, T, D)."""
        T, turn, bias = x.size(1), None, None
        if self.rotary is not None:
            turn = self.rotary(torch.arange(T, device=x.device), x.dtype)
        if self.score_bias is not None:
            bias = self.score_bias(T, T)
        out: Tensor = self.attn(x, causal=True, rotary=turn, score_bias=bias)
        return out


class Block(nn.Module):
    """Attention and a feed-forward network, each in its residual connection.

    Args:
        attn: the first half; its branch takes (B, T, D) and looks at no later position.
        ffn: the second half.

    Book: part-advanced-bench
    """

    def __init__(self, attn: Residual, ffn: Residual) -> None:
        super().__init__()
        self.attn, self.ffn = attn, ffn

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, T, D) to (B, T, D)."""
        return self.ffn(self.attn(x))


class Decoder(nn.Module):
    """Token embeddings, blocks, a last norm, and the embeddings once more as the output layer.

    Matrices and tables are drawn from N(0, 0.02²), those that write into the stream from
    N(0, 0.02² / 2L) as GPT-2's, biases are 0; a part that wants another start sets it afterwards.

    Args:
        vocab_size: V.
        d_model: D.
        blocks: modules (B, T, D) → (B, T, D).
        pos_embed: gives the vectors (T, D) that are added to the embeddings of T tokens, called with T;
            nothing is added when left out.
        final_norm: a norm before the output layer, as behind pre-norm blocks; none when left out.

    Book: part-advanced-bench
    """

    def __init__(
        self,
        vocab_size: int,
        d_model: int,
        blocks: Iterable[nn.Module],
        *,
        pos_embed: nn.Module | None = None,
        final_norm: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.token_embed = TokenEmbedding(vocab_size, d_model)
        self.pos_embed = pos_embed
        self.blocks = nn.ModuleList(blocks)
        self.final_norm = final_norm
        self.reset_parameters()

    def reset_parameters(self, std: float = 0.02) -> None:
        """Draw all matrices and tables anew."""
        for name, parameter in self.named_parameters():
            if parameter.dim() < 2:
                if name.endswith("bias"):
                    nn.init.zeros_(parameter)
                continue
            writes = name.endswith(("out_proj.weight", "fc2.weight", "down_proj.weight"))
            nn.init.normal_(parameter, std=std / (2 * len(self.blocks)) ** 0.5 if writes else std)

    def forward(self, tokens: Tensor) -> Tensor:
        """Score every token of the vocabulary as the next one.

        Args:
            tokens: (B, T) integer ids.

        Returns:
            (B, T, V) logits.

        Raises:
            TypeError: the ids are not integers.
            ValueError: an id, or a position, lies outside its table.

        Book: part-advanced-bench
        """
        x = self.token_embed(tokens)  # (B, T, D)
        if self.pos_embed is not None:
            x = x + self.pos_embed(tokens.size(1))
        for block in self.blocks:
            x = block(x)
        if self.final_norm is not None:
            x = self.final_norm(x)
        return self.token_embed.attend(x)
