"""RoBERTa computes what transformers' RoBERTa computes: the encoder, every head, every gradient."""

from __future__ import annotations

import pytest
import torch
import transformers
from parity import check_loading, error_of, loud_, parity_row
from references import ROBERTA, padded_on_the_left, roberta_batch, roberta_config
from torch import Tensor

from textbook_code.models.text.roberta import (
    Roberta,
    RobertaForMaskedLM,
    RobertaForSequenceClassification,
    RobertaForTokenClassification,
)

ATTENTIONS = ["eager", "sdpa"]
K_BIAS = r".*\.k_proj\.bias"  # shifts all scores of a query alike, and softmax does not see it
HEADS = [
    (Roberta, "RobertaModel"),
    (RobertaForMaskedLM, "RobertaForMaskedLM"),
    (RobertaForSequenceClassification, "RobertaForSequenceClassification"),
    (RobertaForTokenClassification, "RobertaForTokenClassification"),
]


BATCH = roberta_batch()
BATCHES = {"right": BATCH, "left": padded_on_the_left(BATCH)}


def build(architecture: str, attention: str = "eager", **changes: object) -> transformers.PreTrainedModel:
    """The reference, tiny, loud and in float64."""
    config = roberta_config(attn_implementation=attention, **changes)
    return loud_(getattr(transformers, architecture)(config)).double()


def ours(model, batch=BATCH, **kw):
    return model(batch.tokens, token_mask=batch.token_mask, **kw)


def theirs(model, batch=BATCH, **kw):
    return model(batch.tokens, attention_mask=batch.token_mask.long(), **kw)


@parity_row("roberta", "encoder and pooler", "transformers.RobertaModel", page="roberta-positions")
def test_encoder_and_pooler(parity):
    """Padding on either side; three segments, which published weights do not have."""

    def run_ours(m: Roberta) -> dict[str, Tensor]:
        hidden = {side: ours(m, b, segments=b.segments) for side, b in BATCHES.items()}
        return named(hidden) | {"pooled": m.pool(hidden["right"])}

    def run_theirs(r: transformers.RobertaModel) -> dict[str, Tensor]:
        out = {side: theirs(r, b, token_type_ids=b.segments) for side, b in BATCHES.items()}
        hidden = {side: o.last_hidden_state for side, o in out.items()}
        return named(hidden) | {"pooled": out["right"].pooler_output}

    def named(hidden: dict[str, Tensor]) -> dict[str, Tensor]:
        return {side: BATCHES[side].real(h) for side, h in hidden.items()}

    for attention in ATTENTIONS:
        reference = build("RobertaModel", attention)
        parity.check(Roberta.from_hf, reference, ours=run_ours, theirs=run_theirs, zero_gradient=[K_BIAS])


@parity_row("roberta", "masked language model", "transformers.RobertaForMaskedLM", page="roberta-masking")
def test_masked_language_model(parity):
    for attention in ATTENTIONS:
        parity.check(
            RobertaForMaskedLM.from_hf,
            build("RobertaForMaskedLM", attention),
            ours=lambda m: {side: b.real(ours(m, b)) for side, b in BATCHES.items()},
            theirs=lambda r: {side: b.real(theirs(r, b).logits) for side, b in BATCHES.items()},
            zero_gradient=[K_BIAS],
        )


@parity_row(
    "roberta",
    "sequence classification",
    "transformers.RobertaForSequenceClassification",
    page="roberta-heads",
)
def test_sequence_classification(parity):
    for attention in ATTENTIONS:
        parity.check(
            RobertaForSequenceClassification.from_hf,
            build("RobertaForSequenceClassification", attention, num_labels=7),
            ours=lambda m: {"logits": ours(m)},
            theirs=lambda r: {"logits": theirs(r).logits},
            zero_gradient=[K_BIAS],
        )


@parity_row(
    "roberta", "token classification", "transformers.RobertaForTokenClassification", page="roberta-heads"
)
def test_token_classification(parity):
    for attention in ATTENTIONS:
        parity.check(
            RobertaForTokenClassification.from_hf,
            build("RobertaForTokenClassification", attention, num_labels=7),
            ours=lambda m: {side: b.real(ours(m, b)) for side, b in BATCHES.items()},
            theirs=lambda r: {side: b.real(theirs(r, b).logits) for side, b in BATCHES.items()},
            zero_gradient=[K_BIAS],
        )


@parity_row("xlm-roberta", "encoder and pooler", "transformers.XLMRobertaModel", page="family-e5")
def test_xlm_roberta(parity):
    """The same classes read XLM-R, whose config calls itself by another name."""

    def reference(attention: str) -> transformers.XLMRobertaModel:
        config = transformers.XLMRobertaConfig(**{**ROBERTA, "attn_implementation": attention})
        return loud_(transformers.XLMRobertaModel(config)).double()

    def run_ours(m: Roberta) -> dict[str, Tensor]:
        hidden = ours(m)
        return {"hidden": BATCH.real(hidden), "pooled": m.pool(hidden)}

    def run_theirs(r: transformers.XLMRobertaModel) -> dict[str, Tensor]:
        out = theirs(r)
        return {"hidden": BATCH.real(out.last_hidden_state), "pooled": out.pooler_output}

    for attention in ATTENTIONS:
        parity.check(
            Roberta.from_hf, reference(attention), ours=run_ours, theirs=run_theirs, zero_gradient=[K_BIAS]
        )


@pytest.mark.parametrize(("ours_class", "theirs_class"), HEADS, ids=lambda x: x if isinstance(x, str) else "")
def test_weights_load_strictly_both_ways(ours_class, theirs_class):
    check_loading(
        ours_class.from_hf,
        lambda: getattr(transformers, theirs_class)(roberta_config()),
        tied=ours_class.hf_tied,
    )


@pytest.mark.parametrize(("ours_class", "theirs_class"), HEADS, ids=lambda x: x if isinstance(x, str) else "")
def test_dropout_falls_in_the_same_places(ours_class, theirs_class):
    """In training, with the same random numbers, both drop the same entries; that of the attention is off,
    because torch's kernel draws its own."""
    reference = build(theirs_class, hidden_dropout_prob=0.4, attention_probs_dropout_prob=0.0)
    model = ours_class.from_hf(reference).train()
    torch.manual_seed(5)
    got = ours(model)
    torch.manual_seed(5)
    want = theirs(reference.train())[0]
    assert error_of(real(got), real(want)) < 1e-10
    assert error_of(real(ours(model)), real(want)) > 1e-2  # other numbers, other entries


def real(x: Tensor) -> Tensor:
    return BATCH.real(x) if x.ndim == 3 else x
