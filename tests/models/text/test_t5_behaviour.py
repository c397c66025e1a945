"""What T5 does whatever its weights: causality, caches, padding, distances, counts, files, bad input."""

from __future__ import annotations

import copy
import json

import pytest
import torch
import transformers
from parity import loud_
from t5_references import build, source, t5_config, target
from torch.utils.flop_counter import FlopCounterMode

from textbook_code.inference.generate import generate
from textbook_code.models.text.t5 import T5, T5Config, T5Encoder, T5ForConditionalGeneration
from textbook_code.weights import WeightError

SOURCE, TARGET = source(), target()
SIZES = {
    "vocab_size": 97,
    "d_model": 35,
    "num_heads": 3,
    "head_dim": 11,
    "d_ff": 53,
    "num_layers": 3,
    "num_decoder_layers": 2,
    "num_buckets": 12,
    "max_distance": 23,
    "decoder_start_id": 7,
}
VERSIONS = {"1.0": {}, "1.1": {"gated": True, "tied": False}}


@pytest.fixture(params=["1.0", "1.1"])
def model(request):
    config = T5Config(**SIZES, **VERSIONS[request.param])
    return loud_(T5ForConditionalGeneration(config)).double().eval()


# ------------------------------------------------------------------------------------------------
# Who sees what


def test_a_target_sees_no_later_target(model):
    """Changing the target at t leaves the logits before t as they were, bit for bit, and no later ones."""
    context = model.encode(SOURCE.tokens)
    before = model.decode(TARGET.tokens, context)
    for t in (1, 20, 35):
        changed = TARGET.tokens.clone()
        changed[:, t] = (changed[:, t] + 1) % 97
        after = model.decode(changed, context)
        assert torch.equal(before[:, :t], after[:, :t])
        assert (before[:, t:] != after[:, t:]).flatten(2).any(-1).all()


def test_a_target_sees_the_whole_source(model):
    """Each source token, the last too, reaches each target, the first too."""
    before = model(SOURCE.tokens, TARGET.tokens)
    for s in (0, 21, 42):
        changed = SOURCE.tokens.clone()
        changed[:, s] = (changed[:, s] + 1) % 97
        assert (model(changed, TARGET.tokens) != before).any(-1).all()


def test_padding_changes_nothing(model):
    """On either side of the source and after the target, whatever the padding is made of."""
    tokens, start = SOURCE.tokens[:1, :41], TARGET.tokens[:1, :35]
    alone = model(tokens, start)
    for left, right in ((0, 5), (5, 0), (3, 4)):
        for pad in (2, 11):
            padded = torch.nn.functional.pad(tokens, (left, right), value=pad)
            mask = torch.nn.functional.pad(torch.ones_like(tokens, dtype=torch.bool), (left, right))
            targets = torch.nn.functional.pad(start, (0, right), value=pad)
            target_mask = torch.nn.functional.pad(torch.ones_like(start, dtype=torch.bool), (0, right))
            got = model(padded, targets, token_mask=mask, target_mask=target_mask)[:, :35]
            torch.testing.assert_close(got, alone, rtol=1e-11, atol=1e-11)


def test_padding_on_the_left_of_the_target(model):
    """The bias knows distances alone, so a padded beginning leaves them as they were."""
    context = model.encode(SOURCE.tokens[:1])
    start = TARGET.tokens[:1, :35]
    padded = torch.nn.functional.pad(start, (4, 0), value=2)
    mask = torch.nn.functional.pad(torch.ones_like(start, dtype=torch.bool), (4, 0))
    got = model.decode(padded, context, target_mask=mask)[:, 4:]
    torch.testing.assert_close(got, model.decode(start, context), rtol=1e-11, atol=1e-11)


