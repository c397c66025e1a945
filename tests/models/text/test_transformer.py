"""The first Transformer computes what Marian and torch's own Transformer compute."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import transformers
from parity import ParityError, check_loading, compare, loud_, parity_row, ragged_batch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from textbook_code.layers import attention as attention_module
from textbook_code.layers.positions import SinusoidalPositions
from textbook_code.models.text import transformer as module
from textbook_code.models.text.transformer import TransformerConfig, TransformerForConditionalGeneration
from textbook_code.weights import WeightError

MARIAN = {
    "vocab_size": 97,
    "d_model": 30,
    "encoder_layers": 2,
    "decoder_layers": 3,
    "encoder_attention_heads": 5,
    "decoder_attention_heads": 5,
    "encoder_ffn_dim": 53,
    "decoder_ffn_dim": 53,
    "max_position_embeddings": 41,
    "activation_function": "relu",
    "scale_embedding": True,
    "pad_token_id": 96,
    "eos_token_id": 7,
    "decoder_start_token_id": 96,
    "dropout": 0.07,
    "attention_dropout": 0.03,
    "activation_dropout": 0.02,
}
SOURCE = ragged_batch(97, (37, 23, 32, 3), max_len=39, pad_id=96)
TARGET = ragged_batch(97, (5, 33, 21, 34), max_len=35, pad_id=96, seed=2)
K_BIAS = r".*\.k_proj\.bias"  # shifts all scores of a query alike, and softmax does not see it


def marian(attention: str = "eager", **changes: Any) -> transformers.MarianMTModel:
    """The reference, tiny and loud in all but its waves, which are no weights."""
    model = transformers.MarianMTModel(
        transformers.MarianConfig(**{**MARIAN, **changes}, attn_implementation=attention)
    )
    tables = [half.embed_positions.weight for half in (model.model.encoder, model.model.decoder)]
    waves = [table.clone() for table in tables]
    loud_(model)
    for table, wave in zip(tables, waves, strict=True):
        table.data.copy_(wave)
    z = torch.randn(model.final_logits_bias.shape, generator=torch.Generator().manual_seed(3))
    model.final_logits_bias.copy_(z)
    return model


def in_double(attention: str = "eager") -> transformers.MarianMTModel:
    """In float64, with the waves computed there and not rounded to float32 first."""
    model = marian(attention).double()
    waves = SinusoidalPositions(41, 30, halves=True)
    t, i = torch.arange(41.0, dtype=torch.float64)[:, None], torch.arange(0, 30, 2, dtype=torch.float64)
    angle = t / 10000 ** (i / 30)
    exact = torch.cat([angle.sin(), angle.cos()], dim=1)
    for half in (model.model.encoder, model.model.decoder):
        torch.testing.assert_close(half.embed_positions.weight.float(), waves.weight)
        half.embed_positions.weight.data.copy_(exact)
    return model


def load(reference: nn.Module) -> TransformerForConditionalGeneration:
    model = TransformerForConditionalGeneration.from_hf(reference)
    if model.token_embed.weight.dtype == torch.float64:  # ours too
        torch.set_default_dtype(torch.float64)
        try:
            model.pos_embed = SinusoidalPositions(41, 30, halves=True)
        finally:
            torch.set_default_dtype(torch.float32)
    return model


def ours(m: TransformerForConditionalGeneration) -> dict[str, Tensor]:
    context = m.encode(SOURCE.tokens, token_mask=SOURCE.token_mask)
    logits = m(SOURCE.tokens, TARGET.tokens, token_mask=SOURCE.token_mask, target_mask=TARGET.token_mask)
    return {"context": SOURCE.real(context), "logits": TARGET.real(logits)}


def theirs(r: transformers.MarianMTModel) -> dict[str, Tensor]:
    out = r(
        SOURCE.tokens,
        attention_mask=SOURCE.token_mask.long(),
        decoder_input_ids=TARGET.tokens,
        decoder_attention_mask=TARGET.token_mask.long(),
        use_cache=False,
    )
    return {"context": SOURCE.real(out.encoder_last_hidden_state), "logits": TARGET.real(out.logits)}


@parity_row("transformer", "translation", "transformers.MarianMTModel", page="encoder-decoder-original")
def test_translation(parity):
    for attention in ("eager", "sdpa"):
        parity.check(load, in_double(attention), ours=ours, theirs=theirs, zero_gradient=[K_BIAS])


def torch_transformer() -> nn.Transformer:
    """torch's two stacks, without the norm that it puts behind each."""
    sizes = {"d_model": 30, "nhead": 5, "dim_feedforward": 53, "layer_norm_eps": 1e-2, "batch_first": True}
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(**sizes), 2, norm=None)
    decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(**sizes), 3, norm=None)
    return loud_(
        nn.Transformer(d_model=30, nhead=5, custom_encoder=encoder, custom_decoder=decoder, batch_first=True)
    ).double()


