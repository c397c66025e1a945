"""Longformer computes what transformers' Longformer computes: the attention, the encoder, every head."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
import transformers
from parity import Batch, ParityError, check_loading, compare, loud_, parity_row, ragged_batch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers.models.longformer.modeling_longformer import LongformerSelfAttention

from textbook_code.layers.attention import attention
from textbook_code.layers.sparse_attention import LongformerAttention, longformer
from textbook_code.models.text.longformer import (
    Longformer,
    LongformerConfig,
    LongformerForMaskedLM,
    LongformerForSequenceClassification,
)
from textbook_code.models.text.roberta import Roberta, RobertaConfig

PAD = 4
SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 35,
    "num_hidden_layers": 3,
    "num_attention_heads": 5,
    "intermediate_size": 53,
    "max_position_embeddings": 41 + PAD + 1,
    "attention_window": [4, 12, 6],
    "type_vocab_size": 3,
    "layer_norm_eps": 1e-2,
    "hidden_dropout_prob": 0.07,
    "attention_probs_dropout_prob": 0.03,
    "initializer_range": 0.05,
    "pad_token_id": PAD,
}
K_BIAS = r".*k_(global_)?proj\.bias"
HEADS = [
    (Longformer, "LongformerModel"),
    (LongformerForMaskedLM, "LongformerForMaskedLM"),
    (LongformerForSequenceClassification, "LongformerForSequenceClassification"),
]
BATCH: Batch = ragged_batch(97, (41, 23, 32, 3), num_segments=3, pad_id=PAD)
GLOBAL = torch.zeros(4, 41, dtype=torch.bool)
GLOBAL[:3, 0] = True  # the fourth text has none
GLOBAL[1, [5, 6, 22]] = True
GLOBAL[2, 40] = True  # on padding: nothing


@contextmanager
def in_full_precision() -> Iterator[None]:
    """The reference takes its softmax in float32 whatever it is given; here in the dtype that it is given."""
    theirs = F.softmax

    def softmax(x: Tensor, dim: int, dtype: torch.dtype | None = None, **kw: Any) -> Tensor:
        exact = theirs(x, dim=dim)
        if dtype is not None:
            rounded = theirs(x, dim=dim, dtype=dtype)  # nan for a query that sees nothing, which is padding
            sees = ~rounded.isnan()
            torch.testing.assert_close(exact[sees].to(dtype), rounded[sees], atol=1e-6, rtol=1e-5)
        return exact

    with patch.object(F, "softmax", softmax):
        yield


def build(architecture: str, **changes: Any) -> transformers.PreTrainedModel:
    """The reference, tiny, loud and in float64."""
    config = transformers.LongformerConfig(**{**copy.deepcopy(SIZES), **changes})
    return loud_(getattr(transformers, architecture)(config)).double()


def ours(model: nn.Module, global_mask: Tensor | None, **kw: Any) -> Tensor:
    return model(BATCH.tokens, token_mask=BATCH.token_mask, global_mask=global_mask, **kw)


def theirs(model: nn.Module, global_mask: Tensor | None, **kw: Any) -> Any:
    marked = None if global_mask is None else global_mask.long()
    with in_full_precision():
        return model(BATCH.tokens, attention_mask=BATCH.token_mask.long(), global_attention_mask=marked, **kw)


@parity_row("longformer", "attention", "transformers.LongformerSelfAttention", page="sparse-longformer")
def test_attention(parity):
    """The layer alone: padding, several global tokens in one text and none in another."""
    config = transformers.LongformerConfig(**{**copy.deepcopy(SIZES), "attention_window": [8, 8, 8]})
    reference = loud_(LongformerSelfAttention(config, layer_id=1)).double().eval()
    x = torch.randn(4, 40, 35, generator=torch.Generator().manual_seed(3)).double()
    token_mask, global_mask = BATCH.token_mask[:, :40], GLOBAL[:, :40]
    signs = torch.where(token_mask, 0.0, -1e4) + torch.where(global_mask & token_mask, 1e4, 0.0)

    def load(r: nn.Module) -> nn.Module:
        layer = LongformerAttention(35, 5, window=8).double()
        layer.out_proj = nn.Identity()  # in the reference it belongs to another module
        names = {"query": "q", "key": "k", "value": "v"}
        state = {}
        for name, p in r.state_dict().items():
            what, _, leaf = name.partition(".")
            which, _, end = what.partition("_")
            state[f"{names[which]}{'_global' if end else ''}_proj.{leaf}"] = p
        layer.load_state_dict(state)
        return layer

    def run_theirs(r: nn.Module, marked: bool) -> Tensor:
        mask = signs if marked else torch.where(token_mask, 0.0, -1e4)
        with in_full_precision():
            return r(
                x.clone(),
                attention_mask=mask,
                is_index_masked=mask < 0,
                is_index_global_attn=mask > 0,
                is_global_attn=marked,
            )[0]

    parity.check(
        load,
        reference,
        ours=lambda m: {
            "global": m(x, token_mask=token_mask, global_mask=global_mask)[token_mask],
            "window": m(x, token_mask=token_mask)[token_mask],
        },
        theirs=lambda r: {
            "global": run_theirs(r, True)[token_mask],
            "window": run_theirs(r, False)[token_mask],
        },
        zero_gradient=[K_BIAS],
    )


@parity_row("longformer", "encoder and pooler", "transformers.LongformerModel", page="sparse-longformer")
def test_encoder_and_pooler(parity):
    def named(hidden: Tensor, pooled: Tensor) -> dict[str, Tensor]:
        return {"hidden": BATCH.real(hidden), "pooled": pooled}

    def run_ours(m: Longformer) -> dict[str, Tensor]:
        hidden = ours(m, GLOBAL, segments=BATCH.segments)
        return named(hidden, m.pool(hidden))

    def run_theirs(r: transformers.LongformerModel) -> dict[str, Tensor]:
        out = theirs(r, GLOBAL, token_type_ids=BATCH.segments)
        return named(out.last_hidden_state, out.pooler_output)

    reference = build("LongformerModel")
    parity.check(Longformer.from_hf, reference, ours=run_ours, theirs=run_theirs, zero_gradient=[K_BIAS])


@parity_row(
    "longformer", "masked language model", "transformers.LongformerForMaskedLM", page="sparse-longformer"
)
def test_masked_language_model(parity):
    parity.check(
        LongformerForMaskedLM.from_hf,
        build("LongformerForMaskedLM"),
        ours=lambda m: {str(g is None): BATCH.real(ours(m, g)) for g in (GLOBAL, None)},
        theirs=lambda r: {str(g is None): BATCH.real(theirs(r, g).logits) for g in (GLOBAL, None)},
        zero_gradient=[K_BIAS],
    )


@parity_row(
    "longformer",
    "sequence classification",
    "transformers.LongformerForSequenceClassification",
    page="sparse-longformer",
)
def test_sequence_classification(parity):
    """Without a mask both make the first token global."""
    parity.check(
        LongformerForSequenceClassification.from_hf,
        build("LongformerForSequenceClassification", num_labels=7),
        ours=lambda m: {"given": ours(m, GLOBAL), "first": ours(m, None)},
        theirs=lambda r: {"given": theirs(r, GLOBAL).logits, "first": theirs(r, None).logits},
        zero_gradient=[K_BIAS],
    )


@pytest.mark.parametrize(("ours_class", "theirs_class"), HEADS, ids=lambda x: x if isinstance(x, str) else "")
def test_weights_load_strictly_both_ways(ours_class, theirs_class):
    config = transformers.LongformerConfig(**copy.deepcopy(SIZES))
    check_loading(
        ours_class.from_hf, lambda: getattr(transformers, theirs_class)(config), tied=ours_class.hf_tied
    )


def test_a_saved_model_reads_again(tmp_path):
    model = LongformerForMaskedLM.from_hf(build("LongformerForMaskedLM"))
    model.save_pretrained(tmp_path)
    again = LongformerForMaskedLM.from_pretrained(tmp_path)
    assert again.config == model.config == LongformerConfig(
        vocab_size=97, d_model=35, num_layers=3, num_heads=5, d_ff=53, max_seq_len=41, norm_eps=1e-2,
        dropout=0.07, attn_dropout=0.03, num_segments=3, pad_id=PAD, windows=(4, 12, 6),
    )  # fmt: skip
    assert torch.equal(ours(again, GLOBAL), ours(model, GLOBAL))
    reference = transformers.LongformerForMaskedLM.from_pretrained(tmp_path).double().eval()
    torch.testing.assert_close(BATCH.real(theirs(reference, GLOBAL).logits), BATCH.real(ours(model, GLOBAL)))


def test_one_window_stands_for_all_layers():
    config = Longformer.config_from_hf({**SIZES, "attention_window": 8})
    assert config.windows == (8, 8, 8)
    assert LongformerConfig.longformer_base().num_positions == 4098


@pytest.mark.parametrize("size", ["longformer_base", "longformer_large"])
def test_parameters(size):
    config = getattr(LongformerConfig, size)()
    with torch.device("meta"):
        model = LongformerForMaskedLM(config)
        written = model.config_to_hf()
        written.pop("architectures")
        reference = transformers.LongformerForMaskedLM(transformers.LongformerConfig(**written))
    counts = {sum(p.numel() for p in m.parameters()) for m in (model, reference)}
    assert counts == {config.num_parameters()}


@pytest.mark.parametrize("marked", [0, 1, 3])
def test_operations(marked, monkeypatch):
    """By torch's counter, which does not know every attention kernel: so the global rows are written out."""
    monkeypatch.setattr(longformer, "fused_attention", lambda q, k, v, m, **kw: attention(q, k, v, m)[0])
    config = LongformerConfig(
        vocab_size=97, d_model=35, num_layers=3, num_heads=5, d_ff=53, max_seq_len=72, windows=(8, 24, 12)
    )
    model = LongformerForMaskedLM(config).eval().requires_grad_(False)
    with FlopCounterMode(display=False) as counter:
        model(torch.ones(1, 72).long(), global_mask=torch.arange(72)[None] < marked)
    assert counter.get_total_flops() == config.flops(72, num_global=marked)
    with pytest.raises(ValueError, match=r"T: expected 1 to 72 tokens \(max_seq_len\), got 73"):
        config.flops(73)


