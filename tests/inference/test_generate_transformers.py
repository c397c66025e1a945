"""Generation gives the tokens that transformers' `generate` gives, greedily and by beam search.

Tiny models with loud random weights, prompts of different lengths, stop tokens that are met.
"""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import transformers
from parity import Batch, loud_, ragged_batch
from references import bart_config, llama_config, padded_on_the_left
from t5_references import build as t5_reference
from torch import Tensor, nn

from textbook_code.inference.generate import generate
from textbook_code.models.text.bart import BartForConditionalGeneration
from textbook_code.models.text.gpt import GptForCausalLM
from textbook_code.models.text.llama import LlamaForCausalLM
from textbook_code.models.text.mt5 import Mt5ForConditionalGeneration
from textbook_code.models.text.t5 import T5ForConditionalGeneration

PAD, NEW = 3, 16


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(
        vocab_size=97, n_embd=36, n_head=4, n_layer=3, n_inner=53, n_positions=48, layer_norm_epsilon=1e-2
    )
    return loud_(transformers.GPT2LMHeadModel(config))


def llama() -> nn.Module:
    return loud_(transformers.LlamaForCausalLM(llama_config(max_position_embeddings=48)))


def bart() -> nn.Module:
    return loud_(transformers.BartForConditionalGeneration(bart_config(forced_eos_token_id=None)))


def varied_(model: Any) -> nn.Module:
    """Let the words vary: where the table is the output layer too, each word calls for itself.

    A last norm with weights of both signs ends that; in a decoder that ends in post-norm blocks, less weight
    on what stays the same from step to step does.
    """
    decoder = getattr(model, "transformer", None) or model.get_decoder()
    last = getattr(decoder, "ln_f", None) or getattr(decoder, "final_layer_norm", None)
    if last is not None:
        last.weight.data = torch.randn(last.weight.shape, generator=torch.Generator().manual_seed(1))
    elif model.config.is_encoder_decoder:
        for name, p in decoder.named_parameters():
            p.data *= 0 if name.endswith("bias") else 0.1 if "encoder_attn.out_proj" in name else 1
    return model


MODELS = {
    "gpt2": (GptForCausalLM, gpt2),
    "llama": (LlamaForCausalLM, llama),
    "t5": (T5ForConditionalGeneration, lambda: t5_reference("T5ForConditionalGeneration")),
    "t5 1.1": (
        T5ForConditionalGeneration,
        lambda: t5_reference("T5ForConditionalGeneration", version="1.1"),
    ),
    "mt5": (
        Mt5ForConditionalGeneration,
        lambda: t5_reference("MT5ForConditionalGeneration", version="1.1"),
    ),
    "bart": (BartForConditionalGeneration, bart),
}


@pytest.fixture(scope="module", params=MODELS)
def pair(request: pytest.FixtureRequest) -> tuple[nn.Module, Any, Batch]:
    """Ours, theirs, and a batch that both read: padded on the left, or for a source on the right."""
    ours, build = MODELS[request.param]
    reference = varied_(build()).double().eval()
    config = reference.config
    batch = ragged_batch(config.vocab_size, (11, 23, 2, 17), pad_id=PAD)
    if not config.is_encoder_decoder:
        batch = padded_on_the_left(batch)
    return ours.from_hf(reference), reference, batch


def theirs(reference: Any, batch: Batch, stop: list[int], **how: Any) -> Tensor:
    """Their new tokens (B, N); nothing of the model's own settings may interfere."""
    config = transformers.GenerationConfig(
        max_new_tokens=NEW,
        do_sample=False,
        pad_token_id=PAD,
        eos_token_id=stop or None,
        decoder_start_token_id=reference.config.decoder_start_token_id
        if reference.config.is_encoder_decoder
        else None,
        **how,
    )
    reference.generation_config = transformers.GenerationConfig()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        out = reference.generate(
            batch.tokens, attention_mask=batch.token_mask.long(), generation_config=config
        )
    return out[:, 1 if reference.config.is_encoder_decoder else batch.tokens.size(1) :]


def ours(model: nn.Module, batch: Batch, stop: list[int], **how: Any) -> Tensor:
    return generate(
        model,
        batch.tokens,
        token_mask=batch.token_mask,
        max_new_tokens=NEW,
        stop_tokens=stop,
        pad_id=PAD,
        **how,
    )


def stops(model: nn.Module, batch: Batch) -> list[int]:
    """Two tokens that the greedy texts come upon early, so that rows end at different times."""
    free = ours(model, batch, [])
    return sorted({int(free[0, 2]), int(free[1, 9])})


@pytest.mark.parametrize("use_cache", [True, False])
def test_the_same_greedy_tokens(pair, use_cache: bool) -> None:
    model, reference, batch = pair
    free = ours(model, batch, [], use_cache=use_cache)
    assert free.equal(theirs(reference, batch, []))
    assert free.unique().numel() >= 8, "the texts are varied enough to tell something"
    stop = stops(model, batch)
    got = ours(model, batch, stop, use_cache=use_cache)
    assert got.equal(theirs(reference, batch, stop, use_cache=use_cache))
    assert (got == PAD).any()
    assert not got.equal(free[:, : got.size(1)])


@pytest.mark.parametrize("num_beams", [3, 4])
@pytest.mark.parametrize("length_penalty", [0.7, 1.3])
def test_the_same_beams(pair, num_beams: int, length_penalty: float) -> None:
    model, reference, batch = pair
    how = {"num_beams": num_beams, "length_penalty": length_penalty}
    for stop in ([], stops(model, batch)):
        expected = theirs(reference, batch, stop, **how)
        assert ours(model, batch, stop, **how).equal(expected)
        assert ours(model, batch, stop, use_cache=False, **how).equal(expected)
