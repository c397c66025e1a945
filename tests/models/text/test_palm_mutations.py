"""Each of these bugs, planted in our PaLM, must make the comparison with a public implementation fail."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers.models.cohere.modeling_cohere as cohere
from exact import exact_
from palm_references import build_cohere, compared, from_cohere, turned_wide
from parity import ParityError, compare, ragged_batch
from references import padded_on_the_left
from torch import Tensor, nn

from textbook_code.layers import attention as attention_module
from textbook_code.models.text import palm as palm_module
from textbook_code.models.text.palm import PalmForCausalLM

BATCH = padded_on_the_left(ragged_batch(97, (37, 23, 3), max_len=39))
Mutation = Callable[[PalmForCausalLM, pytest.MonkeyPatch], None]
MUTATIONS: dict[str, Mutation] = {}


def mutation(name: str) -> Callable[[Mutation], Mutation]:
    def register(plant: Mutation) -> Mutation:
        MUTATIONS[name] = plant
        return plant

    return register


def block_forward(name: str, forward: Callable[..., Tensor]) -> None:
    @mutation(name)
    def plant(model: PalmForCausalLM, patch: pytest.MonkeyPatch) -> None:
        patch.setattr(
            palm_module.Block,
            "forward",
            lambda block, x, *, rotary, attn_mask, cache: forward(
                block, x, lambda u: block.attn(u, causal=True, attn_mask=attn_mask, rotary=rotary)
            ),
        )


block_forward("one half after the other", lambda b, x, a: (y := x + a(b.norm(x))) + b.ffn(b.norm(y)))
block_forward("feed-forward reads the residual", lambda b, x, a: x + a(b.norm(x)) + b.ffn(x))
block_forward("attention reads the residual", lambda b, x, a: x + a(x) + b.ffn(b.norm(x)))
block_forward("residual taken after the norm", lambda b, x, a: (u := b.norm(x)) + a(u) + b.ffn(u))
block_forward("residual taken twice", lambda b, x, a: 2 * x + a(b.norm(x)) + b.ffn(b.norm(x)))
block_forward("post-norm", lambda b, x, a: b.norm(x + a(x) + b.ffn(x)))


def rotation(name: str, wrong: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
    @mutation(name)
    def plant(model: PalmForCausalLM, patch: pytest.MonkeyPatch) -> None:
        patch.setattr(attention_module, "rotate", wrong)


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin


rotation("no rotation", lambda x, c, s: x)
rotation("the key not turned", lambda x, c, s: x if x.size(1) == 1 else turned(x, c, s))
rotation("the key turned the other way", lambda x, c, s: turned(x, c, -s if x.size(1) == 1 else s))


@mutation("θ of 10,000")
def _(model: PalmForCausalLM, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(model.palm.rotary, "theta", 10_000.0)


def kernel(name: str, wrong: Callable[..., Tensor]) -> None:
    @mutation(name)
    def plant(model: PalmForCausalLM, patch: pytest.MonkeyPatch) -> None:
        right = attention_module.fused_attention
        patch.setattr(attention_module, "fused_attention", lambda q, k, v, m, **_: wrong(right, q, k, v, m))


kernel("it looks ahead", lambda f, q, k, v, m: f(q, k, v, m))
kernel("padding is seen", lambda f, q, k, v, m: f(q, k, v, causal=True))
kernel("scores not scaled", lambda f, q, k, v, m: f(q, k, v, m, causal=True, scale=1.0))
kernel("scores scaled by the width", lambda f, q, k, v, m: f(q, k, v, m, causal=True, scale=30**-0.5))
kernel("the key read as the value too", lambda f, q, k, v, m: f(q, k, k, m, causal=True))


def each_block(name: str, plant_one: Callable[[nn.Module, pytest.MonkeyPatch], None]) -> None:
    @mutation(name)
    def plant(model: PalmForCausalLM, patch: pytest.MonkeyPatch) -> None:
        for block in model.palm.blocks:
            plant_one(block, patch)


def gate_and_up(block: nn.Module, patch: pytest.MonkeyPatch) -> None:
    gate, up = block.ffn.gate_proj, block.ffn.up_proj
    patch.setitem(block.ffn._modules, "gate_proj", up)
    patch.setitem(block.ffn._modules, "up_proj", gate)


each_block("the other half is bent", gate_and_up)
each_block("GELU for SiLU", lambda block, patch: patch.setattr(block.ffn, "activation", "gelu"))
each_block("another ε", lambda block, patch: patch.setattr(block.norm, "norm_eps", 1e-5))


def norm(name: str, wrong: Callable[[nn.Module, Tensor], Tensor]) -> None:
    @mutation(name)
    def plant(model: PalmForCausalLM, patch: pytest.MonkeyPatch) -> None:
        patch.setattr(palm_module.LayerNorm, "forward", wrong)


norm("the mean left in", lambda n, x: F.rms_norm(x, n.weight.shape, n.weight, n.norm_eps))
norm("a bias of one tenth", lambda n, x: F.layer_norm(x, n.weight.shape, n.weight, None, n.norm_eps) + 0.1)


@mutation("ε of the last norm")
def _(model: PalmForCausalLM, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(model.palm.final_norm, "norm_eps", 1e-5)


@mutation("last norm missing")
def _(model: PalmForCausalLM, patch: pytest.MonkeyPatch) -> None:
    patch.setitem(model.palm._modules, "final_norm", nn.Identity())


@mutation("logits not scaled")
def _(model: PalmForCausalLM, patch: pytest.MonkeyPatch) -> None:
    object.__setattr__(model.config, "scaled_logits", False)


@mutation("logits scaled by the width, not its root")
def _(model: PalmForCausalLM, patch: pytest.MonkeyPatch) -> None:
    table = model.palm.token_embed
    patch.setattr(table, "attend", lambda x: F.linear(x, table.weight) / math.sqrt(30))


@mutation("output table not shared")
def _(model: PalmForCausalLM, patch: pytest.MonkeyPatch) -> None:
    copied = nn.Parameter(model.palm.token_embed.weight.detach().clone())  # equal, but trained apart
    patch.setattr(model.palm.token_embed, "attend", lambda x: F.linear(x, copied))


def judge(plant: Mutation | None) -> tuple[float, bool]:
    """The error seen, and whether the harness stopped at it."""

    @contextmanager
    def mutate(model: PalmForCausalLM) -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            if plant:
                plant(model, patch)
            yield

    runs: dict[str, Any] = compared(BATCH)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cohere, "apply_rotary_pos_emb", turned_wide)
        try:
            errors = compare(from_cohere, exact_(build_cohere()).double(), mutate=mutate, **runs)
        except ParityError as failed:
            return failed.error, True
    return max(errors.forward, errors.backward or 0.0), False


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_planted_bug_is_caught(name):
    error, caught = judge(MUTATIONS[name])
    assert math.isfinite(error), "the mutant does not compute: it proves nothing"
    assert caught, f"the harness lets {name!r} pass with an error of {error:.3g}"


def test_without_a_bug_it_passes():
    assert not judge(None)[1]
