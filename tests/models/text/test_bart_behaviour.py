"""What BART does and refuses, beside computing the right numbers."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import transformers
from parity import loud_, ragged_batch
from references import bart_config
from torch.utils.flop_counter import FlopCounterMode
from transformers.models.bart.modeling_bart import shift_tokens_right

from textbook_code.inference.generate import generate
from textbook_code.models.text.bart import (
    Bart,
    BartConfig,
    BartForConditionalGeneration,
    BartForSequenceClassification,
)

SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "d_model": 35,
    "num_encoder_layers": 2,
    "num_decoder_layers": 3,
    "num_heads": 5,
    "d_ff": 53,
    "max_seq_len": 41,
    "dropout": 0.3,
    "bos_id": 5,
    "pad_id": 3,
    "eos_id": 7,
    "decoder_start_id": 11,
}
CONFIG = BartConfig(**SIZES)
SOURCE = ragged_batch(97, (29, 13, 3), pad_id=3)
TARGET = ragged_batch(97, (17, 19, 2), pad_id=3, seed=2)
ALL = [Bart, BartForConditionalGeneration, BartForSequenceClassification]


def loud() -> BartForConditionalGeneration:
    model = loud_(BartForConditionalGeneration(CONFIG)).double().eval()
    model.logits_bias.normal_(generator=torch.Generator().manual_seed(3))
    return model


@torch.no_grad()
def test_padding_and_the_rest_of_the_batch_change_nothing():
    model = loud()
    together = model(
        SOURCE.tokens, TARGET.tokens, token_mask=SOURCE.token_mask, target_mask=TARGET.token_mask
    )
    lengths = zip(SOURCE.token_mask.sum(1).tolist(), TARGET.token_mask.sum(1).tolist(), strict=True)
    for i, (S, T) in enumerate(lengths):
        alone = model(SOURCE.tokens[i : i + 1, :S], TARGET.tokens[i : i + 1, :T])
        torch.testing.assert_close(together[i, :T], alone[0], atol=1e-10, rtol=1e-10)
    noisy = SOURCE.tokens.masked_fill(~SOURCE.token_mask, 96)
    target = TARGET.tokens.masked_fill(~TARGET.token_mask, 96)
    other = model(noisy, target, token_mask=SOURCE.token_mask, target_mask=TARGET.token_mask)
    torch.testing.assert_close(TARGET.real(other), TARGET.real(together))


@torch.no_grad()
def test_the_decoder_looks_back_only_and_the_encoder_both_ways():
    model, tokens, target = loud(), SOURCE.tokens[:1], TARGET.tokens[:1, :17]
    before = model(tokens, target)
    for position in (0, 8, 16):
        changed = target.clone()
        changed[0, position] = (target[0, position] + 1) % 97
        moved = (model(tokens, changed) - before).abs().amax(-1)[0]
        assert bool((moved[:position] == 0).all()), "bit-equal before the change"
        assert bool((moved[position:] > 1e-9).all())
    for position in (0, 28):
        changed = tokens.clone()
        changed[0, position] = (tokens[0, position] + 1) % 97
        assert bool(((model.encode(changed) - model.encode(tokens)).abs().amax(-1) > 1e-9).all())
        assert bool(((model(changed, target) - before).abs().amax(-1) > 1e-9).all())


@torch.no_grad()
@pytest.mark.parametrize("steps", [[1] * 19, [7, 1, 1, 10], [18, 1]], ids=["one by one", "ragged", "prefill"])
@pytest.mark.parametrize("masked", [False, True])
def test_cached_equals_uncached(steps, masked):
    model = loud()
    context = model.encode(SOURCE.tokens, token_mask=SOURCE.token_mask)
    target_mask = TARGET.token_mask if masked else None
    whole = model.decode(TARGET.tokens, context, context_mask=SOURCE.token_mask, target_mask=target_mask)
    cache, done, pieces = model.make_cache(3, 19, 29), 0, []
    for T in steps:
        mask = None if target_mask is None else target_mask[:, : done + T]
        part = TARGET.tokens[:, done : done + T]
        source = context if done == 0 else torch.full_like(context, torch.nan)  # read once, then kept
        pieces.append(
            model.decode(part, source, context_mask=SOURCE.token_mask, target_mask=mask, cache=cache)
        )
        done += T
    torch.testing.assert_close(torch.cat(pieces, 1), whole, atol=1e-10, rtol=1e-10)
    assert [(own.length, cross.length) for own, cross in cache] == [(19, 29)] * 3


@torch.no_grad()
def test_the_last_logits_alone():
    model = loud()
    context = model.encode(SOURCE.tokens, token_mask=SOURCE.token_mask)
    whole = model.decode(TARGET.tokens, context, context_mask=SOURCE.token_mask)
    for n in (1, 4, 19):
        last = model.decode(TARGET.tokens, context, context_mask=SOURCE.token_mask, num_logits=n)
        torch.testing.assert_close(last, whole[:, -n:])


@torch.no_grad()
@pytest.mark.parametrize("use_cache", [True, False])
def test_greedy_text_is_the_references(use_cache):
    """Through the package's generation, ragged sources and rows that end at different steps."""
    config = bart_config(forced_eos_token_id=None)
    reference = loud_(transformers.BartForConditionalGeneration(config)).double().eval()
    model = BartForConditionalGeneration.from_hf(reference)
    want = reference.generate(
        SOURCE.tokens,
        attention_mask=SOURCE.token_mask.long(),
        max_new_tokens=23,
        do_sample=False,
        num_beams=1,
    )[:, 1:]  # less the start token
    stop = int(want[0, 9])  # a token that does occur, so that a row ends early
    for stop_tokens in ((), (stop,)):
        got = generate(
            model,
            SOURCE.tokens,
            token_mask=SOURCE.token_mask,
            max_new_tokens=23,
            stop_tokens=stop_tokens,
            pad_id=3,
            use_cache=use_cache,
        )
        ended = ((want == stop).cumsum(1) - (want == stop).long() > 0) & bool(stop_tokens)
        expected = want.masked_fill(ended, 3)[:, : got.size(1)]
        assert torch.equal(got, expected)


