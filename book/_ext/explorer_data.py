"""What the attention explorer reads: MiniLM in 8 bits, its attention to a few sentences, and a still figure.

A page opened as a file may not ``fetch`` anything, so the data are scripts that call
``attentionModel.receive``. Each is read when it is needed:

    manifest        sizes, examples, and how far 8 bits move the weights
    example-N       attention to one example, from the model in 32 bits
    vocab           the word pieces
    embed           positions and the norm after them
    pieces-N        1,024 rows of the token table
    layer-N-look    queries and keys of a layer, all that its own picture needs
    layer-N-pass    the rest of the layer, which the next one needs
"""

from __future__ import annotations

import base64
import json
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from textbook_code.data.text import encode
from textbook_code.models.text.bert import Bert

EXAMPLES = (
    "she sat on the bank of the river",
    "he opened an account at the bank",
    "the dog bit the man",
    "the man bit the dog",
    "the trophy did not fit in the suitcase because it was too big",
    "the trophy did not fit in the suitcase because it was too small",
    "the keys to the old cabinet are on the table",
    "a good tokenizer splits heteroscedasticity into pieces",
)
START = {"layer": 0, "head": 4, "word": "bank"}  # what the still shows and the explorer opens with
MAX_TOKENS = 32
ROWS = 1024  # of the token table in one file
GROUP = 64  # weights that share a scale


# ---------------------------------------------------------------- numbers as text


