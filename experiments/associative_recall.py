"""How many pairs does a state remember? Softmax and linear attention of several widths look up keys.

A text is a list of facts, "key k has value v", and then questions, one for each key, in another order. A
decoder of one block with one head learns to answer. The head's width d decides how large the state of
linear attention is, d × d; softmax attention keeps all facts. Every arm of one seed sees the same texts,
with few and many facts by turns, and is then examined for each number of facts.

Book: linear-attention-recall
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from textbook_code.layers.attention import Attention
from textbook_code.layers.feed_forward import FeedForward
from textbook_code.layers.linear_attention import LinearAttention
from textbook_code.layers.norms import LayerNorm
from textbook_code.layers.residual import Residual
from textbook_code.models.text.decoder import Block, Decoder

ABOUT = (
    "A decoder of one block and one head reads pairs of keys and values and is asked for each key's value; "
    "softmax attention of width 8 is compared with linear attention of widths 8, 16, 32 and 64. The learning "
    "rate was chosen among three with a third seed, over a third of the steps, and is the same for all: the "
    "largest that softmax attention bears, at which linear attention of width 64 learns faster than below."
)
CONFIG = {
    "seeds": [0, 1],
    "kinds": {"softmax-8": 8, "linear-8": 8, "linear-16": 16, "linear-32": 32, "linear-64": 64},
    "pairs": [4, 8, 16, 32, 64],
    "num_keys": 64,
    "num_values": 16,
    "d_model": 64,
    "batch_size": 32,
    "steps": 1200,
    "warmup": 50,
    "lr": 1e-2,
    "eval_texts": 64,
}
DATA: list[str] = []
TOLERANCE = {"loss": 1e-3, "results": 0.05}
REPLAY = ["softmax-8/seed-0", "linear-16/seed-0"]


def arms(config: dict) -> list[str]:
    return [f"{kind}/seed-{seed}" for seed in config["seeds"] for kind in config["kinds"]]


class CausalSoftmax(nn.Module):
    """Attention as the bench calls it: with x alone."""

    def __init__(self, attn: Attention) -> None:
        super().__init__()
        self.attn = attn

    def forward(self, x: Tensor) -> Tensor:
        return self.attn(x, causal=True)


def make(config: dict, kind: str) -> Decoder:
    D, d = config["d_model"], config["kinds"][kind]
    if kind.startswith("softmax"):
        attn: nn.Module = CausalSoftmax(Attention(D, 1, head_dim=d))
    else:
        attn = LinearAttention(D, 1, head_dim=d, causal=True)

    def norm() -> LayerNorm:
        return LayerNorm(D, norm_eps=1e-5)

    block = Block(Residual(attn, norm), Residual(FeedForward(D, 2 * D), norm))
    vocab_size = config["num_keys"] * (
        config["num_values"] + 1
    )  # a token for each fact, one for each question
    return Decoder(vocab_size, D, [block], final_norm=norm())


def texts(config: dict, count: int, pairs: int, draws: torch.Generator) -> tuple[Tensor, Tensor]:
    """Facts and questions, (count, 2 · pairs) ids, and the questions' answers, (count, pairs).

    The fact that key k has value v is token k · num_values + v; the question for k is that much behind
    all facts. The answers are values.
    """
    K, V = config["num_keys"], config["num_values"]
    keys = torch.rand(count, K, generator=draws).argsort(-1)[:, :pairs]
    values = torch.randint(V, (count, pairs), generator=draws)
    order = torch.rand(count, pairs, generator=draws).argsort(-1)
    questions = K * V + keys.gather(1, order)
    return torch.cat([keys * V + values, questions], 1), values.gather(1, order)


def answers(model: Decoder, tokens: Tensor, config: dict) -> Tensor:
    """Logits of the values at the questions, (B, pairs, V): those of the facts that have key 0."""
    return model(tokens)[:, tokens.size(1) // 2 :, : config["num_values"]]


def run(config: dict, arm: str, *, steps: int | None = None, log) -> dict:
    """Train one arm; returns the share of right answers for each number of facts."""
    kind, seed = arm.split("/seed-")
    torch.manual_seed(int(seed))
    model = make(config, kind)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config["lr"], betas=(0.9, 0.95), weight_decay=0.01)
    total = config["steps"]
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / config["warmup"], (total - step) / (total - config["warmup"])),
    )
    draws = torch.Generator().manual_seed(int(seed))
    for step in range(min(total, steps or total)):
        pairs = config["pairs"][step % len(config["pairs"])]
        tokens, wanted = texts(config, config["batch_size"], pairs, draws)
        loss = F.cross_entropy(answers(model, tokens, config).flatten(0, 1), wanted.flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        log(loss.item(), of=total)
    if steps is not None:
        return {}
    right = {}
    for pairs in config["pairs"]:
        tokens, wanted = texts(config, config["eval_texts"], pairs, torch.Generator().manual_seed(99))
        with torch.no_grad():
            said = answers(model, tokens, config).argmax(-1)
        right[str(pairs)] = round((said == wanted).float().mean().item(), 4)
    return {"right": right, "parameters": sum(p.numel() for p in model.parameters())}


def summarise(config: dict, runs: dict) -> dict:
    """For each kind, the mean over seeds of the share of right answers, by the number of facts."""
    out = {}
    for kind in config["kinds"]:
        each = [runs[f"{kind}/seed-{seed}"]["right"] for seed in config["seeds"]]
        out[kind] = {n: round(sum(r[n] for r in each) / len(each), 4) for n in map(str, config["pairs"])}
    return out
