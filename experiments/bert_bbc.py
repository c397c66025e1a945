"""How many labels does a pre-trained encoder need? Fine-tuning MiniLM on a handful of BBC articles.

Four ways to sort news into five classes from the same few labelled articles, all judged on the same 1,000
others: MiniLM fine-tuned with a head on [CLS]; its mean-pooled output, frozen, under logistic regression;
and logistic regression on tf-idf, of the whole article and of the part that MiniLM reads.

Articles that repeat another one, whole or with another headline, are removed first, or the test would hold
articles that were trained on. The learning rate and the number of steps were chosen on 200 articles which
are in no test or training set here.

Book: bert-finetune
"""

import functools

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from textbook_code.data.sources import fetch
from textbook_code.data.text import bbc_news, encode, load_tokenizer
from textbook_code.models.text.bert import Bert, BertForSequenceClassification, mean_pool

ABOUT = (
    "MiniLM is fine-tuned on 2, 5, 10 and 20 labelled articles of each of five classes of BBC news, and "
    "compared on 1,000 other articles with its own frozen features and with tf-idf, both under logistic "
    "regression tuned by cross-validation on the same labels."
)
CONFIG = {
    "seeds": [0, 1, 2],
    "labels_per_class": [2, 5, 10, 20],
    "test_size": 1000,
    "set_aside": 200,
    "duplicate_above": 0.8,
    "max_seq_len": 128,
    "steps": 40,
    "warmup": 4,
    "batch_size": 8,
    "lr": 2e-4,
    "weight_decay": 0.01,
    "clip_norm": 1.0,
}
DATA = ["bbc-news", "minilm"]
TOLERANCE = {"loss": 5e-3, "results": 0.03}
REPLAY = ["labels-2/seed-0"]
METHODS = ("fine_tuned", "frozen", "tfidf_whole", "tfidf_same_text")


def arms(config: dict) -> list[str]:
    return [f"labels-{k}/seed-{seed}" for k in config["labels_per_class"] for seed in config["seeds"]]


def run(config: dict, arm: str, *, steps: int | None = None, log) -> dict:
    """All four methods on one draw of labelled articles; `right` has one bit for each test article."""
    k, seed = (int(part) for part in arm.removeprefix("labels-").split("/seed-"))
    labels, test, labelled = split(config, k, seed)
    fine_tuned = fine_tune(config, labelled, seed, steps, log)
    if steps is not None:
        return {}
    guesses = {"fine_tuned": predict(config, fine_tuned, test)}
    for method, features in (
        ("frozen", frozen_features(config, labelled, test)),
        ("tfidf_whole", tfidf_features(articles(config)[0], labelled, test)),
        ("tfidf_same_text", tfidf_features(read_texts(config), labelled, test)),
    ):
        guesses[method] = logistic_regression(*features, labels[labelled].numpy(), k)
    right = {method: guesses[method] == labels[test].numpy() for method in METHODS}
    return {
        "accuracy": {method: round(float(right[method].mean()), 4) for method in METHODS},
        "right": {method: np.packbits(right[method]).tobytes().hex() for method in METHODS},
    }


def summarise(config: dict, runs: dict) -> dict:
    """Accuracies, and what fine-tuning gains over each other method, with its 95 % interval.

    The interval is a bootstrap over both sources of chance: which articles were labelled (the seeds) and
    which were tested. A gain is a difference on the same articles after the same labels.
    """
    texts, labels, classes, dropped = articles(config)
    draws = np.random.default_rng(0)
    by_labels = {}
    for k in config["labels_per_class"]:
        right = {
            method: np.stack(
                [unpack(runs[f"labels-{k}/seed-{seed}"]["right"][method], config) for seed in config["seeds"]]
            )  # (seeds, test articles)
            for method in METHODS
        }
        by_labels[str(k)] = {
            "accuracy": {method: round(float(bits.mean()), 4) for method, bits in right.items()},
            "of_each_seed": {
                method: [round(float(a), 4) for a in bits.mean(1)] for method, bits in right.items()
            },
            "gain": {other: gain(right["fine_tuned"] - right[other], draws) for other in METHODS[1:]},
        }
    return {
        "articles": len(texts),
        "near_duplicates_dropped": dropped,
        "classes": list(classes),
        "test_articles": config["test_size"],
        "largest_class_share": round(float(labels.bincount().max() / len(labels)), 4),
        "by_labels_per_class": by_labels,
    }


def gain(difference: np.ndarray, draws: np.random.Generator) -> dict[str, float]:
    """Mean and 95 % bootstrap interval of (seeds, test articles) differences in −1, 0, 1."""
    seeds, tested = difference.shape
    means = [
        difference[draws.integers(seeds, size=seeds)][:, draws.integers(tested, size=tested)].mean()
        for _ in range(4000)
    ]
    low, high = np.quantile(means, (0.025, 0.975))
    return {key: round(float(x), 4) for key, x in (("mean", difference.mean()), ("low", low), ("high", high))}


def unpack(text: str, config: dict) -> np.ndarray:
    return np.unpackbits(np.frombuffer(bytes.fromhex(text), np.uint8))[: config["test_size"]].astype(int)


def articles(config: dict) -> tuple[list[str], Tensor, tuple[str, ...], int]:
    return _articles(config["duplicate_above"])