def test_far_tokens_are_told_apart_by_nothing():
    """In a first block, two tokens that stand in the same last bucket may change places unseen.

    The last of the six buckets of a direction begins at 3 · (23/3)^(2/3), before max_distance: at 12.
    """
    config = T5Config(**{**SIZES, "num_layers": 1})
    encoder = loud_(T5Encoder(config)).double().eval()
    tokens = torch.randint(97, (1, 60), generator=torch.Generator().manual_seed(0))
    tokens[0, 30], tokens[0, 50] = 3, 4
    swapped = tokens.clone()
    swapped[0, 30], swapped[0, 50] = 4, 3
    one, other = encoder(tokens)[0], encoder(swapped)[0]
    torch.testing.assert_close(one[:19], other[:19], rtol=1e-12, atol=1e-12)  # 30 − 18 = 12
    assert not torch.allclose(one[19], other[19], rtol=1e-6, atol=1e-6)


# ------------------------------------------------------------------------------------------------
# The cache


def test_cached_equals_uncached_token_by_token(model):
    context = model.encode(SOURCE.tokens, token_mask=SOURCE.token_mask)
    masks = {"context_mask": SOURCE.token_mask}
    whole = model.decode(TARGET.tokens, context, target_mask=TARGET.token_mask, **masks)
    cache = model.make_cache(4, 36, 43)
    steps = [
        model.decode(
            TARGET.tokens[:, t : t + 1],
            context,
            target_mask=TARGET.token_mask[:, : t + 1],
            cache=cache,
            **masks,
        )
        for t in range(36)
    ]
    got = torch.cat(steps, dim=1)
    torch.testing.assert_close(got[TARGET.token_mask], whole[TARGET.token_mask], rtol=1e-10, atol=1e-10)
    assert all(own.length == 36 and cross.length == 43 for own, cross in cache)


def test_cached_equals_uncached_prefill_and_decode(model):
    context = model.encode(SOURCE.tokens)
    whole = model.decode(TARGET.tokens, context)
    cache, got = model.make_cache(4, 36, 43), []
    for first, last in ((0, 19), (19, 20), (20, 33), (33, 36)):
        got.append(model.decode(TARGET.tokens[:, first:last], context, cache=cache))
    torch.testing.assert_close(torch.cat(got, dim=1), whole, rtol=1e-10, atol=1e-10)


def test_the_source_is_projected_once(model):
    """After the first step the context is read from the cache; another one would not be seen."""
    context = model.encode(SOURCE.tokens)
    whole = model.decode(TARGET.tokens, context)
    cache = model.make_cache(4, 36, 43)
    model.decode(TARGET.tokens[:, :20], context, cache=cache)
    rest = model.decode(TARGET.tokens[:, 20:], torch.zeros_like(context), cache=cache)
    torch.testing.assert_close(rest, whole[:, 20:], rtol=1e-10, atol=1e-10)


