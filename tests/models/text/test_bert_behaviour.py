"""What BERT does and refuses, beside computing the right numbers."""

from __future__ import annotations

import math

import pytest
import torch
import transformers
from parity import loud_, ragged_batch

from textbook_code.data.sources import fetch
from textbook_code.data.text import encode, load_tokenizer
from textbook_code.models.text.bert import (
    Bert,
    BertConfig,
    BertForMaskedLM,
    BertForPreTraining,
    BertForSequenceClassification,
    BertForTokenClassification,
    mean_pool,
)

CONFIG = BertConfig(
    vocab_size=97,
    d_model=35,
    num_layers=3,
    num_heads=5,
    d_ff=53,
    max_seq_len=41,
    num_segments=3,
    norm_eps=1e-2,
    dropout=0.3,
)
BATCH = ragged_batch(97, (29, 13, 3), num_segments=3)
ALL = [Bert, BertForMaskedLM, BertForPreTraining, BertForSequenceClassification, BertForTokenClassification]


def loud_bert(**kwargs: bool) -> Bert:
    return loud_(Bert(CONFIG, **kwargs)).double().eval()


def test_padding_and_the_rest_of_the_batch_change_nothing():
    model = loud_bert()
    together = model(BATCH.tokens, token_mask=BATCH.token_mask, segments=BATCH.segments)
    noise = BATCH.tokens.masked_fill(~BATCH.token_mask, 96)
    for i, n in enumerate(BATCH.token_mask.sum(1).tolist()):
        alone = model(BATCH.tokens[i : i + 1, :n], segments=BATCH.segments[i : i + 1, :n])
        torch.testing.assert_close(together[i, :n], alone[0], atol=1e-10, rtol=1e-10)
    other = model(noise, token_mask=BATCH.token_mask, segments=BATCH.segments)
    torch.testing.assert_close(BATCH.real(other), BATCH.real(together))


def test_bert_reads_in_both_directions():
    model, tokens = loud_bert(), BATCH.tokens[:1]
    for position in (0, 28):
        changed = tokens.clone()
        changed[0, position] = (tokens[0, position] + 1) % 97
        moved = (model(changed) - model(tokens)).abs().amax(-1)[0]
        assert bool((moved > 1e-9).all())  # every position, before and after


def test_what_is_left_out_means_all_real_and_the_first_segment():
    model, tokens = loud_bert(), BATCH.tokens
    given = model(
        tokens, token_mask=torch.ones_like(tokens, dtype=torch.bool), segments=torch.zeros_like(tokens)
    )
    torch.testing.assert_close(model(tokens), given)


def test_weights_come_from_the_same_computation():
    model = loud_bert()
    hidden, weights = model(BATCH.tokens, token_mask=BATCH.token_mask, need_weights=True)
    torch.testing.assert_close(hidden, model(BATCH.tokens, token_mask=BATCH.token_mask))
    assert [tuple(w.shape) for w in weights] == [(3, 5, 29, 29)] * 3
    for w in weights:
        torch.testing.assert_close(w.sum(-1), torch.ones_like(w.sum(-1)))
        assert bool((w.transpose(1, 3)[~BATCH.token_mask] == 0).all())  # nobody looks at padding


@pytest.mark.parametrize("kind", ALL)
def test_dropout_is_for_training_only(kind):
    def first(out):
        return out[0] if isinstance(out, tuple) else out

    model = kind(CONFIG)
    model.eval()
    assert torch.equal(first(model(BATCH.tokens)), first(model(BATCH.tokens)))
    model.train()
    assert not torch.equal(first(model(BATCH.tokens)), first(model(BATCH.tokens)))


def test_the_initialisation_is_the_papers():
    model = BertForPreTraining(BertConfig.bert_tiny())
    for name, p in model.named_parameters():
        if p.ndim == 2:
            assert float(p.detach().std()) == pytest.approx(0.02, rel=0.15), name
            assert abs(float(p.detach().mean())) < 0.005, name
        else:
            assert bool((p == (1 if name.endswith("norm.weight") else 0)).all()), name


