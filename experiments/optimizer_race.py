"""Six optimizers, one language model: who is lower at equal tokens, and who at equal processor time?

A two-layer decoder learns the next character of Shakespeare's plays with AdamW, Lion, Sophia in both its
forms, Muon (with AdamW for all that is no matrix inside a block), and gradient descent with momentum as the
floor. Each has a learning rate of its own, chosen in the arms `sweep/…`: shorter runs of a seed that is not
raced, judged on plays that are neither read nor raced on; Sophia's γ or ρ was chosen there too. Beside
AdamW's decay of 0.1 stand those that Lion's paper, Sophia's released settings and torch's Muon have beside
it. The arms of one seed see the same batches. The arms
`half/…` have half the steps, and a schedule of that length. A further arm times the parts of a step, in
turns.

Book: second-order
"""

import functools
import statistics
import time
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from textbook_code.data.sources import fetch
from textbook_code.data.text import random_windows, shakespeare_characters, shakespeare_text
from textbook_code.layers.attention import Attention
from textbook_code.layers.feed_forward import FeedForward
from textbook_code.layers.norms import LayerNorm
from textbook_code.layers.positions import LearnedPositions
from textbook_code.layers.residual import Residual
from textbook_code.models.text.decoder import Block, Decoder
from textbook_code.optim.adamw import AdamW
from textbook_code.optim.groups import decay_groups
from textbook_code.optim.lion import Lion
from textbook_code.optim.muon import Muon
from textbook_code.optim.schedules import warmup_linear
from textbook_code.optim.sophia import SophiaG, SophiaH, hutchinson_diagonal, sample_labels

ABOUT = (
    "A two-layer decoder learns Shakespeare by the character with six optimizers, each at the learning rate "
    "that was best in a sweep of shorter runs on other plays and another seed; the loss is that on plays "
    "held out, at equal tokens, and at equal time by step costs that were measured in turns."
)
CONFIG = {
    "seeds": [0, 1, 2],
    "judged": ["hamlet", "macbeth", "tempest"],
    "tuned_on": ["othello", "twelfth_night"],
    "d_model": 64,
    "num_layers": 2,
    "num_heads": 4,
    "max_seq_len": 48,
    "batch_size": 12,
    "steps": 960,
    "warmup_share": 0.1,
    "clip_norm": 1.0,
    "eval_every": 60,
    "eval_windows": 192,
    "update_every": 10,
    "sweep_seed": 7,
    "sweep_steps": 240,
    "weight_decay": {"adamw": 0.1, "lion": 1.0, "sophiag": 0.2, "sophiah": 0.2, "muon": 0.1, "sgd": 0.0},
    "chosen": {
        "adamw": [8e-3],
        "lion": [2e-3],
        "sophiag": [1e-3, 0.01],
        "sophiah": [1e-3, 0.1],
        "muon": [4e-2],
        "sgd": [0.4],
    },
    "sweep": {
        "adamw": [[2e-3], [4e-3], [8e-3], [1.6e-2]],
        "lion": [[2.5e-4], [5e-4], [1e-3], [2e-3], [4e-3]],
        "sophiag": [
            [2.5e-4, 0.05],
            [5e-4, 0.05],
            [1e-3, 0.05],
            [1e-3, 0.01],
            [2e-3, 0.01],
            [1e-3, 0.5],
            [2e-3, 0.5],
            [4e-3, 2.0],
        ],
        "sophiah": [
            [5e-4, 0.01],
            [1e-3, 0.01],
            [5e-4, 0.1],
            [1e-3, 0.1],
            [2e-3, 0.1],
            [1e-3, 0.5],
            [4e-3, 0.5],
        ],
        "muon": [[1e-2], [2e-2], [4e-2], [8e-2]],
        "sgd": [[0.1], [0.2], [0.4], [0.8]],
    },
    "halved": ["adamw", "lion", "sophiag", "sophiah", "muon"],
    "timed_rounds": 40,
}
DATA = ["shakespeare"]
TOLERANCE = {"loss": 1e-3, "results": 0.05}
REPLAY = ["adamw/seed-0", "sophiag/seed-0", "sophiah/seed-0", "muon/seed-0"]
KINDS = ("adamw", "lion", "sophiag", "sophiah", "muon", "sgd")


