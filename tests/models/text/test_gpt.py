"""GPT computes what transformers' GPT-1, GPT-2 and GPT-Neo compute: every head, every gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from parity import Batch, check_loading, loud_, parity_row, ragged_batch
from torch import Tensor, nn
from transformers.models.gpt_neo import modeling_gpt_neo

from textbook_code.layers.positions import token_positions
from textbook_code.models.text.gpt import (
    Gpt,
    GptConfig,
    GptForCausalLM,
    GptForSequenceClassification,
    finetuning_loss,
)
from textbook_code.weights import rename

K_BIAS = r".*\.k_proj\.bias"  # shifts all scores of a query alike, and softmax does not see it
V, T = 97, 39
COMMON = {
    "vocab_size": V,
    "n_positions": 41,
    "n_embd": 35,
    "n_layer": 3,
    "n_head": 5,
    "resid_pdrop": 0.07,
    "embd_pdrop": 0.03,
    "attn_pdrop": 0.05,
    "layer_norm_epsilon": 1e-2,
    "initializer_range": 0.05,
    "pad_token_id": 0,
}
RIGHT = ragged_batch(V, (37, 23, 32, 3), max_len=T)
LEFT = Batch(RIGHT.tokens.flip(1), RIGHT.token_mask.flip(1), RIGHT.segments)
ATTENTIONS = {"openai-gpt": ["eager"], "gpt2": ["eager", "sdpa"]}  # GPT-1's reference has the first only
PADDINGS = {"right": RIGHT, "left": LEFT}


def reference_config(family: str, **changes: Any) -> transformers.PreTrainedConfig:
    if family == "openai-gpt":
        return transformers.OpenAIGPTConfig(**{**COMMON, **changes})
    return transformers.GPT2Config(**{**COMMON, "n_inner": 53, **changes})


def build(family: str, head: str, **changes: Any) -> transformers.PreTrainedModel:
    """The reference, tiny, loud and in float64."""
    name = {"openai-gpt": "OpenAIGPT", "gpt2": "GPT2"}[family] + head
    return loud_(getattr(transformers, name)(reference_config(family, **changes))).double()


def theirs(model, batch: Batch, **kw):
    """The reference does not look for the padding's side by itself: it is told the positions."""
    return model(
        batch.tokens,
        attention_mask=batch.token_mask.long(),
        position_ids=token_positions(batch.token_mask),
        **kw,
    )


def check_both(parity, family: str, head: str, load, ours, run_theirs, **changes: Any) -> None:
    """Both of the reference's attentions, padding on both sides."""
    for attention in ATTENTIONS[family]:
        for batch in PADDINGS.values():
            parity.check(
                load,
                build(family, head, attn_implementation=attention, **changes),
                ours=lambda m, batch=batch: ours(m, batch),
                theirs=lambda r, batch=batch: run_theirs(r, batch),
                zero_gradient=[K_BIAS],
            )


def hidden(m: Gpt, batch: Batch) -> dict[str, Tensor]:
    return {"hidden": batch.real(m(batch.tokens, token_mask=batch.token_mask))}


def their_hidden(r, batch: Batch) -> dict[str, Tensor]:
    return {"hidden": batch.real(theirs(r, batch).last_hidden_state)}


def logits(m, batch: Batch) -> dict[str, Tensor]:
    return {"logits": batch.real(m(batch.tokens, token_mask=batch.token_mask))}


def their_logits(r, batch: Batch) -> dict[str, Tensor]:
    return {"logits": batch.real(theirs(r, batch).logits)}


def classes(m, batch: Batch) -> dict[str, Tensor]:
    return {"logits": m(batch.tokens, token_mask=batch.token_mask)}


def their_classes(r, batch: Batch) -> dict[str, Tensor]:
    return {"logits": theirs(r, batch).logits}


@parity_row("gpt-1", "decoder", "transformers.OpenAIGPTModel", page="gpt-model")
def test_gpt1_decoder(parity):
    check_both(parity, "openai-gpt", "Model", Gpt.from_hf, hidden, their_hidden)


@parity_row("gpt-1", "language model", "transformers.OpenAIGPTLMHeadModel", page="gpt-model")
def test_gpt1_language_model(parity):
    check_both(parity, "openai-gpt", "LMHeadModel", GptForCausalLM.from_hf, logits, their_logits)


@parity_row(
    "gpt-1", "sequence classification", "transformers.OpenAIGPTForSequenceClassification", page="gpt-finetune"
)
def test_gpt1_sequence_classification(parity):
    load = GptForSequenceClassification.from_hf
    check_both(parity, "openai-gpt", "ForSequenceClassification", load, classes, their_classes, num_labels=7)