@pytest.mark.parametrize(
    ("size", "millions"),  # as published, rounded
    [
        ("bert_tiny", 4.4),
        ("bert_mini", 11.2),
        ("bert_small", 28.8),
        ("bert_medium", 41.4),
        ("bert_base", 109.5),
        ("bert_large", 335.1),
        ("minilm_l6", 22.7),
    ],
)
def test_the_published_sizes(size, millions):
    config = getattr(BertConfig, size)()
    with torch.device("meta"):
        ours = sum(p.numel() for p in Bert(config).parameters())
        reference = transformers.BertModel(
            transformers.BertConfig(
                hidden_size=config.d_model,
                num_hidden_layers=config.num_layers,
                num_attention_heads=config.num_heads,
                intermediate_size=config.d_ff,
            )
        )
    assert ours == sum(p.numel() for p in reference.parameters())
    assert round(ours / 1e6, 1) == millions
    assert config.norm_eps == reference.config.layer_norm_eps == 1e-12
    assert config.dropout == reference.config.hidden_dropout_prob
    smaller = getattr(BertConfig, size)(vocab_size=100, dropout=0.0)
    assert (smaller.vocab_size, smaller.dropout, smaller.d_model) == (100, 0.0, config.d_model)


def test_mean_pool_averages_real_tokens():
    hidden = torch.arange(24.0).view(2, 4, 3)
    mask = torch.tensor([[True, True, False, False], [False] * 4])
    assert mean_pool(hidden, mask).tolist() == [[1.5, 2.5, 3.5], [0, 0, 0]]
    hidden[~mask] = 1e6
    assert mean_pool(hidden, mask).tolist() == [[1.5, 2.5, 3.5], [0, 0, 0]]


@pytest.mark.parametrize("kind", [BertForSequenceClassification, BertForTokenClassification])
def test_a_new_head_on_a_trained_encoder(kind, tmp_path):
    """It shares the encoder, trains it, and can be saved and read again."""
    bert = loud_bert()
    model = kind.from_encoder(bert, 7)
    assert model.bert.blocks is bert.blocks and model.classifier.weight.dtype == torch.float64
    out = model(BATCH.tokens, token_mask=BATCH.token_mask)
    assert out.shape == ((3, 7) if kind is BertForSequenceClassification else (3, 29, 7))
    out.sum().backward()
    assert bert.token_embed.weight.grad is not None
    model.save_pretrained(tmp_path)
    again = kind.from_pretrained(tmp_path)
    model.eval()
    assert torch.equal(again(BATCH.tokens), model(BATCH.tokens))


