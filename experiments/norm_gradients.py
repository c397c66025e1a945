"""Where the norm stands: gradients by layer, training without a warm-up, and the size of attention's logits.

Decoders of 4 to 48 blocks learn Shakespeare's plays by the character, with the norm in one of four places and
with everything else the same. Three kinds of arms:

- `gradients`: the gradient of each block's matrices on one batch, at the start and after some steps, with
  the size of the residual stream; at the start also with GPT-2's small matrices in place of Glorot's;
- `train`: a learning rate from the first step on, or reached by a warm-up;
- `logits`: attention with its queries and keys normalised or not, at rising learning rates.

Book: norm-record
"""

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from textbook_code.data.sources import fetch
from textbook_code.data.text import Characters, random_windows, shakespeare_characters
from textbook_code.layers.attention import Attention
from textbook_code.layers.feed_forward import FeedForward
from textbook_code.layers.norms import LayerNorm, QKNorm, RMSNorm, UnitNorm
from textbook_code.layers.positions import LearnedPositions
from textbook_code.layers.residual import PLACES, Residual, deepnorm, deepnorm_init_
from textbook_code.models.text.decoder import Block, Decoder

ABOUT = (
    "Decoders of 4 to 48 blocks learn Shakespeare by the character with the norm in four places: the "
    "gradients of each block at the start and after some steps, training with and without a warm-up, and "
    "attention's logits with and without normalised queries and keys. The learning rates of depths 4 and 8 "
    "were chosen by looking at seed 0 of post-norm: at them a warm-up decides. At depth 16 three rates were "
    "tried so, and at none did post-norm learn in this many steps."
)
CONFIG = {
    "seeds": [0, 1],
    "held_out": ["hamlet", "macbeth", "tempest"],
    "d_model": 32,
    "num_heads": 4,
    "max_seq_len": 32,
    "batch_size": 8,
    "depths": [4, 8, 16, 24, 48],
    "gradient_steps": 20,
    "gradient_lr": 1e-3,
    "gradient_windows": 16,
    "steps": 200,
    "warmup": 100,
    "places": ["pre", "post", "deep"],
    "lrs": {"4": 1e-2, "8": 3e-3, "16": 1e-3},
    "warm_only": ["16"],
    "logit_depth": 4,
    "logit_lrs": [1e-2, 3e-2, 1e-1],
    "logit_steps": 100,
    "eval_windows": 256,
    "eval_every": 50,
}
DATA = ["shakespeare"]
TOLERANCE = {"loss": 1e-3, "results": 0.3}
REPLAY = ["gradients/post/4/seed-0", "train/deep/4/0.01/cold/seed-0", "logits/unit/0.01/seed-0"]
QK = ("none", "rms", "unit")


def arms(config: dict) -> list[str]:
    names = []
    for seed in config["seeds"]:
        names += [f"gradients/{place}/{L}/seed-{seed}" for L in config["depths"] for place in PLACES]
        names += [f"train/{kind}/seed-{seed}" for kind in trained(config)]
        names += [f"logits/{kind}/{lr}/seed-{seed}" for lr in config["logit_lrs"] for kind in QK]
    return names


def trained(config: dict) -> list[str]:
    """Place, depth, learning rate and start of the decoders that are trained."""
    return [
        f"{place}/{L}/{lr}/{start}"
        for L, lr in config["lrs"].items()
        for place in config["places"]
        for start in (("warm",) if L in config["warm_only"] else ("cold", "warm"))
    ]


class Causal(nn.Module):
    """Attention that looks at no later position; it can keep the largest logit that it saw."""

    def __init__(self, config: dict, qk: str = "none") -> None:
        super().__init__()
        D, H, T = config["d_model"], config["num_heads"], config["max_seq_len"]
        Dh = D // H
        norm = {
            "none": lambda: None,
            "rms": lambda: QKNorm(RMSNorm(Dh), RMSNorm(Dh)),
            "unit": lambda: QKNorm(UnitNorm(scale=math.log2(T * T - T)), UnitNorm()),
        }[qk]()
        self.inner = Attention(D, H, qk_norm=norm, scale=1.0 if qk == "unit" else None)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x, causal=True)

    @torch.no_grad()
    def largest_logit(self, x: Tensor) -> float:
        """The largest absolute score of a query and a key that it may see."""
        attn, T = self.inner, x.size(1)
        q, k = (p(x).unflatten(-1, (-1, attn.head_dim)).transpose(1, 2) for p in (attn.q_proj, attn.k_proj))
        if attn.qk_norm is not None:
            q, k = attn.qk_norm(q, k)
        scores = q @ k.transpose(-2, -1) * (attn.head_dim**-0.5 if attn.scale is None else attn.scale)
        return scores.abs().masked_fill(torch.ones(T, T).triu(1).bool(), 0).max().item()


