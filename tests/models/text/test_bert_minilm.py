"""BERT with real weights: MiniLM's embeddings of 200 sentences from the news, against transformers'."""

from __future__ import annotations

from functools import cache

import pytest
import torch
import torch.nn.functional as F
import transformers
from parity import parity_row
from torch import Tensor

from textbook_code.data.sources import fetch
from textbook_code.data.text import bbc_news, encode, load_tokenizer, news_sentences
from textbook_code.models.text.bert import Bert, BertConfig, mean_pool

STEP = 25  # sentences of like length go through the model together


@cache
def real_sentences() -> tuple[str, ...]:
    found = news_sentences(fetch("bbc-news"), 200)
    assert len(set(found)) == 200
    return tuple(sorted(found, key=len))


@cache
def our_embeddings(dtype: torch.dtype, texts: tuple[str, ...]) -> Tensor:
    folder = fetch("minilm")
    model, tokenizer = Bert.from_pretrained(folder).to(dtype), load_tokenizer(folder)
    rows = []
    with torch.no_grad():
        for start in range(0, len(texts), STEP):
            batch = encode(tokenizer, texts[start : start + STEP], max_seq_len=512)
            hidden = model(batch.tokens, token_mask=batch.token_mask, segments=batch.segments)
            rows.append(F.normalize(mean_pool(hidden, batch.token_mask), dim=-1))
    return torch.cat(rows)


def reference_embeddings(dtype: torch.dtype, texts: tuple[str, ...], attention: str) -> Tensor:
    """By transformers alone: its reader, its tokenizer's padding, its model; pooled one text at a time."""
    folder = fetch("minilm")
    model = transformers.BertModel.from_pretrained(folder, attn_implementation=attention).to(dtype).eval()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"), pad_token="[PAD]"
    )
    rows = []
    with torch.no_grad():
        for start in range(0, len(texts), STEP):
            batch = tokenizer(
                list(texts[start : start + STEP]), padding="longest", truncation=False, return_tensors="pt"
            )
            hidden = model(**batch).last_hidden_state
            lengths = batch["attention_mask"].sum(1)
            rows += [h[:n].mean(0) / h[:n].mean(0).norm() for h, n in zip(hidden, lengths, strict=True)]
    return torch.stack(rows)


@parity_row(
    "bert", "sentences by MiniLM", "transformers.BertModel", page="bert-real", weights="real", backward=False
)
def test_embeddings_of_200_real_sentences(parity):
    ours = our_embeddings(torch.float64, real_sentences())
    assert ours.shape == (200, 384)
    theirs = reference_embeddings(torch.float64, real_sentences(), "sdpa")
    parity.record({"embeddings": ours}, {"embeddings": theirs})
    distinct = (ours @ ours.T).fill_diagonal_(-1)
    assert float(distinct.max()) < 0.99  # 200 sentences, 200 embeddings


@parity_row(
    "bert",
    "sentences by MiniLM, as shipped",
    "transformers.BertModel",
    page="bert-real",
    weights="real",
    dtype="float32",
    tolerance=1e-5,
    backward=False,
)
def test_embeddings_in_the_precision_of_the_file(parity):
    texts = real_sentences()[::4]
    got = {"embeddings": our_embeddings(torch.float32, texts)}
    parity.record(got, {"embeddings": reference_embeddings(torch.float32, texts, "eager")})


def test_the_file_is_the_published_size():
    model = Bert.from_pretrained("minilm")
    assert model.config == BertConfig.minilm_l6()
    assert not model.training
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert sum(p.numel() for p in model.parameters()) == 22_713_216


def test_it_goes_back_into_the_published_format(tmp_path):
    """What we save, transformers reads without a key missing or left over, and it is the same model."""
    model = Bert.from_pretrained("minilm")
    model.save_pretrained(tmp_path)
    theirs, info = transformers.BertModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    original = transformers.BertModel.from_pretrained(fetch("minilm"))
    for name, tensor in original.state_dict().items():
        assert torch.equal(theirs.state_dict()[name], tensor), name
    for key in ("hidden_size", "num_attention_heads", "layer_norm_eps", "hidden_act", "type_vocab_size"):
        assert getattr(theirs.config, key) == getattr(original.config, key)


MEANINGS = [
    ("A man is playing a guitar on stage.", "Someone performs music with a stringed instrument."),
    ("The central bank raised interest rates again.", "Borrowing became more expensive after the decision."),
    ("It has been raining heavily since last night.", "The weather has been very wet since yesterday."),
    ("The striker scored twice in the final.", "Two goals by the forward decided the match."),
    ("My laptop does not turn on any more.", "The computer will no longer start."),
    ("The bakery sells fresh bread every morning.", "You can buy newly baked loaves there each day."),
    ("Scientists found water ice on the Moon.", "Frozen water was discovered on the lunar surface."),
]


def test_nearest_neighbours_make_sense():
    """Each sentence is nearest to the one that says the same in other words."""
    texts = tuple(text for pair in MEANINGS for text in pair)
    embeddings = our_embeddings(torch.float32, texts)
    similarity = (embeddings @ embeddings.T).fill_diagonal_(-1)
    assert similarity.argmax(1).tolist() == [i ^ 1 for i in range(len(texts))]


def test_neighbours_in_the_news_share_their_subject():
    """Most sentences' nearest neighbour comes from an article of the same class; chance is one in five."""
    folder = fetch("bbc-news")
    articles, found = bbc_news(folder), news_sentences(folder, 200)
    label_of = {text: articles[i * len(articles) // 200][1] for i, text in enumerate(found)}
    labels = [label_of[sentence] for sentence in real_sentences()]
    assert len(set(labels)) == 5
    embeddings = our_embeddings(torch.float64, real_sentences())
    nearest = (embeddings @ embeddings.T).fill_diagonal_(-1).argmax(1)
    same = sum(labels[i] == labels[j] for i, j in enumerate(nearest.tolist()))
    assert same >= 140, f"{same} of 200"


def test_a_tokenizer_of_another_size_is_named():
    """Ids beyond the table raise and say so, as they would with a tokenizer of another model."""
    model = Bert.from_pretrained("minilm")
    with pytest.raises(ValueError, match=r"tokens: expected ids from 0 to 30521, got .* to 30522"):
        model(torch.tensor([[101, 30522]]))