def test_a_step_of_training_lowers_the_loss():
    torch.manual_seed(0)
    model = BertForSequenceClassification(CONFIG, 3)
    labels = torch.tensor([0, 1, 2])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    model.eval()  # no dropout, so that the loss is a function
    losses = []
    for _ in range(20):
        logits = model(BATCH.tokens, token_mask=BATCH.token_mask)
        loss = torch.nn.functional.cross_entropy(logits, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(math.log(3), abs=0.2)
    assert losses[-1] < losses[0] - 0.1


# ------------------------------------------------------------------------------------------------
# Bad input: the message names the argument, what came and what was expected


GOOD = torch.zeros(2, 7, dtype=torch.long)


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize(
    ("tokens", "kwargs", "error", "message"),
    [
        (GOOD[0], {}, ValueError, r"tokens: expected shape \(B, T\), got \(7,\)"),
        ("hello", {}, TypeError, r"tokens: expected a tensor, got str"),
        (GOOD.float(), {}, TypeError, r"tokens: expected a tensor of integer ids.*, got torch.float32"),
        (GOOD + 97, {}, ValueError, r"tokens: expected ids from 0 to 96, got 97 to 97"),
        (GOOD - 1, {}, ValueError, r"tokens: expected ids from 0 to 96, got -1 to -1"),
        (GOOD[:, :0], {}, ValueError, r"tokens: expected 1 to 41 positions \(max_seq_len\), got 0"),
        (
            torch.zeros(2, 42, dtype=torch.long),
            {},
            ValueError,
            r"tokens: expected 1 to 41 positions \(max_seq_len\), got 42",
        ),
        (GOOD, {"token_mask": GOOD}, TypeError, r"token_mask: expected a bool tensor.*, got torch.int64"),
        (GOOD, {"token_mask": GOOD.float()}, TypeError, r"token_mask: .*, got torch.float32"),
        (
            GOOD,
            {"token_mask": torch.ones(2, 6, dtype=torch.bool)},
            ValueError,
            r"token_mask: expected shape \(B, T\) with B = 2, T = 7, got \(2, 6\)",
        ),
        (
            GOOD,
            {"token_mask": torch.ones(2, 1, 1, 7, dtype=torch.bool)},
            ValueError,
            r"token_mask: expected shape \(B, T\).*, got \(2, 1, 1, 7\)",
        ),
        (GOOD, {"segments": GOOD[:1]}, ValueError, r"segments: expected .* B = 2.*, got \(1, 7\)"),
        (GOOD, {"segments": GOOD + 3}, ValueError, r"segments: expected ids from 0 to 2, got 3 to 3"),
        (
            GOOD,
            {"segments": GOOD.float()},
            TypeError,
            r"segments: expected .* integer ids.*, got torch.float32",
        ),
        (GOOD, {"segments": GOOD.bool()}, TypeError, r"segments: expected .* integer ids.*, got torch.bool"),
    ],
)
def test_bad_input(kind, tokens, kwargs, error, message):
    with pytest.raises(error, match=message):
        kind(CONFIG)(tokens, **kwargs)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_heads": 4}, r"num_heads: expected a positive divisor of d_model = 35, got 4"),
        ({"num_heads": 0}, r"num_heads: expected at least 1, got 0"),
        ({"num_layers": 0}, r"num_layers: expected at least 1, got 0"),
        ({"vocab_size": 0}, r"vocab_size: expected at least 1, got 0"),
        ({"d_ff": -1}, r"d_ff: expected at least 1, got -1"),
        ({"max_seq_len": 0}, r"max_seq_len: expected at least 1, got 0"),
        ({"dropout": 1.5}, r"dropout probability has to be between 0 and 1, but got 1.5"),
    ],
)
def test_a_config_that_cannot_be(changes, message):
    sizes = {field: getattr(CONFIG, field) for field in CONFIG.__dataclass_fields__}
    with pytest.raises(ValueError, match=message):
        Bert(BertConfig(**{**sizes, **changes}))


def test_heads_that_cannot_be():
    with pytest.raises(ValueError, match="num_classes: expected at least 2, got 1"):
        BertForSequenceClassification(CONFIG, 1)
    with pytest.raises(ValueError, match="pooler: this Bert was built with pooler=False"):
        loud_bert(pooler=False).pool(torch.zeros(2, 7, 35).double())
    with pytest.raises(ValueError, match=r"bert: expected an encoder with a pooler"):
        BertForSequenceClassification.from_encoder(loud_bert(pooler=False), 3)


def test_hidden_states_that_do_not_fit_a_pooler():
    hidden, mask = torch.zeros(2, 7, 35), torch.ones(2, 7, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"hidden: expected shape \(B, T, D\), got \(7, 35\)"):
        mean_pool(hidden[0], mask)
    with pytest.raises(TypeError, match=r"token_mask: expected a bool tensor.*got torch.int64"):
        mean_pool(hidden, mask.long())
    with pytest.raises(ValueError, match=r"token_mask: expected .* T = 7, got \(2, 6\)"):
        mean_pool(hidden, mask[:, :6])
    with pytest.raises(ValueError, match=r"hidden: expected shape \(B, T, D\) with D = 35, got \(2, 7, 34\)"):
        loud_bert().pool(hidden[:, :, :34].double())


@pytest.mark.parametrize("texts", [[""], ["a text", "   "]])
def test_an_empty_text(texts):
    tokenizer = load_tokenizer(fetch("minilm"))
    with pytest.raises(
        ValueError, match=rf"texts\[{len(texts) - 1}\].* is empty, expected at least one token"
    ):
        encode(tokenizer, texts, max_seq_len=32)
