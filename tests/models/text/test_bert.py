"""BERT computes what transformers' BERT computes: the encoder, every head, every gradient."""

from __future__ import annotations

import pytest
import transformers
from parity import check_loading, loud_, parity_row
from references import bert_batch, bert_config
from torch import Tensor

from textbook_code.models.text.bert import (
    Bert,
    BertForMaskedLM,
    BertForPreTraining,
    BertForSequenceClassification,
    BertForTokenClassification,
)

BATCH = bert_batch()
ATTENTIONS = ["eager", "sdpa"]
K_BIAS = r".*\.k_proj\.bias"  # shifts all scores of a query alike, and softmax does not see it


def build(architecture: str, attention: str, **changes: object) -> transformers.PreTrainedModel:
    """The reference, tiny, loud and in float64."""
    config = bert_config(attn_implementation=attention, **changes)
    return loud_(getattr(transformers, architecture)(config)).double()


def ours(model, **kw):
    return model(BATCH.tokens, token_mask=BATCH.token_mask, segments=BATCH.segments, **kw)


def theirs(model, **kw):
    return model(BATCH.tokens, attention_mask=BATCH.token_mask.long(), token_type_ids=BATCH.segments, **kw)


@parity_row("bert", "encoder and pooler", "transformers.BertModel", page="encoder-only")
def test_encoder_and_pooler(parity):
    def run_ours(m: Bert) -> dict[str, Tensor]:
        hidden = ours(m)
        return {"hidden": BATCH.real(hidden), "pooled": m.pool(hidden)}

    def run_theirs(r: transformers.BertModel) -> dict[str, Tensor]:
        out = theirs(r)
        return {"hidden": BATCH.real(out.last_hidden_state), "pooled": out.pooler_output}

    for attention in ATTENTIONS:
        reference = build("BertModel", attention)
        parity.check(Bert.from_hf, reference, ours=run_ours, theirs=run_theirs, zero_gradient=[K_BIAS])


@parity_row("bert", "attention weights", "transformers.BertModel", page="attention-real")
def test_attention_weights(parity):
    """The written-out path, through the whole model: hidden states, and every head's weights."""

    def run_ours(m: Bert) -> dict[str, Tensor]:
        hidden, weights = ours(m, need_weights=True)
        return named(hidden, weights) | {"pooled": m.pool(hidden)}

    def run_theirs(r: transformers.BertModel) -> dict[str, Tensor]:
        out = theirs(r, output_attentions=True)
        return named(out.last_hidden_state, out.attentions) | {"pooled": out.pooler_output}

    def named(hidden: Tensor, weights: list[Tensor]) -> dict[str, Tensor]:
        assert len(weights) == 3
        maps = {f"weights.{i}": BATCH.real(w.transpose(1, 2)) for i, w in enumerate(weights)}  # (N, H, T)
        return {"hidden": BATCH.real(hidden), **maps}

    reference = build("BertModel", "eager")
    parity.check(Bert.from_hf, reference, ours=run_ours, theirs=run_theirs, zero_gradient=[K_BIAS])


@parity_row("bert", "masked language model", "transformers.BertForMaskedLM", page="bert-mlm")
def test_masked_language_model(parity):
    for attention in ATTENTIONS:
        parity.check(
            BertForMaskedLM.from_hf,
            build("BertForMaskedLM", attention),
            ours=lambda m: {"logits": BATCH.real(ours(m))},
            theirs=lambda r: {"logits": BATCH.real(theirs(r).logits)},
            zero_gradient=[K_BIAS],
        )


@parity_row("bert", "pre-training", "transformers.BertForPreTraining", page="bert-heads")
def test_pre_training(parity):
    def run_ours(m: BertForPreTraining) -> dict[str, Tensor]:
        words, follows = ours(m)
        return {"words": BATCH.real(words), "follows": follows}

    def run_theirs(r: transformers.BertForPreTraining) -> dict[str, Tensor]:
        out = theirs(r)
        return {"words": BATCH.real(out.prediction_logits), "follows": out.seq_relationship_logits}

    for attention in ATTENTIONS:
        reference = build("BertForPreTraining", attention)
        parity.check(
            BertForPreTraining.from_hf, reference, ours=run_ours, theirs=run_theirs, zero_gradient=[K_BIAS]
        )


@parity_row(
    "bert", "sequence classification", "transformers.BertForSequenceClassification", page="bert-finetune"
)
def test_sequence_classification(parity):
    for attention in ATTENTIONS:
        parity.check(
            BertForSequenceClassification.from_hf,
            build("BertForSequenceClassification", attention, num_labels=7),
            ours=lambda m: {"logits": ours(m)},
            theirs=lambda r: {"logits": theirs(r).logits},
            zero_gradient=[K_BIAS],
        )


@parity_row("bert", "token classification", "transformers.BertForTokenClassification", page="bert-heads")
def test_token_classification(parity):
    for attention in ATTENTIONS:
        parity.check(
            BertForTokenClassification.from_hf,
            build("BertForTokenClassification", attention, num_labels=7),
            ours=lambda m: {"logits": BATCH.real(ours(m))},
            theirs=lambda r: {"logits": BATCH.real(theirs(r).logits)},
            zero_gradient=[K_BIAS],
        )


@pytest.mark.parametrize(
    ("ours_class", "theirs_class"),
    [
        (Bert, "BertModel"),
        (BertForMaskedLM, "BertForMaskedLM"),
        (BertForPreTraining, "BertForPreTraining"),
        (BertForSequenceClassification, "BertForSequenceClassification"),
        (BertForTokenClassification, "BertForTokenClassification"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_weights_load_strictly_both_ways(ours_class, theirs_class):
    check_loading(
        ours_class.from_hf,
        lambda: getattr(transformers, theirs_class)(bert_config()),
        tied=ours_class.hf_tied,
    )