def arms(config: dict) -> list[str]:
    sweep = [f"sweep/{kind}/{_label(one)}" for kind in KINDS for one in config["sweep"][kind]]
    raced = [f"{kind}/seed-{seed}" for seed in config["seeds"] for kind in KINDS]
    halved = [f"half/{kind}/seed-{seed}" for seed in config["seeds"] for kind in config["halved"]]
    return [*sweep, *raced, *halved, "step-time"]


def run(config: dict, arm: str, *, steps: int | None = None, log) -> dict:
    """One arm; the losses are in nats a character."""
    if arm == "step-time":
        return step_times(config, steps=steps, log=log)
    first, *rest = arm.split("/")
    if first == "sweep":
        kind, label = rest
        settings = next(one for one in config["sweep"][kind] if _label(one) == label)
        total, seed, examined = config["sweep_steps"], config["sweep_seed"], "tuned_on"
    else:
        kind = rest[0] if first == "half" else first
        seed, settings, examined = int(arm.rpartition("-")[2]), config["chosen"][kind], "judged"
        total = config["steps"] // 2 if first == "half" else config["steps"]
    text, vocab_size = corpus(tuple(config["judged"]), tuple(config["tuned_on"]))
    torch.manual_seed(seed)
    model = decoder(config, vocab_size)
    trainer = Trainer(config, model, kind, settings, total, seed)
    draws = torch.Generator().manual_seed(seed)
    length = config["max_seq_len"] + 1
    examination = random_windows(
        text[examined], config["eval_windows"], length, generator=torch.Generator().manual_seed(99)
    )
    curve, probes = [], []
    for step in range(min(total, steps or total)):
        window = random_windows(text["train"], config["batch_size"], length, generator=draws)
        last = (step + 1) % config["eval_every"] == 0
        before = [p.detach().clone() for p in model.parameters()] if last else []
        loss = trainer.step(window)
        log(loss, of=total)
        if not loss < 20:  # it went astray
            return {"loss": None}
        if last:
            moved = [(p.detach() - b).abs() for p, b in zip(model.parameters(), before, strict=True)]
            size = torch.cat([m.flatten() for m in moved])
            probes.append(
                {
                    "step": step + 1,
                    "largest_move": float(f"{size.max().item():.3g}"),
                    "rms_move": float(f"{size.square().mean().sqrt().item():.3g}"),
                }
            )
            if kind.startswith("sophia"):
                probes[-1] |= trainer.clipping()
            if first != "sweep" or step + 1 == total:
                with torch.no_grad():
                    curve.append(round(next_loss(model, examination).item(), 4))
    if steps is not None:
        return {}
    return {"loss": curve[-1], "curve": curve, "probes": probes}


