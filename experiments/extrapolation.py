"""What does a position code do beyond the length it was trained on; what do stretching, and a few steps, buy?

Decoders that differ in how they are told places, and in nothing else, learn the next character of
Shakespeare's plays in windows of 64, and are tested in windows of up to 512. The arms of one seed see the
same batches. The loss is taken in three ways: over all of a text cut into windows (the curve everyone
quotes); at each place of the longest window; and of the same characters each time, with more or less text
before them, which tells a model that uses its context from one that merely survives it. The decoders with
rotary positions are tested with their frequencies stretched too, as they are and after a few steps on long
windows; one of their kind is trained on long windows from the start. Further arms learn to recall the later
of two marks, from distances within the training length, and are asked from beyond it; and the learning rate
is chosen on a play that is neither read nor judged.

Book: longer-contexts
"""

import copy
import functools
import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from textbook_code.data.sources import fetch
from textbook_code.data.text import random_windows, shakespeare_characters, shakespeare_text
from textbook_code.layers.attention import Attention
from textbook_code.layers.feed_forward import FeedForward
from textbook_code.layers.norms import RMSNorm
from textbook_code.layers.positions import (
    ALiBi,
    LearnedPositions,
    LinearScaling,
    NTKScaling,
    RelativeBias,
    RotaryPositions,
    SinusoidalPositions,
    YarnScaling,
)
from textbook_code.layers.residual import Residual
from textbook_code.models.text.decoder import Block, CausalAttention, Decoder

ABOUT = (
    "Three-layer decoders that differ in their position code alone learn Shakespeare by the character in "
    "windows of 64 and are tested in windows of up to 512, with RoPE also stretched, and stretched and "
    "trained on long windows for a few steps. The learning rate was chosen among three, with RoPE, on a play "
    "that is neither read nor judged, over a quarter of the steps; that of the few steps was not tuned."
)
CONFIG = {
    "seeds": [0, 1],
    "chosen_on": ["othello"],
    "held_out": ["hamlet", "macbeth", "tempest"],
    "d_model": 64,
    "num_layers": 3,
    "num_heads": 4,
    "length": 64,
    "longest": 512,
    "batch_size": 24,
    "steps": 300,
    "warmup": 50,
    "lr": 8e-3,
    "rates": [4e-3, 8e-3, 1.6e-2],
    "weight_decay": 0.01,
    "tune_steps": 40,
    "tune_lr": 1e-3,
    "num_buckets": 16,
    "max_distance": 32,
    "texts": 32,
    "judged": 128,
    "judged_each": 32,
    "bins": [0, 16, 32, 48, 64, 80, 96, 128, 192, 256, 384, 512],
    "recall": {"steps": 160, "lr": 4e-3, "fillers": 16, "marks": 8, "texts": 64},
    "distances": [16, 32, 56, 96, 128, 256, 448],
}
DATA = ["shakespeare"]
TOLERANCE = {"loss": 1e-3, "results": 0.1}
REPLAY = ["rope/seed-0", "alibi/seed-1"]
KINDS = ("learned", "sinusoidal", "nope", "t5", "rope", "alibi")
SCALINGS = ("pi", "ntk", "yarn")
LONG = "rope, trained long"
RECALL = ("nope", "t5", "rope", "alibi")
TUNED = ("none", "pi", "yarn")


def arms(config: dict) -> list[str]:
    seeds = config["seeds"]
    return [
        *(f"rate-{rate:g}" for rate in config["rates"]),
        *(f"{kind}/seed-{seed}" for seed in seeds for kind in (*KINDS, LONG)),
        *(f"recall {kind}/seed-{seed}" for seed in seeds for kind in RECALL),
    ]


class Waves(SinusoidalPositions):
    """Sinusoids as large as the bench's embeddings are at the start; the paper enlarges these instead."""

    def forward(self, T: int, *, start: int = 0) -> Tensor:
        return 0.02 * 2**0.5 * super().forward(T, start=start)


def build(config: dict, kind: str, vocab_size: int) -> Decoder:
    """A pre-norm decoder that is told places as `kind` says."""
    D, heads = config["d_model"], config["num_heads"]

    def attention() -> CausalAttention:
        rotary = RotaryPositions(D // heads) if kind in ("rope", LONG) else None
        bias = ALiBi(heads) if kind == "alibi" else None
        if kind == "t5":
            sizes = {"num_buckets": config["num_buckets"], "max_distance": config["max_distance"]}
            bias = RelativeBias(heads, bidirectional=False, **sizes)
        return CausalAttention(Attention(D, heads, bias=False), rotary=rotary, score_bias=bias)

    norm = functools.partial(RMSNorm, D)
    blocks = [
        Block(Residual(attention(), norm), Residual(FeedForward(D, 4 * D), norm))
        for _ in range(config["num_layers"])
    ]
    embed = {"learned": (LearnedPositions, config["length"]), "sinusoidal": (Waves, config["longest"])}
    make, rows = embed.get(kind, (None, 0))
    pos_embed = make(rows, D) if make else None
    return Decoder(vocab_size, D, blocks, pos_embed=pos_embed, final_norm=norm())


def stretch(model: Decoder, method: str, factor: float, original: int) -> Decoder:
    """A copy whose rotary positions are stretched; "none" leaves them."""
    make = {
        "none": lambda: None,
        "pi": lambda: LinearScaling(factor),
        "ntk": lambda: NTKScaling(factor),
        "yarn": lambda: YarnScaling(factor, original),
    }[method]
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, RotaryPositions):
            module.scaling = make()
    return model


