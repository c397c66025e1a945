"""From letters to sounds: a small T5 against rules and a joint n-gram model, on CMUdict.

All learn to pronounce from the same English words and are judged on the same held-out ones, where any of
the pronunciations that the dictionary lists is right. Stress is left out, so that 39 phones remain.

The T5 reads the letters and writes the phones, token by token; nobody tells it which letters make which
sounds. The other two are told: letters and phones are first aligned by expectation-maximisation, each
letter with no, one or two phones. The rules then say each letter as it was said most often in the widest
window of letters that was seen before. The n-gram model takes a word for a sequence of pairs of a letter
and its phones (after Bisani and Ney, 2008), with interpolated Kneser-Ney smoothing and a beam search.

The order of the n-gram model is the best of 4, 5 and 6 on 1,000 words of the validation part. Size, learning
rate and number of steps of the T5 were set so that it fits into minutes on one core; they were not searched.

Book: t5-cmudict
"""

import functools
import itertools
import math
from collections import Counter, defaultdict

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor

from textbook_code.data.corpora import Phones, cmudict_words
from textbook_code.data.sources import fetch
from textbook_code.inference.generate import generate
from textbook_code.models.text.t5 import T5Config, T5ForConditionalGeneration
from textbook_code.optim.schedules import warmup_cosine

ABOUT = (
    "A T5 of a quarter of a million weights learns to pronounce English words, letters in and phones out, "
    "and is compared on held-out words of CMUdict with rules of context and with a joint n-gram model, both "
    "over letters and phones that were aligned by expectation-maximisation."
)
CONFIG = {
    "seeds": [0, 1],
    "sizes": {
        "d_model": 64,
        "num_layers": 2,
        "num_decoder_layers": 2,
        "num_heads": 4,
        "head_dim": 16,
        "d_ff": 192,
    },
    "num_buckets": 16,
    "max_distance": 16,
    "steps": 3600,
    "batch_size": 128,
    "lr": 4e-3,
    "warmup": 100,
    "weight_decay": 0.01,
    "clip_norm": 1.0,
    "dropout": 0.0,
    "max_phones": 20,
    "beams": 4,
    "test_words": 2000,
    "valid_words": 300,
    "evaluate_every": 600,
    "em_rounds": 5,
    "rules": {"widest": 4, "at_least": 2},
    "ngram": {"order": 6, "beam": 8, "choices": 12, "discount": 0.9},
}
DATA = ["cmudict"]
TOLERANCE = {"loss": 5e-3, "results": 0.03}
REPLAY = ["t5/seed-0"]
CHECKPOINT = {"name": "t5-cmudict", "arm": "t5/seed-0", "metric": "word_accuracy"}

Words = dict[str, tuple[Phones, ...]]
Pair = tuple[str, Phones]  # a letter, and the phones that it makes
PAD, EOS = 0, 1
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def arms(config: dict) -> list[str]:
    return ["aligned", *(f"t5/seed-{seed}" for seed in config["seeds"])]


def run(config: dict, arm: str, *, steps: int | None = None, log):
    """Training and test: word accuracy and phone error rate."""
    if arm == "aligned":
        rounds = config["em_rounds"] if steps is None else min(steps, config["em_rounds"])
        sequences = Aligner(rounds, pairs_of(words("train")), log).sequences()
        if steps is not None:
            return {}
        test, results = sample_of(words("test"), config["test_words"]), {}
        ngram = JointNgram(sequences, **config["ngram"])
        for name, model in (("rules", Rules(sequences, **config["rules"])), ("ngram", ngram)):
            results[name] = score({word: model.pronounce(word) for word in test}, test)
        return results | {"pairs": ngram.pairs}
    model, curve = train(config, int(arm.removeprefix("t5/seed-")), steps, log)
    if steps is not None:
        return {}
    test = sample_of(words("test"), config["test_words"])
    results = score(pronounce(config, model, list(test)), test)
    beam = score(pronounce(config, model, list(test), beams=config["beams"]), test)
    results |= {f"{name}_beam": value for name, value in beam.items()} | {"curve": curve}
    return (results, model, tokenizer()) if arm == CHECKPOINT["arm"] else results


