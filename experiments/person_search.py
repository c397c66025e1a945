"""Which tiny vision transformer fits best into a microcontroller? A small search under a budget.

A base of the family is changed one choice at a time: the patches, the width, the depth, the heads, the norm,
the activation, the width of the feed-forward network. Every candidate keeps within 250 KB of flash, 64 KB of
activations and 15 million multiply-accumulates, learns the same pictures for as many steps, and is judged on
the validation split, where each source counts the same. Short trainings rank small differences by chance:
two seeds of one show how much.

Book: person-search
"""

import torch

from textbook_code.data.people import backgrounds, load
from textbook_code.models.vision.tiny_vit import TinyViT, TinyViTConfig
from textbook_code.optim.schedules import warmup_cosine
from textbook_code.training.loop import train
from textbook_code.training.pictures import balanced_batches, examined, one_logit_loss

ABOUT = (
    "Twelve tiny vision transformers within a budget of flash, activation memory and multiply-accumulates "
    "learn emoji, pedestrians and faces for equally many steps; judged by balanced accuracy on the "
    "validation split, averaged over the three sources."
)
CONFIG = {
    "seeds": [0, 1],
    "base": {"patch_size": 4, "d_model": 64, "num_layers": 4, "num_heads": 4, "d_ff": 128},
    "candidates": {
        "base": {},
        "layer-norm": {"norm": "layer"},
        "hardswish": {"activation": "hardswish"},
        "one-head": {"num_heads": 1},
        "two-layers": {"num_layers": 2},
        "wide-ffn": {"d_ff": 256, "num_layers": 3},
        "width-32": {"d_model": 32, "d_ff": 64},
        "patch-8": {"patch_size": 8},
        "patch-8-layer-norm": {"patch_size": 8, "norm": "layer"},
        "patch-8-width-32": {"patch_size": 8, "d_model": 32, "d_ff": 64},
        "patch-8-two-layers": {"patch_size": 8, "d_model": 96, "d_ff": 192, "num_layers": 2},
        "patch-8-six-layers": {"patch_size": 8, "num_layers": 6},
    },
    "again": ["patch-8"],
    "budget": {"flash_bytes": 250_000, "peak_activation_bytes": 65_536, "macs": 15_000_000},
    "shares": {"emoji": 2, "pedestrians": 1, "faces": 1},
    "batch_size": 64,
    "steps": 200,
    "warmup": 20,
    "floor": 0.02,
    "lr": 1.5e-3,
    "weight_decay": 0.05,
}
DATA = ["emoji-google", "emoji-twitter", "scikit-image"]
TOLERANCE = {"loss": 1e-3, "results": 0.08}
REPLAY = ["patch-8/seed-0", "patch-8-layer-norm/seed-0"]


def arms(config: dict) -> list[str]:
    first, names = config["seeds"][0], list(config["candidates"])
    return [f"{name}/seed-{first}" for name in names] + [
        f"{name}/seed-{first + 1}" for name in config["again"]
    ]


def run(config: dict, arm: str, *, steps: int | None = None, log) -> dict:
    """Train one candidate; returns its sizes and its measures on the validation split of each source."""
    name, seed = arm.split("/seed-")[0], int(arm.split("/seed-")[1])
    size = TinyViTConfig(**config["base"] | config["candidates"][name])
    over = {
        what: getattr(size, what) for what, most in config["budget"].items() if getattr(size, what) > most
    }
    if over:
        raise ValueError(f"candidates: {name} is beyond the budget with {over}")
    shares, total = config["shares"], config["steps"]
    torch.manual_seed(seed)
    model = TinyViT(size)
    done = train(
        model,
        one_logit_loss,
        balanced_batches(
            shares,
            {source: load(source, "train") for source in shares},
            batch_size=config["batch_size"],
            backgrounds=backgrounds(),
        ),
        steps=min(total, steps or total),
        optimizer=torch.optim.AdamW(
            model.parameters(), lr=config["lr"], weight_decay=config["weight_decay"], fused=True
        ),
        schedule=warmup_cosine(config["warmup"], total, floor=config["floor"]),
        seed=seed,
        progress=False,
    )
    for loss in done.losses:
        log(loss, of=total)
    if steps is not None:
        return {}
    return {
        "parameters": size.num_parameters,
        **{what: getattr(size, what) for what in config["budget"]},
        "validation": {source: examined(model, load(source, "validation")) for source in shares},
    }


def summarise(config: dict, runs: dict) -> dict:
    """For each candidate its sizes and mean balanced accuracy, and who is on the fronts of two costs."""
    out = {}
    for arm, result in runs.items():
        each = {source: found["balanced_accuracy"] for source, found in result["validation"].items()}
        loss = sum(found["loss"] for found in result["validation"].values()) / len(each)
        out[arm] = {
            **{what: result[what] for what in ("parameters", *config["budget"])},
            "by_source": each,
            "balanced_accuracy": round(sum(each.values()) / len(each), 4),
            "loss": round(loss, 4),
        }
    first = {arm.split("/")[0]: found for arm, found in out.items() if arm.endswith(f"-{config['seeds'][0]}")}
    return {
        "candidates": out,
        "fronts": {cost: front(first, cost) for cost in ("macs", "flash_bytes")},
        "seeds_differ_by": {
            name: round(abs(first[name]["balanced_accuracy"] - other["balanced_accuracy"]), 4)
            for name in config["again"]
            for other in [out[f"{name}/seed-{config['seeds'][1]}"]]
        },
    }


def front(found: dict, cost: str) -> list[str]:
    """The candidates than which none is both as cheap and as good, the cheapest first."""
    names = sorted(found, key=lambda name: (found[name][cost], -found[name]["balanced_accuracy"]))
    best, kept = -1.0, []
    for name in names:
        if found[name]["balanced_accuracy"] > best:
            best, kept = found[name]["balanced_accuracy"], [*kept, name]
    return kept
