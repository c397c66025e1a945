"""Each of these planted bugs, those that a T5 can have, must make the comparison with transformers fail."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from parity import Batch, ParityError, compare, ragged_batch
from t5_references import build
from torch import Tensor, nn

from textbook_code.layers import attention as attention_module
from textbook_code.layers.norms import RMSNorm
from textbook_code.models.text import t5 as t5_module
from textbook_code.models.text.t5 import T5ForConditionalGeneration

Mutation = Callable[[T5ForConditionalGeneration, pytest.MonkeyPatch], None]
MUTATIONS: dict[str, tuple[str, Mutation]] = {}  # name → version of T5, bug


def mutation(name: str, version: str = "1.0") -> Callable[[Mutation], Mutation]:
    def register(plant: Mutation) -> Mutation:
        MUTATIONS[name] = version, plant
        return plant

    return register


def batch(lengths: tuple[int, ...], max_len: int, seed: int) -> Batch:
    return ragged_batch(97, lengths, max_len=max_len, pad_id=2, seed=seed)


SOURCE, TARGET = batch((31, 19, 3), 32, 1), batch((29, 17, 4), 30, 3)


def run_ours(m: T5ForConditionalGeneration) -> dict[str, Tensor]:
    logits = m(SOURCE.tokens, TARGET.tokens, token_mask=SOURCE.token_mask, target_mask=TARGET.token_mask)
    return {"logits": TARGET.real(logits)}


def run_theirs(r: nn.Module) -> dict[str, Tensor]:
    out = r(
        input_ids=SOURCE.tokens,
        attention_mask=SOURCE.token_mask.long(),
        decoder_input_ids=TARGET.tokens,
        decoder_attention_mask=TARGET.token_mask.long(),
        use_cache=False,
    )
    return {"logits": TARGET.real(out.logits)}


# ------------------------------------------------------------------------------------------------
# Attention, and the bias of distances


@mutation("scores divided by √Dh")
def _(model: T5ForConditionalGeneration, patch: pytest.MonkeyPatch) -> None:
    for module in model.modules():
        if isinstance(module, attention_module.Attention):
            patch.setattr(module, "scale", None)


@mutation("scores divided by √Dh in the cross-attention alone")
def _(model: T5ForConditionalGeneration, patch: pytest.MonkeyPatch) -> None:
    for block in model.t5.decoder.blocks:
        patch.setattr(block.cross_attn, "scale", None)


def biased(name: str, change: Callable[[int, Tensor], Tensor]) -> None:
    """The bias that block i of either stack receives, changed."""

    @mutation(name)
    def plant(model: T5ForConditionalGeneration, patch: pytest.MonkeyPatch) -> None:
        for stack in (model.t5.encoder, model.t5.decoder):
            for i, block in enumerate(stack.blocks):
                attend = block.attn.forward
                patch.setattr(block.attn, "forward", functools.partial(wrong, attend, i))

    def wrong(
        attend: Callable[..., Tensor], i: int, x: Tensor, *, score_bias: Tensor, **how: object
    ) -> Tensor:
        return attend(x, score_bias=change(i, score_bias), **how)


biased("bias in the first block alone", lambda i, bias: bias if i == 0 else torch.zeros_like(bias))
biased("bias missing in the first block", lambda i, bias: bias if i else torch.zeros_like(bias))
biased("a bias of its own in each block", lambda i, bias: bias if i == 0 else bias.detach())
biased("distances the wrong way round", lambda i, bias: bias.flip(-1, -2))
biased("heads of the bias in another order", lambda i, bias: bias.flip(0))


def buckets(name: str, stack: str, attribute: str, value: object) -> None:
    @mutation(name)
    def plant(model: T5ForConditionalGeneration, patch: pytest.MonkeyPatch) -> None:
        patch.setattr(getattr(model.t5, stack).relative_bias, attribute, value)


buckets("buckets for both directions in the decoder", "decoder", "bidirectional", True)
buckets("buckets for one direction in the encoder", "encoder", "bidirectional", False)
buckets("farthest distance 128 in the encoder", "encoder", "max_distance", 128)
buckets("farthest distance 128 in the decoder", "decoder", "max_distance", 128)
buckets("too few buckets", "decoder", "num_buckets", 10)


@mutation("bias in the cross-attention too")
def _(model: T5ForConditionalGeneration, patch: pytest.MonkeyPatch) -> None:
    relative_bias = model.t5.encoder.relative_bias
    for block in model.t5.decoder.blocks:
        attend = block.cross_attn.forward

        def biased(
            x: Tensor, context: Tensor, attend: Callable[..., Tensor] = attend, **how: object
        ) -> Tensor:
            bias = relative_bias(context.size(1), context.size(1))[:, : x.size(1)]
            return attend(x, context, score_bias=bias, **how)

        patch.setattr(block.cross_attn, "forward", biased)


@mutation("both stacks share one table of biases")
def _(model: T5ForConditionalGeneration, patch: pytest.MonkeyPatch) -> None:
    table = model.t5.encoder.relative_bias.weight
    patch.setitem(model.t5.decoder.relative_bias._parameters, "weight", table)


@mutation("decoder sees later targets")
def _(model: T5ForConditionalGeneration, patch: pytest.MonkeyPatch) -> None:
    fused = attention_module.fused_attention
    patch.setattr(
        attention_module,
        "fused_attention",
        lambda *tensors, causal, **how: fused(*tensors, causal=False, **how),
    )


@mutation("encoder sees no later token")
def _(model: T5ForConditionalGeneration, patch: pytest.MonkeyPatch) -> None:
    for block in model.t5.encoder.blocks:
        patch.setattr(block.attn, "forward", functools.partial(block.attn.forward, causal=True))


def unpadded(name: str, which: str) -> None:
    @mutation(name)
    def plant(model: T5ForConditionalGeneration, patch: pytest.MonkeyPatch) -> None:
        right = t5_module.real_key_mask

        def wrong(argument: str, mask: Tensor, *sizes: int) -> Tensor:
            return right(argument, torch.ones_like(mask) if argument == which else mask, *sizes)

        patch.setattr(t5_module, "real_key_mask", wrong)


unpadded("source's padding seen by the encoder", "token_mask")
unpadded("source's padding seen by the decoder", "context_mask")


# ------------------------------------------------------------------------------------------------
# Norms and blocks


@mutation("wrong epsilon")
def _(model: T5ForConditionalGeneration, patch: pytest.MonkeyPatch) -> None:
    for module in model.modules():
        if isinstance(module, RMSNorm):
            patch.setattr(module, "norm_eps", 1e-6)


@mutation("norms subtract the mean")
def _(model: T5ForConditionalGeneration, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(
        RMSNorm, "forward", lambda self, x: F.layer_norm(x, x.shape[-1:], self.weight, None, self.norm_eps)
    )


@mutation("norms square in float32")
def _(model: T5ForConditionalGeneration, patch: pytest.MonkeyPatch) -> None:
    def forward(self: RMSNorm, x: Tensor) -> Tensor:
        mean = x.float().square().mean(-1, keepdim=True)
        return self.weight * x * (mean + self.norm_eps).rsqrt()

    patch.setattr(RMSNorm, "forward", forward)


@mutation("context not normalised at the end of the encoder")
def _(model: T5ForConditionalGeneration, patch: pytest.MonkeyPatch) -> None:
    patch.setitem(model.t5.encoder._modules, "final_norm", nn.Identity())


@mutation("last norm of the decoder missing")
def _(model: T5ForConditionalGeneration, patch: pytest.MonkeyPatch) -> None:
    patch.setitem(model.t5.decoder._modules, "final_norm", nn.Identity())


@mutation("norms of the two attentions swapped")
def _(model: T5ForConditionalGeneration, patch: pytest.MonkeyPatch) -> None:
    for block in model.t5.decoder.blocks:
        first, second = block.attn_norm, block.cross_norm
        patch.setitem(block._modules, "attn_norm", second)
        patch.setitem(block._modules, "cross_norm", first)


@mutation("post-norm in the encoder")
def _(model: T5ForConditionalGeneration, patch: pytest.MonkeyPatch) -> None:
    def forward(self: nn.Module, x: Tensor, **how: object) -> Tensor:
        x = self.attn_norm(x + self.attn(x, **how))
        return self.ffn_norm(x + self.ffn(x))

    patch.setattr(t5_module.EncoderBlock, "forward", forward)


@mutation("source attended to before the target")
def _(model: T5ForConditionalGeneration, patch: pytest.MonkeyPatch) -> None:
    def forward(
        self: nn.Module,
        x: Tensor,
        context: Tensor,
        *,
        score_bias: Tensor,
        attn_mask: Tensor,
        cross_mask: Tensor,
        **_: object,
    ) -> tuple[Tensor, None]:
        x = x + self.cross_attn(self.cross_norm(x), context, attn_mask=cross_mask)
        x = x + self.attn(self.attn_norm(x), causal=True, score_bias=score_bias, attn_mask=attn_mask)
        return x + self.ffn(self.ffn_norm(x)), None

    patch.setattr(t5_module.DecoderBlock, "forward", forward)


@mutation("token vectors times √D")
def _(model: T5ForConditionalGeneration, patch: pytest.MonkeyPatch) -> None:
    table = model.t5.token_embed
    patch.setattr(table, "forward", lambda tokens, name="": F.embedding(tokens, table.weight) * 35**0.5)


def activation(name: str, wrong: str, version: str) -> None:
    @mutation(name, version)
    def plant(model: T5ForConditionalGeneration, patch: pytest.MonkeyPatch) -> None:
        for stack in (model.t5.encoder, model.t5.decoder):
            for block in stack.blocks:
                patch.setattr(block.ffn, "activation", wrong)


activation("GELU in version 1.0", "gelu_tanh", "1.0")
activation("ReLU in version 1.1", "relu", "1.1")
activation("GELU by the error function", "gelu", "1.1")
activation("SiLU in the gate", "silu", "1.1")


@mutation("gate and value swapped", "1.1")
def _(model: T5ForConditionalGeneration, patch: pytest.MonkeyPatch) -> None:
    for block in model.t5.encoder.blocks:
        gate, value = block.ffn.gate_proj, block.ffn.up_proj
        patch.setitem(block.ffn._modules, "gate_proj", value)
        patch.setitem(block.ffn._modules, "up_proj", gate)


# ------------------------------------------------------------------------------------------------
# The output layer


@mutation("tied head not scaled")
def _(model: T5ForConditionalGeneration, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(model, "score", model.t5.token_embed.attend)


@mutation("tied head trained apart")
def _(model: T5ForConditionalGeneration, patch: pytest.MonkeyPatch) -> None:
    copied = nn.Parameter(model.t5.token_embed.weight.detach().clone())
    patch.setattr(model, "score", lambda hidden: F.linear(hidden * 35**-0.5, copied))


@mutation("untied head scaled", "1.1")
def _(model: T5ForConditionalGeneration, patch: pytest.MonkeyPatch) -> None:
    head = model.lm_head
    patch.setattr(head, "forward", lambda hidden: F.linear(hidden * 35**-0.5, head.weight))


@mutation("untied head replaced by the token table", "1.1")
def _(model: T5ForConditionalGeneration, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(model.lm_head, "forward", model.t5.token_embed.attend)


# ------------------------------------------------------------------------------------------------
# The verdicts


@functools.cache
def reference(version: str) -> nn.Module:
    return build("T5ForConditionalGeneration", version=version)


def judge(version: str, plant: Mutation | None) -> float | None:
    """The error that gave the bug away, or None where nothing did."""

    @contextmanager
    def mutate(model: T5ForConditionalGeneration) -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            if plant:
                plant(model, patch)
            yield

    how = {"ours": run_ours, "theirs": run_theirs, "mutate": mutate}
    try:
        compare(T5ForConditionalGeneration.from_hf, reference(version), **how)
    except ParityError as failed:
        return failed.error
    return None


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_planted_bug_is_caught(name):
    error = judge(*MUTATIONS[name])
    assert error is not None, f"the harness lets {name!r} pass"
    assert math.isfinite(error), "the mutant does not compute: it proves nothing"


@pytest.mark.parametrize("version", ["1.0", "1.1"])
def test_without_a_bug_it_passes(version):
    """So that a verdict above is due to the bug."""
    assert judge(version, None) is None