# ------------------------------------------------------------------------------------------------
# A longer RoBERTa


ROBERTA = RobertaConfig(
    vocab_size=97, d_model=35, num_layers=3, num_heads=5, d_ff=53, max_seq_len=17, norm_eps=1e-2, pad_id=PAD
)


def test_a_roberta_made_longer_computes_the_same_in_a_wide_window():
    """Until a text is longer than RoBERTa's positions, nothing has changed, global tokens or not."""
    roberta = loud_(Roberta(ROBERTA)).double().eval()
    longer = Longformer.from_roberta(roberta, max_seq_len=41, window=34)
    tokens, token_mask = BATCH.tokens[:, :17], BATCH.token_mask[:, :17]
    want = roberta(tokens, token_mask=token_mask)[token_mask]
    for marked in (None, GLOBAL[:, :17]):
        got = longer(tokens, token_mask=token_mask, global_mask=marked)[token_mask]
        torch.testing.assert_close(got, want, atol=1e-10, rtol=1e-10)
    narrow = Longformer.from_roberta(roberta, max_seq_len=41, window=4)
    assert not torch.allclose(narrow(tokens, token_mask=token_mask)[token_mask], want)


def test_positions_are_copied_one_after_the_other_behind_those_of_padding():
    roberta = Roberta(ROBERTA)
    rows = torch.arange(22.0)[:, None].expand(22, 35)
    roberta.pos_embed.weight.data.copy_(rows)
    table = Longformer.from_roberta(roberta, max_seq_len=41, window=4).pos_embed.weight[:, 0].tolist()
    real = list(range(PAD + 1, 22))
    assert table == [*range(PAD + 1), *real, *real, *real[:7]]
    with pytest.raises(ValueError, match="max_seq_len: expected at least 17, RoBERTa's, got 16"):
        Longformer.from_roberta(roberta, max_seq_len=16, window=4)


