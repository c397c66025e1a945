"""What does cheaper attention cost? Seven ways to attend, on a text and on a look-up.

One decoder, seven kinds of attention, two tasks. **Text**: the next character of Shakespeare's plays,
measured on plays held out. **Look-up**: somewhere in a window of a play stands a token of a second alphabet;
at its end comes a question mark, and the answer is that token. Chance is one in eight. The distance of the
token is drawn evenly, and the accuracy is told by distance.

All kinds start from the same weights, as far as they share them, and see the same batches. Patterns are
computed through their masks: that the cheap forms give the same numbers is proven elsewhere, and for 256
positions a mask is the faster way.

Book: attention-variants
"""

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from textbook_code.data.sources import fetch
from textbook_code.data.text import random_windows, shakespeare_characters
from textbook_code.layers.attention import Attention
from textbook_code.layers.feed_forward import FeedForward
from textbook_code.layers.linear_attention import LinearAttention, RandomFeatures
from textbook_code.layers.masks import causal_mask, sliding_window_mask
from textbook_code.layers.norms import LayerNorm
from textbook_code.layers.positions import RotaryPositions
from textbook_code.layers.residual import Residual
from textbook_code.layers.sparse_attention import fixed_mask, strided_mask
from textbook_code.models.text.decoder import Block, Decoder

ABOUT = (
    "A three-layer decoder with seven kinds of attention learns Shakespeare by the character, and to find "
    "one token again in a window of 256; the loss is that on plays held out, the accuracy is told by "
    "distance. The learning rate is the better of two for full attention, on a play set aside."
)
CONFIG = {
    "seeds": [0, 1],
    "held_out": ["hamlet", "macbeth", "tempest"],
    "set_aside": ["othello"],
    "d_model": 64,
    "num_layers": 3,
    "num_heads": 4,
    "length": 256,
    "window": 32,
    "stride": 16,
    "summary": 2,
    "sinks": 4,
    "features": 64,
    "batch_size": 8,
    "steps": {"text": 400, "lookup": 800},
    "warmup": 40,
    "lr": 8e-3,
    "weight_decay": 0.01,
    "eval_windows": 96,
    "answers": 8,
    "nearest": 4,
    "bins": [16, 32, 64, 96, 128, 192, 256],
    "asked": 768,
}
DATA = ["shakespeare"]
TOLERANCE = {"loss": 2e-3, "results": 0.08}
REPLAY = ["text/strided/seed-0", "lookup/linear/seed-1"]
TASKS = ("text", "lookup")
KINDS = ("full", "window", "sinks", "strided", "fixed", "linear", "performer")


def arms(config: dict) -> list[str]:
    return [f"{task}/{kind}/seed-{seed}" for seed in config["seeds"] for task in TASKS for kind in KINDS]


def mask_of(kind: str, config: dict) -> Tensor:
    """Who sees whom, (T, T) bool, of a kind that has a mask."""
    T, window = config["length"], config["window"]
    if kind == "full":
        return causal_mask(T)
    if kind == "window":
        return sliding_window_mask(T, window=window)
    if kind == "sinks":  # as many keys a query: a narrower window, and the first positions for all
        mask = sliding_window_mask(T, window=window - config["sinks"])
        mask[:, : config["sinks"]] = True
        return mask & causal_mask(T)
    if kind == "strided":
        return strided_mask(T, stride=config["stride"])
    return fixed_mask(T, stride=config["stride"], summary=config["summary"])


class Turned(nn.Module):
    """Attention with rotary positions, and behind a mask where there is one."""

    def __init__(self, attn: Attention | LinearAttention, mask: Tensor | None = None) -> None:
        super().__init__()
        self.attn, self.rotary = attn, RotaryPositions(attn.head_dim)
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        rotary = self.rotary(torch.arange(x.size(1)), x.dtype)
        if self.mask is None:
            return self.attn(x, rotary=rotary)
        return self.attn(x, attn_mask=self.mask, rotary=rotary)


def branch(kind: str, config: dict) -> nn.Module:
    D, H = config["d_model"], config["num_heads"]
    attn = Attention(D, H)
    if kind not in ("linear", "performer"):
        return Turned(attn, mask_of(kind, config))
    if kind == "linear":
        return Turned(LinearAttention.from_attention(attn, causal=True))
    features = RandomFeatures(
        D // H, config["features"], stabilise_keys=False, generator=torch.Generator().manual_seed(7)
    )
    return Turned(LinearAttention.from_attention(attn, causal=True, feature_map=features))