def test_the_last_logits_alone(model):
    context = model.encode(SOURCE.tokens)
    whole = model.decode(TARGET.tokens, context)
    last = model.decode(TARGET.tokens, context, num_logits=3)
    assert last.shape == (4, 3, 97)
    torch.testing.assert_close(last, whole[:, -3:], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("num_beams", [1, 3])
@pytest.mark.parametrize("version", ["1.0", "1.1"])
def test_it_writes_what_the_reference_writes(version, num_beams):
    """16 tokens, from a padded batch of sources, greedily and by beam search."""
    reference = build("T5ForConditionalGeneration", version=version)
    ours = T5ForConditionalGeneration.from_hf(reference)
    want = reference.generate(
        input_ids=SOURCE.tokens,
        attention_mask=SOURCE.token_mask.long(),
        max_new_tokens=16,
        do_sample=False,
        num_beams=num_beams,
        eos_token_id=5,
        pad_token_id=2,
    )
    for use_cache in (True, False):
        got = generate(
            ours,
            SOURCE.tokens,
            token_mask=SOURCE.token_mask,
            max_new_tokens=16,
            num_beams=num_beams,
            stop_tokens=(5,),
            pad_id=2,
            use_cache=use_cache,
        )
        assert got.tolist() == want[:, 1:].tolist()


def test_cross_attention_weights_are_those_of_the_forward_pass(model):
    """Rows of them sum to 1, padding gets none, and the logits are the same."""
    context = model.encode(SOURCE.tokens, token_mask=SOURCE.token_mask)
    logits, weights = model.decode(TARGET.tokens, context, context_mask=SOURCE.token_mask, need_weights=True)
    plain = model.decode(TARGET.tokens, context, context_mask=SOURCE.token_mask)
    torch.testing.assert_close(logits, plain, rtol=1e-10, atol=1e-10)
    assert [w.shape for w in weights] == [(4, 3, 36, 43)] * 2
    for w in weights:
        torch.testing.assert_close(w.sum(-1), torch.ones(4, 3, 36, dtype=w.dtype))
        assert not w.transpose(1, 3)[~SOURCE.token_mask].any()


# ------------------------------------------------------------------------------------------------
# Labels, dropout, initialisation


def test_labels_are_shifted_right_as_the_reference_does(model):
    reference = build("T5ForConditionalGeneration", pad_token_id=0)
    labels = torch.tensor([[11, 12, 5, -100, -100], [13, 14, 15, 16, 5]])
    shifted = model.shift_right(labels)
    assert shifted.tolist() == [[7, 11, 12, 5, 0], [7, 13, 14, 15, 16]]
    assert torch.equal(shifted, reference._shift_right(labels))
    assert labels[0, 3] == -100  # the caller's tensor is left alone
    with pytest.raises(TypeError, match="labels: expected a tensor of integer ids"):
        model.shift_right(labels.float())
    with pytest.raises(ValueError, match=r"labels: expected shape \(B, T\)"):
        model.shift_right(labels[0])


def test_dropout_is_where_the_reference_has_it():
    """Embeddings, attention weights, every sublayer, the middle of the feed-forward, the ends."""
    config = T5Config(**SIZES, dropout=0.4)
    model = loud_(T5ForConditionalGeneration(config)).double().train()

    def share_of_zeros(where: str, x: torch.Tensor) -> None:
        assert 0.3 < float((x == 0).double().mean()) < 0.5, where

    seen, hooks = [], []

    def look(name):
        def hook(module, inputs, output):
            seen.append(name)
            share_of_zeros(name, output)

        return hook

    def look_inside(name):
        def hook(module, inputs):  # ReLU has made half of it zero, dropout two fifths of the rest
            seen.append(name)
            assert 0.6 < float((inputs[0] == 0).double().mean()) < 0.8, name

        return hook

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Dropout):
            hooks.append(module.register_forward_hook(look(name)))
        if name.endswith("fc2"):
            hooks.append(module.register_forward_pre_hook(look_inside(name)))
    model(SOURCE.tokens, TARGET.tokens)
    assert len(seen) == 2 * 2 + 3 * 2 + 2 * 3 + 5  # ends of two stacks, three and two blocks, five fc2
    for hook in hooks:
        hook.remove()
    assert all(block.attn.dropout == 0.4 for block in model.t5.encoder.blocks)
    assert all(b.attn.dropout == b.cross_attn.dropout == 0.4 for b in model.t5.decoder.blocks)
    first, second = (model(SOURCE.tokens, TARGET.tokens) for _ in range(2))
    assert not torch.equal(first, second)
    model.eval()
    assert torch.equal(*(model(SOURCE.tokens, TARGET.tokens) for _ in range(2)))