def summarise(config: dict, runs: dict) -> dict:
    """All three side by side; the T5's figures are means over its seeds."""
    aligned, seeds = runs["aligned"], [runs[f"t5/seed-{seed}"] for seed in config["seeds"]]
    model, figures = T5ForConditionalGeneration(t5_config(config)), ("word_accuracy", "phone_error_rate")
    return {
        "train_words": len(words("train")),
        "test_words": config["test_words"],
        "parameters": sum(p.numel() for p in model.parameters()),
        "epochs": round(config["steps"] * config["batch_size"] / len(pairs_of(words("train"))), 1),
        "pairs": aligned["pairs"],
        **{name: {figure: aligned[name][figure] for figure in figures} for name in ("rules", "ngram")},
        "t5": {
            name: round(float(np.mean([run[name] for run in seeds])), 4)
            for name in (*figures, *(f"{figure}_beam" for figure in figures))
        },
        "t5_of_each_seed": [run["word_accuracy"] for run in seeds],
        "gain": {name: gain(config, seeds, aligned[name]) for name in ("rules", "ngram")},
    }


def gain(config: dict, seeds: list[dict], other: dict) -> dict[str, float]:
    """What the T5 gets right more often than another model, on the same words; 95 % bootstrap over both
    sources of chance, the seeds and the words."""
    n, draws = config["test_words"], np.random.default_rng(0)
    more = np.stack([unpack(run["right"], n) for run in seeds]) - unpack(other["right"], n)  # (seeds, words)
    means = [
        more[draws.integers(len(more), size=len(more))][:, draws.integers(n, size=n)].mean()
        for _ in range(4000)
    ]
    low, high = np.quantile(means, (0.025, 0.975))
    return {key: round(float(x), 4) for key, x in (("mean", more.mean()), ("low", low), ("high", high))}


def sample(config: dict, model: T5ForConditionalGeneration) -> float:
    """Word accuracy on 200 of the validation words, by greedy search."""
    valid = sample_of(words("valid"), 200)
    return score(pronounce(config, model.float().eval(), list(valid)), valid)["word_accuracy"]


# ------------------------------------------------------------------------------------------------
# The words


@functools.cache
def words(split: str) -> Words:
    return cmudict_words(fetch("cmudict"), split, stress=False)


def sample_of(found: Words, count: int) -> Words:
    """The same words in every run, spread over the alphabet."""
    chosen = np.random.default_rng(0).permutation(len(found))[:count]
    keys = list(found)
    return {keys[i]: found[keys[i]] for i in sorted(chosen)}


def pairs_of(found: Words) -> list[tuple[str, Phones]]:
    """Each pronunciation is an example."""
    return [(word, phones) for word, said in found.items() for phones in said]


@functools.cache
def phone_names() -> tuple[str, ...]:
    return tuple(sorted({phone for _, phones in pairs_of(words("train")) for phone in phones}))


@functools.cache
def tokenizer() -> Tokenizer:
    """Letters and phones, set apart by spaces: 'w a l k' and 'W AO K'."""
    vocabulary = {token: i for i, token in enumerate(["<pad>", "</s>", *LETTERS, *phone_names()])}
    built = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    built.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return built


def encoded(texts: list[str], *, longest: int) -> Tensor:
    """(N, longest) ids, each row ended by EOS and filled up with PAD."""
    ids = torch.full((len(texts), longest), PAD)
    for row, found in zip(ids, tokenizer().encode_batch(texts), strict=True):
        row[: len(found.ids) + 1] = torch.tensor([*found.ids, EOS])
    return ids


def score(said: dict[str, Phones], truth: Words) -> dict:
    """Share of words that are right, and edits per phone against the nearest pronunciation."""
    right, edits, length = [], 0, 0
    for word, pronunciations in truth.items():
        distances = [(edit_distance(said[word], phones), len(phones)) for phones in pronunciations]
        nearest = min(distances)
        right.append(nearest[0] == 0)
        edits, length = edits + nearest[0], length + nearest[1]
    return {
        "word_accuracy": round(sum(right) / len(right), 4),
        "phone_error_rate": round(edits / length, 4),
        "right": np.packbits(right).tobytes().hex(),
    }


def unpack(text: str, n: int) -> np.ndarray:
    return np.unpackbits(np.frombuffer(bytes.fromhex(text), np.uint8))[:n].astype(float)


def edit_distance(a: Phones, b: Phones) -> int:
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        last, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            last, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, last + (x != y))
    return row[-1]


# ------------------------------------------------------------------------------------------------
# The T5


