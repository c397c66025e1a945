"""mT5 computes what transformers' mT5 computes; its sizes; how it draws languages."""

from __future__ import annotations

import pytest
import torch
import transformers
from parity import check_loading, loud_, parity_row
from t5_references import build, source, target
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from textbook_code.models.text.mt5 import (
    Mt5,
    Mt5Config,
    Mt5Encoder,
    Mt5ForConditionalGeneration,
    language_probabilities,
)
from textbook_code.models.text.t5 import T5ForConditionalGeneration
from textbook_code.weights import WeightError

SOURCE, TARGET = source(), target()
FULL = "MT5ForConditionalGeneration"


def ours(model):
    return model(SOURCE.tokens, TARGET.tokens, token_mask=SOURCE.token_mask, target_mask=TARGET.token_mask)


def theirs(model):
    return model(
        input_ids=SOURCE.tokens,
        attention_mask=SOURCE.token_mask.long(),
        decoder_input_ids=TARGET.tokens,
        decoder_attention_mask=TARGET.token_mask.long(),
        use_cache=False,
    )


@parity_row("mt5", "conditional generation", "transformers.MT5ForConditionalGeneration", page="mt5-model")
def test_conditional_generation(parity):
    for attention in ("eager", "sdpa"):
        parity.check(
            Mt5ForConditionalGeneration.from_hf,
            build(FULL, version="1.1", attention=attention),
            ours=lambda m: {"logits": TARGET.real(ours(m))},
            theirs=lambda r: {"logits": TARGET.real(theirs(r).logits)},
        )


@parity_row("mt5", "encoder and decoder", "transformers.MT5Model", page="mt5-model")
def test_hidden_states(parity):
    def run_theirs(r: transformers.MT5Model) -> dict[str, Tensor]:
        out = theirs(r)
        return {
            "context": SOURCE.real(out.encoder_last_hidden_state),
            "hidden": TARGET.real(out.last_hidden_state),
        }

    parity.check(
        Mt5.from_hf,
        build("MT5Model", version="1.1"),
        ours=lambda m: {
            "context": SOURCE.real(m.encode(SOURCE.tokens, token_mask=SOURCE.token_mask)),
            "hidden": TARGET.real(ours(m)),
        },
        theirs=run_theirs,
    )


@parity_row("mt5", "encoder", "transformers.MT5EncoderModel", page="mt5-model")
def test_encoder(parity):
    parity.check(
        Mt5Encoder.from_hf,
        build("MT5EncoderModel", version="1.1"),
        ours=lambda m: {"hidden": SOURCE.real(m(SOURCE.tokens, token_mask=SOURCE.token_mask))},
        theirs=lambda r: {
            "hidden": SOURCE.real(r(SOURCE.tokens, attention_mask=SOURCE.token_mask.long()).last_hidden_state)
        },
    )


@pytest.mark.parametrize(
    ("ours_class", "theirs_class"),
    [(Mt5, "MT5Model"), (Mt5Encoder, "MT5EncoderModel"), (Mt5ForConditionalGeneration, FULL)],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_weights_load_strictly_both_ways(ours_class, theirs_class):
    seeds = iter((1, 2))
    state = build(theirs_class, version="1.1").state_dict()
    model = ours_class.from_hf(build(theirs_class, version="1.1"))
    check_loading(
        ours_class.from_hf,
        lambda: build(theirs_class, version="1.1", seed=next(seeds), dtype=torch.float32),
        tied=[key for key in model.hf_tied if key in state],
    )


def test_the_reference_reads_what_is_saved(tmp_path):
    """Its untied head included."""
    model = Mt5ForConditionalGeneration.from_hf(build(FULL, version="1.1", dtype=torch.float32))
    model.save_pretrained(tmp_path)
    theirs = transformers.MT5ForConditionalGeneration.from_pretrained(tmp_path).eval()
    want = theirs(input_ids=SOURCE.tokens, decoder_input_ids=TARGET.tokens, use_cache=False).logits
    torch.testing.assert_close(model(SOURCE.tokens, TARGET.tokens), want, rtol=1e-3, atol=1e-3)
    again = Mt5ForConditionalGeneration.from_pretrained(tmp_path)
    assert torch.equal(again(SOURCE.tokens, TARGET.tokens), model(SOURCE.tokens, TARGET.tokens))
    assert again.config == model.config


def test_t5_and_mt5_are_not_taken_for_each_other(tmp_path):
    sizes = {"vocab_size": 97, "d_model": 35, "num_heads": 3, "head_dim": 11, "d_ff": 53, "num_layers": 1}
    loud_(Mt5ForConditionalGeneration(Mt5Config(**sizes))).save_pretrained(tmp_path)
    with pytest.raises(WeightError, match="T5ForConditionalGeneration needs model_type = 't5', got 'mt5'"):
        T5ForConditionalGeneration.from_pretrained(tmp_path)
    with pytest.raises(WeightError, match="needs model_type = 'mt5', got 't5'"):
        Mt5ForConditionalGeneration.from_hf(build("T5ForConditionalGeneration"))


PUBLISHED = {"mt5_small": 300, "mt5_base": 582, "mt5_large": 1230, "mt5_xl": 3743, "mt5_xxl": 12921}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_size_has_its_parameters(name):
    config = getattr(Mt5Config, name)()
    assert (config.gated, config.tied, config.vocab_size) == (True, False, 250112)
    assert round(config.num_parameters() / 1e6) == PUBLISHED[name]


DEEP = [name for name in PUBLISHED if getattr(Mt5Config, name)().num_layers == 24]


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow if n in DEEP else ()) for n in PUBLISHED]
)
def test_counts_of_a_published_size(name):
    """The formulas give what is counted, on a model without memory."""
    config = getattr(Mt5Config, name)()
    with torch.device("meta"):
        model = Mt5ForConditionalGeneration(config).eval()
        assert config.num_parameters() == sum(p.numel() for p in model.parameters())
        with FlopCounterMode(display=False) as counter:
            model(torch.zeros(1, 11, dtype=torch.long), torch.zeros(1, 17, dtype=torch.long))
    assert config.flops(11, 17) == counter.get_total_flops()


def test_languages_are_drawn_by_a_power_of_their_size():
    sizes = torch.tensor([1000, 10, 1])
    p = language_probabilities(sizes)
    want = torch.tensor([1000.0, 10.0, 1.0], dtype=torch.float64) ** 0.3
    torch.testing.assert_close(p, want / want.sum(), rtol=1e-12, atol=0)
    proportional = sizes / sizes.sum().double()
    torch.testing.assert_close(language_probabilities(sizes, alpha=1), proportional, rtol=1e-12, atol=0)
    assert language_probabilities(sizes, alpha=0).tolist() == pytest.approx([1 / 3] * 3)
    huge = language_probabilities(torch.tensor([10**15, 10**15]))  # no overflow
    assert huge.tolist() == pytest.approx([0.5, 0.5])


@pytest.mark.parametrize(
    ("sizes", "alpha", "message"),
    [
        ([3, 4], 1.5, "alpha: expected 0 to 1, got 1.5"),
        ([3, 0], 0.3, r"sizes: expected one positive number for each language, got \[3, 0\]"),
        ([], 0.3, "sizes: expected one positive number"),
        ([[1, 2]], 0.3, "sizes: expected one positive number"),
    ],
)
def test_impossible_languages(sizes, alpha, message):
    with pytest.raises(ValueError, match=message):
        language_probabilities(torch.tensor(sizes), alpha=alpha)