@pytest.mark.parametrize("version", ["1.0", "1.1"])
def test_initialisation(version):
    """Each table and matrix has the published spread, and mean 0; norms begin at 1."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 499, "d_model": 96, "num_heads": 5, "head_dim": 24, "d_ff": 224, "num_layers": 2}
    D, Dh, inner, width = 96, 24, 120, 224
    model = T5ForConditionalGeneration(T5Config(**sizes, **VERSIONS[version], num_buckets=64))
    spread = {
        "token_embed": 1.0,
        "relative_bias": D**-0.5,
        "q_proj": (D * Dh) ** -0.5,
        "k_proj": D**-0.5,
        "v_proj": D**-0.5,
        "out_proj": inner**-0.5,
        "fc1": D**-0.5,
        "fc2": width**-0.5,
        "gate_proj": D**-0.5,
        "up_proj": D**-0.5,
        "down_proj": width**-0.5,
        "lm_head": D**-0.5,
    }
    seen = set()
    for name, p in model.named_parameters():
        kind = name.split(".")[-2]
        if kind.endswith("norm"):
            assert bool((p == 1).all()), name
            continue
        seen.add(kind)
        want, n, p = spread[kind], p.numel(), p.detach()
        assert abs(float(p.std()) / want - 1) < 4 / (2 * n) ** 0.5, name  # four standard errors
        assert abs(float(p.mean())) < 4 * want / n**0.5, name
    ffn = {"fc1", "fc2"} if version == "1.0" else {"gate_proj", "up_proj", "down_proj", "lm_head"}
    assert seen == {*ffn, "token_embed", "relative_bias", "q_proj", "k_proj", "v_proj", "out_proj"}


def test_initialisation_is_the_reference_s():
    """The same spreads, matrix by matrix, but for an untied head, which the library never has."""
    torch.manual_seed(0)
    changes = {
        "d_model": 96,
        "d_kv": 24,
        "num_heads": 5,
        "d_ff": 224,
        "relative_attention_num_buckets": 64,
        "relative_attention_max_distance": 128,
        "num_layers": 1,
        "num_decoder_layers": 1,
    }
    theirs = transformers.T5ForConditionalGeneration(t5_config(**changes))
    ours = T5ForConditionalGeneration(T5ForConditionalGeneration.from_hf(theirs).config)
    for name, p in T5ForConditionalGeneration.from_hf(theirs).named_parameters():
        spread, theirs = ours.get_parameter(name).detach().std(), p.detach().std()
        if theirs > 0:
            assert abs(float(spread / theirs) - 1) < 6 / (2 * p.numel()) ** 0.5, name


# ------------------------------------------------------------------------------------------------
# Counts

PUBLISHED = {  # millions of parameters of the released checkpoints
    "t5_small": 61,
    "t5_base": 223,
    "t5_large": 738,
    "t5_3b": 2852,
    "t5_11b": 11307,
    "t5_v1_1_small": 77,
    "t5_v1_1_base": 248,
    "t5_v1_1_large": 783,
    "t5_v1_1_xl": 2850,
    "t5_v1_1_xxl": 11135,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_size_has_its_parameters(name):
    assert round(getattr(T5Config, name)().num_parameters() / 1e6) == PUBLISHED[name]


DEEP = [name for name in PUBLISHED if getattr(T5Config, name)().num_layers == 24]


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow if n in DEEP else ()) for n in PUBLISHED]
)
def test_counts_of_a_published_size(name):
    """The formulas give what is counted, on a model without memory.

    Without a device that it knows, torch takes attention apart into two matrix products, which its
    counter sees.
    """
    config = getattr(T5Config, name)()
    with torch.device("meta"):
        model = T5ForConditionalGeneration(config).eval()
        assert config.num_parameters() == sum(p.numel() for p in model.parameters())
        with FlopCounterMode(display=False) as counter:
            model(torch.zeros(1, 19, dtype=torch.long), torch.zeros(1, 7, dtype=torch.long))
    assert config.flops(19, 7) == counter.get_total_flops()


def test_counts_of_a_lopsided_size():
    """Where no two sizes agree, a term in the wrong place shows."""
    for version in VERSIONS.values():
        config = T5Config(**SIZES, **version)
        with torch.device("meta"):
            model = T5ForConditionalGeneration(config).eval()
            with FlopCounterMode(display=False) as counter:
                model(torch.zeros(1, 13, dtype=torch.long), torch.zeros(1, 5, dtype=torch.long))
        assert config.flops(13, 5) == counter.get_total_flops()
        assert config.num_parameters() == sum(p.numel() for p in model.parameters())


# ------------------------------------------------------------------------------------------------
# Files


@pytest.mark.parametrize("version", ["1.0", "1.1"])
def test_the_reference_reads_what_is_saved(version, tmp_path):
    """The folder gives transformers the same model, its untied head included; and us again."""
    ours = T5ForConditionalGeneration.from_hf(
        build("T5ForConditionalGeneration", version=version, dtype=torch.float32)
    )
    ours.save_pretrained(tmp_path)
    theirs = transformers.T5ForConditionalGeneration.from_pretrained(tmp_path).eval()
    again = T5ForConditionalGeneration.from_pretrained(tmp_path)
    got = ours(SOURCE.tokens, TARGET.tokens)
    want = theirs(input_ids=SOURCE.tokens, decoder_input_ids=TARGET.tokens, use_cache=False).logits
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)
    assert torch.equal(again(SOURCE.tokens, TARGET.tokens), got)
    assert again.config == ours.config


@pytest.mark.parametrize("ours_class", [T5, T5Encoder])
def test_other_classes_are_saved_and_read(ours_class, tmp_path):
    ours = loud_(ours_class(T5Config(**SIZES))).eval()
    ours.save_pretrained(tmp_path)
    again = ours_class.from_pretrained(tmp_path)
    for name, p in ours.state_dict().items():
        assert torch.equal(p, again.state_dict()[name])
    getattr(transformers, ours_class.hf_architecture).from_pretrained(tmp_path)


def test_a_copy_keeps_its_rules(model):
    assert copy.deepcopy(model).to_hf_state_dict().keys() == model.to_hf_state_dict().keys()


def test_the_first_released_configs_are_read():
    """They say nothing of the activation, the farthest distance or the decoder's layers."""
    theirs = {
        "architectures": ["T5WithLMHeadModel"],
        "d_ff": 2048,
        "d_kv": 64,
        "d_model": 512,
        "decoder_start_token_id": 0,
        "dropout_rate": 0.1,
        "eos_token_id": 1,
        "layer_norm_epsilon": 1e-06,
        "model_type": "t5",
        "num_heads": 8,
        "num_layers": 6,
        "pad_token_id": 0,
        "relative_attention_num_buckets": 32,
        "vocab_size": 32128,
    }
    small = T5ForConditionalGeneration.config_from_hf(theirs)
    assert small == T5Config.t5_small(num_decoder_layers=None)
    newer = {
        **theirs,
        "feed_forward_proj": "gated-gelu",
        "tie_word_embeddings": False,
        "num_decoder_layers": 6,
    }
    read = T5ForConditionalGeneration.config_from_hf(newer)
    assert (read.gated, read.tied, read.decoder_layers) == (True, False, 6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "bart"}, "needs model_type = 't5', got 'bart'"),
        ({"model_type": "mt5"}, "needs model_type = 't5', got 'mt5'"),
        ({"feed_forward_proj": "gated-silu"}, "feed_forward_proj to be one of .*, got 'gated-silu'"),
        ({"d_kv": None}, "needs the fields .*d_kv"),
    ],
)
def test_another_architecture_is_refused(change, message, tmp_path):
    T5ForConditionalGeneration(T5Config(**SIZES)).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config.update(change)
    if change.get("d_kv", 0) is None:
        del config["d_kv"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(WeightError, match=message):
        T5ForConditionalGeneration.from_pretrained(tmp_path)


def test_a_tied_checkpoint_with_another_head_is_refused():
    reference = build("T5ForConditionalGeneration", version="1.1")
    reference.config.scale_decoder_outputs = True
    with pytest.raises(WeightError, match=r"lm_head.weight: expected it to equal shared.weight"):
        T5ForConditionalGeneration.from_hf(reference)


# ------------------------------------------------------------------------------------------------
# Bad input


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"d_model": 0}, "d_model: expected at least 1, got 0"),
        ({"num_decoder_layers": 0}, "num_decoder_layers: expected at least 1, got 0"),
        ({"head_dim": -1}, "head_dim: expected at least 1, got -1"),
        ({"pad_id": 97}, "pad_id: expected a token from 0 to 96, got 97"),
        ({"decoder_start_id": -1}, "decoder_start_id: expected a token from 0 to 96, got -1"),
    ],
)
def test_impossible_sizes(change, message):
    with pytest.raises(ValueError, match=message):
        T5Config(**{**SIZES, **change})


