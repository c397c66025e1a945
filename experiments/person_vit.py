"""The tiny vision transformer that the book carries to a microcontroller: person or not, in 32 × 32 pixels.

A teacher of the same family, four times as wide patches and fourteen times as many parameters, learns emoji,
pedestrians and faces together. A student that fits the budget learns the same batches twice, from the labels
alone and also from the teacher's logits. The student that had a teacher then goes on for a while with the
rounding of int8 in its forward pass, its norms folded; that folded model is the checkpoint.

How the settings were chosen: the learning rate by runs of a quarter of the length on the validation split;
the student's size before any search, as the greatest of this shape in the budget of activation memory that
the microcontroller leaves.

Book: person-distill
"""

import functools
import json

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from textbook_code.compression.quantize import prepare
from textbook_code.data.people import backgrounds, load
from textbook_code.models.vision.tiny_vit import TinyViT, TinyViTConfig, fold
from textbook_code.optim.schedules import warmup_cosine
from textbook_code.training.distillation import one_logit_soft_loss
from textbook_code.training.loop import train
from textbook_code.training.pictures import balanced_batches, examined, one_logit_loss

ABOUT = (
    "A tiny vision transformer learns to tell people from the rest in emoji, pedestrians and faces together: "
    "with and without a larger teacher of the same family, then with the rounding of int8 in its forward "
    "pass. Tested on each source by itself, and on a few photographs that no model has trained on."
)
CONFIG = {
    "seeds": [0],
    "shares": {"emoji": 2, "pedestrians": 1, "faces": 1},
    "tested": ["emoji", "pedestrians", "faces", "photographs"],
    "student": {"patch_size": 4, "d_model": 64, "num_layers": 4, "num_heads": 4, "d_ff": 128},
    "teacher": {"patch_size": 8, "d_model": 128, "num_layers": 6, "num_heads": 4, "d_ff": 256},
    "batch_size": 64,
    "steps": {"teacher": 2400, "student": 2400, "quantised": 120},
    "warmup": 100,
    "lr": {"teacher": 1e-3, "student": 1.5e-3, "quantised": 1e-4},
    "floor": 0.02,
    "weight_decay": 0.05,
    "temperature": 2.0,
    "soft_weight": 0.7,
    "calibration": 256,
    "calibrate_every": 30,
}
DATA = ["emoji-google", "emoji-twitter", "scikit-image"]
TOLERANCE = {"loss": 1e-3, "results": 0.05}
REPLAY = ["teacher/seed-0", "plain/seed-0"]
CHECKPOINT = {
    "name": "person-vit",
    "arm": "quantised/seed-0",
    "metric": "emoji_balanced_accuracy",
    "interval": "emoji_interval",
}


def arms(config: dict) -> list[str]:
    kinds = ("teacher", "plain", "distilled", "quantised")
    return [f"{kind}/seed-{seed}" for seed in config["seeds"] for kind in kinds]


def run(config: dict, arm: str, *, steps: int | None = None, log) -> dict | tuple:
    """Train one model; returns its measures on each source, and for the last kind the model."""
    kind, seed = arm.split("/seed-")[0], int(arm.split("/seed-")[1])
    model = trained(config, kind, seed, steps=steps, log=log)
    if steps is not None:
        return {}
    results: dict = {"sizes": sizes(model.config)}
    for split in ("validation", "test"):
        sources = [name for name in config["tested"] if split == "test" or name in config["shares"]]
        results[split] = {name: examined(model, load(name, split)) for name in sources}
    emoji = results["test"]["emoji"]
    results |= {"emoji_balanced_accuracy": emoji["balanced_accuracy"], "emoji_interval": emoji["interval"]}
    return (results, model) if arm == CHECKPOINT["arm"] else results


def summarise(config: dict, runs: dict) -> dict:
    """For each kind its sizes and, by source, balanced accuracy, interval and ROC area on the test split."""
    out = {}
    for arm, result in runs.items():
        test = {
            name: {key: measures[key] for key in ("balanced_accuracy", "interval", "roc_area")}
            for name, measures in result["test"].items()
        }
        out[arm.split("/")[0]] = {"sizes": result["sizes"], "test": test}
    return out


