"""What a decoder must do whatever its weights: look back only, ignore padding, continue from a cache."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from parity import loud_
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from textbook_code.models.text.gpt import (
    Gpt,
    GptConfig,
    GptForCausalLM,
    GptForSequenceClassification,
    document_positions,
)

V = 97
KINDS = {
    "gpt1": {"pre_norm": False},
    "gpt2": {},
    "gpt3": {"window": 5},
    "wide heads": {"window": 5, "head_dim": 11},
}
SIZES = {
    name: getattr(GptConfig, name)
    for name in (
        "gpt1",
        "gpt2_small",
        "gpt2_medium",
        "gpt2_large",
        "gpt2_xl",
        "gpt3_small",
        "gpt3_medium",
        "gpt3_large",
        "gpt3_xl",
        "gpt3_2_7b",
        "gpt3_6_7b",
        "gpt3_13b",
        "gpt3_175b",
    )
}


def tiny(kind: str = "gpt2", **changes) -> GptConfig:
    sizes = {"vocab_size": V, "d_model": 35, "num_layers": 4, "num_heads": 5, "d_ff": 53, "max_seq_len": 41}
    return GptConfig(**{**sizes, "norm_eps": 1e-2, **KINDS[kind], **changes})


def loud(kind: str = "gpt2", **changes) -> GptForCausalLM:
    return loud_(GptForCausalLM(tiny(kind, **changes))).double().eval()


def text(B: int, T: int, seed: int = 3) -> Tensor:
    return torch.randint(V, (B, T), generator=torch.Generator().manual_seed(seed))


def left_padded(lengths: tuple[int, ...], T: int) -> tuple[Tensor, Tensor]:
    mask = torch.arange(T)[None] >= T - torch.tensor(lengths)[:, None]
    return text(len(lengths), T).masked_fill(~mask, 0), mask


# ------------------------------------------------------------------------------------------------
# Causality


@pytest.mark.parametrize("kind", KINDS)
def test_no_output_depends_on_a_later_token(kind):
    """Bit for bit, at each position; and it does depend on its own."""
    model, tokens = loud(kind), text(2, 24)
    before = model(tokens)
    for t in (0, 1, 11, 23):
        changed = tokens.clone()
        changed[:, t] = (changed[:, t] + 1) % V
        after = model(changed)
        assert torch.equal(after[:, :t], before[:, :t])
        assert not torch.isclose(after[:, t], before[:, t]).all(-1).any()


def test_the_gradient_does_not_reach_later_tokens():
    model, tokens = loud(), text(1, 12)
    embedded = []
    model.gpt.token_embed.register_forward_hook(lambda m, i, out: embedded.append(out) or out.retain_grad())
    model(tokens)[0, 6].sum().backward()
    reached = embedded[0].grad[0].abs().sum(-1)
    assert bool((reached[:7] > 0).all()) and bool((reached[7:] == 0).all())


def test_the_band_is_in_every_second_layer_only():
    """Layers 0 and 2 see all, layers 1 and 3 five positions; a band as long as the text is no band."""
    _, weights = loud("gpt3").gpt(text(1, 20), need_weights=True)
    for i, w in enumerate(weights):
        seen = (w[0] > 0).sum(-1)  # (H, T)
        want = torch.arange(1, 21) if i % 2 == 0 else torch.arange(1, 21).clamp(max=5)
        assert torch.equal(seen, want.expand_as(seen))
    full, banded = loud("gpt2"), loud("gpt2", window=20)
    tokens = text(2, 20)
    torch.testing.assert_close(banded(tokens), full(tokens), atol=1e-12, rtol=1e-12)
    narrow = loud("gpt2", window=19)(tokens)
    assert torch.equal(narrow[:, :19], banded(tokens)[:, :19])
    assert not torch.isclose(narrow[:, 19], banded(tokens)[:, 19]).any(-1).all()


# ------------------------------------------------------------------------------------------------
# Padding


@pytest.mark.parametrize("kind", KINDS)
def test_left_padding_changes_nothing(kind):
    model = loud(kind)
    tokens, mask = left_padded((17, 9, 1, 20), 20)
    got = model(tokens, token_mask=mask)
    assert bool(got.isfinite().all())
    for row in range(4):
        alone = model(tokens[row][mask[row]][None])[0]
        torch.testing.assert_close(got[row][mask[row]], alone, atol=1e-10, rtol=1e-10)
    other = torch.where(mask, tokens, 55)  # what the padding is does not matter
    assert torch.equal(model(other, token_mask=mask)[mask], got[mask])


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_with_left_padding_are_those_without(kind):
    model = loud(kind)
    tokens, mask = left_padded((7, 12), 12)

    def gradient(losses: list[Tensor]) -> list[Tensor]:
        model.zero_grad()
        torch.stack(losses).sum().backward()
        return [p.grad.clone() for p in model.parameters()]

    padded = gradient([model(tokens, token_mask=mask)[mask].square().mean(-1).sum()])
    alone = gradient([model(t[m][None]).square().mean(-1).sum() for t, m in zip(tokens, mask, strict=True)])
    for got, want in zip(padded, alone, strict=True):
        torch.testing.assert_close(got, want, atol=1e-8, rtol=1e-8)


def test_a_class_is_read_from_the_last_real_token():
    model = loud_(GptForSequenceClassification(tiny(), num_classes=3)).double().eval()
    tokens, mask = left_padded((17, 9, 1), 20)
    want = torch.cat([model(t[m][None]) for t, m in zip(tokens, mask, strict=True)])
    torch.testing.assert_close(model(tokens, token_mask=mask), want, atol=1e-10, rtol=1e-10)
    right = torch.stack([torch.cat([t[m], t[~m]]) for t, m in zip(tokens, mask, strict=True)])
    got = model(right, token_mask=mask.flip(1))
    torch.testing.assert_close(got, want, atol=1e-10, rtol=1e-10)


# ------------------------------------------------------------------------------------------------
# Packed documents


@pytest.mark.parametrize("kind", KINDS)
def test_packed_documents_do_not_see_each_other(kind):
    model, tokens = loud(kind), text(2, 20)
    document_ids = torch.tensor([[0] * 7 + [1] * 1 + [2] * 12, [5] * 13 + [3] * 7])
    packed = model(tokens, document_ids=document_ids)
    for row, cuts in enumerate([(0, 7, 8, 20), (0, 13, 20)]):
        for start, end in pairwise(cuts):
            alone = model(tokens[row : row + 1, start:end])[0]
            torch.testing.assert_close(packed[row, start:end], alone, atol=1e-10, rtol=1e-10)
    assert not torch.isclose(packed[0, 8:], model(tokens)[0, 8:]).all(-1).any()


def test_positions_start_again_in_each_document():
    ids = torch.tensor([[4, 4, 4, 9, 0, 0], [1, 1, 1, 1, 1, 1], [0, 1, 0, 1, 1, 0]])
    want = torch.tensor([[0, 1, 2, 0, 0, 1], [0, 1, 2, 3, 4, 5], [0, 0, 0, 0, 1, 0]])
    assert torch.equal(document_positions(ids), want)
    with pytest.raises(TypeError, match="document_ids: expected a tensor of integer ids"):
        document_positions(ids.float())


# ------------------------------------------------------------------------------------------------
# The cache


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "steps", [[1] * 20, [8] + [1] * 12, [3, 11, 6]], ids=["by token", "prefill", "chunks"]
)
def test_cached_is_uncached(kind, steps):
    model, tokens = loud(kind), text(3, 20)
    cache = model.make_cache(3, 20)
    got = [model(part, cache=cache) for part in tokens.split(steps, dim=1)]
    torch.testing.assert_close(torch.cat(got, 1), model(tokens), atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("steps", [[8] + [1] * 12, [9, 6, 5]], ids=["prefill", "chunks"])
def test_cached_is_uncached_with_left_padding(kind, steps):
    model = loud(kind)
    tokens, mask = left_padded((20, 13, 15), 20)  # the first step holds a real token of each row
    cache, start, got = model.make_cache(3, 20), 0, []
    for part in tokens.split(steps, dim=1):
        start += part.size(1)
        got.append(model(part, token_mask=mask[:, :start], cache=cache))
    want = model(tokens, token_mask=mask)
    torch.testing.assert_close(torch.cat(got, 1)[mask], want[mask], atol=1e-10, rtol=1e-10)


def test_the_last_logits_only():
    model, tokens = loud(), text(2, 9)
    every = model(tokens)
    torch.testing.assert_close(model(tokens, num_logits=2), every[:, -2:], atol=1e-12, rtol=1e-12)
    for n in (0, 10):
        with pytest.raises(ValueError, match=f"num_logits: expected 1 to 9 .* got {n}"):
            model(tokens, num_logits=n)


# ------------------------------------------------------------------------------------------------
# Initialisation


def test_the_start_is_the_published_one():
    torch.manual_seed(0)
    config = GptConfig(vocab_size=997, d_model=120, num_layers=8, num_heads=4, d_ff=480, max_seq_len=200)
    for pre_norm in (True, False):
        model = Gpt(GptConfig(**{**vars(config), "pre_norm": pre_norm}))
        residual = 0.02 / 16**0.5 if pre_norm else 0.02
        for name, p in model.named_parameters():
            if name.endswith("bias"):
                assert bool((p == 0).all()), name
            elif "norm" in name:
                assert bool((p == 1).all()), name
            else:
                std = 0.02
                if name.endswith(("out_proj.weight", "fc2.weight")):
                    std = residual
                elif name.startswith("pos_embed") and pre_norm:
                    std = 0.01
                spread = 5 / (2 * p.numel()) ** 0.5  # five standard errors
                assert abs(float(p.detach().std()) / std - 1) < spread, (name, float(p.detach().std()), std)
                assert abs(float(p.detach().mean())) < 5 * std / p.numel() ** 0.5, name


def test_the_residual_start_keeps_the_streams_growth_the_same_at_every_depth():
    """What the blocks add to the stream's variance, in units of one block's at depth 1."""

    def added(num_layers: int, scaled: bool) -> float:
        torch.manual_seed(1)
        model = Gpt(
            GptConfig(
                vocab_size=211, d_model=64, num_layers=num_layers, num_heads=4, d_ff=256, max_seq_len=64
            )
        ).eval()
        for block in model.blocks:
            for part in (block.attn.out_proj, block.ffn.fc2):
                if not scaled:
                    nn.init.normal_(part.weight, std=0.02)
        model.final_norm = None
        tokens = torch.randint(211, (8, 64))
        first = model.token_embed(tokens) + model.pos_embed(64)
        return (model(tokens) - first).var().item()

    scaled = added(24, True) / added(2, True)
    plain = added(24, False) / added(2, False)
    assert 0.7 < scaled < 1.4
    assert plain > 8


# ------------------------------------------------------------------------------------------------
# Sizes


@pytest.mark.parametrize("name", SIZES)
def test_parameters_are_counted_by_formula(name):
    config = SIZES[name]()
    with torch.device("meta"):
        model = GptForCausalLM(config)
    assert sum(p.numel() for p in model.parameters()) == config.num_parameters()


PUBLISHED = {  # in millions, as the models are called; GPT-2's by the count of the released files
    "gpt1": 117,
    "gpt2_small": 124,
    "gpt2_medium": 355,
    "gpt2_large": 774,
    "gpt2_xl": 1558,
    "gpt3_small": 125,
    "gpt3_medium": 350,
    "gpt3_large": 760,
    "gpt3_2_7b": 2700,
    "gpt3_6_7b": 6700,
    "gpt3_13b": 13000,
    "gpt3_175b": 175000,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_those_of_the_name(name):
    assert SIZES[name]().num_parameters() / 1e6 == pytest.approx(PUBLISHED[name], rel=0.02)


def test_one_size_of_gpt3_does_not_fit_its_name():
    """1.3 billion with 16 heads of 128; the printed table has 24."""
    assert GptConfig.gpt3_xl().num_parameters() / 1e9 == pytest.approx(1.52, abs=0.01)
    assert GptConfig.gpt3_xl(num_heads=16).num_parameters() / 1e9 == pytest.approx(1.3, rel=0.02)


@pytest.mark.parametrize("name", SIZES)
def test_operations_are_counted_by_formula(name):
    """torch counts on the meta device; attention takes its written-out path, whose products it knows.

    Of the deep ones two blocks are counted, a dense and a banded one; the others are like them.
    """
    config = SIZES[name]()
    if config.num_layers > 24:
        config = replace(config, num_layers=2)
    T = 33
    with torch.device("meta"):
        model = GptForCausalLM(config).eval()
        tokens = torch.zeros(1, T, dtype=torch.long)
        with FlopCounterMode(display=False) as counter:
            hidden, _ = model.gpt(tokens, need_weights=True)
            model.gpt.token_embed.attend(hidden)
    assert counter.get_total_flops() == config.flops(T)


@pytest.mark.parametrize("T", [0, 1025])
def test_operations_of_a_text_that_does_not_fit_are_refused(T):
    with pytest.raises(ValueError, match=rf"T: expected 1 to 1024 tokens \(max_seq_len\), got {T}"):
        GptConfig().flops(T)


# ------------------------------------------------------------------------------------------------
# Fine-tuning, and what is refused


def test_a_head_on_a_trained_decoder_shares_it():
    gpt = loud("gpt3").gpt
    model = GptForSequenceClassification.from_decoder(gpt, 4)
    assert model.gpt is gpt and model.config is gpt.config
    assert model.eval()(text(3, 8)).shape == (3, 4)
    assert model.classifier.weight.dtype == torch.float64


def test_dropout_is_where_the_config_says():
    """Each of the three by itself changes the output in training and none in evaluation."""
    tokens = text(2, 9)
    none = {"dropout": 0.0, "embed_dropout": 0.0, "attn_dropout": 0.0}
    for which in (*none, None):
        torch.manual_seed(0)
        model = loud(**{**none, **({which: 0.5} if which else {})})
        still = model(tokens)
        assert torch.equal(model.train()(tokens), still) == (which is None), which


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m: m(text(1, 42)), ValueError, r"tokens: expected 1 to 41 positions .*, got 42"),
        (lambda m: m(torch.zeros(1, 0, dtype=torch.long)), ValueError, "tokens: expected 1 to 41 positions"),
        (lambda m: m(text(2, 5).float()), TypeError, "tokens: expected a tensor of integer ids"),
        (lambda m: m(text(2, 5) + V), ValueError, "tokens: expected ids from 0 to 96"),
        (lambda m: m(text(1, 5)[0]), ValueError, r"tokens: expected shape \(B, T\), got \(5,\)"),
        (
            lambda m: m(text(2, 5), token_mask=torch.ones(2, 5)),
            TypeError,
            "token_mask: expected a bool tensor",
        ),
        (
            lambda m: m(text(2, 5), token_mask=torch.tensor([[True] * 5, [False] * 5])),
            ValueError,
            "token_mask: expected a real token in each row, got none in row 1",
        ),
        (lambda m: m(text(2, 5), cache=m.make_cache(2)[:3]), ValueError, "cache: expected one for each of 4"),
        (
            lambda m: m(text(1, 5), document_ids=torch.zeros(1, 5, dtype=torch.long), cache=m.make_cache(1)),
            ValueError,
            "document_ids: expected no token_mask and no cache",
        ),
        (
            lambda m: m(text(1, 5), document_ids=torch.zeros(1, 4, dtype=torch.long)),
            ValueError,
            r"document_ids: expected shape \(B, T\) with B = 1, T = 5, got \(1, 4\)",
        ),
    ],
)
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call(loud())


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"num_heads": 4}, "num_heads: expected a positive divisor of d_model = 35, got 4"),
        ({"window": 0}, "window: expected at least 1, got 0"),
        ({"num_layers": 0}, "num_layers: expected at least 1, got 0"),
    ],
)
def test_bad_sizes_are_named(sizes, message):
    with pytest.raises(ValueError, match=message):
        tiny(**sizes)
    with pytest.raises(ValueError, match="num_classes: expected at least 1, got 0"):
        GptForSequenceClassification(tiny(), num_classes=0)
