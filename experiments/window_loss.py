"""What does a window cost? One decoder learns Shakespeare by the character with windows of several sizes.

Six decoders of three layers with LLaMA's parts differ in how many characters a query sees, from its own and
the one before it to all 128. The arms of one seed see the same batches. The loss is that on plays held out,
at the second half of the positions, where every arm has as much text behind it as it can reach.

Book: local-attention-loss
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from textbook_code.data.sources import fetch
from textbook_code.data.text import random_windows, shakespeare_characters
from textbook_code.layers.feed_forward import GatedFeedForward
from textbook_code.layers.local_attention import LocalAttention
from textbook_code.layers.norms import RMSNorm
from textbook_code.layers.positions import RotaryPositions
from textbook_code.layers.residual import Residual
from textbook_code.models.text.decoder import Block, Decoder
from textbook_code.models.text.llama import swiglu_width

ABOUT = (
    "A three-layer decoder with LLaMA's parts learns Shakespeare by the character, its queries seeing 2, 4, "
    "8, 16, 32 or all 128 characters; the loss is that on plays held out, at positions 64 to 127. The "
    "learning rate is the one that llama_changes uses for these parts; none was tried here."
)
CONFIG = {
    "seeds": [0, 1],
    "windows": [2, 4, 8, 16, 32, 128],
    "held_out": ["hamlet", "macbeth", "tempest"],
    "d_model": 64,
    "num_layers": 3,
    "num_heads": 4,
    "length": 128,
    "batch_size": 12,
    "steps": 360,
    "warmup": 40,
    "lr": 8e-3,
    "weight_decay": 0.01,
    "eval_windows": 256,
}
DATA = ["shakespeare"]
TOLERANCE = {"loss": 1e-3, "results": 0.05}
REPLAY = ["window-4/seed-0", "window-128/seed-1"]


def arms(config: dict) -> list[str]:
    return [f"window-{W}/seed-{seed}" for seed in config["seeds"] for W in config["windows"]]


class Turned(nn.Module):
    """Local attention whose queries and keys are turned by their positions."""

    def __init__(self, config: dict, window: int) -> None:
        super().__init__()
        D, H = config["d_model"], config["num_heads"]
        self.attn = LocalAttention(D, H, window=window, bias=False)
        self.rotary = RotaryPositions(D // H)

    def forward(self, x: Tensor) -> Tensor:
        return self.attn(x, rotary=self.rotary(torch.arange(x.size(1)), x.dtype))


def decoder(config: dict, window: int, vocab_size: int) -> Decoder:
    """The bench with LLaMA's parts and a window."""
    D = config["d_model"]

    def norm() -> RMSNorm:
        return RMSNorm(D)

    blocks = [
        Block(
            Residual(Turned(config, window), norm),
            Residual(GatedFeedForward(D, swiglu_width(D, multiple_of=1)), norm),
        )
        for _ in range(config["num_layers"])
    ]
    return Decoder(vocab_size, D, blocks, final_norm=norm())


def run(config: dict, arm: str, *, steps: int | None = None, log) -> dict:
    """Train one arm; returns the held-out loss of the second half of the positions, nats a character."""
    window, seed = (int(part.split("-")[1]) for part in arm.split("/"))
    T, total = config["length"], config["steps"]
    text = shakespeare_characters(fetch("shakespeare"), *config["held_out"])
    torch.manual_seed(seed)
    model = decoder(config, window, text.vocab_size)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config["lr"], betas=(0.9, 0.95), weight_decay=config["weight_decay"]
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / config["warmup"], (total - step) / (total - config["warmup"])),
    )
    draws = torch.Generator().manual_seed(seed)
    for _ in range(min(total, steps or total)):
        batch = random_windows(text.train, config["batch_size"], T + 1, generator=draws)
        loss = losses(model, batch).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        log(loss.item(), of=total)
    if steps is not None:
        return {}
    examination = random_windows(
        text.held_out, config["eval_windows"], T + 1, generator=torch.Generator().manual_seed(99)
    )
    with torch.no_grad():
        by_position = losses(model, examination).mean(0)  # (T,)
    return {
        "held_out_loss": round(by_position[T // 2 :].mean().item(), 4),
        "parameters": sum(p.numel() for p in model.parameters()),
    }


def summarise(config: dict, runs: dict) -> dict:
    """For each window the mean held-out loss, and by seed how much more it is than with all in view."""
    seeds, widest = config["seeds"], max(config["windows"])
    out = {}
    for W in config["windows"]:
        each = [runs[f"window-{W}/seed-{seed}"]["held_out_loss"] for seed in seeds]
        full = [runs[f"window-{widest}/seed-{seed}"]["held_out_loss"] for seed in seeds]
        out[str(W)] = {
            "loss": round(sum(each) / len(each), 4),
            "more_than_full": [round(loss - f, 4) for loss, f in zip(each, full, strict=True)],
        }
    return {"windows": out}


def losses(model: Decoder, window: Tensor) -> Tensor:
    """(B, T) cross-entropy of each next character, in nats."""
    logits = model(window[:, :-1])
    return F.cross_entropy(logits.transpose(1, 2), window[:, 1:], reduction="none")