def run(config: dict, arm: str, *, steps: int | None = None, log) -> dict:
    """One arm: the losses in nats a character of the trained decoder, or the shares recalled."""
    name, _, seed = arm.partition("/seed-")
    if name.startswith("rate-"):
        return rate(config, float(name[5:]), steps=steps, log=log)
    if name.startswith("recall "):
        return recall(config, name[7:], int(seed), steps=steps, log=log)
    L, longest = config["length"], config["longest"]
    length = longest if name == LONG else L
    model = trained(config, name, int(seed), length, config["steps"], config["lr"], steps=steps, log=log)
    if steps is not None:
        return {}
    lengths = [L] if name == "learned" else [L << i for i in range((longest // L).bit_length())]
    result = examine(config, model, lengths)
    if name == "rope":
        for method in SCALINGS:
            at_own_factor = {
                str(T): examine(config, stretch(model, method, T // L, L), [T]) for T in lengths[1:]
            }
            short = sliding(config, stretch(model, method, longest // L, L), L)
            result[method] = {
                "whole": {T: found["whole"][T] for T, found in at_own_factor.items()},
                "same": {T: found["same"][T] for T, found in at_own_factor.items()},
                "by_place": at_own_factor[str(longest)]["by_place"],
                "stretched_short": round(short, 4),
            }
        for method in TUNED:
            tuned = tune(config, stretch(model, method, longest // L, L), int(seed))
            result[f"{method}, tuned"] = examine(config, tuned, [L, longest])
    return result


def trained(
    config: dict, kind: str, seed: int, length: int, total: int, lr: float, *, steps: int | None, log
) -> Decoder:
    """A decoder after `total` steps, with as many characters a step whatever the length."""
    train, _, _, vocab_size = corpus(config)
    torch.manual_seed(seed)
    model = build(config, kind, vocab_size)
    count, draws = config["batch_size"] * config["length"] // length, torch.Generator().manual_seed(seed)
    learn(
        config,
        model,
        lambda: next_loss(model, random_windows(train, count, length + 1, generator=draws)),
        total,
        lr,
        steps=steps,
        log=log,
    )
    return model


def learn(config: dict, model: nn.Module, loss_of, total: int, lr: float, *, steps: int | None, log) -> None:
    """AdamW, a warm-up and a straight fall to 0."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=config["weight_decay"]
    )
    warmup = config["warmup"]
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, (total - step) / (total - warmup))
    )
    for _ in range(min(total, steps or total)):
        loss = loss_of()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        log(loss.item(), of=total)


def tune(config: dict, model: Decoder, seed: int) -> Decoder:
    """The model after a few steps at a constant rate on the longest windows."""
    train, _, _, _ = corpus(config)
    draws = torch.Generator().manual_seed(1000 + seed)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config["tune_lr"], betas=(0.9, 0.95), weight_decay=config["weight_decay"]
    )
    count = config["batch_size"] * config["length"] // config["longest"]
    for _ in range(config["tune_steps"]):
        loss = next_loss(model, random_windows(train, count, config["longest"] + 1, generator=draws))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return model


def rate(config: dict, lr: float, *, steps: int | None, log) -> dict:
    """Loss on the play kept for it, with RoPE after a quarter of the steps at this learning rate."""
    _, chosen_on, _, _ = corpus(config)
    draws = torch.Generator().manual_seed(98)
    window = random_windows(chosen_on, 512, config["length"] + 1, generator=draws)
    quarter = config["steps"] // 4
    model = trained(config, "rope", 0, config["length"], quarter, lr, steps=steps, log=log)
    with torch.no_grad():
        return {"loss": round(next_loss(model, window).item(), 4)}


@torch.no_grad()
def examine(config: dict, model: Decoder, lengths: list[int]) -> dict:
    """The loss in windows of each length: over a whole text, of the same characters, and by place."""
    _, _, test, _ = corpus(config)
    longest, bins = config["longest"], config["bins"]
    starts = torch.linspace(0, len(test) - longest - 1, config["texts"]).long()
    texts = test[starts[:, None] + torch.arange(longest + 1)]
    out: dict = {"whole": {}, "same": {}}
    for T in lengths:
        # windows of T out of each text: the same characters are judged whatever T
        each = losses(model, texts[:, :-1].reshape(-1, T), texts[:, 1:].reshape(-1, T))
        out["whole"][str(T)] = round(each.mean().item(), 4)
        out["same"][str(T)] = round(sliding(config, model, T), 4)
        if longest == T:
            spans = itertools.pairwise(bins)
            out["by_place"] = [round(each[:, a:b].mean().item(), 4) for a, b in spans]
    return out


@torch.no_grad()
def sliding(config: dict, model: Decoder, T: int) -> float:
    """The loss of the same characters for every T: the last few of a window of T that ends with them."""
    _, _, test, _ = corpus(config)
    last = config["judged_each"]
    ends = torch.linspace(config["longest"], len(test) - 1, config["judged"]).long()
    window = test[ends[:, None] + torch.arange(-T, 1)]
    return losses(model, window[:, :-1], window[:, 1:])[:, -last:].mean().item()


def losses(model: Decoder, inputs: Tensor, targets: Tensor) -> Tensor:
    """(N, T) losses, a few thousand characters at a time."""
    at_once = max(1, 8192 // inputs.size(1))
    parts = zip(inputs.split(at_once), targets.split(at_once), strict=True)
    return torch.cat([F.cross_entropy(model(x).transpose(1, 2), y, reduction="none") for x, y in parts])


def recall(config: dict, kind: str, seed: int, *, steps: int | None, log) -> dict:
    """The share of marks that a decoder recalls, having seen two among fillers, the later so many places ago.

    It is trained in windows of 64 to say at each place which mark it saw last; it is asked once, at the last
    place of a window in which the marks stood at the fourth and the eighth place.
    """
    sizes, L = config["recall"], config["length"]
    fillers, marks = sizes["fillers"], sizes["marks"]
    torch.manual_seed(seed)
    model, draws = build(config, kind, fillers + marks), torch.Generator().manual_seed(seed)

    def draw(places: Tensor, T: int) -> tuple[Tensor, Tensor]:  # (N, 2) places, in order
        tokens = torch.randint(fillers, (len(places), T), generator=draws)
        mark = fillers + torch.randint(marks, places.shape, generator=draws)
        return tokens.scatter(1, places, mark), mark

    def loss() -> Tensor:
        places = torch.rand(config["batch_size"], L - 1, generator=draws).topk(2).indices.sort().values
        tokens, mark = draw(places, L)
        seen = (torch.arange(L) > places[..., None]).sum(1)  # (N, L) marks before each place
        last = mark.gather(1, (seen - 1).clamp(min=0))
        return F.cross_entropy(model(tokens)[seen > 0], last[seen > 0])

    learn(config, model, loss, sizes["steps"], sizes["lr"], steps=steps, log=log)
    if steps is not None:
        return {}
    shares = {}
    for distance in config["distances"]:
        tokens, mark = draw(torch.tensor([3, 7]).expand(sizes["texts"], 2), 8 + distance)
        with torch.no_grad():
            said = torch.cat([model(part)[:, -1, fillers:] for part in tokens.split(16)]).argmax(-1)
        shares[str(distance)] = round((said + fillers == mark[:, 1]).double().mean().item(), 4)
    return shares


def summarise(config: dict, runs: dict) -> dict:
    """Means over the seeds, and of the losses the largest distance of a seed from its mean."""
    seeds = config["seeds"]

    def over(kind: str, *path: str) -> dict:
        """Of each length, the mean over seeds and the spread."""
        found = [functools.reduce(dict.__getitem__, path, runs[f"{kind}/seed-{seed}"]) for seed in seeds]
        means = {T: sum(run[T] for run in found) / len(found) for T in found[0]}
        spread = {T: max(abs(run[T] - means[T]) for run in found) for T in means}
        return {T: {"loss": round(means[T], 4), "spread": round(spread[T], 4)} for T in means}

    kinds = {kind: {way: over(kind, way) for way in ("whole", "same")} for kind in (*KINDS, LONG)}
    for method in SCALINGS:
        kinds[f"rope, {method}"] = {way: over("rope", method, way) for way in ("whole", "same")}
    for method in TUNED:
        name = f"rope, {method}, tuned"
        kinds[name] = {way: over("rope", f"{method}, tuned", way) for way in ("whole", "same")}
    rates = {f"{lr:g}": runs[f"rate-{lr:g}"]["loss"] for lr in config["rates"]}
    return {
        "kinds": kinds,
        "recall": {
            kind: {
                str(d): sum(runs[f"recall {kind}/seed-{seed}"][str(d)] for seed in seeds) / len(seeds)
                for d in config["distances"]
            }
            for kind in RECALL
        },
        "rates": rates,
    }


def corpus(config: dict) -> tuple[Tensor, Tensor, Tensor, int]:
    """Characters that are read, those the rate is chosen on, those that judge, and V."""
    folder, apart = fetch("shakespeare"), config["chosen_on"]
    characters = shakespeare_characters(folder, *apart, *config["held_out"])
    end = len(shakespeare_text(folder, *apart))
    return characters.train, characters.held_out[:end], characters.held_out[end:], characters.vocab_size


def next_loss(model: Decoder, window: Tensor) -> Tensor:
    """Cross-entropy of each next character, in nats."""
    return F.cross_entropy(model(window[:, :-1]).flatten(0, 1), window[:, 1:].flatten())
