"""What LLaMA does and refuses, beside computing the right numbers."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from parity import loud_, ragged_batch
from references import padded_on_the_left
from torch.utils.flop_counter import FlopCounterMode

from textbook_code.layers import attention as attention_module
from textbook_code.layers import local_attention as local_attention_module
from textbook_code.layers.attention import Attention
from textbook_code.layers.positions import Llama3Scaling
from textbook_code.models.text.llama import (
    Llama,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    swiglu_width,
)

CONFIG = LlamaConfig(
    vocab_size=97,
    d_model=36,
    num_layers=3,
    num_heads=6,
    num_kv_heads=2,
    head_dim=10,
    d_ff=53,
    max_seq_len=41,
    rope_theta=500.0,
    scaling=Llama3Scaling(6.0, 1.5, 5.0, 29),
    norm_eps=1e-2,
)
BATCH = ragged_batch(97, (29, 13, 3))
LEFT = padded_on_the_left(BATCH)


def loud_llama(config: LlamaConfig = CONFIG) -> LlamaForCausalLM:
    return loud_(LlamaForCausalLM(config)).double().eval()


@torch.no_grad()
def test_a_later_token_changes_nothing_before_it():
    """Bit-equal, not close."""
    model, tokens = loud_llama(), BATCH.tokens[:1]
    before = model(tokens)
    for position in (1, 17, 28):
        changed = tokens.clone()
        changed[0, position] = (tokens[0, position] + 1) % 97
        after = model(changed)
        assert torch.equal(after[0, :position], before[0, :position])
        assert bool(((after - before)[0, position:].abs().amax(-1) > 1e-9).all())


@torch.no_grad()
def test_padding_on_either_side_and_the_rest_of_the_batch_change_nothing():
    model = loud_llama()
    for batch in (BATCH, LEFT):
        noise = batch.tokens.masked_fill(~batch.token_mask, 96)
        for tokens in (batch.tokens, noise):
            together = model(tokens, token_mask=batch.token_mask)
            assert bool(together.isfinite().all())
            for row, mask, logits in zip(batch.tokens, batch.token_mask, together, strict=True):
                alone = model(row[mask][None])[0]
                torch.testing.assert_close(logits[mask], alone, atol=1e-10, rtol=1e-10)


@torch.no_grad()
@pytest.mark.parametrize("kind", [Llama, LlamaForCausalLM])
@pytest.mark.parametrize("pieces", [[1] * 29, [20, 1, 1, 1, 1, 5], [28, 1], [29]])
def test_with_a_cache_it_computes_the_same(kind, pieces):
    """Token by token, prompt then steps, and in chunks; rows padded on the left."""
    model = loud_(kind(CONFIG)).double().eval()
    cache, start, parts = model.make_cache(3, 29), 0, []
    for length in pieces:
        end = start + length
        mask = LEFT.token_mask[:, :end].clone()
        mask[:, 0] |= ~mask.any(1)  # a row of padding alone is refused: let its first token stand
        parts.append(model(LEFT.tokens[:, start:end], token_mask=mask, cache=cache))
        start = end
    whole = model(LEFT.tokens, token_mask=LEFT.token_mask)
    assert cache[0].length == 29 and cache[0].k.shape == (3, 2, 29, 10)
    full = LEFT.token_mask.all(1)  # the row without padding, which the line above leaves as it is
    torch.testing.assert_close(torch.cat(parts, 1)[full], whole[full], atol=1e-10, rtol=1e-10)


@torch.no_grad()
def test_a_padded_prompt_then_steps():
    """What `generate` does: one pass over prompts padded on the left, then a token at a time."""
    model, cache = loud_llama(), None
    cache = model.make_cache(3)
    whole = model(LEFT.tokens, token_mask=LEFT.token_mask)
    prompt = model(LEFT.tokens[:, :27], token_mask=LEFT.token_mask[:, :27], cache=cache, num_logits=1)
    torch.testing.assert_close(prompt[:, 0], whole[:, 26], atol=1e-10, rtol=1e-10)
    for t in (27, 28):
        step = model(LEFT.tokens[:, t : t + 1], token_mask=LEFT.token_mask[:, : t + 1], cache=cache)
        torch.testing.assert_close(step[:, 0], whole[:, t], atol=1e-10, rtol=1e-10)


@torch.no_grad()
def test_only_the_last_logits():
    model = loud_llama()
    whole = model(BATCH.tokens)
    for n in (1, 5, 29):
        torch.testing.assert_close(model(BATCH.tokens, num_logits=n), whole[:, -n:])


@torch.no_grad()
def test_as_many_key_heads_as_query_heads_is_multi_head_attention():
    """Shared keys, copied out to a head each, give the same model with plain multi-head attention."""
    shared = loud_llama()
    plain = loud_llama(LlamaConfig(**{**vars(CONFIG), "num_kv_heads": 6}))
    state = shared.state_dict()
    for name in [n for n in state if n.endswith(("k_proj.weight", "v_proj.weight"))]:
        state[name] = state[name].unflatten(0, (2, 10)).repeat_interleave(3, 0).flatten(0, 1)
    plain.load_state_dict(state)
    torch.testing.assert_close(plain(BATCH.tokens), shared(BATCH.tokens), atol=1e-12, rtol=1e-12)


@torch.no_grad()
def test_scores_depend_on_the_distance_alone():
    """Attention's weights at positions 0 … T − 1 and anywhere else are the same."""
    attn = loud_(Attention(36, 6, num_kv_heads=2, head_dim=10, bias=False)).double()
    rotary = Llama(CONFIG).rotary
    x = torch.randn(1, 17, 36, generator=torch.Generator().manual_seed(0)).double()
    t = torch.arange(17)
    _, weights = attn(x, causal=True, rotary=rotary(t), need_weights=True)
    for start in (1, 1000, 100_000):
        _, moved = attn(x, causal=True, rotary=rotary(t + start), need_weights=True)
        torch.testing.assert_close(moved, weights, atol=1e-9, rtol=1e-9)
    _, stretched = attn(x, causal=True, rotary=rotary(2 * t), need_weights=True)
    assert float((stretched - weights).abs().max()) > 1e-2
    # and the score of two vectors is the same wherever they stand at the same distance
    q, k = (torch.randn(10, generator=torch.Generator().manual_seed(s)).double() for s in (1, 2))
    cos, sin = rotary(torch.arange(40))
    turned_q, turned_k = (attention_module.rotate(v.expand(1, 1, 40, 10), cos, sin)[0, 0] for v in (q, k))
    scores = turned_q @ turned_k.T
    for distance in range(-39, 40):
        on_diagonal = scores.diagonal(distance)
        torch.testing.assert_close(on_diagonal, on_diagonal[:1].expand_as(on_diagonal))
    assert scores[0].std() > 0.1


