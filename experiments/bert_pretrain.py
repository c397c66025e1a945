"""What does pre-training give a small BERT? Shakespeare without labels, then a few labelled sentences.

A four-layer BERT first learns to fill in masked pieces of Shakespeare's plays. Then it, and the same model
without that, learn from a few labelled sentences of these plays to tell questions from statements, whose end
mark is hidden; both are judged on sentences of plays that nothing has read, beside logistic regression on
tf-idf of words, and of words and pairs of words. Pre-training sees no end mark either: ".", "?" and "!" all
become the separator.

The corpus is Shakespeare as he is in the public domain, so that the weights and the tokenizer may be passed
on, and this task because the order of words bears on it, the labels are free of any annotator's opinion, and
the plays judged on share no sentence with those read. The size of the vocabulary, the depth, the spread of
the initial weights and the learning rates were set after a handful of short runs on the plays set aside; they
were not searched for, and one pre-training serves all seeds, which differ in the labelled sentences, the new
head and the order of the batches.

`results` has: parameters, vocabulary_pieces, read_plays, pieces_read, unigram_loss, held_out_loss,
held_out_interval, held_out_curve (the loss after every `eval_every` steps), test_sentences, and
by_labels[str(k)] with accuracy[method], of_each_seed[method] and gain[other] = {mean, low, high} of the
pre-trained model over the other, for the methods pretrained, scratch, tfidf_words, tfidf_pairs; and
beats_best_baseline[str(k)], true where the interval of the gain over both tf-idf is above 0.

Book: bert-mlm
"""

import functools
import random
import re

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from textbook_code.data.sources import fetch
from textbook_code.data.text import shakespeare_plays, shakespeare_text
from textbook_code.models.text.bert import BertConfig, BertForMaskedLM, BertForSequenceClassification
from textbook_code.optim.schedules import warmup_linear
from textbook_code.training.loop import train
from textbook_code.training.objectives import IGNORE, mask_tokens

ABOUT = (
    "A small BERT is pre-trained by masked language modelling on Shakespeare's plays and fine-tuned on a few "
    "labelled sentences to tell questions from statements; the same model without pre-training and logistic "
    "regression on tf-idf get the same sentences, and all are judged on plays that none has read."
)
CONFIG = {
    "seeds": [0, 1, 2],
    "held_out": ["hamlet", "macbeth", "tempest", "henry_v", "twelfth_night", "othello"],
    "set_aside": ["julius_caesar", "winters_tale"],
    "vocab_size": 600,
    "d_model": 64,
    "num_layers": 4,
    "num_heads": 4,
    "d_ff": 256,
    "max_seq_len": 48,
    "init_std": 0.07,
    "window": 32,
    "mask_prob": 0.2,
    "batch_size": 16,
    "lr": 3e-3,
    "warmup": 150,
    "eval_every": 200,
    "eval_windows": 512,
    "labels": [100, 1000],
    "words": [4, 24],
    "test_size": 1000,
    "fine_tuning_lr": 1e-3,
    "fine_tuning_steps": 150,
    "steps": {"pretraining": 2000, "fine-tuning": 600},
}
DATA = ["shakespeare"]
TOLERANCE = {"loss": 1e-3, "results": 0.05}
REPLAY = ["pretraining/seed-0"]
CHECKPOINT = {
    "name": "bert-shakespeare",
    "arm": "pretraining/seed-0",
    "metric": "held_out_loss",
    "interval": "held_out_interval",
}
METHODS = ("pretrained", "scratch", "tfidf_words", "tfidf_pairs")
PAD, CLS, SEP, MASK = 0, 2, 3, 4
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def arms(config: dict) -> list[str]:
    return ["pretraining/seed-0", *(f"fine-tuning/seed-{seed}" for seed in config["seeds"])]


def run(config: dict, arm: str, *, steps: int | None = None, log):
    """Pre-train once; or fine-tune and judge all methods with one draw of labelled sentences a number."""
    if arm.startswith("pretraining"):
        model, results = pretrain(config, steps, log)
        if steps is not None:
            return {}
        _pretrained["model"] = model
        return results, model, corpus(config)[0]
    return fine_tuned(config, int(arm.rpartition("-")[2]), steps, log)


# ------------------------------------------------------------------ pre-training

_pretrained: dict[str, BertForMaskedLM] = {}


