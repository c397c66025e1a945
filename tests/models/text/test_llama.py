"""LLaMA computes what transformers' LLaMA computes: every generation, every head, every gradient."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from exact import exact_
from parity import Batch, check_loading, loud_, parity_row, ragged_batch
from references import LLAMA3_ROPE, LLAMA_KINDS, llama_config, padded_on_the_left
from torch import Tensor

from textbook_code.layers.positions import Llama3Scaling
from textbook_code.models.text.llama import (
    Llama,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
)
from textbook_code.weights import WeightError

RIGHT = ragged_batch(97, (37, 23, 32, 3), max_len=39)
LEFT = padded_on_the_left(RIGHT)
KINDS = list(LLAMA_KINDS)


def build(architecture: str, *, attention: str = "sdpa", **changes: Any) -> transformers.PreTrainedModel:
    """The reference, tiny and loud, in float32 and untouched."""
    config = llama_config(attn_implementation=attention, **changes)
    return loud_(getattr(transformers, architecture)(config))


def theirs(model: Any, batch: Batch) -> Any:
    """The reference counts padding as positions unless it is told not to."""
    positions = (batch.token_mask.long().cumsum(1) - 1).clamp(min=0)
    return model(batch.tokens, attention_mask=batch.token_mask.long(), position_ids=positions)


def logits(batch: Batch) -> dict[str, Any]:
    return {
        "ours": lambda m: {"logits": batch.real(m(batch.tokens, token_mask=batch.token_mask))},
        "theirs": lambda r: {"logits": batch.real(theirs(r, batch).logits)},
    }


@parity_row("llama", "causal language model", "transformers.LlamaForCausalLM", page="llama-block")
def test_causal_language_model(parity):
    for changes in LLAMA_KINDS.values():
        for batch in (RIGHT, LEFT):
            reference = exact_(build("LlamaForCausalLM", **changes)).double()
            parity.check(LlamaForCausalLM.from_hf, reference, **logits(batch))


@parity_row(
    "llama",
    "causal language model, the reference's rounding kept",
    "transformers.LlamaForCausalLM",
    page="llama-block",
    dtype="float32",
    backward=False,  # sums over 9,000 logits: float32 is too narrow for them; the row above has them
)
def test_causal_language_model_against_the_untouched_reference(parity):
    """Norms, angles and (by the written-out path) the softmax in float32, as published."""
    for attention in ("eager", "sdpa"):
        for changes in LLAMA_KINDS.values():
            for batch in (RIGHT, LEFT):
                reference = build("LlamaForCausalLM", attention=attention, **changes)
                parity.check(LlamaForCausalLM.from_hf, reference, **logits(batch))


@parity_row("llama", "decoder", "transformers.LlamaModel", page="llama-block")
def test_decoder(parity):
    for batch in (RIGHT, LEFT):
        parity.check(
            Llama.from_hf,
            exact_(build("LlamaModel")).double(),
            ours=lambda m, b=batch: {"hidden": b.real(m(b.tokens, token_mask=b.token_mask))},
            theirs=lambda r, b=batch: {"hidden": b.real(theirs(r, b).last_hidden_state)},
        )


@parity_row(
    "llama", "sequence classification", "transformers.LlamaForSequenceClassification", page="llama-block"
)
def test_sequence_classification(parity):
    for batch in (RIGHT, LEFT):
        parity.check(
            LlamaForSequenceClassification.from_hf,
            exact_(build("LlamaForSequenceClassification", num_labels=7)).double(),
            ours=lambda m, b=batch: {"logits": m(b.tokens, token_mask=b.token_mask)},
            theirs=lambda r, b=batch: {"logits": theirs(r, b).logits},
        )


@pytest.mark.parametrize("kind", KINDS)
def test_weights_load_strictly_both_ways(kind):
    changes = LLAMA_KINDS[kind]
    tied = ["lm_head.weight"] if changes.get("tie_word_embeddings") else []
    check_loading(
        LlamaForCausalLM.from_hf,
        lambda: transformers.LlamaForCausalLM(llama_config(**changes)),
        tied=tied,
    )


def test_the_other_heads_load_strictly_too():
    check_loading(Llama.from_hf, lambda: transformers.LlamaModel(llama_config()))
    check_loading(
        LlamaForSequenceClassification.from_hf,
        lambda: transformers.LlamaForSequenceClassification(llama_config(num_labels=7)),
    )


def test_a_decoder_comes_out_of_a_language_model():
    reference = build("LlamaForCausalLM")
    body = Llama.from_hf(reference)
    torch.testing.assert_close(
        body(RIGHT.tokens), reference.model(RIGHT.tokens).last_hidden_state, atol=1e-4, rtol=1e-4
    )


# ------------------------------------------------------------------------------------------------
# Configs: what the reference writes we read, and the other way round


@pytest.mark.parametrize("kind", KINDS)
def test_what_we_save_the_reference_reads(kind, tmp_path):
    reference = build("LlamaForCausalLM", **LLAMA_KINDS[kind])
    LlamaForCausalLM.from_hf(reference).save_pretrained(tmp_path)
    again, info = transformers.LlamaForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    for name, tensor in reference.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    for key in ("head_dim", "num_key_value_heads", "rms_norm_eps", "tie_word_embeddings", "hidden_act"):
        assert getattr(again.config, key) == getattr(reference.config, key), key
    assert dict(again.config.rope_parameters) == dict(reference.config.rope_parameters)
    torch.testing.assert_close(again.eval()(RIGHT.tokens).logits, reference.eval()(RIGHT.tokens).logits)
    assert LlamaForCausalLM.from_pretrained(tmp_path).config == LlamaForCausalLM.from_hf(reference).config


OLD = {  # a file of the first conversions: no sharing, no θ, no tying, no width of a head
    "architectures": ["LLaMAForCausalLM"],
    "hidden_act": "silu",
    "hidden_size": 36,
    "intermediate_size": 53,
    "max_position_embeddings": 41,
    "model_type": "llama",
    "num_attention_heads": 6,
    "num_hidden_layers": 3,
    "rms_norm_eps": 1e-6,
    "vocab_size": 97,
}


def test_old_configs_mean_what_they_meant():
    config = LlamaForCausalLM.config_from_hf(OLD)
    assert (config.num_kv_heads, config.head_dim, config.rope_theta) == (6, 6, 10_000.0)
    assert (config.scaling, config.tied) == (None, False)
    newer = OLD | {"rope_theta": 500.0, "num_key_value_heads": 3, "rope_scaling": None}
    config = LlamaForCausalLM.config_from_hf(newer)
    assert (config.num_kv_heads, config.rope_theta, config.scaling) == (3, 500.0, None)
    stretched = {key: value for key, value in LLAMA3_ROPE.items() if key != "rope_theta"}
    both = [
        OLD | {"rope_theta": 500.0, "rope_scaling": stretched},
        OLD | {"rope_parameters": dict(LLAMA3_ROPE)},
    ]
    for theirs_ in both:
        config = LlamaForCausalLM.config_from_hf(theirs_)
        assert config.scaling == Llama3Scaling(factor=6.0, low=1.5, high=5.0, original=29)
        assert config.rope_theta == 500.0
        reference = transformers.LlamaConfig(**copy.deepcopy(theirs_))
        assert LlamaForCausalLM.config_from_hf(reference.to_dict()) == config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gemma"}, r"needs model_type = 'llama', got 'gemma'"),
        ({"attention_bias": True}, r"needs attention_bias = False, got True"),
        ({"hidden_act": "gelu"}, r"needs hidden_act = 'silu', got 'gelu'"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, r"rope_type is 'linear', expected"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, r"rope_type is 'yarn', expected"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, r"needs the fields \['low_freq_factor'"),
        (
            {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
            r"expected RoPE on whole heads",
        ),
    ],
)
def test_configs_of_other_models_are_refused(changes, message):
    with pytest.raises(WeightError, match=message):
        LlamaForCausalLM.config_from_hf(OLD | changes)


def test_a_config_without_a_size_is_refused():
    short = {key: value for key, value in OLD.items() if key != "num_attention_heads"}
    with pytest.raises(WeightError, match="num_attention_heads"):
        LlamaForCausalLM.config_from_hf(short)


# ------------------------------------------------------------------------------------------------
# The layout of the rotation


def first_release(model: LlamaForCausalLM, tokens: Tensor) -> Tensor:
    """Logits by complex numbers on neighbouring pairs, as in the first release, from permuted weights."""
    config, body = model.config, model.llama
    Dh = config.head_dim
    frequencies = 1 / config.rope_theta ** (torch.arange(0, Dh, 2, dtype=torch.float64) / Dh)
    turn = torch.polar(
        *torch.broadcast_tensors(torch.ones(1).double(), torch.arange(tokens.size(1))[:, None] * frequencies)
    )

    def neighbours(weight: Tensor) -> Tensor:
        """From (first half, second half) to (pair, pair, …), head by head."""
        return weight.view(-1, 2, Dh // 2, weight.size(1)).transpose(1, 2).reshape_as(weight)

    def turned(x: Tensor) -> Tensor:
        pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
        return torch.view_as_real(pairs * turn).flatten(-2)

    x = body.token_embed(tokens)
    for block in body.blocks:
        u = block.attn_norm(x)
        q, k = (
            (u @ neighbours(p.weight).T).unflatten(-1, (-1, Dh)).transpose(1, 2)
            for p in (block.attn.q_proj, block.attn.k_proj)
        )
        v = block.attn.v_proj(u).unflatten(-1, (-1, Dh)).transpose(1, 2)
        q, k = turned(q), turned(k)
        k, v = (h.repeat_interleave(block.attn.group_size, 1) for h in (k, v))
        scores = (q @ k.mT / Dh**0.5).masked_fill(~torch.ones(x.size(1), x.size(1)).tril().bool(), -torch.inf)
        x = x + block.attn.out_proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
        x = x + block.ffn(block.ffn_norm(x))
    return model.lm_head(body.final_norm(x))


def test_the_first_releases_rotation_of_neighbours_is_ours_after_a_permutation():
    model = LlamaForCausalLM.from_hf(build("LlamaForCausalLM").double())
    tokens = RIGHT.tokens[:2, :32]
    torch.testing.assert_close(first_release(model, tokens), model(tokens), atol=1e-10, rtol=1e-10)
    assert LlamaConfig().rope_theta == 10_000.0