@torch.no_grad()
def test_without_positions_it_could_not_tell_the_order():
    """The control: with the rotation off, the last token's scores ignore the order of those before it."""
    tokens, shuffled = BATCH.tokens[:1], BATCH.tokens[:1, [2, 0, 1, *range(3, 29)]]
    model = loud_llama(LlamaConfig(**{**vars(CONFIG), "num_layers": 1}))
    assert float((model(tokens) - model(shuffled))[0, -1].abs().max()) > 1e-3
    model.llama.rotary.forward = lambda positions, dtype: (  # type: ignore[method-assign]
        torch.ones(len(positions), 10, dtype=dtype),
        torch.zeros(len(positions), 10, dtype=dtype),
    )
    torch.testing.assert_close(model(tokens)[0, -1], model(shuffled)[0, -1], atol=1e-12, rtol=1e-12)


@torch.no_grad()
def test_bfloat16_is_near():
    model = LlamaForCausalLM(LlamaConfig.smollm2_135m(num_layers=4, vocab_size=1000)).eval()
    tokens = torch.randint(1000, (2, 300), generator=torch.Generator().manual_seed(0))
    wide = model(tokens, num_logits=20)
    half = model.to(torch.bfloat16)(tokens, num_logits=20)
    assert half.dtype == torch.bfloat16
    # weights of 8 bits each: about 2⁻⁸ for each of the sums on the way, and no position is worse off
    error = (half.float() - wide).norm(dim=-1) / wide.norm(dim=-1)
    assert float(error.max()) < 0.03
    assert float(error[:, -1].mean()) < 2 * float(error.mean())


