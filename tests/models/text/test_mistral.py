"""Mistral is LLaMA with a sliding window: against transformers' Mistral, with and without the ring."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers
from exact import exact_
from parity import Batch, ParityError, check_loading, compare, loud_, parity_row, ragged_batch
from references import mistral_config, padded_on_the_left
from torch import Tensor

from textbook_code.inference.generate import generate
from textbook_code.layers import local_attention as module
from textbook_code.layers.attention import Attention
from textbook_code.layers.cache import RollingCache
from textbook_code.layers.local_attention import LocalAttention
from textbook_code.models.text.llama import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
)

RIGHT = ragged_batch(97, (37, 23, 32, 3), max_len=39)
LEFT = padded_on_the_left(RIGHT)
LONG = padded_on_the_left(ragged_batch(97, (171, 64, 130, 3), max_len=173))  # several blocks of 64


def build(architecture: str, *, attention: str = "sdpa", **changes: Any) -> Any:
    config = mistral_config(attn_implementation=attention, **changes)
    return loud_(getattr(transformers, architecture)(config))


def theirs(model: Any, batch: Batch) -> Any:
    positions = (batch.token_mask.long().cumsum(1) - 1).clamp(min=0)
    return model(batch.tokens, attention_mask=batch.token_mask.long(), position_ids=positions)


def logits(batch: Batch) -> dict[str, Any]:
    return {
        "ours": lambda m: {"logits": batch.real(m(batch.tokens, token_mask=batch.token_mask))},
        "theirs": lambda r: {"logits": batch.real(theirs(r, batch).logits)},
    }


@parity_row(
    "mistral", "causal language model", "transformers.MistralForCausalLM", page="local-attention-window"
)
def test_causal_language_model(parity):
    for window in (1, 4, 23, 100):
        # a query that sees itself alone has the weight 1, whatever q and k are
        zero = (r".*attn\.[qk]_proj\.weight",) if window == 1 else ()
        for batch in (RIGHT, LEFT):
            reference = exact_(build("MistralForCausalLM", sliding_window=window)).double()
            parity.check(LlamaForCausalLM.from_hf, reference, zero_gradient=zero, **logits(batch))
    for window in (4, 70):
        reference = build("MistralForCausalLM", sliding_window=window, max_position_embeddings=200)
        parity.check(LlamaForCausalLM.from_hf, exact_(reference).double(), **logits(LONG))


@parity_row(
    "mistral",
    "causal language model, the reference's rounding kept",
    "transformers.MistralForCausalLM",
    page="local-attention-window",
    dtype="float32",
    backward=False,  # as in LLaMA's row
)
def test_causal_language_model_against_the_untouched_reference(parity):
    for attention in ("eager", "sdpa"):
        for batch in (RIGHT, LEFT, LONG):
            reference = build("MistralForCausalLM", attention=attention, max_position_embeddings=200)
            parity.check(LlamaForCausalLM.from_hf, reference, **logits(batch))


@parity_row(
    "mistral",
    "sequence classification",
    "transformers.MistralForSequenceClassification",
    page="local-attention-window",
)
def test_sequence_classification(parity):
    for batch in (RIGHT, LEFT):
        parity.check(
            LlamaForSequenceClassification.from_hf,
            exact_(build("MistralForSequenceClassification", num_labels=7)).double(),
            ours=lambda m, b=batch: {"logits": m(b.tokens, token_mask=b.token_mask)},
            theirs=lambda r, b=batch: {"logits": theirs(r, b).logits},
        )


def test_weights_load_strictly_both_ways():
    check_loading(LlamaForCausalLM.from_hf, lambda: transformers.MistralForCausalLM(mistral_config()))


@pytest.mark.parametrize("window", [4, None])
def test_what_we_save_the_reference_reads(window, tmp_path):
    """With a window it is a Mistral; without one (as version 0.2) nothing sets it apart from LLaMA."""
    reference = build("MistralForCausalLM", sliding_window=window)
    model = LlamaForCausalLM.from_hf(reference)
    assert model.config.sliding_window == window
    model.save_pretrained(tmp_path)
    kind = transformers.LlamaForCausalLM if window is None else transformers.MistralForCausalLM
    again, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert type(again) is kind and not any(info.values()), info
    assert getattr(again.config, "sliding_window", None) == window
    torch.testing.assert_close(again.eval()(RIGHT.tokens).logits, reference.eval()(RIGHT.tokens).logits)
    assert LlamaForCausalLM.from_pretrained(tmp_path).config == model.config


def test_the_published_size():
    """The defaults of the reference's config are version 0.1, but for ε and the context."""
    reference = transformers.MistralConfig(rms_norm_eps=1e-5, max_position_embeddings=32_768)
    assert LlamaForCausalLM.config_from_hf(reference.to_dict()) == LlamaConfig.mistral_7b()


# ------------------------------------------------------------------------------------------------
# Behaviour


CONFIG = LlamaForCausalLM.config_from_hf(mistral_config(max_position_embeddings=300).to_dict())


def loud_mistral(**changes: Any) -> LlamaForCausalLM:
    return loud_(LlamaForCausalLM(replace(CONFIG, **changes))).double().eval()


def test_the_window_is_in_every_block_and_only_where_asked_for():
    for window, kind in ((4, LocalAttention), (None, Attention)):
        blocks = loud_mistral(sliding_window=window).llama.blocks
        assert [type(block.attn) for block in blocks] == [kind] * 3


