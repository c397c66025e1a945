"""From GPT-2's block to LLaMA's, one change at a time: what does each do to the loss, and what does it cost?

Five small decoders learn the next character of Shakespeare's plays. The first has GPT-2's parts; three have
one part of LLaMA's instead: RMSNorm for LayerNorm, a gated SwiGLU layer of as many parameters for the GELU
layer, rotary positions for learned ones; the last has all three and no biases. The arms of one seed see the
same batches. A further arm times a training step of each, in turns.

Book: llama-changes
"""

import functools
import statistics
import time

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from textbook_code.data.sources import fetch
from textbook_code.data.text import shakespeare_plays, shakespeare_text
from textbook_code.layers.attention import Attention
from textbook_code.layers.embeddings import TokenEmbedding
from textbook_code.layers.feed_forward import FeedForward, GatedFeedForward
from textbook_code.layers.norms import LayerNorm, RMSNorm
from textbook_code.layers.positions import LearnedPositions, RotaryPositions
from textbook_code.models.text.llama import swiglu_width

ABOUT = (
    "A three-layer decoder learns Shakespeare by the character with GPT-2's parts, with one part of LLaMA's "
    "at a time, and with all of them; the loss is that on plays held out. The learning rate was chosen among "
    "three on GPT-2's parts over a quarter of the steps, and is the same for all."
)
CONFIG = {
    "seeds": [0, 1],
    "held_out": ["hamlet", "macbeth", "tempest"],
    "d_model": 64,
    "num_layers": 3,
    "num_heads": 4,
    "max_seq_len": 64,
    "batch_size": 24,
    "steps": 500,
    "warmup": 50,
    "lr": 8e-3,
    "weight_decay": 0.01,
    "eval_every": 125,
    "eval_windows": 512,
    "timed_rounds": 60,
}
DATA = ["shakespeare"]
TOLERANCE = {"loss": 1e-3, "results": 0.05}
REPLAY = ["gpt2/seed-0", "all/seed-0"]
KINDS = ("gpt2", "rmsnorm", "swiglu", "rope", "all")


def arms(config: dict) -> list[str]:
    return [f"{kind}/seed-{seed}" for seed in config["seeds"] for kind in KINDS] + ["step-time"]


class Block(nn.Module):
    """A pre-norm block of either make."""

    def __init__(self, config: dict, kind: str) -> None:
        super().__init__()
        D, bias = config["d_model"], kind != "all"
        norm = RMSNorm if kind in ("rmsnorm", "all") else functools.partial(LayerNorm, norm_eps=1e-5)
        self.attn_norm, self.ffn_norm = norm(D), norm(D)
        self.attn = Attention(D, config["num_heads"], bias=bias)
        if kind in ("swiglu", "all"):
            self.ffn = GatedFeedForward(D, swiglu_width(D, multiple_of=1), bias=bias)
        else:
            self.ffn = FeedForward(D, 4 * D, activation="gelu_tanh")

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor] | None) -> Tensor:
        x = x + self.attn(self.attn_norm(x), causal=True, rotary=rotary)
        return x + self.ffn(self.ffn_norm(x))


class Decoder(nn.Module):
    """A tied decoder of either make, drawn from N(0, 0.02²), its residual branches smaller, as GPT-2's."""

    def __init__(self, config: dict, kind: str, vocab_size: int) -> None:
        super().__init__()
        D, layers = config["d_model"], config["num_layers"]
        self.token_embed = TokenEmbedding(vocab_size, D)
        turned = kind in ("rope", "all")
        self.rotary = RotaryPositions(D // config["num_heads"]) if turned else None
        self.pos_embed = None if turned else LearnedPositions(config["max_seq_len"], D)
        self.blocks = nn.ModuleList(Block(config, kind) for _ in range(layers))
        self.final_norm = RMSNorm(D) if kind in ("rmsnorm", "all") else LayerNorm(D, norm_eps=1e-5)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding | LearnedPositions):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        for name, p in self.named_parameters():
            if name.endswith(("out_proj.weight", "fc2.weight", "down_proj.weight")):
                nn.init.normal_(p, std=0.02 / (2 * layers) ** 0.5)

    def forward(self, tokens: Tensor) -> Tensor:
        T = tokens.size(1)
        x, rotary = self.token_embed(tokens), None
        if self.pos_embed is not None:
            x = x + self.pos_embed(T)
        if self.rotary is not None:
            rotary = self.rotary(torch.arange(T), x.dtype)
        for block in self.blocks:
            x = block(x, rotary)
        return self.token_embed.attend(self.final_norm(x))