def quantise(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Round a matrix to 8 bits, each group of GROUP neighbours in a row with a scale of its own.

    Returns:
        values in -127 … 127, (rows, groups, GROUP), and scales, (rows, groups, 1): their product is near
        the weight.
    """
    groups = weight.view(len(weight), -1, GROUP)
    scale = groups.abs().amax(-1, keepdim=True) / 127
    scale[scale == 0] = 1
    return (groups / scale).round().to(torch.int8), scale


def _text(numbers: Tensor | np.ndarray, kind: str) -> str:
    return base64.b64encode(np.ascontiguousarray(numbers, dtype=kind).tobytes()).decode()


def _floats(numbers: Tensor) -> str:
    return _text(numbers, "<f4")


def _matrix(weight: Tensor) -> dict[str, Any]:
    values, scale = quantise(weight)
    return {
        "rows": weight.shape[0],
        "cols": weight.shape[1],
        "scale": _floats(scale),
        "values": _text(values, "i1"),
    }


def _linear(layer: torch.nn.Linear) -> dict[str, Any]:
    return {**_matrix(layer.weight), "bias": _floats(layer.bias)}


def _norm(norm: torch.nn.Module) -> dict[str, str]:
    return {"weight": _floats(norm.weight), "bias": _floats(norm.bias)}


# ---------------------------------------------------------------- the model and what it says


def read(model: Bert, tokenizer: Any, sentence: str) -> tuple[list[str], Tensor]:
    """The word pieces of a sentence, and all its attention weights, (layers, heads, T, T)."""
    batch = encode(tokenizer, [sentence], max_seq_len=MAX_TOKENS)
    _, weights = model(batch.tokens, need_weights=True)
    return [tokenizer.id_to_token(i) for i in batch.tokens[0].tolist()], torch.stack(weights)[:, 0]


def rounded(folder: Path) -> Bert:
    """The model as the browser has it: the token table and every linear map in 8 bits."""
    model = Bert.from_pretrained(folder)
    for name, weight in model.named_parameters():
        if weight.ndim == 2 and not name.startswith(("pos_embed", "segment_embed", "pooler")):
            values, scale = quantise(weight)
            weight.copy_((scale * values).view_as(weight))
    return model


def payloads(folder: Path, tokenizer: Any) -> dict[str, Any]:
    """Everything that is written, by file name without its ending."""
    with torch.no_grad():
        model = Bert.from_pretrained(folder)
        config = model.config
        readings = [read(model, tokenizer, sentence) for sentence in EXAMPLES]
        coarse = rounded(folder)
        apart = torch.cat(
            [
                (read(coarse, tokenizer, sentence)[1] - weights).abs().flatten()
                for sentence, (_, weights) in zip(EXAMPLES, readings, strict=True)
            ]
        )
        files: dict[str, Any] = {
            f"example-{i}": _text((weights * 65535).round(), "<u2") for i, (_, weights) in enumerate(readings)
        }
        table = model.token_embed.weight
        for start in range(0, len(table), ROWS):
            files[f"pieces-{start // ROWS}"] = _matrix(table[start : start + ROWS])
        files["vocab"] = "\n".join(tokenizer.id_to_token(i) for i in range(len(table)))
        files["embed"] = {
            "places": _floats(model.pos_embed.weight[:MAX_TOKENS] + model.segment_embed.weight[0]),
            "norm": _norm(model.embed_norm),
        }
        for i, block in enumerate(model.blocks):
            files[f"layer-{i}-look"] = {"q": _linear(block.attn.q_proj), "k": _linear(block.attn.k_proj)}
            if i + 1 < config.num_layers:
                files[f"layer-{i}-pass"] = {
                    "v": _linear(block.attn.v_proj),
                    "out": _linear(block.attn.out_proj),
                    "attn_norm": _norm(block.attn_norm),
                    "fc1": _linear(block.ffn.fc1),
                    "fc2": _linear(block.ffn.fc2),
                    "ffn_norm": _norm(block.ffn_norm),
                }
    words, _ = readings[0]
    files["manifest"] = {
        "layers": config.num_layers,
        "heads": config.num_heads,
        "width": config.d_model,
        "eps": config.norm_eps,
        "maxTokens": MAX_TOKENS,
        "rows": ROWS,
        "group": GROUP,
        "start": {"layer": START["layer"], "head": START["head"], "token": words.index(START["word"])},
        "examples": [
            {"text": text, "tokens": tokens} for text, (tokens, _) in zip(EXAMPLES, readings, strict=True)
        ],
        "bytes": {name: len(_script(name, payload)) for name, payload in files.items()},
        "error": {"largest": apart.max().item(), "mean": apart.mean().item(), "sentences": len(EXAMPLES)},
    }
    return files


# ---------------------------------------------------------------- files


def _script(name: str, payload: Any) -> str:
    """A script of ASCII only, so that its length is its size and its encoding cannot be mistaken."""
    return f"attentionModel.receive({json.dumps(name)}, {json.dumps(payload)});\n"


def write(folder: Path, tokenizer: Any, target: Path) -> None:
    """Write ``target/data/*.js``, ``target/still.svg`` and ``target/still.pdf``: all of them or none."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as name:
        work = Path(name) / "new"
        (work / "data").mkdir(parents=True)
        for file, payload in payloads(folder, tokenizer).items():
            (work / "data" / f"{file}.js").write_text(_script(file, payload), "ascii")
        with torch.no_grad():
            words, weights = read(Bert.from_pretrained(folder), tokenizer, EXAMPLES[0])
        still(words, weights, (work / "still.svg", work / "still.pdf"))
        if target.exists():
            shutil.rmtree(target)
        work.replace(target)


def still(words: Sequence[str], weights: Tensor, paths: Sequence[Path]) -> None:
    """Draw all heads, and the one that the explorer opens with, as vectors."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt
    from matplotlib.patches import Rectangle

    from textbook_code.figures import ORANGE, SEQUENTIAL, use_style

    layers, heads, T, _ = weights.shape
    with plt.rc_context():
        use_style()
        fig, (left, right) = plt.subplots(
            1, 2, figsize=(7.6, 2.9), layout="constrained", gridspec_kw={"width_ratios": [1.75, 1]}
        )
        # side by side with a gap; square root, as on screen, because most weights are small
        sheet = np.full((layers * (T + 1) - 1, heads * (T + 1) - 1), np.nan)
        for at in range(layers):
            for head in range(heads):
                y, x = at * (T + 1), head * (T + 1)
                sheet[y : y + T, x : x + T] = weights[at, head].sqrt()
        colours = matplotlib.colormaps[SEQUENTIAL].with_extremes(bad="white")
        left.imshow(colours(np.ma.masked_invalid(sheet))[..., :3], interpolation="none")
        at, head = int(START["layer"]), int(START["head"])
        corner = (head * (T + 1) - 1.5, at * (T + 1) - 1.5)
        left.add_patch(
            Rectangle(corner, T + 2, T + 2, fill=False, edgecolor=ORANGE, linewidth=1.6, clip_on=False)
        )
        left.set(xlabel="head", ylabel="layer")
        left.set_xticks(np.arange(heads) * (T + 1) + T / 2, range(heads))
        left.set_yticks(np.arange(layers) * (T + 1) + T / 2, range(layers))
        right.imshow(weights[at, head].sqrt(), cmap=SEQUENTIAL, vmin=0, vmax=1, interpolation="none")
        right.set(title=f"layer {at}, head {head}")
        right.set_xticks(range(T), words, rotation=60, ha="right", rotation_mode="anchor")
        right.set_yticks(range(T), words)
        for ax in (left, right):
            ax.grid(False)
            ax.tick_params(length=0)
            ax.spines[:].set_visible(False)
        for path in paths:
            fig.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else {"CreationDate": None})
        plt.close(fig)
