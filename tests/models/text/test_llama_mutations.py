"""Each of these bugs, planted in our LLaMA, must make the comparison with transformers fail."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from exact import exact_
from parity import ParityError, compare, loud_, ragged_batch
from references import LLAMA3_ROPE, llama_config, padded_on_the_left
from torch import Tensor, nn

from textbook_code.layers import attention as attention_module
from textbook_code.layers.positions import Llama3Scaling
from textbook_code.models.text import llama as llama_module
from textbook_code.models.text.llama import LlamaForCausalLM

BATCH = padded_on_the_left(ragged_batch(97, (37, 23, 3), max_len=39))
Mutation = Callable[[LlamaForCausalLM, pytest.MonkeyPatch], None]
MUTATIONS: dict[str, Mutation] = {}


def mutation(name: str) -> Callable[[Mutation], Mutation]:
    def register(plant: Mutation) -> Mutation:
        MUTATIONS[name] = plant
        return plant

    return register


# ------------------------------------------------------------------------------------------------
# The rotation


def rotation(name: str, wrong: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
    @mutation(name)
    def plant(model: LlamaForCausalLM, patch: pytest.MonkeyPatch) -> None:
        patch.setattr(attention_module, "rotate", wrong)


def neighbours(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.size(-1) // 2
    cos, sin = cos[..., :half].repeat_interleave(2, -1), sin[..., :half].repeat_interleave(2, -1)
    turned = torch.stack([-x[..., 1::2], x[..., ::2]], dim=-1).flatten(-2)
    return x * cos + turned * sin


def right_rotation(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin


rotation("no rotation", lambda x, cos, sin: x)
rotation("neighbours turned instead of halves", neighbours)
rotation(
    "turned the other way in the queries only",
    lambda x, c, s: right_rotation(x, c, s if x.size(1) == 2 else -s),
)
rotation("keys not turned", lambda x, c, s: x if x.size(1) == 2 else right_rotation(x, c, s))
rotation("queries not turned", lambda x, c, s: right_rotation(x, c, s) if x.size(1) == 2 else x)
rotation(
    "queries one position late",
    lambda x, c, s: right_rotation(x, *((c, s) if x.size(1) == 2 else late(c, s))),
)
rotation("halves exchanged without a sign", lambda x, c, s: x * c + torch.cat(x.chunk(2, -1)[::-1], -1) * s)


def late(cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return cos.roll(1, -2), sin.roll(1, -2)


@mutation("values turned too")
def _(model: LlamaForCausalLM, patch: pytest.MonkeyPatch) -> None:
    right = attention_module.fused_attention
    cos, sin = model.llama.rotary(torch.arange(39), torch.float64)
    patch.setattr(
        attention_module,
        "fused_attention",
        lambda q, k, v, m, **kw: right(q, k, right_rotation(v, cos, sin), m, **kw),
    )


def rotary(name: str, **changes: Any) -> None:
    @mutation(name)
    def plant(model: LlamaForCausalLM, patch: pytest.MonkeyPatch) -> None:
        for key, value in changes.items():
            patch.setattr(model.llama.rotary, key, value)


rotary("θ of 10,000", theta=10_000.0)
rotary("stretching ignored", scaling=None)
rotary("stretched eightfold instead of sixfold", scaling=Llama3Scaling(8.0, 1.5, 5.0, 29))
rotary("stretching starts too low", scaling=Llama3Scaling(6.0, 1.0, 5.0, 29))
rotary("stretching ends too low", scaling=Llama3Scaling(6.0, 1.5, 4.0, 29))
rotary("stretched from another length", scaling=Llama3Scaling(6.0, 1.5, 5.0, 41))


@mutation("two tokens at each position")
def _(model: LlamaForCausalLM, patch: pytest.MonkeyPatch) -> None:
    right = llama_module.decoder_inputs

    def wrong(tokens: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        positions, mask = right(tokens, **kwargs)
        return positions // 2, mask

    patch.setattr(llama_module, "decoder_inputs", wrong)


# ------------------------------------------------------------------------------------------------
# Attention


def kernel(name: str, wrong: Callable[[Any, Tensor, Tensor, Tensor, Tensor | None], Tensor]) -> None:
    @mutation(name)
    def plant(model: LlamaForCausalLM, patch: pytest.MonkeyPatch) -> None:
        right = attention_module.fused_attention
        patch.setattr(attention_module, "fused_attention", lambda q, k, v, m, **_: wrong(right, q, k, v, m))


def tiled(x: Tensor, heads: int) -> Tensor:
    return x.repeat(1, heads // x.size(1), 1, 1)


kernel(
    "key heads tiled instead of repeated",
    lambda f, q, k, v, m: f(q, tiled(k, 6), tiled(v, 6), m, causal=True),
)
kernel("only the first key head is read", lambda f, q, k, v, m: f(q, k[:, :1], v[:, :1], m, causal=True))
kernel("it looks ahead", lambda f, q, k, v, m: f(q, k, v, m))
kernel("padding is seen", lambda f, q, k, v, m: f(q, k, v, causal=True))
kernel("scores not scaled", lambda f, q, k, v, m: f(q, k, v, m, causal=True, scale=1.0))
kernel("scores scaled by the width", lambda f, q, k, v, m: f(q, k, v, m, causal=True, scale=36**-0.5))
kernel("a position does not see itself", lambda f, q, k, v, m: f(q, k, v, strictly_before(m), causal=True))


def strictly_before(mask: Tensor | None) -> Tensor:
    assert mask is not None
    earlier = torch.ones(39, 39, dtype=torch.bool).tril(-1)
    return mask & earlier


# ------------------------------------------------------------------------------------------------
# Norms, feed-forward, block, head


def each_block(name: str, plant_one: Callable[[nn.Module, pytest.MonkeyPatch], None]) -> None:
    @mutation(name)
    def plant(model: LlamaForCausalLM, patch: pytest.MonkeyPatch) -> None:
        for block in model.llama.blocks:
            plant_one(block, patch)


def exchange(block: nn.Module, patch: pytest.MonkeyPatch) -> None:
    first, second = block.attn_norm, block.ffn_norm
    patch.setitem(block._modules, "attn_norm", second)
    patch.setitem(block._modules, "ffn_norm", first)


each_block("the two norms exchanged", exchange)
each_block("ε of LLaMA 2", lambda block, patch: patch.setattr(block.attn_norm, "norm_eps", 1e-5))
each_block(
    "ε of LLaMA 2 in the second norm", lambda block, patch: patch.setattr(block.ffn_norm, "norm_eps", 1e-5)
)
each_block("GELU for SiLU", lambda block, patch: patch.setattr(block.ffn, "activation", "gelu"))
each_block("ReLU for SiLU", lambda block, patch: patch.setattr(block.ffn, "activation", "relu"))


def gate_and_up(block: nn.Module, patch: pytest.MonkeyPatch) -> None:
    gate, up = block.ffn.gate_proj, block.ffn.up_proj
    patch.setitem(block.ffn._modules, "gate_proj", up)
    patch.setitem(block.ffn._modules, "up_proj", gate)


each_block("gate and up exchanged", gate_and_up)
each_block(
    "up left out",
    lambda block, patch: patch.setattr(
        block.ffn, "forward", lambda x: block.ffn.down_proj(F.silu(block.ffn.gate_proj(x)))
    ),
)


def norm(name: str, wrong: Callable[[nn.Module, Tensor], Tensor]) -> None:
    @mutation(name)
    def plant(model: LlamaForCausalLM, patch: pytest.MonkeyPatch) -> None:
        patch.setattr(llama_module.RMSNorm, "forward", wrong)


norm("the mean taken off", lambda n, x: F.layer_norm(x, n.weight.shape, n.weight, None, n.norm_eps))
norm(
    "ε outside the root", lambda n, x: n.weight * x / (x.square().mean(-1, keepdim=True).sqrt() + n.norm_eps)
)
norm("sum for mean", lambda n, x: n.weight * x * (x.square().sum(-1, keepdim=True) + n.norm_eps).rsqrt())
norm("weight plus one", lambda n, x: F.rms_norm(x, n.weight.shape, 1 + n.weight, n.norm_eps))
norm("no weight", lambda n, x: F.rms_norm(x, n.weight.shape, None, n.norm_eps))
norm("in float32", lambda n, x: F.rms_norm(x.float(), n.weight.shape, n.weight.float(), n.norm_eps).double())


def block_forward(name: str, forward: Callable[..., Tensor]) -> None:
    @mutation(name)
    def plant(model: LlamaForCausalLM, patch: pytest.MonkeyPatch) -> None:
        patch.setattr(
            llama_module.Block,
            "forward",
            lambda block, x, *, rotary, attn_mask, cache: forward(
                block, x, lambda u: block.attn(u, causal=True, attn_mask=attn_mask, rotary=rotary)
            ),
        )


block_forward("halves side by side", lambda b, x, a: x + a(b.attn_norm(x)) + b.ffn(b.ffn_norm(x)))
block_forward("no residual round attention", lambda b, x, a: (y := a(b.attn_norm(x))) + b.ffn(b.ffn_norm(y)))
block_forward("no residual round the feed-forward", lambda b, x, a: b.ffn(b.ffn_norm(x + a(b.attn_norm(x)))))
block_forward(
    "residual taken after the norm",
    lambda b, x, a: (y := (u := b.attn_norm(x)) + a(u)) + b.ffn(b.ffn_norm(y)),
)
block_forward("post-norm", lambda b, x, a: b.ffn_norm((y := b.attn_norm(x + a(x))) + b.ffn(y)))


@mutation("last norm missing")
def _(model: LlamaForCausalLM, patch: pytest.MonkeyPatch) -> None:
    patch.setitem(model.llama._modules, "final_norm", nn.Identity())


@mutation("embeddings scaled by √d_model")
def _(model: LlamaForCausalLM, patch: pytest.MonkeyPatch) -> None:
    table = model.llama.token_embed
    patch.setattr(table, "forward", lambda tokens: F.embedding(tokens, table.weight) * math.sqrt(36))


@mutation("blocks in reverse order")
def _(model: LlamaForCausalLM, patch: pytest.MonkeyPatch) -> None:
    patch.setitem(model.llama._modules, "blocks", nn.ModuleList(reversed(model.llama.blocks)))


@mutation("head tied where it is not")
def _(model: LlamaForCausalLM, patch: pytest.MonkeyPatch) -> None:
    patch.setitem(model._modules, "lm_head", None)


# ------------------------------------------------------------------------------------------------
# The verdicts


def judge(plant: Mutation | None) -> tuple[float, bool]:
    """The error seen, and whether the harness stopped at it."""

    @contextmanager
    def mutate(model: LlamaForCausalLM) -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            if plant:
                plant(model, patch)
            yield

    reference = loud_(transformers.LlamaForCausalLM(llama_config(rope_parameters=LLAMA3_ROPE)))
    positions = (BATCH.token_mask.long().cumsum(1) - 1).clamp(min=0)
    try:
        errors = compare(
            LlamaForCausalLM.from_hf,
            exact_(reference).double(),
            ours=lambda m: {"logits": BATCH.real(m(BATCH.tokens, token_mask=BATCH.token_mask))},
            theirs=lambda r: {
                "logits": BATCH.real(
                    r(BATCH.tokens, attention_mask=BATCH.token_mask.long(), position_ids=positions).logits
                )
            },
            mutate=mutate,
        )
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


@pytest.mark.parametrize("shift", [1, 7])
def test_positions_shifted_as_a_whole_are_no_bug(shift):
    """RoPE knows distances only: this mutant computes the same function."""

    def plant(model: LlamaForCausalLM, patch: pytest.MonkeyPatch) -> None:
        right = llama_module.decoder_inputs

        def shifted(tokens: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
            positions, mask = right(tokens, **kwargs)
            return positions + shift, mask

        patch.setattr(llama_module, "decoder_inputs", shifted)

    error, caught = judge(plant)
    assert not caught and error < 1e-10