def test_shift_right_is_the_references():
    labels = torch.tensor([[5, 20, 30, 7, -100, -100], [5, 40, 50, 60, 70, 7]])
    for model in (Bart(CONFIG), BartForConditionalGeneration(CONFIG)):
        kept = labels.clone()
        assert torch.equal(model.shift_right(labels), shift_tokens_right(labels, 3, 11))
        assert torch.equal(labels, kept)
    # as published: eos, then bos, then the text
    published = BartForConditionalGeneration(BartConfig(**{**SIZES, **PUBLISHED_IDS}))
    assert published.shift_right(torch.tensor([[0, 45, 46, 2]])).tolist() == [[2, 0, 45, 46]]


PUBLISHED_IDS = {"bos_id": 0, "pad_id": 1, "eos_id": 2, "decoder_start_id": 2}


@torch.no_grad()
def test_classification_reads_the_last_end_among_the_real_tokens():
    model = loud_(BartForSequenceClassification(CONFIG, 5)).double().eval()
    tokens = SOURCE.tokens.masked_fill(SOURCE.tokens == 7, 8)
    tokens[:, 1], tokens[:, 2] = 7, 7
    tokens[0, 28] = tokens[1, 12] = 7
    want = model(tokens, token_mask=SOURCE.token_mask)
    for row, last in enumerate((28, 12, 2)):
        short = tokens[row : row + 1, : last + 1]
        hidden = model.bart(short, model.bart.shift_right(short))[:, -1]
        by_hand = model.classifier(model.pooler(hidden).tanh())
        torch.testing.assert_close(want[row : row + 1], by_hand, atol=1e-10, rtol=1e-10)
    padded_with_ends = tokens.masked_fill(~SOURCE.token_mask, 7)
    torch.testing.assert_close(model(padded_with_ends, token_mask=SOURCE.token_mask), want)


@pytest.mark.parametrize("kind", ALL)
def test_dropout_is_for_training_only(kind):
    args = [SOURCE.tokens, TARGET.tokens]
    if kind is BartForSequenceClassification:
        args = [SOURCE.tokens.index_fill(1, torch.tensor([28]), 7)]
    model = kind(CONFIG).eval()
    assert torch.equal(model(*args), model(*args))
    model.train()
    assert not torch.equal(model(*args), model(*args))


def test_the_initialisation():
    config = BartConfig(vocab_size=499, d_model=128, num_heads=4, d_ff=256, max_seq_len=61)
    model = BartForSequenceClassification(config, 67)
    for name, p in model.named_parameters():
        if p.ndim == 2:
            assert float(p.detach().std()) == pytest.approx(0.02, rel=0.05), name
            assert abs(float(p.detach().mean())) < 0.001, name
        else:
            assert bool((p == (1 if name.endswith("norm.weight") else 0)).all()), name
    assert bool((model.bart.token_embed.weight[1] == 0).all())
    assert bool((BartForConditionalGeneration(CONFIG).logits_bias == 0).all())


