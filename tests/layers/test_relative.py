"""ALiBi, Shaw's tables and DeBERTa's places: against transformers and against their equations."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from parity import Parity, ParityError, compare, loud_, parity_row
from torch import Tensor, nn
from transformers.models.bloom.modeling_bloom import build_alibi_tensor
from transformers.models.deberta_v2 import modeling_deberta_v2 as deberta
from transformers.models.mpt.modeling_mpt import build_mpt_alibi_tensor
from transformers.models.wav2vec2_bert.modeling_wav2vec2_bert import Wav2Vec2BertSelfAttention

from textbook_code.layers import relative_attention
from textbook_code.layers.attention import Attention
from textbook_code.layers.masks import key_mask
from textbook_code.layers.positions import (
    ALiBi,
    RelativeBias,
    alibi_slopes,
    disentangled_index,
    disentangled_scores,
    offsets,
    relative,
    relative_scores,
    relative_values,
    skew,
    unskew,
)
from textbook_code.layers.relative_attention import DisentangledAttention, ShawAttention


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


B, T = 2, 37
LATER = torch.ones(T, T, dtype=torch.bool).triu(1)

# ------------------------------------------------------------------------------------------------
# ALiBi


def test_slopes_equal_the_published_ones_for_every_number_of_heads():
    """BLOOM's and MPT's rules are written differently; both are ours, and read off the released code."""
    for heads in range(1, 131):
        ours = alibi_slopes(heads).float()
        bloom = build_alibi_tensor(torch.ones(1, 2), heads, torch.float32)[:, 0, 1]
        mpt = -build_mpt_alibi_tensor(heads, 2)[:, 0, 0]
        torch.testing.assert_close(ours, bloom, rtol=1e-5, atol=0)
        torch.testing.assert_close(ours, mpt, rtol=1e-5, atol=0)
    assert alibi_slopes(8).tolist() == [2.0**-h for h in range(1, 9)]
    exponents = (-alibi_slopes(12).log2()).tolist()
    assert exponents == pytest.approx([1, 2, 3, 4, 5, 6, 7, 8, 0.5, 1.5, 2.5, 3.5])


def bloom_attention(heads: int) -> nn.Module:
    config = transformers.BloomConfig(vocab_size=31, hidden_size=36, n_head=heads, n_layer=1)
    return loud_(transformers.BloomForCausalLM(config)).eval().transformer.h[0].self_attention


def load_bloom(theirs: nn.Module) -> Attention:
    heads, ours = theirs.num_heads, Attention(36, theirs.num_heads)
    rows = {
        leaf: p.detach().unflatten(0, (heads, 3, 36 // heads)).unbind(1)
        for leaf, p in theirs.query_key_value.named_parameters()
    }
    state = {
        f"{n}_proj.{leaf}": part[i].flatten(0, 1) for leaf, part in rows.items() for i, n in enumerate("qkv")
    }
    ours.load_state_dict(state | {f"out_proj.{leaf}": p for leaf, p in theirs.dense.named_parameters()})
    return ours


def check_bloom(parity: Parity, heads: int) -> None:
    x, real = randn(B, T, 36).float(), torch.arange(T) >= torch.tensor([[0], [5]])  # padded on the left
    alibi = build_alibi_tensor(real.long(), heads, x.dtype)
    mask = (torch.zeros(B, 1, T, T)).masked_fill(LATER | ~real[:, None, None], torch.finfo(x.dtype).min)
    bias = ALiBi(heads)(T, T)
    parity.check(
        load_bloom,
        bloom_attention(heads),
        ours=lambda m: {"out": m(x, attn_mask=key_mask(real), causal=True, score_bias=bias)[real]},
        theirs=lambda r: {"out": r(x, torch.zeros_like(x), alibi, mask)[0][real]},
        zero_gradient=["k_proj.bias"],
    )


@parity_row("positions", "ALiBi, BLOOM", "transformers.BloomForCausalLM", page="alibi", dtype="float32")
def test_alibi_of_bloom(parity):
    for heads in (4, 6):
        check_bloom(parity, heads)


def check_mpt(parity: Parity, heads: int) -> None:
    config = transformers.MptConfig(vocab_size=31, d_model=36, n_heads=heads, n_layers=1, expansion_ratio=1)
    reference = loud_(transformers.MptForCausalLM(config)).transformer.blocks[0].attn
    x, bias = randn(B, T, 36).float(), ALiBi(heads)(T, T)

    def load(theirs: nn.Module) -> Attention:
        ours = Attention(36, heads, bias=False)
        parts = zip("qkv", theirs.Wqkv.weight.chunk(3), strict=True)
        state = {f"{name}_proj.weight": rows for name, rows in parts}
        ours.load_state_dict(state | {"out_proj.weight": theirs.out_proj.weight})
        return ours

    parity.check(
        load,
        reference,
        ours=lambda m: {"out": m(x, causal=True, score_bias=bias)},
        theirs=lambda r: {"out": r(x, build_mpt_alibi_tensor(heads, T), attention_mask=LATER[None, None])[0]},
    )


@parity_row("positions", "ALiBi, MPT", "transformers.MptForCausalLM", page="alibi", dtype="float32")
def test_alibi_of_mpt(parity):
    for heads in (4, 6):
        check_mpt(parity, heads)


ALIBI_BUGS: dict[str, Any] = {
    "the sign": lambda self, T, S: -right_alibi(self, T, S),
    "distance from the start": lambda self, T, S: right_alibi(self, T, S)[:, :1].expand(-1, T, -1),
    "slopes in reverse": lambda self, T, S: right_alibi(self, T, S).flip(0),
    "all of one slope": lambda self, T, S: right_alibi(self, T, S)[:1].expand(self.num_heads, -1, -1),
    "slopes by the plain formula": lambda self, T, S: (
        -(2.0 ** (-8 * torch.arange(1, self.num_heads + 1) / self.num_heads))[:, None, None]
        * offsets(T, S).abs()
    ),
    "one distance too far": lambda self, T, S: (
        right_alibi(self, T, S) - alibi_slopes(self.num_heads).float()[:, None, None] * (offsets(T, S) != 0)
    ),
}
right_alibi = ALiBi.forward


@pytest.mark.parametrize("bug", ALIBI_BUGS)
@pytest.mark.parametrize("check", [check_bloom, check_mpt])
def test_a_planted_bug_in_alibi_is_caught(check, bug, monkeypatch):
    row = parity_row("x", "y", "transformers.BloomForCausalLM", page="z", dtype="float32").args[0]
    monkeypatch.setattr(ALiBi, "forward", ALIBI_BUGS[bug])
    with pytest.raises(ParityError):
        check(Parity(row), 6)


def test_a_number_common_to_a_row_is_no_bug(monkeypatch):
    """BLOOM's and MPT's own form, +m·j: the same weights."""
    row = parity_row("x", "y", "transformers.BloomForCausalLM", page="z", dtype="float32").args[0]
    by_key = lambda self, T, S: alibi_slopes(self.num_heads).float()[:, None, None] * torch.arange(S)  # noqa: E731
    monkeypatch.setattr(ALiBi, "forward", by_key)
    check_mpt(Parity(row), 6)


def test_alibi_is_symmetric_keeps_its_kind_and_rounds_last():
    bias = ALiBi(6)(5, 9)
    assert bias.shape == (6, 5, 9) and bias.dtype == torch.float32
    torch.testing.assert_close(bias, ALiBi(6)(9, 9)[:, -5:])  # the last queries, behind a cache
    torch.testing.assert_close(ALiBi(6)(9, 9), ALiBi(6)(9, 9).mT)
    exact = -alibi_slopes(6)[:, None, None] * offsets(400, 400).abs()
    torch.testing.assert_close(ALiBi(6).double()(400, 400), exact)
    exact = -alibi_slopes(12)[:, None, None] * offsets(400, 400).abs()
    assert torch.equal(ALiBi(12).bfloat16()(400, 400), exact.bfloat16())
    careless = -alibi_slopes(12).bfloat16()[:, None, None] * offsets(400, 400).abs().bfloat16()
    assert not torch.equal(careless, exact.bfloat16())


# ------------------------------------------------------------------------------------------------
# Skewing


@given(st.integers(1, 9), st.integers(0, 9))
@settings(deadline=None)
def test_skewing_puts_each_distance_where_it_occurs(length, past):
    S = length + past
    distance = torch.arange(1 - S, length).expand(2, 3, length, -1)  # one for each column
    assert torch.equal(skew(distance), offsets(length, S).expand(2, 3, -1, -1))
    x = randn(2, length, S)
    back = unskew(x)
    assert torch.equal(skew(back), x)
    assert (back != 0).sum() == x.numel()  # and zeros elsewhere


@given(st.integers(1, 9), st.integers(0, 9), st.integers(1, 12))
@settings(deadline=None)
def test_shaw_s_terms_equal_the_sums_over_all_pairs(length, past, clip):
    """The naive form, with a vector for each pair, (T, S, Dh)."""
    S, Dh = length + past, 5
    q, w, table = randn(2, 3, length, Dh), randn(2, 3, length, S, seed=1), randn(2 * clip + 1, Dh, seed=2)
    vectors = table[offsets(length, S).clamp(-clip, clip) + clip]  # (T, S, Dh)
    torch.testing.assert_close(relative_scores(q, table, S), torch.einsum("bhid,ijd->bhij", q, vectors))
    torch.testing.assert_close(relative_values(w, table), torch.einsum("bhij,ijd->bhid", w, vectors))


# ------------------------------------------------------------------------------------------------
# Shaw


def shaw_reference(clip: int) -> nn.Module:
    config = transformers.Wav2Vec2BertConfig(
        hidden_size=36,
        num_attention_heads=3,
        position_embeddings_type="relative_key",
        left_max_position_embeddings=clip,
        right_max_position_embeddings=clip,
        attn_implementation="sdpa",
    )
    return loud_(Wav2Vec2BertSelfAttention(config)).double()


def load_shaw(theirs: nn.Module) -> ShawAttention:
    ours = ShawAttention(36, 3, clip=theirs.left_max_position_embeddings, values=False).double()
    names = {"q_proj": "linear_q", "k_proj": "linear_k", "v_proj": "linear_v", "out_proj": "linear_out"}
    state = {
        f"{name}.{leaf}": p
        for name, other in names.items()
        for leaf, p in getattr(theirs, other).named_parameters()
    }
    ours.load_state_dict(state | {"key_table": theirs.distance_embedding.weight})
    return ours


SHAW = {
    "ours": lambda m: {"out": m(randn(B, T, 36))},
    "theirs": lambda r: {"out": r(randn(B, T, 36))[0]},
    "zero_gradient": ["k_proj.bias"],
}


@parity_row("positions", "Shaw, keys", "transformers.Wav2Vec2BertModel", page="shaw-positions")
def test_shaw_keys(parity):
    for clip in (4, T + 3):
        reference = shaw_reference(clip)
        if clip > T:  # the distances that do not occur in this text have no gradient
            reference.distance_embedding.weight.data[: clip - T + 1] = 0
        used = SHAW if clip < T else SHAW | {"zero_gradient": ["k_proj.bias"]}
        parity.check(load_shaw, reference, **used)


@pytest.mark.parametrize("causal", [False, True])
def test_shaw_attention_is_its_equation(causal):
    layer = loud_(ShawAttention(12, 3, clip=2, head_dim=5)).double()
    x = randn(B, 9, 12)
    real = torch.arange(9) < torch.tensor([[9], [6]])
    q, k, v = (p(x).unflatten(-1, (3, 5)).transpose(1, 2) for p in (layer.q_proj, layer.k_proj, layer.v_proj))
    index = offsets(9, 9).clamp(-2, 2) + 2
    keys = k[:, :, None] + layer.key_table[index]  # (B, H, T, T, Dh): a key for each pair
    values = v[:, :, None] + layer.value_table[index]
    hidden = ~real[:, None, None] | (torch.ones(9, 9).triu(1).bool() if causal else torch.tensor(False))
    scores = torch.einsum("bhid,bhijd->bhij", q, keys) / math.sqrt(5)
    out = torch.einsum("bhij,bhijd->bhid", scores.masked_fill(hidden, -math.inf).softmax(-1), values)
    want = layer.out_proj(out.transpose(1, 2).flatten(2))
    got = layer(x, attn_mask=key_mask(real), causal=causal)
    torch.testing.assert_close(got[real], want[real])


SHAW_BUGS: dict[str, Any] = {
    "clipped one too early": lambda q, table, S: right_scores(q, table[1:-1], S),
    "the sign of the distance": lambda q, table, S: right_scores(q, table.flip(0), S),
    "one distance off": lambda q, table, S: right_scores(q, table.roll(1, 0), S),
    "keys left out": lambda q, table, S: 0 * right_scores(q, table, S),
    "added behind the scaling": lambda q, table, S: right_scores(q, table, S) * q.size(-1) ** 0.5,
}
right_scores = relative_scores


@pytest.mark.parametrize("bug", SHAW_BUGS)
def test_a_planted_bug_in_shaw_is_caught(bug, monkeypatch):
    compare(load_shaw, shaw_reference(4), **SHAW)
    monkeypatch.setattr(relative_attention, "relative_scores", SHAW_BUGS[bug])
    with pytest.raises(ParityError):
        compare(load_shaw, shaw_reference(4), **SHAW)


# ------------------------------------------------------------------------------------------------
# DeBERTa


@pytest.mark.parametrize(("span", "max_distance"), [(256, 512), (8, 20), (2, 9), (7, 30)])
def test_places_equal_the_published_ones_at_every_distance(span, max_distance):
    T = 700
    x = torch.zeros(1, T, 1)
    theirs = deberta.build_relative_position(x, x, span, max_distance)[0]
    want = (theirs + span).clamp(0, 2 * span - 1)
    assert torch.equal(disentangled_index(T, T, span, max_distance=max_distance), want)
    assert torch.equal(disentangled_index(3, T, span, max_distance=max_distance), want[-3:])


class Half(nn.Module):
    """The reference's attention without the residual connection and the norm behind it."""

    def __init__(self, attention: nn.Module, places: nn.Embedding | None = None) -> None:
        super().__init__()
        self.attention, self.dense, self.places = attention.self, attention.output.dense, places