def t5_config(config: dict) -> T5Config:
    return T5Config(
        vocab_size=tokenizer().get_vocab_size(),
        **config["sizes"],
        num_buckets=config["num_buckets"],
        max_distance=config["max_distance"],
        dropout=config["dropout"],
        gated=True,
        tied=False,
    )


def train(config: dict, seed: int, steps: int | None, log) -> tuple[T5ForConditionalGeneration, list]:
    """Cross-entropy of the phones under teacher forcing; (step, accuracy on validation words) on the way."""
    torch.manual_seed(seed)
    model = T5ForConditionalGeneration(t5_config(config))
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=config["lr"],
        betas=(0.9, 0.98),
        weight_decay=config["weight_decay"],
        fused=True,
    )
    schedule = warmup_cosine(config["warmup"], config["steps"], floor=0.0)
    valid, curve = sample_of(words("valid"), config["valid_words"]), []
    for step, (source, labels) in enumerate(batches(config, seed)):
        if step == (config["steps"] if steps is None else steps):
            break
        for group in optimizer.param_groups:
            group["lr"] = config["lr"] * schedule(step)
        logits = model(source, model.shift_right(labels), token_mask=source != PAD)
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=PAD)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config["clip_norm"])
        optimizer.step()
        log(loss.item(), of=config["steps"])
        if (step + 1) % config["evaluate_every"] == 0:
            found = score(pronounce(config, model.eval(), list(valid)), valid)
            curve.append([step + 1, found["word_accuracy"], found["phone_error_rate"]])
            model.train()
    return model.eval(), curve


def batches(config: dict, seed: int):
    """Endless epochs over all pronunciations; a batch has words of nearly one length."""
    examples = pairs_of(words("train"))
    source = encoded([" ".join(word) for word, _ in examples], longest=1 + max(len(w) for w, _ in examples))
    target = encoded([" ".join(said) for _, said in examples], longest=1 + max(len(p) for _, p in examples))
    length = (source != PAD).sum(1) * 32 + (target != PAD).sum(1)
    generator, size = torch.Generator().manual_seed(seed), config["batch_size"]
    while True:
        order = torch.randperm(len(examples), generator=generator)
        pools = [pool[length[pool].argsort()].split(size) for pool in order.split(32 * size)]
        rows = [batch for pool in pools for batch in pool if len(batch) == size]
        for i in torch.randperm(len(rows), generator=generator).tolist():
            read, write = source[rows[i]], target[rows[i]]
            yield read[:, (read != PAD).any(0)], write[:, (write != PAD).any(0)]


def pronounce(
    config: dict, model: T5ForConditionalGeneration, asked: list[str], *, beams: int = 1
) -> dict[str, Phones]:
    """Greedy or beam search, in batches of words of nearly one length."""
    said = {}
    by_length = sorted(asked, key=len)
    for first in range(0, len(by_length), 250):
        some = by_length[first : first + 250]
        source = encoded([" ".join(word) for word in some], longest=1 + len(some[-1]))
        ids = generate(
            model,
            source,
            token_mask=source != PAD,
            max_new_tokens=config["max_phones"],
            num_beams=beams,
            stop_tokens=(EOS,),
            pad_id=PAD,
        )
        for word, row in zip(some, ids.tolist(), strict=True):
            end = row.index(EOS) if EOS in row else len(row)
            said[word] = tuple(str(tokenizer().id_to_token(i)) for i in row[:end])
    return said


# ------------------------------------------------------------------------------------------------
# The n-gram model