PUBLISHED = {
    "bart_base": {
        "d_model": 768,
        "encoder_layers": 6,
        "decoder_layers": 6,
        "encoder_attention_heads": 12,
        "decoder_attention_heads": 12,
        "encoder_ffn_dim": 3072,
        "decoder_ffn_dim": 3072,
    },
    "bart_large": {},  # the reference's defaults
}


@pytest.mark.parametrize(("size", "millions"), [("bart_base", 139), ("bart_large", 406)])
def test_the_published_sizes(size, millions):
    config = getattr(BartConfig, size)()
    with torch.device("meta"):
        ours = BartForConditionalGeneration(config)
        reference = transformers.BartForConditionalGeneration(transformers.BartConfig(**PUBLISHED[size]))
    counted = sum(p.numel() for p in ours.parameters())
    assert config.num_parameters() == counted == sum(p.numel() for p in reference.parameters())
    assert round(counted / 1e6) == millions
    ids = ("bos_token_id", "pad_token_id", "eos_token_id", "decoder_start_token_id")
    assert [getattr(reference.config, name) for name in ids] == [0, 1, 2, 2]
    assert (config.bos_id, config.pad_id, config.eos_id, config.decoder_start_id) == (0, 1, 2, 2)
    smaller = getattr(BartConfig, size)(vocab_size=100, d_ff=77)
    assert (smaller.vocab_size, smaller.d_ff, smaller.d_model) == (100, 77, config.d_model)


