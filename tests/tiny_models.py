"""The smallest models with the interface that generation asks for; attention and padding are real."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from textbook_code.layers.attention import Attention
from textbook_code.layers.cache import KVCache
from textbook_code.layers.masks import causal_mask, key_mask
from textbook_code.layers.positions import token_positions


@dataclass(frozen=True)
class Config:
    vocab_size: int = 29
    max_seq_len: int = 24
    decoder_start_id: int = 3


class TinyCausal(nn.Module):
    """One layer of causal attention and a tied head; it counts what it is asked to compute."""

    def __init__(self, seed: int = 0, *, vocab_size: int = 29, loud: float = 1.0) -> None:
        super().__init__()
        self.config = Config(vocab_size)
        self.embed = nn.Embedding(vocab_size, 12)
        self.positions = nn.Embedding(self.config.max_seq_len, 12)
        self.attn = Attention(12, 3)
        self.out = nn.Linear(12, vocab_size)
        self.dropout = nn.Dropout(0.5)
        self.fed: list[int] = []
        self.asked: list[int | None] = []
        generator = torch.Generator().manual_seed(seed)
        for p in self.parameters():
            p.data = torch.randn(p.shape, generator=generator) * loud

    def make_cache(self, batch_size: int, max_seq_len: int | None = None) -> list[KVCache]:
        weight = self.embed.weight
        return [KVCache(batch_size, 3, max_seq_len or self.config.max_seq_len, 4, dtype=weight.dtype)]

    def forward(
        self,
        tokens: Tensor,
        *,
        token_mask: Tensor | None = None,
        cache: list[KVCache] | None = None,
        num_logits: int | None = None,
    ) -> Tensor:
        T, past = tokens.size(1), cache[0].length if cache else 0
        self.fed.append(T)
        self.asked.append(num_logits)
        if token_mask is None:
            token_mask = torch.ones(tokens.size(0), past + T, dtype=torch.bool)
        x = self.embed(tokens) + self.positions(token_positions(token_mask)[:, past:])
        mask = causal_mask(T, past + T) & key_mask(token_mask)
        x = x + self.dropout(self.attn(x, attn_mask=mask, cache=cache[0] if cache else None))
        return self.out(x if num_logits is None else x[:, -num_logits:])


class TinyEncoderDecoder(nn.Module):
    """One layer of attention on each side and one between."""

    def __init__(self, seed: int = 0, *, vocab_size: int = 29) -> None:
        super().__init__()
        self.config = Config(vocab_size)
        self.embed = nn.Embedding(vocab_size, 12)
        self.positions = nn.Embedding(self.config.max_seq_len, 12)
        self.attn, self.own, self.cross = Attention(12, 3), Attention(12, 3), Attention(12, 3)
        self.out = nn.Linear(12, vocab_size)
        self.encoded = 0
        generator = torch.Generator().manual_seed(seed)
        for p in self.parameters():
            p.data = torch.randn(p.shape, generator=generator) / 2

    def make_cache(self, batch_size: int, max_seq_len: int, source_len: int) -> list[tuple[KVCache, KVCache]]:
        return [(KVCache(batch_size, 3, max_seq_len, 4), KVCache(batch_size, 3, source_len, 4))]

    def encode(self, tokens: Tensor, *, token_mask: Tensor | None = None) -> Tensor:
        self.encoded += 1
        if token_mask is None:
            token_mask = torch.ones_like(tokens, dtype=torch.bool)
        x = self.embed(tokens) + self.positions(token_positions(token_mask))
        return x + self.attn(x, attn_mask=key_mask(token_mask))

    def decode(
        self,
        target: Tensor,
        context: Tensor,
        *,
        context_mask: Tensor | None = None,
        target_mask: Tensor | None = None,
        cache: list[tuple[KVCache, KVCache]] | None = None,
        num_logits: int | None = None,
    ) -> Tensor:
        own, cross = cache[0] if cache else (None, None)
        T, past = target.size(1), own.length if own else 0
        x = self.embed(target) + self.positions(torch.arange(past, past + T))
        x = x + self.own(x, attn_mask=causal_mask(T, past + T), cache=own)
        mask = None if context_mask is None else key_mask(context_mask)
        x = x + self.cross(x, context, attn_mask=mask, cache=cross)
        return self.out(x if num_logits is None else x[:, -num_logits:])