def test_lengths_of_a_count():
    with pytest.raises(ValueError, match="S: expected at least 1, got 0"):
        T5Config.t5_small().flops(0, 5)
    with pytest.raises(ValueError, match="T: expected at least 1, got 0"):
        T5Config.t5_small().flops(5, 0)


def test_bad_sources(model):
    with pytest.raises(ValueError, match="tokens: number of positions: expected at least 1, got 0"):
        model.encode(torch.zeros(2, 0, dtype=torch.long))
    with pytest.raises(ValueError, match=r"tokens: expected shape \(B, S\), got \(43,\)"):
        model.encode(SOURCE.tokens[0])
    with pytest.raises(ValueError, match="tokens: expected ids from 0 to 96, got"):
        model.encode(torch.tensor([[3, 97]]))
    with pytest.raises(TypeError, match="tokens: expected a tensor of integer ids"):
        model.encode(SOURCE.tokens.double())
    with pytest.raises(TypeError, match="token_mask: expected a bool tensor"):
        model.encode(SOURCE.tokens, token_mask=SOURCE.token_mask.long())
    with pytest.raises(ValueError, match=r"token_mask: expected shape \(B, S\) with B = 4, S = 43"):
        model.encode(SOURCE.tokens, token_mask=SOURCE.token_mask[:, 1:])
    empty = SOURCE.token_mask.clone()
    empty[2] = False
    with pytest.raises(ValueError, match="token_mask: expected a real token in each row, got none in row 2"):
        model.encode(SOURCE.tokens, token_mask=empty)