def load_torch(reference: nn.Transformer) -> nn.Module:
    config = TransformerConfig(
        vocab_size=11, d_model=30, num_layers=2, num_decoder_layers=3, num_heads=5, d_ff=53, norm_eps=1e-2
    )
    full = TransformerForConditionalGeneration(config).double()
    model = nn.ModuleDict({"encoder": full.encoder, "decoder": full.decoder})
    names = {"linear1.": "ffn.fc1.", "linear2.": "ffn.fc2.", "out_proj": "out_proj"}
    state = {}
    for half, norms in (
        ("encoder", {"norm1": "attn_norm", "norm2": "ffn_norm"}),
        ("decoder", {"norm1": "attn_norm", "norm2": "cross_norm", "norm3": "ffn_norm"}),
    ):
        for key, value in getattr(reference, half).state_dict().items():
            key = (
                key.removeprefix("layers.")
                .replace("multihead_attn", "cross_attn")
                .replace("self_attn", "attn")
            )
            for old, new in (*names.items(), *norms.items()):
                key = key.replace(old, new)
            if "in_proj_" in key:
                parts = zip(("q_proj.", "k_proj.", "v_proj."), value.chunk(3), strict=True)
                state |= {f"{half}.{key.replace('in_proj_', name)}": part for name, part in parts}
            else:
                state[f"{half}.{key}"] = value
    model.load_state_dict(state)
    return model


@parity_row("transformer", "both stacks", "torch.nn.Transformer", page="encoder-decoder-original")
def test_both_stacks_against_torch(parity):
    generator = torch.Generator().manual_seed(5)
    source = torch.randn(4, 39, 30, generator=generator, dtype=torch.float64)
    target = torch.randn(4, 35, 30, generator=generator, dtype=torch.float64)
    from textbook_code.layers.masks import key_mask

    def run_ours(m: Any) -> dict[str, Tensor]:
        context, y = source, target
        for block in m["encoder"]:
            context = block(context, attn_mask=key_mask(SOURCE.token_mask))
        for block in m["decoder"]:
            y = block(
                y, context, attn_mask=key_mask(TARGET.token_mask), cross_mask=key_mask(SOURCE.token_mask)
            )
        return {"context": SOURCE.real(context), "target": TARGET.real(y)}

    def run_theirs(r: nn.Transformer) -> dict[str, Tensor]:
        later = torch.ones(35, 35).triu(1).bool()  # torch's masks: True = may not attend
        context = r.encoder(source, src_key_padding_mask=~SOURCE.token_mask)
        y = r.decoder(
            target,
            context,
            tgt_mask=later,
            tgt_key_padding_mask=~TARGET.token_mask,
            memory_key_padding_mask=~SOURCE.token_mask,
        )
        return {"context": SOURCE.real(context), "target": TARGET.real(y)}

    parity.check(load_torch, torch_transformer(), ours=run_ours, theirs=run_theirs, zero_gradient=[K_BIAS])


def test_weights_load_strictly_both_ways():
    waves = [f"model.{half}.embed_positions.weight" for half in ("encoder", "decoder")]
    state = marian().state_dict()
    known = [name for name in (*TransformerForConditionalGeneration.hf_tied, *waves) if name in state]
    check_loading(TransformerForConditionalGeneration.from_hf, marian, tied=known)


# ------------------------------------------------------------------------------------------------
# Planted bugs

MUTATIONS: dict[str, Callable[[Any, pytest.MonkeyPatch], None]] = {}


def mutation(name: str) -> Callable[[Any], Any]:
    def register(plant: Any) -> Any:
        MUTATIONS[name] = plant
        return plant

    return register