def make(config: dict, place: str, depth: int, vocab_size: int, *, qk: str = "none") -> Decoder:
    """A decoder drawn from Glorot's normal distribution, with DeepNorm's gain in DeepNorm's place."""
    D = config["d_model"]
    norm = functools.partial(LayerNorm, D)
    alpha, beta = deepnorm(depth) if place == "deep" else (1.0, 1.0)
    blocks = [
        Block(
            Residual(Causal(config, qk), norm, place=place, alpha=alpha),
            Residual(FeedForward(D, 4 * D), norm, place=place, alpha=alpha),
        )
        for _ in range(depth)
    ]
    last = norm() if place in ("pre", "sandwich") else None  # the others end with one
    model = Decoder(
        vocab_size, D, blocks, pos_embed=LearnedPositions(config["max_seq_len"], D), final_norm=last
    )
    for table in (model.token_embed.weight, model.pos_embed.weight):
        nn.init.normal_(table, std=D**-0.5)
    deepnorm_init_(model.blocks, beta)
    return model


def run(config: dict, arm: str, *, steps: int | None = None, log) -> dict:
    kind, *rest, seed = arm.split("/")
    number = int(seed.removeprefix("seed-"))
    return {"gradients": gradients, "train": train, "logits": logits}[kind](
        config, *rest, seed=number, steps=steps, log=log
    )


def gradients(config: dict, place: str, depth: str, *, seed: int, steps: int | None, log) -> dict:
    """Measure at the start, train some steps, measure again."""
    data = corpus(*config["held_out"])
    torch.manual_seed(seed)
    model = make(config, place, int(depth), data.vocab_size)
    batch = random_windows(
        data.train,
        config["gradient_windows"],
        config["max_seq_len"] + 1,
        generator=torch.Generator().manual_seed(99),
    )
    start = measure(model, batch)
    total = config["gradient_steps"]
    fit(config, model, data, config["gradient_lr"], 0, total, seed=seed, steps=steps, log=log)
    if steps is not None:
        return {}
    later = measure(model, batch)
    torch.manual_seed(seed)
    model.reset_parameters()
    return {"start": start, "later": later, "small_start": measure(model, batch)}


def measure(model: Decoder, batch: Tensor) -> dict:
    """Of one batch, by block: the gradient norm of the second feed-forward matrix and of the stream that
    leaves the block, and that stream's root mean square."""
    streams: list[Tensor] = []

    def keep(module: nn.Module, inputs: tuple, output: Tensor) -> None:
        output.retain_grad()
        streams.append(output)

    hooks = [block.register_forward_hook(keep) for block in model.blocks]
    model.zero_grad()
    loss = next_loss(model, batch)
    loss.backward()
    for hook in hooks:
        hook.remove()
    return {
        "loss": digits(loss.item()),
        "matrix": [digits(block.ffn.branch.fc2.weight.grad.norm().item()) for block in model.blocks],
        "stream": [digits(x.grad.norm().item()) for x in streams],
        "size": [digits(x.detach().square().mean().sqrt().item()) for x in streams],
    }


def train(
    config: dict, place: str, depth: str, lr: str, start: str, *, seed: int, steps: int | None, log
) -> dict:
    """Train with the learning rate at once (cold), or reached in steps (warm)."""
    data = corpus(*config["held_out"])
    torch.manual_seed(seed)
    model = make(config, place, int(depth), data.vocab_size)
    warmup = config["warmup"] if start == "warm" else 0
    curve = fit(config, model, data, float(lr), warmup, config["steps"], seed=seed, steps=steps, log=log)
    return {} if steps is not None else {"held_out_curve": curve, "held_out_loss": curve[-1]}


