"""What RoBERTa does and refuses, beside computing the right numbers."""

from __future__ import annotations

import json
import math

import pytest
import torch
import transformers
from parity import loud_
from references import ROBERTA_PAD as PAD
from references import padded_on_the_left, roberta_batch, roberta_config

from textbook_code.models.text.bert import Bert, BertConfig
from textbook_code.models.text.roberta import (
    Roberta,
    RobertaConfig,
    RobertaForMaskedLM,
    RobertaForSequenceClassification,
    RobertaForTokenClassification,
)
from textbook_code.weights import WeightError

CONFIG = RobertaConfig(
    vocab_size=97,
    d_model=35,
    num_layers=3,
    num_heads=5,
    d_ff=53,
    max_seq_len=41,
    norm_eps=1e-2,
    dropout=0.3,
    pad_id=PAD,
)
HEADS = [
    (Roberta, "RobertaModel"),
    (RobertaForMaskedLM, "RobertaForMaskedLM"),
    (RobertaForSequenceClassification, "RobertaForSequenceClassification"),
    (RobertaForTokenClassification, "RobertaForTokenClassification"),
]
ALL = [ours_class for ours_class, _ in HEADS]
BATCH = roberta_batch()
BATCHES = {"right": BATCH, "left": padded_on_the_left(BATCH)}
GOOD = torch.full((2, 7), 9)


def loud_roberta(config: RobertaConfig = CONFIG, **kwargs: bool) -> Roberta:
    return loud_(Roberta(config, **kwargs)).double().eval()


def test_positions_start_behind_the_padding_and_padding_stays_there():
    """Each row of the table holds its own number, so that the positions can be read off."""
    model = Roberta(RobertaConfig(vocab_size=97, d_model=5, num_layers=1, num_heads=1, d_ff=8, max_seq_len=9))
    model.pos_embed.weight.data.copy_(torch.arange(11.0)[:, None].expand(11, 5))
    mask = torch.tensor([[1, 1, 1, 0, 0], [0, 0, 1, 1, 1], [1, 0, 1, 1, 0], [1, 1, 1, 1, 1]]).bool()
    positions = model.positions(5, mask)[..., 0].tolist()
    assert positions == [[2, 3, 4, 1, 1], [1, 1, 2, 3, 4], [2, 1, 3, 4, 1], [2, 3, 4, 5, 6]]
    assert model.positions(5, None)[:, 0].tolist() == [2, 3, 4, 5, 6]
    want = transformers.models.roberta.modeling_roberta.RobertaEmbeddings.create_position_ids_from_input_ids(
        torch.where(mask, 9, 1), padding_idx=1
    )
    assert positions == want.tolist()


def test_padding_on_either_side_changes_nothing():
    """Whatever stands in it, and whoever else is in the batch."""
    model = loud_roberta()
    for batch in BATCHES.values():
        noise = batch.tokens.masked_fill(~batch.token_mask, 96)
        for tokens in (batch.tokens, noise):
            together = model(tokens, token_mask=batch.token_mask)
            for row, mask, hidden in zip(batch.tokens, batch.token_mask, together, strict=True):
                alone = model(row[mask][None])
                torch.testing.assert_close(hidden[mask], alone[0], atol=1e-10, rtol=1e-10)


def test_a_text_of_the_full_length_uses_the_last_row():
    model = loud_roberta()
    tokens = BATCH.tokens[:1]
    assert tokens.size(1) == CONFIG.max_seq_len
    hidden = model(tokens)
    hidden.sum().backward()
    used = model.pos_embed.weight.grad.abs().amax(1) > 0
    assert used.tolist() == [False] * (PAD + 1) + [True] * 41


def test_it_is_bert_with_other_positions():
    """A BERT whose position table lacks the unused rows computes the same on texts without padding."""
    roberta = loud_roberta()
    bert = Bert(
        BertConfig(
            vocab_size=97, d_model=35, num_layers=3, num_heads=5, d_ff=53, max_seq_len=41, num_segments=1,
            norm_eps=1e-2,
        )
    ).double().eval()  # fmt: skip
    weights = roberta.state_dict()
    weights["pos_embed.weight"] = weights["pos_embed.weight"][PAD + 1 :]
    bert.load_state_dict(weights)
    torch.testing.assert_close(bert(BATCH.tokens[:1]), roberta(BATCH.tokens[:1]), atol=1e-12, rtol=1e-12)