class Trainer:
    """A model's optimizer, or optimizers, and one step of it."""

    def __init__(self, config: dict, model: nn.Module, kind: str, settings: list, total: int, seed: int):
        self.config, self.model, self.kind = config, model, kind
        self.labels = torch.Generator().manual_seed(1000 + seed)
        lr, decay = settings[0], config["weight_decay"][kind]
        groups = decay_groups(model, decay)
        tokens = config["batch_size"] * config["max_seq_len"]
        k = config["update_every"]
        if kind == "adamw":
            self.optimizers = [AdamW(groups, lr=lr, betas=(0.9, 0.95))]
        elif kind == "lion":
            self.optimizers = [Lion(groups, lr=lr, betas=(0.9, 0.99))]
        elif kind == "sophiag":
            self.optimizers = [SophiaG(groups, lr=lr, rho=settings[1], batch_tokens=tokens, update_every=k)]
        elif kind == "sophiah":
            self.optimizers = [SophiaH(groups, lr=lr, gamma=settings[1], update_every=k)]
        elif kind == "muon":  # the matrices that decay are those inside the blocks
            matrices, others = groups
            self.optimizers = [
                Muon([matrices], lr=lr, match_rms=True, ns_dtype=None),
                AdamW([others], lr=lr, betas=(0.9, 0.95)),
            ]
        else:
            self.optimizers = [torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)]
        schedule = warmup_linear(round(config["warmup_share"] * total), total)
        self.schedules = [torch.optim.lr_scheduler.LambdaLR(o, schedule) for o in self.optimizers]
        self.members = [p for group in self.optimizers[0].param_groups for p in group["params"]]

    def step(self, window: Tensor) -> float:
        """One step on a batch, (B, T + 1); returns the loss before it."""
        optimizer = self.optimizers[0]
        if self.kind.startswith("sophia") and optimizer.hessian_due:
            self.look_at_curvature(window)
        loss = next_loss(self.model, window)
        self.model.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.config["clip_norm"])
        for one, schedule in zip(self.optimizers, self.schedules, strict=True):
            one.step()
            schedule.step()
        return loss.item()

    def look_at_curvature(self, window: Tensor) -> None:
        """A new estimate of the Hessian's diagonal, from the same batch as the step's."""
        optimizer = self.optimizers[0]
        if self.kind == "sophiag":
            self.model.zero_grad()
            logits = self.model(window[:, :-1])
            labels = sample_labels(logits, self.labels)
            F.cross_entropy(logits.flatten(0, 1), labels.flatten()).backward()
            optimizer.update_hessian()
        else:
            with sdpa_kernel(SDPBackend.MATH):  # the fused kernel cannot be differentiated twice
                loss = next_loss(self.model, window)
                optimizer.update_hessian(hutchinson_diagonal(loss, self.members, self.labels))

    def clipping(self) -> dict:
        """The share of coordinates that are not clipped, and that whose curvature is not positive."""
        free = flat = count = 0
        for group in self.optimizers[0].param_groups:
            for p in group["params"]:
                m, h = self.optimizers[0].state[p]["m"], self.optimizers[0].state[p]["h"]
                if self.kind == "sophiag":
                    scale = group["rho"] * group["batch_tokens"] * h + 1e-15
                else:
                    scale = (group["gamma"] * h).clamp(min=group["eps"])
                free += int((m.abs() < scale).sum())
                flat += int((h <= 0).sum())
                count += p.numel()
        return {"unclipped": round(free / count, 4), "not_positive": round(flat / count, 4)}


def step_times(config: dict, *, steps: int | None, log) -> dict:
    """CPU milliseconds of a step of each, and of an estimate of Sophia's: medians over rounds in turns."""
    text, vocab_size = corpus(tuple(config["judged"]), tuple(config["tuned_on"]))
    trainers = {}
    for kind in KINDS:
        torch.manual_seed(0)
        model = decoder(config, vocab_size)
        trainers[kind] = Trainer(config, model, kind, config["chosen"][kind], config["steps"], 0)
    spent: dict[str, list[float]] = {}
    draws = torch.Generator().manual_seed(0)
    rounds = config["timed_rounds"]
    for _ in range(min(rounds, steps or rounds)):
        window = random_windows(
            text["train"], config["batch_size"], config["max_seq_len"] + 1, generator=draws
        )
        for kind, trainer in trainers.items():
            if kind.startswith("sophia"):
                started = time.process_time()
                trainer.look_at_curvature(window)
                spent.setdefault(f"{kind}'s estimate", []).append(1000 * (time.process_time() - started))
            with _no_estimate(trainer) if kind.startswith("sophia") else nullcontext():
                started = time.process_time()
                loss = trainer.step(window)
                spent.setdefault(kind, []).append(1000 * (time.process_time() - started))
        log(loss, of=rounds)
    if steps is not None:
        return {}
    median = {part: round(statistics.median(times), 2) for part, times in spent.items()}
    each = {
        kind: round(median[kind] + median.get(f"{kind}'s estimate", 0) / config["update_every"], 2)
        for kind in KINDS
    }
    return {"parts": median, "step": each}