@parity_row("gpt-2", "decoder", "transformers.GPT2Model", page="gpt-pre-norm")
def test_gpt2_decoder(parity):
    check_both(parity, "gpt2", "Model", Gpt.from_hf, hidden, their_hidden)


@parity_row("gpt-2", "language model", "transformers.GPT2LMHeadModel", page="gpt-pre-norm")
def test_gpt2_language_model(parity):
    check_both(parity, "gpt2", "LMHeadModel", GptForCausalLM.from_hf, logits, their_logits)


@parity_row(
    "gpt-2", "sequence classification", "transformers.GPT2ForSequenceClassification", page="gpt-finetune"
)
def test_gpt2_sequence_classification(parity):
    load = GptForSequenceClassification.from_hf
    check_both(parity, "gpt2", "ForSequenceClassification", load, classes, their_classes, num_labels=7)


@parity_row("gpt-2", "attention weights", "transformers.GPT2Model", page="gpt-induction")
def test_gpt2_attention_weights(parity):
    """The written-out path, through the whole model: every head's weights."""

    def named(x: Tensor, weights: list[Tensor]) -> dict[str, Tensor]:
        assert len(weights) == 3
        maps = {f"weights.{i}": RIGHT.real(w.transpose(1, 2)) for i, w in enumerate(weights)}  # (N, H, S)
        return {"hidden": RIGHT.real(x), **maps}

    def run_theirs(r):
        out = theirs(r, RIGHT, output_attentions=True)
        return named(out.last_hidden_state, out.attentions)

    parity.check(
        Gpt.from_hf,
        build("gpt2", "Model", attn_implementation="eager"),
        ours=lambda m: named(*m(RIGHT.tokens, token_mask=RIGHT.token_mask, need_weights=True)),
        theirs=run_theirs,
        zero_gradient=[K_BIAS],
    )


# ------------------------------------------------------------------------------------------------
# Fine-tuning


@parity_row("gpt-1", "fine-tuning loss", "transformers.OpenAIGPTDoubleHeadsModel", page="gpt-finetune")
def test_gpt1_finetuning_loss(parity):
    """Two questions with two answers each; the right answer's score and the language model's loss.

    The reference compares the candidates of one question, so our scores are laid out likewise; its
    loss of the language model and of the choice are added by λ = 0.5 as in the paper.
    """
    tokens = torch.cat([RIGHT.tokens[:, :23]] * 2)[:4]  # (2 questions · 2 answers, T), no padding inside
    tokens = torch.where(tokens == 0, torch.tensor(5), tokens)
    right = torch.tensor([1, 0])

    def ours(m: GptForSequenceClassification) -> dict[str, Tensor]:
        # the loss of two classes is the loss of two candidates: put the candidates' scores side by side
        scores = m(tokens).view(2, 2)
        # with one class the task's term is 0, so what is left is λ times the language model's
        helper = finetuning_loss(m, tokens, torch.zeros(4, dtype=torch.long), lm_weight=0.5)
        return {"loss": nn.functional.cross_entropy(scores, right) + helper, "scores": centred(scores)}

    def theirs(r: transformers.OpenAIGPTDoubleHeadsModel) -> dict[str, Tensor]:
        out = r(tokens.view(2, 2, 23), labels=tokens.view(2, 2, 23), mc_labels=right)
        return {"loss": out.mc_loss + 0.5 * out.loss, "scores": centred(out.mc_logits)}

    def centred(scores: Tensor) -> Tensor:
        """Less their mean: softmax does not see it, and their bias, which we leave out, is part of it."""
        return scores - scores.mean(1, keepdim=True)

    reference = build("openai-gpt", "DoubleHeadsModel")
    assert reference.multiple_choice_head.summary.bias.item() != 0
    parity.check(
        GptForSequenceClassification.from_hf, reference, ours=ours, theirs=theirs, zero_gradient=[K_BIAS]
    )


def test_the_finetuning_loss_counts_real_tokens_only():
    """Against the sum written out, row by row without padding; λ = 0 leaves the task."""
    model = loud_(GptForSequenceClassification(tiny(), num_classes=3)).double().eval()
    labels = torch.tensor([2, 0, 1, 2])
    for batch in PADDINGS.values():
        task = nn.functional.cross_entropy(model(batch.tokens, token_mask=batch.token_mask), labels)
        losses = []
        for row, real in zip(batch.tokens, batch.token_mask, strict=True):
            text = row[real][None]
            scores = model.gpt.token_embed.attend(model.gpt(text)).log_softmax(-1)
            losses += [-scores[0, t, text[0, t + 1]] for t in range(text.size(1) - 1)]
        for weight in (0.5, 2.0):
            got = finetuning_loss(model, batch.tokens, labels, token_mask=batch.token_mask, lm_weight=weight)
            torch.testing.assert_close(got, task + weight * torch.stack(losses).mean())
        got = finetuning_loss(model, batch.tokens, labels, token_mask=batch.token_mask, lm_weight=0)
        torch.testing.assert_close(got, task)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"labels": torch.zeros(4)}, TypeError, "labels: expected a tensor of integer ids"),
        (
            {"labels": torch.zeros(3, dtype=torch.long)},
            ValueError,
            r"labels: expected shape \(B\) with B = 4",
        ),
        ({"lm_weight": -0.5}, ValueError, "lm_weight: expected 0 or more, got -0.5"),
    ],
)
def test_the_finetuning_loss_refuses(change, error, message):
    model = GptForSequenceClassification(tiny())
    good = {"labels": torch.zeros(4, dtype=torch.long), "lm_weight": 0.5}
    with pytest.raises(error, match=message):
        finetuning_loss(model, RIGHT.tokens, **{**good, **change})


