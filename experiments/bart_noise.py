"""What does a noise teach? A small BART restores words, trained on one kind of damage, examined on both.

The words are those of Shakespeare's plays, letter by letter. One arm loses letters without a trace (token
deletion), the other finds one mask for each lost span (text infilling). Both are examined on words that
neither has read, damaged in both ways. Width and step size were settled on one short run of one arm.

Book: bart-denoise
"""

import re

import torch
import torch.nn.functional as F
from torch import Tensor

from textbook_code.data.sources import fetch
from textbook_code.data.text import shakespeare_text
from textbook_code.inference.generate import generate
from textbook_code.models.text.bart import BartConfig, BartForConditionalGeneration
from textbook_code.training.noising import text_infilling, token_deletion

ABOUT = (
    "A small BART learns to restore words of Shakespeare's, letter by letter, from deletion or from "
    "infilling, and is examined on words that it has not read, damaged in either way."
)
CONFIG = {
    "seeds": [0, 1],
    "shortest": 5,
    "longest": 12,
    "held_out": 600,
    "rate": 0.2,
    "mean_span": 2.0,
    "d_model": 64,
    "num_layers": 2,
    "num_heads": 4,
    "d_ff": 192,
    "batch_size": 64,
    "steps": 800,
    "warmup": 100,
    "lr": 3e-3,
    "weight_decay": 0.01,
}
DATA = ["shakespeare"]
TOLERANCE = {"loss": 1e-3, "results": 0.1}
REPLAY = ["infilling/seed-0", "deletion/seed-0"]
BOS, PAD, EOS, MASK, FIRST = 0, 1, 2, 3, 4  # as in the published vocabulary, then the letters
IGNORE = -100
LETTERS = "abcdefghijklmnopqrstuvwxyz"
KINDS = ("infilling", "deletion")


def arms(config: dict) -> list[str]:
    return [f"{kind}/seed-{seed}" for seed in config["seeds"] for kind in KINDS]


def run(config: dict, arm: str, *, steps: int | None = None, log) -> dict:
    """Train one arm; returns the share of held-out words that it restores, for each kind of damage."""
    model = trained(config, arm, steps=steps, log=log)
    if steps is not None:
        return {}
    _, held_out = words(config)
    shares, shown = {}, {}
    for kind in KINDS:
        draws = torch.Generator().manual_seed(99)
        damaged = [damage(word, kind, config, draws) for word in held_out]
        restored = restore(model, config, damaged)
        right = [a == b for a, b in zip(restored, held_out, strict=True)]
        shares[kind] = "".join("01"[r] for r in right)
        shown[kind] = [list(row) for row in zip(map(spelled, damaged), restored, held_out, strict=True)][:12]
    return {
        "right": shares,
        "shown": shown,
        "parameters": sum(p.numel() for p in model.parameters()),
    }


def trained(config: dict, arm: str, *, steps: int | None = None, log) -> BartForConditionalGeneration:
    kind, seed = arm.split("/seed-")
    read, _ = words(config)
    torch.manual_seed(int(seed))
    model = make_model(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config["lr"], weight_decay=config["weight_decay"])
    total = config["steps"]
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / config["warmup"], (total - step) / (total - config["warmup"])),
    )
    draws = torch.Generator().manual_seed(int(seed))
    for _ in range(min(total, steps or total)):
        picks = torch.randint(len(read), (config["batch_size"],), generator=draws).tolist()
        tokens = padded([[BOS, *damage(read[i], kind, config, draws), EOS] for i in picks], PAD)
        labels = padded([[BOS, *ids(read[i]), EOS] for i in picks], IGNORE)
        logits = model.train()(tokens, model.shift_right(labels), token_mask=tokens != PAD)  # (B, T, V)
        loss = F.cross_entropy(logits.mT, labels, ignore_index=IGNORE)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        log(loss.item(), of=total)
    return model.eval()


