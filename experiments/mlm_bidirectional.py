"""Does it help to read in both directions? One small BERT, two masks, the same masked characters.

Two arms differ in nothing but the attention mask: all positions, or only those to the left (and itself). Both
learn to fill in masked characters of Shakespeare's plays; the loss is taken on plays that no arm has read.

Book: bert-mlm
"""

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from textbook_code.data.sources import fetch
from textbook_code.data.text import shakespeare_plays, shakespeare_text
from textbook_code.layers.masks import causal_mask
from textbook_code.models.text.bert import BertConfig, BertForMaskedLM
from textbook_code.training.objectives import IGNORE, mask_tokens

ABOUT = (
    "A two-layer BERT learns to fill in masked characters of Shakespeare, once seeing both sides of a gap "
    "and once only what stands before it; everything else is equal, and the loss is that on plays held out."
)
CONFIG = {
    "seeds": [0, 1, 2],
    "held_out": ["hamlet", "macbeth", "tempest"],
    "d_model": 64,
    "num_layers": 2,
    "num_heads": 4,
    "d_ff": 256,
    "max_seq_len": 32,
    "batch_size": 64,
    "steps": 2000,
    "warmup": 100,
    "lr": 3e-3,
    "weight_decay": 0.01,
    "eval_every": 100,
    "eval_windows": 1024,
}
DATA = ["shakespeare"]
TOLERANCE = {"loss": 1e-3, "results": 0.05}
REPLAY = ["bidirectional/seed-0", "causal/seed-0"]


def arms(config: dict) -> list[str]:
    return [f"{kind}/seed-{seed}" for seed in config["seeds"] for kind in ("bidirectional", "causal")]


def run(config: dict, arm: str, *, steps: int | None = None, log) -> dict:
    """Train one arm; returns the held-out loss at every `eval_every`-th step, in nats a character."""
    kind, seed = arm.split("/seed-")
    T, total = config["max_seq_len"], config["steps"]
    train, held_out, vocab_size = corpus(*config["held_out"])
    attn_mask = causal_mask(T) if kind == "causal" else None

    torch.manual_seed(int(seed))  # both arms start from the same weights and see the same batches
    model = BertForMaskedLM(
        BertConfig(
            vocab_size=vocab_size,
            d_model=config["d_model"],
            num_layers=config["num_layers"],
            num_heads=config["num_heads"],
            d_ff=config["d_ff"],
            max_seq_len=T,
            dropout=0.0,
        )
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=config["lr"], weight_decay=config["weight_decay"])
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / config["warmup"], (total - step) / (total - config["warmup"])),
    )
    draws = torch.Generator().manual_seed(int(seed))
    examination = windows(held_out, config["eval_windows"], T, vocab_size, torch.Generator().manual_seed(99))
    curve = []
    for step in range(min(total, steps or total)):
        loss = masked_loss(model, *windows(train, config["batch_size"], T, vocab_size, draws), attn_mask)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        log(loss.item(), of=total)
        if (step + 1) % config["eval_every"] == 0:
            with torch.no_grad():
                curve.append(round(masked_loss(model, *examination, attn_mask).item(), 4))
    if steps is not None:
        return {}
    tokens, targets = examination
    return {
        "held_out_curve": curve,
        "held_out_loss": curve[-1],
        "accuracy": round(accuracy(model, tokens, targets, attn_mask), 4),
        "unigram_loss": round(unigram_loss(train, targets, vocab_size), 4),
        "parameters": sum(p.numel() for p in model.parameters()),
    }


def summarise(config: dict, runs: dict) -> dict:
    """Means over the seeds, and the gain of each seed (the arms of one seed are a pair)."""
    seeds = config["seeds"]

    def mean(kind: str, key: str) -> float:
        return round(sum(runs[f"{kind}/seed-{seed}"][key] for seed in seeds) / len(seeds), 4)

    gains = [
        runs[f"causal/seed-{seed}"]["held_out_loss"] - runs[f"bidirectional/seed-{seed}"]["held_out_loss"]
        for seed in seeds
    ]
    first = runs[f"causal/seed-{seeds[0]}"]
    return {
        "unigram_loss": first["unigram_loss"],
        "parameters": first["parameters"],
        "bidirectional_loss": mean("bidirectional", "held_out_loss"),
        "causal_loss": mean("causal", "held_out_loss"),
        "bidirectional_accuracy": mean("bidirectional", "accuracy"),
        "causal_accuracy": mean("causal", "accuracy"),
        "gain": round(sum(gains) / len(gains), 4),
        "gain_of_each_seed": [round(gain, 4) for gain in gains],
        "perplexity_ratio": round(math.exp(sum(gains) / len(gains)), 3),
    }


@functools.cache
def corpus(*held_out: str) -> tuple[Tensor, Tensor, int]:
    """The plays as character ids, read ones and held-out ones, and V (the last id is the mask's)."""
    folder = fetch("shakespeare")
    read = [play for play in shakespeare_plays(folder) if play not in held_out]
    texts = shakespeare_text(folder, *read), shakespeare_text(folder, *held_out)
    ids = {character: i for i, character in enumerate(sorted(set(texts[0] + texts[1])))}
    train, test = (torch.tensor([ids[character] for character in text]) for text in texts)
    return train, test, len(ids) + 1


def windows(
    text: Tensor, count: int, T: int, vocab_size: int, draws: torch.Generator
) -> tuple[Tensor, Tensor]:
    """`count` random windows of T characters, masked for training: tokens and targets, both (count, T)."""
    starts = torch.randint(len(text) - T, (count, 1), generator=draws)
    tokens = text[starts + torch.arange(T)]
    return mask_tokens(
        tokens,
        mask_id=vocab_size - 1,
        vocab_size=vocab_size,
        special_mask=torch.zeros_like(tokens, dtype=torch.bool),
        generator=draws,
    )


def hidden_states(model: BertForMaskedLM, tokens: Tensor, attn_mask: Tensor | None) -> Tensor:
    """Bert's own forward pass, (B, T) to (B, T, D), but with a mask of our choice."""
    bert = model.bert
    x = bert.token_embed(tokens) + bert.pos_embed(tokens.size(1)) + bert.segment_embed.weight[0]
    x = bert.embed_norm(x)
    for block in bert.blocks:
        x, _ = block(x, attn_mask=attn_mask)
    return x


def masked_loss(model: BertForMaskedLM, tokens: Tensor, targets: Tensor, attn_mask: Tensor | None) -> Tensor:
    """Cross-entropy at the masked positions alone, so that the head runs on no other."""
    masked = targets != IGNORE
    hidden = hidden_states(model, tokens, attn_mask)[masked]  # (masked, D)
    return F.cross_entropy(model.mlm_head(hidden, model.bert.token_embed), targets[masked])


@torch.no_grad()
def accuracy(model: BertForMaskedLM, tokens: Tensor, targets: Tensor, attn_mask: Tensor | None) -> float:
    masked = targets != IGNORE
    hidden = hidden_states(model, tokens, attn_mask)[masked]
    guesses = model.mlm_head(hidden, model.bert.token_embed).argmax(-1)
    return (guesses == targets[masked]).double().mean().item()


def unigram_loss(train: Tensor, targets: Tensor, vocab_size: int) -> float:
    """What one gets who knows how frequent each character is, and nothing else."""
    counts = torch.bincount(train, minlength=vocab_size).double() + 1
    return F.nll_loss((counts / counts.sum()).log().expand(targets.numel(), -1), targets.flatten()).item()