# ------------------------------------------------------------------------------------------------
# GPT-3: GPT-Neo is the open model with its bands


class DoublePrecision:
    """torch, whose float32 is float64: GPT-Neo computes its scores in float32 whatever the model's dtype."""

    float32 = torch.float64

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


NEO_RULES = (
    ("transformer.wte.weight", "gpt.token_embed.weight"),
    ("transformer.wpe.weight", "gpt.pos_embed.weight"),
    ("transformer.h.{i}.ln_1.{p}", "gpt.blocks.{i}.attn_norm.{p}"),
    ("transformer.h.{i}.attn.attention.{proj}.{p}", "gpt.blocks.{i}.attn.{proj}.{p}"),
    ("transformer.h.{i}.ln_2.{p}", "gpt.blocks.{i}.ffn_norm.{p}"),
    ("transformer.h.{i}.mlp.c_fc.{p}", "gpt.blocks.{i}.ffn.fc1.{p}"),
    ("transformer.h.{i}.mlp.c_proj.{p}", "gpt.blocks.{i}.ffn.fc2.{p}"),
    ("transformer.ln_f.{p}", "gpt.final_norm.{p}"),
)


def gpt3_from_neo(neo: transformers.GPTNeoForCausalLM) -> GptForCausalLM:
    """GPT-Neo does not scale its scores and has no biases on q, k, v: both are taken from our GPT-3."""
    config = neo.config
    model = GptForCausalLM(
        GptConfig(
            vocab_size=config.vocab_size,
            d_model=config.hidden_size,
            num_layers=config.num_layers,
            num_heads=config.num_heads,
            d_ff=config.intermediate_size,
            max_seq_len=config.max_position_embeddings,
            window=config.window_size,
            norm_eps=config.layer_norm_epsilon,
        )
    ).double()
    for block in model.gpt.blocks:
        block.attn.scale = 1.0
        for projection in (block.attn.q_proj, block.attn.k_proj, block.attn.v_proj):
            projection.bias = None
    tied = {"lm_head.weight": "transformer.wte.weight"}
    model.load_state_dict(rename(neo.state_dict(), NEO_RULES, expected=model.state_dict(), tied=tied))
    return model


@parity_row("gpt-3", "language model", "transformers.GPTNeoForCausalLM", page="gpt-banded")
def test_gpt3_language_model(parity, monkeypatch):
    """Bands of 1, of 7 and wider than the text, in every second of five layers."""
    monkeypatch.setattr(modeling_gpt_neo, "torch", DoublePrecision())
    for window in (1, 7, 40):
        config = transformers.GPTNeoConfig(
            vocab_size=V,
            max_position_embeddings=41,
            hidden_size=35,
            num_layers=5,
            attention_types=[[["global", "local"], 2], [["global"], 1]],
            num_heads=5,
            intermediate_size=53,
            window_size=window,
            layer_norm_epsilon=1e-2,
            attn_implementation="eager",
        )
        for batch in PADDINGS.values():
            parity.check(
                gpt3_from_neo,
                loud_(transformers.GPTNeoForCausalLM(config)).double(),
                ours=lambda m, batch=batch: logits(m, batch),
                theirs=lambda r, batch=batch: their_logits(r, batch),
                # a token that sees itself alone has weight 1, whatever its query and its key
                zero_gradient=[r".*blocks\.[13]\.attn\.[qk]_proj\.weight"] if window == 1 else [],
            )


# ------------------------------------------------------------------------------------------------
# Weights


def tiny(**changes: Any) -> GptConfig:
    sizes: dict[str, Any] = {
        "vocab_size": V,
        "d_model": 35,
        "num_layers": 3,
        "num_heads": 5,
        "d_ff": 53,
        "max_seq_len": 41,
        "norm_eps": 1e-2,
    }
    return GptConfig(**{**sizes, **changes})