def new_model(config: dict) -> BertForMaskedLM:
    """BERT's spread of 0.02 suits a width of 768; the same times √(768 / 64) suits this one."""
    model = BertForMaskedLM(
        BertConfig(
            vocab_size=config["vocab_size"],
            d_model=config["d_model"],
            num_layers=config["num_layers"],
            num_heads=config["num_heads"],
            d_ff=config["d_ff"],
            max_seq_len=config["max_seq_len"],
            dropout=0.0,
            attn_dropout=0.0,
        )
    )
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.mul_(config["init_std"] / 0.02)
    return model


def pretrain(config: dict, steps: int | None, log) -> tuple[BertForMaskedLM, dict]:
    total = config["steps"]["pretraining"]
    _, read, held_out = corpus(config)
    torch.manual_seed(0)
    model = new_model(config)

    def loss_fn(model: BertForMaskedLM, batch: tuple[Tensor, Tensor]) -> Tensor:
        loss = masked_losses(model, *batch).mean()
        log(loss.item(), of=total)
        return loss

    examination = masked(config, held_out, config["eval_windows"], torch.Generator().manual_seed(99))
    done = train(
        model,
        loss_fn,
        lambda _, draws: masked(config, read, config["batch_size"], draws),
        steps=min(total, steps or total),
        optimizer=torch.optim.AdamW(model.parameters(), lr=config["lr"], betas=(0.9, 0.98), fused=True),
        schedule=warmup_linear(config["warmup"], total),
        evaluate=lambda model, _: {"loss": masked_losses(model, *examination).mean().item()},
        eval_every=config["eval_every"],
        progress=False,
    )
    if steps is not None:
        return model, {}
    with torch.no_grad():
        losses = masked_losses(model.eval(), *examination).double()
    mean, error = losses.mean().item(), 1.96 * losses.std().item() / len(losses) ** 0.5
    targets = examination[1][examination[1] != IGNORE]
    counts = torch.bincount(read[0], minlength=config["vocab_size"]).double() + 1
    return model, {
        "held_out_loss": round(mean, 4),
        "held_out_interval": [round(mean - error, 4), round(mean + error, 4)],
        "held_out_curve": [round(value, 4) for _, value in done.evaluated("loss")],
        "unigram_loss": round(-(counts / counts.sum()).log()[targets].mean().item(), 4),
        "parameters": sum(p.numel() for p in model.parameters()),
        "pieces_read": total * config["batch_size"] * config["window"],
    }


def masked_losses(model: BertForMaskedLM, tokens: Tensor, targets: Tensor) -> Tensor:
    """The loss at each masked position, in nats; the head runs on no other."""
    chosen = targets != IGNORE
    hidden = model.bert(tokens)[chosen]
    return F.cross_entropy(model.mlm_head(hidden, model.bert.token_embed), targets[chosen], reduction="none")


def masked(
    config: dict, text: tuple[Tensor, Tensor], count: int, draws: torch.Generator
) -> tuple[Tensor, Tensor]:
    """`count` windows that begin with [CLS] and the start of a sentence, masked: tokens and targets."""
    ids, starts = text
    T = config["window"]
    starts = starts[starts < len(ids) - T]
    first = starts[torch.randint(len(starts), (count, 1), generator=draws)]
    tokens = torch.cat([torch.full((count, 1), CLS), ids[first + torch.arange(T - 1)]], 1)
    return mask_tokens(
        tokens,
        mask_id=MASK,
        vocab_size=config["vocab_size"],
        special_mask=tokens < len(SPECIAL),
        prob=config["mask_prob"],
        generator=draws,
    )


def sample(config: dict, model: BertForMaskedLM) -> float:
    """The loss on a few windows of the held-out plays, quickly computed."""
    batch = masked(config, corpus(config)[2], 64, torch.Generator().manual_seed(7))
    with torch.no_grad():
        return round(masked_losses(model.eval(), *batch).mean().item(), 5)


# ------------------------------------------------------------------ text


def corpus(config: dict):
    """The tokenizer, and (ids, starts of sentences) of the plays that are read and of those held out."""
    return _corpus(config["vocab_size"], tuple(config["held_out"]), tuple(config["set_aside"]))


