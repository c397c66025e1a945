"""What PaLM does and refuses, beside computing the right numbers."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from parity import loud_, ragged_batch
from references import padded_on_the_left
from torch.utils.flop_counter import FlopCounterMode

from textbook_code.layers import attention as attention_module
from textbook_code.models.text.palm import Palm, PalmConfig, PalmForCausalLM

CONFIG = PalmConfig(
    vocab_size=97,
    d_model=36,
    num_layers=3,
    num_heads=5,
    head_dim=10,
    d_ff=53,
    max_seq_len=41,
    rope_theta=500.0,
    norm_eps=1e-2,
)
BATCH = ragged_batch(97, (29, 13, 3))
LEFT = padded_on_the_left(BATCH)


def loud_palm() -> PalmForCausalLM:
    return loud_(PalmForCausalLM(CONFIG)).double().eval()


def test_there_is_no_bias_and_one_norm_a_block():
    names = [name for name, _ in loud_palm().named_parameters()]
    assert not [name for name in names if name.endswith("bias")]
    assert sum("norm" in name for name in names) == CONFIG.num_layers + 1
    assert {name.split(".")[-2] for name in names if "blocks.1" in name} == {
        *("norm", "q_proj", "k_proj", "v_proj", "out_proj", "gate_proj", "up_proj", "down_proj")
    }


@torch.no_grad()
def test_a_later_token_changes_nothing_before_it():
    """Bit-equal, not close."""
    model, tokens = loud_palm(), BATCH.tokens[:1]
    before = model(tokens)
    for position in (1, 17, 28):
        changed = tokens.clone()
        changed[0, position] = (tokens[0, position] + 1) % 97
        after = model(changed)
        assert torch.equal(after[0, :position], before[0, :position])
        assert bool(((after - before)[0, position:].abs().amax(-1) > 1e-9).all())


@torch.no_grad()
def test_padding_on_either_side_and_the_rest_of_the_batch_change_nothing():
    model = loud_palm()
    for batch in (BATCH, LEFT):
        together = model(batch.tokens.masked_fill(~batch.token_mask, 96), token_mask=batch.token_mask)
        for row, mask, logits in zip(batch.tokens, batch.token_mask, together, strict=True):
            torch.testing.assert_close(logits[mask], model(row[mask][None])[0], atol=1e-10, rtol=1e-10)


@torch.no_grad()
@pytest.mark.parametrize("pieces", [[1] * 29, [20, 1, 1, 1, 1, 5], [28, 1]])
def test_with_a_cache_it_computes_the_same(pieces):
    model = loud_palm()
    cache, start, parts = model.make_cache(3), 0, []
    for length in pieces:
        parts.append(model(BATCH.tokens[:, start : start + length], cache=cache))
        start += length
    torch.testing.assert_close(torch.cat(parts, 1), model(BATCH.tokens), atol=1e-10, rtol=1e-10)
    assert cache[2].k.shape == (3, 1, 41, 10) and len(cache) == 3  # one head, whatever H is


@torch.no_grad()
def test_a_padded_prompt_then_steps():
    model = loud_palm()
    cache = model.make_cache(3, 29)
    whole = model(LEFT.tokens, token_mask=LEFT.token_mask)
    prompt = model(LEFT.tokens[:, :27], token_mask=LEFT.token_mask[:, :27], cache=cache, num_logits=1)
    torch.testing.assert_close(prompt[:, 0], whole[:, 26], atol=1e-10, rtol=1e-10)
    for t in (27, 28):
        step = model(LEFT.tokens[:, t : t + 1], token_mask=LEFT.token_mask[:, : t + 1], cache=cache)
        torch.testing.assert_close(step[:, 0], whole[:, t], atol=1e-10, rtol=1e-10)


@torch.no_grad()
def test_bfloat16_is_near():
    model = loud_(PalmForCausalLM(CONFIG)).eval()
    wide = model(BATCH.tokens)
    half = model.to(torch.bfloat16)(BATCH.tokens)
    assert half.dtype == torch.bfloat16
    assert float((half.float() - wide).norm() / wide.norm()) < 0.05


def test_the_initialisation_is_the_papers():
    """A table of N(0, 1), matrices by their fan-in; the scaled logits start near 1, not near √D."""
    torch.manual_seed(0)
    config = replace(CONFIG, d_model=256, head_dim=64, d_ff=700, vocab_size=999)
    model = PalmForCausalLM(config)
    for name, p in model.named_parameters():
        if "embed" in name:
            assert float(p.detach().std()) == pytest.approx(1, rel=0.02)
        elif p.ndim == 2:
            assert float(p.detach().std()) == pytest.approx(p.size(1) ** -0.5, rel=0.03), name
        else:
            assert bool((p == 1).all()), name
    tokens = torch.randint(999, (2, 41))
    scaled = model(tokens).detach()
    others = scaled[F.one_hot(tokens, 999) == 0]  # a residual stream starts as the token's own row
    assert float(others.std()) == pytest.approx(1, abs=0.1)
    object.__setattr__(config, "scaled_logits", False)
    torch.testing.assert_close(model(tokens), scaled * math.sqrt(256))


@pytest.mark.parametrize(
    ("size", "billions"),  # 8.63, 62.50 and 540.35 in the paper's table
    [("palm_8b", 8.63), ("palm_62b", 62.5), ("palm_540b", 540.36)],
)
def test_the_published_sizes(size, billions, monkeypatch):
    config = getattr(PalmConfig, size)()
    for name in ("normal_", "kaiming_uniform_", "uniform_"):
        monkeypatch.setattr(torch.nn.init, name, lambda x, *args, **kwargs: x)
    # the counter knows no fused attention on meta; the written-out one has the same products
    monkeypatch.setattr(
        attention_module, "fused_attention", lambda *a, **kw: attention_module.attention(*a, **kw)[0]
    )

    def on_meta(**changes: int) -> PalmForCausalLM:
        with torch.device("meta"):
            return PalmForCausalLM(replace(config, **changes))

    def operations(T: int, num_layers: int) -> int:
        with FlopCounterMode(display=False) as counter:
            on_meta(num_layers=num_layers)(torch.zeros(1, T, dtype=torch.long, device="meta"))
        return counter.get_total_flops()

    counted = sum(p.numel() for p in on_meta().parameters())
    assert counted == config.num_parameters()
    assert round(counted / 1e9, 2) == billions
    assert (config.d_ff, config.head_dim, config.vocab_size) == (4 * config.d_model, 256, 256_000)
    for T in (1, 33):
        one, two = operations(T, 1), operations(T, 2)
        assert one + (config.num_layers - 1) * (two - one) == config.flops(T)
    smaller = getattr(PalmConfig, size)(num_layers=2, d_ff=7)
    assert (smaller.num_layers, smaller.d_ff, smaller.d_model) == (2, 7, config.d_model)


def test_a_step_of_training_lowers_the_loss():
    torch.manual_seed(0)
    model = PalmForCausalLM(CONFIG)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(25):
        loss = F.cross_entropy(model(BATCH.tokens[:1, :-1])[0], BATCH.tokens[0, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 1


GOOD = torch.zeros(2, 7, dtype=torch.long)
EMPTY_ROW = torch.tensor([[True] * 7, [False] * 7])


@pytest.mark.parametrize("kind", [Palm, PalmForCausalLM])
@pytest.mark.parametrize(
    ("tokens", "kwargs", "error", "message"),
    [
        (GOOD[0], {}, ValueError, r"tokens: expected shape \(B, T\), got \(7,\)"),
        (GOOD.float(), {}, TypeError, r"tokens: expected a tensor of integer ids.*, got torch.float32"),
        (GOOD + 97, {}, ValueError, r"tokens: expected ids from 0 to 96, got 97 to 97"),
        (GOOD[:, :0], {}, ValueError, r"tokens: expected 1 to 41 positions \(max_seq_len=41\), got 0"),
        (GOOD.repeat(1, 6), {}, ValueError, r"tokens: expected 1 to 41 positions \(max_seq_len=41\), got 42"),
        (GOOD, {"token_mask": GOOD}, TypeError, r"token_mask: expected a bool tensor.*, got torch.int64"),
        (
            GOOD,
            {"token_mask": EMPTY_ROW},
            ValueError,
            r"token_mask: expected a real token in each row.*row 1",
        ),
        (GOOD, {"cache": []}, ValueError, r"cache: expected one for each of 3 layers, got 0"),
    ],
)
def test_bad_input(kind, tokens, kwargs, error, message):
    with pytest.raises(error, match=message):
        kind(CONFIG)(tokens, **kwargs)


def test_sizes_and_counts_that_cannot_be():
    with pytest.raises(ValueError, match=r"num_heads: expected at least 1, got 0"):
        replace(CONFIG, num_heads=0)
    with pytest.raises(ValueError, match=r"head_dim: expected an even width"):
        PalmForCausalLM(replace(CONFIG, head_dim=9))
    with pytest.raises(ValueError, match=r"T: expected at least 1, got 0"):
        CONFIG.flops(0)
    with pytest.raises(ValueError, match=r"num_logits: expected 1 to 7 \(the new tokens\), got 8"):
        PalmForCausalLM(CONFIG)(GOOD, num_logits=8)