def test_padding_and_the_length_of_the_batch_change_nothing():
    model = Longformer.from_hf(build("LongformerModel"))
    together = ours(model, GLOBAL)
    noise = BATCH.tokens.masked_fill(~BATCH.token_mask, 96)
    other = model(noise, token_mask=BATCH.token_mask, global_mask=GLOBAL)
    for row, mask in enumerate(BATCH.token_mask):
        alone = model(BATCH.tokens[row][mask][None], global_mask=GLOBAL[row][mask][None])
        torch.testing.assert_close(together[row][mask], alone[0], atol=1e-10, rtol=1e-10)
        torch.testing.assert_close(other[row][mask], alone[0], atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m: m(BATCH.tokens, global_mask=GLOBAL.long()), TypeError, "global_mask: expected a bool"),
        (lambda m: m(BATCH.tokens, global_mask=GLOBAL[:, :9]), ValueError, "global_mask: expected shape"),
        (lambda m: m(torch.ones(1, 42).long()), ValueError, "tokens: expected 1 to 41 positions"),
        (lambda m: LongformerConfig(num_layers=3), ValueError, "windows: expected one for each of 3 layers"),
        (
            lambda m: Longformer(LongformerConfig(num_layers=1, windows=(7,))),
            ValueError,
            "window: expected a positive even number, half of it for either side, got 7",
        ),
    ],
)
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call(Longformer.from_hf(build("LongformerModel")))