@functools.cache
def _corpus(vocab_size: int, held_out: tuple[str, ...], set_aside: tuple[str, ...]):
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

    read = read_plays(held_out, set_aside)
    tokenizer = Tokenizer(models.BPE(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=SPECIAL, show_progress=False)
    tokenizer.train_from_iterator([text for play in read for text, _ in sentences(play)], trainer)

    def stream(plays: tuple[str, ...]) -> tuple[Tensor, Tensor]:
        ids, starts = [], []
        for encoding in tokenizer.encode_batch([text for play in plays for text, _ in sentences(play)]):
            starts.append(len(ids))
            ids += [*encoding.ids, SEP]
        return torch.tensor(ids), torch.tensor(starts)

    return tokenizer, stream(read), stream(held_out)


def read_plays(held_out: tuple[str, ...], set_aside: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(
        play for play in shakespeare_plays(fetch("shakespeare")) if play not in (*held_out, *set_aside)
    )


@functools.cache
def sentences(play: str) -> list[tuple[str, str]]:
    """The sentences of a play in lower case without their end mark, and the mark; no stage directions."""
    text = re.sub(r"\[[^\]]*\]", " ", shakespeare_text(fetch("shakespeare"), play))
    text = " ".join(text.replace("--", " ").replace("_", " ").lower().split())
    parts = re.split(r"([.?!])", text)
    found = zip(parts[0::2], parts[1::2], strict=False)
    return [(sentence.strip(), mark) for sentence, mark in found if sentence.strip()]


def labelled(config: dict, plays) -> list[tuple[str, int]]:
    """Statements (0) and questions (1) of a length between the limits, each once, in a fixed order."""
    low, high = config["words"]
    pairs = {
        (text, int(mark == "?"))
        for play in plays
        for text, mark in sentences(play)
        if mark in ".?" and low <= len(text.split()) <= high
    }
    return sorted(pairs)


def balanced(items: list[tuple[str, int]], count: int, seed: int) -> list[tuple[str, int]]:
    """`count` of them, as many questions as statements."""
    shuffled = random.Random(seed).sample(items, len(items))
    return [item for label in (0, 1) for item in [x for x in shuffled if x[1] == label][: count // 2]]


# ------------------------------------------------------------------ the labelled task


def fine_tuned(config: dict, seed: int, steps: int | None, log) -> dict:
    read = labelled(config, read_plays(tuple(config["held_out"]), tuple(config["set_aside"])))
    known = {text for text, _ in read}
    unseen = [item for item in labelled(config, config["held_out"]) if item[0] not in known]
    test = balanced(unseen, config["test_size"], 0)
    truth = np.array([label for _, label in test])
    if "model" not in _pretrained:
        _pretrained["model"] = pretrain(config, None, lambda loss, of: None)[0]
    results: dict = {"accuracy": {}, "right": {}}
    for k in config["labels"]:
        chosen = balanced(read, k, 1000 * k + seed)
        guesses = {}
        for method in ("pretrained", "scratch"):
            torch.manual_seed(seed)
            encoder = new_model(config).bert
            if method == "pretrained":
                encoder.load_state_dict(_pretrained["model"].bert.state_dict())
            guesses[method] = fine_tune(config, encoder, chosen, test, seed, steps, log)
        if steps is not None:
            return {}
        guesses["tfidf_words"] = tfidf(chosen, test, pairs=False)
        guesses["tfidf_pairs"] = tfidf(chosen, test, pairs=True)
        right = {method: guesses[method] == truth for method in METHODS}
        results["accuracy"][str(k)] = {m: round(float(right[m].mean()), 4) for m in METHODS}
        results["right"][str(k)] = {m: np.packbits(right[m]).tobytes().hex() for m in METHODS}
    return results


def fine_tune(config: dict, encoder, chosen, test, seed: int, steps: int | None, log) -> np.ndarray:
    """Train a head and everything under it; guesses for the test sentences."""
    from textbook_code.models.text.bert import Bert

    total = config["fine_tuning_steps"]
    body = Bert(encoder.config)  # with a pooler, which pre-training had no use for
    body.pooler.weight.data.mul_(config["init_std"] / 0.02)
    body.load_state_dict({**body.state_dict(), **encoder.state_dict()})
    model = BertForSequenceClassification.from_encoder(body, 2)
    tokens, labels = batch_of(config, chosen)

    def loss_fn(model, rows: Tensor) -> Tensor:
        loss = F.cross_entropy(classify(model, tokens[rows]), labels[rows])
        log(loss.item(), of=config["steps"]["fine-tuning"])
        return loss

    train(
        model,
        loss_fn,
        lambda _, draws: torch.randint(len(labels), (config["batch_size"],), generator=draws),
        steps=min(total, steps or total),
        optimizer=torch.optim.AdamW(model.parameters(), lr=config["fine_tuning_lr"], fused=True),
        schedule=warmup_linear(total // 10, total),
        seed=seed,
        progress=False,
    )
    with torch.no_grad():
        return classify(model.eval(), batch_of(config, test)[0]).argmax(-1).numpy()


def classify(model: BertForSequenceClassification, tokens: Tensor) -> Tensor:
    real = tokens != PAD
    longest = int(real.sum(1).max())
    return model(tokens[:, :longest], token_mask=real[:, :longest])


def batch_of(config: dict, items: list[tuple[str, int]]) -> tuple[Tensor, Tensor]:
    """[CLS] pieces [SEP] of each sentence, padded, and the labels."""
    T = config["max_seq_len"]
    tokens = torch.full((len(items), T), PAD)
    for row, encoding in enumerate(corpus(config)[0].encode_batch([text for text, _ in items])):
        ids = [CLS, *encoding.ids[: T - 2], SEP]
        tokens[row, : len(ids)] = torch.tensor(ids)
    return tokens, torch.tensor([label for _, label in items])


def tfidf(chosen, test, *, pairs: bool) -> np.ndarray:
    """Logistic regression on tf-idf, its strength cross-validated; with pairs, of which one is the start."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegressionCV

    start = "<start> " if pairs else ""
    vectorizer = TfidfVectorizer(
        sublinear_tf=True, token_pattern=r"[^\s,;:()]+", ngram_range=(1, 2 if pairs else 1)
    )
    features = vectorizer.fit_transform(start + text for text, _ in chosen)
    model = LogisticRegressionCV(
        Cs=10, cv=5, max_iter=2000, l1_ratios=(0,), scoring="accuracy", use_legacy_attributes=False
    )
    model.fit(features, [label for _, label in chosen])
    return model.predict(vectorizer.transform(start + text for text, _ in test))


# ------------------------------------------------------------------ what the book quotes


def summarise(config: dict, runs: dict) -> dict:
    """Accuracies, and the gain of the pre-trained model over each other one with its 95 % interval.

    The interval is a bootstrap over the seeds and the test sentences, on differences of the same sentence.
    """
    draws, pretraining = np.random.default_rng(0), runs["pretraining/seed-0"]
    by_labels, beats = {}, {}
    for k in map(str, config["labels"]):
        right = {
            method: np.stack(
                [bits(runs[f"fine-tuning/seed-{s}"]["right"][k][method], config) for s in config["seeds"]]
            )
            for method in METHODS
        }
        gains = {other: gain(right["pretrained"] - right[other], draws) for other in METHODS[1:]}
        by_labels[k] = {
            "accuracy": {m: round(float(right[m].mean()), 4) for m in METHODS},
            "of_each_seed": {m: [round(float(a), 4) for a in right[m].mean(1)] for m in METHODS},
            "gain": gains,
        }
        beats[k] = all(gains[other]["low"] > 0 for other in ("tfidf_words", "tfidf_pairs"))
    return {
        **{key: pretraining[key] for key in pretraining},
        "vocabulary_pieces": config["vocab_size"],
        "read_plays": 37 - len(config["held_out"]) - len(config["set_aside"]),
        "test_sentences": config["test_size"],
        "by_labels": by_labels,
        "beats_best_baseline": beats,
    }


def gain(difference: np.ndarray, draws: np.random.Generator) -> dict[str, float]:
    """Mean and 95 % bootstrap interval of (seeds, test sentences) differences in −1, 0, 1."""
    seeds, tested = difference.shape
    means = [
        difference[draws.integers(seeds, size=seeds)][:, draws.integers(tested, size=tested)].mean()
        for _ in range(4000)
    ]
    low, high = np.quantile(means, (0.025, 0.975))
    return {key: round(float(x), 4) for key, x in (("mean", difference.mean()), ("low", low), ("high", high))}


def bits(text: str, config: dict) -> np.ndarray:
    return np.unpackbits(np.frombuffer(bytes.fromhex(text), np.uint8))[: config["test_size"]].astype(int)