@mutation("embeddings not scaled")
def _(model: Any, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(module.math, "sqrt", lambda _: 1.0)


@mutation("waves interleaved")
def _(model: Any, patch: pytest.MonkeyPatch) -> None:
    patch.setitem(model._modules, "pos_embed", SinusoidalPositions(41, 30).double())


@mutation("positions of the target start at 1")
def _(model: Any, patch: pytest.MonkeyPatch) -> None:
    embed = model.embed
    patch.setattr(model, "embed", lambda ids, start=0, name="tokens": embed(ids, start=int(name == "target")))


@mutation("gelu for relu")
def _(model: Any, patch: pytest.MonkeyPatch) -> None:
    for block in (*model.encoder, *model.decoder):
        patch.setattr(block.ffn, "activation", "gelu")


@mutation("no cross-attention in the last block")
def _(model: Any, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(model.decoder[-1].cross_attn, "forward", lambda x, *_, **__: torch.zeros_like(x))


@mutation("source mask forgotten")
def _(model: Any, patch: pytest.MonkeyPatch) -> None:
    forward = attention_module.Attention.forward

    def blind(self: Any, x: Tensor, context: Tensor | None = None, **kwargs: Any) -> Any:
        return forward(self, x, context, **{**kwargs, **({} if context is None else {"attn_mask": None})})

    patch.setattr(attention_module.Attention, "forward", blind)


@mutation("decoder not causal")
def _(model: Any, patch: pytest.MonkeyPatch) -> None:
    forward = attention_module.Attention.forward
    patch.setattr(
        attention_module.Attention,
        "forward",
        lambda self, *args, **kwargs: forward(self, *args, **{**kwargs, "causal": False}),
    )


@mutation("norms swapped")
def _(model: Any, patch: pytest.MonkeyPatch) -> None:
    block = model.decoder[0]
    norms = block.attn_norm, block.cross_norm
    patch.setitem(block._modules, "attn_norm", norms[1])
    patch.setitem(block._modules, "cross_norm", norms[0])


@mutation("bias of the logits dropped")
def _(model: Any, patch: pytest.MonkeyPatch) -> None:
    patch.setitem(model._buffers, "logits_bias", torch.zeros_like(model.logits_bias))


@mutation("norm before instead of after")
def _(model: Any, patch: pytest.MonkeyPatch) -> None:
    def wrong(self: Any, x: Tensor, *, attn_mask: Tensor | None = None) -> Tensor:
        x = x + self.attn(self.attn_norm(x), attn_mask=attn_mask)
        return x + self.ffn(self.ffn_norm(x))

    patch.setattr(module.EncoderBlock, "forward", wrong)


@pytest.mark.parametrize("name", sorted(MUTATIONS))
def test_a_planted_bug_is_caught(name):
    @contextmanager
    def plant(model: Any):
        with pytest.MonkeyPatch.context() as patch:
            MUTATIONS[name](model, patch)
            yield

    with pytest.raises(ParityError):
        compare(
            load,
            in_double(),
            ours=ours,
            theirs=theirs,
            zero_gradient=[K_BIAS],
            tolerance_forward=1e-4,
            tolerance_backward=None,
            mutate=plant,
        )


# ------------------------------------------------------------------------------------------------
# Behaviour


@pytest.fixture(scope="module")
def model() -> TransformerForConditionalGeneration:
    return load(in_double())


@torch.no_grad()
def test_the_future_of_the_target_leaves_its_past_bit_equal(model):
    before = model(SOURCE.tokens, TARGET.tokens, token_mask=SOURCE.token_mask)
    changed = TARGET.tokens.clone()
    changed[:, 20] = (changed[:, 20] + 1) % 97
    after = model(SOURCE.tokens, changed, token_mask=SOURCE.token_mask)
    assert torch.equal(before[:, :20], after[:, :20])
    assert not torch.allclose(before[:, 20:], after[:, 20:])


@torch.no_grad()
@pytest.mark.parametrize("prefill", [1, 7])
def test_with_caches_as_without(model, prefill):
    want = model(SOURCE.tokens, TARGET.tokens, token_mask=SOURCE.token_mask)
    context = model.encode(SOURCE.tokens, token_mask=SOURCE.token_mask)
    caches = model.make_cache(4, 35, 39)
    pieces = [TARGET.tokens[:, :prefill], *TARGET.tokens[:, prefill:].split(1, dim=1)]
    got = [model.decode(piece, context, context_mask=SOURCE.token_mask, cache=caches) for piece in pieces]
    torch.testing.assert_close(torch.cat(got, dim=1), want)


@torch.no_grad()
def test_padding_of_the_source_changes_nothing(model):
    tokens, target = SOURCE.tokens[1:2, :23], TARGET.tokens[1:2]
    padded = torch.cat([tokens, torch.full((1, 9), 55)], dim=1)
    mask = torch.arange(32)[None] < 23
    torch.testing.assert_close(model(padded, target, token_mask=mask), model(tokens, target))


def test_saved_and_read_by_transformers(tmp_path):
    reference = marian().eval()
    model = TransformerForConditionalGeneration.from_hf(reference)
    model.save_pretrained(tmp_path)
    theirs_again = transformers.MarianMTModel.from_pretrained(tmp_path).eval()
    ours_again = TransformerForConditionalGeneration.from_pretrained(tmp_path)
    with torch.no_grad():
        want = theirs(reference)["logits"]
        torch.testing.assert_close(theirs(theirs_again)["logits"], want)
        torch.testing.assert_close(ours(ours_again)["logits"], want, atol=1e-4, rtol=1e-4)
    assert ours_again.config == model.config


@pytest.mark.parametrize("size", [TransformerConfig.base, TransformerConfig.big])
def test_parameters_and_operations_are_the_counted_ones(size, monkeypatch):
    config = size()
    with torch.device("meta"):
        model = TransformerForConditionalGeneration(config).eval()
    assert sum(p.numel() for p in model.parameters()) == config.num_parameters()
    S, T = 23, 17
    # the fused kernel is no product the counter knows on this device; written out, it is two
    monkeypatch.setattr(
        attention_module, "fused_attention", lambda *args, **kw: attention_module.attention(*args, **kw)[0]
    )
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, S, dtype=torch.long), torch.zeros(1, T, dtype=torch.long))
    assert counter.get_total_flops() == config.flops(S, T)


