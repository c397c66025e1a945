"""Planted bugs that a BART can have: each must make the comparison with transformers fail."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from parity import Errors, ParityError, compare, loud_
from references import bart_batches, bart_config
from torch import Tensor, nn

from textbook_code.layers import attention as attention_module
from textbook_code.layers.norms import LayerNorm
from textbook_code.models.text import bart as bart_module
from textbook_code.models.text.bart import BartForConditionalGeneration

SOURCE, TARGET = bart_batches()
Mutation = Callable[[BartForConditionalGeneration, pytest.MonkeyPatch], None]
MUTATIONS: dict[str, Mutation] = {}


def mutation(name: str) -> Callable[[Mutation], Mutation]:
    def register(plant: Mutation) -> Mutation:
        MUTATIONS[name] = plant
        return plant

    return register


def ours(m: BartForConditionalGeneration) -> dict[str, Tensor]:
    logits = m(SOURCE.tokens, TARGET.tokens, token_mask=SOURCE.token_mask, target_mask=TARGET.token_mask)
    return {"logits": TARGET.real(logits)}


def theirs(r: transformers.BartForConditionalGeneration) -> dict[str, Tensor]:
    out = r(
        SOURCE.tokens,
        attention_mask=SOURCE.token_mask.long(),
        decoder_input_ids=TARGET.tokens,
        decoder_attention_mask=TARGET.token_mask.long(),
        use_cache=False,
    )
    return {"logits": TARGET.real(out.logits)}


# ------------------------------------------------------------------------------------------------
# The embeddings.


for start in (0, 1, 3):

    @mutation(f"positions start at row {start}")
    def _(model: Any, patch: pytest.MonkeyPatch, start: int = start) -> None:
        patch.setattr(bart_module, "OFFSET", start)


for half in ("encoder", "decoder"):

    @mutation(f"{half}: positions start at row 0")
    def _(model: Any, patch: pytest.MonkeyPatch, half: str = half) -> None:
        table = getattr(model.bart, half).pos_embed
        patch.setattr(table, "forward", lambda T, *, start: type(table).forward(table, T, start=start - 2))

    @mutation(f"{half}: norm of the embeddings missing")
    def _(model: Any, patch: pytest.MonkeyPatch, half: str = half) -> None:
        patch.setitem(getattr(model.bart, half)._modules, "embed_norm", nn.Identity())


@mutation("one position table for both stacks")
def _(model: Any, patch: pytest.MonkeyPatch) -> None:
    patch.setitem(model.bart.decoder._modules, "pos_embed", model.bart.encoder.pos_embed)


@mutation("embeddings scaled by √d_model")
def _(model: Any, patch: pytest.MonkeyPatch) -> None:
    table = model.bart.token_embed
    scale = math.sqrt(table.embedding_dim)
    patch.setattr(table, "forward", lambda ids, name="": scale * F.embedding(ids, table.weight))


@mutation("positions added after the norm")
def _(model: Any, patch: pytest.MonkeyPatch) -> None:
    def embed(self: bart_module.Stack, words: Tensor, *, start: int = 0) -> Tensor:
        return self.embed_norm(words) + self.pos_embed(words.size(1), start=start + 2)

    patch.setattr(bart_module.Stack, "embed", embed)


# ------------------------------------------------------------------------------------------------
# The blocks.


def norms_swapped(half: str, first: str, second: str) -> None:
    @mutation(f"{half}: {first} and {second} swapped")
    def plant(model: Any, patch: pytest.MonkeyPatch) -> None:
        for block in getattr(model.bart, half).blocks:
            one, two = getattr(block, first), getattr(block, second)
            patch.setitem(block._modules, first, two)
            patch.setitem(block._modules, second, one)


norms_swapped("encoder", "attn_norm", "ffn_norm")
norms_swapped("decoder", "attn_norm", "cross_norm")
norms_swapped("decoder", "cross_norm", "ffn_norm")
norms_swapped("decoder", "attn", "cross_attn")


for name in ("attn_norm", "cross_norm", "ffn_norm"):

    @mutation(f"decoder: {name} missing")
    def _(model: Any, patch: pytest.MonkeyPatch, name: str = name) -> None:
        patch.setitem(model.bart.decoder.blocks[1]._modules, name, nn.Identity())


@mutation("encoder: pre-norm")
def _(model: Any, patch: pytest.MonkeyPatch) -> None:
    def forward(self: Any, x: Tensor, *, attn_mask: Tensor) -> Tensor:
        x = x + self.attn(self.attn_norm(x), attn_mask=attn_mask)
        return x + self.ffn(self.ffn_norm(x))

    patch.setattr(bart_module.EncoderBlock, "forward", forward)


def decoder_forward(name: str, forward: Callable[..., Tensor]) -> None:
    @mutation(name)
    def plant(model: Any, patch: pytest.MonkeyPatch) -> None:
        def wrong(
            self: Any, x: Tensor, c: Tensor, *, attn_mask: Tensor, cross_mask: Tensor, cache: None
        ) -> Tensor:
            return forward(self, x, c, attn_mask, cross_mask)

        patch.setattr(bart_module.DecoderBlock, "forward", wrong)


def pre_norm(block: Any, x: Tensor, c: Tensor, mask: Tensor, cross: Tensor) -> Tensor:
    x = x + block.attn(block.attn_norm(x), attn_mask=mask, causal=True)
    x = x + block.cross_attn(block.cross_norm(x), c, attn_mask=cross)
    return x + block.ffn(block.ffn_norm(x))


def cross_first(block: Any, x: Tensor, c: Tensor, mask: Tensor, cross: Tensor) -> Tensor:
    x = block.cross_norm(x + block.cross_attn(x, c, attn_mask=cross))
    x = block.attn_norm(x + block.attn(x, attn_mask=mask, causal=True))
    return block.ffn_norm(x + block.ffn(x))


def not_causal(block: Any, x: Tensor, c: Tensor, mask: Tensor, cross: Tensor) -> Tensor:
    x = block.attn_norm(x + block.attn(x, attn_mask=mask))
    x = block.cross_norm(x + block.cross_attn(x, c, attn_mask=cross))
    return block.ffn_norm(x + block.ffn(x))


def cross_unmasked(block: Any, x: Tensor, c: Tensor, mask: Tensor, cross: Tensor) -> Tensor:
    x = block.attn_norm(x + block.attn(x, attn_mask=mask, causal=True))
    x = block.cross_norm(x + block.cross_attn(x, c))
    return block.ffn_norm(x + block.ffn(x))


def cross_without_residual(block: Any, x: Tensor, c: Tensor, mask: Tensor, cross: Tensor) -> Tensor:
    x = block.attn_norm(x + block.attn(x, attn_mask=mask, causal=True))
    x = block.cross_norm(block.cross_attn(x, c, attn_mask=cross))
    return block.ffn_norm(x + block.ffn(x))


def without_cross(block: Any, x: Tensor, c: Tensor, mask: Tensor, cross: Tensor) -> Tensor:
    x = block.attn_norm(x + block.attn(x, attn_mask=mask, causal=True))
    return block.ffn_norm(x + block.ffn(x))


decoder_forward("decoder: pre-norm", pre_norm)
decoder_forward("decoder: cross-attention first", cross_first)
decoder_forward("decoder: causal mask dropped", not_causal)
decoder_forward("decoder: padding of the source attended to", cross_unmasked)
decoder_forward("decoder: no residual round the cross-attention", cross_without_residual)
decoder_forward("decoder: no cross-attention", without_cross)


@mutation("encoder: a causal mask")
def _(model: Any, patch: pytest.MonkeyPatch) -> None:
    for block in model.bart.encoder.blocks:
        attend = block.attn.forward
        patch.setattr(block.attn, "forward", lambda x, attend=attend, **kw: attend(x, causal=True, **kw))


@mutation("encoder: padding attended to")
def _(model: Any, patch: pytest.MonkeyPatch) -> None:
    for block in model.bart.encoder.blocks:
        attend = block.attn.forward
        patch.setattr(block.attn, "forward", lambda x, attend=attend, **kw: attend(x))


@mutation("decoder: each block reads the embeddings of the source")
def _(model: Any, patch: pytest.MonkeyPatch) -> None:
    body = model.bart
    patch.setattr(
        type(body), "encode", lambda self, tokens, **kw: self.encoder.embed(self.token_embed(tokens))
    )


@mutation("scores not scaled")
def _(model: Any, patch: pytest.MonkeyPatch) -> None:
    for module in model.modules():
        if isinstance(module, attention_module.Attention):
            patch.setattr(module, "scale", 1.0)


@mutation("GELU by tanh")
def _(model: Any, patch: pytest.MonkeyPatch) -> None:
    for block in model.bart.decoder.blocks:
        patch.setattr(block.ffn, "activation", "gelu_tanh")


@mutation("wrong epsilon")
def _(model: Any, patch: pytest.MonkeyPatch) -> None:
    for module in model.modules():
        if isinstance(module, LayerNorm):
            patch.setattr(module, "norm_eps", 1e-12)


for name in ("attn.q_proj", "cross_attn.v_proj", "cross_attn.out_proj", "ffn.fc1", "ffn.fc2"):

    @mutation(f"bias of {name} dropped")
    def _(model: Any, patch: pytest.MonkeyPatch, name: str = name) -> None:
        for block in model.bart.decoder.blocks:
            patch.setattr(block.get_submodule(name), "bias", None)


# ------------------------------------------------------------------------------------------------
# The head, and the verdicts.


@mutation("bias of the logits dropped")
def _(model: Any, patch: pytest.MonkeyPatch) -> None:
    patch.setitem(model._buffers, "logits_bias", torch.zeros_like(model.logits_bias))


@mutation("output table not tied")
def _(model: Any, patch: pytest.MonkeyPatch) -> None:
    copied = nn.Parameter(model.bart.token_embed.weight.detach().clone())  # equal, but trained apart
    patch.setattr(model.bart.token_embed, "attend", lambda x: F.linear(x, copied))


@mutation("logits scaled, as in T5")
def _(model: Any, patch: pytest.MonkeyPatch) -> None:
    table = model.bart.token_embed
    patch.setattr(table, "attend", lambda x: F.linear(x * table.embedding_dim**-0.5, table.weight))


@mutation("the target not shifted")
def _(model: Any, patch: pytest.MonkeyPatch) -> None:
    decode = type(model.bart).decode
    patch.setattr(model.bart, "decode", lambda t, c, **kw: decode(model.bart, t.roll(-1, dims=1), c, **kw))


def judge(plant: Mutation | None) -> float | None:
    """The error at which the harness stopped, or None where it let the model pass."""

    @contextmanager
    def mutate(model: BartForConditionalGeneration) -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            if plant:
                plant(model, patch)
            yield

    reference = loud_(transformers.BartForConditionalGeneration(bart_config())).double()
    z = torch.randn(reference.final_logits_bias.shape, generator=torch.Generator().manual_seed(3))
    reference.final_logits_bias.copy_(z)
    try:
        errors: Errors = compare(
            BartForConditionalGeneration.from_hf,
            reference,
            ours=ours,
            theirs=theirs,
            zero_gradient=[r".*\.k_proj\.bias"],
            mutate=mutate,
        )
    except ParityError as failed:
        return failed.error
    assert max(errors.forward, errors.backward or 0.0) <= 1e-10
    return None


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_planted_bug_is_caught(name):
    error = judge(MUTATIONS[name])
    assert error is not None, f"the harness lets {name!r} pass"
    assert math.isfinite(error), "the mutant does not compute: it proves nothing"


def test_without_a_bug_it_passes():
    """So that a verdict above is due to the bug."""
    assert judge(None) is None
