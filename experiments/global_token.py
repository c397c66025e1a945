"""Evidence that stands far away: does it reach [CLS] through windows alone, and through one global token?

A page of Shakespeare by the character, with [CLS] before it and one of four marks put in place of one of its
characters, anywhere. A small encoder has to say from [CLS] which of the four marks it was. Four kinds of
attention: windows alone; windows and [CLS] as a global token, with projections of its own as the Longformer
has them, or with the ordinary ones; full attention. The accuracy is that on plays held out, by the distance
between [CLS] and the mark.

Book: sparse-global-token
"""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from textbook_code.data.sources import fetch
from textbook_code.data.text import Characters, random_windows, shakespeare_characters
from textbook_code.layers.embeddings import TokenEmbedding
from textbook_code.layers.feed_forward import FeedForward
from textbook_code.layers.norms import LayerNorm
from textbook_code.layers.positions import LearnedPositions
from textbook_code.layers.residual import Residual
from textbook_code.layers.sparse_attention import LongformerAttention

ABOUT = (
    "A small encoder of Shakespeare's characters has to say from [CLS] which of four marks stands somewhere "
    "in its text: with windows alone, with [CLS] as a global token (projections of its own, or shared ones), "
    "and with full attention. The learning rate was chosen between two by windows alone with another seed, "
    "on the same plays held out, and is the same for all."
)
CONFIG = {
    "seeds": [0, 1],
    "held_out": ["hamlet", "macbeth", "tempest"],
    "marks": 4,
    "length": 128,
    "window": 32,
    "num_layers": 2,
    "d_model": 32,
    "num_heads": 4,
    "batch_size": 32,
    "steps": 500,
    "warmup": 50,
    "lr": 5e-3,
    "weight_decay": 0.01,
    "eval_texts": 4096,
    "bucket": 8,
}
DATA = ["shakespeare"]
TOLERANCE = {"loss": 1e-3, "results": 0.06}
REPLAY = ["window/seed-0", "global/seed-0"]
KINDS = ("window", "global", "shared", "full")


def arms(config: dict) -> list[str]:
    return [f"{kind}/seed-{seed}" for seed in config["seeds"] for kind in KINDS]


class Encoder(nn.Module):
    """Pre-norm blocks of one kind of attention, and a linear map from [CLS] to the marks."""

    def __init__(self, config: dict, kind: str, vocab_size: int) -> None:
        super().__init__()
        D, T, H = config["d_model"], config["length"], config["num_heads"]
        norm = functools.partial(LayerNorm, D)
        self.kind = kind
        self.token_embed = TokenEmbedding(vocab_size, D)
        self.pos_embed = LearnedPositions(T, D)
        self.attn = nn.ModuleList()
        self.ffn = nn.ModuleList()
        for _ in range(config["num_layers"]):
            full = kind == "full"
            attn = LongformerAttention(D, H, window=2 * T if full else config["window"], dense=full)
            self.attn.append(Residual(attn, norm))
            self.ffn.append(Residual(FeedForward(D, 4 * D, activation="gelu"), norm))
        self.final_norm = norm()
        self.classifier = nn.Linear(D, config["marks"])
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding | LearnedPositions):
                nn.init.normal_(module.weight, std=module.weight.size(-1) ** -0.5)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)
        for residual in self.attn:  # all start with equal projections; those of `shared` are one
            branch = residual.branch
            branch.start_global_from_local()
            if kind == "shared":
                branch.q_global_proj, branch.k_global_proj = branch.q_proj, branch.k_proj
                branch.v_global_proj = branch.v_proj

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.token_embed(tokens) + self.pos_embed(tokens.size(1))
        first = None
        if self.kind in ("global", "shared"):
            first = torch.zeros_like(tokens, dtype=torch.bool)
            first[:, 0] = True
        for attn, ffn in zip(self.attn, self.ffn, strict=True):
            x = ffn(attn(x, global_mask=first))
        return self.classifier(self.final_norm(x[:, 0]))


def run(config: dict, arm: str, *, steps: int | None = None, log) -> dict:
    """Train one arm; returns the held-out accuracy, and that by the distance of the mark."""
    kind, seed = arm.split("/seed-")
    total = config["steps"]
    text = corpus(*config["held_out"])
    torch.manual_seed(int(seed))
    model = Encoder(config, kind, text.vocab_size + 1 + config["marks"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=config["lr"], weight_decay=config["weight_decay"])
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / config["warmup"], (total - step) / (total - config["warmup"])),
    )
    draws = torch.Generator().manual_seed(int(seed))
    for _ in range(min(total, steps or total)):
        tokens, mark, _ = batch(config, text, text.train, config["batch_size"], draws)
        loss = F.cross_entropy(model(tokens), mark)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        log(loss.item(), of=total)
    if steps is not None:
        return {}
    tokens, mark, place = batch(
        config, text, text.held_out, config["eval_texts"], torch.Generator().manual_seed(99)
    )
    with torch.no_grad():
        right = torch.cat([model(part).argmax(-1) for part in tokens.split(256)]) == mark
    buckets = [
        right[(place - 1) // config["bucket"] == i]
        for i in range(-(-(config["length"] - 1) // config["bucket"]))
    ]
    return {
        "accuracy": round(right.double().mean().item(), 4),
        "by_distance": [round(bucket.double().mean().item(), 3) for bucket in buckets],
        "parameters": sum(p.numel() for p in model.parameters()),
    }


def summarise(config: dict, runs: dict) -> dict:
    """For each kind: the accuracy of each seed, near (as far as windows reach) and far, and over all."""
    reach = config["num_layers"] * config["window"] // 2
    near = reach // config["bucket"]
    out = {}
    for kind in KINDS:
        each = [runs[f"{kind}/seed-{seed}"] for seed in config["seeds"]]
        curves = [run["by_distance"] for run in each]
        out[kind] = {
            "accuracy": [run["accuracy"] for run in each],
            "near": [round(sum(curve[:near]) / near, 3) for curve in curves],
            "far": [round(sum(curve[near:]) / len(curve[near:]), 3) for curve in curves],
            "parameters": each[0]["parameters"],
        }
    return {"kinds": out, "reach": reach, "chance": round(1 / config["marks"], 3)}


@functools.cache
def corpus(*held_out: str) -> Characters:
    return shakespeare_characters(fetch("shakespeare"), *held_out)


def batch(
    config: dict, text: Characters, source: Tensor, count: int, draws: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """`count` texts (count, T) that begin with [CLS], the mark in each, and the place where it stands."""
    V, T = text.vocab_size, config["length"]
    page = random_windows(source, count, T - 1, generator=draws)
    tokens = torch.cat([torch.full((count, 1), V), page], 1)
    place = torch.randint(1, T, (count,), generator=draws)
    mark = torch.randint(config["marks"], (count,), generator=draws)
    tokens[torch.arange(count), place] = V + 1 + mark
    return tokens, mark, place