def test_the_initialisation_is_the_papers():
    model = RobertaForMaskedLM(RobertaConfig._sized(2, 256, 4, vocab_size=2000))
    for name, p in model.named_parameters():
        if p.ndim == 2 and p.numel() > 1000:
            assert float(p.detach().std()) == pytest.approx(0.02, rel=0.05), name
            assert abs(float(p.detach().mean())) < 0.002, name
        elif p.ndim == 1:
            assert bool((p == (1 if name.endswith("norm.weight") else 0)).all()), name


@pytest.mark.parametrize("kind", ALL)
def test_dropout_is_for_training_only(kind):
    model = kind(CONFIG).eval()
    assert torch.equal(model(BATCH.tokens), model(BATCH.tokens))
    model.train()
    assert not torch.equal(model(BATCH.tokens), model(BATCH.tokens))


@pytest.mark.parametrize("kind", [RobertaForSequenceClassification, RobertaForTokenClassification])
def test_a_new_head_on_a_trained_encoder(kind):
    """It shares the encoder, and trains it and the head."""
    encoder = loud_roberta(pooler=False)
    model = kind.from_encoder(encoder, 7)
    assert model.roberta.blocks is encoder.blocks and model.classifier.weight.dtype == torch.float64
    assert float(model.classifier.weight.detach().std()) == pytest.approx(0.02, rel=0.3)
    out = model(BATCH.tokens, token_mask=BATCH.token_mask)
    assert out.shape == ((4, 7) if kind is RobertaForSequenceClassification else (4, 41, 7))
    out.sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    assert encoder.token_embed.weight.grad is not None
    with pytest.raises(TypeError, match=rf"roberta: expected a Roberta for {kind.__name__}, got Bert"):
        kind.from_encoder(Bert(BertConfig.bert_tiny(vocab_size=9)), 7)