# 12 channels a head: the reference takes √(3 Dh) in float32, and this one is 6
DEBERTA = {"hidden_size": 36, "num_attention_heads": 3, "num_hidden_layers": 1, "intermediate_size": 20}
DEBERTA |= {"vocab_size": 31, "relative_attention": True, "pos_att_type": ["c2p", "p2c"]}
REAL = torch.arange(T) < torch.tensor([[T], [T - 9]])
PAIRS = (REAL[:, None, None] & REAL[:, None, :, None]).long()  # (B, 1, T, T)


def check_deberta_v2(parity: Parity, *, shared: bool) -> None:
    config = transformers.DebertaV2Config(
        **DEBERTA, position_buckets=6, max_relative_positions=30, share_att_key=shared
    )
    model = loud_(transformers.DebertaV2ForMaskedLM(config)).double().deberta.encoder
    x = randn(B, T, 36)

    class Ours(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn = DisentangledAttention(36, 3, span=6, max_distance=30, share_projections=shared)
            self.places = nn.Parameter(torch.empty(12, 36))

    def load(theirs: Half) -> Ours:
        a, ours = theirs.attention, Ours().double()
        names = {
            "q_proj": a.query_proj,
            "k_proj": a.key_proj,
            "v_proj": a.value_proj,
            "out_proj": theirs.dense,
        }
        if not shared:
            names |= {"place_q_proj": a.pos_query_proj, "place_k_proj": a.pos_key_proj}
        state = {f"attn.{n}.{leaf}": p for n, m in names.items() for leaf, p in m.named_parameters()}
        ours.load_state_dict(state | {"places": theirs.places.weight})
        return ours

    def run_theirs(r: Half) -> dict[str, Tensor]:
        return {"out": r.dense(r.attention(x, PAIRS, rel_embeddings=r.places.weight)[0])[REAL]}

    parity.check(
        load,
        Half(model.layer[0].attention, model.rel_embeddings),
        ours=lambda m: {"out": m.attn(x, m.places, attn_mask=key_mask(REAL))[REAL]},
        theirs=run_theirs,
        zero_gradient=[] if shared else ["attn.place_k_proj.bias"],
    )


@parity_row("positions", "DeBERTa-v2", "transformers.DebertaV2ForMaskedLM", page="deberta-positions")
def test_deberta_v2(parity):
    for shared in (False, True):
        check_deberta_v2(parity, shared=shared)


@parity_row("positions", "DeBERTa", "transformers.DebertaForMaskedLM", page="deberta-positions")
def test_deberta_v1(parity):
    """Plain distances; here the maps of q, k and v are one, and only some of them have a bias."""
    for span in (8, T + 3):
        config = transformers.DebertaConfig(**DEBERTA, max_relative_positions=span)
        encoder = loud_(transformers.DebertaForMaskedLM(config)).double().eval().deberta.encoder
        theirs = encoder.layer[0].attention
        a, dense, places = theirs.self, theirs.output.dense, encoder.rel_embeddings.weight
        ours = DisentangledAttention(36, 3, span=span).double()
        q, k, v = (rows.flatten(0, 1) for rows in a.in_proj.weight.unflatten(0, (3, 3, 12)).unbind(1))
        none = torch.zeros(36, dtype=q.dtype)
        state = {"q_proj": (q, a.q_bias), "k_proj": (k, none), "v_proj": (v, a.v_bias)}
        state |= {"out_proj": (dense.weight, dense.bias), "place_k_proj": (a.pos_proj.weight, none)}
        state |= {"place_q_proj": (a.pos_q_proj.weight, a.pos_q_proj.bias)}
        ours.load_state_dict(
            {
                f"{n}.{leaf}": p
                for n, both in state.items()
                for leaf, p in zip(("weight", "bias"), both, strict=True)
            }
        )
        x = randn(B, T, 36).requires_grad_()
        index = torch.arange(T)[:, None] - torch.arange(T)
        want = dense(a(x, PAIRS, relative_pos=index[None], rel_embeddings=places)[0])[REAL]
        got = ours(x, places, attn_mask=key_mask(REAL))[REAL]
        parity.record({"out": got}, {"out": want})
        weight = randn(*want.shape, seed=5)
        grads = [torch.autograd.grad((out * weight).sum(), (x, places)) for out in (got, want)]
        by_name = ({"x": g[0], "places": g[1]} for g in grads)
        parity.record(*by_name, gradients=True)


DEBERTA_BUGS: dict[str, Any] = {
    "key minus query": ("index", lambda i: 11 - i),
    "one place off": ("index", lambda i: (i + 1).clamp(max=11)),
    "the second term at j - i, as the paper has it": ("p2c", None),
    "the two kinds of places exchanged": ("exchanged", None),
    "the second term left out": ("c2p only", None),
    "scaled for one term": ("scale", None),
}


@pytest.mark.parametrize("bug", DEBERTA_BUGS)
def test_a_planted_bug_in_deberta_is_caught(bug, monkeypatch):
    row = parity_row("x", "y", "transformers.DebertaV2ForMaskedLM", page="z").args[0]
    check_deberta_v2(Parity(row), shared=False)
    kind, change = DEBERTA_BUGS[bug]

    def wrong(q: Tensor, k: Tensor, place_q: Tensor, place_k: Tensor, index: Tensor) -> Tensor:
        none = torch.zeros_like(place_q)
        match kind:
            case "index":
                return disentangled_scores(q, k, place_q, place_k, change(index))
            case "p2c":
                other = disentangled_index(T, T, 6, max_distance=30).T
                return disentangled_scores(q, k, none, place_k, index) + disentangled_scores(
                    q, k, place_q, none, other
                )
            case "exchanged":
                return disentangled_scores(q, k, place_k, place_q, index)
            case "c2p only":
                return disentangled_scores(q, k, none, place_k, index)
        return disentangled_scores(q, k, place_q, place_k, index) * 3**0.5

    monkeypatch.setattr(relative_attention, "disentangled_scores", wrong)
    with pytest.raises(ParityError):
        check_deberta_v2(Parity(row), shared=False)


def test_a_bucket_s_border_that_moves_is_caught(monkeypatch):
    row = parity_row("x", "y", "transformers.DebertaV2ForMaskedLM", page="z").args[0]
    floor = lambda *a, **kw: disentangled_index(*a, **kw | {"max_distance": 31})  # noqa: E731
    monkeypatch.setattr(relative_attention, "disentangled_index", floor)
    with pytest.raises(ParityError):
        check_deberta_v2(Parity(row), shared=False)


def test_t5_s_bucket_border_matters():
    """Logarithms in float64 move a distance across a border; parity at every distance notices it."""
    from transformers.models.t5.modeling_t5 import T5Attention

    want = T5Attention._relative_position_bucket(offsets(700, 700), True, 32, 128)
    bias = RelativeBias(1)
    assert torch.equal(bias.buckets(700, 700), want)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(relative, "math", type("M", (), {"log": lambda x: math.log(x) * 1.01}))
        assert not torch.equal(bias.buckets(700, 700), want)


@given(st.integers(1, 40), st.integers(0, 30), st.sampled_from([None, 30]))
@settings(deadline=None)
def test_places_depend_on_the_distance_and_never_step_back(length, past, max_distance):
    index = disentangled_index(length, length + past, 6, max_distance=max_distance)
    assert (index.diff(dim=1) <= 0).all()  # later keys have smaller i - j
    assert torch.equal(index[1:, 1:], index[:-1, :-1])
    assert int(index.min()) >= 0 and int(index.max()) <= 11


# ------------------------------------------------------------------------------------------------
# Bad input


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ALiBi(0), "num_heads: expected at least 1, got 0"),
        (lambda: alibi_slopes(-3), "num_heads: expected at least 1, got -3"),
        (lambda: ALiBi(2)(4, 3), "T, S: expected 1 <= T <= S"),
        (lambda: offsets(0, 3), "T, S: expected 1 <= T <= S"),
        (lambda: ShawAttention(12, 3, clip=0), "clip: expected a distance of at least 1, got 0"),
        (lambda: ShawAttention(12, 5, clip=2), "num_heads: expected a positive divisor of d_model"),
        (lambda: ShawAttention(12, 0, clip=2, head_dim=4), "num_heads, head_dim: expected at least 1 each"),
        (lambda: ShawAttention(12, 3, clip=2)(torch.zeros(2, 5, 11)), "x: expected shape"),
        (lambda: relative_scores(randn(1, 1, 3, 4), randn(4, 4), 3), "table: expected 2k \\+ 1 rows"),
        (lambda: relative_scores(randn(1, 1, 3, 4), randn(5, 3), 3), "table: expected shape"),
        (lambda: relative_scores(randn(1, 1, 3, 4), randn(5, 4), 2), "x: expected|T, S: expected"),
        (lambda: relative_values(randn(1, 1, 3, 2), randn(5, 4)), "x: expected"),
        (lambda: skew(randn(4, 3)), "x: expected"),
        (lambda: unskew(randn(4, 3)), "x: expected"),
        (lambda: disentangled_index(3, 3, 0), "span: expected at least 1, got 0"),
        (lambda: disentangled_index(3, 3, 8, max_distance=5), "max_distance: expected more than the 5"),
        (lambda: disentangled_index(3, 3, 1, max_distance=5), "max_distance: expected more than"),
        (lambda: DisentangledAttention(12, 3, span=0), "span: expected at least 1"),
        (lambda: DisentangledAttention(12, 5, span=2), "num_heads: expected a positive divisor of d_model"),
        (
            lambda: DisentangledAttention(12, 3, span=2)(torch.zeros(1, 3, 12), torch.zeros(5, 12)),
            r"places: expected shape \(places, D\) with places = 4, D = 12",
        ),
        (
            lambda: disentangled_scores(
                *(randn(1, 2, 3, 4),) * 2, randn(2, 4, 4), randn(3, 4, 4), offsets(3, 3)
            ),
            "place_k: expected shape",
        ),
    ],
)
def test_bad_input_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_places_of_another_dtype_are_refused():
    with pytest.raises(TypeError, match=r"places: expected torch.float32, got torch.float64"):
        DisentangledAttention(12, 3, span=2)(torch.zeros(1, 3, 12), torch.zeros(4, 12).double())
