"""DistilBERT computes what transformers' DistilBERT computes: the encoder, every head, every gradient."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import transformers
from parity import check_loading, error_of, loud_, parity_row
from references import bert_batch, distilbert_config
from torch import Tensor, nn

from textbook_code.models.text.distilbert import (
    DistilBert,
    DistilBertForMaskedLM,
    DistilBertForSequenceClassification,
    DistilBertForTokenClassification,
)

BATCH = bert_batch()
ATTENTIONS = ["eager", "sdpa"]
EPS = 1e-2
K_BIAS = r".*\.k_proj\.bias"  # shifts all scores of a query alike, and softmax does not see it
HEADS = [
    (DistilBert, "DistilBertModel"),
    (DistilBertForMaskedLM, "DistilBertForMaskedLM"),
    (DistilBertForSequenceClassification, "DistilBertForSequenceClassification"),
    (DistilBertForTokenClassification, "DistilBertForTokenClassification"),
]


def build(architecture: str, attention: str = "eager", **changes: object) -> transformers.PreTrainedModel:
    """The reference, tiny, loud and in float64, with an ε that is heard."""
    config = distilbert_config(attn_implementation=attention, **changes)
    reference = loud_(getattr(transformers, architecture)(config)).double()
    for module in reference.modules():
        if isinstance(module, nn.LayerNorm):
            assert module.eps == 1e-12  # a constant of the published code
            module.eps = EPS
    return reference


def loaded(kind):
    """`from_hf`, at the ε of `build`, which the published config cannot carry."""

    def load(reference):
        theirs = reference.config.to_dict()
        like = kind.from_hf_config(theirs)
        classes = [like.classifier.out_features] if hasattr(like, "classifier") else []
        model = kind(replace(like.config, norm_eps=EPS), *classes)
        return model.load_hf_state_dict(reference.state_dict()).eval()

    return load


def ours(model, **kw):
    return model(BATCH.tokens, token_mask=BATCH.token_mask, **kw)


def theirs(model, **kw):
    return model(BATCH.tokens, attention_mask=BATCH.token_mask.long(), **kw)


@parity_row("distilbert", "encoder", "transformers.DistilBertModel", page="distilbert-student")
def test_encoder(parity):
    for attention in ATTENTIONS:
        parity.check(
            loaded(DistilBert),
            build("DistilBertModel", attention),
            ours=lambda m: {"hidden": BATCH.real(ours(m))},
            theirs=lambda r: {"hidden": BATCH.real(theirs(r).last_hidden_state)},
            zero_gradient=[K_BIAS],
        )


def test_attention_weights():
    """The written-out path: the same hidden states, and every head's weights."""
    reference = build("DistilBertModel").eval()
    model = loaded(DistilBert)(reference)
    hidden, weights = ours(model, need_weights=True)
    out = theirs(reference, output_attentions=True)
    assert error_of(BATCH.real(hidden), BATCH.real(out.last_hidden_state)) < 1e-10
    assert len(weights) == len(out.attentions) == 3
    for got, want in zip(weights, out.attentions, strict=True):
        assert error_of(BATCH.real(got.transpose(1, 2)), BATCH.real(want.transpose(1, 2))) < 1e-10


@parity_row(
    "distilbert", "masked language model", "transformers.DistilBertForMaskedLM", page="distilbert-loss"
)
def test_masked_language_model(parity):
    for attention in ATTENTIONS:
        parity.check(
            loaded(DistilBertForMaskedLM),
            build("DistilBertForMaskedLM", attention),
            ours=lambda m: {"logits": BATCH.real(ours(m))},
            theirs=lambda r: {"logits": BATCH.real(theirs(r).logits)},
            zero_gradient=[K_BIAS],
        )


@parity_row(
    "distilbert",
    "sequence classification",
    "transformers.DistilBertForSequenceClassification",
    page="distilbert-student",
)
def test_sequence_classification(parity):
    for attention in ATTENTIONS:
        parity.check(
            loaded(DistilBertForSequenceClassification),
            build("DistilBertForSequenceClassification", attention, num_labels=7),
            ours=lambda m: {"logits": ours(m)},
            theirs=lambda r: {"logits": theirs(r).logits},
            zero_gradient=[K_BIAS],
        )


@parity_row(
    "distilbert",
    "token classification",
    "transformers.DistilBertForTokenClassification",
    page="distilbert-tagger",
)
def test_token_classification(parity):
    for attention in ATTENTIONS:
        parity.check(
            loaded(DistilBertForTokenClassification),
            build("DistilBertForTokenClassification", attention, num_labels=7),
            ours=lambda m: {"logits": BATCH.real(ours(m))},
            theirs=lambda r: {"logits": BATCH.real(theirs(r).logits)},
            zero_gradient=[K_BIAS],
        )


@pytest.mark.parametrize(("ours_class", "theirs_class"), HEADS, ids=lambda x: x if isinstance(x, str) else "")
def test_weights_load_strictly_both_ways(ours_class, theirs_class):
    check_loading(
        ours_class.from_hf,
        lambda: getattr(transformers, theirs_class)(distilbert_config()),
        tied=ours_class.hf_tied,
    )


@pytest.mark.parametrize(("ours_class", "theirs_class"), HEADS, ids=lambda x: x if isinstance(x, str) else "")
def test_dropout_falls_in_the_same_places(ours_class, theirs_class):
    """In training, with the same random numbers, both drop the same entries; that of the attention is off,
    because torch's kernel draws its own. BERT's block would drop entries of the attention's output too."""
    reference = build(theirs_class, dropout=0.4, attention_dropout=0.0, seq_classif_dropout=0.3)
    model = loaded(ours_class)(reference).train()
    torch.manual_seed(5)
    got = ours(model)
    torch.manual_seed(5)
    want = theirs(reference.train())[0]
    assert error_of(real(got), real(want)) < 1e-10
    assert error_of(real(ours(model)), real(want)) > 1e-2  # other numbers, other entries


def real(x: Tensor) -> Tensor:
    return BATCH.real(x) if x.ndim == 3 else x
