"""SmolLM2 writes: ours beside transformers' `generate`, and both beside what memory allows."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from textbook_code.data.sources import fetch
from textbook_code.inference.generate import generate
from textbook_code.models.text.llama import LlamaForCausalLM

PROMPT, NEW = 16, 32
PEER = "transformers, LlamaForCausalLM.generate (SDPA)"


def what(dtype: str) -> str:
    return f"SmolLM2, {NEW} tokens with cache, {dtype}"


def peers(dtype: str) -> dict[str, str]:
    return {"transformers": PEER}


def build(dtype_name: str, who: str, ours: str) -> tuple[Callable[[], Tensor], Tensor]:
    """Write 32 tokens behind a prompt of 16, greedily and with a cache; and the tokens written."""
    dtype = getattr(torch, dtype_name)
    prompt = torch.randint(5, 40_000, (1, PROMPT), generator=torch.Generator().manual_seed(0))
    if who == ours:
        model = _ours(dtype)
        return (work := lambda: generate(model, prompt, max_new_tokens=NEW)), work()
    theirs, how = _theirs(dtype), {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False}

    def work() -> Tensor:
        mask = torch.ones_like(prompt)
        return theirs.generate(prompt, attention_mask=mask, pad_token_id=0, **how)[:, PROMPT:]

    return work, work()


def roofline(dtype: torch.dtype, rounds: int) -> tuple[float, float]:
    """Seconds that the bytes of all tokens after the first take at the bandwidth that the model's matrices
    reach when nothing but multiplying them is done; and that bandwidth, bytes a second. Their median over
    rounds."""
    model = _ours(dtype)
    matrices = [p for p in model.parameters() if p.dim() == 2]
    vectors = {n: torch.randn(1, 1, n).to(dtype) for n in {m.size(1) for m in matrices}}

    def once() -> float:
        started = time.process_time()
        with torch.inference_mode():
            for matrix in matrices:
                F.linear(vectors[matrix.size(1)], matrix)
        return time.process_time() - started

    once()
    weight_bytes = sum(m.numel() * m.element_size() for m in matrices)
    bandwidth = weight_bytes / statistics.median(once() for _ in range(rounds))
    one = sum(2 * layer.k.numel() * layer.k.element_size() for layer in model.make_cache(1, 1))
    fetched = sum(weight_bytes + (PROMPT + n) * one for n in range(1, NEW))
    return fetched / bandwidth, bandwidth


@cache
def _ours(dtype: torch.dtype) -> Any:
    return LlamaForCausalLM.from_pretrained(fetch("smollm2")).to(dtype).eval()


@cache
def _theirs(dtype: torch.dtype) -> nn.Module:
    import transformers

    theirs = transformers.LlamaForCausalLM.from_pretrained(
        fetch("smollm2"), dtype=dtype, attn_implementation="sdpa"
    )
    return theirs.eval()
