"""BART computes what transformers' BART computes: both stacks, both heads, every gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from parity import check_loading, loud_, parity_row
from references import BART, bart_batches, bart_config
from torch import Tensor, nn

from textbook_code.layers.norms import LayerNorm
from textbook_code.models.text.bart import Bart, BartForConditionalGeneration, BartForSequenceClassification
from textbook_code.weights import WeightError

SOURCE, TARGET = bart_batches()
ATTENTIONS = ["eager", "sdpa"]
K_BIAS = r".*\.k_proj\.bias"  # shifts all scores of a query alike, and softmax does not see it


def build(architecture: str, attention: str, **changes: Any) -> transformers.PreTrainedModel:
    """The reference, tiny, loud (its fixed bias too) and in float64."""
    model = loud_(getattr(transformers, architecture)(bart_config(attn_implementation=attention, **changes)))
    if hasattr(model, "final_logits_bias"):
        z = torch.randn(model.final_logits_bias.shape, generator=torch.Generator().manual_seed(3))
        model.final_logits_bias.copy_(z)
    return model.double().eval()


def ours(m: Any) -> Tensor:
    return m(SOURCE.tokens, TARGET.tokens, token_mask=SOURCE.token_mask, target_mask=TARGET.token_mask)


def theirs(r: Any) -> Any:
    return r(
        SOURCE.tokens,
        attention_mask=SOURCE.token_mask.long(),
        decoder_input_ids=TARGET.tokens,
        decoder_attention_mask=TARGET.token_mask.long(),
        use_cache=False,
    )


@parity_row("bart", "both stacks", "transformers.BartModel", page="bart-model")
def test_both_stacks(parity):
    def run_ours(m: Bart) -> dict[str, Tensor]:
        context = m.encode(SOURCE.tokens, token_mask=SOURCE.token_mask)
        return {"encoder": SOURCE.real(context), "decoder": TARGET.real(ours(m))}

    def run_theirs(r: transformers.BartModel) -> dict[str, Tensor]:
        out = theirs(r)
        return {
            "encoder": SOURCE.real(out.encoder_last_hidden_state),
            "decoder": TARGET.real(out.last_hidden_state),
        }

    for attention in ATTENTIONS:
        reference = build("BartModel", attention)
        parity.check(Bart.from_hf, reference, ours=run_ours, theirs=run_theirs, zero_gradient=[K_BIAS])


@parity_row("bart", "generation", "transformers.BartForConditionalGeneration", page="bart-model")
def test_generation(parity):
    for attention in ATTENTIONS:
        parity.check(
            BartForConditionalGeneration.from_hf,
            build("BartForConditionalGeneration", attention),
            ours=lambda m: {"logits": TARGET.real(ours(m))},
            theirs=lambda r: {"logits": TARGET.real(theirs(r).logits)},
            zero_gradient=[K_BIAS],
        )


def texts_with_ends() -> Tensor:
    """The source, with one or two `eos` in each row: the last is its last real token, or before it."""
    tokens = SOURCE.tokens.masked_fill(SOURCE.tokens == 7, 8)
    for row, (first, last) in enumerate([(4, 36), (2, 20), (9, 31), (0, 2)]):
        tokens[row, first] = tokens[row, last] = 7
    return tokens


@parity_row(
    "bart", "sequence classification", "transformers.BartForSequenceClassification", page="bart-model"
)
def test_sequence_classification(parity):
    tokens = texts_with_ends()
    for attention in ATTENTIONS:
        parity.check(
            BartForSequenceClassification.from_hf,
            build("BartForSequenceClassification", attention, num_labels=7),
            ours=lambda m: {"logits": m(tokens, token_mask=SOURCE.token_mask)},
            theirs=lambda r: {
                "logits": r(tokens, attention_mask=SOURCE.token_mask.long(), use_cache=False).logits
            },
            zero_gradient=[K_BIAS],
        )


@pytest.mark.parametrize(
    ("ours_class", "theirs_class"),
    [
        (Bart, "BartModel"),
        (BartForConditionalGeneration, "BartForConditionalGeneration"),
        (BartForSequenceClassification, "BartForSequenceClassification"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_weights_load_strictly_both_ways(ours_class, theirs_class):
    def reference() -> transformers.PreTrainedModel:
        return getattr(transformers, theirs_class)(bart_config(encoder_layers=1, decoder_layers=2))

    tied = [key for key in ours_class.hf_tied if key in reference().state_dict()]
    assert len(tied) == (3 if ours_class is BartForConditionalGeneration else 2)
    check_loading(ours_class.from_hf, reference, tied=tied)


def test_a_table_that_is_not_tied_is_refused():
    reference = build("BartForConditionalGeneration", "sdpa")
    for key in ("lm_head.weight", "model.encoder.embed_tokens.weight", "model.decoder.embed_tokens.weight"):
        state = {name: tensor.clone() for name, tensor in reference.state_dict().items()}
        state[key][13, 17] += 1
        model = BartForConditionalGeneration.from_hf_config(bart_config().to_dict())
        with pytest.raises(WeightError, match=f"{key}: expected it to equal model.shared.weight"):
            model.load_hf_state_dict(state)


def test_the_body_of_a_checkpoint_serves_every_class(tmp_path):
    """BART-base is published as a bare body: no prefix, no bias of the logits."""
    body = build("BartModel", "sdpa")
    body.save_pretrained(tmp_path / "body")
    whole = BartForConditionalGeneration.from_pretrained(tmp_path / "body")
    assert float(whole.logits_bias.abs().max()) == 0
    want = theirs(body).last_hidden_state
    torch.testing.assert_close(TARGET.real(ours(whole.bart)), TARGET.real(want), atol=1e-10, rtol=1e-10)

    generation = build("BartForConditionalGeneration", "sdpa")
    generation.save_pretrained(tmp_path / "generation")
    bare = Bart.from_pretrained(tmp_path / "generation")
    want = theirs(generation.model).last_hidden_state
    torch.testing.assert_close(TARGET.real(ours(bare)), TARGET.real(want), atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize(
    ("ours_class", "theirs_class"),
    [
        (Bart, "BartModel"),
        (BartForConditionalGeneration, "BartForConditionalGeneration"),
        (BartForSequenceClassification, "BartForSequenceClassification"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_what_we_save_the_reference_reads(ours_class, theirs_class, tmp_path):
    reference = build(theirs_class, "sdpa")
    model = ours_class.from_hf(reference)
    model.save_pretrained(tmp_path)
    again, info = getattr(transformers, theirs_class).from_pretrained(
        tmp_path, dtype=torch.float64, output_loading_info=True
    )
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    state = reference.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in again.state_dict().items())
    for key in BART:
        if key not in ("init_std", "forced_eos_token_id"):
            assert getattr(again.config, key) == BART[key], key
    assert again.config.num_labels == reference.config.num_labels
    ours_again = ours_class.from_pretrained(tmp_path)
    assert ours_again.config == model.config
    assert all(torch.equal(t, model.state_dict()[name]) for name, t in ours_again.state_dict().items())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scale_embedding": True}, "needs scale_embedding = False, got True"),
        ({"activation_function": "relu"}, "needs activation_function = 'gelu', got 'relu'"),
        (
            {"decoder_attention_heads": 7},
            "needs decoder_attention_heads = encoder_attention_heads = 5, got 7",
        ),
        ({"decoder_ffn_dim": 59}, "needs decoder_ffn_dim = encoder_ffn_dim = 53, got 59"),
        ({"normalize_before": True}, "needs normalize_before = False, got True"),
        ({"tie_word_embeddings": False}, "needs tie_word_embeddings = True, got False"),
        ({"model_type": "mbart"}, "needs model_type = 'bart', got 'mbart'"),
        ({"model_type": "t5"}, "needs model_type = 'bart', got 't5'"),
    ],
)
@pytest.mark.parametrize("kind", [Bart, BartForConditionalGeneration, BartForSequenceClassification])
def test_other_architectures_are_refused(kind, changes, message):
    with pytest.raises(WeightError, match=message):
        kind.config_from_hf({**bart_config().to_dict(), **changes})


def test_a_config_without_a_field_is_refused():
    given = bart_config().to_dict()
    del given["max_position_embeddings"]
    with pytest.raises(WeightError, match="max_position_embeddings"):
        Bart.config_from_hf(given)


def test_the_epsilon_that_no_config_names_is_the_references():
    reference, model = transformers.BartModel(bart_config()), Bart.from_hf_config(bart_config().to_dict())
    theirs = {m.eps for m in reference.modules() if isinstance(m, nn.LayerNorm)}
    assert theirs == {m.norm_eps for m in model.modules() if isinstance(m, LayerNorm)} == {1e-5}