def sample(config: dict, model: nn.Module) -> float:
    """The loss on the pedestrians and faces of the test, in nats."""
    losses = [examined(model, load(name, "test"))["loss"] for name in ("emoji", "pedestrians", "faces")]
    return round(sum(losses) / len(losses), 5)


def sizes(config: TinyViTConfig) -> dict[str, int]:
    return {
        "parameters": config.num_parameters,
        "macs": config.macs,
        "flash_bytes": config.flash_bytes,
        "peak_activation_bytes": config.peak_activation_bytes,
    }


def trained(config: dict, kind: str, seed: int, *, steps: int | None = None, log=None) -> TinyViT:
    """The model of one kind; what another one learns from is kept, or trained first."""
    if steps is None and log is None:
        return _kept(json.dumps(config), kind, seed)
    model = (
        quantised(config, seed, steps, log) if kind == "quantised" else learnt(config, kind, seed, steps, log)
    )
    if steps is None:
        KEPT[json.dumps(config), kind, seed] = model
    return model


KEPT: dict[tuple[str, str, int], TinyViT] = {}  # models of this process


def _kept(config: str, kind: str, seed: int) -> TinyViT:
    if (config, kind, seed) not in KEPT:
        trained(json.loads(config), kind, seed, log=lambda loss, *, of: None)
    return KEPT[config, kind, seed]


@functools.cache
def batches(batch_size: int, shares: str):
    named = json.loads(shares)
    pictures = {name: load(name, "train") for name in named}
    return balanced_batches(named, pictures, batch_size=batch_size, backgrounds=backgrounds())


def learnt(config: dict, kind: str, seed: int, steps: int | None, log) -> TinyViT:
    """Trained from the start: on the labels, and where it is to be distilled on the teacher's logits too."""
    size = "teacher" if kind == "teacher" else "student"
    teacher = trained(config, "teacher", seed).eval() if kind == "distilled" else None
    torch.manual_seed(seed)
    model = TinyViT(TinyViTConfig(**config[size]))

    def loss_fn(student: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        if teacher is None:
            return one_logit_loss(student, batch)
        images, labels = batch
        with torch.no_grad():
            told = teacher(images)
        logits = student(images)
        hard = F.binary_cross_entropy_with_logits(logits, labels)
        soft = one_logit_soft_loss(logits, told, temperature=config["temperature"])
        return (1 - config["soft_weight"]) * hard + config["soft_weight"] * soft

    total = config["steps"][size]
    fit(config, model, loss_fn, size, seed, total, steps, log)
    return model.eval()


def quantised(config: dict, seed: int, steps: int | None, log) -> TinyViT:
    """The distilled student, folded, trained a little more with the rounding of int8."""
    student, teacher = (trained(config, kind, seed).eval() for kind in ("distilled", "teacher"))
    draw = torch.Generator().manual_seed(1000 + seed)
    pictures = batches(config["calibration"], json.dumps(config["shares"]))(0, draw)[0]
    aware = prepare(fold(student), pictures)
    seen = 0

    def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        nonlocal seen
        if seen and seen % config["calibrate_every"] == 0:
            aware.calibrate(pictures)
        seen += 1
        images, labels = batch
        with torch.no_grad():
            told = teacher(images)
        logits = model(images)
        hard = F.binary_cross_entropy_with_logits(logits, labels)
        soft = one_logit_soft_loss(logits, told, temperature=config["temperature"])
        return (1 - config["soft_weight"]) * hard + config["soft_weight"] * soft

    fit(config, aware, loss_fn, "quantised", 1000 + seed, config["steps"]["quantised"], steps, log)
    return aware.finished()


def fit(config: dict, model: nn.Module, loss_fn, size: str, seed: int, total: int, steps, log) -> None:
    done = train(
        model,
        loss_fn,
        batches(config["batch_size"], json.dumps(config["shares"])),
        steps=min(total, steps or total),
        optimizer=torch.optim.AdamW(
            model.parameters(), lr=config["lr"][size], weight_decay=config["weight_decay"], fused=True
        ),
        schedule=warmup_cosine(min(config["warmup"], total // 10), total, floor=config["floor"]),
        seed=seed,
        progress=False,
    )
    for loss in done.losses:
        log(loss, of=total)