def run(config: dict, arm: str, *, steps: int | None = None, log) -> dict:
    """Train one arm; returns the held-out loss at every `eval_every`-th step, in nats a character."""
    if arm == "step-time":
        return step_times(config, steps=steps, log=log)
    kind, seed = arm.split("/seed-")
    T, total = config["max_seq_len"], config["steps"]
    train, held_out, vocab_size = corpus(*config["held_out"])
    torch.manual_seed(int(seed))
    model = Decoder(config, kind, vocab_size)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config["lr"], betas=(0.9, 0.95), weight_decay=config["weight_decay"]
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / config["warmup"], (total - step) / (total - config["warmup"])),
    )
    draws = torch.Generator().manual_seed(int(seed))
    examination = windows(held_out, config["eval_windows"], T, torch.Generator().manual_seed(99))
    curve = []
    for step in range(min(total, steps or total)):
        loss = next_loss(model, windows(train, config["batch_size"], T, draws))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        log(loss.item(), of=total)
        if (step + 1) % config["eval_every"] == 0:
            with torch.no_grad():
                curve.append(round(next_loss(model, examination).item(), 4))
    if steps is not None:
        return {}
    return {
        "held_out_curve": curve,
        "held_out_loss": curve[-1],
        "parameters": sum(p.numel() for p in model.parameters()),
    }


def step_times(config: dict, *, steps: int | None, log) -> dict:
    """CPU milliseconds of a training step of each kind: the median over rounds in which all take turns."""
    train, _, vocab_size = corpus(*config["held_out"])
    torch.manual_seed(0)
    models = {kind: Decoder(config, kind, vocab_size) for kind in KINDS}
    optimizers = {kind: torch.optim.AdamW(model.parameters(), lr=1e-4) for kind, model in models.items()}
    spent: dict[str, list[float]] = {kind: [] for kind in KINDS}
    draws = torch.Generator().manual_seed(0)
    for _ in range(min(config["timed_rounds"], steps or config["timed_rounds"])):
        batch = windows(train, config["batch_size"], config["max_seq_len"], draws)
        for kind, model in models.items():
            started = time.process_time()
            loss = next_loss(model, batch)
            optimizers[kind].zero_grad()
            loss.backward()
            optimizers[kind].step()
            spent[kind].append(1000 * (time.process_time() - started))
        log(loss.item(), of=config["timed_rounds"])
    return {kind: round(statistics.median(times), 2) for kind, times in spent.items()}


def summarise(config: dict, runs: dict) -> dict:
    """For each kind: the mean held-out loss, its difference from GPT-2's by seed, and the parameters.

    The times stay with their arm: they are this machine's, and no repetition would give them again.
    """
    seeds = config["seeds"]
    out: dict[str, dict] = {}
    for kind in KINDS:
        losses = [runs[f"{kind}/seed-{seed}"]["held_out_loss"] for seed in seeds]
        base = [runs[f"gpt2/seed-{seed}"]["held_out_loss"] for seed in seeds]
        out[kind] = {
            "loss": round(sum(losses) / len(losses), 4),
            "change_of_each_seed": [round(loss - b, 4) for loss, b in zip(losses, base, strict=True)],
            "change": round((sum(losses) - sum(base)) / len(seeds), 4),
        }
    return {
        "kinds": out,
        "parameters": {kind: runs[f"{kind}/seed-{seeds[0]}"]["parameters"] for kind in KINDS},
    }


@functools.cache
def corpus(*held_out: str) -> tuple[Tensor, Tensor, int]:
    """The plays as character ids, read ones and held-out ones, and V."""
    folder = fetch("shakespeare")
    read = [play for play in shakespeare_plays(folder) if play not in held_out]
    texts = shakespeare_text(folder, *read), shakespeare_text(folder, *held_out)
    ids = {character: i for i, character in enumerate(sorted(set(texts[0] + texts[1])))}
    train, test = (torch.tensor([ids[character] for character in text]) for text in texts)
    return train, test, len(ids)


def windows(text: Tensor, count: int, T: int, draws: torch.Generator) -> Tensor:
    """`count` random windows of T + 1 characters, (count, T + 1)."""
    starts = torch.randint(len(text) - T - 1, (count, 1), generator=draws)
    return text[starts + torch.arange(T + 1)]


def next_loss(model: Decoder, window: Tensor) -> Tensor:
    """Cross-entropy of each next character, in nats."""
    return F.cross_entropy(model(window[:, :-1]).flatten(0, 1), window[:, 1:].flatten())
