"""How long does a token take? SmolLM2 reads a real text token by token, behind a growing cache.

Each step must fetch every weight and the whole cache from memory, so its time is predicted to be

    seconds(n) = (bytes of the weights + n · bytes of the cache for one position) / bandwidth.

The bandwidth is not taken from a data sheet. It is what this machine reaches with the model's own matrices:
every 64 steps all of them are multiplied by a vector and nothing else is done, and the median of these times
is taken, so that what else the machine has to do falls on both sides alike. In the same places a second model
is timed, with as many layers but so narrow that it has next to nothing to fetch: what it takes is the price
of giving a thousand small orders. All times are of the processor, on one thread.

The text is the beginning of the BBC's articles, one after the other; the loss of each step is that of the
token that comes next. No setting was tuned.

Book: generate-roofline
"""

import statistics
import time
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from textbook_code.data.sources import fetch
from textbook_code.data.text import bbc_news, load_tokenizer
from textbook_code.models.text.llama import LlamaForCausalLM

ABOUT = (
    "SmolLM2 reads 1,024 tokens one by one behind its cache, in float32 and in bfloat16. The time of each "
    "step is set beside the bytes it must fetch, divided by the bandwidth that the same machine reaches, in "
    "between, with the model's matrices alone."
)
CONFIG = {"seeds": [0], "steps": 1024, "every": 64, "dtypes": ["float32", "bfloat16"], "narrow": 24}
DATA = ["smollm2", "bbc-news"]
TOLERANCE = {"loss": 1e-3, "results": 0.35}
REPLAY = ["float32"]


def arms(config: dict) -> list[str]:
    return config["dtypes"]


@torch.inference_mode()
def run(config: dict, arm: str, *, steps: int | None = None, log) -> dict:
    """Times of the steps, medians of each stretch of 64; of the matrices alone; of the narrow model."""
    dtype = getattr(torch, arm)
    folder = fetch("smollm2")
    model = LlamaForCausalLM.from_pretrained(folder).to(dtype).eval()
    tokens, total = text(folder, config["steps"] + 1), config["steps"]
    cache, little = model.make_cache(1, total), narrow(model, config["narrow"])
    seconds, alone, orders = [], [], []
    for n in range(total if steps is None else steps):
        if n % config["every"] == 0:
            alone.append(timed(lambda: multiply(model)))
            orders.append(
                timed(lambda: little(tokens[:, :1] % 64, cache=little.make_cache(1, 8), num_logits=1))
            )
            seconds.append([])
        started = time.process_time()
        logits = model(tokens[:, n : n + 1], cache=cache, num_logits=1)
        seconds[-1].append(time.process_time() - started)
        log(F.cross_entropy(logits[:, -1].float(), tokens[:, n + 1]), of=total)
    if steps is not None:
        return {}
    one = cache[0].k[:, :, :1]
    return {
        "weight_bytes": sum(p.numel() * p.element_size() for p in matrices(model)),
        "cache_bytes": 2 * len(cache) * one.numel() * one.element_size(),
        "step_seconds": [round(statistics.median(some), 6) for some in seconds],
        "matrices_seconds": [round(some, 6) for some in alone],
        "orders_seconds": [round(some, 6) for some in orders],
    }


def summarise(config: dict, runs: dict) -> dict:
    """Measured ÷ predicted, without and with the price of the orders, in each stretch and at its worst."""
    out = {}
    for arm, result in runs.items():
        plain, priced = predicted(config, result)
        ratios = [s / p for s, p in zip(result["step_seconds"], plain, strict=True)]
        with_orders = [s / p for s, p in zip(result["step_seconds"], priced, strict=True)]
        out[arm] = {
            "ratio": round(statistics.median(ratios), 3),
            "ratio_with_orders": round(statistics.median(with_orders), 3),
            "worst_with_orders": round(max(with_orders, key=lambda ratio: abs(ratio - 1)), 3),
        }
    return out


def bandwidth(result: dict) -> float:
    """Bytes a second that the machine reaches with the model's matrices alone."""
    return result["weight_bytes"] / statistics.median(result["matrices_seconds"])


def predicted(config: dict, result: dict) -> tuple[list[float], list[float]]:
    """Seconds of a step in the middle of each stretch: bytes by bandwidth; the same and the orders."""
    middles = [(i + 0.5) * config["every"] for i in range(len(result["step_seconds"]))]
    plain = [(result["weight_bytes"] + n * result["cache_bytes"]) / bandwidth(result) for n in middles]
    orders = statistics.median(result["orders_seconds"])
    return plain, [seconds + orders for seconds in plain]


def text(folder, length: int) -> Tensor:
    """The first tokens of the articles, (1, length)."""
    tokenizer, ids = load_tokenizer(folder), []
    for article, _ in bbc_news(fetch("bbc-news")):
        ids += tokenizer.encode(article).ids
        if len(ids) >= length:
            return torch.tensor([ids[:length]])
    raise ValueError(f"length: expected at most {len(ids)}, got {length}")


def matrices(model: nn.Module) -> list[Tensor]:
    """What a step multiplies by: all matrices; the table once, as the output layer."""
    return [p for p in model.parameters() if p.dim() == 2]


def multiply(model: nn.Module) -> None:
    for weight in matrices(model):
        F.linear(weight.new_ones(1, 1, weight.size(1)), weight)


def narrow(model: LlamaForCausalLM, head_dim: int) -> nn.Module:
    """A model of as many layers and heads with next to no weights."""
    ours = model.config
    config = replace(ours, vocab_size=64, d_model=head_dim, head_dim=head_dim, d_ff=head_dim)
    return LlamaForCausalLM(config).to(model.llama.token_embed.weight.dtype).eval()


def timed(work) -> float:
    work()
    started = time.process_time()
    work()
    return time.process_time() - started