def decoder(kind: str, config: dict, vocab_size: int) -> Decoder:
    D = config["d_model"]

    def norm() -> nn.Module:
        return LayerNorm(D)

    blocks = [
        Block(Residual(branch(kind, config), norm), Residual(FeedForward(D, 4 * D), norm))
        for _ in range(config["num_layers"])
    ]
    return Decoder(vocab_size, D, blocks, final_norm=norm())


def run(config: dict, arm: str, *, steps: int | None = None, log) -> dict:
    """Train one kind on one task: the held-out loss of the text, or how often the look-up is right."""
    task, kind, seed = arm.split("/")
    seed = int(seed.removeprefix("seed-"))
    T, total = config["length"], config["steps"][task]
    text = shakespeare_characters(fetch("shakespeare"), *config["held_out"], *config["set_aside"])
    judged = shakespeare_characters(fetch("shakespeare"), *config["held_out"])
    held_out = judged.held_out
    assert judged.alphabet == text.alphabet
    torch.manual_seed(seed)
    model = decoder(kind, config, text.vocab_size + config["answers"] + 1)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config["lr"], betas=(0.9, 0.95), weight_decay=config["weight_decay"]
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / config["warmup"], (total - step) / (total - config["warmup"])),
    )
    draws = torch.Generator().manual_seed(seed)
    for _ in range(min(total, steps or total)):
        window = random_windows(text.train, config["batch_size"], T + 1, generator=draws)
        if task == "text":
            loss = F.cross_entropy(model(window[:, :-1]).flatten(0, 1), window[:, 1:].flatten())
        else:
            tokens, answer, _ = planted(window[:, :T], text.vocab_size, config, draws)
            loss = F.cross_entropy(model(tokens)[:, -1], answer)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        log(loss.item(), of=total)
    if steps is not None:
        return {}
    model.eval()
    examination = torch.Generator().manual_seed(99)
    with torch.no_grad():
        if task == "text":
            window = random_windows(held_out, config["eval_windows"], T + 1, generator=examination)
            losses = F.cross_entropy(
                model(window[:, :-1]).flatten(0, 1), window[:, 1:].flatten(), reduction="none"
            ).view(len(window), T)
            by_place = losses.mean(0).view(-1, T // 8).mean(1)
            return {
                "loss": round(losses.mean().item(), 4),
                "by_place": [round(x, 4) for x in by_place.tolist()],
            }
        window = random_windows(held_out, config["asked"], T, generator=examination)
        tokens, answer, distance = planted(window, text.vocab_size, config, examination)
        right = model(tokens)[:, -1].argmax(-1) == answer
        edges = [0, *config["bins"]]
        shares = [
            right[(distance >= low) & (distance < high)].float().mean().item()
            for low, high in itertools.pairwise(edges)
        ]
        return {
            "accuracy": round(right.float().mean().item(), 4),
            "by_distance": [round(x, 4) for x in shares],
        }


def planted(
    window: Tensor, vocab_size: int, config: dict, draws: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Put an answer into each window and the question at its end: tokens, answers and their distances."""
    B, T = window.shape
    answer = vocab_size + torch.randint(config["answers"], (B,), generator=draws)
    distance = torch.randint(config["nearest"], T, (B,), generator=draws)
    tokens = window.clone()
    tokens[torch.arange(B), T - 1 - distance] = answer
    tokens[:, -1] = vocab_size + config["answers"]
    return tokens, answer, distance


def summarise(config: dict, runs: dict) -> dict:
    """For each kind: the mean loss, its change against full attention by seed, and the accuracy."""
    seeds = config["seeds"]
    out: dict[str, dict] = {}
    for kind in KINDS:
        loss = [runs[f"text/{kind}/seed-{seed}"]["loss"] for seed in seeds]
        base = [runs[f"text/full/seed-{seed}"]["loss"] for seed in seeds]
        found = [runs[f"lookup/{kind}/seed-{seed}"] for seed in seeds]
        out[kind] = {
            "loss": round(sum(loss) / len(seeds), 4),
            "change_of_each_seed": [round(a - b, 4) for a, b in zip(loss, base, strict=True)],
            "accuracy": [run["accuracy"] for run in found],
            "by_distance": [
                round(sum(shares) / len(seeds), 4)
                for shares in zip(*(run["by_distance"] for run in found), strict=True)
            ],
        }
    return {"kinds": out}
