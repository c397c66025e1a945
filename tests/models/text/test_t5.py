"""T5 computes what transformers' T5 computes: both versions, every head, every gradient."""

from __future__ import annotations

import pytest
import torch
import transformers
from parity import check_loading, parity_row
from t5_references import build, source, target
from torch import Tensor

from textbook_code.models.text.t5 import T5, T5Encoder, T5ForConditionalGeneration

SOURCE, TARGET = source(), target()
ATTENTIONS = ["eager", "sdpa"]
FULL = "T5ForConditionalGeneration"


def ours(model):
    return model(SOURCE.tokens, TARGET.tokens, token_mask=SOURCE.token_mask, target_mask=TARGET.token_mask)


def theirs(model, **kw):
    return model(
        input_ids=SOURCE.tokens,
        attention_mask=SOURCE.token_mask.long(),
        decoder_input_ids=TARGET.tokens,
        decoder_attention_mask=TARGET.token_mask.long(),
        use_cache=False,
        **kw,
    )


def check(parity, reference) -> None:
    parity.check(
        T5ForConditionalGeneration.from_hf,
        reference,
        ours=lambda m: {"logits": TARGET.real(ours(m))},
        theirs=lambda r: {"logits": TARGET.real(theirs(r).logits)},
    )


@parity_row("t5", "conditional generation", "transformers.T5ForConditionalGeneration", page="t5-head")
def test_version_1_0(parity):
    """ReLU, the token table as output layer, its input scaled by 1/√D."""
    for attention in ATTENTIONS:
        check(parity, build(FULL, attention=attention))


@parity_row("t5-v1.1", "conditional generation", "transformers.T5ForConditionalGeneration", page="t5-head")
def test_version_1_1(parity):
    """Gated tanh-GELU, an output layer of its own, unscaled."""
    for attention in ATTENTIONS:
        check(parity, build(FULL, version="1.1", attention=attention))


@parity_row(
    "t5",
    "conditional generation, library's norms",
    "transformers.T5ForConditionalGeneration",
    page="t5-norm",
    dtype="float32",
)
def test_version_1_0_in_float32(parity):
    """With the library's own norms, which square in float32 and so allow no float64.

    The queries are as small as T5 draws them: loud ones, with scores that nothing divides, put the
    rounding of float32 above the tolerance.
    """
    reference = build(FULL, dtype=torch.float32)
    with torch.no_grad():
        for name, p in reference.named_parameters():
            if name.endswith(".q.weight"):
                p *= reference.config.d_kv**-0.5
    check(parity, reference)


@parity_row("t5", "encoder and decoder", "transformers.T5Model", page="t5-model")
def test_hidden_states(parity):
    def run_ours(m: T5) -> dict[str, Tensor]:
        context = m.encode(SOURCE.tokens, token_mask=SOURCE.token_mask)
        hidden = m.decode(
            TARGET.tokens, context, context_mask=SOURCE.token_mask, target_mask=TARGET.token_mask
        )
        assert torch.equal(hidden, ours(m))
        return {"context": SOURCE.real(context), "hidden": TARGET.real(hidden)}

    def run_theirs(r: transformers.T5Model) -> dict[str, Tensor]:
        out = theirs(r)
        return {
            "context": SOURCE.real(out.encoder_last_hidden_state),
            "hidden": TARGET.real(out.last_hidden_state),
        }

    for attention in ATTENTIONS:
        for version in ("1.0", "1.1"):
            reference = build("T5Model", version=version, attention=attention)
            parity.check(T5.from_hf, reference, ours=run_ours, theirs=run_theirs)


@parity_row("t5", "cross-attention weights", "transformers.T5Model", page="t5-live")
def test_cross_attention_weights(parity):
    """The written-out path: hidden states, and every head's weights over the source."""

    def run_ours(m: T5) -> dict[str, Tensor]:
        context = m.encode(SOURCE.tokens, token_mask=SOURCE.token_mask)
        hidden, weights = m.decode(
            TARGET.tokens,
            context,
            context_mask=SOURCE.token_mask,
            target_mask=TARGET.token_mask,
            need_weights=True,
        )
        return named(hidden, weights)

    def run_theirs(r: transformers.T5Model) -> dict[str, Tensor]:
        out = theirs(r, output_attentions=True)
        return named(out.last_hidden_state, out.cross_attentions)

    def named(hidden: Tensor, weights: list[Tensor]) -> dict[str, Tensor]:
        assert len(weights) == 2
        maps = {f"weights.{i}": TARGET.real(w.transpose(1, 2)) for i, w in enumerate(weights)}  # (N, H, S)
        return {"hidden": TARGET.real(hidden), **maps}

    parity.check(T5.from_hf, build("T5Model"), ours=run_ours, theirs=run_theirs)


@parity_row("t5", "encoder", "transformers.T5EncoderModel", page="t5-model")
def test_encoder(parity):
    for attention in ATTENTIONS:
        for version in ("1.0", "1.1"):
            parity.check(
                T5Encoder.from_hf,
                build("T5EncoderModel", version=version, attention=attention),
                ours=lambda m: {"hidden": SOURCE.real(m(SOURCE.tokens, token_mask=SOURCE.token_mask))},
                theirs=lambda r: {
                    "hidden": SOURCE.real(
                        r(SOURCE.tokens, attention_mask=SOURCE.token_mask.long()).last_hidden_state
                    )
                },
            )


@pytest.mark.parametrize("version", ["1.0", "1.1"])
@pytest.mark.parametrize(
    ("ours_class", "theirs_class"),
    [(T5, "T5Model"), (T5Encoder, "T5EncoderModel"), (T5ForConditionalGeneration, FULL)],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_weights_load_strictly_both_ways(ours_class, theirs_class, version):
    seeds = iter((1, 2))
    state = build(theirs_class, version=version).state_dict()
    model = ours_class.from_hf(build(theirs_class, version=version))
    check_loading(
        ours_class.from_hf,
        lambda: build(theirs_class, version=version, seed=next(seeds), dtype=torch.float32),
        tied=[key for key in model.hf_tied if key in state],
    )


def test_an_untied_head_is_loaded_as_it_is():
    """The head of version 1.1 is not the token table, neither there nor here."""
    reference = build(FULL, version="1.1")
    model = T5ForConditionalGeneration.from_hf(reference)
    assert torch.equal(model.lm_head.weight, reference.lm_head.weight)
    assert not torch.equal(model.lm_head.weight, model.t5.token_embed.weight)


def test_the_encoder_loads_from_a_whole_model():
    """Bit for bit the whole model's encoder; decoder and head are left out."""
    for version in ("1.0", "1.1"):
        reference = build(FULL, version=version)
        alone, whole = T5Encoder.from_hf(reference), T5ForConditionalGeneration.from_hf(reference)
        assert torch.equal(alone(SOURCE.tokens), whole.encode(SOURCE.tokens))
        body = T5.from_hf(reference)
        assert torch.equal(body.encode(SOURCE.tokens), whole.encode(SOURCE.tokens))
