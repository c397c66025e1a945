"""What DistilBERT does and refuses, beside computing the right numbers; and how a student is made."""

from __future__ import annotations

import itertools
import json
import math

import pytest
import torch
import torch.nn.functional as F
import transformers
from parity import loud_, ragged_batch
from references import bert_batch, distilbert_config

from textbook_code.models.text.bert import Bert, BertConfig, BertForMaskedLM
from textbook_code.models.text.distilbert import (
    DistilBert,
    DistilBertConfig,
    DistilBertForMaskedLM,
    DistilBertForSequenceClassification,
    DistilBertForTokenClassification,
    teacher_layers,
)
from textbook_code.weights import WeightError

CONFIG = DistilBertConfig(
    vocab_size=97,
    d_model=35,
    num_layers=3,
    num_heads=5,
    d_ff=53,
    max_seq_len=41,
    norm_eps=1e-2,
    dropout=0.3,
)
TEACHER = BertConfig(
    vocab_size=97,
    d_model=35,
    num_layers=12,
    num_heads=5,
    d_ff=53,
    max_seq_len=41,
    num_segments=3,
    norm_eps=1e-2,
    dropout=0.07,
    attn_dropout=0.03,
)
BATCH = bert_batch()
HEADS = [
    (DistilBert, "DistilBertModel"),
    (DistilBertForMaskedLM, "DistilBertForMaskedLM"),
    (DistilBertForSequenceClassification, "DistilBertForSequenceClassification"),
    (DistilBertForTokenClassification, "DistilBertForTokenClassification"),
]
ALL = [ours_class for ours_class, _ in HEADS]
GOOD = torch.zeros(2, 7, dtype=torch.long)


def test_padding_and_the_rest_of_the_batch_change_nothing():
    model = loud_(DistilBert(CONFIG)).double().eval()
    batch = ragged_batch(97, (29, 13, 3))
    together = model(batch.tokens, token_mask=batch.token_mask)
    noise = model(batch.tokens.masked_fill(~batch.token_mask, 96), token_mask=batch.token_mask)
    torch.testing.assert_close(batch.real(noise), batch.real(together))
    for i, n in enumerate(batch.token_mask.sum(1).tolist()):
        alone = model(batch.tokens[i : i + 1, :n])
        torch.testing.assert_close(together[i, :n], alone[0], atol=1e-10, rtol=1e-10)


def test_the_initialisation_is_berts():
    model = DistilBertForSequenceClassification(DistilBertConfig._sized(2, 256, 4, vocab_size=2000), 9)
    for name, p in model.named_parameters():
        if p.ndim == 2:
            assert float(p.detach().std()) == pytest.approx(0.02, rel=0.1), name
        else:
            assert bool((p == (1 if name.endswith("norm.weight") else 0)).all()), name


@pytest.mark.parametrize("kind", ALL)
def test_dropout_is_for_training_only(kind):
    model = kind(CONFIG).eval()
    assert torch.equal(model(BATCH.tokens), model(BATCH.tokens))
    model.train()
    assert not torch.equal(model(BATCH.tokens), model(BATCH.tokens))


def test_the_attention_drops_nothing_that_it_adds():
    """With every dropout of the hidden states at 1, only the norms' shifts are left of BERT's block; of
    DistilBERT's, the attention is."""
    config = DistilBertConfig._sized(1, 8, 2, vocab_size=9, dropout=1.0, attn_dropout=0.0)
    block = loud_(DistilBert(config).blocks[0]).double().train()
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    attended = block.attn_norm(x + block.attn(x))
    torch.testing.assert_close(block(x)[0], block.ffn_norm(attended))


# ------------------------------------------------------------------------------------------------
# Students


def loud_teacher() -> BertForMaskedLM:
    return loud_(BertForMaskedLM(TEACHER)).double().eval()


def test_which_layers():
    assert teacher_layers(12, 6) == (0, 2, 4, 7, 9, 11)  # as published
    assert teacher_layers(12, 12) == tuple(range(12))
    assert teacher_layers(12, 1) == (0,)
    assert teacher_layers(4, 2) == (0, 3)
    for L in range(1, 30):
        for n in range(1, L + 1):
            layers = teacher_layers(L, n)
            assert len(set(layers)) == n and list(layers) == sorted(layers) and layers[0] == 0
            assert n == 1 or layers[-1] == L - 1
            gaps = [b - a for a, b in itertools.pairwise(layers)]
            assert not gaps or max(gaps) - min(gaps) <= 1
    for n in (0, 13):
        with pytest.raises(ValueError, match=rf"num_student: expected 1 to 12 layers, got {n}"):
            teacher_layers(12, n)


def test_a_student_starts_with_its_teachers_layers_bit_for_bit():
    teacher = loud_teacher()
    student = DistilBertForMaskedLM.from_teacher(teacher)
    assert student.config == DistilBertConfig(
        vocab_size=97, d_model=35, num_layers=6, num_heads=5, d_ff=53, max_seq_len=41, norm_eps=1e-2,
        dropout=0.07, attn_dropout=0.03,
    )  # fmt: skip
    body, bert = student.distilbert, teacher.bert
    pairs = [(f"blocks.{i}.", f"blocks.{layer}.") for i, layer in enumerate((0, 2, 4, 7, 9, 11))]
    pairs += [(name, name) for name in ("token_embed.", "pos_embed.", "embed_norm.")]
    copied = set()
    for mine, its in pairs:
        for name, p in bert.state_dict().items():
            if name.startswith(its):
                got = body.state_dict()[mine + name.removeprefix(its)]
                assert torch.equal(got, p) and got.dtype == torch.float64
                copied.add(mine + name.removeprefix(its))
    assert copied == body.state_dict().keys()
    for name, p in teacher.mlm_head.state_dict().items():
        assert torch.equal(student.mlm_head.state_dict()[name], p)


