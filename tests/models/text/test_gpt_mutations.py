"""The GPT parity tests are tested: each of these planted bugs must make the comparison fail."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from parity import Batch, ParityError, compare, loud_, ragged_batch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, OpenAIGPTConfig, OpenAIGPTLMHeadModel

from textbook_code.layers import attention as attention_module
from textbook_code.layers import decoding
from textbook_code.layers.positions import token_positions
from textbook_code.models.text import gpt as gpt_module
from textbook_code.models.text.gpt import GptForCausalLM

SIZES = {
    "vocab_size": 97,
    "n_positions": 41,
    "n_embd": 35,
    "n_layer": 3,
    "n_head": 5,
    "layer_norm_epsilon": 1e-2,
    "pad_token_id": 0,
}
RIGHT = ragged_batch(97, (17, 11, 3), max_len=19)
LEFT = Batch(RIGHT.tokens.flip(1), RIGHT.token_mask.flip(1), RIGHT.segments)
FAMILIES = {
    "gpt1": lambda: OpenAIGPTLMHeadModel(OpenAIGPTConfig(**SIZES, attn_implementation="eager")),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**SIZES, n_inner=53, attn_implementation="eager")),
}
Mutation = Callable[[GptForCausalLM, pytest.MonkeyPatch], None]
MUTATIONS: dict[str, Mutation] = {}
ONLY = {  # bugs that one of the two cannot have
    "final norm missing": "gpt2",
    "a final norm too many": "gpt1",
    "post-norm instead of pre-norm": "gpt2",
    "pre-norm instead of post-norm": "gpt1",
}


def mutation(name: str) -> Callable[[Mutation], Mutation]:
    def register(plant: Mutation) -> Mutation:
        MUTATIONS[name] = plant
        return plant

    return register


# ------------------------------------------------------------------------------------------------
# Attention


def kernel(name: str, wrong: Callable[..., Tensor]) -> None:
    @mutation(name)
    def plant(model: GptForCausalLM, patch: pytest.MonkeyPatch) -> None:
        def fused(q, k, v, attn_mask=None, *, causal, score_bias, dropout, scale):
            mask = torch.ones(q.size(2), k.size(2), dtype=torch.bool).tril()
            return wrong(q, k, v, mask, mask if attn_mask is None else attn_mask & mask)

        patch.setattr(attention_module, "fused_attention", fused)


def written_out(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float | None = None) -> Tensor:
    scores = q @ k.transpose(-2, -1) * (q.size(-1) ** -0.5 if scale is None else scale)
    return scores.masked_fill(~mask, torch.finfo(scores.dtype).min).softmax(-1) @ v


kernel("scores not scaled", lambda q, k, v, causal, both: written_out(q, k, v, both, 1.0))
kernel("padding ignored", lambda q, k, v, causal, both: written_out(q, k, v, causal))
kernel("no causal mask", lambda q, k, v, causal, both: written_out(q, k, v, both | both.transpose(-2, -1)))
kernel(
    "a token does not see itself",
    lambda q, k, v, causal, both: written_out(q, k, v, both & ~torch.eye(len(causal), dtype=torch.bool)),
)
kernel("keys and values swapped", lambda q, k, v, causal, both: written_out(q, v, k, both))
kernel(
    "softmax in float32",
    lambda q, k, v, causal, both: written_out(q.float(), k.float(), v.float(), both).to(q.dtype),
)


@mutation("heads interleaved")
def _(model: GptForCausalLM, patch: pytest.MonkeyPatch) -> None:
    def split(x: Tensor, num_heads: int) -> Tensor:
        return x.unflatten(-1, (-1, num_heads)).permute(0, 3, 1, 2)

    patch.setattr(attention_module, "split_heads", split)


@mutation("queries and keys cut out of the packed matrix in the wrong order")
def _(model: GptForCausalLM, patch: pytest.MonkeyPatch) -> None:
    for block in model.gpt.blocks:
        q, k = block.attn.q_proj, block.attn.k_proj
        patch.setitem(block.attn._modules, "q_proj", k)
        patch.setitem(block.attn._modules, "k_proj", q)


@mutation("a square matrix not transposed")
def _(model: GptForCausalLM, patch: pytest.MonkeyPatch) -> None:
    for block in model.gpt.blocks:
        out = block.attn.out_proj
        patch.setattr(out, "forward", lambda x, out=out: F.linear(x, out.weight.T, out.bias))


for where in ("attn.q_proj", "attn.v_proj", "attn.out_proj", "ffn.fc1", "ffn.fc2"):

    @mutation(f"bias of {where} dropped")
    def _(model: GptForCausalLM, patch: pytest.MonkeyPatch, where: str = where) -> None:
        for block in model.gpt.blocks:
            part = block.get_submodule(where)
            patch.setitem(part._parameters, "bias", torch.zeros_like(part.bias).requires_grad_())


# ------------------------------------------------------------------------------------------------
# The block and the decoder


@mutation("the two norms swapped")
def _(model: GptForCausalLM, patch: pytest.MonkeyPatch) -> None:
    for block in model.gpt.blocks:
        first, second = block.attn_norm, block.ffn_norm
        patch.setitem(block._modules, "attn_norm", second)
        patch.setitem(block._modules, "ffn_norm", first)


def block_forward(name: str, forward: Callable[..., Tensor]) -> None:
    @mutation(name)
    def plant(model: GptForCausalLM, patch: pytest.MonkeyPatch) -> None:
        for kind in (gpt_module.PostNormBlock, gpt_module.PreNormBlock):

            def wrong(self, x, *, attn_mask, cache, need_weights):
                attend = self.attend
                how = {"attn_mask": attn_mask, "cache": cache, "need_weights": need_weights}
                return forward(self, x, lambda y: attend(y, **how)[0]), None

            patch.setattr(kind, "forward", wrong)


def pre_norm(block: nn.Module, x: Tensor, attend: Callable[[Tensor], Tensor]) -> Tensor:
    x = x + attend(block.attn_norm(x))
    return x + block.ffn(block.ffn_norm(x))


def post_norm(block: nn.Module, x: Tensor, attend: Callable[[Tensor], Tensor]) -> Tensor:
    x = block.attn_norm(x + attend(x))
    return block.ffn_norm(x + block.ffn(x))


def parallel(block: nn.Module, x: Tensor, attend: Callable[[Tensor], Tensor]) -> Tensor:
    return x + attend(block.attn_norm(x)) + block.ffn(block.ffn_norm(x))


def residual_of_the_norm(block: nn.Module, x: Tensor, attend: Callable[[Tensor], Tensor]) -> Tensor:
    normed = block.attn_norm(x)
    x = normed + attend(normed)
    return x + block.ffn(block.ffn_norm(x))


block_forward("pre-norm instead of post-norm", pre_norm)
block_forward("post-norm instead of pre-norm", post_norm)
block_forward("both halves in parallel", parallel)
block_forward("residual taken behind the norm", residual_of_the_norm)


@mutation("GELU by the error function")
def _(model: GptForCausalLM, patch: pytest.MonkeyPatch) -> None:
    for block in model.gpt.blocks:
        patch.setattr(block.ffn, "activation", "gelu")


@mutation("wrong epsilon")
def _(model: GptForCausalLM, patch: pytest.MonkeyPatch) -> None:
    for block in model.gpt.blocks:
        patch.setattr(block.ffn_norm, "norm_eps", 1e-5)


@mutation("final norm missing")
def _(model: GptForCausalLM, patch: pytest.MonkeyPatch) -> None:
    patch.setitem(model.gpt._modules, "final_norm", nn.Identity())


@mutation("a final norm too many")
def _(model: GptForCausalLM, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(model.gpt, "final_norm", nn.LayerNorm(35, elementwise_affine=False).double())


@mutation("blocks in reverse order")
def _(model: GptForCausalLM, patch: pytest.MonkeyPatch) -> None:
    patch.setitem(model.gpt._modules, "blocks", nn.ModuleList(reversed(model.gpt.blocks)))


@mutation("positions off by one")
def _(model: GptForCausalLM, patch: pytest.MonkeyPatch) -> None:
    table = model.gpt.pos_embed
    patch.setattr(table, "at", lambda positions: F.embedding(positions + 1, table.weight))


@mutation("padding on the left counted as positions")
def _(model: GptForCausalLM, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(decoding, "token_positions", lambda mask: torch.arange(mask.size(1)).expand(mask.shape))


@mutation("embeddings scaled by √d_model")
def _(model: GptForCausalLM, patch: pytest.MonkeyPatch) -> None:
    table = model.gpt.token_embed
    patch.setattr(
        table, "forward", lambda tokens: F.embedding(tokens, table.weight) * math.sqrt(table.embedding_dim)
    )


@mutation("output table not tied")
def _(model: GptForCausalLM, patch: pytest.MonkeyPatch) -> None:
    copied = nn.Parameter(model.gpt.token_embed.weight.detach().clone())  # equal, but trained apart
    patch.setattr(model.gpt.token_embed, "attend", lambda x: F.linear(x, copied))


# ------------------------------------------------------------------------------------------------
# The verdicts


def judge(family: str, plant: Mutation | None) -> ParityError | None:
    @contextmanager
    def mutate(model: GptForCausalLM) -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            if plant:
                plant(model, patch)
            yield

    def ours(m: GptForCausalLM) -> dict[str, Tensor]:
        return {side: b.real(m(b.tokens, token_mask=b.token_mask)) for side, b in BATCHES.items()}

    def theirs(r: nn.Module) -> dict[str, Tensor]:
        return {
            side: b.real(
                r(
                    b.tokens,
                    attention_mask=b.token_mask.long(),
                    position_ids=token_positions(b.token_mask),
                ).logits
            )
            for side, b in BATCHES.items()
        }

    try:
        compare(
            GptForCausalLM.from_hf,
            loud_(FAMILIES[family]()).double(),
            ours=ours,
            theirs=theirs,
            zero_gradient=[r".*\.k_proj\.bias"],
            mutate=mutate,
        )
    except ParityError as failed:
        return failed
    return None


BATCHES = {"right": RIGHT, "left": LEFT}
CASES = [(family, name) for name in MUTATIONS for family in FAMILIES if ONLY.get(name, family) == family]


@pytest.mark.parametrize(("family", "name"), CASES)
def test_a_planted_bug_is_caught(family, name):
    failed = judge(family, MUTATIONS[name])
    assert failed is not None, f"the comparison lets {name!r} pass in {family}"
    assert math.isfinite(failed.error), "the mutant does not compute: it proves nothing"


@pytest.mark.parametrize("family", FAMILIES)
def test_without_a_bug_it_passes(family):
    """So that a verdict above is due to the bug."""
    assert judge(family, None) is None