@functools.cache
def _articles(duplicate_above: float) -> tuple[list[str], Tensor, tuple[str, ...], int]:
    """Texts, labels and classes without repetitions, and how many near-repetitions were dropped."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    everything = bbc_news(fetch("bbc-news"))  # exact copies are gone already
    vectors = TfidfVectorizer(sublinear_tf=True).fit_transform(text for text, _ in everything)
    similar = np.tril((vectors @ vectors.T).toarray(), -1).max(1) > duplicate_above  # to an earlier one
    kept = [article for article, repeats in zip(everything, similar, strict=True) if not repeats]
    classes = tuple(sorted({label for _, label in kept}))
    labels = torch.tensor([classes.index(label) for _, label in kept])
    return [text for text, _ in kept], labels, classes, int(similar.sum())


def split(config: dict, k: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """All labels, the indices of the test articles (always the same) and of k labelled ones of each class."""
    _, labels, classes, _ = articles(config)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    test, pool = order[: config["test_size"]], order[config["test_size"] + config["set_aside"] :]
    draws = torch.Generator().manual_seed(100 + seed)
    labelled = []
    for label in range(len(classes)):
        candidates = pool[labels[pool] == label]
        # 5 labelled articles contain the 2 of the same seed, and so on
        labelled.append(candidates[torch.randperm(len(candidates), generator=draws)[:k]])
    return labels, test, torch.cat(labelled)


@functools.cache
def _tokens(duplicate_above: float, max_seq_len: int) -> tuple[Tensor, Tensor]:
    tokenizer = load_tokenizer(fetch("minilm"))
    batch = encode(tokenizer, _articles(duplicate_above)[0], max_seq_len=max_seq_len, truncate=True)
    return batch.tokens, batch.token_mask


def tokens_of(config: dict, indices: Tensor) -> tuple[Tensor, Tensor]:
    tokens, token_mask = _tokens(config["duplicate_above"], config["max_seq_len"])
    return tokens[indices], token_mask[indices]


@functools.cache
def _read_texts(duplicate_above: float, max_seq_len: int) -> list[str]:
    tokenizer = load_tokenizer(fetch("minilm"))
    tokens, _ = _tokens(duplicate_above, max_seq_len)
    return tokenizer.decode_batch(tokens.tolist())


def read_texts(config: dict) -> list[str]:
    """The part of each article that MiniLM reads, as text again."""
    return _read_texts(config["duplicate_above"], config["max_seq_len"])


def fine_tune(
    config: dict, labelled: Tensor, seed: int, steps: int | None, log
) -> BertForSequenceClassification:
    """AdamW with warm-up and linear decay; the embedding tables, half of all parameters, stay as they are."""
    _, labels, classes, _ = articles(config)
    total = config["steps"]
    torch.manual_seed(seed)  # the head's weights, dropout
    encoder = Bert.from_pretrained("minilm")
    model = BertForSequenceClassification.from_encoder(encoder, len(classes)).train()
    for table in (encoder.token_embed, encoder.pos_embed, encoder.segment_embed):
        table.requires_grad_(False)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=config["lr"], weight_decay=config["weight_decay"])
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / config["warmup"], (total - step) / (total - config["warmup"])),
    )
    batches = batch_indices(labelled, config["batch_size"], torch.Generator().manual_seed(seed))
    for _ in range(min(total, steps or total)):
        chosen = next(batches)
        tokens, token_mask = tokens_of(config, chosen)
        loss = F.cross_entropy(model(tokens, token_mask=token_mask), labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, config["clip_norm"])
        optimizer.step()
        schedule.step()
        log(loss.item(), of=total)
    return model.eval()


def batch_indices(labelled: Tensor, batch_size: int, draws: torch.Generator):
    """Batches without end: each article once in every pass, in a new order."""
    queue = labelled[:0]
    while True:
        while len(queue) < batch_size:
            queue = torch.cat([queue, labelled[torch.randperm(len(labelled), generator=draws)]])
        yield queue[:batch_size]
        queue = queue[batch_size:]


@torch.no_grad()
def predict(config: dict, model: BertForSequenceClassification, indices: Tensor) -> np.ndarray:
    logits = [
        model(tokens, token_mask=token_mask)
        for tokens, token_mask in (tokens_of(config, part) for part in indices.split(32))
    ]
    return torch.cat(logits).argmax(-1).numpy()


_features: dict[int, Tensor] = {}  # of the pre-trained encoder, by article


@torch.no_grad()
def frozen_features(config: dict, *sets: Tensor) -> list[np.ndarray]:
    """Mean-pooled MiniLM embeddings of unit length, computed once for each article."""
    wanted = torch.cat(sets)
    missing = torch.tensor([i for i in wanted.tolist() if i not in _features], dtype=torch.long)
    if len(missing):
        encoder = Bert.from_pretrained("minilm")
        for part in missing.split(32):
            tokens, token_mask = tokens_of(config, part)
            pooled = F.normalize(mean_pool(encoder(tokens, token_mask=token_mask), token_mask), dim=-1)
            _features.update(zip(part.tolist(), pooled, strict=True))
    return [torch.stack([_features[i] for i in indices.tolist()]).numpy() for indices in sets]


def tfidf_features(texts: list[str], labelled: Tensor, test: Tensor) -> list:
    """tf-idf with the words and document frequencies of the labelled articles."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    vectorizer = TfidfVectorizer(sublinear_tf=True, stop_words="english")
    train = vectorizer.fit_transform(texts[i] for i in labelled.tolist())
    return [train, vectorizer.transform(texts[i] for i in test.tolist())]


def logistic_regression(train, test, labels: np.ndarray, k: int) -> np.ndarray:
    """Guesses for `test`; the strength of regularisation is cross-validated on the labelled articles."""
    from sklearn.linear_model import LogisticRegressionCV

    folds = min(5, k)
    model = LogisticRegressionCV(Cs=10, cv=folds, max_iter=2000, use_legacy_attributes=False)
    return model.fit(train, labels).predict(test)