def test_a_student_of_all_layers_is_its_teacher_without_segments():
    teacher = loud_teacher()
    teacher.bert.segment_embed.weight.data.zero_()
    student = DistilBertForMaskedLM.from_teacher(teacher, layers=range(12)).eval()
    got = student(BATCH.tokens, token_mask=BATCH.token_mask)
    want = teacher(BATCH.tokens, token_mask=BATCH.token_mask)
    torch.testing.assert_close(BATCH.real(got), BATCH.real(want), atol=1e-12, rtol=1e-12)


def test_training_the_student_leaves_the_teacher_alone():
    teacher = loud_teacher()
    before = {name: p.clone() for name, p in teacher.state_dict().items()}
    student = DistilBertForMaskedLM.from_teacher(teacher, layers=[3, 3])
    student(BATCH.tokens).square().mean().backward()
    torch.optim.SGD(student.parameters(), lr=0.1).step()
    assert all(torch.equal(before[name], p) for name, p in teacher.state_dict().items())
    first, second = student.distilbert.blocks
    assert not torch.equal(first.attn.q_proj.weight, second.attn.q_proj.weight)  # two copies, not one


@pytest.mark.parametrize("layers", [[], [12], [-1], [0, 5, 99]])
def test_layers_that_the_teacher_does_not_have(layers):
    with pytest.raises(ValueError, match=r"layers: expected layers from 0 to 11, got \["):
        DistilBert.from_teacher(Bert(TEACHER), layers=layers)


@pytest.mark.parametrize("kind", [DistilBertForSequenceClassification, DistilBertForTokenClassification])
def test_a_new_head_on_a_trained_encoder(kind):
    encoder = DistilBert.from_teacher(loud_teacher().bert).eval()
    model = kind.from_encoder(encoder, 7)
    assert model.distilbert.blocks is encoder.blocks and model.classifier.weight.dtype == torch.float64
    out = model(BATCH.tokens, token_mask=BATCH.token_mask)
    assert out.shape == ((4, 7) if kind is DistilBertForSequenceClassification else (4, 39, 7))
    out.sum().backward()
    assert encoder.token_embed.weight.grad is not None
    with pytest.raises(TypeError, match=rf"distilbert: expected a DistilBert for {kind.__name__}, got Bert"):
        kind.from_encoder(loud_teacher().bert, 7)


def test_a_step_of_training_lowers_the_loss():
    torch.manual_seed(0)
    model = DistilBertForMaskedLM(CONFIG).eval()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    targets = BATCH.tokens.masked_fill(~BATCH.token_mask, -100)
    losses = []
    for _ in range(10):
        loss = F.cross_entropy(model(BATCH.tokens, token_mask=BATCH.token_mask).mT, targets)
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
    labels = {} if ours_class in (DistilBert, DistilBertForMaskedLM) else {"num_labels": 7}
    reference_class = getattr(transformers, theirs_class)
    reference = loud_(reference_class(distilbert_config(**labels))).eval()
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
    for key in ("dim", "n_layers", "n_heads", "hidden_dim", "seq_classif_dropout", "attention_dropout"):
        assert getattr(back.config, key) == getattr(reference.config, key)


def test_an_epsilon_that_the_published_format_cannot_carry(tmp_path):
    with pytest.raises(WeightError, match=r"knows norm_eps = 1e-12 only, this model has 0.01"):
        DistilBert(CONFIG).save_pretrained(tmp_path)
    assert not (tmp_path / "config.json").exists()


def test_the_encoder_is_read_out_of_a_pre_training_checkpoint():
    reference = loud_(transformers.DistilBertForMaskedLM(distilbert_config()))
    ours = DistilBert.from_hf(reference)
    assert torch.equal(ours.blocks[2].ffn.fc1.bias, reference.distilbert.transformer.layer[2].ffn.lin1.bias)


@pytest.mark.parametrize(
    ("config", "reader", "message"),
    [
        (
            transformers.BertConfig(),
            DistilBert,
            r"DistilBert needs model_type = 'distilbert', got 'bert'",
        ),
        (transformers.RobertaConfig(), DistilBertForMaskedLM, r"model_type = 'distilbert', got 'roberta'"),
        (distilbert_config(), Bert, r"config: Bert needs model_type = 'bert', got 'distilbert'"),
        (distilbert_config(activation="relu"), DistilBert, r"needs activation = 'gelu', got 'relu'"),
        (distilbert_config(sinusoidal_pos_embds=True), DistilBert, r"sinusoidal_pos_embds = False, got True"),
    ],
)
def test_a_checkpoint_of_another_architecture(config, reader, message, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    with pytest.raises(WeightError, match=message):
        reader.from_pretrained(tmp_path)


# ------------------------------------------------------------------------------------------------
# Bad input: the message names the argument, what came and what was expected


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize(
    ("tokens", "kwargs", "error", "message"),
    [
        (GOOD[0], {}, ValueError, r"tokens: expected shape \(B, T\), got \(7,\)"),
        (GOOD.float(), {}, TypeError, r"tokens: expected a tensor of integer ids.*, got torch.float32"),
        (GOOD + 97, {}, ValueError, r"tokens: expected ids from 0 to 96, got 97 to 97"),
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


@pytest.mark.parametrize("kind", [DistilBertForSequenceClassification, DistilBertForTokenClassification])
def test_heads_that_cannot_be(kind):
    with pytest.raises(ValueError, match="num_classes: expected at least 2, got 1"):
        kind(CONFIG, 1)


def test_a_config_that_cannot_be():
    with pytest.raises(ValueError, match=r"num_layers: expected at least 1, got 0"):
        DistilBertConfig(num_layers=0)