def logits(config: dict, qk: str, lr: str, *, seed: int, steps: int | None, log) -> dict:
    """Train pre-norm without a warm-up, and note the largest logit of attention at each look."""
    data = corpus(*config["held_out"])
    torch.manual_seed(seed)
    model = make(config, "pre", config["logit_depth"], data.vocab_size, qk=qk)
    largest: list[float] = []
    total = config["logit_steps"]
    curve = fit(config, model, data, float(lr), 0, total, seed=seed, steps=steps, log=log, largest=largest)
    return {} if steps is not None else {"held_out_curve": curve, "largest_logit": largest}


def fit(
    config: dict,
    model: Decoder,
    data: Characters,
    lr: float,
    warmup: int,
    total: int,
    *,
    seed: int,
    steps: int | None,
    log,
    largest: list[float] | None = None,
) -> list[float]:
    """Train for `total` steps; returns the held-out loss at every `eval_every`-th step, in nats."""
    T = config["max_seq_len"]
    optimizer = torch.optim.Adam(model.parameters(), lr=lr, betas=(0.9, 0.98), eps=1e-9)
    draws = torch.Generator().manual_seed(seed)
    examination = random_windows(
        data.held_out, config["eval_windows"], T + 1, generator=torch.Generator().manual_seed(99)
    )
    curve = []
    for step in range(min(total, steps or total)):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / warmup) if warmup else lr
        window = random_windows(data.train, config["batch_size"], T + 1, generator=draws)
        loss = next_loss(model, window)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        log(loss.item(), of=total)
        if (step + 1) % config["eval_every"] == 0:
            with torch.no_grad():
                curve.append(digits(next_loss(model, examination).item()))
                if largest is not None:
                    largest.append(digits(max_logit(model, examination[:32, :-1])))
    return curve


def max_logit(model: Decoder, tokens: Tensor) -> float:
    """The largest absolute logit of attention in any layer."""
    seen = []
    hooks = [
        block.attn.branch.register_forward_hook(lambda m, inputs, _: seen.append(m.largest_logit(inputs[0])))
        for block in model.blocks
    ]
    model(tokens)
    for hook in hooks:
        hook.remove()
    return max(seen)


def summarise(config: dict, runs: dict) -> dict:
    """First block's gradient over the last one's, final losses, largest logits, over the seeds."""
    seeds = config["seeds"]

    def mean(values: list[float]) -> float:
        return round(sum(values) / len(values), 4)

    ratios: dict[str, dict] = {}
    for what in ("start", "later", "small_start"):
        ratios[what] = {
            place: {
                str(L): mean(
                    [
                        math.log10(g[0] / g[-1])
                        for g in (runs[f"gradients/{place}/{L}/seed-{s}"][what]["matrix"] for s in seeds)
                    ]
                )
                for L in config["depths"]
            }
            for place in PLACES
        }
    losses = {
        kind: [runs[f"train/{kind}/seed-{s}"]["held_out_loss"] for s in seeds] for kind in trained(config)
    }
    qk = {
        f"{kind}/{lr}": {
            "loss": [runs[f"logits/{kind}/{lr}/seed-{s}"]["held_out_curve"][-1] for s in seeds],
            "log10_largest": [
                round(math.log10(max(runs[f"logits/{kind}/{lr}/seed-{s}"]["largest_logit"])), 2)
                for s in seeds
            ],
        }
        for lr in config["logit_lrs"]
        for kind in QK
    }
    counts = corpus(*config["held_out"])
    return {
        "log10_first_over_last": ratios,
        "losses": losses,
        "logits": qk,
        "frequencies_alone": digits(unigram_loss(counts)),
    }


def unigram_loss(data: Characters) -> float:
    """Held-out loss of the characters' frequencies, in nats: what a model knows that reads no context."""
    counts = torch.bincount(data.train, minlength=data.vocab_size).double() + 1
    return F.cross_entropy((counts / counts.sum()).log().expand(len(data.held_out), -1), data.held_out).item()


def digits(value: float) -> float:
    """Five significant digits."""
    return float(f"{value:.5g}")


@functools.cache
def corpus(*held_out: str) -> Characters:
    """The plays as characters."""
    return shakespeare_characters(fetch("shakespeare"), *held_out)


def next_loss(model: Decoder, window: Tensor) -> Tensor:
    """Cross-entropy of each next character, in nats."""
    return F.cross_entropy(model(window[:, :-1]).flatten(0, 1), window[:, 1:].flatten())