def test_bad_targets(model):
    context = model.encode(SOURCE.tokens)
    with pytest.raises(ValueError, match="target: number of positions: expected at least 1, got 0"):
        model.decode(TARGET.tokens[:, :0], context)
    with pytest.raises(ValueError, match="target: expected ids from 0 to 96, got"):
        model.decode(torch.full((4, 1), 97), context)
    with pytest.raises(ValueError, match=r"context: expected shape \(B, S, D\) with B = 4, D = 35"):
        model.decode(TARGET.tokens, context[:3])
    with pytest.raises(ValueError, match=r"context_mask: expected shape \(B, S\) with B = 4, S = 43"):
        model.decode(TARGET.tokens, context, context_mask=TARGET.token_mask)
    none = torch.zeros_like(TARGET.token_mask)
    with pytest.raises(ValueError, match="target_mask: expected a real token in each row, got none in row 0"):
        model.decode(TARGET.tokens, context, target_mask=none)
    with pytest.raises(ValueError, match="cache: expected 2 pairs, one a block, got 1"):
        model.decode(TARGET.tokens, context, cache=model.make_cache(4, 36, 43)[:1])
    with pytest.raises(ValueError, match="k: expected at most 9 more positions"):
        model.decode(TARGET.tokens, context, cache=model.make_cache(4, 9, 43))
    with pytest.raises(ValueError, match=r"num_logits: expected 1 to 36 \(the new tokens\), got 37"):
        model.decode(TARGET.tokens, context, num_logits=37)
    with pytest.raises(ValueError, match="source_len: expected at least 1, got 0"):
        model.make_cache(4, 36, 0)
    cache = model.make_cache(4, 36, 43)
    model.decode(TARGET.tokens[:, :5], context, cache=cache)
    with pytest.raises(ValueError, match=r"target_mask: expected shape \(B, S\) with B = 4, S = 6"):
        model.decode(TARGET.tokens[:, 5:6], context, cache=cache, target_mask=TARGET.token_mask[:, :1])