def test_initial_weights_by_their_statistics():
    model = TransformerForConditionalGeneration(TransformerConfig(vocab_size=5000, num_layers=1))
    weight = model.encoder[0].ffn.fc1.weight
    bound = math.sqrt(6 / (512 + 2048))
    assert float(weight.abs().max()) <= bound
    assert float(weight.std()) == pytest.approx(bound / math.sqrt(3), rel=0.01)
    assert float(model.token_embed.weight.std()) == pytest.approx(512**-0.5, rel=0.01)
    scaled = model.token_embed.weight * math.sqrt(512)
    assert float(scaled.std()) == pytest.approx(1, rel=0.01)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scale_embedding": False}, "needs scale_embedding = True"),
        ({"model_type": "bart"}, "needs model_type = 'marian'"),
        ({"activation_function": "tanh"}, "expected activation_function in"),
        ({"decoder_ffn_dim": 54}, "needs decoder_ffn_dim = encoder_ffn_dim = 53, got 54"),
    ],
)
def test_another_architecture_is_refused(change, message):
    theirs_config = {**transformers.MarianConfig(**MARIAN).to_dict(), **change}
    with pytest.raises(WeightError, match=message):
        TransformerForConditionalGeneration.from_hf_config(theirs_config)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m, ids: m.encode(ids[:, :0]), ValueError, "tokens: expected 1 to 41 positions"),
        (lambda m, ids: m.encode(ids.repeat(1, 9)), ValueError, "tokens: expected 1 to 41 positions"),
        (lambda m, ids: m.encode(ids.double()), TypeError, "tokens: expected a tensor of integer ids"),
        (lambda m, ids: m.encode(ids + 97), ValueError, "tokens: expected ids from 0 to 96"),
        (
            lambda m, ids: m.encode(ids, token_mask=ids > 1000),
            ValueError,
            "token_mask: expected a real token",
        ),
        (lambda m, ids: m(ids, ids + 97), ValueError, "target: expected ids from 0 to 96"),
        (lambda m, ids: m.decode(ids, torch.zeros(2, 5, 29)), ValueError, "context: expected shape"),
        (lambda m, ids: m.make_cache(2, 42, 5), ValueError, "max_seq_len: expected 1 to 41, got 42"),
        (
            lambda m, ids: m.decode(ids, m.encode(ids), cache=m.make_cache(2, 9, 5)[1:]),
            ValueError,
            "cache: expected 3 pairs",
        ),
        (
            lambda m, ids: m.decode(ids, m.encode(ids), num_logits=6),
            ValueError,
            "num_logits: expected 1 to 5",
        ),
    ],
)
def test_bad_input_is_named(model, call, error, message):
    with pytest.raises(error, match=message):
        call(model, torch.arange(10).view(2, 5))


def test_interleaved_waves_cannot_be_published(tmp_path):
    model = TransformerForConditionalGeneration(
        TransformerConfig(vocab_size=11, d_model=8, d_ff=8, num_heads=2)
    )
    with pytest.raises(WeightError, match="halves=True"):
        model.save_pretrained(tmp_path)