@torch.no_grad()
def test_bfloat16_with_a_cache():
    model = LlamaForCausalLM(CONFIG).to(torch.bfloat16).eval()
    cache = model.make_cache(2)
    assert {c.k.dtype for c in cache} == {torch.bfloat16}
    whole = model(BATCH.tokens[:2, :9]).float()
    model(BATCH.tokens[:2, :8], cache=cache)
    step = model(BATCH.tokens[:2, 8:9], cache=cache).float()
    torch.testing.assert_close(step[:, 0], whole[:, -1], atol=2e-2, rtol=2e-2)


def test_a_tied_head_is_one_table():
    model = LlamaForCausalLM(LlamaConfig(**{**vars(CONFIG), "tied": True}))
    assert model.lm_head is None and "lm_head.weight" not in model.state_dict()
    model(BATCH.tokens).sum().backward()
    unused = [i for i in range(97) if i not in BATCH.tokens]
    assert unused and bool((model.llama.token_embed.weight.grad[unused] != 0).any())  # by the output side


def test_the_initialisation():
    model = LlamaForCausalLM(LlamaConfig.smollm2_135m(num_layers=2, vocab_size=5000, tied=False))
    for name, p in model.named_parameters():
        if p.ndim == 2:
            assert float(p.detach().std()) == pytest.approx(0.02, rel=0.02), name
            assert abs(float(p.detach().mean())) < 3e-4, name
        else:
            assert name.endswith("norm.weight") and bool((p == 1).all()), name
    logits = model(torch.randint(5000, (1, 64))).detach()
    assert F.cross_entropy(logits[0], torch.randint(5000, (64,))) == pytest.approx(math.log(5000), abs=0.3)


def test_a_step_of_training_lowers_the_loss():
    torch.manual_seed(0)
    model = LlamaForCausalLM(CONFIG)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(25):
        logits = model(BATCH.tokens[:1, :-1])
        loss = F.cross_entropy(logits[0], BATCH.tokens[0, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(math.log(97), abs=0.3)
    assert losses[-1] < losses[0] - 1


# ------------------------------------------------------------------------------------------------
# Sizes


def on_meta(config: LlamaConfig, patch: pytest.MonkeyPatch) -> LlamaForCausalLM:
    """The model without memory, and so without numbers to draw."""
    for name in ("normal_", "kaiming_uniform_", "uniform_"):
        patch.setattr(torch.nn.init, name, lambda x, *args, **kwargs: x)
    with torch.device("meta"):
        return LlamaForCausalLM(config)


def operations(model: LlamaForCausalLM, T: int, patch: pytest.MonkeyPatch) -> int:
    """torch's count. It knows no fused attention on meta; the written-out one has the same products."""
    for module in (attention_module, local_attention_module):
        patch.setattr(module, "fused_attention", lambda *a, **kw: attention_module.attention(*a, **kw)[0])
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, T, dtype=torch.long, device="meta"))
    return counter.get_total_flops()