@pytest.mark.parametrize("config", [CONFIG, BartConfig.bart_base(), BartConfig.bart_large()])
def test_the_operations_by_formula_are_those_counted(config):
    S, T = (37, 29) if config is CONFIG else (512, 128)
    with torch.device("meta"):
        model = BartForConditionalGeneration(config).eval()
        tokens, target = torch.zeros(1, S, dtype=torch.long), torch.zeros(1, T, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:  # on meta, attention is written out and counted dense
        model(tokens, target)
    assert counter.get_total_flops() == config.flops(S, T)


def test_a_few_steps_of_denoising_lower_the_loss():
    torch.manual_seed(0)
    model = BartForConditionalGeneration(BartConfig(**{**SIZES, "dropout": 0.0}))
    model.eval()  # no dropout, so that the loss is a function
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    labels = TARGET.tokens.masked_fill(~TARGET.token_mask, -100)
    losses = []
    for _ in range(30):
        logits = model(SOURCE.tokens, model.shift_right(labels), token_mask=SOURCE.token_mask)
        loss = torch.nn.functional.cross_entropy(logits.mT, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(math.log(97), abs=0.3)
    assert losses[-1] < losses[0] - 0.5


# ------------------------------------------------------------------------------------------------
# Bad input: the message names the argument, what came and what was expected


GOOD = torch.zeros(2, 7, dtype=torch.long)
REAL = torch.ones(2, 7, dtype=torch.bool)


@pytest.mark.parametrize("kind", ALL[:2])
@pytest.mark.parametrize(
    ("tokens", "target", "kwargs", "error", "message"),
    [
        (GOOD[0], GOOD, {}, ValueError, r"tokens: expected shape \(B, T\), got \(7,\)"),
        (GOOD, GOOD[0], {}, ValueError, r"target: expected shape \(B, T\), got \(7,\)"),
        ("hello", GOOD, {}, TypeError, r"tokens: expected a tensor, got str"),
        (GOOD.float(), GOOD, {}, TypeError, r"tokens: expected a tensor of integer ids.*torch.float32"),
        (GOOD, GOOD.float(), {}, TypeError, r"target: expected a tensor of integer ids.*torch.float32"),
        (GOOD + 97, GOOD, {}, ValueError, r"tokens: expected ids from 0 to 96, got 97 to 97"),
        (GOOD, GOOD - 1, {}, ValueError, r"target: expected ids from 0 to 96, got -1 to -1"),
        (GOOD[:, :0], GOOD, {}, ValueError, r"tokens: expected 1 to 41 positions .*, got 0"),
        (GOOD, GOOD[:, :0], {}, ValueError, r"target: expected 1 to 41 positions .*, got 0"),
        (GOOD.repeat(1, 6), GOOD, {}, ValueError, r"tokens: expected 1 to 41 positions .*, got 42"),
        (GOOD, GOOD.repeat(1, 6), {}, ValueError, r"target: expected 1 to 41 positions .*, got 42"),
        (GOOD, GOOD[:1], {}, ValueError, r"context: expected .* B = 1, D = 35, got \(2, 7, 35\)"),
        (GOOD, GOOD, {"token_mask": GOOD}, TypeError, r"token_mask: expected a bool.*torch.int64"),
        (GOOD, GOOD, {"target_mask": GOOD}, TypeError, r"target_mask: expected a bool.*torch.int64"),
        (GOOD, GOOD, {"token_mask": REAL[:, :6]}, ValueError, r"token_mask: .* S = 7, got \(2, 6\)"),
        (GOOD, GOOD, {"target_mask": REAL[:1]}, ValueError, r"target_mask: .* B = 2, S = 7, got \(1, 7\)"),
        (
            GOOD,
            GOOD,
            {"token_mask": torch.tensor([[True] * 7, [False] * 7])},
            ValueError,
            r"token_mask: expected a real token in each row, got none in row 1",
        ),
        (
            GOOD,
            GOOD,
            {"target_mask": torch.tensor([[False] * 7, [True] * 7])},
            ValueError,
            r"target_mask: expected a real token in each row, got none in row 0",
        ),
    ],
)
def test_bad_input(kind, tokens, target, kwargs, error, message):
    with pytest.raises(error, match=message):
        kind(CONFIG)(tokens, target, **kwargs)


def test_bad_caches_and_counts():
    model = BartForConditionalGeneration(CONFIG).eval()
    context = model.encode(GOOD)
    with pytest.raises(ValueError, match=r"max_seq_len: expected 1 to 41, got 42"):
        model.make_cache(2, 42, 7)
    with pytest.raises(ValueError, match=r"source_len: expected 1 to 41, got 0"):
        model.make_cache(2, 7, 0)
    with pytest.raises(ValueError, match=r"batch_size: expected at least 1, got 0"):
        model.make_cache(0, 7, 7)
    with pytest.raises(ValueError, match=r"cache: expected 3 pairs, one a layer, got 2"):
        model.decode(GOOD, context, cache=model.make_cache(2, 7, 7)[:2])
    cache = model.make_cache(2, 41, 7)
    model.decode(GOOD.repeat(1, 5), context, cache=cache)
    with pytest.raises(ValueError, match=r"target: expected 1 to 6 positions .*35 of them cached\), got 7"):
        model.decode(GOOD, context, cache=cache)
    for n in (0, 8):
        with pytest.raises(ValueError, match=rf"num_logits: expected 1 to 7 .*got {n}"):
            model.decode(GOOD, context, num_logits=n)
    with pytest.raises(TypeError, match=r"labels: expected a tensor of integer ids"):
        model.shift_right(GOOD.float())
    with pytest.raises(ValueError, match=r"labels: expected shape \(B, T\), got \(7,\)"):
        model.shift_right(GOOD[0])


def test_classes_that_cannot_be_and_texts_without_an_end():
    with pytest.raises(ValueError, match="num_classes: expected at least 2, got 1"):
        BartForSequenceClassification(CONFIG, 1)
    model = BartForSequenceClassification(CONFIG)
    tokens = torch.tensor([[5, 9, 7], [5, 9, 9]])
    with pytest.raises(ValueError, match=r"tokens: expected eos_id=7 in each row, rows \[1\] have none"):
        model(tokens)
    with pytest.raises(ValueError, match=r"tokens: .* rows \[0, 1\] have none"):
        model(tokens, token_mask=torch.tensor([[True, True, False]] * 2))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_heads": 4}, r"num_heads: expected a positive divisor of d_model = 35, got 4"),
        ({"num_heads": 0}, r"num_heads: expected at least 1, got 0"),
        ({"num_encoder_layers": 0}, r"num_encoder_layers: expected at least 1, got 0"),
        ({"num_decoder_layers": -1}, r"num_decoder_layers: expected at least 1, got -1"),
        ({"vocab_size": 0}, r"vocab_size: expected at least 1, got 0"),
        ({"d_ff": 0}, r"d_ff: expected at least 1, got 0"),
        ({"max_seq_len": 0}, r"max_seq_len: expected at least 1, got 0"),
        ({"pad_id": 97}, r"pad_id: expected a token from 0 to 96, got 97"),
        ({"eos_id": -1}, r"eos_id: expected a token from 0 to 96, got -1"),
        ({"decoder_start_id": 97}, r"decoder_start_id: expected a token from 0 to 96, got 97"),
    ],
)
def test_a_config_that_cannot_be(changes, message):
    with pytest.raises(ValueError, match=message):
        Bart(BartConfig(**{**SIZES, **changes}))


def test_lengths_that_cannot_be_counted():
    with pytest.raises(ValueError, match="S: expected at least 1, got 0"):
        CONFIG.flops(0, 3)
    with pytest.raises(ValueError, match="T: expected at least 1, got -1"):
        CONFIG.flops(3, -1)
