"""BERT with the real weights of multilingual-e5: articles of the Universal Declaration in six languages."""

from __future__ import annotations

from functools import cache

import pytest
import torch
import torch.nn.functional as F
import transformers
from parity import parity_row
from torch import Tensor

from textbook_code.data.corpora import udhr_articles
from textbook_code.data.sources import fetch
from textbook_code.data.text import TextBatch, encode, load_tokenizer
from textbook_code.models.text.bert import Bert, BertConfig, mean_pool
from textbook_code.weights import WeightError

LANGUAGES = ("eng", "fra", "rus", "swh", "hin", "cmn_hans")
ARTICLES = (0, 2, 3, 4, 8, 14, 19, 27)  # short ones, of different subjects


@cache
def batches() -> dict[str, TextBatch]:
    tokenizer = load_tokenizer(fetch("e5-multilingual"))
    found = {}
    for code in LANGUAGES:
        articles = udhr_articles(fetch("udhr"), code)
        texts = ["query: " + articles[i] for i in ARTICLES]
        found[code] = encode(tokenizer, texts, max_seq_len=512, pad_token="<pad>")
    return found


@cache
def our_hidden() -> dict[str, Tensor]:
    model = Bert.from_pretrained("e5-multilingual", pooler=False)
    with torch.no_grad():
        return {code: model(b.tokens, token_mask=b.token_mask) for code, b in batches().items()}


@parity_row(
    "multilingual-e5",
    "articles in six languages",
    "transformers.BertModel",
    page="family-e5",
    weights="real",
    dtype="float32",
    backward=False,
)
def test_hidden_states_and_embeddings_of_real_articles(parity):
    folder = fetch("e5-multilingual")
    reference = transformers.BertModel.from_pretrained(folder, add_pooling_layer=False).eval()
    for code, b in batches().items():
        with torch.no_grad():
            hidden = reference(b.tokens, attention_mask=b.token_mask.long()).last_hidden_state
        got = our_hidden()[code]
        pooled = torch.stack([h[mask].mean(0) for h, mask in zip(hidden, b.token_mask, strict=True)])
        parity.record(
            {f"{code}, hidden": got[b.token_mask],
             f"{code}, embedding": mean_pool(got, b.token_mask)},
            {f"{code}, hidden": hidden[b.token_mask], f"{code}, embedding": pooled},
        )  # fmt: skip


def test_the_nearest_article_of_another_language_is_the_same_article():
    vectors = {c: F.normalize(mean_pool(h, batches()[c].token_mask), dim=-1) for c, h in our_hidden().items()}
    right = [
        (vectors[a] @ vectors[b].T).argmax(1) == torch.arange(len(ARTICLES))
        for a in LANGUAGES
        for b in LANGUAGES
        if a != b
    ]
    assert float(torch.cat(right).double().mean()) > 0.9  # measured: 0.946 of 240; chance is 1 in 8


def test_the_file_is_the_published_size():
    model = Bert.from_pretrained("e5-multilingual", pooler=False)
    assert model.config == BertConfig.multilingual_e5_small()
    assert sum(p.numel() for p in model.parameters()) == 117_505_920
    config = model.config
    head = config.d_model**2 + 3 * config.d_model + config.vocab_size  # of the masked language model
    assert config.num_parameters() - head == 117_505_920


def test_without_saying_so_the_missing_pooler_is_an_error():
    with pytest.raises(WeightError, match=r"pooler\.weight: no tensor for it"):
        Bert.from_pretrained("e5-multilingual")
