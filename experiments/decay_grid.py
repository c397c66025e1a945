"""Learning rate against decay: a grid for decoupled decay, and one for L2 in Adam's gradient.

A small decoder learns ten thousand characters of Shakespeare many times over, so that it can learn them by
heart, and is judged on plays that it never saw. Nothing is chosen: the whole grid is the result.

Book: optim-decay
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from textbook_code.data.sources import fetch
from textbook_code.data.text import random_windows, shakespeare_characters
from textbook_code.layers.attention import Attention
from textbook_code.layers.feed_forward import FeedForward
from textbook_code.layers.norms import LayerNorm
from textbook_code.layers.positions import LearnedPositions
from textbook_code.layers.residual import Residual
from textbook_code.models.text.decoder import Block, Decoder
from textbook_code.optim.adamw import AdamW
from textbook_code.optim.groups import decay_groups
from textbook_code.optim.schedules import warmup_linear

ABOUT = (
    "A one-layer decoder learns ten thousand characters of Shakespeare many times over, at four learning "
    "rates, with decoupled decay and with L2 in Adam's gradient at five strengths each; the loss is that on "
    "plays held out. Nothing was chosen by it: the whole grid is shown."
)
CONFIG = {
    "seeds": [0, 1],
    "held_out": ["hamlet", "macbeth", "tempest"],
    "characters": 10_000,
    "d_model": 48,
    "num_heads": 2,
    "max_seq_len": 32,
    "batch_size": 16,
    "steps": 500,
    "warmup": 20,
    "betas": [0.9, 0.99],
    "lr": [2.5e-3, 5e-3, 1e-2, 2e-2],
    "decoupled": [0.0, 0.1, 0.3, 1.0, 3.0, 10.0],
    "l2": [1e-4, 3e-4, 1e-3, 3e-3, 1e-2],
    "eval_windows": 512,
}
DATA = ["shakespeare"]
TOLERANCE = {"loss": 1e-3, "results": 0.1}
REPLAY = ["decoupled/lr-0.005/seed-0", "l2/lr-0.005/seed-0"]


def arms(config: dict) -> list[str]:
    return [
        f"{kind}/lr-{lr}/seed-{seed}"
        for seed in config["seeds"]
        for kind in ("decoupled", "l2")
        for lr in config["lr"]
    ]


class CausalAttention(Attention):
    """Attention that looks at no later position, as a branch is called."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x, causal=True)


def build(config: dict, vocab_size: int, seed: int) -> Decoder:
    torch.manual_seed(seed)
    D = config["d_model"]
    attn = Residual(CausalAttention(D, config["num_heads"]), lambda: LayerNorm(D))
    ffn = Residual(FeedForward(D, 4 * D, activation="gelu_tanh"), lambda: LayerNorm(D))
    places = LearnedPositions(config["max_seq_len"], D)
    return Decoder(vocab_size, D, [Block(attn, ffn)], pos_embed=places, final_norm=LayerNorm(D))


def run(config: dict, arm: str, *, steps: int | None = None, log) -> dict:
    """Train a model for each strength, side by side on the same batches; returns their held-out losses."""
    kind, rate, name = arm.split("/")
    lr, seed, total = float(rate[3:]), int(name[5:]), config["steps"]
    text, T = shakespeare_characters(fetch("shakespeare"), *config["held_out"]), config["max_seq_len"]
    models = [build(config, text.vocab_size, seed) for _ in config[kind]]
    optimizers = [
        AdamW(decay_groups(model, strength if kind == "decoupled" else 0.0), betas=tuple(config["betas"]))
        for model, strength in zip(models, config[kind], strict=True)
    ]
    decayed = [optimizer.param_groups[0]["params"] for optimizer in optimizers]
    schedule = warmup_linear(config["warmup"], total)
    draws = torch.Generator().manual_seed(seed)
    train = text.train[: config["characters"]]
    for step in range(min(total, steps or total)):
        batch = random_windows(train, config["batch_size"], T + 1, generator=draws)
        losses = []
        for model, optimizer, params, strength in zip(models, optimizers, decayed, config[kind], strict=True):
            loss = next_loss(model, batch)
            optimizer.zero_grad()
            loss.backward()
            for p in params if kind == "l2" else ():
                p.grad.add_(p.detach(), alpha=strength)
            for group in optimizer.param_groups:
                group["lr"] = lr * schedule(step)
            optimizer.step()
            losses.append(loss.item())
        log(sum(losses) / len(losses), of=total)
    if steps is not None:
        return {}
    examination = random_windows(
        text.held_out, config["eval_windows"], T + 1, generator=torch.Generator().manual_seed(99)
    )
    with torch.no_grad():
        return {
            "held_out": [round(next_loss(model.eval(), examination).item(), 4) for model in models],
            "last_train_loss": [round(loss, 4) for loss in losses],
        }


def next_loss(model: nn.Module, window: Tensor) -> Tensor:
    """Cross-entropy of each next character, in nats."""
    return F.cross_entropy(model(window[:, :-1]).flatten(0, 1), window[:, 1:].flatten())


def summarise(config: dict, runs: dict) -> dict:
    """The grids, the mean over the seeds: a row for each learning rate; and how far the seeds are apart."""
    grids: dict[str, list[list[float]]] = {}
    apart = []
    for kind in ("decoupled", "l2"):
        grids[kind] = []
        for lr in config["lr"]:
            each = [runs[f"{kind}/lr-{lr}/seed-{seed}"]["held_out"] for seed in config["seeds"]]
            grids[kind].append([round(sum(pair) / len(pair), 4) for pair in zip(*each, strict=True)])
            apart += [max(pair) - min(pair) for pair in zip(*each, strict=True)]
    return {"grids": grids, "seeds_apart": round(sorted(apart)[len(apart) // 2], 4)}