def words(config: dict) -> tuple[list[str], list[str]]:
    """Words to read and words held out, each of them once, in an order drawn at random."""
    text = shakespeare_text(fetch("shakespeare"))
    pattern = rf"\b[a-z]{{{config['shortest']},{config['longest']}}}\b"
    found = sorted(set(re.findall(pattern, text)))
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(3)).tolist()
    mixed = [found[i] for i in order]
    return mixed[config["held_out"] :], mixed[: config["held_out"]]


def ids(word: str) -> list[int]:
    return [FIRST + LETTERS.index(letter) for letter in word]


def spelled(row: list[int]) -> str:
    """Letters, and `_` for each mask."""
    return "".join("_" if i == MASK else LETTERS[i - FIRST] for i in row if i >= MASK)


def damage(word: str, kind: str, config: dict, draws: torch.Generator) -> list[int]:
    tokens = torch.tensor(ids(word))
    if kind == "deletion":
        return token_deletion(tokens, rate=config["rate"], generator=draws).tolist()
    return text_infilling(
        tokens, mask_id=MASK, rate=config["rate"], mean_span=config["mean_span"], generator=draws
    ).tolist()


def make_model(config: dict) -> BartForConditionalGeneration:
    return BartForConditionalGeneration(
        BartConfig(
            vocab_size=FIRST + len(LETTERS),
            d_model=config["d_model"],
            num_encoder_layers=config["num_layers"],
            num_decoder_layers=config["num_layers"],
            num_heads=config["num_heads"],
            d_ff=config["d_ff"],
            max_seq_len=2 * config["longest"],
            dropout=0.0,
            attn_dropout=0.0,
            ffn_dropout=0.0,
        )
    )


def padded(rows: list[list[int]], fill: int) -> Tensor:
    longest = max(map(len, rows))
    return torch.tensor([row + [fill] * (longest - len(row)) for row in rows])


def restore(model: BartForConditionalGeneration, config: dict, damaged: list[list[int]]) -> list[str]:
    """The words that the model writes, greedily."""
    tokens = padded([[BOS, *row, EOS] for row in damaged], PAD)
    out = generate(
        model,
        tokens,
        token_mask=tokens != PAD,
        max_new_tokens=config["longest"] + 4,
        stop_tokens=(EOS,),
        pad_id=PAD,
    )
    return [spelled(row) for row in out.tolist()]


def summarise(config: dict, runs: dict) -> dict:
    """Shares of restored words, with 95 % intervals from a bootstrap over words, and of those left intact."""
    _, held_out = words(config)
    picks = torch.randint(len(held_out), (2000, len(held_out)), generator=torch.Generator().manual_seed(5))

    def right(trained_on: str, kind: str) -> Tensor:
        rows = [runs[f"{trained_on}/seed-{seed}"]["right"][kind] for seed in config["seeds"]]
        return torch.tensor([[float(c) for c in row] for row in rows]).mean(0)

    def interval(values: Tensor) -> dict[str, float]:
        low, high = torch.quantile(values[picks].mean(1), torch.tensor([0.025, 0.975])).tolist()
        return {"mean": round(values.mean().item(), 4), "low": round(low, 4), "high": round(high, 4)}

    intact = {}
    for kind in KINDS:
        draws = torch.Generator().manual_seed(99)
        copies = [spelled(damage(word, kind, config, draws)).replace("_", "") for word in held_out]
        same = sum(a == b for a, b in zip(copies, held_out, strict=True))
        intact[kind] = round(same / len(held_out), 4)
    first = runs[f"{KINDS[0]}/seed-{config['seeds'][0]}"]
    return {
        "parameters": first["parameters"],
        "words": {"read": len(words(config)[0]), "held_out": len(held_out)},
        "right": {a: {b: interval(right(a, b)) for b in KINDS} for a in KINDS},
        "copying": intact,
        "own_noise_gain": {
            kind: interval(right(kind, kind) - right(other, kind))
            for kind, other in (KINDS, tuple(reversed(KINDS)))
        },
    }