# ------------------------------------------------------------------------------------------------
# Planted bugs


def shared_projections(model: Longformer, mp: pytest.MonkeyPatch) -> None:
    for block in model.blocks:
        for x in "qkv":
            mp.setitem(block.attn._modules, f"{x}_global_proj", getattr(block.attn, f"{x}_proj"))


def one_window_for_all(model: Longformer, mp: pytest.MonkeyPatch) -> None:
    for block in model.blocks:
        mp.setattr(block.attn, "window", 12)


def whole_windows_on_either_side(model: Longformer, mp: pytest.MonkeyPatch) -> None:
    for block in model.blocks:
        mp.setattr(block.attn, "window", 2 * block.attn.window)


def no_global_tokens(model: Longformer, mp: pytest.MonkeyPatch) -> None:
    for block in model.blocks:
        forward = block.attn.forward
        mp.setattr(block.attn, "forward", lambda x, forward=forward, global_mask=None, **kw: forward(x, **kw))


def padding_is_seen(model: Longformer, mp: pytest.MonkeyPatch) -> None:
    for block in model.blocks:
        forward = block.attn.forward
        mp.setattr(block.attn, "forward", lambda x, forward=forward, token_mask=None, **kw: forward(x, **kw))


def positions_of_bert(model: Longformer, mp: pytest.MonkeyPatch) -> None:
    mp.setattr(model, "positions", lambda T, mask: model.pos_embed(T))


@pytest.mark.parametrize(
    "plant",
    [
        None,
        shared_projections,
        one_window_for_all,
        whole_windows_on_either_side,
        no_global_tokens,
        padding_is_seen,
        positions_of_bert,
    ],
)
def test_a_planted_bug_is_caught(plant):
    @contextmanager
    def mutate(model: Longformer) -> Iterator[None]:
        with pytest.MonkeyPatch.context() as mp:
            if plant:
                plant(model, mp)
            yield

    def judge() -> None:
        compare(
            Longformer.from_hf,
            build("LongformerModel"),
            ours=lambda m: {"hidden": BATCH.real(ours(m, GLOBAL))},
            theirs=lambda r: {"hidden": BATCH.real(theirs(r, GLOBAL).last_hidden_state)},
            tolerance_backward=None,
            mutate=mutate,
        )

    if plant is None:
        judge()
        return
    with pytest.raises(ParityError) as caught:
        judge()
    assert 1e-3 < caught.value.error < float("inf")