LOADED = [
    (family, ours, head)
    for family in ("openai-gpt", "gpt2")
    for ours, head in (
        (Gpt, "Model"),
        (GptForCausalLM, "LMHeadModel"),
        (GptForSequenceClassification, "ForSequenceClassification"),
    )
]


@pytest.mark.parametrize(("family", "ours", "head"), LOADED)
def test_weights_load_strictly_both_ways(family, ours, head):
    name = {"openai-gpt": "OpenAIGPT", "gpt2": "GPT2"}[family] + head
    tied = ("lm_head.weight",) if head == "LMHeadModel" else ()
    check_loading(ours.from_hf, lambda: getattr(transformers, name)(reference_config(family)), tied=tied)


@pytest.mark.parametrize(("family", "ours", "head"), LOADED)
def test_the_reference_reads_what_we_save(family, ours, head, tmp_path):
    name = {"openai-gpt": "OpenAIGPT", "gpt2": "GPT2"}[family] + head
    changes = {"num_labels": 7} if ours is GptForSequenceClassification else {}
    model = ours.from_hf(build(family, head, **changes))
    model.save_pretrained(tmp_path)
    reference = getattr(transformers, name).from_pretrained(tmp_path, dtype=torch.float64, pad_token_id=0)
    want = (their_hidden if head == "Model" else their_logits if head == "LMHeadModel" else their_classes)(
        reference.eval(), RIGHT
    )
    got = (hidden if head == "Model" else logits if head == "LMHeadModel" else classes)(model, RIGHT)
    for key in want:
        torch.testing.assert_close(got[key], want[key], atol=1e-10, rtol=1e-10)
    again = ours.from_pretrained(tmp_path)
    assert again.config == model.config
    state = model.state_dict()
    assert all(torch.equal(x, state[key]) for key, x in again.state_dict().items())


@pytest.mark.parametrize("ours", [Gpt, GptForCausalLM])
@pytest.mark.parametrize("family", ["openai-gpt", "gpt2"])
def test_a_released_checkpoint_without_prefix_and_with_its_masks_is_read(family, ours):
    """The released files hold the decoder by itself, and each layer's causal mask."""
    reference = build(family, "Model")
    state = dict(reference.state_dict())
    for i in range(3):
        state[f"h.{i}.attn.bias"] = torch.ones(41, 41).tril()[None, None].double()
    model = ours.from_hf_config(reference.config.to_dict()).load_hf_state_dict(state).eval()
    body = model if ours is Gpt else model.gpt
    want = their_hidden(reference.eval(), RIGHT)["hidden"]
    torch.testing.assert_close(hidden(body, RIGHT)["hidden"], want, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize(
    "config",
    [
        tiny(window=7),
        tiny(head_dim=11, window=7),
        tiny(pre_norm=False, window=7),
        tiny(pre_norm=False),
        tiny(),
        tiny(pre_norm=False, d_ff=140),
    ],
    ids=["band", "wide heads", "post-norm with a band", "post-norm of another width", "gpt-2", "gpt-1"],
)
def test_every_config_comes_back(config, tmp_path):
    """Also those that nobody published; no GPT-2 reader takes them for a GPT-2."""
    model = loud_(GptForCausalLM(config)).eval()
    model.save_pretrained(tmp_path)
    again = GptForCausalLM.from_pretrained(tmp_path)
    assert again.config == config or again.config == GptConfig(**{**vars(config), "head_dim": None})
    torch.testing.assert_close(again(RIGHT.tokens), model(RIGHT.tokens), atol=0, rtol=0)
    published = config in (tiny(), tiny(pre_norm=False, d_ff=140))
    if not published:
        with pytest.raises(ValueError, match="textbook-gpt"):
            transformers.AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("theirs_config", "message"),
    [
        (transformers.BertConfig().to_dict(), "model_type to be one of .*'gpt2'.* got 'bert'"),
        (transformers.LlamaConfig().to_dict(), "got 'llama'"),
        ({"vocab_size": 97}, "got None"),
        (reference_config("gpt2", activation_function="relu").to_dict(), "activation_function = 'gelu_new'"),
        (
            reference_config("gpt2", scale_attn_by_inverse_layer_idx=True).to_dict(),
            "inverse_layer_idx = False",
        ),
        (reference_config("gpt2", tie_word_embeddings=False).to_dict(), "tie_word_embeddings = True"),
        (reference_config("openai-gpt", afn="relu").to_dict(), "afn = 'gelu'"),
        ({"model_type": "gpt2", "n_embd": 35}, r"fields \['vocab_size', 'n_layer'"),
    ],
)
def test_another_architecture_is_refused(theirs_config, message):
    with pytest.raises(ValueError, match=message):
        GptForCausalLM.config_from_hf(theirs_config)