@pytest.mark.parametrize(
    ("size", "billions", "d_ff"),  # as published, rounded
    [
        ("llama1_7b", 6.7, 11_008),
        ("llama1_13b", 13.0, 13_824),
        ("llama1_30b", 32.5, 17_920),
        ("llama1_65b", 65.3, 22_016),
        ("llama2_7b", 6.7, 11_008),
        ("llama2_13b", 13.0, 13_824),
        ("llama2_70b", 69.0, 28_672),
        ("llama3_8b", 8.0, 14_336),
        ("llama3_70b", 70.6, 28_672),
        ("llama31_8b", 8.0, 14_336),
        ("llama31_70b", 70.6, 28_672),
        ("llama31_405b", 405.9, 53_248),
        ("llama32_1b", 1.2, 8192),
        ("llama32_3b", 3.2, 8192),
        ("smollm2_135m", 0.1, 1536),
        ("smollm2_360m", 0.4, 2560),
        ("smollm2_1b7", 1.7, 8192),
        ("mistral_7b", 7.2, 14_336),
    ],
)
def test_the_published_sizes(size, billions, d_ff, monkeypatch):
    """Counted on modules without memory: every parameter; operations of one block and of two, so of all."""
    config = getattr(LlamaConfig, size)()
    counted = sum(p.numel() for p in on_meta(config, monkeypatch).parameters())
    assert counted == config.num_parameters()
    assert round(counted / 1e9, 1) == billions
    assert config.d_ff == d_ff
    for T in (1, 33):
        one, two = (
            operations(on_meta(replace(config, num_layers=n), monkeypatch), T, monkeypatch) for n in (1, 2)
        )
        assert one + (config.num_layers - 1) * (two - one) == config.flops(T)
    smaller = getattr(LlamaConfig, size)(vocab_size=100, num_layers=1, norm_eps=0.5, max_seq_len=7)
    assert (smaller.vocab_size, smaller.num_layers, smaller.norm_eps, smaller.max_seq_len) == (100, 1, 0.5, 7)
    assert smaller.d_ff == d_ff


def test_operations_of_a_whole_model(monkeypatch):
    for config in (LlamaConfig.smollm2_135m(), CONFIG):
        assert operations(on_meta(config, monkeypatch), 33, monkeypatch) == config.flops(33)


def test_the_generations_differ_where_the_papers_say():
    one, two, three, long = (
        getattr(LlamaConfig, f"llama{n}")() for n in ("1_65b", "2_70b", "3_70b", "31_70b")
    )
    assert (one.max_seq_len, two.max_seq_len, three.max_seq_len, long.max_seq_len) == (
        2048,
        4096,
        8192,
        131_072,
    )
    assert (one.num_kv_heads, two.num_kv_heads, three.num_kv_heads) == (64, 8, 8)
    assert (two.vocab_size, three.vocab_size) == (32_000, 128_256)
    assert (two.rope_theta, three.rope_theta) == (1e4, 5e5)
    assert (three.scaling, long.scaling) == (None, Llama3Scaling(8.0, 1.0, 4.0, 8192))
    assert LlamaConfig.llama32_1b().scaling == Llama3Scaling(32.0, 1.0, 4.0, 8192)
    assert (LlamaConfig.llama1_7b().norm_eps, LlamaConfig.llama2_7b().norm_eps) == (1e-6, 1e-5)
    assert LlamaConfig.llama32_3b().tied and not long.tied
    assert LlamaConfig.llama32_3b().head_dim == 128


def test_swiglu_width_matches_the_parameters():
    for d_model in (576, 768, 4096, 5120):
        exact = swiglu_width(d_model, multiple_of=1)
        assert abs(3 * exact - 8 * d_model) <= 3
        assert swiglu_width(d_model) - exact in range(256) and swiglu_width(d_model) % 256 == 0
    assert swiglu_width(4096) == 11_008
    with pytest.raises(ValueError, match=r"d_model, multiple_of, multiplier: expected positive.*got 0, 256"):
        swiglu_width(0)


# ------------------------------------------------------------------------------------------------
# Bad input: the message names the argument, what came and what was expected


GOOD = torch.zeros(2, 7, dtype=torch.long)
REAL = torch.ones(2, 7, dtype=torch.bool)
EMPTY_ROW = torch.tensor([[True] * 7, [False] * 7])