@torch.no_grad()
def test_a_window_as_long_as_the_text_is_llama():
    full, tokens = loud_mistral(sliding_window=None), RIGHT.tokens
    for window in (39, 40, 1000):
        same = loud_mistral(sliding_window=window)
        same.load_state_dict(full.state_dict())
        torch.testing.assert_close(same(tokens), full(tokens), atol=1e-11, rtol=1e-11)
    shorter = loud_mistral(sliding_window=38)
    shorter.load_state_dict(full.state_dict())
    assert (shorter(tokens) - full(tokens)).abs().amax((0, 2)).gt(1e-9).nonzero().flatten().tolist() == [38]


@torch.no_grad()
@pytest.mark.parametrize("pieces", [[1] * 37, [20, 1, 1, 1, 1, 13], [36, 1], [37], [2, 3] * 7 + [2]])
def test_with_the_ring_it_computes_the_same(pieces):
    model, tokens = loud_mistral(), LEFT.tokens[:, :37]
    mask = LEFT.token_mask[:, :37].clone()
    mask[:, 0] = True  # so that no piece is padding alone
    whole, cache, parts, start = model(tokens, token_mask=mask), model.make_cache(4), [], 0
    for length in pieces:
        end = start + length
        parts.append(model(tokens[:, start:end], token_mask=mask[:, :end], cache=cache))
        start = end
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-10, rtol=1e-10)
    assert all(type(c) is RollingCache and c.k.shape == (4, 2, 4, 10) for c in cache)


@torch.no_grad()
def test_the_receptive_field_is_the_window_less_one_a_layer():
    """A changed token is seen L (W − 1) positions on, and no further, to the bit."""
    model = loud_mistral()
    tokens = RIGHT.tokens[:1, :37]
    before, changed = model(tokens), tokens.clone()
    changed[0, 5] = (tokens[0, 5] + 1) % 97
    moved = (model(changed) != before).any(-1)[0].nonzero().flatten().tolist()
    assert moved == list(range(5, 5 + 3 * (4 - 1) + 1))


@torch.no_grad()
@pytest.mark.parametrize("beams", [1, 3])
def test_it_writes_what_the_reference_writes(beams):
    """Far past its window, from prompts padded on the left, with the ring and without a cache."""
    reference = build("MistralForCausalLM", max_position_embeddings=300).eval()
    ours = LlamaForCausalLM.from_hf(reference)
    prompt, mask = LEFT.tokens[:3], LEFT.token_mask[:3]
    how: dict[str, Any] = {"num_beams": beams, "pad_token_id": 0, "eos_token_id": None}
    want = reference.generate(prompt, attention_mask=mask.long(), max_new_tokens=24, do_sample=False, **how)[
        :, prompt.size(1) :
    ]
    for use_cache in (True, False):
        got = generate(ours, prompt, token_mask=mask, max_new_tokens=24, num_beams=beams, use_cache=use_cache)
        assert torch.equal(got, want)
    assert len(set(want[0].tolist())) > 3


# ------------------------------------------------------------------------------------------------
# Planted bugs


Mutation = Callable[[pytest.MonkeyPatch], None]


def window(wrong: Callable[..., Tensor]) -> Mutation:
    right = module.windowed_attention
    return lambda patch: patch.setattr(
        module, "windowed_attention", lambda q, k, v, m, **kw: wrong(right, q, k, v, m, **kw)
    )


def resized(change: int) -> Mutation:
    return window(lambda f, q, k, v, m, *, window, **kw: f(q, k, v, m, window=window + change, **kw))


def without_itself(right: Any, q: Tensor, k: Tensor, v: Tensor, m: Tensor, **kw: Any) -> Tensor:
    mask = module.sliding_window_mask(q.size(2), window=kw["window"]).tril(-1)
    return module.fused_attention(q, k, v, mask & module.key_mask(m))


MUTATIONS = {
    "window one too large": resized(1),
    "window one too small": resized(-1),
    "the query's own position not seen": window(without_itself),
    "it looks ahead": window(lambda f, q, k, v, m, *, causal, **kw: f(q, k, v, m, causal=False, **kw)),
    "no window": window(
        lambda f, q, k, v, m, **kw: module.fused_attention(q, k, v, module.key_mask(m), causal=True)
    ),
    "padding is seen": window(lambda f, q, k, v, m, **kw: f(q, k, v, None, **kw)),
    "every second position": window(
        lambda f, q, k, v, m, **kw: module.fused_attention(
            q, k, v, module.key_mask(m) & module.sliding_window_mask(39, window=4, dilation=2)
        )
    ),
    "the mask one position late": window(lambda f, q, k, v, m, **kw: f(q, k, v, m.roll(1, 1), **kw)),
    "keys not turned": lambda patch: patch.setattr(
        module, "rotate", lambda x, *turn, right=module.rotate: x if x.size(1) == 2 else right(x, *turn)
    ),
    "blocks instead of a window": window(
        lambda f, q, k, v, m, *, window, dilation, **kw: module.block_local_attention(
            q, k, v, m, block=window, look_back=1, **kw
        )
    ),
    "key heads tiled": window(
        lambda f, q, k, v, m, **kw: f(q, k.repeat(1, 3, 1, 1), v.repeat(1, 3, 1, 1), m, **kw)
    ),
}


def judge(plant: Mutation | None) -> tuple[float, bool]:
    @contextmanager
    def mutate(model: LlamaForCausalLM) -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            if plant:
                plant(patch)
            yield

    try:
        errors = compare(
            LlamaForCausalLM.from_hf,
            exact_(build("MistralForCausalLM")).double(),
            mutate=mutate,
            **logits(LEFT),
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
