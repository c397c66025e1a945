"""Does a model that knows pictograms of people know people? Trained on one kind of picture, tested on each.

The tiny vision transformer of the default size learns emoji alone, photographs alone (pedestrians and faces),
or both, and is tested on every source by itself. Beside it, trained on both: logistic regression on pixels,
a small convolutional network that takes as many multiply-accumulates, and MobileNet-v1 of a quarter's width.
The models of one seed see the same pictures where they learn from the same sources.

How the settings were chosen: the learning rate is that of person_vit; none was tried here for any baseline
but the regression on pixels, which has a hundred times fewer weights and gets more.

Book: person-transfer
"""

import torch

from textbook_code.data.people import backgrounds, load
from textbook_code.models.vision.baselines import MobileNetV1, PixelRegression, SmallCnn
from textbook_code.models.vision.tiny_vit import TinyViT, TinyViTConfig
from textbook_code.optim.schedules import warmup_cosine
from textbook_code.training.loop import train
from textbook_code.training.pictures import balanced_batches, examined, one_logit_loss

ABOUT = (
    "A tiny vision transformer learns to tell people from the rest in emoji, in photographs (pedestrians and "
    "faces), or in both, and is tested on each source by itself; beside it, trained on both, logistic "
    "regression on pixels, a convolutional network of equal cost, and MobileNet-v1 of a quarter's width."
)
CONFIG = {
    "seeds": [0, 1],
    "shares": {
        "emoji": {"emoji": 1},
        "photographs": {"pedestrians": 1, "faces": 1},
        "both": {"emoji": 2, "pedestrians": 1, "faces": 1},
    },
    "tested": ["emoji", "pedestrians", "faces", "photographs"],
    "student": {"patch_size": 4, "d_model": 64, "num_layers": 4, "num_heads": 4, "d_ff": 128},
    "batch_size": 64,
    "steps": 400,
    "warmup": 50,
    "floor": 0.02,
    "lr": {"vit": 1.5e-3, "pixels": 1e-2, "cnn": 1.5e-3, "mobilenet": 1.5e-3},
    "weight_decay": 0.05,
}
DATA = ["emoji-google", "emoji-twitter", "scikit-image"]
TOLERANCE = {"loss": 1e-3, "results": 0.08}
REPLAY = ["vit-emoji/seed-0", "pixels-both/seed-0"]


def arms(config: dict) -> list[str]:
    trained = [f"vit-{on}/seed-{seed}" for on in config["shares"] for seed in config["seeds"]]
    return trained + [f"{name}-both/seed-{config['seeds'][0]}" for name in ("pixels", "cnn", "mobilenet")]


def run(config: dict, arm: str, *, steps: int | None = None, log) -> dict:
    """Train one model; returns its sizes and its measures on the test split of each source."""
    name, seed = arm.split("/seed-")[0], int(arm.split("/seed-")[1])
    kind, on = name.split("-")
    shares, total = config["shares"][on], config["steps"]
    torch.manual_seed(seed)
    model = {
        "vit": lambda: TinyViT(TinyViTConfig(**config["student"])),
        "pixels": PixelRegression,
        "cnn": SmallCnn,
        "mobilenet": MobileNetV1,
    }[kind]()
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
            model.parameters(), lr=config["lr"][kind], weight_decay=config["weight_decay"], fused=True
        ),
        schedule=warmup_cosine(config["warmup"], total, floor=config["floor"]),
        seed=seed,
        progress=False,
    )
    for loss in done.losses:
        log(loss, of=total)
    if steps is not None:
        return {}
    known = model.config if kind == "vit" else model
    return {
        "parameters": known.num_parameters,
        "macs": known.macs,
        "test": {source: examined(model, load(source, "test")) for source in config["tested"]},
    }


def summarise(config: dict, runs: dict) -> dict:
    """For each model and what it was trained on, by source: the measures of each seed and their mean."""
    out: dict = {}
    for arm, result in runs.items():
        entry = out.setdefault(
            arm.split("/")[0], {"parameters": result["parameters"], "macs": result["macs"], "test": {}}
        )
        for source, measures in result["test"].items():
            kept = entry["test"].setdefault(source, {"each": [], "intervals": [], "roc_areas": []})
            kept["each"].append(measures["balanced_accuracy"])
            kept["intervals"].append(measures["interval"])
            kept["roc_areas"].append(measures["roc_area"])
            kept["balanced_accuracy"] = round(sum(kept["each"]) / len(kept["each"]), 4)
    return out