@pytest.mark.parametrize("kind", [Llama, LlamaForCausalLM, LlamaForSequenceClassification])
@pytest.mark.parametrize(
    ("tokens", "kwargs", "error", "message"),
    [
        (GOOD[0], {}, ValueError, r"tokens: expected shape \(B, T\), got \(7,\)"),
        ("hello", {}, TypeError, r"tokens: expected a tensor, got str"),
        (GOOD.float(), {}, TypeError, r"tokens: expected a tensor of integer ids.*, got torch.float32"),
        (GOOD + 97, {}, ValueError, r"tokens: expected ids from 0 to 96, got 97 to 97"),
        (GOOD[:, :0], {}, ValueError, r"tokens: expected 1 to 41 positions \(max_seq_len=41\), got 0"),
        (GOOD.repeat(1, 6), {}, ValueError, r"tokens: expected 1 to 41 positions \(max_seq_len=41\), got 42"),
        (GOOD, {"token_mask": GOOD}, TypeError, r"token_mask: expected a bool tensor.*, got torch.int64"),
        (GOOD, {"token_mask": REAL[:, 1:]}, ValueError, r"token_mask: expected .* S = 7, got \(2, 6\)"),
        (
            GOOD,
            {"token_mask": EMPTY_ROW},
            ValueError,
            r"token_mask: expected a real token in each row.*row 1",
        ),
    ],
)
def test_bad_input(kind, tokens, kwargs, error, message):
    with pytest.raises(error, match=message):
        kind(CONFIG)(tokens, **kwargs)


def test_bad_input_behind_a_cache():
    model = LlamaForCausalLM(CONFIG).eval()
    cache = model.make_cache(2)
    model(GOOD.repeat(1, 5), cache=cache)
    with pytest.raises(
        ValueError, match=r"tokens: expected 1 to 6 positions \(max_seq_len=41, 35 of them cached\), got 7"
    ):
        model(GOOD, cache=cache)
    with pytest.raises(ValueError, match=r"token_mask: expected .* S = 36, got \(2, 7\)"):
        model(GOOD[:, :1], token_mask=REAL, cache=cache)
    with pytest.raises(ValueError, match=r"cache: expected one for each of 3 layers, got 2"):
        model(GOOD, cache=cache[:2])
    with pytest.raises(ValueError, match=r"k: .* B = 2.*got \(1, "):
        model(GOOD[:1, :1], cache=cache)


@pytest.mark.parametrize("num_logits", [0, 8, -1])
def test_logits_that_are_not_there(num_logits):
    with pytest.raises(
        ValueError, match=rf"num_logits: expected 1 to 7 \(the new tokens\), got {num_logits}"
    ):
        LlamaForCausalLM(CONFIG)(GOOD, num_logits=num_logits)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"num_heads": 5, "head_dim": None},
            r"num_heads: expected a positive divisor of d_model = 36, got 5",
        ),
        ({"num_kv_heads": 4}, r"num_kv_heads: expected a positive divisor of num_heads = 6, got 4"),
        ({"num_kv_heads": 0}, r"num_kv_heads: expected at least 1, got 0"),
        ({"head_dim": 9}, r"head_dim: expected an even width"),
        ({"num_layers": 0}, r"num_layers: expected at least 1, got 0"),
        ({"sliding_window": 0}, r"sliding_window: expected at least 1, got 0"),
        ({"rope_theta": 0.0}, r"theta: expected a positive number, got 0.0"),
    ],
)
def test_a_config_that_cannot_be(changes: dict[str, Any], message):
    with pytest.raises(ValueError, match=message):
        LlamaForCausalLM(LlamaConfig(**{**vars(CONFIG), **changes}))


def test_heads_and_counts_that_cannot_be():
    with pytest.raises(ValueError, match="num_classes: expected at least 2, got 1"):
        LlamaForSequenceClassification(CONFIG, 1)
    with pytest.raises(ValueError, match="T: expected at least 1, got 0"):
        CONFIG.flops(0)