class JointNgram:
    """An n-gram model over pairs of a letter and its phones, and a beam search for the likeliest pairs."""

    def __init__(
        self, sequences: list[list[Pair]], *, order: int, beam: int, choices: int, discount: float
    ) -> None:
        self.order, self.beam, self.discount = order, beam, discount
        self.sequences = sequences
        seen = Counter(pair for sequence in sequences for pair in sequence)
        self.pairs = len(seen)
        self.by_letter: dict[str, list[Pair]] = defaultdict(list)
        for pair, count in seen.most_common():
            if count > 1 and len(self.by_letter[pair[0]]) < choices:
                self.by_letter[pair[0]].append(pair)
        self._count()

    def _count(self) -> None:
        """Kneser-Ney: the lower orders count in how many contexts an n-gram stands, not how often."""
        start, end = (("<s>", ()),) * (self.order - 1), (("</s>", ()),)
        self.counts: list[dict] = [Counter() for _ in range(self.order)]  # by length − 1
        for sequence in self.sequences:
            padded = start + tuple(sequence) + end
            for i in range(self.order - 1, len(padded)):
                self.counts[-1][padded[i - self.order + 1 : i + 1]] += 1
        for n in range(self.order - 2, -1, -1):
            for gram in self.counts[n + 1]:
                self.counts[n][gram[1:]] += 1
        self.total: list[Counter] = [Counter() for _ in range(self.order)]
        self.kinds: list[Counter] = [Counter() for _ in range(self.order)]
        for n, counts in enumerate(self.counts):
            for gram, count in counts.items():
                self.total[n][gram[:-1]] += count
                self.kinds[n][gram[:-1]] += 1
        self.probability = functools.lru_cache(maxsize=500_000)(self._probability)

    def _probability(self, context: tuple, pair: tuple) -> float:
        n = len(context)
        lower = self.probability(context[1:], pair) if n else 1 / self.pairs
        total = self.total[n].get(context, 0)
        if not total:
            return lower
        found = max(self.counts[n].get((*context, pair), 0) - self.discount, 0)
        return (found + self.discount * self.kinds[n][context] * lower) / total

    def pronounce(self, word: str) -> Phones:
        start = (("<s>", ()),) * (self.order - 1)
        beam: list[tuple[float, tuple, Phones]] = [(0.0, start, ())]
        for letter in [*word, "</s>"]:
            choices = self.by_letter[letter] if letter != "</s>" else [("</s>", ())]
            best: dict[tuple, tuple[float, tuple, Phones]] = {}
            for value, context, said in beam:
                for pair in choices:
                    new = value + math.log(self.probability(context, pair))
                    state, phones = (*context[1:], pair), said + pair[1]
                    key = (state, phones)
                    if key not in best or new > best[key][0]:
                        best[key] = (new, state, phones)
            beam = sorted(best.values(), key=lambda item: -item[0])[: self.beam]
        return beam[0][2]