def test_a_step_of_training_lowers_the_loss():
    torch.manual_seed(0)
    model = RobertaForMaskedLM(CONFIG).eval()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    targets = BATCH.tokens.masked_fill(~BATCH.token_mask, -100)
    losses = []
    for _ in range(10):
        logits = model(BATCH.tokens, token_mask=BATCH.token_mask)
        loss = torch.nn.functional.cross_entropy(logits.mT, targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(math.log(97), abs=0.2)
    assert losses[-1] < losses[0] - 0.3


# ------------------------------------------------------------------------------------------------
# Files


@pytest.mark.parametrize(("ours_class", "theirs_class"), HEADS, ids=lambda x: x if isinstance(x, str) else "")
def test_transformers_reads_what_we_write_and_we_read_what_it_writes(ours_class, theirs_class, tmp_path):
    labels = {} if ours_class in (Roberta, RobertaForMaskedLM) else {"num_labels": 7}
    reference_class = getattr(transformers, theirs_class)
    reference = loud_(reference_class(roberta_config(**labels))).eval()
    reference.save_pretrained(tmp_path / "theirs")
    model = ours_class.from_pretrained(tmp_path / "theirs")
    mask = BATCH.token_mask
    with torch.no_grad():
        want = reference(BATCH.tokens, attention_mask=mask.long())[0]
        got = model(BATCH.tokens, token_mask=mask)
        model.save_pretrained(tmp_path / "ours")
        back, info = reference_class.from_pretrained(tmp_path / "ours", output_loading_info=True)
        again = back.eval()(BATCH.tokens, attention_mask=mask.long())[0]
    assert not any(info.values()), info
    keep = mask if want.shape[:2] == mask.shape else slice(None)
    torch.testing.assert_close(got[keep], want[keep], atol=1e-4, rtol=1e-4)
    assert torch.equal(again[keep], want[keep])  # bit for bit: the same weights in the same code
    assert ours_class.from_pretrained(tmp_path / "ours").config == model.config
    for key in ("max_position_embeddings", "type_vocab_size", "layer_norm_eps", "pad_token_id"):
        assert getattr(back.config, key) == getattr(reference.config, key)


def test_the_encoder_is_read_out_of_a_pre_training_checkpoint(tmp_path):
    """It holds a language head, which is not wanted, and no pooler, or one."""
    reference = loud_(transformers.RobertaForMaskedLM(roberta_config()))
    state = {name: x.clone() for name, x in reference.state_dict().items()}
    state["roberta.embeddings.position_ids"] = torch.arange(46)[None]  # as old versions stored it
    ours = Roberta.from_hf_config(reference.config.to_dict() | {"type_vocab_size": 3})
    with pytest.raises(WeightError, match=r"pooler\.weight: no tensor for it"):
        ours.load_hf_state_dict(state)
    state |= {
        "roberta.pooler.dense.weight": torch.randn(35, 35),
        "roberta.pooler.dense.bias": torch.randn(35),
    }
    ours.load_hf_state_dict(state)
    assert torch.equal(ours.token_embed.weight, state["roberta.embeddings.word_embeddings.weight"])
    assert torch.equal(ours.pooler.bias, state["roberta.pooler.dense.bias"])


@pytest.mark.parametrize(
    ("config", "reader", "message"),
    [
        (transformers.BertConfig(), Roberta, r"config: Roberta needs model_type = 'roberta', got 'bert'"),
        (
            transformers.DistilBertConfig(),
            RobertaForMaskedLM,
            r"needs model_type = 'roberta', got 'distilbert'",
        ),
        (roberta_config(), Bert, r"config: Bert needs model_type = 'bert', got 'roberta'"),
        (transformers.RobertaConfig(hidden_act="relu"), Roberta, r"needs hidden_act = 'gelu', got 'relu'"),
        (transformers.RobertaConfig(is_decoder=True), Roberta, r"needs is_decoder = False, got True"),
    ],
)
def test_a_checkpoint_of_another_architecture(config, reader, message, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    with pytest.raises(WeightError, match=message):
        reader.from_pretrained(tmp_path)


def test_the_reference_librarys_defaults_are_not_robertas():
    """Its config is BERT's: whoever builds from it gets another model than the published one."""
    read = Roberta.config_from_hf(transformers.RobertaConfig().to_dict())
    published = RobertaConfig.roberta_base()
    assert (published.norm_eps, published.max_seq_len, published.num_segments) == (1e-5, 512, 1)
    assert published.num_positions == 514
    assert (read.norm_eps, read.max_seq_len, read.num_segments) == (1e-12, 510, 2)


# ------------------------------------------------------------------------------------------------
# Bad input: the message names the argument, what came and what was expected


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize(
    ("tokens", "kwargs", "error", "message"),
    [
        (GOOD[0], {}, ValueError, r"tokens: expected shape \(B, T\), got \(7,\)"),
        (GOOD.float(), {}, TypeError, r"tokens: expected a tensor of integer ids.*, got torch.float32"),
        (GOOD + 88, {}, ValueError, r"tokens: expected ids from 0 to 96, got 97 to 97"),
        (GOOD[:, :0], {}, ValueError, r"tokens: expected 1 to 41 positions \(max_seq_len\), got 0"),
        (GOOD.repeat(1, 6), {}, ValueError, r"tokens: expected 1 to 41 positions \(max_seq_len\), got 42"),
        (GOOD, {"token_mask": GOOD}, TypeError, r"token_mask: expected a bool tensor.*, got torch.int64"),
        (
            GOOD,
            {"token_mask": torch.ones(2, 6, dtype=torch.bool)},
            ValueError,
            r"token_mask: expected shape \(B, T\) with B = 2, T = 7, got \(2, 6\)",
        ),
    ],
)
def test_bad_input(kind, tokens, kwargs, error, message):
    with pytest.raises(error, match=message):
        kind(CONFIG)(tokens, **kwargs)


def test_there_is_one_segment():
    with pytest.raises(ValueError, match=r"segments: expected ids from 0 to 0, got 1 to 1"):
        Roberta(CONFIG)(GOOD, segments=torch.ones_like(GOOD))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_heads": 4}, r"num_heads: expected a positive divisor of d_model = 35, got 4"),
        ({"num_layers": 0}, r"num_layers: expected at least 1, got 0"),
        ({"max_seq_len": 0}, r"max_seq_len: expected at least 1, got 0"),
        ({"pad_id": 97}, r"pad_id: expected an id from 0 to 96, got 97"),
        ({"pad_id": -1}, r"pad_id: expected an id from 0 to 96, got -1"),
    ],
)
def test_a_config_that_cannot_be(changes, message):
    sizes = {field: getattr(CONFIG, field) for field in CONFIG.__dataclass_fields__}
    with pytest.raises(ValueError, match=message):
        Roberta(RobertaConfig(**{**sizes, **changes}))


def test_padding_may_have_the_id_0():
    config = RobertaConfig(
        vocab_size=9, d_model=4, num_layers=1, num_heads=1, d_ff=4, max_seq_len=5, pad_id=0
    )
    assert config.num_positions == 6
    assert Roberta(config)(torch.ones(1, 5, dtype=torch.long)).shape == (1, 5, 4)


def test_heads_that_cannot_be():
    for kind in (RobertaForSequenceClassification, RobertaForTokenClassification):
        with pytest.raises(ValueError, match="num_classes: expected at least 2, got 1"):
            kind(CONFIG, 1)