class _no_estimate:  # noqa: N801
    """Within it a step of Sophia's makes no estimate of its own."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer

    def __enter__(self) -> None:
        self.trainer.look_at_curvature = lambda window: None

    def __exit__(self, *_: object) -> None:
        del self.trainer.look_at_curvature


def summarise(config: dict, runs: dict) -> dict:
    """For each optimizer: its loss, the steps to AdamW's, what half the steps gave, and what the sweep chose.

    The times stay with their arm: they are this machine's, and no repetition would give them again.
    """
    seeds, every = config["seeds"], config["eval_every"]

    def mean(values: list) -> float:
        return round(sum(values) / len(values), 4)

    curves = {
        kind: [mean(at) for at in zip(*(runs[f"{kind}/seed-{s}"]["curve"] for s in seeds), strict=True)]
        for kind in KINDS
    }
    goal = curves["adamw"][-1]
    raced = {}
    for kind in KINDS:
        losses = [runs[f"{kind}/seed-{s}"]["loss"] for s in seeds]
        against = [loss - runs[f"adamw/seed-{s}"]["loss"] for loss, s in zip(losses, seeds, strict=True)]
        raced[kind] = {
            "loss": mean(losses),
            "spread": round(statistics.stdev(losses), 4),
            "against_adamw": [round(difference, 4) for difference in against],
            "mean_curve": curves[kind],
            "share_of_steps_to_adamw": _first_below(curves[kind], goal, every, config["steps"]),
        }
        if kind.startswith("sophia"):
            probes = [runs[f"{kind}/seed-{s}"]["probes"] for s in seeds]
            raced[kind]["unclipped"] = [
                mean([p["unclipped"] for p in at]) for at in zip(*probes, strict=True)
            ]
    sweep = {
        kind: {_label(one): runs[f"sweep/{kind}/{_label(one)}"]["loss"] for one in config["sweep"][kind]}
        for kind in KINDS
    }
    best = {kind: min((x for x in s if s[x] is not None), key=s.__getitem__) for kind, s in sweep.items()}
    return {
        "raced": raced,
        "half": {kind: [runs[f"half/{kind}/seed-{s}"]["loss"] for s in seeds] for kind in config["halved"]},
        "sweep": sweep,
        "chosen_was_best": {kind: best[kind] == _label(config["chosen"][kind]) for kind in KINDS},
    }


def _first_below(curve: list[float], goal: float, every: int, steps: int) -> float | None:
    """The share of the steps at which the curve, straight between its points, first meets the goal."""
    for i, loss in enumerate(curve):
        if loss <= goal:
            share = 0.0 if i == 0 else (curve[i - 1] - goal) / (curve[i - 1] - loss)
            return round((i + share) * every / steps, 3)
    return None


def _label(settings: list) -> str:
    return ",".join(f"{x:g}" for x in settings)


class Causal(nn.Module):
    """Attention that sees nothing later."""

    def __init__(self, config: dict) -> None:
        super().__init__()
        self.inner = Attention(config["d_model"], config["num_heads"])

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x, causal=True)


def decoder(config: dict, vocab_size: int) -> Decoder:
    """GPT-2's parts on the bench."""
    D = config["d_model"]
    norm = functools.partial(LayerNorm, D, norm_eps=1e-5)
    blocks = [
        Block(
            Residual(Causal(config), norm),
            Residual(FeedForward(D, 4 * D, activation="gelu_tanh"), norm),
        )
        for _ in range(config["num_layers"])
    ]
    positions = LearnedPositions(config["max_seq_len"], D)
    return Decoder(vocab_size, D, blocks, pos_embed=positions, final_norm=norm())


@functools.cache
def corpus(judged: tuple[str, ...], tuned_on: tuple[str, ...]) -> tuple[dict[str, Tensor], int]:
    """The plays that are read, those that judge and those that chose, as character ids, and V."""
    folder = fetch("shakespeare")
    kept = shakespeare_characters(folder, *judged, *tuned_on)
    ids = {character: i for i, character in enumerate(kept.alphabet)}
    texts = {"judged": judged, "tuned_on": tuned_on}
    held = {
        name: torch.tensor([ids[character] for character in shakespeare_text(folder, *plays)])
        for name, plays in texts.items()
    }
    return {"train": kept.train} | held, kept.vocab_size


def next_loss(model: Decoder, window: Tensor) -> Tensor:
    """Cross-entropy of each next character, in nats."""
    return F.cross_entropy(model(window[:, :-1]).flatten(0, 1), window[:, 1:].flatten())