class Aligner:
    """Which letters make which phones: each letter makes 0, 1 or 2 of them, by itself.

        p(word, phones) = Σ over all divisions of the phones among the letters  Π p(chunk | letter)

    One round of EM: with α(i, j) the probability that the first i letters make the first j phones, and
    β that the rest makes the rest, each chunk is counted by its posterior α p β / p(word, phones).
    """

    def __init__(self, rounds: int, examples: list[tuple[str, Phones]], log) -> None:
        self.names = {phone: i for i, phone in enumerate(phone_names())}
        P = len(self.names)
        self.table = np.full((27, 1 + P + P * P), 1.0)
        self.table[:, 1 + P :] = 0.02  # two phones from one letter are the exception
        self.table /= self.table.sum(1, keepdims=True)
        # letters said by their names, such as www, have no division
        examples = [(word, phones) for word, phones in examples if len(phones) <= 2 * len(word)]
        ordered = sorted(examples, key=lambda example: (len(example[0]), len(example[1])))
        self.groups = [self._arrays(ordered[i : i + 3000]) for i in range(0, len(ordered), 3000)]
        for _ in range(rounds):
            counts, loss = np.zeros(self.table.size), 0.0
            for group in self.groups:
                loss += self._expect(*group[1:], counts)
            counts = counts.reshape(self.table.shape) + 1e-6
            self.table = counts / counts.sum(1, keepdims=True)
            log(loss / len(ordered), of=rounds)

    def _arrays(self, examples: list[tuple[str, Phones]]):
        """Letters (N, L), lengths (N, 2), and the chunk of k phones from j on (N, J + 1, k), -1 for none."""
        P, N = len(self.names), len(examples)
        length = np.array([[len(word), len(phones)] for word, phones in examples])
        L, J = length.max(0)
        letters, chunk = np.full((N, L), 26), np.full((N, J + 1, 3), -1)
        for n, (word, phones) in enumerate(examples):
            letters[n, : len(word)] = [LETTERS.index(letter) for letter in word]
            ids = [self.names[phone] for phone in phones]
            chunk[n, : len(ids) + 1, 0] = 0
            chunk[n, : len(ids), 1] = [1 + a for a in ids]
            chunk[n, : len(ids) - 1, 2] = [1 + P + a * P + b for a, b in itertools.pairwise(ids)]
        return examples, letters, chunk, length

    def _moves(self, i: int, letters: np.ndarray, chunk: np.ndarray, length: np.ndarray) -> np.ndarray:
        """p(chunk | letter i) of each word, start j and number of phones k: (N, J + 1, 3)."""
        p = self.table[letters[:, i, None, None], chunk]
        return np.where((chunk < 0) | (i >= length[:, 0])[:, None, None], 0.0, p)

    def _expect(
        self, letters: np.ndarray, chunk: np.ndarray, length: np.ndarray, counts: np.ndarray
    ) -> float:
        """Add the posterior counts of some words; return their negative log-likelihood."""
        (N, L), J, rows = letters.shape, chunk.shape[1] - 1, np.arange(len(letters))
        moves = [self._moves(i, letters, chunk, length) for i in range(L)]
        alpha = np.zeros((L + 1, N, J + 3))
        alpha[0, :, 0] = 1
        for i in range(L):
            for k in range(3):
                alpha[i + 1, :, k : J + 1 + k] += alpha[i, :, : J + 1] * moves[i][:, :, k]
        whole = alpha[length[:, 0], rows, length[:, 1]]
        beta = np.zeros((N, J + 3))
        for i in range(L - 1, -1, -1):
            ends = rows[length[:, 0] == i + 1]
            beta[ends, length[ends, 1]] = 1
            before = np.zeros_like(beta)
            for k in range(3):
                after = beta[:, k : J + 1 + k] * moves[i][:, :, k]
                before[:, : J + 1] += after
                posterior = alpha[i, :, : J + 1] * after / whole[:, None]
                seen = posterior > 0
                cell = letters[:, i, None] * self.table.shape[1] + chunk[:, :, k]
                counts += np.bincount(cell[seen], posterior[seen], minlength=counts.size)
            beta = np.where((i < length[:, 0])[:, None], before, beta)
        return float(-np.log(whole).sum())

    def sequences(self) -> list[list[Pair]]:
        """The likeliest division of each word."""
        return [sequence for group in self.groups for sequence in self._best(*group)]

    def _best(self, examples, letters: np.ndarray, chunk: np.ndarray, length: np.ndarray) -> list[list[Pair]]:
        (N, L), J = letters.shape, chunk.shape[1] - 1
        best = np.full((L + 1, N, J + 3), -np.inf)
        best[0, :, 0] = 0
        choice = np.zeros((L + 1, N, J + 3), dtype=np.int8)
        for i in range(L):
            with np.errstate(divide="ignore"):
                p = np.log(self._moves(i, letters, chunk, length))
            for k in range(3):
                new = best[i, :, : J + 1] + p[:, :, k]
                better = new > best[i + 1, :, k : J + 1 + k]
                best[i + 1, :, k : J + 1 + k][better] = new[better]
                choice[i + 1, :, k : J + 1 + k][better] = k
        found = []
        for n, (word, phones) in enumerate(examples):
            j, pairs = len(phones), []
            for i in range(len(word), 0, -1):
                k = int(choice[i, n, j])
                pairs.append((word[i - 1], phones[j - k : j]))
                j -= k
            found.append(pairs[::-1])
        return found


class Rules:
    """Each letter's usual phones in the widest window of letters around it that was seen often enough."""

    def __init__(self, sequences: list[list[Pair]], *, widest: int, at_least: int) -> None:
        # the windows from narrow to wide: (0, 0), (0, 1), (1, 1), (1, 2), … letters on the left and right
        self.windows = [(n // 2, (n + 1) // 2) for n in range(2 * widest + 1)]
        counts: dict[tuple[int, str], Counter] = defaultdict(Counter)
        for sequence in sequences:
            word = "".join(letter for letter, _ in sequence)
            for i, (_, chunk) in enumerate(sequence):
                for n, seen in enumerate(self._seen(word, i)):
                    counts[n, seen][chunk] += 1
        self.usual = {
            where: found.most_common(1)[0][0]
            for where, found in counts.items()
            if where[0] == 0 or found.total() >= at_least
        }

    def _seen(self, word: str, i: int) -> list[str]:
        side = "#" * len(self.windows)
        padded, i = side + word + side, i + len(side)
        return [padded[i - left : i + right + 1] for left, right in self.windows]

    def pronounce(self, word: str) -> Phones:
        said: Phones = ()
        for i in range(len(word)):
            known = [key for key in enumerate(self._seen(word, i)) if key in self.usual]
            said += self.usual[known[-1]]
        return said
