"""DistilBERT with real weights: a tagger of slips on 200 sentences from the news, against transformers and
against the ONNX graph that it was shipped as."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import cache

import torch
import transformers
from parity import parity_row
from torch import Tensor

from textbook_code.data.sources import fetch
from textbook_code.data.text import TextBatch, bbc_news, encode, load_tokenizer, sentences
from textbook_code.models.text.distilbert import DistilBertForTokenClassification

STEP = 25  # sentences of like length go through the model together
SLIPS = {  # confusions that its makers taught it
    "their": "there", "there": "their", "than": "then", "then": "than", "its": "it's", "it's": "its",
    "whether": "weather", "weather": "whether",
}  # fmt: skip
WORD = re.compile(r"\b(" + "|".join(SLIPS) + r")\b")


@cache
def real_sentences() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """100 sentences as they were printed, and 100 others with one word swapped for its confusion."""
    found = []
    for text, _ in bbc_news(fetch("bbc-news")):
        inside = [s for s in sentences(text)[1:] if 6 <= len(s.split()) <= 12 and WORD.search(s)]
        found += inside[:1]
    found = list(dict.fromkeys(found))  # some quotations are printed twice
    found = [found[i * len(found) // 200] for i in range(200)]
    assert len(set(found)) == 200
    slipped = [WORD.sub(lambda match: SLIPS[match[0]], s, count=1) for s in found[1::2]]
    return tuple(sorted(found[::2], key=len)), tuple(sorted(slipped, key=len))


@cache
def batches() -> tuple[TextBatch, ...]:
    tokenizer = load_tokenizer(fetch("distilbert-tagger"))
    texts = [text for group in real_sentences() for text in group]
    return tuple(encode(tokenizer, texts[i : i + STEP], max_seq_len=128) for i in range(0, 200, STEP))


@cache
def ours() -> tuple[Tensor, ...]:
    """Our logits of each batch's real tokens, (N, C)."""
    model = DistilBertForTokenClassification.from_pretrained("distilbert-tagger")
    with torch.no_grad():
        return tuple(model(b.tokens, token_mask=b.token_mask)[b.token_mask] for b in batches())


def rows() -> list[Tensor]:
    """The same, sentence by sentence."""
    lengths = [n for b in batches() for n in b.token_mask.sum(1).tolist()]
    return list(torch.cat(ours()).split(lengths))


def by_onnx(some: Sequence[TextBatch], *, float_activations: bool) -> list[Tensor]:
    """The logits of the shipped graph, by the runtime that it is meant for.

    It rounds activations to 8 bits: each passes through a QuantizeLinear and a DequantizeLinear. With float
    activations these pairs are left out, and the rounded weights stay.
    """
    import onnx
    import onnxruntime

    model = onnx.load(fetch("distilbert-tagger") / "model.onnx")
    if float_activations:
        nodes = model.graph.node
        before = {n.output[0]: n.input[0] for n in nodes if n.op_type == "QuantizeLinear"}
        after = {n.output[0]: n.input[0] for n in nodes if n.op_type == "DequantizeLinear"}
        unrounded = {out: before[rounded] for out, rounded in after.items() if rounded in before}
        assert len(unrounded) == len(before) == 100
        for node in nodes:
            if node.op_type != "QuantizeLinear":
                node.input[:] = [unrounded.get(name, name) for name in node.input]
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options)
    rows = []
    for b in some:
        feed = {"input_ids": b.tokens.numpy(), "attention_mask": b.token_mask.long().numpy()}
        rows.append(torch.from_numpy(session.run(["logits"], feed)[0])[b.token_mask])
    return rows


@parity_row(
    "distilbert",
    "tags of real sentences",
    "transformers.DistilBertForTokenClassification",
    page="distilbert-tagger",
    weights="real",
    dtype="float32",
    backward=False,
)
def test_tags_of_200_real_sentences(parity):
    reference = transformers.DistilBertForTokenClassification.from_pretrained(
        fetch("distilbert-tagger")
    ).eval()
    for i, (b, got) in enumerate(zip(batches(), ours(), strict=True)):
        with torch.no_grad():
            want = reference(b.tokens, attention_mask=b.token_mask.long()).logits[b.token_mask]
        parity.record({f"batch {i}": got}, {f"batch {i}": want})
        assert torch.equal(got.argmax(-1), want.argmax(-1))


def test_the_shipped_graph_computes_the_same_where_it_does_not_round():
    """By onnxruntime, with its rounded weights and float activations: the same logits, the same tags."""
    by_the_runtime = by_onnx(batches()[::4], float_activations=True)  # some of either group
    for got, want in zip(ours()[::4], by_the_runtime, strict=True):
        torch.testing.assert_close(got, want, atol=1e-3, rtol=1e-4)
        assert torch.equal(got.argmax(-1), want.argmax(-1))


def test_the_shipped_graph_as_it_is_gives_nearly_the_same_tags():
    """It rounds activations too: its logits move by far more than a rounding, its tags seldom."""
    got, want = torch.cat(ours()), torch.cat(by_onnx(batches(), float_activations=False))
    same = got.argmax(-1) == want.argmax(-1)
    edits = (got.argmax(-1) != 0) | (want.argmax(-1) != 0)  # 0 is "$KEEP"
    assert float(same.double().mean()) > 0.99  # measured: 0.9962 of 3,200 tokens
    assert int(edits.sum()) > 100 and float(same[edits].double().mean()) > 0.8  # measured: 0.892
    assert float((got - want).abs().max()) > 1  # measured: 10.0


def test_it_finds_the_slips():
    """Most swapped words are put right, few words that were right are touched."""
    folder = fetch("distilbert-tagger")
    tags, tokenizer = json.loads((folder / "labels.json").read_text())["tags"], load_tokenizer(folder)
    _, slipped = real_sentences()
    found = [[tags[i] for i in row.argmax(-1).tolist()] for row in rows()]
    touched = sum(tag != "$KEEP" for row in found[:100] for tag in row)
    put_right = 0
    for text, row in zip(slipped, found[100:], strict=True):
        slip = WORD.search(text)
        token = tokenizer.encode(text).char_to_token(slip.start())
        put_right += row[token] == f"$REPLACE_{SLIPS[slip[0]]}"
    assert put_right >= 95  # measured: 98 of 100
    assert touched <= 10  # measured: 2 tokens in 100 sentences


def test_the_file_is_the_published_size():
    model = DistilBertForTokenClassification.from_pretrained("distilbert-tagger")
    assert model.classifier.out_features == 213 and not model.training
    encoder = sum(p.numel() for p in model.distilbert.parameters())
    config = model.config
    head = config.d_model**2 + 3 * config.d_model + config.vocab_size  # of the masked language model
    assert encoder == config.num_parameters() - head == 65_190_912
